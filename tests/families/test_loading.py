"""What of a teacher's directory or hub id is read, recorded and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import worlds
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from models import family_of

import stepdistill
from stepdistill import card as cards
from stepdistill import export
from stepdistill.errors import UserError
from stepdistill.families.reading import only_variant
from stepdistill.families.sd import SD
from stepdistill.families.sdxl import SDXL
from training.data.base import Source
from training.run import _cut


@pytest.fixture
def copied(tmp_path):
    """A directory of one's own, of the variant asked for."""

    def copy(variant: str) -> Path:
        return Path(shutil.copytree(tiny.directory(variant), tmp_path / variant))

    return copy


def renamed(directory: Path, suffix: str = ".fp16") -> Path:
    for file in directory.glob("*/*.safetensors"):
        file.rename(file.with_name(f"{file.stem}{suffix}.safetensors"))
    return directory


def test_weights_of_one_variant_alone_are_read(copied):
    directory = renamed(copied("sdxl"))
    assert only_variant(directory) == "fp16" and only_variant(tiny.directory("sdxl")) is None
    a, b = SDXL.from_directory(directory), family_of("sdxl")
    assert all(torch.equal(x, y) for x, y in zip(a.teacher.parameters(), b.teacher.parameters(), strict=True))


def test_a_hub_teacher_is_recorded_with_its_commit(copied, monkeypatch, tmp_path):
    snapshot = tmp_path / "hub" / "snapshots" / ("c0ffee" + "0" * 34)
    shutil.copytree(tiny.directory("sdxl"), snapshot)
    asked = {}

    def download(name, **settings):
        asked.update(settings, name=name)
        return str(snapshot)

    index = json.loads((snapshot / "model_index.json").read_text())
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda name, **settings: index)
    family = SDXL(SDXL.Config(teacher="owner/name", revision="main"))
    assert (asked["name"], asked["revision"], asked["use_safetensors"]) == ("owner/name", "main", True)
    student = family.student("teacher", ())
    recipe = {"family": {"teacher": "owner/name"}, "method": {"name": "dmd2"}, "run": {"out": "runs/x"}}
    export.write(family, student, tmp_path / "student", export.card_of(family, worlds.method("dmd2"), recipe))
    assert cards.required(tmp_path / "student").revision == snapshot.name
    assert f"owner/name at {snapshot.name}" in (tmp_path / "student" / "README.md").read_text()


def test_a_hub_out_of_reach_is_one_sentence_with_a_way_out():
    # The tests are offline.
    with pytest.raises(UserError, match=r"owner/name cannot be loaded: .*`hf download`"):
        SDXL(SDXL.Config(teacher="owner/name"))


def test_the_solver_of_the_teachers_directory_does_not_matter(copied):
    """DPM++ and UniPC with Karras times stand for the table they were configured with."""
    plain = family_of("sdxl").schedule
    for make in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        directory = copied("sdxl")
        pipeline = DiffusionPipeline.from_pretrained(directory)
        make.from_config(pipeline.scheduler.config, use_karras_sigmas=True).save_pretrained(
            directory / "scheduler"
        )
        index = json.loads((directory / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", make.__name__]
        (directory / "model_index.json").write_text(json.dumps(index))
        family = SDXL.from_directory(directory)
        assert family.kind == "eps" and torch.equal(family.schedule.log_rho, plain.log_rho)
        shutil.rmtree(directory)


def test_a_flow_process_on_a_unet_is_refused_before_a_student_cannot_leave(copied):
    directory = copied("sdxl")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(directory / "scheduler")
    index = json.loads((directory / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (directory / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="flow matching, which StableDiffusionXLPipeline cannot sample by"):
        SDXL.from_directory(directory)


def test_prompts_that_are_cut_are_counted():
    words = "red " * 80
    for variant in (
        "sdxl",
        "flux-schnell",
        "chroma",
        "flux2-klein",
        "flux2-dev",
        "qwen-image",
        "z-image",
        "lumina2",
    ):
        family = family_of(variant)
        assert family.cut(["red", words]) == 1 and family.cut(["red"]) == 0 and family.cut([]) == 0, variant


@pytest.mark.parametrize("variant", ["sd3-no-t5", "flux-schnell", "pixart-alpha", "lumina2", "qwen-image"])
def test_less_than_no_tokens_are_refused(variant):
    with pytest.raises(UserError, match=r"max_tokens must be 0 or more, got -1\."):
        family_of(variant, max_tokens=-1)


def test_max_tokens_of_a_t5_that_is_not_there_cut_nothing():
    """StableDiffusion3Pipeline puts that many zeros in its place, and the CLIPs hear the prompt."""
    family = family_of("sd3-no-t5", max_tokens=1)
    assert (
        family.cut(["a small red circle above a large blue square"]) == 0 and family.cut(["red " * 80]) == 1
    )


@pytest.mark.parametrize("variant", ["flux2-klein", "flux2-dev", "qwen-image", "z-image", "lumina2"])
def test_a_prompt_is_cut_at_the_letter_after_the_last_that_is_heard(variant):
    """With all that its pipeline says around it: what is counted as whole is heard to the end."""
    family = family_of(variant)
    longest = max(count for count in range(1, 150) if not family.cut(["e" * count]))
    ends = [family.encode(["e" * (count - 1) + end]) for count in (longest, longest + 20) for end in "ab"]
    heard = [not torch.equal(a["prompt"], b["prompt"]) for a, b in (ends[:2], ends[2:])]
    assert heard == [True, False]


def test_a_tokenizer_without_a_limit_reads_what_its_encoder_has_places_for(tiny_sd, tmp_path):
    directory = Path(shutil.copytree(tiny_sd, tmp_path / "sd"))
    file = directory / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config))
    ours, right = SD.from_directory(directory), SD.from_directory(tiny_sd)
    assert torch.equal(ours.encode(["a red circle"]), right.encode(["a red circle"]))


def test_an_exported_tokenizer_has_a_name_that_older_libraries_know(tiny_sd, tmp_path):
    family = SD.from_directory(tiny_sd)
    recipe = {"family": {"teacher": ""}, "method": {"name": "dmd2"}, "run": {"out": "runs/x"}}
    card = export.card_of(family, worlds.method("dmd2"), recipe)
    export.write(family, family.student("teacher", ()), tmp_path / "student", card)
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    again = stepdistill.load(tmp_path / "student").family_
    assert torch.equal(again.encode(["a red circle"]), family.encode(["a red circle"]))


def test_sizes_are_the_recipes_or_refused():
    family = family_of("sdxl", resolution=[32, 48])
    assert (family.resolution, family.shape) == ((32, 48), (4, 8, 12))
    with pytest.raises(UserError, match=r"family\.resolution=\[30, 32\]: both sides must be multiples of 4"):
        family_of("sdxl", resolution=[30, 32])
    with pytest.raises(UserError, match=r"resolution must be \[height, width\]"):
        family_of("sdxl", resolution=[1, 2, 3])


def test_a_run_says_once_how_many_prompts_are_cut():
    source = Source(None)
    source.captions = ("red " * 80, "a red circle")
    assert _cut(family_of("sdxl"), [source, source]) == "1 of 2 prompts are cut at the tokenizer's limit."
    source.captions = ("a red circle",)
    assert _cut(family_of("sdxl"), [source]) == ""


def test_a_pipeline_under_another_family_is_told_its_own():
    for family, variant, named in ((SDXL, "flux-schnell", "flux"), (SD, "sdxl", "sdxl")):
        with pytest.raises(UserError, match=f"none of the pipelines .*; set family.name={named}."):
            family.from_directory(tiny.directory(variant))
