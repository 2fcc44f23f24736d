"""Several runs beside one another, published numbers, GenEval's files, and what the doctor finds."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import compare, doctor, geneval, published
from evaluation.__main__ import main
from evaluation.captions import CaptionFile
from evaluation.images import MemoryImages
from evaluation.protocol import PROTOCOLS
from evaluation.references import NamedReference
from stepdistill.errors import UserError

COCO = PROTOCOLS["coco14-30k"]


def saved(folder: Path, *, shift: float = 0.0, seed: int = 0, **changes) -> Path:
    """A run of one student at two step counts, whose distances are 10 + shift, with folds of their own."""
    rng = np.random.default_rng(seed)
    rows = []
    for steps in (1, 4):
        folds = (10 / steps + shift + 0.01 * rng.standard_normal(10)).tolist()
        metrics = {"fd:tiny": 10 / steps + shift, "fd:tiny/se": 0.1}
        rows.append(
            {"role": "student", "name": "student", "steps": steps, "guidance": 1.0, "nfe": steps, "n": 30_000,
             "metrics": metrics, "folds": {"fd:tiny": folds}, "sweep": None}
        )  # fmt: skip
    usual = {
        "format": "stepdistill-results-1", "protocol": COCO.name, "protocol_hash": COCO.hash, "protocol_n": 30_000,
        "n": 30_000, "extractor": {"name": "tiny", "sha256": "0"}, "reference_sha256": "1", "rows": rows,
    }  # fmt: skip
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(usual | changes))
    return folder


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1, message
    return message


# -------------------------------------------------------------------------------- runs


def test_paired_differences_have_the_error_of_the_difference(tmp_path) -> None:
    one, other = (compare.load(saved(tmp_path / str(i), shift=i / 2, seed=i)) for i in range(2))
    found = compare.differences([one, other])
    assert [(entry["steps"], entry["difference"]) for entry in found] == [(1, 0.5), (4, 0.5)]
    left_out = [
        np.subtract(b["folds"]["fd:tiny"], a["folds"]["fd:tiny"])
        for a, b in zip(one["rows"], other["rows"], strict=True)
    ]
    for entry, values in zip(found, left_out, strict=True):
        assert entry["se"] == pytest.approx(np.sqrt(0.9 * ((values - values.mean()) ** 2).sum()))
    # what both have in common cancels, however large the error of each alone is
    (tmp_path / "same").mkdir()
    rows = [row | {"folds": {"fd:tiny": [v + 0.5 for v in row["folds"]["fd:tiny"]]}} for row in one["rows"]]
    (tmp_path / "same" / "results.json").write_text(json.dumps(one | {"rows": rows}))
    assert all(entry["se"] < 1e-12 for entry in compare.differences([one, compare.load(tmp_path / "same")]))


def test_a_run_does_not_differ_from_its_copy(tmp_path, capsys) -> None:
    one = saved(tmp_path / "one")
    shutil.copytree(one, tmp_path / "copy")
    main(["compare", str(one), str(tmp_path / "copy")])
    shown = capsys.readouterr().out
    assert shown.count("+0 ± 0 (0.0 standard errors: no evidence of a difference)") == 2


@pytest.mark.parametrize(
    "change", [{"protocol_hash": "0"}, {"n": 500}, {"extractor": {"name": "t", "sha256": "9"}}, {"reference_sha256": "2"},
     {"captions_sha256": "3"}]
)  # fmt: skip
def test_what_was_measured_otherwise_stands_in_another_table(tmp_path, change, capsys) -> None:
    a, b, c = saved(tmp_path / "a"), saved(tmp_path / "b", shift=1), saved(tmp_path / "c", **change)
    main(["compare", str(a), str(b), str(c)])
    shown = capsys.readouterr().out
    assert shown.count(" (hash ") == 2 and "don't compare" in shown
    assert "b: student minus a: student is +1" in shown and "c: student minus" not in shown
    main(["compare", str(a), str(b)])
    assert "don't compare" not in capsys.readouterr().out


def test_published_numbers_only_beside_their_protocol(tmp_path, capsys) -> None:
    main(["compare", str(saved(tmp_path / "a")), "--published"])
    shown = capsys.readouterr().out
    assert (
        "DMD2, SD 1.5, 1 step: fid 8.35 (tianweiy/DMD2@" in shown
        and "differs: noise is seeded by batches of ten" in shown
    )
    other = replace(COCO, quantise="round").hash
    assert "no published number was" in refused(
        capsys, "compare", saved(tmp_path / "b", protocol_hash=other), "--published"
    )
    assert "has 5000 samples, but" in refused(capsys, "compare", saved(tmp_path / "c", n=5000), "--published")
    assert "at least two runs" in refused(capsys, "compare", tmp_path / "a")
    for entries in published.published().values():
        for entry in entries:
            assert entry["source"] and entry["model"] and entry["steps"] >= 1
            # The code that measured it was read: repository, commit, file.
            assert re.match(r"[\w-]+/[\w-]+@[0-9a-f]{7} \S+\.(py|md)", entry["recipe"])
            assert (
                entry["metrics"].keys() <= {"fid", "patch-fd", "clip"}
                and entry["metrics"].get("clip", 100) > 1
            )
            assert all(value > 0 for value in entry["metrics"].values())


def test_what_are_no_results(tmp_path) -> None:
    with pytest.raises(UserError, match="there are no results at"):
        compare.load(tmp_path)
    for content in (
        "[",
        "[]",
        "{}",
        '{"format": "other", "rows": [1]}',
        '{"format": "stepdistill-results-1", "rows": []}',
    ):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(UserError, match="holds no results"):
            compare.load(tmp_path)


# -------------------------------------------------------------------------------- doctor


def test_the_doctor_says_what_is_there_and_what_not(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STEPDISTILL_REFERENCES", str(tmp_path))
    main(["doctor", "--protocol", "scenes-2k", "--out", str(tmp_path / "not" / "yet")])
    shown = capsys.readouterr().out
    assert "MISSING" not in shown and "torch 2" in shown and "24.6 MB" in shown
    tiny = replace(
        COCO, name="tiny", n=2, captions=CaptionFile("lines", 2), reference=NamedReference("pictures", 3),
        extractor="scenes-v1", clip="",
    )  # fmt: skip
    monkeypatch.setitem(PROTOCOLS, "tiny", tiny)
    assert "see tiny: reference, tiny: captions above" in refused(capsys, "doctor", "--protocol", "tiny")
    (tmp_path / "lines.txt").write_text("a\nb\n")
    (tmp_path / "pictures").mkdir()
    for index in range(3):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "pictures" / f"{index}.png")
    main(["doctor", "--protocol", "tiny"])
    assert str(tmp_path / "pictures") in capsys.readouterr().out
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(1, 1, 1000))
    assert "see tiny: disk above" in refused(capsys, "doctor", "--protocol", "tiny")
    assert "Did you mean 'scenes-2k'" in refused(capsys, "doctor", "--protocol", "scenes-2")


def test_the_doctor_goes_through_every_protocol(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "load_extractor", lambda name: (_ for _ in ()).throw(UserError("none")))
    found = {finding.name: finding for finding in doctor.examine(out=tmp_path)}
    assert {f"{name}: disk" for name in PROTOCOLS} <= set(found)
    assert not found["extractor scenes-v1"].good and not found["coco14-30k: captions"].good


# -------------------------------------------------------------------------------- GenEval


def test_geneval_export_has_the_layout_its_detector_reads(tmp_path) -> None:
    lines = [json.dumps({"tag": "counting", "prompt": text}) for text in ("two cats", "three dogs")]
    (tmp_path / "m.jsonl").write_text("\n".join(lines) + "\n")
    captions = CaptionFile("m", 2).located(tmp_path / "m.jsonl")
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 8, 8)
    assert geneval.export(MemoryImages(images.split(4)), captions, 3, tmp_path / "out") == 2
    for prompt in range(2):
        place = tmp_path / "out" / f"{prompt:05d}"
        assert json.loads((place / "metadata.jsonl").read_text()) == json.loads(lines[prompt])
        assert sorted(file.name for file in (place / "samples").iterdir()) == [
            f"{i:05d}.png" for i in range(3)
        ]
        with Image.open(place / "samples" / "00002.png") as image:
            assert image.getpixel((0, 0)) == (3 * prompt + 2,) * 3


def test_geneval_scores_and_their_errors(tmp_path, capsys) -> None:
    def line(tag: str, prompt: str, correct: bool) -> str:
        return json.dumps({"tag": tag, "prompt": prompt, "correct": correct, "filename": "x"})

    outcomes = {"a": (1, 1, 1, 1), "b": (0, 0, 0, 0), "c": (1, 0, 1, 0)}
    entries = [line("counting", prompt, bool(x)) for prompt, group in outcomes.items() for x in group]
    entries += [line("colors", prompt, True) for prompt in "xxyy"]
    (tmp_path / "r.jsonl").write_text("\n".join(entries))
    main(["geneval", "summarise", str(tmp_path / "r.jsonl"), "-o", str(tmp_path / "s.json")])
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["geneval"] == 0.75 and found["geneval/counting"] == 0.5 and found["geneval/colors"] == 1
    # Over prompts.
    assert found["geneval/counting/se"] == pytest.approx(np.std([1, 0, 0.5], ddof=1) / 3**0.5)
    assert found["geneval/se"] == pytest.approx(found["geneval/counting/se"] / 2)
    assert "5 prompts, 16 images" in capsys.readouterr().out
    (tmp_path / "r.jsonl").write_text("{}\n")
    assert "is no file of GenEval: every line needs tag, prompt, correct" in refused(
        capsys, "geneval", "summarise", tmp_path / "r.jsonl"
    )
    assert "cannot be read" in refused(capsys, "geneval", "summarise", tmp_path / "none.jsonl")


def test_geneval_export_from_the_command_line(tmp_path, tiny_sd, monkeypatch, capsys) -> None:
    small = replace(
        PROTOCOLS["geneval"], n=4, captions=CaptionFile("evaluation_metadata", 2), images_per_prompt=2
    )
    monkeypatch.setitem(PROTOCOLS, "geneval", small)
    (tmp_path / "m.jsonl").write_text('{"prompt": "a red star"}\n{"prompt": "a red star"}\n')
    command = [
        "geneval",
        "export",
        "--pipeline",
        tiny_sd,
        "--steps",
        1,
        "--batch",
        2,
        "--out",
        tmp_path / "o",
    ]
    assert "the captions evaluation_metadata at" in refused(capsys, *command)
    main([*map(str, command), "--captions", str(tmp_path / "m.jsonl")])
    pixels = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "o" / "images").rglob("*.png"))]
    assert len(pixels) == 4 and not np.array_equal(pixels[0], pixels[1])
    # The same prompt and the same four seeds.
    assert np.array_equal(pixels[0], pixels[2])
