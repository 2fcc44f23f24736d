"""`python -m evaluation images`: sets of images that exist already, and what to doubt about a distance of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluation.captions import CaptionFile, paired
from evaluation.decoding import AS_STORED, Resize
from evaluation.extractors import Extractor, load_extractor
from evaluation.facts import doubts_of
from evaluation.files import IO_BATCH, open_images
from evaluation.images import Images
from evaluation.measure import Measured, Measurement
from evaluation.metrics import get_metrics
from evaluation.moments import Source
from evaluation.protocol import Protocol, get_protocol
from evaluation.references import FileReference, NamedReference, SceneReference, holds
from evaluation.results import finite, models, provenance
from evaluation.settings import Place
from evaluation.stats import FeatureStats
from stepdistill.errors import UserError
from stepdistill.provenance import sha256_of_files

# Samples below which published distances are not taken.
FEW = 10_000


@dataclass(frozen=True)
class Reference:
    """What a set is compared with: images, statistics of such, or both, as in ADM's reference batches."""

    path: Path
    images: Images | None
    stats: FeatureStats | None

    @property
    def n(self) -> int:
        """0 where statistics don't say it."""
        return self.stats.n if self.stats is not None else len(self.images)

    @property
    def sha256(self) -> str:
        """Of the content."""
        return self.images.sha256() if self.stats is None else sha256_of_files([self.path], self.path.parent)


def open_reference(
    path: Place, expect: Source | None = None, resize: Resize = AS_STORED, io_batch: int = IO_BATCH
) -> Reference:
    """The set or the statistics at `path`. Raises UserError as `FeatureStats.load` and `open_images` do."""
    has = holds(path)
    stats = FeatureStats.load(path, expect=expect) if "statistics" in has else None
    if stats is not None and stats.prepared and stats.prepared != str(resize):
        raise UserError(
            f"{path} is of images that were brought to size as {stats.prepared}, but here they are as {resize}; make it "
            "again with the same --protocol."
        )
    return Reference(Path(path), open_images(path, resize, io_batch) if "images" in has else None, stats)


def measure_set(
    images: Place, reference: Place | None = None, *, metrics: Sequence[str] = ("fd",), extractor: Place | None = None,
    protocol: str | Protocol | None = None, captions: Place | None = None, clip: Place | None = None,
    io_batch: int = IO_BATCH, device: str = "cpu", dtype: str = "float32",
) -> dict[str, Any]:  # fmt: skip
    """Measure a set of images against another one or its statistics (.npz).

    Args:
        images, reference: what `open_images` opens. reference: None where no metric needs one.
        extractor: a name or a directory; None is the protocol's, else inception-2015 for FID and the embedded
            one for everything else.
        protocol: whose image path, extractor and number of samples are used; None is images as they are.
        captions: a file with a caption for every image, by name where it names them, else in their natural order.
        clip: directory of the CLIP model, where that is not the embedded one.
        io_batch: images decoded by one job; changes nothing but memory.
        dtype: "bfloat16" for CLIP and DINO networks; their names then say so.

    Returns values by name, with what they were measured on, and `warnings`. The protocol's name says what is not as
    it fixes it. Raises UserError for a set that cannot be read, and where a metric needs what is not there.
    """
    chosen = get_protocol(protocol) if protocol is not None else None
    own = open_images(images, chosen.resize if chosen else AS_STORED, io_batch)
    needs = set().union(*(metric.needs for metric in get_metrics(metrics).values()))
    usual = "inception-2015" if "fid" in metrics else "scenes-v1"
    name = extractor or (chosen.extractor if chosen else usual)
    net = load_extractor(name, device, dtype=dtype) if "extractor" in needs else None
    resize = reference_resize(chosen)
    against = open_reference(reference, net and net.source, resize, io_batch) if reference and net else None
    said = paired(Path(captions), own.names, len(own), str(images)) if captions else None
    # Of a protocol only what is done to images counts here: these were drawn already, whatever for.
    bare = chosen and replace(chosen, conditions="none", captions=None, images_per_prompt=1, reference=None)
    ready = Measurement(
        bare, metrics, len(own), extractor=net, reference=against and (against.stats or against.images),
        reference_images=against and against.images, captions=said,
        clip=clip or "", device=device, dtype=dtype,
    )  # fmt: skip
    done = ready.of(own)
    actual = chosen and _actual(chosen, own, against, net and net.name, captions, said)
    n, warnings = len(own), [*_doubts(own, against, ready, done, chosen), *done.doubts]
    return finite(done.numbers) | {
        "n": n,
        "protocol": actual and actual.label(n),
        "protocol_hash": actual and actual.hash,
        "images": str(images),
        "images_sha256": own.sha256(),
        "captions": captions and str(captions),
        "captions_sha256": captions and CaptionFile.open(captions).content,
        **_against(against, net),
        "models": models(ready),
        **provenance(device),
        "warnings": warnings,
    }


def _against(reference: Reference | None, net: Extractor | None) -> dict[str, Any]:
    """The reference and the feature network, as a result holds them."""
    return {
        "reference": reference and str(reference.path),
        "reference_n": reference and reference.n,
        "reference_sha256": reference and reference.sha256,
        "extractor": net and net.name,
        "sha256": net and net.sha256,
        "resize": net and net.resize,
    }


def reference_resize(protocol: Protocol | None) -> Resize:
    """How a protocol brings the images of its reference to size; as they are stored where it says nothing."""
    return getattr(protocol.reference, "resize", AS_STORED) if protocol else AS_STORED


def _actual(
    chosen: Protocol, own: Images, against: Reference | None, extractor: str | None, path: Place | None,
    captions: Sequence[str] | None,
) -> Protocol:  # fmt: skip
    """The protocol these images were measured under, which differs from the chosen one in all that is not as it says."""
    width, height = own.resized(AS_STORED).peek().size
    actual = replace(chosen, extractor=extractor or chosen.extractor)
    if chosen.resolution and (width, height) != (chosen.resolution, chosen.resolution):
        actual = replace(actual, resolution=max(width, height))
    if against is not None:
        fixed = chosen.reference
        same = isinstance(fixed, NamedReference) and against.n in (0, fixed.n)
        # Nobody has the rendered scenes of a protocol in a folder.
        if not same or isinstance(fixed, SceneReference):
            actual = replace(actual, reference=FileReference(str(against.path), against.n, against.sha256))
    if captions is None:
        return actual
    if chosen.captions is None:
        other = chosen.has_text and chosen.prompts(len(captions)) != list(captions)
        return replace(actual, clip_prefix="other captions") if other else actual
    try:
        chosen.captions.located(path)
    except UserError:
        return replace(actual, captions=replace(chosen.captions, content=CaptionFile.open(path).content))
    return actual


def _doubts(
    images: Images, against: Reference | None, ready: Measurement, done: Measured, protocol: Protocol | None
) -> list[str]:
    """What a reader of a distance has to know about the two sets it is of."""
    doubts, n, own = [], len(images), done.inputs.images.facts
    if against is not None and images.path.resolve() == against.path.resolve():
        doubts.append("the images were compared with themselves.")
    known = against.n if against else 0, getattr(against and against.images, "facts", None)
    rest = ready.doubts(own, n, *known)
    if (
        against is not None
        and protocol is None
        and n < FEW
        and not any("full rank" in doubt for doubt in rest)
    ):
        doubts.append(f"{n} images are few: compare only with distances of as many, which share the bias.")
    return doubts + doubts_of(own, "images") + rest
