"""What is counted, what is left out and said, in folders, archives, Parquet files and arrays."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from fakes import encoded, pictures, refused, save_images, save_scenes
from PIL import Image

from evaluation.__main__ import main
from evaluation.decoding import Resize, decode
from evaluation.facts import doubts_of
from evaluation.files import open_images
from stepdistill.errors import UserError


def grey(value: int = 90, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value)).convert(mode)


def test_everything_pillow_takes_for_pixels_counts(tmp_path) -> None:
    """50 PNG and 50 TIFF used to be 50 images."""
    forms = {"a.png": "PNG", "b.tif": "TIFF", "c.gif": "GIF", "d.avif": "AVIF", "e.ppm": "PPM", "f.jfif": "JPEG",
             "g.WEBP": "WEBP", "h.bmp": "BMP", "i.jp2": "JPEG2000"}  # fmt: skip
    for name, form in forms.items():
        grey().save(tmp_path / name, form)
    opened = open_images(tmp_path)
    assert len(opened) == 9 and opened.skipped == {}
    assert abs(torch.cat(list(opened)).int() - 90).max() < 4


def test_what_is_left_out_is_said_with_its_number(tmp_path, net, capsys) -> None:
    save_scenes(tmp_path / "a" / "inner", 12)
    (tmp_path / "far").mkdir()
    save_scenes(tmp_path / "far" / "linked", 3, first=12)
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "far" / "linked")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    for name in (
        ".ipynb_checkpoints/0.png",
        "._x.png",
        "captions.txt",
        "notes.txt",
        "metadata.parquet",
        "x.psd",
    ):
        (tmp_path / "a" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(b"not looked at")
    opened = open_images(tmp_path / "a")
    assert len(opened) == 15
    assert opened.skipped == {".txt": 2, ".parquet": 1, ".psd": 1, "hidden": 2, "linked twice": 1}
    save_scenes(tmp_path / "b", 20, first=20)
    main(["images", str(tmp_path / "a"), "--ref", str(tmp_path / "b"), "--extractor", str(net)])
    assert "files left out beside the images: 2 .txt, 2 hidden, 1 .parquet" in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "x.psd").write_bytes(b"")
    with pytest.raises(UserError, match=r"there is no image in .*none among 1 \.psd"):
        open_images(tmp_path / "none")


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tars", "parquet", "img", "npy", "npz", "pattern"])
def test_every_source_gives_the_same_images(tmp_path, kind) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = pictures(0, 40)
    files = [encoded(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images]
    path = tmp_path / f"a.{kind}"
    if kind == "folder":
        path = tmp_path / "folder"
        save_images(path, images)
    elif kind == "zip":
        # As EDM's dataset_tool writes them.
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("dataset.json", "{}")
            for index, content in enumerate(files):
                file.writestr(f"00000/img{index:08d}.png", content)
    elif kind in ("tar", "tars"):
        path = path if kind == "tar" else tmp_path / "shards" / "0.tar"
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as file:
            for index, content in enumerate(files):
                for suffix, part in (("png", content), ("txt", b"a caption")):
                    member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                    member.size = len(part)
                    file.addfile(member, io.BytesIO(part))
        path = path if kind == "tar" else path.parent
    elif kind in ("parquet", "img", "pattern"):
        table = pa.table(
            {"img" if kind == "img" else "image": [{"bytes": content, "path": ""} for content in files]}
        )
        path = tmp_path / "train-00000-of-00001.parquet"
        pq.write_table(table, path)
        pq.write_table(
            table, tmp_path / ("test-0.parquet" if kind == "pattern" else "train-00001-of-00001.txt")
        )
        path = path.parent / "train-*.parquet" if kind == "pattern" else path
    elif kind == "npy":
        np.save(path, images.permute(0, 2, 3, 1).numpy())
    else:
        np.savez(path, images.permute(0, 2, 3, 1).numpy(), np.arange(40))
    opened = open_images(path)
    assert len(opened) == 40 and torch.equal(torch.cat(list(opened)), images) and len(opened.sha256()) == 64
    opened.check_headers()
    assert opened.peek().size == (64, 64)
    halved = open_images(path, Resize("centre", 32, "box"))
    assert torch.equal(
        torch.cat(list(halved))[3], torch.cat(list(opened.resized(Resize("centre", 32, "box"))))[3]
    )
    assert torch.equal(torch.cat(list(halved.resized(Resize()))), images)
    if kind in ("zip", "tar", "tars"):
        assert opened.skipped == ({".json": 1} if kind == "zip" else {".txt": 40})


def test_sets_of_two_splits_are_not_merged(tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        pq.write_table(pa.table({"image": [encoded(grey())]}), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"of 2 sets, test, train; name one, as .*test\*\.parquet"):
        open_images(tmp_path)
    assert len(open_images(tmp_path / "train*.parquet")) == 2


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((3, 4, 4, 3), np.float32), r"holds float32 \(3, 4, 4, 3\); images are uint8 \(N, H, W, 3\)"),
        (np.zeros((3, 3, 4, 4), np.uint8), r"holds uint8 \(3, 3, 4, 4\)"), (np.zeros((0, 4, 4, 3), np.uint8), "holds"),
    ],
)  # fmt: skip
def test_arrays_that_hold_no_images(tmp_path, array, said) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match=said):
        open_images(tmp_path / "a.npy")
    np.savez(tmp_path / "b.npz", other=array)
    with pytest.raises(UserError, match="holds no array arr_0"):
        open_images(tmp_path / "b.npz")
    (tmp_path / "c.npy").write_bytes(b"x" * 99)
    with pytest.raises(UserError, match="no NumPy array that can be read"):
        open_images(tmp_path / "c.npy")


def test_odd_images_follow_a_stated_rule() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    gif, webp, jpeg = io.BytesIO(), io.BytesIO(), io.BytesIO()
    grey(3, "P").save(gif, "GIF", save_all=True, append_images=[grey(200, "P")])
    grey().save(webp, "WEBP", lossless=False)
    grey(size=(8, 4)).save(jpeg, "JPEG", exif=turned)
    first, lossy, oriented = (decode(buffer.getvalue(), "x") for buffer in (gif, webp, jpeg))
    assert first.traits == {"animated"} and first.pixels[0, 0, 0] < 60
    assert lossy.traits == {"lossy"} and oriented.traits == {"lossy", "orientation"}
    # Not turned: no tool of a public reference does it.
    assert oriented.pixels.shape == (4, 8, 3)
    assert decode(encoded(grey(), "WEBP"), "x").traits == {"lossy"}
    cmyk = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "x")
    assert cmyk.traits == {"CMYK", "lossy"} and abs(cmyk.pixels[0, 0].astype(int) - [255, 0, 0]).max() < 4
    clear = io.BytesIO()
    grey().save(clear, "PNG", transparency=(90, 90, 90))
    with pytest.raises(UserError, match="x has transparent pixels"):
        decode(clear.getvalue(), "x")
    clear = io.BytesIO()
    grey().save(clear, "PNG", transparency=(1, 2, 3))
    assert decode(clear.getvalue(), "x").pixels[0, 0].tolist() == [90, 90, 90]


def test_every_rule_is_one_line_with_a_number(tmp_path) -> None:
    grey(3).save(tmp_path / "a.png")
    Image.new("CMYK", (8, 8)).save(tmp_path / "b.jpg")
    opened = open_images(tmp_path)
    list(opened)
    assert doubts_of(opened.facts, "images") == [
        "1 of 2 images are CMYK and were converted to RGB as Pillow does it, and ADM's and EDM2's tools with it."
    ]


def test_a_name_that_is_no_utf8_does_not_end_it_all(tmp_path, net, capsys) -> None:
    """It used to, after all the computing."""
    save_scenes(tmp_path / "a", 12)
    os.rename(tmp_path / "a" / "3.png", os.path.join(os.fsencode(tmp_path / "a"), b"3\xff.png"))
    save_scenes(tmp_path / "b", 12, first=12)
    command = [
        "images",
        tmp_path / "a",
        "--ref",
        tmp_path / "b",
        "--extractor",
        net,
        "-o",
        tmp_path / "r.json",
    ]
    main([*map(str, command)])
    assert json.loads((tmp_path / "r.json").read_text())["n"] == 12
    os.truncate(os.path.join(os.fsencode(tmp_path / "a"), b"3\xff.png"), 100)
    refused(capsys, *command)


@pytest.mark.parametrize("device", ["gpu", "cuda", "meta"])
def test_a_device_that_is_not_here_is_refused_first(tmp_path, net, capsys, device) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    save_scenes(tmp_path / "a", 3)
    command = ["images", tmp_path / "a", "--ref", tmp_path / "a", "--extractor", net, "--device", device]
    assert f"--device {device} is not here; use cpu" in refused(capsys, *command)
    run = ["run", "--pipeline", tmp_path, "--out", tmp_path / "out", "--device", device]
    assert f"--device {device} is not here" in refused(capsys, *run)
    assert "is not here" in refused(
        capsys, "stats", tmp_path / "a", "-o", tmp_path / "s.npz", "--device", device
    )


def test_headers_are_read_before_anything_else(tmp_path) -> None:
    save_scenes(tmp_path / "a", 30)
    (tmp_path / "a" / "27.png").write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"27\.png cannot be read as an image"):
        open_images(tmp_path / "a").check_headers()
    grey().save(tmp_path / "a" / "27.png")
    with pytest.raises(UserError, match=r"27\.png is 8x8 but"):
        open_images(tmp_path / "a").check_headers()
    open_images(tmp_path / "a", Resize("centre", 8)).check_headers()
