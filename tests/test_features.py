"""Taps, early exit, discriminator heads and the exponential moving average."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepdistill.denoiser import Denoiser
from stepdistill.discriminator import Discriminator, Head
from stepdistill.ema import EMA
from stepdistill.errors import UserError
from stepdistill.families.sd import SD
from stepdistill.families.toy import MLP
from stepdistill.features import block_features, tap, tap_with_gradient
from stepdistill.schedule import Flow

SCHEDULE = Flow()


def student() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(MLP(SCHEDULE, width=16), "x0", SCHEDULE)


def state(count: int = 5):
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(1))
    return x, torch.full((count,), 0.4, dtype=torch.float64)


class Counting(nn.Module):
    """A block that counts its calls."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


def test_taps_equal_a_forward_by_hand():
    denoiser = student()
    network = denoiser.network
    x, t = state()
    first, second = block_features(denoiser, x, t, None, ["network.hidden.0", "network.hidden.1"])
    heard = []
    network.hidden[0].register_forward_hook(lambda module, inputs, output: heard.append((inputs[0], output)))
    denoiser(x, t)
    ((entered, left),) = heard
    torch.testing.assert_close(first, left, rtol=0, atol=0)
    torch.testing.assert_close(second, network.hidden[1](entered + left), rtol=0, atol=0)


def test_early_exit_gives_the_same_features_and_input_gradient_and_computes_nothing_behind():
    denoiser = student()
    denoiser.network.hidden[2] = Counting(denoiser.network.hidden[2])
    middle = "network.hidden.1"

    def through(early: bool):
        x, t = state()
        x.requires_grad_()
        if early:
            (features,) = block_features(denoiser, x, t, None, [middle])
        else:
            with tap(denoiser, [middle]) as collected:
                denoiser(x, t)
            features = collected[middle]
        features.square().sum().backward()
        return features.detach(), x.grad

    early, whole = through(True), through(False)
    # By the whole forward alone.
    assert denoiser.network.hidden[2].calls == 1
    assert torch.equal(early[0], whole[0]) and torch.equal(early[1], whole[1])
    assert float(early[1].abs().max()) > 0
    # Nothing is left behind.
    assert not any(module._forward_hooks for module in denoiser.modules())


def test_frozen_parameters_get_no_gradient_but_the_input_does():
    denoiser = student().requires_grad_(False)
    x, t = state()
    x.requires_grad_()
    block_features(denoiser, x, t, None, [denoiser.middle])[0].sum().backward()
    assert float(x.grad.abs().max()) > 0
    assert all(parameter.grad is None for parameter in denoiser.parameters())


def test_a_wrong_block_name_lists_near_ones():
    denoiser = student()
    with pytest.raises(
        ValueError, match=r"no block 'network\.hiden\.1' to tap in Denoiser; it has .*network\.hidden\.1"
    ):
        block_features(denoiser, *state(), None, ["network.hiden.1"])
    assert not any(module._forward_hooks for module in denoiser.modules())


def test_every_listed_block_of_a_unet_has_the_channels_it_says(tiny_sd):
    teacher = SD(SD.Config(teacher=str(tiny_sd))).teacher
    x, t = torch.randn(2, 4, 4, 4), torch.full((2,), 500.0, dtype=torch.float64)
    cond = torch.randn(2, 7, 16)
    names = list(teacher.blocks)
    features = block_features(teacher, x, t, cond, names)
    assert [feature.shape[1] for feature in features] == list(teacher.blocks.values())
    with tap(teacher, names) as collected:
        teacher(x, t, cond)
    for name, feature in zip(names, features, strict=True):
        torch.testing.assert_close(feature, collected[name], rtol=0, atol=0)
    # Wrapped by a trainer.
    (middle,) = block_features(nn.DataParallel(teacher), x, t, cond, [teacher.middle])
    assert torch.equal(middle, collected[teacher.middle])


def test_discriminator_takes_maps_tokens_and_vectors():
    maps, tokens, vectors = torch.randn(3, 8, 4, 5), torch.randn(3, 7, 6), torch.randn(3, 10)
    logits = Discriminator([8, 6, 10], width=32)([maps, tokens, vectors])
    assert [each.shape for each in logits] == [(3, 4 * 5), (3, 7), (3, 1)]
    head = Head(8)
    # The same places as tokens.
    places = maps.flatten(2).transpose(1, 2)
    torch.testing.assert_close(head(maps), head(places))
    assert head(vectors[:, :8]).shape == (3, 1)
    with pytest.raises(ValueError):
        Discriminator([8, 6])([maps])


def test_a_samples_logits_are_its_own():
    maps = torch.randn(3, 8, 4, 4)
    # An odd width finds its groups.
    head = Head(8, width=12)
    torch.testing.assert_close(head(maps)[1:2], head(maps[1:2]))


# ------------------------------------------------------------------------------------------------------- EMA


def test_ema_arithmetic_and_warm_up():
    """The decay in force is min(decay, (1 + n) / (10 + n))."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 2.0)
    average = EMA(network, 0.5)
    expected, values = 2.0, [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, 6.0, 5.0, 3.5, 8.0]
    for n, value in enumerate(values):
        nn.init.constant_(network.weight, value)
        average.update(network)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        assert float(average.shadow["weight"]) == pytest.approx(expected, rel=1e-6), n
    # The last one was past the warm-up.
    assert min(0.5, (1 + 10) / (10 + 10)) == 0.5


def test_no_decay_is_the_network_itself():
    network = nn.Linear(2, 2)
    average = EMA(network, 0.0)
    nn.init.normal_(network.weight)
    average.update(network)
    torch.testing.assert_close(average.shadow["weight"], network.weight.detach(), rtol=1e-6, atol=1e-7)
    for wrong in (1.0, -0.1):
        with pytest.raises(ValueError, match="ema decay"):
            EMA(network, wrong)


def test_applied_lends_the_average_and_gives_the_weights_back():
    network = nn.Linear(2, 2)
    average = EMA(network, 0.9)
    before, averaged = network.weight.detach().clone(), average.shadow["weight"].clone()
    nn.init.normal_(network.weight)
    now = network.weight.detach().clone()
    with pytest.raises(RuntimeError), average.applied(network):
        assert torch.equal(network.weight, averaged)
        raise RuntimeError
    assert torch.equal(network.weight, now) and not torch.equal(now, before)
    average.put(network)
    assert torch.equal(network.weight, averaged)


def test_only_trainable_parameters_are_averaged():
    network = nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    assert set(EMA(network, 0.9).shadow) == {"weight"}


def test_ema_state_comes_back_in_place():
    network = nn.Linear(2, 2)
    average, other = EMA(network, 0.9), EMA(nn.Linear(2, 2), 0.9)
    for _ in range(3):
        average.update(network)
    # The tensor that lies on the network's device.
    kept = other.shadow["weight"]
    other.load_state_dict(average.state_dict())
    assert (
        other.updates == 3 and torch.equal(kept, average.shadow["weight"]) and other.shadow["weight"] is kept
    )
    with pytest.raises(ValueError, match="does not fit"):
        EMA(nn.Linear(2, 2, bias=False), 0.9).load_state_dict(average.state_dict())


def test_a_pass_can_record_its_first_half_alone():
    """Up to the last tap there is a graph, behind it none; the outputs are those of a plain pass."""
    torch.manual_seed(0)
    body = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    x = torch.randn(2, 3, requires_grad=True)
    with torch.no_grad(), tap_with_gradient(body, ["0", "1"]) as seen:
        out = body(x)
        assert not out.requires_grad and not (2 * x).requires_grad
    assert torch.equal(out, body(x)) and all(feature.requires_grad for feature in seen.values())
    (slope,) = torch.autograd.grad(seen["1"].sum(), x)
    (expected,) = torch.autograd.grad(body[1](body[0](x)).sum(), x)
    assert torch.equal(slope, expected)
    # The mode and the network are as before.
    assert torch.is_grad_enabled() and body(x).requires_grad


def test_a_compiled_network_has_no_taps():
    """Its hooks would never be called."""
    network = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")
    with pytest.raises(UserError, match="cannot be compiled"), tap(network, ["0"]):
        pass
