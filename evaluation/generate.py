"""Drawing a protocol's samples, kept on disk so that a killed run goes on where it was.

Samples lie in shards by index. With several processes each draws whole shards in turn; no image travels.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evaluation.images import Images, MemoryImages, as_images, joined, rechunked
from evaluation.processes import Processes
from evaluation.weights import pipeline_name
from stepdistill.errors import UserError, atomic_write
from stepdistill.provenance import pipeline_sha256

if TYPE_CHECKING:
    from evaluation.protocol import Protocol
    from stepdistill.drawing import Drawer

# Images per file: what a killed run loses at most, for each process.
SHARD = 128
# Bytes of samples that are kept without a file.
IN_MEMORY = 1 << 28
SamplerFn = Callable[[Sequence[str] | Sequence[int], Sequence[int]], Tensor]
# Called with the number of images that became ready.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Configuration:
    """Everything the pixels of a sample depend on, beside its index."""

    # Its name, for people.
    pipeline: str
    pipeline_sha256: str
    # Its hash, which grey levels are rounded by, too.
    protocol: str
    steps: int
    guidance: float
    chunk: int
    device: str

    @classmethod
    def of(cls, drawer: Drawer, protocol: Protocol, sha256: str = "") -> Configuration:
        """Of a drawer under a protocol; sha256: of its pipeline, where it is known already."""
        path = Path(drawer.sampler.path)
        return cls(
            pipeline_name(path).replace("/", "-"), sha256 or pipeline_sha256(path), protocol.hash, drawer.steps,
            drawer.guidance, drawer.chunk, str(drawer.sampler.device).partition(":")[0],
        )  # fmt: skip

    @property
    def key(self) -> str:
        """Name of the folder these samples are kept in."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.pipeline}-{self.steps}-steps-g{self.guidance:g}-{digest}"


class Shards(Images):
    """The first `count` samples in a folder of shards."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.count, SHARD):
            yield _read(_shard(self.folder, start))[: self.count - start]

    def first(self, count: int) -> Images:
        return Shards(self.folder, min(count, self.count))


def generate(
    sample: SamplerFn, configuration: Configuration, prompts: Sequence[str] | Sequence[int], seeds: Sequence[int],
    folder: Path, *, force: bool = False, progress: Progress = lambda count: None, processes: Processes | None = None,
    io_batch: int | None = None,
) -> Shards:  # fmt: skip
    """Draw one image per prompt and seed into `folder`/<key>/, skipping what is there already.

    A shard that was cut short, or holds fewer images than are wanted now, is completed. `force` draws all again.
    `processes` share the work, all waiting for the last; `progress` hears of this one's images. The sampler is asked
    for `io_batch` samples at a time, by default as many as its networks take at once. Raises UserError if the sampler
    returned something else than one uint8 image per prompt, or the processes don't see one file system.
    """
    processes = processes or Processes()
    folder, at_once = folder / configuration.key, io_batch or configuration.chunk
    if processes.first:
        if force:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "configuration.json") as temporary:
            temporary.write_text(json.dumps(asdict(configuration), indent=2) + "\n")
    processes.wait()
    starts = range(0, len(prompts), SHARD)
    for index, start in enumerate(starts):
        if not processes.mine(index):
            continue
        stop = min(start + SHARD, len(prompts))
        path = _shard(folder, start)
        parts = _present(path)
        have = sum(map(len, parts))
        progress(min(have, stop - start))
        for at in range(start + have, stop, at_once):
            until = min(at + at_once, stop)
            parts.append(drawn(sample, prompts[at:until], seeds[at:until]))
            progress(until - at)
        if start + have < stop:
            images = joined(parts)
            with atomic_write(path) as temporary:
                save_file({"images": images}, temporary)
    processes.wait()
    if not all(_shard(folder, start).is_file() for start in starts):
        raise UserError(
            f"{folder} lacks samples another process drew; --out must be on a disk all of them see."
        )
    return Shards(folder, len(prompts))


def kept(batches: Iterable[Tensor], folder: Path) -> Images:
    """Batches uint8 (n, 3, H, W) as a set: in memory while they are few, in files of `folder` once not."""
    batches = iter(batches)
    waiting: list[Tensor] = []
    size = 0
    for batch in batches:
        waiting.append(batch)
        size += batch.nbytes
        if size > IN_MEMORY:
            break
    else:
        return MemoryImages(waiting)

    def everything() -> Iterator[Tensor]:
        while waiting:
            yield waiting.pop(0)
        yield from batches

    count = 0
    for shard in rechunked(everything(), SHARD):
        save_file({"images": shard.contiguous()}, _shard(folder, count))
        count += len(shard)
    return Shards(folder, count)


def drawn(sample: SamplerFn, prompts: Sequence[str] | Sequence[int], seeds: Sequence[int]) -> Tensor:
    """One image per prompt, uint8 (N, 3, H, W). Raises UserError when the sampler returns anything else."""
    images = as_images(sample(prompts, seeds)).cpu().contiguous()
    if len(images) != len(prompts):
        raise UserError(
            f"the sampler returned {len(images)} images for {len(prompts)} prompts; it must return one each."
        )
    return images


def _shard(folder: Path, start: int) -> Path:
    return folder / f"{start:07d}.safetensors"


def _read(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return as_images(file.get_tensor("images"))


def _present(path: Path) -> list[Tensor]:
    """The images in a shard, in a list; empty when it is missing or damaged (it is then drawn again)."""
    if not path.is_file():
        return []
    try:
        return [_read(path)]
    except (SafetensorError, OSError, UserError):
        return []
