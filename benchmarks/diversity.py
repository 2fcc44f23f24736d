"""How different the images of one caption are: of the teacher, of the shipped student, and of the data itself.

    OMP_NUM_THREADS=1 python -m benchmarks.diversity      (writes diversity.json)

The protocol scenes-seeds: 100 captions, eight seeds of each, mean distance of two images of a caption in the features
scenes-v1. The data's are the same captions rendered anew with other places, sizes and shades. "right" counts images
alone that show all a caption says: wrong ones differ as well, from the right ones and from one another.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.extractors import load_extractor
from evaluation.metrics.diversity import mean_distance
from evaluation.results import machine
from stepdistill import assets, load, scenes
from stepdistill.errors import atomic_write, quieten_libraries
from stepdistill.provenance import git_commit

OUT = Path(__file__).with_suffix(".json")
CAPTIONS, SEEDS, GUIDANCE = 100, 8, 3.0


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    quieten_libraries()
    captions = [scenes.scene_at(i, scenes.HELD_OUT_SEED).caption for i in range(CAPTIONS)]
    asked = [caption for caption in captions for _ in range(SEEDS)]
    extractor = load_extractor("scenes-v1")
    rows: list[dict[str, Any]] = []
    for name, steps, images in drawn(asked):
        features = extractor(images).double().numpy().reshape(CAPTIONS, SEEDS, -1)
        right = np.array([all_right(image, caption) for image, caption in zip(images, asked, strict=True)])
        right = right.reshape(CAPTIONS, SEEDS)
        pairs = [(group, group[kept]) for group, kept in zip(features, right, strict=True)]
        row = {
            "name": name,
            "steps": steps,
            "right": round(float(right.mean()), 4),
            "diversity": summary([mean_distance(group) for group, _ in pairs]),
            "diversity_of_right": summary([mean_distance(kept) for _, kept in pairs if len(kept) > 1]),
        }
        rows.append(row)
        print(row, flush=True)
    for row in rows:
        for key in ("diversity", "diversity_of_right"):
            row[key]["of_teacher"] = round(row[key]["mean"] / rows[-1][key]["mean"], 3)
    facts = {"rows": rows, "captions": CAPTIONS, "seeds": SEEDS, "guidance": GUIDANCE}
    facts |= {"commit": git_commit(), "machine": machine("cpu")}
    with atomic_write(OUT) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n")


def drawn(captions: list[str]) -> Iterator[tuple[str, int | None, Tensor]]:
    """What is compared, its sampling steps and its images uint8 (N, 3, H, W); last the teacher."""
    rendered = [
        scenes.render(scenes.parse_caption(caption), np.random.default_rng((scenes.HELD_OUT_SEED, i)))
        for i, caption in enumerate(captions)
    ]
    yield "data", None, torch.from_numpy(np.stack(rendered)).permute(0, 3, 1, 2).contiguous()
    seeds = range(len(captions))
    student, teacher = load(assets.path("student")), load(assets.path("teacher"))
    for steps in student.steps or ():
        yield "student", steps, torch.as_tensor(student.at(steps)(captions, seeds))
    yield "teacher", 50, torch.as_tensor(teacher.at(50, GUIDANCE)(captions, seeds))


def all_right(image: Tensor, caption: str) -> bool:
    return all(scenes.check(image.permute(1, 2, 0).numpy(), scenes.parse_caption(caption)).values())


def summary(values: list[float]) -> dict[str, float]:
    """Mean over captions and its standard error."""
    error = np.std(values, ddof=1) / len(values) ** 0.5
    return {"mean": round(float(np.mean(values)), 4), "se": round(float(error), 4)}


if __name__ == "__main__":
    main()
