"""`python -m evaluation doctor`: whether a measurement can be made here, before hours are spent on it."""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from evaluation.extractors import load_extractor
from evaluation.files import open_images
from evaluation.metrics.clip_score import VARIANTS
from evaluation.protocol import PROTOCOLS, Protocol, get_protocol
from evaluation.reference import cache_directory
from evaluation.references import NamedReference, holds
from evaluation.settings import Place
from evaluation.weights import find
from stepdistill.errors import UserError

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")
# Of samples where neither protocol nor pipeline says it.
_USUAL_SIDE = 512


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, whether it is as it should be, and what was found."""

    name: str
    good: bool
    text: str


def examine(
    protocol: str | Protocol | None = None, *, reference: Place | None = None, captions: Place | None = None,
    extractor: str | None = None, out: Place = ".", settings: int = 1,
) -> list[Finding]:  # fmt: skip
    """Versions, devices and caches; then the protocol's weights, files and disk space, or those of all.

    `settings` is the number of models times step counts that samples are kept of. Raises UserError if there is no such
    protocol.
    """
    chosen = [get_protocol(protocol)] if protocol is not None else list(PROTOCOLS.values())
    findings = [_versions(), _device(), _cache()]
    nets = dict.fromkeys(extractor or one.extractor for one in chosen if one.reference is not None)
    findings += [_tried(f"extractor {name}", partial(_extractor, name)) for name in nets]
    weights = [name for one in chosen for name in (VARIANTS.get(one.clip), *one.networks) if name]
    findings += [
        _tried(f"weights {name}", lambda name=name: str(find(name))) for name in dict.fromkeys(weights)
    ]
    for one in chosen:
        findings += _files(one, reference, captions)
        findings.append(_disk(one, Path(out), settings))
    return findings


def _versions() -> Finding:
    versions = [f"python {platform.python_version()}"]
    missing = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    text = ", ".join(versions) + (f"; missing: {', '.join(missing)}" if missing else "")
    return Finding("versions", not missing, text)


def _device() -> Finding:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cpu = f"cpu with {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return Finding("devices", True, ", ".join([cpu, *gpus]) + ("" if gpus else "; no GPU is visible"))


def _cache() -> Finding:
    place = cache_directory()
    kept = list(place.glob("*.npz")) if place.is_dir() else []
    parent = next(folder for folder in (place, *place.parents) if folder.exists())
    good = os.access(parent, os.W_OK)
    text = f"{place}: {len(kept)} kept" + (
        "" if good else "; it cannot be written to, so nothing will be kept"
    )
    return Finding("statistics cache", good, text)


def _tried(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, look())
    except UserError as error:
        return Finding(what, False, str(error))


def _extractor(name: str) -> str:
    net = load_extractor(name)
    return f"{net.dim} features, sha256 {net.sha256[:16]}"


def _files(protocol: Protocol, reference: Place | None, captions: Place | None) -> list[Finding]:
    """Reference and captions, as far as they are files that a person has to bring."""
    findings = []
    if isinstance(protocol.reference, NamedReference):
        findings.append(
            _tried(f"{protocol.name}: reference", lambda: _reference(protocol.reference, reference))
        )
    if protocol.captions is not None:
        findings.append(
            _tried(f"{protocol.name}: captions", lambda: protocol.captions.located(captions).path)
        )
    return findings


def _reference(part: NamedReference, path: Place | None) -> str:
    known = part.located(path)
    if "images" not in holds(known.path):
        return known.path
    # A damaged image among a million would else end a run at its end.
    open_images(known.path, known.resize).check_headers()
    return f"{known.path}: the headers of all {known.n} images are sound"


def _disk(protocol: Protocol, out: Path, settings: int) -> Finding:
    side = protocol.resolution or (64 if protocol.conditions == "scenes" else _USUAL_SIDE)
    needed = settings * protocol.n * 3 * side**2
    place = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    text = (
        f"{_bytes(needed)} for the samples of {settings} setting{'s' * (settings > 1)} at {side}x{side}, "
        f"{_bytes(free)} free at {place}"
    )
    return Finding(f"{protocol.name}: disk", needed < free, text)


def _bytes(count: int) -> str:
    power = min(4, int(math.log(max(count, 1), 1000)))
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
