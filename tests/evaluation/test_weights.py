"""Finding weights: the order of places, checks, and what a person reads when they are missing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from evaluation import weights
from evaluation.weights import (
    WEIGHTS,
    MissingWeights,
    Weights,
    content_sha256,
    convert,
    find,
    find_pipeline,
    load_file,
    main,
    model_files,
    pipeline_name,
)
from stepdistill.errors import UserError

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> Path:
    """Every place is an empty folder under the one returned."""
    monkeypatch.setenv("STEPDISTILL_WEIGHTS", str(tmp_path / "own"))
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    """A small file that stands for the published Inception weights, and its checksum."""
    path = tmp_path / "published.pth"
    torch.save(STATE, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = Weights(
        "inception-2015", 1, "Apache-2.0", ("w.pth", "w.safetensors"), "https://x/w.pth", digest[:8]
    )
    monkeypatch.setitem(WEIGHTS, "inception-2015", entry)
    return path


def put(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())
    weights.file_sha256.cache_clear()
    return target


def test_the_first_place_that_has_them_wins(nowhere, published) -> None:
    there = [
        put(published, nowhere / folder / "w.pth")
        for folder in ("torch/hub/checkpoints", "cache/weights", "own")
    ]
    for expected in reversed(there):
        assert find("inception-2015") == expected
        expected.unlink()
    explicit = put(published, nowhere / "elsewhere" / "renamed.pth")
    assert find("inception-2015", explicit) == explicit
    put(published, nowhere / "own" / "w.pth")
    # A path that was given is the only place.
    with pytest.raises(MissingWeights):
        find("inception-2015", nowhere / "empty")


def test_a_miss_says_what_where_and_how(nowhere) -> None:
    with pytest.raises(MissingWeights) as caught:
        find("inception-2015")
    text = str(caught.value)
    for part in (
        "inception-2015 (96 MB, Apache-2.0, sha256 6726825d...)",
        "there is none of weights-inception-2015-12-05-6726825d.pth, pt_inception-2015-12-05-6726825d.pth, "
        f"inception-2015.safetensors in {nowhere / 'own'}, {nowhere / 'cache' / 'weights'}, ",
        f"{nowhere / 'torch' / 'hub' / 'checkpoints'}, {nowhere / 'hub'};",
        "curl -L",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/",
        "$STEPDISTILL_WEIGHTS",
    ):
        assert part in text, part
    # One sentence.
    assert "\n" not in text
    with pytest.raises(MissingWeights) as caught:
        find("dinov2-vitl14")
    assert "hf download facebook/dinov2-large" in str(caught.value)
    assert "dinov2-large, models--facebook--dinov2-large in " in str(caught.value)
    with pytest.raises(UserError, match=r"no weights 'dinov2'.*Did you mean 'dinov2-vitl14'"):
        find("dinov2")


def test_another_file_of_the_right_name_is_refused(nowhere, published) -> None:
    wrong = put(published, nowhere / "own" / "w.pth")
    wrong.write_bytes(published.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"w\.pth is not the published file, or is damaged: its sha256 begins"
    ):
        find("inception-2015")


def test_a_conversion_is_the_same_network_and_carries_its_origin(nowhere, published) -> None:
    target = convert(published, nowhere / "own" / "w.safetensors")
    assert find("inception-2015") == target
    assert content_sha256(load_file(target)) == content_sha256(load_file(published)) == content_sha256(STATE)
    changed = {**STATE, "b": torch.tensor([1, 3])}
    assert content_sha256(changed) != content_sha256(STATE)
    torch.save(changed, nowhere / "changed.pth")
    convert(nowhere / "changed.pth", target)
    with pytest.raises(UserError, match="was not converted from the published file"):
        find("inception-2015")
    with pytest.raises(UserError, match=r"must end with \.safetensors"):
        convert(published, nowhere / "w.pth")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was opened",))


def test_a_checkpoint_with_code_is_not_run(tmp_path) -> None:
    torch.save({"a": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match=r"cannot be read as weights.*weights convert IN\.pth"):
        load_file(tmp_path / "bomb.pth")
    torch.save({"a": torch.zeros(1), "epoch": 3}, tmp_path / "more.pth")
    with pytest.raises(UserError, match="more than tensors"):
        load_file(tmp_path / "more.pth")
    for name in ("half.pth", "half.safetensors"):
        (tmp_path / name).write_bytes(b"half a file")
        with pytest.raises(UserError, match="cannot be read as weights"):
            load_file(tmp_path / name)


def repository(path: Path, content: bytes = b"weights", file: str = "model.safetensors") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / file).write_bytes(content)
    return path


def test_a_repository_is_found_in_the_hubs_cache_by_its_main_branch(nowhere) -> None:
    cached = nowhere / "hub" / "models--openai--clip-vit-base-patch32"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    repository(cached / "snapshots" / "old")
    with pytest.raises(MissingWeights):
        find("clip-vit-b32")
    assert find("clip-vit-b32", repository(nowhere / "mine")) == nowhere / "mine"
    (cached / "blobs").mkdir()
    name = hashlib.sha256(b"weights").hexdigest()
    (cached / "blobs" / name).write_bytes(b"weights")
    snapshot = repository(cached / "snapshots" / "abc")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(cached / "blobs" / name)
    assert find("clip-vit-b32") == snapshot
    (cached / "blobs" / name).write_bytes(b"weight5")
    weights.file_sha256.cache_clear()
    with pytest.raises(UserError, match="is damaged"):
        find("clip-vit-b32")
    own = repository(nowhere / "own" / "clip-vit-base-patch32")
    assert find("clip-vit-b32") == own


def test_a_pipeline_of_the_hub_is_found_in_its_cache(nowhere, monkeypatch) -> None:
    monkeypatch.chdir(nowhere)
    # A path, which loading will complain about.
    assert find_pipeline(nowhere / "gone") == nowhere / "gone"
    with pytest.raises(UserError, match=r"no directory me/student, .* get it with `hf download me/student`"):
        find_pipeline("me/student")
    cached = nowhere / "hub" / "models--me--student"
    snapshot = cached / "snapshots" / "abc"
    for folder in (cached / "refs", snapshot):
        folder.mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    # An interrupted download.
    with pytest.raises(UserError, match="no pipeline of that name"):
        find_pipeline("me/student")
    (snapshot / "model_index.json").write_text("{}")
    assert find_pipeline("me/student") == snapshot and pipeline_name(snapshot) == "me/student"
    (nowhere / "me" / "student").mkdir(parents=True)
    # A directory comes first.
    assert find_pipeline("me/student") == "me/student"
    assert pipeline_name(Path("me/student")) == "student"


def test_safetensors_are_taken_before_pickles(tmp_path) -> None:
    folder = repository(tmp_path, file="pytorch_model.bin")
    assert [file.name for file in model_files(folder)] == ["pytorch_model.bin"]
    repository(tmp_path)
    assert [file.name for file in model_files(folder)] == ["model.safetensors"]


def test_the_command_lists_and_converts(nowhere, published, capsys) -> None:
    main([])
    shown = capsys.readouterr().out
    assert all(name in shown for name in WEIGHTS) and "missing; curl -L" in shown
    main(["convert", str(published), str(nowhere / "own" / "w.safetensors")])
    main([])
    assert str(nowhere / "own" / "w.safetensors") in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(nowhere / "none"), str(nowhere / "x.safetensors")])
    assert caught.value.code == 2 and "there is no file" in capsys.readouterr().err
