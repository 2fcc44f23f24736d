"""Train the micro-CLIP on captioned scenes: a stock CLIPModel with a tokenizer of whole words.

    python -m training.embedded.clip --clip assets/clip --teacher assets/teacher

Its text tower is the embedded teacher's text encoder, its score the embedded CLIP score. Both need to know
which colour belongs to which shape, and scenes drawn at random are told apart without: so half of every batch
differs from the other half in a single attribute, every image also faces such a caption that belongs to no
image, and one linear head, shared by both towers and thrown away afterwards, reads every attribute from the
common embedding. A second head reads off each patch of an image what lies there.

The contrastive loss is that of CLIP (Radford et al., "Learning Transferable Visual Models From Natural
Language Supervision", arXiv 2103.00020). The length is given in steps, so a seed gives the same weights on
the same machine.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stepdistill import scenes
from stepdistill.ema import EMA
from stepdistill.errors import UserError, cli_errors
from training.embedded import common
from training.embedded.clip_lessons import (
    Pointer,
    Reader,
    caption_with_noise,
    contrast,
    draw_batch,
    patch_truth,
    vary,
)
from training.embedded.clip_model import (
    build_model,
    build_tokenizer,
    embed_captions,
    embed_images,
    look,
    save,
    tokenize,
)

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerFast

# Weight of the attribute loss.
AUXILIARY = 1.0


class Learner:
    """The model with its two auxiliary heads, which are thrown away afterwards, and what trains all three."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.tokenizer, self.model = build_tokenizer(), build_model()
        self.reader, self.pointer = Reader(), Pointer()
        if args.init:
            # The heads are not kept, and learn anew in the first hundred steps.
            self.model = type(self.model).from_pretrained(args.init, dtype=torch.float32)
        self.average = EMA(self.model, 0.998)
        modules = (self.model, self.reader, self.pointer)
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        decayed = [p for p in self.parameters if p.ndim > 1]
        plain = [p for p in self.parameters if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}],
            lr=args.lr,
            betas=(0.9, 0.98),
        )
        self.schedule = common.warmup_and_cosine(self.optimizer, args.steps, args.warmup)
        self.rng, self.half = np.random.default_rng(args.seed), args.batch // 2

    def step(self) -> dict[str, float]:
        """One optimiser step; the losses."""
        model = self.model
        drawn, images, same = draw_batch(self.rng, self.half)
        ids = tokenize(self.tokenizer, [caption_with_noise(scene, self.rng) for scene in drawn])
        truth = torch.tensor([common.answers(scene) for scene in drawn])
        (pictures, patches), texts = look(model, images), embed_captions(model, ids)
        contrastive = contrast(pictures, texts, model.logit_scale.exp(), same)
        seen, said = self.reader.loss(pictures, truth[: len(images)]), self.reader.loss(texts, truth)
        pointed = self.pointer.loss(patches, patch_truth(images, truth[: len(images)]))
        self.optimizer.zero_grad(set_to_none=True)
        (contrastive + AUXILIARY * (seen + said + pointed)).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(100)))
        self.average.update(model)
        losses = {"contrastive": contrastive, "seen": seen, "said": said, "pointed": pointed}
        return {name: value.item() for name, value in losses.items()}


def train(args: argparse.Namespace) -> None:
    """Train, save, measure; see the module's docstring."""
    started = logged = time.monotonic()
    common.prepare(args.threads, args.seed)
    learner = Learner(args)
    model, tokenizer = learner.model, learner.tokenizer
    for step in range(args.stop or args.steps):
        losses = learner.step()
        if time.monotonic() - logged > 60:
            logged = time.monotonic()
            with learner.average.applied(model):
                scores = retrieval(model, tokenizer, 128)
                if args.partial:
                    save(model, tokenizer, Path(args.partial) / "clip", Path(args.partial) / "teacher")
            shown = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
            scale = model.logit_scale.exp().item()
            place = f"{logged - started:6.0f} s  step {step + 1}/{args.steps}"
            print(f"{place}  {shown}  scale {scale:.1f}  {scores}", flush=True)
    clip, teacher = Path(args.clip), Path(args.teacher)
    learner.average.put(model)
    save(model, tokenizer, clip, teacher)
    # Measured is what was written.
    reread = type(model).from_pretrained(clip, dtype=torch.float32)
    common.write_report(
        clip / "training.json",
        started,
        command=common.command(__spec__.name, args, ("init", "steps", "stop", "lr", "seed")),
        steps=args.steps,
        retrieval=retrieval(reread, tokenizer, 512),
        parameters={
            "text": sum(p.numel() for p in model.text_model.parameters()),
            "vision": sum(p.numel() for p in model.vision_model.parameters()),
        },
    )


@torch.no_grad()
def retrieval(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, count: int) -> dict[str, float]:
    """Share of held-out images whose own caption wins: of 32 random ones, and of 8 that differ in one thing."""
    drawn, images = common.scene_pool(count, seed=scenes.HELD_OUT_SEED)
    rng = np.random.default_rng(scenes.HELD_OUT_SEED)
    groups = []
    for scene in drawn:
        group = {common.canonical(scene): scene}
        while len(group) < 8:
            other = vary(scene, rng)
            group.setdefault(common.canonical(other), other)
        groups.append(list(group.values()))
    pictures = torch.cat([F.normalize(embed_images(model, part), dim=1) for part in images.split(64)])
    captions = [scene.caption for group in groups for scene in group]
    texts = torch.cat(
        [
            F.normalize(embed_captions(model, tokenize(tokenizer, captions[k : k + 512])), dim=1)
            for k in range(0, len(captions), 512)
        ]
    ).view(count, 8, -1)
    hard = torch.einsum("nd,nkd->nk", pictures, texts).argmax(1) == 0
    hits = []
    for start in range(0, count - count % 32, 32):
        part = slice(start, start + 32)
        hits.append((pictures[part] @ texts[part, 0].T).argmax(1) == torch.arange(32))
    cosine = (pictures * texts[:, 0]).sum(1)
    return {
        "right caption of 32 random": round(torch.cat(hits).float().mean().item(), 4),
        "right caption of 8 hard": round(hard.float().mean().item(), 4),
        "cosine of pairs": round(cosine.mean().item(), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clip", required=True, help="directory for the CLIP model")
    parser.add_argument(
        "--teacher", required=True, help="pipeline directory that receives text_encoder and tokenizer"
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--stop", type=int, default=0, help="leave the schedule of --steps at this step; 0 = at its end"
    )
    parser.add_argument("--init", default="", help="directory of a CLIP model to start from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--partial", default="", help="directory that receives a copy every minute")
    args = parser.parse_args()
    with cli_errors():
        for name in ("steps", "threads", "batch", "warmup"):
            common.positive(name, getattr(args, name))
        if args.batch < 4 or args.batch % 2:
            raise UserError(f"--batch is {args.batch}; give an even number, 4 or more.")
        train(args)


if __name__ == "__main__":
    main()
