"""The embedded student's images by the tiny decoder and by its own: how alike, how right, and how fast, in turns.

OMP_NUM_THREADS=1 python -m benchmarks.tiny_decoder      (a CPU minute; writes tiny_decoder.json)
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from evaluation.results import machine
from stepdistill import assets, load, scenes
from stepdistill.errors import atomic_write, quieten_libraries
from training.embedded import common

OUT = Path(__file__).with_suffix(".json")
COUNT, TURNS = 256, 21


def main() -> None:
    quieten_libraries()
    drawn, _ = common.scene_pool(COUNT, seed=scenes.HELD_OUT_SEED)
    captions = [scene.caption for scene in drawn]
    own = load(assets.path("student"))
    samplers = {"own": own, "tiny": load(assets.path("student"), decoder=assets.path("tiny_decoder"))}
    drawers = {name: sampler.at(1) for name, sampler in samplers.items()}
    images = {name: torch.as_tensor(draw(captions, range(COUNT))) for name, draw in drawers.items()}
    milliseconds: dict[str, list[float]] = {name: [] for name in drawers}
    for turn in range(TURNS):
        for name, draw in drawers.items():
            begun = time.process_time()
            draw(captions[:1], [turn])
            milliseconds[name].append(1e3 * (time.process_time() - begun))
    facts = {
        "psnr_between": round(common.psnr(images["tiny"], images["own"]), 2),
        "attributes": {name: common.checker_accuracy(each, drawn)["all"] for name, each in images.items()},
        "cpu_milliseconds_of_an_image": {
            name: round(sorted(each)[TURNS // 2], 1) for name, each in milliseconds.items()
        },
        "images": COUNT,
        "machine": machine("cpu"),
    }
    print(json.dumps(facts, indent=2))
    with atomic_write(OUT) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
