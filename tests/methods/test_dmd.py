"""DMD (arXiv 2311.18828): its normaliser."""

from __future__ import annotations

import torch
from quadrature import Line, close

from stepdistill.families.toy import SCHEDULES


def test_dmd_divides_by_the_distance_to_the_teachers_answer():
    line = Line("dmd", SCHEDULES["edm"]())
    batch = line.batch()
    x0 = line.method.generate(line.nets, batch).x0
    with torch.no_grad():
        real, fake = line.method.ask(line.nets, batch, x0)
    pull = (fake.x0 - real.x0) / (x0.detach() - real.x0).abs().clamp(min=1e-5)
    parameters = (line.student.shift, line.student.scale)
    expected = torch.autograd.grad((line.weights[:, None] * pull * x0).sum(), parameters)
    close(line.gradient(), torch.stack(expected))
