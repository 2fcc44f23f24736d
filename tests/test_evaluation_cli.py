"""The command line: a whole run with a tiny teacher and student, and one sentence for every wrong input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import stepdistill
from evaluation import protocol as protocols
from evaluation.__main__ import main
from evaluation.captions import CaptionFile
from evaluation.decoding import Resize
from evaluation.feature_net import FeatureNet
from evaluation.metrics import base
from evaluation.processes import Processes
from evaluation.protocol import PROTOCOLS
from evaluation.references import NamedReference, SceneReference
from evaluation.stats import FeatureStats
from stepdistill import scenes
from stepdistill.errors import UserError


class Painter:
    """Stands for an ImageSampler: renders the caption; fewer steps and other guidance than 2 add noise."""

    resolution, class_names, family, parameters = (
        (64, 64),
        None,
        "sd",
        {"denoiser": 1, "text": 1, "decoder": 1},
    )
    default_steps = 1

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.name, self.kind = path, path.name, kind
        self.steps = (1, 2) if kind == "student" else None
        self.guidance_free = kind == "student"
        self.default_guidance = 1.0 if self.guidance_free else 3.0
        self.card = {"method": "dmd2"} if kind == "student" else {}
        self.conditions = "prompt"
        self.device = torch.device("cpu")
        self.drawn = 0

    def trace(self) -> Painter:
        return self

    def calls(self, guidance: float) -> int:
        return 1 if guidance == 1 else 2

    def __call__(
        self, prompts, seeds, *, steps, guidance_scale, chunk=16, timings=None, on_step=None
    ) -> Tensor:
        self.drawn += len(prompts)
        images = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            rng = np.random.default_rng(seed)
            image = scenes.render(scenes.parse_caption(prompt), rng).astype(float)
            amount = 60 / steps + (0 if self.guidance_free else 60 * abs(guidance_scale - 2))
            images.append(np.clip(image + amount * rng.standard_normal(image.shape), 0, 255).astype(np.uint8))
        for name in ("text", "denoise", "decode"):
            timings is not None and timings.update({name: timings.get(name, 0) + 0.001 * steps})
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("extractor") / "tiny"
    torch.manual_seed(0)
    FeatureNet("tiny", 32, 16, {"label": ["a", "b"]}).save(path)
    return path


@pytest.fixture
def painters(tmp_path, monkeypatch) -> dict[str, Painter]:
    """`stepdistill.load` finds a teacher and a student under tmp_path; the reference is small."""
    found = {}
    for kind in ("teacher", "student"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "model_index.json").write_text("{}")
        found[kind] = Painter(tmp_path / kind, kind)

    def load(path, device="cpu", dtype=torch.float32) -> Painter:
        if Path(path).name not in found:
            raise UserError(f"{path} does not exist.")
        return found[Path(path).name]

    monkeypatch.setattr(stepdistill, "load", load)
    monkeypatch.setattr("evaluation.__main__._quieten", lambda: None)  # spares importing diffusers
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    small = replace(PROTOCOLS["scenes-2k"], reference=SceneReference(n=100))
    monkeypatch.setitem(protocols.PROTOCOLS, "scenes-2k", small)
    return found


def save_images(folder: Path, count: int = 6, size: int = 64) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.fromarray(scenes.image_at(index, 3)[1][:size, :size]).save(folder / f"{index}.png")
    return folder


def refused(capsys, *arguments: object) -> str:
    """The one sentence a wrong command ends with."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message


# -------------------------------------------------------------------------------- run


def run(tmp_path: Path, net: Path, *more: object) -> dict:
    command = [
        "run",
        "--pipeline",
        tmp_path / "student",
        "--teacher",
        tmp_path / "teacher",
        "--teacher-steps",
        8,
    ]
    command += ["--metrics", "fd,attributes,latency", "--extractor", net, "--out", tmp_path / "out"]
    main([str(part) for part in (*command, "--latency-images", 2, *more)])
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_run_compares_students_with_their_teacher(tmp_path, painters, net, capsys) -> None:
    results = run(tmp_path, net, "--teacher-guidance", "1,2,3", "--n", 40)
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
    assert results["protocol"] == "scenes-2k[n=40]" and results["seeds"] == [0, 39]
    assert results["extractor"]["name"] == "tiny" and len(results["extractor"]["sha256"]) == 64
    assert any("biased upwards" in warning for warning in results["warnings"])
    shown = capsys.readouterr().out
    text = (tmp_path / "out" / "results.md").read_text()
    for part in ("fd:tiny", "speed-up", "±", "scenes-2k[n=40]"):
        assert part in shown and part in text
    assert "FID" not in shown
    html = (tmp_path / "out" / "results.html").read_text()
    assert html.count("data:image/png;base64,") == 8 * 5 and "scenes-2k[n=40]" in html
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 1000
    assert [len(row["folds"]["fd:tiny"]) for row in results["rows"]] == [10] * 5

    # The same command again draws nothing but what is timed; --force draws everything.
    drawn = painters["teacher"].drawn
    again = run(tmp_path, net, "--teacher-guidance", "1,2,3", "--n", 40)
    timed = 3 + 4 * 16  # two images and three batches, each after one that warms up
    assert painters["teacher"].drawn - drawn == 3 * timed
    for row, other in zip(results["rows"], again["rows"], strict=True):
        for name in ("fd:tiny", "fd:tiny/se", "attributes/all"):
            assert row["metrics"][name] == other["metrics"][name]
    drawn = painters["teacher"].drawn
    run(tmp_path, net, "--teacher-guidance", "1,2,3", "--n", 40, "--force")
    assert painters["teacher"].drawn - drawn == 3 * 3 * 40 + 3 * timed


def test_run_with_fewer_teacher_samples_compares_the_first_of_both(tmp_path, painters, net) -> None:
    results = run(tmp_path, net, "--teacher-guidance", "2", "--n", 40, "--teacher-n", 24, "--steps", "1")
    teacher, _, student = results["rows"]
    alone = run(tmp_path, net, "--teacher-guidance", "2", "--n", 24, "--steps", "1")["rows"][2]
    assert (teacher["n"], student["n"], student["metrics"]["fd_ratio/n"]) == (24, 40, 24)
    assert student["metrics"]["fd_ratio"] == alone["metrics"]["fd_ratio"]
    assert any("first 24 of both" in warning for warning in results["warnings"])


def test_a_long_sweep_chooses_on_a_subset_and_measures_on_all(tmp_path, painters, net, monkeypatch) -> None:
    monkeypatch.setattr("evaluation.runner.SWEEP_N", 30)
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


def test_a_run_that_fails_keeps_what_is_finished(tmp_path, painters, net, capsys) -> None:
    painter, drawn = painters["student"], painters["student"].__call__

    class Breaking(Painter):
        def __call__(self, prompts, seeds, *, steps, **options) -> Tensor:
            images = drawn(prompts, seeds, steps=steps, **options)
            return images.float() if steps == 2 else images

    painter.__class__ = Breaking
    out, command = tmp_path / "out", ["run", "--pipeline", tmp_path / "student", "--metrics", "fd", "--n", 40]
    command += ["--extractor", net, "--out", out]
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, command)])
    last = capsys.readouterr().err.splitlines()[-1]  # after the progress bars
    assert stopped.value.code == 2 and last.startswith("error: images must be a uint8 tensor")
    results = json.loads((out / "results.json").read_text())
    assert [row["steps"] for row in results["rows"]] == [1] and results["complete"] is False
    assert any("ended early" in warning for warning in results["warnings"])
    painter.__class__ = Painter
    before = painter.drawn
    main([*map(str, command)])
    again = json.loads((out / "results.json").read_text())
    assert again["complete"] and again["rows"][0]["metrics"] == results["rows"][0]["metrics"]
    assert painter.drawn - before == 40  # of two steps; those of one step were kept


def test_a_run_looks_for_all_it_needs_first(tmp_path, painters, net, capsys, monkeypatch) -> None:
    public = replace(
        PROTOCOLS["coco14-30k"], name="public", n=4, captions=CaptionFile("lines", 4), extractor=str(net),
        reference=NamedReference("pictures", 5), quantise="round", resize=Resize(size=32), metrics=("fd", "clip"),
    )  # fmt: skip
    monkeypatch.setitem(protocols.PROTOCOLS, "public", public)
    command = ["run", "--pipeline", tmp_path / "student", "--protocol", "public", "--out", tmp_path / "out"]
    assert "nothing for the reference pictures at" in refused(capsys, *command)
    command += ["--reference", save_images(tmp_path / "five", 5)]
    assert "nothing for the captions lines at" in refused(capsys, *command)
    (tmp_path / "lines.txt").write_text("\n".join(scenes.scene_at(index, 1).caption for index in range(4)))
    command += ["--captions", tmp_path / "lines.txt"]
    monkeypatch.setenv("STEPDISTILL_WEIGHTS", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, command)])
    assert (
        stopped.value.code == 2 and "clip-vit-g14-laion2b" in capsys.readouterr().err
    )  # and where it was looked for
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda place: usage)
        assert "GB are free there; choose another disk" in refused(capsys, *command, "--metrics", "fd")
    assert painters["student"].drawn == 0
    main([*map(str, command), "--metrics", "fd", "--steps", "1"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (
        results["protocol"] == "public"
        and results["reference_n"] == 5
        and len(results["captions_sha256"]) == 64
    )
    assert results["protocol_definition"]["clip_prefix"] == "A photo depicts "
    located = public.located(tmp_path / "five", tmp_path / "lines.txt")
    assert located.scored_captions(1) == ["A photo depicts " + scenes.scene_at(0, 1).caption]


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
    assert (
        extracted.count("the reference") == 1 and "the teacher's samples" not in extracted
    )  # known from its row
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    own, best = rows[-1]["metrics"], rows[0]["metrics"]
    few = rows[1]["metrics"]  # of the same picture as the student's, and paired with the same
    assert rows[1]["role"] == "teacher, few steps"
    assert few["paired:tiny/distance"] == own["paired:tiny/distance"]
    assert own["paired:tiny/distance"] > 0 and "paired:tiny/distance" not in best
    assert own["kid:tiny"] > best["kid:tiny"] and 0 <= own["prdc:tiny/recall"] <= 1
    shown = capsys.readouterr().out
    for heading in ("kid:tiny ↓", "prdc:tiny/precision ↑", "paired:tiny/cosine ↑"):
        assert heading in shown


def test_images_by_kernel_and_neighbours(tmp_path, net, capsys) -> None:
    one, other = save_images(tmp_path / "one", 20), save_images(tmp_path / "other", 30)
    command = ["images", one, "--ref", other, "--extractor", net, "--metrics", "fd,kid,prdc"]
    main([*map(str, command), "-o", str(tmp_path / "r.json")])
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["prdc:tiny/precision"] == 1 and found["kid:tiny"] < 0.01  # the first 20 of the same 30
    main(["stats", str(other), "-o", str(tmp_path / "ref.npz"), "--extractor", str(net)])
    command[3] = tmp_path / "ref.npz"
    assert "the metric 'kid' needs reference_images" in refused(capsys, *command)


def test_another_extractor_is_another_protocol(tmp_path, painters, net) -> None:
    results = run(tmp_path, net, "--teacher-guidance", "2", "--n", 24, "--steps", "1")
    scenes_2k = protocols.PROTOCOLS["scenes-2k"]
    assert results["protocol_hash"] == replace(scenes_2k, extractor="tiny").hash != scenes_2k.hash


def test_picture_has_a_row_per_prompt_and_a_column_per_sampler(tmp_path, painters, capsys) -> None:
    prompt = "a large red star on a black background"
    command = ["picture", "--teacher", tmp_path / "teacher", "--student", tmp_path / "student", "--before"]
    sizes = []
    for prompts in ([prompt], [prompt, "a small cyan circle on a white background"]):
        asked = [part for text in prompts for part in ("--prompt", text)]
        main([*map(str, command), "--out", str(tmp_path / "p.png"), "--student-steps", "1,2", *asked])
        with Image.open(tmp_path / "p.png") as image:
            sizes.append(image.size)
    # teacher, student at 2, student at 1, teacher at 1: each 192 wide
    assert sizes[0][0] == sizes[1][0] > 4 * 192 and sizes[1][1] - sizes[0][1] >= 192
    assert "is a directory" in refused(capsys, *command, "--out", tmp_path)
    assert "--student-steps 4 is not" in refused(
        capsys, *command, "--out", tmp_path / "q.png", "--student-steps", 4
    )


# -------------------------------------------------------------------------------- images, stats, protocols


def test_images_against_a_folder_and_against_statistics(tmp_path, net, capsys) -> None:
    one, other = save_images(tmp_path / "one", 30), save_images(tmp_path / "other", 40)
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


def test_every_io_batch_gives_the_same_distance(tmp_path, net) -> None:
    one, other = save_images(tmp_path / "one", 70), save_images(tmp_path / "other", 40)
    found = []
    for size in (1, 7, 64):
        command = [
            "images",
            one,
            "--ref",
            other,
            "--extractor",
            net,
            "--io-batch",
            size,
            "-o",
            tmp_path / "r.json",
        ]
        main([*map(str, command)])
        found.append(json.loads((tmp_path / "r.json").read_text()))
    for result in found:
        assert (result["fd:tiny"], result["fd:tiny/se"]) == (found[0]["fd:tiny"], found[0]["fd:tiny/se"])


def test_doubts_about_two_sets(tmp_path, net, capsys) -> None:
    def doubted(*more: object) -> str:
        main(
            [*map(str, ("images", tmp_path / "one", "--ref", tmp_path / "other", "--extractor", net, *more))]
        )
        return capsys.readouterr().out

    save_images(tmp_path / "one", 30)
    (tmp_path / "other").mkdir()
    for index in range(30):
        pixels = Image.fromarray(scenes.image_at(100 + index, 3)[1])
        pixels.resize((80, 80)).save(tmp_path / "other" / f"{index}.jpg")
    shown = doubted()
    assert "differ in size, 64x64 and 80x80" in shown and "30 of the 30 of the reference are JPEG" in shown
    assert "30 images are few" in shown and "same pixels" not in shown and "without colour" not in shown
    shutil.copy(tmp_path / "one" / "3.png", tmp_path / "one" / "copy.png")
    Image.new("L", (64, 64), 7).save(tmp_path / "one" / "grey.png")
    shutil.rmtree(tmp_path / "other")
    save_images(tmp_path / "other", 9)
    shown = doubted()
    for part in ("1 of 32 images have the same pixels", "1 of 32 images are stored without colour",
                 "9 different images are in both sets", "no more images than the 16 features"):  # fmt: skip
        assert part in shown


def test_images_as_a_protocol_wants_them(tmp_path, net, capsys, monkeypatch) -> None:
    """Mixed sizes are brought to one by the protocol, on both sides, and the result carries its hash."""
    protocol = replace(
        PROTOCOLS["coco14-30k"], name="mine", resize=Resize("centre", 32, "box"), n=20,
        captions=CaptionFile("c", 20), reference=NamedReference("r", 20, Resize("centre", 32, "box")),
    )  # fmt: skip
    monkeypatch.setitem(protocols.PROTOCOLS, "mine", protocol)
    for name in ("one", "other"):
        save_images(tmp_path / name, 19)
        Image.new("RGB", (64, 40), (5, 9, 200)).save(tmp_path / name / "wide.png")
    command = ["images", tmp_path / "one", "--ref", tmp_path / "other", "--extractor", net]
    assert "is 64x40 but" in refused(capsys, *command)
    main([*map(str, command), "--protocol", "mine", "-o", str(tmp_path / "r.json")])
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["fd:tiny"] < 1e-8 and (found["protocol"], found["protocol_hash"]) == ("mine", protocol.hash)
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


def test_fid_is_of_inception_unless_an_extractor_is_named(tmp_path, capsys, monkeypatch) -> None:
    for name in ("STEPDISTILL_WEIGHTS", "STEPDISTILL_CACHE", "TORCH_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    one = save_images(tmp_path / "one", 4)
    message = refused(capsys, "images", one, "--ref", one, "--metrics", "fid,kid,prdc")
    for part in ("inception-2015 (96 MB", str(tmp_path / "nothing"), "get them on any machine with `curl"):
        assert part in message


def test_a_run_doubts_a_reference_unlike_its_samples(tmp_path, net, monkeypatch) -> None:
    from evaluation.images import open_images
    from evaluation.protocol import real_images
    from evaluation.runner import _Session

    session = _Session(tmp_path, 1, None, "cpu", False, None, Processes())
    places = {"same": save_images(tmp_path / "same", 3), "odd": tmp_path / "odd"}
    places["odd"].mkdir()
    for index in range(3):
        Image.fromarray(scenes.image_at(index, 3)[1]).resize((80, 72)).save(places["odd"] / f"{index}.jpg")
    said = {}
    for name, place in places.items():
        session.protocol = real_images(place)
        said[name] = session._reference_doubts({(64, 64)})
    assert said["same"] == []
    assert any("samples are 64x64 and the reference 80x72" in doubt for doubt in said["odd"])
    assert any("the reference is JPEG" in doubt for doubt in said["odd"])
    assert open_images(places["odd"]).peek().size == (80, 72)


def test_a_score_of_captions_needs_them_all(tmp_path, net, capsys) -> None:
    one = save_images(tmp_path / "one", 4)
    command = ["images", one, "--ref", one, "--extractor", net, "--metrics", "fd,clip"]
    assert "the metric 'clip' needs captions" in refused(capsys, *command)
    (tmp_path / "c.txt").write_text("a\nb\nc\n")
    assert "has 3 captions for the 4 images" in refused(capsys, *command, "--captions", tmp_path / "c.txt")
    assert "needs captions and timed" in refused(
        capsys, "images", one, "--ref", one, "--extractor", net, "--metrics", "latency"
    )


def test_images_that_cannot_be_measured(tmp_path, net, capsys) -> None:
    good = save_images(tmp_path / "good")

    def wrong(images: Path, *more: object, reference: Path = good) -> str:
        return refused(capsys, "images", images, "--ref", reference, "--extractor", net, *more)

    assert "there is nothing at" in wrong(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "there is no image" in wrong(tmp_path / "empty")
    cut = save_images(tmp_path / "cut")
    (cut / "3.png").write_bytes((cut / "3.png").read_bytes()[:150])
    assert "3.png cannot be read as an image" in wrong(cut)
    mixed = save_images(tmp_path / "mixed")
    Image.new("RGB", (32, 32)).save(mixed / "9.png")
    assert "9.png is 32x32 but" in wrong(mixed)
    assert "at least 2 images, got 1" in wrong(save_images(tmp_path / "single", 1))
    for name, image in (
        ("deep", Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64))),
        ("clear", Image.new("RGBA", (64, 64), (1, 2, 3, 4))),
        ("cmyk", Image.new("CMYK", (64, 64))),
    ):
        odd = save_images(tmp_path / name)
        image.save(odd / f"{name}.{'jpg' if name == 'cmyk' else 'png'}")
        reason = {"deep": "16 bits a channel", "clear": "transparent pixels", "cmyk": "the pixel format"}[
            name
        ]
        assert reason in wrong(odd)
    bomb = save_images(tmp_path / "bomb")
    Image.new("1", (10_000, 10_000)).save(bomb / "bomb.png")  # 100 megapixels in a few kilobytes
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


def test_protocols_are_listed_and_shown(capsys) -> None:
    main(["protocols"])
    assert "scenes-2k" in capsys.readouterr().out
    main(["protocols", "show", "scenes-2k"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["hash"] == PROTOCOLS["scenes-2k"].hash and shown["reference"]["first"] == 10_000
    assert "Did you mean 'scenes-2k'" in refused(capsys, "protocols", "show", "scene-2k")


def test_help_and_exit_code_in_a_process_of_its_own(tmp_path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "evaluation", *arguments], capture_output=True, text=True
        )

    helped = call("run", "--help")
    assert helped.returncode == 0 and "--teacher-guidance" in helped.stdout and "examples:" in helped.stdout
    wrong = call("run", "--pipeline", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    assert wrong.stderr.strip().splitlines()[-1].startswith("error: ") and "nowhere" in wrong.stderr
