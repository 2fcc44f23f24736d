"""The end of a jump told by depth: the first blocks see where it begins, what follows them where it ends."""

from __future__ import annotations

import contextlib
import functools

import pytest
import tiny
import torch
import worlds
from models import TOLD, family_of, refused
from stock import assert_comes_back, exported
from torch import nn

from stepdistill.denoiser import Denoiser, map_cond
from stepdistill.errors import UserError
from stepdistill.families.depth import FIRST
from stepdistill.families.faces import TransformerFace
from stepdistill.jvp import difference, fine_step, jvp
from stepdistill.schedule import times_like

EACH = pytest.mark.parametrize("variant", tiny.one_of_each_family())


@functools.cache
def stirred(variant: str) -> tuple:
    """(family, student off its first weights, of which some are zero, inputs x_t, t, cond, and r): of the second sample
    alone r is not t.
    """
    family = family_of(variant)
    student = family.student("teacher", ("end_by_depth",)).eval()
    worlds.stir(student)
    x = torch.randn(2, *family.shape, generator=torch.Generator().manual_seed(0))
    t, r = (times_like([share * family.schedule.t_max for share in s], x) for s in ((0.3, 0.6), (0.3, 0.2)))
    cond = map_cond(lambda c: c.clone(), family.encode(TOLD[family.conditions]))
    return family, student, (x, t, cond), r


def early(network: nn.Module) -> list[str]:
    """Names of the blocks that see where a jump begins."""
    names = list(network.blocks)
    if not isinstance(network, TransformerFace):
        return [name for name in names if "up_blocks" not in name]
    refiners = [
        f"transformer.{stack}.{i}"
        for stack in network.refiners
        for i in range(len(network.transformer.get_submodule(stack)))
    ]
    return [*refiners, *names[: round(FIRST * len(names))]]


@contextlib.contextmanager
def outputs(network: nn.Module, names: list[str], instead: dict | None = None):
    """What blocks return, by name; with `instead`, they return that."""
    found, handles = {}, []
    for name in names:

        def hook(_block, _args, output, name=name):
            found[name] = output
            return instead[name] if instead else None

        handles.append(network.get_submodule(name).register_forward_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def same(one: object, other: object) -> bool:
    """Of tensors, or of tuples of them and of nothing."""
    if isinstance(one, torch.Tensor) or one is None:
        return one is other or torch.equal(one, other)
    return all(map(same, one, other))


@EACH
def test_a_jump_of_no_length_is_the_teachers_answer_bit_for_bit(variant):
    family, student, (x, t, cond), r = stirred(variant)
    assert student.state_dict().keys() == family.teacher.state_dict().keys()
    scale = {"guidance": torch.full((2,), 3.0)} if "guidance" in student.network.told else {}
    with torch.no_grad():
        plain = student(x, t, cond, **scale).raw
        assert torch.equal(student(x, t, cond, end=t, **scale).raw, plain)
        one, other = student(x, t, cond, end=r, **scale).raw - plain
        assert not one.any() and float(other.abs().max()) > 1e-4
        # Nothing is left behind.
        assert torch.equal(student(x, t, cond, **scale).raw, plain)


@EACH
def test_a_jump_is_the_answer_at_its_end_of_what_the_first_blocks_made_at_its_beginning(variant):
    _, student, (x, t, cond), r = stirred(variant)
    network = student.network
    names = early(network)
    with torch.no_grad():
        with outputs(network, [*names, *network.blocks]) as plain:
            network(x, t, cond)
        with outputs(network, [*names, *network.blocks]) as told:
            answer = network(x, t, cond, end=r)
        assert plain.keys() == told.keys() and names
        for name, made in told.items():
            assert same(made, plain[name]) == (name in names), name
        with outputs(network, names, plain):
            torch.testing.assert_close(network(x, r, cond), answer, rtol=1e-5, atol=1e-6)


def test_as_many_blocks_see_the_beginning_as_in_the_authors_network():
    assert [round(FIRST * blocks) for blocks in (28, 24, 12, 2)] == [20, 17, 9, 1]
    _, student, _, _ = stirred("flux-schnell")
    assert [name.split(".")[1] for name in early(student.network)] == [
        "transformer_blocks",
        "transformer_blocks",
        "single_transformer_blocks",
    ]


def gradient(student: Denoiser, asked: tuple, r: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a jump to r, while another to t was recorded after it."""
    student.zero_grad()
    answer = student(*asked, end=r).raw
    student(*asked, end=asked[1])
    answer.square().mean().backward()
    # Data-parallel training waits for every gradient that is wanted.
    wanted = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
    assert not [name for name, grad in wanted.items() if grad is None]
    return {name: grad.clone() for name, grad in wanted.items()}


@EACH
def test_gradients_reach_all_and_are_the_same_computed_again(variant):
    _, student, asked, r = stirred(variant)
    student.requires_grad_(True)
    plain = gradient(student, asked, r)
    assert sum(float(each.abs().sum()) for each in plain.values()) > 0
    model = student.network.model
    if student.network.uncheckpointed or not model._supports_gradient_checkpointing:
        return
    model.enable_gradient_checkpointing()
    again = gradient(student, asked, r)
    model.disable_gradient_checkpointing()
    for name, expected in plain.items():
        torch.testing.assert_close(again[name], expected, rtol=1e-4, atol=1e-6, msg=name)


@EACH
def test_forward_mode_runs_through_a_jump_and_agrees_with_differences(variant):
    family, student, (x, t, cond), r = stirred(variant)
    student = student.clone().double()
    x, cond = x.double(), map_cond(lambda c: c.double() if c.is_floating_point() else c, cond)
    along = (torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double(), torch.ones_like(t))

    def network(x, time):
        return student(x, time, cond, end=r).raw

    value, exact = jvp(network, (x, t), along)
    # SANA's, off its first weights, turns within a hundredth of its time's unit.
    step = fine_step(family.schedule, family.schedule, t, along[1]) / 10
    mean, slope = difference(network, (x, t), along, step)
    torch.testing.assert_close(value, network(x, t).detach(), rtol=1e-5, atol=1e-6)
    assert float((value - mean).norm() / value.norm()) < 1e-2
    # Networks embed their time in float32.
    assert float(exact.norm()) > 0 and float((slope - exact).norm() / exact.norm()) < 2e-2


@EACH
def test_dmf_trains_every_network(variant):
    assert not refused(variant, "dmf")


@pytest.mark.slow
@pytest.mark.parametrize("variant", tiny.VARIANTS)
@pytest.mark.parametrize("name", ["meanflow", "imf", "anyflow"])
def test_methods_that_embed_an_end_train_every_network_by_depth(variant, name):
    one = {"guidance_low": 2.0, "guidance_high": 2.0, "tell_guidance": False}
    told = {"end_by": "depth"} | ({} if name == "meanflow" else one)
    assert not refused(variant, name, **({"flow_map": told} if name == "anyflow" else told))


@pytest.mark.parametrize("variant", ["dit", "flux-dev"])
def test_a_student_leaves_and_comes_back_told_two_times(variant, tmp_path):
    family = family_of(variant)
    sampler = exported(family, worlds.method("dmf", steps=(2,)), tmp_path / "student", {"teacher": variant})
    assert (
        "No diffusers scheduler tells the network the time its jump ends at"
        in (tmp_path / "student/README.md").read_text()
    )
    assert_comes_back(tmp_path / "student", sampler, TOLD[family.conditions], [3, 4], steps=2)


def test_a_face_of_ones_own_that_does_not_say_so_is_told_no_end():
    class Plain(TransformerFace):
        def forward(self, x_t, t, cond):
            return x_t

    assert "end_by_depth" not in Plain(nn.Identity()).extras
    family = family_of("dit")
    with pytest.raises(
        UserError, match=r"cannot be told the 'end' .*; set end_by=depth if the method has it, or"
    ):
        family.student("teacher", ("end",))
