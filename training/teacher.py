"""The test a run begins with: whether its teacher predicts what its directory says, before anything is trained by it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stepdistill import scenes
from stepdistill.denoiser import Cond, map_cond
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from training.data import Source
from training.data.base import Unreadable
from training.denoising import CLEARLY, REVERSED, SETTINGS, Errors, chunk_of, count_of, errors_of

if TYPE_CHECKING:
    from training.recipe import Recipe

# Of latents in either direction, from which on it is asked whether their scaling is wrong.
ODD = 1.25
SCENES = "drawn scenes"


@dataclass(frozen=True)
class Examples:
    """x0 (N, *shape) and their conditions, on the teacher's device.

    Attributes:
        where: they are from, for people. stand_in: drawn for want of the teacher's own kind of images.
    """

    x0: Tensor
    cond: Cond
    where: str
    stand_in: bool = False


@dataclass(frozen=True)
class Verdict:
    """What a test found.

    Attributes:
        declared: how the directory says that the network's output is to be read.
        errors: of each reading. std, mean: of x0, over all channels.
        factor: what x0 must be multiplied by for the network to know it again, 1 = nothing.
    """

    declared: str
    errors: Errors
    where: str
    std: float
    mean: float
    factor: float = 1.0

    @property
    def verified(self) -> bool:
        return self.errors.verified(self.declared) and self.factor == 1

    @property
    def fits(self) -> str:
        """The reading that is right in place of the declared one; "" = none is known to be."""
        return self.errors.clearly_better(self.declared)

    def line(self) -> str:
        """For people."""
        said = f"{self.declared}, {self.errors.mean(self.declared):.2f} of the best linear denoiser's error"
        if self.verified:
            return f"the teacher predicts {said} on {self.where}, as declared"
        if self.fits or self.factor != 1:
            return (
                f"the teacher is declared wrong: on {self.where} {self.errors} (1 = the best linear denoiser)"
            )
        return (
            f"whether the teacher predicts {self.declared} could not be verified on {self.where} ({self.errors}, 1 = the"
            " best linear denoiser): its weights are not trained, or for other images"
        )

    def wrong(self, family: Family) -> str:
        """What is declared wrong and what fits, in words that say what to set; "" where nothing is known to be wrong."""
        if self.fits:
            return (
                f"{_declared(family, self.declared)}, but read as {self.fits} it leaves {self.errors.mean(self.fits):.2f}"
                f" of the best linear denoiser's error on {self.where}, and {self.errors.mean(self.declared):.2f} as"
                f" {self.declared}; {_cure(family, self.declared, self.fits)}"
            )
        if self.factor == 1:
            return ""
        vae = getattr(family, "vae", None)
        scale = getattr(getattr(vae, "config", None), "scaling_factor", None)
        said = f"the latents of {self.where} have a standard deviation of {self.std:.3g}, and its network knows latents"
        if scale and family.scaled_by == "scaling_factor":
            return (
                f"{said} of about 1: scaling_factor={scale:g} in vae/config.json is wrong, and about"
                f" {scale * self.factor:.3g} fits; set it to that of the model"
            )
        return f"{said} {self.factor:.3g} times those; take the VAE that belongs to it"


def examples_of(family: Family, source: Source | None, device: Any, batch: int) -> Examples:
    """The first examples of the data where they are images of the family's size, else drawn scenes.

    batch: of one pass of the encoders.
    """
    found = None
    if source is not None and _fits(family, source):
        # What cannot be read a run counts, and goes on up to a limit.
        with contextlib.suppress(Unreadable):
            found = _of_data(family, source, batch)
    if found is None:
        count = count_of(family.shape, 2**31)
        pixels = _encoded(family, _scenes(count, family.resolution), batch)
        found = Examples(pixels, _told(family, None, range(count)), SCENES, True)
    cond = map_cond(lambda c: c.to(device), found.cond)
    return replace(found, x0=found.x0.detach().to(device), cond=cond)


def _fits(family: Family, source: Source) -> bool:
    sized = source.bucketed or source.image_size == family.resolution
    frames = source.frames in (1, getattr(getattr(family, "config", None), "frames", 1))
    return family.own_data or (source.has_images and sized and frames)


def _of_data(family: Family, source: Source, batch: int) -> Examples:
    if family.own_data:
        rows = range(count_of(family.shape, source.size))
        return Examples(
            family.examples(source, rows), family.encode(family.prompts(source, rows)), "its data"
        )
    members = source.buckets[0].members
    rows = [int(row) for row in members[: count_of(family.shape, len(members))]]
    x0 = _encoded(family, source.images(rows), batch)
    sizes = torch.as_tensor(source.sizes(rows), dtype=torch.float32)
    return Examples(x0, family.sized(_told(family, source, rows), sizes), "its data")


def _encoded(family: Family, pixels: np.ndarray, batch: int) -> Tensor:
    images = torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, -3)
    # Those of videos have frames.
    images = family.stills(images) if images.ndim == 4 else images
    return torch.cat([family.encode_images(part) for part in images.split(chunk_of(family.shape, batch))])


def judge(family: Family, examples: Examples, batch: int) -> Verdict:
    """How the teacher's output is to be read on these examples, and whether they have the scale it knows.

    batch: of one pass of the teacher.
    """
    teacher, x0, chunk = family.teacher, examples.x0, chunk_of(family.shape, batch)
    errors = errors_of(teacher, x0, examples.cond, chunk=chunk)
    std, mean = float(x0.std()), float(x0.mean())
    factor = 1.0
    if family.latent and std > 0 and not 1 / ODD < std < ODD:
        scaled = errors_of(teacher, x0 / std, examples.cond, chunk=chunk)
        # Read as they are best: a wrong scale makes readings hard to tell.
        best = scaled.mean(scaled.best)
        if scaled.verified(scaled.best) and errors.mean(errors.best) > CLEARLY * best:
            errors, factor = scaled, 1 / std
    return Verdict(teacher.kind, errors, examples.where, std, mean, factor)


def assess(recipe: Recipe, family: Family, source: Source, device: Any, batch: int) -> str:
    """A line on the teacher of a run that begins, "" where there is nothing to test: exact teachers declare nothing.

    Nothing is drawn from any generator but the test's own.

    Raises:
        UserError: what its directory says is wrong, and what fits is known.
    """
    if not recipe.run.check_teacher or family.teacher is None or family.pipeline is None:
        return ""
    stages = recipe.stages()
    if not any(stage.student.init == "teacher" or stage.new_method().needs_teacher for stage in stages):
        return ""
    verdict = judge(family, examples_of(family, source, device, batch), batch)
    if wrong := verdict.wrong(family):
        raise UserError(f"family.teacher: {wrong} (run.check_teacher=false trains all the same).")
    return verdict.line()


def _scenes(count: int, resolution: tuple[int, int]) -> np.ndarray:
    """Pictures (N, H, W, 3) of the first scenes, the middle of squares."""
    height, width = resolution
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    pictures = np.empty((count, height, width, 3), np.uint8)
    for i in range(count):
        # As scenes.image_at, at any size.
        rng = np.random.default_rng((0, i))
        scene = scenes.sample_scene(rng)
        pictures[i] = scenes.render(scene, rng, side)[top : top + height, left : left + width]
    return pictures


def some_prompts(family: Family, source: Source | None, rows: Sequence[int]) -> list:
    """What pictures may be asked for: the data's captions or classes, else those of drawn scenes, or any classes."""
    if source is not None and _listed(family, source) is not None:
        return family.prompts(source, [row for row in rows if row < source.size])
    if family.conditions == "prompt":
        return [scenes.scene_at(row).caption for row in rows]
    return [row % len(family.class_names or (0,)) for row in rows]


def _told(family: Family, source: Source | None, rows: Sequence[int]) -> Cond:
    """The conditions of those pictures of a source, None = scenes. Without captions or classes that the family knows
    they are told none, where that can be said.
    """
    prompts = some_prompts(family, source, rows)
    if family.conditions == "none" or (family.conditions == "prompt" and source is None):
        return family.encode(prompts)
    known = source is not None and _listed(family, source) is not None
    return family.encode(prompts) if known or not family.guidable else family.uncond(len(prompts))


def _listed(family: Family, source: Source) -> Sequence | None:
    return source.captions if family.conditions == "prompt" else source.labels


def _declared(family: Family, declared: str) -> str:
    if family.teacher.native.discrete:
        return f"its scheduler says prediction_type={SETTINGS[declared]}"
    return f"its scheduler stands for {declared}"


def _cure(family: Family, declared: str, fits: str) -> str:
    """What to set for a network that predicts `fits`."""
    if family.teacher.native.discrete:
        return f"set prediction_type to {SETTINGS[fits]} in scheduler/scheduler_config.json of the teacher"
    if fits == REVERSED:
        return "its weights were converted with the other sign: convert them again"
    return f"no flow scheduler stands for {fits}: put the scheduler it was trained with into its directory"
