"""Make the embedded codes: a stock VQModel out of the embedded autoencoder, 64 x 64 images to 8 x 8 of 512 codes.

    python -m training.embedded.vq --vae assets/teacher/vae --out assets/ar/vqvae

The encoder is the autoencoder's own. Its codes are k-means centres of what it says of scenes, most of them of patches
where an edge runs, because those differ and plain ones hardly do. The decoder then learns to paint from codes: L1 + 0.5
MSE, as it learnt before. Codes have mean 0 and variance 1 by coordinate over scenes, as the noise has they are mapped from.

`--partial` keeps a file to go on from; the length is given in steps, so a seed gives the same weights on one machine.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill import scenes
from stepdistill.ema import EMA
from stepdistill.errors import atomic_write
from training.embedded import common
from training.embedded.progress import Progress

CODES = 512
# Grey levels within a patch from which an edge runs through it.
EDGE = 24
# Patches k-means sees, with an edge and without.
SEEN = 40_000, 5_000
# Rounds of k-means.
ROUNDS = 30


def build(vae: nn.Module, moments: tuple[Tensor, Tensor]) -> nn.Module:
    """A VQModel with the weights of an AutoencoderKL, its codes yet unset.

    moments: mean and standard deviation (4,) of the latents' means, which codes leave out.
    """
    from diffusers import VQModel

    shared = ("down_block_types", "up_block_types", "block_out_channels", "layers_per_block")
    dims = vae.config.latent_channels
    model = VQModel(
        **{name: vae.config[name] for name in shared},
        latent_channels=2 * dims,
        sample_size=64,
        num_vq_embeddings=CODES,
        norm_num_groups=vae.config.norm_num_groups,
        vq_embed_dim=dims,
        mid_block_add_attention=False,
    )
    mean, std = moments
    weights = vae.state_dict()
    # The mean is the first half of what the encoder says, and codes are what is left of it once standardised.
    taken = weights["quant_conv.weight"][:dims] / std[:, None, None, None]
    weights |= {
        "quant_conv.weight": taken,
        "quant_conv.bias": (weights["quant_conv.bias"][:dims] - mean) / std,
    }
    back = weights["post_quant_conv.weight"][:, :, 0, 0]
    bias = weights["post_quant_conv.bias"] + back @ mean
    # The decoder's second half of channels hears nothing at first.
    padded = torch.cat((back * std, torch.zeros_like(back)))
    weights |= {"post_quant_conv.weight": padded[..., None, None]}
    weights |= {"post_quant_conv.bias": torch.cat((bias, torch.zeros_like(bias)))}
    entry = weights["decoder.conv_in.weight"]
    weights |= {"decoder.conv_in.weight": torch.cat((entry, torch.zeros_like(entry)), 1)}
    weights |= {"quantize.embedding.weight": model.quantize.embedding.weight.detach()}
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def latents_of(model: nn.Module, images: Tensor) -> Tensor:
    """What the encoder says (N, 8, 8, D) of uint8 images (N, 3, 64, 64), before it is rounded to codes."""
    parts = [model.encode(common.to_unit(part)).latents for part in images.split(64)]
    return torch.cat(parts).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
def codes_of(model: nn.Module, images: Tensor) -> Tensor:
    """The code (N, 64), a number below CODES, of each patch of uint8 images, row by row."""
    latents, book = latents_of(model, images), model.quantize.embedding.weight
    return torch.cat([torch.cdist(part.flatten(1, 2), book).argmin(-1) for part in latents.split(256)])


def decode(model: nn.Module, codes: Tensor) -> Tensor:
    """Images (N, 3, 64, 64) in about [-1, 1] of codes (N, 64)."""
    vectors = model.quantize.embedding.weight.detach()[codes].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    return model.decode(vectors, force_not_quantize=True).sample


def edges(images: Tensor) -> Tensor:
    """Whether an edge runs through each 8 x 8 patch of uint8 images: (N, 8, 8) bool."""
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).flatten(-2).float()
    return (patches.amax(-1) - patches.amin(-1)).amax(1) > EDGE


def k_means(points: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """`count` centres (count, D) of points (N, D); one that has no points left begins anew at one of them."""
    centres = points[torch.randperm(len(points), generator=draw)[:count]].clone()
    for _ in range(ROUNDS):
        nearest = torch.cdist(points, centres).argmin(1)
        held = torch.bincount(nearest, minlength=count)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        strays = points[torch.randint(len(points), (count,), generator=draw)]
        centres = torch.where(held > 0, sums / held.clamp(min=1), strays)
    return centres


def set_codes(model: nn.Module, images: Tensor, draw: torch.Generator) -> None:
    """Put k-means centres of these images' patches into the codebook, standardised by how often each is used."""
    points, edged = latents_of(model, images).flatten(0, 2), edges(images).flatten()
    kept = [
        group[torch.randperm(len(group), generator=draw)[:most]]
        for group, most in ((points[edged], SEEN[0]), (points[~edged], SEEN[1]))
    ]
    model.quantize.embedding.weight.data = k_means(torch.cat(kept), CODES, draw)


def train(args: argparse.Namespace) -> None:
    """Train, save, measure; see the module's docstring."""
    from diffusers import AutoencoderKL

    started = logged = time.monotonic()
    common.prepare(args.threads, args.seed)
    draw = torch.Generator().manual_seed(args.seed)
    _, pool = common.scene_pool(args.pool, seed=args.seed)
    vae = AutoencoderKL.from_pretrained(args.vae, dtype=torch.float32)
    raw = build(vae, (torch.zeros(vae.config.latent_channels), torch.ones(vae.config.latent_channels)))
    seen = latents_of(raw, pool[:1024]).flatten(0, 2)
    model = build(vae, (seen.mean(0), seen.std(0)))
    set_codes(model, pool[:2048], draw)
    codes = codes_of(model, pool)
    learnt = nn.ModuleList((model.post_quant_conv, model.decoder))
    average = EMA(model, 0.998)
    optimizer = torch.optim.AdamW(learnt.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = common.warmup_and_cosine(optimizer, args.steps, 100)
    progress = Progress(args.partial, model, average, optimizer, schedule)
    for step in range(progress.begin(), args.stop or args.steps):
        draw.manual_seed(args.seed + step)
        indices = torch.randint(len(pool), (args.batch,), generator=draw)
        images = common.to_unit(pool[indices])
        with torch.autocast("cpu", torch.bfloat16):
            decoded = decode(model, codes[indices]).float()
        loss = F.l1_loss(decoded, images) + 0.5 * F.mse_loss(decoded, images)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learnt.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update(model)
        if time.monotonic() - logged > 30:
            logged = time.monotonic()
            progress.keep(step + 1)
            print(
                f"{logged - started:6.0f} s  step {step + 1}/{args.steps}  loss {loss.item():.4f}", flush=True
            )
    average.put(model)
    finish(model, args, started)


def finish(model: nn.Module, args: argparse.Namespace, started: float) -> None:
    """Save in half precision, and report on what was written."""
    out = Path(args.out)
    with atomic_write(out) as temporary:
        copy.deepcopy(model).half().save_pretrained(temporary)
    reread = type(model).from_pretrained(out, dtype=torch.float32)
    drawn, images = common.scene_pool(256, seed=scenes.HELD_OUT_SEED)
    codes = codes_of(reread, images)
    with torch.no_grad():
        painted = torch.cat([common.to_uint8(decode(reread, part)) for part in codes.split(32)])
    used = torch.bincount(codes.flatten(), minlength=CODES).double() / codes.numel()
    common.write_report(
        out / "training.json",
        started,
        command=common.command(__spec__.name, args, ("vae", "steps", "stop", "lr", "seed")),
        steps=args.steps,
        psnr=round(common.psnr(painted, images), 2),
        checker=common.checker_accuracy(painted, drawn),
        codes_used=int((used > 0).sum()),
        perplexity=round(float(torch.special.entr(used).sum().exp()), 1),
        parameters=sum(p.numel() for p in model.parameters()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vae", required=True, help="directory of the AutoencoderKL it is made from")
    parser.add_argument("--out", required=True, help="directory for the VQModel")
    parser.add_argument(
        "--stop", type=int, default=0, help="leave the schedule of --steps at this step; 0 = at its end"
    )
    common.loop_options(parser, 1500, 16, 1e-3, 4096, "images kept in memory")
    common.asked(parser, train)


if __name__ == "__main__":
    main()
