"""Train the embedded teacher's autoencoder: a stock AutoencoderKL, 64 x 64 images to 8 x 8 x 4 latents.

    python -m training.embedded.vae --out assets/teacher/vae

The first 70 % of the steps see random 32 x 32 crops, a quarter of the work of a full image for nearly the
same lesson; the rest see full images, for what depends on the frame. The loss is L1 + 0.5 MSE with a KL
weight of 1e-6 (a larger one is what keeps a small VAE blurred). The length is given in steps, so a seed gives
the same weights on the same machine.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill import scenes
from stepdistill.ema import EMA
from stepdistill.errors import atomic_write
from training.embedded import common

# Share of the steps on crops.
CROPS = 0.7
# Their side in pixels.
CROP = 32
# Weight of the KL divergence, summed over a latent and averaged over the images.
KL = 1e-6


def build() -> nn.Module:
    """A fresh AutoencoderKL with 0.9 M parameters."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def loss_of(vae: nn.Module, images: Tensor) -> Tensor:
    """L1 + 0.5 MSE + KL of images (B, 3, H, W) in [-1, 1]."""
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample()).sample.float()
    return F.l1_loss(decoded, images) + 0.5 * F.mse_loss(decoded, images) + KL * posterior.kl().mean()


def crops(images: Tensor, where: torch.Generator) -> Tensor:
    """One random CROP x CROP window of every image (B, C, H, W)."""
    tops = torch.randint(images.shape[2] - CROP + 1, (len(images),), generator=where).tolist()
    lefts = torch.randint(images.shape[3] - CROP + 1, (len(images),), generator=where).tolist()
    places = zip(images, tops, lefts, strict=True)
    return torch.stack([image[:, top : top + CROP, left : left + CROP] for image, top, left in places])


@torch.no_grad()
def latents_of(vae: nn.Module, images: Tensor) -> Tensor:
    """Means of the latents (N, 4, 8, 8) of uint8 images (N, 3, 64, 64)."""
    return torch.cat([vae.encode(common.to_unit(part)).latent_dist.mean for part in images.split(32)])


@torch.no_grad()
def reconstruct(vae: nn.Module, images: Tensor) -> Tensor:
    """uint8 images decoded from the means of their latents."""
    return torch.cat([common.to_uint8(vae.decode(part).sample) for part in latents_of(vae, images).split(32)])


def save(vae: nn.Module, out: Path) -> None:
    """Write the weights in half precision, as `from_pretrained` reads them; the module itself stays as it is."""
    with atomic_write(out) as temporary:
        copy.deepcopy(vae).half().save_pretrained(temporary)


def train(args: argparse.Namespace) -> None:
    """Train, save, measure; see the module's docstring."""
    started = logged = saved = time.monotonic()
    common.prepare(args.threads, args.seed)
    _, pool = common.scene_pool(args.pool, seed=args.seed)
    held_out, held_images = common.scene_pool(256, seed=scenes.HELD_OUT_SEED)
    vae = type(build()).from_pretrained(args.init, dtype=torch.float32) if args.init else build()
    average = EMA(vae, 0.998)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = common.warmup_and_cosine(optimizer, args.steps, args.warmup)
    draw = torch.Generator().manual_seed(args.seed)
    for step in range(args.stop or args.steps):
        small = step < CROPS * args.steps
        indices = torch.randint(len(pool), (args.batch if small else args.full_batch,), generator=draw)
        images = common.to_unit(crops(pool[indices], draw) if small else pool[indices])
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32):
            loss = loss_of(vae, images)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update(vae)
        if time.monotonic() - logged > 60:
            logged = time.monotonic()
            with average.applied(vae):
                score = common.psnr(reconstruct(vae, held_images[:48]), held_images[:48])
            place = f"{logged - started:6.0f} s  step {step + 1}/{args.steps}"
            print(f"{place}  loss {loss.item():.4f}  psnr {score:.2f}", flush=True)
        if args.partial and time.monotonic() - saved > 300:
            saved = time.monotonic()
            with average.applied(vae):
                _scale(vae, pool[:256])
                save(vae, Path(args.partial))
    average.put(vae)
    _finish(vae, pool, held_out, held_images, args, started)


def _finish(
    vae: nn.Module,
    pool: Tensor,
    held_out: Sequence[scenes.Scene],
    held_images: Tensor,
    args: argparse.Namespace,
    started: float,
) -> None:
    """Save the autoencoder and report on what was written, which is in half precision."""
    deviation = _scale(vae, pool)
    save(vae, Path(args.out))
    reread = type(vae).from_pretrained(args.out)
    reconstructed = reconstruct(reread, held_images)
    common.write_report(
        Path(args.out) / "training.json",
        started,
        command=common.command(__spec__.name, args, ("init", "steps", "stop", "lr", "seed")),
        steps=args.steps,
        psnr=round(common.psnr(reconstructed, held_images), 2),
        checker=common.checker_accuracy(reconstructed, held_out),
        latent_std=round(deviation, 4),
        parameters=sum(p.numel() for p in vae.parameters()),
    )


def _scale(vae: nn.Module, images: Tensor) -> float:
    """Set the scaling factor so that latents have unit variance; returns their standard deviation before."""
    deviation = latents_of(vae, images[:1024]).std().item()
    vae.register_to_config(scaling_factor=round(1 / deviation, 5))
    return deviation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="directory for the autoencoder")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument(
        "--stop", type=int, default=0, help="leave the schedule of --steps at this step; 0 = at its end"
    )
    parser.add_argument("--init", default="", help="directory of an autoencoder to start from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="crops per step")
    parser.add_argument("--full-batch", type=int, default=8, help="images per step, once they are full")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--pool", type=int, default=8192, help="images kept in memory")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 in the network passes")
    parser.add_argument("--partial", default="", help="directory that receives a copy every five minutes")
    common.asked(parser, train, ("steps", "threads", "batch", "full_batch", "pool", "warmup"))


if __name__ == "__main__":
    main()
