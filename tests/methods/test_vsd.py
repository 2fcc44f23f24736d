"""VSD (arXiv 2305.16213): the weight of its critic."""

from __future__ import annotations

import torch
from quadrature import RHO, Line, close

from stepdistill.families.toy import SCHEDULES
from stepdistill.prediction import Prediction


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
