"""A denoiser that shares another's weights: by reference, unchanged, and only its adapters are trained or kept."""

from __future__ import annotations

import pytest
import torch
import worlds

from stepdistill.denoiser import Denoiser, parameter_count
from stepdistill.errors import UserError
from stepdistill.families.sd import SD
from stepdistill.families.toy import MLP
from stepdistill.lora import LoRA
from stepdistill.schedule import VP, Flow, times_like


def base(width: int = 32) -> Denoiser:
    torch.manual_seed(0)
    schedule = VP.from_betas()
    return Denoiser(MLP(schedule, width=width), "x0", schedule).requires_grad_(False)


def stirred(adapted: LoRA) -> LoRA:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapted


def ask(denoiser: Denoiser, **more) -> torch.Tensor:
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(2))
    return denoiser(x, times_like(0.3 if more else 300.0, x), **more).x0


def test_it_starts_as_its_base_and_holds_it_by_reference():
    network = base()
    adapted = LoRA(network, rank=4, scale=8.0)
    assert torch.equal(ask(adapted), ask(network))
    assert adapted.network is network.network
    assert (adapted.kind, adapted.native, adapted.schedule) == (
        network.kind,
        network.native,
        network.schedule,
    )
    own = {p.data_ptr() for p in adapted.parameters()}
    assert not own & {p.data_ptr() for p in network.parameters()}
    assert all(name.startswith("adapters.") for name in adapted.state_dict())
    assert parameter_count(adapted) < parameter_count(network)
    assert torch.equal(ask(adapted, in_schedule=Flow()), ask(network, in_schedule=Flow()))


def test_it_is_the_base_with_merged_weights():
    """W + scale / rank up down, layer by layer."""
    network, rank, scale = base(), 4, 8.0
    adapted = stirred(LoRA(network, rank, scale))
    said = ask(adapted)
    merged = network.clone()
    modules = dict(merged.network.named_modules())
    with torch.no_grad():
        for name, (down, up) in adapted.adapters.items():
            modules[name.replace("/", ".")].weight += scale / rank * up.weight @ down.weight
    assert {"enter", "hidden/0/1", "leave/1"} <= set(adapted.adapters)
    torch.testing.assert_close(said, ask(merged), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(said, ask(network), atol=1e-3)


def test_convolutions_are_adapted_too(tiny_sd):
    denoiser = SD(SD.Config(teacher=str(tiny_sd))).teacher
    adapted = stirred(LoRA(denoiser, rank=2, targets=("conv1", "to_q")))
    x, cond = torch.randn(2, 4, 4, 4), torch.randn(2, 7, 16)
    merged = denoiser.clone()
    modules = dict(merged.network.named_modules())
    kinds = set()
    with torch.no_grad():
        for name, (down, up) in adapted.adapters.items():
            layer = modules[name.replace("/", ".")]
            kinds.add(type(layer).__name__)
            update = torch.einsum("or,r...->o...", up.weight.flatten(1), down.weight)
            layer.weight += adapted.scale / adapted.rank * update
    assert kinds == {"Conv2d", "Linear"}
    t = times_like(400.0, x)
    torch.testing.assert_close(adapted(x, t, cond).x0, merged(x, t, cond).x0, rtol=1e-4, atol=1e-4)


def test_the_base_is_itself_again_after_every_call():
    network = base()
    before, adapted = ask(network), stirred(LoRA(network))
    ask(adapted)
    assert torch.equal(ask(network), before)
    with pytest.raises(RuntimeError):
        adapted(torch.randn(3, 7), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(ask(network), before)
    assert not any(module._forward_hooks for module in network.network.modules())


def test_only_adapters_are_ever_trained():
    network = base()
    bytes_before = [p.clone() for p in network.parameters()]
    adapted = LoRA(network).requires_grad_(True).train()
    assert not any(p.requires_grad for p in network.parameters())
    optimizer = torch.optim.Adam(adapted.parameters(), 1e-2)
    for _ in range(3):
        ask(adapted).square().mean().backward()
        assert all(p.grad is not None for p in adapted.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(bytes_before, network.parameters(), strict=True))
    assert not torch.equal(ask(adapted), ask(network))


def test_the_gradient_reaches_the_input_of_a_frozen_one():
    adapted = stirred(LoRA(base())).requires_grad_(False)
    x = torch.randn(3, 2, requires_grad=True)
    adapted(x, times_like(300.0, x)).x0.sum().backward()
    assert float(x.grad.abs().max()) > 0 and all(p.grad is None for p in adapted.parameters())


def test_a_clone_has_adapters_of_its_own_over_the_same_base():
    adapted = stirred(LoRA(base()))
    twin = adapted.clone()
    assert torch.equal(ask(twin), ask(adapted)) and twin.network is adapted.network
    stirred(twin)
    assert not torch.equal(ask(twin), ask(adapted))


def test_a_state_survives():
    network = base()
    adapted, other = stirred(LoRA(network)), LoRA(network)
    other.load_state_dict(adapted.state_dict())
    assert torch.equal(ask(other), ask(adapted))


def test_what_cannot_be_adapted_is_one_sentence():
    with pytest.raises(UserError, match="called to_q"):
        LoRA(base(), targets=("to_q",))
    with pytest.raises(UserError, match="rank of a LoRA must be at least 1, got 0"):
        LoRA(base(), rank=0)


def test_vsd_holds_the_teachers_weights_once(tiny_sd):
    family = SD(SD.Config(teacher=str(tiny_sd)))
    student = family.student("teacher", ())

    def fake(**settings) -> LoRA:
        method = worlds.method("vsd", steps=(1,), lora_rank=2, **settings)
        return method.networks(family.teacher, student)["fake_score"]

    assert fake().network is family.teacher.network
    assert set(fake(lora_targets=["to_q", "to_v"]).adapters) < set(fake().adapters)
    # Unless they are named, what the family says.
    family.teacher.network.lora_targets = ("to_k",)
    assert fake().targets == ("to_k",)
    assert parameter_count(fake()) < parameter_count(family.teacher) / 5


def test_merged_and_as_a_file_it_has_its_scale():
    adapted = stirred(LoRA(base(), rank=4, scale=8.0))
    torch.testing.assert_close(ask(adapted.merged()), ask(adapted), rtol=1e-5, atol=1e-6)
    held = adapted.layers("hidden")
    down, up = adapted.adapters["hidden/0/1"]
    assert torch.equal(held["0.1.lora_A.weight"], down.weight)
    assert torch.equal(held["0.1.lora_B.weight"], 2 * up.weight)
