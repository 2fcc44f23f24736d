"""Students of every family in their stock pipelines: the images of our sampler, for the same noise."""

from __future__ import annotations

import pytest
import tiny
import torch
import worlds
from diffusers import DiffusionPipeline
from diffusers.schedulers import (
    scheduling_flow_match_euler_discrete,
    scheduling_flow_match_lcm,
    scheduling_lcm,
)
from models import TOLD, asked_for, family_of
from PIL import Image
from stock import exported

from stepdistill.drawing import Sampler

SEEDS = [5, 6]


@pytest.fixture
def renoised(monkeypatch):
    """What stock schedulers draw between two steps, in their pipelines' layouts, as it is drawn."""
    drawn: list[torch.Tensor] = []
    for module in (scheduling_lcm, scheduling_flow_match_lcm, scheduling_flow_match_euler_discrete):
        if draw := getattr(module, "randn_tensor", None):

            def remember(*args, draw=draw, **kwargs):
                drawn.append(draw(*args, **kwargs))
                return drawn[-1]

            monkeypatch.setattr(module, "randn_tensor", remember)
    return drawn


def ours(sampler: Sampler, steps: int, renoised: list[torch.Tensor]) -> torch.Tensor:
    """Images (N, 3, H, W) of the in-memory student, renoised with what a stock scheduler drew."""
    family, times = sampler.family_, sampler.times(steps)
    z = torch.stack(
        [torch.randn(family.shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    )
    first = sampler.sampling.first_input(sampler.denoiser.schedule, z, times[0])
    with torch.no_grad():
        x0 = sampler.sampling.sample(
            sampler.denoiser,
            first,
            times,
            lambda i: family.from_stock_noise(renoised[i]),
            family.encode(TOLD[family.conditions]),
        )
        return family.decode(x0).clamp(0, 1)


def every_rule() -> list:
    """Four steps that renoise of one variant of each family; all variants, the ODE and single steps slowly."""
    slow = [
        pytest.param(variant, rule, steps, marks=pytest.mark.slow)
        for variant in tiny.VARIANTS
        for rule, steps in (("ode", 4), ("ode", 1), ("renoise", 1))
    ]
    return [*tiny.one_of_each_family("renoise", 4), *slow]


@pytest.mark.parametrize(("variant", "rule", "steps"), every_rule())
def test_a_student_draws_the_same_images_in_its_stock_pipeline(variant, rule, steps, tmp_path, renoised):
    family, directory = family_of(variant), tmp_path / "student"
    method = worlds.method("dmd2" if rule == "renoise" else "progressive", steps=(steps,))
    sampler = exported(family, method, directory, {"teacher": variant})
    stock = DiffusionPipeline.from_pretrained(directory)
    stock.set_progress_bar_config(disable=True)
    call = asked_for(family) | {"output_type": "pt"} | family.stock_call(1.0)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = stock(num_inference_steps=steps, generator=generators, **call).images
    assert len(renoised) >= (steps - 1 if rule == "renoise" else 0)
    images = ours(sampler, steps, renoised)
    assert images.std() > 0.01
    torch.testing.assert_close(images, theirs, rtol=0, atol=1e-4)
    if rule == "renoise" and steps > 1:
        # The default call is for many-step models.
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            stock(**call)
        the_cards_own_code_draws(directory, family.resolution)


def the_cards_own_code_draws(directory, resolution):
    code = (directory / "README.md").read_text().split("```python")[1].split("```")[0]
    scope: dict = {}
    exec(code.replace("PATH_TO_THIS_DIRECTORY", str(directory)), scope)
    image = scope["image"]
    assert isinstance(image, Image.Image) and image.size == resolution[::-1]
