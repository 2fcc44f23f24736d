"""Fewer blocks: `python -m training.prune RECIPE.yaml [section.key=value ...]` (PPCL, `stepdistill/methods/ppcl.py`).

Finds the intervals of blocks a teacher can do without, writes them to run.out/intervals.json, and distils each into one
block, resumably as any run. run.out/student is then a stock pipeline with fewer blocks, and run.out/student/intervals
holds each interval by itself: plug them in where the teacher is loaded, or write a pipeline with some of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepdistill.redundancy import Found
    from training.recipe import Recipe

EPILOG = """\
examples, with the recipe of docs/pruning.md as prune.yaml:
  python -m training.prune prune.yaml --find         (says which blocks would go, trains nothing)
  accelerate launch -m training.prune prune.yaml method.remove=3
  python -m training.prune prune.yaml --export runs/half --plug transformer_blocks.3-5
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; what is wrong with it is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="training.prune",
        description="Replace intervals of a teacher's blocks by one block each.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML file whose method is ppcl")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe"
    )
    parser.add_argument("--find", action="store_true", help="find the intervals and say them; train nothing")
    parser.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="write the teacher with the distilled intervals of --plug; train nothing",
    )
    parser.add_argument(
        "--plug", default="", metavar="INTERVAL,...", help="which intervals, such as transformer_blocks.3-5"
    )
    from stepdistill.errors import UserError, cli_errors, quieten_libraries
    from stepdistill.registry import add_allow_code, allowing_code

    add_allow_code(parser)
    with cli_errors():
        given = parser.parse_intermixed_args(arguments)
        from training.recipe import load_recipe

        with allowing_code(given.allow_code):
            recipe = load_recipe(given.recipe, given.overrides)
            if recipe.method is None or recipe.method.name != "ppcl" or recipe.partials:
                raise UserError(
                    f"{given.recipe}: blocks are removed by a recipe of one method, ppcl; set method.name to it."
                )
            if bool(given.plug) != (given.export is not None):
                raise UserError("--export and --plug go together: where to write, and which intervals.")
            quieten_libraries()
            if given.export is not None:
                print(export(recipe, given.plug.split(","), given.export))
                return
            recipe = with_intervals(recipe, fresh=given.fresh)
            if not given.find:
                from training.run import run

                run(recipe, fresh=given.fresh)


def with_intervals(recipe: Recipe, fresh: bool = False) -> Recipe:
    """The recipe with its intervals: as it gives them, as they were found before, or as they are found now.

    Raises:
        UserError: no blocks of this teacher can go, or not as many.
    """
    from training.run import accelerator_of, build, say

    if recipe.method.config.intervals:
        return recipe
    path = Path(recipe.run.out).expanduser() / "intervals.json"
    wanted = {"teacher": recipe.family.mapping(), "remove": recipe.method.config.remove}
    if path.exists() and not fresh and (kept := json.loads(path.read_text()))["wanted"] == _plain(wanted):
        return _told(recipe, kept["intervals"])
    accelerator = accelerator_of(recipe)
    family, sources = build(recipe)
    found, chosen = search(recipe, family, sources[0], accelerator)
    report = [{"interval": str(each.interval), "harm": each.harm, "cka": list(each.curve)} for each in found]
    intervals = [str(each) for each in chosen]
    if accelerator.is_main_process:
        from stepdistill.errors import atomic_write

        with atomic_write(path) as temporary:
            content = {"wanted": wanted, "intervals": intervals, "found": report}
            temporary.write_text(json.dumps(content, indent=1) + "\n")
    for line in described(found, chosen):
        say(accelerator.is_main_process, line)
    accelerator.wait_for_everyone()
    return _told(recipe, intervals)


def search(recipe: Recipe, family: Any, source: Any, accelerator: Any) -> tuple[list[Found], list[Any]]:
    """(all intervals, those that are to go) of the family's teacher, on calibration samples of the recipe's data.

    Raises:
        UserError: as `with_intervals`.
    """
    import torch

    from stepdistill.errors import UserError
    from stepdistill.methods.base import Networks
    from stepdistill.pruning import movable
    from stepdistill.redundancy import choose, find
    from training.precompute import prepare
    from training.state import TrainState

    config = recipe.method.config
    free = movable(family.teacher.network)
    method = recipe.new_method()
    batches = prepare(recipe, method, family, source, accelerator)
    # Every process finds the same: each looks at the whole calibration set.
    batches.processes, batches.process = 1, 0
    nets, state, samples, count = (
        Networks({"teacher": family.teacher}, family.schedule),
        TrainState(recipe.run.seed),
        [],
        0,
    )
    with torch.no_grad():
        while count < config.calibration:
            for batch in batches.draw("calibration", state):
                samples.append(method.noised(nets, batch))
                count += len(samples[-1][0])
            state.step += 1
    found = find(family.teacher, samples)
    remove = config.remove or round(sum(map(len, free.values())) / 3)
    chosen = choose(found, remove)
    if (most := sum(each.removed for each in chosen)) < remove:
        raise UserError(
            f"method.remove={remove}: this teacher's intervals are {most} blocks longer than one block each; remove fewer."
        )
    return found, chosen


def described(found: Sequence[Found], chosen: Sequence[Any]) -> list[str]:
    """For people: each interval, its harm, and which are chosen."""
    lines = [f"  {'interval':<36}{'harm':>10}   goes"]
    by_first = {(each.stack, each.first): each for each in chosen}
    for each in found:
        taken = by_first.get((each.interval.stack, each.interval.first))
        lines.append(f"  {each.interval!s:<36}{each.harm:>10.2g}   {taken or ''}")
    return lines


def export(recipe: Recipe, names: Sequence[str], directory: Path) -> str:
    """Write the recipe's teacher with the named intervals of its run as a pipeline directory.

    Raises:
        UserError: the run has no such interval.
    """
    from stepdistill import export as exports
    from stepdistill.errors import UserError
    from stepdistill.pruning import Interval, plug

    folder = Path(recipe.run.out).expanduser() / "student" / "intervals"
    there = sorted(path.stem for path in folder.glob("*.safetensors"))
    for name in names:
        Interval.parse(name)
        if name not in there:
            raise UserError(f"--plug {name}: {folder} holds {', '.join(there) or 'no intervals yet'}.")
    family = recipe.new_family()
    pruned = plug(family.teacher, [folder / f"{name}.safetensors" for name in names])
    card = exports.card_of(family, _told(recipe, names).new_method(), recipe.mapping())
    exports.write(family, pruned.eval(), directory, replace(card, name=directory.name))
    return f"exported to {directory}"


def _told(recipe: Recipe, intervals: Sequence[str]) -> Recipe:
    config = replace(recipe.method.config, intervals=tuple(intervals))
    return replace(recipe, method=replace(recipe.method, config=config))


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


if __name__ == "__main__":
    main()
