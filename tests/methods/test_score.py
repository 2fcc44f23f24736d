"""What the score distillation methods share: gradients against quadrature, zeros, the fake score and its law."""

from __future__ import annotations

import pytest
import torch
import worlds
from quadrature import EVERY_SCHEDULE, RHO, TWO_STUDENTS, Line, close
from torch import Tensor, nn
from worlds import Doubles, world

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.families.toy import SCHEDULES
from stepdistill.losses import distribution_matching
from stepdistill.methods.base import Batch
from stepdistill.methods.score import compared
from stepdistill.prediction import Prediction
from stepdistill.schedule import Flow, Schedule, expand, times_like
from stepdistill.timesteps import draw

# Of the data a student is to reach.
MEAN, STD = 1.5, 0.3


@pytest.mark.parametrize("name", ["dmd2", "sid"])
def test_shared_samples_are_those_of_the_students_update_with_their_conditions(name):
    made = world(name, shared_samples=True)
    drawn, seen = [], []
    made.nets.student.register_forward_hook(lambda *call: drawn.append(call[-1].x0))
    made.nets.fake_score.register_forward_pre_hook(lambda _, args: seen.append(args))
    first, second = made.batch(0), made.batch(1)
    second.cond = second.cond.flip(0)
    used = []
    # Two passes of accumulation.
    for batch in (first, second):
        made.method.student_loss(made.nets, batch)
        used.append(drawn[-1])
    calls = len(drawn)
    for x0, batch, fresh in zip(used, (first, second), (made.batch(2), made.batch(3)), strict=True):
        seen.clear()
        losses, shared = made.method.denoise(made.nets, fresh)
        # Into the fake score; nothing of the student's graph is kept.
        losses["total"].mean().backward()
        assert torch.equal(shared.x0, x0) and not shared.x0.requires_grad
        assert torch.equal(seen[0][2], batch.cond)
    assert len(drawn) == calls, "the critic called the student"
    # Without an update of the student it draws its own.
    made.method.critic_loss(made.nets, made.batch(4))
    assert len(drawn) > calls


@pytest.mark.parametrize(
    ("name", "law"),
    [(n, "lognormal") for n in ("sim", "sid", "diff_instruct")] + [(n, "uniform") for n in ("dmd", "dmd2", "vsd")],
)  # fmt: skip
def test_the_fake_score_learns_by_its_own_law_over_all_noise_levels(name, law):
    """SiD's student is compared at Karras levels up to 0.8, DMD's within 0.02 .. 0.98: the critic sees all."""

    class Ear(nn.Module):
        sigma_data = 1.0

        def forward(self, x_t, t, cond=None):
            heard.append(t)
            return Prediction(x_t, "x0", x_t, t, made.nets.schedule)

    heard, made = [], world(name, steps=(1,))
    made.nets.modules["fake_score"] = Ear()
    for step in range(4):
        batch, twin = made.batch(step), made.batch(step)
        made.method.critic_loss(made.nets, batch)
        made.method.generate(made.nets, twin)
        assert torch.equal(heard[-1], draw(law, made.nets.schedule, twin.generator))


@pytest.mark.parametrize("name", ["sid", "vsd"])
def test_the_fake_score_is_guided_by_its_own_scale(name):
    made = world(name, steps=(1,), fake_guidance_scale=2.0, guidance_scale=5.0)
    batch, fake = made.batch(), made.nets.fake_score
    x_t, t = batch.randn(), times_like(500.0, batch.randn())
    with torch.no_grad():
        for parameter in fake.parameters():
            parameter += 0.1
        c, u = (fake(x_t, t, told).x0 for told in (batch.cond, batch.uncond))
        said = made.method.fake_at(made.nets, batch, x_t, t).x0
    torch.testing.assert_close(said, u + 2 * (c - u), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(said, c, rtol=1e-2)


@EVERY_SCHEDULE
@TWO_STUDENTS
def test_values_at_the_optimal_fake_score(schedule, theta):
    """SIM's surrogate is 0 whatever the student; SiD's is (1 - alpha) E |teacher - fake|^2."""
    for settings in ({"distance": "l2"}, {"huber_c": 0.2}):
        assert abs(Line("sim", schedule, theta, **settings).mean("total")) < 1e-9
    for alpha in (0.5, 1.0, 1.2):
        line = Line("sid", schedule, theta, alpha=alpha, normalise=False)
        assert line.mean("gap") > 0.01
        assert line.mean("total") == pytest.approx((1 - alpha) * line.mean("gap"), abs=1e-9)


@EVERY_SCHEDULE
@TWO_STUDENTS
def test_the_matching_gradient_is_that_of_the_reverse_kl(schedule, theta):
    """In x0-space it is sigma^2 / alpha^2 times the KL's: one factor from the scores, one from dx_t/dx0."""
    line = Line("diff_instruct", schedule, theta)
    expected = (line.sigma / line.alpha) ** 2 * line.reverse_kl()
    close(line.gradient(), expected)
    plain = {"normalise": False, "guidance_scale": 1.0}
    for name, settings in (("dmd", plain), ("dmd2", plain)):
        close(Line(name, schedule, theta, **settings).gradient(), expected)
    unguided = {"guidance_scale": 1.0, "fake_guidance_scale": 1.0}
    close(Line("vsd", schedule, theta, **unguided).gradient(), RHO / (1 + RHO**2) * expected)


@pytest.mark.parametrize("name", ["diff_instruct", "dmd", "dmd2", "vsd"])
def test_kl_methods_keep_no_graph_through_the_networks(name):
    line, graphs = Line(name, SCHEDULES["vp"](), guidance_scale=1.0), []

    class Watched(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            graphs.append(torch.is_grad_enabled())
            return self.inner(x_t, t)

    for network in ("teacher", "fake_score"):
        inner = line.nets.modules[network].network
        line.nets.modules[network] = Denoiser(Watched(inner), "x0", line.schedule)
    line.expected()
    assert graphs == [False, False]


def test_normalised_gradients_do_not_depend_on_the_scale_of_the_images():
    x0, real, fake = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    pulls = []
    for factor in (1.0, 50.0):
        x = (factor * x0).requires_grad_(True)
        distribution_matching(x, factor * real, factor * fake).sum().backward()
        pulls.append(x.grad)
    torch.testing.assert_close(*pulls, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("sim", {}), ("sim", {"distance": "l2"}), ("sid", {}), ("diff_instruct", {}), ("dmd", {}), ("vsd", {})],
)
def test_no_gradient_where_the_fake_score_is_the_teacher(name, settings):
    line = Line(name, SCHEDULES["vp"](), **settings)
    line.nets.modules["fake_score"] = line.nets.teacher
    assert float(line.gradient().abs().max()) == 0


@pytest.mark.parametrize(
    ("name", "settings", "schedule"),
    [
        ("sim", {}, "flow"),
        ("sim", {"distance": "l2"}, "vp"),
        ("sid", {"alpha": 0.5, "normalise": False}, "vp"),
        ("sid", {"alpha": 1.0, "normalise": False}, "flow"),
        ("sid", {"alpha": 1.2, "normalise": False}, "vp"),
        ("diff_instruct", {}, "flow"),
    ],
)
def test_a_student_reaches_the_data_with_the_exact_fake_score(name, settings, schedule):
    """With the teacher alone under no_grad SIM and SiD would end at another width."""
    line = Line(name, SCHEDULES[schedule](), nodes=41, **settings)
    line.nets.modules["teacher"] = Denoiser(line.own(MEAN, STD), "x0", line.schedule)
    optimizer = torch.optim.Adam(line.student.parameters(), 0.1)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 120)
    for _ in range(120):
        fake = line.own(line.student.shift.item(), line.student.scale.item())
        line.nets.modules["fake_score"] = Denoiser(fake, "x0", line.schedule)
        optimizer.zero_grad()
        line.expected().backward()
        optimizer.step()
        decay.step()
    assert line.student.shift.item() == pytest.approx(MEAN, abs=1e-2)
    assert abs(line.student.scale.item()) == pytest.approx(STD, abs=1e-2)


class Bell(nn.Module):
    """A fake score of two parameters: the posterior mean of N(mean, std^2)."""

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule
        self.mean, self.log_std = (nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2))

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        alpha, sigma = (expand(f(t), x_t) for f in (self.schedule.alpha, self.schedule.sigma))
        variance = (2 * self.log_std).exp()
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return self.mean + gain * (x_t - alpha * self.mean)


@pytest.mark.parametrize(
    ("name", "schedule", "settings"),
    [("dmd", "vp", {"regression_weight": 0.0}), ("dmd2", "flow", {})],
)
def test_a_student_reaches_the_data_behind_a_fake_score_of_five_updates(name, schedule, settings):
    """By the method's own phases: both networks of two parameters, the fake score five updates to one."""
    common = {"normalise": False, "guidance_scale": 1.0, "student_every": 5, "time_std": 0.8}
    line = Line(name, SCHEDULES[schedule](), **common, **settings)
    fake = Bell(line.schedule)
    modules = line.nets.modules
    modules["teacher"] = Denoiser(line.own(MEAN, STD), "x0", line.schedule)
    modules["fake_score"] = Denoiser(fake, "x0", line.schedule)
    updates = {"student": 0, "fake_score": 0}
    optimizers = {key: torch.optim.Adam(modules[key].parameters(), 0.1) for key in updates}
    steps = 400
    for step in range(steps):
        for phase in line.method.phases(step):
            (trained,), ((_, loss),) = phase.trains, phase.terms
            noise = Doubles(range(128), step=step, phase=phase.name)
            for group in optimizers[trained].param_groups:
                group["lr"] = 0.1 * (1 - step / steps)
            for module in modules.values():
                module.requires_grad_(module is modules[trained])
            optimizers[trained].zero_grad()
            loss(line.nets, Batch(None, None, (1,), noise.index, noise))["total"].mean().backward()
            optimizers[trained].step()
            updates[trained] += 1
    assert updates == {"student": steps // 5, "fake_score": steps}
    shift, scale = line.student.shift.item(), abs(line.student.scale.item())
    assert (shift, scale) == (pytest.approx(MEAN, abs=0.02), pytest.approx(STD, abs=0.02))
    assert (fake.mean.item(), fake.log_std.exp().item()) == pytest.approx((shift, scale), abs=0.05)


@pytest.mark.parametrize("name", ["sim", "sid"])
@pytest.mark.parametrize("network", ["teacher", "fake_score"])
def test_the_gradient_crosses_the_input_of_both_networks_and_not_their_parameters(name, network):
    line = Line(name, SCHEDULES["vp"]())
    inputs = []

    class Watched(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64), requires_grad=False)

        def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            x_t.retain_grad()
            inputs.append(x_t)
            return self.weight * self.inner(x_t, t)

    watched = Watched(line.nets.modules[network].network)
    line.nets.modules[network] = Denoiser(watched, "x0", line.schedule)
    line.expected().backward()
    assert len(inputs) == 1 and float(inputs[0].grad.abs().max()) > 0
    assert watched.weight.grad is None
    assert float(line.student.shift.grad) != 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"student_every": 0}, "student_every"),
        ({"first_rho": -1.0}, "first_rho"),
        ({"t_low": 0.9, "t_high": 0.1}, "t_low"),
    ],
)
def test_bad_settings_are_one_sentence(wrong, says):
    with pytest.raises(UserError, match=says):
        Line("sim", SCHEDULES["vp"](), **wrong)


def test_a_fake_score_of_adapters_is_over_the_teacher():
    made = world("dmd2", fake_score_lora={"rank": 2})
    assert made.nets.fake_score.base is made.nets.teacher.backbone()


def test_what_is_logged_beside_the_students_samples_is_the_teachers():
    schedule = Flow()
    x_t, t = torch.randn(4, 2), torch.full((4,), 0.5, dtype=torch.float64)
    real, fake = (Prediction(torch.full((4, 2), value), "x0", x_t, t, schedule) for value in (3.0, 5.0))
    seen = compared(torch.zeros(4, 2), real, fake)
    assert float(seen["teacher_x0_mean"]) == 3 and float(seen["x0_mean"]) == 0
    assert seen["gap"].tolist() == [4.0] * 4


def test_vsd_has_adapters_of_its_own():
    """Those of the other score methods would be passed over."""
    with pytest.raises(UserError, match=r"method\.fake_score_lora.*set method\.lora_rank"):
        worlds.method("vsd", fake_score_lora={"rank": 2})
