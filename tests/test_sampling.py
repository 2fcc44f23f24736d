"""The one few-step rule against diffusers and closed forms; images that depend on nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gaussians import EVERY_SCHEDULE, MADE, MEAN, STD, Oracle
from stock import (
    EVERY_KIND,
    close,
    drawn,
    seeded,
    states,
    stock_states,
)

from stepdistill import load
from stepdistill.card import Card
from stepdistill.denoiser import Denoiser
from stepdistill.drawing import Sampler
from stepdistill.errors import UserError
from stepdistill.families.toy import Toy, gaussian, gaussian_flow_map
from stepdistill.noise import SampleNoise
from stepdistill.prediction import Prediction
from stepdistill.sampling import Sampling
from stepdistill.schedule import EDM, VP, Flow, Schedule, times_like


def oracle(schedule: Schedule) -> Denoiser:
    """The exact consistency function: the end of the trajectory, not the posterior mean."""
    return Denoiser(Oracle(schedule), "x0", schedule)


@EVERY_KIND
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_renoise_equals_lcm_scheduler_step_by_step(steps, theirs, kind):
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(
        beta_schedule="scaled_linear", original_inference_steps=4, prediction_type=theirs
    )
    scheduler.set_timesteps(steps)
    schedule, times = VP(scheduler.alphas_cumprod), VP(scheduler.alphas_cumprod).few_step_grid(steps, 4)
    assert list(times) == scheduler.timesteps.tolist()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    start, outputs = drawn(steps)
    ours = states(outputs, kind, schedule, start, times, seeded(start, torch.float64))
    # c_skip is not quite 0.
    close(ours, stock_states(scheduler, outputs, start), 1e-6)


@EVERY_KIND
@pytest.mark.parametrize("steps", [1, 4])
def test_ode_equals_ddim_scheduler_step_by_step(steps, theirs, kind):
    """Where steps divide 1000: elsewhere the stock scheduler strides past its own times."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", prediction_type=theirs, clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    schedule = VP(scheduler.alphas_cumprod)
    for table in ("alphas_cumprod", "final_alpha_cumprod"):
        setattr(scheduler, table, getattr(scheduler, table).double())
    start, outputs = drawn(steps)
    ours = states(outputs, kind, schedule, start, schedule.teacher_grid(steps), rule="ode")
    close(ours, stock_states(scheduler, outputs, start), 1e-10)


@pytest.mark.parametrize(
    # Of the noise they draw.
    ("name", "settings", "rule", "dtype"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "renoise", torch.float32),
        ("FlowMatchLCMScheduler", {}, "renoise", torch.float64),
        ("FlowMatchEulerDiscreteScheduler", {}, "ode", None),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 4])
# At pure noise our alpha is 1e-4, not 0; below it both are exact, theirs in float32.
@pytest.mark.parametrize(("first_rho", "tolerance"), [(0.0, 5e-4), (9.0, 2e-6)])
def test_under_flow_the_rules_are_the_stock_schedulers(
    name, settings, rule, dtype, steps, first_rho, tolerance
):
    import diffusers

    scheduler, schedule = getattr(diffusers, name)(**settings), Flow()
    times = schedule.few_step_grid(steps, 0, first_rho)
    scheduler.set_timesteps(sigmas=list(times))
    start, outputs = drawn(steps)
    ours = states(outputs, "flow", schedule, start, times, seeded(start, dtype), rule=rule)
    close(ours, stock_states(scheduler, outputs, start), tolerance)


@pytest.mark.parametrize("name", ["edm", "flow", "trig"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_renoising_with_the_oracle_keeps_the_distribution(steps, name):
    schedule, n = MADE[name], 60_000
    noise = SampleNoise(range(n), step=steps, phase=name)
    grid = schedule.few_step_grid(steps)
    x = schedule.first_state(noise.randn(1, dtype=torch.float64), grid[0])
    x0 = Sampling().sample(oracle(schedule), x, grid, lambda _: noise.randn(1, dtype=torch.float64))
    # EDM starts from mean 0 where its own marginal has mean MEAN, a bias of STD / 80 standard deviations.
    bias = 0.002 if name == "edm" else 0.0
    assert abs(float(x0.mean()) - MEAN) < 5 * STD / n**0.5 + bias
    assert abs(float(x0.std()) - STD) < 5 * STD / (2 * n) ** 0.5
    # The posterior mean in its place does not keep it.
    if steps > 1:
        mean = Denoiser(gaussian(schedule, [MEAN], STD), "x0", schedule)
        assert (
            float(Sampling().sample(mean, x, grid, lambda _: noise.randn(1, dtype=torch.float64)).std())
            < 0.97 * STD
        )


@EVERY_SCHEDULE
def test_ode_with_the_exact_teacher_converges_to_the_flow_map(schedule):
    teacher = Denoiser(gaussian(schedule, [MEAN], STD), "x0", schedule)
    first = times_like(schedule.t_max, torch.zeros(7, 1))
    spread = (schedule.alpha(first) ** 2 * STD**2 + schedule.sigma(first) ** 2).sqrt()[:, None]
    x = (
        schedule.alpha(first)[:, None] * MEAN
        + spread * torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None]
    )
    end = torch.full_like(first, schedule.t_min)
    exact = gaussian_flow_map(schedule, MEAN, STD, x, first, end)
    # A table ends at rho = 0.03: the last x0 takes that noise away too, which leaves the data's quantiles.
    clean = MEAN + STD * torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None]
    torch.testing.assert_close(schedule.alpha(end)[:, None] * clean, exact, rtol=0, atol=5e-3)

    def error(steps: int) -> float:
        def no_noise(_: int) -> torch.Tensor:
            raise AssertionError("the ode rule draws no noise")

        drawn = Sampling(rule="ode").sample(teacher, x, schedule.teacher_grid(steps), no_noise)
        return float((drawn - clean).abs().max())

    coarse, fine, finest = error(50), error(200), error(800) if schedule.t_max < 900 else error(500)
    assert coarse > fine > finest and finest < 0.01 < float(clean.std())
    # Of first order.
    assert coarse / fine > 2.5


def test_first_input():
    z = torch.randn(4, 2, dtype=torch.float64)
    unit, sigma_noise = Sampling(), Sampling(init_noise="sigma")
    assert unit.first_input(MADE["vp"], z, 999) is z
    assert torch.equal(unit.first_input(MADE["edm"], z, 80.0), 80 * z)
    assert torch.equal(unit.first_input(MADE["flow"], z, 1.0), z)
    sigma = (1 - 0.0046600) ** 0.5
    first = sigma_noise.first_input(MADE["vp"], z, 999)
    torch.testing.assert_close(first, sigma * z, rtol=1e-5, atol=0)


def test_walk_stops_at_the_last_time_and_counts_steps():
    schedule, counted = Flow(), []
    x = torch.randn(3, 1, dtype=torch.float64)
    grid = (1.0, 0.5, 0.25)

    def draw(i: int) -> torch.Tensor:
        return torch.full_like(x, float(i))

    x_t = Sampling().walk(oracle(schedule), x, grid, draw, on_step=lambda i, n: counted.append((i, n)))
    assert counted == [(1, 3), (2, 3)]
    half = 0.5 * oracle(schedule)(x, times_like(1.0, x)).x0 + 0.5 * 0.0
    quarter = 0.75 * oracle(schedule)(half, times_like(0.5, x)).x0 + 0.25 * 1.0
    torch.testing.assert_close(x_t, quarter, rtol=1e-12, atol=1e-12)
    assert Sampling().walk(oracle(schedule), x, grid[:1], draw) is x


def test_extras_reach_every_call():
    heard = []

    def predict(x_t, t, cond, guidance):
        heard.append((cond, guidance))
        return Prediction(x_t, "x0", x_t, t, Flow())

    Sampling().sample(
        predict, torch.zeros(1, 1), (1.0, 0.5), lambda _: torch.zeros(1, 1), "cond", guidance="g"
    )
    assert heard == [("cond", "g")] * 2


@pytest.fixture(scope="module")
def toy() -> Sampler:
    family = Toy(Toy.Config(classes=4, fit_steps=0))
    student = family.student("teacher", ())
    card = Card("student", "toy", sampling=Sampling((1, 2, 4)))
    return Sampler(family, student, Path("toy"), card)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_sample_is_bitwise_independent_of_its_batch_and_of_padding(toy, steps):
    labels, seeds = [0, 1, 2, 3, 0, 1, 2], [10, 11, 12, 13, 14, 15, 16]
    whole = toy.at(steps, chunk=4).x0(labels, seeds)
    assert whole.shape == (7, 2)
    for i in (0, 3, 6):
        assert torch.equal(toy.at(steps, chunk=4).x0([labels[i]], [seeds[i]])[0], whole[i])
    order = [6, 2, 4, 0, 1, 5, 3]
    shuffled = toy.at(steps, chunk=4).x0([labels[i] for i in order], [seeds[i] for i in order])
    assert torch.equal(shuffled, whole[order])
    assert not torch.equal(toy.at(steps, chunk=4).x0([0], [10]), toy.at(steps, chunk=4).x0([0], [11]))
    assert not torch.equal(toy.at(steps, chunk=4).x0([0], [10]), toy.at(steps, chunk=4).x0([1], [10]))


def test_images_are_bitwise_independent_of_their_batch(tiny_sd):
    sampler = load(tiny_sd)
    prompts, seeds = ["a red circle", "a large blue square", ""], [1, 2, 3]
    timings: dict[str, float] = {}
    whole = sampler(prompts, seeds, steps=3, guidance_scale=2.0, chunk=2, timings=timings)
    assert whole.shape == (3, 3, 16, 16) and whole.dtype == torch.uint8 and float(whole.float().std()) > 1
    assert set(timings) == {"text", "denoise", "decode"} and min(timings.values()) > 0
    for i in range(3):
        assert torch.equal(
            sampler([prompts[i]], [seeds[i]], steps=3, guidance_scale=2.0, chunk=2)[0], whole[i]
        )
    assert not torch.equal(sampler(prompts[:1], seeds[:1], steps=3, guidance_scale=4.0, chunk=2)[0], whole[0])
    negative = sampler(prompts[:1], [1], steps=3, guidance_scale=2.0, chunk=2, negative_prompts=["a star"])
    assert not torch.equal(negative[0], whole[0])


def test_on_step_counts_per_chunk_and_may_raise(tiny_sd):
    sampler, counted = load(tiny_sd), []
    prompts, seeds, how = ["a star"] * 3, [1, 2, 3], {"steps": 4, "guidance_scale": 1.0, "chunk": 2}
    images = sampler(prompts, seeds, **how, on_step=lambda i, n: counted.append((i, n)))
    assert counted == [(1, 4), (2, 4), (3, 4), (4, 4)] * 2

    class Stop(Exception):
        pass

    def stop(i: int, n: int) -> None:
        counted.append((i, n))
        if i == 2:
            raise Stop

    counted.clear()
    with pytest.raises(Stop):
        sampler(prompts, seeds, **how, on_step=stop)
    assert counted == [(1, 4), (2, 4)]
    # And it goes on working.
    assert torch.equal(sampler(prompts, seeds, **how), images)


def test_a_student_is_called_at_its_own_times_and_a_teacher_at_trailing_ones(toy):
    assert toy.times(4) == (999, 749, 499, 249) and toy.times(2) == (999, 499)
    teacher = Sampler(toy.family_, toy.denoiser, toy.path)
    assert teacher.kind == "teacher" and teacher.default_steps == 50
    assert teacher.times(30)[:2] == (999, 966) and teacher.times(50)[-1] == 19


def test_the_samplers_noise_is_a_stock_pipelines(toy):
    """One CPU generator per image: the initial noise is randn of its shape from manual_seed(seed)."""
    heard = []

    class Ear(torch.nn.Module):
        def forward(self, x_t, t, cond=None):
            heard.append(x_t)
            return torch.zeros_like(x_t)

    schedule = toy.denoiser.schedule
    ear = Sampler(toy.family_, Denoiser(Ear(), "x0", schedule), toy.path, toy.card)
    ear.at(2, chunk=2).x0([0, 0], [7, 8])
    first, second = heard
    for row, seed in enumerate((7, 8)):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(first[row], torch.randn(2, generator=generator))
        expected = schedule.sigma(torch.tensor([499.0])).float() * torch.randn(2, generator=generator)
        torch.testing.assert_close(second[row], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": (0,)}, "student.steps must list whole numbers of at least 1, got \\[0\\]"),
        ({"rule": "euler"}, "student.rule must be one of renoise, ode, tcd, flowmap, got 'euler'"),
        ({"init_noise": "zero"}, "student.init_noise must be one of unit, sigma, got 'zero'"),
        ({"first_rho": -1.0}, "student.first_rho must be 0 .* got -1"),
        ({"first_rho": float("nan")}, "student.first_rho must be 0 .* got nan"),
        ({"eta": 1.5}, "student.eta must be between 0 and 1, got 1.5"),
        ({"steps": (8,), "finest": 4}, "student.steps must be at most .* 4.* got 8"),
    ],
)
def test_a_sampling_refuses_what_cannot_be(values, said):
    with pytest.raises(UserError, match=said):
        Sampling(**values)


def test_of_several_layers_the_last_that_names_a_value_wins():
    layers = ({"rule": "tcd", "eta": 0.3, "first_rho": 2.0}, {"eta": None}, {"first_rho": 0.0, "eta": 1.0})
    assert Sampling.of((1, 2), *layers) == Sampling((1, 2), "tcd", 0.0, eta=1.0)
    assert Sampling.of((1,), {"init_noise": "sigma"}).init_noise == "sigma"
    # Several steps renoise, and stock schedulers that do start from unit noise.
    assert Sampling.of((1, 2), {"init_noise": "sigma"}).init_noise == "unit"


def test_equal_settings_are_one_drawer(toy):
    draw = toy.at(2, chunk=4)
    assert draw == toy.at(2, chunk=4) != toy.at(4, chunk=4) and draw != toy.at(2, chunk=8)
    assert draw.nfe == 2 and draw.label == "student, 2 steps" and toy.at().steps == 1
    with pytest.raises(UserError, match="steps=3 is not what 'toy' was trained for; use one of 1, 2, 4"):
        toy.at(3)
    with pytest.raises(UserError, match="chunk must be at least 1, got 0"):
        toy.at(2, chunk=0)
    with pytest.raises(UserError, match="quantise must be one of round, edm, floor, got 'ceil'"):
        toy.at(2, quantise="ceil")


def test_a_drawers_negative_prompt_is_every_images(tiny_sd):
    sampler, prompts = load(tiny_sd), ["a red circle", "a blue square"]
    images = sampler.at(2, 3.0, chunk=2, negative="a star")(prompts, [1, 2])
    each = sampler(prompts, [1, 2], steps=2, guidance_scale=3.0, chunk=2, negative_prompts=["a star"] * 2)
    assert torch.equal(images, each)
    assert not torch.equal(images, sampler.at(2, 3.0, chunk=2)(prompts, [1, 2]))
    with pytest.raises(UserError, match="a negative prompt needs guidance at sampling time"):
        sampler.at(2, 1.0, negative="a star")


def test_a_guided_step_costs_two_evaluations(tiny_sd):
    sampler = load(tiny_sd)
    assert sampler.at(5, 3.0).nfe == 10 and sampler.at(5, 1.0).nfe == 5
    assert sampler.at(5, 3.0).label == "teacher, 5 steps, guidance 3"


def test_a_sampling_asks_for_its_own_grid():
    """From its finest grid, and from its own first level of noise."""
    of_steps = Flow(lambda steps: float(steps))
    assert Sampling((1, 2, 4), "ode").grid(of_steps, 2) == of_steps.few_step_ode_grid(2, 4)
    assert Sampling((1,), first_rho=2.5).grid(EDM(), 1) == pytest.approx((2.5,))
    assert (
        Sampling((3, 4)).grid(VP.from_betas(), 3)
        == VP.from_betas().few_step_grid(3, 4)
        != VP.from_betas().few_step_grid(3)
    )
