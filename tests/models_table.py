"""docs/models.md: every method on every family, from tiny pipelines that are trained a step of each phase.

PYTHONPATH=.:tests python tests/models_table.py
"""

from __future__ import annotations

from pathlib import Path

import tiny
from models import refused

from stepdistill.errors import atomic_write
from stepdistill.methods import METHODS

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
HEAD = """# Families and methods

Each cell was tried on a tiny pipeline of that kind, with random weights: a step of every phase of the method.
"yes" says that all that the method trains moved; a number says why a pair is refused.
`PYTHONPATH=.:tests python tests/models_table.py` makes this page again, in some ten minutes of one core.

"""


def main() -> None:
    reasons: list[str] = []
    lines = [
        f"| teacher | {' | '.join(f'`{name}`' for name in METHODS)} |",
        "|---" * (len(METHODS) + 1) + "|",
    ]
    for variant in tiny.VARIANTS:
        cells = []
        for name in METHODS:
            why = refused(variant, name)
            if why and why not in reasons:
                reasons.append(why)
            cells.append(f"{reasons.index(why) + 1}" if why else "yes")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    notes = [f"{number}. {why}" for number, why in enumerate(reasons, 1)]
    with atomic_write(PAGE) as temporary:
        temporary.write_text(HEAD + "\n".join([*lines, "", *notes, ""]))


if __name__ == "__main__":
    main()
