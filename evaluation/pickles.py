"""Pickles, which can run any code when they are opened: none is, and the way to convert each kind is named."""

from __future__ import annotations

from pathlib import Path

from stepdistill.errors import UserError

SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt")
_HOW = {
    "captions": "import json, pickle; json.dump(list(map(str, pickle.load(open('{path}', 'rb')))), open('{to}.json', 'w'))",
    # EDM2 keeps a dictionary for each metric; others keep one.
    "statistics": "import numpy, pickle; d = pickle.load(open('{path}', 'rb')); "
    "[numpy.savez(f'{to}-{{k}}.npz', num_images=d.get('num_images', 0), **v) for k, v in d.items() if isinstance(v, dict)] "
    "or numpy.savez('{to}.npz', **d)",
}


def refuse_pickle(path: Path, kind: str = "statistics") -> None:
    """Raises UserError for a file that is a pickle by its name, with the command that converts one where it is trusted.

    kind: "captions" or "statistics".
    """
    if path.suffix.lower() in SUFFIXES:
        how = _HOW[kind].format(path=path, to=path.with_suffix(""))
        raise UserError(
            f"{path} is a pickle, which can run any code when it is opened, so it is not; where you trust it, convert "
            f'it with: python -c "{how}"'
        )
