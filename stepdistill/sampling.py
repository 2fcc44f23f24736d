"""The one few-step rule, and the samplers built on it.

Previews, evaluation, the app, backward simulation and the export test all walk through `walk`; what a student
is trained on is therefore what it is sampled by.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepdistill.denoiser import Cond, Denoiser, guided, map_cond, parameter_count
from stepdistill.errors import UserError
from stepdistill.prediction import Prediction
from stepdistill.registry import resolve
from stepdistill.schedule import VP, Schedule, expand
from stepdistill.timesteps import few_step_grid, teacher_grid, times_like
from stepdistill.tracing import Traced

if TYPE_CHECKING:
    from stepdistill.families.base import Family

CARD = "stepdistill.json"  # what a student directory knows of itself beside the stock files
RULES = ("renoise", "ode", "tcd", "flowmap")
INIT_NOISE = ("unit", "sigma")
QUANTISE = {  # [0, 1] to grey levels 0 .. 255; peers differ, and a mean half a level darker moves a distance
    "round": lambda u: (255 * u).round(),
    "edm": lambda u: (255 * u + 0.5).floor(),
    "floor": lambda u: (255 * u).floor(),
}
Predict = Callable[[Tensor, Tensor], Prediction]


def first_input(schedule: Schedule, z: Tensor, t: float, init_noise: str) -> Tensor:
    """The student's first state from unit noise z (B, ...).

    "unit": z itself, as if t were pure noise, which a VP table's last entry is not quite (DMD2, LCM).
    "sigma": sigma_t z, a state with no signal in it (SiD, SIM). Outside VP the two are one.
    """
    if init_noise not in INIT_NOISE:
        raise ValueError(f"init_noise must be one of {', '.join(INIT_NOISE)}, got {init_noise!r}")
    if init_noise == "unit" and isinstance(schedule, VP):
        return z
    return z * expand(schedule.sigma(times_like(t, z)), z)


def walk(
    predict: Predict | Denoiser,
    x_t: Tensor,
    times: Sequence[float],
    noise: Callable[[int], Tensor],
    cond: Cond = None,
    *,
    rule: str = "renoise",
    eta: float = 0.0,
    on_step: Callable[[int, int], None] | None = None,
    **extras: Tensor,
) -> Tensor:
    """From the state at times[0] to the state at times[-1], one prediction per interval.

    renoise: x_s = alpha_s x0 + sigma_s eps', fresh eps' = noise(i) (LCM, DMD2, sCM). ode: x_s = alpha_s x0 +
    sigma_s eps, the prediction's own eps (DDIM). tcd: the ode's move to a time below s, then noise up to s;
    eta in [0, 1] goes from ode to (almost) renoise (Zheng et al. 2024, arXiv 2402.19159, Alg. 2). flowmap:
    the ode's move by a two-time network that is told where it ends (MeanFlow).
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        s_ = times_like(s, x_t)
        told = extras | {"end": s_} if rule == "flowmap" else extras
        prediction = predict(x_t, times_like(t, x_t), cond, **told)
        if rule == "renoise":
            x_t = prediction.schedule.add_noise(prediction.x0, noise(i), s_)
        elif rule == "tcd" and eta > 0:
            x_t = _strategic_step(prediction, s_, noise(i), eta)
        else:
            x_t = prediction.at(s_)
        if on_step:
            on_step(i + 1, len(times))
    return x_t


def _strategic_step(prediction: Prediction, s: Tensor, noise: Tensor, eta: float) -> Tensor:
    """Along the prediction's line to the time (1 - eta) s, then diffused up to s, as `TCDScheduler` steps."""
    schedule, x_t = prediction.schedule, prediction.x_t
    below = schedule.t_min + (1 - eta) * (s - schedule.t_min)
    if isinstance(schedule, VP):
        below = below.float().floor().double()
    ratio = schedule.alpha(s) / schedule.alpha(below)
    spread = (schedule.sigma(s) ** 2 - (ratio * schedule.sigma(below)) ** 2).clamp(min=0).sqrt()
    return expand(ratio, x_t) * prediction.at(below) + expand(spread, x_t) * noise


def sample(
    predict: Predict | Denoiser,
    x_t: Tensor,
    times: Sequence[float],
    noise: Callable[[int], Tensor],
    cond: Cond = None,
    *,
    rule: str = "renoise",
    eta: float = 0.0,
    t_min: float = 0.0,
    on_step: Callable[[int, int], None] | None = None,
    **extras: Tensor,
) -> Tensor:
    """x0 by len(times) predictions: `walk` to the last time, then its x0. No noise is added after the last
    one.

    t_min: the schedule's end, to which "tcd" and "flowmap" jump last. As with `TCDScheduler`, the result of
    "tcd" is the state there, not x0.
    """
    x_t = walk(predict, x_t, times, noise, cond, rule=rule, eta=eta, on_step=on_step, **extras)
    end = times_like(t_min, x_t)
    told = extras | {"end": end} if rule == "flowmap" else extras
    prediction = predict(x_t, times_like(times[-1], x_t), cond, **told)
    x0 = prediction.at(end) if rule == "tcd" else prediction.x0
    if on_step:
        on_step(len(times), len(times))
    return x0


class ImageSampler:
    """A teacher or student directory, ready to draw images. Made by `load`.

    Image i depends on its own prompt and seed only: its noise comes from a CPU torch.Generator of its own
    (the generator diffusers takes, so a stock pipeline given the same list draws the same noise), and the
    networks always run at one fixed batch size, padded, because a batch of 1 and one of 7 differ in the last
    bits on every backend.
    """

    def __init__(
        self, family: Family, denoiser: Denoiser, path: Path, card: dict[str, Any],
        device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        self.family_, self.denoiser, self.path, self.card = family, denoiser, path, card
        self.device, self.dtype = torch.device(device), dtype
        self.family: str = family.name
        self.name: str = card.get("name") or path.name
        self.kind: str = card.get("kind", "teacher")
        self.steps: tuple[int, ...] | None = tuple(card["steps"]) if "steps" in card else None
        self.default_steps: int = min(self.steps) if self.steps else 50
        self.guidance_free: bool = bool(card.get("guidance_free", False)) or family.conditions == "none"
        self.default_guidance: float = (
            1.0 if self.guidance_free else float(card.get("guidance_scale", family.default_guidance))
        )
        self.resolution: tuple[int, int] = family.resolution
        self.conditions: str = family.conditions
        self.class_names: tuple[str, ...] | None = family.class_names
        self.pipeline = family.pipeline
        self.parameters: dict[str, int] = family.parameters() | {"denoiser": parameter_count(denoiser)}

    def trace(self) -> ImageSampler:
        """Replay the denoiser's operations without its Python from now on; the images stay bit-equal.

        Worth it for many calls of one shape on a CPU, where bookkeeping is half of a small network's time.
        Choose the attention backend before.
        """
        if not isinstance(self.denoiser.network, Traced):
            self.denoiser.network = Traced(self.denoiser.network).eval()
        return self

    def times(self, steps: int) -> tuple[float, ...]:
        """The times the denoiser is called at."""
        if self.kind == "teacher":
            return teacher_grid(self.denoiser.schedule, steps)
        if listed := self.card.get("timesteps", {}).get(str(steps)):
            return tuple(listed)  # what it was trained on
        finest, first_rho = self.card.get("finest", steps), self.card.get("first_rho")
        return few_step_grid(self.denoiser.schedule, steps, finest, first_rho)

    def calls(self, guidance_scale: float) -> int:
        """Network evaluations per step: two with guidance applied outside the network, else one."""
        return 1 if guidance_scale == 1 or "guidance" in self.card.get("extras", ()) else 2

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str] | Sequence[int],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompts: Sequence[str] | None = None,
        chunk: int = 16,
        quantise: str = "round",
        timings: dict[str, float] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Draw one image per prompt (or class index) and seed.

        Args:
            steps: number of sampling steps; None = the default (teacher 50, student its least).
            guidance_scale: g of uncond + g (cond - uncond), 1 = off; None = the default.
            negative_prompts: what stands in for the empty prompt in guidance.
            chunk: the fixed batch size of the networks. Results are equal for equal chunk.
            quantise: how grey levels are rounded, a name in QUANTISE.
            timings: seconds are added under "text", "denoise" and "decode".
            on_step: called as on_step(i, n) after each step of each chunk; may raise to stop.

        Returns:
            uint8 (N, 3, H, W).

        Raises:
            UserError: steps, guidance, prompts or seeds this model cannot serve.
        """
        timings = timings if timings is not None else {}
        images = [torch.empty(0, 3, *self.resolution, dtype=torch.uint8)]
        for x0, kept in self._chunks(
            prompts, seeds, steps, guidance_scale, negative_prompts, chunk, timings, on_step
        ):
            clock = time.perf_counter()
            decoded = self.family_.decode(x0.to(self.dtype)).clamp(0, 1)
            images.append(QUANTISE[quantise](decoded).to(torch.uint8)[:kept].cpu())
            self._lap(timings, "decode", clock)
        return torch.cat(images)

    @torch.no_grad()
    def x0(
        self,
        prompts: Sequence[str] | Sequence[int],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        chunk: int = 16,
    ) -> Tensor:
        """As the call, before decoding: (N, *family.shape)."""
        return torch.cat(
            [x0[:kept] for x0, kept in self._chunks(prompts, seeds, steps, None, None, chunk, {}, None)]
        )

    def _chunks(
        self, prompts, seeds, steps, guidance_scale, negative_prompts, chunk, timings, on_step
    ) -> Iterator[tuple[Tensor, int]]:
        steps, guidance_scale = self._check(prompts, seeds, steps, guidance_scale, negative_prompts)
        for start in range(0, len(prompts), chunk):
            part = slice(start, start + chunk)
            negatives = list(negative_prompts[part]) if negative_prompts else None
            x0 = self._chunk(
                list(prompts[part]),
                list(seeds[part]),
                steps,
                guidance_scale,
                negatives,
                chunk,
                timings,
                on_step,
            )
            yield x0, len(prompts[part])

    def _check(self, prompts, seeds, steps, guidance_scale, negative_prompts) -> tuple[int, float]:
        if len(prompts) != len(seeds):
            raise UserError(f"prompts and seeds must be of one length, got {len(prompts)} and {len(seeds)}.")
        steps = self.default_steps if steps is None else steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise UserError(f"steps must be a whole number of at least 1, got {steps!r}.")
        if self.steps and steps not in self.steps:
            listed = ", ".join(map(str, self.steps))
            raise UserError(f"steps={steps} is not what {self.name!r} was trained for; use one of {listed}.")
        guidance_scale = self.default_guidance if guidance_scale is None else float(guidance_scale)
        if self.guidance_free and guidance_scale != 1:
            raise UserError(
                f"guidance_scale={guidance_scale:g} has no effect: guidance is already distilled into {self.name!r}; leave it out."
            )
        if negative_prompts and any(negative_prompts):
            if self.guidance_free or self.calls(guidance_scale) == 1:
                raise UserError(
                    f"a negative prompt needs guidance at sampling time, and {self.name!r} makes one network call per step "
                    "without it; leave the negative prompt empty or use the teacher."
                )
            if len(negative_prompts) != len(prompts):
                raise UserError(
                    f"negative_prompts must be as many as prompts ({len(prompts)}), got {len(negative_prompts)}."
                )
        return steps, guidance_scale

    def _chunk(self, prompts, seeds, steps, scale, negatives, size, timings, on_step) -> Tensor:
        """x0 of one chunk, padded to `size`."""
        missing, family = size - len(prompts), self.family_
        prompts, seeds = prompts + prompts[:1] * missing, seeds + seeds[:1] * missing
        if negatives:
            negatives = negatives + negatives[:1] * missing
        clock = time.perf_counter()
        schedule, times = self.denoiser.schedule, self.times(steps)
        cond = self._cast(family.encode(prompts))
        extras, predict = {}, self.denoiser
        if "guidance" in self.card.get("extras", ()):
            extras["guidance"] = torch.full((size,), scale, dtype=torch.float64)
        elif scale != 1:
            uncond = self._cast(family.encode(negatives) if negatives else family.uncond(size))

            def predict(x_t: Tensor, t: Tensor, c: Cond) -> Prediction:
                return guided(self.denoiser, x_t, t, c, uncond, scale)

        clock = self._lap(timings, "text", clock)
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

        def noise(_: int) -> Tensor:
            draws = [torch.randn(family.shape, generator=generator) for generator in generators]
            return torch.stack(draws).to(self.device, self.dtype)

        x_t = first_input(schedule, noise(0), times[0], self.card.get("init_noise", "unit"))
        rule = {
            "rule": self.card.get("rule", "ode"),
            "eta": self.card.get("eta", 0.0),
            "t_min": schedule.t_min,
        }
        x0 = sample(predict, x_t, times, noise, cond, **rule, on_step=on_step, **extras)
        self._lap(timings, "denoise", clock)
        return x0

    def _cast(self, cond: Cond) -> Cond:
        def cast(c: Tensor) -> Tensor:
            return c.to(self.device, self.dtype) if c.is_floating_point() else c.to(self.device)

        return map_cond(cast, cond)

    def _lap(self, timings: dict[str, float], stage: str, since: float) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        timings[stage] = timings.get(stage, 0.0) + now - since
        return now


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ImageSampler:
    """A teacher or student directory as a sampler.

    A student is a stock diffusers directory with a `stepdistill.json` beside its model_index.json; without
    that file the directory is a teacher, and its family is told by the pipeline class. Merged students are a
    `routing.Students`, which is called like any other.

    Raises:
        UserError: the directory is missing, is no diffusers pipeline, or holds pickled weights.
    """
    from stepdistill.families import FAMILIES
    from stepdistill.families.base import family_of

    path = Path(path)
    card: dict[str, Any] = {}
    if (path / CARD).is_file():
        try:
            card = json.loads((path / CARD).read_text())
        except ValueError as error:
            raise UserError(f"{path / CARD} is not valid JSON ({error}); export the student again.") from None
    if card.get("kind") == "students":
        from stepdistill.routing import Students

        return Students(path, card, device, dtype)
    named, where = card.get("family") or family_of(path), f"{path / CARD}: family"
    cls = resolve(named, FAMILIES, "family", where=where, registered_only=True)
    family = cls.from_directory(path)
    family.to(device, dtype)
    denoiser = family.teacher.eval().requires_grad_(False)
    return ImageSampler(family, denoiser, path, card, device, dtype)
