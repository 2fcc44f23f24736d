"""A style LoRA made for the teacher, on a student distilled without it: how much of its effect is left.

    OMP_NUM_THREADS=1 python -m benchmarks.stacking      (some eight CPU minutes; writes stacking.json)

The style is a palette: red and blue change places, and so do yellow and purple. Adapters learn it on the embedded teacher,
from scenes that are painted so under their old captions, and leave by `python -m training.export`. The stock pipelines of
teacher and student then draw held-out captions that name one of these colours, with and without them. The checker reads
whether objects and background have the colours the palette asks for; the effect is how much more often they do with the
adapters. Stacked: `load_lora_weights` on the student's pipeline; merged: into its weights, as `family.lora` does it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from evaluation.results import machine
from stepdistill import assets, scenes
from stepdistill.errors import atomic_write, cli_errors, quieten_libraries
from stepdistill.families.adapters import LoraFile, merge
from stepdistill.registry import allowing_code
from stepdistill.scenes import Scene
from training import export
from training.data.scenes import Scenes
from training.recipe import recipe_from
from training.run import run

SWAPPED = {"red": "blue", "blue": "red", "yellow": "purple", "purple": "yellow"}
OUT = Path(__file__).with_suffix(".json")
RECIPE: dict[str, Any] = {
    "family": {"name": "sd", "teacher": "assets/teacher"},
    "student": {"lora": {"rank": 16}, "ema": 0.98},
    "method": {"name": "pretrain"},
    "data": {"name": "benchmarks.stacking:Repainted", "size": 2000},
    "optim": {"lr": 1e-3, "batch_size": 32, "schedule": "cosine"},
    "run": {"steps": 500, "trackers": [], "log_every": 50},
}
TEACHER = {"num_inference_steps": 20, "guidance_scale": 2.0}
STEPS = (1, 2, 4)
SCALES = (1.0, 1.25, 1.5, 2.0)
BATCH = 40


def repainted(scene: Scene) -> Scene:
    """The scene in the style's palette."""
    things = tuple(replace(thing, colour=SWAPPED.get(thing.colour, thing.colour)) for thing in scene.objects)
    return replace(scene, objects=things, background=SWAPPED.get(scene.background, scene.background))


class Repainted(Scenes):
    """Scenes in the style's palette, under the captions they had before."""

    def images(self, indices: Sequence[int]) -> np.ndarray:
        out = np.empty((len(indices), *self.image_size, 3), np.uint8)
        for row, index in enumerate(indices):
            rng = np.random.default_rng((self.config.seed, self._block[index]))
            out[row] = scenes.render(repainted(scenes.sample_scene(rng)), rng, self.config.resolution)
        return out


def held_out(count: int) -> list[Scene]:
    """Scenes of which the palette changes something."""
    found, index = [], 0
    while len(found) < count:
        scene = scenes.scene_at(index, scenes.HELD_OUT_SEED)
        found += [scene] if repainted(scene) != scene else []
        index += 1
    return found


@dataclass
class Measured:
    """Shares of images, 0 .. 1: styled: objects and background have the palette's colours; plain: those of the caption;
    whole: everything is as the palette and the caption ask for.
    """

    styled: float
    plain: float
    whole: float


@torch.no_grad()
def measure(pipeline: Any, wanted: list[Scene], **call: Any) -> Measured:
    images = []
    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        told = [scene.caption for scene in part]
        drawn = pipeline(told, generator=generators, output_type="np", **call).images
        images += list((drawn * 255).round().astype(np.uint8))

    def share(names: Sequence[str], targets: list[Scene]) -> float:
        read = [scenes.check(image, scene) for image, scene in zip(images, targets, strict=True)]
        return float(np.mean([all(result[name] for name in names) for result in read]))

    palette, styled = ("colours", "background"), [repainted(scene) for scene in wanted]
    return Measured(share(palette, styled), share(palette, wanted), share(["all"], styled))


def loaded(name: str) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(assets.path(name), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def effects(lora: Path, wanted: list[Scene]) -> dict[str, Any]:
    """Everything that is measured of adapters in a directory."""
    teacher = loaded("teacher")
    rows = {"teacher": {"without": vars(measure(teacher, wanted, **TEACHER))}}
    teacher.load_lora_weights(lora)
    rows["teacher"]["stacked x 1"] = vars(measure(teacher, wanted, **TEACHER))
    student, merged = loaded("student"), loaded("student")
    call = {"guidance_scale": 1.0}
    plain = {n: vars(measure(student, wanted, num_inference_steps=n, **call)) for n in STEPS}
    student.load_lora_weights(lora, adapter_name="style")
    merge(merged, [LoraFile.of(str(lora))])
    for n in STEPS:
        rows[f"student, {n}"] = own = {"without": plain[n]}
        for scale in SCALES:
            student.set_adapters("style", scale)
            own[f"stacked x {scale:g}"] = vars(measure(student, wanted, num_inference_steps=n, **call))
        own["merged x 1"] = vars(measure(merged, wanted, num_inference_steps=n, **call))
    return rows


def kept(rows: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The effect on each student over that on the teacher."""

    def effect(of: str, how: str) -> float:
        return rows[of][how]["styled"] - rows[of]["without"]["styled"]

    whole = effect("teacher", "stacked x 1")
    return {
        of: {how: round(effect(of, how) / whole, 4) for how in rows[of] if how != "without"}
        for of in rows
        if of != "teacher"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=240, help="images of each row")
    parser.add_argument(
        "--run", type=Path, help="where the style's run lies or is to lie; a temporary place by default"
    )
    given = parser.parse_args()
    quieten_libraries()
    with cli_errors(), allowing_code(), tempfile.TemporaryDirectory() as folder:
        place = given.run or Path(folder) / "style"
        recipe = recipe_from(RECIPE | {"run": RECIPE["run"] | {"out": str(place)}})
        run(recipe)
        export.main([str(place), "--allow-code"])
        rows = effects(place / "lora", held_out(given.n))
    results = {
        "palette": SWAPPED, "recipe": RECIPE, "teacher_call": TEACHER, "n": given.n, "rows": rows, "kept": kept(rows),
        "machine": machine("cpu"),
    }  # fmt: skip
    with atomic_write(OUT) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results["kept"], indent=2))


if __name__ == "__main__":
    main()
