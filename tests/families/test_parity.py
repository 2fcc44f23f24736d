"""A teacher through our denoiser is the teacher in its stock pipeline."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from models import family_of

from stepdistill.drawing import Sampler

# A tuple, as some stock pipelines write into the list they are handed.
PROMPTS, SEEDS = ("a red circle", "two stars"), (5, 6)
# A divisor of 1000: with others DDIM steps to a time beside the one its network is called at next.
STEPS = 4
# Their pipelines never call the network without the prompt.
UNGUIDED = ("flux2-dev", "flux2-distilled")


@pytest.mark.parametrize(
    ("variant", "guidance"),
    [*tiny.one_of_each_family(3), *(pytest.param(v, 1, marks=pytest.mark.slow) for v in tiny.VARIANTS)],
)
def test_the_teacher_equals_its_stock_pipeline(variant, guidance):
    if variant in UNGUIDED and guidance != 1:
        pytest.skip("the stock pipeline does not guide")
    family = family_of(variant)
    stock = DiffusionPipeline.from_pretrained(tiny.directory(variant))
    stock.set_progress_bar_config(disable=True)
    if hasattr(stock.scheduler, "alphas_cumprod"):
        # The process is the teacher's whatever its own solver; ours is DDIM.
        stock.scheduler = DDIMScheduler.from_config(
            stock.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
        )
    theirs = stock(
        prompt=list(PROMPTS), num_inference_steps=STEPS, output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        **family.stock_call(guidance),
    ).images  # fmt: skip
    sampler = Sampler(family, family.teacher, tiny.directory(variant))
    with torch.no_grad():
        ours = family.decode(sampler.at(STEPS, guidance, chunk=2).x0(PROMPTS, SEEDS)).clamp(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert ours.std() > 0.01
