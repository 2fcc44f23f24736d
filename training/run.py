"""A recipe as a run: build family and data, train its stages one after another, export what came out."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from stepdistill import export
from stepdistill.config import dump
from stepdistill.denoiser import Denoiser, parameter_count
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from training.checkpoint import Checkpoint, RunDirectory
from training.data import Source
from training.loggers import Loggers
from training.precompute import latents
from training.recipe import Recipe
from training.trainer import Trainer, measure

CACHE = Path("cache")


def run(recipe: Recipe, fresh: bool = False) -> None:
    """Train every stage and export the student; goes on where an interrupted run of the same recipe stopped."""
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    torch.manual_seed(recipe.run.seed)  # fresh weights; all else draws from `SampleNoise`
    accelerator = Accelerator(mixed_precision=recipe.run.precision)
    main = accelerator.is_main_process
    directory = RunDirectory(recipe.run.out, recipe.run.keep)
    family, sources = build(recipe)
    family.to(accelerator.device)
    if main:
        done = directory.begin(recipe, fresh)
    accelerator.wait_for_everyone()
    if not main:
        done = directory.latest() or 0
    checkpoint = directory.load(done) if done else None
    if done >= recipe.total_steps and directory.student.exists():
        say(main, f"{directory.path} is finished at step {done}; nothing to do (--fresh starts over).")
        return
    loggers = Loggers(directory.path, done) if main else None
    try:
        trainer = _stages(recipe, accelerator, family, sources, directory, loggers, checkpoint)
        if main:
            _finish(trainer, family, directory)
    finally:
        if loggers:
            loggers.close()
        accelerator.end_training()


def _stages(recipe, accelerator, family, sources, directory, loggers, checkpoint) -> Trainer:
    student, offset = None, 0
    for number, (stage, source) in enumerate(zip(recipe.stages(), sources, strict=True)):
        over = checkpoint is not None and checkpoint.extra["stage"] > number
        if not over:
            needs = stage.method.make(stage.student.steps).needs_images
            x0 = _latents(family, source, accelerator) if needs else None
            trainer = Trainer(
                stage, recipe, accelerator, family, source, x0, directory, loggers, stage=number, offset=offset, student=student
            )
            if checkpoint is not None and checkpoint.extra["stage"] == number:
                trainer.restore(checkpoint)
                say(accelerator.is_main_process, f"resuming {directory.path} at step {checkpoint.step}")
            student = trainer.fit()
        offset += stage.run.steps
    return trainer


def _finish(trainer: Trainer, family: Family, directory: RunDirectory) -> None:
    for name in family.metrics:
        value = measure(name, family, trainer.sampler(), 0)
        trainer.loggers.log(trainer.offset + trainer.step, {f"metric/{name}": value})
        say(True, f"{name} = {value:.3f}")
    if family.pipeline is not None or not family.metrics:
        export.write(family, trainer.raw["student"], directory.student, trainer.card())
        say(True, f"exported to {directory.student}")


def build(recipe: Recipe) -> tuple[Family, list[Source]]:
    """The family and, per stage, the data source, checked against what the methods need."""
    family: Family = recipe.family.make()
    made: dict[str, Source] = {}
    sources = []
    for stage in recipe.stages():
        source = made.setdefault(str(stage.data.mapping()), stage.data.make())
        check(stage, family, source)
        sources.append(source)
    return family, sources


def check(recipe: Recipe, family: Family, source: Source) -> None:
    """One sentence for a method, family and data source that do not fit each other."""
    method = recipe.method.make(recipe.student.steps)
    if method.needs_images and not (source.has_images or hasattr(family, "data")):
        raise UserError(f"the method {recipe.method.name!r} needs real images as configured, and data.name={recipe.data.name} has none.")
    if method.needs_teacher and family.teacher is None:
        raise UserError(f"the method {recipe.method.name!r} needs a teacher; set family.teacher and leave family.unet out.")
    if family.conditions == "prompt" and source.captions is None:
        raise UserError(f"the family {family.name!r} is told captions, and data.name={recipe.data.name} has none.")
    if family.conditions == "class":
        if source.labels is None and not hasattr(family, "data"):
            raise UserError(f"the family {family.name!r} is told classes here, and data.name={recipe.data.name} has no labels.")
        if source.class_names:
            if len(source.class_names) != len(family.class_names):
                raise UserError(f"the network has {len(family.class_names)} classes and the data {len(source.class_names)}; make them equal.")
            family.class_names = tuple(source.class_names)
    if source.has_images and source.resolution and method.needs_images and (source.resolution,) * 2 != family.resolution:
        raise UserError(f"data.resolution={source.resolution} differs from the family's {family.resolution[0]}x{family.resolution[1]}; set it to that.")


def _latents(family: Family, source: Source, accelerator: Accelerator) -> Tensor | None:
    """Latents of all images, encoded once per data set and VAE; None where x0 is cheap to make per batch."""
    if not family.latent:
        return None

    def encode(images: Tensor) -> Tensor:
        return family.encode_images(images.to(accelerator.device))

    with accelerator.main_process_first():
        return latents(source, encode, CACHE, family.latent_key(), progress=accelerator.is_main_process)


def export_checkpoint(recipe: Recipe, which: str) -> str:
    """Export the weights (run.export: ema or raw) of one checkpoint to run.out/student-STEP-WEIGHTS."""
    directory = RunDirectory(recipe.run.out, recipe.run.keep)
    directory.check(recipe)
    chosen = {"latest": directory.latest(), "best": (directory.best() or (None,))[0]}.get(which, which)
    if chosen is None or not str(chosen).isdecimal():
        raise UserError(f"--export {which}: give a step, 'best' or 'latest'; there are checkpoints of steps {directory.steps()}.")
    checkpoint: Checkpoint = directory.load(int(chosen))
    family, sources = build(recipe)
    number, offset = checkpoint.extra["stage"], 0
    stages = recipe.stages()
    offset = sum(stage.run.steps for stage in stages[:number])
    trainer = Trainer(
        stages[number], recipe, Accelerator(cpu=True), family, sources[number], None, directory, None, stage=number, offset=offset
    )
    trainer.restore(checkpoint)
    target = directory.path / f"student-{chosen}-{recipe.run.export}"
    with trainer.exported():
        export.write(family, trainer.raw["student"], target, trainer.card())
    return f"exported to {target}"


def dry_run(recipe: Recipe) -> str:
    """The resolved recipe, what the data holds, and a memory estimate."""
    family, sources = build(recipe)
    lines = [dump(recipe).rstrip(), ""]
    for number, (stage, source) in enumerate(zip(recipe.stages(), sources, strict=True)):
        method = stage.method.make(stage.student.steps)
        student: Denoiser = family.student(stage.student.init, method.student_extras)
        modules = {"student": student} | method.networks(family.teacher if method.needs_teacher else None, student)
        trained = {name for step in range(min(stage.run.steps, 1000)) for phase in method.phases(step) for name in phase.trains}
        bytes_ = sum(parameter_count(m) * 4 * (4 if name in trained else 1) for name, m in modules.items())
        bytes_ += 4 * parameter_count(student)  # the average
        bytes_ += sum(4 * parameter_count(m) for m in (family.teacher, *family.modules().values()) if m is not None)
        lines += [
            f"stage {number}: {stage.method.name}, {stage.run.steps:,} steps of batch {stage.optim.batch_size}",
            f"  data      {source.describe()}",
            *(f"  network   {name}: {parameter_count(m):,} parameters, {'trained' if name in trained else 'frozen'}" for name, m in modules.items()),
            f"  memory    {bytes_ / 2**20:,.0f} MiB for weights, gradients, optimiser and average; activations come on top",
        ]
    return "\n".join(lines)


def say(main: bool, text: str) -> None:
    if main:
        print(text, file=sys.stderr, flush=True)
