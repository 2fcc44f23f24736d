"""README and docs: short sentences, and nothing named that is not there."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import yaml
from worlds import gradients, world

from evaluation import report
from stepdistill.errors import UserError
from stepdistill.families import FAMILIES
from stepdistill.methods import METHODS
from training.recipe import SECTIONS, recipe_from

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMING = [*PAGES, ROOT / "CONTRIBUTING.md"]
MOST_WORDS = 30

FENCE = re.compile(r"^```(\w*).*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
OWN = ("app", "assets", "benchmarks", "docs", "evaluation", "stepdistill", "tests", "training")
# A path or pattern below one of the repository's directories, whole.
NAMED = re.compile(rf"(?<![\w./*-])(?:{'|'.join(OWN)})/[\w./*-]+")
MODULE = re.compile(r"(?:python|accelerate launch[^\n`]*?) -m ([\w.]+)")

each = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
each_naming = pytest.mark.parametrize("page", NAMING, ids=lambda page: page.name)


def sentences(text: str) -> Iterator[str]:
    """Of the prose: paragraphs, items of lists and cells of tables, without code blocks."""
    prose = FENCE.sub("\n\n", text)
    prose = re.sub(r"!\[[^\]]*\]\([^)]*\)|\]\([^)]*\)", "", prose)
    prose = re.sub(r"`[^`\n]*`", "CODE", prose)
    # A heading, an item and a row end what stands before them.
    prose = re.sub(r"\n(?=#|- |\* |\d+\. |\|)", "\n\n", prose)
    for paragraph in re.split(r"\n\s*\n", prose):
        for cell in paragraph.split("|"):
            yield from re.split(r"(?<=[.!?])\s+(?=\S)|\n(?=#)", " ".join(cell.split()))


def words(sentence: str) -> int:
    return len([word for word in sentence.split() if re.search(r"\w", word)])


def too_long(text: str) -> list[str]:
    return [each for each in sentences(text) if words(each) > MOST_WORDS]


def missing(page: Path, text: str) -> list[str]:
    """Links and paths of the page that lead nowhere; an example in Python may name a file that is yet to be."""
    text = FENCE.sub(lambda block: "" if block[1] == "python" else block[0], text)
    links = [link for link in LINK.findall(text) if "://" not in link]
    named = [path.rstrip("./") for path in NAMED.findall(text)]
    return [link for link in links if not (page.parent / link).exists()] + [
        path for path in named if not (any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists())
    ]


def unknown_modules(text: str) -> list[str]:
    """Modules that are to be run, and are neither a file here nor installed."""
    found = []
    for name in MODULE.findall(text):
        path = ROOT.joinpath(*name.split("."))
        if name.split(".")[0] in OWN:
            found += [] if path.with_suffix(".py").is_file() or (path / "__main__.py").is_file() else [name]
        elif importlib.util.find_spec(name) is None:
            found.append(name)
    return found


@each
def test_no_sentence_is_long(page):
    assert not too_long(page.read_text())


@each_naming
def test_what_is_linked_or_named_is_there(page):
    assert not missing(page, page.read_text())


@each_naming
def test_modules_that_are_to_be_run_exist(page):
    assert not unknown_modules(page.read_text())


@each_naming
def test_code_blocks_can_be_read(page):
    for language, block in FENCE.findall(page.read_text()):
        if language == "python":
            ast.parse(block)
        elif language == "yaml":
            found = yaml.safe_load(block)
            if {"family", "run"} <= found.keys():
                assert found.keys() <= {*SECTIONS, "stages"}
                recipe_from(found)


def test_the_example_of_a_method_trains_its_student():
    code = next(
        block for kind, block in FENCE.findall((ROOT / "CONTRIBUTING.md").read_text()) if kind == "python"
    )
    names = {"__name__": __name__}
    exec(code, names)
    made = world(names["Mine"](names["Mine"].Config()))
    (phase,) = made.method.phases(0)
    made.backward(phase)
    assert all(gradients(made.nets.student)) and not any(gradients(made.nets.teacher))


def test_tables_of_results_are_those_of_their_files():
    results = (ROOT / "docs" / "results.md").read_text().splitlines()
    for name in ("assets/results/results.md", "assets/results/demo.md", "benchmarks/fair.md"):
        rows = [row for row in (ROOT / name).read_text().splitlines() if row[:1] == "|"]
        assert len(rows) > 2 and set(rows) <= set(results)


def test_the_table_of_the_demo_is_what_is_printed():
    results = json.loads((ROOT / "assets" / "results" / "demo.json").read_text())
    printed = report.table(results).split("\n\n")[0].splitlines()
    blocks = [block.splitlines() for _, block in FENCE.findall((ROOT / "README.md").read_text())]
    (shown,) = (block for block in blocks if block[0].startswith("model "))
    assert len(shown) == len(printed)
    assert all(whole.startswith(line) for whole, line in zip(printed, shown, strict=True))


def test_the_readmes_results_are_those_of_the_benchmark():
    rows = (ROOT / "benchmarks" / "embedded.md").read_text().splitlines()
    measured = {tuple(cell.strip() for cell in row.split("|")[1:-1]) for row in rows}
    table = (ROOT / "README.md").read_text().partition("| attributes right |")[2].partition("\n\n")[0]
    shown = [row for row in table.splitlines() if row.startswith("| `")]
    assert len(shown) > 2
    for row in shown:
        method, *cells = (cell.strip() for cell in row.split("|")[1:-1])
        name = method.split("`")[1]
        assert any(one[0] == name and [*one[1:4], one[5]] == cells for one in measured), row


def test_the_tables_of_adapters_are_those_of_the_measurement_and_of_every_pipeline():
    page = (ROOT / "docs" / "lora.md").read_text()
    kept = json.loads((ROOT / "benchmarks" / "stacking.json").read_text())["kept"]
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in page.splitlines() if row.startswith("|")
    ]
    for name, own in kept.items():
        assert [name.rpartition(" ")[2], *(f"{100 * share:.0f} %" for share in own.values())] in rows
    layouts = {row[0]: row[4] for row in rows if row[0] in tiny.VARIANTS and len(row) == 7}
    assert list(layouts) == list(tiny.VARIANTS)
    # Where a stock pipeline reads adapters it says what they say.
    errors = {name: error for name, error in layouts.items() if "no loader" not in error}
    assert len(errors) == 19 and all(float(error) < 1e-6 for error in errors.values()), errors


def test_the_checks_find_what_they_look_for():
    long = "word " * 31
    assert not too_long(f"{'word ' * 30}. {'word ' * 30}.")
    assert len(too_long(f"Short.\n\n{long}.\n\n- {long}\n- short\n")) == 2
    assert not too_long(f"```\n{long}\n```\n")
    assert too_long(f"| {long} | short |")
    assert missing(ROOT / "README.md", "[a](no.md), `training/recipes/no.yaml`") == [
        "no.md",
        "training/recipes/no.yaml",
    ]
    assert not missing(ROOT / "README.md", "[a](LICENSE), `training/recipes/toy_*.yaml` and `training/`")
    assert unknown_modules("python -m training.no x") == ["training.no"]
    assert unknown_modules("accelerate launch --cpu -m training.train x") == []
    with pytest.raises(UserError, match=r"student\.first_rho"):
        recipe_from(
            {
                "family": "toy",
                "data": "toy",
                "method": {"name": "dmd2", "first_rho": 1.0},
                "run": {"steps": 1, "out": "x"},
            }
        )


def test_the_readme_names_every_family_and_method():
    readme = (ROOT / "README.md").read_text()
    assert [name for name in (*FAMILIES, *METHODS) if f"`{name}`" not in readme] == []


def test_the_table_of_models_has_every_family_and_method():
    rows = [
        line.split("|")
        for line in (ROOT / "docs" / "models.md").read_text().splitlines()
        if line.startswith("|")
    ]
    head, _, *body = [[cell.strip(" `") for cell in row[1:-1]] for row in rows]
    assert head == ["teacher", *METHODS] and [row[0] for row in body] == list(tiny.VARIANTS)
    assert all(cell == "yes" or cell.isdecimal() for row in body for cell in row[1:])
    # Every method trains on every family, but for an input some networks have no place for and captions of classes.
    maps = {"meanflow", "imf", "dmf", "anyflow", "twinflow", "boot"}
    for name in set(METHODS) - maps - {"lcm", "reward", "add"}:
        assert {row[head.index(name)] for row in body} == {"yes"}, name
