"""Score-implicit and variational score methods: gradients against quadrature, zeros, values, conversions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import worlds
from torch import Tensor, nn
from worlds import Doubles

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.families.toy import SCHEDULES, Mixture
from stepdistill.losses import distribution_matching
from stepdistill.methods import METHODS
from stepdistill.methods.base import Batch, Method, Networks
from stepdistill.methods.f_distill import WEIGHTS
from stepdistill.prediction import Prediction
from stepdistill.registry import resolve
from stepdistill.schedule import Schedule, expand

# ------------------------------------------------------------------------------------- one dimension, exactly

RHO = 0.7  # the noise level of every comparison
SHIFT, SCALE = 0.4, 0.8  # the student: x0 = SHIFT + SCALE z
ELSEWHERE = (-0.6, 0.3)  # another one
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", [f() for f in SCHEDULES.values()], ids=list(SCHEDULES))
TWO_STUDENTS = pytest.mark.parametrize("theta", [(SHIFT, SCALE), ELSEWHERE], ids=["wide", "narrow"])


class Nodes:
    """In the place of a batch's noise: the nodes of a product quadrature, so that means are exact.

    The first normal draw is z, the second eps; a lognormal time of std 0 takes a draw of its own in between.
    """

    def __init__(self, z: Tensor, eps: Tensor):
        self.draws = {"z": z, "eps": eps}
        self.queue = ["z", "eps"]

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if not shape:  # a time
            return torch.zeros(len(self.draws["z"]), dtype=torch.float64)
        return self.draws[self.queue.pop(0)][:, None]

    def shared_randint(self, low: int, high: int) -> int:
        return low


def normal(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights for expectations under N(0, 1): the trapezoid rule, exponentially exact here."""
    nodes = torch.linspace(-9, 9, count, dtype=torch.float64)
    weights = (-0.5 * nodes**2).exp()
    return nodes, weights / weights.sum()


class Affine(nn.Module):
    """x0 = shift + scale z of the unit noise z its first input was made from."""

    def __init__(self, z_of: Callable[[Tensor, Tensor], Tensor], theta: tuple[float, float] = (SHIFT, SCALE)):
        super().__init__()
        self.shift, self.scale = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in theta)
        self.z_of = z_of

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.shift + self.scale * self.z_of(x_t, t)


class Line:
    """A method on the line: affine student, two-mode teacher, the exact fake score of the student's law."""

    def __init__(
        self,
        name: str,
        schedule: Schedule,
        theta: tuple[float, float] = (SHIFT, SCALE),
        nodes: int = 161,
        **settings: Any,
    ):
        common = {"time_density": "lognormal", "time_mean": math.log(RHO), "time_std": 0.0}
        self.method = worlds.method(name, steps=(1,), **(common | settings))
        self.schedule = schedule
        self.t = schedule.t_of_rho(torch.tensor([RHO], dtype=torch.float64))
        alpha, sigma = float(schedule.alpha(self.t)), float(schedule.sigma(self.t))
        self.alpha, self.sigma = alpha, sigma
        means = torch.tensor([[-1.0], [1.3]], dtype=torch.float64)
        weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
        self.data = Mixture(schedule, means, 0.35, weights)
        first = first_sigma(self.method, schedule)
        self.theta, self.student = theta, Affine(lambda x_t, t: x_t / first, theta)
        modules = {
            "student": Denoiser(self.student, "x0", schedule),
            "teacher": Denoiser(self.data, "x0", schedule),
            "fake_score": Denoiser(self.own(*theta), "x0", schedule),
        }
        self.nets = Networks(modules, schedule)
        z, wz = normal(nodes)
        grid_z, grid_eps = torch.meshgrid(z, z, indexing="ij")
        self.z, self.eps = grid_z.flatten(), grid_eps.flatten()
        self.weights = torch.outer(wz, wz).flatten()

    def own(self, shift: float, scale: float) -> Mixture:
        return Mixture(self.schedule, torch.tensor([[shift]], dtype=torch.float64), scale)

    def batch(self) -> Batch:
        noise = Nodes(self.z, self.eps)
        return Batch(None, None, (1,), torch.arange(len(self.z)), noise)

    def expected(self, name: str = "total") -> Tensor:
        return (self.weights * self.method.student_loss(self.nets, self.batch())[name]).sum()

    def mean(self, name: str) -> float:
        return float(self.expected(name).detach())

    def gradient(self) -> Tensor:
        """d E[loss] / d (shift, scale), through the method's own code."""
        parameters = (self.student.shift, self.student.scale)
        return torch.stack(torch.autograd.grad(self.expected(), parameters))

    def score_gap(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """s_student - s_data at x_t, the student's differentiable in its parameters."""
        variance = self.alpha**2 * scale**2 + self.sigma**2
        own = -(x - self.alpha * shift) / variance
        t = self.t.expand(len(x))
        state = x[:, None] if x.requires_grad else x[:, None].clone().requires_grad_(True)
        (data,) = torch.autograd.grad(self.data.log_prob(state, t).sum(), state, create_graph=True)
        return own - data[:, 0]

    def direct(self, d: Callable[[Tensor], Tensor], sampling: bool) -> Tensor:
        """d / d (shift, scale) of E_{x_t} d(s_student - s_data), the sampling law differentiated or held."""
        shift, scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in self.theta)
        nodes, weights = normal(1601)
        spread = (self.alpha**2 * scale**2 + self.sigma**2).sqrt()
        x = self.alpha * shift + spread * nodes
        x = x if sampling else x.detach()
        value = (weights * d(self.score_gap(x, shift, scale))).sum()
        return torch.stack(torch.autograd.grad(value, (shift, scale)))

    def reverse_kl(self) -> Tensor:
        """d KL(student at t || data at t) / d (shift, scale)."""
        return self.density_gradient(lambda log_q, log_p: log_q.exp() * (log_q - log_p))

    def density_gradient(self, integrand: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The same for the integral of any function of the two log densities, by the trapezoid rule."""
        shift, scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in self.theta)
        x = torch.linspace(-14, 14, 20001, dtype=torch.float64)
        variance = self.alpha**2 * scale**2 + self.sigma**2
        log_q = -0.5 * (x - self.alpha * shift) ** 2 / variance - 0.5 * (2 * math.pi * variance).log()
        log_p = self.data.log_prob(x[:, None], self.t.expand(len(x)))
        value = torch.trapezoid(integrand(log_q, log_p), x)
        return torch.stack(torch.autograd.grad(value, (shift, scale)))


def first_sigma(method: Method, schedule: Schedule) -> float:
    """What the first input divides into the unit noise it was made from."""
    from stepdistill.sampling import first_input

    t = method.grid(schedule, 1)[0]
    return float(first_input(schedule, torch.ones(1, 1, dtype=torch.float64), t, method.init_noise))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ SIM and SiD


@EVERY_SCHEDULE
@TWO_STUDENTS
def test_sim_has_the_gradient_of_its_divergence(schedule, theta):
    """Through the inputs of teacher and fake score: without either the gradient is another one."""
    line = Line("sim", schedule, theta, distance="l2")
    ratio = line.alpha / line.sigma**2  # of a score to an x0
    close(line.gradient(), line.direct(lambda y: y**2, sampling=False) / (2 * ratio**2))
    c = 0.2
    line = Line("sim", schedule, theta, huber_c=c)
    c_score = c * ratio
    huber = line.direct(lambda y: (y**2 + c_score**2).sqrt() - c_score, sampling=False) / ratio
    close(line.gradient(), huber, 1e-6)  # the kink of width c is what limits the quadrature


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


# --------------------------------------------------------------------------------------------------- KL methods


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


def test_dmd_divides_by_the_distance_to_the_teachers_answer():
    line = Line("dmd", SCHEDULES["edm"]())
    batch = line.batch()
    x0 = line.method.generate(line.nets, batch)
    with torch.no_grad():
        real, fake = line.method.ask(line.nets, batch, x0)
    pull = (fake.x0 - real.x0) / (x0.detach() - real.x0).abs().clamp(min=1e-5)
    parameters = (line.student.shift, line.student.scale)
    expected = torch.autograd.grad((line.weights[:, None] * pull * x0).sum(), parameters)
    close(line.gradient(), torch.stack(expected))


F = {  # f(r), r = p / q, of D_f(p || q) = E_q f(r)
    "reverse_kl": lambda r: -r.log(),
    "softened_kl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "hellinger": lambda r: 1 - r.sqrt(),
    "forward_kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (r - 1) ** 2 / r,
}


@pytest.mark.parametrize("divergence", WEIGHTS)
def test_f_distill_has_the_gradient_of_its_divergence(divergence, monkeypatch):
    """With the exact density ratio in the discriminator's place."""
    settings = {
        "divergence": divergence,
        "normalise": False,
        "normalise_weight": False,
        "guidance_scale": 1.0,
    }
    limits = {"ratio_low": 1e-12, "ratio_high": 1e12}
    line = Line("f_distill", SCHEDULES["vp"](), **settings, **limits)
    line.method.config.gan_weight = 0.0
    own, data = line.nets.fake_score.network, line.data

    def log_ratio(real: Prediction, logits: None) -> Tensor:
        return data.log_prob(real.x_t, real.t) - own.log_prob(real.x_t, real.t)

    monkeypatch.setattr(line.method, "log_ratio", log_ratio)
    f = F[divergence]
    direct = line.density_gradient(lambda log_q, log_p: log_q.exp() * f((log_p - log_q).exp()))
    close(line.gradient(), (line.sigma / line.alpha) ** 2 * direct, 1e-7)


@pytest.mark.parametrize("divergence", WEIGHTS)
def test_f_distill_weights_are_f_second_times_r_squared(divergence):
    r = torch.linspace(0.1, 20, 200, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(F[divergence](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(WEIGHTS[divergence](r), second * r**2, rtol=1e-9, atol=1e-9)
    assert float(F[divergence](torch.ones(1))) == 0


def test_reverse_kl_is_dmd2_and_ratios_are_clipped_and_normalised():
    common = {"guidance_scale": 1.0, "gan_weight": 1e-3}
    method = Line("f_distill", SCHEDULES["vp"](), divergence="reverse_kl", **common).method
    logits = torch.tensor([[-50.0], [0.0], [1.0], [50.0]])
    real = Prediction(logits, "x0", logits, torch.ones(4), SCHEDULES["vp"]())
    assert method.weight(real, logits).tolist() == [1, 1, 1, 1]
    method.config.divergence = "forward_kl"
    clipped = torch.tensor([0.1, 1.0, math.e, 20.0])
    torch.testing.assert_close(method.weight(real, logits), clipped / clipped.mean())
    method.config.divergence = "jensen_shannon"  # of ratios whose mean is 1
    expected = clipped / (clipped + clipped.mean())
    torch.testing.assert_close(method.weight(real, logits), expected / expected.mean())
    for settings, says in (({"gan_weight": 0.0}, "gan_weight"), ({"ratio_low": 30.0}, "ratio_low")):
        with pytest.raises(UserError, match=says):
            Line("f_distill", SCHEDULES["vp"](), **settings)


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


# ------------------------------------------------------------------------------------------------- fixed points


@pytest.mark.parametrize(
    ("name", "settings"),
    [("sim", {}), ("sim", {"distance": "l2"}), ("sid", {}), ("diff_instruct", {}), ("dmd", {}), ("vsd", {})],
)
def test_no_gradient_where_the_fake_score_is_the_teacher(name, settings):
    line = Line(name, SCHEDULES["vp"](), **settings)
    line.nets.modules["fake_score"] = line.nets.teacher
    assert float(line.gradient().abs().max()) == 0


def test_no_gradient_of_f_distill_either_whatever_the_ratio(monkeypatch):
    line = Line("f_distill", SCHEDULES["vp"](), guidance_scale=1.0)
    line.method.config.gan_weight = 0.0  # of the discriminator's own pull
    monkeypatch.setattr(line.method, "log_ratio", lambda real, logits: real.x_t[:, 0])
    assert float(line.gradient().abs().max()) > 0.01
    line.nets.modules["fake_score"] = line.nets.teacher
    assert float(line.gradient().abs().max()) == 0


# ------------------------------------------------------------------------------------- all the way to the data

MEAN, STD = 1.5, 0.3


@pytest.mark.parametrize("schedule", ["vp", "flow"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sim", {}),
        ("sim", {"distance": "l2"}),
        *(("sid", {"alpha": alpha, "normalise": False}) for alpha in (0.5, 1.0, 1.2)),
        ("diff_instruct", {}),
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


def test_the_critic_of_vsd_weighs_eps_by_alpha_squared():
    """The same error of x0 costs the same at equal rho, whatever the schedule."""
    costs = []
    for make in SCHEDULES.values():
        schedule = make()
        method = Line("vsd", schedule).method
        t = schedule.t_of_rho(torch.full((4,), RHO, dtype=torch.float64))
        x0, eps = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        prediction = Prediction(x0 + 0.3, "x0", schedule.add_noise(x0, eps, t), t, schedule)
        costs.append(method.critic_error(prediction, x0, eps, 1.0))
    expected = torch.full((4,), (0.3 / RHO) ** 2 / (1 + RHO**2), dtype=torch.float64)
    for cost in costs:
        close(cost, expected, 1e-4)


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


def test_the_paper_times_and_first_state():
    """sigma z at t = 625 of Stable Diffusion's table; SiD compares at Karras indices up to 0.8 (sigma 24.4)."""
    line = Line("sid", SCHEDULES["vp"]())
    assert line.method.grid(line.schedule, 1) == (625.0,) and line.method.init_noise == "sigma"
    assert Line("sid", SCHEDULES["edm"]()).method.grid(SCHEDULES["edm"](), 1) == pytest.approx((2.5,))
    config = resolve("sid", METHODS, "method").Config()
    assert (config.alpha, config.time_density, config.t_low, config.t_high) == (1.2, "karras", 0.0, 0.8)
    top = (0.002 ** (1 / 7) + 0.8 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    assert top == pytest.approx(24.4, abs=0.05)
