"""Protocols: all that changes a number but not the model, in one small object with a name and a hash.

Each is a YAML file in this folder; `--protocol my.yaml` reads one's own. Two results may be compared only if
their protocols' hashes agree. A result from fewer samples than the protocol says carries that in its name,
"scenes-2k[n=500]", because the Fréchet distance of fewer samples is biased upwards.

A field that was added after version 1 of the hash is left out of it at its neutral value, so that protocols
which do not use it keep theirs.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from evaluation.images import Images, Resize, open_images, patch_window, sha256_of_files
from evaluation.metrics import METRICS
from stepdistill import assets, scenes
from stepdistill.errors import UserError, nearest
from stepdistill.sampling import QUANTISE

HELD_OUT_SEED = 1_000_003  # data set of scenes that training never draws from
FOLDER = Path(__file__).resolve().parent
ENVIRONMENT = "STEPDISTILL_REFERENCES"  # folder of the references and captions that protocols name
CONDITIONS = ("scenes", "classes", "captions", "none")
_REFERENCE_SUFFIXES = ("", ".parquet", ".npz")
_CAPTION_SUFFIXES = (".txt", ".jsonl", ".json")


_UNHASHED = {"identity": False}  # marks a field that identifies nothing: an explanation, the place of a file
_LATER = {"later": True}  # marks a field the hash leaves out at its default


def _identity(thing: Any) -> dict[str, Any]:
    """The fields of a dataclass that can change a number, nested ones likewise."""
    found = {}
    for spec in fields(thing):
        value = getattr(thing, spec.name)
        neutral = "later" in spec.metadata and value == spec.default
        if spec.metadata.get("identity", True) and not neutral:
            found[spec.name] = _identity(value) if dataclasses.is_dataclass(value) else value
    return found


@dataclass(frozen=True)
class SceneReference:
    """Scenes `first` .. `first + n - 1` of the data set `seed`, as rendered."""

    seed: int = HELD_OUT_SEED
    first: int = 10_000
    n: int = 4_000
    kind: str = "scenes"

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(self.first, self.first + self.n, 100):
            stop = min(start + 100, self.first + self.n)
            pixels = np.stack([scenes.image_at(index, self.seed)[1] for index in range(start, stop)])
            yield torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def sha256(self) -> str:
        """Of the first 16 images: it changes when the renderer does."""
        return _sha256_of_scenes(self.seed, self.first)


@dataclass(frozen=True)
class FileReference:
    """All images of a folder or of Parquet files. Identified by their content, not by their place."""

    path: str = field(metadata=_UNHASHED)
    n: int
    content: str
    kind: str = "files"

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> FileReference:
        """Look at the files (not at every image). Raises UserError when there is none."""
        images = open_images(path)
        return cls(str(path), len(images), images.sha256())

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Tensor]:
        return iter(open_images(self.path))

    def sha256(self) -> str:
        return self.content


@dataclass(frozen=True)
class NamedReference:
    """A public set of images that is not ours to ship: the protocol fixes which, a person says where it is.

    It is identified by `name`, `n` and how its images are brought to size; its content goes into the result.
    `path` is a folder, a .parquet file or statistics (.npz), "" while it is not known.
    """

    name: str
    n: int
    resize: Resize = field(default_factory=Resize)
    kind: str = "named"
    about: str = field(default="", metadata=_UNHASHED)
    path: str = field(default="", metadata=_UNHASHED)

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Tensor]:
        return iter(open_images(self.path, resize=self.resize))

    def patches(self, side: int) -> Images:
        """The middle of every image, as it is stored, a pixel wider all around than a patch of this side."""
        return open_images(self.path, resize=patch_window(side))

    @property
    def is_statistics(self) -> bool:
        return self.path.endswith(".npz")

    def sha256(self) -> str:
        """Of the content at `path`; "" while nothing is there."""
        if not self.path:
            return ""
        if self.is_statistics:
            return sha256_of_files([Path(self.path)], Path(self.path).parent)
        return open_images(self.path).sha256()

    def found(self, path: str | os.PathLike[str] | None = None) -> NamedReference:
        """The same with its `path`, searched for unless given.

        Raises:
            UserError: it is in no place that was looked at, or has not `n` images.
        """
        place = _find(path, self.name, _REFERENCE_SUFFIXES, "the reference", self.about, "--reference")
        known = replace(self, path=str(place))
        if not known.is_statistics and (count := len(open_images(place))) != self.n:
            raise UserError(
                f"{place} has {count} images, but the reference {self.name} has {self.n}; {self.about}"
            )
        return known


@dataclass(frozen=True)
class CaptionFile:
    """`n` captions in a fixed order, in a file that a person has.

    .txt: one a line. .jsonl: an object a line with "prompt" or "caption". .json: a list of such objects or
    of strings, an object of objects (MJHQ-30K's meta_data.json), or COCO annotations, of which each image's
    caption with the lowest id is taken, by image id.
    """

    name: str
    n: int
    about: str = field(default="", metadata=_UNHASHED)
    path: str = field(default="", metadata=_UNHASHED)

    def found(self, path: str | os.PathLike[str] | None = None) -> CaptionFile:
        """The same with its `path`, searched for unless given, and read once.

        Raises:
            UserError: it is in no place that was looked at, is none, has not `n` captions or an empty one.
        """
        place = _find(path, self.name, _CAPTION_SUFFIXES, "the captions", self.about, "--captions")
        known = replace(self, path=str(place))
        if (count := len(known.read())) != self.n:
            raise UserError(
                f"{place} has {count} captions, but the protocol's {self.name} has {self.n}; {self.about}"
            )
        return known

    def read(self) -> tuple[str, ...]:
        if not self.path:
            raise UserError(f"the captions {self.name} are missing; give their file with --captions.")
        return read_captions(Path(self.path))

    def sha256(self) -> str:
        """Of the captions themselves; "" while the file is not known."""
        return hashlib.sha256("\n".join(self.read()).encode()).hexdigest() if self.path else ""


@dataclass(frozen=True)
class Protocol:
    """How a number is measured.

    `conditions`: "scenes": sample i is drawn for the caption of scene `first_prompt + i` of the data set
    `prompt_seed`; "captions": for line i of `captions`; "classes": for class i mod `classes`; "none": for
    nothing. With `images_per_prompt` k, samples k i .. k i + k - 1 share prompt i. The noise of sample i has
    the seed `first_seed + i`, with `seeds_by` "prompt" the seed `first_seed + i mod k`.
    `quantise`: u in [0, 1] to uint8 by round(255 u), "edm" floor(255 u + 1/2) or "floor" floor(255 u).
    `resize`: what is done to a sample before it is measured, as uint8; what the extractor does after that is
    part of its name. `patch`: side of the centre crop, at full resolution, a patch distance is taken of.
    """

    name: str
    version: int
    n: int
    conditions: str
    reference: SceneReference | FileReference | NamedReference | None  # None: judged by other means
    metrics: tuple[str, ...] = field(
        metadata=_UNHASHED
    )  # what is measured under it unless others are asked for
    prompt_seed: int = HELD_OUT_SEED
    first_prompt: int = 0
    classes: int = 0
    first_seed: int = 0
    quantise: str = "round"
    extractor: str = "scenes-v1"
    captions: CaptionFile | None = field(default=None, metadata=_LATER)
    images_per_prompt: int = field(default=1, metadata=_LATER)
    seeds_by: str = field(default="sample", metadata=_LATER)
    resolution: int = field(default=0, metadata=_LATER)  # side of the samples; 0: the pipeline's own
    resize: Resize = field(default=Resize(), metadata=_LATER)
    clip: str = field(default="", metadata=_LATER)  # the CLIP model; "": the embedded one
    clip_prefix: str = field(default="", metadata=_LATER)  # put before every caption
    patch: int = field(default=0, metadata=_LATER)
    about: str = field(default="", metadata=_UNHASHED)
    source: str = field(default="", metadata=_UNHASHED)

    def __post_init__(self) -> None:
        for name, known in (
            ("conditions", CONDITIONS),
            ("quantise", tuple(QUANTISE)),
            ("seeds_by", ("sample", "prompt")),
        ):
            if getattr(self, name) not in known:
                raise UserError(
                    f"the protocol {self.name} has {name} {getattr(self, name)!r}; it must be one of {', '.join(known)}."
                )
        if (self.conditions == "captions") != (self.captions is not None):
            raise UserError(
                f"the protocol {self.name} needs `captions` if its conditions are captions, and only then."
            )
        if self.images_per_prompt < 1 or (
            self.captions and self.captions.n * self.images_per_prompt != self.n
        ):
            raise UserError(
                f"the protocol {self.name} has n {self.n}, which is not its captions times images_per_prompt."
            )

    @functools.cached_property
    def hash(self) -> str:
        """16 hex digits over every field that can change a number."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """All fields but those that identify nothing (explanations, places of files) or are neutral."""
        return _identity(self)

    def label(self, n: int) -> str:
        """The name a result of `n` samples is published under."""
        return self.name if n == self.n else f"{self.name}[n={n}]"

    def prompts(self, n: int) -> list[str] | list[int]:
        """Captions, or class numbers, of the first n samples."""
        per = self.images_per_prompt
        if self.conditions == "scenes":
            start = self.first_prompt
            return [scenes.scene_at(start + i // per, self.prompt_seed).caption for i in range(n)]
        if self.captions is not None:
            lines = self.captions.read()
            return [lines[i // per] for i in range(n)]
        return [i // per % max(self.classes, 1) for i in range(n)]

    def seeds(self, n: int) -> list[int]:
        """Noise seeds of the first n samples."""
        modulus = self.images_per_prompt if self.seeds_by == "prompt" else n
        return [self.first_seed + i % modulus for i in range(n)]

    def scored_captions(self, n: int) -> list[str] | None:
        """What the first n samples are compared with: their captions after `clip_prefix`; None without text."""
        return [self.clip_prefix + caption for caption in self.prompts(n)] if self.has_text else None

    def groups(self, n: int) -> list[Hashable]:
        """Equal entries for those of the first n samples that are drawn for the same prompt or class."""
        if self.images_per_prompt > 1:
            return [i // self.images_per_prompt for i in range(n)]
        return list(self.prompts(n))

    @property
    def has_text(self) -> bool:
        """Whether samples are drawn for captions, which they can be compared with."""
        return self.conditions in ("scenes", "captions")

    def located(
        self, reference: str | os.PathLike[str] | None = None, captions: str | os.PathLike[str] | None = None
    ) -> Protocol:
        """The same with its reference and captions found on this machine.

        Raises:
            UserError: one is nowhere, or is another one than the protocol fixes.
        """
        if isinstance(self.reference, NamedReference):
            return replace(self, reference=self.reference.found(reference)).with_captions(captions)
        if reference is not None:
            raise UserError(
                f"the protocol {self.name} has its own reference; leave --reference out, or name another protocol."
            )
        return self.with_captions(captions)

    def with_captions(self, path: str | os.PathLike[str] | None = None) -> Protocol:
        """The same with its captions found on this machine. Raises UserError as `located` does."""
        if self.captions is not None:
            return replace(self, captions=self.captions.found(path))
        if path is not None:
            raise UserError(f"the protocol {self.name} has no use for --captions; leave it out.")
        return self


_PARTS = {
    "scenes": SceneReference, "files": FileReference, "named": NamedReference, "resize": Resize, "captions": CaptionFile
}  # fmt: skip


def load_protocol(path: str | os.PathLike[str]) -> Protocol:
    """The protocol in a YAML file.

    Raises:
        UserError: the file is missing, no YAML, or has an unknown, missing or mistyped field.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"the protocol {path} cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the protocol {path} is not YAML ({' '.join(str(error).split())}).") from None
    return _built(Protocol, content, str(path))


def _built(kind: type, content: Any, where: str) -> Any:
    """A dataclass from a mapping, nested ones likewise. Raises UserError naming the field."""
    if not isinstance(content, Mapping):
        raise UserError(f"{where} must be a mapping of fields, got {content!r}.")
    specs = {spec.name: spec for spec in fields(kind)}
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in specs:
            raise UserError(f"{where} has no field {name!r}.{nearest(name, specs)}")
        if name == "reference" and value is not None:
            part = value.get("kind", "scenes") if isinstance(value, Mapping) else None
            if part not in ("scenes", "files", "named"):
                raise UserError(f"{where}: reference.kind must be scenes, files or named, got {part!r}.")
            value = _built(_PARTS[part], value, f"{where}: reference")
        elif name in ("resize", "captions"):
            value = _built(_PARTS[name], value, f"{where}: {name}")
        elif name == "metrics":
            value = tuple(value)
        elif name != "reference" and type(value).__name__ != specs[name].type:
            raise UserError(f"{where}: {name} must be of type {specs[name].type}, got {value!r}.")
        values[name] = value
    required = [s.name for s in specs.values() if s.default is s.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in values]:
        raise UserError(f"{where} lacks the field{'s' * (len(missing) > 1)} {', '.join(missing)}.")
    return kind(**values)


PROTOCOLS = {found.name: found for found in map(load_protocol, sorted(FOLDER.glob("*.yaml")))}


def get_protocol(name: str | Protocol) -> Protocol:
    """The protocol of this name, or of this YAML file. Raises UserError for an unknown one."""
    if isinstance(name, Protocol):
        return name
    if str(name).endswith((".yaml", ".yml")):
        return load_protocol(name)
    if name not in PROTOCOLS:
        raise UserError(
            f"there is no protocol {name!r}; known are {', '.join(PROTOCOLS)}.{nearest(name, PROTOCOLS)}"
        )
    return PROTOCOLS[name]


def real_images(path: str | os.PathLike[str], *, classes: int = 0, extractor: str = "scenes-v1") -> Protocol:
    """The protocol for a sampler of `classes` classes (0: unconditional) against the images at `path`.

    Its own number of samples is that of the reference; fewer are marked in the result's name as usual.

    Raises:
        UserError: there are no images at `path`.
    """
    reference = FileReference.open(path)
    return Protocol(
        name=f"images:{Path(path).stem}",
        version=1,
        n=len(reference),
        conditions="classes" if classes else "none",
        reference=reference,
        metrics=("fd", "latency"),
        classes=classes,
        extractor=extractor,
        about=f"As many images as the reference has, against all {len(reference)} images of {path}.",
    )


def measurable(protocol: Protocol) -> list[str]:
    """Names of the metrics that can be measured under a protocol."""
    lacking = set() if protocol.conditions == "scenes" else {"attributes"}
    if not protocol.has_text:
        lacking.add("clip")
    if protocol.conditions == "none":
        lacking.add("diversity")
    return [name for name in METRICS if name not in lacking]


def checked_n(n: int | None, protocol: Protocol) -> int:
    """`n`, or the protocol's own for None. Raises UserError for what no distance can be taken of."""
    n = protocol.n if n is None else n
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise UserError(f"n must be a whole number of at least 2 samples, got {n!r}.")
    if protocol.captions is not None and n > protocol.n:
        raise UserError(
            f"n is {n}, but {protocol.name} has captions for {protocol.n} samples; ask for no more."
        )
    return n


def reference_folders() -> list[Path]:
    """Where references and captions are looked for: $STEPDISTILL_REFERENCES, then references/ beside assets/."""
    given = os.environ.get(ENVIRONMENT)
    return [*([Path(given)] if given else []), assets.ROOT.parent / "references"]


def read_captions(path: Path) -> tuple[str, ...]:
    """The captions in a file; see `CaptionFile`. Raises UserError naming the line that is none."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            entries = _json_captions(json.loads(text))
        elif path.suffix == ".jsonl":
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            entries = text.splitlines()
    except OSError as error:
        raise UserError(f"the captions {path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"the captions {path} are not UTF-8 text or JSON ({error}).") from None
    found = []
    for number, entry in enumerate(entries, 1):
        if isinstance(entry, dict):
            entry = entry.get("prompt", entry.get("caption"))
        if not isinstance(entry, str) or not entry.strip():
            raise UserError(f"caption {number} of {path} is empty or missing; every sample needs one.")
        found.append(entry.strip())
    return tuple(found)


def _json_captions(content: Any) -> list[Any]:
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):  # COCO
        first: dict[int, dict[str, Any]] = {}
        for entry in content["annotations"]:
            kept = first.get(entry["image_id"])
            if kept is None or entry["id"] < kept["id"]:
                first[entry["image_id"]] = entry
        return [first[image] for image in sorted(first)]
    return list(content.values()) if isinstance(content, dict) else list(content)


def _find(
    path: str | os.PathLike[str] | None,
    name: str,
    suffixes: Iterable[str],
    what: str,
    about: str,
    option: str,
) -> Path:
    """`path`, or the first `name` + suffix in the folders that are looked at.

    Raises:
        UserError: nothing is there; it says where was looked and what belongs there.
    """
    places = (
        [Path(path)] if path else [folder / f"{name}{s}" for folder in reference_folders() for s in suffixes]
    )
    for place in places:
        if place.exists():
            return place
    raise UserError(
        f"there is nothing for {what} {name} at {', '.join(map(str, places))}; {about} Name its place with {option}, "
        f"or put it into the folder that ${ENVIRONMENT} names."
    )


@functools.lru_cache(maxsize=4)
def _sha256_of_scenes(seed: int, first: int) -> str:
    digest = hashlib.sha256()
    for index in range(first, first + 16):
        scene, image = scenes.image_at(index, seed)
        digest.update(scene.caption.encode() + image.tobytes())
    return digest.hexdigest()
