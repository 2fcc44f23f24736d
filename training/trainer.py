"""The one loop: phases, accumulation, clipping, EMA, logs, previews, metrics, checkpoints, under accelerate.

A method says whose turn it is (`Method.phases`); everything else of a run is here, once. What is random is
drawn from (seed, step, phase, sample index) and data order from the number of batches drawn, so a run that
was interrupted and goes on equals one that was not.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from stepdistill import export
from stepdistill.denoiser import Denoiser, map_cond
from stepdistill.ema import EMA
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.methods.assemble import assemble, trained_by
from stepdistill.methods.base import Batch, Losses, Method, Networks, Phase, term_name
from stepdistill.noise import SampleNoise
from stepdistill.sampling import ImageSampler
from training import interrupts
from training.checkpoint import Checkpoint, RunDirectory
from training.data import Source, order
from training.health import Health
from training.loggers import Loggers
from training.measure import lower_is_better, measure
from training.precompute import Trajectories
from training.preview import draw_preview
from training.recipe import OptimConfig, Recipe

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "radam": torch.optim.RAdam}


class Trainer:
    """Runs one stage of a recipe.

    Args:
        recipe: the stage's recipe; whole: the recipe it came from, for the card.
        stage: its number; offset: the global step it starts at.
        student: the one of the stage before, whose weights this stage starts from, or None to start as the
            recipe says.
        pairs: the teacher's trajectories, for methods that want them.
        extras: the networks of the stage before, from which `Method.carried` are taken.
    """

    def __init__(
        self,
        recipe: Recipe,
        whole: Recipe,
        accelerator: Accelerator,
        family: Family,
        source: Source,
        x0: Tensor | None,
        directory: RunDirectory,
        loggers: Loggers | None,
        *,
        stage: int = 0,
        offset: int = 0,
        student: Denoiser | None = None,
        pairs: Trajectories | None = None,
        extras: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.recipe, self.whole, self.accelerator, self.family = recipe, whole, accelerator, family
        self.source, self.x0, self.pairs = source, x0, pairs
        self.directory, self.loggers = directory, loggers
        self.stage, self.offset, self.run, self.optim = stage, offset, recipe.run, recipe.optim
        self.device = accelerator.device
        self.micro, self.passes = self.optim.split(accelerator.num_processes)
        self.method: Method = recipe.method.make(recipe.student.steps)
        torch.manual_seed(self.run.seed + stage)  # fresh weights, the same in every process
        self._prepare(
            assemble(
                self.method,
                family,
                recipe.student.init,
                before=student,
                gradient_checkpointing=recipe.student.gradient_checkpointing,
            )
        )
        if extras is not None or stage == 0:  # later without them: `restore` brings the weights
            self._take_over(extras or {})
        self.ema = EMA(self.raw["student"], recipe.student.ema)
        self.step, self.batches, self.samples = 0, 0, 0
        self.updates: dict[str, int] = defaultdict(int)
        self.preview_teacher: Any = None  # drawn once
        self.health = Health(self.method)
        self._sums: dict[
            str, list[float]
        ] = {}  # [sum, count] of what was observed since the last line of the log
        self._samples_logged, self._saved_at = 0, -1

    def _prepare(self, nets: Networks) -> None:
        """All networks, which of them are trained, and their optimisers."""
        self.frozen = {name: module for name, module in nets.modules.items() if name == "teacher"}
        modules = {name: module for name, module in nets.modules.items() if name != "teacher"}
        self.trained = trained_by(self.method, self.run.steps)
        if strangers := set(self.trained) - set(modules):
            raise ValueError(
                f"{type(self.method).__name__}.networks() made no {', '.join(sorted(strangers))}"
            )
        self.optim.check_networks(self.trained)
        self.raw = {name: module.to(self.device) for name, module in modules.items()}
        self.wrapped: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Any] = {}
        for name, module in self.raw.items():
            module.requires_grad_(name in self.trained)
        for name in self.trained:
            # A gradient scaler has to see whether a step is left out, which fused optimisers keep to themselves.
            fused = self.accelerator.scaler is None
            pair = (self.raw[name], _optimizer(self.raw[name], self.optim.for_network(name), fused))
            self.wrapped[name], self.optimizers[name] = self.accelerator.prepare(*pair)

    def _take_over(self, extras: Mapping[str, nn.Module]) -> None:
        """The weights of `Method.carried`, every key of which must match.

        A composition's network is called part/name; where no name is the same, the part's is left out, if that
        means one network alone.
        """
        for name in self.method.carried:
            alike = [key for key in extras if key.split("/")[-1] == name.split("/")[-1]]
            source = name if name in extras else alike[0] if len(alike) == 1 else None
            if source is None:
                raise UserError(
                    f"stages.{self.stage}.method takes the network {name!r} over from the stage before, which has"
                    f" {', '.join(sorted(extras)) or 'none'}; write both as `stages:` with the same settings."
                )
            try:
                self.raw[name].load_state_dict(extras[source].state_dict())
            except RuntimeError:  # other keys or shapes: a LoRA cannot go on as a whole network
                raise UserError(
                    f"stages.{self.stage}.method takes the network {name!r} over from the stage before, whose"
                    f" {source!r} is of another make; carry between methods that build it alike."
                ) from None

    # ----------------------------------------------------------------------------------------------- the loop

    def fit(self) -> Denoiser:
        """Train to the end of the stage and return the student, carrying the weights that are exported.

        Raises:
            KeyboardInterrupt: after Ctrl-C or SIGTERM, when the step is finished and a checkpoint is written.
        """
        with self._bar() as bar, interrupts.deferred() as asked:
            if self.step == 0 and self.run.preview_every:
                self._preview()
            while self.step < self.run.steps:
                self._one_step()
                bar.update()
                last = self.step == self.run.steps
                self._every(self.run.log_every, lambda: self._log(bar), always=last)
                self._every(self.run.save_every, self.save, always=last)
                self._every(self.run.metric_every, self._measure)
                self._every(self.run.preview_every, self._preview)
                if self._any_process(asked()):
                    self.save()  # what was learnt is kept; the same command goes on from here
                    raise KeyboardInterrupt
        if self._exports_ema:
            self.ema.put(self.raw["student"])
        return self.raw["student"]

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.run.steps,
            initial=self.step,
            desc=self.recipe.method.name,
            unit="step",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
        )

    def _every(self, period: int, action: Callable[[], Any], always: bool = False) -> None:
        if always or (period and self.step % period == 0):
            action()

    def _one_step(self) -> None:
        ran = []
        for phase in self.method.phases(self.step):
            self._run(phase)
            ran.append(phase.name)
        self.method.after_step(self._networks(()), self.step, tuple(ran))
        self.step += 1

    def _run(self, phase: Phase) -> None:
        """One optimiser step: every term of every pass back-propagated in turn, then clip and update."""
        started = time.perf_counter()
        nets = self._networks(phase.trains)
        for name in self.trained:  # frozen parameters get no gradient; the graph through their inputs stays
            self.raw[name].requires_grad_(name in phase.trains)
        # What a network draws by itself, dropout, goes on after a resume as if there had been none.
        place = (self.run.seed, self.offset + self.step, phase.name, self.accelerator.process_index)
        torch.manual_seed(zlib.crc32(repr(place).encode()))
        last = (self.passes - 1, len(phase.terms) - 1)
        for pass_number, batch in enumerate(self._batches(phase)):
            for term_number, (weight, loss) in enumerate(phase.terms):
                with self._sync(phase, (pass_number, term_number) == last), self.accelerator.autocast():
                    losses = loss(nets, batch)
                    total = self._checked(losses, phase, term_name(loss), batch)
                    self.accelerator.backward(total * (weight / self.passes))
                for name, value in losses.items():
                    self._observe(f"{phase.name}/{name}", float(value.detach().float().mean()))
        for name in phase.trains:
            self._update(name, phase)
        self._observe(f"{phase.name}/seconds", time.perf_counter() - started)

    def _update(self, name: str, phase: Phase) -> None:
        """Clip one network's gradient and take its optimiser's step."""
        settings, optimizer = self.optim.for_network(name), self.optimizers[name]
        # Of this network alone: accelerate's own clipping would unscale the others' fp16 gradients twice.
        self.accelerator.unscale_gradients(optimizer)
        limit = settings.max_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.wrapped[name].parameters(), limit))
        if not math.isfinite(norm) and self.accelerator.scaler is None:  # a scaler leaves such a step out
            raise UserError(self._diverged(f"the gradient of {name} in phase {phase.name!r}"))
        self._observe(f"{phase.name}/grad_norm_{name}", norm)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * settings.lr_factor(self.step, self.run.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if optimizer.step_was_skipped:
            return
        self.updates[name] += 1
        if name == "student":
            self.ema.update(self.raw[name])

    def _networks(self, trains: tuple[str, ...]) -> Networks:
        """What is trained comes wrapped, so that processes synchronise; what is frozen comes raw, so that a
        wrapper does not wait for gradients that never come."""
        modules = self.frozen | self.raw | {name: self.wrapped[name] for name in trains}
        return Networks(modules, self.family.schedule, self.family.decode)

    def _sync(self, phase: Phase, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are exchanged between processes in the last backward of an optimiser step only."""
        stack = contextlib.ExitStack()
        if not last:
            for name in phase.trains:
                stack.enter_context(self.accelerator.no_sync(self.wrapped[name]))
        return stack

    def _checked(self, losses: Losses, phase: Phase, term: str, batch: Batch) -> Tensor:
        total = losses["total"]
        finite = torch.isfinite(total.detach())
        if not finite.all():
            bad = batch.index[~finite].tolist() if total.ndim else batch.index.tolist()
            raise UserError(
                self._diverged(f"the loss of phase {phase.name!r} (term {term}, samples {bad[:8]})")
            )
        return total.mean()

    def _diverged(self, what: str) -> str:
        kept = self.directory.latest()
        return (
            f"{what} is not finite at step {self.offset + self.step}; the last checkpoint is "
            f"{'none' if kept is None else f'step {kept}'}."
            " Lower optim.lr, set optim.max_grad_norm, or use run.precision=no."
        )

    def _any_process(self, asked: bool) -> bool:
        """Whether `asked` holds in one process at least: all must leave the loop after the same step."""
        if self.accelerator.num_processes == 1:
            return asked
        return bool(self.accelerator.reduce(torch.tensor(float(asked), device=self.device), "sum"))

    # --------------------------------------------------------------------------------------------------- data

    def _batches(self, phase: Phase) -> Iterator[Batch]:
        """This process's passes of the next global batch."""
        size = self.optim.batch_size
        picked = order(self.run.seed, self.source.size, self.batches, size)
        pairs = order(self.run.seed, self.pairs.size, self.batches, size) if self.pairs else None
        self.batches += 1
        self.samples += self.optim.batch_size
        for number in range(self.passes):
            first = (number * self.accelerator.num_processes + self.accelerator.process_index) * self.micro
            positions = range(first, first + self.micro)
            batch = self._batch(phase, [picked[i] for i in positions], positions)
            if pairs is not None:
                batch.pairs = self.pairs.rows([pairs[i] for i in positions], self.device)
            yield batch

    def _batch(self, phase: Phase, examples: list[int], positions: range) -> Batch:
        source, family = self.source, self.family
        noise = SampleNoise(positions, self.run.seed, self.offset + self.step, phase.name, self.device)
        told = family.told(source, examples)
        cond = _to(family.encode(told), self.device)
        x0 = None
        if self.method.needs_images:
            if self.x0 is not None:
                x0 = self.x0[examples].float().to(self.device)
            else:
                x0 = family.examples(source, examples).to(self.device)
        uncond = _to(family.uncond(len(examples)), self.device)
        return Batch(cond, uncond, family.shape, noise.index, noise, x0, prompts=told)

    # ------------------------------------------------------------------------------------------ what one sees

    def _observe(self, name: str, value: float) -> None:
        found = self._sums.setdefault(name, [0.0, 0])
        found[0] += value
        found[1] += 1

    def _share_sums(self) -> None:
        """Every process gets the mean over processes of what each has observed."""
        if self.accelerator.num_processes > 1 and self._sums:
            table = torch.tensor(
                [total for total, _ in self._sums.values()], dtype=torch.float64, device=self.device
            )
            for found, total in zip(
                self._sums.values(), self.accelerator.reduce(table, "mean").tolist(), strict=True
            ):
                found[0] = total

    def _log(self, bar: tqdm) -> None:
        self._share_sums()
        values = {name: total / count for name, (total, count) in self._sums.items()}
        seconds = sum(total for name, (total, _) in self._sums.items() if name.endswith("/seconds"))
        self._sums = {}
        # Phases of unequal pace draw unequal numbers of batches: images are counted, not guessed.
        speed = (self.samples - self._samples_logged) / seconds
        self._samples_logged = self.samples
        lr = self.optim.lr * self.optim.lr_factor(self.step - 1, self.run.steps)
        values |= {"images_per_second": speed, "samples": self.samples, "lr": lr}
        derived, warnings = self.health.check(values)
        values |= derived
        if self.loggers:
            self.loggers.log(self.offset + self.step, values)
            for warning in warnings:
                tqdm.write(f"step {self.offset + self.step}: {warning}", file=sys.stderr)
        shown = {name: f"{value:.3g}" for name, value in values.items() if name.endswith("/total")}
        bar.set_postfix(shown | {"images/s": f"{speed:.0f}"}, refresh=False)

    def sampler(self) -> ImageSampler:
        """The student as it would be exported now; use it inside `self.exported()`."""
        return ImageSampler(
            self.family, self.raw["student"], self.directory.student, self.card(), self.device
        )

    @contextlib.contextmanager
    def exported(self) -> Iterator[None]:
        """The student carries the weights that are exported, in eval mode, for the length of the block."""
        student = self.raw["student"]
        was_training = student.training
        student.eval()
        try:
            with self.ema.applied(student) if self._exports_ema else contextlib.nullcontext():
                yield
        finally:
            student.train(was_training)

    @property
    def _exports_ema(self) -> bool:
        return self.run.export == "ema" and self.recipe.student.ema > 0

    def card(self) -> dict[str, Any]:
        weights = "ema" if self._exports_ema else "raw"
        recipe = self.recipe.mapping()  # with stages, `whole` may have no method of its own
        if self.whole.partials:
            recipe["stages"] = self.whole.mapping()["stages"]
        card = export.card_of(self.family, self.method, recipe, step=self.offset + self.step, weights=weights)
        return card | ({"routing": self.source.routing} if self.source.routing else {})

    def _preview(self) -> None:
        if self.loggers:
            with self.exported():
                path = draw_preview(self)
            self.loggers.image(self.offset + self.step, "preview", path)

    def _measure(self) -> None:
        """The recipe's metric on the exported weights; the best checkpoint is kept."""
        self.save()
        metric, step = self.run.metric, self.offset + self.step
        if self.accelerator.is_main_process:
            with self.exported():
                value = measure(self.run, self.family, self.sampler())
            best = self.directory.record_best(step, value, lower_is_better(metric))
            if self.loggers:
                self.loggers.log(step, {f"metric/{metric}": value})
            tqdm.write(f"step {step}: {metric} = {value:.4g}{' (best)' if best else ''}")
        self.accelerator.wait_for_everyone()

    # -------------------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Write a checkpoint of this step unless there is one. All processes call it, the main one writes."""
        if self._saved_at == self.step:
            return
        self._share_sums()
        if self.accelerator.is_main_process:
            tensors = {name: module.state_dict() for name, module in self.raw.items()}
            tensors["student_ema"] = self.ema.state_dict()
            optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
            counters = {"batches": self.batches, "samples": self.samples, "updates": dict(self.updates)}
            counters |= {"sums": self._sums, "samples_logged": self._samples_logged}
            extra = {"stage": self.stage, "offset": self.offset, "counters": counters}
            extra |= {"method": self.method.state_dict(), "health": self.health.state_dict()}
            self.directory.save(self.offset + self.step, tensors, optimizers, extra)
        self._saved_at = self.step
        self.accelerator.wait_for_everyone()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where `save` stopped. Every key of every network must match."""
        extra, counters = checkpoint.extra, checkpoint.extra["counters"]
        if extra.get("offset", self.offset) != self.offset:
            raise UserError(
                f"the checkpoint of step {checkpoint.step} is of a run whose stage {self.stage} began at step"
                f" {extra['offset']}, and this recipe's begins at {self.offset}; set run.steps of the earlier"
                " stages back, or use --fresh."
            )
        for name, module in self.raw.items():
            module.load_state_dict(checkpoint.tensors[name])
        self.ema.load_state_dict(_on(checkpoint.tensors["student_ema"], self.device))
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(checkpoint.optimizers[name])
        self.step = self._saved_at = checkpoint.step - self.offset
        self.batches, self.samples = counters["batches"], counters["samples"]
        self.updates.update(counters["updates"])
        self._sums = counters.get("sums", {})
        self._samples_logged = counters.get("samples_logged", self.samples)
        self.method.load_state_dict(extra["method"])
        if "health" in extra:
            self.health.load_state_dict(extra["health"])


def _to(cond: Any, device: torch.device) -> Any:
    return map_cond(lambda c: c.to(device), cond)


def _on(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _optimizer(module: nn.Module, settings: OptimConfig, fused: bool) -> torch.optim.Optimizer:
    """fused: one kernel for all parameters where the optimiser has one, half the time of a step and more."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    extra = {"fused": True} if fused and settings.optimizer != "radam" else {}
    return OPTIMIZERS[settings.optimizer](
        parameters,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        **extra,
    )
