"""What a directory holds, built: a teacher, a student, or merged students."""

from __future__ import annotations

from pathlib import Path

import torch

from stepdistill import card as cards
from stepdistill.card import Card
from stepdistill.drawing import Sampler
from stepdistill.errors import UserError
from stepdistill.families import FAMILIES
from stepdistill.families.base import family_of
from stepdistill.registry import resolve
from stepdistill.students import Students


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Sampler:
    """A teacher or student directory as a sampler.

    A student is a stock diffusers directory with a `stepdistill.json` beside its model_index.json; without
    that file the directory is a teacher, and its family is told by the pipeline class. Merged students are
    drawn with like any other.

    Raises:
        UserError: the directory is missing, is no diffusers pipeline, or holds pickled weights.
    """
    path = Path(path)
    card = cards.read(path)
    if card is not None and card.kind == "students":
        return Students(path, card, [_part(path / name, device, dtype) for name in card.students])
    return _single(path, card, device, dtype)


def _part(path: Path, device: str, dtype: torch.dtype) -> Sampler:
    card = cards.required(path)
    if card.kind == "students":
        raise UserError(f"{path} holds merged students itself; merge single students.")
    return _single(path, card, device, dtype)


def _single(path: Path, card: Card | None, device: str, dtype: torch.dtype) -> Sampler:
    # A card may have been downloaded: it names what is registered, and never code of its own.
    named, where = (card.family if card else "") or family_of(path), f"{path / cards.NAME}: family"
    cls = resolve(named, FAMILIES, "family", where=where, registered_only=True)
    family = cls.from_directory(path)
    family.to(device, dtype)
    denoiser = family.teacher.eval().requires_grad_(False)
    return Sampler(family, denoiser, path, card, device, dtype)
