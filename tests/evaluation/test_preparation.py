"""Crops, filters and resizes are those of the tools that made the public references; a label says what is not."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import pictures, refused, save_images, save_scenes
from PIL import Image

from evaluation import protocol as protocols
from evaluation.__main__ import main
from evaluation.captions import CaptionFile
from evaluation.decoding import Resize
from evaluation.image_sets import measure_set
from evaluation.images import MemoryImages
from evaluation.protocol import PROTOCOLS, load_protocol
from evaluation.references import NamedReference

# Usual sizes of COCO's images, some with odd margins.
SIZES = [
    (640, 480),
    (640, 427),
    (640, 425),
    (500, 333),
    (480, 640),
    (427, 640),
    (333, 500),
    (640, 426),
    (333, 333),
]


def noise(size: tuple[int, int]) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES)
def test_crops_are_torchvisions(size) -> None:
    """500x333 and 640x425 used to be cropped a pixel off."""
    from torchvision.transforms import functional as tv

    image = noise(size)
    found = Resize("torchvision")(image)
    assert np.array_equal(np.asarray(found), np.asarray(tv.center_crop(image, min(size))))
    # Patches too.
    found = Resize("window", 299)(image)
    assert np.array_equal(np.asarray(found), np.asarray(tv.center_crop(image, 299)))
    # Resize and CenterCrop, as SANA's script does it.
    short = tv.center_crop(tv.resize(image, 96), 96)
    assert np.array_equal(np.asarray(Resize("short-side", 96, "bilinear")(image)), np.asarray(short))


def test_an_image_smaller_than_a_patch_is_taken_whole() -> None:
    """It used to end the run without a name; its source leaves it uncropped."""
    image = noise((500, 281))
    assert np.array_equal(
        np.asarray(Resize("window", 299)(image)),
        np.asarray(image.resize((299, 299), Image.Resampling.BICUBIC)),
    )


@pytest.mark.parametrize("size", [(500, 333), (1024, 640), (129, 65), (64, 64), (63, 200)])
def test_adm_halves_resizes_and_crops(size) -> None:
    image, side = noise(size), 64
    shrunk = image
    for _ in range(20):
        if min(shrunk.size) < 2 * side:
            break
        shrunk = shrunk.resize((shrunk.width // 2, shrunk.height // 2), Image.Resampling.BOX)
    factor = side / min(shrunk.size)
    whole = np.asarray(
        shrunk.resize((round(shrunk.width * factor), round(shrunk.height * factor)), Image.Resampling.BICUBIC)
    )
    top, left = (whole.shape[0] - side) // 2, (whole.shape[1] - side) // 2
    found = np.asarray(Resize("adm", side)(image))
    assert np.array_equal(found, whole[top : top + side, left : left + side])


def test_edm_crops_then_lanczos() -> None:
    image = noise((81, 50))
    rows = np.asarray(image)[:, (81 - 50) // 2 : (81 + 50) // 2]
    want = Image.fromarray(rows).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(Resize("centre", 16, "lanczos")(image)), np.asarray(want))


def test_every_public_reference_is_prepared_as_its_source_does() -> None:
    """What each source's own tool does, read in its code; see the protocols' `source`."""
    wanted = {
        "imagenet64-50k": Resize("centre", 64, "lanczos"), "imagenet256-50k": Resize("adm", 256),
        "imagenet512-50k": Resize("adm", 512), "imagenet512-50k-dino": Resize("adm", 512),
        "ffhq64-50k": Resize(size=64), "afhq64-50k": Resize(size=64), "cifar10-50k": Resize(),
        "coco14-30k": Resize("torchvision", 256), "coco14-30k-drawn": Resize("torchvision", 256),
        "coco14-10k": Resize("torchvision", 512), "mjhq-30k": Resize("short-side", 512, "bilinear"),
        "coco17-5k": Resize("centre", 512),
    }  # fmt: skip
    found = {
        p.name: p.reference.resize for p in PROTOCOLS.values() if isinstance(p.reference, NamedReference)
    }
    assert found == wanted
    for name in ("coco14-30k", "coco14-10k", "coco14-30k-drawn", "mjhq-30k"):
        assert PROTOCOLS[name].resize == wanted[name]
    # DMD2's CLIP score sees 256 pixels whatever its distance sees.
    assert PROTOCOLS["coco14-10k"].clip_resize == Resize("torchvision", 256)
    assert PROTOCOLS["mjhq-30k"].extractor == "inception-2015-pytorch"


def test_images_and_patches_agree_on_their_middle(net) -> None:
    from evaluation.extractors import load_extractor
    from evaluation.metrics.patch_fd import of_patches

    wide = torch.from_numpy(np.array(noise((61, 50)))).permute(2, 0, 1)[None]
    patches = of_patches(load_extractor(net))
    window = MemoryImages([wide]).resized(Resize("window", 32))
    assert torch.equal(patches(wide), patches(next(iter(window))))


# ------------------------------------------------------------------------------- labels


def test_a_label_says_what_is_not_as_the_protocol_says(tmp_path, net, monkeypatch) -> None:
    """`images --protocol cifar10-50k` on 64x64 images and 100 others used to print its bare name and hash."""
    cifar = replace(
        PROTOCOLS["cifar10-50k"], n=30, extractor="tiny", reference=NamedReference("cifar10-train", 40)
    )
    monkeypatch.setitem(protocols.PROTOCOLS, "cifar10-50k", cifar)
    for name, count, first in (("good", 30, 0), ("few", 20, 0), ("reference", 40, 50), ("other", 25, 50)):
        save_images(tmp_path / name, torch.nn.functional.avg_pool2d(pictures(first, count).float(), 2).byte())
    save_scenes(tmp_path / "large", 30)

    def label(images: str, reference: str, **more) -> str:
        found = measure_set(
            tmp_path / images, tmp_path / reference, protocol="cifar10-50k", extractor=net, **more
        )
        assert (found["protocol_hash"] == cifar.hash) == ("[" not in found["protocol"].replace("[n=20]", ""))
        return found["protocol"]

    assert label("good", "reference") == "cifar10-50k"
    assert label("few", "reference") == "cifar10-50k[n=20]"
    assert label("good", "other") == "cifar10-50k[other reference]"
    assert label("large", "reference") == "cifar10-50k[resolution=64]"
    assert label("large", "other") == "cifar10-50k[other reference, resolution=64]"
    monkeypatch.setitem(protocols.PROTOCOLS, "cifar10-50k", replace(cifar, extractor="inception-2015"))
    found = measure_set(tmp_path / "good", tmp_path / "reference", protocol="cifar10-50k", extractor=net)
    assert found["protocol"] == "cifar10-50k[extractor=tiny]"


def test_other_captions_are_no_protocols_captions(tmp_path, monkeypatch) -> None:
    import hashlib

    from stepdistill import scenes

    lines = [scenes.scene_at(index, 7).caption for index in range(50)]
    pin = hashlib.sha256("\n".join(lines[:20] + lines[-20:]).encode()).hexdigest()
    length = len("\n".join(lines)) + 1
    # Another scene in the middle alone.
    middle = [*lines[:25], max(lines, key=len) if lines[25] != max(lines, key=len) else lines[0], *lines[26:]]
    published = CaptionFile("c", 50, ends=pin, characters=length)
    coco = replace(
        PROTOCOLS["coco14-30k"], n=50, captions=published, clip="", clip_prefix="", resize=Resize()
    )
    monkeypatch.setitem(protocols.PROTOCOLS, "coco14-30k", coco)
    save_images(tmp_path / "images", pictures(0, 50))
    found = {}
    for name, written in (("right", lines), ("other", lines[::-1]), ("middle", middle)):
        (tmp_path / f"{name}.txt").write_text("\n".join(written))
        found[name] = measure_set(
            tmp_path / "images",
            metrics=["attributes"],
            captions=tmp_path / f"{name}.txt",
            protocol="coco14-30k",
        )
    assert found["right"]["protocol"] == "coco14-30k"
    assert found["other"]["protocol"] == found["middle"]["protocol"] == "coco14-30k[other captions]"
    assert found["right"]["captions_sha256"] != found["other"]["captions_sha256"]


def test_a_file_of_ones_own_under_a_known_name_is_told_apart(tmp_path) -> None:
    text = (protocols.FOLDER / "cifar10-50k.yaml").read_text().replace("quantise: edm", "quantise: floor")
    (tmp_path / "p.yaml").write_text(text)
    assert load_protocol(tmp_path / "p.yaml").label(50_000) == "cifar10-50k[quantise=floor]"


def test_a_run_with_another_extractor_says_so(tmp_path, painters, net, capsys) -> None:
    command = [
        "run",
        "--pipeline",
        tmp_path / "student",
        "--steps",
        1,
        "--n",
        12,
        "--metrics",
        "fd",
        "--extractor",
        net,
    ]
    main([str(part) for part in (*command, "--out", tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["protocol"] == "scenes-2k[n=12, extractor=tiny]"
    capsys.readouterr()
    assert "no published number was" in refused(capsys, "compare", tmp_path / "out", "--published")
