"""One loaded model: what it can do, the sizes its networks run at, and a batch drawn with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from app.catalog import Entry
from app.embeddings import Embeddings
from app.invariant import make_invariant
from app.request import Limits, Request
from stepdistill.families.decoders import decoded_by
from stepdistill.image_to_image import no_images
from stepdistill.tracing import TracedDecoder

if TYPE_CHECKING:
    from app.pictures import Picture

# Sizes of a batch that are tried, the largest first.
SIZES = (8, 4, 2)


def _digest(picture: torch.Tensor) -> bytes:
    """What a picture is remembered by: its pixels would outweigh its latents."""
    return hashlib.sha256(picture.numpy().tobytes()).digest()


class Model:
    """A sampler as the engine runs it.

    Attributes:
        sizes: of a batch at which an image has the bits that it has alone; what is between is filled up. Where
            no size but one had them, this is that one: `batch`.
        preview: the same sampler with a tiny decoder, for a few-step student where one was asked for.
    """

    def __init__(
        self, entry: Entry, sampler: Any, attention: str, batch: int = 1, decoder: str | Path | None = None
    ) -> None:
        from stepdistill.attention import choose

        self.entry, self.sampler = entry, sampler
        # What is no pipeline of diffusers has a network all the same.
        chosen = choose(sampler.pipeline or sampler.denoiser.network, attention)
        family = getattr(sampler, "family_", None)
        device, dtype = str(getattr(sampler, "device", "cpu")), getattr(sampler, "dtype", torch.float32)
        if device == "cpu" and dtype == torch.float32:
            make_invariant(sampler.denoiser.network, getattr(sampler.pipeline, "vae", None))
        if family is not None and sampler.conditions == "prompt":
            family.encode = Embeddings(family.encode)
        if family is not None and sampler.image_to_image:
            # Each alone, as prompts are: one picture is drawn from many times.
            encode = family.encode_images
            family.encode_images = Embeddings(lambda pictures: encode(torch.stack(pictures)), _digest)
        self.preview = decoded_by(sampler, Path(decoder)) if decoder and sampler.steps else None
        self.sizes: tuple[int, ...] = (batch,)
        self._traceable = device == "cpu"
        self._untried = list(SIZES) if batch == 1 and device == "cpu" and family is not None else []
        self.about = {
            "attention": str(chosen).removeprefix("attention: "),
            "attention_why": chosen.why,
            "parameters": dict(sampler.parameters),
        }

    def limits(self) -> Limits:
        """What may be asked of it."""
        s = self.sampler
        return Limits(
            name=s.name,
            kind=s.kind,
            steps=tuple(s.steps) if s.steps else None,
            default_steps=s.default_steps,
            guidance_free=s.guidance_free,
            default_guidance=s.default_guidance,
            resolution=self.resolution,
            conditions=s.conditions,
            class_names=tuple(s.class_names) if s.class_names else None,
            no_picture=no_images(s),
            levels=len(s.levels) if s.steps and s.image_to_image else None,
        )

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) of its images."""
        return tuple(self.sampler.resolution)

    # Drawing ------------------------------------------------------------------------------------------------

    def draw(
        self,
        requests: Sequence[Request],
        on_step: Callable[[int, int], None] | None = None,
        pictures: Sequence[Picture] | None = None,
        preview: bool = False,
    ) -> tuple[list[np.ndarray], dict[str, float]]:
        """The images of validated requests of one key, uint8 (H, W, 3), and the seconds of the batch's stages.

        pictures: what their `image` names. preview: decode by the tiny decoder, where there is one.

        Raises:
            UserError: an image is not finite.
        """
        first, spent = requests[0], {}
        drawn_from: dict[str, Any] = {}
        if pictures is not None:
            fitted = np.stack([picture.fitted(self.resolution) for picture in pictures])
            drawn_from["images"] = torch.from_numpy(fitted).permute(0, 3, 1, 2)
            drawn_from["strength"] = first.strength
        negatives = [request.negative_prompt for request in requests]
        images = (self.preview if preview and self.preview is not None else self.sampler)(
            [self._condition(request.prompt) for request in requests],
            [request.seed for request in requests],
            steps=first.steps,
            guidance_scale=None if self.sampler.guidance_free else first.guidance_scale,
            negative_prompts=negatives if any(negatives) else None,
            chunk=self.size_for(len(requests)),
            timings=spent,
            on_step=on_step,
            **drawn_from,
        )
        names = ("text", *(("encode",) if pictures is not None else ()), "denoise", "decode")
        stages = {name: spent.get(name, 0.0) for name in names}
        return list(np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())), stages

    def size_for(self, count: int) -> int:
        """The size the networks run at for `count` images: the smallest that holds them, or the largest."""
        return min((size for size in self.sizes if size >= count), default=max(self.sizes))

    def _condition(self, prompt: str) -> Any:
        names = self.sampler.class_names
        return names.index(prompt) if self.sampler.conditions == "class" and names else prompt

    def any_prompt(self) -> str:
        """A prompt that it can draw."""
        names = self.sampler.class_names
        classes = self.sampler.conditions == "class" and names
        return names[0] if classes else "a large red circle on a blue background"

    # Getting ready ------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """One image in one or few steps, which also shows whether the weights are sound."""
        steps = self.sampler.default_steps if self.sampler.steps else 2
        self.draw([Request(self.any_prompt(), seed=0, steps=steps)])

    def make_faster(self) -> bool:
        """Do a part of what makes drawing faster and can wait until nobody does; False where all is done."""
        if self._traceable:
            # A quarter of a small network's time on a CPU is Python's, which the routes of other users wait for as well.
            # Recording takes longer than a first image.
            self._traceable = False
            self.sampler.trace()
            for each in filter(None, (self.sampler, self.preview)):
                vae = getattr(each.pipeline, "vae", None)
                if isinstance(getattr(vae, "decoder", None), nn.Module):
                    vae.decoder = TracedDecoder(vae.decoder).eval()
            self.warm_up()
            return True
        return self._try_size()

    def _try_size(self) -> bool:
        """Try the next size of a batch; False where all have been tried.

        It is taken where its first and its last image have the bits they have alone, as floats: those of the
        denoiser and those of the decoder.
        """
        if not self._untried:
            return False
        size, sampler = self._untried.pop(0), self.sampler
        prompt = self._condition(self.any_prompt())
        many = _floats(sampler, [prompt] * size, list(range(size)), size)
        for at in (0, size - 1):
            one = _floats(sampler, [prompt], [at], 1)
            if not all(torch.equal(a[at : at + 1], b) for a, b in zip(many, one, strict=True)):
                return True
        self.sizes = tuple(sorted({*self.sizes, size}))
        return True


def _floats(sampler: Any, prompts: list, seeds: list[int], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 and the decoded images before they are rounded."""
    steps = min(sampler.steps) if sampler.steps else 1
    with torch.no_grad():
        x0 = sampler.at(steps, chunk=size).x0(prompts, seeds)
        return x0, sampler.family_.decode(x0.to(sampler.dtype))
