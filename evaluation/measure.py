"""Draw with these settings, then measure: what `run`, `images`, `evaluate` and the metric within a run all go through.

`Measurement` is a protocol and its metrics made ready: all that is needed is loaded and looked at before a sample
is drawn. What it is given is drawn or read, brought to size and compared in one way, so a number means the same
wherever it is asked for.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.companion import Part, parts
from evaluation.decoding import AS_STORED, Resize
from evaluation.extractors import Extractor, load_extractor
from evaluation.facts import Facts, doubts_between, doubts_of
from evaluation.generate import SamplerFn, drawn, kept
from evaluation.images import Images
from evaluation.metrics import get_metrics
from evaluation.metrics.base import Inputs, Metric
from evaluation.metrics.clip_score import ClipScore
from evaluation.processes import Processes, precision_kept
from evaluation.protocol import Protocol, checked_n, get_protocol
from evaluation.reference import reference_stats
from evaluation.references import FileReference, NamedReference, holds
from evaluation.settings import Place
from evaluation.stats import FeatureStats
from evaluation.values import Value, flat
from stepdistill.errors import UserError

if TYPE_CHECKING:
    from stepdistill.drawing import Drawer

DISTANCES = ("fid", "fd")
_WHERE_FROM = {
    "captions": "give them with --captions, or use a protocol that has some",
    "reference": "give one with --reference, or use a protocol that has one",
    "reference_images": "give images, not statistics",
    "timed": "measure it with `python -m evaluation run`",
    "teacher": "measure it with `python -m evaluation run` and --teacher",
}


@dataclass
class Measured:
    """The values of `n` samples. `inputs` is what they were computed from, None once that is gone; `doubts` is what
    a reader has to know of them."""

    values: list[Value]
    n: int
    inputs: Inputs | None = None
    doubts: list[str] = field(default_factory=list)
    # What they were measured under, which says of each thing that is not as a protocol of its name has it.
    protocol: Protocol | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """By name, a standard error as "<name>/se"."""
        return flat(self.values)

    def beside(self, *others: Measured) -> Measured:
        """The same with what was measured under a companion of its protocol: doubts, and values behind the distances, which
        say what they are of.
        """
        theirs = [
            replace(value, protocol=other.protocol.label(other.n))
            for other in others
            for value in other.values
        ]
        places = [at for at, value in enumerate(self.values, 1) if value.name.startswith(DISTANCES)]
        at = max(places, default=0)
        return replace(
            self, values=[*self.values[:at], *theirs, *self.values[at:]],
            doubts=list(dict.fromkeys(doubt for one in (self, *others) for doubt in one.doubts)),
        )  # fmt: skip


class Measurement:
    """A protocol's metrics, ready to be computed of any number of sets of samples.

    Args:
        protocol: with its files found. None: sets of images as they are.
        metrics: names in METRICS.
        n: number of samples.
        extractor: a name, a directory or an `Extractor`; None is the protocol's.
        reference: images or statistics instead of the protocol's reference. reference_images: images that
            belong to statistics, for what cannot be computed from these.
        captions: one for each sample, instead of the protocol's.
        clip: directory of the CLIP model; "" is the protocol's.
        device, dtype: where networks run, and in what CLIP and DINO do: see `load_extractor`.
        available: fields of `Inputs` that will be there beside what these arguments say: "teacher", "timed".

    Raises:
        UserError: a metric or extractor is unknown, or a metric needs what is not there.
    """

    def __init__(
        self, protocol: Protocol | None, metrics: Sequence[str], n: int, *, extractor: Place | Extractor | None = None,
        reference: FeatureStats | Images | None = None, reference_images: Images | None = None,
        captions: Sequence[str] | None = None, clip: Place = "", available: frozenset[str] = frozenset(),
        device: str = "cpu", dtype: str = "float32", processes: Processes | None = None,
    ) -> None:  # fmt: skip
        self.protocol, self.processes, self.n = protocol, processes or Processes(), n
        self.metrics = get_metrics(metrics)
        for name, metric in self.metrics.items():
            if name == "clip":
                self.metrics[name] = ClipScore(clip, (protocol and protocol.clip) or None, device, dtype)
            elif isinstance(metric, ClipScore):
                self.metrics[name] = type(metric)(device, dtype)
        self.captions = captions
        own = reference if reference is not None else protocol.reference if protocol else None
        # Rows of the reference's features, once they are known: they serve every set.
        self.reference_rows = None
        self.images = reference_images or _images_of(own)
        self._refuse_missing(own, available)
        # As it was loaded, and as all processes share it.
        self.loaded: Extractor | None = None
        self.extractor: Extractor | None = None
        self._given = reference
        if "extractor" in self.needs:
            if not isinstance(extractor, Extractor):
                extractor = load_extractor(extractor or protocol.extractor, device, dtype=dtype)
            self.loaded, self.extractor = extractor, self.processes.share(extractor)
            if protocol is not None:
                self.protocol = replace(protocol, extractor=self.extractor.name)
        if protocol is not None and isinstance(reference, FeatureStats) and "reference" in self.needs:
            self.protocol = replace(
                self.protocol, reference=FileReference("", reference.n, reference.sha256())
            )
        looked_at = self._inputs(self.n)
        for metric in self.metrics.values():
            metric.check(looked_at, self.n)

    @property
    def needs(self) -> set[str]:
        """Fields of `Inputs` that the metrics name."""
        return set().union(*(metric.needs for metric in self.metrics.values()))

    @functools.cached_property
    def reference(self) -> FeatureStats | None:
        """Statistics of the reference, where a metric needs them; computed when first asked for."""
        if "reference" not in self.needs:
            return None
        if isinstance(self._given, FeatureStats):
            return self._given
        if self._given is not None:
            return self.extractor.statistics(self._given.watched())
        return reference_stats(self.protocol, self.extractor, self.processes)

    @property
    def distance(self) -> Metric | None:
        """The Fréchet distance among the metrics."""
        return next((self.metrics[name] for name in DISTANCES if name in self.metrics), None)

    def of(self, images: Images, n: int | None = None, teacher: Measured | None = None) -> Measured:
        """Every metric but those of time, of the first `n` images; None: of as many as were asked for at first.

        teacher: its samples for the same prompts and seeds, for the metrics that compare with them, which are
        left out without one or where it has fewer.
        """
        n = self.n if n is None else n
        inputs = self.inputs(images, n)
        if teacher is not None and teacher.n >= n:
            inputs.teacher = teacher.inputs.images.first(n)
            if "features" in vars(teacher.inputs):
                inputs.teacher_features = teacher.inputs.features[:n]
        values: list[Value] = []
        for metric in self.metrics.values():
            if "timed" not in metric.needs and ("teacher" not in metric.needs or inputs.teacher is not None):
                values += metric.compute(inputs)
        self.reference_rows = vars(inputs).get("reference_features", self.reference_rows)
        doubts = [*inputs.doubts, *(self.extractor.doubts if self.extractor else ())]
        return Measured(values, n, inputs, doubts, self.protocol)

    def doubts(self, facts: Facts | None, n: int, others: int = 0, seen: Facts | None = None) -> list[str]:
        """What a reader of a distance of `n` images has to know of them, by their facts, and of the reference.

        others: how many the reference has, 0 where it is known from its statistics, or not at all. seen: its facts, where
        it has no statistics.
        """
        doubts, protocol, reference = [], self.protocol, self.reference
        if protocol is not None and n != protocol.n:
            biased = "a distance of fewer is biased upwards and compares" if self.distance else "compare them"
            doubts.append(
                f"{n} images where {protocol.name} has {protocol.n}: {biased} only with others of as many."
            )
        others = others or (reference.n if reference is not None else 0)
        compared = self.extractor is not None and (reference is not None or self.images is not None)
        if self.distance and compared and min(n, others or n) <= self.extractor.dim:
            doubts.append(
                f"no more images than the {self.extractor.dim} features: the covariance has no full rank and the "
                "distance is biased far upwards."
            )
        if reference is not None:
            doubts, seen = [*doubts, *reference.doubts], reference.facts
        return [*doubts, *doubts_of(seen, "images of the reference"), *doubts_between(facts, seen)]

    def inputs(self, images: Images, n: int) -> Inputs:
        """What metrics are computed from, of the first `n` images."""
        inputs = self._inputs(n)
        images, protocol, inputs.reference = images.first(n), self.protocol, self.reference
        inputs.images = images.resized(protocol.resize).watched() if protocol else images.watched()
        inputs.drawn = images.resized(AS_STORED) if protocol and protocol.resize else None
        if protocol and protocol.patch and "patch-fd" in self.metrics:
            window = Resize("window", protocol.patch)
            inputs.patch_images = images.resized(window)
            inputs.patch_reference = self.images.resized(window)
        if protocol and protocol.clip_resize and "clip" in self.metrics:
            inputs.clip_images = images.resized(protocol.clip_resize)
        return inputs

    def _inputs(self, n: int) -> Inputs:
        inputs = Inputs(extractor=self.extractor, reference_images=self.images)
        if self.protocol is not None:
            inputs.captions = self.protocol.prompts(n) if self.protocol.has_text else None
            inputs.clip_prefix = self.protocol.clip_prefix
            inputs.groups = self.protocol.groups(n) if self.protocol.conditions != "none" else None
        if self.captions is not None:
            inputs.captions = list(self.captions[:n])
        inputs.keep = "features" in self.needs
        if self.reference_rows is not None:
            inputs.reference_features = self.reference_rows
        return inputs

    def _refuse_missing(self, reference: object, available: frozenset[str]) -> None:
        there = available | {"images", "extractor", "features"}
        has_text = self.captions is not None or (self.protocol is not None and self.protocol.has_text)
        there |= {"captions"} if has_text else set()
        there |= {"reference"} if reference is not None else set()
        there |= {"reference_images"} if self.images is not None else set()
        for name, metric in self.metrics.items():
            if missing := sorted(metric.needs - there):
                raise UserError(
                    f"the metric {name!r} needs {' and '.join(missing)}, which is not here; "
                    f"{_WHERE_FROM.get(missing[-1], 'leave it out')}, or leave the metric out."
                )


@precision_kept()
def measure(
    draws: Drawer | SamplerFn | Images, protocol: str | Protocol, metrics: Sequence[str], *, n: int | None = None,
    extractor: Place | Extractor | None = None, reference: FeatureStats | Images | None = None, clip: Place = "",
    batch: int = 64,
) -> Measured:  # fmt: skip
    """Draw the samples of a protocol, and of its companion where a metric is of that, or take those that exist, and
    measure them.

    Equal pixels give equal numbers whatever `batch` is. Samples beyond a quarter of a gigabyte wait in a temporary
    folder, so that memory doesn't grow with n.

    Args:
        draws: draws(prompts, seeds) -> uint8 (N, 3, H, W), asked for up to `batch` at a time; or a set of images.
            A `Drawer` or `Sampler` rounds its grey levels as the protocol says, and networks run on its device.

    The others are as in `Measurement`. Raises UserError as it does, and for images that are not as promised.
    """
    protocol = get_protocol(protocol)
    n = checked_n(n, protocol)
    how = {"reference": reference, "clip": clip, "device": _device(draws)}
    if isinstance(draws, Images):
        return Measurement(protocol, metrics, n, extractor=extractor, **how).of(draws)
    draw = quantised(draws, protocol.quantise)
    ready = prepared(parts(protocol, metrics, n), extractor, **how)
    done, *others = (_of_drawn(one, draw, batch) for one in ready)
    return done.beside(*others)


def prepared(
    parts: Sequence[Part], extractor: Place | Extractor | None = None, **how: Any
) -> list[Measurement]:
    """A measurement for each part, all through one network; `how` and what is raised are as in `Measurement`."""
    ready: list[Measurement] = []
    for part in parts:
        ready.append(Measurement(part.protocol, part.metrics, part.n, extractor=extractor, **how))
        extractor = ready[-1].loaded or extractor
    return ready


def _of_drawn(ready: Measurement, draw: SamplerFn, batch: int) -> Measured:
    n = ready.n
    prompts, seeds = ready.protocol.prompts(n), ready.protocol.seeds(n)
    slices = (slice(start, start + batch) for start in range(0, n, batch))
    with tempfile.TemporaryDirectory() as folder:
        images = kept((drawn(draw, prompts[part], seeds[part]) for part in slices), Path(folder))
        done = ready.of(images)
    return replace(done, inputs=None)


def quantised(draws: Callable, quantise: str) -> SamplerFn:
    """`draws`, its grey levels rounded in this way where it is a `Sampler` or a `Drawer`, which can be told."""
    from stepdistill.drawing import Drawer

    if isinstance(draws, Drawer):
        return replace(draws, quantise=quantise)
    return draws.at(quantise=quantise) if hasattr(draws, "at") else draws


def _device(draws: object) -> str:
    """Of a `Drawer` or a `Sampler`."""
    return str(getattr(getattr(draws, "sampler", draws), "device", "cpu"))


def _images_of(reference: object) -> Images | None:
    """The images of a reference, where it is not statistics alone."""
    if isinstance(reference, FeatureStats) or reference is None:
        return None
    if isinstance(reference, NamedReference):
        return reference.resized() if "images" in holds(reference.path) else None
    return reference if isinstance(reference, Images) else reference.resized()
