"""f-distill (arXiv 2502.15681): each divergence's gradient, its weights, their limits."""

from __future__ import annotations

import math

import pytest
import torch
import worlds
from quadrature import Line, close
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.families.toy import SCHEDULES
from stepdistill.methods.f_distill import WEIGHTS
from stepdistill.prediction import Prediction
from stepdistill.schedule import Flow

# f(r), r = p / q, of D_f(p || q) = E_q f(r).
F = {
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
    # Of ratios whose mean is 1.
    method.config.divergence = "jensen_shannon"
    expected = clipped / (clipped + clipped.mean())
    torch.testing.assert_close(method.weight(real, logits), expected / expected.mean())
    for settings, says in (({"gan_weight": 0.0}, "gan_weight"), ({"ratio_low": 30.0}, "ratio_low")):
        with pytest.raises(UserError, match=says):
            Line("f_distill", SCHEDULES["vp"](), **settings)


def test_no_gradient_of_f_distill_either_whatever_the_ratio(monkeypatch):
    line = Line("f_distill", SCHEDULES["vp"](), guidance_scale=1.0)
    # Of the discriminator's own pull.
    line.method.config.gan_weight = 0.0
    monkeypatch.setattr(line.method, "log_ratio", lambda real, logits: real.x_t[:, 0])
    assert float(line.gradient().abs().max()) > 0.01
    line.nets.modules["fake_score"] = line.nets.teacher
    assert float(line.gradient().abs().max()) == 0


def test_ratios_are_divided_by_the_running_mean_of_their_part_of_the_noise():
    """Two parts, below and above flow time 1/2; the means outlive a checkpoint."""
    settings = {"divergence": "forward_kl", "time_bins": 2, "bin_decay": 0.75, "gan_weight": 1e-3}
    schedule = Flow()
    method = Line("f_distill", SCHEDULES["flow"](), **settings).method
    t = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)

    def asked(method, *values: float) -> Tensor:
        logits = torch.tensor(values).log()[:, None]
        return method.mean(Prediction(logits, "x0", logits, t, schedule), logits[:, 0].exp())

    torch.testing.assert_close(asked(method, 1.0, 3.0, 4.0, 8.0), torch.tensor([2.0, 2.0, 6.0, 6.0]))
    again = Line("f_distill", SCHEDULES["flow"](), **settings).method
    again.load_state_dict(method.state_dict())
    for one in (method, again):
        # A quarter of the way to 4 and to 2.
        torch.testing.assert_close(asked(one, 4.0, 4.0, 2.0, 2.0), torch.tensor([2.5, 2.5, 5.0, 5.0]))
    # Of a batch without the upper part, its mean stays.
    ratio = torch.full((4, 1), 2.5)
    method.mean(Prediction(ratio, "x0", ratio, t * 0 + 0.1, schedule), ratio[:, 0])
    assert method.state_dict() == {"ratio_means": pytest.approx([2.5, 5.0])}
    assert Line("f_distill", SCHEDULES["flow"]()).method.state_dict() == {}
    with pytest.raises(UserError, match=r"method\.time_bins"):
        Line("f_distill", SCHEDULES["flow"](), time_bins=-1)


def test_parts_of_the_noise_are_of_levels_and_not_of_a_schedules_times():
    """Under a table, times lie far from flow's: 100 of 999 is little noise, 999 all of it."""
    schedule = SCHEDULES["vp"]()
    method = Line("f_distill", schedule, time_bins=2, gan_weight=1e-3).method
    t, ratio = (
        torch.tensor([20.0, 50.0, 990.0, 999.0], dtype=torch.float64),
        torch.tensor([1.0, 3.0, 4.0, 8.0]),
    )
    said = method.mean(Prediction(ratio[:, None], "x0", ratio[:, None], t, schedule), ratio)
    torch.testing.assert_close(said, torch.tensor([2.0, 2.0, 6.0, 6.0]))


def test_a_forecast_may_ask_of_tensors_without_content():
    method = Line("f_distill", SCHEDULES["flow"](), time_bins=3, gan_weight=1e-3).method
    t, ratio = torch.ones(4, dtype=torch.float64, device="meta"), torch.ones(4, device="meta")
    said = method.mean(Prediction(ratio[:, None], "x0", ratio[:, None], t, Flow()), ratio)
    assert said.shape == (4,) and said.is_meta


def test_processes_share_their_running_means():
    """A part of the noise levels that one alone has met counts as that one has it."""
    first, second = (worlds.method("f_distill", time_bins=3, gan_weight=0.1) for _ in range(2))
    first.load_state_dict({"ratio_means": [1.0, 2.0, 0.0]})
    second.load_state_dict({"ratio_means": [3.0, 0.0, 0.0]})
    theirs: list[Tensor] = []
    second.averaged(None, lambda value: theirs.append(value) or value)
    first.averaged(None, lambda value: (value + theirs.pop(0)) / 2)
    assert first.state_dict()["ratio_means"] == [2.0, 2.0, 0.0]
