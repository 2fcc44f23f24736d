"""Recipes whose teacher is a hub id, or what another run leaves, on a tiny pipeline of the same family instead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import perceptual
import tiny
from models import SETTINGS
from runs import labelled_images

from stepdistill.yaml_files import read_yaml
from training.checkpoint import RunDirectory
from training.recipe import Recipe, recipe_from
from training.run import run

# Recipe -> the variant of `tiny.VARIANTS` in its teacher's place; a recipe whose run in the small leaves its teacher; ""
# where it has none.
STAND_INS = {
    "cifar10_dmd2": "cifar10_teacher",
    "cifar10_teacher": "",
    "dit_imagenet_dmf": "dit",
    "dit_imagenet_scm": "dit",
    "edm_imagenet64_cd": "cifar10_teacher",
    "edm_imagenet64_sida": "cifar10_teacher",
    "flux_dmd2_lora": "flux-dev",
    "pixart_sim": "pixart-alpha",
    "pixel_cifar10_cd": "cifar10_teacher",
    "pixel_cifar10_ect": "cifar10_teacher",
    "qwen_image_dmd2_lora": "qwen-image",
    "qwen_image_phased_dmd_lora": "qwen-image",
    "sana_sprint": "sana",
    "sd15_dmd2_1step": "sd15",
    "sd15_f_distill": "sd15",
    "sd15_lcm_lora": "sd15",
    "sd15_sid_lsg": "sd15",
    "sd21_swiftbrush": "sd15",
    "sd3_cdm": "sd3.5",
    "sd35_ladd": "sd3.5",
    "sdxl_add": "sdxl",
    "sdxl_dmd2_4step": "sdxl",
    "sdxl_hyper_lora": "sdxl",
    "sdxl_lightning": "sdxl",
    "shapes_flux_dmd2": "flux-schnell",
    "shapes_flux_teacher": "flux-schnell",
    "shapes_sdxl_dmd2": "sdxl",
    "shapes_sdxl_teacher": "sdxl",
    "transformer_prune_healed": "sd3.5",
    "transformer_teacher": "sd3.5",
    "wan_dmd2": "wan",
}
# What is said of a teacher and is not true of its stand-in.
OWN = ("revision", "variant", "resolution", "null_class")
# Of families told classes, whose size is the network's own.
CLASSES = {"pixel": 10, "dit": 1000}
SIDE = 32
# What one iteration on two examples needs less of, wherever a recipe says it. A rank of 0 means none.
SMALL = {
    "batch_size": 2,
    "micro_batch_size": 0,
    "size": 8,
    "preview_every": 0,
    "save_every": 0,
    "warmup_steps": 0,
}
RANKS = ("rank", "lora_rank")


def small(path: Path, folder: Path, precision: str = "") -> Recipe:
    """The recipe with its stand-in's teacher and data in `folder`; every stage is one iteration, in which each of its
    phases has a turn. precision: in place of its own, "" = its own.
    """
    folder.mkdir(exist_ok=True)
    mapping = _reduced(read_yaml(path))
    family = mapping["family"]
    name = family["name"]
    family = {key: value for key, value in family.items() if key not in OWN}
    size = {} if name in CLASSES else {"resolution": [SIDE]}
    mapping["family"] = family | size | SETTINGS.get(name, {})
    mapping["data"] = _data(name, mapping["data"], folder)
    if "method" in mapping:
        mapping["method"] = _seeing(mapping["method"], folder)
    mapping["run"] |= {"out": str(folder / "run"), "trackers": []}
    mapping["run"] |= {"precision": precision} if precision else {}
    mapping["family"] |= _teacher(path, folder, mapping["run"].get("precision", "no"))
    student = mapping.get("student") or {}
    if student.get("init", "teacher") not in ("teacher", "random"):
        # What another run leaves: here a student that is its teacher.
        student["init"] = mapping["family"]["teacher"]
    for stage in mapping.get("stages", [mapping]):
        stage["run"] = stage["run"] | {"steps": 1}
    return recipe_from(mapping)


def _teacher(path: Path, folder: Path, precision: str) -> dict[str, str]:
    """precision: which accelerate fixes once in a process."""
    stand_in = STAND_INS[path.stem]
    if not stand_in:
        return {}
    if stand_in in tiny.VARIANTS:
        return {"teacher": str(tiny.directory(stand_in))}
    before = small(path.with_stem(stand_in), folder / stand_in, precision)
    run(before)
    return {"teacher": str(RunDirectory(before.run.out).student)}


def _reduced(value: Any) -> Any:
    if isinstance(value, list):
        return [_reduced(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    small = {key: SMALL.get(key, _reduced(each)) for key, each in value.items()}
    return small | {key: min(2, value[key]) for key in RANKS if key in value}


def _data(family: str, section: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A source of the same kind: prompts, pictures with classes, pictures with captions."""
    if section["name"] == "prompts":
        path = folder / "prompts.txt"
        path.write_text("a red circle\na small blue square\n")
        return {"name": "prompts", "path": str(path)}
    if family in CLASSES:
        images = labelled_images(folder / "images", CLASSES[family], each=1, size=SIDE)
        mirrored = {"flip": section["flip"]} if "flip" in section else {}
        return {"name": "folder", "path": str(images), "resolution": SIDE, **mirrored}
    return {"name": "scenes", "size": 8, "resolution": SIDE}


def _seeing(method: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """With a frozen network of random weights for each that a loss looks through."""
    made = dict(method)
    if made.get("lpips_weights"):
        made["lpips_weights"] = str(perceptual.written(folder / "lpips.safetensors"))
    if made.get("eye") == "dino":
        made["arguments"] = {"directory": str(perceptual.dino(folder / "dino")), "side": perceptual.DINO_SIDE}
    return made
