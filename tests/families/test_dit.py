"""DiT: classes in place of prompts, and a stock pipeline that knows one size and draws from the global generator."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
import worlds
from diffusers import DiffusionPipeline
from models import drawn_by_both, family_of, model_world
from stock import exported

from stepdistill import load
from stepdistill.errors import UserError
from stepdistill.families.dit import DiT


def test_a_class_is_told_and_the_last_one_means_none():
    family = family_of("dit")
    assert (family.conditions, family.classes) == ("class", 1000)
    assert family.encode([3, 999]).tolist() == [3, 999] and family.uncond(2).tolist() == [1000, 1000]
    with pytest.raises(UserError, match="between 0 and 999"):
        family.encode([3, 1000])


def test_its_size_is_its_transformers_alone():
    assert family_of("dit", resolution=[32]).resolution == (32, 32)
    for wrong in ([32, 48], [64]):
        with pytest.raises(UserError, match="32 x 32 pixels alone"):
            family_of("dit", resolution=wrong)


def test_a_student_starts_from_unit_noise_as_its_pipeline_does():
    assert family_of("dit").init_noises == ("unit",)


def test_class_names_come_and_leave_with_the_pipeline(tmp_path):
    path = tmp_path / "teacher"
    shutil.copytree(tiny.directory("dit"), path)
    index = json.loads((path / "model_index.json").read_text())
    index["id2label"] = {"0": "tench, Tinca tinca", "2": "great white shark"}
    (path / "model_index.json").write_text(json.dumps(index))
    family = DiT.from_directory(path)
    assert family.class_names[:3] == ("Tinca tinca, tench", "1", "great white shark")
    student = tmp_path / "student"
    exported(family, worlds.method("dmd2", steps=(1,)), student, {"teacher": str(path)})
    assert load(student).class_names == family.class_names
    stock = DiffusionPipeline.from_pretrained(student)
    assert stock.get_label_ids(["Tinca tinca", "great white shark"]) == [0, 2]


def test_published_directories_call_the_transformer_by_its_old_name(tmp_path):
    path = tmp_path / "old"
    shutil.copytree(tiny.directory("dit"), path)
    for file, key, value in (
        (path / "transformer" / "config.json", "_class_name", "Transformer2DModel"),
        (path / "model_index.json", "transformer", ["diffusers", "Transformer2DModel"]),
    ):
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    ours, theirs = drawn_by_both(DiT.from_directory(path), path, 3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_what_is_trained_hears_the_labels_it_is_told():
    """In training mode its embeddings would drop a tenth of them, each block others."""
    family = family_of("dit")
    x, t = torch.randn(1, *family.shape).expand(64, -1, -1, -1), torch.full((64,), 500.0)
    student = family.student("teacher", ())
    with torch.no_grad():
        raw = student(x, t, family.encode([7] * 64)).raw
    torch.testing.assert_close(raw, raw[:1].expand_as(raw), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["add", "reward"])
def test_what_reads_captions_is_refused_before_the_first_step(name):
    with pytest.raises(UserError, match=r"family\.name=dit: .*reads captions"):
        model_world(family_of("dit"), name)
