"""GenEval's judgement in process: objects by Mask2Former, their colours by CLIP, both of transformers.

The rules are GenEval's (djghosh13/geneval, evaluation/evaluate_images.py). Its detector is OpenMMLab's training of
Mask2Former Swin-S in mmdet 2 with mmcv 1, which were made for torch 1; this is Meta's training of the same network.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from evaluation.clip import Clip
from evaluation.images import to_tensor
from evaluation.processes import ready_device
from evaluation.settings import Place
from evaluation.weights import find
from stepdistill.clip import pretrained
from stepdistill.errors import UserError

# COCO's 80 classes in their order, in GenEval's words.
_COCO = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, "
    "clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
CLASSES = _COCO.split(", ")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
# Least certainty of an object, also where objects are counted; and how many of a class are looked at.
CERTAIN, COUNTED, MOST = 0.3, 0.9, 16
# Of the two objects' sides, that their centres have to be apart.
APART = 0.1
# What the network sees: short side, longest side, and a multiple of its strides.
_SHORT, _LONG, _STRIDE = 800, 1333, 32


@dataclass(frozen=True)
class Detected:
    """An object: how certain it is, its box (left, top, right, bottom) in pixels, and its mask (H, W), bool."""

    score: float
    box: tuple[int, int, int, int]
    mask: np.ndarray


class Detector:
    """Objects and their colours. detector, clip: directories; None searches for the public ones. Raises UserError."""

    def __init__(
        self, detector: Place | None = None, clip: Place | None = None,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.device = ready_device(device)
        places = find("mask2former-swin-s", detector), find("clip-vit-l14", clip)
        self.model = pretrained("Mask2FormerForUniversalSegmentation", places[0]).to(device)
        if self.model.config.num_labels != len(CLASSES):
            raise UserError(
                f"{places[0]} knows {self.model.config.num_labels} classes, not COCO's {len(CLASSES)}."
            )
        self.clip = Clip(places[1], device)

    @torch.no_grad()
    def objects(self, image: Image.Image) -> dict[str, list[Detected]]:
        """By class, the most certain first, all above CERTAIN; at most 100 in all."""
        pixels = to_tensor([np.asarray(image)]).to(self.device).float()
        height, width = pixels.shape[-2:]
        scale = min(_SHORT / min(height, width), _LONG / max(height, width))
        size = int(height * scale + 0.5), int(width * scale + 0.5)
        pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
        mean, std = (
            torch.tensor(x, device=self.device).view(3, 1, 1)
            for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
        )
        down, right = (-length % _STRIDE for length in size)
        out = self.model(pixel_values=F.pad((pixels - mean) / std, (0, right, 0, down)))
        masks = F.interpolate(
            out.masks_queries_logits, (size[0] + down, size[1] + right), mode="bilinear", align_corners=False
        )[..., : size[0], : size[1]]
        masks = F.interpolate(masks, (height, width), mode="bilinear", align_corners=False)[0]
        classes = out.class_queries_logits[0].softmax(-1)[:, :-1]
        scores, places = classes.flatten().topk(min(100, classes.numel()))
        by_class: dict[str, list[Detected]] = {}
        for score, place in zip(scores.tolist(), places.tolist(), strict=True):
            query, label = divmod(place, len(CLASSES))
            shown = masks[query] > 0
            score *= float((masks[query].sigmoid() * shown).sum() / (shown.sum() + 1e-6))
            if score > CERTAIN:
                by_class.setdefault(CLASSES[label], []).append(_detected(score, shown))
        return {name: sorted(own, key=lambda one: -one.score) for name, own in by_class.items()}

    @torch.no_grad()
    def colours(self, image: Image.Image, objects: Sequence[Detected], name: str) -> list[str]:
        """Of each object of the class `name`, cut out on grey; by zero-shot classification."""
        grey, parts = Image.new("RGB", image.size, "#999"), []
        for one in objects:
            cut = Image.composite(image, grey, Image.fromarray(one.mask)).crop(one.box)
            parts.append(self.clip.of_images(to_tensor([np.asarray(cut)])))
        return [COLOURS[index] for index in (torch.cat(parts) @ self._palette(name).T).argmax(1).tolist()]

    @functools.lru_cache(maxsize=80)  # noqa: B019
    def _palette(self, name: str) -> Tensor:
        texts = [template.format(colour, name) for colour in COLOURS for template in TEMPLATES]
        rows = F.normalize(self.clip.of_tokens(self.clip.tokens(texts)), dim=1)
        return F.normalize(rows.view(len(COLOURS), len(TEMPLATES), -1).mean(1), dim=1)

    def judge(self, image: Image.Image, wanted: Mapping[str, Any]) -> tuple[bool, str]:
        """Whether an image is as a line of evaluation_metadata.jsonl wants it, and else why not."""
        least = COUNTED if wanted["tag"] == "counting" else CERTAIN
        certain = {
            name: [one for one in own if one.score > least][:MOST]
            for name, own in self.objects(image).items()
        }
        return judged(certain, wanted, lambda objects, name: self.colours(image, objects, name))


def _detected(score: float, shown: Tensor) -> Detected:
    rows, columns = (torch.nonzero(shown.any(axis)).flatten().tolist() for axis in (1, 0))
    return Detected(score, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), shown.cpu().numpy())


def judged(
    objects: Mapping[str, Sequence[Detected]],
    wanted: Mapping[str, Any],
    colours: Callable[[Sequence[Detected], str], list[str]],
) -> tuple[bool, str]:
    """GenEval's rules on the objects of each class, the most certain first: all that is included, nothing excluded.

    wanted: `include` with class, count and perhaps color or position ("left of" the objects of an earlier entry), and
    `exclude` with class and count. Only the most certain objects, as many as are wanted, are looked at.
    """
    groups: list[Sequence[Detected]] = []
    reasons = []
    for want in wanted.get("include", ()):
        name, count = want["class"], want["count"]
        own, reason = objects.get(name, ())[:count], ""
        if len(own) < count:
            reason = f"{len(own)} of {count} {name}"
        elif "color" in want and (right := colours(own, name).count(want["color"])) < count:
            reason = f"{right} of {count} {name} {want['color']}"
        elif "position" in want:
            relation, target = want["position"]
            pairs = [relations(one.box, other.box) for one in own for other in groups[target]]
            if not pairs or any(relation not in there for there in pairs):
                reason = f"{name} not {relation} its target"
        groups.append(() if reason else own)
        reasons += [reason] if reason else []
    for want in wanted.get("exclude", ()):
        if (have := len(objects.get(want["class"], ()))) >= want["count"]:
            reasons.append(f"{have} {want['class']} where fewer than {want['count']} are wanted")
    return not reasons, "; ".join(reasons)


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where a box (left, top, right, bottom) is of another one, as far as their centres are apart."""
    corners = np.array([box, other], float).reshape(2, 2, 2)
    (centre, there), sides = corners.mean(1), np.abs(np.diff(corners, axis=1))[:, 0].sum(0)
    offset = centre - there
    moved = np.maximum(np.abs(offset) - APART * sides, 0) * np.sign(offset)
    if (np.abs(moved) < 1e-3).all():
        return set()
    across, down = moved / np.linalg.norm(offset)
    known = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in known.items() if holds}
