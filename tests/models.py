"""Every method on every model family: one optimiser step of each phase on a tiny pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import worlds
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor
from worlds import World

from stepdistill.drawing import Sampler
from stepdistill.errors import UserError
from stepdistill.families import FAMILIES
from stepdistill.families.base import Family
from stepdistill.lora import NO_LORA, LoraConfig
from stepdistill.methods.assemble import assemble
from stepdistill.registry import resolve
from training.data.base import Source

COUNT = 2
SEEDS = [5, 6]
# A divisor of 1000: with others DDIM steps to a time beside the one its network is called at next.
STEPS = 4
# Where a pipeline's own size is large, or prompts are padded to many tokens.
SETTINGS = {
    "sd3": {"max_tokens": 16},
    "sana": {"max_tokens": 16, "instruction": False},
    "sana_sprint": {"max_tokens": 16, "instruction": False},
    "wan": {"resolution": [32], "frames": 5, "max_tokens": 16},
    "flux": {"resolution": [32], "max_tokens": 16},
    "chroma": {"resolution": [32], "max_tokens": 16},
    "flux2": {"resolution": [32], "max_tokens": 48},
    "z_image": {"resolution": [32], "max_tokens": 48},
    # A system prompt of its own length, so that the pipeline's own is not all that is heard.
    "lumina2": {"max_tokens": 48, "system_prompt": "draw"},
    # The pipeline's own words are 200 letters.
    "qwen_image": {"resolution": [32], "max_tokens": 256},
}
# Pipelines that draw squares alone.
SQUARE = {"dit"}
# Conditions of two images.
TOLD: dict[str, list[Any]] = {"prompt": ["a red circle", "two stars"], "class": [1, 0]}
# Methods on images look through the embedded CLIP, which knows the words of the scenes.
METHODS: dict[str, dict[str, Any]] = {
    "add": {"gan": "non_saturating"},
    "reward": {"margin": 10.0},
    "rdm": {"chunks": 2},
}


class Pictures(Source):
    """A data source of noise for pictures (H, W) or videos (F, H, W), with captions and classes."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(None)
        self.shape = shape
        self.captions = ("a red circle", "a small blue square")
        self.labels = tuple(TOLD["class"])

    def images(self, indices: Any) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, (len(indices), *self.shape, 3), np.uint8)


def family_of(variant: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Family:
    """The family of a tiny variant, its teacher the variant's pipeline."""
    name, _, _ = tiny.VARIANTS[variant]
    cls = resolve(name, FAMILIES, "family")
    return cls.from_directory(tiny.directory(variant), SETTINGS.get(name, {}) | settings, dtype)


def asked_for(family: Family) -> dict[str, Any]:
    """How a stock pipeline is asked for two images."""
    name = {"prompt": "prompt", "class": "class_labels"}[family.conditions]
    # A list of its own, as some stock pipelines write into the one they are handed.
    return {name: list(TOLD[family.conditions])}


def drawn_by_both(family: Family, directory: Path, guidance: float) -> tuple[Tensor, Tensor]:
    """Two images in [0, 1] of a teacher's directory: by our sampler, and by its stock pipeline with DDIM, of which the
    process is the teacher's whatever its own solver.
    """
    stock = DiffusionPipeline.from_pretrained(directory, **family.stock_load())
    stock.set_progress_bar_config(disable=True)
    if hasattr(stock.scheduler, "alphas_cumprod"):
        stock.scheduler = DDIMScheduler.from_config(
            stock.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
        )
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    sampler = Sampler(family, family.teacher, directory)
    _, call = family.stock_steps(sampler.sampling, STEPS)
    call |= family.stock_sampling(sampler.sampling, guidance) | asked_for(family)
    theirs = stock(generator=generators, num_inference_steps=STEPS, output_type="pt", **call)[family.output]
    with torch.no_grad():
        x0 = sampler.at(STEPS, guidance, chunk=2).x0(TOLD[family.conditions], SEEDS)
        ours = everything(family, x0)
    return ours, theirs


def everything(family: Family, x0: Tensor) -> Tensor:
    """Images in [0, 1] (N, 3, H, W), or of a video, of which its image is one frame, all (N, F, 3, H, W)."""
    return (family.frames if family.output == "frames" else family.decode)(x0).clamp(0, 1)


def wide(variant: str) -> Family:
    """The family at images at least half as wide again as high, where its pipeline takes such."""
    family = family_of(variant)
    if family.name in SQUARE:
        return family
    height = family.resolution[0]
    width = -(-height * 3 // 2 // family.sides) * family.sides
    return family_of(variant, resolution=[height, width])


def model_world(family: Family, name: str, lora: LoraConfig = NO_LORA, **settings: Any) -> World:
    """A method on a family's tiny pipeline, the student a little off its teacher.

    Raises:
        UserError: the two do not go together.
    """
    own = METHODS[name] if name in METHODS else worlds.SETTINGS.get(name, {})
    settings = own | settings
    made = worlds.method(name, **settings)
    torch.manual_seed(0)
    nets = assemble(made, family, lora=lora)
    # At a fixed point nothing would move, and rightly so.
    for key, module in nets.modules.items():
        if key.rpartition("/")[2] in ("student", "fake_score") or key.startswith("path_"):
            worlds.stir(module)
    frames = (family.config.frames,) if family.output == "frames" else ()
    return World(made, family, nets, nets.student, Pictures((*frames, *family.resolution)))


def step_of_each_phase(made: World, steps: int = 6) -> dict[tuple[str, ...], dict[str, float]]:
    """Take an optimiser step in each of the method's phases; what was trained -> how far it moved."""
    moved: dict[tuple[str, ...], dict[str, float]] = {}
    for step in range(steps):
        ran = list(made.method.phases(step))
        for phase in ran:
            if phase.trains in moved:
                continue
            made.backward(phase, step, COUNT)
            moved[phase.trains] = {key: taken(made.nets.modules[key]) for key in phase.trains}
        made.method.after_step(made.nets, step, tuple(phase.name for phase in ran))
    return moved


def taken(module: torch.nn.Module, lr: float = 1e-3) -> float:
    """How far an optimiser step takes the parameters, in all."""
    before = [parameter.detach().clone() for parameter in module.parameters()]
    torch.optim.Adam(module.parameters(), lr).step()
    after = [parameter.detach() for parameter in module.parameters()]
    return sum(float((a - b).abs().sum()) for a, b in zip(before, after, strict=True))


def refused(variant: str, name: str, **settings: Any) -> str:
    """Why a method does not go with a variant's family, "" where it trains: every phase moves all it is to train."""
    try:
        made = model_world(family_of(variant), name, **settings)
    except UserError as error:
        return str(error)
    moved = step_of_each_phase(made)
    assert moved
    for trained, distances in moved.items():
        assert set(trained) == set(distances) and all(distances.values()), distances
    return ""
