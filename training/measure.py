"""The number a run is watched by: a metric of the family's own, or one of the evaluation package's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stepdistill import scenes
from stepdistill.config import closest
from stepdistill.drawing import Sampler
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from training.recipe import RunConfig

SEED = 10_000_019  # of the points a family's own metric draws


def measure(
    run: RunConfig, family: Family, sampler: Sampler, metric: str | None = None, steps: int | None = None
) -> float:
    """`metric`, by default the run's, of `sampler` at `steps`, by default its least number of them."""
    metric = metric or run.metric
    classes = len(family.class_names or ())
    if metric in family.metrics:

        def points(n: int) -> Tensor:
            told = [i % max(classes, 1) for i in range(n)]
            return sampler.at(steps, chunk=n).x0(told, range(SEED, SEED + n))

        return float(family.metrics[metric](points))
    from evaluation import evaluate

    kind, _, extractor = metric.partition(":")

    def draw(prompts: Any, seeds: Any) -> Tensor:
        return sampler(prompts, seeds, steps=steps, chunk=64)

    values = evaluate(
        draw,
        n=run.metric_samples,
        metrics=(kind,),
        extractor=extractor if kind == "fd" and extractor else None,
        reference=run.metric_reference or None,
        classes=classes if run.metric_reference else 0,
    )
    # "fd:MY_DIRECTORY" comes back under the name that the network in the directory has.
    return float(
        values[metric] if metric in values else next(v for k, v in values.items() if k.startswith(f"{kind}:"))
    )


def lower_is_better(metric: str) -> bool:
    """Distances fall; CLIP scores and shares of right attributes rise."""
    return not metric.startswith(("clip", "attributes"))


def check_metric(run: RunConfig, family: Family) -> None:
    """UserError for a metric that could not be measured, so that no run ends at its first measurement."""
    if not run.metric_every:
        return
    if family.metrics:
        offered = list(family.metrics)
    elif family.conditions == "prompt":
        offered = [
            "fd:scenes-v1",
            "clip:scenes-v1",
            *(f"attributes/{name}" for name in ("all", *scenes.ATTRIBUTES)),
        ]
    else:
        offered = ["fd:scenes-v1"]
    own_network = run.metric.startswith("fd:") and "fd:scenes-v1" in offered
    if run.metric not in offered and not own_network:
        close = closest(run.metric, offered)
        hint = f"did you mean {close}?" if close else f"choose one of {', '.join(offered)}."
        raise UserError(f"run.metric={run.metric} cannot be measured on the family {family.name!r}; {hint}")
    if not family.metrics:
        _check_files(run, family)


def _check_files(run: RunConfig, family: Family) -> None:
    """The metric's network and reference are there."""
    from evaluation.extractors import load_extractor
    from evaluation.images import open_images
    from stepdistill import assets

    if run.metric.startswith("fd:"):
        load_extractor(run.metric.removeprefix("fd:"))
    elif run.metric.startswith("clip:"):
        assets.path("clip")
    if family.conditions == "prompt" and run.metric_reference:
        raise UserError(
            f"run.metric_reference={run.metric_reference} is for families without prompts;"
            " with prompts, the distance is to the scenes of the protocol, so leave it out."
        )
    if family.conditions != "prompt":
        if not run.metric_reference:
            raise UserError(
                f"run.metric={run.metric} needs run.metric_reference here:"
                " a folder or Parquet file of real images."
            )
        open_images(run.metric_reference)
