"""alpha, sigma, their derivatives and rho <-> t against closed forms, published numbers, diffusers."""

from __future__ import annotations

import math

import pytest
import torch

from stepdistill.families.schedulers import flow_scheduler
from stepdistill.sampling import Sampling
from stepdistill.schedule import EDM, VP, Flow, TrigFlow, expand

SCHEDULES = {
    "vp": VP.from_betas(),
    "edm": EDM(),
    "flow": Flow(),
    "trig": TrigFlow(),
    "trig half": TrigFlow(0.5),
}
EVERY = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "at_min", "at_max"),
    [
        (
            "vp",
            (math.sqrt(1 - 0.00085), math.sqrt(0.00085)),
            (math.sqrt(0.0046600), math.sqrt(1 - 0.0046600)),
        ),
        ("edm", (1, 0.002), (1, 80)),
        ("flow", (1, 0), (0, 1)),
        ("trig", (1, 0), (0, 1)),
        ("trig half", (1, 0), (0, 0.5)),
    ],
)
def test_the_ends(name, at_min, at_max):
    schedule = SCHEDULES[name]
    t = f64(schedule.t_min, schedule.t_max)
    for function, expected in (
        (schedule.alpha, (at_min[0], at_max[0])),
        (schedule.sigma, (at_min[1], at_max[1])),
    ):
        assert function(t).dtype == torch.float64
        torch.testing.assert_close(function(t), f64(*expected), rtol=2e-5, atol=1e-12)


@EVERY
def test_derivatives_equal_central_differences(schedule):
    # Away from the ends, and off the kinks a table has at its whole times.
    u = torch.linspace(0.01, 0.98, 41, dtype=torch.float64)
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * u
    if isinstance(schedule, VP):
        t = t.floor() + 0.3
    h = 1e-5
    for function, derivative in ((schedule.alpha, schedule.d_alpha), (schedule.sigma, schedule.d_sigma)):
        numeric = (function(t + h) - function(t - h)) / (2 * h)
        torch.testing.assert_close(derivative(t), numeric, rtol=1e-5, atol=1e-9)


@EVERY
def test_rho_and_time_are_inverse(schedule):
    u = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * u
    rho = schedule.rho(t)
    torch.testing.assert_close(rho, schedule.sigma(t) / schedule.alpha(t), rtol=1e-12, atol=0)
    assert bool((rho[1:] > rho[:-1]).all())
    torch.testing.assert_close(schedule.t_of_rho(rho), t, rtol=1e-9, atol=1e-9)


@EVERY
def test_rho_beyond_the_schedule_gives_the_nearer_end(schedule):
    t = schedule.t_of_rho(f64(1e-13, 1e12))
    torch.testing.assert_close(t, f64(schedule.t_min, schedule.t_max), rtol=1e-9, atol=1e-9)


def test_stable_diffusion_has_the_published_numbers():
    schedule = SCHEDULES["vp"]
    rho = schedule.rho(f64(399, 625, 800, 999))
    torch.testing.assert_close(rho, f64(1.161, 2.502, 5.11, 14.61), rtol=0, atol=5e-3)
    assert (
        abs(float(schedule.rho(f64(399))) - 1.161) < 5e-4
        and abs(float(schedule.rho(f64(625))) - 2.502) < 5e-4
    )
    assert abs(float(schedule.alpha(f64(999)) ** 2) - 0.00466) < 5e-6


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_the_table_equals_diffusers(kind):
    from diffusers import DDPMScheduler

    start, end = (0.00085, 0.012) if kind == "scaled_linear" else (1e-4, 0.02)
    theirs = DDPMScheduler(beta_start=start, beta_end=end, beta_schedule=kind)
    ours, t = VP.from_betas(kind, start, end), torch.arange(1000)
    torch.testing.assert_close(ours.alpha(t) ** 2, theirs.alphas_cumprod.double(), rtol=2e-5, atol=0)
    # Exact at whole times.
    read = VP(theirs.alphas_cumprod)
    torch.testing.assert_close(read.alpha(t) ** 2, theirs.alphas_cumprod.double(), rtol=1e-12, atol=0)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, 4, 4, generator=generator)
    times = torch.tensor([0, 17, 500, 998, 999])
    torch.testing.assert_close(
        read.add_noise(x0, eps, times.double()), theirs.add_noise(x0, eps, times), rtol=1e-5, atol=1e-6
    )


def test_between_table_entries_log_rho_is_linear():
    schedule = SCHEDULES["vp"]
    left, middle, right = schedule.rho(f64(400, 400.25, 401)).log()
    assert abs(float(middle - (0.75 * left + 0.25 * right))) < 1e-12
    torch.testing.assert_close(
        schedule.alpha(f64(400.25)) ** 2 + schedule.sigma(f64(400.25)) ** 2, f64(1), rtol=0, atol=1e-14
    )


def test_zero_terminal_snr_stays_finite():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6
    schedule = VP(torch.cat((scheduler.alphas_cumprod[:-1], torch.zeros(1))))
    t = f64(998.0, 998.5, 999.0)
    for function in (schedule.alpha, schedule.sigma, schedule.rho, schedule.d_alpha, schedule.d_sigma):
        assert bool(torch.isfinite(function(t)).all())
    assert float(schedule.alpha(f64(999))) == pytest.approx(1e-4, rel=1e-6)
    torch.testing.assert_close(schedule.t_of_rho(schedule.rho(t)), t, rtol=1e-12, atol=0)


@pytest.mark.parametrize("table", [[0.9], [0.9, 0.9], [0.5, 0.6], [1.1, 0.5], [0.5, -0.1]])
def test_a_table_that_does_not_fall_is_refused(table):
    with pytest.raises(ValueError, match="fall strictly"):
        VP(table)
    with pytest.raises(ValueError, match="beta kind"):
        VP.from_betas("cosine")


def test_half_precision_images_get_float32_coefficients():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)
    shaped = expand(f64(0.123456789, 1), images)
    assert shaped.shape == (2, 1, 1, 1) and shaped.dtype == torch.float32
    assert expand(f64(1), images[:1].double()).dtype == torch.float64


def test_a_shift_moves_the_grids_and_not_the_process():
    from diffusers import FlowMatchEulerDiscreteScheduler

    plain, shifted = Flow(), Flow(3.0)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(plain.sigma(t), shifted.sigma(t)) and torch.equal(plain.alpha(t), shifted.alpha(t))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(shifted.teacher_grid(4), abs=1e-6)
    assert shifted.few_step_grid(2, 4) == pytest.approx(shifted.few_step_grid(4)[::2])
    # It starts at the noise level asked for, whatever the shift.
    first = torch.tensor(shifted.few_step_grid(4, 4, 2.5)[:1], dtype=torch.float64)
    assert float(shifted.rho(first)) == pytest.approx(2.5)


@pytest.mark.parametrize("passes_sigmas", [True, False])
@pytest.mark.parametrize("rule", ["ode", "renoise"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_few_step_flow_student_is_called_at_the_times_its_stock_scheduler_lists(steps, rule, passes_sigmas):
    """Whatever a many-step model's own last time: FLUX.2's shift by steps, Qwen-Image's terminal, SD3's smallest time."""
    schedule = Flow(lambda n: 3 + n / 10, last=0.0 if passes_sigmas else 0.003, terminal=0.02)
    sampling = Sampling(steps=(steps,), rule=rule)
    scheduler = flow_scheduler(schedule, sampling, passes_sigmas)
    even = {"sigmas": [1 - i / steps for i in range(steps)]} if passes_sigmas else {}
    scheduler.set_timesteps(num_inference_steps=steps, **even)
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(sampling.grid(schedule, steps), abs=1e-6)


@pytest.mark.parametrize("ours", [Flow(), TrigFlow(), TrigFlow(0.5)], ids=["flow", "trig", "trig half"])
@pytest.mark.parametrize("theirs", [Flow(), TrigFlow(), TrigFlow(0.5)], ids=["flow", "trig", "trig half"])
def test_noise_alone_is_noise_alone_in_another_process(ours, theirs):
    """Where sigma / alpha has no number; between, the ratio is the same."""
    assert ours.time_of(theirs, f64(theirs.t_max)).item() == pytest.approx(ours.t_max, abs=1e-12)
    t = f64(0.0, 0.1, 0.5, 0.9) * theirs.t_max
    torch.testing.assert_close(ours.rho(ours.time_of(theirs, t)), theirs.rho(t))


def test_samplers_grids_keep_their_own_first_and_last_times():
    """Qwen-Image's terminal, a last time of the scheduler's own, a shift by the number of steps, a start at less noise."""
    assert Flow(2.0, terminal=0.02).teacher_grid(4)[-1] == pytest.approx(0.02)
    assert Flow(2.0, last=0.01).teacher_grid(4)[-1] == pytest.approx(2 * 0.01 / 1.01)
    of_steps = Flow(lambda steps: float(steps))
    assert (
        of_steps.few_step_ode_grid(2, 4)
        == Flow(4.0).few_step_ode_grid(2, 4)
        != Flow(2.0).few_step_ode_grid(2, 2)
    )
    assert EDM().few_step_grid(1, first_rho=2.5) == pytest.approx((2.5,))
