"""What a run warns of, each kind with a code that docs/warnings.md explains: cause and cure."""

from __future__ import annotations

import sys

from tqdm import tqdm

CODES = {
    "W01": "a checkpoint is damaged, and an older one is gone on from",
    "W02": "the recipe has changed since the checkpoint",
    "W03": "the data have changed since the checkpoint",
    "W04": "an example can no longer be read",
    "W05": "prompts are cut",
    "W06": "a value has left its normal range",
    "W07": "an update was left out, because something was not finite",
    "W08": "the disk is full, and the run waits",
    "W09": "the log of a run without a checkpoint is begun again",
    "W10": "another process computes the same",
}


def notice(code: str, text: str) -> str:
    """The line of one warning. Raises KeyError for a code that is none."""
    assert CODES[code]
    return f"warning {code}: {text}"


def warn(code: str, text: str) -> None:
    """Say it to the person at the terminal, past a progress bar."""
    tqdm.write(notice(code, text), file=sys.stderr)
