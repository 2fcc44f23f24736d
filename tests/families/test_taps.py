"""Blocks that a discriminator taps: features of the image alone, and nothing of the prompt's padding."""

from __future__ import annotations

import pytest
import tiny
import torch
from models import TOLD, family_of, wide

from stepdistill.denoiser import map_cond, parameter_count
from stepdistill.features import block_features

# diffusers adds its mask of 0 and 1 to the scores: padding is only less heard.
BIASED = {"chroma"}
EACH = pytest.mark.parametrize("variant", tiny.one_of_each_family())


def stirred(family):
    """A denoiser off its first weights, of which some are zero, and inputs of two samples: x_t, t, cond."""
    torch.manual_seed(0)
    denoiser = family.teacher.clone().requires_grad_(False)
    for parameter in denoiser.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    t = torch.full((2,), 0.6 * family.schedule.t_max, dtype=torch.float64)
    return denoiser, torch.randn(2, *family.shape), t, family.encode(TOLD[family.conditions])


@EACH
def test_every_block_gives_the_features_of_the_image(variant):
    """Its tokens are of another number than the prompt's."""
    family = wide(variant)
    denoiser, x_t, t, cond = stirred(family)
    blocks = denoiser.blocks
    assert len(blocks) > 1 and denoiser.middle in blocks
    prompt = cond["prompt"] if isinstance(cond, dict) else None
    assert prompt is None or prompt.shape[1] != family.image_tokens
    features = block_features(denoiser, x_t, t, cond, list(blocks))
    others = block_features(denoiser, x_t.flip(-1), t, cond, list(blocks))
    for (name, channels), tapped, other in zip(blocks.items(), features, others, strict=True):
        assert tapped.isfinite().all() and not torch.equal(tapped, other), name
        if tapped.ndim == 4:
            _, width, h, w = tapped.shape
            assert width == channels and h * x_t.shape[-1] == w * x_t.shape[-2], name
        else:
            assert tapped.shape == (2, family.image_tokens, channels), name


@EACH
def test_an_encoder_ends_at_the_middle_block(variant):
    denoiser, x_t, t, cond = stirred(family_of(variant))
    names = list(denoiser.blocks)
    last = names.index(denoiser.middle)
    encoder = denoiser.encoder()
    assert parameter_count(encoder) < parameter_count(denoiser)
    ours = block_features(encoder, x_t, t, cond, names[: last + 1])
    for one, other in zip(ours, block_features(denoiser, x_t, t, cond, names[: last + 1]), strict=True):
        assert torch.equal(one, other)
    ours[-1].square().mean().backward()
    left = {name.rpartition(".")[0] for name, _ in encoder.named_parameters()}
    assert not [name for name in names[last + 1 :] if any(f"{each}.".startswith(f"{name}.") for each in left)]
    # Data-parallel training waits for every gradient that is wanted.
    waiting = [
        name
        for name, parameter in encoder.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    assert waiting == []
    # The middle block itself is trained.
    gradients = [parameter.grad for parameter in encoder.get_submodule(denoiser.middle).parameters()]
    assert any(gradient is not None and bool(gradient.any()) for gradient in gradients)


@EACH
def test_masked_padding_is_no_part_of_a_prompt(variant):
    family = family_of(variant)
    denoiser, x_t, t, cond = stirred(family)
    if not isinstance(cond, dict) or "mask" not in cond or family.name in BIASED:
        pytest.skip("its padding is part of the prompt")
    told, mask = cond["prompt"], cond["mask"][..., None].bool()
    assert bool(mask.any()) and not bool(mask.all())
    raw = denoiser(x_t, t, cond).raw
    padded = cond | {"prompt": torch.where(mask, told, told + torch.randn_like(told))}
    assert torch.equal(denoiser(x_t, t, padded).raw, raw)
    other = cond | {"prompt": torch.where(mask, told + torch.randn_like(told), told)}
    assert not torch.equal(denoiser(x_t, t, other).raw, raw)


@EACH
def test_the_condition_reaches_the_network(variant):
    """Of two samples that differ in it alone, the outputs differ; without one it is a third."""
    family = family_of(variant)
    denoiser, x_t, t, cond = stirred(family)
    x_t = x_t[:1].expand_as(x_t).contiguous()
    one, other = denoiser(x_t, t, cond).raw
    none = denoiser(x_t, t, map_cond(torch.clone, family.uncond(2))).raw[0]
    assert not torch.allclose(one, other) and not torch.allclose(one, none)


@EACH
def test_a_teacher_in_half_precision_speaks_and_its_student_is_whole(variant):
    family, whole = family_of(variant, torch.bfloat16), family_of(variant)
    # Some models load a few of their layers in float32 whatever they are asked.
    kept = getattr(type(family.teacher.network.model), "_keep_in_fp32_modules", None) or ()
    for name, parameter in family.teacher.named_parameters():
        assert parameter.dtype == torch.bfloat16 or any(layer in name for layer in kept), name
    _, x_t, t, cond = stirred(whole)
    with torch.no_grad():
        half = family.teacher(x_t, t, family.encode(TOLD[family.conditions])).x0
        close = whole.teacher(x_t, t, cond).x0
    assert half.dtype == torch.float32 and half.isfinite().all()
    assert float((half - close).norm() / close.norm()) < 0.1
    student = family.teacher.clone()
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    unheard = tuple(f"network.{name}." for name in student.network.unheard)
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad != name.startswith(unheard), name
