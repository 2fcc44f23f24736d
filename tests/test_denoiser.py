"""One denoiser in many schedules, and classifier-free guidance."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepdistill.denoiser import Denoiser, guided, map_cond, parameter_count, unwrap
from stepdistill.families.toy import MLP, Mixture
from stepdistill.prediction import Prediction
from stepdistill.schedule import EDM, VP, Flow, TrigFlow, expand

SCHEDULES = {"vp": VP.from_betas(), "edm": EDM(), "flow": Flow(), "trig": TrigFlow(0.5)}
MEANS = torch.tensor([[1.0, 0.3], [-1.0, 0.5], [0.2, -0.9]])
WEIGHTS = torch.tensor([0.5, 0.3, 0.2])


def mixture(schedule, classes=None) -> Mixture:
    return Mixture(schedule, MEANS, 0.3, WEIGHTS, classes)


def points(schedule, rho: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same picture at noise-to-signal ratio rho in any schedule: x_t = alpha (x0 + rho eps)."""
    generator = torch.Generator().manual_seed(2)
    x0, eps = torch.randn(2, len(rho), 2, generator=generator, dtype=torch.float64)
    t = schedule.t_of_rho(rho)
    return schedule.add_noise(x0, eps, t), t


# Inside every schedule's range.
RHO = torch.logspace(-1.4, 1.1, 26, dtype=torch.float64)


def test_one_mixture_says_the_same_in_every_schedule():
    said = {name: mixture(schedule)(*points(schedule, RHO)) for name, schedule in SCHEDULES.items()}
    for name in said:
        torch.testing.assert_close(said[name], said["edm"], rtol=1e-9, atol=1e-9, msg=name)
    # Not one constant.
    assert float(said["edm"].std()) > 0.3


@pytest.mark.parametrize("spoken", SCHEDULES)
@pytest.mark.parametrize("native", SCHEDULES)
def test_a_wrapped_network_equals_one_made_for_the_schedule(native, spoken):
    wrapped = Denoiser(mixture(SCHEDULES[native]), "x0", SCHEDULES[native]).under(SCHEDULES[spoken])
    x_t, t = points(SCHEDULES[spoken], RHO)
    said, direct = (
        wrapped(x_t, t),
        Prediction(mixture(SCHEDULES[spoken])(x_t, t), "x0", x_t, t, SCHEDULES[spoken]),
    )
    for kind in ("x0", "eps", "v", "flow", "score"):
        torch.testing.assert_close(getattr(said, kind), getattr(direct, kind), rtol=1e-7, atol=1e-7)
    assert said.x_t is x_t and said.schedule is SCHEDULES[spoken]


class Spoken(nn.Module):
    """A mixture's prediction in a given kind, remembering what it was called with."""

    def __init__(self, schedule, kind, classes=None):
        super().__init__()
        self.inner, self.kind, self.schedule, self.calls = mixture(schedule, classes), kind, schedule, []

    def forward(self, x_t, t, cond=None):
        self.calls.append((x_t.shape[0], t))
        return getattr(Prediction(self.inner(x_t, t, cond), "x0", x_t, t, self.schedule), self.kind)


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow", "score"])
def test_wrapping_carries_any_kind_of_network(kind):
    vp, edm = SCHEDULES["vp"], SCHEDULES["edm"]
    network = Spoken(vp, kind)
    x_t, t = points(edm, RHO)
    said = Denoiser(network, kind, vp).under(edm)(x_t, t)
    torch.testing.assert_close(said.x0, mixture(edm)(x_t, t), rtol=1e-8, atol=1e-8)
    ((_, told),) = network.calls
    # In its own time.
    torch.testing.assert_close(vp.rho(told), RHO, rtol=1e-9, atol=0)


def test_noise_beyond_the_networks_range_keeps_its_norm():
    """EDM's sigma 80 asked of a VP network (rho at most 14.6): its last time, a state it can know."""
    vp, edm = SCHEDULES["vp"], SCHEDULES["edm"]
    heard = []

    class Ear(nn.Module):
        def forward(self, x_t, t, cond=None):
            heard.append((x_t, t))
            return torch.zeros_like(x_t)

    x_t = 80 * torch.randn(4096, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Denoiser(Ear(), "eps", vp).under(edm)(x_t, torch.full((4096,), 80.0, dtype=torch.float64))
    ((x_native, t),) = heard
    assert float(t[0]) == 999
    assert abs(float(x_native.std()) - 1) < 0.03


def test_the_raw_output_is_brought_to_float32():
    class Half(nn.Module):
        def forward(self, x_t, t, cond=None):
            return x_t.half()

    x_t, t = points(SCHEDULES["edm"], RHO)
    assert Denoiser(Half(), "x0", SCHEDULES["edm"])(x_t, t).raw.dtype == torch.float32


# -------------------------------------------------------------------------------------------------- guidance

CLASSES = torch.tensor([0, 1, 1])


def guided_parts(schedule, kind="x0", scale=3.0):
    network = Spoken(schedule, kind, CLASSES)
    x_t, t = points(schedule, RHO)
    cond, uncond = torch.arange(len(RHO)) % 2, torch.full((len(RHO),), 2)
    return (
        network,
        guided(Denoiser(network, kind, schedule), x_t, t, cond, uncond, scale),
        (x_t, t, cond, uncond),
    )


def test_scale_one_is_one_call_of_one_batch_and_needs_no_uncond():
    network, _, (x_t, t, cond, _) = guided_parts(SCHEDULES["vp"], scale=1)
    assert [count for count, _ in network.calls] == [len(RHO)]
    said = guided(Denoiser(network, "x0", SCHEDULES["vp"]), x_t, t, cond, None, 1.0)
    torch.testing.assert_close(said.x0, network.inner(x_t, t, cond), rtol=0, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow", "score"])
def test_guiding_any_kind_is_the_same(kind, schedule):
    network, said, (x_t, t, cond, uncond) = guided_parts(schedule, kind)
    # Both halves in one call.
    assert [count for count, _ in network.calls] == [2 * len(RHO)]
    with_cond, without = network.inner(x_t, t, cond), network.inner(x_t, t, uncond)
    torch.testing.assert_close(said.x0, without + 3 * (with_cond - without), rtol=1e-8, atol=1e-8)
    # x0 and eps fit each other: together they are the state they were asked at.
    torch.testing.assert_close(said.at(t), x_t, rtol=1e-8, atol=1e-8)
    assert float((said.x0 - with_cond).abs().max()) > 0.1


def test_guidance_in_a_wrapped_schedule_equals_guidance_at_home():
    vp, edm = SCHEDULES["vp"], SCHEDULES["edm"]
    x_t, t = points(edm, RHO)
    cond, uncond = torch.arange(len(RHO)) % 2, torch.full((len(RHO),), 2)
    at_home = guided(Denoiser(Spoken(edm, "eps", CLASSES), "eps", edm), x_t, t, cond, uncond, 2.5)
    away = guided(Denoiser(Spoken(vp, "v", CLASSES), "v", vp).under(edm), x_t, t, cond, uncond, 2.5)
    torch.testing.assert_close(away.x0, at_home.x0, rtol=1e-8, atol=1e-8)


def test_a_scale_per_sample_equals_one_call_per_scale():
    scales = torch.linspace(0, 8, len(RHO), dtype=torch.float64)
    _, said, (x_t, t, cond, uncond) = guided_parts(SCHEDULES["flow"], "v", scales)
    denoiser = Denoiser(Spoken(SCHEDULES["flow"], "v", CLASSES), "v", SCHEDULES["flow"])
    for i in range(0, len(RHO), 5):
        row = slice(i, i + 1)
        alone = guided(denoiser, x_t[row], t[row], cond[row], uncond[row], float(scales[i]))
        torch.testing.assert_close(said.x0[row], alone.x0, rtol=1e-10, atol=1e-10)
    without = denoiser(x_t[:1], t[:1], uncond[:1]).x0
    # Scale 0 is the unconditional one.
    torch.testing.assert_close(said.x0[:1], without, rtol=1e-10, atol=1e-10)


def test_map_cond_takes_tensors_dicts_and_none():
    a, b = torch.zeros(2), torch.ones(2)
    assert map_cond(lambda x, y: x + y, None, None) is None
    assert torch.equal(map_cond(torch.add, a, b), b)
    assert torch.equal(map_cond(torch.add, {"k": a}, {"k": b})["k"], b)
    for mixed in ((a, None), (None, a), ({"k": a}, a)):
        with pytest.raises(ValueError, match="same form"):
            map_cond(torch.add, *mixed)


def test_clones_share_nothing_and_are_trainable():
    network = nn.Linear(2, 2)
    original = Denoiser(network, "x0", SCHEDULES["vp"]).requires_grad_(False)
    twin = original.clone()
    # Still unwrapped after the copy.
    assert twin.schedule is twin.native
    assert all(p.requires_grad for p in twin.parameters()) and not any(
        p.requires_grad for p in original.parameters()
    )
    with torch.no_grad():
        twin.network.weight.zero_()
    assert float(network.weight.abs().sum()) > 0
    assert parameter_count(original) == 6
    assert unwrap(nn.DataParallel(original)) is original
    # shared, on the other hand.
    assert original.under(SCHEDULES["edm"]).network is network


def test_expand_puts_the_batch_first():
    assert expand(torch.ones(3), torch.zeros(3, 2, 5)).shape == (3, 1, 1)


def test_a_copy_of_half_precision_is_trained_in_float32():
    schedule = VP.from_betas()
    half = Denoiser(MLP(schedule, width=8), "x0", schedule).to(torch.bfloat16)
    assert {p.dtype for p in half.clone().parameters()} == {torch.float32}
