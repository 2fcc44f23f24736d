"""What a recipe takes on a cluster, before one is rented: `python -m training.plan RECIPE.yaml --gpus 8 --gpu h100-80g`.

Memory is counted on tensors without content, as `--dry-run` does; time is a roofline of the GPU's and the network's numbers.
A teacher of a known full-size configuration need not be there (training/layouts.json).
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from training.hardware import GPU, GPUS, THIS_CPU, this_cpu

if TYPE_CHECKING:
    from torch import nn

    from training.forecast import Forecast, Work
    from training.recipe import Recipe


# GPUs of a machine.
MACHINE = 8
# Bytes the libraries, the communication's buffers and unused remainders of blocks take on a GPU.
RESERVE = 3e9
# A block's weights: in use, and on their way; its gradient: made, and on its way.
IN_FLIGHT = 4
# Iterations over which phases are counted.
PERIOD = 60
# Moved by an optimiser's step: weight, gradient and two moments read, three written, in float32.
STEP_BYTES = 28


@dataclass(frozen=True)
class Way:
    """One way to run a stage.

    Attributes:
        name: "DDP", "FSDP2", with " + LoRA" behind.
        memory: bytes on each GPU, beside RESERVE.
        sent: bytes each GPU receives in an iteration.
        seconds: of an iteration, at what of the roofline is reached.
        samples: drawn in an iteration by all phases, over all GPUs.
    """

    name: str
    memory: float
    sent: float
    seconds: float
    samples: float

    def fits(self, gpu: GPU) -> bool:
        return self.memory + RESERVE <= gpu.memory * 1e9


@dataclass(frozen=True)
class Shares:
    """How processes hold networks: parts of each, and how many times over."""

    parts: int
    copies: int

    @classmethod
    def of(cls, processes: int, sharded: bool) -> Shares:
        """As the files in training/accelerate have it: shards within a machine, copies beyond."""
        parts = min(processes, MACHINE) if sharded else 1
        return cls(parts, processes // parts)


def memory(said: Forecast, shares: Shares) -> dict[str, float]:
    """Bytes on a process during each phase."""
    from stepdistill.lora import LoRA

    parts, found = shares.parts, {}
    whole = {name for name, module in said.modules.items() if isinstance(module, LoRA)}
    lasting = float(sum(said.helpers.values()))
    for name, each in said.networks.items():
        cut = (
            1 if name in whole or not (each.trained or name == "teacher" or _denoises(said, name)) else parts
        )
        lasting += (each.weights + each.optimizer + each.average) / cut
        if parts == 1 or name in whole:
            # What DistributedDataParallel gathers gradients in.
            lasting += each.gradients if shares.copies * parts > 1 else 0
    for phase, work in said.work.items():
        gradients = sum(said.networks[n].gradients / (1 if n in whole else parts) for n in work.trains)
        found[phase] = lasting + gradients + work.passes
        if parts > 1:
            found[phase] += _fetched(said, work)
        elif said.phases[phase] - said.lasting < gradients + work.passes:
            # Activations have gone by the time gradients are all there.
            found[phase] += said.phases[phase] - said.lasting - gradients - work.passes
    return found


def _denoises(said: Forecast, name: str) -> bool:
    from stepdistill.denoiser import Denoiser

    return isinstance(said.modules[name], Denoiser)


def _based(module: nn.Module) -> nn.Module:
    """What is cut of a network: that which adapters lie over, in their place."""
    from stepdistill.lora import LoRA

    while isinstance(module, LoRA):
        module = module.base
    return getattr(module, "network", module)


def _sizes(parts: list[nn.Module]) -> list[int]:
    """Bytes of each; what lies in one that came before counts there."""
    from training.ledger import bytes_of

    sizes: list[int] = []
    counted: set[int] = set()
    for part in parts:
        sizes.append(bytes_of(part, lambda weight: id(weight) not in counted))
        counted.update(map(id, part.parameters()))
    return sizes


def _fetched(said: Forecast, work: Work) -> float:
    """The most that is whole at a time: everything around blocks, and a few blocks."""
    from training.ledger import bytes_of
    from training.sharding import units

    around, largest = 0.0, 0.0
    for root in {
        id(r): r for r in (_based(said.modules[n]) for n in work.calls if n in said.modules)
    }.values():
        sizes = _sizes(units(root))
        around += bytes_of(root) - sum(sizes)
        largest = max(largest, *sizes, 0)
    return around + IN_FLIGHT * largest


def sent(said: Forecast, work: Work, passes: int, shares: Shares) -> tuple[float, float]:
    """Bytes each process receives in one phase: (within a machine, beyond it)."""
    from stepdistill.lora import LoRA
    from training.ledger import bytes_of

    parts, copies = shares.parts, shares.copies
    within = beyond = 0.0
    if parts > 1:
        for name, calls in work.calls.items():
            module = said.modules.get(name)
            if module is not None:
                times = calls + work.recorded[name]
                within += passes * times * bytes_of(_based(module)) * (parts - 1) / parts
    for name in work.trains:
        size, adapters = said.networks[name].gradients, isinstance(said.modules[name], LoRA)
        if parts > 1 and not adapters:
            within += passes * size * (parts - 1) / parts
            beyond += passes * 2 * size / parts * (copies - 1) / copies
        else:
            everywhere = 2 * size * (parts * copies - 1) / (parts * copies)
            within += everywhere
            beyond += everywhere / MACHINE if parts * copies > MACHINE else 0.0
    return within, beyond


def seconds(said: Forecast, work: Work, passes: int, gpu: GPU, half: bool) -> float:
    """Of one phase's passes and its optimisers' steps, on one GPU at its peak."""
    compute = work.flops / ((gpu.half if half else gpu.single) * 1e12)
    # What is made is written once and read about twice.
    moved = 3 * work.made / (gpu.bandwidth * 1e9)
    trained = sum(said.networks[name].trained for name in work.trains)
    return passes * max(compute, moved) + STEP_BYTES * trained / (gpu.bandwidth * 1e9)


def way(name: str, said: Forecast, stage: Recipe, processes: int, gpu: GPU) -> Way:
    """One way to run a stage of which `said` is the forecast."""
    shares = Shares.of(processes, name.startswith("FSDP2"))
    _, passes = stage.optim.split(processes)
    counts = Counter(phase.name for step in range(PERIOD) for phase in stage.new_method().phases(step))
    each = {phase: counts[phase] / PERIOD for phase in said.work}
    busy = waited = within = beyond = 0.0
    for phase, work in said.work.items():
        rate = each[phase]
        busy += rate * seconds(said, work, passes, gpu, stage.run.precision != "no")
        near, far = sent(said, work, passes, shares)
        within, beyond = within + rate * near, beyond + rate * far
    waited = within / (gpu.within * 1e9) + beyond / (gpu.beyond * 1e9)
    samples = stage.optim.batch_size * sum(each.values())
    most = max(memory(said, shares).values(), default=float(said.lasting))
    # Communication goes on beside passes, as far as there are any.
    return Way(name, most, within + beyond, max(busy, waited) / gpu.efficiency, samples)


def forecasts(stage: Recipe, made: tuple[Any, Any], processes: int) -> dict[str, Forecast]:
    """Of the stage as it is, by "", and of its networks as LoRAs, by "LoRA", where they can be. made: family and data.

    Raises:
        UserError: the stage cannot be counted.
    """
    from stepdistill.errors import UserError
    from training.forecast import forecast

    found = {"": forecast(stage, *made, processes)}
    if found[""].unknown:
        raise UserError(f"the recipe cannot be planned: {found[''].unknown}")
    adapted = None if stage.student.lora else with_adapters(stage)
    # A layer may be smaller than the rank.
    with contextlib.suppress(UserError):
        if adapted is not None and not (said := forecast(adapted, *made, processes)).unknown:
            found["LoRA"] = said
    return found


def ways(stage: Recipe, known: Mapping[str, Forecast], processes: int, gpu: GPU) -> list[Way]:
    """Every way to run a stage, of which the first that fits should be taken. known: its `forecasts`."""
    found = []
    for suffix, said in known.items():
        label = " + LoRA" if suffix or stage.student.lora else ""
        recipe = with_adapters(stage) if suffix else stage
        for kind in ("DDP", "FSDP2") if processes > 1 else ("one process",):
            found.append(way(f"{kind}{label}", said, recipe, processes, gpu))
    return found


def with_adapters(stage: Recipe, rank: int = 64) -> Recipe | None:
    """The stage with its student, and its fake score where it has one, as LoRAs over one teacher; None where its method or
    its start does not take them.
    """
    from stepdistill.errors import UserError
    from stepdistill.lora import LoraConfig

    if stage.student.init != "teacher" or stage.new_method().sampling.inputs:
        return None
    method = stage.method
    if hasattr(method.config, "fake_score_lora"):
        method = replace(method, config=replace(method.config, fake_score_lora=LoraConfig(rank)))
    try:
        changed = replace(stage, student=replace(stage.student, lora=LoraConfig(rank)), method=method)
        changed.new_method()
        return changed
    except (UserError, ValueError):
        return None


def subject(stage: Recipe, layout: str = "") -> tuple[Any, Any]:
    """Family and data of a stage, on paper where its teacher is of a known layout.

    Raises:
        UserError: the teacher is neither here nor of a known layout.
    """
    from stepdistill.errors import UserError
    from training.layouts import LAYOUTS, PaperSource, layout_of, on_paper
    from training.run import build

    teacher = getattr(stage.family.config, "teacher", "")
    if layout and layout not in LAYOUTS:
        raise UserError(f"--layout {layout}: there are {', '.join(LAYOUTS)}.")
    if name := layout or layout_of(teacher):
        return on_paper(name, stage), PaperSource()
    family, sources = build(stage)
    return family, sources[0]


def lines(stage: Recipe, found: list[Way], processes: int, gpu: GPU, price: float) -> list[str]:
    """For people."""
    rows = [
        f"  {'':<16}{'GB per GPU':>11}{'GB sent':>9}{'s/iteration':>13}{'samples/s':>11}{'GPU hours':>11}"
        + ("{:>11}".format("cost") if price else "")
    ]
    for each in found:
        hours = stage.run.steps * each.seconds * processes / 3600
        row = f"  {each.name:<16}{(each.memory + RESERVE) / 1e9:>11.1f}{each.sent / 1e9:>9.1f}{each.seconds:>13.3g}"
        row += f"{each.samples / each.seconds:>11.3g}{hours:>11,.0f}" + (
            f"{hours * price:>11,.0f}" if price else ""
        )
        rows.append(row + ("" if each.fits(gpu) else "  does not fit"))
    fitting = [each.name for each in found if each.fits(gpu)]
    rows.append(
        f"  take {fitting[0]}"
        if fitting
        else "  nothing fits: take more or larger GPUs, gradient_checkpointing, or a smaller micro_batch_size"
    )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; what is wrong with it is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="training.plan",
        description="Memory, communication, time and cost of a recipe on so many GPUs, and which way of running it fits.",
    )
    parser.add_argument("recipe", help="a YAML file, such as those in training/recipes/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe"
    )
    parser.add_argument("--gpus", type=int, default=8, help="how many, machines of eight (default: 8)")
    parser.add_argument("--gpu", default="h100-80g", help=f"one of {', '.join(GPUS)}, or {THIS_CPU}")
    parser.add_argument("--layout", default="", help="take the teacher for one of training/layouts.json")
    parser.add_argument("--price", type=float, default=0.0, help="of a GPU for an hour, in any currency")
    from stepdistill.errors import UserError, cli_errors, quieten_libraries
    from stepdistill.registry import add_allow_code, allowing_code

    add_allow_code(parser)
    with cli_errors():
        given = parser.parse_intermixed_args(arguments)
        if given.gpu not in (*GPUS, THIS_CPU):
            raise UserError(f"--gpu {given.gpu}: there are {', '.join(GPUS)}, and {THIS_CPU}.")
        if given.gpu == THIS_CPU and given.gpus != 1:
            raise UserError(f"--gpu {THIS_CPU}: there is one of it; add --gpus 1.")
        if given.gpus < 1 or (given.gpus > MACHINE and given.gpus % MACHINE):
            raise UserError(f"--gpus {given.gpus}: give 1 to {MACHINE}, or a multiple of {MACHINE}.")
        if given.price < 0:
            raise UserError(f"--price {given.price:g}: give 0 or more.")
        from training.recipe import load_recipe

        with allowing_code(given.allow_code):
            recipe = load_recipe(given.recipe, given.overrides)
            quieten_libraries()
            gpu = this_cpu() if given.gpu == THIS_CPU else GPUS[given.gpu]
            for number, stage in enumerate(recipe.stages()):
                known = forecasts(stage, subject(stage, given.layout), given.gpus)
                found = ways(stage, known, given.gpus, gpu)
                print(
                    f"stage {number}: {stage.method.name}, {stage.run.steps:,} iterations on {given.gpus} x {given.gpu}"
                )
                print("\n".join(lines(stage, found, given.gpus, gpu, given.price)))
            print(
                f"Time is the roofline at {gpu.efficiency:.0%}; {RESERVE / 1e9:g} GB of each GPU are kept for libraries."
            )


if __name__ == "__main__":
    main()
