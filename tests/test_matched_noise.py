"""The schedule is a way of speaking: at equal noise-to-signal ratios every method says the same under all of them.

One set of networks, spoken to in each schedule's terms, and one set of draws: the same loss, the same gradient.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from levels import COUNT, FOURIER, HERE, LOGNORMAL, batch, prepared
from torch import Tensor
from worlds import Doubles

from stepdistill.families.toy import SCHEDULES
from stepdistill.schedule import EDM, Schedule

CASES: dict[str, dict[str, Any]] = {
    "cd": {},
    "ect": {"double_every": 1},
    "ect teacher_step": {"double_every": 1, "teacher_step": True},
    "scm": {"warmup": 1},
    "meanflow": {},
    "pretrain": LOGNORMAL,
    "tsm": LOGNORMAL,
    "kd": {},
    "progressive": {},
    "tscd": {"ddim_steps": 4, "segments": 2, "guidance_scale": 1.0},
    "boot": {},
    "reward": HERE | {"anchor_weight": 0.5},
    "add": FOURIER | {"gan": "non_saturating"},
    "ladd": {"student_times": "density", "first_weight": 0.3, "student_std": 0.7, "time_std": 0.5},
    "ladd grid": {"warmup": 1, "time_std": 0.5},
    "lightning": {},
    "dmd": LOGNORMAL,
    "dmd2": LOGNORMAL | {"gan_weight": 0.1, "student_every": 1},
    "f_distill": LOGNORMAL | {"divergence": "forward_kl", "student_every": 1},
    "diff_instruct": LOGNORMAL,
    "vsd": LOGNORMAL | {"lora_targets": ["hidden"], "guidance_scale": 1.0, "fake_guidance_scale": 1.0},
    "sim": LOGNORMAL,
    "sid": LOGNORMAL,
}
# Whose features are float32.
SINGLE = ("ladd", "lightning", "dmd2", "f_distill")


def said(case: str, schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Losses of the student's terms, (terms, B), and the gradient of their sum."""
    name = case.split()[0]
    method, nets = prepared(name, CASES[case], schedule, monkeypatch)
    phase = next(iter(method.phases(7)))
    losses = torch.stack([loss(nets, batch(method, schedule))["total"].double() for _, loss in phase.terms])
    # Which measures states at the segment's edge, not what they show.
    if name == "tscd":
        edges = method.lower_edge(
            schedule, torch.tensor(method.sampling.grid(schedule, 4), dtype=torch.float64)
        )
        losses = losses / schedule.alpha(edges[Doubles(range(COUNT), phase="student").randint(0, 4)]) ** 2
    slopes = torch.autograd.grad(losses.sum(), list(nets.student.parameters()))
    return losses.detach(), torch.cat([slope.flatten() for slope in slopes])


# A table's times are whole, and its end is not quite clean: these two are told both.
ROWS = [(c, n) for c in CASES for n in ("vp", "flow", "trig") if n != "vp" or c not in ("boot", "lightning")]


@pytest.mark.parametrize(("case", "name"), ROWS)
def test_loss_and_gradient_are_the_same_under_every_schedule(case, name, monkeypatch):
    schedule = SCHEDULES[name]()
    if name != "vp":
        # Short of its end, where no signal is left and no ratio says so.
        schedule.t_max = float(schedule.t_of_rho(torch.tensor(1e3, dtype=torch.float64)))
    ends = schedule.rho(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))
    (ours, slope), (theirs, expected) = (
        said(case, each, monkeypatch) for each in (schedule, EDM(*ends.tolist()))
    )
    tolerance = 1e-4 if case.split()[0] in SINGLE else 1e-8
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(slope, expected, rtol=tolerance, atol=tolerance)
    assert float(expected.abs().max()) > 100 * tolerance
