"""One measurement behind run, images, evaluate and the metric in a run: they cannot disagree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import pictures, refused, save_images, save_scenes, tiny_extractor
from PIL import Image
from torch import Tensor

import evaluation
from evaluation.__main__ import main
from evaluation.captions import CaptionFile
from evaluation.decoding import Resize
from evaluation.image_sets import measure_set
from evaluation.images import MemoryImages
from evaluation.measure import measure
from evaluation.metrics import METRICS
from evaluation.metrics.base import Inputs, Metric
from evaluation.protocol import PROTOCOLS
from evaluation.references import NamedReference, SceneReference
from evaluation.values import Value, measured
from stepdistill import scenes
from stepdistill.errors import UserError


def public(folder: Path, count: int = 24) -> dict:
    """A protocol with its own reference, captions, size and patches, as the COCO ones are, and its files."""
    side = Resize("centre", 40, "bicubic")
    protocol = replace(
        PROTOCOLS["coco14-10k"], name="public", n=count, captions=CaptionFile("lines", count), resize=side, patch=32,
        reference=NamedReference("real", count, side), resolution=0, quantise="edm",
    )  # fmt: skip
    save_images(folder / "real", pictures(300, count))
    (folder / "lines.txt").write_text("\n".join(scenes.scene_at(i, 7).caption for i in range(count)))
    return {"protocol": protocol, "reference": folder / "real", "captions": folder / "lines.txt"}


def test_patches_of_samples_and_references_are_both_at_full_resolution(tmp_path, net, monkeypatch) -> None:
    """evaluate() used to take the references' patches after they were resized."""
    given, count = public(tmp_path), 24
    samples = pictures(0, count)
    save_images(tmp_path / "drawn", samples)
    alone = measure_set(
        tmp_path / "drawn", tmp_path / "real", metrics=["patch-fd"], extractor=net, protocol=given["protocol"]
    )
    found = evaluation.evaluate(
        lambda prompts, seeds: samples[list(seeds)], metrics=("patch-fd",), extractor=str(net), **given
    )
    assert found["patch-fd:tiny"] == alone["patch-fd:tiny"]
    assert found["patch-fd:tiny/se"] == alone["patch-fd:tiny/se"]
    # As without any resizing at all.
    bare = measure_set(tmp_path / "drawn", tmp_path / "real", metrics=["patch-fd"], extractor=net)
    assert found["patch-fd:tiny"] == bare["patch-fd:tiny"]


@pytest.mark.parametrize("quantise", ["round", "edm", "floor"])
def test_grey_levels_are_rounded_as_the_protocol_says(quantise, tiny_sd, monkeypatch) -> None:
    """evaluate() used to round as it pleased the sampler."""
    import stepdistill

    protocol = replace(PROTOCOLS["scenes-2k"], quantise=quantise, reference=SceneReference(n=20))
    sampler, seen = stepdistill.load(tiny_sd), []
    # The steps it takes where none are asked for.
    sampler.default_steps = 3

    class Keep(Metric):
        needs = frozenset({"images"})
        values = (Value("keep", better="lower", main=True),)

        def compute(self, inputs: Inputs) -> list[Value]:
            seen.append(torch.cat(list(inputs.images)))
            return measured(self.values, {"keep": 0.0})

    for module in ("companion", "measure"):
        monkeypatch.setattr(f"evaluation.{module}.get_metrics", lambda names: {"keep": Keep()})
    for draws in (sampler, sampler.at(steps=3)):
        measure(draws, protocol, ["keep"], n=3)
    truth = sampler.at(steps=3, quantise=quantise)(protocol.prompts(3), protocol.seeds(3))
    assert torch.equal(seen[0], truth) and torch.equal(seen[1], truth)


def test_a_measurement_leaves_the_precision_of_products_as_it_was(extractor, monkeypatch) -> None:
    """On a GPU it turns TF32 off, and the training run it is made in would go on without."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")

    def sampler(prompts, seeds) -> Tensor:
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        return pictures(0, len(seeds))

    protocol = replace(PROTOCOLS["scenes-2k"], reference=SceneReference(n=4))
    measure(sampler, protocol, ["fd"], n=3, extractor=extractor)
    assert torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("no_plots")
def test_run_images_and_evaluate_give_the_same_bits(tmp_path, painters, net) -> None:
    given = public(tmp_path)
    (tmp_path / "p.yaml").write_text("""\
{name: p, version: 1, n: 24, conditions: captions, captions: {name: lines, n: 24}, metrics: [fd], quantise: round,
 reference: {kind: named, name: real, n: 24, resize: {crop: centre, size: 40, filter: bicubic}},
 resize: {crop: centre, size: 40, filter: bicubic}, patch: 32}
""")
    names = ["fd", "kid", "prdc", "patch-fd"]
    options = ["--protocol", tmp_path / "p.yaml", "--reference", given["reference"], "--extractor", net]
    command = ["run", "--pipeline", tmp_path / "student", "--steps", 1, "--captions", given["captions"]]
    main(
        [str(part) for part in (*command, *options, "--metrics", ",".join(names), "--out", tmp_path / "out")]
    )
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    draw = painters["student"].at(1, 1)
    files = {"reference": given["reference"], "captions": given["captions"]}
    found = evaluation.evaluate(
        draw, str(tmp_path / "p.yaml"), metrics=names, extractor=str(net), batch=7, **files
    )
    captions = given["captions"].read_text().splitlines()
    save_images(tmp_path / "drawn", draw(captions, range(24)))
    alone = measure_set(
        tmp_path / "drawn", given["reference"], metrics=names, extractor=net, protocol=tmp_path / "p.yaml"
    )
    assert len(row["metrics"]) >= 12
    for name, value in row["metrics"].items():
        assert found[name] == value == alone[name], name


def own_data(folder: Path, count: int = 12) -> list[object]:
    """A person's own images and captions, and the options that name them; one image is a JPEG of another size."""
    folder.mkdir()
    for index in range(count):
        Image.fromarray(scenes.image_at(index, 3)[1]).resize((80, 72)).save(folder / f"{index:02d}.jpg")
    (folder / "c.txt").write_text("\n".join(scenes.scene_at(index, 3).caption for index in range(count)))
    return ["--reference", folder, "--captions", folder / "c.txt"]


@pytest.mark.usefixtures("no_plots")
def test_prompts_are_measured_against_ones_own_images_and_captions(tmp_path, painters, net, capsys) -> None:
    command = ["run", "--pipeline", tmp_path / "student", "--steps", 1, "--extractor", net]
    command += ["--metrics", "fd,attributes", "--out", tmp_path / "out"]
    own = own_data(tmp_path / "mine")
    assert "give --captions to draw for" in refused(capsys, *command, *own[:2])
    main([str(part) for part in (*command, *own)])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["protocol"] == "images:mine" and results["n"] == results["reference_n"] == 12
    assert results["prompts"][0] == scenes.scene_at(0, 3).caption and results["captions_sha256"]
    assert results["rows"][0]["metrics"]["attributes/count"] > 0
    assert any("differ in size, 64x64 and 80x72" in doubt for doubt in results["warnings"])
    assert any("12 of the 12 of the reference are JPEG" in doubt for doubt in results["warnings"])
    # Other captions are another protocol; the same elsewhere are the same.
    (tmp_path / "moved.txt").write_text((tmp_path / "mine" / "c.txt").read_text())
    main([str(part) for part in (*command, *own[:3], tmp_path / "moved.txt")])
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["protocol_hash"] == results["protocol_hash"]
    draw = painters["student"].at(1, 1)
    found = evaluation.evaluate(
        draw,
        reference=tmp_path / "mine",
        captions=tmp_path / "mine" / "c.txt",
        extractor=str(net),
        metrics=("fd",),
    )
    assert found["fd:tiny"] == results["rows"][0]["metrics"]["fd:tiny"]


def test_a_reference_like_the_samples_is_not_doubted(tmp_path) -> None:
    from evaluation.facts import doubts_between
    from evaluation.files import open_images

    same, other = (open_images(save_scenes(tmp_path / str(first), 3, first=first)) for first in (0, 3))
    assert list(same) and list(other) and doubts_between(same.facts, other.facts) == []


# A metric that is one class and one line in METRICS.
class Brightness(Metric):
    """`brightness`: the mean grey level, higher is better."""

    needs = frozenset({"images"})
    values = (Value("brightness", better="higher", main=True), Value("brightness/darkest", better="higher"))

    def compute(self, inputs: Inputs) -> list[Value]:
        means = np.concatenate([batch.double().mean((1, 2, 3)).numpy() for batch in inputs.images])
        error = float(means.std(ddof=1) / len(means) ** 0.5)
        return measured(
            self.values,
            {"brightness": (float(means.mean()), error), "brightness/darkest": float(means.min())},
        )


def test_a_metric_is_one_class_and_one_line(tmp_path, painters, net, tiny_sd, monkeypatch, capsys) -> None:
    """It is in the run, its tables, its plots, its files, in evaluate, and watches a training run."""
    from evaluation import report
    from evaluation.values import _declared
    from training.measure import check_metric
    from training.measure import measure as measure_in_run
    from training.sections import RunConfig

    monkeypatch.setitem(METRICS, "brightness", f"{__name__}:Brightness")
    _declared.cache_clear()
    command = ["run", "--pipeline", tmp_path / "student", "--n", 8, "--metrics", "brightness"]
    main([str(part) for part in (*command, "--out", tmp_path / "out")])
    shown, results = capsys.readouterr().out, json.loads((tmp_path / "out" / "results.json").read_text())
    assert "brightness ↑" in shown and "brightness/darkest ↑" in shown
    usual, further = report.cells(results)
    assert "brightness ↑" in usual[0] and further[0][2:] == ["brightness/darkest ↑"]
    page = (tmp_path / "out" / "results.html").read_text()
    assert "<option>brightness</option>" in page and "brightness (higher is better)" in page
    assert (tmp_path / "out" / "pareto.png").is_file()
    # Read back without the line, as a file of a metric of somebody else's.
    monkeypatch.delitem(METRICS, "brightness")
    _declared.cache_clear()
    assert report.cells(results) == [usual, further]
    monkeypatch.setitem(METRICS, "brightness", f"{__name__}:Brightness")
    _declared.cache_clear()

    from stepdistill.loading import load

    # The painters stand in for `stepdistill.load`.
    sampler = load(tiny_sd)
    sampler.default_steps = 3
    run = RunConfig(steps=1, out="x", metric_every=1, metric="brightness", metric_samples=3)
    check_metric(run, sampler.family_)
    found = measure_in_run(run, sampler.family_, sampler)
    alone = evaluation.evaluate(sampler.at(chunk=64), n=3, metrics=("brightness",))
    assert (found.name, found.better, found.value) == ("brightness", "higher", alone["brightness"])
    monkeypatch.undo()
    _declared.cache_clear()


def test_a_set_of_images_is_measured_as_it_is(tmp_path) -> None:
    net = tiny_extractor()
    reference = net.statistics(MemoryImages([pictures(100, 30)]))
    images: Tensor = pictures(0, 30)
    protocol = replace(PROTOCOLS["scenes-2k"], n=30)
    whole = measure(MemoryImages([images]), protocol, ["fd"], extractor=net, reference=reference)
    drawn = measure(
        lambda prompts, seeds: images[list(seeds)],
        protocol,
        ["fd"],
        extractor=net,
        reference=reference,
        batch=4,
    )
    assert whole.numbers == drawn.numbers and whole.n == 30


def test_a_sampler_that_varies_its_size_is_told(net) -> None:
    """It used to end in a traceback of torch.cat."""

    def draw(prompts, seeds):
        return torch.zeros(len(seeds), 3, 32 + 2 * (seeds[0] > 0), 32, dtype=torch.uint8)

    with pytest.raises(UserError, match="the images have two sizes, 32x32 and 32x34"):
        measure(
            draw,
            PROTOCOLS["scenes-2k"],
            ["fd"],
            n=20,
            batch=8,
            extractor=str(net),
            reference=MemoryImages([pictures(0, 9)]),
        )


def test_statistics_instead_of_the_protocols_reference_are_in_the_name(extractor) -> None:
    stats = extractor.statistics(MemoryImages([pictures(0, 40)]))
    found = evaluation.evaluate(
        lambda prompts, seeds: pictures(50, len(seeds)),
        n=20,
        metrics=("fd",),
        extractor=extractor,
        reference=stats,
    )
    assert found["protocol"] == "scenes-2k[n=20, extractor=tiny, other reference]"
