"""The embedded student as ONNX: how far its images differ, and how fast one is, in turns with torch in one process.

OMP_NUM_THREADS=1 python -m benchmarks.onnx_form      (a CPU minute; writes onnx_form.json)
"""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from evaluation.results import machine
from stepdistill import assets
from stepdistill.errors import atomic_write, quieten_libraries
from training.export import to_onnx

OUT = Path(__file__).with_suffix(".json")


def main() -> None:
    quieten_libraries()
    with tempfile.TemporaryDirectory() as folder:
        student = Path(folder) / "student"
        shutil.copytree(assets.path("student"), student)
        print(to_onnx(student))
        facts = json.loads((student / "onnx/onnx.json").read_text())
    versions = {name: version(name) for name in ("torch", "onnx", "onnxruntime")}
    with atomic_write(OUT) as temporary:
        temporary.write_text(
            json.dumps(facts | {"versions": versions, "machine": machine("cpu")}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
