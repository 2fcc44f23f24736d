"""`python -m training.train` as a newcomer meets it: wrong input is one sentence and exit code 2."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from training import files
from training.checkpoint import RunDirectory
from training.recipe import load_recipe
from training.train import main
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("short_runs")

ROOT = Path(__file__).resolve().parents[2]
TOY = {
    "family": {"name": "toy", "fit_steps": 2},
    "student": {"steps": [1]},
    "method": {"name": "dmd2", "guidance_scale": 1.0},
    "data": {"name": "toy", "size": 50},
    "optim": {"lr": "1e-3", "batch_size": 8},
    "run": {"steps": 4, "out": "out", "log_every": 1},
}
PROMPT = "a large red star on a black background"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(yaml.safe_dump(TOY))


def stopped(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(lines) == 1, printed.err
    assert "Traceback" not in printed.err
    return lines[0].removeprefix("error: ")


def sd(teacher: Path, **sections: Any) -> str:
    mapping = {**TOY, "family": {"name": "sd", "teacher": str(teacher)}, **sections}
    Path("sd.yaml").write_text(yaml.safe_dump(mapping))
    return "sd.yaml"


def prompts() -> dict[str, str]:
    Path("prompts.txt").write_text(f"{PROMPT}\n\n{PROMPT}\n")
    return {"name": "prompts", "path": "prompts.txt"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", "unknown key optim.learning_rate; did you mean optim.lr?"),
        ("optim.lr=abc", "optim.lr: expected a number, got 'abc'."),
        (
            "optim.fake_scor.lr=1e-3",
            "optim.fake_scor names no network of this run; did you mean optim.fake_score?",
        ),
        ("optim.micro_batch_size=3", "optim.micro_batch_size must be 0 or divide batch_size=8, got 3."),
        ("method=dmd22", "unknown method 'dmd22'. Did you mean 'dmd2'?"),
        ("family.name=tok", "unknown family 'tok'. Did you mean 'toy'?"),
        ("data.name=toys", "unknown data 'toys'. Did you mean 'toy'?"),
        ("data.name=folder", "unknown key data.size; did you mean data.min_size?"),
        ("student.steps=[0]", "student.steps must be different whole numbers of at least 1, got [0]."),
        ("student.steps=[]", "student.steps must be different whole numbers of at least 1, got []."),
        ("student.steps=two", "student.steps[0]: expected a whole number, got 'two'."),
        ("student.init=nowhere", "the family 'toy' has no pipeline directories"),
        ("run.precision=fp16", "run.precision=fp16 needs a GPU, and this run is on the CPU"),
        (
            "run.metric_every=1",
            "run.metric=fd:scenes-v1 cannot be measured on the family 'toy'; choose one of sw1, modes, shares, trace, shape.",
        ),
        ("run.out=toy.yaml", "run.out=toy.yaml is a file; name a directory."),
        ("run.out=toy.yaml/run", "run.out=toy.yaml/run cannot be written to (Not a directory)"),
        ("lr=1", "unknown key lr"),
        ("optim.lr", "'optim.lr' is not an override; write section.key=value"),
    ],
)
def test_wrong_settings(override, message, capsys):
    said = stopped(capsys, "toy.yaml", override)
    assert message in said
    # All else is found before anything is made.
    assert Path("out").exists() == override.startswith("student.init")


@pytest.mark.parametrize(
    "override", ["optim.fake_scor.lr=1", "run.precision=fp16", "run.metric_every=1", "optim.lr=abc"]
)
def test_a_dry_run_finds_what_a_run_would(override, capsys):
    assert stopped(capsys, "toy.yaml", override, "--dry-run") == stopped(capsys, "toy.yaml", override)


def test_wrong_recipes(capsys):
    Path("broken.yaml").write_text("family: {name: toy\nrun: [")
    Path("empty.yaml").write_text("")
    assert "there is no file toi.yaml. Did you mean 'toy.yaml'?" in stopped(capsys, "toi.yaml")
    assert "broken.yaml, line" in stopped(capsys, "broken.yaml")
    assert "empty.yaml: expected sections" in stopped(capsys, "empty.yaml")
    # YAML reads 1e-3 as text.
    assert load_recipe("toy.yaml").optim.lr == 1e-3


def test_wrong_teachers(capsys, tiny_sd):
    said = stopped(capsys, sd(Path("./nowhere"), data=prompts()))
    assert "family.teacher=nowhere: nowhere does not exist" in said
    save_file({"x": torch.zeros(1)}, "other.safetensors")
    said = stopped(capsys, sd(tiny_sd, data=prompts()), "family.lora=[other.safetensors]")
    assert "other.safetensors holds no pairs of LoRA matrices" in said and "family.teacher" not in said
    Path("hollow").mkdir()
    said = stopped(capsys, sd(Path("./hollow"), data=prompts()))
    assert "family.teacher=hollow: hollow is not" in said and "has no model_index.json" in said
    for name, spoil, message in (
        ("cut", lambda file: file.write_bytes(file.read_bytes()[:1000]), "corrupt or cut off"),
        (
            "pickled",
            lambda file: file.rename(file.with_suffix(".bin")),
            "pickled weights, which are never loaded",
        ),
    ):
        shutil.copytree(tiny_sd, name)
        spoil(Path(name) / "unet" / "diffusion_pytorch_model.safetensors")
        assert message in stopped(capsys, sd(Path(f"./{name}"), data=prompts()))
    assert "student.init" in stopped(capsys, sd(tiny_sd, data=prompts()), "student.init=random")
    assert "student.init=./nowhere: nowhere does not exist" in stopped(
        capsys, "sd.yaml", "student.init=./nowhere"
    )


def test_data_that_does_not_fit(capsys, tiny_sd, tiny_pixel):
    assert "'dmd2' needs real images as configured, and data.name=prompts has none" in stopped(
        capsys, sd(tiny_sd, data=prompts()), "method.gan_weight=1e-3"
    )
    assert "needs captions, and data.name=toy has none" in stopped(capsys, sd(tiny_sd))
    scenes = {"name": "scenes", "size": 8}
    assert "data.resolution=64 differs from the family's 16x16; set it to 16, or" in stopped(
        capsys, sd(tiny_sd, data=scenes), "method.gan_weight=1e-3"
    )
    Path("images").mkdir()
    assert "holds no .png, .jpg or .webp file" in stopped(
        capsys, sd(tiny_sd, data={"name": "folder", "path": "images"})
    )
    Path("images/a.png").write_bytes(b"not a picture")
    assert "unreadable image" in stopped(capsys, "sd.yaml")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save("images/b.png")
    assert "needs captions, and data.name=folder has none" in stopped(capsys, "sd.yaml")
    assert "data.path=imagse does not exist" in stopped(capsys, "sd.yaml", "data.path=imagse")
    pixel = {
        **TOY,
        "family": {"name": "pixel", "teacher": str(tiny_pixel)},
        "data": {"name": "folder", "path": "images"},
    }
    Path("pixel.yaml").write_text(yaml.safe_dump(pixel))
    assert "needs classes here, and data.name=folder has no labels" in stopped(capsys, "pixel.yaml")


def test_an_unreadable_image_is_counted_and_the_dry_run_says_so(capsys, tiny_sd):
    files = []
    for value in (0, 100, 200):
        Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save("image.png")
        files.append(Path("image.png").read_bytes())
    table = pa.table({"image": [*files, b"broken", files[0]], "text": [PROMPT, PROMPT, PROMPT, PROMPT, None]})
    pq.write_table(table, "data.parquet")
    data = {"name": "parquet", "path": "data.parquet", "resolution": 16}
    main([sd(tiny_sd, data=data), "method.gan_weight=1e-3", "--dry-run"])
    printed = capsys.readouterr().out
    assert "3 images at 16x16, captions; left out: " in printed and "1 unreadable image" in printed
    assert "lr: 0.001" in printed and "gan_weight: 0.001" in printed
    # Parameters, and those of them that are trained.
    for name in ("student", "fake_score", "discriminator"):
        (row,) = re.findall(rf"^  {name} +([\d,]+) +([\d,]+) ", printed, re.MULTILINE)
        assert row[0] == row[1] != "0", name
    assert re.search(r"memory +\d+ MiB at most, in phase '(student|critic)'", printed)
    assert not Path("out").exists()
    main(["sd.yaml", "method.gan_weight=1e-3", "run.steps=1", "optim.batch_size=2"])
    said = capsys.readouterr().err
    assert "Loading pipeline components" not in said and "exported to out/student" in said
    # The progress bar.
    assert "critic/total=" in said and "images/s=" in said


def test_ctrl_c_keeps_a_checkpoint_and_the_same_command_goes_on(capsys, monkeypatch):
    original = Trainer.train_step

    def train_step(self: Trainer) -> None:
        if self.state.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        with pytest.raises(SystemExit) as end:
            main(["toy.yaml"])
    assert end.value.code == 130 and RunDirectory("out").latest() == 2
    main(["toy.yaml"])
    assert "resuming out at step 2" in capsys.readouterr().err and RunDirectory("out").latest() == 4
    main(["toy.yaml"])
    assert "out is finished at step 4; nothing to do" in capsys.readouterr().err
    assert "holds a run already and run.resume is false" in stopped(capsys, "toy.yaml", "run.resume=false")
    assert "run.out=..." in stopped(capsys, "toy.yaml", "method.student_every=2")
    main(["toy.yaml", "method.student_every=2", "--fresh"])
    assert RunDirectory("out").latest() == 4


def test_a_full_disk_keeps_the_checkpoint_before(capsys, monkeypatch):
    original, calls = files.save_file, []

    def full(tensors: Any, path: str, *rest: Any) -> None:
        calls.append(path)
        # Three networks and the counters of the first checkpoint fit.
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        original(tensors, path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        message = stopped(capsys, "toy.yaml", "run.save_every=1")
    assert message.startswith("the disk is full while writing ")
    assert len(RunDirectory("out").steps()) <= 1
    assert not list(Path("out/checkpoints").glob(".*"))
    main(["toy.yaml", "run.save_every=1"])
    assert RunDirectory("out").latest() == 4


def test_a_directory_that_cannot_be_written_to(capsys, monkeypatch):
    original = Path.mkdir

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        if "out" in self.parts:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert "run.out=out cannot be written to (Permission denied)" in stopped(capsys, "toy.yaml")


def command(
    *arguments: str, launcher: tuple[str, ...] = ("-m",), **options: Any
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *launcher, "training.train", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=280, **options)


def test_as_a_command():
    wrong = command("toy.yaml", "optim.lr=abc")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr == "error: optim.lr: expected a number, got 'abc'.\n"


@pytest.mark.slow
def test_what_a_run_prints_is_its_own(tiny_sd):
    done = command(
        sd(tiny_sd, data=prompts()), "run.preview_every=2", "run.preview_count=1", "optim.batch_size=2"
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    # With what it says of its data, of a teacher of random weights and of a student as bad.
    own = (
        "dmd2:",
        "exported to",
        "1 process ",
        "data prompts",
        "whether the teacher predicts v ",
        "warning W06: ",
    )
    strangers = [line for line in lines if not line.startswith(own)]
    assert strangers == [] and done.stdout == ""


@pytest.mark.slow
def test_the_launcher_with_two_processes():
    config = ROOT / "training" / "accelerate" / "2cpu.yaml"
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(config), "-m")
    done = command("toy.yaml", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert RunDirectory("out").latest() == 4 and "sw1 = " in done.stderr
    assert "2 processes" in done.stderr
