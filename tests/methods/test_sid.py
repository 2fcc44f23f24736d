"""SiD (arXiv 2404.04057): the Fisher divergence and its extrapolation, the paper's times."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quadrature import EVERY_SCHEDULE, TWO_STUDENTS, Line, close
from worlds import world

from stepdistill.families.toy import SCHEDULES
from stepdistill.methods import METHODS
from stepdistill.methods.base import Batch
from stepdistill.noise import SampleNoise
from stepdistill.registry import resolve
from stepdistill.schedule import VP
from training.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "training" / "recipes"


@EVERY_SCHEDULE
@TWO_STUDENTS
def test_sid_at_one_half_is_the_fisher_divergence_and_at_one_is_sim(schedule, theta):
    def sid(alpha: float) -> Line:
        return Line("sid", schedule, theta, alpha=alpha, normalise=False)

    half, one = sid(0.5), sid(1.0)
    ratio = half.alpha / half.sigma**2
    close(half.gradient(), half.direct(lambda y: y**2, sampling=True) / (2 * ratio**2))
    close(one.gradient(), Line("sim", schedule, theta, distance="l2").gradient())
    # And 1.2, the default, extrapolates from there.
    close(sid(1.2).gradient(), one.gradient() + 0.4 * (one.gradient() - half.gradient()))


def test_the_paper_times_and_first_state():
    """sigma z at t = 625 of Stable Diffusion's table; SiD compares at Karras indices up to 0.8 (sigma 24.4)."""
    line = Line("sid", SCHEDULES["vp"]())
    assert (
        line.method.sampling.grid(line.schedule, 1) == (625.0,) and line.method.sampling.init_noise == "sigma"
    )
    assert Line("sid", SCHEDULES["edm"]()).method.sampling.grid(SCHEDULES["edm"](), 1) == pytest.approx(
        (2.5,)
    )
    config = resolve("sid", METHODS, "method").Config()
    assert (config.alpha, config.time_density, config.t_low, config.t_high) == (1.2, "karras", 0.0, 0.8)
    top = (0.002 ** (1 / 7) + 0.8 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    assert top == pytest.approx(24.4, abs=0.05)


def test_sid_lsg_guides_the_fake_score_while_it_learns():
    """Its guided answer denoises; where the condition was dropped, the unconditional one."""
    settings = {"critic_guidance_scale": 2.0, "critic_dropout": 0.5, "critic_density": "uniform"}
    made = world("sid", steps=(1,), critic_low=0.02, critic_high=0.98, **settings)
    nets, method = made.nets, made.method
    losses, batch = method.critic_loss(nets, made.batch(phase="critic")), made.batch(phase="critic")
    x0 = method.generate(nets, batch).x0.detach()
    t = batch.generator.randint(20, 980).double()
    eps = batch.randn()
    dropped = batch.generator.rand() < 0.5
    x_t = nets.schedule.add_noise(x0, eps, t)
    c, u = (nets.fake_score(x_t, t, cond).x0 for cond in (batch.cond, batch.uncond))
    said = torch.where(dropped[:, None], u, u + 2 * (c - u))
    weight = (nets.schedule.rho(t) ** -2 + 1).to(x0)
    expected = weight * (said - x0).square().mean(1)
    assert bool(dropped.any()) and not bool(dropped.all())
    torch.testing.assert_close(losses["denoising"], expected, rtol=1e-4, atol=1e-5)


def test_the_recipe_for_stable_diffusion_is_sid_lsgs():
    """Uniform times from 20 to 979 for both networks, not EDM's log-normal, whose median is at 0.6 of the data's deviation."""
    recipe = load_recipe(RECIPES / "sd15_sid_lsg.yaml", [])
    config, table = recipe.method.config, VP.from_betas()
    method, nets = recipe.new_method(), world("sid", steps=(1,)).nets
    batch = Batch(None, None, (1,), torch.arange(4000), SampleNoise(range(4000)))
    for drawn in (method.times(nets, batch, config.t_low, config.t_high), method.critic_times(nets, batch)):
        assert (float(drawn.min()), float(drawn.max())) == (20, 979)
    scales = config.guidance_scale, config.fake_guidance_scale, config.critic_guidance_scale
    assert scales == (2, 2, 2) and config.alpha == 1
    assert method.sampling.grid(table, 1) == (625.0,)
