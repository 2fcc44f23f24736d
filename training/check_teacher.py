"""Look at a teacher before a run is spent on it: `python -m training.check_teacher DIRECTORY_OR_HUB_ID_OR_RECIPE`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepdistill.card import Card
    from stepdistill.families.base import Family
    from training.data import Source
    from training.recipe import Recipe
    from training.teacher_report import Report

EPILOG = """\
examples:
  python -m training.check_teacher assets/teacher
  python -m training.check_teacher PATH_OR_HUB_ID family.resolution=1024 family.dtype=bfloat16 --images my_images
  python -m training.check_teacher training/recipes/scenes_dmd2.yaml --no-pictures --json

exit code: 0 = nothing is known to be wrong; 1 = something declared does not fit, and the last lines say what does; 2 = it
could not be looked at.
"""
# Rows and columns of the pictures.
PROMPTS = 4
STEPS = 25


@dataclass
class Subject:
    """What is looked at. source: of the recipe's data, or of the images given; None = there is none."""

    name: str
    family: Family
    source: Source | None
    recipe: Recipe | None
    card: Card | None


def subject_of(given: str, overrides: Sequence[str], images: str) -> Subject:
    """The teacher of a recipe, in a directory, or behind a hub id.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    from stepdistill.errors import UserError
    from training.recipe import load_recipe
    from training.run import build

    recipe = card = source = None
    if Path(given).suffix in (".yaml", ".yml"):
        recipe = load_recipe(given, overrides)
        family, sources = build(recipe)
        source = sources[0]
    else:
        family, card = _open(given, overrides)
    if family.teacher is None:
        raise UserError(f"{given} has no teacher, it trains one; there is nothing to check.")
    if family.of_codes:
        raise UserError(
            f"{given} says codes one after another, and what is checked here is how a teacher denoises; draw with it instead."
        )
    return Subject(given, family, _images(images, family) if images else source, recipe, card)


def _open(given: str, overrides: Sequence[str]) -> tuple[Family, Card | None]:
    from stepdistill import card as cards
    from stepdistill.config import apply_overrides, build
    from stepdistill.errors import UserError
    from stepdistill.families.reading import fetch_index, is_hub_id
    from stepdistill.loading import class_of, serving

    path, hub = Path(given), is_hub_id(Path(given))
    card = None if hub else cards.read(path)
    if card is not None and card.kind == "students":
        raise UserError(f"{given} holds merged students; check one of them.")
    settings = dict(card.settings) if card is not None else {}
    said = apply_overrides({"family": settings | {"teacher": given}}, overrides)
    if others := sorted(said.keys() - {"family"}):
        raise UserError(f"{others[0]}: beside a directory or hub id only family.* can be set.")
    if hub:
        cls = serving(fetch_index(path, str(said["family"].get("revision", "")))["_class_name"], path)
    else:
        cls = class_of(path, card)
    family = cls(build(cls.Config, said["family"], "family"))
    return family, card


def _images(folder: str, family: Family) -> Source:
    from stepdistill.config import build
    from training.data.folder import Folder

    height, width = family.resolution
    side = height if height == width else [height, width]
    source = Folder(build(Folder.Config, {"path": folder, "resolution": side}, "data"))
    names = family.class_names
    if family.conditions == "class" and (source.labels is None or len(source.class_names) != len(names)):
        source.labels = None
    return source


def look(subject: Subject, device: str, methods: Sequence[str]) -> Report:
    """All but the pictures."""
    from training.own_samples import COUNT, judge_by_itself, own_samples
    from training.teacher import examples_of, judge, some_prompts
    from training.teacher_report import Report, latents_of, memory_of, process_of, tables_of

    family, recipe = subject.family, subject.recipe
    family.to(device)
    batch = recipe.stages()[0].optim.split(1)[0] if recipe is not None else 1
    pipeline = type(family.pipeline).__name__ if family.pipeline is not None else "none"
    facts = (subject.name, pipeline, family.name, family.resolution, family.shape)
    report = Report(*facts, process_of(family))
    examples = examples_of(family, subject.source, device, batch)
    report.tests.append(judge(family, examples, batch))
    report.latents = latents_of(family, examples)
    if examples.stand_in and not report.tests[0].wrong(family):
        prompts = some_prompts(family, subject.source, range(COUNT))
        report.tests.append(judge_by_itself(family, prompts, device, batch))
        if report.tests[-1].verified:
            examples = own_samples(family, family.teacher.kind, prompts, device, batch)
    report.wrong = list(dict.fromkeys(filter(None, (test.wrong(family) for test in report.tests))))[:1]
    if not report.wrong and any(test.verified for test in report.tests):
        report.tables, wrong = tables_of(family, family.teacher.kind, examples, batch)
        report.wrong = [wrong] if wrong else []
    report.memory = memory_of(family, recipe, methods)
    return report


def draw(subject: Subject, prompts: Sequence, steps: int, device: str, path: Path) -> None:
    """A picture of what the teacher draws of the same noise without guidance, with its own, and with twice that."""
    from evaluation import picture
    from stepdistill.drawing import Sampler

    sampler = Sampler(subject.family, subject.family.teacher, Path(subject.name), subject.card, device)
    own = sampler.default_guidance
    scales = (
        [1.0]
        if sampler.guidance_free
        else sorted({1.0, own if own > 1 else 2.0, 2 * own if own > 1 else 4.0})
    )
    count = None if sampler.steps else steps
    columns = [picture.Column(f"guidance {scale:g}", sampler.at(count, scale, chunk=1)) for scale in scales]
    images, seconds = picture.draw(columns, prompts, range(len(prompts)))
    names = subject.family.class_names
    captions = [names[prompt] if isinstance(prompt, int) and names else str(prompt) for prompt in prompts]
    headings = [column.heading for column in columns]
    smooth = max(subject.family.resolution) > 96
    picture.save(picture.compose(images, seconds, captions, headings, smooth=smooth, faster=False), path)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; what is wrong with it is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="training.check_teacher",
        description="Say what a teacher is, and verify by denoising that it predicts what its directory says.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("teacher", help="a pipeline directory, a hub id, or a recipe (.yaml)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a setting")
    parser.add_argument("--images", default="", metavar="DIR", help="a folder of images it should know")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="of the pictures; may be repeated")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the pictures (default {STEPS})")
    parser.add_argument("--methods", default="", help="of the memory table: names with commas, all, or none")
    parser.add_argument("--out", default="runs/check_teacher", help="where the pictures go")
    parser.add_argument("--no-pictures", action="store_true", help="draw none")
    parser.add_argument("--device", default="", help="such as cuda or cpu; default: a GPU where there is one")
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")
    from stepdistill.errors import cli_errors, quieten_libraries
    from stepdistill.registry import add_allow_code, allowing_code

    add_allow_code(parser)
    with cli_errors():
        given = parser.parse_intermixed_args(arguments)
        quieten_libraries()
        with allowing_code(given.allow_code):
            report = _checked(given)
        print(json.dumps(report.mapping(), indent=2) if given.json else "\n".join(report.lines()))
    if report.wrong:
        raise SystemExit(1)


def _checked(given: Any) -> Report:
    import torch

    from training.teacher import some_prompts

    methods = _methods(given.methods)
    subject = subject_of(given.teacher, given.overrides, given.images)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    device = given.device or str(accelerator)
    report = look(subject, device, methods)
    if not given.no_pictures and subject.family.exportable:
        path = Path(given.out) / "guidance.png"
        words = given.prompt if subject.family.conditions == "prompt" else None
        prompts = words or some_prompts(subject.family, subject.source, range(PROMPTS))
        draw(subject, prompts, given.steps, device, path)
        report.pictures = str(path)
    return report


def _methods(given: str) -> Sequence[str]:
    from stepdistill.errors import UserError
    from stepdistill.methods import METHODS
    from training.teacher_report import METHODS as USUAL

    if given in ("", "none"):
        return USUAL if not given else ()
    names = (
        [name for name in METHODS if name not in ("compose", "pretrain")]
        if given == "all"
        else given.split(",")
    )
    if unknown := [name for name in names if name not in METHODS]:
        raise UserError(f"--methods: {unknown[0]!r} is no method; known are {', '.join(METHODS)}.")
    return names


if __name__ == "__main__":
    main()
