"""Several students behind one face: multi-student distillation (Song et al. 2024, arXiv 2410.23274).

The conditions are cut into K disjoint parts; each student is an ordinary run that only ever sees its own
(`data.partition: k/K`), and may be smaller for it. An image costs what one student costs.

Classes are cut into contiguous blocks. Prompts are cut by nearest of K centroids, found by k-means over
hashed bags of words, which needs no model to be loaded before a prompt can be routed. `merge` puts K student
directories side by side with the rule in a `stepdistill.json`; `stepdistill.load` makes `students.Students` of that.
"""

from __future__ import annotations

import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from stepdistill import card as cards
from stepdistill.card import Card
from stepdistill.errors import UserError, atomic_write

# Of a bag of words: words are hashed into so many places.
WIDTH = 64
# Of k-means.
_ROUNDS = 20
# What students behind one face must agree on.
_COMMON = ("family", "teacher", "timesteps")


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
    # Then always the farthest: deterministic, and no part is empty.
    centroids = points[:1]
    while len(centroids) < count:
        distances = ((points[:, None] - centroids) ** 2).sum(-1).min(1)
        centroids = np.concatenate((centroids, points[distances.argmax()][None]))
    for _ in range(_ROUNDS):
        part = _assign(points, centroids)
        means = [points[part == k].mean(0) if (part == k).any() else centroids[k] for k in range(count)]
        # As it is written into a card.
        centroids = np.stack(means).round(6)
    order = list(dict.fromkeys(_assign(points, centroids).tolist()))
    return centroids[order + [k for k in range(count) if k not in order]]


def _assign(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """|p - c|^2 without the term all centroids share."""
    return ((centroids**2).sum(1) - 2 * points @ centroids.T).argmin(1)


def router(routing: dict[str, Any]) -> Callable[[Sequence], list[int]]:
    """Prompts or class indices -> which student draws each, from 0. Raises UserError for routing that is none."""
    try:
        if routing["by"] == "prompt":
            centroids = np.array(routing["centroids"], float)
            known = centroids.ndim == 2 and centroids.shape[1] == WIDTH and np.isfinite(centroids).all()
        else:
            known = all(int(a) < int(b) for a, b in routing["blocks"])
    except (KeyError, TypeError, ValueError, OverflowError):
        known = False
    if not known:
        raise UserError(
            f"{cards.NAME}: its routing is neither of prompts nor of classes; merge the students again."
        )
    if routing["by"] == "prompt":
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


def merge(students: Sequence[Path], out: Path) -> Path:
    """K student directories, one per part of a partition, as one directory with a routing file.

    Raises:
        UserError: they are not the K parts of one partition, or differ in what they must agree on.
    """
    own = [cards.required(Path(path)) for path in students]
    routings = [card.routing for card in own]
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
    facts = [{name: getattr(card, name) for name in _COMMON} | asdict(card.sampling) for card in own]
    for name in facts[0]:
        first, *others = (fact[name] for fact in facts)
        if any(other != first for other in others):
            other = next(other for other in others if other != first)
            raise UserError(f"the students differ in {name}: {first} and {other}.")
    if out.exists() and getattr(cards.read(out), "kind", None) != "students":
        raise UserError(f"{out} exists and holds no merged students; choose another directory.")
    names = tuple(str(k + 1) for k in range(len(parts)))
    card = replace(
        own[0], kind="students", name=out.name, students=names, routing=rules[0], recipe={}, step=None,
        weights="raw", metrics={},
    )  # fmt: skip
    with atomic_write(out) as temporary:
        temporary.mkdir()
        for part, path in zip(parts, students, strict=True):
            shutil.copytree(path, temporary / str(part))
        cards.write(card, temporary)
        (temporary / "README.md").write_text(_readme(card))
    return out


def _readme(card: Card) -> str:
    return "\n".join([
        f"# {card.name}", "",
        f"{len(card.students)} {card.method} students of `{card.teacher}`, each for its own part of the conditions.",
        "Every numbered directory is an ordinary diffusers pipeline; which of them draws what is in `stepdistill.json`:", "",
        "```python", "import stepdistill", "", 'students = stepdistill.load("PATH_TO_THIS_DIRECTORY")',
        "images = students(prompts, seeds)", "```", "",
    ])  # fmt: skip
