"""Student and fake score as adapters over the one teacher: what they learn is what copies of their own would."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import worlds
from models import family_of, model_world

import stepdistill
from stepdistill import export
from stepdistill.denoiser import Denoiser
from stepdistill.drawing import Sampler
from stepdistill.errors import UserError
from stepdistill.lora import LoRA, LoraConfig
from stepdistill.methods.assemble import assemble
from stepdistill.schedule import times_like

PROMPT = "a red circle"


def apart(adapted: LoRA) -> LoRA:
    """The same adapters over a copy of the base."""
    twin = LoRA(copy.deepcopy(adapted.base), adapted.rank, adapted.scale, adapted.targets)
    twin.load_state_dict(adapted.state_dict())
    return twin


def loss_of(student: Denoiser, fake: Denoiser, family) -> torch.Tensor:
    """A student's loss through the fake score, as SIM's and the GAN's are, and the fake score's own."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, *family.shape, generator=generator)
    cond = family.encode([PROMPT, "a blue square"])
    t = times_like(family.schedule.t_max * 0.7, x)
    x0 = student(x, t, cond).x0
    seen = fake(family.schedule.add_noise(x0, x, t), t, cond).x0
    return seen.square().mean() + (x0 * seen.detach()).mean()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", ["sdxl", "flux-schnell"])
def test_gradients_are_those_of_copies_of_their_own(variant, checkpointing):
    family = family_of(variant)
    base = family.teacher
    if checkpointing:
        made = worlds.method("dmd2", fake_score_lora={"rank": 4})
        nets = assemble(made, family, lora=LoraConfig(4), gradient_checkpointing=True)
        student, fake = nets.student, nets.fake_score
        assert base.network.model.is_gradient_checkpointing
    else:
        student, fake = LoraConfig(4).over(base), LoraConfig(4).over(base)
    worlds.stir(student), worlds.stir(fake)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    alone, other = apart(student), apart(fake)
    for copied in (alone, other):
        copied.base.network.model.disable_gradient_checkpointing()
    loss_of(student, fake, family).backward()
    loss_of(alone, other, family).backward()
    for ours, theirs in ((student, alone), (fake, other)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert a.grad is not None and float(b.grad.abs().max()) > 0
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6 * float(b.grad.abs().max()))
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize(("variant", "name"), tiny.one_of_each_family("dmd2"))
def test_adapters_over_one_base_train_on_every_family(variant, name):
    made = model_world(
        family_of(variant), name, lora=LoraConfig(2), fake_score_lora={"rank": 2}, gan_weight=1e-2
    )
    assert isinstance(made.nets.student, LoRA) and made.nets.fake_score.base is made.family.teacher.backbone()
    for phase in made.method.phases(0):
        made.backward(phase, 0, 2)
        for key in phase.trains:
            reached = [p.grad is not None for p in made.nets.modules[key].parameters()]
            assert all(reached) or key == "discriminator", (key, reached)
    assert not any(p.requires_grad or p.grad is not None for p in made.family.teacher.parameters())


def test_a_student_of_adapters_leaves_merged(tmp_path):
    family = family_of("sdxl")
    method = worlds.method("dmd2", steps=(1, 4))
    student = worlds.stir(assemble(method, family, lora=LoraConfig(2, alpha=4.0)).student)
    recipe = {"family": {"teacher": ""}, "method": {"name": "dmd2"}, "run": {"out": "runs/x"}}
    card = export.card_of(family, method, recipe)
    export.write(family, student, tmp_path / "student", card)
    ours = Sampler(family, student, tmp_path, card).at(4, chunk=2).x0([PROMPT, PROMPT], [1, 2])
    theirs = stepdistill.load(tmp_path / "student").at(4, chunk=2).x0([PROMPT, PROMPT], [1, 2])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    plain = Sampler(family, family.teacher, tmp_path, card).at(4, chunk=2).x0([PROMPT, PROMPT], [1, 2])
    assert not torch.allclose(ours, plain, atol=1e-2)


def test_a_stage_goes_on_with_the_adapters_it_was_left_or_says_why_not():
    family, method = family_of("sdxl"), worlds.method("dmd2")
    before = worlds.stir(assemble(method, family, lora=LoraConfig(2)).student)
    after = assemble(method, family, lora=LoraConfig(2), before=before).student
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    whole = assemble(method, family, before=before).student
    x, cond = torch.randn(1, *family.shape), family.encode([PROMPT])
    t = times_like(600.0, x)
    torch.testing.assert_close(whole(x, t, cond).x0, before(x, t, cond).x0, rtol=1e-4, atol=1e-4)
    for lora, left in ((LoraConfig(4), before), (LoraConfig(2), family.student("teacher", ()))):
        with pytest.raises(UserError, match=r"give all stages the same student\.lora"):
            assemble(method, family, lora=lora, before=left)


def test_what_adapters_cannot_be_is_refused():
    family = family_of("sdxl")
    with pytest.raises(UserError, match=r"LCM tells its student guidance"):
        assemble(worlds.method("lcm"), family, lora=LoraConfig(2))
    with pytest.raises(UserError, match=r"student\.init=random"):
        assemble(worlds.method("dmd2"), family, "random", lora=LoraConfig(2))
