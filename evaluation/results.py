"""What results.json holds: the numbers, and everything one needs to repeat them."""

from __future__ import annotations

import math
import os
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evaluation.metrics.clip_score import ClipScore
from evaluation.values import written
from evaluation.weights import pipeline_name
from stepdistill.provenance import git_commit

if TYPE_CHECKING:
    from evaluation.measure import Measurement
    from evaluation.runs import Row

FORMAT = "stepdistill-results-1"
# Prompts kept in a file, and samples of every row shown in the report.
SHOWN = 8


def results_of(
    rows: Sequence[Row], parts: Sequence[Measurement], *, batch: int, device: str, seconds: float, warnings: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Everything results.json holds, of rows measured under one protocol, and under its companion if there is a second
    part.
    """
    measurement, *others = parts
    protocol, n, net = measurement.protocol, measurement.n, measurement.extractor
    seeds = protocol.seeds(n)
    names = pipeline_names([row.path for row in rows])
    return {
        "format": FORMAT,
        "protocol": protocol.label(n),
        "protocol_version": protocol.version,
        "protocol_hash": protocol.hash,
        "protocol_definition": protocol.describe(),
        "protocol_n": protocol.n,
        "protocol_source": protocol.source,
        "companion": _companion(*others),
        "reference_sha256": protocol.reference.sha256() if protocol.reference else None,
        "reference_n": measurement.reference.n if measurement.reference is not None else None,
        "captions_sha256": protocol.captions.sha256() if protocol.captions else None,
        "complete": True,
        "n": n,
        "seeds": [min(seeds), max(seeds)],
        "prompts": [str(prompt) for prompt in protocol.prompts(min(n, SHOWN))],
        "extractor": net and {"name": net.name, "sha256": net.sha256, "resize": net.resize},
        "models": models(measurement),
        "rows": [_row(row, names[row.path]) for row in rows],
        "values": written([value for row in rows for value in row.values]),
        "batch": batch,
        "processes": measurement.processes.count,
        "dtype": "float32",
        **provenance(device),
        "seconds": round(seconds, 1),
        "warnings": [*warnings, *_sample_warnings(rows, names)],
    }


def _companion(measurement: Measurement | None = None) -> dict[str, Any] | None:
    """The protocol of the values that name it, and of how many samples they are."""
    if measurement is None:
        return None
    protocol, n = measurement.protocol, measurement.n
    seeds = protocol.seeds(n)
    return {
        "protocol": protocol.label(n),
        "protocol_hash": protocol.hash,
        "protocol_definition": protocol.describe(),
        "n": n,
        "seeds": [min(seeds), max(seeds)],
    }


def models(measurement: Measurement) -> dict[str, dict[str, str]]:
    """By metric: the CLIP models that scored captions, by name and sha256."""
    scores = {name: metric for name, metric in measurement.metrics.items() if isinstance(metric, ClipScore)}
    return {name: {"name": score.name, "sha256": score.sha256} for name, score in scores.items()}


def provenance(device: str) -> dict[str, Any]:
    """What measured: machine, versions, commit, command, date."""
    return {
        "machine": machine(device),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "transformers", "numpy", "pillow")},
        },
        "git_commit": git_commit(),
        "command": command(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """The same with None, which JSON has, for what is no number: a standard error of too few samples."""
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


def _row(row: Row, name: str) -> dict[str, Any]:
    return {
        "role": row.role,
        "name": name,
        "path": str(row.path),
        "sha256": row.sha256,
        "method": row.drawer.sampler.card.method or None,
        "steps": row.drawer.steps,
        "guidance": row.drawer.guidance,
        "nfe": row.drawer.nfe,
        "n": row.n,
        "parameters": row.drawer.sampler.parameters,
        "metrics": finite(row.numbers),
        "folds": row.folds,
        "sweep": row.sweep,
        "repeats": [{"seed": one.seed, "metrics": finite(one.numbers)} for one in row.repeats],
        "seconds": round(row.seconds, 2),
    }


def _sample_warnings(rows: Sequence[Row], names: dict[Path, str]) -> list[str]:
    """What the samples themselves give reason to doubt."""
    return [
        f"{row.facts.duplicates} of {row.facts.n} samples of {names[row.path]} at {row.drawer.steps} "
        "steps have the same pixels as another one."
        for row in rows
        if row.facts is not None and row.facts.duplicates
    ]


def pipeline_names(paths: Sequence[Path]) -> dict[Path, str]:
    """What each pipeline is called: its own name, or its whole path where two share a name."""
    called = Counter(pipeline_name(path) for path in set(paths))
    return {path: name if called[name := pipeline_name(path)] == 1 else str(path) for path in paths}


def machine(device: str) -> dict[str, Any]:
    """What the times were measured on."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "device": torch.cuda.get_device_name(device) if str(device).startswith("cuda") else "cpu",
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(terse=True),
    }


def command() -> str:
    """The command line of this process, as one would type it again."""
    program = Path(sys.argv[0])
    typed = (
        "python -m evaluation"
        if (program.parent.name, program.name) == ("evaluation", "__main__.py")
        else str(program)
    )
    return " ".join([typed, *map(shlex.quote, sys.argv[1:])])
