"""What training does to every family's network: gradients computed again, derivatives along time, adapters."""

from __future__ import annotations

import pytest
import tiny
import torch
import worlds
from diffusers import DiffusionPipeline
from models import TOLD, family_of

from stepdistill import export
from stepdistill.denoiser import Denoiser, map_cond
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.jvp import difference, fine_step, jvp
from stepdistill.lora import LoraConfig
from stepdistill.methods.assemble import assemble
from stepdistill.schedule import times_like


def asked(family: Family) -> tuple:
    x = torch.randn(2, *family.shape, generator=torch.Generator().manual_seed(0))
    t = times_like([0.6 * family.schedule.t_max, 0.3 * family.schedule.t_max], x)
    return x, t, family.encode(TOLD[family.conditions])


def gradient(student: Denoiser, family: Family) -> torch.Tensor:
    student.zero_grad()
    student(*asked(family)).raw.square().mean().backward()
    # Data-parallel training waits for every gradient that is wanted.
    wanted = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
    assert not [name for name, grad in wanted.items() if grad is None]
    return torch.cat([grad.flatten() for grad in wanted.values()])


@pytest.mark.parametrize("variant", tiny.one_of_each_family())
def test_gradients_computed_again_are_the_same(variant):
    family, method = family_of(variant), worlds.method("kd")
    model = family.teacher.network.model
    if family.teacher.network.uncheckpointed or not model._supports_gradient_checkpointing:
        with pytest.raises(UserError, match=r"student.gradient_checkpointing=true: .*; set it to false"):
            assemble(method, family, gradient_checkpointing=True)
        return
    plain, again = (
        assemble(method, family, gradient_checkpointing=each).student.requires_grad_(True)
        for each in (False, True)
    )
    assert again.network.model.is_gradient_checkpointing and not plain.network.model.is_gradient_checkpointing
    expected = gradient(plain, family)
    torch.testing.assert_close(gradient(again, family), expected, rtol=0, atol=1e-6)
    assert float(expected.abs().max()) > 1e-4


def test_upstreams_mistake_is_the_reason_that_chroma_gives():
    """Should diffusers mend it, this test asks to let Chroma through."""
    family = family_of("chroma")
    student = family.student("teacher", ())
    plain = gradient(student, family)
    student.network.model.enable_gradient_checkpointing()
    again = gradient(student, family)
    assert float((again - plain).norm() / plain.norm()) > 1e-3
    with pytest.raises(UserError, match="without the prompt's mask"):
        assemble(worlds.method("kd"), family, gradient_checkpointing=True)


@pytest.mark.parametrize("variant", tiny.one_of_each_family())
def test_forward_mode_runs_through_and_agrees_with_differences(variant):
    """Along the trajectory, as continuous-time methods go; a step of 1e-3 in flow time would be a tenth off."""
    family = family_of(variant)
    teacher, (x, t, cond) = family.teacher.double(), asked(family)
    x, cond = x.double(), map_cond(lambda c: c.double() if c.is_floating_point() else c, cond)
    with torch.no_grad():
        dx = teacher(x, t, cond).velocity
    along = (dx, torch.ones_like(t))

    def network(x, time):
        return teacher(x, time, cond).raw

    value, exact = jvp(network, (x, t), along)
    step = fine_step(family.schedule, family.schedule, t, along[1])
    mean, slope = difference(network, (x, t), along, step)
    assert float((value - mean).norm() / value.norm()) < 1e-2
    assert float(exact.norm()) > 0
    # Networks embed their time in float32.
    assert float((slope - exact).norm() / exact.norm()) < 2e-2


@pytest.mark.parametrize("variant", tiny.one_of_each_family())
def test_adapters_start_at_nothing_train_and_leave_as_the_stock_pipeline_reads_them(variant, tmp_path):
    family = family_of(variant)
    x, t, cond = asked(family)
    student = LoraConfig(rank=4, alpha=8.0).over(family.teacher)
    with torch.no_grad():
        before = family.teacher(x, t, cond).raw
        torch.testing.assert_close(student(x, t, cond).raw, before, rtol=0, atol=0)
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        loss = (student(x, t, cond).raw - 1).square().mean()
        loss.backward()
        optimiser.step()
    # Every layer that is adapted moved, and of every kind that the family names there are some.
    moved = [name.split("/") for name, (_, up) in student.adapters.items() if bool(up.weight.detach().any())]
    assert len(moved) == len(student.adapters)
    assert all(any(target in parts for parts in moved) for target in family.lora_targets), moved
    with torch.no_grad():
        expected = student(x, t, cond).raw
    assert float((expected - before).abs().max()) > 1e-3

    recipe = {"family": {"teacher": variant}, "method": {"name": "dmd2"}, "run": {"out": "runs/x"}}
    export.write(family, student, tmp_path / "out", export.card_of(family, worlds.method("dmd2"), recipe))
    readme = (tmp_path / "out/README.md").read_text()
    if family.no_lora_file:
        assert family.lora_file(student, tmp_path / "lora") is None and not (tmp_path / "out/lora").exists()
        assert "load_lora_weights" in family.no_lora_file and "load_lora_weights" not in readme
        return
    assert "load_lora_weights" in readme
    stock = DiffusionPipeline.from_pretrained(tiny.directory(variant), **family.stock_load())
    stock.load_lora_weights(tmp_path / "out/lora")
    loaded = Denoiser(family.face(getattr(stock, family.face.inner)), family.kind, family.teacher.native)
    loaded = loaded.under(family.schedule)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, t, cond).raw, expected, rtol=0, atol=1e-6)
