"""Feature extractors by name: what turns images into the rows a Fréchet distance is taken of.

An extractor's name is part of the metric's name (`fd:scenes-v1`), and its weights' checksum part of every
statistics file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.clip import Clip
from evaluation.images import as_images, rechunked
from evaluation.moments import Source
from evaluation.processes import BFLOAT16, in_bfloat16, ready_device
from evaluation.settings import Place
from evaluation.stats import FeatureStats
from evaluation.weights import content_sha256, find, load_file, model_files
from stepdistill import assets
from stepdistill.clip import pretrained
from stepdistill.errors import UserError, nearest
from stepdistill.provenance import sha256_of_files


@dataclass(frozen=True)
class Extractor:
    """A feature network and what identifies it.

    `network` takes uint8 (chunk, 3, H, W) and gives (chunk, dim). It always runs at the batch size `chunk`,
    padded, because the last bits of a row depend on the size of the batch it was in. `side` is that of the
    square the network sees, None where it takes any. `head` gives logits (N, classes) of rows (N, dim), NumPy
    to NumPy, where the network is a classifier of one set of classes. `doubts`: what a reader of its numbers has to
    know.
    """

    name: str
    dim: int
    sha256: str
    network: Callable[[Tensor], Tensor]
    chunk: int = 50
    resize: str = "none"
    side: int | None = None
    head: Callable[[np.ndarray], np.ndarray] | None = None
    doubts: list[str] = field(default_factory=list, compare=False)

    @property
    def source(self) -> Source:
        """What statistics made with this extractor are marked with."""
        return Source(self.name, self.sha256, self.resize)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 (N, dim) of images uint8 (N, 3, H, W). Raises UserError for other tensors."""
        rows = [
            padded(self.network, part, self.chunk)
            for part in as_images(images).split(self.chunk)
            if len(part)
        ]
        return torch.cat(rows).float().cpu() if rows else torch.empty(0, self.dim)

    def stream(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Features of all batches in order. Chunks are formed by index: batch sizes don't change a bit."""
        for chunk in rechunked(batches, self.chunk):
            yield self(chunk)

    def statistics(self, images: Iterable[Tensor]) -> FeatureStats:
        """Feature statistics of a set, in one pass."""
        stats = FeatureStats(self.dim, self.source)
        for features in self.stream(images):
            stats.add(features)
        stats.facts = getattr(images, "facts", None)
        return stats


def load_extractor(
    name: Place = "scenes-v1", device: str = "cpu", weights: Place | None = None, dtype: str = "float32"
) -> Extractor:
    """An extractor of EXTRACTORS, or one from a directory with `config.json` and `model.safetensors`.

    Args:
        weights: file or directory of a public network's weights; None searches the usual places.
        dtype: "bfloat16" is what CLIP and DINO networks run in then, which their names say: "dinov2-vitl14-bf16". That
            name does the same. What it changed in the features of the first chunk comes into `doubts`.

    Raises:
        MissingWeights: a public network's weights are nowhere; the message says where to put them.
        UserError: there is no such extractor, or its files are missing or damaged.
    """
    name, device = str(name), ready_device(device)
    bare = name.removesuffix(BFLOAT16)
    make = EXTRACTORS.get(bare)
    half = make in (_clip, _dino) and (bare != name or dtype == "bfloat16")
    if make is None or (bare != name and not half):
        if not Path(name).is_dir():
            raise UserError(
                f"there is no extractor {name!r}; use {', '.join(EXTRACTORS)} or a directory with config.json "
                f"and model.safetensors.{nearest(name, EXTRACTORS)}"
            )
        return _feature_net(Path(name), device)
    net = make(bare, device, weights)
    if not half:
        return net
    name = bare + BFLOAT16
    return replace(net, name=name, network=in_bfloat16(net.network, device, name, net.doubts))


def _feature_net(path: Path, device: str) -> Extractor:
    from evaluation.feature_net import FeatureNet

    network = FeatureNet.load(path).for_inference().to(device)
    return Extractor(
        network.name,
        network.dim,
        sha256_of_files([path / "config.json", path / "model.safetensors"]),
        lambda images: network(images.to(device)),
        # Its activations then stay in a core's cache.
        chunk=25,
        resize=f"bilinear, antialiased, to {network.resolution}",
        side=network.resolution,
        head=network.classify if len(network.labels) == 1 else None,
    )


def _embedded(name: str, device: str, weights: Place | None) -> Extractor:
    return _feature_net(Path(weights) if weights is not None else assets.path(name), device)


def _inception(name: str, device: str, weights: Place | None) -> Extractor:
    """The 2015 Inception network after TensorFlow 1's resize (EDM, ADM, torch-fidelity), clean-fid's or pytorch-fid's;
    or its spatial features, after TensorFlow's.
    """
    from evaluation import inception

    path = find("inception-2015", weights)
    network = inception.Inception.from_state(load_file(path), path)
    sha256 = content_sha256(network.state_dict())
    spatial = name.endswith("-spatial")
    resize, text = inception.RESIZES.get(name.removeprefix("inception-2015-"), inception.RESIZES["tf1"])
    head = None if spatial else inception.logits_of(network.fc.weight.detach().numpy())
    network.to(device)
    features = network.spatial if spatial else network
    return Extractor(
        name, inception.SPATIAL if spatial else inception.FEATURES, sha256,
        lambda images: features(resize(images.to(device))), resize=text, side=inception.SIDE, head=head,
    )  # fmt: skip


def _clip(name: str, device: str, weights: Place | None) -> Extractor:
    """Projected image embeddings of a CLIP model, not normalised."""
    clip = Clip(assets.path("clip") if name == "clip-scenes-v1" else find(name, weights), device)
    return Extractor(
        name, clip.model.config.projection_dim, clip.sha256, clip.of_images,
        resize=f"Pillow bicubic, short side to {clip.side}, centre crop", side=clip.side,
    )  # fmt: skip


def _dino(name: str, device: str, weights: Place | None) -> Extractor:
    """DINOv2's class token behind the last layer norm, on images resized as EDM2 does it (its "torch" mode)."""
    path = find(name, weights)
    network = pretrained("Dinov2Model", path).to(device)
    side = 224
    _hub_positions(network, side)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )

    def embed(images: Tensor) -> Tensor:
        pixels = images.float()
        if pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
        return network(pixel_values=((pixels / 255 - mean) / std).to(device)).pooler_output

    return Extractor(
        name, network.config.hidden_size, sha256_of_files([path / "config.json", *model_files(path)]), embed,
        resize=f"torch bicubic, antialiased, to {side}", side=side,
    )  # fmt: skip


EXTRACTORS: dict[str, Callable[[str, str, Place | None], Extractor]] = {
    "scenes-v1": _embedded,
    "clip-scenes-v1": _clip,
    "inception-2015": _inception,
    "inception-2015-clean": _inception,
    "inception-2015-pytorch": _inception,
    "inception-2015-spatial": _inception,
    "clip-vit-b32": _clip,
    "clip-vit-l14": _clip,
    "clip-vit-l14-336": _clip,
    "dinov2-vitl14": _dino,
}


def _hub_positions(network: torch.nn.Module, side: int) -> None:
    """Give DINOv2 its position embeddings at `side` as the published code interpolates them.

    That code scales by (patches + 0.1) / (patches trained with), where transformers scales to a size, and the
    published distances are of its features.
    """
    table = network.embeddings.position_embeddings
    patches = side // network.config.patch_size
    trained = round((table.shape[1] - 1) ** 0.5)
    if trained == patches:
        return
    grid = table[:, 1:].unflatten(1, (trained, trained)).permute(0, 3, 1, 2)
    scale = (patches + 0.1) / trained
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic").flatten(2).transpose(1, 2)
    network.embeddings.position_embeddings = torch.nn.Parameter(
        torch.cat([table[:, :1], grid], 1), requires_grad=False
    )


def padded(network: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """`network(images)` for at most `size` rows, run at exactly `size` rows."""
    missing = size - len(images)
    if missing:
        images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
    return network(images)[: size - missing]
