"""What a stage takes before it is run: parameters and memory of each network, from one step on tensors without content."""

from __future__ import annotations

import copy
import gc
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.denoiser import map_cond, parameter_count
from stepdistill.errors import UserError, first_line
from stepdistill.families.base import Family
from stepdistill.lora import LoRA
from stepdistill.methods.assemble import assemble, trained_by
from stepdistill.methods.base import Batch, Method, Networks, Pairs, Phase
from stepdistill.noise import SampleNoise
from training.data import Source
from training.ledger import META, Ledger, bytes_of, counted, without_content
from training.optimizers import state_bytes
from training.precompute import answers
from training.recipe import Recipe

# Iterations among which every phase of a method has its turn.
LOOKED_AT = 64


@dataclass
class NetworkMemory:
    """Bytes of one network. activations: what its passes hold at the peak of the phase that holds most."""

    parameters: int
    trained: int
    weights: int
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    activations: int = 0


@dataclass
class Work:
    """One pass of a phase on one process.

    Attributes:
        passes: the most its activations and batch take, in bytes, beside weights and gradients.
        flops: of products and convolutions. made: bytes of all tensors it makes.
        calls: forward passes by network; recorded: those of them that are differentiated.
        trains: names of networks.
    """

    passes: int
    flops: int
    made: int
    calls: dict[str, float]
    recorded: dict[str, float]
    trains: tuple[str, ...]


@dataclass
class Forecast:
    """Memory of a stage on one process, in bytes.

    Attributes:
        networks: by name; helpers are those of the family that stay: decoder, text encoders.
        lasting: weights, optimiser states and the average.
        phases: the most that is held during each phase: `lasting`, gradients, activations and the batch.
        unknown: why the activations could not be counted, "" if they were.
        work: what a pass of each phase does.
        modules: the networks without content.
    """

    networks: dict[str, NetworkMemory]
    helpers: dict[str, int]
    lasting: int = 0
    phases: dict[str, int] = field(default_factory=dict)
    unknown: str = ""
    work: dict[str, Work] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return max(self.phases.values(), default=self.lasting)

    def lines(self) -> list[str]:
        """For people: a table in MiB."""
        heads = ("weights", "gradients", "optimizer", "average", "activations")
        rows = [f"  {'MiB':<22}{'parameters':>16}{'trained':>16}" + "".join(f"{head:>13}" for head in heads)]
        for name, each in self.networks.items():
            sizes = "".join(f"{getattr(each, head) / 2**20:>13,.1f}" for head in heads)
            rows.append(f"  {name:<22}{each.parameters:>16,}{each.trained:>16,}{sizes}")
        rows += [f"  {name:<54}{size / 2**20:>13,.1f}" for name, size in self.helpers.items()]
        if self.unknown:
            return [*rows, f"  memory    {self.lasting / 2**20:,.0f} MiB before activations ({self.unknown})"]
        worst = max(self.phases, key=self.phases.get)
        return [
            *rows,
            f"  memory    {self.peak / 2**20:,.0f} MiB at most, in phase {worst!r}, beside the libraries",
        ]


def forecast(stage: Recipe, family: Family, source: Source, processes: int = 1) -> Forecast:
    """What `stage` takes on each process. Nothing is computed and the family stays as it is."""
    method, micro = stage.new_method(), stage.optim.split(processes)
    shadow = _shadow(family)
    wanted = stage.student
    how = {"gradient_checkpointing": wanted.gradient_checkpointing, "dropout": wanted.dropout}
    made = assemble(method, shadow, wanted.init, lora=wanted.lora, **how)
    modules = {name: module.to(META) for name, module in made.modules.items()}
    nets = Networks(modules, family.schedule, shadow.decode)
    lasting = {"decoder": shadow.vae} if hasattr(shadow, "vae") else {}
    trained = trained_by(method, stage.run.steps)
    for name, module in modules.items():
        module.requires_grad_(name in trained)
    said = Forecast(_networks(modules, trained, stage), _helpers(stage, method, family, source))
    said.modules = modules
    if family.teacher is not None and "teacher" not in said.networks:
        # Kept for previews, or as what adapters adapt.
        said.helpers["teacher, unused"] = bytes_of(family.teacher)
    said.lasting = sum(n.weights + n.optimizer + n.average for n in said.networks.values()) + sum(
        said.helpers.values()
    )
    try:
        for phase in _phases(method, stage.run.steps):
            make = _batch(method, family, source, micro[0])
            _count(said, stage, phase, nets, lasting, make, micro[1])
        if isinstance(made.student, LoRA) and family.exportable:
            # Adapters leave merged into a copy of what they adapt, beside all that training holds.
            said.phases["export"] = said.lasting + bytes_of(made.student.base)
    except UserError:
        # The run would end with it too.
        raise
    except Exception as error:
        # Foreign networks and methods may do what has no meaning without content.
        said.unknown = f"a step could not be counted: {first_line(error)}"
    return said


def _networks(modules: dict[str, nn.Module], trained: list[str], stage: Recipe) -> dict[str, NetworkMemory]:
    found = {}
    for name, module in modules.items():
        learning = bytes_of(module, lambda p: p.requires_grad) if name in trained else 0
        count = sum(p.numel() for p in module.parameters() if p.requires_grad) if learning else 0
        moments = state_bytes(module, stage.optim.for_network(name).optimizer) if learning else 0
        found[name] = NetworkMemory(
            parameter_count(module), count, bytes_of(module), learning, moments, 4 * count if name == "student" else 0
        )  # fmt: skip
    return found


def _helpers(stage: Recipe, method: Method, family: Family, source: Source) -> dict[str, int]:
    """The family's modules that stay in memory while it trains."""
    gone = set()
    if answers(stage, method, family, source):
        gone = set(family.modules()) - {"decoder"}
    return {name: bytes_of(module) for name, module in family.modules().items() if name not in gone}


def _shadow(family: Family) -> Family:
    """The family with a teacher and a decoder without content."""
    shadow = copy.copy(family)
    if family.teacher is not None:
        shadow.teacher = without_content(family.teacher)
    if getattr(family, "pipeline", None) is not None and hasattr(family, "vae"):
        shadow.pipeline = copy.copy(family.pipeline)
        object.__setattr__(shadow.pipeline, "vae", without_content(family.vae))
    return shadow


def _phases(method: Method, steps: int) -> list[Phase]:
    """Each phase once."""
    found: dict[str, Phase] = {}
    for step in range(min(steps, LOOKED_AT)):
        for phase in method.phases(step):
            found.setdefault(phase.name, phase)
    return list(found.values())


@torch.no_grad()
def _batch(method: Method, family: Family, source: Source, size: int) -> Any:
    """Makes a batch whose tensors have shapes alone."""
    prompts = family.prompts(source, [0]) * size
    cond, uncond = (
        map_cond(lambda c: c.to(META), each) for each in (family.encode(prompts[:1]), family.uncond(1))
    )
    settings = method.pairs(family.schedule)
    shape = family.shape
    if source.bucketed:
        # The largest takes the most.
        shape = max((family.shape_at(bucket.size) for bucket in source.buckets), key=math.prod)

    def many(c: Tensor) -> Tensor:
        return torch.empty((size, *c.shape[1:]), dtype=c.dtype, device=META)

    def make(phase: str) -> Batch:
        noise = SampleNoise(range(size), phase=phase, device=META)
        x0 = torch.empty((size, *shape), device=META) if method.needs_images else None
        pairs = None
        if settings is not None:
            ends = {name: torch.empty((size, *family.shape), device=META) for name in ("z", "x0")}
            states = torch.empty((size, len(settings.times), *family.shape), device=META)
            pairs = Pairs(cond=map_cond(many, cond), states=states, **ends)
        told, empty = map_cond(many, cond), map_cond(many, uncond)
        return Batch(told, empty, shape, noise.index, noise, x0, pairs=pairs, prompts=prompts)

    return make


def _count(
    said: Forecast,
    stage: Recipe,
    phase: Phase,
    nets: Networks,
    lasting: dict[str, nn.Module],
    make: Any,
    passes: int,
) -> None:
    """Run a phase and note its peak."""
    for name, module in nets.modules.items():
        module.requires_grad_(name in phase.trains)
        module.zero_grad(set_to_none=True)
    gc.collect()
    with counted(nets.modules | lasting, stage.run.precision) as ledger:
        for _ in range(min(passes, 2)):
            batch = make(phase.name)
            for weight, loss in phase.terms:
                loss(nets, batch)["total"].mean().mul(weight).backward()
    for module in nets.modules.values():
        module.zero_grad(set_to_none=True)
    held = Counter(ledger.peak)
    said.work[phase.name] = _work(ledger, phase.trains, min(passes, 2))
    for name, size in held.items():
        if name in said.networks:
            said.networks[name].activations = max(said.networks[name].activations, size)
    said.phases[phase.name] = said.lasting + held.total()


def _work(ledger: Ledger, trains: tuple[str, ...], passes: int) -> Work:
    calls: Counter[str] = Counter()
    recorded: Counter[str] = Counter()
    for (name, graph), count in ledger.calls.items():
        calls[name] += count
        recorded[name] += count * graph
    each = ({name: count / passes for name, count in counts.items()} for counts in (calls, recorded))
    return Work(ledger.passes, ledger.flops // passes, ledger.made // passes, *each, trains)
