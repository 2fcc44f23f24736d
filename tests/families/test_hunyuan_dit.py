"""HunyuanDiT: sizes in an order of its own, a grid fitted into that of 512 pixels, and no checkpointing."""

from __future__ import annotations

import pytest
import tiny
import torch
from models import drawn_by_both, family_of
from worlds import method

from stepdistill.errors import UserError
from stepdistill.families.hunyuan_dit import HunyuanDiT
from stepdistill.methods.assemble import assemble


def test_images_need_not_be_square_and_have_sides_of_whole_patches():
    family = family_of("hunyuan_dit", resolution=[64, 96])
    ours, theirs = drawn_by_both(family, tiny.directory("hunyuan_dit"), 3)
    assert ours.shape == (2, 3, 64, 96)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="multiples of 16"):
        family_of("hunyuan_dit", resolution=[64, 72])


def test_sizes_are_original_target_and_crop_as_the_pipeline_says_them():
    cond = family_of("hunyuan_dit", resolution=[64, 96]).encode(["a", "b"])
    assert cond["sizes"].tolist() == [[1024, 1024, 64, 96, 0, 0]] * 2
    assert cond["prompt"].shape[1] == 77 and cond["prompt_2"].shape[1] == 256


def test_it_predicts_v_along_a_table_of_its_own():
    family = family_of("hunyuan_dit")
    assert family.kind == "v" and family.schedule.t_max == 999
    assert float(family.schedule.rho(torch.tensor(999.0))) == pytest.approx(49, rel=0.1)


def test_gradients_that_cannot_be_recomputed_are_refused_before_the_first_step():
    with pytest.raises(UserError, match="this family's network cannot do it"):
        assemble(method("dmd2"), family_of("hunyuan_dit"), gradient_checkpointing=True)


def test_a_network_without_the_variance_that_its_pipeline_drops_is_refused(tmp_path):
    from tiny.hunyuan_dit import build

    build(learn_sigma=False).save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="learn_sigma=false in transformer/"):
        HunyuanDiT.from_directory(tmp_path / "plain")
