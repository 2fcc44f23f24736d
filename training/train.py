"""Train by a recipe: `accelerate launch -m training.train RECIPE.yaml [section.key=value ...]`."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Sequence

EPILOG = """\
examples:
  accelerate launch -m training.train training/recipes/toy_dmd2.yaml
  accelerate launch -m training.train training/recipes/scenes_dmd2.yaml optim.lr=2e-4 run.out=runs/mine
  python -m training.train training/recipes/toy_dmd2.yaml --dry-run        (one process needs no launcher)

To resume, run the same command again. The run directory (run.out) gets recipe.yaml, metrics.jsonl, previews/,
checkpoints/ and, at the end, student/: an ordinary diffusers pipeline directory.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; what is wrong with it is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="training.train",
        description="Distil a few-step student, or pretrain a teacher, as a recipe says.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "recipe", help="a YAML file, such as those in training/recipes/, or a run's own recipe.yaml"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe, data counts and a memory estimate; train nothing",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start over instead of resuming; removes what the run directory holds of the run",
    )
    from stepdistill.errors import cli_errors, quieten_libraries
    from stepdistill.registry import add_allow_code, allowing_code

    add_allow_code(parser)
    with cli_errors():
        given = parser.parse_intermixed_args(arguments)
        _quieten()
        from training.recipe import load_recipe

        with allowing_code(given.allow_code):
            recipe = load_recipe(given.recipe, given.overrides)
            # After the recipe: a mistake in it is said in half the time.
            from training.run import dry_run, run

            if recipe.family.cls.exportable:
                quieten_libraries()
            if given.dry_run:
                print(dry_run(recipe))
            else:
                run(recipe, fresh=given.fresh)


def _quieten() -> None:
    """Before the libraries load: their notices and progress bars would bury the run's own."""
    # TensorBoard takes TensorFlow along where it is installed.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


if __name__ == "__main__":
    main()
