"""Backward simulation: the states a student is trained on are those it is sampled through."""

from __future__ import annotations

import pytest
import torch
import worlds
from worlds import world

from stepdistill.families.toy import gaussian_flow_map
from stepdistill.methods.base import Batch, Networks
from stepdistill.noise import SampleNoise
from stepdistill.prediction import Prediction
from stepdistill.rollout import simulate
from stepdistill.schedule import EDM, VP, Flow, TrigFlow, times_like


@pytest.mark.parametrize(
    "schedule", [VP.from_betas(), EDM(), Flow(), TrigFlow()], ids=["vp", "edm", "flow", "trig"]
)
def test_backward_simulation_with_an_oracle_student_lands_on_the_marginal(schedule):
    """x at t_K ~ N(alpha mu, alpha^2 s^2 + sigma^2) for every K, and every K of every step count is met."""
    mean, std, n = 0.3, 0.4, 20_000
    method = worlds.method("dmd2", steps=(1, 2, 4))

    def oracle(x_t, t, cond=None):
        end = torch.full_like(t, schedule.t_min)
        return Prediction(gaussian_flow_map(schedule, mean, std, x_t, t, end), "x0", x_t, t, schedule)

    nets, met = Networks({"student": oracle}, schedule), {}
    for step in range(40):
        noise = SampleNoise(range(n if step < 25 else 2), step=step, phase="student")
        batch = Batch(None, None, (1,), noise.index, noise)
        x_t, t, time = simulate(method.sampling, nets, batch)
        assert bool((t == time).all()) and not x_t.requires_grad
        met[time] = met.get(time, 0) + 1
        if step >= 25:
            continue
        alpha, sigma = float(schedule.alpha(t[:1])), float(schedule.sigma(t[:1]))
        spread = (alpha**2 * std**2 + sigma**2) ** 0.5
        # EDM's and VP's first states have mean 0 where the marginals have alpha 0.3: a shift of x0 by 0.002 and 0.008.
        bias = alpha * mean if time == schedule.t_max else 0.008 if isinstance(schedule, VP) else 0.002
        assert abs(float(x_t.double().mean()) - alpha * mean) < 5 * spread / n**0.5 + bias
        assert abs(float(x_t.double().std()) - spread) < 5 * spread / (2 * n) ** 0.5
    assert set(met) == {time for count in (1, 2, 4) for time in schedule.few_step_grid(count, 4)}
    # Pure noise: K = 0 of all three counts.
    assert met[schedule.t_max] > 10


@pytest.mark.parametrize(
    # Of 84: seven states, three counts, these as 4 : 2 : 1, or four states.
    ("by", "shares"),
    [
        ("states", {1.0: 36, 0.75: 12, 0.5: 24, 0.25: 12}),
        ("counts", {1.0: 49, 0.75: 7, 0.5: 21, 0.25: 7}),
        ("passes", {1.0: 63, 0.75: 3, 0.5: 15, 0.25: 3}),
        ("longest", {1.0: 21, 0.75: 21, 0.5: 21, 0.25: 21}),
    ],
)
def test_backward_simulation_meets_every_state_or_every_count_alike(by, shares):
    method, schedule, heard = worlds.method("dmd2", steps=(1, 2, 4), simulated=by), Flow(), []

    def student(x_t, t, cond=None):
        heard.append(float(t[0]))
        return Prediction(x_t, "x0", x_t, t, schedule)

    met: dict[float, int] = {}
    for step in range(840):
        noise = SampleNoise(range(1), step=step)
        batch = Batch(None, None, (1,), noise.index, noise)
        # The states are drawn by the generator.
        batch.randn = lambda: torch.zeros(1, 1)
        method.generate(Networks({"student": student}, schedule), batch)
        met[heard[-1]] = met.get(heard[-1], 0) + 1
    assert set(met) == set(shares)
    assert all(abs(met[time] - 10 * share) < 4 * (10 * share) ** 0.5 for time, share in shares.items())


def test_backward_simulation_uses_the_students_own_rule_and_pure_noise_first():
    made = world("dmd2", steps=(2,))
    heard = []
    made.nets.modules["student"] = lambda x_t, t, cond: (
        heard.append((x_t, t)) or Prediction(torch.full_like(x_t, 0.5), "x0", x_t, t, made.nets.schedule)
    )
    for step in range(8):
        heard.clear()
        batch, twin = made.batch(step), made.batch(step)
        x_t, _, time = simulate(made.method.sampling, made.nets, batch)
        twin.generator.shared_randint(0, 2)
        first, fresh = twin.randn(), twin.randn()
        if time == 999:
            # Not noised with alpha_999 = 0.07.
            assert torch.equal(x_t, first) and not heard
        else:
            assert time == 499 and torch.equal(heard[0][0], first)
            half = torch.full_like(first, 0.5)
            torch.testing.assert_close(
                x_t, made.nets.schedule.add_noise(half, fresh, times_like(499.0, first))
            )


EYES = {"ladd": {"warmup": 0}, "add": {"eye": "fourier"}, "reward": worlds.SETTINGS["reward"]}


@pytest.mark.parametrize(("name", "settings"), EYES.items(), ids=EYES)
def test_a_stage_can_go_on_with_a_student_of_sigma_noise(name, settings):
    """As SiD and SIM leave it: the first input, and so the exported card, is theirs."""
    settings = settings | {"first_rho": 2.5, "init_noise": "sigma"}
    made, heard = world(name, steps=(1,), **settings), []
    made.nets.modules["student"] = lambda x_t, t, cond: (
        heard.append((x_t, t)) or Prediction(x_t, "x0", x_t, t, made.nets.schedule)
    )
    if name == "reward":
        x_t, t, _ = simulate(made.method.sampling, made.nets, made.batch())
    else:
        made.method.generate(made.nets, made.batch(), *([False] if name == "ladd" else []))
        ((x_t, t),) = heard
    sigma = float(made.nets.schedule.sigma(t)[0])
    assert sigma < 0.95 and float(x_t.std()) == pytest.approx(sigma, rel=0.25)


def test_the_way_to_a_state_carries_no_gradient_and_is_the_students_own():
    made, heard = world("dmd2", steps=(3,)), []
    made.nets.student.register_forward_pre_hook(lambda _, told: heard.append(told[2]))
    for step in range(6):
        batch = made.batch(step)
        x_t, _, _ = simulate(made.method.sampling, made.nets, batch)
        assert not x_t.requires_grad and x_t.grad_fn is None
    assert heard and all(torch.equal(cond, batch.cond) for cond in heard)


def test_states_before_the_first_and_before_the_late_ones_are_left_out():
    made = world("dmd2", steps=(4,))
    grid = made.method.sampling.grid(made.nets.schedule, 4)
    for settings, left in (
        ({"first": 2}, 2),
        ({"late": 0.5}, 2),
        ({"first": 1, "late": 0.8}, 3),
        ({"first": 3, "late": 0.3}, 3),
    ):
        met = {
            simulate(made.method.sampling, made.nets, made.batch(step), **settings)[2] for step in range(30)
        }
        assert met == set(grid[left:])
