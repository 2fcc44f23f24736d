"""A recipe as a run: build family and data, train its stages one after another, export what came out."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import AutocastKwargs, GradientAccumulationPlugin, gather_object
from torch import Tensor

from stepdistill.config import dump
from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from training.checkpoint import Checkpoint, RunDirectory
from training.data import Source
from training.disk import with_room
from training.exporting import Exported
from training.fitting import check
from training.forecast import forecast
from training.launch import by_main, check_processes, peers
from training.measure import measure
from training.notices import notice
from training.precompute import prepare
from training.recipe import Recipe
from training.sharding import check_launch, unseen
from training.teacher import assess
from training.trackers import trackers
from training.trainer import Trainer


def run(recipe: Recipe, fresh: bool = False) -> None:
    """Train every stage and export the student; an interrupted run goes on where it was."""
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    accelerator = accelerator_of(recipe)
    main = accelerator.is_main_process
    directory = RunDirectory(recipe.run.out, recipe.run.keep, recipe.run.on_full_disk)
    family, sources = build(recipe)
    for stage in recipe.stages():
        stage.optim.split(accelerator.num_processes)
    family.to(accelerator.device)
    done = by_main(lambda: directory.begin(recipe, fresh))
    try:
        for note in directory.notes:
            say(main, note)
        exported = not family.exportable or directory.exported() == done
        if done >= recipe.total_steps and exported and directory.finished(done):
            say(main, f"{directory.path} is finished at step {done}; nothing to do (--fresh starts over).")
        else:
            _train(recipe, accelerator, family, sources, directory, done)
    finally:
        accelerator.end_training()
        directory.lock.release()


def _train(
    recipe: Recipe,
    accelerator: Accelerator,
    family: Family,
    sources: list[Source],
    directory: RunDirectory,
    done: int,
) -> None:
    """What is left to do of a run of which so many steps are done."""
    main = accelerator.is_main_process
    for source in dict.fromkeys(sources):
        say(main, f"data {source.describe()}")
    if cut := _cut(family, sources):
        say(main, notice("W05", cut))
    count = accelerator.num_processes
    say(
        main, f"{count} process{'es' * (count > 1)} on {accelerator.device}, precision {recipe.run.precision}"
    )
    if not done:
        say(main, _assessed(accelerator, recipe, family, sources[0]))
    made = trackers(directory.path, recipe.run.trackers, done, recipe.run.on_full_disk) if main else []
    accelerator.log_with = made
    accelerator.init_trackers("stepdistill")
    with peers(accelerator.num_processes):
        trainer = _stages(recipe, accelerator, family, sources, directory, done)
        _finish(trainer, accelerator)


def _cut(family: Family, sources: list[Source], most: int = 10_000) -> str:
    """A sentence on captions that the text encoders do not read to their end, "" where there are none."""
    if family.conditions != "prompt":
        return ""
    captions = [text for source in set(sources) for text in itertools.islice(source.all_captions(), most)]
    cut = family.cut(captions)
    return f"{cut:,} of {len(captions):,} prompts are cut at the tokenizer's limit." if cut else ""


def _assessed(accelerator: Accelerator, recipe: Recipe, family: Family, source: Source) -> str:
    """A line on the teacher."""
    micro, _ = recipe.stages()[0].optim.split(accelerator.num_processes)
    return by_main(lambda: assess(recipe, family, source, accelerator.device, micro))


def _check_alike(accelerator: Accelerator, data: Mapping[str, str]) -> None:
    """UserError, and everybody's end, where processes read other data: each takes its share of one order."""
    told = gather_object([dict(data)])

    def check() -> None:
        for number, each in enumerate(told):
            if each["fingerprint"] != told[0]["fingerprint"]:
                raise UserError(
                    f"data: process {number} reads {each['said']}, and process 0 reads {told[0]['said']}; give all machines the"
                    " same files at the same place."
                )

    by_main(check)


def accelerator_of(recipe: Recipe) -> Accelerator:
    """accelerate's, as every run here is set up. Raises UserError for what the trainer cannot serve."""
    check_processes()
    precision = recipe.run.precision
    # Its cache would hand weights that were cast under no_grad (backward simulation) to the call that trains,
    # which then has no gradient.
    autocast = AutocastKwargs(cache_enabled=False)
    # accelerate takes several processes without a GPU for one each unless it is told that the CPU is meant.
    cpu = not torch.accelerator.is_available()
    # The trainer accumulates by itself; a number in the environment would divide gradients once more.
    once = GradientAccumulationPlugin(num_steps=1)
    check_launch()
    with unseen():
        accelerator = Accelerator(
            mixed_precision=precision, cpu=cpu, kwargs_handlers=[autocast], gradient_accumulation_plugin=once
        )
    # accelerate would train in float32 and not say so.
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError(
            "run.precision=fp16 needs a GPU, and this run is on the CPU; use run.precision=no or bf16."
        )
    if accelerator.distributed_type is DistributedType.MEGATRON_LM:
        raise UserError(
            "the trainer cannot shard networks with Megatron-LM; launch it with one of training/accelerate/*.yaml."
        )
    return accelerator


def _stages(
    recipe: Recipe,
    accelerator: Accelerator,
    family: Family,
    sources: list[Source],
    directory: RunDirectory,
    done: int,
) -> Trainer:
    """Every stage that is not over yet, one after another; the last one's trainer."""
    student: Denoiser | None = None
    extras, offset = None, 0
    # The main process has read every byte of it.
    checkpoint = directory.load(done, verify=accelerator.is_main_process) if done else None
    reached = checkpoint.extra["stage"] if checkpoint is not None else 0
    for number, (stage, source) in enumerate(zip(recipe.stages(), sources, strict=True)):
        if number >= reached:
            method = stage.new_method()
            batches = prepare(stage, method, family, source, accelerator)
            _check_alike(accelerator, batches.data)
            # Of the stage before.
            accelerator.free_memory()
            place = {"stage": number, "offset": offset, "student": student, "extras": extras}
            trainer = Trainer(stage, recipe, accelerator, method, family, batches, directory, **place)
            if checkpoint is not None:
                trainer.restore(checkpoint)
                say(accelerator.is_main_process, f"resuming {directory.path} at step {checkpoint.step}")
                # It is as large as the run, and lies in its networks now.
                checkpoint = None
            student, extras = trainer.fit(), trainer.modules
            if trainer.sharding and number + 1 < len(sources):
                # Shards cannot be copied: the next stage starts from the files.
                made, kept = Exported.of(recipe, "latest"), directory.load(trainer.state.global_step, False)
                family, student = made.family, made.student
                extras = {name: _Weights(kept, name) for name in kept.networks}
        offset += stage.run.steps
    return trainer


@dataclass(frozen=True)
class _Weights:
    """A network of a stage before, as its checkpoint has it."""

    checkpoint: Checkpoint
    name: str

    def state_dict(self) -> dict[str, Tensor]:
        return self.checkpoint.weights(self.name)


def _finish(trainer: Trainer, accelerator: Accelerator) -> None:
    """Measure the family's own metrics, at every number of steps, and write the student directory. The main process does
    it, and with networks in shards all draw.
    """
    main = accelerator.is_main_process
    if not main and not trainer.sharding:
        return
    family, student, step = trainer.family, trainer.student, trainer.state.global_step
    sampler, logged = student.sampler(step), trainer.directory.logged(step)
    for name in family.metrics:
        for steps in sorted(sampler.steps or (sampler.default_steps,)):
            label = name if steps == sampler.default_steps else f"{name}@{steps}"
            # A run that was killed after this has it already.
            value = logged.get(f"metric/{label}")
            if value is None:
                value = measure(trainer.run, family, sampler, name, steps).value
                accelerator.log({f"metric/{label}": value}, step)
            say(main, f"{name} = {value:.3f} at {steps} step{'s' * (steps > 1)}")
    if not main:
        return
    if family.exportable:
        # What the checkpoint holds is whole.
        made = Exported.of(trainer.whole, "latest") if trainer.sharding else None
        full = trainer.run.on_full_disk
        with_room(full, f"writing {student.directory}", lambda: student.write(step, made))
        say(True, f"exported to {student.directory}")
    trainer.directory.finish(step)


def build(recipe: Recipe) -> tuple[Family, list[Source]]:
    """The family and, per stage, the data source, checked against what the methods need."""
    family = recipe.new_family()
    made: dict[str, Source] = {}
    sources = []
    for number, stage in enumerate(recipe.stages()):
        source = made.setdefault(str(stage.data.mapping()), stage.data.make())
        try:
            check(stage, family, source)
        except UserError as error:
            if not recipe.partials:
                raise
            raise UserError(f"stages.{number}: {error}") from None
        sources.append(source)
    return family, sources


def dry_run(recipe: Recipe) -> str:
    """The resolved recipe, what the data holds, and the memory that each stage takes."""
    processes = accelerator_of(recipe).num_processes
    family, sources = build(recipe)
    lines = [dump(recipe).rstrip(), ""]
    for number, (stage, source) in enumerate(zip(recipe.stages(), sources, strict=True)):
        lines.append(
            f"stage {number}: {stage.method.name}, {stage.run.steps:,} steps of batch {stage.optim.batch_size}"
        )
        lines.append(f"  data      {source.describe()}")
        lines += forecast(stage, family, source, processes).lines()
    return "\n".join(lines)


def say(main: bool, text: str) -> None:
    """A line for the person at the terminal, from the main process alone; nothing where there is none."""
    if main and text:
        print(text, file=sys.stderr, flush=True)
