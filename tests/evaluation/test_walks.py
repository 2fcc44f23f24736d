"""From downloaded files to the printed number and what it compares with, one protocol of each kind.

The files are stand-ins: small sets in the layouts of the public ones, and random networks whose checksums are entered
for the published ones'.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import ClassPainter, encoded, random_state
from PIL import Image

import stepdistill
from evaluation import inception, weights
from evaluation import protocol as protocols
from evaluation.__main__ import main
from evaluation.decoding import Resize
from evaluation.protocol import PROTOCOLS
from stepdistill import scenes

N = 24


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """Where weights and references are looked for."""
    for variable in (
        "STEPDISTILL_WEIGHTS",
        "STEPDISTILL_REFERENCES",
        "STEPDISTILL_CACHE",
        "TORCH_HOME",
        "HF_HUB_CACHE",
    ):
        monkeypatch.setenv(variable, str(tmp_path / variable))
        (tmp_path / variable).mkdir()
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / weights.WEIGHTS["inception-2015"].files[0]
    torch.save(random_state(), path)
    return path


@pytest.fixture
def inception_here(places, monkeypatch, inception_file) -> None:
    """The file under its published name, its checksum entered; the network sees 75 pixels, which costs a sixteenth."""
    (places / "STEPDISTILL_WEIGHTS" / inception_file.name).symlink_to(inception_file)
    one, digest = weights.WEIGHTS["inception-2015"], weights.file_sha256(inception_file)
    monkeypatch.setitem(weights.WEIGHTS, "inception-2015", replace(one, sha256=digest[:8]))
    small = {
        name: (functools.partial(resize, side=75), text) for name, (resize, text) in inception.RESIZES.items()
    }
    monkeypatch.setattr(inception, "RESIZES", small)


def entered(monkeypatch, name: str, reference: dict, captions: dict | None = None, **changes) -> None:
    """The protocol, made small."""
    known = PROTOCOLS[name]
    parts = {"reference": replace(known.reference, **reference)}
    if captions:
        parts["captions"] = replace(known.captions, n=N, **captions)
    monkeypatch.setitem(protocols.PROTOCOLS, name, replace(known, n=N, **parts, **changes))


def walked(tmp_path: Path, capsys, name: str, *more: str) -> tuple[dict, str]:
    """doctor, then run; the metrics of the one row, and what was printed."""
    main(["doctor", "--protocol", name, "--out", str(tmp_path)])
    assert "MISSING" not in capsys.readouterr().out
    main(
        [
            "run",
            "--pipeline",
            str(tmp_path / "student"),
            "--protocol",
            name,
            "--steps",
            "1",
            "--out",
            str(tmp_path / "out"),
            *more,
        ]
    )
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    shown = capsys.readouterr().out
    assert f"{name} (hash {PROTOCOLS[name].hash}, n = {N})" in shown
    return row["metrics"], shown


@pytest.mark.usefixtures("no_plots", "inception_here")
def test_classes_against_edms_zip(places, monkeypatch, capsys) -> None:
    entered(monkeypatch, "cifar10-50k", {"n": 30})
    monkeypatch.setattr(stepdistill, "load", lambda path, **_: ClassPainter(Path(path)))
    with zipfile.ZipFile(places / "STEPDISTILL_REFERENCES" / "cifar10-train.zip", "w") as file:
        file.writestr("dataset.json", "{}")
        for index in range(30):
            pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            file.writestr(f"00000/img{index:08d}.png", encoded(Image.fromarray(pixels)))
    numbers, _ = walked(places, capsys, "cifar10-50k", "--metrics", "fid", "--seeds", "0,1")
    assert numbers["fid:inception-2015"] > numbers["fid:inception-2015/min_of_2"] - 1e-9 > 0
    main(["compare", str(places / "out"), "--published"])
    assert (
        "SiD, unconditional, 1 step: fid 1.923 (mingyuanzhou/SiD@01fbb13 README.md" in capsys.readouterr().out
    )


@pytest.mark.usefixtures("no_plots", "inception_here")
def test_captions_against_a_folder_of_jpeg(places, painters, monkeypatch, capsys, clip_directory) -> None:
    lines = [scenes.scene_at(index, 7).caption for index in range(N)]
    pin = hashlib.sha256("\n".join(lines[:20] + lines[-20:]).encode()).hexdigest()
    small, characters = Resize("torchvision", 48), len("\n".join(lines)) + 1
    entered(
        monkeypatch,
        "coco14-30k",
        {"n": 30, "resize": small},
        {"ends": pin, "characters": characters},
        resize=small,
    )
    there = places / "STEPDISTILL_REFERENCES"
    (there / "coco14-30k-captions.txt").write_text("\n".join(lines) + "\n")
    (there / "coco14-val").mkdir()
    for index in range(30):
        image = Image.fromarray(scenes.image_at(index, 9)[1]).resize((80 + index % 3, 60))
        image.save(there / "coco14-val" / f"COCO_val2014_{index * 37:012d}.jpg", quality=95)
    shutil.copytree(clip_directory, places / "STEPDISTILL_WEIGHTS" / "clip-vit-g14-laion2b")
    numbers, shown = walked(places, capsys, "coco14-30k", "--metrics", "fid,clip")
    assert numbers["fid:inception-2015-clean"] > 0 and -100 < numbers["clip:vit-g-14-laion2b"] < 100
    assert "30 of the 30 of the reference are JPEG" in shown
    main(["compare", str(places / "out"), "--published"])
    assert "DMD2, SD 1.5, 1 step: fid 8.35" in capsys.readouterr().out


@pytest.mark.usefixtures("no_plots")
def test_dinov2_against_converted_statistics(places, monkeypatch, capsys) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(places / "STEPDISTILL_WEIGHTS" / "dinov2-vitl14")
    entered(monkeypatch, "imagenet512-50k-dino", {"n": 40}, resolution=32, classes=10)
    monkeypatch.setattr(stepdistill, "load", lambda path, **_: ClassPainter(Path(path)))
    rows = np.random.default_rng(0).standard_normal((40, 8))
    path = places / "STEPDISTILL_REFERENCES" / "imagenet512-train-dino-edm2.npz"
    # As the command that refuse_pickle names makes it of EDM2's pickle.
    np.savez(path, mu=rows.mean(0), sigma=np.cov(rows.T), num_images=40)
    numbers, shown = walked(places, capsys, "imagenet512-50k-dino", "--metrics", "fd")
    assert numbers["fd:dinov2-vitl14"] > 0 and "does not say what made it" in shown
    np.savez(path, mu=rows.mean(0), sigma=np.cov(rows.T), num_images=41)
    with pytest.raises(SystemExit):
        main(
            [
                "run",
                "--pipeline",
                str(places),
                "--protocol",
                "imagenet512-50k-dino",
                "--out",
                str(places / "x"),
                "--metrics",
                "fd",
            ]
        )
    assert "holds statistics of 41 images, but the reference" in capsys.readouterr().err
