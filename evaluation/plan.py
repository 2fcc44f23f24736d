"""What a run measures: pipelines at their settings, the protocol they all fit, and whether that can be done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evaluation.companion import Part, parts
from evaluation.measure import DISTANCES
from evaluation.processes import ready_device
from evaluation.protocol import Protocol, checked_n, chosen_protocol, get_protocol
from evaluation.references import NamedReference
from evaluation.settings import Place, Settings
from evaluation.weights import find_pipeline
from stepdistill.errors import UserError

if TYPE_CHECKING:
    from stepdistill.drawing import Drawer, Sampler


@dataclass(frozen=True)
class Plan:
    """parts: the protocol with its metrics, and what is measured under its companion. students: in the order of the report.
    teacher: for each step count, its own first, the settings to try.
    """

    parts: list[Part]
    students: list[Drawer]
    teacher: list[list[Drawer]]
    teacher_n: int

    @property
    def protocol(self) -> Protocol:
        return self.parts[0].protocol

    @property
    def n(self) -> int:
        return self.parts[0].n

    @property
    def samplers(self) -> list[Sampler]:
        """Every pipeline, once or more."""
        return [drawer.sampler for drawer in (*self.students, *(d for part in self.teacher for d in part))]


def planned(settings: Settings, device: str) -> Plan:
    """Load the pipelines and look whether they can be measured. Raises UserError for what cannot be done."""
    seeds = list(settings.seeds)
    if not seeds or seeds[0] != 0 or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(
            f"--seeds must begin with 0, the protocol's own, and repeat none, got {', '.join(map(str, seeds))}."
        )
    samplers = [load_pipeline(path, device) for path in settings.pipelines]
    teacher = load_pipeline(settings.teacher, device) if settings.teacher is not None else None
    protocol = _protocol(settings, [*samplers, *([teacher] if teacher else [])])
    names = list(protocol.metrics if settings.metrics is None else settings.metrics)
    measured = parts(protocol, names, checked_n(settings.n, protocol))
    protocol, n = measured[0].protocol, measured[0].n
    teacher_n = n if settings.teacher_n is None else checked_n(settings.teacher_n, protocol)
    if teacher and not any(name.partition("/")[0] in DISTANCES for name in names):
        raise UserError(
            f"comparing with a teacher needs the metric 'fd' or 'fid', got {', '.join(names)}; add it to --metrics."
        )
    if "paired" in names and (teacher is None or teacher_n < n):
        raise UserError("the metric 'paired' needs --teacher, and of it no fewer samples than --n.")
    quantise = protocol.quantise
    students = [drawer for sampler in samplers for drawer in _drawers(sampler, settings, quantise)]
    tried = _teacher_drawers(teacher, students, settings, quantise) if teacher else []
    return Plan(measured, students, tried, teacher_n)


def load_pipeline(path: Place, device: str) -> Sampler:
    """A directory or a repository in the Hugging Face cache. Raises UserError where there is neither."""
    from stepdistill import load

    return load(find_pipeline(path), device=ready_device(device))


def _protocol(settings: Settings, samplers: Sequence[Sampler]) -> Protocol:
    """The named protocol, its files found, or that of a set of real images; every sampler has to fit it."""
    kinds = {sampler.conditions for sampler in samplers}
    if len(kinds) > 1:
        raise UserError(
            f"the pipelines take different conditions ({', '.join(sorted(kinds))}); measure them apart."
        )
    classes = {len(sampler.class_names or ()) for sampler in samplers}
    if len(classes) > 1:
        raise UserError(
            f"the pipelines have different numbers of classes {sorted(classes)}; measure them apart."
        )
    kind, count, where = kinds.pop(), classes.pop(), samplers[0].path
    takes = {"prompt": "prompts", "class": "a class"}.get(kind, "no condition")
    chosen, net = get_protocol(settings.protocol), str(settings.extractor or "scenes-v1")
    own = settings.reference is not None and not isinstance(chosen.reference, NamedReference)
    if own and kind == "prompt" and settings.captions is None:
        raise UserError(
            f"{where} takes prompts, which a folder of images does not have; give --captions to draw for, or "
            "leave --reference out to use a protocol with prompts."
        )
    if own and kind != "prompt" and settings.captions is not None:
        raise UserError(f"{where} takes {takes}, so it has no use for --captions; leave it out.")
    if not own:
        _check_fit(chosen, samplers, takes, count)
    if settings.captions_seed >= 0 and not (own and settings.captions):
        raise UserError(
            "--captions-seed draws from captions of one's own; give --captions and --reference with it."
        )
    return chosen_protocol(
        chosen, settings.reference, settings.captions, classes=count, extractor=net, n=settings.n,
        captions_seed=settings.captions_seed,
    )  # fmt: skip


def _check_fit(protocol: Protocol, samplers: Sequence[Sampler], takes: str, classes: int) -> None:
    """Raises UserError where the samplers cannot draw what a protocol asks for."""
    where = samplers[0].path
    if protocol.has_text != (takes == "prompts"):
        needs = "a pipeline with prompts" if protocol.has_text else "a pipeline without prompts"
        raise UserError(
            f"the protocol {protocol.name} needs {needs}, but {where} takes {takes}; "
            + ("give --reference with real images." if protocol.has_text else "name another protocol.")
        )
    if takes == "a class" and classes != protocol.classes:
        raise UserError(
            f"the protocol {protocol.name} has {protocol.classes} classes, but {where} has {classes}."
        )
    for sampler in samplers:
        if protocol.resolution and tuple(sampler.resolution) != (protocol.resolution, protocol.resolution):
            height, width = sampler.resolution
            raise UserError(
                f"the protocol {protocol.name} wants images of {protocol.resolution}x{protocol.resolution}, but "
                f"{sampler.path} draws {width}x{height}."
            )


def _drawers(sampler: Sampler, settings: Settings, quantise: str) -> list[Drawer]:
    """A pipeline at every setting it is measured at. Raises UserError for what it cannot do."""
    counts = tuple(settings.steps) if settings.steps else sampler.steps or (sampler.default_steps,)
    for count in counts:
        if count < 1 or (sampler.steps and count not in sampler.steps):
            known = ", ".join(map(str, sampler.steps or ("1 or more",)))
            raise UserError(f"--steps {count} is not what {sampler.path} was trained for; it has {known}.")
    guidance = settings.guidance
    if guidance is not None and guidance != 1 and sampler.guidance_free:
        raise UserError(
            f"--guidance {guidance:g} has no effect: {sampler.path} needs no guidance; leave it out."
        )
    return [
        sampler.at(count, guidance, chunk=settings.batch, quantise=quantise)
        for count in dict.fromkeys(counts)
    ]


def _teacher_drawers(
    teacher: Sampler, students: Sequence[Drawer], settings: Settings, quantise: str
) -> list[list[Drawer]]:
    """The teacher at its own step count and then at each of the students', each at every scale to try."""
    scales = [1.0] if teacher.guidance_free else list(dict.fromkeys(map(float, settings.teacher_guidance)))
    full = settings.teacher_steps or teacher.default_steps
    others = sorted({drawer.steps for drawer in students} - {full})
    # An autoregressive one has a step for each of its codes, and no others; what it was asked for is refused by `at`.
    counts = [full, *(count for count in others if not teacher.steps or count in teacher.steps)]
    return [
        [teacher.at(count, scale, chunk=settings.batch, quantise=quantise) for scale in scales]
        for count in counts
    ]
