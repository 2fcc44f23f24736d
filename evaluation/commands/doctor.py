"""`python -m evaluation doctor`."""

from __future__ import annotations

import argparse

from evaluation.commands.common import at_least_one
from stepdistill.errors import UserError, quieten_libraries

TEXT = "Find out whether a measurement can be made here, before it is begun."
EXAMPLES = """\
examples:
  python -m evaluation doctor
  python -m evaluation doctor --protocol coco14-30k --reference val2014 --captions FILE --out runs/eval

With --protocol, the exit code is 2 if that protocol cannot be measured here."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--protocol", help="only this one (default: all)")
    parser.add_argument("--reference", metavar="PATH", help="where its reference is")
    parser.add_argument("--captions", metavar="FILE", help="where its captions are")
    parser.add_argument("--extractor", help="another extractor than the protocol's")
    parser.add_argument(
        "--out", default=".", metavar="DIR", help="where samples would be kept (default: here)"
    )
    parser.add_argument(
        "--settings",
        type=int,
        default=1,
        metavar="1",
        help="models times step counts to be measured (default: 1)",
    )


def do(args: argparse.Namespace) -> None:
    from evaluation import doctor

    at_least_one(args, "settings")
    quieten_libraries()
    findings = doctor.examine(
        args.protocol, reference=args.reference, captions=args.captions, extractor=args.extractor, out=args.out,
        settings=args.settings,
    )  # fmt: skip
    for finding in findings:
        print(f"{'ok     ' if finding.good else 'MISSING'}  {finding.name}: {finding.text}")
    missing = [finding.name for finding in findings if not finding.good]
    if args.protocol and missing:
        raise UserError(f"{args.protocol} cannot be measured here yet: see {', '.join(missing)} above.")
