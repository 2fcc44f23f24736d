"""A student out of a run's directory, without its data: `python -m training.export RUN [-o DIR] [--merge] [--push HUB_ID]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.exporting import Exported

EPILOG = """\
examples:
  python -m training.export runs/scenes_dmd2
  python -m training.export runs/scenes_dmd2 --checkpoint 1000 -o students/early
  python -m training.export runs/mine --merge --push me/my-student

A run that trains adapters (student.lora) leaves them here as `load_lora_weights` reads them, with their scheduler and a
card whose code runs; --merge folds them into a whole pipeline instead. Any other run leaves a whole pipeline.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="training.export",
        description="Write the student of a run's checkpoint as a diffusers pipeline, or its adapters.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory (run.out)")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="DIR",
        help="where to write; RUN/student, of adapters RUN/lora, by default",
    )
    parser.add_argument("--merge", action="store_true", help="fold adapters into a whole pipeline")
    parser.add_argument(
        "--checkpoint",
        default="latest",
        metavar="STEP",
        help="a step, 'best' or 'latest', which is the default",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="the average of the weights or the last; as run.export says by default",
    )
    parser.add_argument(
        "--push", metavar="HUB_ID", help="upload what was written to this repository, owner/name"
    )
    parser.add_argument(
        "--onnx",
        action="store_true",
        help="write its networks as ONNX beside it too, which are then what is drawn with",
    )
    parser.add_argument("--private", action="store_true", help="make a repository that is new private")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; what is wrong with it is one sentence and exit code 2."""
    from stepdistill.errors import UserError, cli_errors, quieten_libraries
    from stepdistill.registry import add_allow_code, allowing_code

    parser = _parser()
    add_allow_code(parser)
    with cli_errors():
        given = parser.parse_args(arguments)
        from training.checkpoint import RunDirectory
        from training.exporting import Exported
        from training.recipe import load_recipe

        directory = RunDirectory(given.run)
        if not directory.recipe.is_file():
            raise UserError(
                f"{given.run} is no run's directory: it has no recipe.yaml; give a recipe's run.out."
            )
        if given.push:
            _check_hub(given.push)
        with allowing_code(given.allow_code):
            # The run may have been moved.
            chosen = [f"run.export={given.weights}"] if given.weights else []
            recipe = load_recipe(directory.recipe, [f"run.out={directory.path}", *chosen])
            quieten_libraries()
            made = Exported.of(recipe, given.checkpoint)
            target = export(made, directory, given.out, given.merge or given.onnx)
            print(f"exported to {target}")
            if given.onnx:
                print(to_onnx(target))
        if given.push:
            print(f"pushed to {push(target, given.push, given.private)}")


def export(made: Exported, run: Any, out: Path | None = None, merge: bool = False) -> Path:
    """Write a student to `out`, or to its place in its run; where it lies. merge: adapters leave as a whole pipeline.

    Raises:
        UserError: adapters that no stock pipeline reads, without `merge`, or a directory that holds something else.
    """
    from stepdistill.denoiser import unwrap
    from stepdistill.export import write, write_adapters
    from stepdistill.lora import LoRA
    from training.exporting import measured_by

    alone = isinstance(unwrap(made.student), LoRA) and not merge
    target = out or (run.path / "lora" if alone else run.student)
    _refuse_other(target)
    numbers = measured_by(run, made.card)
    if alone:
        write_adapters(made.family, unwrap(made.student), target, made.card, numbers)
    else:
        write(made.family, made.student, target, made.card, numbers)
    return target


def to_onnx(target: Path) -> str:
    """Convert an exported student's networks; a sentence on how exact and how fast they are.

    Raises:
        UserError: as `onnx_form.convert`.
    """
    from stepdistill.loading import load
    from stepdistill.onnx_form import convert

    sampler = load(target)
    prompts = ["a small red circle on a black background", "a large blue star on a white background"]
    told: list[Any] = {"prompt": prompts, "class": [0, 1]}.get(sampler.conditions, [0, 0])
    facts = convert(sampler, told, [0, 1])
    times = facts["milliseconds"]
    return (
        f"ONNX in {target / 'onnx'}: images differ by at most {facts['images']:.1e}; an image takes {times['onnx']:g} ms where"
        f" torch takes {times['eager']:g} ({facts['times_as_fast']:g} times as fast, {facts['threads']} threads)"
    )


def _refuse_other(target: Path) -> None:
    """What is replaced as a whole must be a student that was exported before, or nothing."""
    from stepdistill.card import NAME
    from stepdistill.errors import UserError

    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / NAME).is_file()):
        raise UserError(
            f"{target} holds something else than an exported student; choose another place with -o."
        )


def _check_hub(name: str) -> None:
    """Before a minute of export: the name, and whether anybody is logged in."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from stepdistill.errors import UserError

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"--push {name}: no name of a repository; give owner/name.") from None
    if get_token() is None:
        raise UserError(
            f"--push {name}: there is no token for the hub; log in with `hf auth login`, or set HF_TOKEN."
        )


def push(directory: Path, name: str, private: bool = False) -> str:
    """Upload a directory to a repository of the hub, which is made where there is none; its address.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    from stepdistill.errors import UserError, first_line

    api = HfApi()
    try:
        made = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(
            folder_path=directory, repo_id=made.repo_id, commit_message="A student of stepdistill"
        )
        return str(made)
    except OfflineModeIsEnabled:
        why = "HF_HUB_OFFLINE is set; unset it"
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        # No connection, no right, no such owner, a full account.
        why = f"{first_line(error)}; what was exported lies in {directory}"
    raise UserError(f"--push {name}: the hub cannot be written to: {why}.")


if __name__ == "__main__":
    main()
