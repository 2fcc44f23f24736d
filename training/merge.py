"""Several students of one partition as one directory: `python -m training.merge OUT STUDENT_1 ... STUDENT_K`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; what is wrong with it is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="training.merge",
        description="Put the students of K runs with data.partition=1/K .. K/K side by side, with a routing file.",
    )
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("students", type=Path, nargs="+", help="the runs' student directories, in any order")
    from stepdistill.errors import cli_errors

    with cli_errors():
        given = parser.parse_args(arguments)
        from stepdistill.routing import merge

        print(f"merged {len(given.students)} students into {merge(given.students, given.out)}")


if __name__ == "__main__":
    main()
