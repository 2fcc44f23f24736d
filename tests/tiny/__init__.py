"""Stock pipelines of every model family, tiny and with random weights: the real ones' load path without downloads."""

from __future__ import annotations

import functools
import importlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

# Variant -> (family, module with a function `build`, its arguments).
VARIANTS: dict[str, tuple[str, str, dict]] = {
    "sd15": ("sd", "sd", {}),
    "sdxl": ("sdxl", "sdxl", {}),
    "pixart-alpha": ("pixart", "pixart", {"sigma": False}),
    "pixart-sigma": ("pixart", "pixart", {"sigma": True}),
    "dit": ("dit", "dit", {}),
    "hunyuan_dit": ("hunyuan_dit", "hunyuan_dit", {}),
    "sd3": ("sd3", "sd3", {}),
    "sd3.5": ("sd3", "sd3", {"three_five": True}),
    "sd3-no-t5": ("sd3", "sd3", {"t5": False}),
    "sana": ("sana", "sana", {}),
    "sana-sprint": ("sana_sprint", "sana", {"sprint": True}),
    "flux-dev": ("flux", "flux", {"guidance": True}),
    "flux-schnell": ("flux", "flux", {"guidance": False}),
    "chroma": ("chroma", "chroma", {}),
    "flux2-klein": ("flux2", "flux2", {"klein": True}),
    "flux2-distilled": ("flux2", "flux2", {"klein": True, "distilled": True}),
    "flux2-dev": ("flux2", "flux2", {"klein": False}),
    "qwen-image": ("qwen_image", "qwen_image", {}),
    "z-image": ("z_image", "z_image", {}),
    "lumina2": ("lumina2", "lumina2", {}),
    "lumina2-dynamic": ("lumina2", "lumina2", {"dynamic": True}),
    "wan": ("wan", "wan", {}),
    "wan-2.2-ti2v": ("wan", "wan", {"expand_timesteps": True}),
}


def one_of_each_family(*fixed: Any) -> list[Any]:
    """Parameters of a test, one per variant and then `fixed`: the first of each family, the others marked slow."""
    families = [family for family, _, _ in VARIANTS.values()]
    firsts = {families.index(family) for family in families}
    return [
        pytest.param(variant, *fixed, marks=() if number in firsts else pytest.mark.slow)
        for number, variant in enumerate(VARIANTS)
    ]


@functools.cache
def directory(variant: str) -> Path:
    """Where such a pipeline lies, built once per process. Read it; copy it before you change anything."""
    _, module, settings = VARIANTS[variant]
    path = Path(tempfile.mkdtemp(prefix=f"tiny-{variant}-"))
    torch.manual_seed(0)
    pipeline = importlib.import_module(f"tiny.{module}").build(**settings)
    pipeline.save_pretrained(path)
    return path
