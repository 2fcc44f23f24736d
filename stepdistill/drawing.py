"""A loaded pipeline, and one way of drawing with it.

sampler = stepdistill.load("runs/dmd2/student")        # a Sampler
draw = sampler.at(steps=1)                             # a Drawer: fixed settings, a frozen value
images = draw(["a red circle"], seeds=[0])             # uint8 (1, 3, H, W)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepdistill.card import Card
from stepdistill.denoiser import Cond, Denoiser, guided, map_cond, parameter_count
from stepdistill.drawer import Drawer, OnStep
from stepdistill.errors import UserError
from stepdistill.image_to_image import check_images, left_of, left_of_levels
from stepdistill.prediction import Prediction
from stepdistill.schedule import times_like
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
        image_to_image: it can draw from images: its family's pipelines can, and a student has more than one level.
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
        self.image_to_image: bool = bool(family.image_to_image) and (
            self.steps is None or len(self.levels) > 1
        )
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

    def times(self, steps: int, strength: float = 1.0) -> tuple[float, ...]:
        """The times the denoiser is called at: those the student was trained on, where its card lists them.

        strength: in (0, 1]: what is left of them when an image of that strength is drawn from; () = nothing.
        """
        if strength < 1 and self.steps:
            return left_of_levels(self.levels, steps, strength)
        times = self.card.timesteps.get(str(steps)) or self.sampling.grid(self.denoiser.schedule, steps)
        return times if strength == 1 else left_of(times, strength, not self.denoiser.schedule.discrete)

    @property
    def levels(self) -> tuple[float, ...]:
        """The times a few-step student was trained at, falling: all of its step counts, and of its finest grid."""
        counts = {*(self.steps or ()), self.sampling.points}
        return tuple(sorted({t for steps in counts for t in self.times(steps)}, reverse=True))

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
        strength: float = 1.0,
    ) -> Drawer:
        """This model at fixed settings; None = its default.

        Raises:
            UserError: steps, guidance, strength, a negative prompt or other settings this model cannot serve.
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
        if not 0 < strength <= 1:
            raise UserError(f"strength must be above 0 and at most 1, got {strength!r}.")
        return Drawer(self, steps, guidance, chunk, quantise, negative or None, float(strength))

    def __call__(
        self,
        prompts: Sequence[str] | Sequence[int],
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompts: Sequence[str] | None = None,
        images: Tensor | None = None,
        strength: float = 1.0,
        chunk: int = 16,
        quantise: str = "round",
        timings: dict[str, float] | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """`at` these settings, and drawn: uint8 (N, 3, H, W). See `at` and `Drawer`."""
        draw = self.at(steps, guidance_scale, chunk=chunk, quantise=quantise, strength=strength)
        return draw(prompts, seeds, on_step, negatives=negative_prompts, images=images, timings=timings)

    @torch.no_grad()
    def draw(
        self, drawer: Drawer, prompts: Sequence, seeds: Sequence[int], on_step: OnStep | None = None,
        negatives: Sequence[str] | None = None, timings: dict[str, float] | None = None, images: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """What a `Drawer`'s call does."""
        timings = timings if timings is not None else {}
        drawn = [torch.empty(0, 3, *self.resolution, dtype=torch.uint8)]
        for x0, kept in self._chunks(drawer, prompts, seeds, on_step, negatives, timings, images):
            clock = time.perf_counter()
            decoded = self.family_.decode(x0.to(self.dtype))[:kept]
            self._refuse_broken(decoded, seeds[drawer.chunk * (len(drawn) - 1) :])
            drawn.append(QUANTISE[drawer.quantise](decoded.clamp(0, 1)).to(torch.uint8).cpu())
            self._lap(timings, "decode", clock)
        return torch.cat(drawn)

    @torch.no_grad()
    def draw_x0(
        self, drawer: Drawer, prompts: Sequence, seeds: Sequence[int], on_step: OnStep | None = None,
        images: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """What `Drawer.x0` does."""
        chunks = self._chunks(drawer, prompts, seeds, on_step, None, {}, images)
        return torch.cat([x0[:kept] for x0, kept in chunks])

    def _chunks(
        self, drawer, prompts, seeds, on_step, negatives, timings, images
    ) -> Iterator[tuple[Tensor, int]]:
        """x0 of each chunk, padded to its size, and how many of it are wanted."""
        refuse_lengths(prompts, seeds)
        check_images(self, images, drawer.strength, len(prompts))
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
            # At full strength nothing of them is left.
            whole = images is None or drawer.strength == 1
            first = None if whole else torch.stack(padded(images))
            yield self._chunk(drawer, padded(prompts), padded(seeds), own, timings, on_step, first), kept

    def _refuse_broken(self, images: Tensor, seeds: Sequence[int]) -> None:
        """Half precision overflows in some VAEs, and weights may be broken: a black image would hide it."""
        if images.isfinite().all():
            return
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

    def _chunk(self, drawer, prompts, seeds, negatives, timings, on_step, images) -> Tensor:
        """x0 of one chunk."""
        clock = time.perf_counter()
        family, sampling, size = self.family_, self.sampling, len(prompts)
        schedule, times = self.denoiser.schedule, self.times(drawer.steps, drawer.strength)
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
        if images is None:
            x_t = sampling.first_input(schedule, noise(0), times[0])
        else:
            x0 = family.encode_images(images).to(self.device, self.dtype)
            clock = self._lap(timings, "encode", clock)
            if not times:
                return x0
            x_t = schedule.add_noise(x0, noise(0), times_like(times[0], x0))
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
