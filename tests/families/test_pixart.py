"""PixArt: sizes that alpha is told at 1024 pixels and Sigma is not, prompts at their own length."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from models import asked_for, drawn_by_both, family_of
from tiny.pixart import build

from stepdistill.drawing import Sampler
from stepdistill.errors import UserError
from stepdistill.families.pixart import PixArt


@pytest.fixture(scope="module")
def told_sizes(tmp_path_factory):
    """Of sample_size 128, at which alpha's pipeline tells its network the image's size."""
    path = tmp_path_factory.mktemp("alpha") / "teacher"
    torch.manual_seed(0)
    build(sigma=False, sample_size=128).save_pretrained(path)
    return path


def changed(teacher, path, **settings):
    shutil.copytree(teacher, path)
    file = path / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return path


def test_alpha_is_told_the_size_of_its_image(told_sizes):
    family = PixArt.from_directory(told_sizes, {"resolution": [32, 48]})
    cond = family.encode(["a red circle"])
    assert cond["resolution"].tolist() == [[32, 48]] and cond["aspect_ratio"].item() == pytest.approx(2 / 3)
    assert {key: value.shape for key, value in family.uncond(3).items()} == {
        key: (3, *value.shape[1:]) for key, value in cond.items()
    }
    ours, theirs = drawn_by_both(family, told_sizes, 3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    x, t = torch.randn(1, *family.shape), torch.tensor([500.0])
    elsewhere = cond | {"resolution": cond["resolution"] + 300}
    assert not torch.allclose(family.teacher(x, t, cond).raw, family.teacher(x, t, elsewhere).raw)


def test_what_it_is_told_of_sizes_is_not_rounded_to_half_precision(told_sizes):
    family = PixArt.from_directory(told_sizes, {"resolution": [32, 48]}, torch.bfloat16)
    heard, embedding = [], family.teacher.network.transformer.adaln_single.emb
    embedding.additional_condition_proj.register_forward_pre_hook(lambda _, told: heard.append(told[0]))
    sampler = Sampler(family, family.teacher, told_sizes, dtype=torch.bfloat16)
    sampler(["a red circle"], [5], steps=1, guidance_scale=1.0, chunk=1)
    assert heard[0].tolist() == [32, 48]
    assert heard[1].item() == pytest.approx(2 / 3, rel=1e-6)


@pytest.mark.parametrize("variant", ["pixart-alpha", "pixart-sigma"])
def test_prompts_have_the_pipelines_own_length_unless_asked(variant):
    family = family_of(variant)
    length = 300 if "sigma" in variant else 120
    assert family.encode(["a red circle"])["prompt"].shape[1] == length
    assert family.stock_call(1.0)["max_sequence_length"] == length
    short = family_of(variant, max_tokens=12)
    assert short.encode(["a red circle"])["prompt"].shape[1] == 12 and short.settings["max_tokens"] == 12


def test_a_network_that_its_pipeline_cannot_tell_all_is_refused_by_its_field(told_sizes, tmp_path):
    sigma = tmp_path / "sigma"
    pipeline = build(sigma=True, sample_size=128)
    pipeline.transformer = build(sigma=False, sample_size=128).transformer
    pipeline.save_pretrained(sigma)
    with pytest.raises(UserError, match="use_additional_conditions in transformer/"):
        PixArt.from_directory(sigma)


def test_the_first_half_of_the_outputs_is_the_teachers():
    family = family_of("pixart-sigma")
    whole = family.pipeline.transformer
    assert whole.config.out_channels == 2 * whole.config.in_channels
    x, t, cond = torch.randn(1, *family.shape), torch.tensor([500.0]), family.encode(["a red circle"])
    raw = family.teacher(x, t, cond).raw
    assert raw.shape == x.shape
    # The variance's half moves, and nothing does with it.
    student = family.teacher.clone().requires_grad_(False)
    bias = student.network.transformer.proj_out.bias.reshape(4, 8)
    bias[:, 4:].add_(1)
    torch.testing.assert_close(student(x, t, cond).raw, raw, rtol=0, atol=1e-6)
    bias[:, :4].add_(1)
    torch.testing.assert_close(student(x, t, cond).raw, raw + 1, rtol=0, atol=1e-6)


def test_published_directories_call_the_transformer_by_its_old_name(tmp_path):
    path = changed(tiny.directory("pixart-alpha"), tmp_path / "old", _class_name="Transformer2DModel")
    index = json.loads((path / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "Transformer2DModel"]
    (path / "model_index.json").write_text(json.dumps(index))
    ours, theirs = drawn_by_both(PixArt.from_directory(path), path, 3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_sides_are_whole_patches():
    with pytest.raises(UserError, match="multiples of 8"):
        family_of("pixart-alpha", resolution=[36, 32])
    family = family_of("pixart-sigma", resolution=[32, 48])
    stock = DiffusionPipeline.from_pretrained(tiny.directory("pixart-sigma"))
    stock.set_progress_bar_config(disable=True)
    images = stock(
        num_inference_steps=2, output_type="pt", **asked_for(family), **family.stock_call(1.0)
    ).images
    assert images.shape == (2, 3, 32, 48)
