"""Lumina-Image 2.0: the system prompt, guidance of each row's length, and the positions it knows."""

from __future__ import annotations

import pytest
import tiny
import torch
import worlds
from diffusers import DiffusionPipeline
from models import family_of
from stock import assert_comes_back, exported

from stepdistill.denoiser import guided
from stepdistill.drawing import Sampler
from stepdistill.errors import UserError
from stepdistill.schedule import times_like

PROMPT, SEED = "a red circle", 5


def test_a_prompt_is_told_behind_the_system_prompt_and_a_negative_one_alone():
    family, plain = family_of("lumina2"), family_of("lumina2", system_prompt="")
    words = {name: int(family.encode([PROMPT])["mask"].sum()) for name in ("own",)}
    words["negative"] = int(family.encode_negative([PROMPT])["mask"].sum())
    words["none"] = int(family.uncond(1)["mask"].sum())
    assert words["none"] < words["negative"] < words["own"]
    # "" = the pipeline's own, longer than the 48 tokens here.
    assert int(plain.encode([PROMPT])["mask"].sum()) == 48


@pytest.mark.parametrize("negative", [None, "two stars"])
def test_a_negative_prompt_and_sides_that_differ_equal_the_stock_pipeline(negative):
    family = family_of("lumina2", resolution=[64, 96])
    stock = DiffusionPipeline.from_pretrained(tiny.directory("lumina2"))
    stock.set_progress_bar_config(disable=True)
    theirs = stock(
        prompt=PROMPT, negative_prompt=negative, num_inference_steps=2, output_type="np",
        generator=torch.Generator().manual_seed(SEED), **family.stock_call(3.0),
    ).images  # fmt: skip
    sampler = Sampler(family, family.teacher, tiny.directory("lumina2"))
    ours = sampler.at(2, 3.0, chunk=1, negative=negative)([PROMPT], [SEED]).permute(0, 2, 3, 1).numpy()
    assert abs(255 * theirs - ours).max() <= 0.51


def test_guidance_leaves_each_row_as_long_as_the_condition_makes_it():
    family = family_of("lumina2")
    x = torch.randn(2, *family.shape)
    t, cond, uncond = times_like([0.3, 0.9], x), family.encode([PROMPT, "two stars"]), family.uncond(2)
    with torch.no_grad():
        plain = family.teacher(x, t, cond).raw
        raw = guided(family.teacher, x, t, cond, uncond, 5.0).raw
    torch.testing.assert_close(raw.norm(dim=-1), plain.norm(dim=-1), rtol=1e-4, atol=1e-5)
    assert float((raw - plain).abs().max()) > 1e-3


def test_a_student_remembers_its_system_prompt(tmp_path):
    family = family_of("lumina2")
    sampler = exported(
        family, worlds.method("dmd2", steps=(1,)), tmp_path / "student", {"teacher": "lumina2"}
    )
    assert_comes_back(tmp_path / "student", sampler, [PROMPT], [SEED], chunk=1)
    assert 'system_prompt="draw"' in (tmp_path / "student/README.md").read_text()


def test_what_it_has_no_positions_for_is_refused():
    for wrong, says in (
        ({"resolution": [72, 64]}, "multiples of 16"),
        ({"resolution": [64, 2048]}, "at most 1024 x 1024 pixels"),
        ({"max_tokens": 512}, "positions for 511 tokens"),
    ):
        with pytest.raises(UserError, match=says):
            family_of("lumina2", **wrong)
