"""What frozen encoders make of a data source, computed once: latents of its images, conditions of its prompts.

Both lie as shards below a cache directory, named by everything they depend on. Rows are computed in batches of the
size that training would encode: on some devices a row's last bits depend on it.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stepdistill.denoiser import Cond, map_cond
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from training.data import Source
from training.data.buckets import Bucket
from training.shards import ALONE, Rows, Shards, Share

# How a condition that is no dict is called in a shard; the entries of one that is have it in front.
COND = "cond"
MOST_PIXELS = 64 * 512**2


class Latents:
    """x0 of every image of a source; float16 where the encoder gives that, else float32.

    Args:
        encode: uint8 (n, 3, H, W), of videos (n, F, 3, H, W), -> x0 (n, *shape).
        key: names what `encode` depends on: model, weights, scaling, dtype.
    """

    def __init__(
        self, source: Source, encode: Callable[[Tensor], Tensor], cache_dir: str | Path, key: str
    ) -> None:
        self.source, self.encode = source, encode
        facts = {"images": source.fingerprint(), "encoder": key}
        self.stores: list[tuple[Shards, Bucket]] = []
        for bucket in source.buckets:
            own = facts | ({"size": list(bucket.size)} if source.bucketed else {})
            self.stores.append((Shards(cache_dir, "latents", own, len(bucket.members)), bucket))

    def fill(
        self, batch: int = 0, *, mend: bool = False, share: Share = ALONE, progress: bool = True
    ) -> Latents:
        """As `Shards.fill`; batch: 0 = as many examples as have the pixels of 64 images of 512 x 512, at most 64.

        Raises:
            UserError: a latent is not finite, which half precision is known for in some VAEs.
        """
        for shards, bucket in self.stores:
            make = functools.partial(self._make, bucket)
            most = MOST_PIXELS // (self.source.frames * math.prod(bucket.size))
            size = batch or max(1, min(64, most))
            shards.fill(make, size, mend=mend, share=share, progress=progress)
        return self

    @torch.no_grad()
    def _make(self, bucket: Bucket, rows: range) -> Rows:
        indices = [int(bucket.members[row]) for row in rows]
        pixels = torch.from_numpy(self.source.images(indices)).movedim(-1, -3).contiguous()
        x0 = self.encode(pixels).detach().cpu()
        if bad := [indices[i] for i, each in enumerate(x0) if not each.isfinite().all()]:
            raise UserError(
                f"the latents of {len(bad)} examples, {bad[:8]} of the data, are not finite; set family.dtype=float32,"
                " or take these images out."
            )
        return {"x0": x0 if x0.dtype == torch.float16 else x0.float()}

    def of(self, indices: Sequence[int]) -> Tensor:
        """x0 of these examples of one bucket (n, *shape) on the CPU, in float32."""
        for shards, bucket in self.stores:
            if (rows := bucket.rows(indices)) is not None:
                return shards.rows(rows)["x0"].float()
        raise ValueError(f"the examples {list(indices)[:8]} are of several buckets")


class Conditions:
    """The conditions of prompts, and the empty one.

    Args:
        family: one with text encoders, `Family.text_key`.
        groups: of prompts, each of which has shards of its own: those of a data source, those of a metric.
    """

    def __init__(self, family: Family, groups: Iterable[Iterable[str]], cache_dir: str | Path) -> None:
        self.family = family
        # Everywhere the same; kept beside the shards.
        self._empty = map_cond(lambda c: c.cpu(), family.uncond(1))
        self._place: dict[str, tuple[Shards, int]] = {}
        self.shards: dict[Shards, list[str]] = {}
        for group in groups:
            prompts = [prompt for prompt in dict.fromkeys(group) if prompt not in self._place]
            if not prompts:
                continue
            listed = hashlib.sha256("\0".join(prompts).encode()).hexdigest()
            facts = {"prompts": listed, "encoder": family.text_key()}
            shards = Shards(cache_dir, "conditions", facts, len(prompts))
            self.shards[shards] = prompts
            self._place |= {prompt: (shards, number) for number, prompt in enumerate(prompts)}

    @property
    def complete(self) -> bool:
        """Whether all of them have been computed once."""
        return all(shards.complete for shards in self.shards)

    def fill(
        self, batch: int = 64, *, mend: bool = False, share: Share = ALONE, progress: bool = True
    ) -> Conditions:
        """As `Shards.fill`. Raises UserError for a condition that is not finite."""
        for shards, prompts in self.shards.items():
            make = functools.partial(self._make, prompts)
            shards.fill(make, batch, mend=mend, share=share, progress=progress)
        return self

    @torch.no_grad()
    def _make(self, prompts: Sequence[str], numbers: range) -> Rows:
        cond = self.family.encode([prompts[i] for i in numbers])
        rows = {f"{COND}.{name}": c for name, c in cond.items()} if isinstance(cond, dict) else {COND: cond}
        for i, number in enumerate(numbers):
            if not all(c[i].isfinite().all() for c in rows.values()):
                raise UserError(
                    f"the text encoders' output for {prompts[number]!r} is not finite; set family.dtype=float32."
                )
        return {name: c.detach().cpu().contiguous() for name, c in rows.items()}

    def answer(self) -> None:
        """From now on `family.encode` and `family.uncond` read from the shards, and the text encoders leave memory
        until somebody asks for a prompt that is none of these; they come back to the CPU.
        """
        family = self.family
        family.encode, family.encode_negative, family.uncond = self.encode, self.encode_negative, self.uncond
        family.drop_text()

    def encode(self, prompts: Sequence[str]) -> Cond:
        """In place of `Family.encode`."""
        if any(prompt not in self._place for prompt in prompts):
            self.family.load_text()
            return type(self.family).encode(self.family, prompts)
        wanted: dict[Shards, list[int]] = {}
        for position, prompt in enumerate(prompts):
            wanted.setdefault(self._place[prompt][0], []).append(position)
        rows: Rows = {}
        for shards, positions in wanted.items():
            part = shards.rows([self._place[prompts[position]][1] for position in positions])
            for name, tensor in part.items():
                if name not in rows:
                    rows[name] = tensor.new_empty((len(prompts), *tensor.shape[1:]))
                rows[name][positions] = tensor
        return rows[COND] if COND in rows else {name.partition(".")[2]: c for name, c in rows.items()}

    def encode_negative(self, prompts: Sequence[str]) -> Cond:
        """In place of `Family.encode_negative`."""
        self.family.load_text()
        return type(self.family).encode_negative(self.family, prompts)

    def uncond(self, count: int) -> Cond:
        """In place of `Family.uncond`."""
        return map_cond(lambda c: c.expand(count, *c.shape[1:]), self._empty)


def forget(family: Family) -> None:
    """Undo `Conditions.answer`: the family encodes by itself, with its encoders in memory."""
    for name in ("encode", "encode_negative", "uncond"):
        vars(family).pop(name, None)
    family.load_text()
