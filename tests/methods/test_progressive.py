"""Progressive distillation (arXiv 2202.00512): two steps in one, the weights, the predecessor, the grids."""

from __future__ import annotations

import pytest
import torch
import worlds
from gaussians import EVERY_SCHEDULE, MEAN, batch_of, exact
from stock import exported
from torch import nn
from worlds import world

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.methods.base import Networks
from stepdistill.prediction import Prediction
from stepdistill.sampling import Sampling
from stepdistill.schedule import Flow, times_like
from stepdistill.solvers import chord


@EVERY_SCHEDULE
def test_one_step_to_the_target_ends_where_two_steps_did(schedule):
    """The target is inverted DDIM: from x_t with its x0, one step lands on the predecessor's x_t''."""
    grid = torch.tensor(schedule.teacher_grid(8), dtype=torch.float64)
    for i in range(3):
        t, middle, end = (times_like(float(grid[2 * i + k]), torch.empty(32)) for k in range(3))
        x_t = schedule.add_noise(torch.full((32, 1), MEAN, dtype=torch.float64), batch_of(32).randn(), t)
        two = Sampling(rule="ode").walk(
            exact(schedule), x_t, (float(t[0]), float(middle[0]), float(end[0])), None
        )
        target = chord(schedule, x_t, two, t, end)
        torch.testing.assert_close(
            Prediction(target, "x0", x_t, t, schedule).at(end), two, rtol=1e-7, atol=1e-7
        )


@EVERY_SCHEDULE
@pytest.mark.parametrize("count", [1, 4])
def test_the_loss_is_zero_for_the_student_that_does_two_steps_in_one(schedule, count):
    method, predecessor = worlds.method("progressive", steps=(count,)), exact(schedule)
    grid = schedule.teacher_grid(2 * count)

    class Both(nn.Module):
        """The predecessor's sampler from any point of the coarse grid to the next, read as an x0."""

        def forward(self, x_t, t, cond=None):
            out = torch.empty_like(x_t)
            for row, (x, time) in enumerate(zip(x_t, t.tolist(), strict=True)):
                i = min(range(0, 2 * count, 2), key=lambda k: abs(grid[k] - time))
                x = Sampling(rule="ode").walk(predecessor, x[None], grid[i : i + 3][:3], None)
                # The last step goes to x0.
                if i + 2 >= 2 * count:
                    out[row] = predecessor(x, times_like(grid[i + 1], x)).x0[0]
                    continue
                end, start = (times_like(grid[k], x) for k in (i + 2, i))
                ratio = schedule.sigma(end) / schedule.sigma(start)
                out[row] = (x[0] - ratio * x_t[row]) / (schedule.alpha(end) - ratio * schedule.alpha(start))
            return out

    nets = Networks({"student": Denoiser(Both(), "x0", schedule), "predecessor": predecessor}, schedule)
    losses = method.loss(nets, batch_of(32))
    assert float(losses["error"].max()) < 1e-12
    # Which does one step, not two.
    nets.modules["student"] = predecessor
    assert float(method.loss(nets, batch_of(32))["error"].max()) > 1e-5


def test_the_weights_are_truncated_snr_and_the_error_of_v():
    schedule = Flow()
    teacher, off = exact(schedule), exact(schedule)
    losses = {}
    for weight in ("truncated_snr", "snr_plus_one"):
        method = worlds.method("progressive", steps=(4,), weight=weight)
        losses[weight] = method.loss(
            Networks({"student": off, "predecessor": teacher}, schedule), batch_of(32)
        )
    t = torch.tensor(schedule.teacher_grid(4), dtype=torch.float64)[batch_of(32).generator.randint(0, 4)]
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
    for a, b in zip(made.nets.predecessor.parameters(), made.before.parameters(), strict=True):
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
        fine, coarse = method.sampling.grid(schedule, 2 * count), method.sampling.grid(schedule, count)
        assert fine[::2] == pytest.approx(coarse, rel=1e-9)


def test_a_student_is_sampled_at_the_times_on_its_card(tiny_pixel, tmp_path):
    """Under EDM the halved grids are not the stock scheduler's strides; the card's times hold."""
    from stepdistill import load
    from stepdistill.families.pixel import Pixel

    family, method = Pixel(Pixel.Config(teacher=str(tiny_pixel))), worlds.method("progressive", steps=(4,))
    exported(family, method, tmp_path / "student", {"teacher": str(tiny_pixel)})
    times = load(tmp_path / "student").times(4)
    assert times == pytest.approx(family.schedule.teacher_grid(4), rel=1e-12)
