"""Work that is the same in every epoch, done once: the latents of a data source."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from stepdistill.errors import UserError, atomic_write
from training.data import Source


def latents(
    source: Source,
    encode: Callable[[Tensor], Tensor],
    cache_dir: str | Path,
    key: str,
    batch: int = 64,
    progress: bool = True,
) -> Tensor:
    """`encode` of every image of `source`: (size, ...) on the CPU, float16 or float32 as `encode` returns it.

    Computed once and kept in `cache_dir`; `key` must name what `encode` depends on: model, weights, dtype.
    `encode` gets uint8 (n, 3, H, W), n = `batch` or less at the end.

    Raises:
        UserError: a latent is not finite, which half precision is known for in some VAEs.
    """
    name = hashlib.sha256(f"{source.fingerprint()}\n{key}".encode()).hexdigest()[:20]
    path = Path(cache_dir) / f"latents-{name}.safetensors"
    cached = _read(path, source.size)
    if cached is not None:
        return cached
    out = None
    firsts = range(0, source.size, batch)
    with torch.no_grad():
        for first in tqdm(firsts, desc="encoding images", unit="batch", disable=not progress):
            indices = range(first, min(first + batch, source.size))
            pixels = torch.from_numpy(source.images(indices)).permute(0, 3, 1, 2).contiguous()
            part = encode(pixels).detach().cpu()
            part = part if part.dtype == torch.float16 else part.float()
            if not part.isfinite().all():
                where = f"of examples {first} to {indices[-1]}"
                raise UserError(f"the latents {where} are not finite; run the encoder in float32.")
            if out is None:
                out = torch.empty((source.size, *part.shape[1:]), dtype=part.dtype)
            out[first : first + len(part)] = part
    assert out is not None  # a source has at least one example
    with atomic_write(path) as temporary:
        save_file({"latents": out}, str(temporary), metadata={"key": key})
    return out


def _read(path: Path, size: int) -> Tensor | None:
    """The cached latents, or None if there are none or the file is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            found = file.get_tensor("latents")
    except (SafetensorError, OSError):
        return None
    return found if len(found) == size else None
