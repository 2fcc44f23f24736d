"""`python -m evaluation run`: students beside their teacher, on the same prompts, noise and reference.

Under `accelerate launch` every process goes through the same program: each draws its shards of samples and its
part of every chunk of features, all come to the same numbers, and the first writes them.
"""

from __future__ import annotations

import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evaluation import report
from evaluation.decoding import patch_window
from evaluation.extractors import load_extractor
from evaluation.folders import ROWS_NEEDED
from evaluation.folds import frechet_ratio_with_error
from evaluation.generate import Configuration, Shards, draw_with, generate, pipeline_sha256
from evaluation.images import Facts, Images, ResizedImages, Watched, open_images
from evaluation.metrics import get_metrics
from evaluation.metrics.base import Inputs, check
from evaluation.metrics.clip_score import ClipScore
from evaluation.metrics.latency import BATCH, IMAGES, Timed, measure, speedups
from evaluation.processes import Processes
from evaluation.protocol import Protocol, checked_n, get_protocol, measurable, real_images
from evaluation.reference import reference_stats
from evaluation.references import FileReference, NamedReference
from evaluation.weights import find_pipeline, pipeline_name
from stepdistill.errors import UserError
from stepdistill.provenance import git_commit

if TYPE_CHECKING:
    from stepdistill.drawing import Sampler

SWEEP_N = 500  # samples a sweep over many scales chooses by
SWEEP_SCALES = 4  # from this many scales on
DISK_MARGIN = 1 << 28  # bytes left free beside the samples


@dataclass
class Row:
    """One line of the report: a sampler at one setting."""

    role: str  # "teacher", "teacher at the student's steps", "student"
    sampler: Sampler
    sha256: str
    steps: int
    guidance: float
    n: int
    metrics: dict[str, float] = field(default_factory=dict)
    sweep: dict[str, Any] | None = None
    inputs: Inputs | None = None
    folds: dict[str, list[float]] = field(default_factory=dict)  # values with each fold of samples left out
    facts: Facts | None = None
    seconds: float = 0.0


def run(
    pipelines: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    teacher: str | os.PathLike[str] | None = None,
    steps: Sequence[int] | None = None,
    guidance: float | None = None,
    teacher_steps: int | None = None,
    teacher_guidance: Sequence[float] = (1.0, 1.5, 2.0, 3.0, 5.0),
    n: int | None = None,
    teacher_n: int | None = None,
    metrics: Sequence[str] | None = None,
    protocol: str | Protocol = "scenes-2k",
    reference: str | os.PathLike[str] | None = None,
    captions: str | os.PathLike[str] | None = None,
    extractor: str | os.PathLike[str] | None = None,
    clip: str | os.PathLike[str] | None = None,
    batch: int = 64,
    io_batch: int | None = None,
    device: str = "cpu",
    latency_images: int = IMAGES,
    throughput_batch: int = BATCH,
    force: bool = False,
    bar: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Measure pipeline directories and write `out`/results.json and the report beside it.

    Args:
        pipelines: directories, or repositories in the Hugging Face cache; usually students.
        teacher: directory of what they are compared with. Its guidance is swept and the least distance
            taken; it is also measured at the students' own step counts, which is what distillation starts
            from.
        steps: step counts; None is what each pipeline was trained for.
        guidance: of `pipelines`; None is each one's default.
        teacher_steps: None is the teacher's default.
        n, teacher_n: numbers of samples; None is the protocol's. A ratio uses the first min(n, teacher_n) of
            both.
        metrics: names in METRICS; None is what the protocol says.
        reference: where the protocol's named reference is; or, for pipelines without prompts, a folder or
            Parquet file of real images instead of a protocol.
        captions: where the protocol's captions are, if it has a file of them.
        extractor: a name or a directory; None is the protocol's. Another one makes another protocol hash.
        clip: directory of the protocol's CLIP model, where that is not the embedded one.
        batch: batch size of the sampled networks; samples of two sizes differ in their last bits.
        io_batch: samples asked for at a time; changes nothing but memory.
        latency_images, throughput_batch: images timed one by one, and drawn at a time for the throughput; a
            batch of 0 leaves that out.
        force: draw again what is kept under `out`/samples.
        bar: makes a progress bar from `total` and `desc` (tqdm); None shows nothing.

    Returns:
        What is written to results.json.

    Raises:
        UserError: wrong input, found before anything is drawn.
    """
    began = time.time()
    processes = Processes.join()
    session = _Session(Path(out), batch, io_batch, processes.device(device), force, bar or _NoBar, processes)
    samplers = [load_pipeline(path, session.device) for path in pipelines]
    teacher_sampler = load_pipeline(teacher, session.device) if teacher is not None else None
    everyone = [*samplers, *([teacher_sampler] if teacher_sampler else [])]
    session.drawn_by = chosen = _protocol(protocol, reference, captions, extractor, everyone)
    n = checked_n(n, chosen)
    teacher_n = n if teacher_n is None else checked_n(teacher_n, chosen)
    names = list(chosen.metrics if metrics is None else metrics)
    session.computed = get_metrics(names, measurable(chosen))
    timed = session.computed.pop("latency", None) is not None
    if "clip" in session.computed and (clip or chosen.clip):
        session.computed["clip"] = ClipScore(clip, chosen.clip or None)
    if teacher_sampler and session.distance is None:
        raise UserError(
            f"comparing with a teacher needs the metric 'fd' or 'fid', got {', '.join(names)}; add it to --metrics."
        )
    if "paired" in session.computed and (teacher_sampler is None or teacher_n < n):
        raise UserError("the metric 'paired' needs --teacher, and of it no fewer samples than --n.")
    rows = [
        Row("student" if sampler.kind == "student" else "model", sampler, "", count, scale, n)
        for sampler in samplers
        for count, scale in _settings(sampler, steps, guidance)
    ]
    report.check_writable(Path(out))
    session.prepare(extractor, n)
    session.check(everyone, n, teacher_n)
    scales = [1.0]
    if teacher_sampler and not teacher_sampler.guidance_free:
        scales = list(dict.fromkeys(map(float, teacher_guidance)))
    session.check_disk(rows, teacher_sampler, len(scales), teacher_n)

    done: list[Row] = []
    best = None
    try:
        if teacher_sampler:
            full = teacher_steps or teacher_sampler.default_steps
            best = session.swept("teacher", teacher_sampler, full, scales, teacher_n)
            done.append(best)
            for count in sorted({row.steps for row in rows} - {full}):
                role = "teacher, few steps"
                done.append(session.swept(role, teacher_sampler, count, scales, teacher_n, best))
                session.compared(done[-1], best)
        for row in rows:
            session.measured(row, best)
            if best is not None:
                session.compared(row, best)
            done.append(row)
    except UserError:
        if done and processes.first:  # hours may have gone into these
            report.write(session.results(done, n, time.time() - began, complete=False), Path(out))
        raise
    if timed:
        entries = [Timed(row.sampler, row.steps, row.guidance) for row in done]
        prompts = chosen.prompts(min(max(latency_images, throughput_batch), chosen.n))
        times = processes.from_first(lambda: measure(entries, prompts, latency_images, throughput_batch))
        for row, found in zip(done, times, strict=True):
            row.metrics |= {f"latency/{name}": value for name, value in found.items()}
            if best is not None and row is not best:
                row.metrics |= {f"latency/{name}": value for name, value in speedups(found, times[0]).items()}
    results = processes.from_first(lambda: session.results(done, n, time.time() - began))
    if processes.first:
        report.write(results, Path(out), session.grid(done))
    processes.wait()
    return results


class _Session:
    """What the rows of one run share."""

    def __init__(
        self, out: Path, batch: int, io_batch: int | None, device: str, force: bool, bar: Callable[..., Any],
        processes: Processes,
    ) -> None:  # fmt: skip
        self.out, self.batch, self.io_batch, self.device, self.force = out, batch, io_batch, device, force
        self.processes, self.bar = processes, bar if processes.first else _NoBar
        self.drawn_by: Protocol  # samples are kept under its hash: they don't depend on the extractor
        self.protocol: Protocol  # the same with the extractor that is used: what results are published under
        self.computed: dict[str, Any] = {}
        self.extractor = self.reference = self.reference_rows = None
        self.warnings: list[str] = []
        self.hashes: dict[Path, str] = {}
        self.drawn: dict[str, Shards] = {}  # by key, as far as this run has come

    def prepare(self, extractor: str | os.PathLike[str] | None, n: int) -> None:
        """Load all that measures, and the reference, so that what is missing ends a run before it begins."""
        self.protocol = self.drawn_by
        needs = set().union(*(metric.needs for metric in self.computed.values()))
        statistics = (
            isinstance(self.drawn_by.reference, NamedReference) and self.drawn_by.reference.is_statistics
        )
        if "reference_images" in needs and (statistics or self.drawn_by.reference is None):
            names = [name for name, metric in self.computed.items() if "reference_images" in metric.needs]
            raise UserError(
                f"the metric {names[0]!r} needs the images of the reference, not statistics; give them with "
                "--reference or leave it out."
            )
        if "extractor" in needs:
            self.extractor = self.processes.share(
                load_extractor(extractor or self.drawn_by.extractor, self.device)
            )
            self.protocol = replace(self.drawn_by, extractor=self.extractor.name)
        known = Inputs(captions=self.protocol.scored_captions(n), extractor=self.extractor)
        known.reference_images, known.groups = self.protocol.reference, self.protocol.groups(n)
        check(self.computed.values(), known, n)
        if "reference" in needs:
            self.reference = reference_stats(self.protocol, self.extractor, self.processes)

    @property
    def distance(self) -> str | None:
        """The Fréchet distance among the metrics that are computed: "fid", "fd" or None."""
        return next((name for name in ("fid", "fd") if name in self.computed), None)

    def check_disk(self, rows: Sequence[Row], teacher: Sampler | None, scales: int, teacher_n: int) -> None:
        """Raises UserError when the samples that may have to be drawn don't fit on the disk of `out`."""
        needed = sum(row.n * 3 * math.prod(row.sampler.resolution) for row in rows)
        if teacher is not None:
            counts = len({row.steps for row in rows}) + 1
            needed += counts * scales * teacher_n * 3 * math.prod(teacher.resolution)
        have = sum(file.stat().st_size for file in (self.out / "samples").glob("*/*.safetensors"))
        free = shutil.disk_usage(self.out).free
        if needed - have + DISK_MARGIN > free:
            raise UserError(
                f"--out {self.out} needs about {(needed - have) / 1e9:.1f} GB for samples, but {free / 1e9:.1f} GB "
                "are free there; choose another disk or a smaller --n."
            )

    def check(self, samplers: Sequence[Sampler], n: int, teacher_n: int) -> None:
        """Note what a reader of the numbers has to know."""
        name, full = self.protocol.name, self.protocol.n
        if n != full:
            self.warnings.append(
                f"measured on {n} samples where {name} has {full}: a distance of fewer samples is biased "
                "upwards and compares only with others of the same number."
            )
        if teacher_n != n:
            self.warnings.append(
                f"the teacher was measured on {teacher_n} samples, the others on {n}; ratios use the first "
                f"{min(n, teacher_n)} of both."
            )
        if self.extractor is not None and min(n, teacher_n) <= self.extractor.dim:
            self.warnings.append(
                f"no more samples than the {self.extractor.dim} features: the covariance has no full rank."
            )
        sizes = {sampler.resolution for sampler in samplers}
        if len(sizes) > 1:
            self.warnings.append(f"the pipelines draw images of different sizes: {sorted(sizes)}.")
        if isinstance(self.protocol.reference, FileReference) and self.reference is not None:
            self.warnings += self._reference_doubts(sizes)

    def _reference_doubts(self, sizes: set[tuple[int, int]]) -> list[str]:
        """What sets a person's own reference apart from samples, by its first image."""
        found = []
        first = open_images(self.protocol.reference.path).peek()
        width, height = first.size
        if {(height, width)} != sizes:
            drawn = " and ".join(f"{w}x{h}" for h, w in sorted(sizes))
            found.append(
                f"the samples are {drawn} and the reference {width}x{height}: resizing alone makes a distance."
            )
        if first.lossy:
            found.append("the reference is JPEG and the samples are not: its losses alone make a distance.")
        return found

    def samples(self, row: Row, n: int) -> Images:
        """The first n samples of a row, drawn or found."""
        path = Path(row.sampler.path)
        if path not in self.hashes:
            self.hashes[path] = pipeline_sha256(path)
        row.sha256 = self.hashes[path]
        configuration = Configuration(
            pipeline_name(path).replace("/", "-"), row.sha256, self.drawn_by.hash, row.steps, row.guidance, self.batch,
            self.device.partition(":")[0],
        )  # fmt: skip
        # A sweep's samples are part of the full set: what this run has drawn is never drawn again, even with
        # --force.
        known = self.drawn.get(configuration.key)
        if known is None or len(known) < n:
            with self.bar(total=n, desc=_bar_label(row)) as bar:
                known = self.drawn[configuration.key] = generate(
                    draw_with(row.sampler, row.steps, row.guidance, self.batch, self.drawn_by.quantise),
                    configuration,
                    self.protocol.prompts(n),
                    self.protocol.seeds(n),
                    self.out / "samples",
                    force=self.force and known is None,
                    progress=bar.update,
                    processes=self.processes,
                    io_batch=self.io_batch,
                )
        return known.first(n)

    def inputs(self, row: Row, n: int) -> Inputs:
        protocol, drawn = self.protocol, self.samples(row, n)
        images = ResizedImages(drawn, protocol.resize) if protocol.resize else drawn
        found = Inputs(Watched(images), protocol.scored_captions(n), self.extractor, self.reference)
        found.reference_images, found.groups = protocol.reference, protocol.groups(n)
        found.keep = bool(set(self.computed) & ROWS_NEEDED)
        if self.reference_rows is not None:
            found.reference_features = self.reference_rows
        if protocol.patch and "patch-fd" in self.computed:
            found.patch_images = ResizedImages(drawn, patch_window(protocol.patch))
            if isinstance(protocol.reference, NamedReference):
                found.patch_reference = protocol.reference.patches(protocol.patch)
        return found

    def measured(self, row: Row, teacher: Row | None = None) -> Row:
        """Draw the row's samples and compute every metric but latency; `teacher`: what it is paired with."""
        began = time.time()
        row.inputs = self.inputs(row, row.n)
        if teacher is not None and teacher.n >= row.n:
            row.inputs.teacher = teacher.inputs.images.first(row.n)
            if "features" in vars(teacher.inputs):
                row.inputs.teacher_features = teacher.inputs.features[: row.n]
        for metric in self.computed.values():
            if "teacher" not in metric.needs or row.inputs.teacher is not None:
                row.metrics |= metric.compute(row.inputs)
        row.facts = row.inputs.images.facts
        known = vars(
            row.inputs
        )  # rows of features: the reference's serve every row, the teacher's the students
        self.reference_rows = known.get("reference_features", self.reference_rows)
        if row.role != "teacher":
            known.pop("features", None)
        if self.distance:
            row.folds[f"{self.distance}:{self.extractor.name}"] = list(row.inputs.distances.left_out)
        row.seconds = time.time() - began
        return row

    def swept(
        self, role: str, sampler: Sampler, steps: int, scales: Sequence[float], n: int,
        teacher: Row | None = None,
    ) -> Row:  # fmt: skip
        """The row with the least distance over `scales`, measured on n samples; the sweep is kept in it.

        `teacher`: what the row is paired with.

        With many scales and many samples the choice is made on the first SWEEP_N. The error of the minimum is
        that of a fixed choice: choosing by the samples measured makes it look better by a fraction of its
        standard error.
        """
        if len(scales) == 1:
            return self.measured(Row(role, sampler, "", steps, scales[0], n), teacher)
        began = time.time()
        n_sweep = SWEEP_N if len(scales) >= SWEEP_SCALES and n > SWEEP_N else n
        tried = []
        for scale in scales:
            row = Row(role, sampler, "", steps, scale, n_sweep)
            found = self.computed[self.distance].compute(self.inputs(row, n_sweep))
            name = f"{self.distance}:{self.extractor.name}"
            tried.append({"guidance": scale, "fd": found[name], "se": found[f"{name}/se"]})
        chosen = min(tried, key=lambda entry: entry["fd"])["guidance"]
        best = self.measured(Row(role, sampler, "", steps, chosen, n), teacher)
        best.sweep = {"n": n_sweep, "chosen_on_a_subset": n_sweep != n, "chosen": chosen, "tried": tried}
        best.seconds = time.time() - began
        return best

    def compared(self, row: Row, teacher: Row) -> None:
        """Add the ratio of the row's distance to the teacher's, on samples both have."""
        count = min(row.n, teacher.n)
        sides = [one.inputs if one.n == count else self.inputs(one, count) for one in (row, teacher)]
        ratio, error = frechet_ratio_with_error(sides[0].folds, sides[1].folds, self.reference)
        row.metrics |= {"fd_ratio": ratio, "fd_ratio/se": error, "fd_ratio/n": float(count)}

    def grid(self, rows: Sequence[Row]) -> list[list[Any]]:
        """The first images of every row, uint8 (3, H, W)."""
        return [list(next(iter(row.inputs.images.first(report.SHOWN)))) for row in rows]

    def results(self, rows: Sequence[Row], n: int, seconds: float, complete: bool = True) -> dict[str, Any]:
        """Everything results.json holds."""
        warnings = [*self.warnings, *self.sample_warnings(rows)]
        if not complete:
            warnings.append("the run ended early; the same command goes on where it was.")
        known = self.extractor
        names = _names([row.sampler.path for row in rows])
        return {
            "format": "stepdistill-results-1",
            "protocol": self.protocol.label(n),
            "protocol_version": self.protocol.version,
            "protocol_hash": self.protocol.hash,
            "protocol_definition": self.protocol.describe(),
            "protocol_n": self.protocol.n,
            "protocol_source": self.protocol.source,
            "reference_sha256": self.protocol.reference.sha256() if self.protocol.reference else None,
            "reference_n": self.reference.n if self.reference is not None else None,
            "captions_sha256": self.protocol.captions.sha256() if self.protocol.captions else None,
            "complete": complete,
            "n": n,
            "seeds": [min(self.protocol.seeds(n)), max(self.protocol.seeds(n))],
            "prompts": [str(prompt) for prompt in self.protocol.prompts(min(n, report.SHOWN))],
            "extractor": None
            if known is None
            else {"name": known.name, "sha256": known.sha256, "resize": known.resize},
            "rows": [
                {
                    "role": row.role,
                    "name": names[row.sampler.path],
                    "path": str(row.sampler.path),
                    "sha256": row.sha256,
                    "method": row.sampler.card.method or None,
                    "steps": row.steps,
                    "guidance": row.guidance,
                    "nfe": Timed(row.sampler, row.steps, row.guidance).nfe,
                    "n": row.n,
                    "parameters": row.sampler.parameters,
                    "metrics": {
                        name: value if math.isfinite(value) else None for name, value in row.metrics.items()
                    },
                    "folds": row.folds,
                    "sweep": row.sweep,
                    "seconds": round(row.seconds, 2),
                }
                for row in rows
            ],
            "batch": self.batch,
            "processes": self.processes.count,
            "dtype": "float32",
            "machine": machine(self.device),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "diffusers": version("diffusers"),
                "transformers": version("transformers"),
            },
            "git_commit": git_commit(),
            "command": command(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(seconds, 1),
            "warnings": warnings,
        }

    def sample_warnings(self, rows: Sequence[Row]) -> list[str]:
        """What the samples themselves give reason to doubt."""
        names = _names([row.sampler.path for row in rows])
        found = []
        for row in rows:
            if row.facts is not None and row.facts.duplicates:
                found.append(
                    f"{row.facts.duplicates} of {row.facts.n} samples of {names[row.sampler.path]} at {row.steps} "
                    "steps have the same pixels as another one."
                )
        return found


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


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """What each pipeline is called: its own name, or its whole path where two share a name."""
    called = Counter(pipeline_name(path) for path in set(paths))
    return {path: name if called[name := pipeline_name(path)] == 1 else str(path) for path in paths}


def _bar_label(row: Row) -> str:
    steps = f"{row.steps} step{'s' if row.steps > 1 else ''}"
    return f"{pipeline_name(Path(row.sampler.path))}, {steps}, guidance {row.guidance:g}"


def load_pipeline(path: str | os.PathLike[str], device: str) -> Sampler:
    from stepdistill import load

    return load(find_pipeline(path), device=device)


def _protocol(protocol, reference, captions, extractor, samplers: Sequence[Sampler]) -> Protocol:
    """The named protocol, its files found, or that of a set of real images; every sampler has to fit it."""
    kinds = {sampler.conditions for sampler in samplers}
    if len(kinds) > 1:
        raise UserError(
            f"the pipelines take different conditions ({', '.join(sorted(kinds))}); measure them apart."
        )
    kind, where = kinds.pop(), samplers[0].path
    classes = {len(sampler.class_names or ()) for sampler in samplers}
    if len(classes) > 1:
        raise UserError(
            f"the pipelines have different numbers of classes {sorted(classes)}; measure them apart."
        )
    chosen = get_protocol(protocol)
    takes = {"prompt": "prompts", "class": "a class"}.get(kind, "no condition")
    if reference is not None and not isinstance(chosen.reference, NamedReference):
        if kind == "prompt":
            raise UserError(
                f"{where} takes prompts, which a folder of images does not have; leave --reference "
                "out to use a protocol with prompts."
            )
        return real_images(reference, classes=classes.pop(), extractor=str(extractor or "scenes-v1"))
    if chosen.has_text != (kind == "prompt"):
        needs = "a pipeline with prompts" if chosen.has_text else "a pipeline without prompts"
        raise UserError(
            f"the protocol {chosen.name} needs {needs}, but {where} takes {takes}; "
            + ("give --reference with real images." if chosen.has_text else "name another protocol.")
        )
    if kind == "class" and classes != {chosen.classes}:
        raise UserError(
            f"the protocol {chosen.name} has {chosen.classes} classes, but {where} has {classes.pop()}."
        )
    for sampler in samplers:
        if chosen.resolution and tuple(sampler.resolution) != (chosen.resolution, chosen.resolution):
            height, width = sampler.resolution
            raise UserError(
                f"the protocol {chosen.name} wants images of {chosen.resolution}x{chosen.resolution}, but "
                f"{sampler.path} draws {width}x{height}."
            )
    return chosen.located(reference, captions)


def _settings(
    sampler: Sampler, steps: Sequence[int] | None, guidance: float | None
) -> list[tuple[int, float]]:
    """(steps, guidance) a pipeline is measured at. Raises UserError for what it cannot do."""
    counts = tuple(steps) if steps else sampler.steps or (sampler.default_steps,)
    for count in counts:
        if count < 1 or (sampler.steps and count not in sampler.steps):
            known = ", ".join(map(str, sampler.steps or ("1 or more",)))
            raise UserError(f"--steps {count} is not what {sampler.path} was trained for; it has {known}.")
    if guidance is not None and guidance != 1 and sampler.guidance_free:
        raise UserError(
            f"--guidance {guidance:g} has no effect: {sampler.path} needs no guidance; leave it out."
        )
    scale = sampler.default_guidance if guidance is None else guidance
    return [(count, scale) for count in dict.fromkeys(counts)]


class _NoBar:
    """A progress bar that shows nothing."""

    def __init__(self, total: int, desc: str) -> None:
        pass

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, count: int) -> None:
        """Take `count` more."""
