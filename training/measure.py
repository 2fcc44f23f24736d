"""The number a run is watched by: a metric of the family's own, or any of the evaluation package's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stepdistill.config import closest
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.methods.base import Method
from training.sections import RunConfig

if TYPE_CHECKING:
    from evaluation.companion import Part
    from evaluation.metrics.base import Metric
    from evaluation.protocol import Protocol
    from evaluation.values import Value
    from stepdistill.drawing import Sampler

# Of the points a family's own metric draws.
SEED = 10_000_019
# Fields of the evaluation's `Inputs` that a run has.
_HERE = {"images", "extractor", "reference", "reference_images", "features"}


def measure(
    run: RunConfig, family: Family, sampler: Sampler, metric: str | None = None, steps: int | None = None
) -> Value:
    """`metric`, by default the run's, of `sampler` at `steps`, by default its least number of them."""
    from evaluation.values import Value

    metric = metric or run.metric
    if metric in family.metrics:
        score, better = family.metrics[metric]
        classes = max(len(family.class_names or ()), 1)

        def points(n: int) -> Tensor:
            drawer = sampler.at(steps, chunk=n)
            return drawer.x0([i % classes for i in range(n)], range(SEED, SEED + n))

        return Value(metric, float(score(points)), better=better)
    from evaluation.measure import measure as measure_samples

    protocol, wanted, settings = _settings(run, family, metric)
    kind = wanted.name.partition("/")[0]
    found = measure_samples(
        sampler.at(steps, chunk=64), protocol, [kind], n=run.metric_samples, **settings
    ).values
    return next(value for value in found if _declared(value) == wanted.name)


def check_metric(run: RunConfig, family: Family, method: Method | None = None) -> None:
    """UserError for a metric that could not be measured, so that no run ends at its first measurement, or whose network
    the method trains on.
    """
    if not run.metric_every:
        return
    if method is not None:
        check_judge(run, method)
    if not family.metrics:
        from evaluation.measure import prepared

        drawn, settings = _parts(run, family)
        prepared(drawn, **settings)
    elif run.metric not in family.metrics:
        raise _refusal(run.metric, family, list(family.metrics))


def check_judge(run: RunConfig, method: Method) -> None:
    """UserError where the metric looks through a network that the method trains on: it would only grow better."""
    if not run.metric_every or not method.trained_on:
        return
    from stepdistill import assets

    kind, _, source = run.metric.partition(":")
    embedded = kind == "clip" and source in ("", "scenes-v1")
    seen = str(assets.path("clip")) if embedded else source
    same = [one for one in method.trained_on if seen and Path(one).resolve() == Path(seen).resolve()]
    if same:
        raise UserError(
            f"run.metric={run.metric} judges by {same[0]}, which its method trains on; choose a metric of another"
            " network."
        )


def metric_prompts(run: RunConfig, family: Family) -> list[str]:
    """What the run's metric draws for; [] where nothing is measured, or not for prompts."""
    if not run.metric_every or family.metrics or family.conditions != "prompt":
        return []
    drawn, _ = _parts(run, family)
    return [prompt for part in drawn for prompt in part.protocol.prompts(part.n)]


def _parts(run: RunConfig, family: Family) -> tuple[list[Part], dict[str, Any]]:
    """Of the run's metric: what is drawn of which protocol, and what to measure it with."""
    from evaluation.companion import parts
    from evaluation.protocol import checked_n

    protocol, wanted, settings = _settings(run, family, run.metric)
    samples = checked_n(run.metric_samples, protocol)
    return parts(protocol, [wanted.name.partition("/")[0]], samples), settings


def _settings(run: RunConfig, family: Family, metric: str) -> tuple[Protocol, Value, dict[str, Any]]:
    """The protocol, the value that is wanted, as its metric declares it, and what to measure it with.

    Raises:
        UserError: there is no such value, it cannot be had in a run, or the files it needs are not said.
    """
    from evaluation.metrics.clip_score import VARIANTS
    from evaluation.protocol import chosen_protocol

    kind, source, wanted = _parsed(metric, family)
    _check_files(run, family)
    classes = len(family.class_names or ()) if run.metric_reference else 0
    protocol = chosen_protocol(
        "scenes-2k", run.metric_reference or None, run.metric_captions or None, classes=classes
    )
    if "extractor" in kind.needs:
        return protocol, wanted, {"extractor": source or None}
    if source in VARIANTS:
        return replace(protocol, clip=source), wanted, {}
    return protocol, wanted, {"clip": "" if source == "scenes-v1" else source}


def _parsed(metric: str, family: Family) -> tuple[type[Metric], str, Value]:
    """The class, the extractor or model, and the value of "kid:scenes-v1/subsets", "fd:MY/DIRECTORY", "fd", ..."""
    from evaluation.metrics import METRICS
    from stepdistill.registry import resolve

    here = _HERE | ({"captions"} if family.conditions == "prompt" else set())
    classes = {name: resolve(name, METRICS, "metric") for name in METRICS}
    offered = {
        value.name: (metric_class, value)
        for name, metric_class in classes.items()
        if metric_class.needs <= here
        for value in metric_class.values
        if value.better != "none" and not value.compares
    }
    kind, colon, rest = metric.partition(":")
    # A directory may have slashes of its own, so the longest part that is known is cut off its end.
    declared = (value.name for value in (classes[kind].values if kind in classes else ()))
    parts = sorted((name[len(kind) :] for name in declared if name.startswith(f"{kind}/")), key=len)
    part = next((part for part in reversed(parts) if rest.endswith(part)), "")
    name = f"{kind}{part}" if colon else metric
    takes_source = name in offered and ("extractor" in offered[name][0].needs or kind == "clip")
    if name not in offered or (colon and not takes_source):
        raise _refusal(metric, family, list(offered))
    metric_class, value = offered[name]
    return metric_class, rest.removesuffix(part) if colon else "", value


def _refusal(metric: str, family: Family, offered: list[str]) -> UserError:
    close = closest(metric, offered)
    hint = f"did you mean {close}?" if close else f"choose one of {', '.join(offered)}."
    return UserError(f"run.metric={metric} cannot be measured on the family {family.name!r}; {hint}")


def _declared(value: Value) -> str:
    from evaluation.values import declared_name

    return declared_name(value.name)


def _check_files(run: RunConfig, family: Family) -> None:
    """The run's own images and captions are said where they are needed, and only there."""
    prompts = family.conditions == "prompt"
    if prompts and bool(run.metric_reference) != bool(run.metric_captions):
        given, other = ("reference", "captions") if run.metric_reference else ("captions", "reference")
        raise UserError(
            f"run.metric_{given}={getattr(run, f'metric_{given}')} needs run.metric_{other} with it: real images,"
            " and the captions to draw for; without both, the scenes of the protocol are used."
        )
    if not prompts and run.metric_captions:
        raise UserError(
            f"run.metric_captions={run.metric_captions} is for families with prompts, and {family.name!r} has"
            " none; leave it out."
        )
    if not prompts and not run.metric_reference:
        raise UserError(
            f"run.metric={run.metric} needs run.metric_reference here: a folder or Parquet file of real images."
        )
    for name in ("metric_reference", "metric_captions"):
        path = getattr(run, name)
        if path and not Path(path).exists():
            raise UserError(f"run.{name}={path} does not exist; give a path that does.")
