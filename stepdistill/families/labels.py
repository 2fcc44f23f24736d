"""Class indices as conditions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.errors import UserError


def labels_of(prompts: Sequence[int], classes: int, hint: str = "") -> Tensor:
    """Class indices as (N,) int64. hint: the end of the sentence about what else could be meant.

    Raises:
        UserError: one of them is no class.
    """
    labels = torch.as_tensor([int(label) for label in prompts], dtype=torch.int64)
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise UserError(
            f"class labels must be between 0 and {classes - 1}, got {int(labels.min())}..{int(labels.max())}{hint}."
        )
    return labels
