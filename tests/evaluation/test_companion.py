"""The seeds' diversity stands beside every distance, measured as its own protocol says and named after that."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import run_command, tiny_extractor
from torch import Tensor

from app import results as app_results
from evaluation import compare, evaluate, report
from evaluation import protocol as protocols
from evaluation.__main__ import main
from evaluation.companion import parts
from evaluation.protocol import PROTOCOLS
from evaluation.references import SceneReference
from evaluation.values import readings
from stepdistill import scenes
from stepdistill.errors import UserError

SCENES, SEEDS = PROTOCOLS["scenes-2k"], PROTOCOLS["scenes-seeds"]


def shares(metrics: list[str], n: int, protocol=SCENES) -> list[tuple]:
    return [(part.protocol.name, part.metrics, part.n) for part in parts(protocol, metrics, n)]


def test_what_looks_at_several_images_is_the_companions() -> None:
    assert shares(["fd", "diversity", "clip"], 2000) == [
        ("scenes-2k", ["fd", "clip"], 2000),
        ("scenes-seeds", ["diversity"], 800),
    ]
    # As large a share of the prompts, whole ones, and never fewer than two.
    assert [shares(["fd", "diversity"], n)[1][2] for n in (1000, 500, 510, 24, 5000)] == [
        400,
        200,
        208,
        16,
        800,
    ]
    # Alone it needs none of the protocol's own samples.
    assert shares(["diversity/of_teacher"], 2000) == [("scenes-seeds", ["diversity/of_teacher"], 800)]


def test_without_a_companion_or_a_need_for_one_there_is_one_part() -> None:
    assert shares(["fd", "clip"], 9) == [("scenes-2k", ["fd", "clip"], 9)]
    for protocol in (replace(SCENES, companion=""), SEEDS, replace(SCENES, images_per_prompt=2)):
        assert shares(["fd", "diversity"], 16, protocol) == [(protocol.name, ["fd", "diversity"], 16)]


def test_a_companion_is_drawn_as_the_protocol_is(monkeypatch) -> None:
    assert replace(SCENES, companion="").hash == SCENES.hash
    for change, reason in (
        ({"companion": "scenes-2k"}, "has one image of a prompt"),
        ({"quantise": "floor", "resolution": 32}, "has other resolution and quantise"),
        ({"companion": "scenes-seds"}, "Did you mean 'scenes-seeds'"),
    ):
        with pytest.raises(UserError, match=reason):
            parts(replace(SCENES, **change), ["fd", "diversity"], 9)
    other = replace(SEEDS, name="classes", conditions="classes", classes=3)
    monkeypatch.setitem(protocols.PROTOCOLS, "classes", other)
    with pytest.raises(UserError, match="companion classes, which has other conditions and classes"):
        parts(replace(SCENES, companion="classes"), ["diversity"], 9)


def wanted(prompts, seeds) -> Tensor:
    drawn = [
        scenes.render(scenes.parse_caption(prompt), np.random.default_rng(seed))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)


def test_evaluate_draws_for_both_and_gives_the_numbers_of_each() -> None:
    options = {"extractor": tiny_extractor()}
    both = evaluate(wanted, "scenes-2k", n=60, metrics=("attributes", "diversity"), **options)
    own = evaluate(wanted, "scenes-2k", n=60, metrics=("attributes",), **options)
    beside = evaluate(wanted, "scenes-seeds", n=24, metrics=("diversity",), **options)
    assert (both["n"], both["protocol"]) == (60, own["protocol"])
    for one in (own, beside):
        numbers = {name: value for name, value in one.items() if isinstance(value, float)}
        assert numbers and numbers.items() <= both.items()
    alone = evaluate(wanted, "scenes-2k", n=60, metrics=("diversity",), **options)
    assert alone == beside and alone["protocol"] == "scenes-seeds[n=24, extractor=tiny]"


@pytest.fixture
def results(tmp_path, painters, net, no_plots, monkeypatch) -> dict:
    """With a sweep of the teacher's guidance, and a repeat of the student's noise."""
    small = replace(SEEDS, reference=SceneReference(n=100))
    monkeypatch.setitem(protocols.PROTOCOLS, "scenes-seeds", small)
    more = ["--teacher-guidance", "1,2", "--n", 40, "--metrics", "fd,diversity,attributes"]
    return run_command(tmp_path, net, "--steps", 1, *more, "--seeds", "0,1")


def test_a_run_has_the_numbers_of_both_protocols_in_one_row(results, painters, tmp_path, net) -> None:
    # Two scales at 8 steps and at 1, and the student twice; 16 more of each that is shown or repeated.
    assert (painters["teacher"].drawn, painters["student"].drawn) == (4 * 40 + 2 * 16, 2 * 40 + 2 * 16)
    teacher, few, student = results["rows"]
    apart = run_command(
        tmp_path, net, "--steps", 1, "--teacher-guidance", 2, "--protocol", "scenes-seeds", "--n", 16,
        out=tmp_path / "seeds",
    )  # fmt: skip
    assert teacher["guidance"] == few["guidance"] == 2
    # The companion's own run gives the same.
    for row, other in zip(results["rows"], apart["rows"], strict=True):
        numbers = {name: value for name, value in other["metrics"].items() if name.startswith("diversity")}
        assert numbers and numbers.items() <= row["metrics"].items()
    assert (
        "diversity:tiny/of_teacher" in student["metrics"] and few["metrics"]["diversity:tiny/of_teacher"] > 0
    )
    assert "diversity:tiny/of_teacher" not in teacher["metrics"]
    # A repeat has noise of its own.
    repeated = student["repeats"][0]["metrics"]["diversity:tiny"]
    assert repeated != student["metrics"]["diversity:tiny"]
    assert student["metrics"]["diversity:tiny/mean_of_2"] == pytest.approx(
        (repeated + student["metrics"]["diversity:tiny"]) / 2
    )

    label = apart["protocol"]
    assert label == "scenes-seeds[n=16, extractor=tiny]" and results["protocol"].startswith("scenes-2k[n=40")
    beside = results["companion"]
    assert beside == {
        "protocol": label, "protocol_hash": apart["protocol_hash"], "n": 16, "seeds": apart["seeds"],
        "protocol_definition": apart["protocol_definition"],
    }  # fmt: skip
    assert apart["companion"] is None
    said = {name for name, value in readings(results).items() if value.protocol == label}
    assert said == {name for name in readings(results) if name.startswith("diversity")}


def test_tables_page_and_app_show_it_beside_the_distance(results, tmp_path) -> None:
    heads = report.cells(results)[0][0]
    assert heads[4:8] == [
        "fd:tiny ↓", "fd:tiny/infinity ↓", "diversity:tiny ↑", "diversity:tiny/of_teacher ↑"
    ]  # fmt: skip
    said = f"`diversity:tiny`: protocol `{results['companion']['protocol']}`"
    assert sum(said in fact for fact in report.facts(results)) == 1
    assert said in (tmp_path / "out" / "results.md").read_text()
    page = (tmp_path / "out" / "results.html").read_text()
    assert page.count(results["companion"]["protocol"]) > 1 and "of_teacher" in page
    shown = app_results.read(tmp_path / "out" / "results.json")
    assert shown["companion"] == results["companion"]["protocol"]
    names = ("diversity:tiny/of_teacher", "diversity:tiny/of_teacher/se")
    assert [shown["rows"][2]["metrics"][name] for name in names] == [
        results["rows"][2]["metrics"][name] for name in names
    ]
    (tmp_path / "old.json").write_text(json.dumps(results | {"companion": None}))
    assert app_results.read(tmp_path / "old.json")["companion"] is None


def test_diversities_of_other_numbers_of_seeds_are_told_apart(results, tmp_path) -> None:
    one, other = results | {"label": "one"}, json.loads(json.dumps(results)) | {"label": "other"}
    assert "seeds' diversity" not in compare.text([one, other])
    other["companion"]["protocol"] = "scenes-seeds[n=8]"
    warning = "diversity is of scenes-seeds[n=16, extractor=tiny] and scenes-seeds[n=8]; don't compare"
    assert warning in compare.text([one, other])
    # One without it is compared all the same.
    assert "don't compare" not in compare.text([one, other | {"companion": None}])


def test_what_some_rows_have_stands_behind_what_comes_before_it_there() -> None:
    rows = [{"metrics": {"a": 1, "b": 1, "z": 1}}, {"metrics": {"a": 1, "a2": 1, "b": 1, "c": 1, "z": 1}}]
    assert list(readings({"rows": rows})) == ["a", "a2", "b", "c", "z"]
    assert list(readings({"rows": rows[::-1]})) == ["a", "a2", "b", "c", "z"]


def test_without_a_distance_nothing_is_said_of_its_bias(painters, tmp_path, net) -> None:
    words = ("run", "--pipeline", tmp_path / "student", "--steps", 1, "--metrics", "diversity", "--n", 5)
    main([*map(str, (*words, "--extractor", net, "--out", tmp_path / "out"))])
    warnings = json.loads((tmp_path / "out" / "results.json").read_text())["warnings"]
    assert any("compare them only with others of as many" in warning for warning in warnings)
    assert not any("biased" in warning for warning in warnings)
