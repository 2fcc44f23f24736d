"""Rows of named tensors in a directory of safetensors files: written a shard at a time, read without being loaded.

    cache/latents-<key>/store.json 000000.safetensors 000001.safetensors ...

Every shard is written under a temporary name and renamed, and carries the SHA-256 of its tensors, so a computation
that is killed at any point goes on at the first shard that is missing. `store.json` says what the rows depend on and,
once all are there, how many there are: from then on a shard that is missing or damaged is refused. `verified.json` has
the size and time of every shard whose checksum was right, which is computed again only where these have changed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from stepdistill.errors import UserError, atomic_write
from training.files import save_tensors
from training.lock import Lock
from training.notices import warn

# Of the layout below; part of every key.
FORMAT = 1
# What a killed computation loses at most, and what a shard holds: so many bytes, and so many rows.
SHARD_BYTES = 64 << 20
SHARD_ROWS = 1024

Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Share:
    """Which shards a process computes: those whose number is `index` modulo `of`.

    gather: a value of each process, once all have come so far, by the processes' numbers.
    """

    index: int = 0
    of: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    @property
    def first(self) -> bool:
        return self.index == 0

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` returns in each process. What ends it in one ends it in all, and none waits for ever.

        Raises:
            UserError: in the first process, as in the one where `work` raised it; other processes exit.
        """
        failed, value = None, None
        try:
            value = work()
        except (UserError, OSError) as error:
            failed = error
        said = self.gather((str(failed) if failed else "", value))
        if failed:
            raise failed
        if problem := next((problem for problem, _ in said if problem), ""):
            raise UserError(problem) if self.first else SystemExit(2)
        return [value for _, value in said]


ALONE = Share()


class Shards:
    """The rows 0 .. count - 1 of what `facts` describe.

    Args:
        facts: everything that the rows depend on, as plain values; it names the directory.
        count: of rows. A store may hold more of them than one asks for, and be made longer.
        rows: of a shard, if it matters; else as many as `SHARD_BYTES` and `SHARD_ROWS` allow.
    """

    def __init__(
        self, cache_dir: str | Path, what: str, facts: Mapping[str, Any], count: int, rows: int | None = None
    ) -> None:
        self.facts = {"format": FORMAT, **facts}
        text = json.dumps(self.facts, sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()[:20]
        self.what, self.count = what, count
        self.directory = Path(cache_dir) / f"{what}-{key}"
        self._index, self._checked = self.directory / "store.json", self.directory / "verified.json"
        self._rows = rows
        self._open: dict[int, Rows] = {}

    def __len__(self) -> int:
        return self.count

    @property
    def complete(self) -> bool:
        """Whether all rows have been computed once."""
        return self._said().get("complete", 0) >= self.count

    def fill(
        self,
        make: Callable[[range], Rows],
        batch: int = 64,
        *,
        mend: bool = False,
        share: Share = ALONE,
        progress: bool = True,
    ) -> Shards:
        """Compute the rows that are missing; `make` gives those of a range of at most `batch` numbers.

        A complete store is checked: what is missing or damaged there is made again with `mend`, else refused.

        Raises:
            UserError: a shard of a complete store is missing or damaged.
        """
        # Said by one, that a store which is finished meanwhile is not so for some of them alone.
        complete = share.gather(self.complete)[0]
        if complete and not mend:
            self.check(share)
            return self
        lock = Lock(self.directory / ".lock")
        try:
            share.together(lambda: self._begin(make, batch, lock) if share.first else None)
            self._compute(make, batch, share, progress)
        finally:
            lock.release()
        return self

    def _compute(self, make: Callable[[range], Rows], batch: int, share: Share, progress: bool) -> None:
        """This process's part of what is missing or damaged; all of them are done when it returns."""
        own = range(share.index, self._shards, share.of)
        bar = tqdm(own, desc=f"computing {self.what}", unit="shard", disable=not progress, delay=1)

        def compute() -> None:
            for number in bar:
                if self._read(number) is None:
                    self._write(number, make, batch)

        share.together(compute)
        if share.first:
            self._say(complete=max(self.count, self._said().get("complete", 0)))
        share.gather(None)

    def check(self, share: Share = ALONE) -> None:
        """Look at every shard, and read those that have changed since their checksum was right. Raises UserError for the
        first that is missing or damaged.
        """
        known = self._verified()

        def look() -> dict[str, list[int]]:
            sound = {}
            for number in range(share.index, self._shards, share.of):
                name, now = self._path(number).name, self._stamp(number)
                if now is None or (known.get(name) != now and self._read(number) is None):
                    raise self._damaged(number)
                sound[name] = now
            return sound

        sound = {name: stamp for part in share.together(look) for name, stamp in part.items()}
        if share.first and not sound.items() <= known.items():
            with atomic_write(self._checked) as temporary:
                temporary.write_text(json.dumps(known | sound, sort_keys=True, indent=0), encoding="utf-8")

    def rows(self, indices: Sequence[int]) -> Rows:
        """Copies of the rows of these numbers, in their order, on the CPU.

        Raises:
            UserError: a shard is gone.
        """
        out: Rows = {}
        for place, index in enumerate(indices):
            number, at = divmod(index, self._per_shard)
            for name, tensor in self._mapped(number).items():
                if name not in out:
                    out[name] = tensor.new_empty((len(indices), *tensor.shape[1:]))
                out[name][place] = tensor[at]
        return out

    # ---------------------------------------------------------------------------------------------------- the files

    @property
    def _per_shard(self) -> int:
        if self._rows is None:
            self._rows = self._said()["rows"]
        return self._rows

    @property
    def _shards(self) -> int:
        return -(-self.count // self._per_shard)

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:06d}.safetensors"

    def _numbers(self, number: int) -> range:
        """The rows of a shard."""
        first = number * self._per_shard
        return range(first, min(first + self._per_shard, self.count))

    def _stamp(self, number: int) -> list[int] | None:
        """Size and time of a shard's file, None without one."""
        try:
            found = self._path(number).stat()
        except OSError:
            return None
        return [found.st_size, found.st_mtime_ns]

    def _verified(self) -> dict[str, Any]:
        try:
            known = json.loads(self._checked.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _said(self) -> dict[str, Any]:
        try:
            said = json.loads(self._index.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        good = isinstance(said, dict) and all(isinstance(said.get(key), int) for key in ("rows", "complete"))
        return said if good else {}

    def _say(self, complete: int) -> None:
        content = {"rows": self._per_shard, "complete": complete, "facts": self.facts}
        with atomic_write(self._index) as temporary:
            temporary.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")

    def _begin(self, make: Callable[[range], Rows], batch: int, lock: Lock) -> None:
        """Have the directory alone; say how many rows a shard has, which the first of them tell, and clear up after a
        computation that was killed.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        lock.wait(lambda: warn("W10", f"another process computes {self.directory}; waiting for it."))
        for left_over in self.directory.glob(".*"):
            shutil.rmtree(left_over, ignore_errors=True)
        if self._said():
            return
        if self._rows is None:
            first = make(range(min(batch, self.count)))
            bytes_each = sum(t[0].numel() * t.element_size() for t in first.values())
            self._rows = max(1, min(SHARD_ROWS, SHARD_BYTES // max(bytes_each, 1)))
        self._say(complete=0)

    def _write(self, number: int, make: Callable[[range], Rows], batch: int) -> None:
        numbers = self._numbers(number)
        pieces = [make(numbers[at : at + batch]) for at in range(0, len(numbers), batch)]
        whole = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        with atomic_write(self._path(number)) as temporary:
            save_tensors(temporary, whole, {"sha256": _digest(whole)})
        self._open.pop(number, None)

    def _read(self, number: int) -> Rows | None:
        """A shard, if it is there and sound; its tensors are mapped from the file."""
        try:
            with safe_open(str(self._path(number)), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
                said = (file.metadata() or {}).get("sha256")
        except (SafetensorError, OSError):
            return None
        enough = all(len(tensor) >= len(self._numbers(number)) for tensor in tensors.values())
        return tensors if tensors and enough and said == _digest(tensors) else None

    def _mapped(self, number: int) -> Rows:
        if number not in self._open:
            try:
                with safe_open(str(self._path(number)), framework="pt") as file:
                    self._open[number] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError):
                raise self._damaged(number) from None
        return self._open[number]

    def _damaged(self, number: int) -> UserError:
        path = self._path(number)
        return UserError(
            f"the shard {path} is {'damaged' if path.exists() else 'missing'}; run `python -m training.precompute`"
            f" with the same recipe to make it again."
        )


def _digest(tensors: Rows) -> str:
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        hashed.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()
