"""A teacher through our denoiser is the teacher in its stock pipeline."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from stepdistill.drawing import Sampler
from stepdistill.families import FAMILIES
from stepdistill.registry import resolve

PROMPTS, SEEDS = ["a red circle", "two stars"], [5, 6]
# A divisor of 1000: with others DDIM steps to a time beside the one its network is called at next.
STEPS = 4
# Where the pipeline's own size is another, and prompts are padded to many tokens.
SETTINGS = {"flux": {"resolution": [32], "max_tokens": 16}, "chroma": {"resolution": [32], "max_tokens": 16}}


def family_of(variant):
    name, _, _ = tiny.VARIANTS[variant]
    cls = resolve(name, FAMILIES, "family")
    return cls.from_directory(tiny.directory(variant), SETTINGS.get(name))


@pytest.mark.parametrize("guidance", [1, 3])
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_the_teacher_equals_its_stock_pipeline(variant, guidance):
    family = family_of(variant)
    stock = DiffusionPipeline.from_pretrained(tiny.directory(variant))
    stock.set_progress_bar_config(disable=True)
    if hasattr(stock.scheduler, "alphas_cumprod"):
        # The process is the teacher's whatever its own solver; ours is DDIM.
        stock.scheduler = DDIMScheduler.from_config(
            stock.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
        )
    theirs = stock(
        PROMPTS, num_inference_steps=STEPS, output_type="pt", generator=[torch.Generator().manual_seed(s) for s in SEEDS],
        **family.stock_call(guidance),
    ).images  # fmt: skip
    sampler = Sampler(family, family.teacher, tiny.directory(variant))
    with torch.no_grad():
        ours = family.decode(sampler.at(STEPS, guidance, chunk=2).x0(PROMPTS, SEEDS)).clamp(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert ours.std() > 0.01
