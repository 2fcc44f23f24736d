"""`python -m evaluation run`: students beside their teacher, on the same prompts, noise and reference.

Under `accelerate launch` every process goes through the same program: each draws its shards of samples and its
part of every chunk of features, all come to the same numbers, and the first writes them.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from evaluation import report
from evaluation.facts import Facts
from evaluation.folds import frechet_ratio_with_error
from evaluation.generate import Configuration, Shards, generate, pipeline_sha256
from evaluation.images import Images
from evaluation.measure import DISTANCES, Measured, Measurement, prepared
from evaluation.metrics.fd import FrechetDistance
from evaluation.metrics.latency import latencies
from evaluation.plan import Plan, planned
from evaluation.processes import Processes
from evaluation.results import SHOWN, results_of
from evaluation.settings import Settings
from evaluation.values import Value, flat, measured
from evaluation.weights import pipeline_name
from stepdistill.errors import UserError

if TYPE_CHECKING:
    from evaluation.protocol import Protocol
    from stepdistill.drawing import Drawer

# Samples a sweep over many scales chooses by, and from how many scales on it does.
SWEEP_N = 500
SWEEP_SCALES = 4
# Bytes left free beside the samples.
DISK_MARGIN = 1 << 28


@dataclass
class Row:
    """One line of the report: a pipeline at one setting. `folds`: values with each fold of samples left out."""

    # "teacher", "teacher, few steps", "student" or "model".
    role: str
    drawer: Drawer
    n: int
    # Which repeat of the protocol's noise.
    seed: int = 0
    sha256: str = ""
    values: list[Value] = field(default_factory=list)
    # Under each part of the plan.
    measured: list[Measured] = field(default_factory=list)
    folds: dict[str, list[float]] = field(default_factory=dict)
    facts: Facts | None = None
    sweep: dict[str, Any] | None = None
    repeats: list[Row] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def path(self) -> Path:
        return Path(self.drawer.sampler.path)

    @property
    def numbers(self) -> dict[str, float]:
        return flat(self.values)


def run(settings: Settings, bar: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Measure pipeline directories and write `out`/results.json and the report beside it.

    bar: makes a progress bar from `total` and `desc` (tqdm); None shows nothing.

    Returns what is written to results.json. Raises UserError for wrong input, found before anything is drawn.
    """
    began, out, processes = time.time(), Path(settings.out), Processes.join()
    device = processes.device(settings.device)
    plan = planned(settings, device)
    report.check_writable(out)
    ready = prepared(
        plan.parts, settings.extractor, clip=settings.clip or "", device=device, dtype=settings.dtype,
        processes=processes, available=frozenset({"teacher", "timed"}),
    )  # fmt: skip
    # What is wrong with the reference ends the run before anything is drawn.
    _ = ready[0].reference
    session = Session(ready, plan, settings, device, bar if processes.first else None)
    session.check_disk()
    try:
        rows = session.measure_all()
    except UserError:
        # Hours may have gone into these.
        if session.rows and processes.first:
            report.write(session.results(time.time() - began, complete=False), out)
        raise
    if "latency" in ready[0].metrics:
        session.time()
    results = processes.from_first(lambda: session.results(time.time() - began))
    if processes.first:
        report.write(
            results, out, [list(next(iter(row.measured[0].inputs.images.first(SHOWN)))) for row in rows]
        )
    processes.wait()
    return results


class Session:
    """What the rows of one run share: the plan, the measurement of each of its parts, and where samples are kept."""

    def __init__(
        self, parts: list[Measurement], plan: Plan, settings: Settings, device: str,
        bar: Callable[..., Any] | None = None,
    ) -> None:  # fmt: skip
        self.parts, self.ready = parts, parts[0]
        self.plan, self.settings, self.device = plan, settings, device
        self.folder, self.bar = Path(settings.out) / "samples", bar or partial(tqdm, disable=True)
        self.hashes: dict[Path, str] = {}
        # By key, as far as this run has come.
        self.drawn: dict[str, Shards] = {}
        # Those that are finished, in the order of the report.
        self.rows: list[Row] = []

    def measure_all(self) -> list[Row]:
        """The teacher at each step count, at the best of its settings, and then the students."""
        best = None
        for drawers in self.plan.teacher:
            role = "teacher" if best is None else "teacher, few steps"
            row = self.swept(role, drawers, self.plan.teacher_n, best)
            self.rows.append(row)
            if best is not None:
                self.compare(row, best)
            best = best or row
        for drawer in self.plan.students:
            role = "student" if drawer.sampler.kind == "student" else "model"
            row = self.measure(Row(role, drawer, self.plan.n), best)
            if best is not None:
                self.compare(row, best)
            self.rows.append(row)
            for seed in list(self.settings.seeds)[1:]:
                row.repeats.append(self.measure(Row(role, drawer, self.plan.n, seed)))
            row.values += over_seeds([row.values, *(repeat.values for repeat in row.repeats)])
        return self.rows

    def samples(self, row: Row, n: int, protocol: Protocol | None = None) -> Images:
        """The first n samples of a row under a protocol, by default the plan's, drawn or found."""
        if row.path not in self.hashes:
            self.hashes[row.path] = pipeline_sha256(row.path)
        row.sha256, draw = self.hashes[row.path], row.drawer
        # Kept under the hash of the protocol as it was named: samples don't depend on the extractor in use.
        protocol = protocol or self.plan.protocol
        if row.seed:
            protocol = replace(protocol, first_seed=protocol.first_seed + row.seed * protocol.n)
        configuration = Configuration.of(draw, protocol, row.sha256)
        # A sweep's samples are part of the full set: what this run has drawn is never drawn again, even with
        # --force.
        known = self.drawn.get(configuration.key)
        if known is None or len(known) < n:
            with self.bar(total=n, desc=f"{pipeline_name(row.path)}, {_setting(draw)}") as bar:
                known = self.drawn[configuration.key] = generate(
                    draw, configuration, protocol.prompts(n), protocol.seeds(n), self.folder,
                    force=self.settings.force and known is None, progress=bar.update, processes=self.ready.processes,
                    io_batch=self.settings.io_batch,
                )  # fmt: skip
        return known.first(n)

    def measure(self, row: Row, teacher: Row | None = None) -> Row:
        """Draw the row's samples and compute every metric but latency; `teacher`: what it is paired with."""
        began = time.time()
        for at, (ready, part) in enumerate(zip(self.parts, self.plan.parts, strict=True)):
            n = part.n if at else row.n
            done = ready.of(self.samples(row, n, part.protocol), n, teacher and teacher.measured[at])
            # The teacher's rows of features serve the students; a student's serve nobody.
            if row.role != "teacher":
                vars(done.inputs).pop("features", None)
            row.measured.append(done)
        done, *others = row.measured
        row.values, row.facts = done.beside(*others).values, done.inputs.images.facts
        if self.ready.distance:
            name = next(value.name for value in done.values if value.name.startswith(DISTANCES))
            row.folds[name] = list(done.inputs.distances.left_out)
        row.seconds = time.time() - began
        return row

    def swept(self, role: str, drawers: Sequence[Drawer], n: int, teacher: Row | None = None) -> Row:
        """The row with the least distance among `drawers`, on n samples; the sweep is kept in it.

        `teacher`: what the row is paired with.

        With many scales and many samples the choice is made on the first SWEEP_N. The error of the minimum is
        that of a fixed choice: choosing by the samples measured makes it look better by a fraction of its
        standard error.
        """
        if len(drawers) == 1:
            return self.measure(Row(role, drawers[0], n), teacher)
        began = time.time()
        n_sweep = SWEEP_N if len(drawers) >= SWEEP_SCALES and n > SWEEP_N else n
        tried = []
        for drawer in drawers:
            samples = self.samples(Row(role, drawer, n_sweep), n_sweep)
            distance = self.ready.distance.compute(self.ready.inputs(samples, n_sweep))[0]
            tried.append({"guidance": drawer.guidance, "fd": distance.value, "se": distance.se})
        chosen = min(range(len(tried)), key=lambda index: tried[index]["fd"])
        row = self.measure(Row(role, drawers[chosen], n), teacher)
        row.sweep = {
            "n": n_sweep,
            "chosen_on_a_subset": n_sweep != n,
            "chosen": tried[chosen]["guidance"],
            "tried": tried,
        }
        row.seconds = time.time() - began
        return row

    def compare(self, row: Row, teacher: Row) -> None:
        """Add the ratio of the row's distance to the teacher's, on samples both have."""
        count = min(row.n, teacher.n)
        sides = [
            one.measured[0].inputs if one.n == count else self.ready.inputs(self.samples(one, count), count)
            for one in (row, teacher)
        ]
        ratio = frechet_ratio_with_error(sides[0].folds, sides[1].folds, self.ready.reference)
        row.values += measured(FrechetDistance.values, {"fd_ratio": ratio, "fd_ratio/n": float(count)})

    def time(self) -> None:
        """Add the latency of every row, all in turns in the first process."""
        images, batch = self.settings.latency_images, self.settings.throughput_batch
        protocol, drawers = self.plan.protocol, [row.drawer for row in self.rows]
        prompts = protocol.prompts(min(max(images, batch), protocol.n))
        first = 0 if self.plan.teacher else None
        times = self.ready.processes.from_first(lambda: latencies(drawers, prompts, images, batch, first))
        for row, values in zip(self.rows, times, strict=True):
            row.values += values

    def results(self, seconds: float, complete: bool = True) -> dict[str, Any]:
        """What results.json holds of the rows that are finished."""
        doubts = self.doubts()
        if not complete:
            doubts.append("the run ended early; the same command goes on where it was.")
        results = results_of(
            self.rows, self.parts, batch=self.settings.batch, device=self.device, seconds=seconds, warnings=doubts,
        )  # fmt: skip
        return results | {"complete": complete}

    def check_disk(self) -> None:
        """Raises UserError when the samples that may have to be drawn don't fit on the disk of `out`."""
        plan = self.plan
        pixels = [(plan.n, drawer) for drawer in plan.students]
        pixels += [(plan.teacher_n, drawer) for drawers in plan.teacher for drawer in drawers]
        pixels += [(plan.n, drawer) for drawer in plan.students] * (len(list(self.settings.seeds)) - 1)
        share = sum(part.n for part in plan.parts) / plan.n
        needed = share * sum(n * 3 * math.prod(drawer.sampler.resolution) for n, drawer in pixels)
        have = sum(file.stat().st_size for file in self.folder.glob("*/*.safetensors"))
        free = shutil.disk_usage(self.folder.parent).free
        if needed - have + DISK_MARGIN > free:
            raise UserError(
                f"--out {self.folder.parent} needs about {(needed - have) / 1e9:.1f} GB for samples, but "
                f"{free / 1e9:.1f} GB are free there; choose another disk or a smaller --n."
            )

    def doubts(self) -> list[str]:
        """What a reader of the numbers has to know."""
        doubts, n, teacher_n = [], self.plan.n, self.plan.teacher_n
        if teacher_n != n:
            doubts.append(
                f"the teacher was measured on {teacher_n} samples, the others on {n}; ratios use the first "
                f"{min(n, teacher_n)} of both."
            )
        sizes = {sampler.resolution for sampler in self.plan.samplers}
        if len(sizes) > 1:
            doubts.append(f"the pipelines draw images of different sizes: {sorted(sizes)}.")
        for row in self.rows:
            doubts += [
                doubt
                for doubt in (
                    *self.ready.doubts(row.facts, row.n),
                    *(doubt for done in row.measured for doubt in done.doubts),
                )
                if doubt not in doubts
            ]
        return doubts


def over_seeds(repeats: Sequence[Sequence[Value]]) -> list[Value]:
    """Of each main value of several repeats the mean, with its standard error, and the spread; and of those that are
    better lower the minimum, which EDM and EDM2 publish of three: it lies below the mean by about 0.85 spreads.
    """
    values = []
    for value in repeats[0] if len(repeats) > 1 else ():
        numbers = [one.value for repeat in repeats for one in repeat if one.name == value.name]
        if value.main and len(numbers) == len(repeats):
            spread = statistics.stdev(numbers)
            mean = statistics.fmean(numbers), spread / math.sqrt(len(numbers))
            values += [
                replace(value, name=f"{value.name}/mean_of_{len(numbers)}", value=mean[0], se=mean[1]),
                replace(value, name=f"{value.name}/spread", value=spread, se=None, better="none", main=False),
            ]
            if value.better == "lower":
                name = f"{value.name}/min_of_{len(numbers)}"
                values.append(replace(value, name=name, value=min(numbers), se=None))
    return values


def _setting(drawer: Drawer) -> str:
    return f"{drawer.steps} step{'s' if drawer.steps > 1 else ''}, guidance {drawer.guidance:g}"
