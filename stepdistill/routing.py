"""Several students behind one face: multi-student distillation (Song et al. 2024, arXiv 2410.23274).

The conditions are cut into K disjoint parts; each student is an ordinary run that only ever sees its own
(`data.partition: k/K`), and may be smaller for it. An image costs what one student costs.

Classes are cut into contiguous blocks. Prompts are cut by nearest of K centroids, found by k-means over
hashed bags of words, which needs no model to be loaded before a prompt can be routed. `merge` puts K student
directories side by side with the rule in a `stepdistill.json`; `stepdistill.load` makes `Students` of that.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepdistill.errors import UserError, atomic_write
from stepdistill.sampling import CARD, ImageSampler, load

WIDTH = 64  # of a bag of words: words are hashed into so many places
_ROUNDS = 20  # of k-means
# What students behind one face must agree on.
_COMMON = ("family", "teacher", "steps", "timesteps", "rule", "init_noise", "guidance_free", "extras")


def bags(prompts: Sequence[str]) -> np.ndarray:
    """Words counted in WIDTH hashed places, at unit length, (N, WIDTH)."""
    out = np.zeros((len(prompts), WIDTH))
    for row, prompt in zip(out, prompts, strict=True):
        for word in re.findall(r"\w+", prompt.lower()):
            row[zlib.crc32(word.encode()) % WIDTH] += 1
    return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)


def nearest(prompts: Sequence[str], centroids: np.ndarray) -> np.ndarray:
    """Index (N,) of the centroid nearest to each prompt."""
    return _assign(bags(prompts), np.asarray(centroids))


def cluster(prompts: Sequence[str], count: int) -> np.ndarray:
    """Centroids (count, WIDTH) of the prompts, a pure function of them; the first is that of the first prompt.

    Raises:
        UserError: there are fewer than `count` different bags of words.
    """
    points = bags(prompts)
    distinct = np.unique(points.round(9), axis=0)
    if len(distinct) < count:
        raise UserError(
            f"data.partition asks for {count} parts, but there are only {len(distinct)} different prompts."
        )
    centroids = points[:1]  # then always the farthest: deterministic, and no part is empty
    while len(centroids) < count:
        distances = ((points[:, None] - centroids) ** 2).sum(-1).min(1)
        centroids = np.concatenate((centroids, points[distances.argmax()][None]))
    for _ in range(_ROUNDS):
        part = _assign(points, centroids)
        means = [points[part == k].mean(0) if (part == k).any() else centroids[k] for k in range(count)]
        centroids = np.stack(means).round(6)  # as it is written into a card
    order = list(dict.fromkeys(_assign(points, centroids).tolist()))
    return centroids[order + [k for k in range(count) if k not in order]]


def _assign(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """|p - c|^2 without the term all centroids share."""
    return ((centroids**2).sum(1) - 2 * points @ centroids.T).argmin(1)


def router(routing: dict[str, Any]) -> Callable[[Sequence], list[int]]:
    """Prompts or class indices -> which student draws each, from 0."""
    if routing["by"] == "prompt":
        centroids = np.array(routing["centroids"])
        return lambda prompts: nearest(prompts, centroids).tolist()

    def by_class(labels: Sequence[int]) -> list[int]:
        found = []
        for label in labels:
            part = next((k for k, (a, b) in enumerate(routing["blocks"]) if a <= int(label) < b), None)
            if part is None:
                raise UserError(
                    f"class {label} belongs to none of the students; there are {routing['blocks']}."
                )
            found.append(part)
        return found

    return by_class


class Students:
    """K students as one `ImageSampler`: every prompt or class is drawn by the student it belongs to.

    What all have in common (steps, resolution, conditions, ...) is read from the first.
    """

    def __init__(
        self, path: Path, card: dict[str, Any], device: str = "cpu", dtype: torch.dtype = torch.float32
    ):
        self.path, self.card, self.name = path, card, card.get("name") or path.name
        self.parts: list[ImageSampler] = [load(path / name, device, dtype) for name in card["students"]]
        self.route = router(card["routing"])
        self.parameters = dict(self.parts[0].parameters)
        self.parameters["denoiser"] = sum(part.parameters["denoiser"] for part in self.parts)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "parts":
            raise AttributeError(name)
        return getattr(self.parts[0], name)

    def trace(self) -> Students:
        """As `ImageSampler.trace`."""
        for part in self.parts:
            part.trace()
        return self

    def __call__(self, prompts: Sequence, seeds: Sequence[int], **options: Any) -> Tensor:
        """As `ImageSampler`: uint8 (N, 3, H, W), each image that of its own student alone."""
        return self._gather(prompts, seeds, options, lambda part: part)

    def x0(self, prompts: Sequence, seeds: Sequence[int], **options: Any) -> Tensor:
        """As `ImageSampler.x0`."""
        return self._gather(prompts, seeds, options, lambda part: part.x0)

    def _gather(self, prompts, seeds, options, draw) -> Tensor:
        negatives = options.pop("negative_prompts", None)
        if len(prompts) != len(seeds) or not len(prompts):  # said, or drawn as nothing, by a student
            return draw(self.parts[0])(prompts, seeds, **options)
        chosen, out = np.array(self.route(prompts)), None
        for k, part in enumerate(self.parts):
            rows = np.flatnonzero(chosen == k).tolist()
            if not rows:
                continue
            more = {"negative_prompts": [negatives[i] for i in rows]} if negatives else {}
            images = draw(part)([prompts[i] for i in rows], [seeds[i] for i in rows], **more, **options)
            out = images.new_empty((len(prompts), *images.shape[1:])) if out is None else out
            out[rows] = images
        return out


def merge(students: Sequence[Path], out: Path) -> Path:
    """K student directories, one per part of a partition, as one directory with a routing file.

    Raises:
        UserError: they are not the K parts of one partition, or differ in what they must agree on.
    """
    cards = [_card(Path(path)) for path in students]
    routings = [card.get("routing") for card in cards]
    for path, routing in zip(students, routings, strict=True):
        if not routing:
            advice = f"set data.partition: k/{len(students)} with classes or prompts"
            if len(students) == 1:
                advice = "one student of all conditions needs no merging"
            raise UserError(f"{path} was not trained on a part of the conditions; {advice}.")
    parts = [routing["part"] for routing in routings]
    rules = [{key: value for key, value in routing.items() if key != "part"} for routing in routings]
    if sorted(parts) != list(range(1, len(students) + 1)) or any(rule["of"] != len(parts) for rule in rules):
        listed = ", ".join(f"{part}/{rule['of']}" for part, rule in zip(parts, rules, strict=True))
        raise UserError(f"the students must be the parts 1 to K of one partition, got {listed}.")
    if any(rule != rules[0] for rule in rules):
        raise UserError("the students were trained on parts of different data; use one data section for all.")
    for key in _COMMON:
        values = [card.get(key) for card in cards]
        if any(value != values[0] for value in values):
            raise UserError(
                f"the students differ in {key}: {values[0]} and {next(v for v in values if v != values[0])}."
            )
    if out.exists() and _card(out, missing_ok=True).get("kind") != "students":
        raise UserError(f"{out} exists and holds no merged students; choose another directory.")
    card = {
        key: cards[0].get(key) for key in ("format", "stepdistill", *_COMMON, "method", "finest", "commit")
    }
    card |= {"kind": "students", "name": out.name, "students": [str(k + 1) for k in range(len(parts))]}
    with atomic_write(out) as temporary:
        temporary.mkdir()
        for part, path in zip(parts, students, strict=True):
            shutil.copytree(path, temporary / str(part))
        (temporary / CARD).write_text(json.dumps(card | {"routing": rules[0]}, indent=2) + "\n")
        (temporary / "README.md").write_text(_readme(card))
    return out


def _card(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    try:
        return json.loads((path / CARD).read_text())
    except (OSError, ValueError):
        if missing_ok:
            return {}
        raise UserError(f"{path} is no student directory: it has no readable {CARD}.") from None


def _readme(card: dict[str, Any]) -> str:
    return "\n".join([
        f"# {card['name']}", "",
        f"{len(card['students'])} {card['method']} students of `{card['teacher']}`, each for its own part of the conditions.",
        "Every numbered directory is an ordinary diffusers pipeline; which of them draws what is in `stepdistill.json`:", "",
        "```python", "import stepdistill", "", 'students = stepdistill.load("PATH_TO_THIS_DIRECTORY")',
        "images = students(prompts, seeds)", "```", "",
    ])  # fmt: skip
