"""Statistics of other tools: what they may be taken for, and what their files leave unsaid; ours, read by others."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fakes import pictures, refused, save_images, save_scenes
from features import correlated, stats_of
from PIL import Image

from evaluation.__main__ import main
from evaluation.image_sets import measure_set
from evaluation.images import MemoryImages
from evaluation.moments import Source
from evaluation.stats import FeatureStats
from stepdistill.errors import UserError

DIM = 24
TF1, CLEAN, SPATIAL = (Source(f"inception-2015{end}", "0" * 64) for end in ("", "-clean", "-spatial"))
ROWS = correlated(np.random.default_rng(0), 300, DIM)


def written(path, rows=ROWS, dtype=np.float64, **more):
    arrays = {"mu": rows.mean(0), "sigma": np.cov(rows.T)}
    np.savez(path, **{name: array.astype(dtype) for name, array in arrays.items()}, **more)
    return path


def test_an_unmarked_file_is_taken_and_doubted(tmp_path) -> None:
    stats = FeatureStats.load(written(tmp_path / "a.npz"), expect=TF1)
    said = "\n".join(stats.doubts)
    assert (
        "does not say what made it: it is taken for inception-2015" in said and "of how many images" in said
    )
    assert len(stats.doubts) == 2 and stats.n == 0
    known = FeatureStats.load(written(tmp_path / "b.npz", num_images=300), expect=CLEAN)
    assert known.n == 300 and len(known.doubts) == 1


def test_what_tells_its_resize_is_held_to_it(tmp_path) -> None:
    """The statistics of ADM used to load under clean-fid's extractor as well."""
    adm = written(tmp_path / "adm.npz", mu_s=ROWS.mean(0)[:7], sigma_s=np.cov(ROWS.T)[:7, :7])
    assert not any("what made it" in doubt for doubt in FeatureStats.load(adm, expect=TF1).doubts)
    assert FeatureStats.load(adm, expect=SPATIAL).dim == 7
    with pytest.raises(
        UserError, match="was made by inception-2015, as its arrays or its name say, but inception-2015-clean"
    ):
        FeatureStats.load(adm, expect=CLEAN)
    clean = written(tmp_path / "cifar10_clean_train_32.npz")
    assert FeatureStats.load(clean, expect=CLEAN).dim == DIM
    with pytest.raises(UserError, match="was made by inception-2015-clean"):
        FeatureStats.load(clean, expect=TF1)
    with pytest.raises(UserError, match="has no mu_s and sigma_s"):
        FeatureStats.load(clean, expect=SPATIAL)


@pytest.mark.parametrize("rank", [9, DIM])
def test_few_images_and_few_digits_are_seen(tmp_path, rank) -> None:
    rows = ROWS[: rank + 1] if rank < DIM else ROWS
    said = "\n".join(FeatureStats.load(written(tmp_path / "a.npz", rows), expect=TF1).doubts)
    assert (f"rank {rank} of {DIM}: it is of about {rank + 1} images" in said) == (rank < DIM)
    said = "\n".join(FeatureStats.load(written(tmp_path / "b.npz", dtype=np.float32), expect=TF1).doubts)
    assert "float32" in said and "rank" not in said


@pytest.mark.parametrize("count", [300, 20])
def test_others_read_what_is_saved_here(tmp_path, count) -> None:
    ours = stats_of(ROWS[:count], source=TF1)
    with np.load(ours.save(tmp_path / "ours.npz"), allow_pickle=False) as file:
        np.testing.assert_allclose(file["mu"], ROWS[:count].mean(0), rtol=1e-12)
        np.testing.assert_allclose(file["sigma"], np.cov(ROWS[:count].T), rtol=1e-9, atol=1e-15)
    back = FeatureStats.load(tmp_path / "ours.npz", expect=TF1)
    assert np.array_equal(back.cov, ours.cov) and np.array_equal(back.mean, ours.mean) and back.n == count
    assert back.doubts == []


def test_features_of_any_precision_are_taken() -> None:
    rows = torch.from_numpy(ROWS[:40]).bfloat16()
    found = FeatureStats(DIM).add(rows)
    assert np.array_equal(found.mean, FeatureStats(DIM).add(rows.double().numpy()).mean)


def test_statistics_keep_what_their_images_were(tmp_path, net, capsys) -> None:
    """Warnings about size, losses and shared images used to vanish with the images."""
    save_images(tmp_path / "samples", pictures(0, 30))
    save_scenes(tmp_path / "reference", 20)
    (tmp_path / "reference" / "notes.txt").write_text("")
    for index, image in enumerate(pictures(0, 2)):
        pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
        pixels.save(tmp_path / "reference" / f"shared{index}.png")
        pixels.save(tmp_path / "reference" / f"lossy{index}.jpg")
    main(["stats", str(tmp_path / "reference"), "-o", str(tmp_path / "r.npz"), "--extractor", str(net)])
    assert "files left out beside the images: 1 .txt" in capsys.readouterr().out
    found = [
        measure_set(tmp_path / "samples", tmp_path / name, extractor=net) for name in ("reference", "r.npz")
    ]
    assert found[0]["warnings"] == found[1]["warnings"]
    said = "\n".join(found[1]["warnings"])
    assert "2 different images are in both sets" in said and "2 of the 24 of the reference are JPEG" in said
    assert found[0]["fd:tiny"] == found[1]["fd:tiny"]


def test_statistics_of_one_preparation_do_not_serve_another(tmp_path, net, capsys, monkeypatch) -> None:
    from dataclasses import replace

    from evaluation import protocol as protocols
    from evaluation.decoding import Resize
    from evaluation.protocol import PROTOCOLS
    from evaluation.references import NamedReference

    for name, crop in (("one", "centre"), ("other", "adm")):
        made = replace(
            PROTOCOLS["cifar10-50k"], name=name, n=12, extractor="tiny", resolution=64,
            reference=NamedReference("r", 20, Resize(crop, 32)),
        )  # fmt: skip
        monkeypatch.setitem(protocols.PROTOCOLS, name, made)
    save_scenes(tmp_path / "r", 20)
    save_scenes(tmp_path / "s", 12, first=30)
    main(
        [
            *map(
                str,
                ("stats", tmp_path / "r", "-o", tmp_path / "r.npz", "--extractor", net, "--protocol", "one"),
            )
        ]
    )
    command = ["images", tmp_path / "s", "--ref", tmp_path / "r.npz", "--extractor", net, "--protocol"]
    main([*map(str, command), "one"])
    assert "brought to size as centre, lanczos, 32x32, but here they are as adm" in refused(
        capsys, *command, "other"
    )


def test_adms_reference_batch_serves_distance_and_neighbours(tmp_path, net) -> None:
    """`arr_0` beside mu and sigma: precision and recall need its images."""
    from evaluation.extractors import load_extractor

    images = pictures(0, 40)
    extractor = load_extractor(net)
    stats = extractor.statistics(MemoryImages([images]))
    stats.save(tmp_path / "plain.npz")
    with np.load(tmp_path / "plain.npz") as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(tmp_path / "batch.npz", **arrays, arr_0=images.permute(0, 2, 3, 1).numpy())
    save_images(tmp_path / "samples", pictures(60, 30))
    save_images(tmp_path / "folder", images)
    names = ["fd", "prdc", "kid"]
    one = measure_set(tmp_path / "samples", tmp_path / "batch.npz", metrics=names, extractor=net)
    two = measure_set(tmp_path / "samples", tmp_path / "folder", metrics=names, extractor=net)
    numbers = {name: value for name, value in two.items() if isinstance(value, float)}
    assert len(numbers) > 8 and {name: one[name] for name in numbers} == numbers
    with pytest.raises(UserError, match="needs reference_images"):
        measure_set(tmp_path / "samples", tmp_path / "plain.npz", metrics=names, extractor=net)


def test_a_result_says_what_made_it(tmp_path, net) -> None:
    save_scenes(tmp_path / "a", 12)
    save_scenes(tmp_path / "b", 12, first=12)
    main(
        [
            *map(
                str,
                (
                    "images",
                    tmp_path / "a",
                    "--ref",
                    tmp_path / "b",
                    "--extractor",
                    net,
                    "-o",
                    tmp_path / "r.json",
                ),
            )
        ]
    )
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["reference"] == str(tmp_path / "b") and len(found["reference_sha256"]) == 64
    assert found["machine"]["device"] == "cpu" and {"torch", "numpy", "pillow"} <= found["versions"].keys()
    assert found["sha256"] and found["git_commit"] and found["command"] and found["captions_sha256"] is None
