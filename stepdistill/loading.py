"""What a directory holds, built: a teacher, a student, or merged students."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from stepdistill import card as cards
from stepdistill.card import Card
from stepdistill.drawing import Sampler
from stepdistill.errors import UserError
from stepdistill.families import FAMILIES
from stepdistill.families.base import Family
from stepdistill.families.decoders import put_decoder
from stepdistill.families.reading import every_family, read_index
from stepdistill.onnx_form import attached
from stepdistill.pruning import files, plug
from stepdistill.registry import resolve
from stepdistill.students import Students


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    intervals: str | Path | Sequence[str | Path] = (),
    decoder: str | Path = "",
) -> Sampler:
    """A teacher or student directory as a sampler.

    A student is a stock diffusers directory with a `stepdistill.json` beside its model_index.json; without
    that file the directory is a teacher, and its family is told by the pipeline class. Merged students are
    drawn with like any other.

    intervals: files of intervals of blocks, or a directory of them, as `python -m training.prune` leaves them for this
        teacher: each puts one block in the place of several.
    decoder: directory of an AutoencoderTiny that decodes in the place of the pipeline's own VAE.

    Raises:
        UserError: the directory is missing, is no diffusers pipeline, or holds pickled weights; an interval is of
            another teacher.
    """
    path = Path(path)
    card = cards.read(path)
    if card is not None and card.kind == "students":
        if intervals or decoder:
            raise UserError(f"{path} holds merged students, into which nothing is plugged.")
        return Students(path, card, [_part(path / name, device, dtype) for name in card.students])
    return _single(path, card, device, dtype, intervals, decoder)


def class_of(path: Path, card: Card | None) -> type[Family]:
    """The family of a directory with this card, or none.

    Raises:
        UserError: no family serves its pipeline, or the card names an unknown one.
    """
    # A card may have been downloaded: it names what is registered, and never code of its own.
    if card is not None and card.family:
        where = f"{path / cards.NAME}: family"
        return resolve(card.family, FAMILIES, "family", where=where, registered_only=True)
    return family_of(path)


def family_of(path: Path) -> type[Family]:
    """The family that serves a pipeline directory, told by its model_index.json.

    Raises:
        UserError: there is no such directory, or no family serves its pipeline.
    """
    return serving(read_index(path)["_class_name"], path)


def serving(name: str, path: Path) -> type[Family]:
    """The family that serves the pipeline class `name`, which lies at `path`. Raises UserError where none does."""
    families = [family for _, family in every_family()]
    for family in families:
        if name in family.pipelines:
            return family
    supported = sorted(pipeline for family in families for pipeline in family.pipelines)
    raise UserError(f"{path} is a {name}, which no family serves yet; supported are {', '.join(supported)}.")


def _part(path: Path, device: str, dtype: torch.dtype) -> Sampler:
    card = cards.required(path)
    if card.kind == "students":
        raise UserError(f"{path} holds merged students itself; merge single students.")
    return _single(path, card, device, dtype)


def _single(
    path: Path,
    card: Card | None,
    device: str,
    dtype: torch.dtype,
    intervals: str | Path | Sequence[str | Path] = (),
    decoder: str | Path = "",
) -> Sampler:
    cls = class_of(path, card)
    family = cls.from_directory(path, card.settings if card is not None else None, dtype)
    if intervals:
        family.teacher = plug(family.teacher, files(intervals))
    if card is not None and "end_by_depth" in card.sampling.inputs:
        # Which its weights do not say.
        family.teacher.network.extras["end_by_depth"]()
    if decoder:
        put_decoder(family, Path(decoder))
    family.to(device, dtype)
    denoiser = family.teacher.eval().requires_grad_(False)
    sampler = Sampler(family, denoiser, path, card, device, dtype)
    # ONNX files are of the networks that lie there.
    return sampler if intervals or decoder else attached(sampler)
