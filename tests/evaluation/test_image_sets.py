"""`python -m evaluation images` and `stats`, and what is said of sets that cannot be measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fakes import refused, save_scenes
from PIL import Image

from evaluation import protocol as protocols
from evaluation.__main__ import main
from evaluation.captions import CaptionFile
from evaluation.decoding import Resize
from evaluation.feature_net import FeatureNet
from evaluation.protocol import PROTOCOLS
from evaluation.references import NamedReference
from evaluation.stats import FeatureStats


def test_images_by_kernel_and_neighbours(tmp_path, net, capsys) -> None:
    one, other = save_scenes(tmp_path / "one", 20), save_scenes(tmp_path / "other", 30)
    command = ["images", one, "--ref", other, "--extractor", net, "--metrics", "fd,kid,prdc"]
    main([*map(str, command), "-o", str(tmp_path / "r.json")])
    found = json.loads((tmp_path / "r.json").read_text())
    # The first 20 of the same 30.
    assert found["prdc:tiny/precision"] == 1 and found["kid:tiny"] < 0.01
    main(["stats", str(other), "-o", str(tmp_path / "ref.npz"), "--extractor", str(net)])
    command[3] = tmp_path / "ref.npz"
    assert "the metric 'kid' needs reference_images" in refused(capsys, *command)


def test_images_against_a_folder_and_against_statistics(tmp_path, net, capsys) -> None:
    one, other = save_scenes(tmp_path / "one", 30), save_scenes(tmp_path / "other", 40)
    main(["stats", str(other), "-o", str(tmp_path / "ref.npz"), "--extractor", str(net)])
    assert FeatureStats.load(tmp_path / "ref.npz").n == 40
    found = []
    for reference in (other, tmp_path / "ref.npz"):
        main(
            [
                "images",
                str(one),
                "--ref",
                str(reference),
                "--extractor",
                str(net),
                "-o",
                str(tmp_path / "r.json"),
            ]
        )
        found.append(json.loads((tmp_path / "r.json").read_text()))
    assert found[0]["fd:tiny"] == found[1]["fd:tiny"] > 0 and found[0]["reference_n"] == 40
    assert found[0]["fd:tiny/se"] == found[1]["fd:tiny/se"] and found[0]["extractor"] == "tiny"
    assert "fd:tiny" in capsys.readouterr().out
    main(["images", str(one), "--ref", str(one), "--extractor", str(net)])
    assert "compared with themselves" in capsys.readouterr().out


def test_images_as_a_protocol_wants_them(tmp_path, net, capsys, monkeypatch) -> None:
    """Mixed sizes are brought to one by the protocol, on both sides, and the result carries its hash."""
    protocol = replace(
        PROTOCOLS["coco14-30k"], name="mine", resize=Resize("centre", 32, "box"), n=20,
        captions=CaptionFile("c", 20), reference=NamedReference("r", 20, Resize("centre", 32, "box")),
    )  # fmt: skip
    monkeypatch.setitem(protocols.PROTOCOLS, "mine", protocol)
    for name in ("one", "other"):
        save_scenes(tmp_path / name, 19)
        Image.new("RGB", (64, 40), (5, 9, 200)).save(tmp_path / name / "wide.png")
    command = ["images", tmp_path / "one", "--ref", tmp_path / "other", "--extractor", net]
    assert "is 64x40 but" in refused(capsys, *command)
    main([*map(str, command), "--protocol", "mine", "-o", str(tmp_path / "r.json")])
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["fd:tiny"] < 1e-8 and found["protocol"] == "mine[extractor=tiny]"
    assert found["protocol_hash"] == replace(protocol, extractor="tiny").hash
    main(
        [
            "stats",
            str(tmp_path / "other"),
            "-o",
            str(tmp_path / "s.npz"),
            "--extractor",
            str(net),
            "--protocol",
            "mine",
        ]
    )
    main([*map(str, command[:3]), str(tmp_path / "s.npz"), "--extractor", str(net), "--protocol", "mine"])
    assert "fd:tiny 0" in capsys.readouterr().out or found["fd:tiny"] < 1e-8


def test_images_that_cannot_be_measured(tmp_path, net, capsys) -> None:
    good = save_scenes(tmp_path / "good")

    def wrong(images: Path, *more: object, reference: Path = good) -> str:
        return refused(capsys, "images", images, "--ref", reference, "--extractor", net, *more)

    assert "there is nothing at" in wrong(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "there is no image" in wrong(tmp_path / "empty")
    cut = save_scenes(tmp_path / "cut")
    (cut / "3.png").write_bytes((cut / "3.png").read_bytes()[:150])
    assert "3.png cannot be read as an image" in wrong(cut)
    mixed = save_scenes(tmp_path / "mixed")
    Image.new("RGB", (32, 32)).save(mixed / "9.png")
    assert "9.png is 32x32 but" in wrong(mixed)
    assert "at least 2 images, got 1" in wrong(save_scenes(tmp_path / "single", 1))
    for name, image in (
        ("deep", Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64))),
        ("clear", Image.new("RGBA", (64, 64), (1, 2, 3, 4))),
    ):
        odd = save_scenes(tmp_path / name)
        image.save(odd / f"{name}.png")
        assert {"deep": "16 bits a channel", "clear": "transparent pixels"}[name] in wrong(odd)
    bomb = save_scenes(tmp_path / "bomb")
    # 100 megapixels in a few kilobytes.
    Image.new("1", (10_000, 10_000)).save(bomb / "bomb.png")
    assert "bomb.png cannot be read as an image (it has more than 89,478,485 pixels" in wrong(bomb)
    (tmp_path / "ref.pkl").write_bytes(b"")
    assert "ref.pkl is a pickle, which can run any code" in wrong(good, reference=tmp_path / "ref.pkl")
    one = "stats", tmp_path / "single", "-o", tmp_path / "one.npz", "--extractor", net
    assert "statistics need at least 2 images, got 1" in refused(capsys, *one)
    assert not (tmp_path / "one.npz").exists()
    assert "and tiny is in use" in wrong(good, "--metrics", "fid")
    torch.manual_seed(1)
    FeatureNet("other", 32, 16, {"label": ["a", "b"]}).save(tmp_path / "net")
    main(["stats", str(good), "-o", str(tmp_path / "ref.npz"), "--extractor", str(tmp_path / "net")])
    assert "extractor 'other', but 'tiny'" in wrong(good, reference=tmp_path / "ref.npz")
    assert "no statistics file" in wrong(good, reference=tmp_path / "none.npz")
    assert "is a directory" in wrong(good, "-o", tmp_path)


def test_a_score_of_captions_needs_them_all(tmp_path, net, capsys) -> None:
    one = save_scenes(tmp_path / "one", 4)
    command = ["images", one, "--ref", one, "--extractor", net, "--metrics", "fd,clip"]
    assert "the metric 'clip' needs captions" in refused(capsys, *command)
    (tmp_path / "c.txt").write_text("a\nb\nc\n")
    assert "has 3 captions for the 4 images" in refused(capsys, *command, "--captions", tmp_path / "c.txt")
    assert "needs timed" in refused(
        capsys, "images", one, "--ref", one, "--extractor", net, "--metrics", "latency"
    )


def test_fid_is_of_inception_unless_an_extractor_is_named(tmp_path, capsys, monkeypatch) -> None:
    for name in ("STEPDISTILL_WEIGHTS", "STEPDISTILL_CACHE", "TORCH_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    one = save_scenes(tmp_path / "one", 4)
    message = refused(capsys, "images", one, "--ref", one, "--metrics", "fid,kid,prdc")
    for part in ("inception-2015 (96 MB", str(tmp_path / "nothing"), "get them on any machine with `curl"):
        assert part in message
