"""Any checkpoint becomes a student directory, without the data it was trained on."""

from __future__ import annotations

import shutil

import pytest
import torch
from runs import LCM, checkpoint, labelled_images, pixel, same, sd
from safetensors.torch import load_file

import stepdistill
from stepdistill.errors import UserError
from training import run as running
from training.checkpoint import RunDirectory
from training.exporting import export_checkpoint
from training.recipe import recipe_from

pytestmark = pytest.mark.usefixtures("short_runs")


def test_any_checkpoint_can_be_exported(tmp_path, tiny_sd):
    recipe = sd(tmp_path / "run", tiny_sd, "run.steps=3", "run.save_every=1", "run.keep=3", "student.ema=0.9")
    running.run(recipe)
    run = tmp_path / "run"
    RunDirectory(run, keep=3).record_best(2, 0.5)
    unets = {}
    for which, step in (("1", 1), ("best", 2), ("latest", 3)):
        for weights in ("ema", "raw"):
            chosen = sd(run, tiny_sd, "run.steps=3", "student.ema=0.9", f"run.export={weights}")
            said = export_checkpoint(chosen, which)
            target = run / f"student-{step}-{weights}"
            assert said == f"exported to {target}"
            sampler = stepdistill.load(target)
            assert (sampler.kind, sampler.steps) == ("student", (1, 2))
            assert sampler.card.step == step and sampler.card.weights == weights
            unets[step, weights] = load_file(target / "unet" / "diffusion_pytorch_model.safetensors")
    final = load_file(run / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    assert same(unets[3, "ema"], final) and not same(unets[3, "raw"], final)
    assert not same(unets[1, "ema"], final)
    raw = checkpoint(run, 1).tensors["student"]
    name = "conv_in.weight"
    assert torch.equal(unets[1, "raw"][name], raw[f"network.unet.{name}"])
    images = stepdistill.load(run / "student")(["a large red star on a black background"], [0], chunk=1)
    assert images.shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match=r"has checkpoints of steps \[1, 2, 3\]"):
        export_checkpoint(recipe, "newest")
    with pytest.raises(UserError, match=r"no complete checkpoint .*; complete are the steps \[1, 2, 3\]"):
        export_checkpoint(recipe, "7")


def test_a_staged_student_is_exported_with_its_last_method(tmp_path, tiny_sd):
    mapping = sd(tmp_path / "run", tiny_sd).mapping()
    del mapping["method"]
    mapping["stages"] = [
        {"method": {**LCM, "ddim_steps": 4}, "run": {"steps": 1}},
        {"method": {"name": "dmd2"}, "run": {"steps": 1}},
    ]
    del mapping["run"]["steps"]
    running.run(recipe_from(mapping))
    sampler = stepdistill.load(tmp_path / "run" / "student")
    assert sampler.card.method == "dmd2" and sampler.guidance_free and sampler.sampling.inputs == ()
    # The grid its times are taken from is still the one it was first taught.
    assert sampler.sampling.finest == 4
    assert [stage["method"]["name"] for stage in sampler.card.recipe["stages"]] == ["lcm", "dmd2"]


def test_export_needs_no_data(tmp_path, tiny_pixel):
    images = labelled_images(tmp_path / "images")
    recipe = pixel(tmp_path / "run", tiny_pixel, images, "student.ema=0.9")
    running.run(recipe)
    written = tmp_path / "run" / "student"
    shutil.rmtree(images)
    export_checkpoint(recipe, "latest")
    again = tmp_path / "run" / "student-2-ema"
    files = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((written / file).read_bytes() == (again / file).read_bytes() for file in files)
