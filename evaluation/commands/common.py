"""What the commands' arguments and outputs have in common."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError, atomic_write


def print_values(numbers: dict[str, Any]) -> None:
    """Every number with its standard error, one a line."""
    for name, value in numbers.items():
        if isinstance(value, float) and not name.endswith("/se"):
            error = numbers.get(f"{name}/se")
            print(f"{name} {value:.6g}" + (f" ± {error:.2g}" if error is not None else ""))


def print_warnings(warnings: Iterable[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}")


def write_json(content: dict[str, Any], target: Path) -> None:
    with atomic_write(target) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raises UserError for an option that is given and below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")


def progress_bar() -> Callable[..., Any]:
    """Makes a progress bar from `total` and `desc`."""
    from functools import partial

    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 30
    return partial(tqdm, unit="image", mininterval=interval, dynamic_ncols=True)


def writable(path: str) -> Path:
    """A file that can be written. Raises UserError otherwise."""
    from evaluation.report import check_writable

    if Path(path).is_dir():
        raise UserError(f"--out {path} is a directory; give the path of the file to write.")
    check_writable(Path(path).parent)
    return Path(path)


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(kind: type) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        try:
            parsed = [kind(part) for part in text.split(",") if part.strip()]
        except ValueError:
            parsed = []
        if not parsed:
            example = "1,2,4" if kind is int else "1,1.5,2"
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like {example}")
        return parsed

    return parse


def add_set_options(parser: argparse.ArgumentParser) -> None:
    """How a set of images is read and what makes features of it."""
    parser.add_argument(
        "--extractor",
        help="name or directory of a feature net (default: the protocol's; else inception-2015 for fid, "
        "scenes-v1 for all others)",
    )
    parser.add_argument(
        "--protocol", help="crop, resize and extract as this protocol does (default: as they are)"
    )
    parser.add_argument(
        "--io-batch", type=int, default=16, metavar="16", help="images decoded at a time; changes no number"
    )
    add_device(parser)


def add_device(parser: argparse._ActionsContainer) -> None:
    """Where networks run, and in what precision."""
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"],
        help="of CLIP and DINO networks (default: float32); with bfloat16 their names end with -bf16",
    )  # fmt: skip
