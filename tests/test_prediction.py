"""The conversion algebra: every kind to every other and back, velocities, precision, error equivalences."""

from __future__ import annotations

import pytest
import torch

from stepdistill.prediction import KINDS, Prediction
from stepdistill.schedule import EDM, VP, Flow, TrigFlow, expand

SCHEDULES = {
    "vp": VP.from_betas(),
    "edm": EDM(),
    "flow": Flow(),
    "trig": TrigFlow(),
    "trig half": TrigFlow(0.5),
}
EVERY = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def kinds(schedule) -> tuple[str, ...]:
    return KINDS if isinstance(schedule, TrigFlow) else tuple(kind for kind in KINDS if kind != "F")


def state(schedule, count: int = 64, dtype=torch.float64):
    """x0, eps, t and x_t, with t strictly inside the schedule."""
    generator = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, count, 3, generator=generator, dtype=torch.float64).to(dtype)
    u = torch.linspace(0.02, 0.98, count, dtype=torch.float64)
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * u
    return x0, eps, t, schedule.add_noise(x0, eps, t)


def truth(schedule, x0, eps, t) -> dict[str, torch.Tensor]:
    """Every quantity by its definition."""
    alpha, sigma = expand(schedule.alpha(t), x0), expand(schedule.sigma(t), x0)
    values = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0, "score": -eps / sigma}
    if isinstance(schedule, TrigFlow):
        tau, data = t[:, None], schedule.sigma_data
        # Lu & Song: sigma_data F = cos(t) z - sin(t) x0, where z has standard deviation sigma_data.
        values["F"] = (tau.cos() * data * eps - tau.sin() * x0) / data
    return values


@EVERY
def test_every_kind_is_read_as_every_other(schedule):
    x0, eps, t, x_t = state(schedule)
    expected = truth(schedule, x0, eps, t)
    for kind in kinds(schedule):
        said = Prediction(expected[kind], kind, x_t, t, schedule)
        for other in kinds(schedule):
            torch.testing.assert_close(
                getattr(said, other), expected[other], rtol=1e-9, atol=1e-9, msg=f"{kind} -> {other}"
            )


@EVERY
def test_the_whole_chain_comes_back(schedule):
    """x0 -> eps -> v -> flow (-> F) -> score -> x0 from an arbitrary output, not only from true pairs."""
    _, raw, t, x_t = state(schedule)
    said = Prediction(raw, "x0", x_t, t, schedule)
    for kind in (*kinds(schedule)[1:], "x0"):
        said = Prediction(getattr(said, kind), kind, x_t, t, schedule)
    torch.testing.assert_close(said.raw, raw, rtol=1e-8, atol=1e-8)


@EVERY
def test_velocity_equals_the_finite_difference_of_the_path(schedule):
    x0, eps, t, x_t = state(schedule)
    t = t.floor() + 0.3 if isinstance(schedule, VP) else t
    x_t, h = schedule.add_noise(x0, eps, t), 1e-5
    numeric = (schedule.add_noise(x0, eps, t + h) - schedule.add_noise(x0, eps, t - h)) / (2 * h)
    for kind, value in truth(schedule, x0, eps, t).items():
        torch.testing.assert_close(
            Prediction(value, kind, x_t, t, schedule).velocity, numeric, rtol=1e-5, atol=1e-7
        )


@EVERY
def test_at_moves_along_the_straight_line(schedule):
    x0, eps, t, x_t = state(schedule)
    s = t.flip(0)
    for kind, value in truth(schedule, x0, eps, t).items():
        said = Prediction(value, kind, x_t, t, schedule)
        torch.testing.assert_close(said.at(s), schedule.add_noise(x0, eps, s), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(said.at(t), x_t, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["eps", "v", "flow", "F", "score"])
def test_noise_keeps_its_digits_at_small_sigma_in_float32(kind):
    schedule = TrigFlow()
    x0, eps = state(schedule)[:2]
    t = torch.full((len(x0),), 1e-5, dtype=torch.float64)
    x_t = schedule.add_noise(x0, eps, t)
    value = truth(schedule, x0, eps, t)[kind]
    said = Prediction(value.float(), kind, x_t.float(), t, schedule)
    assert said.eps.dtype == torch.float32
    torch.testing.assert_close(said.eps.double(), eps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(said.score.double() * 1e-5, -eps, rtol=1e-5, atol=1e-5)
    # The way through x0 has no digits left there; without this the assertion above would say nothing.
    through_x0 = (said.x_t - said._alpha * said.x0) / said._sigma
    assert float((through_x0.double() - eps).abs().max()) > 1e-3


@EVERY
def test_error_equivalences(schedule):
    """An error of x0 seen in the other kinds: |d eps|^2 = |d x0|^2 / rho^2 and its relatives."""
    x0, eps, t, x_t = state(schedule)
    wrong = x0 + 0.1 * eps
    true, said = truth(schedule, x0, eps, t), Prediction(wrong, "x0", x_t, t, schedule)
    base = (wrong - x0).square().sum(1)
    alpha, sigma, rho = schedule.alpha(t), schedule.sigma(t), schedule.rho(t)

    def ratio(kind: str) -> torch.Tensor:
        return (getattr(said, kind) - true[kind]).square().sum(1) / base

    torch.testing.assert_close(ratio("eps"), rho**-2, rtol=1e-7, atol=0)
    torch.testing.assert_close(ratio("v"), ((alpha**2 + sigma**2) / sigma) ** 2, rtol=1e-7, atol=0)
    torch.testing.assert_close(ratio("flow"), ((alpha + sigma) / sigma) ** 2, rtol=1e-7, atol=0)
    if isinstance(schedule, Flow):
        torch.testing.assert_close(ratio("flow"), t**-2, rtol=1e-7, atol=0)
    if isinstance(schedule, TrigFlow):
        torch.testing.assert_close(ratio("F") * schedule.sigma_data**2, t.sin() ** -2, rtol=1e-7, atol=0)


def test_pure_noise_under_flow_is_exact():
    """t = 1, where alpha is held at 1e-4: what was mixed by it is unmixed by it."""
    schedule = Flow()
    x0, eps, *_ = state(schedule)
    t = torch.ones(len(x0), dtype=torch.float64)
    said = Prediction(eps - x0, "flow", schedule.add_noise(x0, eps, t), t, schedule)
    torch.testing.assert_close(said.x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(said.eps, eps, rtol=1e-9, atol=1e-9)


def test_unknown_kinds_are_refused():
    x0, _, t, x_t = state(Flow())
    with pytest.raises(ValueError, match="prediction kind"):
        _ = Prediction(x0, "velocity", x_t, t, Flow()).x0
    for wrong in ("F", "x0"):
        with pytest.raises(ValueError, match="TrigFlow"):
            said = Prediction(x0, wrong, x_t, t, Flow())
            _ = said.F if wrong == "x0" else said.x0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "F"])
@pytest.mark.parametrize("name", ["x0", "eps", "flow"])
def test_what_was_read_without_gradient_has_it_for_the_next_reader(kind, name):
    x0, eps, t, x_t = state(VP.from_betas())
    said = Prediction((x0 + eps).requires_grad_(), kind, x_t, t, VP.from_betas())
    with torch.no_grad():
        before = said.x0, said.eps
    assert not any(value.requires_grad for value in before if value is not said.raw)
    (gradient,) = torch.autograd.grad(getattr(said, name).sum(), said.raw)
    fresh = Prediction(said.raw, kind, x_t, t, VP.from_betas())
    (whole,) = torch.autograd.grad(getattr(fresh, name).sum(), said.raw)
    assert torch.equal(gradient, whole)
    # It is computed once.
    assert said.x0 is said.x0 and said.eps is said.eps
