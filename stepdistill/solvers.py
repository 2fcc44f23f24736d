"""One teacher step along the probability-flow ODE, from time t to time s < t.

`predict(x_t, t) -> Prediction` is the teacher with its condition and guidance already applied. All return x_s
(B, ...).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from stepdistill.prediction import Prediction
from stepdistill.schedule import Schedule, expand

Predict = Callable[[Tensor, Tensor], Prediction]


def ddim(predict: Predict, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """alpha_s x0 + sigma_s eps (Song et al. 2020, Eq. 12 with eta = 0): exact when x0 is constant along
    the step.
    """
    return predict(x_t, t).at(s)


def chord(schedule: Schedule, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The x0 whose one DDIM step from x_t at t ends in x_s at s: what a student has to say to be there in one step."""
    ratio = expand(schedule.sigma(s) / schedule.sigma(t), x_t)
    alpha_s, alpha_t = (expand(schedule.alpha(time), x_t) for time in (s, t))
    # 0 / 0 where both times are the same.
    return (x_s - ratio * x_t) / (alpha_s - ratio * alpha_t).clamp(min=1e-8)


def euler(predict: Predict, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """x_t + (s - t) dx/dt. Local error O((t - s)^2)."""
    return x_t + expand(s - t, x_t) * predict(x_t, t).velocity


def heun(predict: Predict, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Trapezoid of the two slopes (Karras et al. 2022, Alg. 1); two calls, local error O((t - s)^3). Needs s
    > t_min.
    """
    step = expand(s - t, x_t)
    slope = predict(x_t, t).velocity
    ahead = predict(x_t + step * slope, s).velocity
    return x_t + step * (slope + ahead) / 2


SOLVERS = {"ddim": ddim, "euler": euler, "heun": heun}
