"""Fréchet distance at 2,048 features: ours beside what other libraries compute, in turns, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/frechet.py          (about two minutes; writes frechet.json)

The peers' formulas: the trace of `scipy.linalg.sqrtm(S1 S2)` (pytorch-fid, clean-fid, EDM2 and most papers' code),
written out here, and the sum of the roots of `eigvals(S1 S2)` (torch-fidelity with NumPy, torchmetrics with torch).
The last two are called in their own libraries where these are installed (`pip install --no-deps torch-fidelity
torchmetrics lightning-utilities`); without them the formula is written out, and torchmetrics left out. All get the
same float64 statistics. The truth is the nuclear norm of the product of the centred features.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from evaluation.frechet import frechet_distance, frechet_from_features
from evaluation.results import machine
from evaluation.stats import FeatureStats
from stepdistill.errors import atomic_write

DIM = 2048


def features(seed: int, n: int, dim: int = DIM) -> np.ndarray:
    """(n, dim): positive, correlated, with a falling spectrum, as pooled features of a network are."""
    mix = (
        np.linalg.qr(np.random.default_rng(0).standard_normal((dim, dim)))[0] * np.arange(1, dim + 1) ** -0.7
    )
    rng = np.random.default_rng(seed)
    return np.maximum(rng.standard_normal((n, dim)) @ mix.T + 0.02 * (1 + seed % 2), 0)


def by_sqrtm(mean_a, cov_a, mean_b, cov_b) -> float:
    from scipy.linalg import sqrtm

    root = np.trace(sqrtm(cov_a @ cov_b).real)
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root)


def by_eigvals(mean_a, cov_a, mean_b, cov_b) -> float:
    """torch-fidelity's own function, else its formula."""
    try:
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
    except ImportError:
        pass
    else:
        sides = ({"mu": mean_a, "sigma": cov_a}, {"mu": mean_b, "sigma": cov_b})
        return fid_statistics_to_metric(*sides, verbose=False)[KEY_METRIC_FID]
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root)


def by_torchmetrics(*moments) -> float:
    """torchmetrics' own function (its class adds a cast to float32)."""
    from torchmetrics.image.fid import _compute_fid

    return float(_compute_fid(*map(torch.from_numpy, moments)))


def installed(*names: str) -> dict[str, str]:
    """Versions of those packages that are here."""
    return {name: version(name) for name in names if importlib.util.find_spec(name.replace("-", "_"))}


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    fx, fy = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
    norm = np.linalg.svd(fx @ fy.T, compute_uv=False).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (fx**2).sum() + (fy**2).sum() - 2 * norm)


def timed(call: Callable[[], float]) -> dict[str, float]:
    cpu, clock = time.process_time(), time.perf_counter()
    value = call()
    return {"value": value, "cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - clock}


def in_turns(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, float]]:
    """Each called `rounds` times, in turns, the first before every other one; value and median times of each."""
    (first, baseline), *others = calls.items()
    laps: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in others:
            laps[first].append(timed(baseline))
            laps[name].append(timed(call))
    return {
        name: {key: statistics.median(one[key] for one in found) for key in found[0]}
        for name, found in laps.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=Path(__file__).with_suffix(".json"), type=Path)
    parser.add_argument("--rounds", type=int, default=3, help="turns each method gets (default: 3)")
    args = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1, so that every method has one thread")

    x, y = features(1, 6000), features(2, 6000)
    stats = [FeatureStats(DIM).add(z) for z in (x, y)]
    moments = [part for one in stats for part in (one.mean, one.cov)]
    # The first call of a library routine sets it up.
    frechet_distance(*stats)
    peers = installed("torch-fidelity", "torchmetrics", "scipy")
    calls = {
        "ours": lambda: frechet_distance(*stats),
        "torch-fidelity": lambda: by_eigvals(*moments),
        "scipy sqrtm": lambda: by_sqrtm(*moments),
    }
    if "torchmetrics" in peers:
        calls["torchmetrics"] = lambda: by_torchmetrics(*moments)
    full = in_turns(calls, args.rounds)
    ours = full["ours"]
    for found in full.values():
        found["relative_difference_to_ours"] = abs(found["value"] - ours["value"]) / ours["value"]
        for clock in ("cpu_s", "wall_s"):
            found[f"times_ours_{clock}"] = found[clock] / ours[clock]

    few_x, few_y = x[:1000], y[:1000]
    few_stats = [FeatureStats(DIM).add(z) for z in (few_x, few_y)]
    few_moments = [part for one in few_stats for part in (one.mean, one.cov)]
    few = in_turns(
        {
            "ours, from features": lambda: frechet_from_features(few_x, few_y),
            "ours, reference of 6000": lambda: frechet_distance(few_stats[0], stats[1]),
            "ours, to itself": lambda: frechet_distance(few_stats[0], few_stats[0]),
            "truth": lambda: by_definition(few_x, few_y),
            "torch-fidelity": lambda: by_eigvals(*few_moments),
        },
        args.rounds,
    )
    for name in ("ours, from features", "torch-fidelity"):
        few[name]["relative_difference_to_truth"] = few[name]["value"] / few["truth"]["value"] - 1

    results = {
        "what": f"{DIM} features, float64, one thread; medians of interleaved rounds in one process",
        "n = 6000": full,
        "n = 1000": few,
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            **peers,
        },
        "processor": machine("cpu")["cpu"],
    }
    with atomic_write(args.out) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")
    for title in ("n = 6000", "n = 1000"):
        print(title)
        for name, found in results[title].items():
            print(f"  {name:24}", "  ".join(f"{key} {value:.10g}" for key, value in found.items()))


if __name__ == "__main__":
    main()
