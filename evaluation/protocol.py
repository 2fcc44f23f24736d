"""Protocols: all that changes a number but not the model, in one small object with a name and a hash.

Each is a YAML file in `protocols/`; `--protocol my.yaml` reads one's own. Two results may be compared only if
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
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from evaluation.captions import CaptionFile
from evaluation.decoding import Resize
from evaluation.references import LATER, UNHASHED, FileReference, NamedReference, SceneReference
from evaluation.settings import Place
from stepdistill import scenes
from stepdistill.drawing import QUANTISE
from stepdistill.errors import UserError, nearest
from stepdistill.scenes import HELD_OUT_SEED
from stepdistill.yaml_files import read_yaml

FOLDER = Path(__file__).resolve().parent / "protocols"
CONDITIONS = ("scenes", "classes", "captions", "none")


def _identity(thing: Any) -> dict[str, Any]:
    """The fields of a dataclass that can change a number, nested ones likewise."""
    identity = {}
    for spec in fields(thing):
        value = getattr(thing, spec.name)
        neutral = "later" in spec.metadata and value == spec.default
        if spec.metadata.get("identity", True) and not neutral:
            identity[spec.name] = _identity(value) if dataclasses.is_dataclass(value) else value
    return identity


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
    `reference`: None where samples are judged by other means. `metrics`: measured unless others are asked for.
    `companion`: the protocol whose samples metrics of several images of a prompt are measured on, where this one
    has one image of each. `networks`: weights that judging the samples needs beside the extractor and the CLIP model.
    `resolution`: side of the samples, 0 for the pipeline's own. `clip`: the CLIP model, "" for the embedded one;
    `clip_prefix` is put before every caption; `clip_resize` is what is done to a sample, instead of `resize`, before
    the CLIP model sees it.
    """

    name: str
    version: int
    n: int
    conditions: str
    reference: SceneReference | FileReference | NamedReference | None
    metrics: tuple[str, ...] = field(metadata=UNHASHED)
    prompt_seed: int = HELD_OUT_SEED
    first_prompt: int = 0
    classes: int = 0
    first_seed: int = 0
    quantise: str = "round"
    extractor: str = "scenes-v1"
    captions: CaptionFile | None = field(default=None, metadata=LATER)
    images_per_prompt: int = field(default=1, metadata=LATER)
    seeds_by: str = field(default="sample", metadata=LATER)
    resolution: int = field(default=0, metadata=LATER)
    resize: Resize = field(default=Resize(), metadata=LATER)
    clip: str = field(default="", metadata=LATER)
    clip_prefix: str = field(default="", metadata=LATER)
    clip_resize: Resize = field(default=Resize(), metadata=LATER)
    patch: int = field(default=0, metadata=LATER)
    companion: str = field(default="", metadata=UNHASHED)
    networks: tuple[str, ...] = field(default=(), metadata=UNHASHED)
    about: str = field(default="", metadata=UNHASHED)
    source: str = field(default="", metadata=UNHASHED)

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
        """The name a result of `n` samples is published under, with all that is not as the protocol of that name says.

        "cifar10-50k[n=100, resolution=64, other reference]": such a number compares with none of the protocol's.
        """
        known = PROTOCOLS.get(self.name, self)
        theirs = known.describe()
        parts = [f"n={n}"] if n != known.n else []
        ours = self.describe()
        for name in sorted((ours.keys() | theirs.keys()) - {"n"}):
            if ours.get(name) != theirs.get(name):
                value = getattr(self, name)
                parts.append(f"{name}={value}" if isinstance(value, (str, int)) else f"other {name}")
        return f"{self.name}[{', '.join(parts)}]" if parts else self.name

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

    def groups(self, n: int) -> list[Hashable]:
        """Equal entries for those of the first n samples that are drawn for the same prompt or class."""
        if self.images_per_prompt > 1:
            return [i // self.images_per_prompt for i in range(n)]
        return list(self.prompts(n))

    @property
    def has_text(self) -> bool:
        """Whether samples are drawn for captions, which they can be compared with."""
        return self.conditions in ("scenes", "captions")

    def located(self, reference: Place | None = None, captions: Place | None = None) -> Protocol:
        """The same with its reference and captions found on this machine. Raises UserError if one is nowhere, or is
        another one than the protocol fixes.
        """
        if isinstance(self.reference, NamedReference):
            return replace(self, reference=self.reference.located(reference)).with_captions(captions)
        if reference is not None:
            raise UserError(
                f"the protocol {self.name} has its own reference; leave --reference out, or name another protocol."
            )
        return self.with_captions(captions)

    def with_captions(self, path: Place | None = None) -> Protocol:
        """The same with its captions found on this machine. Raises UserError as `located` does."""
        if self.captions is not None:
            return replace(self, captions=self.captions.located(path))
        if path is not None:
            raise UserError(f"the protocol {self.name} has no use for --captions; leave it out.")
        return self


_PARTS = {
    "scenes": SceneReference, "files": FileReference, "named": NamedReference, "resize": Resize, "captions": CaptionFile
}  # fmt: skip


def load_protocol(path: Place) -> Protocol:
    """The protocol in a YAML file. Raises UserError if the file is missing, no YAML, or has an unknown, missing or
    mistyped field.
    """
    path = Path(path)
    return _built(Protocol, read_yaml(path), str(path))


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
        elif name in ("resize", "clip_resize", "captions"):
            value = _built(_PARTS[name.removeprefix("clip_")], value, f"{where}: {name}")
        elif name in ("metrics", "files", "networks"):
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise UserError(f"{where}: {name} must be a list of names, got {value!r}.")
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


def real_images(
    path: Place, *, captions: Place | None = None, captions_seed: int = -1, n: int | None = None, classes: int = 0,
    extractor: str = "scenes-v1",
) -> Protocol:  # fmt: skip
    """The protocol for samples against the images at `path`.

    Samples are drawn for `captions`, one of each, if given; else for `classes` classes in turn (0: for nothing), as
    many as the reference has. Fewer are marked in the result's name as usual. With a `captions_seed` of 0 or more, `n`
    of the captions are drawn at random. Raises UserError if there are no images at `path`, or no captions in that
    file.
    """
    reference = FileReference.open(path)
    lines = CaptionFile.open(captions, n, captions_seed) if captions else None
    metrics = ("fd", "clip", "latency") if lines else ("fd", "latency")
    return Protocol(
        name=f"images:{Path(path).stem}",
        version=1,
        n=lines.n if lines else len(reference),
        conditions="captions" if lines else "classes" if classes else "none",
        reference=reference,
        metrics=metrics,
        classes=classes,
        extractor=extractor,
        captions=lines,
        about=f"Against all {len(reference)} images of {path}, "
        + (f"drawn for the captions in {captions}." if lines else "as many as those."),
    )


def chosen_protocol(
    protocol: str | Protocol, reference: Place | None = None, captions: Place | None = None, **own: Any
) -> Protocol:
    """The named protocol with its files found; or, for a `reference` where it names none, `real_images`, to which
    `own` goes. Raises UserError if there is no such protocol, or a file is nowhere or another one than the protocol
    fixes.
    """
    protocol = get_protocol(protocol)
    if reference is None or isinstance(protocol.reference, NamedReference):
        return protocol.located(reference, captions)
    return real_images(reference, captions=captions, **own)


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
