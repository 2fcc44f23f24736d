"""A sampler at fixed settings, as one frozen value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from stepdistill.drawing import Sampler

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Drawer:
    """A sampler at fixed settings. Equal settings draw equal images; made by `Sampler.at`.

    Attributes:
        steps: number of sampling steps. guidance: g of uncond + g (cond - uncond), 1 = off.
        chunk: the fixed batch size of the networks; results are equal for equal chunk.
        quantise: how grey levels are rounded, a name in QUANTISE.
        negative: what stands in for the empty prompt in guidance; None = the empty prompt.
        strength: where images are given to draw from, in (0, 1]: how much of the walk is left (`image_to_image`).
    """

    sampler: Sampler
    steps: int
    guidance: float
    chunk: int = 16
    quantise: str = "round"
    negative: str | None = None
    strength: float = 1.0

    @property
    def nfe(self) -> int:
        """Evaluations of the denoiser per image; guidance outside the network counts twice."""
        steps = self.steps if self.strength == 1 else len(self.sampler.times(self.steps, self.strength))
        return steps * self.sampler.calls(self.guidance)

    @property
    def label(self) -> str:
        """For people: "student, 1 step", "teacher, 50 steps, guidance 3"."""
        plural = "s" if self.steps != 1 else ""
        scale = "" if self.sampler.guidance_free else f", guidance {self.guidance:g}"
        strength = "" if self.strength == 1 else f", strength {self.strength:g}"
        return f"{self.sampler.kind}, {self.steps} step{plural}{scale}{strength}"

    def __call__(
        self,
        prompts: Sequence[str] | Sequence[int],
        seeds: Sequence[int],
        on_step: OnStep | None = None,
        *,
        negatives: Sequence[str] | None = None,
        images: Tensor | None = None,
        timings: dict[str, float] | None = None,
    ) -> Tensor:
        """Draw one image per prompt (or class index) and seed.

        Args:
            on_step: called as on_step(i, n) after each step of each chunk; may raise to stop.
            negatives: a negative prompt for each, in place of `negative`.
            images: to draw from, one for each, uint8 (N, 3, H, W); needed where `strength` is below 1.
            timings: seconds are added under "text", "denoise" and "decode", with images also under "encode".

        Returns:
            uint8 (N, 3, H, W).

        Raises:
            UserError: prompts, seeds, images or negative prompts this model cannot serve.
        """
        return self.sampler.draw(self, prompts, seeds, on_step, negatives, timings, images)

    def x0(
        self,
        prompts: Sequence[str] | Sequence[int],
        seeds: Sequence[int],
        on_step: OnStep | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        """As the call, before decoding: (N, *family.shape)."""
        return self.sampler.draw_x0(self, prompts, seeds, on_step, images)
