"""What `training.check_teacher` finds out about a teacher, part by part, and says."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.schedule import EDM, VP, Flow
from training.data import Source
from training.denoising import VERIFIED, chunk_of, errors_of
from training.forecast import forecast
from training.recipe import Recipe, recipe_from
from training.teacher import Examples, Verdict

# Tables of common models: beta_schedule, beta_start, beta_end.
TABLES = (
    ("scaled_linear", 0.00085, 0.012),
    ("linear", 0.0001, 0.02),
    ("linear", 0.00085, 0.012),
    ("squaredcos_cap_v2", 0.0001, 0.02),
)
# A wrong table costs 2 % to 40 %, and the right one was always the best: from here on another is named.
NOTABLY = 1.15
# Those of the table of memory, unless others are asked for.
METHODS = ("lcm", "scm", "dmd2", "sim", "ladd")
RANK = 16


@dataclass
class Report:
    """Of one teacher.

    Attributes:
        process: name -> what is said of the noise process.
        tests: what it was tried on, and the outcome.
        wrong: sentences on what is declared wrong and what fits.
        tables: error by table of betas, the declared one first; {} where there is no table.
        latents: "mean" and "std" of each channel and what scales them; {} where x0 are no latents.
        memory: method -> of full training and of adapters, MiB at the most or why not.
    """

    teacher: str
    pipeline: str
    family: str
    resolution: tuple[int, int]
    shape: tuple[int, ...]
    process: dict[str, str]
    tests: list[Verdict] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    tables: dict[str, float] = field(default_factory=dict)
    latents: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, tuple[str, str]] = field(default_factory=dict)
    pictures: str = ""

    @property
    def verified(self) -> bool:
        return not self.wrong and any(test.verified for test in self.tests)

    def lines(self) -> list[str]:
        """For people."""
        height, width = self.resolution
        said = [
            f"teacher     {self.teacher}",
            f"pipeline    {self.pipeline}, family {self.family}",
            f"images      {height} x {width} pixels, x0 of {' x '.join(map(str, self.shape))}",
            f"process     {', '.join(f'{name} {value}' for name, value in self.process.items())}",
        ]
        said += [f"prediction  {test.line()}" for test in self.tests]
        said += [f"            on {test.where}: {test.errors}" for test in self.tests]
        said += [f"table       {error:.2f} by {name}" for name, error in self.tables.items()]
        for name, value in self.latents.items():
            shown = " ".join(f"{each:.2f}" for each in value) if isinstance(value, list) else value
            said.append(f"latents     {name} {shown}")
        if self.memory:
            said.append(f"memory      {'MiB':<14}{'all weights':>14}{f'LoRA {RANK}':>14}")
            said += [
                f"            {name:<14}{full:>14}{lora:>14}" for name, (full, lora) in self.memory.items()
            ]
        said += [f"pictures    {self.pictures}"] if self.pictures else []
        return said + [f"WRONG       {sentence}" for sentence in self.wrong]

    def mapping(self) -> dict[str, Any]:
        """As JSON holds it."""
        plain = {name: value for name, value in vars(self).items() if name not in ("tests", "memory")}
        memory = {name: {"full": full, "lora": lora} for name, (full, lora) in self.memory.items()}
        return plain | {"verified": self.verified, "tests": list(map(_test, self.tests)), "memory": memory}


def _test(test: Verdict) -> dict[str, Any]:
    levels = {kind: [_finite(value) for value in values] for kind, values in test.errors.levels.items()}
    said = {"declared": test.declared, "fits": test.fits, "verified": test.verified, "factor": test.factor}
    errors = {kind: _finite(test.errors.mean(kind)) for kind in levels}
    return {
        "where": test.where,
        **said,
        "std": test.std,
        "mean": test.mean,
        "errors": errors,
        "levels": levels,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------------------- the noise process


def process_of(family: Family) -> dict[str, str]:
    """Name -> what is said of it."""
    schedule, scheduler = family.teacher.native, getattr(family.pipeline, "scheduler", None)
    said = {"of": type(scheduler).__name__} if scheduler is not None else {}
    config = getattr(scheduler, "config", {})
    if isinstance(schedule, VP):
        said["with a table of"] = str(len(schedule.log_rho))
        said["betas"] = _betas(config)
        said["zero terminal SNR"] = "yes" if schedule.ends_without_signal else "no"
    elif isinstance(schedule, Flow):
        by = " by resolution" if config.get("use_dynamic_shifting") else ""
        said["flow matching, shift"] = f"{schedule.shift_at(28):.4g}{by}"
    elif isinstance(schedule, EDM):
        said["EDM, sigma"] = f"{schedule.t_min:g} to {schedule.t_max:g}"
    else:
        said["along"] = type(schedule).__name__
    ends = schedule.rho(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)).tolist()
    return said | {"noise to signal": f"{ends[0]:.3g} to {ends[1]:.4g}"}


def _betas(config: Any) -> str:
    if config.get("trained_betas") is not None:
        return "listed"
    return f"{config.get('beta_schedule')} {config.get('beta_start')} to {config.get('beta_end')}"


def tables_of(family: Family, kind: str, examples: Examples, batch: int) -> tuple[dict[str, float], str]:
    """The error along the declared table and others, read as `kind`, and a sentence where another is notably better.

    What ends them, such as a zero terminal SNR, and how a sampler spaces its times, no denoising tells.
    """
    from diffusers import DDPMScheduler

    declared = family.teacher.native
    if not isinstance(declared, VP):
        return {}, ""
    scheduler = getattr(family.pipeline, "scheduler", None)
    tables = {f"{_betas(getattr(scheduler, 'config', {}))}, as declared": declared}
    for schedule, start, end in TABLES:
        other = VP(DDPMScheduler(len(declared.log_rho), start, end, schedule).alphas_cumprod)
        if not other.agrees(declared):
            tables[f"{schedule} {start} to {end}"] = other
    found = {}
    for name, table in tables.items():
        network = Denoiser(family.teacher.network, kind, table)
        chunk = chunk_of(family.shape, batch)
        found[name] = errors_of(network, examples.x0, examples.cond, kinds=(kind,), chunk=chunk).mean(kind)
    first, best = next(iter(found)), min(found, key=found.get)
    if found[best] > VERIFIED or found[first] < NOTABLY * found[best]:
        return found, ""
    return found, (
        f"the betas of scheduler/scheduler_config.json do not fit: {found[first]:.2f} of the best linear denoiser's error"
        f" along {first}, and {found[best]:.2f} along {best}."
    )


def latents_of(family: Family, examples: Examples) -> dict[str, Any]:
    """Mean and standard deviation of each channel of latents, and what scales them."""
    if not family.latent:
        return {}
    channels = examples.x0.double().transpose(0, 1).flatten(1)
    said = {"mean": channels.mean(1).tolist(), "std": channels.std(1).tolist(), "of": examples.where}
    scale = getattr(family.vae.config, "scaling_factor", None)
    return said | {"scaled by": family.scaled_by if scale is None else f"{family.scaled_by} {scale:g}"}


# ---------------------------------------------------------------------------------------------------------------- memory


class Anything(Source):
    """One example of any kind, for the shapes of a step."""

    def __init__(self, family: Family):
        super().__init__(None)
        self.size, self.image_size = 1, family.resolution
        self.captions, self.labels = ["a picture"], [0]


def memory_of(family: Family, recipe: Recipe | None, methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Method -> MiB that a step takes at the most (`forecast`), of full training and of adapters; batch 1 without a recipe."""
    return {name: (_memory(family, recipe, name, 0), _memory(family, recipe, name, RANK)) for name in methods}


def _memory(family: Family, recipe: Recipe | None, method: str, rank: int) -> str:
    section: dict[str, Any] = {"name": method}
    optim = {"batch_size": 1} if recipe is None else _batch(recipe)
    run = {"steps": 1000, "out": "none", "precompute": "always"}
    given = {"family": {"name": family.name}, "data": "scenes", "optim": optim, "run": run}
    try:
        if rank:
            given["student"] = {"lora": {"rank": rank}}
            section |= _adapters(given | {"method": method}, rank)
        said = forecast(recipe_from(given | {"method": section}), family, Anything(family))
    except UserError:
        return "no"
    return "unknown" if said.unknown else f"{said.peak / 2**20:,.0f}"


def _batch(recipe: Recipe) -> dict[str, Any]:
    first = recipe.stages()[0]
    return {"batch_size": first.optim.batch_size, "micro_batch_size": first.optim.micro_batch_size}


def _adapters(given: dict[str, Any], rank: int) -> dict[str, Any]:
    """A fake score is then adapters as well, and nothing is told that a stock LoRA has no place for."""
    config = recipe_from(given).method.config
    told = {"fake_score_lora": {"rank": rank}, "tell_guidance": False}
    return {name: value for name, value in told.items() if hasattr(config, name)}
