"""Train a tiny decoder for the embedded autoencoder: the decoder is most of what an image of one step costs.

    python -m training.embedded.decoder --out assets/tiny_decoder

It is a stock AutoencoderTiny, whose encoder is a stub that was never trained: it takes latents and gives images. What it
learns is what the large decoder makes of latents of drawn scenes, half of them with a little noise as students leave it;
the loss is L1 + 0.5 MSE, for three quarters of the steps on crops.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill import assets, scenes
from stepdistill.ema import EMA
from stepdistill.errors import atomic_write
from training.embedded import common
from training.embedded.vae import latents_of

# Share of the steps on crops, and their side in latents.
CROPS, CROP = 0.75, 4
# Standard deviation of the noise, in units of the latents'.
NOISE = 0.1
NOTE = "decoder only: the encoder was never trained"


def build() -> nn.Module:
    """A fresh AutoencoderTiny; its decoder has 84 thousand parameters."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(4, 4, 4, 4),
        num_encoder_blocks=(1, 1, 1, 1),
        decoder_block_out_channels=(16, 16, 16, 16),
        num_decoder_blocks=(4, 4, 2, 1),
        latent_channels=4,
        upsampling_scaling_factor=2,
    )


@torch.no_grad()
def lessons(vae: nn.Module, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Latents as pipelines hold them (N, 4, 8, 8), and what `vae` makes of them, uint8 (N, 3, 64, 64)."""
    z = latents_of(vae, images) * vae.config.scaling_factor
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
    noise[::2] = 0
    z = z + NOISE * noise
    return z, torch.cat([decoded(vae, part) for part in z.split(32)])


@torch.no_grad()
def decoded(vae: nn.Module, z: Tensor) -> Tensor:
    """uint8 images of latents as pipelines hold them."""
    return common.to_uint8(vae.decode(z / vae.config.scaling_factor).sample)


def train(args: argparse.Namespace) -> None:
    """Train, save, measure."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    started = time.monotonic()
    common.prepare(args.threads, args.seed)
    large = AutoencoderKL.from_pretrained(assets.path("teacher") / "vae").float().eval()
    _, images = common.scene_pool(args.pool, seed=args.seed)
    z, targets = lessons(large, images, args.seed)
    tiny = AutoencoderTiny.from_pretrained(args.init).float().train() if args.init else build()
    tiny.encoder.requires_grad_(False)
    average = EMA(tiny, 0.998)
    optimizer = torch.optim.AdamW(tiny.decoder.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = common.warmup_and_cosine(optimizer, args.steps, args.warmup)
    draw = torch.Generator().manual_seed(args.seed)
    for step in range(args.steps):
        small = step < CROPS * args.steps
        rows = torch.randint(len(z), (args.batch if small else args.batch // 4,), generator=draw)
        given, wanted = z[rows], targets[rows]
        if small:
            # One window for all: what differs is where the objects are.
            top, left = torch.randint(8 - CROP + 1, (2,), generator=draw).tolist()
            given = given[..., top : top + CROP, left : left + CROP]
            wanted = wanted[..., 8 * top : 8 * (top + CROP), 8 * left : 8 * (left + CROP)]
        made, wanted = tiny.decode(given).sample, common.to_unit(wanted)
        loss = F.l1_loss(made, wanted) + 0.5 * F.mse_loss(made, wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(tiny.decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update(tiny)
        if step % 250 == 0:
            print(f"{time.monotonic() - started:6.0f} s  step {step}  loss {loss.item():.4f}", flush=True)
    average.put(tiny)
    with atomic_write(args.out) as temporary:
        tiny.half().save_pretrained(temporary)
    _report(large, AutoencoderTiny.from_pretrained(args.out).eval(), args, started)


def _report(large: nn.Module, tiny: nn.Module, args: argparse.Namespace, started: float) -> None:
    """On held-out scenes, from the file: likeness to the images and to the large decoder, attributes read back, time."""
    drawn, images = common.scene_pool(256, seed=scenes.HELD_OUT_SEED)
    z = latents_of(large, images) * large.config.scaling_factor
    shown = {name: torch.cat([decoded(vae, part) for part in z.split(32)]) for name, vae in
             (("large", large), ("tiny", tiny))}  # fmt: skip
    common.write_report(
        args.out / "training.json",
        started,
        note=NOTE,
        command=common.command(__spec__.name, args, ("out", "init", "steps", "pool", "lr", "seed")),
        psnr={name: round(common.psnr(each, images), 2) for name, each in shown.items()},
        psnr_between=round(common.psnr(shown["tiny"], shown["large"]), 2),
        checker={name: common.checker_accuracy(each, drawn)["all"] for name, each in shown.items()},
        milliseconds=_times({"large": large, "tiny": tiny}, z[:1]),
        parameters={name: sum(p.numel() for p in vae.decoder.parameters())
                    for name, vae in (("large", large), ("tiny", tiny))},
    )  # fmt: skip


@torch.no_grad()
def _times(decoders: dict[str, nn.Module], z: Tensor, turns: int = 41) -> dict[str, float]:
    """CPU milliseconds of one image, median of turns, the decoders one after another in each."""
    found: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(turns):
        for name, vae in decoders.items():
            begun = time.process_time()
            vae.decode(z)
            found[name].append(1e3 * (time.process_time() - begun))
    return {name: round(sorted(values)[turns // 2], 2) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for the decoder")
    parser.add_argument("--init", default="", help="directory of a tiny decoder to start from")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--batch", type=int, default=32, help="crops per step; full images are a quarter as many"
    )
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--pool", type=int, default=1536, help="images kept in memory")
    common.asked(parser, train, ("steps", "threads", "batch", "pool", "warmup"))


if __name__ == "__main__":
    main()
