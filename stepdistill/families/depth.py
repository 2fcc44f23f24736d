"""A UNet that sees two times: its first half and middle where a jump begins, its second half where it ends.

A denoiser's second half makes the answer, and its time says of which noise level. Told the end of the jump there, a trained
network is a flow map without a new weight (decoupled MeanFlow, arXiv 2510.24474); a jump of no length is the network itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from stepdistill.jvp import in_full


@contextlib.contextmanager
def second_half_at(unet: nn.Module, t: Tensor, end: Tensor, **told: Any) -> Iterator[None]:
    """Inside, up blocks of a diffusers UNet called at t (B,) are told `end` (B,) instead, both in the units of its time.

    told: what its time embedding is called with besides. What classes and sizes add to the embedding stays.
    """
    dtype = next(unet.parameters()).dtype
    with in_full(t):
        begun, ended = (unet.time_embedding(unet.time_proj(time).to(dtype), **told) for time in (t, end))
    moved = ended - begun

    def instead(_block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if "temb" in kwargs:
            return args, kwargs | {"temb": kwargs["temb"] + moved}
        hidden, passed, embedded, *rest = args
        return (hidden, passed, embedded + moved, *rest), kwargs

    with contextlib.ExitStack() as hooks:
        for block in unet.up_blocks:
            hook = block.register_forward_pre_hook(instead, with_kwargs=True)
            hooks.callback(hook.remove)
        yield
