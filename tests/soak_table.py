"""The figures of `make soak` as docs/faults.md has them: `python tests/soak_table.py` puts them there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "benchmarks" / "soak.json", ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- of benchmarks/soak.json -->\n", "<!-- end -->\n"


def table(result: dict[str, Any]) -> str:
    """A row for each kind of moment at which runs were killed, and one for flipped bits."""
    totals = result["totals"]
    saves = f"the steps since the last checkpoint, at most {totals['steps_lost_at_most']} here"
    rows = ["| fault | times injected | lost work | what one sees |", "|---|---|---|---|"]
    rows += [
        f"| killed: {kind} | {count} | {saves} | the same command goes on |"
        for kind, count in totals["at"].items()
    ]
    flips, found = totals["flipped_bits"], totals["flipped_bits_found"]
    rows.append(
        f"| one bit of the newest checkpoint flipped | {flips} | one checkpoint | warning W01, {found} times |"
    )
    signals = ", ".join(f"{count} by {name}" for name, count in sorted(totals["signals"].items()))
    said = (
        f"{totals['kills']} kills ({signals}) in {totals['trials']} runs of {len(result['cases'])} kinds, a checkpoint every"
        f" {totals['save_every']} steps.\nRuns that ended otherwise than one nobody disturbed: {totals['different']}."
    )
    return "\n".join([*rows, "", said, ""])


def placed(page: str, result: dict[str, Any]) -> str:
    """The page with the table of `result` in its place."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + table(result) + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(placed(PAGE.read_text(), json.loads(RESULT.read_text())))
