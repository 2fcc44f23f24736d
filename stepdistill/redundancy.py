"""Which intervals of blocks a network can do without, by PPCL's criterion (arXiv 2511.16156, Sec. 3.1).

Each block T_i has a linear stand-in, its residual probe h + l_i(h) ~ T_i(h), fitted by least squares. cka(u, k) compares
the network's output with its output when probes stand for the blocks u..k, and

    delta(u, k) = -(cka(u, k) - cka(u, k - 1))                                                    (what block k takes)

While an interval is redundant delta falls; where it first rises, at k, the interval u..k-1 ends, and the next begins at k.
The probes are the least-squares solution itself, which is the minimum of the loss that the paper then trains them on.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Cond, Denoiser
from stepdistill.pruning import Interval, movable, streams

# Rises of delta below this are rounding.
ROUNDING = 1e-5
# Relative ridge of a probe's normal equations.
RIDGE = 1e-6
# Blocks whose normal equations are held at once: two float64 matrices of (width + 1)^2 for each of their streams.
AT_ONCE = 8

# (x_t, t, cond) of a number of samples.
Sample = tuple[Tensor, Tensor, Cond]


@dataclass(frozen=True)
class Found:
    """An interval and what was measured of it.

    Attributes:
        curve: cka(u, k) for k = u .. the one that ended it, or the last of the list.
        harm: 1 - cka of the output with probes in the place of all its blocks but the first, which one block remains for.
    """

    interval: Interval
    curve: tuple[float, ...]
    harm: float


class Probe(nn.Module):
    """A residual affine map in the place of a block, for each of its streams: h + h W + b.

    Args:
        block: whose arguments it takes. maps: (width + 1, width) for each stream, the last row b.
    """

    def __init__(self, block: nn.Module, maps: Sequence[Tensor], pair: bool) -> None:
        super().__init__()
        self.signature, self.pair = inspect.signature(block.forward), pair
        self.maps = nn.ParameterList(nn.Parameter(each, requires_grad=False) for each in maps)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = stream_inputs(self.signature, args, kwargs, self.pair)
        out = [h + (h @ m[:-1].to(h) + m[-1].to(h)) for h, m in zip(given, self.maps, strict=True)]
        return tuple(out) if self.pair else out[0]


def stream_inputs(
    signature: inspect.Signature, args: tuple, kwargs: dict[str, Any], pair: bool
) -> tuple[Tensor, ...]:
    """Of a block's arguments, those that its outputs go on from, in the order of these: upstream's joint blocks return
    the text's tokens and then the image's, all others the first thing they are given.
    """
    bound = signature.bind(*args, **kwargs).arguments
    if pair:
        return bound["encoder_hidden_states"], bound["hidden_states"]
    return (next(iter(bound.values())),)


@torch.no_grad()
def probes(
    denoiser: Denoiser, stack: str, samples: Sequence[Sample], indices: Sequence[int]
) -> dict[int, Probe]:
    """The probes of the blocks `indices` of a list, fitted to what goes through them for these samples."""
    found: dict[int, Probe] = {}
    for start in range(0, len(indices), AT_ONCE):
        found |= _fitted(denoiser, stack, samples, indices[start : start + AT_ONCE])
    return found


def _fitted(
    denoiser: Denoiser, stack: str, samples: Sequence[Sample], indices: Sequence[int]
) -> dict[int, Probe]:
    blocks = denoiser.network.model.get_submodule(stack)
    sums: dict[int, list[list[Tensor]]] = {i: [] for i in indices}

    def gather(i: int):
        signature = inspect.signature(blocks[i].forward)

        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            out = streams(output)
            given = stream_inputs(signature, args, kwargs, len(out) > 1)
            for stream, (h, target) in enumerate(zip(given, out, strict=True)):
                h, difference = h.flatten(0, -2).double(), (target - h).flatten(0, -2).double()
                h = torch.cat((h, h.new_ones(len(h), 1)), 1)
                terms = [h.T @ h, h.T @ difference]
                if stream < len(sums[i]):
                    sums[i][stream] = [a + b for a, b in zip(sums[i][stream], terms, strict=True)]
                else:
                    sums[i].append(terms)

        return hook

    handles = [blocks[i].register_forward_hook(gather(i), with_kwargs=True) for i in indices]
    try:
        for x_t, t, cond in samples:
            denoiser(x_t, t, cond)
    finally:
        for handle in handles:
            handle.remove()
    made = {}
    for i, per_stream in sums.items():
        maps = []
        for gram, cross in per_stream:
            ridge = (
                RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            )
            maps.append(torch.linalg.solve(gram + ridge, cross).float())
        made[i] = Probe(blocks[i], maps, len(maps) > 1)
    return made


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features (n, d) and (n, d') of the same n samples: 1 where they are
    equal up to rotation, shift and scale (Kornblith et al. 2019, arXiv 1905.00414, Eq. 4). NaN where one is constant.
    """
    grams = []
    for each in (x, y):
        each = each.double() - each.double().mean(0)
        grams.append(each @ each.T)
    a, b = grams
    return float((a * b).sum() / (a.norm() * b.norm()))


@torch.no_grad()
def output(denoiser: Denoiser, samples: Sequence[Sample]) -> Tensor:
    """The network's own output for all samples, (n, features)."""
    return torch.cat([denoiser(x_t, t, cond).raw.flatten(1) for x_t, t, cond in samples])


def find(denoiser: Denoiser, samples: Sequence[Sample]) -> list[Found]:
    """The intervals of every list of blocks that an interval may hold, in order, which do not overlap.

    denoiser: the teacher. samples: some hundreds, over all times; fewer than three tell nothing.

    Raises:
        UserError: no blocks of this network can be removed, and why.
    """
    whole, found = output(denoiser, samples), []
    for stack, indices in movable(denoiser.network).items():
        stand_ins = probes(denoiser, stack, samples, indices)

        def alike(
            first: int, last: int, stack: str = stack, stand_ins: dict[int, Probe] = stand_ins
        ) -> float:
            with _standing_in(denoiser, stack, {i: stand_ins[i] for i in range(first, last + 1)}):
                return cka(whole, output(denoiser, samples))

        found += _walk(stack, indices, alike)
    return found


class _standing_in:
    """Other modules in the place of some blocks of a list, for the length of the block."""

    def __init__(self, denoiser: Denoiser, stack: str, others: dict[int, nn.Module]) -> None:
        self.blocks, self.others = denoiser.network.model.get_submodule(stack), others

    def __enter__(self) -> None:
        self.kept = {i: self.blocks[i] for i in self.others}
        for i, module in self.others.items():
            self.blocks[i] = module

    def __exit__(self, *ended: Any) -> None:
        for i, module in self.kept.items():
            self.blocks[i] = module


def _walk(stack: str, indices: Sequence[int], alike: Any) -> list[Found]:
    """alike(u, k) = cka(u, k). indices: without gaps."""
    found, last = [], max(indices, default=-1)
    u = min(indices, default=0)
    while u < last:
        curve = [alike(u, u), alike(u, u + 1)]
        delta, end = curve[0] - curve[1], u + 1
        for k in range(u + 2, last + 1):
            curve.append(alike(u, k))
            before, delta = delta, curve[-2] - curve[-1]
            if delta > before + ROUNDING:
                break
            end = k
        harm = 1 - alike(u + 1, end)
        found.append(Found(Interval(stack, u, end), tuple(curve), harm))
        u = end + 1
    return found


def choose(found: Sequence[Found], remove: int) -> list[Interval]:
    """Intervals by which `remove` blocks go, those first that do the least harm per block that goes; the last of them is
    cut where it would remove more.
    """
    chosen: list[Interval] = []
    for each in sorted(found, key=lambda each: each.harm / each.interval.removed):
        left = remove - sum(interval.removed for interval in chosen)
        if left <= 0:
            break
        interval = each.interval
        chosen.append(Interval(interval.stack, interval.first, min(interval.last, interval.first + left)))
    return sorted(chosen)
