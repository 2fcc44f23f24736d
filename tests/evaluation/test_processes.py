"""The same bits for any I/O batch, any number of processes, and after a kill."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import two_processes
from torch import Tensor

import evaluation
from evaluation import generate
from evaluation.__main__ import main
from evaluation.feature_net import FeatureNet
from evaluation.images import Images
from evaluation.processes import Processes
from stepdistill.errors import UserError

pytestmark = pytest.mark.usefixtures("no_plots")

ROOT = Path(__file__).resolve().parents[2]
# Three shards, the last one short; two beside them.
SHARD, N, BESIDE = 32, 75, 40
PROTOCOL = """\
{name: tiny, version: 1, n: 75, conditions: scenes, quantise: edm, resize: {size: 24, filter: bicubic},
 metrics: [fd, diversity], companion: SEEDS, reference: {kind: scenes, n: 60}}
"""
SEEDS = """\
{name: seeds, version: 1, n: 40, conditions: scenes, images_per_prompt: 2, quantise: edm, metrics: [diversity], reference: null}
"""


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_sd) -> dict[str, str]:
    """A pipeline, a protocol and a feature net, all tiny, and the options that name them."""
    folder = tmp_path_factory.mktemp("setting")
    (folder / "tiny.yaml").write_text(PROTOCOL.replace("SEEDS", str(folder / "seeds.yaml")))
    (folder / "seeds.yaml").write_text(SEEDS)
    torch.manual_seed(0)
    FeatureNet("tiny", 32, 16, {"label": ["a", "b"]}).save(folder / "net")
    options = {"pipeline": tiny_sd, "protocol": folder / "tiny.yaml", "extractor": folder / "net"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "SHARD", SHARD)
        patch.setenv("STEPDISTILL_CACHE", str(folder / "cache"))
        yield {name: str(value) for name, value in options.items()} | {"folder": str(folder)}


def command(setting: dict[str, str], out: Path, *more: object) -> list[str]:
    given = [part for name in ("pipeline", "protocol", "extractor") for part in (f"--{name}", setting[name])]
    fixed = ["--steps", "1", "--guidance", "1", "--batch", "16", "--out", str(out)]
    return ["run", *given, *fixed, *map(str, more)]


def numbers(out: Path) -> tuple[dict, dict, str]:
    results = json.loads((out / "results.json").read_text())
    (row,) = results["rows"]
    return row["metrics"], row["folds"], results["protocol_hash"]


@pytest.fixture(scope="module")
def alone(setting, tmp_path_factory) -> tuple[dict, dict, str]:
    out = tmp_path_factory.mktemp("alone")
    main(command(setting, out))
    assert {"fd:tiny", "diversity:tiny"} <= numbers(out)[0].keys()
    return numbers(out)


@pytest.mark.parametrize("io_batch", [1, 7, 64])
def test_io_batches_give_the_same_bits(setting, alone, tmp_path, io_batch: int) -> None:
    """Even of one image, which pads every call to the 16 of the networks."""
    main(command(setting, tmp_path / "out", "--io-batch", io_batch))
    assert numbers(tmp_path / "out") == alone


def test_two_processes_give_the_same_bits(setting, alone, tmp_path, monkeypatch) -> None:
    # So that the reference is computed by both.
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))

    def measure(rank: int) -> None:
        with open(tmp_path / f"said-{rank}", "w") as said, contextlib.redirect_stdout(said):
            main(command(setting, tmp_path / "out"))

    two_processes(measure)
    assert numbers(tmp_path / "out") == alone
    assert json.loads((tmp_path / "out" / "results.json").read_text())["processes"] == 2
    # One of them speaks.
    assert ["written:" in (tmp_path / f"said-{rank}").read_text() for rank in range(2)] == [True, False]


@pytest.mark.slow
def test_accelerate_launch(setting, alone, tmp_path) -> None:
    launch = ["-m", "accelerate.commands.launch", "--config_file", "training/accelerate/2cpu.yaml"]
    line = [sys.executable, *launch, "-m", "evaluation", *command(setting, tmp_path / "out")]
    subprocess.run(line, cwd=ROOT, check=True)
    assert numbers(tmp_path / "out") == alone


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(setting, alone, tmp_path, monkeypatch) -> None:
    asked: list[int] = []
    drawn, limit = generate.drawn, SHARD + 16

    def counted(sample, prompts, seeds) -> Tensor:
        if len(asked) >= limit:
            raise KeyboardInterrupt
        asked.extend(seeds)
        return drawn(sample, prompts, seeds)

    monkeypatch.setattr(generate, "drawn", counted)
    with pytest.raises(SystemExit) as stopped:
        main(command(setting, tmp_path / "out", "--io-batch", 16))
    assert stopped.value.code == 130 and not (tmp_path / "out" / "results.json").exists()
    asked.clear()
    limit = N + BESIDE
    main(command(setting, tmp_path / "out"))
    # The shard that was finished is not drawn again.
    assert asked == [*range(SHARD, N), *range(BESIDE)]
    assert numbers(tmp_path / "out") == alone


def test_evaluate_gives_the_same_bits_for_every_batch_and_spills_to_disk(setting, monkeypatch) -> None:
    from stepdistill import load

    sampler = load(setting["pipeline"])

    draw = sampler.at(1, 1, chunk=8)
    options = {
        "protocol": setting["protocol"],
        "extractor": setting["extractor"],
        "n": 60,
        "metrics": ("fd",),
    }
    found = [evaluation.evaluate(draw, batch=batch, **options) for batch in (7, 64)]
    monkeypatch.setattr(generate, "IN_MEMORY", 20 * 3 * 16 * 16)
    held: list[type] = []
    inner = generate.kept
    monkeypatch.setattr("evaluation.measure.kept", lambda *given: held.append(inner(*given)) or held[-1])
    assert found[0] == found[1] == evaluation.evaluate(draw, batch=16, **options)
    assert isinstance(held[0], generate.Shards) and len(held[0]) == 60


def test_kept_keeps_order_on_both_sides_of_the_limit(tmp_path, monkeypatch) -> None:
    images = (
        torch.arange(300, dtype=torch.int64)
        .remainder(251)
        .to(torch.uint8)
        .view(-1, 1, 1, 1)
        .expand(-1, 3, 4, 4)
    )
    for limit in (1 << 20, 1000):
        monkeypatch.setattr(generate, "IN_MEMORY", limit)
        found: Images = generate.kept(iter(images.split(7)), tmp_path)
        assert len(found) == 300 and torch.equal(torch.cat(list(found)), images)
    assert isinstance(found, generate.Shards)


def test_work_is_dealt_out_completely_and_once() -> None:
    dealt = [[index for index in range(10) if Processes(rank, 3).mine(index)] for rank in range(3)]
    assert sorted(itertools.chain(*dealt)) == list(range(10)) and all(dealt)


def test_messages_of_processes(monkeypatch) -> None:
    assert Processes().from_first(lambda: 3) == 3 and Processes().first
    assert Processes(1, 2).device("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Processes(1, 2).device("cuda") == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        # Set first, so that what accelerate puts there is taken back.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but the processes cannot find each other"):
        Processes.join()


def test_samples_another_disk_holds_are_missed(tmp_path) -> None:
    class Half(Processes):
        def wait(self) -> None:
            pass

    def draw(prompts, seeds) -> Tensor:
        return torch.zeros(len(seeds), 3, 4, 4, dtype=torch.uint8)

    configuration = generate.Configuration("p", "0", "h", 1, 1.0, 8, "cpu")
    with pytest.raises(UserError, match="must be on a disk all of them see"):
        generate.generate(draw, configuration, ["a"] * 300, range(300), tmp_path, processes=Half(0, 2))
    found = generate.generate(draw, configuration, ["a"] * 300, range(300), tmp_path, processes=Half(1, 2))
    assert np.sum([len(batch) for batch in found]) == 300
