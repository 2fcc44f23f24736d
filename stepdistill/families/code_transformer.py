"""The network of an autoregressive image model: a causal transformer over code numbers behind a caption.

As a teacher it is told the codes before a place and says how likely each code is there. As a student it is also told the
noise of every place, its own included, and says all codes at once (Distilled Decoding, arXiv 2412.17153, Sec. 4): output
i hears x_1 .. x_i. The published student has one more row of input for that, one place later than its teacher's; here
the noise of a place is added where the teacher already speaks of it, so the teacher's weights keep their places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class CodeShape:
    """Sizes: codes in the book, their dimensions, places of an image, and of the transformer and its caption.

    student: it hears noise.
    """

    codes: int
    dims: int
    length: int
    width: int = 128
    layers: int = 4
    heads: int = 4
    text_length: int = 16
    text_width: int = 128
    student: bool = False


class Cache:
    """Keys and values of the rows a network was told, room for all of them from the first: (layers, 2, B, heads, rows,
    width / heads). `seen`: how many rows.
    """

    def __init__(self, shape: CodeShape, count: int, like: Tensor):
        rows = shape.text_length + shape.length
        self.held = like.new_empty(shape.layers, 2, count, shape.heads, rows, shape.width // shape.heads)
        self.seen = 0

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, with those of new rows behind."""
        end = self.seen + k.shape[2]
        self.held[layer, 0, :, :, self.seen : end] = k
        self.held[layer, 1, :, :, self.seen : end] = v
        return self.held[layer, 0, :, :, :end], self.held[layer, 1, :, :, :end]


class Block(nn.Module):
    """Causal attention and a perceptron, both behind a norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.joint, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        """h: (B, N, width), of rows behind those that the cache has seen."""
        count, size, _ = h.shape
        split = self.joint(self.before(h)).view(count, size, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = split.unbind(0)
        if cache is not None:
            k, v = cache.put(layer, k, v)
        seen, mask = k.shape[2], None
        if 1 < size < seen:
            mask = torch.ones(size, seen, dtype=torch.bool, device=h.device).tril(seen - size)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=size == seen and size > 1)
        h = h + self.leave(mixed.transpose(1, 2).flatten(2))
        return h + self.perceptron(self.between(h))


class CodeTransformer(nn.Module):
    """See the module's docstring.

    The row that speaks of place 1 is the caption's last; that of place i + 1 hears code i. `book` (codes, dims) are the
    vectors of the codes, of mean 0 and variance 1.
    """

    # What it does hangs on how many places are known.
    traceable = False

    def __init__(self, shape: CodeShape):
        super().__init__()
        self.shape, width = shape, shape.width
        self.register_buffer("book", torch.zeros(shape.codes, shape.dims))
        self.text = nn.Linear(shape.text_width, width)
        self.text_place = nn.Parameter(0.02 * torch.randn(shape.text_length, width))
        self.code = nn.Embedding(shape.codes, width)
        self.place = nn.Parameter(0.02 * torch.randn(shape.length, width))
        nn.init.normal_(self.code.weight, std=0.02)
        self.blocks_ = nn.ModuleList(Block(width, shape.heads) for _ in range(shape.layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, shape.codes)
        if shape.student:
            self._add_noise()

    def _add_noise(self) -> None:
        """What hears noise and says vectors; whether a place holds noise or data is a row of two."""
        width, dims = self.shape.width, self.shape.dims
        self.noise = nn.Sequential(nn.Linear(dims, width), nn.GELU(), nn.Linear(width, width))
        self.kind = nn.Parameter(torch.zeros(2, width))
        self.gain, self.vector = nn.Linear(width, 1), nn.Linear(width, dims)
        for layer in (self.noise[2], self.gain, self.vector):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @staticmethod
    def guide(unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
        """Guidance of logits (B, codes); scale may be (B, ...) with ones behind."""
        scale = scale.reshape(-1, 1) if isinstance(scale, Tensor) else scale
        return unconditional + scale * (conditional - unconditional)

    def heading(self, text: Tensor) -> Tensor:
        """The caption's rows (B, text_length, width)."""
        return self.text(text) + self.text_place

    def run(self, rows: Tensor, cache: Cache | None = None) -> Tensor:
        """The last states of these rows, normalised; a cache then has seen them."""
        count = rows.shape[1]
        for number, block in enumerate(self.blocks_):
            rows = block(rows, cache, number)
        if cache is not None:
            cache.seen += count
        return self.norm(rows)

    def rows(self, codes: Tensor, first: int = 0) -> Tensor:
        """The rows (B, N, width) of codes (B, N) at the places from `first` on."""
        return self.code(codes) + self.place[first : first + codes.shape[1]]

    def logits(self, codes: Tensor, text: Tensor) -> Tensor:
        """As a teacher: log p(code at i | codes before i) up to a constant, (B, length, codes).

        codes: (B, length) or (B, length - 1), int64; text: (B, text_length, text_width).
        """
        codes = codes[:, : self.shape.length - 1]
        states = self.run(torch.cat((self.heading(text), self.rows(codes)), 1))
        return self.head(states[:, self.shape.text_length - 1 :])

    def nearest(self, x: Tensor) -> Tensor:
        """The code (B, N) whose vector is nearest each of x (B, N, dims)."""
        return torch.cdist(x.to(self.book.dtype), self.book).argmin(-1)

    def forward(self, x: Tensor, kept: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """As a student: logits (B, length, codes) and vectors (B, length, dims) of every place.

        x: (B, length, dims), code vectors in the first `kept` (B,) places and noise behind.
        """
        length = self.shape.length
        data = torch.arange(length, device=x.device) < kept.to(x.device)[:, None]
        # What a place holds is heard by those behind it: as the teacher hears codes, or as noise.
        held = torch.where(data[..., None], self.code(self.nearest(x)), 0.0)
        own = torch.where(data[..., None], self.kind[1], self.noise(x) + self.kind[0])
        behind = held[:, :-1] + self.place[: length - 1]
        heading = self.heading(text)
        rows = torch.cat((heading, behind), 1)
        rows = torch.cat((rows[:, :-length], rows[:, -length:] + own), 1)
        states = self.run(rows)[:, -length:]
        # Cells of a map from noise onto points are cut by planes across the points' directions, as those of optimal transport
        # are; where they lie hangs on the probabilities, which the states know.
        toward = (1 + self.gain(states)) * (x.to(states.dtype) @ self.book.T)
        return self.head(states) + toward, self.vector(states)
