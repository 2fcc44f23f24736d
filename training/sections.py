"""The recipe's sections that name no class: student, optim and run, with their ranges."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from stepdistill.config import UnknownKey, build, closest
from stepdistill.errors import UserError
from stepdistill.lora import NO_LORA, LoraConfig
from stepdistill.sampling import InitNoise, Rule, Sampling

# torch ends in a crash where threads cannot be started.
MOST_THREADS = 64
# What is more was meant otherwise: samples of a batch, iterations of a run.
MOST_SAMPLES, MOST_STEPS = 1_000_000, 1_000_000_000


def _require(condition: bool, name: str, value: Any, must: str) -> None:
    # `build` puts the section before the field's name.
    if not condition:
        raise ValueError(f"{name} must {must}, got {value}.")


@dataclass(frozen=True)
class StudentConfig:
    """The network that is trained, and how it is sampled.

    Attributes:
        steps: the numbers of sampling steps the student is made for.
        rule, first_rho, init_noise, eta, finest, middle_time: as `Sampling` has them; what is left out is as the
            method's paper has it, or in a later stage as the stage before left it.
        init: "teacher", "random", or a directory with a student.
        lora: train adapters of this rank over the network, not the network: see `LoraConfig`.
        ema: decay of the average of its weights per update of the student, in [0, 1); 0 = off.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        dropout: the share of activations that its dropout layers, and those of copies of it, drop while it trains; 0 =
            leave them as they are, which is off where it begins as the teacher.
    """

    steps: tuple[int, ...] = (1,)
    init: str = "teacher"
    lora: LoraConfig = NO_LORA
    ema: float = 0.999
    gradient_checkpointing: bool = False
    dropout: float = 0.0
    rule: Rule | None = None
    first_rho: float | None = None
    init_noise: InitNoise | None = None
    eta: float | None = None
    finest: int | None = None
    middle_time: float | None = None

    def __post_init__(self) -> None:
        steps = self.steps
        good = len(steps) > 0 and min(steps) >= 1 and len(set(steps)) == len(steps)
        _require(good, "steps", list(steps), "be different whole numbers of at least 1")
        _require(bool(self.init), "init", "nothing", "be teacher, random or a directory")
        _require(0 <= self.ema < 1, "ema", self.ema, "be at least 0 and below 1")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "be at least 0 and below 1")

    def sampled(self) -> dict[str, Any]:
        """What is said of its sampling beside `steps`, by name; None where nothing is."""
        own = {each.name for each in fields(Sampling)} - {"steps"}
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name in own}


@dataclass(frozen=True)
class OptimConfig:
    """Optimisers, batches and the learning rate; for one network `optim.<network>.<key>` overrides the common key.

    Attributes:
        optimizer: "came" keeps about half of what the others do (`training.came`).
        betas: two; of came three, the last of its instability, 0.9999 where it is left out.
        eps: of all but came, which has its own.
        max_grad_norm: each network's gradient is clipped to this norm by itself; 0 = no clipping.
        batch_size: global, over all processes and accumulation passes.
        micro_batch_size: of one process in one pass; 0 = batch_size / processes.
        schedule: how the rate falls, by `lr_factor`.
        decay_from: fraction of the run after which "cosine" and "linear" begin to fall.
        warmup_steps: iterations of a linear rise before the full rate.
        final_lr: fraction of lr reached at the end of the decay.
        networks: settings of single networks by name, written as optim.<network>.lr; those of "fake_score" hold for
            "fake_score_1" and so on as well, which may have their own on top.
    """

    lr: float = 1e-4
    optimizer: Literal["adamw", "adam", "radam", "came"] = "adamw"
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.0
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    batch_size: int = 64
    micro_batch_size: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    decay_from: float = 0.0
    warmup_steps: int = 0
    final_lr: float = 0.0
    networks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "lr", self.lr, "be above 0")
        came = self.optimizer == "came"
        count, most = len(self.betas), "two or three numbers" if came else "two numbers"
        good = count in (2, 3)[: 1 + came] and all(0 <= beta < 1 for beta in self.betas)
        _require(good, "betas", list(self.betas), f"be {most} in [0, 1) with optimizer={self.optimizer}")
        _require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "be 0 or more")
        _require(0 < self.eps < math.inf, "eps", self.eps, "be above 0")
        unheard = came and self.eps != OptimConfig.eps
        _require(not unheard, "eps", self.eps, "be left out with optimizer=came, which has its own")
        _require(self.max_grad_norm >= 0, "max_grad_norm", self.max_grad_norm, "be 0 (no clipping) or more")
        _require(
            1 <= self.batch_size <= MOST_SAMPLES,
            "batch_size",
            self.batch_size,
            f"be from 1 to {MOST_SAMPLES:,}",
        )
        micro, dividing = self.micro_batch_size, f"be 0 or divide batch_size={self.batch_size}"
        _require(
            micro >= 0 and (not micro or self.batch_size % micro == 0), "micro_batch_size", micro, dividing
        )
        _require(0 <= self.decay_from <= 1, "decay_from", self.decay_from, "be a fraction from 0 to 1")
        _require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "be 0 or more")
        _require(0 <= self.final_lr <= 1, "final_lr", self.final_lr, "be a fraction of lr from 0 to 1")
        typed = {}
        for name, overrides in self.networks.items():
            own = self.for_network(name)
            typed[name] = {key: getattr(own, key) for key in overrides}
        object.__setattr__(self, "networks", typed)

    def for_network(self, name: str) -> OptimConfig:
        """The settings of one network: the common ones with `optim.<name>.*` on top.

        Of several of one kind, "fake_score_1" after "fake_score", each has the first one's below its own.
        """
        overrides = {**self.networks.get(re.sub(r"_\d+$", "", name), {}), **self.networks.get(name, {})}
        for shared in ("batch_size", "micro_batch_size", "networks"):
            if shared in overrides:
                raise UserError(f"optim.{name}.{shared} cannot be set for one network; set optim.{shared}.")
        common = {key: getattr(self, key) for key in field_names(OptimConfig) if key != "networks"}
        return build(OptimConfig, {**common, **overrides}, f"optim.{name}")

    def check_networks(self, names: Iterable[str]) -> None:
        """UserError when settings are given for a network that is not among `names`."""
        names = sorted(names)
        for given in self.networks:
            if given not in names:
                close = closest(given, [*names, *field_names(OptimConfig)])
                hint = f"did you mean optim.{close}?" if close else f"this run trains {', '.join(names)}."
                raise UserError(f"optim.{given} names no network of this run; {hint}")

    def split(self, processes: int) -> tuple[int, int]:
        """(batch of one process in one pass, passes per step): together they make batch_size."""
        micro = self.micro_batch_size or self.batch_size // processes
        if micro == 0 or self.batch_size % (micro * processes):
            raise UserError(
                f"optim.batch_size={self.batch_size} must be a multiple of {max(micro, 1) * processes}"
                f" ({processes} processes x micro batch {max(micro, 1)})."
            )
        return micro, self.batch_size // (micro * processes)

    def lr_factor(self, step: int, total: int) -> float:
        """What `lr` is multiplied by at `step` of `total` (0-based): linear warm-up, then the schedule."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        start = self.decay_from * total
        if self.schedule == "constant" or step <= start:
            return warmup
        progress = min(1.0, (step - start) / max(total - start, 1))
        fall = (1 + math.cos(math.pi * progress)) / 2 if self.schedule == "cosine" else 1 - progress
        return warmup * (self.final_lr + (1 - self.final_lr) * fall)

    def mapping(self) -> dict[str, Any]:
        """As it is written in a recipe: the networks' settings are sub-sections."""
        values = {name: getattr(self, name) for name in field_names(OptimConfig) if name != "networks"}
        return {**values, **self.networks}

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], where: str = "optim") -> OptimConfig:
        """From a recipe's section, where every unknown key that holds a sub-section is a network's name."""
        mapping = as_section(mapping, where)
        own = [name for name in field_names(cls) if name != "networks"]
        networks = {
            key: part for key, part in mapping.items() if key not in own and isinstance(part, Mapping)
        }
        for key in mapping:
            if key not in own and key not in networks:
                raise UnknownKey(where, str(key), own)
        common = {key: value for key, value in mapping.items() if key in own}
        return build(cls, {**common, "networks": networks}, where)


@dataclass(frozen=True)
class RunConfig:
    """How long a run is, where it lies, and what is written down while it goes. A period is in iterations.

    Attributes:
        steps: iterations of the loop.
        out: the run directory.
        precision: of the networks' passes (autocast); weights are float32.
        preview_every: 0 = no previews; preview_count: pictures in a row of them.
        save_minutes: a checkpoint after so many minutes by the clock, and at the end; 0 = not by time.
        save_every: a checkpoint after so many iterations as well; 0 = not by number. keep: checkpoints kept, beside the best
            one.
        metric_every: 0 = never measured during the run; metric: by name, see `measure.check_metric`;
            metric_samples: images drawn for it.
        metric_reference: one's own real images (Parquet or folder) instead of the protocol's scenes;
            metric_captions: with prompts, the captions (a file) that samples are drawn for.
        stop: "steps" = after `steps`; "patience" = before, after `patience` measurements in a row that were no better than
            the best by more than their standard errors (`training.patience`); the best one's checkpoint is kept.
        export: which weights the student directory gets, the average or the last.
        threads: torch CPU threads; 0 = leave as they are.
        trackers: beside metrics.jsonl. TensorBoard is left out where it is not installed; W&B writes offline
            unless the environment sets WANDB_MODE.
        precompute: when the prompts' conditions are encoded once, into ./cache, and text encoders leave memory: "auto" =
            if that has been done already (training.precompute), or the run draws more prompts than there are.
        check_teacher: test at the start whether the teacher predicts what its scheduler says; false = trust it.
        on_nonfinite: what follows a loss or a gradient that is NaN or infinite: "stop", or "skip" that update, at most
            nonfinite_budget times in a run.
        on_full_disk: "stop" with what was saved, or "wait" until there is room.
        resume: go on with a run that lies in `out`; false = refuse.
    """

    steps: int
    out: str
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "no"
    log_every: int = 10
    preview_every: int = 0
    preview_count: int = 8
    save_minutes: float = 15.0
    save_every: int = 0
    keep: int = 2
    metric_every: int = 0
    metric: str = "fd:scenes-v1"
    metric_samples: int = 500
    metric_reference: str = ""
    metric_captions: str = ""
    stop: Literal["steps", "patience"] = "steps"
    patience: int = 3
    export: Literal["ema", "raw"] = "ema"
    threads: int = 0
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    precompute: Literal["auto", "always", "never"] = "auto"
    check_teacher: bool = True
    on_nonfinite: Literal["stop", "skip"] = "stop"
    nonfinite_budget: int = 10
    on_full_disk: Literal["stop", "wait"] = "stop"
    resume: bool = True

    def __post_init__(self) -> None:
        _require(bool(self.out.strip()), "out", "nothing", "name a directory")
        for name in ("steps", "log_every", "preview_count", "keep", "patience"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "be at least 1")
        for name, most in (
            ("steps", MOST_STEPS),
            ("preview_count", MOST_SAMPLES),
            ("metric_samples", 10 * MOST_SAMPLES),
        ):
            _require(getattr(self, name) <= most, name, getattr(self, name), f"be at most {most:,}")
        for name in ("seed", "preview_every", "save_every", "metric_every", "threads", "nonfinite_budget"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "be 0 or more")
        _require(0 <= self.save_minutes < math.inf, "save_minutes", self.save_minutes, "be 0 or more")
        most = max(MOST_THREADS, os.cpu_count() or 1)
        _require(self.threads <= most, "threads", self.threads, f"be at most {most} on this machine")
        measured = self.stop == "steps" or self.metric_every > 0
        _require(measured, "stop", self.stop, "be steps where metric_every is 0, for nothing is measured")
        _require(self.metric_samples >= 2, "metric_samples", self.metric_samples, "be at least 2")


def as_section(value: Any, where: str) -> Mapping[str, Any]:
    """A section as a mapping: its lines, or the name alone of what it names; UserError for anything else."""
    # `data: scenes`
    if isinstance(value, str) and where in ("family", "method", "data"):
        return {"name": value}
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{where}: expected a section of `key: value` lines, got {value!r}.")
    return value or {}


def field_names(cls: type) -> list[str]:
    """Names of a dataclass's fields, in order."""
    return [each.name for each in fields(cls)]
