"""A traced network is the network, faster."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stepdistill
from stepdistill import assets
from stepdistill.tracing import Traced, TracedDecoder

PROMPTS = ["a large red star on a black background", "a small blue circle on a white background"]


@pytest.fixture(scope="module")
def pair():
    return [stepdistill.load(assets.path("student")) for _ in range(2)]


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("steps", [1, 2])
def test_images_are_bit_equal(pair, steps, chunk):
    plain, traced = pair
    traced.trace()
    expected = plain(PROMPTS, [3, 4], steps=steps, chunk=chunk)
    # As recorded, and as replayed.
    for _ in range(2):
        assert torch.equal(traced(PROMPTS, [3, 4], steps=steps, chunk=chunk), expected)
    assert len(traced.denoiser.network._recorded) >= 1


def test_a_decoder_is_replayed_bit_equal(pair):
    decoder = pair[0].pipeline.vae.decoder
    z = torch.randn(2, decoder.conv_in.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    traced = TracedDecoder(decoder).eval()
    with torch.no_grad():
        expected = decoder(z)
        for _ in range(2):
            assert torch.equal(traced(z), expected) and torch.equal(traced(z, None), expected)
    assert len(traced._recorded) == 1 and traced(z.requires_grad_()).requires_grad
    assert isinstance(next(iter(traced._recorded.values())), torch.jit.ScriptModule)


class Noted(nn.Module):
    """Counts how often its Python runs."""

    blocks: dict[str, int] = {"layer": 2}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(2, 2), 0

    def forward(self, x_t, t, cond=None, guidance=None):
        self.calls += 1
        out = self.layer(x_t) + t[:, None].to(x_t)
        if isinstance(cond, dict):
            out = out + cond["a"] - 2 * cond["b"]
        elif cond is not None:
            out = out * cond
        return out if guidance is None else out + guidance[:, None].to(x_t)


def inputs(count: int):
    draw = torch.Generator().manual_seed(count)
    return torch.randn(count, 2, generator=draw), torch.rand(count, generator=draw).double()


@pytest.mark.parametrize("form", ["none", "tensor", "dict", "guidance"])
def test_conditions_and_extras_arrive_in_their_places(form):
    network = Noted().eval()
    traced = Traced(network).eval()
    with torch.no_grad():
        for count in (1, 2, 1):
            x_t, t = inputs(count)
            told = {"none": None, "tensor": x_t + 1, "dict": {"b": x_t - 3, "a": x_t * 2}, "guidance": x_t}[
                form
            ]
            extras = {"guidance": t * 4} if form == "guidance" else {}
            assert torch.equal(traced(x_t, t, told, **extras), network(x_t, t, told, **extras))


def test_recorded_once_per_shape_and_never_with_gradients():
    network = Noted().eval()
    traced = Traced(network).eval()
    x_t, t = inputs(1)
    with torch.no_grad():
        traced(x_t, t)
        after = network.calls
        traced(x_t, t)
        assert network.calls == after
        traced(*inputs(2))
        assert network.calls > after
        for count in range(3, 30):
            traced(*inputs(count))
        assert len(traced._recorded) == Traced.KEPT
    traced(x_t, t).sum().backward()
    assert network.layer.weight.grad is not None
    assert traced.blocks == {"layer": 2}


def test_new_weights_are_heard():
    network = Noted().eval()
    traced = Traced(network).eval()
    x_t, t = inputs(1)
    with torch.no_grad():
        before = traced(x_t, t)
        network.layer.weight += 1.0
        after = traced(x_t, t)
        assert not torch.equal(before, after) and torch.equal(after, network(x_t, t))


def test_what_cannot_be_recorded_still_runs():
    class Branching(Noted):
        def forward(self, x_t, t, cond=None):
            return x_t * 2 if float(t.sum()) > 1 else x_t * self.fail

        fail = property(
            lambda self: (_ for _ in ()).throw(RuntimeError("no trace")) if torch.jit.is_tracing() else 3
        )

    traced = Traced(Branching().eval()).eval()
    with torch.no_grad():
        x_t = torch.ones(1, 2)
        assert torch.equal(traced(x_t, torch.zeros(1)), x_t * 3)


def test_a_network_that_depends_on_more_than_shapes_is_not_recorded(pair, monkeypatch):
    _, sampler = pair
    plain = getattr(sampler.denoiser.network, "network", sampler.denoiser.network)
    monkeypatch.setattr(type(plain), "traceable", False)
    monkeypatch.setattr(sampler.denoiser, "network", plain)
    assert sampler.trace().denoiser.network is plain
