"""One teacher step: DDIM number by number, the order of Euler and Heun on a flow known in closed form."""

from __future__ import annotations

import itertools

import pytest
import torch

from stepdistill.denoiser import Denoiser
from stepdistill.families.toy import gaussian, gaussian_flow_map
from stepdistill.prediction import Prediction
from stepdistill.schedule import EDM, VP, Flow, TrigFlow
from stepdistill.solvers import SOLVERS, ddim, euler, heun

MEAN, STD = 0.7, 0.4


@pytest.mark.parametrize(("theirs", "ours"), [("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0")])
def test_ddim_equals_diffusers_number_by_number(theirs, ours):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=theirs,
        clip_sample=False, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(8)
    schedule = VP(scheduler.alphas_cumprod)
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(3, 4, 5, 5, generator=generator)
    times = scheduler.timesteps.tolist()
    for t, s in zip(times, [*times[1:], None], strict=True):
        output = torch.randn(x_t.shape, generator=generator)
        stock = scheduler.step(output, t, x_t).prev_sample

        def predict(x, time, output=output):
            return Prediction(output, ours, x, time, schedule)

        t_ = torch.full((3,), float(t), dtype=torch.float64)
        mine = predict(x_t, t_).x0 if s is None else ddim(predict, x_t, t_, torch.full_like(t_, s))
        torch.testing.assert_close(mine, stock, rtol=2e-5, atol=2e-5)
        x_t = stock


def local_error(solver, schedule, t: float, step: float) -> float:
    """Largest endpoint error of one step of the exact Gaussian teacher, from points spread over p_t."""
    teacher = Denoiser(gaussian(schedule, [MEAN], STD), "x0", schedule)
    time = torch.full((9,), t, dtype=torch.float64)
    alpha, sigma = float(schedule.alpha(time)[0]), float(schedule.sigma(time)[0])
    spread = (alpha**2 * STD**2 + sigma**2) ** 0.5
    x_t = alpha * MEAN + spread * torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    reached = solver(teacher, x_t, time, time - step)
    return float((reached - gaussian_flow_map(schedule, MEAN, STD, x_t, time, time - step)).abs().max())


@pytest.mark.parametrize(("solver", "factor"), [(euler, 4), (ddim, 4), (heun, 8)])
@pytest.mark.parametrize(
    ("schedule", "t", "step"), [(EDM(), 2.0, 0.2), (Flow(), 0.6, 0.04), (TrigFlow(), 0.9, 0.06)]
)
def test_local_error_falls_with_the_solvers_order(solver, factor, schedule, t, step):
    errors = [local_error(solver, schedule, t, step / 2**i) for i in range(4)]
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert ratios[-1] == pytest.approx(factor, rel=0.08), ratios
    # The ratio is of errors, not of rounding.
    assert errors[-1] > 1e-12


def test_under_edm_ddim_is_euler():
    for step in (0.05, 0.5):
        assert local_error(ddim, EDM(), 2.0, step) == pytest.approx(
            local_error(euler, EDM(), 2.0, step), rel=1e-9
        )


def test_ddim_is_exact_where_x0_is_known():
    """Data at one point: x0 is constant along the trajectory, so one step of any length is exact."""
    schedule = VP.from_betas()
    x0, eps = torch.full((4, 2), 0.3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    t, s = (torch.full((4,), value, dtype=torch.float64) for value in (900.0, 100.0))
    moved = ddim(
        lambda x, time: Prediction(x0, "x0", x, time, schedule), schedule.add_noise(x0, eps, t), t, s
    )
    torch.testing.assert_close(moved, schedule.add_noise(x0, eps, s), rtol=1e-10, atol=1e-10)


def test_calls_per_step():
    schedule = Flow()
    counted = []
    teacher = Denoiser(gaussian(schedule, [MEAN], STD), "x0", schedule)

    def predict(x_t, t):
        counted.append(t)
        return teacher(x_t, t)

    t = torch.full((2,), 0.5, dtype=torch.float64)
    for name, calls in (("ddim", 1), ("euler", 1), ("heun", 2)):
        counted.clear()
        moved = SOLVERS[name](predict, torch.zeros(2, 1, dtype=torch.float64), t, t - 0.1)
        assert len(counted) == calls and moved.shape == (2, 1)
