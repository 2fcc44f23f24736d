"""The exact teachers: score, posterior mean and flow map against autograd, quadrature and Runge-Kutta."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from stepdistill.families.toy import (
    SCHEDULES,
    ExactTeacher,
    Mixture,
    Toy,
    gaussian,
    gaussian_flow_map,
)
from stepdistill.noise import SampleNoise
from stepdistill.prediction import Prediction
from stepdistill.schedule import EDM, Flow, times_like

MADE = {name: make() for name, make in SCHEDULES.items()}
EVERY = pytest.mark.parametrize("schedule", MADE.values(), ids=MADE)
MEANS = torch.tensor([[1.0, 0.3], [-1.0, 0.5], [0.2, -0.9], [0.0, 1.1]])
WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1])
CLASSES = torch.tensor([0, 1, 1, 0])
CONDS = pytest.mark.parametrize("cond", [None, 0, 1, 2], ids=["None", "class 0", "class 1", "no class"])


def mixture(schedule) -> Mixture:
    return Mixture(schedule, MEANS, 0.3, WEIGHTS, CLASSES)


def points(schedule, count: int = 40):
    generator = torch.Generator().manual_seed(4)
    x0, eps = torch.randn(2, count, 2, generator=generator, dtype=torch.float64)
    t = schedule.t_of_rho(torch.logspace(-1, 1, count, dtype=torch.float64))
    return schedule.add_noise(x0, eps, t), t


@EVERY
@CONDS
def test_the_score_is_the_gradient_of_log_p(schedule, cond):
    x_t, t = points(schedule)
    cond = None if cond is None else torch.full((len(x_t),), cond)
    x_t.requires_grad_()
    (expected,) = torch.autograd.grad(mixture(schedule).log_prob(x_t, t, cond).sum(), x_t)
    said = Prediction(mixture(schedule)(x_t, t, cond), "x0", x_t, t, schedule)
    torch.testing.assert_close(said.score, expected, rtol=1e-8, atol=1e-8)


@EVERY
@pytest.mark.parametrize("cond", [None, 1])
def test_x0_is_the_posterior_mean_by_quadrature(schedule, cond):
    """1-D: E[x0 | x_t] = int x0 p(x0) N(x_t; alpha x0, sigma^2) / int p(x0) N(...), by a fine trapezoid."""
    means = MEANS[:, :1].double()
    network = Mixture(schedule, means, 0.3, WEIGHTS, CLASSES)
    x_t, t = points(schedule)
    x_t = x_t[:, :1]
    kept = WEIGHTS.double() if cond is None else WEIGHTS.double() * (cond == CLASSES)
    grid = torch.linspace(-5, 5, 20_001, dtype=torch.float64)
    prior = (kept * torch.exp(-((grid[:, None] - means[:, 0]) ** 2) / (2 * 0.3**2))).sum(1)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    log = prior.log() - (x_t - alpha * grid) ** 2 / (2 * sigma**2)
    weight = (log - log.amax(1, keepdim=True)).exp()
    expected = (weight * grid).sum(1) / weight.sum(1)
    told = None if cond is None else torch.full((len(x_t),), cond)
    torch.testing.assert_close(network(x_t, t, told)[:, 0], expected, rtol=1e-8, atol=1e-8)


def test_the_density_integrates_to_one():
    schedule = EDM()
    axis = torch.linspace(-6, 6, 301, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    for cond in (None, 1):
        told = None if cond is None else torch.full((len(x),), cond)
        density = mixture(schedule).log_prob(x, times_like(0.4, x), told).exp()
        assert float(density.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, abs=1e-6)


def test_no_class_means_all_modes():
    schedule = Flow()
    x_t, t = points(schedule)
    network = mixture(schedule)
    assert network.no_class == 2
    everything = network(x_t, t, torch.full((len(x_t),), 2))
    torch.testing.assert_close(everything, network(x_t, t, None), rtol=1e-12, atol=1e-12)
    assert float((network(x_t, t, torch.zeros(len(x_t)).long()) - everything).abs().max()) > 0.1


def test_draws_have_the_mixtures_moments_and_keep_to_their_class():
    network, n = mixture(Flow()), 40_000
    drawn = network.draw(SampleNoise(range(n))).double()
    means, weights = MEANS.double(), WEIGHTS.double()
    mean = weights @ means
    spread = (weights @ means.square() - mean**2 + 0.3**2).sqrt()
    assert bool(((drawn.mean(0) - mean).abs() < 5 * spread / n**0.5).all())
    assert bool(((drawn.std(0) - spread).abs() < 5 * spread / n**0.5).all())
    cond = torch.arange(n) % 2
    told = network.draw(SampleNoise(range(n)), cond).double()
    for label in (0, 1):
        kept = weights * (label == CLASSES)
        expected = kept @ means / kept.sum()
        assert bool(((told[cond == label].mean(0) - expected).abs() < 0.03).all())


@EVERY
def test_gaussian_flow_map_is_the_ode(schedule):
    """Against classical Runge-Kutta on the exact velocity, which knows nothing of the closed form."""
    mean, std = 0.7, 0.4
    network = gaussian(schedule, [mean], std)
    start, end = (float(schedule.t_of_rho(torch.tensor(rho, dtype=torch.float64))) for rho in (1.9, 0.8))
    x = x_t = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]

    def slope(x: torch.Tensor, time: float) -> torch.Tensor:
        t = times_like(time, x)
        return Prediction(network(x, t), "x0", x, t, schedule).velocity

    # A table's velocity jumps at whole times: steps of one entry, slopes asked just inside.
    whole = schedule.t_max > 100
    if whole:
        start, end = math.floor(start), math.ceil(end)
    steps = int(start - end) if whole else 200
    h, inside = (end - start) / steps, 1e-9 if whole else 0.0
    for i in range(steps):
        t = start + i * h
        k1 = slope(x, t - inside)
        k2 = slope(x + h / 2 * k1, t + h / 2)
        k3 = slope(x + h / 2 * k2, t + h / 2)
        k4 = slope(x + h * k3, t + h + inside)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    mapped = gaussian_flow_map(schedule, mean, std, x_t, times_like(start, x_t), times_like(end, x_t))
    torch.testing.assert_close(mapped, x, rtol=1e-6, atol=1e-6)
    assert float((mapped - x_t).abs().max()) > 0.1


@EVERY
def test_gaussian_flow_map_composes_and_carries_the_marginal(schedule):
    mean, std = 0.7, 0.4
    times = [schedule.t_of_rho(torch.tensor(rho, dtype=torch.float64)).expand(3) for rho in (2.0, 0.8, 0.1)]
    t, middle, s = times

    def quantiles(time):
        spread = (schedule.alpha(time) ** 2 * std**2 + schedule.sigma(time) ** 2).sqrt()
        return (schedule.alpha(time) * mean + spread * torch.tensor([-1.0, 0.0, 1.5]))[:, None]

    direct = gaussian_flow_map(schedule, mean, std, quantiles(t), t, s)
    torch.testing.assert_close(direct, quantiles(s), rtol=1e-10, atol=1e-10)
    through = gaussian_flow_map(schedule, mean, std, quantiles(t), t, middle)
    torch.testing.assert_close(
        gaussian_flow_map(schedule, mean, std, through, middle, s), direct, rtol=1e-10, atol=1e-10
    )


# ------------------------------------------------------------------------------------- the family, its clone


def test_sliced_distance_on_known_cases():
    family, generator = Toy(Toy.Config()), torch.Generator().manual_seed(0)

    def distance(a, b):
        return float((family.projected(a) - family.projected(b)).abs().mean())

    a = torch.randn(2000, 2, generator=generator, dtype=torch.float64)
    assert distance(a, a[torch.randperm(2000, generator=generator)]) < 1e-7
    shift = torch.tensor([0.6, 0.8])
    # A shift of length 1 seen along a random direction: E |cos| = 2 / pi.
    assert distance(a, a + shift) == pytest.approx(2 / math.pi, abs=0.03)
    assert distance(a, 3 * a) == pytest.approx(2 * (2 / math.pi) ** 0.5, rel=0.05)


def test_sliced_distance_tells_classes_apart():
    family = Toy(Toy.Config(classes=2))
    points = family.exact(2048, seed=1)
    # The same points, each told as the other class.
    swapped = points.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    assert family.sliced_w1(lambda n: swapped.repeat(4, 1), 2048) > 5


def test_the_metric_is_one_for_exact_samples_and_large_for_wrong_ones():
    family = Toy(Toy.Config())
    assert 0.7 < family.sliced_w1(lambda n: family.exact(n, seed=30), 2048) < 1.4
    assert family.sliced_w1(lambda n: 0.8 * family.exact(n, seed=30), 2048) > 4


def test_toy_data_has_unit_variance_and_follows_the_labels():
    family = Toy(Toy.Config(classes=4))
    data = family.data(range(20_000))
    # The circle gives each coordinate variance 1, the modes their own 0.01.
    assert bool(((data.var(0) - 1.01).abs() < 0.04).all())
    # A sample is its index.
    assert torch.equal(data[:10], family.data(range(10)))
    labels = family.prompts(None, range(64))
    examples = family.examples(None, range(64))
    nearest = (examples[:, None].double() - family.mixture.means).norm(dim=2).argmin(1)
    assert (nearest % 4).tolist() == labels
    assert family.uncond(3).tolist() == [4, 4, 4] and family.class_names == ("0", "1", "2", "3")


def test_the_clone_is_a_fit_of_the_exact_teacher():
    def errors(fit_steps: int) -> list[float]:
        found = []
        family = Toy(Toy.Config(modes=3, classes=3, fit_steps=fit_steps, schedule="edm"))
        teacher, clone = family.teacher, family.teacher.clone()
        x0, eps = family.data(range(500), seed=9), SampleNoise(range(500), phase="test").randn(2)
        # "no class" is among them.
        told = torch.arange(500) % 4
        for sigma in (5.0, 0.5):
            t = times_like(sigma, x0)
            x_t = clone.schedule.add_noise(x0, eps, t)
            with torch.no_grad():
                found.append(float((clone(x_t, t, told).x0 - teacher(x_t, t, told).x0).square().mean()))
        return found

    for before, after in zip(errors(0), errors(120), strict=True):
        assert after < before / 5
    family = Toy(Toy.Config(fit_steps=0))
    teacher, clone, other = family.teacher, family.teacher.clone(), family.teacher.clone()
    assert all(torch.equal(a, b) for a, b in zip(clone.parameters(), other.parameters(), strict=True))
    assert clone.network is not other.network and not list(teacher.parameters())


def test_a_fresh_mlp_is_exact_without_noise_and_a_guidance_input_changes_nothing_at_first():
    schedule = Flow()
    student = ExactTeacher(gaussian(schedule, [0.0, 0.0], 1.0), fit_steps=0, width=16).clone()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(student(x, times_like(0.0, x)).x0, x)
    t = times_like(0.4, x)
    before = student(x, t).x0
    student.network.add_guidance()
    told = student(x, t, guidance=torch.full((5,), 4.0, dtype=torch.float64)).x0
    assert torch.equal(before, told)
    torch.nn.init.ones_(student.network.guidance.weight)
    assert not torch.equal(before, student(x, t, guidance=torch.full((5,), 4.0, dtype=torch.float64)).x0)


def test_the_picture_shows_the_points():
    family = Toy(Toy.Config())
    empty, one = family.picture(torch.zeros(0, 2)), family.picture(torch.tensor([[2.0, 2.0]]))
    assert empty.shape == (192, 192, 3) and int(empty.min()) == 255
    rows, columns = (one[..., 0] < 255).nonzero()
    # Up and to the right.
    assert rows.tolist() == [8] and columns.tolist() == [183]


@pytest.mark.parametrize("name", ["Mixture", "Toy"])
def test_everything_stays_on_the_device_of_the_state(name):
    """On "meta" an operation that mixes devices raises, as it would on a GPU."""
    family = Toy(Toy.Config(classes=2, fit_steps=0))
    x, t = torch.zeros(4, 2, device="meta"), torch.zeros(4, dtype=torch.float64, device="meta")
    cond = torch.zeros(4, dtype=torch.long, device="meta")
    if name == "Mixture":
        assert family.mixture(x, t, cond).device.type == "meta"
        assert family.mixture.log_prob(x, t).device.type == "meta"
    else:
        student = family.student("teacher", ("guidance",)).to("meta")
        guidance = torch.ones(4, dtype=torch.float64)
        assert student.network(x, t, cond, guidance=guidance).device.type == "meta"
        assert student.network(x, t).device.type == "meta"


def test_modes_covered_counts_what_is_reached():
    family = Toy(Toy.Config(modes=8, fit_steps=0, uneven=0.0))
    assert family.modes_covered(lambda n: family.data(range(n), seed=5)) == 8
    three = family.mixture.means[:3].float()
    assert family.modes_covered(lambda n: three[torch.arange(n) % 3]) == 3
    # The centre is no mode.
    assert family.modes_covered(lambda n: torch.zeros(n, 2)) == 0
    thin = family.mixture.means[torch.cat((torch.zeros(4000), torch.ones(96))).long()].float()
    # 96 of 4,096 is less than a quarter of an eighth.
    assert family.modes_covered(lambda n: thin) == 1


def test_the_data_are_off_centre_uneven_and_of_unit_variance():
    for classes in (1, 2):
        mixture = Toy(Toy.Config(classes=classes, fit_steps=0)).mixture
        mean = mixture.weights @ mixture.means
        assert mean.tolist() == pytest.approx([0.4, -0.3])
        assert float((mixture.weights @ (mixture.means - mean).square()).mean()) == pytest.approx(1)
        shares = mixture.weights.new_zeros(classes).index_add(0, mixture.classes, mixture.weights)
        assert shares.tolist() == pytest.approx([1 / classes] * classes)
        assert float(mixture.weights.max() / mixture.weights.min()) == pytest.approx(
            3, rel=0.3 * (classes - 1) + 1e-9
        )


@pytest.mark.parametrize(("schedule", "most", "least"), [("vp", 9.0, 2.0), ("flow", 1.5, 0.0)])
def test_a_mean_shows_what_starting_from_unit_noise_leaves_out(schedule, most, least):
    """A table's last entry keeps a fifteenth of the data: the exact teacher's own ODE from z misses its share of the mean."""
    family = Toy(Toy.Config(fit_steps=0, schedule=schedule, mean=(2.0, -1.5)))

    def draw(count: int) -> torch.Tensor:
        grid = (*family.schedule.teacher_grid(60), family.schedule.t_min)
        x = family.schedule.first_state(SampleNoise(range(count), phase="draw").randn(2), grid[0])
        for t, s in itertools.pairwise(grid):
            said = family.teacher(x, times_like(t, x))
            x = said.at(times_like(s, x))
        return x

    assert least <= family.sliced_w1(draw, 1024, draws=1) < most


def test_shares_and_covariances_tell_what_a_distance_does_not():
    family = Toy(Toy.Config(fit_steps=0))
    exact = family.exact(4096, seed=40)
    _, nearest, near = family.nearest(exact)
    place = family.mixture.means[nearest].float()
    assert float(near.double().mean()) > 0.998
    assert family.shares_off(lambda n: exact) < 0.04
    assert family.trace_off(lambda n: exact) < 0.08 and family.shape_off(lambda n: exact) < 0.15
    # Half the variance, and where it lies along one axis alone.
    narrow = place + 0.5**0.5 * (exact - place)
    assert family.trace_off(lambda n: narrow) == pytest.approx(0.5, abs=0.05)
    flat = place + (exact - place) * torch.tensor([2**0.5, 0.0])
    assert family.trace_off(lambda n: flat) < 0.1 < 0.9 < family.shape_off(lambda n: flat)
    # An even spread over the modes: half of sum |1/8 - w_k|.
    even = family.mixture.means[torch.arange(4096) % 8]
    expected = float((family.mixture.weights - 1 / 8).abs().sum() / 2)
    assert family.shares_off(lambda n: even) == pytest.approx(expected, abs=1e-9)
    assert family.trace_off(lambda n: even) == pytest.approx(1.0)
    # Too few points for a covariance.
    assert family.shape_off(lambda n: even[:1]) == pytest.approx(1.0)
