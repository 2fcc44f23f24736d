"""TSCD (arXiv 2404.13686): segments and their edges, and the rule its student is sampled by."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import worlds
from gaussians import EVERY_SCHEDULE, MEAN, STD, Affine, Oracle, batch_of, gradient, nets_of
from torch import nn

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.families.toy import gaussian, gaussian_flow_map
from stepdistill.methods.tscd import TSCD
from stepdistill.noise import SampleNoise
from stepdistill.prediction import Prediction
from stepdistill.sampling import Sampling
from stepdistill.schedule import EDM, VP, Flow, Schedule, TrigFlow, times_like


class SegmentOracle(nn.Module):
    """The network whose DDIM jump from t to its segment's lower edge is the exact flow map."""

    def __init__(self, schedule: Schedule, method: TSCD):
        super().__init__()
        self.two_time, self.schedule, self.method = Oracle(schedule), schedule, method

    def forward(self, x_t, t, cond=None):
        b = self.method.lower_edge(self.schedule, t)
        # At its own edge any line will do.
        b = torch.where(b < t, b, t - 1e-6)
        return self.two_time(x_t, t, end=b)


@EVERY_SCHEDULE
@pytest.mark.parametrize("segments", [8, 4, 2, 1])
def test_tscd_with_the_exact_segment_maps_has_the_teachers_error_alone(schedule, segments):
    def loss(points: int) -> float:
        method = worlds.method(
            "tscd", segments=segments, ddim_steps=points, guidance_scale=1.0, link_weight="uniform"
        )
        nets = nets_of(schedule, SegmentOracle(schedule, method))
        return float(method.loss(nets, batch_of(256))["total"].mean().sqrt())

    # A state at sigma = 40 is an error in units of 40.
    scale = 80 if isinstance(schedule, EDM) else 1
    assert loss(200) < 0.5 * loss(50) < 0.5 * 0.05 * scale


@EVERY_SCHEDULE
@pytest.mark.parametrize("segments", [8, 3, 1])
def test_tscds_loss_is_zero_where_student_and_teacher_follow_the_exact_flow(schedule, segments, monkeypatch):
    def flow_map(predict, x_t, t, s):
        return gaussian_flow_map(schedule, MEAN, STD, x_t, t, s)

    monkeypatch.setattr("stepdistill.methods.tscd.ddim", flow_map)
    method = worlds.method("tscd", segments=segments, guidance_scale=1.0, link_weight="uniform")
    losses = method.loss(nets_of(schedule, SegmentOracle(schedule, method)), batch_of(256))
    assert float(losses["total"].max()) < 1e-15 * schedule.t_max**2


def test_tscd_of_one_segment_is_cd_with_an_euler_step():
    """But for the jump's end: the trajectory's last point, not the data, so sigma_min eps apart."""
    schedule, found = EDM(), []
    for method in (
        worlds.method(
            "cd", points=11, solver="euler", distance="l2", guidance_scale=1.0, link_weight="uniform"
        ),
        worlds.method(
            "tscd", segments=1, ddim_steps=10, distance="l2", guidance_scale=1.0, link_weight="uniform"
        ),
    ):
        nets = nets_of(schedule, Affine(), target=Denoiser(Affine(), "x0", schedule))
        loss = method.loss(nets, batch_of(512))["total"].mean()
        found.append(torch.cat((loss.detach()[None], gradient(loss, nets.student))))
    torch.testing.assert_close(*found, rtol=5e-3, atol=0)


@EVERY_SCHEDULE
def test_the_segments_maps_composed_are_the_whole_trajectory(schedule):
    """And they are what a k-step student without noise walks through: its times are the edges."""
    method = worlds.method("tscd", steps=(4,), segments=4, eta=0.0)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    times = method.sampling.grid(schedule, 4)
    t = times_like(times[0], x)
    start = (schedule.alpha(t) * MEAN)[:, None] + (
        (schedule.alpha(t) ** 2 * STD**2 + schedule.sigma(t) ** 2).sqrt()[:, None] * x
    )
    student = Denoiser(SegmentOracle(schedule, method), "x0", schedule)
    drawn = Sampling(rule="tcd").sample(student, start, times, None, t_min=schedule.t_min)
    exact = gaussian_flow_map(schedule, MEAN, STD, start, t, times_like(schedule.t_min, x))
    torch.testing.assert_close(drawn, exact, rtol=0, atol=1e-6)


@EVERY_SCHEDULE
@pytest.mark.parametrize("segments", [8, 3, 1])
def test_every_time_lies_in_exactly_one_segment(schedule, segments):
    method = worlds.method("tscd", segments=segments)
    edges = (*schedule.few_step_grid(segments), schedule.t_min)
    between = torch.linspace(schedule.t_min, edges[0], 204, dtype=torch.float64)[1:-1]
    t = torch.cat((between, torch.tensor(edges[:-1], dtype=torch.float64)))
    b = method.lower_edge(schedule, t)
    assert bool((b < t).all()) and set(b.tolist()) <= set(edges)
    for upper, lower in itertools.pairwise(edges):
        inside = (t > lower) & (t <= upper)
        assert bool((b[inside] == lower).all()) and bool(inside.any())


def test_tscd_never_looks_below_the_edge_and_takes_the_state_itself_there():
    """One DDIM step that ends in the edge has x_s for its target, whatever the target network says."""
    method = worlds.method("tscd", segments=8, ddim_steps=8, guidance_scale=1.0, link_weight="uniform")
    nets, batch, twin = nets_of(VP.from_betas(), Affine()), batch_of(), batch_of()

    class Never(nn.Module):
        def forward(self, x_t, t, cond=None):
            return torch.full_like(x_t, 1e9)

    nets.modules["target"] = Denoiser(Never(), "x0", nets.schedule)
    losses = method.loss(nets, batch)
    i = twin.generator.randint(0, 8)
    edges = torch.tensor((*nets.schedule.few_step_grid(8), 0.0), dtype=torch.float64)
    t, s = edges[i], edges[i + 1]
    x_t = nets.schedule.add_noise(twin.x0, twin.randn(), t)
    expected = (nets.student(x_t, t).at(s) - nets.teacher(x_t, t).at(s)).square()[:, 0]
    torch.testing.assert_close(losses["total"], expected, rtol=1e-9, atol=1e-12)


@EVERY_SCHEDULE
def test_tscds_teacher_steps_to_the_edge_where_the_next_point_lies_below(schedule):
    heard = []

    class Ear(nn.Module):
        def forward(self, x_t, t, cond=None):
            heard.append(t)
            return x_t

    method = worlds.method("tscd", segments=4, ddim_steps=7, guidance_scale=1.0)
    nets = nets_of(schedule, Affine(), target=Denoiser(Ear(), "x0", schedule))
    method.loss(nets, batch_of(256))
    grid = torch.tensor((*schedule.teacher_grid(7), schedule.t_min), dtype=torch.float64)
    i = batch_of(256).generator.randint(0, 7)
    b, below = method.lower_edge(schedule, grid[i]), grid[i + 1]
    torch.testing.assert_close(heard[0], torch.maximum(below, b), rtol=1e-9, atol=1e-9)
    assert bool((below < b - 1e-3).any()) and bool((below > b + 1e-3).any())


def test_tscd_refuses_what_does_not_fit():
    for settings, says in (
        ({"segments": 0}, r"method\.segments"),
        ({"segments": 9, "ddim_steps": 8}, r"method\.segments"),
        ({"eta": 1.5}, r"student\.eta"),
    ):
        with pytest.raises(UserError, match=says):
            worlds.method("tscd", **settings)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
def test_tcd_equals_tcd_scheduler_step_by_step(kind, eta):
    from diffusers import TCDScheduler

    ours_kind = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}[kind]
    for steps in (1, 2, 4, 8):
        scheduler = TCDScheduler(prediction_type=kind, original_inference_steps=8)
        scheduler.set_timesteps(steps)
        schedule = VP(scheduler.alphas_cumprod)
        generator = torch.Generator().manual_seed(steps)
        x = start = torch.randn(2, 3, generator=generator)
        outputs = [torch.randn(2, 3, generator=generator) for _ in range(steps)]
        for i, (output, t) in enumerate(zip(outputs, scheduler.timesteps, strict=True)):
            seed = torch.Generator().manual_seed(i)
            x = scheduler.step(output, t, x, eta=eta, generator=seed).prev_sample
        times = schedule.few_step_grid(steps, 8)
        assert list(times) == scheduler.timesteps.tolist()
        calls = iter(outputs)
        ours = Sampling(rule="tcd", eta=eta).sample(
            lambda x_t, t, cond, calls=calls, schedule=schedule: Prediction(
                next(calls), ours_kind, x_t, t, schedule
            ),
            start,
            times,
            lambda i: torch.randn(2, 3, generator=torch.Generator().manual_seed(i)),
        )
        torch.testing.assert_close(ours, x, rtol=2e-4, atol=2e-4)


@EVERY_SCHEDULE
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd_with_the_oracle_keeps_the_marginal_at_every_eta(schedule, eta):
    n = 40_000
    oracle = Oracle(schedule)
    noise = SampleNoise(range(n), phase="tcd")

    class TwoTime:
        """Its line from x_t passes through the trajectory's point at (1 - eta) s, as a trajectory student's does."""

        def __call__(self, x_t, t, cond=None):
            below = schedule.t_min + (1 - eta) * (times[1] - schedule.t_min)
            below = math.floor(below) if isinstance(schedule, VP) else below
            return Prediction(oracle(x_t, t, end=times_like(float(below), x_t)), "x0", x_t, t, schedule)

    times = schedule.few_step_grid(2)
    t, s = (torch.tensor([time], dtype=torch.float64) for time in times)
    spread = [(schedule.alpha(u) ** 2 * STD**2 + schedule.sigma(u) ** 2).sqrt() for u in (t, s)]
    x = schedule.alpha(t) * MEAN + spread[0] * noise.randn(1, dtype=torch.float64)
    how = Sampling(rule="tcd", eta=eta)
    x_s = how.walk(TwoTime(), x, times, lambda _: noise.randn(1, dtype=torch.float64))
    assert abs(float(x_s.mean() - schedule.alpha(s) * MEAN)) < 5 * float(spread[1]) / n**0.5
    assert abs(float(x_s.std() / spread[1]) - 1) < 5 / (2 * n) ** 0.5


@EVERY_SCHEDULE
def test_tcd_without_noise_is_the_ode_rule(schedule):
    teacher = Denoiser(gaussian(schedule, [MEAN], STD), "x0", schedule)
    x, times = torch.randn(8, 1, dtype=torch.float64), schedule.few_step_grid(4)
    drawn = [Sampling(rule=rule).walk(teacher, x, times, None) for rule in ("tcd", "ode")]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("schedule", [Flow(), TrigFlow(), TrigFlow(0.5)])
def test_tcd_with_all_noise_is_renoising(schedule):
    """Where the schedule's end is clean: of eta = 1 the line to t_min keeps x0 alone, in the end as well."""
    teacher = Denoiser(gaussian(schedule, [MEAN], STD), "x0", schedule)
    start, *noise = torch.randn(5, 8, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    how = {"start": start, "times": schedule.few_step_grid(4), "noise": noise.__getitem__}
    found = [
        Sampling(rule=rule, eta=1.0).sample(teacher, *how.values(), t_min=schedule.t_min)
        for rule in ("tcd", "renoise")
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
