"""An average of weights: of what is trained, lent and given back, and gone on with."""

from __future__ import annotations

import copy

import torch
from torch import nn

from stepdistill.ema import EMA


def network() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    made[1].requires_grad_(False)
    return made


def moved(net: nn.Module, by: float) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += by
    return net


def test_only_what_is_trained_is_averaged_and_a_short_run_is_no_average_of_its_start():
    net = network()
    start, ema = net[0].weight.detach().clone(), EMA(net, 0.5)
    assert set(ema.shadow) == {"0.weight", "0.bias"}
    ema.update(moved(net, 1.0))
    # Decay 1/10 after no update, 2/11 after one.
    torch.testing.assert_close(ema.shadow["0.weight"], start + 0.9)
    ema.update(net)
    torch.testing.assert_close(ema.shadow["0.weight"], start + 1 - 0.1 * 2 / 11)


def test_it_is_lent_and_given_back():
    net = network()
    ema = EMA(net, 0.9)
    average = net[0].weight.detach().clone()
    moved(net, 1.0)
    now = copy.deepcopy(net.state_dict())
    with ema.applied(net):
        assert torch.equal(net[0].weight, average)
    assert all(torch.equal(value, now[name]) for name, value in net.state_dict().items())
    ema.put(net)
    assert torch.equal(net[0].weight, average)


def test_it_goes_on_where_it_was():
    net = network()
    one = EMA(net, 0.999)
    for _ in range(3):
        one.update(moved(net, 1.0))
    two = EMA(net, 0.999)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert two.updates == 3
    moved(net, 1.0)
    one.update(net)
    two.update(net)
    assert torch.equal(one.shadow["0.weight"], two.shadow["0.weight"])
