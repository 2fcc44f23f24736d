"""FLUX.2: scales its network is told, times that depend on how many they are, statistics of its latents."""

from __future__ import annotations

import pytest
import tiny
import torch
import worlds
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from models import drawn_by_both, family_of
from stock import exported

from stepdistill.drawing import Sampler
from stepdistill.errors import UserError
from stepdistill.families.flux2 import mu

PROMPT, SEED = "a red circle", 5


@pytest.mark.parametrize("tokens", [16, 4096, 4300, 4301, 16384])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_the_shift_is_the_pipelines(tokens, steps):
    assert mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), abs=1e-12)


def test_a_grid_is_shifted_by_its_own_number_of_steps():
    schedule = family_of("flux2-klein").schedule
    # At 16 tokens, from the published fit: 2.31 at 4096 tokens and one step, 2.02 at 50.
    assert schedule.shift_at(4) > schedule.shift_at(50) > 1
    assert schedule.few_step_grid(2, 4) == pytest.approx(schedule.few_step_grid(4)[::2])
    assert schedule.teacher_grid(2)[1] != pytest.approx(schedule.teacher_grid(4)[2], abs=1e-3)


def test_latents_are_patches_of_unit_variance_and_come_back():
    family = family_of("flux2-klein")
    mean, variance = family.vae.bn.running_mean, family.vae.bn.running_var
    x0 = torch.randn(2, *family.shape)
    z = family.denormalised(x0)
    assert z.shape == (2, family.shape[0] // 4, 2 * family.shape[1], 2 * family.shape[2])
    torch.testing.assert_close(family.normalised(z), x0, rtol=1e-5, atol=1e-5)
    # The patch's four pixels of channel 1 are channels 4 to 7.
    expected = x0[:, 4:8, 0, 0] * (variance[4:8] + 1e-4).sqrt() + mean[4:8]
    torch.testing.assert_close(z[:, 1, :2, :2].flatten(1), expected)


def test_the_scale_that_dev_is_told_is_the_pipelines_guidance():
    stock = DiffusionPipeline.from_pretrained(tiny.directory("flux2-dev"))
    stock.set_progress_bar_config(disable=True)
    drawn = []
    for scale in (1.5, 4.0):
        family = family_of("flux2-dev", embedded_guidance=scale)
        call = family.stock_call(1.0)
        assert call["guidance_scale"] == scale
        generator = torch.Generator().manual_seed(SEED)
        theirs = stock(
            prompt=PROMPT, num_inference_steps=2, output_type="pt", generator=generator, **call
        ).images
        sampler = Sampler(family, family.teacher, tiny.directory("flux2-dev"))
        with torch.no_grad():
            drawn.append(family.decode(sampler.at(2, chunk=1).x0([PROMPT], [SEED])).clamp(0, 1))
        torch.testing.assert_close(drawn[-1], theirs, rtol=0, atol=1e-5)
    assert float((drawn[0] - drawn[1]).abs().max()) > 1e-4
    x, t = torch.randn(1, *family.shape), torch.tensor([0.5])
    told = family.teacher(x, t, family.encode([PROMPT]), guidance=torch.tensor([1.5])).x0
    other = family_of("flux2-dev", embedded_guidance=1.5)
    torch.testing.assert_close(told, other.teacher(x, t, other.encode([PROMPT])).x0)


def test_klein_cannot_be_told_a_scale():
    family = family_of("flux2-klein")
    with pytest.raises(UserError, match="cannot be told the 'guidance'"):
        family.student("teacher", ("guidance",))
    assert family.default_guidance == 4.0 and family_of("flux2-distilled").default_guidance == 1.0


def test_a_klein_student_is_not_guided_whatever_its_pipeline_is_called_with(tmp_path):
    family = family_of("flux2-klein")
    exported(family, worlds.method("dmd2", steps=(1,)), tmp_path / "student", {"teacher": "klein"})
    stock = DiffusionPipeline.from_pretrained(tmp_path / "student")
    stock.set_progress_bar_config(disable=True)
    assert stock.config.is_distilled
    call = family.stock_call(1.0) | {"num_inference_steps": 1, "output_type": "pt"}
    plain, guided = (
        stock(
            prompt=PROMPT, generator=torch.Generator().manual_seed(SEED), **call | {"guidance_scale": scale}
        ).images
        for scale in (1.0, 4.0)
    )
    assert torch.equal(plain, guided)


def test_images_need_not_be_square_and_have_sides_of_whole_tokens():
    ours, theirs = drawn_by_both(
        family_of("flux2-klein", resolution=[32, 48]), tiny.directory("flux2-klein"), 3
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="multiples of 8"):
        family_of("flux2-klein", resolution=[36, 32])
