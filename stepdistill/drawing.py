"""A loaded pipeline, and one way of drawing with it.

sampler = stepdistill.load("runs/dmd2/student")        # a Sampler
draw = sampler.at(steps=1)                             # a Drawer: fixed settings, a frozen value
images = draw(["a red circle"], seeds=[0])             # uint8 (1, 3, H, W)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.card import Card
from stepdistill.denoiser import Cond, Denoiser, guided, map_cond, parameter_count
from stepdistill.errors import UserError
from stepdistill.prediction import Prediction
from stepdistill.tracing import Traced

if TYPE_CHECKING:
    from stepdistill.families.base import Family

DEFAULT_TEACHER_STEPS = 50
# [0, 1] to grey levels 0 .. 255; peers differ, and a mean half a level darker moves a distance.
QUANTISE = {
    "round": lambda u: (255 * u).round(),
    "edm": lambda u: (255 * u + 0.5).floor(),
    "floor": lambda u: (255 * u).floor(),
}

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Drawer:
    """A sampler at fixed settings. Equal settings draw equal images; made by `Sampler.at`.

    Attributes:
        steps: number of sampling steps. guidance: g of uncond + g (cond - uncond), 1 = off.
        chunk: the fixed batch size of the networks; results are equal for equal chunk.
        quantise: how grey levels are rounded, a name in QUANTISE.
        negative: what stands in for the empty prompt in guidance; None = the empty prompt.
    """

    sampler: Sampler
    steps: int
    guidance: float
    chunk: int = 16
    quantise: str = "round"
    negative: str | None = None

    @property
    def nfe(self) -> int:
        """Evaluations of the denoiser per image; guidance outside the network counts twice."""
        return self.steps * self.sampler.calls(self.guidance)

    @property
    def label(self) -> str:
        """For people: "student, 1 step", "teacher, 50 steps, guidance 3"."""
        plural = "s" if self.steps != 1 else ""
        scale = "" if self.sampler.guidance_free else f", guidance {self.guidance:g}"
        return f"{self.sampler.kind}, {self.steps} step{plural}{scale}"

    def __call__(
        self,
        prompts: Sequence[str] | Sequence[int],
        seeds: Sequence[int],
        on_step: OnStep | None = None,
        *,
        negatives: Sequence[str] | None = None,
        timings: dict[str, float] | None = None,
    ) -> Tensor:
        """Draw one image per prompt (or class index) and seed.

        Args:
            on_step: called as on_step(i, n) after each step of each chunk; may raise to stop.
            negatives: a negative prompt for each, in place of `negative`.
            timings: seconds are added under "text", "denoise" and "decode".

        Returns:
            uint8 (N, 3, H, W).

        Raises:
            UserError: prompts, seeds or negative prompts this model cannot serve.
        """
        return self.sampler.draw(self, prompts, seeds, on_step, negatives, timings)

    def x0(
        self, prompts: Sequence[str] | Sequence[int], seeds: Sequence[int], on_step: OnStep | None = None
    ) -> Tensor:
        """As the call, before decoding: (N, *family.shape)."""
        return self.sampler.draw_x0(self, prompts, seeds, on_step)


class Sampler:
    """A teacher or student directory, ready to draw images. Made by `loading.load`.

    Image i depends on its own prompt and seed only: its noise comes from a CPU torch.Generator of its own
    (the generator diffusers takes, so a stock pipeline given the same list draws the same noise), and the
    networks always run at one fixed batch size, padded, because a batch of 1 and one of 7 differ in the last
    bits on every backend.

    Attributes:
        kind: "student" or "teacher". steps: the counts it serves, None = any. resolution: (H, W).
        default_steps, default_guidance: what is taken where nothing is asked for.
        guidance_free: guidance is distilled into the weights, and no scale is taken.
        conditions: "prompt", "class" or "none"; class_names where known.
        parameters: counts by stage of an image: text, denoiser, decoder.
    """

    def __init__(
        self, family: Family, denoiser: Denoiser, path: Path, card: Card | None = None,
        device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        card = card or teacher_card(family)
        self.family_, self.denoiser, self.path, self.card = family, denoiser, path, card
        self.device, self.dtype, self.sampling = torch.device(device), dtype, card.sampling
        self.family: str = family.name
        self.name: str = card.name or path.name
        self.kind: str = card.kind
        self.steps: tuple[int, ...] | None = card.sampling.steps or None
        self.default_steps: int = min(self.steps) if self.steps else DEFAULT_TEACHER_STEPS
        self.guidance_free: bool = (
            card.sampling.guidance == "none" or family.conditions == "none" or not family.guidable
        )
        self.default_guidance: float = 1.0 if self.guidance_free else card.sampling.scale
        self.resolution: tuple[int, int] = family.resolution
        self.conditions: str = family.conditions
        self.class_names: tuple[str, ...] | None = family.class_names
        self.pipeline = family.pipeline
        self.parameters: dict[str, int] = family.parameters() | {"denoiser": parameter_count(denoiser)}

    def trace(self) -> Sampler:
        """Replay the denoiser's operations without its Python from now on; the images stay bit-equal.

        Worth it for many calls of one shape on a CPU, where bookkeeping is half of a small network's time.
        Choose the attention backend before. A network whose operations depend on more than shapes stays as it is.
        """
        network = self.denoiser.network
        if not isinstance(network, Traced) and getattr(network, "traceable", True):
            self.denoiser.network = Traced(self.denoiser.network).eval()
        return self

    def times(self, steps: int) -> tuple[float, ...]:
        """The times the denoiser is called at: those the student was trained on, where its card lists them."""
        if listed := self.card.timesteps.get(str(steps)):
            return listed
        return self.sampling.grid(self.denoiser.schedule, steps)

    def calls(self, guidance_scale: float) -> int:
        """Network evaluations per step: two with guidance applied outside the network, else one."""
        return 1 if guidance_scale == 1 or self.sampling.guidance == "input" else 2

    def at(
        self,
        steps: int | None = None,
        guidance: float | None = None,
        *,
        chunk: int = 16,
        quantise: str = "round",
        negative: str | None = None,
    ) -> Drawer:
        """This model at fixed settings; None = its default.

        Raises:
            UserError: steps, guidance, a negative prompt or other settings this model cannot serve.
        """
        if chunk < 1:
            raise UserError(f"chunk must be at least 1, got {chunk}.")
        if quantise not in QUANTISE:
            raise UserError(f"quantise must be one of {', '.join(QUANTISE)}, got {quantise!r}.")
        steps = self.default_steps if steps is None else steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise UserError(f"steps must be a whole number of at least 1, got {steps!r}.")
        if self.steps and steps not in self.steps:
            listed = ", ".join(map(str, self.steps))
            raise UserError(f"steps={steps} is not what {self.name!r} was trained for; use one of {listed}.")
        guidance = self.default_guidance if guidance is None else float(guidance)
        if self.guidance_free and guidance != 1:
            raise UserError(
                f"guidance_scale={guidance:g} has no effect: guidance is already distilled into {self.name!r}; leave it out."
            )
        if negative:
            self._refuse_negative(guidance)
        return Drawer(self, steps, guidance, chunk, quantise, negative or None)

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
        on_step: OnStep | None = None,
    ) -> Tensor:
        """`at` these settings, and drawn: uint8 (N, 3, H, W). See `at` and `Drawer`."""
        draw = self.at(steps, guidance_scale, chunk=chunk, quantise=quantise)
        return draw(prompts, seeds, on_step, negatives=negative_prompts, timings=timings)

    @torch.no_grad()
    def draw(
        self, drawer: Drawer, prompts: Sequence, seeds: Sequence[int], on_step: OnStep | None = None,
        negatives: Sequence[str] | None = None, timings: dict[str, float] | None = None,
    ) -> Tensor:  # fmt: skip
        """What a `Drawer`'s call does."""
        timings = timings if timings is not None else {}
        images = [torch.empty(0, 3, *self.resolution, dtype=torch.uint8)]
        for x0, kept in self._chunks(drawer, prompts, seeds, on_step, negatives, timings):
            clock = time.perf_counter()
            decoded = self.family_.decode(x0.to(self.dtype))[:kept]
            self._refuse_broken(decoded, seeds[drawer.chunk * (len(images) - 1) :])
            images.append(QUANTISE[drawer.quantise](decoded.clamp(0, 1)).to(torch.uint8).cpu())
            self._lap(timings, "decode", clock)
        return torch.cat(images)

    @torch.no_grad()
    def draw_x0(
        self, drawer: Drawer, prompts: Sequence, seeds: Sequence[int], on_step: OnStep | None = None
    ) -> Tensor:
        """What `Drawer.x0` does."""
        chunks = self._chunks(drawer, prompts, seeds, on_step, None, {})
        return torch.cat([x0[:kept] for x0, kept in chunks])

    def _chunks(self, drawer, prompts, seeds, on_step, negatives, timings) -> Iterator[tuple[Tensor, int]]:
        """x0 of each chunk, padded to its size, and how many of it are wanted."""
        refuse_lengths(prompts, seeds)
        if negatives and any(negatives):
            self._refuse_negative(drawer.guidance)
            if len(negatives) != len(prompts):
                raise UserError(
                    f"negative_prompts must be as many as prompts ({len(prompts)}), got {len(negatives)}."
                )
        elif drawer.negative:
            negatives = [drawer.negative] * len(prompts)
        for start in range(0, len(prompts), drawer.chunk):
            part = slice(start, start + drawer.chunk)
            kept = len(prompts[part])

            def padded(values: Sequence, part: slice = part, missing: int = drawer.chunk - kept) -> list:
                return list(values[part]) + list(values[part][:1]) * missing

            own = padded(negatives) if negatives else None
            yield self._chunk(drawer, padded(prompts), padded(seeds), own, timings, on_step), kept

    def _refuse_broken(self, images: Tensor, seeds: Sequence[int]) -> None:
        """Half precision overflows in some VAEs, and weights may be broken: a black image would hide it."""
        for image, seed in zip(images, seeds, strict=False):
            if not image.isfinite().all():
                raise UserError(
                    f"the image of seed {seed} by {self.name!r} is not finite: its weights are broken, or overflow in"
                    f" {str(self.dtype).removeprefix('torch.')}; use float32, or another checkpoint."
                )

    def _refuse_negative(self, guidance: float) -> None:
        if self.guidance_free or self.calls(guidance) == 1:
            raise UserError(
                f"a negative prompt needs guidance at sampling time, and {self.name!r} makes one network call per step "
                "without it; leave the negative prompt empty or use the teacher."
            )

    def _chunk(self, drawer, prompts, seeds, negatives, timings, on_step) -> Tensor:
        """x0 of one chunk."""
        clock = time.perf_counter()
        family, sampling, size = self.family_, self.sampling, len(prompts)
        schedule, times = self.denoiser.schedule, self.times(drawer.steps)
        cond = self._moved(family.encode(prompts))
        inputs, predict = {}, self.denoiser
        if sampling.guidance == "input":
            inputs["guidance"] = torch.full((size,), drawer.guidance, dtype=torch.float64)
        elif drawer.guidance != 1:
            uncond = self._moved(family.encode_negative(negatives) if negatives else family.uncond(size))

            def predict(x_t: Tensor, t: Tensor, c: Cond) -> Prediction:
                return guided(self.denoiser, x_t, t, c, uncond, drawer.guidance)

        clock = self._lap(timings, "text", clock)
        noise = self.noise(seeds)
        x_t = sampling.first_input(schedule, noise(0), times[0])
        x0 = sampling.sample(
            predict, x_t, times, noise, cond, t_min=schedule.t_min, on_step=on_step, **inputs
        )
        self._lap(timings, "denoise", clock)
        return x0

    def noise(self, seeds: Sequence[int]) -> Callable[[int], Tensor]:
        """Draws of unit noise (N, *shape), one after another, each sample's from a generator of its own."""
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

        def draw(_: int) -> Tensor:
            draws = [torch.randn(self.family_.shape, generator=generator) for generator in generators]
            return torch.stack(draws).to(self.device, self.dtype)

        return draw

    def _moved(self, cond: Cond) -> Cond:
        """On our device, in its own precision: a network casts what it may (a size of 1023 pixels is none in half)."""
        return map_cond(lambda c: c.to(self.device), cond)

    def _lap(self, timings: dict[str, float], stage: str, since: float) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        timings[stage] = timings.get(stage, 0.0) + now - since
        return now


def teacher_card(family: Family, scale: float | None = None) -> Card:
    """The card of a many-step model that came without one; `scale` in place of the family's default guidance."""
    scale = family.default_guidance if scale is None else scale
    return Card(family=family.name, sampling=replace(family.many_steps, scale=scale))


def refuse_lengths(prompts: Sequence, seeds: Sequence[int]) -> None:
    if len(prompts) != len(seeds):
        raise UserError(f"prompts and seeds must be of one length, got {len(prompts)} and {len(seeds)}.")
