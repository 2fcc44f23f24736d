"""Work that is the same in every epoch, done once: latents of a data source, trajectories of a teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from stepdistill.denoiser import Cond, guided, map_cond
from stepdistill.errors import UserError, atomic_write
from stepdistill.families.base import Family
from stepdistill.methods.base import Pairs, PairSettings
from stepdistill.noise import SampleNoise
from stepdistill.schedule import times_like
from training.data import Source

# Trajectories per file: what an interruption can cost.
PART = 1024


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
    # A source has at least one example.
    assert out is not None
    with atomic_write(path) as temporary:
        save_file({"latents": out}, str(temporary), metadata={"key": key})
    return out


class Trajectories:
    """All pairs of a run; `rows` is what a batch carries.

    Args:
        tensors: on the CPU, z and x0 (count, *shape), and states (count, K, *shape) at the K times asked for.

    The condition of number i is that of example i modulo the source's size.
    """

    def __init__(self, family: Family, source: Source, tensors: dict[str, Tensor]):
        self.family, self.source, self.tensors = family, source, tensors
        self.size = len(tensors["z"])

    def rows(self, indices: Sequence[int], device: torch.device | str = "cpu") -> Pairs:
        """The trajectories of these numbers, with their conditions."""
        rows = {name: tensor[list(indices)].to(device) for name, tensor in self.tensors.items()}
        return Pairs(cond=_cond(self.family, self.source, indices, device), **rows)


def _cond(family: Family, source: Source, indices: Sequence[int], device: torch.device | str) -> Cond:
    told = family.prompts(source, [i % source.size for i in indices])
    return map_cond(lambda c: c.to(device), family.encode(told))


def trajectories(
    family: Family,
    source: Source,
    settings: PairSettings,
    cache_dir: str | Path,
    device: torch.device | str = "cpu",
    batch: int = 64,
    progress: bool = True,
) -> Trajectories:
    """The guided teacher's DDIM trajectories from unit noise, for the conditions of `source` in turn.

    They lie in `cache_dir`/pairs-KEY, `PART` to a file; an interrupted computation goes on at the first file
    that is missing or damaged. Number i depends on i, the teacher, `settings` and the source, not on `batch`
    (beyond the last bits) or on how many there are.

    Raises:
        UserError: one of them is not finite.
    """
    directory = Path(cache_dir) / f"pairs-{_pairs_key(family, source, settings)}"
    directory.mkdir(parents=True, exist_ok=True)
    parts = []
    firsts = range(0, settings.count, PART)
    for first in tqdm(firsts, desc="sampling the teacher", unit="file", disable=not progress):
        path = directory / f"{first // PART:06d}.safetensors"
        part = _read_part(path, PART)
        if part is None:
            pieces = [
                _trajectory(family, source, settings, range(i, min(i + batch, first + PART)), device)
                for i in range(first, first + PART, batch)
            ]
            part = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
            with atomic_write(path) as temporary:
                save_file(part, str(temporary))
        parts.append(part)
    whole = {name: torch.cat([part[name] for part in parts])[: settings.count] for name in parts[0]}
    return Trajectories(family, source, whole)


@torch.no_grad()
def _trajectory(
    family: Family, source: Source, settings: PairSettings, indices: range, device: torch.device | str
) -> dict[str, Tensor]:
    schedule, cond = family.schedule, _cond(family, source, indices, device)
    uncond = map_cond(lambda c: c.to(device), family.uncond(len(indices)))
    z = SampleNoise(indices, phase="pairs", device=device).randn(*family.shape)
    grid = schedule.teacher_grid(settings.steps)
    times = sorted({*grid, *settings.times}, reverse=True)
    x_t, states = schedule.first_state(z, times[0]), {}
    for number, t in enumerate(times):
        states[t] = x_t
        now = times_like(t, x_t)
        said = guided(family.teacher, x_t, now, cond, uncond, settings.guidance_scale)
        x_t = said.at(times_like(times[number + 1], x_t)) if number + 1 < len(times) else said.x0
    kept = [states[t] for t in settings.times]
    stacked = torch.stack(kept, 1) if kept else z.new_empty(len(z), 0, *family.shape)
    if not x_t.isfinite().all():
        raise UserError(
            f"the teacher's trajectories {indices[0]} to {indices[-1]} are not finite;"
            " raise method.pair_steps or lower method.guidance_scale."
        )
    return {"z": z.cpu(), "x0": x_t.float().cpu(), "states": stacked.float().cpu().contiguous()}


def _pairs_key(family: Family, source: Source, settings: PairSettings) -> str:
    """Names what a trajectory depends on; the number of them is not part of it."""
    digest = hashlib.sha256(f"{family.name} {family.config} {source.fingerprint()} ".encode())
    digest.update(repr((settings.steps, settings.guidance_scale, settings.times)).encode())
    for name, value in sorted(family.teacher.state_dict().items()):
        digest.update(name.encode() + value.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:20]


def _read_part(path: Path, size: int) -> dict[str, Tensor] | None:
    """A file of trajectories, or None if there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            part = {name: file.get_tensor(name) for name in ("z", "x0", "states")}
    except (SafetensorError, OSError):
        return None
    return part if all(len(tensor) == size for tensor in part.values()) else None


def _read(path: Path, size: int) -> Tensor | None:
    """The cached latents, or None if there are none or the file is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            cached = file.get_tensor("latents")
    except (SafetensorError, OSError):
        return None
    return cached if len(cached) == size else None
