"""SiD (arXiv 2404.04057): the Fisher divergence and its extrapolation, the paper's times."""

from __future__ import annotations

import pytest
from quadrature import EVERY_SCHEDULE, TWO_STUDENTS, Line, close

from stepdistill.families.toy import SCHEDULES
from stepdistill.methods import METHODS
from stepdistill.registry import resolve


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
