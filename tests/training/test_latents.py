"""What encoders say of a data source: computed once and a shard at a time, gone on with after a kill, never trusted blindly."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from examples import source
from safetensors import safe_open

import training.shards as shards
from stepdistill.errors import UserError
from stepdistill.families.sd import SD
from training.encoded import Conditions, Latents, forget
from training.shards import Shards, Share


def latents(scenes, encode, cache: Path, key: str, batch: int = 64, **how) -> torch.Tensor:
    made = Latents(scenes, encode, cache, key).fill(batch, progress=False, **how)
    return made.of(range(scenes.size))


def test_latents_are_computed_once(tmp_path: Path) -> None:
    scenes, calls = source("scenes", size=10), []

    def encode(images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 64, 64)
        calls.append(len(images))
        return images.float().mean((2, 3)).half()

    first = latents(scenes, encode, tmp_path, "vae-1", batch=4)
    expected = torch.from_numpy(scenes.images(range(10))).float().mean((1, 2)).half()
    # The first batch is made twice: from it the size of a shard is told.
    assert torch.equal(first, expected.float()) and calls == [4, 4, 4, 2]
    (file,) = tmp_path.glob("latents-*/*.safetensors")
    with safe_open(str(file), "pt") as opened:
        assert opened.get_tensor("x0").dtype == torch.float16
    assert torch.equal(latents(scenes, encode, tmp_path, "vae-1"), first) and len(calls) == 4
    latents(scenes, encode, tmp_path, "vae-2")
    latents(source("scenes", size=10, partition="1/2"), encode, tmp_path, "vae-1")
    assert len(list(tmp_path.iterdir())) == 3


def test_latents_that_are_not_finite_are_refused_by_their_number_in_the_data(tmp_path: Path) -> None:
    def spoilt(images: torch.Tensor) -> torch.Tensor:
        x0 = images.float()
        x0[1:, 0, 3, 5] = torch.nan
        return x0

    with pytest.raises(
        UserError,
        match=r"the latents of 2 examples, \[1, 2\] of the data, are not finite; set family\.dtype=float32",
    ):
        latents(source("scenes", size=3), spoilt, tmp_path, "k")
    assert not list(tmp_path.rglob("*.safetensors"))


# ------------------------------------------------------------------------------------------------------- shards


def numbers(indices: range) -> dict[str, torch.Tensor]:
    values = torch.arange(indices[0], indices[-1] + 1)
    return {"value": values.float(), "pair": torch.stack((values, -values), 1).bfloat16()}


def store(cache: Path, count: int = 10, **facts: int) -> Shards:
    return Shards(cache, "numbers", facts, count, rows=3)


def test_rows_are_those_that_were_made_in_any_order_and_dtype(tmp_path: Path) -> None:
    made = store(tmp_path).fill(numbers, batch=2, progress=False)
    rows = made.rows([9, 0, 4, 4])
    assert rows["value"].tolist() == [9, 0, 4, 4] and rows["pair"].dtype == torch.bfloat16
    assert rows["pair"].tolist() == [[9, -9], [0, 0], [4, -4], [4, -4]]
    assert len(list(made.directory.glob("*.safetensors"))) == 4
    # Other facts, another place; and a store can be made longer.
    assert store(tmp_path, seed=1).directory != made.directory
    calls = []
    longer = store(tmp_path, 12).fill(lambda r: calls.append(r) or numbers(r), progress=False)
    assert [list(r) for r in calls] == [[9, 10, 11]] and longer.rows([11])["value"].tolist() == [11]


@pytest.mark.parametrize("moment", range(6))
def test_killed_at_any_point_it_goes_on(tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL at each call that computes, writes or renames; what was finished is not computed again."""
    child = os.fork()
    if child == 0:
        count = 0

        def dying(function):
            def call(*given, **named):
                nonlocal count
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return function(*given, **named)

            return call

        shards.save_tensors = dying(shards.save_tensors)
        os.replace = dying(os.replace)
        store(tmp_path).fill(dying(numbers), progress=False)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    finished = [
        path.name for path in tmp_path.rglob("0*.safetensors") if path.parent.name.startswith("numbers-")
    ]
    assert not store(tmp_path).complete
    calls: list[int] = []
    made = store(tmp_path).fill(lambda r: calls.extend(r) or numbers(r), progress=False)
    assert made.complete and made.rows(range(10))["value"].tolist() == list(range(10))
    assert not {3 * int(name[:6]) for name in finished} & set(calls)
    # The lock stays, as a file that nobody holds.
    assert {path.name for path in made.directory.glob(".*")} <= {".lock"}


def test_processes_share_the_shards(tmp_path: Path) -> None:
    made: dict[int, list[int]] = {0: [], 1: []}
    for index in (1, 0):
        # The second to come finds how the first has laid them out.
        store(tmp_path)._say(complete=0) if index == 1 else None
        store(tmp_path).fill(
            lambda r, index=index: made[index].extend(r) or numbers(r), share=Share(index, 2), progress=False
        )
    assert made == {0: [0, 1, 2, 6, 7, 8], 1: [3, 4, 5, 9]} and store(tmp_path).complete
    store(tmp_path).check()


@pytest.mark.parametrize("harm", ["missing", "short", "a bit"])
def test_a_shard_missing_or_damaged_is_one_sentence_and_is_made_again_when_asked(
    tmp_path: Path, harm: str
) -> None:
    path = store(tmp_path).fill(numbers, progress=False).directory / "000001.safetensors"
    content = bytearray(path.read_bytes())
    path.unlink()
    if harm == "short":
        path.write_bytes(content[:-4])
    if harm == "a bit":
        content[-3] ^= 1
        path.write_bytes(content)
    word = "missing" if harm == "missing" else "damaged"
    with pytest.raises(
        UserError, match=rf"000001.safetensors is {word}; run `python -m training.precompute`"
    ):
        store(tmp_path).fill(numbers, progress=False)
    calls: list[int] = []
    mended = store(tmp_path).fill(lambda r: calls.extend(r) or numbers(r), mend=True, progress=False)
    assert calls == [3, 4, 5] and mended.rows([4])["value"].tolist() == [4]


def test_a_shard_is_hashed_once_and_again_when_its_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = store(tmp_path).fill(numbers, progress=False)
    hashed: list[int] = []
    original = shards._digest
    monkeypatch.setattr(shards, "_digest", lambda rows: hashed.append(1) or original(rows))
    for expected in (4, 0, 0):
        hashed.clear()
        store(tmp_path).fill(numbers, progress=False)
        assert len(hashed) == expected
    path = made.directory / "000002.safetensors"
    os.utime(path, ns=(0, 0))
    store(tmp_path).fill(numbers, progress=False)
    assert len(hashed) == 1
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"000002\.safetensors is damaged"):
        store(tmp_path).fill(numbers, progress=False)


class Gathering:
    """What processes have of each other, between threads."""

    def __init__(self, count: int) -> None:
        self.values: list = [None] * count
        self.barrier = threading.Barrier(count, timeout=20)

    def share(self, index: int) -> Share:
        def gather(value: object) -> list:
            self.values[index] = value
            self.barrier.wait()
            values = list(self.values)
            self.barrier.wait()
            return values

        return Share(index, len(self.values), gather)


@pytest.mark.parametrize("where", ["damaged", "cannot be made"])
def test_what_ends_one_process_ends_all(tmp_path: Path, where: str) -> None:
    """The second finds it; the first says it, and neither waits for the other."""
    if where == "damaged":
        path = store(tmp_path).fill(numbers, progress=False).directory / "000001.safetensors"
        path.write_bytes(b"?")

    def make(indices: range) -> dict[str, torch.Tensor]:
        if 4 in indices:
            raise UserError("row 4 cannot be made")
        return numbers(indices)

    gathering, ended = Gathering(2), {}

    def work(index: int) -> None:
        try:
            store(tmp_path).fill(make, share=gathering.share(index), progress=False)
        except BaseException as error:
            ended[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    expected = "000001.safetensors is damaged" if where == "damaged" else "row 4 cannot be made"
    assert all(isinstance(error, UserError) and expected in str(error) for error in ended.values()), ended
    assert len(ended) == 2


def test_a_batch_does_not_load_a_shard(tmp_path: Path) -> None:
    """64 MiB of rows of 64 KiB, one of which is asked for."""

    def wide(indices: range) -> dict[str, torch.Tensor]:
        return {
            "x": torch.arange(indices[0], indices[-1] + 1).float()[:, None].expand(-1, 1 << 14).contiguous()
        }

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    Shards(tmp_path, "wide", {}, 1024, rows=1024).fill(wide, progress=False)
    fresh, before = Shards(tmp_path, "wide", {}, 1024), resident()
    assert fresh.rows([700])["x"].unique().tolist() == [700]
    assert resident() - before < 16 << 20


# --------------------------------------------------------------------------------------------------- conditions


def test_conditions_are_keyed_by_all_they_depend_on(tiny_sd: Path, tmp_path: Path) -> None:
    def key(change=lambda family: None, prompts=("a", "b")) -> str:
        family = SD(SD.Config(teacher=str(tiny_sd)))
        change(family)
        return next(iter(Conditions(family, [prompts], tmp_path).shards)).directory.name

    def weights(family) -> None:
        next(family.text_encoder.parameters()).data[0, 0] += 1

    def tokenizer(family) -> None:
        family.tokenizer.add_tokens(["more"])

    def length(family) -> None:
        family.tokenizer.model_max_length -= 1

    def size(family) -> None:
        family.resolution = (8, 8)

    def dtype(family) -> None:
        family.text_encoder.bfloat16()

    keys = [key(), key(weights), key(tokenizer), key(length), key(size), key(dtype), key(prompts=("b", "a"))]
    assert len(set(keys)) == len(keys) and key() == keys[0]
    latent_keys = set()
    for change in (
        lambda vae: None,
        lambda vae: vae.register_to_config(scaling_factor=0.5),
        lambda vae: vae.half(),
    ):
        family = SD(SD.Config(teacher=str(tiny_sd)))
        change(family.vae)
        latent_keys.add(family.latent_key())
    assert len(latent_keys) == 3


def test_a_family_answers_from_shards_and_its_encoders_come_back_for_other_prompts(
    tiny_sd: Path, tmp_path: Path
) -> None:
    family = SD(SD.Config(teacher=str(tiny_sd)))
    known, other = ["a red circle", "a blue square", "a red circle"], ["a green star"]
    expected = [family.encode(known), family.uncond(2), family.encode(other)]
    Conditions(family, [known, other[:0]], tmp_path).fill(progress=False).answer()
    assert family.text_encoder is None and "text_encoder" not in family.modules()
    assert torch.equal(family.encode(known), expected[0]) and torch.equal(family.uncond(2), expected[1])
    assert family.text_encoder is None
    assert torch.equal(family.encode(other), expected[2]) and family.text_encoder is not None
    forget(family)
    assert "encode" not in vars(family) and torch.equal(family.encode(known), expected[0])
    (index,) = tmp_path.glob("conditions-*/store.json")
    assert json.loads(index.read_text())["complete"] == 2
