"""Train a feature net: on scenes for the embedded metrics, or on any labelled Parquet file.

    python -m training.embedded.features --data scenes --out assets/scenes-v1
    python -m training.embedded.features --data parquet --path train.parquet --name cifar10-v1 --out runs/cifar10-v1

Scenes ask eight questions at once (shape, colour and size of each object, relation, background); a Parquet
file asks for its labels, and is read as the data source `parquet` reads it. The length is given in steps, so a
seed gives the same weights on the same machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stepdistill import scenes
from stepdistill.errors import UserError, cli_errors
from training.embedded import common

if TYPE_CHECKING:
    from evaluation.feature_net import FeatureNet

DIM = 128
# Share of a Parquet file's images that only measure.
HELD_OUT = 0.1
STEPS = {"scenes": 2500, "parquet": 4500}


@dataclass(frozen=True)
class Lesson:
    """What to learn: images, uint8 (N, 3, H, W), and the right answers (N, questions), drawn and held out.

    Attributes:
        resolution: side of the images in pixels.
        labels: the possible answers by question.
        draw: batch size -> a training batch.
    """

    resolution: int
    labels: dict[str, list[str]]
    draw: Callable[[int], tuple[Tensor, Tensor]]
    held_out: tuple[Tensor, Tensor]


def scene_lesson(seed: int) -> Lesson:
    """Scenes without end for training, 1,024 of the evaluation's seed to measure with."""
    rng = np.random.default_rng(seed)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        drawn = [scenes.sample_scene(rng) for _ in range(count)]
        pixels = np.stack([scenes.render(scene, rng) for scene in drawn])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return weathered(images, rng), torch.tensor([common.answers(scene) for scene in drawn])

    held, images = common.scene_pool(1024, seed=scenes.HELD_OUT_SEED)
    truth = torch.tensor([common.answers(scene) for scene in held])
    labels = {question: list(choices) for question, choices in common.QUESTIONS.items()}
    return Lesson(64, labels, draw, (images, truth))


def weathered(images: Tensor, rng: np.random.Generator) -> Tensor:
    """uint8 images, half of them a little noisy or blurred.

    A net that has only seen clean renders leaves its range at the faintest noise, and a distance on its features then
    measures nothing else: without this, noise of 10 grey levels cost 4,000 times what the renders' own spread does.
    """
    pixels = images.float()
    count = len(images)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.from_numpy(rng.random((count, 1, 1, 1)) * (rng.random((count, 1, 1, 1)) < 0.3)).float()
    level = torch.from_numpy(16 * rng.random((count, 1, 1, 1)) * (rng.random((count, 1, 1, 1)) < 0.4)).float()
    noise = torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))
    return (pixels.lerp(blurred, share) + level * noise).round().clamp(0, 255).to(torch.uint8)


def parquet_lesson(path: str, resolution: int, seed: int) -> Lesson:
    """Images and labels of a Parquet file; training batches are mirrored and shifted at random.

    Raises:
        UserError: the file is missing, or has no images or no `label`, or fewer than 20 images.
    """
    from torchvision.transforms.v2 import functional as transform

    images, labels, names = read_parquet(path, resolution)
    draw_from = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=draw_from)
    held, kept = order[: int(HELD_OUT * len(order))], order[int(HELD_OUT * len(order)) :]
    shift = resolution // 8

    def draw(count: int) -> tuple[Tensor, Tensor]:
        chosen = kept[torch.randint(len(kept), (count,), generator=draw_from)]
        padded = transform.pad(images[chosen], [shift] * 4, padding_mode="reflect")
        offsets = torch.randint(2 * shift + 1, (count, 2), generator=draw_from).tolist()
        mirrored = (torch.rand(count, generator=draw_from) < 0.5).tolist()
        batch = []
        for image, (top, left), flip in zip(padded, offsets, mirrored, strict=True):
            image = transform.crop(image, top, left, resolution, resolution)
            batch.append(transform.horizontal_flip(image) if flip else image)
        return torch.stack(batch), labels[chosen, None]

    return Lesson(resolution, {"label": names}, draw, (images[held], labels[held, None]))


def read_parquet(path: str, resolution: int) -> tuple[Tensor, Tensor, list[str]]:
    """Images uint8 (N, 3, resolution, resolution), labels (N,) and their names; what cannot be used is left out.

    Raises:
        UserError: see `parquet_lesson`.
    """
    from training.data.parquet import Parquet

    try:
        source = Parquet(Parquet.Config(path=Path(path), resolution=resolution, memory_gb=1024))
    except UserError as error:
        raise UserError(f"--path {path} cannot be used: {error}") from None
    if source.labels is None:
        raise UserError(f"--path {path} has no column label; a feature net learns to tell labels.")
    if source.size < 20:
        raise UserError(f"--path {path} holds {source.size} images; a feature net needs at least 20.")
    images = torch.from_numpy(source.images(range(source.size))).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(source.labels), list(source.class_names)


def loss_of(net: FeatureNet, images: Tensor, truth: Tensor) -> Tensor:
    """Mean cross-entropy over the questions."""
    logits = net.logits(net(images))
    return torch.stack([F.cross_entropy(part, truth[:, k]) for k, part in enumerate(logits.values())]).mean()


@torch.no_grad()
def accuracy(net: FeatureNet, images: Tensor, truth: Tensor) -> dict[str, float]:
    """Share of right answers to each question, and to all of them together."""
    training = net.training
    net.eval()
    chosen = []
    for part in images.split(256):
        chosen.append(torch.stack([logits.argmax(1) for logits in net.logits(net(part)).values()], 1))
    net.train(training)
    right = torch.cat(chosen) == truth
    each = {question: round(right[:, k].float().mean().item(), 4) for k, question in enumerate(net.labels)}
    return each | {"all": round(right.all(1).float().mean().item(), 4)}


def train(args: argparse.Namespace) -> None:
    """Train, save, measure; see the module's docstring."""
    from evaluation.feature_net import FeatureNet

    started = logged = time.monotonic()
    common.prepare(args.threads, args.seed)
    parquet = args.data == "parquet"
    lesson = parquet_lesson(args.path, args.resolution, args.seed) if parquet else scene_lesson(args.seed)
    steps = args.steps or STEPS[args.data]
    net = FeatureNet(args.name, lesson.resolution, DIM, lesson.labels)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = common.warmup_and_cosine(optimizer, steps, args.warmup)
    for step in range(steps):
        images, truth = lesson.draw(args.batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32):
            loss = loss_of(net, images, truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if time.monotonic() - logged > 60:
            logged = time.monotonic()
            scores = accuracy(net, lesson.held_out[0][:512], lesson.held_out[1][:512])
            place = f"{logged - started:6.0f} s  step {step + 1}/{steps}"
            print(f"{place}  loss {loss.item():.4f}  {scores}", flush=True)
    net.save(args.out)
    # Measured is what was written, in half precision.
    reread = FeatureNet.load(args.out)
    common.write_report(
        Path(args.out) / "training.json",
        started,
        command=f"python -m training.embedded.features --data {args.data} --name {args.name} --steps {steps} "
        f"--seed {args.seed}",
        steps=steps,
        batch=args.batch,
        held_out=accuracy(reread, *lesson.held_out),
        parameters=sum(p.numel() for p in net.parameters()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=("scenes", "parquet"), required=True)
    parser.add_argument("--path", default="", help="the Parquet file")
    parser.add_argument("--name", default="scenes-v1", help="what metrics call the net")
    parser.add_argument("--out", required=True, help="directory for the net")
    parser.add_argument("--resolution", type=int, default=32, help="side of a Parquet file's images")
    parser.add_argument("--steps", type=int, default=0, help=f"0 means {STEPS}")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 in the network passes")
    args = parser.parse_args()
    with cli_errors():
        for name in ("batch", "warmup", "threads"):
            common.positive(name, getattr(args, name))
        if args.steps < 0:
            raise UserError(f"--steps is {args.steps}; give 1 or more.")
        if args.data == "parquet" and not args.path:
            raise UserError("--data parquet needs --path FILE.")
        train(args)


if __name__ == "__main__":
    main()
