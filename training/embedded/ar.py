"""Train the embedded autoregressive teacher: a transformer over the codes of captioned scenes.

    python -m training.embedded.ar --vqvae assets/ar/vqvae --text assets/teacher --out assets/ar

It learns log p(code | codes before it, caption) by cross-entropy, with one caption in ten left out, which is what
guidance needs. Scenes are drawn once and coded; the length is given in steps, so a seed gives the same weights on one
machine. `--partial` keeps a file to go on from.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill import scenes
from stepdistill.ema import EMA
from stepdistill.errors import atomic_write
from stepdistill.families import autoregressive
from stepdistill.families.code_transformer import CodeShape, CodeTransformer
from training.embedded import common
from training.embedded.progress import Progress
from training.embedded.vq import codes_of

# Share of captions left out.
DROPPED = 0.1
# Behind the data set's own images: those that only measure the loss.
HELD_OUT = 512


def lesson(args: argparse.Namespace, model: nn.Module, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Codes (count, 64) and caption states (count, L, W), in half precision, of the first scenes of a data set."""
    codes, told = [], []
    words = autoregressive.Captions.read(Path(args.text))
    for start in range(0, count, 512):
        drawn = [scenes.image_at(i, seed) for i in range(start, min(start + 512, count))]
        images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for _, image in drawn])
        with torch.autocast("cpu", torch.bfloat16):
            codes.append(codes_of(model, images))
        told.append(words([scene.caption for scene, _ in drawn]).half())
    return torch.cat(codes), torch.cat(told)


def train(args: argparse.Namespace) -> None:
    """Train, save, measure; see the module's docstring."""
    from diffusers import VQModel

    started = logged = time.monotonic()
    common.prepare(args.threads, args.seed)
    model = VQModel.from_pretrained(args.vqvae, dtype=torch.float32)
    codes, told = lesson(args, model, args.pool, args.seed)
    held = lesson(args, model, HELD_OUT, scenes.HELD_OUT_SEED)
    empty = autoregressive.Captions.read(Path(args.text))([""])[0]
    print(f"{time.monotonic() - started:6.0f} s  {len(codes)} scenes coded", flush=True)
    book = model.quantize.embedding.weight.detach()
    if args.init:
        network = autoregressive.read_network(Path(args.init))
    else:
        network = CodeTransformer(CodeShape(len(book), book.shape[1], codes.shape[1]))
    network.book.copy_(book)
    average = EMA(network, 0.998)
    decayed = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    schedule = common.warmup_and_cosine(optimizer, args.steps, 100)
    progress = Progress(args.partial, network, average, optimizer, schedule)
    draw = torch.Generator()
    for step in range(progress.begin(), args.steps):
        draw.manual_seed(args.seed + step)
        rows = torch.randint(len(codes), (args.batch,), generator=draw)
        dropped = torch.rand(args.batch, 1, 1, generator=draw) < DROPPED
        text = torch.where(dropped, empty, told[rows].float())
        loss = F.cross_entropy(network.logits(codes[rows], text).flatten(0, 1), codes[rows].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update(network)
        if time.monotonic() - logged > 30:
            logged = time.monotonic()
            progress.keep(step + 1)
            with average.applied(network):
                ahead = held_loss(network, *held)
            place = f"{logged - started:6.0f} s  step {step + 1}/{args.steps}"
            print(f"{place}  nats {loss.item():.4f}  held out {ahead:.4f}", flush=True)
    average.put(network)
    finish(network, held, args, started)


@torch.no_grad()
def held_loss(network: CodeTransformer, codes: Tensor, told: Tensor) -> float:
    """Nats per code of scenes that were not learnt from."""
    logits = network.logits(codes[:128], told[:128].float())
    return F.cross_entropy(logits.flatten(0, 1), codes[:128].flatten()).item()


def finish(
    network: CodeTransformer, held: tuple[Tensor, Tensor], args: argparse.Namespace, started: float
) -> None:
    """Write the pipeline directory around the network, in half precision, and report on it."""
    out, text = Path(args.out), Path(args.text)
    for part in autoregressive.TEXT_PARTS:
        with atomic_write(out / part) as temporary:
            shutil.copytree(text / part, temporary)
    autoregressive.write_network(network.half(), out / autoregressive.NETWORK)
    autoregressive.write_index(out)
    reread = autoregressive.read_network(out)
    common.write_report(
        out / autoregressive.NETWORK / "training.json",
        started,
        command=common.command(__spec__.name, args, ("init", "vqvae", "text", "steps", "pool", "lr", "seed")),
        steps=args.steps,
        nats_per_code=round(held_loss(reread, *held), 4),
        parameters=sum(p.numel() for p in network.parameters()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vqvae", required=True, help="directory of the VQModel")
    parser.add_argument("--text", required=True, help="pipeline directory with text_encoder and tokenizer")
    parser.add_argument("--out", required=True, help="pipeline directory to write")
    parser.add_argument("--init", default="", help="pipeline directory whose network is gone on with")
    common.loop_options(parser, 3000, 16, 2e-3, 8192, "scenes that are coded once")
    common.asked(parser, train)


if __name__ == "__main__":
    main()
