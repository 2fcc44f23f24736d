"""Where training examples come from: one small contract and five sources.

A source is opened once, drops what cannot be used and says how much of it and why; from then on it has `size`
examples that never change. Which of them make up batch number k is a pure function of (seed, k), see `order`.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import io
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from stepdistill import routing, scenes
from stepdistill.errors import UserError, nearest

if TYPE_CHECKING:
    from PIL import Image

DATA: dict[str, str] = {
    "scenes": "training.data:Scenes",
    "folder": "training.data:Folder",
    "parquet": "training.data:Parquet",
    "prompts": "training.data:Prompts",
    "toy": "training.data:Toy",
}

EVALUATION_SEED = 1_000_003  # of the scenes the evaluation draws; training must never see them
MAX_PIXELS = 89_478_485  # Pillow's own limit (a quarter GiB of RGB): beyond it, it takes a file for a bomb
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
_CHUNK = 256  # images decoded, encoded bytes held, at a time


class Source:
    """Examples by index, 0 .. size - 1.

    Attributes:
        size: examples kept.
        resolution: side of the square images, 0 without images.
        has_images: whether `images` works; a source of prompts has none.
        captions: one text per example, or None.
        labels: one class number per example, or None; `class_names[label]` is its name.
        counts: "kept", and for every reason to drop an example, how many it was.
        routing: by which rule conditions belong to this part of a partition, or None; goes into the card.
    """

    has_images: bool = True

    def __init__(self, config: Any) -> None:
        self.config = config
        self.size = 0
        self.resolution: int = getattr(config, "resolution", 0)
        self.captions: Sequence[str] | None = None
        self.labels: Sequence[int] | None = None
        self.class_names: tuple[str, ...] | None = None
        self.counts: dict[str, int] = {}
        self.routing: dict[str, Any] | None = None

    def images(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 (n, resolution, resolution, 3), RGB."""
        raise UserError(
            f"the data source {type(self).__name__.lower()} has no images; this method or family needs them."
        )

    def fingerprint(self) -> str:
        """Changes with the content and with what is done to it, not with where it lies; names caches."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line: what there is and what was dropped."""
        parts = [f"{self.size:,} {'images' if self.has_images else 'examples'}"]
        if self.has_images:
            parts[0] += f" at {self.resolution}x{self.resolution}"
        parts += ["captions"] if self.captions is not None else []
        parts += [f"{len(self.class_names)} classes"] if self.class_names else []
        dropped = ", ".join(f"{n:,} {why}" for why, n in self.counts.items() if why != "kept" and n)
        where = getattr(self.config, "path", "")
        name = f"{type(self).__name__.lower()} {where}".strip()
        return f"{name}: {', '.join(parts)}" + (f"; left out: {dropped}" if dropped else "")


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)


def order(seed: int, size: int, batch_index: int, batch_size: int) -> list[int]:
    """Dataset indices of global batch number `batch_index` (0-based).

    The batches cut up one endless sequence, a permutation of 0 .. size - 1 per epoch, each from (seed, epoch)
    alone. Nothing is remembered between calls and no process count enters, so a resumed run sees what an
    uninterrupted one sees.
    """
    if size < 1 or batch_size < 1:
        raise ValueError(f"size and batch_size must be at least 1, got {size} and {batch_size}.")
    start, stop = batch_index * batch_size, (batch_index + 1) * batch_size
    indices: list[int] = []
    while start < stop:
        epoch, at = divmod(start, size)
        taken = _permutation(seed, epoch, size)[at : at + stop - start]
        indices += taken.tolist()
        start += len(taken)
    return indices


# -------------------------------------------------------------------------------------- sources without files


@dataclass(frozen=True)
class Partition:
    """What every source's Config begins with: which part of the examples to take."""

    # "k/K": part k (from 1) of K: a block of the classes, a cluster of the captions (stepdistill/routing.py) or,
    # where there are neither, a block of the examples; "" = all
    partition: str = ""

    def __post_init__(self) -> None:
        self.parts()

    def parts(self) -> tuple[int, int]:
        k, slash, of = self.partition.partition("/")
        if not self.partition:
            return 1, 1
        if not (slash and k.strip().isdecimal() and of.strip().isdecimal() and 1 <= int(k) <= int(of)):
            raise ValueError(f"partition must look like 1/2 (first of two), got {self.partition!r}.")
        return int(k), int(of)

    def block(self, count: int) -> range:
        """The contiguous share of `count` things that is ours."""
        k, of = self.parts()
        if count < of:
            raise UserError(
                f"data.partition={self.partition} asks for {of} parts, but there are only {count}."
            )
        return range((k - 1) * count // of, k * count // of)

    def of_captions(self, captions: Sequence[str]) -> tuple[list[int], dict[str, Any] | None]:
        """The numbers of the captions in our cluster, and the rule by which prompts are routed to it."""
        k, of = self.parts()
        if of == 1:
            return list(range(len(captions))), None
        centroids = routing.cluster(captions, of)
        ours = np.flatnonzero(routing.nearest(captions, centroids) == k - 1).tolist()
        return ours, {"by": "prompt", "of": of, "part": k, "centroids": centroids.tolist()}

    def of_classes(self, count: int) -> tuple[range, dict[str, Any] | None]:
        """Our block of the classes, and the rule by which classes are routed to it."""
        k, of = self.parts()
        blocks = [[i * count // of, (i + 1) * count // of] for i in range(of)]
        rule = {"by": "class", "of": of, "part": k, "blocks": blocks} if of > 1 else None
        return self.block(count), rule


class Scenes(Source):
    """Procedural captioned scenes, drawn when they are asked for."""

    @dataclass(frozen=True)
    class Config(Partition):
        size: int = 20_000
        seed: int = 0
        resolution: int = 64

        def __post_init__(self) -> None:
            super().__post_init__()
            _at_least(1, size=self.size)
            _at_least(8, resolution=self.resolution)
            if self.seed == EVALUATION_SEED or self.seed < 0:
                raise ValueError(
                    f"seed must be 0 or more and not the evaluation's {EVALUATION_SEED}, got {self.seed}."
                )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._block: Sequence[int] = range(config.size)
        if config.parts()[1] > 1:
            everything = _SceneCaptions(self._block, config.seed)[:]
            self._block, self.routing = config.of_captions(everything)
        self.size = len(self._block)
        self.captions = _SceneCaptions(self._block, config.seed)
        self.counts = _counts(self.size, {"in other partitions": config.size - self.size})

    def images(self, indices: Sequence[int]) -> np.ndarray:
        out = np.empty((len(indices), self.resolution, self.resolution, 3), np.uint8)
        for row, index in enumerate(indices):
            rng = np.random.default_rng(
                (self.config.seed, self._block[index])
            )  # as scenes.image_at, at any size
            out[row] = scenes.render(scenes.sample_scene(rng), rng, self.resolution)
        return out

    def fingerprint(self) -> str:
        # The drawing itself is code and may change, so a few pictures speak for all.
        samples = self.images(range(min(8, self.size)))
        return _digest([_facts(self.config), samples.tobytes(), "\n".join(self.captions[:8])])


class _SceneCaptions(Sequence):
    """Captions of a block of scenes, made when they are read."""

    def __init__(self, block: Sequence[int], seed: int) -> None:
        self._block, self._seed = block, seed

    def __len__(self) -> int:
        return len(self._block)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [scenes.scene_at(i, self._seed).caption for i in self._block[index]]
        return scenes.scene_at(self._block[index], self._seed).caption


class Toy(Source):
    """The toy family's own sampler stands in for data: indices only."""

    has_images = False

    @dataclass(frozen=True)
    class Config(Partition):
        size: int = 100_000

        def __post_init__(self) -> None:
            super().__post_init__()
            _at_least(1, size=self.size)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.size = len(config.block(config.size))
        self.counts = _counts(self.size, {"in other partitions": config.size - self.size})

    def fingerprint(self) -> str:
        return _digest([_facts(self.config)])


class Prompts(Source):
    """Prompts alone, without images: a .txt file, one per line, or .jsonl with "text" or "prompt"."""

    has_images = False

    @dataclass(frozen=True, kw_only=True)
    class Config(Partition):
        path: Path

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        path = _existing(config.path, directory=False)
        if path.suffix not in (".txt", ".jsonl"):
            raise UserError(f"data.path={path} must be a .txt file, one prompt per line, or a .jsonl file.")
        dropped: collections.Counter[str] = collections.Counter()
        prompts = []
        for line in _lines(path):
            text = line.strip()
            if not text:
                dropped["blank line"] += 1
            elif path.suffix == ".txt":
                prompts.append(text)
            else:
                text = _caption_of(_json_object(text))
                if text:
                    prompts.append(text)
                else:
                    dropped["line without a prompt"] += 1
        if not prompts:
            raise UserError(f"data.path={path} holds no prompts{_because(dropped)}.")
        ours, self.routing = config.of_captions(prompts)
        dropped["in other partitions"] = len(prompts) - len(ours)
        self.captions = [prompts[i] for i in ours]
        self.size = len(ours)
        self.counts = _counts(self.size, dropped)

    def fingerprint(self) -> str:
        return _digest([_facts(self.config), "\n".join(self.captions)])


# ----------------------------------------------------------------------------------------- sources with files


@dataclass(frozen=True, kw_only=True)
class Files(Partition):
    """What the sources of stored images have in common."""

    path: Path
    resolution: int = 64  # images are cut to their central square and resized to this side
    min_size: int = 0  # images whose shorter side is below this are dropped; 0 = keep and enlarge
    # Up to this, decoded images stay in memory. Beyond it a batch is read and decoded when it is asked for; a
    # shuffled batch of a Parquet file then reads whole row groups, so encode such data to latents first.
    memory_gb: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(8, resolution=self.resolution)
        _at_least(0, min_size=self.min_size, memory_gb=self.memory_gb)


class Stored(Source):
    """Encoded images with captions or labels; subclasses list them and read their bytes.

    Every image is decoded once at opening, so a broken file is counted now and ends no run at hour ten.
    """

    def _open(
        self,
        captions: list[str | None] | None,
        labels: list[int | None] | None,
        class_names: tuple[str, ...] | None,
        total: int,
        dropped: collections.Counter[str],
    ) -> None:
        """Drop what cannot be used of `total` listed examples and take stock of the rest."""
        config = self.config
        if labels is not None:
            block, self.routing = config.of_classes(len(class_names or ()))
            ours = set(block)
            mine = [i for i in range(total) if labels[i] is None or labels[i] in ours]
        elif captions is not None:
            mine, self.routing = config.of_captions([caption or "" for caption in captions])
        else:
            mine = list(config.block(total))
        dropped["in other partitions"] += total - len(mine)
        candidates = []
        for i in mine:
            missing = "no caption" if captions is not None and not captions[i] else ""
            missing = "no label" if labels is not None and labels[i] is None else missing
            if missing:
                dropped[missing] += 1
            else:
                candidates.append(i)

        side = self.resolution
        fits = len(candidates) * side * side * 3 <= config.memory_gb * 2**30
        pixels = np.empty((len(candidates), side, side, 3), np.uint8) if fits else None
        kept, digest = [], hashlib.sha256()
        decode = functools.partial(decoded, resolution=side, min_size=config.min_size)
        main = os.environ.get("LOCAL_RANK", "0") == "0"
        bar = tqdm(
            total=len(candidates),
            desc="reading images",
            unit="image",
            disable=None if main else True,
            delay=1,
        )
        with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, bar:
            warnings.simplefilter("ignore")  # Pillow warns of what is counted here
            raws = self._raw(candidates)
            for first in range(0, len(candidates), _CHUNK):
                chunk = candidates[first : first + _CHUNK]
                encoded = [next(raws) for _ in chunk]
                for i, raw, result in zip(chunk, encoded, pool.map(decode, encoded), strict=True):
                    if isinstance(result, str):
                        dropped[result] += 1
                        continue
                    if pixels is not None:
                        pixels[len(kept)] = result
                    kept.append(i)
                    digest.update(hashlib.sha256(raw).digest())
                bar.update(len(chunk))
        if not kept:
            raise UserError(f"data.path={config.path} holds no usable image{_because(dropped)}.")
        self._kept, self._digest = kept, digest.hexdigest()
        self._pixels = pixels[: len(kept)] if pixels is not None else None
        self.size = len(kept)
        self.captions = [captions[i] for i in kept] if captions is not None else None
        self.labels = [labels[i] for i in kept] if labels is not None else None
        self.class_names = class_names if labels is not None else None
        self.counts = _counts(self.size, dropped)

    def _raw(self, listed: Sequence[int]) -> Iterator[bytes | None]:
        """Encoded bytes of the listed examples (numbers before dropping), in order; None where missing."""
        raise NotImplementedError

    def images(self, indices: Sequence[int]) -> np.ndarray:
        if self._pixels is not None:
            return self._pixels[np.asarray(indices, dtype=np.int64)]
        out = np.empty((len(indices), self.resolution, self.resolution, 3), np.uint8)
        listed = np.array([self._kept[index] for index in indices], np.int64)
        rows = np.argsort(listed, kind="stable")  # in the order of the files, so that each is read once
        for row, raw in zip(rows, self._raw(listed[rows].tolist()), strict=True):
            result = decoded(raw, self.resolution, self.config.min_size)
            if isinstance(result, str):
                raise UserError(
                    f"data.path={self.config.path} changed while it was in use ({result}); start again."
                )
            out[row] = result
        return out

    def fingerprint(self) -> str:
        texts = "\n".join(self.captions) if self.captions is not None else ""
        labels = np.asarray(self.labels, np.int64).tobytes() if self.labels is not None else b""
        return _digest([_facts(self.config), self._digest, texts, labels])


class Folder(Stored):
    """PNG, JPEG and WebP files below a folder.

    Captions come from a .txt file of the same name, or from metadata.jsonl files ("file_name", "text"); once
    one image has a caption, those without are dropped. Where all images lie in two or more sub-folders of
    `path`, their names are the classes.
    """

    Config = Files

    def __init__(self, config: Files) -> None:
        super().__init__(config)
        root = _existing(config.path, directory=True)
        dropped: collections.Counter[str] = collections.Counter()
        found, described = [], {}
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
            for name in sorted(names):
                path = Path(folder, name)
                if name == "metadata.jsonl":
                    described.update(_metadata(path, dropped))
                elif path.suffix.lower() in _IMAGE_SUFFIXES and not name.startswith("."):
                    found.append(path)
        if not found:
            raise UserError(f"data.path={root} holds no .png, .jpg or .webp file.")
        self._paths = sorted(found, key=lambda path: path.relative_to(root).parts)
        dropped["missing file"] += len(described.keys() - set(found))
        captions = [described.get(path) or _text_beside(path) for path in self._paths]
        tops = [path.relative_to(root).parts[:-1][:1] for path in self._paths]
        names = tuple(sorted({top[0] for top in tops if top}))
        labels = [names.index(top[0]) for top in tops] if all(tops) and len(names) > 1 else None
        self._open(captions if any(captions) else None, labels, names, len(self._paths), dropped)

    def _raw(self, listed: Sequence[int]) -> Iterator[bytes | None]:
        for i in listed:
            try:
                yield self._paths[i].read_bytes()
            except OSError:
                yield None


class Parquet(Stored):
    """Parquet in the Hugging Face layout: images as {bytes, path} or bytes, and columns of text and labels.

    `path` is one file or a folder of them.
    """

    @dataclass(frozen=True)
    class Config(Files):
        image_column: str | None = None  # None = image, or img
        caption_column: str | None = None  # None = text or caption, if there is one
        label_column: str | None = None  # None = label, if there is one
        class_names: tuple[str, ...] = ()  # () = those in the file's Hugging Face metadata, else the numbers

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        path = _existing(config.path)
        self._files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not self._files:
            raise UserError(f"data.path={path} holds no .parquet file.")
        self._groups: list[tuple[Path, int, int]] = []  # file, row group, number of its first row
        self._cached: collections.OrderedDict[int, list[bytes | None]] = collections.OrderedDict()
        captions, labels, total = [], [], 0
        for file in self._files:
            parquet = _parquet(file)
            schema = parquet.schema_arrow
            if file == self._files[0]:
                self._image = _column(
                    schema, "image_column", config.image_column, ("image", "img"), required=True
                )
                text = _column(schema, "caption_column", config.caption_column, ("text", "caption"))
                label = _column(schema, "label_column", config.label_column, ("label",))
                names = tuple(config.class_names) or _hugging_face_classes(schema, label)
            wanted = [column for column in (text, label) if column]
            for column in (self._image, *wanted):
                if column not in schema.names:
                    raise UserError(
                        f"data.path: {file} has no column {column!r}, which {self._files[0].name} has."
                    )
            for group in range(parquet.num_row_groups):
                self._groups.append((file, group, total))
                total += parquet.metadata.row_group(group).num_rows
                table = parquet.read_row_group(group, columns=wanted) if wanted else None
                captions += table[text].to_pylist() if text else []
                labels += table[label].to_pylist() if label else []
        if total == 0:
            raise UserError(f"data.path={path} holds no rows.")
        if text:
            captions = [value.strip() if isinstance(value, str) else None for value in captions]
        if label:
            labels, names = _classes(labels, names, label)
        self._total = total
        self._open(captions if text else None, labels if label else None, names, total, collections.Counter())

    def _raw(self, listed: Sequence[int]) -> Iterator[bytes | None]:
        starts = [first for _, _, first in self._groups]
        for i in listed:
            group = int(np.searchsorted(starts, i, side="right")) - 1
            yield self._encoded(group)[i - starts[group]]

    def _encoded(self, group: int) -> list[bytes | None]:
        """The encoded images of one row group; the last few groups stay in memory."""
        if group not in self._cached:
            file, number, _ = self._groups[group]
            column = _parquet(file).read_row_group(number, columns=[self._image])[self._image]
            values = column.to_pylist()
            self._cached[group] = [
                value.get("bytes") if isinstance(value, dict) else value for value in values
            ]
            if len(self._cached) > 2:
                self._cached.popitem(last=False)
        self._cached.move_to_end(group)
        return self._cached[group]


def decoded(raw: bytes | None, resolution: int, min_size: int = 0) -> np.ndarray | str:
    """The central square of an encoded image as uint8 (resolution, resolution, 3), or why it cannot be used.

    RGB, turned upright by its EXIF tag, transparency laid on white, resized with a Lanczos filter.
    """
    from PIL import Image, ImageOps

    if not isinstance(raw, bytes) or not raw:
        return "no image bytes"
    try:
        image = Image.open(io.BytesIO(raw))
        width, height = image.size
        if width * height > MAX_PIXELS:
            return "too large"
        if min(width, height) < min_size:
            return "too small"
        image = _rgb(ImageOps.exif_transpose(image))
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        if image.size != (resolution, resolution):
            box = (left, top, left + side, top + side)
            image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
        return np.asarray(image)
    except Image.DecompressionBombError:
        return "too large"
    except MemoryError:
        raise
    except Exception:  # a damaged file makes the decoders raise nearly anything
        return "unreadable image"


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip it to white
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _metadata(path: Path, dropped: collections.Counter[str]) -> dict[Path, str]:
    found = {}
    for line in _lines(path):
        entry = _json_object(line)
        if isinstance(entry.get("file_name"), str):
            found[Path(os.path.normpath(path.parent / entry["file_name"]))] = _caption_of(entry)
        elif line.strip():
            dropped["metadata line without a file_name"] += 1
    return found


def _text_beside(path: Path) -> str:
    beside = path.with_suffix(".txt")
    try:
        return " ".join(beside.read_text(encoding="utf-8-sig").split())
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError:
        raise UserError(f"the caption {beside} is not UTF-8 text.") from None


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid:
        raise UserError(f"data.path: {path} is not a Parquet file, or only a part of one.") from None


def _column(
    schema: Any, field: str, asked: str | None, usual: Sequence[str], required: bool = False
) -> str | None:
    if asked is not None:
        if asked not in schema.names:
            listed = ", ".join(schema.names)
            raise UserError(
                f"data.{field}={asked} is no column; there are {listed}.{nearest(asked, schema.names)}"
            )
        return asked
    for name in usual:
        if name in schema.names:
            return name
    if required:
        raise UserError(
            f"there is no column {' or '.join(usual)}; set data.{field} to one of {', '.join(schema.names)}."
        )
    return None


def _hugging_face_classes(schema: Any, label: str | None) -> tuple[str, ...]:
    try:
        return tuple(json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _classes(values: list, names: tuple[str, ...], column: str) -> tuple[list[int | None], tuple[str, ...]]:
    """Labels as class numbers, None where there is none, and a name for every class."""
    present = {value for value in values if value is not None}
    if all(isinstance(value, str) for value in present):
        names = names or tuple(sorted(present))
        number = {name: i for i, name in enumerate(names)}
        return [number.get(value) for value in values], names
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in present):
        raise UserError(f"data.label_column={column} must hold whole numbers or text.")
    labels = [value if value is not None and value >= 0 else None for value in values]  # -1 means unlabelled
    count = max((value for value in labels if value is not None), default=-1) + 1
    if names and len(names) < count:
        raise UserError(
            f"data.class_names has {len(names)} names, but the labels in {column} reach {count - 1}."
        )
    return labels, names or tuple(map(str, range(count)))


# ---------------------------------------------------------------------------------------------------- helpers


def _at_least(least: float, **values: float) -> None:
    for name, value in values.items():
        if not least <= value < math.inf:
            raise ValueError(f"{name} must be at least {least}, got {value}.")


def _existing(path: Path, directory: bool | None = None) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"data.path={path} does not exist.{nearest(path.name, beside)}")
    if directory is not None and path.is_dir() != directory:
        raise UserError(f"data.path={path} must be a {'folder' if directory else 'file'}.")
    return path


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text.") from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        entry = json.loads(text)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _caption_of(entry: dict[str, Any]) -> str:
    texts = (entry.get(key) for key in ("text", "prompt", "caption"))
    return next((" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()), "")


def _counts(kept: int, dropped: dict[str, int]) -> dict[str, int]:
    return {"kept": kept, **{why: n for why, n in dropped.items() if n}}


def _because(dropped: dict[str, int]) -> str:
    listed = ", ".join(f"{n:,} {why}" for why, n in dropped.items() if n)
    return f" ({listed})" if listed else ""


def _facts(config: Any) -> str:
    """The settings that change what an example is; where it lies and how much is cached do not."""
    values = {key: value for key, value in asdict(config).items() if key not in ("path", "memory_gb")}
    return json.dumps(values, sort_keys=True, default=str)


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:20]
