"""Images of several aspect ratios: each in the bucket of the nearest, every batch of one bucket, nothing skipped."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from examples import noise, source
from models import family_of
from PIL import Image
from runs import LCM, assert_same_run, interrupt_in, sd

from stepdistill.errors import UserError
from stepdistill.families.base import Family
from training import precompute
from training.batches import Batches
from training.data import Source
from training.data.buckets import bucket_sizes, nearest_size, next_bucket, shared_out
from training.fitting import check
from training.run import run
from training.state import TrainState

# Eight upright, five lying and three square ones.
SHAPES = [(24, 12)] * 8 + [(10, 20)] * 5 + [(16, 16)] * 3
BUCKETS = {"enable_bucket": True, "bucket_reso_steps": 8, "resolution": 16}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, shape in enumerate(SHAPES):
        Image.fromarray(noise(i, *shape)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a red circle\na blue square {i % 2}\n")
    return folder


# ---------------------------------------------------------------------------------------------------------- the sizes


def test_the_sizes_are_those_of_sdxl() -> None:
    """The ends and the middle of the table in its Appendix I, and what holds for all of it."""
    sizes = bucket_sizes((1024, 1024), 64)
    listed = {(512, 2048), (512, 1856), (576, 1792), (704, 1408), (832, 1216), (1024, 1024), (1984, 512)}
    assert listed <= set(sizes)
    assert all(h % 64 == w % 64 == 0 and min(h, w) >= 512 and max(h, w) <= 2048 for h, w in sizes)
    assert all(0.85 * 1024**2 < h * w <= 1024**2 for h, w in sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    assert bucket_sizes((16, 16), 8) == ((8, 24), (8, 32), (16, 16), (24, 8), (32, 8))
    assert bucket_sizes((16, 16), 8, least=16) == ((16, 16),)
    with pytest.raises(ValueError, match="bucket_reso_steps=64 leaves no size between 8 and 32 pixels"):
        bucket_sizes((16, 16), 64)


def test_an_image_goes_to_the_nearest_aspect_ratio() -> None:
    sizes = ((8, 32), (16, 16), (32, 8))
    assert nearest_size(100, 390, sizes) == (8, 32) and nearest_size(100, 210, sizes) == (8, 32)
    # Between 1:1 and 1:4 the middle is 1:2.
    assert nearest_size(100, 190, sizes) == (16, 16) and nearest_size(190, 100, sizes) == (16, 16)


def test_images_are_cut_to_their_buckets(pictures: Path) -> None:
    explicit = [[24, 12], [10, 20], [16, 16]]
    for memory_gb in (1.0, 0.0):
        data = source("folder", path=pictures, aspect_ratio_buckets=explicit, memory_gb=memory_gb)
        assert {bucket.size: list(bucket.members) for bucket in data.buckets} == {
            (10, 20): list(range(8, 13)), (16, 16): [13, 14, 15], (24, 12): list(range(8))
        }  # fmt: skip
        for bucket in data.buckets:
            found = data.images(bucket.members)
            assert np.array_equal(found, np.stack([noise(i, *SHAPES[i]) for i in bucket.members]))
    assert "16 images in 3 buckets (8 at 24x12, 5 at 10x20, 3 at 16x16), 2 captions each" in data.describe()


def test_sizes_are_those_of_the_image_and_of_what_is_cut_off(tmp_path: Path) -> None:
    Image.fromarray(noise(0, 40, 60)).save(tmp_path / "a.png")
    data = source("folder", path=tmp_path, resolution=[20, 20])
    # 60 wide at the scale of 20 / 40: 30, of which 5 are left out on either side.
    assert data.sizes([0]).tolist() == [[40, 60, 0, 5, 20, 20]]
    data = source("folder", path=tmp_path, resolution=[10, 20])
    assert data.sizes([0]).tolist() == [[40, 60, 2, 0, 10, 20]] or data.sizes([0])[0, 2] in (1, 2)
    assert source("scenes", size=2, resolution=16).sizes([1]).tolist() == [[16, 16, 0, 0, 16, 16]]


# ---------------------------------------------------------------------------------------------------------- the order


def test_every_example_is_used_equally_often_whatever_the_batches() -> None:
    counts, drawn, chosen = [80, 15, 5], [0, 0, 0], []
    for batch in [4] * 200 + [10] * 120:
        number = next_bucket(3, counts, drawn, batch)
        drawn[number] += batch
        chosen.append(number)
        total = sum(drawn)
        # Never two batches away from its share.
        assert all(abs(had - count * total / 100) <= 20 for count, had in zip(counts, drawn, strict=True))
    # Two phases that take turns meet both of two equal buckets.
    drawn, turns = [0, 0], Counter()
    for turn in range(200):
        number = next_bucket(0, [10, 10], drawn, 4)
        drawn[number] += 4
        turns[turn % 2, number] += 1
    assert min(turns.values()) > 25 and len(turns) == 4
    assert sum(shared_out(101, [3, 3, 1])) == 101 and shared_out(70, [3, 3, 1]) == [30, 30, 10]


# ----------------------------------------------------------------------------------------------------------- the runs


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(precompute, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def seen(monkeypatch) -> list[tuple[tuple[int, ...], list[str]]]:
    """Shape of x0 and captions of each batch."""
    drawn = []
    original = Batches._batch

    def batch(self, *given):
        made = original(self, *given)
        assert made.x0.shape[1:] == made.shape and len(made.x0) == len(made.prompts)
        sizes = {tuple(self.source.sizes([i])[0, 4:]) for i in made.examples}
        assert sizes == {tuple(side * self.family.stride for side in made.shape[1:])}
        drawn.append((made.shape, list(made.examples), list(made.prompts)))
        return made

    monkeypatch.setattr(Batches, "_batch", batch)
    return drawn


def recipe(out: Path, teacher: Path, pictures: Path, *overrides: str):
    data = {"name": "folder", "path": str(pictures), **BUCKETS}
    return sd(out, teacher, "run.steps=3", "run.save_every=2", *overrides, method=LCM, data=data)


def test_a_bucketed_run_resumes_to_the_bit_and_is_the_same_with_shards(
    tmp_path, tiny_sd, pictures, cache, seen, monkeypatch
) -> None:
    run(recipe(tmp_path / "whole", tiny_sd, pictures, "run.precompute=never"))
    whole = list(seen)
    assert len({shape for shape, _, _ in whole}) > 1
    seen.clear()
    with monkeypatch.context() as patch:
        interrupt_in(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(tmp_path / "broken", tiny_sd, pictures, "run.precompute=always"))
    run(recipe(tmp_path / "broken", tiny_sd, pictures, "run.precompute=always"))
    assert seen == whole
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    assert len(list(cache.glob("latents-*"))) == 3


class Plain(Family):
    """Images as they are, of any size."""

    conditions, resolution, shape = "none", (16, 16), (3, 16, 16)

    def shape_at(self, size: tuple[int, int]) -> tuple[int, ...]:
        return (3, *size)

    def encode(self, prompts) -> None:
        return None

    def uncond(self, count: int) -> None:
        return None

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()


def drawn(data: Source, batches: int, processes: int = 1, micro: int = 4, passes: int = 1) -> list[list]:
    """The examples of each of so many global batches, one list per pass and process, with the shape of each."""
    states = [TrainState(5) for _ in range(processes)]
    each = [
        Batches(Plain(), data, SimpleNamespace(
            num_processes=processes, process_index=i, device=torch.device("cpu")
        ), (micro, passes), needs_images=True)
        for i in range(processes)
    ]  # fmt: skip
    found = []
    for _ in range(batches):
        # All processes at once: process by process in each pass, as positions go.
        made = [list(one.draw("student", state)) for one, state in zip(each, states, strict=True)]
        parts = [made[process][number] for number in range(passes) for process in range(processes)]
        assert all(part.shape == part.x0.shape[1:] for part in parts)
        found.append([(part.shape, part.examples) for part in parts])
    return found


def test_processes_and_passes_share_one_bucket_and_change_nothing(pictures: Path) -> None:
    data = source("folder", path=pictures, **BUCKETS)
    whole = drawn(data, 8)
    assert len({shape for ((shape, _),) in whole}) == 3
    for split in (
        {"processes": 2, "micro": 2},
        {"micro": 1, "passes": 4},
        {"processes": 2, "micro": 1, "passes": 2},
    ):
        for ((shape, examples),), parts in zip(whole, drawn(data, 8, **split), strict=True):
            assert {part for part, _ in parts} == {shape}
            assert [i for _, part in parts for i in part] == examples
    # An epoch of each bucket is all of it.
    firsts = [i for batch in drawn(data, 40) for _, part in batch for i in part]
    assert set(firsts) == set(range(16))


def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path, tiny_sd, tiny_pixel, pictures) -> None:
    def refused(wanted, **family) -> str:
        made = family.get("cls") or wanted.family.make()
        with pytest.raises(UserError) as error:
            check(wanted, made, wanted.data.make())
        return str(error.value)

    wanted = recipe(tmp_path / "run", tiny_sd, pictures, "data.aspect_ratio_buckets=[[15, 30], [16, 16]]")
    assert "a bucket of [15, 30]: both sides must be multiples of" in refused(wanted)
    kd = {"name": "kd", "pair_count": 4, "pair_steps": 2}
    data = {"name": "folder", "path": str(pictures), **BUCKETS}
    assert "the teacher's trajectories, which are of one size" in refused(
        sd(tmp_path / "kd", tiny_sd, method=kd, data=data)
    )
    with pytest.raises(UserError, match=r"data: bucket_reso_steps=64 leaves no size"):
        recipe(tmp_path / "run", tiny_sd, pictures, "data.bucket_reso_steps=64")


def test_a_checkpoint_without_counts_by_bucket_goes_on() -> None:
    state = TrainState(0)
    state.load_state_dict({"samples": 12, "updates": {}}, 3)
    assert state.drawn == [] and state.state_dict()["drawn"] == []


# ------------------------------------------------------------------------------------------------- what SDXL is told


def told(family, source, needs_images: bool = True):
    """The first batch of a run on one process."""
    alone = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    batches = Batches(family, source, alone, (4, 1), needs_images=needs_images)
    (batch,) = batches.draw("student", TrainState(0))
    return batch


def test_sdxl_is_told_the_sizes_of_its_images(tmp_path) -> None:
    for i in range(4):
        Image.fromarray(noise(i, 64, 96)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a red circle")
    family = family_of("sdxl")
    side = family.resolution[0]
    data = source("folder", path=tmp_path, resolution=side)
    # Cut at the left by a sixth of its width, at the scale of what is left.
    expected = [[64, 96, 0, side // 4, side, side]] * 4
    batch = told(family, data)
    assert batch.cond["time_ids"].tolist() == batch.uncond["time_ids"].tolist() == expected
    # Without real images nothing is cropped, which is what its pipeline says by default.
    plain = [[side, side, 0, 0, side, side]] * 4
    assert told(family, data, needs_images=False).cond["time_ids"].tolist() == plain
    assert family.encode(["a"] * 4)["time_ids"].tolist() == plain
    family.config = replace(family.config, size_conditions="target")
    assert told(family, data).cond["time_ids"].tolist() == plain
    # In buckets: the size that is drawn, in the latents' shape too.
    step = family.multiple
    size = [side, side + step]
    batch = told(family, source("folder", path=tmp_path, aspect_ratio_buckets=[size]))
    assert batch.cond["time_ids"].tolist() == [[*size, 0, 0, *size]] * 4
    assert batch.shape == batch.x0.shape[1:] == family.shape_at(size)


@pytest.mark.parametrize("variant", ["pixart-alpha", "hunyuan_dit"])
def test_others_are_told_the_size_that_is_drawn(variant: str) -> None:
    family = family_of(variant)
    cond = family.encode(["a", "b"])
    sizes = torch.tensor([[100.0, 200, 3, 4, 64, 96]] * 2)
    said = family.sized(cond, sizes)
    if "resolution" in cond:
        assert said["resolution"].tolist() == [[64, 96]] * 2
        assert said["aspect_ratio"].tolist() == [[pytest.approx(64 / 96)]] * 2
    elif "sizes" in cond:
        assert said["sizes"].tolist() == [[1024, 1024, 64, 96, 0, 0]] * 2
    # An image of the family's own size is told as without.
    own = torch.tensor([[100.0, 200, 3, 4, *family.resolution]] * 2)
    assert all(torch.equal(family.sized(cond, own)[name], cond[name]) for name in cond)
