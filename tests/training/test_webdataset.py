"""Tar files of samples: what belongs together, and what is never followed."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from examples import encoded, noise, source

from stepdistill.errors import UserError


def tar(path: Path, *members: tuple[str, bytes | str]) -> Path:
    """Members by name; content that begins with "->" is a link to the rest."""
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str) and content.startswith("->"):
                info.type, info.linkname, content = tarfile.SYMTYPE, content[2:], b""
            content = content.encode() if isinstance(content, str) else content
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def test_samples_are_put_together_by_their_names(tmp_path: Path) -> None:
    tar(
        tmp_path / "0.tar", ("a/0.png", encoded(noise(0))), ("a/0.txt", "first\nsecond"),
        ("b/0.jpg", encoded(noise(1), "JPEG")), ("b/0.json", json.dumps({"caption": "in json", "width": 16})),
        ("1.json", json.dumps({"text": "json"})), ("1.txt", "own text"), ("1.webp", encoded(noise(2), "WEBP")),
    )  # fmt: skip
    tar(tmp_path / "1.tar", ("a/0.png", encoded(noise(3))), ("a/0.txt", "another tar's"))
    for memory_gb in (2.0, 0.0):
        data = source("webdataset", path=tmp_path, resolution=16, memory_gb=memory_gb)
        assert data.texts == [["first", "second"], ["in json"], ["own text"], ["another tar's"]]
        assert data.counts == {"kept": 4} and data.labels is None
        assert np.array_equal(data.images([3, 0, 3]), np.stack([noise(3), noise(0), noise(3)]))
    # Nothing is unpacked.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "1.tar"]


def test_classes(tmp_path: Path) -> None:
    members = [
        (name, content)
        for i, label in enumerate(["2", "0", "-1", "x"])
        for name, content in ((f"{i}.png", encoded(noise(i))), (f"{i}.cls", label))
    ]
    tar(tmp_path / "0.tar", *members)
    data = source("webdataset", path=tmp_path / "0.tar")
    assert data.labels == [2, 0] and data.class_names == ("0", "1", "2")
    assert data.counts == {"kept": 2, "no label": 2, "unreadable text": 1}
    assert source("webdataset", path=tmp_path, class_names=["a", "b", "c"]).class_names == ("a", "b", "c")
    with pytest.raises(UserError, match=r"data\.class_names has 1 names, but the labels in \.cls reach 2"):
        source("webdataset", path=tmp_path, class_names=["a"])
    tar(tmp_path / "0.tar", ("0.png", encoded(noise(0))), ("0.cls", "9" * 40))
    with pytest.raises(UserError, match="number the classes from 0"):
        source("webdataset", path=tmp_path)


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    tar(
        tmp_path / "0.tar", ("0.png", encoded(noise(0))), ("0.jpg", encoded(noise(1), "JPEG")), ("0.npy", "x"),
        ("1.txt", "text alone"), ("../2.png", encoded(noise(2))), ("/3.png", encoded(noise(2))),
        ("4.png", "->/etc/passwd"), ("5.png", "not an image"),
    )  # fmt: skip
    data = source("webdataset", path=tmp_path)
    assert data.counts == {
        "kept": 1, "second image of a sample": 1, ".npy file": 1, "name that leads out of its tar": 2,
        "link in a tar": 1, "sample without an image": 1, "unreadable image": 1,
    }  # fmt: skip


def test_a_tar_that_is_not_whole_is_one_sentence(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", *((f"{i}.png", encoded(noise(i))) for i in range(3)))
    whole = path.read_bytes()
    with tarfile.open(path) as file:
        headers = [member.offset for member in file]
    with pytest.raises(UserError, match=r"0\.tar is no uncompressed tar, or only a part of one"):
        path.write_bytes(whole[:2500])
        source("webdataset", path=path)
    for at in headers[:2]:
        # A header whose checksum is wrong; behind the first, the library would say nothing.
        path.write_bytes(whole[:at] + b"?" + whole[at + 1 :])
        with pytest.raises(UserError, match=r"is no uncompressed tar|is damaged before its end"):
            source("webdataset", path=path)
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match="is no uncompressed tar"):
        source("webdataset", path=path)
    tar(path, ("0.txt", "no image"))
    with pytest.raises(UserError, match="holds no image"):
        source("webdataset", path=path)


def test_headers_that_claim_too_much_are_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    (tmp_path / "0.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(UserError, match="a header of 1,099,511,627,776 bytes"):
        source("webdataset", path=tmp_path)
    info = tarfile.TarInfo("0.png")
    info.size = -(1 << 20)
    (tmp_path / "0.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(UserError, match="is no uncompressed tar"):
        source("webdataset", path=tmp_path)
