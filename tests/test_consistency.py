"""Consistency methods against what is known: the exact consistency function, its derivative, closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import worlds
from test_sampling import drawn, seeded, states, stock_states
from torch import Tensor, nn

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.families.toy import SCHEDULES, Toy, gaussian, gaussian_flow_map
from stepdistill.methods.base import Batch, Networks, consistency, track_average
from stepdistill.methods.lcm import LCM
from stepdistill.methods.scm import NoiseWeight
from stepdistill.methods.tscd import TSCD
from stepdistill.noise import SampleNoise
from stepdistill.prediction import Prediction
from stepdistill.sampling import sample
from stepdistill.schedule import EDM, VP, Flow, Schedule, TrigFlow, as_edm
from stepdistill.solvers import SOLVERS
from stepdistill.timesteps import few_step_grid, ode_grid, teacher_grid, times_like

MEAN, STD = 0.3, 0.4
MADE = {name: make() for name, make in SCHEDULES.items()}
EVERY = pytest.mark.parametrize("schedule", MADE.values(), ids=MADE)
COUNT = 32


class Oracle(nn.Module):
    """The exact flow map of N(MEAN, STD^2) as a network of kind "x0": the consistency function, and with `end`
    the x0 whose straight line from x_t passes through the trajectory's point at `end`. least: the noise-to-signal
    ratio where trajectories begin.
    """

    def __init__(self, schedule: Schedule, least: float = 0.0):
        super().__init__()
        self.schedule, self.least = schedule, least

    def forward(self, x_t: Tensor, t: Tensor, cond=None, end: Tensor | None = None) -> Tensor:
        schedule = self.schedule
        # The data itself, where a table ends a little before it.
        alpha, sigma = (f(t)[:, None] for f in (schedule.alpha, schedule.sigma))
        z = (x_t - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()
        if end is None:
            return MEAN + math.hypot(STD, self.least) * z
        alpha_s, sigma_s = (f(end)[:, None] for f in (schedule.alpha, schedule.sigma))
        x_s = alpha_s * MEAN + (alpha_s**2 * STD**2 + sigma_s**2).sqrt() * z
        # x_t = alpha x0 + sigma eps and x_s = alpha_s x0 + sigma_s eps.
        return (sigma * x_s - sigma_s * x_t) / (sigma * alpha_s - sigma_s * alpha)


class Affine(nn.Module):
    """The smallest student with a gradient: x0 = a x_t + b + c t, so that everything has a closed form."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7, 0.1, 0.2], dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, cond=None, end: Tensor | None = None) -> Tensor:
        a, b, c = self.weight
        extra = 0 if end is None else 0.05 * end[:, None]
        return a * x_t + b + c * t[:, None] + extra


def nets_of(schedule: Schedule, student: nn.Module | None = None, **more: nn.Module) -> Networks:
    teacher = Denoiser(gaussian(schedule, [MEAN], STD), "x0", schedule)
    student = Denoiser(student or Oracle(schedule), "x0", schedule)
    modules = {"teacher": teacher, "student": student, "target": student, "weighting": NoiseWeight()}
    return Networks(modules | more, schedule)


def batch_of(count: int = COUNT, step: int = 0) -> Batch:
    noise = SampleNoise(range(count), step=step, phase="student")
    x0 = MEAN + STD * SampleNoise(range(count), phase="data").randn(1, dtype=torch.float64)
    batch = Batch(None, None, (1,), noise.index, noise, x0)
    batch.randn = lambda: noise.randn(1, dtype=torch.float64)
    return batch


def gradient(value: Tensor, module: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(module.parameters()))])


# ------------------------------------------------------------------------------------------ what all of them share


@EVERY
def test_boundary_a_clean_state_is_its_own_beginning(schedule):
    x = torch.randn(COUNT, 1, dtype=torch.float64)
    low, above = times_like(schedule.t_min, x), times_like(schedule.t_min + 1e-3 * schedule.t_max, x)
    wrong = Prediction(x + 5, "x0", x, low, schedule)
    assert torch.equal(consistency(wrong), x / schedule.alpha(low)[:, None])
    assert torch.equal(consistency(Prediction(x + 5, "x0", x, above, schedule)), x + 5)


@EVERY
def test_as_edm_keeps_the_range_of_noise(schedule):
    frame = as_edm(schedule)
    assert isinstance(frame, EDM)
    ends = schedule.rho(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)).clamp(0.002, 80)
    torch.testing.assert_close(torch.tensor([frame.t_min, frame.t_max]), ends.float())
    assert as_edm(schedule, most=5.0).t_max == 5.0


def test_a_target_network_follows_slowly():
    student, target = nn.Linear(2, 2), nn.Linear(2, 2)
    before = target.weight.detach().clone()
    track_average(target, student, 0.75)
    torch.testing.assert_close(target.weight, 0.75 * before + 0.25 * student.weight)
    track_average(target, student, 0.0)
    assert torch.equal(target.weight, student.weight)


# ----------------------------------------------------------------------------------------------------------------- CD


@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("heun", 3)])
def test_cds_loss_at_the_exact_consistency_function_is_the_solvers_local_error(solver, order):
    """Halving the step divides the endpoint error by 2^order: 4 for Euler, 8 for Heun."""
    schedule = EDM()
    nets = nets_of(schedule)
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    t = times_like(0.8, x)

    def error(step: float) -> float:
        x_s = SOLVERS[solver](lambda x, s: nets.teacher(x, s), x, t, t - step)
        ahead, here = (consistency(nets.student(a, b)) for a, b in ((x_s, t - step), (x, t)))
        return float((ahead - here).abs().max())

    ratios = [error(h) / error(h / 2) for h in (0.05, 0.025)]
    assert all(abs(ratio - 2**order) < 0.15 * 2**order for ratio in ratios), ratios


@EVERY
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_cd_is_small_at_the_oracle_and_falls_with_the_number_of_points(schedule, solver):
    def loss(points: int) -> float:
        method, oracle = (
            worlds.method("cd", points=points, solver=solver),
            Oracle(schedule, as_edm(schedule).t_min),
        )
        return float(method.loss(nets_of(schedule, oracle), batch_of(512))["total"].mean().sqrt())

    coarse, fine = loss(40), loss(160)
    assert fine < coarse / (3.0 if solver == "euler" else 6.0) and coarse < 0.1
    off = (
        worlds.method("cd", points=40).loss(nets_of(schedule, Affine()), batch_of(512))["total"].mean().sqrt()
    )
    assert float(off) > 3 * coarse


def test_cds_gradient_is_the_online_networks_alone():
    """2 (f(x_t) - f(x_s)) df(x_t)/dtheta, put together again: no gradient through target or teacher."""
    method, net = worlds.method("cd", points=18), Affine()
    nets, batch, twin = nets_of(EDM(), net), batch_of(), batch_of()
    ours = gradient(method.loss(nets, batch)["total"].mean(), net)

    grid = ode_grid(EDM(), 17, "karras")
    n = twin.generator.randint(0, 17)
    t, s = grid[n], grid[n + 1]
    x_t = twin.x0 + t[:, None] * twin.randn()
    d = (x_t - nets.teacher(x_t, t).x0) / t[:, None]
    x_s = x_t + d * (s - t)[:, None]
    d2 = (x_s - nets.teacher(x_s, s).x0) / s[:, None]
    x_s = x_t + (d + d2) / 2 * (s - t)[:, None]
    end = (s <= 0.002)[:, None]
    target = torch.where(end, x_s, nets.target(x_s, s).x0).detach()
    pull = 2 * (nets.student(x_t, t).x0 - target).detach() / COUNT
    expected = torch.stack([(pull * x_t).sum(), pull.sum(), (pull * t[:, None]).sum()])
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@EVERY
def test_cds_chain_ends_at_the_state_itself(schedule):
    """With two points every pair ends at the least noise, where f is the state, whatever the target network says."""

    class Wrong(nn.Module):
        def forward(self, x_t, t, cond=None):
            return torch.full_like(x_t, 1e9)

    method, frame = worlds.method("cd", points=2, solver="euler"), as_edm(schedule)
    nets = nets_of(schedule, Affine(), target=Denoiser(Wrong(), "x0", schedule))
    losses, twin = method.loss(nets, batch_of()), batch_of()
    twin.generator.randint(0, 1)
    t, s = (times_like(time, twin.x0) for time in (frame.t_max, frame.t_min))
    x_t = frame.add_noise(twin.x0, twin.randn(), t)
    x_s = SOLVERS["euler"](nets.teacher.under(frame), x_t, t, s)
    expected = (nets.student.under(frame)(x_t, t).x0 - x_s).square()[:, 0]
    torch.testing.assert_close(losses["total"], expected, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------- ECT


def test_ects_mapping_is_the_papers():
    method = worlds.method("ect")
    t = torch.tensor([0.5, 1.0, 3.0, 80.0], dtype=torch.float64)
    first, last = method.ratio(t, 0), method.ratio(t, 7)
    torch.testing.assert_close(first, torch.tensor([0.0, 0.0, 0.3103, 0.5]).double(), rtol=0, atol=1e-3)
    assert float(last.min()) > 0.98 and float(last[-1]) == pytest.approx(255 / 256)
    for stage in range(7):
        assert bool((method.ratio(t, stage) <= method.ratio(t, stage + 1)).all())


def test_ects_stage_follows_the_updates():
    method = worlds.method("ect", double_every=10, stages=3)
    found = [next(iter(method.phases(step))).terms[0][1].keywords["stage"] for step in (0, 9, 10, 29, 1000)]
    assert found == [0, 0, 1, 2, 2]


def test_ect_begins_as_denoising_towards_the_data():
    """Where r is 0 the target is x0 itself and the loss |f - x0| / t."""
    method, net = worlds.method("ect", time_mean=-3.0, time_std=0.5), Affine()
    nets, batch, twin = nets_of(EDM(), net), batch_of(), batch_of()
    losses = method.loss(nets, batch, stage=0)
    t = (-3 + 0.5 * twin.generator.randn(dtype=torch.float64)).exp().clamp(0.002, 80)
    x_t = twin.x0 + t[:, None] * twin.randn()
    expected = (nets.student(x_t, t).x0 - twin.x0).abs()[:, 0] / t
    torch.testing.assert_close(losses["total"], expected, rtol=1e-9, atol=1e-9)
    assert float(losses["ratio"]) == 0


def test_ects_pair_shares_its_noise_and_the_oracle_is_its_fixed_point_with_the_teacher():
    """With data pairs the loss of the exact consistency function stays finite (each pair leaves the
    trajectory); with the teacher's own step it is the solver's error, far below.
    """
    nets = nets_of(EDM())
    data = worlds.method("ect").loss(nets, batch_of(2000), stage=7)["total"].mean()
    ode = worlds.method("ect", teacher_step=True).loss(nets, batch_of(2000), stage=7)["total"].mean()
    assert float(ode) < 0.05 * float(data)


def test_ects_gradient_stops_at_the_target():
    """sign(f(x_t) - f(x_r)) / (t - r) df(x_t)/dtheta, put together again from the batch's draws."""
    method, net = worlds.method("ect"), Affine()
    nets, batch, twin = nets_of(EDM(), net), batch_of(), batch_of()
    ours = gradient(method.loss(nets, batch, stage=4)["total"].mean(), net)
    t = (-1.1 + 2.0 * twin.generator.randn(dtype=torch.float64)).exp().clamp(0.002, 80)
    r = t * method.ratio(t, 4)
    assert float((r > 0.002).double().mean()) > 0.5
    r = torch.where(r > 0.002, r, 0.0)
    eps = twin.randn()
    x_t, x_r = twin.x0 + t[:, None] * eps, twin.x0 + r[:, None] * eps
    target = torch.where(r[:, None] > 0, nets.student(x_r, r).x0, x_r)
    pull = ((nets.student(x_t, t).x0 - target).sign() / (t - r)[:, None]).detach() / COUNT
    expected = torch.stack([(pull * x_t).sum(), pull.sum(), (pull * t[:, None]).sum()])
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


def test_ect_at_a_perfect_fit_has_a_zero_gradient_not_a_nan():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, x_t, t, cond=None):
            return self.value.expand_as(x_t)

    net = Constant()
    loss = worlds.method("ect", time_mean=1.0, time_std=0.1).loss(nets_of(EDM(), net), batch_of(), stage=7)[
        "total"
    ]
    assert gradient(loss.mean(), net).tolist() == [0.0]


# ---------------------------------------------------------------------------------------------------------------- sCM


@EVERY
@pytest.mark.parametrize("how", ["forward", "difference", "upwind"])
def test_the_tangent_of_the_exact_consistency_function_is_zero(schedule, how):
    method = worlds.method("scm", derivative=how, difference_step=1e-4, time_mean=-0.5, time_std=0.7)
    tolerance = {"forward": 1e-10, "difference": 1e-5, "upwind": 1e-4}[how]
    assert float(method.loss(nets_of(schedule), batch_of())["tangent"].max()) < tolerance
    assert float(method.loss(nets_of(schedule, Affine()), batch_of())["tangent"].min()) > 0.01 * tolerance


def test_a_denoiser_is_not_consistent():
    nets = nets_of(EDM())
    nets.modules["student"] = nets.teacher
    assert float(worlds.method("scm").loss(nets, batch_of())["tangent"].mean()) > 0.02


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_scms_gradient_is_the_limit_of_discrete_consistency(sigma_data):
    """r = 1, no normalisation, u = 0: g = cos(t) df/dt and df = -s sin(t) dF, so the gradient is that of
    |f(x_t) - sg f(x_{t-h})|^2 / h over tan(t), times the prior weight 1 / (s tan t).
    """
    trig, net = TrigFlow(sigma_data), Affine()
    net.sigma_data = sigma_data
    method = worlds.method("scm", normalise=False, time_mean=-0.3, time_std=0.5)
    nets, batch, twin = nets_of(trig, net), batch_of(), batch_of()
    ours = gradient(method.loss(nets, batch, r=1.0)["total"].mean(), net)
    t = method.times(nets, twin, trig)
    x_t = trig.add_noise(twin.x0, twin.randn(), t)
    h = 1e-5
    velocity = nets.teacher(x_t, t).velocity
    with torch.no_grad():
        before = nets.student(x_t - h * velocity, t - h).x0
    distance = (nets.student(x_t, t).x0 - before).square()[:, 0] / h
    expected = gradient((distance / t.tan() / (sigma_data * t.tan())).mean(), net)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


@EVERY
@pytest.mark.parametrize("how", ["forward", "difference", "upwind"])
def test_the_tangent_is_zero_at_the_ends_of_the_networks_range_too(schedule, how):
    """Of a table most draws with std 3 lie beyond an end, where time has no derivative: none is taken there."""
    method = worlds.method("scm", derivative=how, difference_step=1e-3, time_mean=-0.5, time_std=3.0)
    tolerance = {"forward": 1e-10, "difference": 3e-3, "upwind": 1e-1}[how]
    if isinstance(schedule, VP):
        tolerance = {"forward": 1e-10, "difference": 1e-5, "upwind": 1e-2}[how]
    assert float(method.loss(nets_of(schedule), batch_of(512))["tangent"].max()) < tolerance


@pytest.mark.parametrize("how", ["forward", "difference", "upwind"])
def test_scms_gradient_is_minus_twice_the_tangent(how):
    """However the derivative is taken: what is regressed to is this pass's own F, moved by g."""

    class Steep(Affine):
        def forward(self, x_t, t, cond=None):
            return super().forward(x_t, t) + self.weight[1] * torch.sin(30 * t[:, None])

    settings = {"learned_weight": False, "normalise": False, "time_mean": 0.0, "time_std": 0.3}
    method, trig = worlds.method("scm", derivative=how, difference_step=3e-2, **settings), TrigFlow()
    nets, batch, twin = nets_of(trig, Steep()), batch_of(), batch_of()
    net = nets.student.network
    ours = gradient(method.loss(nets, batch)["total"].mean(), net)
    t = method.times(nets, twin, trig)
    x_t = trig.add_noise(twin.x0, twin.randn(), t)
    _, g = method.tangent(nets.student, None, trig, x_t, t, nets.teacher(x_t, t).velocity, 1.0)
    expected = gradient((-2 / trig.rho(t)[:, None] * g * nets.student(x_t, t).F).mean(), net)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


def test_the_tangents_warm_up_and_what_r_leaves_out():
    """At r = 0 only the part without a derivative is left: -cos^2 (s F - dx/dt)."""
    method = worlds.method("scm", warmup=4)
    found = [next(iter(method.phases(step))).terms[0][1].keywords["r"] for step in range(6)]
    assert found == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    trig, nets = TrigFlow(), nets_of(TrigFlow(), Affine())
    x = torch.randn(COUNT, 1, dtype=torch.float64)
    t, dx = times_like(0.7, x), torch.randn_like(x)
    F, tangent = method.tangent(nets.student, None, trig, x, t, dx, 0.0)
    torch.testing.assert_close(tangent, -(math.cos(0.7) ** 2) * (F - dx), rtol=1e-9, atol=1e-12)


def test_scms_weights_are_optional_and_multiply():
    """e^u w d - u of the paper; w d, and d alone (rCM)."""
    batch, nets = batch_of, nets_of(TrigFlow(), Affine())
    plain = worlds.method("scm", prior=False, learned_weight=False)
    assert plain.networks(nets.teacher, nets.student) == {}
    assert next(iter(plain.phases(0))).trains == ("student",)
    losses = plain.loss(nets, batch())
    assert torch.equal(losses["total"], losses["distance"])
    t = plain.times(nets, batch(), TrigFlow())
    weighed = worlds.method("scm", learned_weight=False).loss(nets, batch())["total"]
    torch.testing.assert_close(weighed, losses["distance"] / t.tan(), rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        nets.weighting.leave.bias.fill_(0.7)
    learned = worlds.method("scm").loss(nets, batch())["total"]
    torch.testing.assert_close(learned, math.exp(0.7) * weighed - 0.7, rtol=1e-5, atol=1e-5)


def test_a_normalised_tangent_makes_the_loss_known_beforehand():
    method = worlds.method("scm", tangent_c=0.1)
    losses = method.loss(nets_of(TrigFlow(), Affine()), batch_of())
    norm = losses["tangent"]
    torch.testing.assert_close(losses["distance"], (norm / (norm + 0.1)) ** 2, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_scms_times_are_scm_schedulers(steps, sigma_data):
    from diffusers import SCMScheduler

    times = worlds.method("scm", steps=(1, 2, 4), first_rho=0.0).grid(TrigFlow(sigma_data), steps)
    scheduler = SCMScheduler(sigma_data=sigma_data)
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    torch.testing.assert_close(torch.tensor((*times, 0.0)), scheduler.timesteps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
# Both clamp the last cosine: ours at 1e-4, float32's pi / 2 has its own.
@pytest.mark.parametrize(("first_rho", "tolerance"), [(0.0, 1e-3), (80.0, 2e-6)])
def test_scms_states_are_scm_schedulers(steps, sigma_data, first_rho, tolerance):
    """Every state and the result of the stock scheduler, number by number, with the same network outputs."""
    from diffusers import SCMScheduler

    trig = TrigFlow(sigma_data)
    times = worlds.method("scm", steps=(1, 2, 4), first_rho=first_rho).grid(trig, steps)
    scheduler = SCMScheduler(sigma_data=sigma_data)
    scheduler.set_timesteps(steps, timesteps=[*times, 0.0], max_timesteps=None, intermediate_timesteps=None)
    start, outputs = drawn(steps)
    ours = states(outputs, "F", trig, start, times, seeded(start, torch.float32))
    theirs = stock_states(scheduler, [sigma_data * output for output in outputs], start)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_flow_teacher_is_asked_in_trigflow_by_the_papers_formulas():
    """SANA-Sprint's training-free change of network: t, state and F from those of rectified flow."""
    heard = []

    class Velocity(nn.Module):
        def forward(self, x_t, t, cond=None):
            heard.append((x_t, t))
            return torch.sin(3 * x_t) + t[:, None]

    tau = torch.linspace(0.01, 1.55, COUNT, dtype=torch.float64)
    x = torch.randn(COUNT, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    said = Denoiser(Velocity(), "flow", Flow(), TrigFlow())(x, tau).F
    t = tau.sin() / (tau.sin() + tau.cos())
    norm = (t**2 + (1 - t) ** 2).sqrt()[:, None]
    x_flow, t_ = x * norm, t[:, None]
    v = torch.sin(3 * x_flow) + t_
    torch.testing.assert_close(heard[0], (x_flow, t), rtol=1e-12, atol=1e-12)
    expected = ((1 - 2 * t_) * x_flow + (1 - 2 * t_ + 2 * t_**2) * v) / norm
    torch.testing.assert_close(said, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_flow_teachers_trajectories_are_the_same_in_trigflow(solver):
    """100 steps from one noise under either schedule, up to the solver's error, and near the exact end."""
    flow, trig = Flow(), TrigFlow()
    teacher = Denoiser(gaussian(flow, [MEAN], STD), "x0", flow)
    noise, ends = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], []
    for schedule in (flow, trig):
        x, grid = noise, ode_grid(schedule, 100)
        for t, s in itertools.pairwise(grid.tolist()):
            x = SOLVERS[solver](teacher.under(schedule), x, times_like(t, x), times_like(s, x))
        ends.append(x)
    tolerance = {"euler": 3e-2, "heun": 1e-3}[solver]
    torch.testing.assert_close(*ends, rtol=0, atol=tolerance)
    torch.testing.assert_close(ends[1], MEAN + STD * noise, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------- LCM


class Told(nn.Module):
    """A network that is told a guidance scale and does not mind."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x_t: Tensor, t: Tensor, cond=None, guidance: Tensor | None = None) -> Tensor:
        return self.inner(x_t, t)


class ToTheEnd(nn.Module):
    """The exact flow to a schedule's last state."""

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return gaussian_flow_map(self.schedule, MEAN, STD, x_t, t, times_like(self.schedule.t_min, x_t))


def lcm(**settings) -> LCM:
    return worlds.method("lcm", guidance_low=1.0, guidance_high=1.0, **settings)


def test_lcms_loss_falls_with_the_square_of_the_step_at_the_exact_flow():
    """By four per halving, for a c far below the error: what is left is the local error of the teacher's step."""
    schedule = VP.from_betas()

    def loss(points: int, net: nn.Module) -> float:
        method = lcm(ddim_steps=points, huber_c=1e-9)
        return float(method.loss(nets_of(schedule, Told(net)), batch_of(1024))["total"].mean().detach())

    errors = [loss(points, ToTheEnd(schedule)) for points in (25, 50, 100)]
    assert all(3 < coarse / fine < 5 for coarse, fine in itertools.pairwise(errors)), errors
    assert errors[0] < 0.1 * loss(25, Affine())


def test_lcms_gradient_is_the_online_networks_alone():
    """d / sqrt(d^2 + c^2) df(x_t)/dtheta, put together again: no gradient through the target or the teacher."""
    schedule, c = VP.from_betas(), 0.1
    method = lcm(huber_c=c)
    nets, batch, twin = nets_of(schedule, Told(Affine())), batch_of(), batch_of()
    ours = gradient(method.loss(nets, batch)["total"].mean(), nets.student)
    grid = method.ode_times(schedule)
    i = twin.generator.randint(0, 50)
    twin.generator.rand()  # the guidance scales
    t, s = grid[i], grid[i + 1]
    x_t = schedule.add_noise(twin.x0, twin.randn(), t)
    x_s = SOLVERS["ddim"](nets.teacher, x_t, t, s)
    online, target = (method.boundary(nets.student(x, time)) for x, time in ((x_t, t), (x_s, s)))
    d = (online - target).detach()
    expected = gradient((d / (d**2 + c**2).sqrt() * online).mean(), nets.student)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- MeanFlow


@EVERY
def test_meanflows_identity_holds_for_the_exact_average_velocity(schedule):
    """u = v - (t - r) du/dt with the oracle's u, through any native schedule: the error is rounding."""
    method = worlds.method("meanflow", equal_share=0.0, time_mean=0.0, time_std=0.8)
    assert float(method.loss(nets_of(schedule), batch_of())["error"].max()) < 1e-7
    assert float(method.loss(nets_of(schedule, Affine()), batch_of())["error"].mean()) > 1e-2


def test_the_oracles_average_velocity_is_the_average():
    """(x_t - x_r) / (t - r) by the flow map, and v itself at r = t."""
    flow = Flow()
    nets = nets_of(flow)
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]
    t, r = times_like(0.8, x), times_like(0.3, x)
    u = nets.student(x, t, end=r).flow
    x_r = gaussian_flow_map(flow, MEAN, STD, x, t, r)
    torch.testing.assert_close(u, (x - x_r) / 0.5, rtol=1e-9, atol=1e-9)
    nearly = nets.student(x, t, end=t - 1e-6).flow
    torch.testing.assert_close(nearly, nets.teacher(x, t).flow, rtol=1e-4, atol=1e-5)


def test_with_r_equal_to_t_meanflow_is_flow_matching():
    method, net = worlds.method("meanflow", direction="data", equal_share=1.0, weight_power=0.0), Affine()
    nets, batch, twin = nets_of(Flow(), net), batch_of(), batch_of()
    losses = method.loss(nets, batch)
    t, r = method.times(nets, twin)
    assert torch.equal(t, r)
    eps = twin.randn()
    x_t = Flow().add_noise(twin.x0, eps, t)
    expected = (nets.student(x_t, t, end=t).flow - (eps - twin.x0)).square()[:, 0]
    torch.testing.assert_close(losses["total"], expected, rtol=1e-9, atol=1e-9)


def test_meanflows_times_are_ordered_and_its_share_of_equal_times_is_kept():
    method = worlds.method("meanflow", equal_share=0.25)
    t, r = method.times(nets_of(Flow()), batch_of(4000))
    assert bool((r <= t).all()) and abs(float((r == t).double().mean()) - 0.25) < 5 * (0.1875 / 4000) ** 0.5


def test_meanflows_gradient_stops_at_the_target_and_its_weight():
    """2 w (u - target) du with w = (|.|^2 + c)^-p and the target constant."""
    method, net = worlds.method("meanflow", equal_share=0.0, weight_power=0.5, weight_c=0.1), Affine()
    nets, batch, twin = nets_of(Flow(), net), batch_of(), batch_of()
    ours = gradient(method.loss(nets, batch)["total"].mean(), net)
    t, r = method.times(nets, twin)
    x_t = Flow().add_noise(twin.x0, twin.randn(), t)
    v = nets.teacher(x_t, t).flow
    h = 1e-5
    with torch.no_grad():
        ahead, behind = (nets.student(x_t + s * h * v, t + s * h, end=r).flow for s in (1, -1))
    target = v - (t - r)[:, None] * (ahead - behind) / (2 * h)
    u = nets.student(x_t, t, end=r).flow
    gap = (u - target).detach()
    weight = (gap.square() + 0.1) ** -0.5
    expected = gradient((2 * weight * gap * u).mean(), net)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-8)


def test_meanflows_guided_target_mixes_its_own_velocities():
    class Labelled(Affine):
        def forward(self, x_t, t, cond=None, end=None):
            return super().forward(x_t, t, None, end) + 0.3 * cond[:, None]

    settings = {"direction": "data", "guidance_scale": 2.0, "kappa": 0.5, "cond_dropout": 0.0}
    method = worlds.method("meanflow", **settings)
    nets, batch = nets_of(Flow(), Labelled()), batch_of()
    batch.cond, batch.uncond = torch.ones(COUNT), torch.zeros(COUNT)
    eps, t = torch.randn(COUNT, 1, dtype=torch.float64), times_like(0.4, batch.x0)
    x_t = Flow().add_noise(batch.x0, eps, t)
    with torch.no_grad():
        v = method.velocity(nets, batch, batch.cond, x_t, t, eps)
        c, u = (nets.student(x_t, t, told, end=t).flow for told in (batch.cond, batch.uncond))
    torch.testing.assert_close(v, 2.0 * (eps - batch.x0) + 0.5 * c - 1.5 * u, rtol=1e-9, atol=1e-9)
    # And the mix is a constant: with r = t the gradient is that of (u - v)^2 at u alone.
    method = worlds.method("meanflow", **settings, equal_share=1.0, weight_power=0.0)
    net, twin = nets.student.network, batch_of()
    ours = gradient(method.loss(nets, batch)["total"].mean(), net)
    t, _ = method.times(nets, twin)
    eps = twin.randn()
    x_t = Flow().add_noise(twin.x0, eps, t)
    v = method.velocity(nets, batch, batch.cond, x_t, t, eps).detach()
    u = nets.student(x_t, t, batch.cond, end=t).flow
    torch.testing.assert_close(ours, gradient((u - v).square().mean(), net), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"direction": "data", "guidance_scale": 2.0}])
def test_meanflows_derivative_is_of_the_network_with_the_dropout_that_is_trained(settings):
    class Draws(Affine):
        def forward(self, x_t, t, cond=None, end=None):
            drawn.append(float(torch.rand(())))
            return super().forward(x_t, t, None, end)

    drawn: list[float] = []
    batch = batch_of()
    batch.cond, batch.uncond = torch.ones(COUNT), torch.zeros(COUNT)
    nets = nets_of(Flow(), Draws())
    nets.teacher.network.forward = lambda x_t, t, cond=None: x_t
    worlds.method("meanflow", **settings).loss(nets, batch)
    assert drawn[-1] == drawn[-2] and len(drawn) == (4 if settings else 2)


@EVERY
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_flow_map_rule_with_the_oracle_follows_the_trajectory_exactly(schedule, steps):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    times = few_step_grid(schedule, steps, first_rho=10.0)
    t = times_like(times[0], x)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    start = alpha * MEAN + (alpha**2 * STD**2 + sigma**2).sqrt() * x
    student = Denoiser(Oracle(schedule), "x0", schedule)
    drawn = sample(student, start, times, None, rule="flowmap", t_min=schedule.t_min)
    last, end = times_like(times[-1], x), times_like(schedule.t_min, x)
    before = gaussian_flow_map(schedule, MEAN, STD, start, t, last)
    jump = student(before, last, end=end)
    torch.testing.assert_close(drawn, jump.x0, rtol=0, atol=1e-9)
    exact = gaussian_flow_map(schedule, MEAN, STD, start, t, end)
    torch.testing.assert_close(jump.at(end), exact, rtol=0, atol=1e-9)


# --------------------------------------------------------------------------------------------------------------- TSCD


class SegmentOracle(nn.Module):
    """The network whose DDIM jump from t to its segment's lower edge is the exact flow map."""

    def __init__(self, schedule: Schedule, method: TSCD):
        super().__init__()
        self.two_time, self.schedule, self.method = Oracle(schedule), schedule, method

    def forward(self, x_t, t, cond=None):
        b = self.method.lower_edge(self.schedule, t)
        b = torch.where(b < t, b, t - 1e-6)  # at its own edge any line will do
        return self.two_time(x_t, t, end=b)


@EVERY
@pytest.mark.parametrize("segments", [8, 4, 2, 1])
def test_tscd_with_the_exact_segment_maps_has_the_teachers_error_alone(schedule, segments):
    def loss(points: int) -> float:
        method = worlds.method("tscd", segments=segments, ddim_steps=points, guidance_scale=1.0)
        nets = nets_of(schedule, SegmentOracle(schedule, method))
        return float(method.loss(nets, batch_of(256))["total"].mean().sqrt())

    scale = 80 if isinstance(schedule, EDM) else 1  # a state at sigma = 40 is an error in units of 40
    assert loss(200) < 0.5 * loss(50) < 0.5 * 0.05 * scale


@EVERY
@pytest.mark.parametrize("segments", [8, 3, 1])
def test_tscds_loss_is_zero_where_student_and_teacher_follow_the_exact_flow(schedule, segments, monkeypatch):
    def flow_map(predict, x_t, t, s):
        return gaussian_flow_map(schedule, MEAN, STD, x_t, t, s)

    monkeypatch.setattr("stepdistill.methods.tscd.ddim", flow_map)
    method = worlds.method("tscd", segments=segments, guidance_scale=1.0)
    losses = method.loss(nets_of(schedule, SegmentOracle(schedule, method)), batch_of(256))
    assert float(losses["total"].max()) < 1e-15 * schedule.t_max**2


def test_tscd_of_one_segment_is_cd_with_an_euler_step():
    """But for the jump's end: the trajectory's last point, not the data, so sigma_min eps apart."""
    schedule, found = EDM(), []
    for method in (
        worlds.method("cd", points=11, solver="euler", distance="l2", guidance_scale=1.0),
        worlds.method("tscd", segments=1, ddim_steps=10, distance="l2", guidance_scale=1.0),
    ):
        nets = nets_of(schedule, Affine(), target=Denoiser(Affine(), "x0", schedule))
        loss = method.loss(nets, batch_of(512))["total"].mean()
        found.append(torch.cat((loss.detach()[None], gradient(loss, nets.student))))
    torch.testing.assert_close(*found, rtol=5e-3, atol=0)


@EVERY
def test_the_segments_maps_composed_are_the_whole_trajectory(schedule):
    """And they are what a k-step student without noise walks through: its times are the edges."""
    method = worlds.method("tscd", steps=(4,), segments=4, eta=0.0)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    times = method.grid(schedule, 4)
    t = times_like(times[0], x)
    start = (schedule.alpha(t) * MEAN)[:, None] + (
        (schedule.alpha(t) ** 2 * STD**2 + schedule.sigma(t) ** 2).sqrt()[:, None] * x
    )
    student = Denoiser(SegmentOracle(schedule, method), "x0", schedule)
    drawn = sample(student, start, times, None, rule="tcd", eta=0.0, t_min=schedule.t_min)
    exact = gaussian_flow_map(schedule, MEAN, STD, start, t, times_like(schedule.t_min, x))
    torch.testing.assert_close(drawn, exact, rtol=0, atol=1e-6)


@EVERY
@pytest.mark.parametrize("segments", [8, 3, 1])
def test_every_time_lies_in_exactly_one_segment(schedule, segments):
    method = worlds.method("tscd", segments=segments)
    edges = (*few_step_grid(schedule, segments), schedule.t_min)
    between = torch.linspace(schedule.t_min, edges[0], 204, dtype=torch.float64)[1:-1]
    t = torch.cat((between, torch.tensor(edges[:-1], dtype=torch.float64)))
    b = method.lower_edge(schedule, t)
    assert bool((b < t).all()) and set(b.tolist()) <= set(edges)
    for upper, lower in itertools.pairwise(edges):
        inside = (t > lower) & (t <= upper)
        assert bool((b[inside] == lower).all()) and bool(inside.any())


def test_tscd_never_looks_below_the_edge_and_takes_the_state_itself_there():
    """One DDIM step that ends in the edge has x_s for its target, whatever the target network says."""
    method = worlds.method("tscd", segments=8, ddim_steps=8, guidance_scale=1.0)
    nets, batch, twin = nets_of(VP.from_betas(), Affine()), batch_of(), batch_of()

    class Never(nn.Module):
        def forward(self, x_t, t, cond=None):
            return torch.full_like(x_t, 1e9)

    nets.modules["target"] = Denoiser(Never(), "x0", nets.schedule)
    losses = method.loss(nets, batch)
    i = twin.generator.randint(0, 8)
    edges = torch.tensor((*few_step_grid(nets.schedule, 8), 0.0), dtype=torch.float64)
    t, s = edges[i], edges[i + 1]
    x_t = nets.schedule.add_noise(twin.x0, twin.randn(), t)
    expected = (nets.student(x_t, t).at(s) - nets.teacher(x_t, t).at(s)).square()[:, 0]
    torch.testing.assert_close(losses["total"], expected, rtol=1e-9, atol=1e-12)


@EVERY
def test_tscds_teacher_steps_to_the_edge_where_the_next_point_lies_below(schedule):
    heard = []

    class Ear(nn.Module):
        def forward(self, x_t, t, cond=None):
            heard.append(t)
            return x_t

    method = worlds.method("tscd", segments=4, ddim_steps=7, guidance_scale=1.0)
    nets = nets_of(schedule, Affine(), target=Denoiser(Ear(), "x0", schedule))
    method.loss(nets, batch_of(256))
    grid = torch.tensor((*teacher_grid(schedule, 7), schedule.t_min), dtype=torch.float64)
    i = batch_of(256).generator.randint(0, 7)
    b, below = method.lower_edge(schedule, grid[i]), grid[i + 1]
    torch.testing.assert_close(heard[0], torch.maximum(below, b), rtol=1e-9, atol=1e-9)
    assert bool((below < b - 1e-3).any()) and bool((below > b + 1e-3).any())


def test_tscd_refuses_what_does_not_fit():
    for settings, says in (
        ({"segments": 0}, r"method\.segments"),
        ({"segments": 9, "ddim_steps": 8}, r"method\.segments"),
        ({"eta": 1.5}, r"method\.eta"),
    ):
        with pytest.raises(UserError, match=says):
            worlds.method("tscd", **settings)


# --------------------------------------------------------------------------------------------------- the rule "tcd"


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
        times = few_step_grid(schedule, steps, 8)
        assert list(times) == scheduler.timesteps.tolist()
        calls = iter(outputs)
        ours = sample(
            lambda x_t, t, cond, calls=calls, schedule=schedule: Prediction(
                next(calls), ours_kind, x_t, t, schedule
            ),
            start,
            times,
            lambda i: torch.randn(2, 3, generator=torch.Generator().manual_seed(i)),
            rule="tcd",
            eta=eta,
        )
        torch.testing.assert_close(ours, x, rtol=2e-4, atol=2e-4)


@EVERY
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd_with_the_oracle_keeps_the_marginal_at_every_eta(schedule, eta):
    from stepdistill.sampling import walk

    n = 40_000
    oracle = Oracle(schedule)
    noise = SampleNoise(range(n), phase="tcd")

    class TwoTime:
        """Its line from x_t passes through the trajectory's point at (1 - eta) s, as a trajectory student's does."""

        def __call__(self, x_t, t, cond=None):
            below = schedule.t_min + (1 - eta) * (times[1] - schedule.t_min)
            below = math.floor(below) if isinstance(schedule, VP) else below
            return Prediction(oracle(x_t, t, end=times_like(float(below), x_t)), "x0", x_t, t, schedule)

    times = few_step_grid(schedule, 2)
    t, s = (torch.tensor([time], dtype=torch.float64) for time in times)
    spread = [(schedule.alpha(u) ** 2 * STD**2 + schedule.sigma(u) ** 2).sqrt() for u in (t, s)]
    x = schedule.alpha(t) * MEAN + spread[0] * noise.randn(1, dtype=torch.float64)
    x_s = walk(TwoTime(), x, times, lambda _: noise.randn(1, dtype=torch.float64), rule="tcd", eta=eta)
    assert abs(float(x_s.mean() - schedule.alpha(s) * MEAN)) < 5 * float(spread[1]) / n**0.5
    assert abs(float(x_s.std() / spread[1]) - 1) < 5 / (2 * n) ** 0.5


@EVERY
def test_tcd_without_noise_is_the_ode_rule(schedule):
    from stepdistill.sampling import walk

    teacher = Denoiser(gaussian(schedule, [MEAN], STD), "x0", schedule)
    x, times = torch.randn(8, 1, dtype=torch.float64), few_step_grid(schedule, 4)
    drawn = [walk(teacher, x, times, None, rule=rule) for rule in ("tcd", "ode")]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("schedule", [Flow(), TrigFlow(), TrigFlow(0.5)])
def test_tcd_with_all_noise_is_renoising(schedule):
    """Where the schedule's end is clean: of eta = 1 the line to t_min keeps x0 alone, in the end as well."""
    teacher = Denoiser(gaussian(schedule, [MEAN], STD), "x0", schedule)
    start, *noise = torch.randn(5, 8, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    how = {"start": start, "times": few_step_grid(schedule, 4), "noise": noise.__getitem__}
    found = [
        sample(teacher, *how.values(), rule=rule, eta=1.0, t_min=schedule.t_min)
        for rule in ("tcd", "renoise")
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------------------- students of two times


def test_a_two_time_student_starts_as_the_teacher_and_hears_its_end():
    family = Toy(Toy.Config(fit_steps=0, schedule="flow"))
    plain, student = family.student("teacher", ()), family.student("teacher", ("end",))
    x = torch.randn(COUNT, 2)
    t, end = times_like(0.7, x), times_like(0.2, x)
    assert torch.equal(student(x, t, end=end).x0, plain(x, t).x0)
    with torch.no_grad():
        student.network.end.weight.normal_()
    assert not torch.allclose(student(x, t, end=end).x0, student(x, t, end=t).x0)
    # Its end travels with the schedule it is asked in.
    trig = TrigFlow()
    x_trig = trig.add_noise(torch.zeros_like(x), x, trig.t_of_rho(Flow().rho(t))) * 0 + x
    asked = [trig.t_of_rho(Flow().rho(time)) for time in (t, end)]
    norm = (1 / torch.hypot(1 - t, t))[:, None].float()
    said = student(x_trig * norm, asked[0], in_schedule=trig, end=asked[1])
    torch.testing.assert_close(said.x0, student(x, t, end=end).x0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method", [worlds.method("cd"), worlds.method("ect"), worlds.method("scm"), worlds.method("meanflow")]
)
def test_the_gradient_through_distributed_data_parallel_is_the_networks_own(method, tmp_path):
    """Asked in another schedule and told an end, a wrapped student still answers through its wrapper."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    family = Toy(Toy.Config(schedule="vp", fit_steps=0))
    student = family.student("teacher", method.student_extras)
    modules = {"student": student, "teacher": family.teacher} | method.networks(family.teacher, student)

    def gradients(online: nn.Module) -> list[Tensor]:
        student.zero_grad()
        noise = SampleNoise(range(COUNT), phase="student")
        batch = Batch(None, None, family.shape, noise.index, noise, family.data(range(COUNT)))
        nets = Networks(modules | {"student": online}, family.schedule)
        ((_, loss),) = next(iter(method.phases(5))).terms
        loss(nets, batch)["total"].mean().backward()
        return [parameter.grad.clone() for parameter in student.parameters()]

    alone = gradients(student)
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = gradients(DistributedDataParallel(student))
    finally:
        distributed.destroy_process_group()
    assert sum(float(g.abs().sum()) for g in alone) > 0
    assert all(torch.equal(a, b) for a, b in zip(alone, wrapped, strict=True))
