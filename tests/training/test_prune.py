"""`python -m training.prune`: intervals found, distilled, plugged in, exported; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from runs import toy

import stepdistill
from stepdistill.config import dump
from stepdistill.families.flux import Flux
from stepdistill.pruning import Interval
from training.prune import main


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """A FLUX with five single blocks."""
    pipeline = DiffusionPipeline.from_pretrained(tiny.directory("flux-schnell"))
    config = {key: value for key, value in pipeline.transformer.config.items() if not key.startswith("_")}
    torch.manual_seed(0)
    model = type(pipeline.transformer).from_config(config | {"num_single_layers": 5})
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    pipeline.register_modules(transformer=model)
    path = tmp_path_factory.mktemp("pipelines") / "deep"
    pipeline.save_pretrained(path)
    return path


def recipe(out: Path, teacher: Path, name: str = "ppcl", **method) -> Path:
    made = toy(
        out / "run",
        family={"name": "flux", "teacher": str(teacher), "resolution": [32], "max_tokens": 16},
        method={"name": name, **({"calibration": 16} if name == "ppcl" else {}), **method},
        data={"name": "scenes", "size": 24, "resolution": 32},
        optim={"lr": 1e-3, "batch_size": 8},
        run={"steps": 2, "save_every": 1, "trackers": [], "log_every": 1},
        student={"ema": 0.5},
    )
    path = out / "prune.yaml"
    path.write_text(dump(made))
    return path


@pytest.mark.usefixtures("short_runs")
def test_planted_blocks_go_and_any_subset_is_loaded_and_exported(tmp_path, deep, capsys):
    path = recipe(tmp_path, deep, remove=2)
    main([str(path), "--find"])
    said = json.loads((tmp_path / "run" / "intervals.json").read_text())
    assert "harm" in capsys.readouterr().err
    removed = sum(Interval.parse(each).removed for each in said["intervals"])
    assert removed == 2 and all(0 <= each["harm"] <= 1 for each in said["found"])
    assert not (tmp_path / "run" / "student").exists()
    main([str(path)])
    student = tmp_path / "run" / "student"
    assert json.loads((student / "stepdistill.json").read_text())["kind"] == "teacher"
    config = json.loads((student / "transformer" / "config.json").read_text())
    assert config["num_single_layers"] + config["num_layers"] == 5
    sampler, plugged = stepdistill.load(student), stepdistill.load(deep, intervals=student / "intervals")
    x_t, t = torch.randn(1, *sampler.family_.shape), torch.tensor([0.5])
    # The teacher of the run has the size its recipe asks for.
    family = Flux(Flux.Config(teacher=str(deep), resolution=(32,), max_tokens=16))
    cond = family.encode(["a red circle"])
    ours, theirs = (each.denoiser(x_t, t, cond).raw for each in (plugged, sampler))
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, family.teacher(x_t, t, cond).raw)
    main([str(path), "--export", str(tmp_path / "some"), "--plug", ",".join(said["intervals"])])
    again = stepdistill.load(tmp_path / "some")
    torch.testing.assert_close(again.denoiser(x_t, t, cond).raw, theirs)
    # A pruned pipeline is a teacher as any other.
    assert Flux(Flux.Config(teacher=str(student), resolution=(32,), max_tokens=16)).teacher is not None


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize(
    ("method", "arguments", "why"),
    [
        ({"remove": 20}, [], "method.remove=20: this teacher's intervals are"),
        ({"intervals": ["single_transformer_blocks.3-7"]}, [], "goes beyond block 4"),
        ({"intervals": ["single_transformer_blocks.1-3"]}, ["--export", "x"], "go together"),
        (
            {"intervals": ["single_transformer_blocks.1-3"]},
            ["--export", "x", "--plug", "single_transformer_blocks.0-1"],
            "holds no intervals yet",
        ),
        (
            {"intervals": ["single_transformer_blocks.1-3"]},
            ["student.lora.rank=2"],
            "PPCL trains whole blocks",
        ),
        ({"name": "pretrain"}, [], "by a recipe of one method, ppcl"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_exit_code_2(tmp_path, deep, capsys, method, arguments, why):
    path = recipe(tmp_path, deep, **method)
    with pytest.raises(SystemExit) as caught:
        main([str(path), *arguments])
    said = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and said[-1].startswith("error: ") and why in said[-1]
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.usefixtures("short_runs")
def test_a_unet_is_refused_by_the_reason(tmp_path, tiny_sd, capsys):
    made = toy(
        tmp_path / "run",
        family={"name": "sd", "teacher": str(tiny_sd)},
        method={"name": "ppcl"},
        data={"name": "scenes", "size": 24, "resolution": 16},
    )
    path = tmp_path / "prune.yaml"
    path.write_text(dump(made))
    with pytest.raises(SystemExit) as caught:
        main([str(path)])
    assert caught.value.code == 2 and "those of a UNet differ in size" in capsys.readouterr().err
