"""Full-size models by their published configurations, without a byte of weights: what a run of one would take is known
before it is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.families import FAMILIES
from stepdistill.families.base import Family
from stepdistill.registry import resolve
from training.ledger import META
from training.recipe import Recipe

# Name -> the model's class and configuration; for forecasts also its family, hub ids, VAE, scheduler, and the shapes of what
# it is told.
LAYOUTS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text())


def full_size(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The denoiser on the meta device."""
    return _made(LAYOUTS[name], dtype)


def layout_of(teacher: str) -> str:
    """The layout of a hub id, "" where it is of none."""
    return next((name for name, said in LAYOUTS.items() if teacher in said["teachers"]), "")


def on_paper(name: str, recipe: Recipe) -> Family:
    """The recipe's family around a layout: everything but content, so that `forecast` can be asked."""
    said, config = LAYOUTS[name], recipe.family.config
    cls = resolve(said["family"], FAMILIES, "family")
    dtype = getattr(torch, config.dtype)
    family = cls.__new__(cls)
    family.config, family.metrics, family._empty, family.path = config, {}, None, Path(name)
    import diffusers

    vae, scheduler = said["vae"], said["scheduler"]
    parts = {
        cls.face.inner: _made(said, dtype),
        "vae": _made(vae, dtype),
        "scheduler": getattr(diffusers, scheduler["class"]).from_config(scheduler["config"]),
        # In latents, as pipelines of transformers name their own size.
        "default_sample_size": 128,
        "vae_scale_factor": 32 if vae["class"] == "AutoencoderDC" else 8,
        "name_or_path": "",
        "config": SimpleNamespace(force_zeros_for_empty_prompt=True),
        **{f"text_encoder_{number}": _Encoder() for number in (2, 3)},
        "tokenizer_3": (),
    }
    family.set_pipeline(SimpleNamespace(**parts))

    def told(prompts: Any) -> dict[str, Tensor]:
        return {key: torch.zeros(len(prompts), *shape, device=META) for key, shape in said["told"].items()}

    # Text encoders are away while conditions come from shards.
    vars(family).update(
        encode=told, uncond=lambda count: told(range(count)), prompts=lambda *_: ["a picture"]
    )
    return family


class _Encoder(nn.Module):
    """Stands for one that is away."""

    config = SimpleNamespace(projection_dim=1280)


def _made(said: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, said["class"]).from_config(said["config"]).to(dtype)


class PaperSource:
    """Data of any method, of which there is no end."""

    has_images, bucketed, routing, frames, labels = True, False, None, 1, None
    size, captions = 1_000_000_000, ("a picture",)
