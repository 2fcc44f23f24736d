"""The one loop: phases, accumulation, clipping, EMA, logs, previews, metrics, checkpoints, under accelerate.

A method says whose turn it is (`Method.phases`); everything else of a run is here, once. What is random is drawn from
(seed, step, phase, sample index) and data order from the number of batches drawn, so a run that was interrupted and goes on
equals one that was not.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from stepdistill import export
from stepdistill.denoiser import Denoiser, map_cond, unwrap
from stepdistill.ema import EMA
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase
from stepdistill.noise import SampleNoise
from stepdistill.sampling import ImageSampler
from training.checkpoint import Checkpoint, RunDirectory
from training.data import Source, order
from training.loggers import Loggers
from training.preview import draw_preview
from training.recipe import OptimConfig, Recipe

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "radam": torch.optim.RAdam}


class Trainer:
    """Runs one stage of a recipe.

    Args:
        recipe: the stage's recipe; whole: the recipe it came from, for the card.
        stage: its number and the global step it starts at.
        student: carried over from the stage before, or None to start as the recipe says.
    """

    def __init__(
        self, recipe: Recipe, whole: Recipe, accelerator: Accelerator, family: Family, source: Source, x0: Tensor | None,
        directory: RunDirectory, loggers: Loggers | None, *, stage: int = 0, offset: int = 0, student: Denoiser | None = None,
    ):  # fmt: skip
        self.recipe, self.whole, self.accelerator, self.family = recipe, whole, accelerator, family
        self.source, self.x0, self.directory, self.loggers = source, x0, directory, loggers
        self.stage, self.offset, self.run, self.optim = stage, offset, recipe.run, recipe.optim
        self.device = accelerator.device
        self.method: Method = recipe.method.make(recipe.student.steps)
        student = student or family.student(recipe.student.init, self.method.student_extras)
        if recipe.student.gradient_checkpointing:
            _checkpoint_gradients(student)
        modules: dict[str, nn.Module] = {"student": student}
        modules |= self.method.networks(family.teacher if self.method.needs_teacher else None, student)
        self.trained = sorted({name for step in range(self.run.steps) for phase in self.method.phases(step) for name in phase.trains})
        if strangers := set(self.trained) - set(modules):
            raise ValueError(f"{type(self.method).__name__}.phases trains {sorted(strangers)}, which its networks() did not make")
        self.optim.check_networks(self.trained)
        self.raw = {name: module.to(self.device) for name, module in modules.items()}
        for name, module in self.raw.items():
            module.requires_grad_(name in self.trained)
        self.wrapped, self.optimizers = {}, {}
        for name in self.trained:
            pair = (self.raw[name], _optimizer(self.raw[name], self.optim.for_network(name)))
            self.wrapped[name], self.optimizers[name] = accelerator.prepare(*pair)
        self.frozen = {"teacher": family.teacher} if family.teacher is not None else {}
        self.ema = EMA(student, recipe.student.ema)
        self.micro, self.passes = self.optim.split(accelerator.num_processes)
        self.step, self.batches, self.samples = 0, 0, 0
        self.updates: dict[str, int] = defaultdict(int)
        self._sums: dict[str, list[float]] = defaultdict(list)

    # ------------------------------------------------------------------------------------------------------- the loop

    def fit(self) -> Denoiser:
        """Train to the end of the stage and return the student, carrying the weights that are exported."""
        steps, main = self.run.steps, self.accelerator.is_main_process
        bar = tqdm(total=steps, initial=self.step, desc=self.recipe.method.name, unit="step", disable=not main, dynamic_ncols=True)
        self._preview_teacher: Any = None
        if self.step == 0:
            self._every(self.run.preview_every, self._preview, always=self.run.preview_every > 0)
        clock = time.perf_counter()
        try:
            while self.step < steps:
                ran = []
                for phase in self.method.phases(self.step):
                    self._run(phase)
                    ran.append(phase.name)
                self.method.after_step(self._networks(()), self.step, tuple(ran))
                self.step += 1
                bar.update()
                if self.step % self.run.log_every == 0 or self.step == steps:
                    clock = self._log(bar, clock)
                self._every(self.run.preview_every, self._preview)
                self._every(self.run.metric_every, self._measure)
                self._every(self.run.save_every, self.save, always=self.step == steps)
        except KeyboardInterrupt:
            self.save()  # what was learnt is kept; the same command goes on from here
            raise
        finally:
            bar.close()
        if self.run.export == "ema" and self.recipe.student.ema:
            self.ema.put(self.raw["student"])
        return self.raw["student"]

    def _every(self, period: int, action: Callable[[], Any], always: bool = False) -> None:
        if always or (period and self.step % period == 0):
            action()

    def _run(self, phase: Phase) -> None:
        """One optimiser step of one phase: every term of every pass back-propagated in turn, then clip and update."""
        nets = self._networks(phase.trains)
        for name in self.trained:  # frozen parameters get no gradient; the graph through their inputs stays
            self.raw[name].requires_grad_(name in phase.trains)
        started = time.perf_counter()
        last = (self.passes - 1, len(phase.terms) - 1)
        for pass_number, batch in enumerate(self._batches(phase)):
            for term_number, (weight, loss) in enumerate(phase.terms):
                with self._sync(phase, (pass_number, term_number) == last), self.accelerator.autocast():
                    losses = loss(nets, batch)
                    total = self._checked(losses, phase, term_number, batch)
                    self.accelerator.backward(total * (weight / self.passes))
                self._collect(phase.name, losses)
        for name in phase.trains:
            settings, optimizer = self.optim.for_network(name), self.optimizers[name]
            limit = settings.max_grad_norm or float("inf")
            norm = self.accelerator.clip_grad_norm_(self.wrapped[name].parameters(), limit)
            self._sums[f"{phase.name}/grad_norm_{name}"].append(float(norm))
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * settings.lr_factor(self.step, self.run.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.updates[name] += 1
        if "student" in phase.trains:
            self.ema.update(self.raw["student"])
        self._sums[f"{phase.name}/seconds"].append(time.perf_counter() - started)

    def _networks(self, trains: tuple[str, ...]) -> Networks:
        """What is trained comes wrapped, so that processes synchronise; what is frozen comes raw, so that a wrapper does not wait
        for gradients that never come."""
        modules = self.frozen | self.raw | {name: self.wrapped[name] for name in trains}
        return Networks(modules, self.family.schedule, self.family.decode)

    def _sync(self, phase: Phase, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are exchanged between processes in the last backward of an optimiser step only."""
        stack = contextlib.ExitStack()
        if not last:
            for name in phase.trains:
                stack.enter_context(self.accelerator.no_sync(self.wrapped[name]))
        return stack

    def _checked(self, losses: Losses, phase: Phase, term: int, batch: Batch) -> Tensor:
        total = losses["total"]
        if not torch.isfinite(total.detach()).all():
            bad = batch.index[~torch.isfinite(total.detach())].tolist() if total.ndim else batch.index.tolist()
            raise UserError(
                f"the loss of phase {phase.name!r} (term {term}) is not finite at step {self.offset + self.step}, samples "
                f"{bad[:8]}; the last checkpoint is step {self.directory.latest() or 'none'}. Lower optim.lr, set "
                "optim.max_grad_norm, or use run.precision=no."
            )
        return total.mean()

    # ------------------------------------------------------------------------------------------------------- data

    def _batches(self, phase: Phase) -> Iterator[Batch]:
        """This process's passes of the next global batch."""
        picked = order(self.run.seed, self.source.size, self.batches, self.optim.batch_size)
        self.batches += 1
        self.samples += self.optim.batch_size
        for number in range(self.passes):
            first = (number * self.accelerator.num_processes + self.accelerator.process_index) * self.micro
            positions = range(first, first + self.micro)
            yield self._batch(phase, [picked[i] for i in positions], positions)

    def _batch(self, phase: Phase, examples: list[int], positions: range) -> Batch:
        source, family = self.source, self.family
        noise = SampleNoise(positions, self.run.seed, self.offset + self.step, phase.name, self.device)
        cond = _to(family.encode(family.told(source, examples)), self.device)
        x0 = None
        if self.method.needs_images:
            if self.x0 is not None:
                x0 = self.x0[examples].float().to(self.device)
            else:
                x0 = family.examples(source, examples).to(self.device)
        return Batch(cond, _to(family.uncond(len(examples)), self.device), family.shape, noise.index, noise, x0)

    # ------------------------------------------------------------------------------------------------------- what one sees

    def _collect(self, phase: str, losses: Losses) -> None:
        for name, value in losses.items():
            self._sums[f"{phase}/{name}"].append(float(value.detach().float().mean()))

    def _log(self, bar: tqdm, clock: float) -> float:
        now = time.perf_counter()
        values = {name: sum(found) / len(found) for name, found in self._sums.items()}
        self._sums.clear()
        # Phases of unequal pace leave unequal counts: images are counted, not guessed from the step.
        seen, self._seen = self.samples - getattr(self, "_seen", 0), self.samples
        values |= {"images_per_second": seen / (now - clock), "samples": self.samples, "lr": self.optim.lr * self.optim.lr_factor(self.step - 1, self.run.steps)}
        if self.loggers:
            self.loggers.log(self.offset + self.step, values)
        shown = {name: f"{value:.3g}" for name, value in values.items() if name.endswith("/total")}
        bar.set_postfix(shown | {"img/s": f"{values['images_per_second']:.0f}"}, refresh=False)
        return now

    def sampler(self) -> ImageSampler:
        """The student as it would be exported now; use it inside `self.exported()`."""
        return ImageSampler(self.family, self.raw["student"], self.directory.student, self.card(), self.device)

    @contextlib.contextmanager
    def exported(self) -> Iterator[None]:
        """The student carries the weights that are exported, in eval mode, for the length of the block."""
        student = self.raw["student"].eval()
        with self.ema.applied(student) if self._exports_ema else contextlib.nullcontext():
            yield
        student.train()

    @property
    def _exports_ema(self) -> bool:
        return self.run.export == "ema" and self.recipe.student.ema > 0

    def card(self) -> dict[str, Any]:
        weights = "ema" if self._exports_ema else "raw"
        return export.card_of(self.family, self.method, self.whole.mapping(), step=self.offset + self.step, weights=weights)

    def _preview(self) -> None:
        if self.loggers:
            with self.exported():
                path = draw_preview(self)
            self.loggers.image(self.offset + self.step, "preview", path)

    def _measure(self) -> None:
        """The recipe's metric on the exported weights; the best checkpoint is kept."""
        if self.accelerator.is_main_process:
            with self.exported():
                value = measure(self.run.metric, self.family, self.sampler(), self.run.metric_samples)
            self.save()
            best = self.directory.record_best(self.offset + self.step, value)
            if self.loggers:
                self.loggers.log(self.offset + self.step, {f"metric/{self.run.metric}": value})
            tqdm.write(f"step {self.offset + self.step}: {self.run.metric} = {value:.4g}{' (best)' if best else ''}")
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        if self.accelerator.is_main_process:
            tensors = {name: module.state_dict() for name, module in self.raw.items()}
            tensors["student_ema"] = self.ema.state_dict()
            optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
            counters = {"batches": self.batches, "samples": self.samples, "updates": dict(self.updates)}
            extra = {"stage": self.stage, "counters": counters, "method": self.method.state_dict()}
            self.directory.save(self.offset + self.step, tensors, optimizers, extra)
        self.accelerator.wait_for_everyone()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where `save` stopped. Every key of every network must match."""
        for name, module in self.raw.items():
            module.load_state_dict(checkpoint.tensors[name])
        self.ema.load_state_dict(checkpoint.tensors["student_ema"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(checkpoint.optimizers[name])
        counters = checkpoint.extra["counters"]
        self.step, self.batches, self.samples = checkpoint.step - self.offset, counters["batches"], counters["samples"]
        self._seen = self.samples
        self.updates.update(counters["updates"])
        self.method.load_state_dict(checkpoint.extra["method"])


def measure(metric: str, family: Family, sampler: ImageSampler, samples: int) -> float:
    """A metric of `sampler`: one of the family's own, or one of the evaluation package's, such as "fd:scenes-v1"."""
    seed = 10_000_019
    if metric in family.metrics:
        return family.metrics[metric](lambda n: sampler.x0([0] * n, range(seed, seed + n), chunk=n))
    from evaluation import evaluate

    name, _, extractor = metric.partition(":")

    def draw(prompts: Any, seeds: Any) -> Tensor:
        return sampler(prompts, seeds, chunk=64)

    values = evaluate(draw, n=samples, metrics=(name,), extractor=extractor or None)
    return float(values[metric])


def _to(cond: Any, device: torch.device) -> Any:
    return map_cond(lambda c: c.to(device), cond)


def _optimizer(module: nn.Module, settings: OptimConfig) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return OPTIMIZERS[settings.optimizer](
        parameters, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )


def _checkpoint_gradients(student: Denoiser) -> None:
    for module in unwrap(student).network.children():
        if hasattr(module, "enable_gradient_checkpointing"):
            module.enable_gradient_checkpointing()
            return
    raise UserError("student.gradient_checkpointing=true: this family's network does not support it; set it to false.")
