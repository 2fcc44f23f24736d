"""What the micro-CLIP is taught: pairs that differ in one attribute, and heads that read attributes off it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepdistill import scenes
from training.embedded import common
from training.embedded.clip_model import SPECIAL

# Share of captions with a word that is not in the vocabulary.
STRANGE = 0.05
# Captions per image that belong to no image of the batch.
EXTRA = 1
# Logits per question.
SIZES = tuple(map(len, common.QUESTIONS.values()))
# Which object covers a patch, its shape, colour and size.
PATCH_SIZES = (3, len(scenes.SHAPES) + 1, len(scenes.COLOURS) + 1, 3)


def vary(scene: scenes.Scene, rng: np.random.Generator) -> scenes.Scene:
    """A scene that differs in one thing: a colour, shape or size, the background, or what two objects exchange."""
    while True:
        changed = _vary_once(scene, rng)
        # Two circles may have exchanged their shapes.
        if common.canonical(changed) != common.canonical(scene):
            return changed


def _vary_once(scene: scenes.Scene, rng: np.random.Generator) -> scenes.Scene:
    kinds = ["colour", "shape", "size", "background"]
    if scene.relation is not None:
        kinds += ["relation", "turn", "swap colour", "swap shape", "swap size"]
    kind = kinds[rng.integers(len(kinds))]
    used = {scene.background, *(thing.colour for thing in scene.objects)}
    unused = [name for name in scenes.COLOURS if name not in used]
    things = list(scene.objects)
    k = int(rng.integers(len(things)))
    if kind == "background":
        return replace(scene, background=unused[rng.integers(len(unused))])
    if kind == "relation":
        return replace(scene, objects=scene.objects[::-1])
    if kind == "turn":
        return replace(scene, relation=scenes.RELATIONS[rng.integers(len(scenes.RELATIONS))])
    if kind.startswith("swap"):
        name = kind.split()[1]
        mine, yours = (getattr(thing, name) for thing in things)
        things = [replace(things[0], **{name: yours}), replace(things[1], **{name: mine})]
    else:
        choices = {"colour": unused, "shape": scenes.SHAPES, "size": scenes.SIZES}[kind]
        things[k] = replace(things[k], **{kind: choices[rng.integers(len(choices))]})
    return replace(scene, objects=tuple(things))


class Reader(nn.Module):
    """Answers to `common.QUESTIONS` from an embedding (N, 64): one linear layer for both towers, so that they agree."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.linear = nn.Linear(64, sum(SIZES))

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        return self.linear(self.norm(embedding)).split(SIZES, dim=1)

    def loss(self, embedding: Tensor, truth: Tensor) -> Tensor:
        """Mean cross-entropy over the questions; truth: (N, 8) integers."""
        parts = [F.cross_entropy(logits, truth[:, k]) for k, logits in enumerate(self(embedding))]
        return torch.stack(parts).mean()


class Pointer(nn.Module):
    """What lies in each patch, from its last state (N, 64, 128).

    A vision transformer learns slowly from one answer per image, and fast from 64.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(128)
        self.linear = nn.Linear(128, sum(PATCH_SIZES))

    def loss(self, patches: Tensor, truth: Tensor) -> Tensor:
        """Mean cross-entropy, half of it on patches with an object; truth: (N, 64, 4) out of `patch_truth`."""
        logits = self.linear(self.norm(patches)).flatten(0, 1).split(PATCH_SIZES, dim=1)
        truth = truth.flatten(0, 1)
        each = sum(F.cross_entropy(part, truth[:, k], reduction="none") for k, part in enumerate(logits))
        empty = truth[:, 0] == 2
        return (each[empty].mean() + each[~empty].mean()) / (2 * len(PATCH_SIZES))


def patch_truth(images: Tensor, answers: Tensor) -> Tensor:
    """Which object covers at least a fifth of each 8 x 8 patch (2: none), and its shape, colour and size.

    images: uint8 (N, 3, 64, 64); answers: (N, 8), `common.answers` of each. Returns integers (N, 64, 4).
    """
    # The last is the colour of no object.
    palette = torch.tensor([*scenes.COLOURS.values(), (1e6, 1e6, 1e6)])
    # (N, 3 things, 3)
    colours = palette[answers[:, [1, 4, 7]]]
    distance = (images[:, None].float() - colours[..., None, None]).square().sum(2)
    owner = F.one_hot(distance.argmin(1), 3)[..., :2].permute(0, 3, 1, 2).float()
    # (N, 2 objects, 64)
    share = F.avg_pool2d(owner, 8).flatten(2)
    most, which = share.max(1)
    which = torch.where(most >= 0.2, which, 2)
    nothing = torch.tensor([len(scenes.SHAPES), len(scenes.COLOURS), len(scenes.SIZES)])
    # (N, 3 things, 3)
    things = torch.stack([answers[:, 0:3], answers[:, 3:6], nothing.expand(len(images), 3)], 1)
    described = things.gather(1, which[..., None].expand(-1, -1, 3))
    return torch.cat([which[..., None], described], 2)


def contrast(images: Tensor, captions: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's loss of N images and M >= N captions; caption i belongs to image i, captions from N on to none.

    images: (N, D), captions: (M, D), not normalised; same: (N, M) bool, further captions that are true of an
    image as well and hence no negatives.
    """
    logits = scale * F.normalize(images, dim=1) @ F.normalize(captions, dim=1).T
    logits = logits.masked_fill(same, -torch.inf)
    truth = torch.arange(len(images))
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits[:, : len(images)].T, truth)) / 2


def draw_batch(rng: np.random.Generator, half: int) -> tuple[list[scenes.Scene], Tensor, Tensor]:
    """Scenes of 2 half images and of their extra captions, the images (uint8), and `same` for `contrast`."""
    base = [scenes.sample_scene(rng) for _ in range(half)]
    shown = base + [vary(scene, rng) for scene in base]
    drawn = shown + [vary(scene, rng) for _ in range(EXTRA) for scene in shown]
    images = torch.from_numpy(np.stack([scenes.render(scene, rng) for scene in shown])).permute(0, 3, 1, 2)
    numbers: dict[scenes.Scene, int] = {}
    keys = torch.tensor([numbers.setdefault(common.canonical(scene), len(numbers)) for scene in drawn])
    same = keys[: len(shown), None] == keys[None, :]
    same[:, : len(shown)].fill_diagonal_(False)
    return drawn, images, same


def caption_with_noise(scene: scenes.Scene, rng: np.random.Generator) -> str:
    """The caption, sometimes with a word nobody knows, which therefore learns to mean nothing."""
    words = scene.caption.split()
    if rng.random() < STRANGE:
        words.insert(int(rng.integers(len(words) + 1)), SPECIAL[2].strip("<>"))
    return " ".join(words)
