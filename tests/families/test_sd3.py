"""Stable Diffusion 3: T5, positions and schedulers."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from models import TOLD, drawn_by_both, family_of
from stock import assert_comes_back, exported
from worlds import method

from stepdistill.errors import UserError
from stepdistill.families.sd3 import SD3


def test_t5_is_told_behind_the_clips_states_and_is_zeros_where_there_is_none():
    whole, without, left_out = family_of("sd3"), family_of("sd3-no-t5"), family_of("sd3", t5=False)
    for family in (whole, without, left_out):
        cond = family.encode(TOLD["prompt"])
        assert cond["prompt"].shape == (2, 77 + 16, 32) and cond["pooled"].shape == (2, 32)
        assert bool(cond["prompt"][:, 77:].any()) == (family is whole)
    assert "text_encoder_3" not in left_out.modules() and "text_encoder_3" in whole.modules()


def test_a_student_trained_without_t5_leaves_without_and_comes_back(tmp_path):
    directory = tmp_path / "student"
    sampler = exported(family_of("sd3", t5=False), method("dmd2", steps=(1,)), directory, {"teacher": "sd3"})
    assert not (directory / "text_encoder_3").exists()
    assert "text_encoder_3=None, tokenizer_3=None" in (directory / "README.md").read_text()
    assert_comes_back(directory, sampler, ["a red circle"], [5], chunk=1)


def test_half_of_t5_is_refused_by_its_name(tmp_path):
    directory = shutil.copytree(tiny.directory("sd3"), tmp_path / "sd3")
    index = json.loads((directory / "model_index.json").read_text())
    index["tokenizer_3"] = [None, None]
    (directory / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks tokenizer_3 .*family.t5=false"):
        SD3.from_directory(directory)
    assert SD3.from_directory(directory, {"t5": False, "max_tokens": 16}).teacher is not None


def test_sides_differ_and_end_where_its_positions_do():
    family = family_of("sd3", resolution=[32, 64])
    ours, theirs = drawn_by_both(family, tiny.directory("sd3"), 3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="multiples of 8"):
        family_of("sd3", resolution=[32, 36])
    with pytest.raises(UserError, match="at most 64 x 64 pixels"):
        family_of("sd3", resolution=[32, 72])
