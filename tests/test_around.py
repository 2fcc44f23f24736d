"""BOOT, progressive, DisBack, reward and the methods around others: identities in float64, then behaviour."""

from __future__ import annotations

import itertools
import json
import math
import shutil

import pytest
import torch
import worlds
from torch import nn
from worlds import COUNT, Doubles, world

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.families.toy import SCHEDULES, gaussian, gaussian_flow_map
from stepdistill.methods.base import Batch, Networks
from stepdistill.prediction import Prediction
from stepdistill.sampling import first_input, walk
from stepdistill.schedule import VP, Flow, expand
from stepdistill.timesteps import teacher_grid, times_like

EVERY_SCHEDULE = pytest.mark.parametrize("schedule", [make() for make in SCHEDULES.values()], ids=SCHEDULES)
MEAN, STD = 0.3, 0.4


class Exact(nn.Module):
    """x0 of N(MEAN, STD^2) in one dimension."""

    def __init__(self, schedule):
        super().__init__()
        self.mixture = gaussian(schedule, [MEAN], STD)

    def forward(self, x_t, t, cond=None):
        return self.mixture(x_t, t)


def exact(schedule) -> Denoiser:
    return Denoiser(Exact(schedule), "x0", schedule)


def batch_of(count: int = 64, step: int = 0, x0: bool = False) -> Batch:
    noise = Doubles(range(count), step=step)
    data = MEAN + STD * Doubles(range(count), phase="data").randn(1) if x0 else None
    return Batch(None, None, (1,), noise.index, noise, data)


# ----------------------------------------------------------------------------------------------------- BOOT


def true_signal(schedule, x_first, eps, t):
    """y_t = (x_t - sigma_t eps) / alpha_t on the trajectory of N(MEAN, STD^2) that starts at x_first."""
    first = times_like(schedule.t_max, x_first)
    x_t = gaussian_flow_map(schedule, MEAN, STD, x_first, first, t)
    return (x_t - expand(schedule.sigma(t), x_t) * eps) / expand(schedule.alpha(t), x_t)


@EVERY_SCHEDULE
def test_the_signal_ode(schedule):
    """dy/dt = -lambda'(t) (f - y), by a central difference along the exact trajectory."""
    eps = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    x_first = first_input(schedule, eps, schedule.t_max, "sigma")
    for angle in (0.2, 0.8, 1.3):
        t, later, earlier = (
            schedule.t_of_rho(torch.full((9,), math.tan(angle + h), dtype=torch.float64))
            for h in (0, 1e-5, -1e-5)
        )
        ends = [true_signal(schedule, x_first, eps, time) for time in (later, earlier)]
        slope = (ends[0] - ends[1]) / expand(schedule.rho(later).log() - schedule.rho(earlier).log(), eps)
        y = true_signal(schedule, x_first, eps, t)
        x_t = gaussian_flow_map(schedule, MEAN, STD, x_first, times_like(schedule.t_max, eps), t)
        f = exact(schedule)(x_t, t).x0
        torch.testing.assert_close(slope, -(f - y), rtol=1e-4, atol=1e-5)  # in units of lambda


@EVERY_SCHEDULE
def test_the_signals_step_is_the_teachers_ddim_step(schedule):
    """y after the step, put back on the trajectory, is DDIM's x_s; an algebraic identity for any y_t."""
    method = worlds.method("boot")
    y_t, eps = torch.randn(2, 8, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, s = method.times(schedule, batch_of(8))
    x_t = schedule.add_noise(y_t, eps, t)
    said = exact(schedule)(x_t, t)
    ours = schedule.add_noise(method.step(schedule, y_t, said.x0, t, s), eps, s)
    torch.testing.assert_close(ours, said.at(s), rtol=1e-9, atol=1e-9)


class Signal(nn.Module):
    """An oracle student, g(eps, t) = y_t exactly, with a displacement to differentiate by."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.off = schedule, nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x_first, first, cond=None, end=None):
        schedule = self.schedule
        sigma = 1.0 if isinstance(schedule, VP) else expand(schedule.sigma(first), x_first)
        return true_signal(schedule, x_first, x_first / sigma, end) + self.off


@EVERY_SCHEDULE
def test_the_answer_boot_converges_to_is_the_quantile_map(schedule):
    """Where every bootstrap residual and the boundary's are zero, g(eps, 0) = mean + std eps."""
    method, delta = worlds.method("boot"), 1e-3
    eps = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    first = times_like(schedule.t_max, eps)
    x_first = first_input(schedule, eps, schedule.t_max, "sigma")
    y, t = exact(schedule)(x_first, first).x0, first  # the boundary
    angle = float(schedule.rho(first).atan()[0])
    while angle > 0:
        angle -= delta
        s = times_like(
            max(float(schedule.t_of_rho(torch.tensor(math.tan(max(angle, 0.0))))), schedule.t_min), eps
        )
        x_t = schedule.add_noise(y, eps, t)
        y, t = method.step(schedule, y, exact(schedule)(x_t, t).x0, t, s), s
    torch.testing.assert_close(y, true_signal(schedule, x_first, eps, t), rtol=0, atol=0.01)
    if not isinstance(schedule, VP):  # whose table ends where noise alone is not quite the teacher's x_T
        torch.testing.assert_close(y, MEAN + STD * eps, rtol=0, atol=0.01)


@EVERY_SCHEDULE
def test_the_oracles_bootstrap_error_is_that_of_one_ddim_step(schedule):
    """The residual of one step is O(delta^2), so the loss, over delta^2, falls by 4 per halving."""
    nets = Networks(
        {"student": Denoiser(Signal(schedule), "x0", schedule), "teacher": exact(schedule)}, schedule
    )
    losses = []
    for delta in (0.08, 0.04, 0.02):
        method = worlds.method("boot", delta=delta)
        # One place of the trajectory, so that only delta changes.
        t, s = (
            schedule.t_of_rho(torch.full((64,), math.tan(angle), dtype=torch.float64))
            for angle in (0.9, 0.9 - delta)
        )
        method.times = lambda *_, ts=(t, s): ts
        losses.append(float(method.bootstrap(nets, batch_of())["total"].mean().detach()))
    assert losses[0] > 1e-9
    for coarse, fine in itertools.pairwise(losses):
        assert 3.4 < coarse / fine < 4.6


def test_the_boundary_is_the_teachers_first_guess_and_where_the_student_begins():
    """A fresh student, told any end, says what it said before it was given one."""
    made = world("boot")
    batch = made.batch()
    x = batch.randn()
    first = times_like(made.nets.schedule.t_max, x)
    fresh = made.family.student("teacher", ("end",))
    plain = made.family.student("teacher", ())
    for end in (0.0, 500.0):
        torch.testing.assert_close(
            fresh(x, first, batch.cond, end=times_like(end, x)).x0, plain(x, first, batch.cond).x0
        )
    # Loss 0 exactly when the student says the teacher's x0 there.
    made.nets.modules["student"] = lambda x_t, t, cond, end: made.nets.teacher(x_t, t, cond)
    assert float(made.method.boundary(made.nets, made.batch())["boundary"].max()) == 0


def test_boot_touches_no_data_and_stops_the_gradient_at_the_target():
    made = world("boot")
    assert not made.method.needs_images and made.batch().x0 is None
    schedule, heard = made.nets.schedule, []
    student = made.nets.student

    class Ear(nn.Module):
        def forward(self, x_t, t, cond, end):
            said = student(x_t, t, cond, end=end)
            heard.append((said, torch.is_grad_enabled(), x_t, t))
            return said

    made.nets.modules["student"] = Ear()
    loss = made.method.bootstrap(made.nets, made.batch())["total"]
    (start, start_grad, x_a, t_a), (reached, reached_grad, x_b, _) = heard
    assert not start_grad and not start.raw.requires_grad and reached_grad and reached.raw.requires_grad
    assert torch.equal(x_a, x_b) and bool((t_a == schedule.t_max).all())  # the starting noise, twice
    batch = made.batch()
    eps = batch.randn()
    t, s = made.method.times(schedule, batch)
    f = made.nets.teacher(schedule.add_noise(start.x0, eps, t), t, batch.cond).x0
    ratio = (schedule.rho(s) / schedule.rho(t))[:, None].float()
    target = (1 - ratio) * f + ratio * start.x0
    torch.testing.assert_close(loss, (reached.x0 - target).square().mean(1) / 0.04**2, rtol=1e-4, atol=1e-5)


@EVERY_SCHEDULE
def test_boots_times_are_delta_apart_in_the_angle(schedule):
    method = worlds.method("boot", delta=0.05)
    for step in range(5):
        t, s = method.times(schedule, batch_of(256, step))
        assert bool((s < t).all()) and float(s.min()) >= schedule.t_min and float(t.max()) <= schedule.t_max
        if isinstance(schedule, VP):
            assert torch.equal(t, t.round()) and torch.equal(s, s.round())
        else:
            apart = schedule.rho(t).atan() - schedule.rho(s).atan()
            torch.testing.assert_close(apart, torch.full_like(apart, 0.05), rtol=1e-6, atol=1e-6)


def test_boots_boundary_is_weighed_by_beta():
    (phase,) = worlds.method("boot", boundary_weight=0.3).phases(0)
    assert [weight for weight, _ in phase.terms] == [1.0, 0.3]


def test_boot_refuses_several_steps():
    with pytest.raises(UserError, match=r"student\.steps must be \[1\] for boot"):
        worlds.method("boot", steps=(1, 2))
    with pytest.raises(UserError, match=r"method\.delta must be above 0"):
        worlds.method("boot", delta=0.0)


# ---------------------------------------------------------------------------------------------- progressive


@EVERY_SCHEDULE
def test_one_step_to_the_target_ends_where_two_steps_did(schedule):
    """The target is inverted DDIM: from x_t with its x0, one step lands on the predecessor's x_t''."""
    method = worlds.method("progressive", steps=(4,))
    grid = torch.tensor(teacher_grid(schedule, 8), dtype=torch.float64)
    for i in range(3):
        t, middle, end = (times_like(float(grid[2 * i + k]), torch.empty(32)) for k in range(3))
        x_t = schedule.add_noise(torch.full((32, 1), MEAN, dtype=torch.float64), batch_of(32).randn(), t)
        two = walk(exact(schedule), x_t, (float(t[0]), float(middle[0]), float(end[0])), None, rule="ode")
        target = method.target(schedule, x_t, two, t, end)
        torch.testing.assert_close(
            Prediction(target, "x0", x_t, t, schedule).at(end), two, rtol=1e-7, atol=1e-7
        )


@EVERY_SCHEDULE
@pytest.mark.parametrize("count", [1, 4])
def test_the_loss_is_zero_for_the_student_that_does_two_steps_in_one(schedule, count):
    method, predecessor = worlds.method("progressive", steps=(count,)), exact(schedule)
    grid = teacher_grid(schedule, 2 * count)

    class Both(nn.Module):
        """The predecessor's sampler from any point of the coarse grid to the next, read as an x0."""

        def forward(self, x_t, t, cond=None):
            out = torch.empty_like(x_t)
            for row, (x, time) in enumerate(zip(x_t, t.tolist(), strict=True)):
                i = min(range(0, 2 * count, 2), key=lambda k: abs(grid[k] - time))
                x = walk(predecessor, x[None], grid[i : i + 3][:3], None, rule="ode")
                if i + 2 >= 2 * count:  # the last step goes to x0
                    out[row] = predecessor(x, times_like(grid[i + 1], x)).x0[0]
                    continue
                end, start = (times_like(grid[k], x) for k in (i + 2, i))
                ratio = schedule.sigma(end) / schedule.sigma(start)
                out[row] = (x[0] - ratio * x_t[row]) / (schedule.alpha(end) - ratio * schedule.alpha(start))
            return out

    nets = Networks({"student": Denoiser(Both(), "x0", schedule), "predecessor": predecessor}, schedule)
    losses = method.loss(nets, batch_of(32, x0=True))
    assert float(losses["error"].max()) < 1e-12
    nets.modules["student"] = predecessor  # which does one step, not two
    assert float(method.loss(nets, batch_of(32, x0=True))["error"].max()) > 1e-5


def test_the_weights_are_truncated_snr_and_the_error_of_v():
    schedule = Flow()
    teacher = exact(schedule)
    off = Denoiser(Exact(schedule), "x0", schedule)
    losses = {}
    for weight in ("truncated_snr", "snr_plus_one"):
        method = worlds.method("progressive", steps=(4,), weight=weight)
        losses[weight] = method.loss(
            Networks({"student": off, "predecessor": teacher}, schedule), batch_of(32, x0=True)
        )
    t = torch.tensor(teacher_grid(schedule, 4), dtype=torch.float64)[batch_of(32).generator.randint(0, 4)]
    snr = ((1 - t) / t) ** 2
    torch.testing.assert_close(
        losses["truncated_snr"]["total"],
        snr.clamp(min=1) * losses["truncated_snr"]["error"],
        atol=1e-7,
        rtol=1e-6,
    )
    torch.testing.assert_close(
        losses["snr_plus_one"]["total"], (snr + 1) * losses["snr_plus_one"]["error"], atol=1e-7, rtol=1e-6
    )


def test_the_predecessor_is_the_student_as_the_stage_began_or_the_guided_teacher():
    made = world("progressive")
    twin = made.family.student("teacher", ())
    for a, b in zip(made.nets.predecessor.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    first = world("progressive", predecessor="teacher", guidance_scale=3.0)
    assert set(first.nets.modules) == {"student", "teacher"}
    batch = first.batch()
    x, t = batch.randn(), times_like(600.0, batch.randn())
    c, u = (first.nets.teacher(x, t, cond).x0 for cond in (batch.cond, batch.uncond))
    torch.testing.assert_close(
        first.method.predict(first.nets, batch, x, t).x0, u + 3 * (c - u), rtol=1e-4, atol=1e-4
    )


def test_progressive_takes_one_number_of_steps():
    with pytest.raises(UserError, match="one number per stage"):
        worlds.method("progressive", steps=(1, 2))


@EVERY_SCHEDULE
def test_a_grid_holds_every_second_time_of_the_finer_one(schedule):
    method = worlds.method("progressive", steps=(1,))
    for count in (1, 2, 4, 8, 16, 32):
        fine, coarse = method.grid(schedule, 2 * count), method.grid(schedule, count)
        assert fine[::2] == pytest.approx(coarse, rel=1e-9)


# -------------------------------------------------------------------------------------------------- DisBack


def disback(**settings):
    return world("disback", steps=(1,), **{"base": {"name": "dmd2", "guidance_scale": 3.0}} | settings)


def test_the_degradation_trains_the_fake_score_alone_and_records_it():
    made = disback(stage="degrade", path=3, interval=2)
    assert set(made.nets.modules) == {"student", "teacher", "fake_score", "path_1", "path_2"}
    optimizer = torch.optim.Adam(made.nets.fake_score.parameters(), 1e-2)
    recorded = []
    for step in range(6):
        (phase,) = made.method.phases(step)
        assert phase.trains == ("fake_score",)
        made.backward(phase, step)
        optimizer.step()
        made.method.after_step(made.nets, step, (phase.name,))
        recorded.append(made.nets.fake_score.network.enter.weight.detach().clone())
    for name, step in (("path_1", 1), ("path_2", 3)):
        assert torch.equal(made.nets.modules[name].network.enter.weight, recorded[step])
    assert not torch.equal(recorded[5], recorded[3])  # the end of the path is the fake score itself


def test_after_the_degradation_the_fake_score_knows_the_students_samples_better_than_the_teacher():
    made = disback(stage="degrade", path=1, interval=1000)
    optimizer = torch.optim.Adam(made.nets.fake_score.parameters(), 3e-3)

    def loss(fake) -> float:
        nets = Networks(made.nets.modules | {"fake_score": fake}, made.nets.schedule)
        with torch.no_grad():
            return sum(
                float(made.method.record(nets, made.batch(1000 + i))["total"].median()) for i in range(20)
            )

    teacher = made.family.teacher.clone()
    before = loss(teacher)
    for step in range(150):
        (phase,) = made.method.phases(step)
        made.backward(phase, step)
        optimizer.step()
    assert loss(made.nets.fake_score) < 0.8 * before


def test_backtracking_visits_the_path_backwards_and_guides_the_last_target_alone():
    base = {"name": "dmd2", "guidance_scale": 3.0, "student_every": 1}
    made = disback(path=3, interval=10, base=base)
    teacher = made.nets.teacher
    asked = []

    class Ear(nn.Module):
        def __init__(self, name, inner):
            super().__init__()
            self.name, self.inner = name, inner

        def forward(self, x_t, t, cond=None):
            asked.append((self.name, len(x_t)))
            return self.inner(x_t, t, cond)

    for name in ("path_1", "path_2", "teacher"):
        made.nets.modules[name] = Ear(name, teacher if name == "teacher" else made.nets.modules[name])
    seen = []
    for step in (0, 9, 10, 19, 20, 500):
        asked.clear()
        made.backward(next(p for p in made.method.phases(step) if p.name == "student"), step)
        seen.append(asked[0])
        assert len(asked) == 1
    plain, guided = COUNT, 2 * COUNT
    assert seen == [("path_2", plain)] * 2 + [("path_1", plain)] * 2 + [("teacher", guided)] * 2


def test_the_stages_agree_on_what_is_carried():
    record, back = (disback(stage=stage, path=3) for stage in ("degrade", "backtrack"))
    assert set(back.method.carried) <= set(record.nets.modules) and not record.method.carried
    for name in back.method.carried:
        back.nets.modules[name].load_state_dict(record.nets.modules[name].state_dict())  # strict: all keys
    assert back.method.carried == ("fake_score", "path_1", "path_2")


def test_the_bases_trajectories_are_computed_where_it_is_trained():
    """DMD regresses to them; the degradation needs none."""
    base = {"name": "dmd", "pair_count": 7}
    made = world("disback", steps=(1,), path=2, base=base)
    assert made.method.pairs(made.nets.schedule).count == 7
    for step in (0, 1000):
        made.backward(next(iter(made.method.phases(step))), step)
        assert all(p.grad is not None for p in made.nets.student.parameters())
    assert worlds.method("disback", steps=(1,), stage="degrade", base=base).pairs(made.nets.schedule) is None


def test_a_base_without_a_fake_score_is_refused():
    with pytest.raises(UserError, match=r"method\.base must be a method with a fake score"):
        world("disback", base={"name": "ladd"})
    with pytest.raises(UserError, match=r"method\.path must be at least 1"):
        worlds.method("disback", path=0)


def test_the_targets_means_go_from_the_students_to_the_teachers():
    """Gaussians: a student off by 2; the recorded networks' posterior means move monotonically away from the data."""
    made = disback(stage="degrade", path=4, interval=40)
    schedule = made.nets.schedule
    shift = torch.tensor([2.0, 0.0])
    made.nets.modules["student"] = Denoiser(Constant(shift), "x0", schedule)
    optimizer = torch.optim.Adam(made.nets.fake_score.parameters(), 3e-4)
    for step in range(160):
        (phase,) = made.method.phases(step)
        made.backward(phase, step)
        optimizer.step()
        made.method.after_step(made.nets, step, ("record",))
    t, batch = torch.full((COUNT,), 800.0, dtype=torch.float64), made.batch()
    x = batch.randn()

    def mean(network) -> float:
        return float(network(x, t, batch.cond).x0[:, 0].mean().detach())

    means = [mean(made.family.teacher.clone())]
    means += [mean(made.nets.modules[name]) for name in ("path_1", "path_2", "path_3", "fake_score")]
    assert means == sorted(means) and means[-1] - means[0] > 0.3


class Constant(nn.Module):
    """Everything at one place, with the tiniest dependence on the input."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, x_t, t, cond=None):
        return self.value.expand_as(x_t) + 0.05 * x_t


# --------------------------------------------------------------------------------------------------- reward


def reward(steps=(1, 2), **settings):
    return world("reward", steps=steps, **{"reward": "worlds:Towards"} | settings)


def test_no_gradient_where_the_score_has_reached_the_margin():
    """Margin 0 is never reached by -|x - a|^2, margin -1000 always is."""
    made = reward(margin=-1000.0)
    made.backward(next(iter(made.method.phases(0))))
    assert all(float(p.grad.abs().max()) == 0 for p in made.nets.student.parameters())
    made = reward(margin=0.0, steps=(1,))
    made.backward(next(iter(made.method.phases(0))))
    ours = [p.grad.clone() for p in made.nets.student.parameters()]
    x = first_input(made.nets.schedule, _first_draw(made), made.nets.schedule.t_max, "unit")
    x0 = made.nets.student(x, times_like(made.nets.schedule.t_max, x), made.batch().cond).x0
    expected = torch.autograd.grad(
        (x0 - torch.tensor([2.0, 0.0])).square().sum(1).mean(), list(made.nets.student.parameters())
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def _first_draw(made):
    batch = made.batch()
    batch.generator.shared_randint(0, 1)
    return batch.randn()


def test_part_of_a_batch_beyond_the_margin_gets_no_gradient():
    made = reward(margin=0.0, steps=(1,))
    scores = made.method.loss(made.nets, made.batch())["score"].detach()
    made.method.config.margin = margin = float(scores.median())
    losses = made.method.loss(made.nets, made.batch())
    reached = scores >= margin
    assert bool(reached.any()) and not bool(reached.all())
    torch.testing.assert_close(losses["total"], (margin - scores).clamp(min=0))
    assert torch.equal(losses["short"] == 0, reached)


def test_only_late_steps_are_rewarded():
    made = reward(steps=(4,), late=0.5)
    heard = []
    made.nets.modules["student"] = lambda x_t, t, cond: (
        heard.append((float(t[0]), torch.is_grad_enabled()))
        or Prediction(0.5 * x_t, "x0", x_t, t, made.nets.schedule)
    )
    rewarded = set()
    for step in range(12):
        heard.clear()
        made.method.loss(made.nets, made.batch(step))
        assert [grad for _, grad in heard] == [False] * (len(heard) - 1) + [True]
        rewarded.add(heard[-1][0])
    assert rewarded == {499.0, 249.0}


def test_the_reward_hears_the_prompts_of_its_images():
    made = reward()
    batch = made.batch()
    made.method.loss(made.nets, batch)
    assert made.method.model.heard[-1] == list(batch.prompts)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ("wrong", r"one score per image, shape \(16,\), got \(16, 1\)"),
        ("number", "got float"),
        ("detached", "without a gradient"),
    ],
)
def test_a_reward_of_the_wrong_shape_is_refused(shape, says):
    made = reward(arguments={"shape": shape})
    with pytest.raises(UserError, match=says):
        made.method.loss(made.nets, made.batch())


def test_what_a_reward_cannot_be_made_of_is_said():
    with pytest.raises(UserError, match="unknown reward 'clap'"):
        worlds.method("reward", reward="clap")
    with pytest.raises(UserError, match=r"method\.arguments do not fit"):
        _ = worlds.method("reward", reward="worlds:Towards", arguments={"shap": 1}).model
    made = reward()
    batch = made.batch()
    batch.prompts = None
    with pytest.raises(UserError, match="this run has none"):
        made.method.loss(made.nets, batch)


def test_a_reward_raises_the_score_up_to_its_margin_and_then_lets_go():
    """The toy proof: all of the student's points come to within the margin's circle, and stop there."""
    made = reward(margin=-0.5, steps=(1,))
    optimizer = torch.optim.Adam(made.nets.student.parameters(), 3e-3)
    shorts, scores = [], []
    for step in range(150):
        (phase,) = made.method.phases(step)
        losses = made.method.loss(made.nets, made.batch(step))
        shorts.append(float(losses["short"].mean()))
        scores.append(float(losses["score"].detach().mean()))
        made.backward(phase, step)
        optimizer.step()
    assert sum(shorts[:5]) / 5 > 0.6 and sum(shorts[-20:]) / 20 < 0.15
    assert sum(scores[-20:]) / 20 < -0.1  # not climbed to the top, which is 0


def test_the_anchor_holds_the_student_where_it_was():
    made = reward(margin=-1000.0, anchor_weight=2.0)
    losses = made.method.loss(made.nets, made.batch())
    assert float(losses["anchor"].mean().detach()) > 0  # the world has moved the student since
    torch.testing.assert_close(losses["total"], 2.0 * losses["anchor"])
    made.nets.modules["start"] = made.nets.student
    assert float(made.method.loss(made.nets, made.batch())["total"].max().detach()) == 0


def test_the_micro_clip_tells_a_caption_from_another_and_has_a_gradient():
    from stepdistill import scenes
    from stepdistill.rewards import ClipReward, scores

    drawn = [scenes.image_at(i) for i in range(8)]
    images = torch.stack([torch.from_numpy(image.copy()) for _, image in drawn]).permute(0, 3, 1, 2) / 255
    images.requires_grad_()
    captions = [scene.caption for scene, _ in drawn]
    clip = ClipReward()
    own, other = (
        scores(clip, "clip", images, captions),
        scores(clip, "clip", images, captions[1:] + captions[:1]),
    )
    assert float((own > other).float().mean()) == 1 and float(own.min().detach()) > 0.5
    (slope,) = torch.autograd.grad(own.sum(), images)
    assert bool((slope.flatten(1).norm(dim=1) > 0).all())
    from evaluation.metrics.clip_score import ClipScore

    theirs = ClipScore().cosines([(images.detach() * 255).round().to(torch.uint8)], captions)
    torch.testing.assert_close(own.detach(), theirs, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------- several students: TSM, partitions, merging


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(schedule):
    """Loss 0 for the teacher itself, positive for anyone else."""
    made = world("tsm", schedule=schedule, cond_dropout=0.0)
    assert float(made.method.loss(made.nets, made.batch())["total"].min().detach()) > 0
    made.nets.modules["student"] = made.nets.teacher
    assert float(made.method.loss(made.nets, made.batch())["total"].max()) == 0


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
def test_tsm_measures_the_error_in_the_students_own_kind(kind):
    """Off by d in its own kind: |d|^2, whatever the noise level (x0: times EDM's weight)."""
    schedule, off = Flow(), 0.3
    method, teacher = worlds.method("tsm", cond_dropout=0.0, time_density="lognormal"), exact(Flow())

    class Off(nn.Module):
        def forward(self, x_t, t, cond=None):
            return getattr(teacher(x_t, t), kind) + off

    nets = Networks({"student": Denoiser(Off(), kind, schedule), "teacher": teacher}, schedule)
    losses = method.loss(nets, batch_of(x0=True))
    rho = (-1.2 + 1.2 * batch_of().generator.randn(dtype=torch.float64)).exp()
    weight = rho**-2 + 1 if kind == "x0" else torch.ones_like(rho)
    torch.testing.assert_close(losses["total"], weight * off**2, rtol=1e-5, atol=1e-8)


def test_the_teacher_of_tsm_is_told_what_its_student_is_told():
    """Half of the conditions are dropped, for both alike."""
    made, heard = world("tsm", cond_dropout=0.5), []

    class Ear(nn.Module):
        sigma_data = 1.0

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x_t, t, cond=None):
            heard.append(cond)
            return self.inner(x_t, t, cond)

    for name in ("teacher", "student"):
        made.nets.modules[name] = Ear(made.nets.modules[name])
    made.method.loss(made.nets, made.batch())
    told, none = heard[0], made.family.config.classes
    assert torch.equal(told, heard[1]) and 0 < int((told == none).sum()) < COUNT
    assert torch.equal(told[told != none], made.batch().cond[told != none])


def test_a_smaller_student_starts_from_random_weights_and_follows_the_teacher():
    from stepdistill.families.toy import Toy

    family = Toy(Toy.Config(modes=4, classes=2, schedule="flow", fit_steps=0, student_width=24))
    student = family.student("random", ())
    assert student.network.width == 24
    made = world("tsm", schedule="flow", time_density="lognormal", time_mean=0.0)
    made.nets.modules["student"] = student
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    losses = []
    for step in range(150):
        (phase,) = made.method.phases(step)
        losses.append(float(made.method.loss(made.nets, made.batch(step))["total"].median().detach()))
        made.backward(phase, step)
        optimizer.step()
    assert sum(losses[-30:]) < 0.6 * sum(losses[:30]), (sum(losses[-30:]), sum(losses[:30]))


def test_prompts_are_cut_into_clusters_that_are_disjoint_complete_and_a_function_of_the_prompt():
    from stepdistill import scenes
    from stepdistill.routing import cluster, nearest, router

    captions = [scenes.scene_at(i).caption for i in range(300)]
    centroids = cluster(captions, 4)
    assert centroids.tolist() == cluster(captions, 4).tolist()
    parts = nearest(captions, centroids)
    assert set(parts.tolist()) == {0, 1, 2, 3} and parts[0] == 0
    # Written into a card and read back, for prompts nobody clustered, one at a time or together.
    rule = json.loads(json.dumps({"by": "prompt", "centroids": centroids.tolist()}))
    unseen = [scenes.scene_at(i, seed=5).caption for i in range(50)]
    together = router(rule)(unseen)
    assert together == [router(rule)([prompt])[0] for prompt in unseen] and len(set(together)) > 1
    # Clusters mean something: prompts share more words with their own centroid's than with the others'.
    assert router(rule)(captions) == parts.tolist()
    with pytest.raises(UserError, match="only 1 different prompts"):
        cluster(["a star", "a STAR"], 2)


def test_classes_are_routed_by_their_blocks():
    from stepdistill.routing import router

    route = router({"by": "class", "blocks": [[0, 2], [2, 5]]})
    assert route([0, 1, 2, 4]) == [0, 0, 1, 1]
    with pytest.raises(UserError, match="class 5 belongs to none"):
        route([5])


@pytest.fixture(scope="module")
def halves(tiny_sd, tmp_path_factory):
    """Two students of the tiny pipeline, each trained for a step on its half of the prompts."""
    from accelerate.state import AcceleratorState, GradientState

    from training.recipe import recipe_from
    from training.run import run

    root = tmp_path_factory.mktemp("halves")
    for k in (1, 2):
        run(
            recipe_from(
                {
                    "family": {"name": "sd", "teacher": str(tiny_sd)},
                    "student": {"steps": [1, 2]},
                    "method": {"name": "dmd2", "guidance_scale": 1.5, "student_every": 1},
                    "data": {"name": "scenes", "size": 24, "partition": f"{k}/2"},
                    "optim": {"batch_size": 2, "lr": 0.05 * k},
                    "run": {"steps": 2, "out": str(root / f"run{k}"), "log_every": 1},
                }
            )
        )
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    return [root / f"run{k}" / "student" for k in (1, 2)]


def test_merged_students_draw_each_prompt_as_its_own_student_would(halves, tmp_path):
    from diffusers import DiffusionPipeline

    import stepdistill
    from stepdistill import scenes
    from training.merge import main

    main([str(tmp_path / "merged"), str(halves[1]), str(halves[0])])  # in any order
    students = stepdistill.load(tmp_path / "merged")
    alone = [stepdistill.load(path) for path in halves]
    prompts = [scenes.scene_at(i).caption for i in range(12)]
    chosen = students.route(prompts)
    assert set(chosen) == {0, 1}
    timings = {}
    images = students(prompts, list(range(12)), steps=2, chunk=4, timings=timings)
    assert images.dtype == torch.uint8 and set(timings) == {"text", "denoise", "decode"}
    for i, (prompt, k) in enumerate(zip(prompts, chosen, strict=True)):
        drawn = [each([prompt], [i], steps=2, chunk=4)[0] for each in alone]
        assert torch.equal(images[i], drawn[k]) and not torch.equal(drawn[0], drawn[1])
    assert students.steps == (1, 2) and students.kind == "student" and students.conditions == "prompt"
    assert students.parameters["denoiser"] == 2 * alone[0].parameters["denoiser"]
    # Each is a stock pipeline, and each saw only its own prompts.
    DiffusionPipeline.from_pretrained(tmp_path / "merged" / "1")
    main([str(tmp_path / "merged"), *map(str, halves)])  # again over the old one
    with pytest.raises(UserError, match="steps=3 is not what"):
        students(prompts, list(range(12)), steps=3)
    with pytest.raises(UserError, match="of one length"):
        students(prompts, [0])


def test_one_merged_student_draws_what_it_draws_alone(halves, tmp_path):
    import stepdistill
    from stepdistill import scenes
    from stepdistill.routing import cluster, merge

    prompts, alone = [scenes.scene_at(i).caption for i in range(5)], tmp_path / "alone"
    shutil.copytree(halves[0], alone)
    routing = {"by": "prompt", "of": 1, "part": 1, "centroids": cluster(prompts, 1).tolist()}
    card = json.loads((alone / "stepdistill.json").read_text())
    (alone / "stepdistill.json").write_text(json.dumps(card | {"routing": routing}))
    students = stepdistill.load(merge([alone], tmp_path / "merged"))
    assert set(students.route(prompts)) == {0}
    drawn = [each(prompts, [*range(5)], steps=2, chunk=2) for each in (students, stepdistill.load(alone))]
    assert torch.equal(*drawn)


def test_what_cannot_be_merged_is_refused_with_one_sentence(halves, tmp_path, capsys):
    from training.merge import main

    def said(*students) -> str:
        with pytest.raises(SystemExit) as exit_:
            main([str(tmp_path / "out"), *map(str, students)])
        assert exit_.value.code == 2
        return capsys.readouterr().err

    assert "must be the parts 1 to K of one partition, got 1/2, 1/2" in said(halves[0], halves[0])
    assert "got 1/2" in said(halves[0])
    assert "is no student directory" in said(tmp_path, halves[1])
    other = tmp_path / "other"
    shutil.copytree(halves[1], other)
    card = json.loads((other / "stepdistill.json").read_text())
    for change, says in (
        ({"steps": [1]}, r"differ in steps: [1, 2] and [1]"),
        ({"routing": None}, "was not trained on a part"),
        ({"routing": card["routing"] | {"centroids": [[0.0] * 64] * 2}}, "parts of different data"),
    ):
        (other / "stepdistill.json").write_text(json.dumps(card | change))
        assert says in said(halves[0], other)
    (tmp_path / "out").mkdir()
    assert "exists and holds no merged students" in said(*halves)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_partition_of_one_is_the_whole():
    from training.data.scenes import Scenes
    from training.data.toy import Toy

    for source, config in ((Scenes, {"size": 9}), (Toy, {"size": 9})):
        whole, one = (source(source.Config(partition=text, **config)) for text in ("", "1/1"))
        assert whole.size == one.size == 9 and one.routing is None
    assert list(whole.captions or ()) == list(one.captions or ())


def test_the_students_of_a_class_partition_each_see_their_own_classes():
    from stepdistill.families.toy import Toy as Family
    from training.data.toy import Toy

    family = Family(Family.Config(modes=8, classes=4, fit_steps=0))
    seen = [set(family.told(Toy(Toy.Config(partition=f"{k}/2")), range(100))) for k in (1, 2)]
    assert seen == [{0, 1}, {2, 3}]


# --------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("steps", [1, 4])
def test_a_deterministic_student_equals_the_stock_ddim_pipeline(tiny_sd, tmp_path, steps):
    from test_export import PROMPT, exported, stock_images

    from stepdistill.families.sd import SD

    family, directory = SD(SD.Config(teacher=str(tiny_sd))), tmp_path / "student"
    sampler = exported(
        family, worlds.method("progressive", steps=(steps,)), directory, {"teacher": str(tiny_sd)}
    )
    ours = sampler([PROMPT, PROMPT], [5, 6], steps=steps, chunk=2).permute(0, 2, 3, 1).numpy()
    call = {"prompt": [PROMPT, PROMPT], "num_inference_steps": steps, "seeds": [5, 6]}
    assert abs(stock_images(directory, tmp_path, **call) * 255 - ours).max() <= 1.0


def test_a_student_is_sampled_at_the_times_on_its_card(tiny_pixel, tmp_path):
    """Under EDM the halved grids are not the stock scheduler's strides; the card's times hold."""
    from test_export import exported

    from stepdistill import load
    from stepdistill.families.pixel import Pixel

    family, method = Pixel(Pixel.Config(teacher=str(tiny_pixel))), worlds.method("progressive", steps=(4,))
    exported(family, method, tmp_path / "student", {"teacher": str(tiny_pixel)})
    times = load(tmp_path / "student").times(4)
    assert times == pytest.approx(teacher_grid(family.schedule, 4), rel=1e-12)


def test_a_smaller_student_leaves_as_a_stock_pipeline(tiny_sd, tmp_path):
    """Its UNet is made from a partial configuration, beside a teacher of another width."""
    from stepdistill import export, load
    from stepdistill.families.sd import SD

    small = {
        "sample_size": 4, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": [8, 8],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 4, "norm_num_groups": 4,
    }  # fmt: skip
    family = SD(SD.Config(teacher=str(tiny_sd), student_unet=small))
    student = family.student("random", ()).eval()
    recipe = {"family": {"teacher": str(tiny_sd)}, "method": {"name": "dmd2"}, "run": {"out": "runs/x"}}
    export.write(family, student, tmp_path / "student", export.card_of(family, worlds.method("dmd2"), recipe))
    loaded = load(tmp_path / "student")
    assert loaded.parameters["denoiser"] < 0.6 * sum(p.numel() for p in family.teacher.parameters())
    x, t, cond = (
        torch.randn(2, 4, 4, 4),
        torch.tensor([10.0, 700.0], dtype=torch.float64),
        torch.randn(2, 7, 16),
    )
    torch.testing.assert_close(loaded.denoiser(x, t, cond).raw, student(x, t, cond).raw)


# --------------------------------------------------------------------------------------- stages, by the trainer


def backtracked(out, **run_) -> dict:
    method = {"name": "disback", "path": 2, "interval": 2, "base": {"name": "dmd2", "student_every": 1}}
    return {
        "family": {"name": "toy", "modes": 4, "fit_steps": 2},
        "method": method,
        "data": {"name": "toy"},
        "optim": {"batch_size": 8, "lr": 1e-2},
        "run": {"out": str(out), "save_every": 2, "keep": 9, "log_every": 1} | run_,
        "stages": [
            {"method": {"stage": "degrade"}, "run": {"steps": 4}},
            {"method": {"stage": "backtrack"}, "run": {"steps": 4}},
        ],
    }


@pytest.mark.usefixtures("accelerator_state")
def test_the_second_stage_takes_over_what_the_first_recorded_and_resumes_bit_for_bit(tmp_path):
    from training.checkpoint import RunDirectory
    from training.recipe import recipe_from
    from training.run import run

    recipe = recipe_from(backtracked(tmp_path / "run"))
    run(recipe)
    directory = RunDirectory(tmp_path / "run", 9)
    recorded, at_6, at_8 = (directory.load(step).tensors for step in (4, 6, 8))
    assert set(recorded) >= {"fake_score", "path_1"}
    for name, value in recorded["path_1"].items():
        assert torch.equal(value, at_6["path_1"][name]) and torch.equal(value, at_8["path_1"][name])
    first = "network.enter.weight"
    assert not torch.equal(recorded["path_1"][first], recorded["fake_score"][first])  # two iterations apart
    assert not torch.equal(at_6["student"][first], at_8["student"][first])
    shutil.rmtree(directory.checkpoints / "8")
    run(recipe)  # goes on in the second stage, at 6
    again = directory.load(8).tensors
    for network, state in at_8.items():
        for name, value in state.items():
            assert torch.equal(value, again[network][name]), (network, name)


@pytest.mark.usefixtures("accelerator_state")
def test_a_degrade_stage_too_short_for_its_record_is_refused(tmp_path):
    from training.recipe import recipe_from
    from training.run import run

    short = backtracked(tmp_path / "run")
    short["stages"][0]["run"]["steps"] = 1  # of 2 to the first record
    with pytest.raises(
        UserError, match=r"method\.path=2: the degrade stage recorded no path_1; give it run\.steps of"
    ):
        run(recipe_from(short))


@pytest.mark.parametrize("direction", ["into a composition", "out of one"])
@pytest.mark.usefixtures("accelerator_state")
def test_a_composition_and_a_plain_stage_carry_each_others_fake_score(tmp_path, direction):
    from training.checkpoint import RunDirectory
    from training.recipe import recipe_from
    from training.run import run

    def composed(**dmd2) -> dict:
        return {"name": "compose", "parts": [{"name": "dmd2", **dmd2}, {"name": "ladd"}]}

    if direction == "out of one":
        methods = [composed(), {"name": "dmd2", "carry_fake_score": True}]
        names = ["dmd2/fake_score", "fake_score"]
    else:
        methods = [{"name": "dmd2"}, composed(carry_fake_score=True)]
        names = ["fake_score", "dmd2/fake_score"]
    recipe = backtracked(tmp_path / "run")
    del recipe["method"]
    recipe["stages"] = [  # the second stage does not move what it was given
        {"method": methods[0], "run": {"steps": 3}},
        {"method": methods[1], "run": {"steps": 1}, "optim": {"lr": 1e-12}},
    ]
    run(recipe_from(recipe))
    directory = RunDirectory(tmp_path / "run", 9)
    first, second = (directory.load(step).tensors[name] for step, name in zip((3, 4), names, strict=True))
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("accelerator_state")
def test_which_of_two_fake_scores_is_carried_has_to_be_said(tmp_path):
    from training.recipe import recipe_from
    from training.run import run

    recipe = backtracked(tmp_path / "run")
    recipe["stages"] = [
        {"method": {"name": "compose", "parts": [{"name": "dmd2"}, {"name": "dmd"}]}, "run": {"steps": 1}},
        {"method": {"name": "f_distill", "carry_fake_score": True}, "run": {"steps": 1}},
    ]
    del recipe["method"]
    with pytest.raises(
        UserError, match=r"takes the network 'fake_score' over .* dmd/fake_score, dmd2/fake_score"
    ):
        run(recipe_from(recipe))


@pytest.mark.usefixtures("accelerator_state")
def test_a_lora_is_not_carried_as_a_whole_network(tmp_path):
    from training.recipe import recipe_from
    from training.run import run

    recipe = backtracked(tmp_path / "run")
    recipe["stages"] = [
        {"method": {"name": "vsd"}, "run": {"steps": 1}},
        {"method": {"name": "dmd2", "carry_fake_score": True}, "run": {"steps": 1}},
    ]
    del recipe["method"]
    with pytest.raises(UserError, match="whose 'fake_score' is of another make"):
        run(recipe_from(recipe))


def test_degradation_learns_at_the_noise_levels_of_its_base():
    seen = {}
    for density in ("uniform", "lognormal"):
        base = {"name": "dmd2", "critic_density": density, "time_mean": -3.0, "time_std": 0.01}
        made = world("disback", stage="degrade", base=base)
        fake, asked = made.nets.fake_score.forward, []
        made.nets.fake_score.forward = lambda x, t, *rest, asked=asked, fake=fake: (
            asked.append(t),
            fake(x, t, *rest),
        )[1]
        (phase,) = made.method.phases(0)
        phase.terms[0][1](made.nets, made.batch(0, phase.name))
        seen[density] = made.family.schedule.rho(asked[0]).log()
    assert (seen["lognormal"] + 3).abs().max() < 0.2 < (seen["uniform"] + 3).abs().max()


@pytest.mark.usefixtures("accelerator_state")
def test_backtracking_without_a_record_is_refused(tmp_path):
    from training.recipe import recipe_from
    from training.run import run

    alone = backtracked(tmp_path / "run")
    alone["stages"] = alone["stages"][1:]
    with pytest.raises(UserError, match="takes the network 'fake_score' over from the stage before"):
        run(recipe_from(alone))
    unlike = backtracked(tmp_path / "other")
    unlike["stages"][0]["method"]["path"] = 1
    with pytest.raises(UserError, match=r"stages\.1\.method takes the network 'path_1' over"):
        run(recipe_from(unlike))
