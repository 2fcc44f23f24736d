"""`python -m evaluation run` with a painting teacher and student, and one sentence for every wrong input."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import Painter, refused, run_command, save_scenes, without_plots
from torch import Tensor

from evaluation import protocol as protocols
from evaluation.__main__ import main
from evaluation.captions import CaptionFile
from evaluation.decoding import Resize
from evaluation.extractors import load_extractor
from evaluation.measure import measure
from evaluation.metrics import base
from evaluation.protocol import PROTOCOLS
from evaluation.references import NamedReference
from stepdistill import scenes


def run(tmp_path: Path, net: Path, *more: object) -> dict:
    timed = ("--metrics", "fd,attributes,latency", "--latency-images", 2)
    return run_command(tmp_path, net, *timed, *more)


def test_run_compares_students_with_their_teacher(tmp_path, painters, net, capsys, monkeypatch) -> None:
    results = run(tmp_path, net, "--teacher-guidance", "1,2,3", "--n", 24)
    rows = {(row["role"], row["steps"]): row for row in results["rows"]}
    assert list(rows) == [
        ("teacher", 8), ("teacher, few steps", 1), ("teacher, few steps", 2), ("student", 1), ("student", 2)
    ]  # fmt: skip
    teacher, student = rows["teacher", 8], rows["student", 1]
    assert teacher["guidance"] == 2 and [entry["guidance"] for entry in teacher["sweep"]["tried"]] == [
        1,
        2,
        3,
    ]
    assert teacher["metrics"]["fd:tiny"] == min(entry["fd"] for entry in teacher["sweep"]["tried"])
    assert teacher["nfe"] == 16 and student["nfe"] == 1
    ratio = student["metrics"]["fd:tiny"] / teacher["metrics"]["fd:tiny"]
    assert student["metrics"]["fd_ratio"] == pytest.approx(ratio) and ratio > 1
    assert student["metrics"]["fd_ratio/se"] > 0 and student["metrics"][
        "latency/speedup_denoise"
    ] == pytest.approx(8)
    assert results["protocol"] == "scenes-2k[n=24, extractor=tiny]" and results["seeds"] == [0, 23]
    assert results["extractor"]["name"] == "tiny" and len(results["extractor"]["sha256"]) == 64
    assert any("biased upwards" in warning for warning in results["warnings"])
    shown = capsys.readouterr().out
    text = (tmp_path / "out" / "results.md").read_text()
    for part in ("fd:tiny ↓", "latency/speedup ↑", "±", "scenes-2k[n=24, extractor=tiny]"):
        assert part in shown and part in text
    assert "FID" not in shown
    html = (tmp_path / "out" / "results.html").read_text()
    assert html.count("data:image/png;base64,") == 8 * 5 and "scenes-2k[n=24, extractor=tiny]" in html
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 1000
    assert [len(row["folds"]["fd:tiny"]) for row in results["rows"]] == [10] * 5

    # The same command again draws nothing but what is timed: two images each, after one that warms up.
    without_plots(monkeypatch)
    drawn = painters["teacher"].drawn
    again = run(tmp_path, net, "--teacher-guidance", "1,2,3", "--n", 24, "--throughput-batch", 0)
    assert painters["teacher"].drawn - drawn == 3 * 3
    for row, other in zip(results["rows"], again["rows"], strict=True):
        for name in ("fd:tiny", "fd:tiny/se", "attributes/all"):
            assert row["metrics"][name] == other["metrics"][name]
    # --force draws everything: at 8 steps and at 1, at two scales.
    drawn, few = painters["teacher"].drawn, ("--steps", 1, "--throughput-batch", 0)
    run(tmp_path, net, "--teacher-guidance", "1,2", "--n", 24, "--force", *few)
    assert painters["teacher"].drawn - drawn == 2 * 2 * 24 + 2 * 3


@pytest.mark.usefixtures("no_plots")
def test_run_with_fewer_teacher_samples_compares_the_first_of_both(tmp_path, painters, net) -> None:
    few = ("--steps", 1, "--throughput-batch", 0)
    results = run(tmp_path, net, "--teacher-guidance", "2", "--n", 32, "--teacher-n", 24, *few)
    teacher, _, student = results["rows"]
    alone = run(tmp_path, net, "--teacher-guidance", "2", "--n", 24, *few)["rows"][2]
    assert (teacher["n"], student["n"], student["metrics"]["fd_ratio/n"]) == (24, 32, 24)
    assert student["metrics"]["fd_ratio"] == alone["metrics"]["fd_ratio"]
    assert any("first 24 of both" in warning for warning in results["warnings"])


@pytest.mark.usefixtures("no_plots")
def test_a_long_sweep_chooses_on_a_subset_and_measures_on_all(tmp_path, painters, net, monkeypatch) -> None:
    monkeypatch.setattr("evaluation.runs.SWEEP_N", 30)
    results = run(tmp_path, net, "--teacher-guidance", "1,1.5,2,3", "--n", 50, "--steps", "2",
                  "--throughput-batch", 0)  # fmt: skip
    sweep = results["rows"][0]["sweep"]
    assert (sweep["n"], sweep["chosen_on_a_subset"], sweep["chosen"]) == (30, True, 2)
    assert results["rows"][0]["n"] == 50
    # 4 scales of 30, then 20 more of the best, at 8 and at 2 steps; and 2 x 3 timed
    assert painters["teacher"].drawn == 2 * (4 * 30 + 20) + 6
    assert "throughput" not in (tmp_path / "out" / "results.json").read_text()


def test_run_refuses_wrong_input_before_drawing(tmp_path, painters, net, capsys) -> None:
    def wrong(*more: object) -> str:
        out = [] if "--out" in more else ["--out", tmp_path / "out"]
        return refused(capsys, "run", "--pipeline", tmp_path / "student", "--extractor", net, *out, *more)

    assert "at least 2 samples, got 0" in wrong("--n", 0)
    assert "at least 2 samples, got 1" in wrong("--n", 1)
    assert "Did you mean 'attributes'?" in wrong("--n", 9, "--metrics", "fd,attribute")
    assert "--steps 3 is not what" in wrong("--steps", "1,3")
    assert "needs no guidance" in wrong("--guidance", 3)
    assert "--throughput-batch must be at least 0" in wrong("--throughput-batch", -1)
    assert "FID is defined by the extractor inception-2015" in wrong("--n", 9, "--metrics", "fid")
    assert "preprocessor_config.json cannot be read" in wrong(
        "--n", 9, "--metrics", "clip", "--clip", tmp_path
    )
    assert "no protocol 'scenes-3k'" in wrong("--protocol", "scenes-3k")
    assert "--batch must be at least 1" in wrong("--batch", 0)
    assert "does not exist" in wrong("--teacher", tmp_path / "nowhere")
    assert "takes prompts" in wrong("--reference", tmp_path)
    assert "needs the metric 'fd'" in wrong("--teacher", tmp_path / "teacher", "--metrics", "attributes")
    assert "cannot be written to" in wrong(
        "--n", 9, "--out", tmp_path / "student" / "model_index.json" / "out"
    )
    assert painters["student"].drawn == painters["teacher"].drawn == 0


@pytest.mark.usefixtures("no_plots")
def test_a_run_that_fails_keeps_what_is_finished(tmp_path, painters, net, capsys) -> None:
    painter, drawn = painters["student"], painters["student"].draw

    class Breaking(Painter):
        def draw(self, drawer, *given) -> Tensor:
            images = drawn(drawer, *given)
            return images.float() if drawer.steps == 2 else images

    painter.__class__ = Breaking
    out, command = tmp_path / "out", ["run", "--pipeline", tmp_path / "student", "--metrics", "fd", "--n", 40]
    command += ["--extractor", net, "--out", out]
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, command)])
    # After the progress bars.
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and last.startswith("error: images must be a uint8 tensor")
    results = json.loads((out / "results.json").read_text())
    assert [row["steps"] for row in results["rows"]] == [1] and results["complete"] is False
    assert any("ended early" in warning for warning in results["warnings"])
    painter.__class__ = Painter
    before = painter.drawn
    main([*map(str, command)])
    again = json.loads((out / "results.json").read_text())
    assert again["complete"] and again["rows"][0]["metrics"] == results["rows"][0]["metrics"]
    # Of two steps; those of one step were kept.
    assert painter.drawn - before == 40


@pytest.mark.usefixtures("no_plots")
def test_a_run_looks_for_all_it_needs_first(tmp_path, painters, net, capsys, monkeypatch) -> None:
    public = replace(
        PROTOCOLS["coco14-30k"], name="public", n=4, captions=CaptionFile("lines", 4), extractor=str(net),
        reference=NamedReference("pictures", 5), quantise="round", resize=Resize(size=32), metrics=("fd", "clip"),
    )  # fmt: skip
    monkeypatch.setitem(protocols.PROTOCOLS, "public", public)
    command = ["run", "--pipeline", tmp_path / "student", "--protocol", "public", "--out", tmp_path / "out"]
    assert "nothing for the reference pictures at" in refused(capsys, *command)
    command += ["--reference", save_scenes(tmp_path / "five", 5)]
    assert "nothing for the captions lines at" in refused(capsys, *command)
    (tmp_path / "lines.txt").write_text("\n".join(scenes.scene_at(index, 1).caption for index in range(4)))
    command += ["--captions", tmp_path / "lines.txt"]
    monkeypatch.setenv("STEPDISTILL_WEIGHTS", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, command)])
    # And where it was looked for.
    assert stopped.value.code == 2 and "clip-vit-g14-laion2b" in capsys.readouterr().err
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda place: usage)
        assert "GB are free there; choose another disk" in refused(capsys, *command, "--metrics", "fd")
    assert painters["student"].drawn == 0
    main([*map(str, command), "--metrics", "fd", "--steps", "1"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (
        results["protocol"] == "public[extractor=tiny]"
        and results["reference_n"] == 5
        and len(results["captions_sha256"]) == 64
    )
    assert results["protocol_definition"]["clip_prefix"] == "A photo depicts "


@pytest.mark.usefixtures("no_plots")
def test_metrics_that_need_rows_the_reference_or_the_teacher(
    tmp_path, painters, net, capsys, monkeypatch
) -> None:
    command = ["run", "--pipeline", tmp_path / "student", "--extractor", net, "--n", 30, "--steps", 1]
    command += ["--metrics", "fd,kid,prdc,diversity,paired", "--out", tmp_path / "out"]
    assert "'paired' needs --teacher" in refused(capsys, *command)
    teacher = ["--teacher", tmp_path / "teacher", "--teacher-steps", 8, "--teacher-guidance", 2]
    command[command.index("fd,kid,prdc,diversity,paired")] = "fd,kid,prdc,paired"
    extracted: list[str] = []
    inner = base.stored
    monkeypatch.setattr(
        base, "stored", lambda net, images, what: extracted.append(what) or inner(net, images, what)
    )
    main([*map(str, (*command, *teacher))])
    # Known from its row.
    assert extracted.count("the reference") == 1 and "the teacher's samples" not in extracted
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    own, best = rows[-1]["metrics"], rows[0]["metrics"]
    # Of the same picture as the student's, and paired with the same.
    few = rows[1]["metrics"]
    assert rows[1]["role"] == "teacher, few steps"
    assert few["paired:tiny/distance"] == own["paired:tiny/distance"]
    assert own["paired:tiny/distance"] > 0 and "paired:tiny/distance" not in best
    assert own["kid:tiny"] > best["kid:tiny"] and 0 <= own["prdc:tiny/recall"] <= 1
    shown = capsys.readouterr().out
    for heading in ("kid:tiny ↓", "prdc:tiny/precision ↑", "paired:tiny/cosine ↑"):
        assert heading in shown


@pytest.mark.usefixtures("no_plots")
def test_another_extractor_is_another_protocol(tmp_path, painters, net) -> None:
    command = ["run", "--pipeline", tmp_path / "student", "--metrics", "fd", "--n", 9, "--steps", 1]
    main([str(part) for part in (*command, "--extractor", net, "--out", tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    scenes_2k = protocols.PROTOCOLS["scenes-2k"]
    assert results["protocol_hash"] == replace(scenes_2k, extractor="tiny").hash != scenes_2k.hash


@pytest.mark.usefixtures("no_plots")
def test_repeats_give_mean_spread_and_minimum(tmp_path, painters, net) -> None:
    def rows(*more: object) -> list[dict]:
        command = [
            "run",
            "--pipeline",
            tmp_path / "student",
            "--steps",
            1,
            "--n",
            24,
            "--metrics",
            "fd,attributes",
        ]
        main([*map(str, (*command, "--extractor", net, "--out", tmp_path / "out", *more))])
        return json.loads((tmp_path / "out" / "results.json").read_text())["rows"]

    (row,) = rows("--seeds", "0,1,2")
    first, repeats = row["metrics"], [one["metrics"] for one in row["repeats"]]
    values = [metrics["fd:tiny"] for metrics in (first, *repeats)]
    assert len(set(values)) == 3 and [one["seed"] for one in row["repeats"]] == [1, 2]
    assert first["fd:tiny/mean_of_3"] == pytest.approx(np.mean(values))
    assert first["fd:tiny/spread"] == pytest.approx(np.std(values, ddof=1))
    assert first["fd:tiny/min_of_3"] == min(values) and "attributes/all/min_of_3" not in first
    # The first is what a run without repeats gives, the second what one with its noise seeds gives.
    assert rows()[0]["metrics"]["fd:tiny"] == values[0]
    moved = replace(PROTOCOLS["scenes-2k"], first_seed=2000)
    alone = measure(painters["student"].at(1), moved, ["fd"], n=24, extractor=load_extractor(net))
    assert alone.numbers["fd:tiny"] == values[1]


def test_repeats_begin_with_the_protocols_own(tmp_path, painters, net, capsys) -> None:
    command = ["run", "--pipeline", tmp_path / "student", "--extractor", net, "--out", tmp_path / "out"]
    assert "--seeds must begin with 0" in refused(capsys, *command, "--seeds", "1,2")
    assert "--captions-seed draws from captions of one's own" in refused(
        capsys, *command, "--captions-seed", 0
    )
