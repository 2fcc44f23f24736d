"""Grids against the stock schedulers' own lists; the moments of the training densities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import worlds

from stepdistill import timesteps
from stepdistill.errors import UserError
from stepdistill.noise import SampleNoise
from stepdistill.schedule import EDM, VP, Flow, TrigFlow, times_like

VP_TABLE = VP.from_betas()
SCHEDULES = {"vp": VP_TABLE, "edm": EDM(), "flow": Flow(), "trig": TrigFlow()}


@pytest.mark.parametrize("finest", [1, 2, 3, 4, 6, 8, 25, 50])
def test_the_vp_grid_is_what_lcm_scheduler_lists(finest):
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(original_inference_steps=finest)
    for steps in range(1, finest + 1):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == list(VP_TABLE.few_step_grid(steps, finest)), steps


def test_known_grids():
    assert VP_TABLE.few_step_grid(4) == (999, 749, 499, 249)
    assert VP_TABLE.few_step_grid(1) == (999,)
    assert VP_TABLE.few_step_grid(2, 4) == (999, 499)
    assert Flow().few_step_grid(4) == (1.0, 0.75, 0.5, 0.25)
    assert Flow().few_step_grid(2, 4) == (1.0, 0.5)
    assert TrigFlow().few_step_grid(2) == pytest.approx((math.pi / 2, math.pi / 4))


def test_more_steps_than_a_table_has_are_refused():
    with pytest.raises(UserError, match="2000 steps are more than the 1000 timesteps of the schedule"):
        VP_TABLE.few_step_grid(2000)
    with pytest.raises(UserError, match="700 steps are more than the 626 timesteps"):
        VP_TABLE.few_step_grid(700, first_rho=2.5)


def test_a_fraction_of_the_karras_range_is_the_same_noise_under_schedules_that_reach_as_far():
    drawn = [s.rho(timesteps.karras(s, noise(), 0.0, 0.8)) for s in (EDM(), Flow(), TrigFlow())]
    # Flow and TrigFlow go on to where there is no signal at all.
    for rho in drawn:
        torch.testing.assert_close(rho, drawn[0], rtol=1e-6, atol=0)
    assert float(drawn[0].max()) < 24.5


def test_the_edm_grid_is_what_the_consistency_scheduler_lists():
    from diffusers import CMStochasticIterativeScheduler

    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40)
    for steps in range(1, 41):
        scheduler.set_timesteps(steps)
        ours = np.array(EDM().few_step_grid(steps))
        np.testing.assert_allclose(ours, scheduler.sigmas[:steps].numpy(), rtol=1e-5, err_msg=str(steps))


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 16, 30, 50, 128, 1000])
def test_the_teachers_grid_is_trailing_ddim(steps):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == list(VP_TABLE.teacher_grid(steps))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_grids_fall_from_the_noisy_end(schedule):
    for grid in (schedule.few_step_grid(4), schedule.few_step_grid(4, 20), schedule.teacher_grid(30)):
        assert grid[0] == pytest.approx(schedule.t_max)
        assert all(a > b for a, b in zip(grid, (*grid[1:], schedule.t_min), strict=True))


def test_grids_refuse_what_they_cannot_serve():
    for steps, finest in ((0, None), (5, 4), (-1, 4)):
        with pytest.raises(ValueError, match="steps must be between 1 and"):
            VP_TABLE.few_step_grid(steps, finest)
    with pytest.raises(ValueError, match="steps must be between 1 and 1000"):
        VP_TABLE.teacher_grid(1001)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_ode_grids_reach_both_ends(schedule):
    grid = schedule.ode_grid(10)
    assert len(grid) == 11 and float(grid[0]) == schedule.t_max and float(grid[-1]) == schedule.t_min
    curved = schedule.ode_grid(10, "karras")
    assert bool((curved[1:] < curved[:-1]).all())
    assert float(curved[0]) == schedule.t_max and float(curved[-1]) == schedule.t_min


def test_karras_spacing_is_the_published_formula():
    low, high, n = 0.002 ** (1 / 7), 80 ** (1 / 7), 18
    expected = [(high + i / (n - 1) * (low - high)) ** 7 for i in range(n)]
    np.testing.assert_allclose(EDM().ode_grid(n - 1, "karras").numpy(), expected, rtol=1e-9)


def test_times_like():
    x = torch.zeros(3, 2)
    assert times_like(4.0, x).tolist() == [4.0] * 3 and times_like(4.0, x).dtype == torch.float64
    assert times_like([1.0, 2.0, 3.0], x).tolist() == [1.0, 2.0, 3.0]


# ------------------------------------------------------------------------------------------------- densities

N = 40_000


def noise(step: int = 0) -> SampleNoise:
    return SampleNoise(range(N), step=step, phase="density")


def close(values: torch.Tensor, mean: float, std: float) -> None:
    """Mean and standard deviation within five standard errors (kurtosis at most that of a normal)."""
    assert abs(float(values.mean()) - mean) < 5 * std / N**0.5
    assert abs(float(values.std()) - std) < 5 * std / (2 * N) ** 0.5


@pytest.mark.parametrize("name", ["flow", "trig"])
def test_uniform_moments(name):
    schedule = SCHEDULES[name]
    span = schedule.t_max - schedule.t_min
    t = timesteps.uniform(schedule, noise(), 0.02, 0.98)
    assert t.dtype == torch.float64
    close((t - schedule.t_min) / span, 0.5, 0.96 / 12**0.5)
    assert float(t.min()) >= schedule.t_min + 0.02 * span and float(t.max()) <= schedule.t_min + 0.98 * span


def test_uniform_under_a_table_is_whole_and_reaches_both_ends():
    t = timesteps.uniform(VP_TABLE, noise())
    assert torch.equal(t, t.round()) and float(t.min()) == 0 and float(t.max()) == 999
    close(t, 499.5, ((1000**2 - 1) / 12) ** 0.5)
    inner = timesteps.uniform(VP_TABLE, noise(), 0.02, 0.98)
    # DMD2's 0.02 T .. 0.98 T.
    assert float(inner.min()) == 20 and float(inner.max()) == 979
    assert len(inner.unique()) == 960
    assert torch.equal(
        timesteps.uniform(VP_TABLE, noise(), 0.5, 0.5), torch.full((N,), 500.0, dtype=torch.float64)
    )


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_karras_is_uniform_in_the_seventh_root_of_rho(schedule):
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    # EDM's.
    low, high = (schedule.rho(ends).clamp(0.002, 80.0) ** (1 / 7)).tolist()
    u = (schedule.rho(timesteps.karras(schedule, noise())) ** (1 / 7) - low) / (high - low)
    close(u, 0.5, 1 / 12**0.5)
    part = (schedule.rho(timesteps.karras(schedule, noise(1), 0.25, 0.5)) ** (1 / 7) - low) / (high - low)
    close(part, 0.375, 0.25 / 12**0.5)


def test_uniform_under_edm_is_in_karras_index():
    """Uniform in sigma the median would be 40, and one draw in eighty below 1."""
    drawn = timesteps.uniform(EDM(), noise(), 0.02, 0.98)
    assert torch.equal(drawn, timesteps.karras(EDM(), noise(), 0.02, 0.98))
    # ((80^(1/7) + 0.002^(1/7)) / 2)^7.
    assert float(drawn.median()) == pytest.approx(2.515, rel=0.1)
    assert 0.35 < float((drawn < 1).double().mean()) < 0.45


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("unit", [1.0, 0.5])
def test_lognormal_is_normal_in_log_rho_over_the_datas_deviation(schedule, unit):
    # Narrow enough to stay inside every schedule's range.
    mean, std = 0.2, 0.4
    drawn = timesteps.lognormal(schedule, noise(), mean, std, unit)
    close((schedule.rho(drawn) / unit).log(), mean, std)
    assert torch.equal(drawn, timesteps.draw("lognormal", schedule, noise(), mean=mean, std=std, unit=unit))


def test_densities_of_the_papers_come_back_on_their_own_data():
    """EDM's, sCM's and ECT's, stated there for images of deviation 0.5, and SANA-Sprint's on latents of deviation 1."""
    log2 = math.log(2)
    assert pytest.approx(-1.2 + log2, abs=1e-3) == timesteps.EDM_MEAN
    for name, field, papers in (
        ("sim", "time_mean", -1.2),
        ("diff_instruct", "time_mean", -1.2),
        ("pretrain", "time_mean", -1.2),
        ("scm", "time_mean", -1.0),
        ("ect", "time_mean", -1.1),
        ("ladd", "student_mean", 0.2),
    ):
        assert getattr(worlds.method(name).config, field) == pytest.approx(papers + log2, abs=1e-3), name


@pytest.mark.parametrize("name", ["diff_instruct", "scm", "ect", "meanflow", "tsm", "pretrain", "ladd"])
def test_methods_draw_their_noise_in_units_of_the_data(name, monkeypatch):
    """A network preconditioned for data half as wide is met at half the noise."""
    settings = {"time_density": "lognormal"} if name in ("tsm", "pretrain") else {}
    made, units = worlds.world(name, **settings), []
    made.nets.student.network.sigma_data = 0.5
    plain = timesteps.lognormal

    def heard(schedule, noise, mean, std, unit):
        units.append(unit)
        return plain(schedule, noise, mean, std, unit)

    monkeypatch.setattr(timesteps, "lognormal", heard)
    for phase in made.method.phases(0):
        made.backward(phase)
    assert units and set(units) == {0.5}


def test_shifted_times_are_uniform_before_a_samplers_shift():
    """Of the same draw u in [low, high]: S u / (1 + (S - 1) u), as flow schedulers bend their grids."""
    even = timesteps.uniform(Flow(), noise(), 0.02, 0.98)
    bent = timesteps.draw("shifted", Flow(shift=5.0), noise(), 0.02, 0.98)
    torch.testing.assert_close(bent, 5 * even / (1 + 4 * even))
    # The one of a grid of as many steps, where it depends on them.
    assert torch.equal(timesteps.shifted(Flow(shift=lambda steps: steps / 10), noise(), 0.02, 0.98), bent)
    for schedule in SCHEDULES.values():
        assert torch.equal(timesteps.shifted(schedule, noise()), timesteps.uniform(schedule, noise()))


def test_draw_picks_by_name_and_passes_what_belongs():
    schedule = Flow()
    assert torch.equal(
        timesteps.draw("uniform", schedule, noise(), 0.1, 0.3), timesteps.uniform(schedule, noise(), 0.1, 0.3)
    )
    assert torch.equal(
        timesteps.draw("karras", schedule, noise(), 0.1, 0.3), timesteps.karras(schedule, noise(), 0.1, 0.3)
    )
    drawn = timesteps.draw("lognormal", schedule, noise(), 0.1, 0.3, -0.7, 1.1)
    assert torch.equal(drawn, timesteps.lognormal(schedule, noise(), -0.7, 1.1))
