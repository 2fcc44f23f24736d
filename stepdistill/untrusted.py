"""What a directory of weights may hold and name, looked at before any library opens it.

diffusers and transformers import what a configuration names: a component's library and class, code beside the
weights (`auto_map`), kernels from a hub, quantisers, adapters of other models. A directory may come from anybody,
so only what a family knows is let through, and weights are safetensors.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from stepdistill.errors import UserError, first_line

if TYPE_CHECKING:
    from PIL import Image

# What the libraries raise for a directory they cannot load.
# tokenizers raises Exception itself, and huggingface_hub classes that only share that with the others.
LOADING = Exception
PICKLES = ("bin", "ckpt", "pt", "pth", "pkl")
# What Pillow may take an image for, by its names: decoders of pixels alone. It would hand an EPS to Ghostscript,
# which runs the program the file holds, whatever the file is called.
IMAGES = ("PNG", "JPEG", "WEBP", "BMP")
# Encoded bytes of one image, and its pixels, beyond which it is taken for a bomb. The second is Pillow's own limit, a
# quarter GiB of RGB.
IMAGE_BYTES = 256 << 20
IMAGE_PIXELS = 89_478_485
# Keys by which a configuration names code or a loader that brings its own.
CODE = ("auto_map", "custom_pipelines", "quantization_config", "kernel_config")
# Attention of torch's own; any other name is a package or a kernel that transformers would fetch.
ATTENTION = (None, "eager", "sdpa")
CONFIG_BYTES = 16 << 20
# The most that a configuration may ask for by a key with such a word in it: a network is built from it before anything
# is compared with its weights. Far above any published model's, and of lists the length.
MOST = {"layer": 1_000, "depth": 1_000, "block": 1_000, "timesteps": 100_000}


def open_regular(path: str | os.PathLike[str], most: int | None = None) -> BinaryIO:
    """A regular file of at most `most` bytes, open for reading. A pipe would wait for a writer, and a device has no end.

    Raises:
        OSError: it is no regular file, is larger, or cannot be opened; its `strerror` says which.
    """
    # What is no regular file must not be waited for.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = open(os.open(path, flags), "rb")  # noqa: SIM115
    try:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if most is not None and found.st_size > most:
            raise OSError(errno.EFBIG, f"it has more than {most >> 20} MiB", str(path))
    except OSError:
        file.close()
        raise
    return file


@contextlib.contextmanager
def readable(what: object, kind: str) -> Iterator[None]:
    """What a library raises for a damaged file, which is nearly anything, is one sentence: `what` is no `kind`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} cannot be read as {kind} ({first_line(error)}); copy it again.") from None


def read_regular(path: str | os.PathLike[str], most: int = IMAGE_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises OSError as `open_regular` does."""
    with open_regular(path, most) as file:
        return file.read(most)


@contextlib.contextmanager
def opened_image(content: bytes) -> Iterator[Image.Image]:
    """An encoded image of a known format, not decoded yet.

    What all threads hold open together has at most `IMAGE_PIXELS` pixels, or is one image: others wait, so that small
    files of large images do not fill the memory.

    Raises:
        Image.DecompressionBombError: it has more pixels than that.
        Image.UnidentifiedImageError: it is none of `IMAGES`. A damaged one makes Pillow raise nearly anything.
    """
    from PIL import Image

    with Image.open(io.BytesIO(content), formats=IMAGES) as image:
        pixels = image.width * image.height
        if pixels > IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{pixels:,} pixels, where {IMAGE_PIXELS:,} are the most")
        with _decoding.room(pixels):
            yield image


class _Budget:
    """So much of something at a time, over all threads; what wants more than there is gets it alone."""

    def __init__(self, most: int) -> None:
        self.most, self._taken, self._changed = most, 0, threading.Condition()

    @contextlib.contextmanager
    def room(self, wanted: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + wanted <= self.most)
            self._taken += wanted
        try:
            yield
        finally:
            with self._changed:
                self._taken -= wanted
                self._changed.notify_all()


_decoding = _Budget(IMAGE_PIXELS)


def check_directory(path: Path) -> None:
    """UserError for a directory, or a folder in it, whose files would make a library run or unpickle something."""
    check_configurations(path)
    for folder in _folders(path):
        refuse_pickles(folder)


def check_configurations(path: Path) -> None:
    """The same of its configurations alone, for what is opened by a loader of tensors and nothing else."""
    for folder in _folders(path):
        if (folder / "adapter_config.json").exists():
            raise UserError(
                f"{folder / 'adapter_config.json'} puts an adapter onto weights from elsewhere, which are not"
                " looked for; merge it into the model and save that."
            )
        for file in sorted(folder.glob("*.json")):
            if file.name.endswith(".safetensors.index.json"):
                _check_shards(file)
            elif "config" in file.name:
                _check_config(file)


def _folders(path: Path) -> list[Path]:
    return [path, *(part for part in sorted(path.iterdir()) if part.is_dir())]


def refuse_pickles(folder: Path) -> None:
    """Weights are safetensors. A pickle runs code when it is opened, so none is, and the way out is named."""
    pickles = [found for suffix in PICKLES for found in sorted(folder.glob(f"*.{suffix}"))]
    if pickles and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{pickles[0]} holds pickled weights, which are never loaded; convert them to safetensors "
            "(pipeline.save_pretrained(..., safe_serialization=True)) and point at the result."
        )


def check_components(
    where: Path, index: Mapping[str, Any], known: Mapping[str, Sequence[str]], left_out: Sequence[str] = ()
) -> None:
    """UserError unless every class that a model_index.json names is one the family knows.

    known: component -> patterns of "library.Class". left_out: components that are not loaded, whatever they name.
    """
    for name, value in index.items():
        unused = name in left_out or value in ([None, None], None)
        if (
            name.startswith("_")
            or unused
            or (name not in known and isinstance(value, (bool, int, float, str)))
        ):
            continue
        pair = isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
        named = ".".join(value) if pair else repr(value)
        patterns = known.get(name, ())
        if not pair or not any(fnmatchcase(named, pattern) for pattern in patterns):
            expected = f"expected is {' or '.join(patterns)}" if patterns else "it has no such part"
            raise UserError(
                f"{where}: {name} would be made by {named[:100]}, which a pipeline may not name here; {expected}."
            )


def read_json(path: Path) -> Any:
    """The content of a JSON file of a few megabytes at most. Raises UserError."""
    try:
        if not path.is_file() or path.stat().st_size > CONFIG_BYTES:
            raise UserError(
                f"{path} is no configuration: not a file, or of more than {CONFIG_BYTES >> 20} MiB."
            )
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(
            f"{path} is damaged: not JSON ({type(error).__name__}); fetch or export it again."
        ) from None


def _check_config(file: Path) -> None:
    for key, value in _entries(read_json(file)):
        attention = key.endswith(("_implementation", "_implementation_internal"))
        if (key in CODE and value) or (attention and value not in ATTENTION):
            raise UserError(
                f"{file}: {key}={str(value)[:100]} names code that comes with the model, which is never run;"
                " save the model again without it."
            )
        if most := next((MOST[word] for word in MOST if word in key), 0):
            sizes = _sizes(value, key)
            if max(sizes, default=0) > most or ("layers" in key and min(sizes, default=0) < 0):
                raise UserError(
                    f"{file}: {key} is none of 0 to {most:,}, as every model's is; fetch it again."
                )


def _sizes(value: Any, key: str) -> list[float]:
    """Numbers and lengths of lists in a configuration's value, at any depth; of blocks, which have widths, the lengths."""
    if isinstance(value, list):
        return [len(value), *(size for part in value for size in _sizes(part, key))]
    widths = "block" in key and "layer" not in key and not key.startswith("num")
    return [value] if isinstance(value, (int, float)) and not widths else []


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a JSON value with what it holds, at any depth."""
    pending = [content]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            yield from part.items()
        pending += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()


def _check_shards(file: Path) -> None:
    content = read_json(file)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    for name in shards.values() if isinstance(shards, dict) else [shards]:
        plain = isinstance(name, str) and Path(name).name == name and "\\" not in name
        if not plain or not name.endswith(".safetensors"):
            raise UserError(
                f"{file}: weight_map names {str(name)[:100]!r}, which is no safetensors file beside it; fetch it again."
            )
