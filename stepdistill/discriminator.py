"""Small discriminator heads over a denoiser's tapped activations (DMD2, LADD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """One tapped block -> logits. (B, C, H, W) maps, (B, N, C) tokens or (B, C) vectors.

    One logit per place (LADD); a vector has one place.
    """

    def __init__(self, channels: int, width: int = 128):
        super().__init__()
        groups = next(g for g in (16, 8, 4, 2, 1) if width % g == 0)
        self.layers = nn.Sequential(
            nn.Conv1d(channels, width, 1), nn.GroupNorm(groups, width), nn.SiLU(), nn.Conv1d(width, 1, 1)
        )

    def forward(self, features: Tensor) -> Tensor:
        """-> logits (B, places)."""
        if features.ndim == 4:
            places = features.flatten(2)
        elif features.ndim == 3:
            places = features.transpose(1, 2)
        else:
            places = features[..., None]
        return self.layers(places)[:, 0]


class Discriminator(nn.Module):
    """A head per tapped block; their logits side by side, (B, all places).

    channels: the channel count of each tap, in the order the features come.
    """

    def __init__(self, channels: Sequence[int], width: int = 128):
        super().__init__()
        self.heads = nn.ModuleList(Head(count, width) for count in channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat([head(feature) for head, feature in zip(self.heads, features, strict=True)], 1)
