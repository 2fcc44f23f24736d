"""Recipes whose teacher is a hub id, or what another run leaves, on a tiny pipeline of the same family instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
from models import SETTINGS
from runs import labelled_images

from stepdistill.config import read_yaml
from training.recipe import Recipe, recipe_from


@dataclass(frozen=True)
class StandIn:
    """variant: of `tiny.VARIANTS`. family: what its section says in the small, beside what all of the family say."""

    variant: str
    family: Mapping[str, Any] = field(default_factory=dict)


# Recipe -> its stand-in.
STAND_INS = {
    "shapes_flux_teacher": StandIn("flux-schnell"),
    "shapes_sdxl_teacher": StandIn("sdxl"),
    "sd15_dmd2_1step": StandIn("sd15"),
    "sd15_lcm_lora": StandIn("sd15"),
    "sd21_swiftbrush": StandIn("sd15"),
    "sdxl_dmd2_4step": StandIn("sdxl"),
    "sdxl_hyper_lora": StandIn("sdxl"),
    "sdxl_lightning": StandIn("sdxl"),
    "flux_dmd2_lora": StandIn("flux-dev"),
}
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


def small(path: Path, folder: Path) -> Recipe:
    """The recipe with its stand-in's teacher and data in `folder`; every stage is one iteration, in which each of its
    phases has a turn.
    """
    mapping, stand_in = _reduced(read_yaml(path)), STAND_INS[path.stem]
    name = mapping["family"]["name"]
    own = {
        key: value
        for key, value in mapping["family"].items()
        if key not in ("revision", "variant", "resolution")
    }
    size = {"resolution": [32]} | SETTINGS.get(name, {}) | dict(stand_in.family)
    mapping["family"] = own | size | {"teacher": str(tiny.directory(stand_in.variant))}
    mapping["data"] = _data(mapping["data"], size["resolution"][0], folder)
    mapping["run"] |= {"out": str(folder / "run"), "trackers": []}
    for stage in mapping.get("stages", [mapping]):
        stage["run"] = stage["run"] | {"steps": 1}
    return recipe_from(mapping)


def _reduced(value: Any) -> Any:
    if isinstance(value, list):
        return [_reduced(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    small = {key: SMALL.get(key, _reduced(each)) for key, each in value.items()}
    return small | {key: min(2, value[key]) for key in RANKS if key in value}


def _data(section: Mapping[str, Any], side: int, folder: Path) -> dict[str, Any]:
    """A source of the same kind: prompts, pictures with captions, pictures with classes."""
    if section["name"] == "prompts":
        path = folder / "prompts.txt"
        path.write_text("a red circle\na small blue square\n")
        return {"name": "prompts", "path": str(path)}
    if section["name"] == "folder":
        return {
            "name": "folder",
            "path": str(labelled_images(folder / "images", size=side)),
            "resolution": side,
        }
    return {"name": "scenes", "size": 8, "resolution": side}
