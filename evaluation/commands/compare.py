"""`python -m evaluation compare`."""

from __future__ import annotations

import argparse

from stepdistill.errors import UserError

TEXT = "Tables of several runs, their paired differences, published numbers."
EXAMPLES = """\
examples:
  python -m evaluation compare runs/a runs/b      # tables, and what really differs, with its standard error
  python -m evaluation compare runs/a --published # beside published numbers, if the protocol is theirs

Runs are put into one table only if protocol, number of samples, extractor and reference agree."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="--out directories of runs, or results.json files"
    )
    parser.add_argument(
        "--published",
        action="store_true",
        help="also print published numbers; refused under another protocol",
    )


def do(args: argparse.Namespace) -> None:
    from evaluation import compare

    if len(args.runs) < 2 and not args.published:
        raise UserError("compare needs at least two runs, or one and --published.")
    print(compare.text([compare.load(path) for path in args.runs], args.published))
