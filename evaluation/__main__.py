"""The command line: `python -m evaluation run | images | stats | compare | doctor | protocols | picture | geneval`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from evaluation.commands import compare, doctor, geneval, images, picture, protocols, run, stats
from stepdistill.errors import cli_errors
from stepdistill.registry import allowing_code

COMMANDS = {
    "run": run,
    "picture": picture,
    "images": images,
    "stats": stats,
    "compare": compare,
    "doctor": doctor,
    "geneval": geneval,
    "protocols": protocols,
}
_EXAMPLES = """\
examples:
  python -m evaluation run --pipeline assets/student --teacher assets/teacher --steps 1,2,4 --out runs/eval
  python -m evaluation run --pipeline assets/student --n 200 --out /tmp/quick
  python -m evaluation picture --teacher assets/teacher --student assets/student --out picture.png
  python -m evaluation images MY_SAMPLES --ref MY_DATASET
  python -m evaluation doctor --protocol coco14-30k
  python -m evaluation compare runs/eval runs/other

`python -m evaluation COMMAND --help` explains each. The package also has a Python interface:
evaluation.evaluate(...)."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and do. Wrong input ends with one sentence and exit code 2."""
    args = _parser().parse_args(argv)
    with cli_errors(), allowing_code(getattr(args, "allow_code", False)):
        args.do(args)


def _parser() -> argparse.ArgumentParser:
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m evaluation",
        description="How good and how fast a few-step student is, next to its teacher.",
        epilog=_EXAMPLES,
        formatter_class=shown,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name, help=command.TEXT, description=command.TEXT, epilog=command.EXAMPLES, formatter_class=shown
        )
        command.add(added)
        added.set_defaults(do=command.do)
    return parser


if __name__ == "__main__":
    main()
