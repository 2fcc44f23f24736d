"""The one loop: phases, accumulation, clipping, EMA, logs, previews, metrics, checkpoints, under accelerate.

A method says whose turn it is (`Method.phases`); everything else of a run is here, once. What is random is
drawn from (seed, step, phase, sample index) and data order from the number of samples drawn, so a run that
was interrupted and goes on equals one that was not.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from stepdistill.denoiser import Denoiser
from stepdistill.ema import EMA
from stepdistill.errors import Interrupted, UserError
from stepdistill.families.base import Family
from stepdistill.methods.assemble import assemble, take_over, trained_by
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase, term_name
from training import interrupts
from training.batches import Batches
from training.checkpoint import Checkpoint, RunDirectory
from training.exporting import ExportedStudent, StudentCard
from training.monitor import Monitor
from training.nonfinite import NonFinite
from training.optimizers import NetworkOptimizer
from training.origin import Origin
from training.recipe import Recipe
from training.sharding import Sharding, check_sharded, settle
from training.state import TrainState


class Trainer:
    """Runs one stage of a recipe.

    Args:
        recipe: the stage's recipe; whole: the recipe it came from, for the card.
        batches: its data, see `precompute.prepare`.
        stage: its number; offset: the global step it starts at.
        student: the one of the stage before, whose weights this stage starts from, or None to start as the
            recipe says.
        extras: the networks of the stage before, from which `Method.carried` are taken.

    Attributes:
        modules: student and extras by name, unwrapped; `trained` names those that are trained.
        state: step, updates and what else a checkpoint holds beside weights.
    """

    def __init__(
        self,
        recipe: Recipe,
        whole: Recipe,
        accelerator: Accelerator,
        method: Method,
        family: Family,
        batches: Batches,
        directory: RunDirectory,
        *,
        stage: int = 0,
        offset: int = 0,
        student: Denoiser | None = None,
        extras: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.recipe, self.whole, self.accelerator = recipe, whole, accelerator
        self.method, self.family, self.batches, self.directory = method, family, batches, directory
        self.run, self.device = recipe.run, accelerator.device
        self.sharding = Sharding.of(accelerator)
        self.state = TrainState(self.run.seed, stage, offset)
        self.origin = Origin(family, batches.data, accelerator.is_main_process)
        # Fresh weights, the same in every process.
        torch.manual_seed(self.run.seed + stage)
        wanted = recipe.student
        how = {"gradient_checkpointing": wanted.gradient_checkpointing, "dropout": wanted.dropout}
        if self.sharding and family.teacher is not None:
            # All of every network lies in main memory until it is cut; its checksum is of the whole.
            family.teacher.to("cpu")
            self.origin.remember()
        self._prepare(assemble(method, family, wanted.init, lora=wanted.lora, before=student, **how))
        # A later stage without them goes on from a checkpoint, which brings the weights.
        if extras is not None or stage == 0:
            take_over(method, self.modules, extras or {}, f"stages.{stage}")
        self.ema = EMA(self.modules["student"], recipe.student.ema)
        card = StudentCard(recipe, whole, method, family, batches.source.routing)
        self.student = ExportedStudent(
            card, self.modules["student"], self.ema, directory.student, self.device
        )
        self.monitor = Monitor(
            recipe, accelerator, method, family, batches.source, directory, self.state, self.student
        )
        self._saved_at, self._saved_when = -1, 0.0
        self.nonfinite = NonFinite(self.run, directory, self.state, accelerator.is_main_process)

    def _prepare(self, nets: Networks) -> None:
        """Which networks are trained, and their optimisers."""
        self.frozen = {name: module for name, module in nets.modules.items() if name == "teacher"}
        self.modules = {name: module for name, module in nets.modules.items() if name != "teacher"}
        self.trained = trained_by(self.method, self.run.steps)
        if strangers := set(self.trained) - set(self.modules):
            raise ValueError(
                f"{type(self.method).__name__}.networks() made no {', '.join(sorted(strangers))}"
            )
        self.recipe.optim.check_networks(self.trained)
        for name, module in self.modules.items():
            module.requires_grad_(name in self.trained)
        if self.sharding:
            check_sharded(self.recipe, self.method, self.modules["student"])
            self.sharding.cut(nets.modules, self.trained)
        for module in nets.modules.values():
            module.to(self.device)
        self.optimizers = {
            name: NetworkOptimizer(self.modules[name], self.recipe.optim.for_network(name), self.accelerator)
            for name in self.trained
        }

    # ----------------------------------------------------------------------------------------------- the loop

    def fit(self) -> Denoiser:
        """Train to the end of the stage and return the student, carrying the weights that are exported.

        Raises:
            UserError: a loss or a gradient is not finite; or, with a checkpoint written, too many examples are gone.
            Interrupted: after a signal that asks for an end, when the step is finished and a checkpoint is written.
        """
        run, began = self.run, self.state.step
        with self._bar() as bar, interrupts.deferred() as asked:
            self._saved_when = time.monotonic()
            self._catch_up()
            while self.state.step < run.steps and not self._out_of_patience():
                self.train_step()
                bar.update()
                last = self.state.step == run.steps
                self._every(run.log_every, lambda: self.monitor.log(bar), always=last)
                self._every(run.save_every, self.save, always=last)
                self._every(run.metric_every, self._measure)
                self._every(run.preview_every, lambda: self.monitor.preview(self.modules))
                self._obey(asked)
            if began < self.state.step < run.steps and self.state.step % run.log_every:
                self.monitor.log(bar)
        return self.student.put()

    def _catch_up(self) -> None:
        """What is due before the first step, or was due after the last one and a kill has prevented."""
        metric, preview = self.monitor.pending()
        if metric:
            self._measure()
        if preview:
            self.monitor.preview(self.modules)

    def _out_of_patience(self) -> bool:
        """Whether the metric has stopped getting better (`run.stop`), on all processes."""
        if self.run.stop != "patience":
            return False
        return self._any_process(self.monitor.patience.over)

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.run.steps,
            initial=self.state.step,
            desc=self.recipe.method.name,
            unit="step",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
        )

    def _every(self, period: int, action: Callable[[], Any], always: bool = False) -> None:
        if always or (period and self.state.step % period == 0):
            action()

    def _obey(self, asked: interrupts.Asked) -> None:
        """What signals, the clock and the data have asked for since the last step, in all processes alike."""
        due = (
            bool(self.run.save_minutes) and time.monotonic() - self._saved_when >= 60 * self.run.save_minutes
        )
        trouble = self.batches.trouble
        wanted = [
            asked.saving or due,
            bool(trouble),
            *(asked.ending == number for number in interrupts.ENDING),
        ]
        save, troubled, *ends = self._any_process(wanted)
        if save or troubled or any(ends):
            # What was learnt is kept; the same command goes on from here.
            self.save()
            asked.saved()
        if trouble:
            raise UserError(trouble)
        if troubled or any(ends):
            raise Interrupted(
                next(n for n, end in zip((*interrupts.ENDING, 2), (*ends, True), strict=True) if end)
            )

    def train_step(self) -> None:
        """One iteration: every phase whose turn it is, then the method's curriculum."""
        ran = []
        for phase in self.method.phases(self.state.step):
            self._train(phase)
            ran.append(phase.name)
        settle((self.frozen | self.modules).values())
        nets = self._networks(())
        self.method.after_step(nets, self.state.step, tuple(ran))
        if self.accelerator.num_processes > 1:
            self.method.averaged(nets, self._average)
        self.state.step += 1

    def _average(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value.to(self.accelerator.device), "mean").to(value.device)

    def _train(self, phase: Phase) -> None:
        """One optimiser step: every term of every pass back-propagated in turn, then clip and update."""
        started = time.perf_counter()
        nets, passes = self._networks(phase.trains), self.batches.passes
        settle(nets.modules.values())
        # Frozen parameters get no gradient; the graph through their inputs stays.
        for name in self.trained:
            self.modules[name].requires_grad_(name in phase.trains)
        self.state.seed_networks(phase.name, self.accelerator.process_index)
        last = (passes - 1, len(phase.terms) - 1)
        for pass_number, batch in enumerate(self.batches.draw(phase.name, self.state)):
            for term_number, (weight, loss) in enumerate(phase.terms):
                with self._sync(phase, (pass_number, term_number) == last), self.accelerator.autocast():
                    losses = loss(nets, batch)
                    total = self._checked(losses, phase, term_name(loss), batch)
                    self.accelerator.backward(total * (weight / passes))
                for name, value in losses.items():
                    self._observe(f"{phase.name}/{name}", float(value.detach().float().mean()))
        self._update(phase)
        self.monitor.meters.add(f"{phase.name}/seconds", time.perf_counter() - started)

    def _update(self, phase: Phase) -> None:
        """Clip each network's gradient and take its optimiser's step; all of them, or none where one is not finite."""
        norms = {name: self.optimizers[name].clip() for name in phase.trains}
        for name, norm in norms.items():
            self._observe(f"{phase.name}/grad_norm_{name}", norm)
        # A gradient scaler leaves such a step out by itself.
        broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
        if broken and self.accelerator.scaler is None:
            self.nonfinite.gradient(f"the gradient of {', '.join(broken)} in phase {phase.name!r}")
            for name in phase.trains:
                self.optimizers[name].leave_out()
            return
        for name in phase.trains:
            if self.optimizers[name].step(self.state.step, self.run.steps):
                self.state.updates[name] += 1
                if name == "student":
                    self.ema.update(self.modules[name])

    def _observe(self, name: str, value: float) -> None:
        """For the log, whose means leave out what was of an update that is left out."""
        if self.nonfinite.skips and not math.isfinite(value):
            self.monitor.meters.miss(name)
        else:
            self.monitor.meters.add(name, value)

    def _networks(self, trains: tuple[str, ...]) -> Networks:
        """What is trained comes wrapped, so that processes synchronise; what is frozen comes unwrapped, so that
        a wrapper does not wait for gradients that never come."""
        wrapped = {name: self.optimizers[name].wrapped for name in trains}
        return Networks(self.frozen | self.modules | wrapped, self.family.schedule, self.family.decode)

    def _sync(self, phase: Phase, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are exchanged between processes in the last backward of an optimiser step only."""
        stack = contextlib.ExitStack()
        if not last:
            for name in phase.trains:
                stack.enter_context(self.accelerator.no_sync(self.optimizers[name].wrapped))
        return stack

    def _checked(self, losses: Losses, phase: Phase, term: str, batch: Batch) -> Tensor:
        total = losses["total"]
        finite = torch.isfinite(total.detach())
        if not finite.all():
            numbers = torch.as_tensor(batch.index.cpu() if batch.examples is None else batch.examples)
            bad = (numbers[~finite.cpu()] if total.ndim else numbers).tolist()
            self.nonfinite.loss(
                f"the loss of phase {phase.name!r} (term {term}, examples {bad[:8]} of the data)"
            )
            # Every gradient is told, and with it every process.
            return total.mean() * math.nan
        return total.mean()

    def _any_process(self, asked: list[bool]) -> list[bool]:
        """Which are true in one process at least: all must do the same after the same step."""
        if self.accelerator.num_processes == 1:
            return asked
        votes = torch.tensor(asked, dtype=torch.float32, device=self.device)
        return [count > 0 for count in self.accelerator.reduce(votes, "sum").tolist()]

    # -------------------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Write a checkpoint of this step unless there is one. All processes call it; the main one writes, and shards each."""
        if self._saved_at == self.state.step:
            return
        self.monitor.meters.share(self.accelerator)
        save = self.directory.save_shards if self.sharding else self.directory.save
        if self.sharding or self.accelerator.is_main_process:
            extra = {
                "stage": self.state.stage,
                "offset": self.state.offset,
                "counters": self.state.state_dict() | self.monitor.state_dict(),
                "method": self.method.state_dict(),
                "health": self.monitor.health.state_dict(),
                "routing": self.batches.source.routing,
            } | self.origin.state_dict()
            tensors = {name: each.state_dict() for name, each in self._followed().items()}
            optimizers = {name: each.state_dict() for name, each in self.optimizers.items()}
            save(self.state.global_step, tensors, optimizers, extra)
        self._saved_at, self._saved_when = self.state.step, time.monotonic()
        self.accelerator.wait_for_everyone()

    def _followed(self) -> dict[str, nn.Module | EMA]:
        """What a checkpoint has weights of."""
        return self.modules | {"student_ema": self.ema}

    def _measure(self) -> None:
        self.save()
        self.monitor.measure()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where `save` stopped. Every key of every network must match.

        Raises:
            UserError: the checkpoint is of a run whose earlier stages had other lengths, or of another teacher.
        """
        extra, counters, state = checkpoint.extra, checkpoint.extra["counters"], self.state
        self.origin.check(checkpoint)
        if extra.get("offset", state.offset) != state.offset:
            raise UserError(
                f"the checkpoint of step {checkpoint.step} is of a run whose stage {state.stage} began at step"
                f" {extra['offset']}, and this recipe's begins at {state.offset}; set run.steps of the earlier"
                " stages back, or use --fresh."
            )
        for name, module in self._followed().items():
            checkpoint.load_into(name, module)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(checkpoint.optimizer(name, optimizer.parameters))
        state.load_state_dict(counters, checkpoint.step)
        self._saved_at = state.step
        self.monitor.load_state_dict(counters)
        self.method.load_state_dict(extra["method"])
        if "health" in extra:
            self.monitor.health.load_state_dict(extra["health"])
