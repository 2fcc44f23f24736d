"""Put a run's exported pipeline into assets/ in half precision.

python -m training.embedded.ship runs/scenes_teacher/student assets/teacher
python -m training.embedded.ship runs/transformer_teacher/student assets/transformer --share assets/teacher
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from stepdistill.errors import UserError, atomic_write, cli_errors
from stepdistill.families.reading import read_index


def ship(source: Path, target: Path, share: Sequence[Path] = ()) -> None:
    """Copy the pipeline directory `source` to `target` with float16 weights.

    What of `target` is no part of the pipeline, the reports of the parts' trainings, is kept. A file of weights that is
    byte for byte one of `share`, directories, or one met before becomes a relative link to it.

    Raises:
        UserError: `source` is no pipeline directory.
    """
    import torch
    from safetensors.torch import load_file, save_file

    read_index(source)
    known = {_digest(file): file for folder in share for file in sorted(folder.rglob("*.safetensors"))}
    with atomic_write(target) as temporary:
        shutil.copytree(source, temporary)
        for file in sorted(temporary.rglob("*.safetensors")):
            half = {name: t.half() if t.dtype == torch.float32 else t for name, t in load_file(file).items()}
            save_file(half, file, metadata={"format": "pt"})
            final = target / file.relative_to(temporary)
            same = known.setdefault(_digest(file), final)
            if same != final:
                file.unlink()
                file.symlink_to(os.path.relpath(same, final.parent))
        for report in target.glob("*/training.json") if target.exists() else ():
            shutil.copy(report, temporary / report.parent.name / report.name)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the student/ directory of a run")
    parser.add_argument("target", type=Path, help="where it is to lie, such as assets/teacher")
    parser.add_argument(
        "--share",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="where a file lies already; linked to",
    )
    given = parser.parse_args()
    with cli_errors():
        if given.source.resolve() == given.target.resolve():
            raise UserError(f"source and target are both {given.source}; name two directories.")
        ship(given.source, given.target, given.share)


if __name__ == "__main__":
    main()
