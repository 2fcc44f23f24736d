"""What a recipe takes on a cluster: shares of memory, bytes sent, products counted, and what is refused."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import sd
from torch import nn

from training import hardware, plan
from training.forecast import forecast
from training.hardware import GPUS
from training.ledger import META, Ledger
from training.run import build

MEASURED = Path(__file__).parents[2] / "benchmarks" / "plan.json"


@pytest.fixture(scope="module")
def planned(tmp_path_factory, tiny_sd):
    stage = sd(tmp_path_factory.mktemp("plan"), tiny_sd).stages()[0]
    family, sources = build(stage)
    return stage, forecast(stage, family, sources[0], 2)


def test_one_process_holds_what_is_forecast(planned):
    _, said = planned
    held = plan.memory(said, plan.Shares(1, 1))
    assert held.keys() == said.phases.keys()
    for phase, size in held.items():
        assert size == pytest.approx(said.phases[phase], rel=0.01)


def test_copies_gather_gradients_in_as_much_again_and_shards_divide_what_lasts(planned):
    _, said = planned
    one, copies = (plan.memory(said, plan.Shares(1, count)) for count in (1, 2))
    gradients = sum(each.gradients for each in said.networks.values())
    assert copies["critic"] - one["critic"] == gradients
    shards = [plan.memory(said, plan.Shares(parts, 1))["critic"] for parts in (2, 4, 8)]
    assert copies["critic"] > shards[0] > shards[1] > shards[2]
    lasting = said.lasting - sum(said.helpers.values())
    trained = sum(said.networks[name].gradients for name in said.work["critic"].trains)
    assert shards[0] - shards[1] == pytest.approx((lasting + trained) / 4)


def test_bytes_sent_are_those_of_rings(planned):
    _, said = planned
    work = said.work["critic"]
    trained = sum(said.networks[name].gradients for name in work.trains)
    assert plan.sent(said, work, 3, plan.Shares(1, 1)) == (0, 0)
    assert plan.sent(said, work, 3, plan.Shares(1, 2)) == (pytest.approx(trained), 0)
    within, beyond = plan.sent(said, work, 1, plan.Shares(2, 1))
    assert within > trained / 2 and beyond == 0
    assert plan.sent(said, work, 1, plan.Shares(8, 8))[1] == pytest.approx(2 * trained / 8 * 7 / 8)


def test_more_of_the_same_takes_less_time_and_what_is_too_large_does_not_fit(planned, capsys):
    stage, said = planned
    gpu = GPUS["h100-80g"]
    found = plan.ways(stage, {"": said}, 2, gpu)
    assert [each.name for each in found][:2] == ["DDP", "FSDP2"]
    assert all(each.fits(gpu) and each.seconds > 0 for each in found)
    # A student's update in two iterations, a critic's in each.
    assert found[0].samples == 1.5 * stage.optim.batch_size
    assert not found[0].fits(plan.GPU(3, 989, 67, 3350, 450, 50))
    assert plan.lines(stage, found, 2, gpu, 2.0)[-1] == "  take DDP"


def test_this_cpu_is_what_it_was_seen_to_do(monkeypatch, planned):
    monkeypatch.setattr(hardware, "SIDE", 8)
    monkeypatch.setattr(hardware, "COPIED", 1000)
    # A second passes whenever it is looked at.
    cpu = hardware.this_cpu(itertools.count().__next__)
    assert cpu.single == cpu.half == 2 * 8**3 / 1e12
    assert cpu.bandwidth == 2 * 4 * 1000 / 1e9 and cpu.efficiency == 1 and cpu.memory > 0.5
    stage, said = planned
    (half,) = plan.ways(stage, {"": said}, 1, replace(cpu, single=2 * cpu.single, bandwidth=1e9))
    (found,) = plan.ways(stage, {"": said}, 1, replace(cpu, bandwidth=1e9))
    assert found.seconds == pytest.approx(2 * half.seconds, rel=1e-3)


def test_products_of_all_kinds_are_counted():
    layer, x = nn.Linear(8, 16, bias=False, device=META), torch.empty(4, 8, device=META)
    with Ledger({"layer": layer}) as ledger:
        layer(x).sum().backward()
    # The input wants no gradient.
    assert ledger.flops == 2 * (2 * 4 * 8 * 16)
    assert ledger.calls == {("layer", True): 1}
    assert ledger.live["gradients"] == 4 * 8 * 16 and ledger.peak.total() - ledger.passes <= 4 * 8 * 16
    with Ledger({}) as ledger, torch.no_grad():
        q, k = torch.empty(1, 2, 5, 4, device=META), torch.empty(1, 2, 7, 4, device=META)
        nn.functional.scaled_dot_product_attention(q, k, k)
    assert ledger.flops == 2 * 2 * (2 * 5 * 7 * 4)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--gpu", "abacus"], "--gpu abacus: there are h100-80g"),
        (["--gpus", "12"], "--gpus 12: give 1 to 8, or a multiple of 8"),
        (["--gpu", "this-cpu", "--gpus", "8"], "there is one of it; add --gpus 1"),
        (["--price", "-1"], "--price -1: give 0 or more"),
        (["--layout", "sd9"], "--layout sd9: there are sdxl"),
        (["optim.batch_size=100"], r"optim\.batch_size=100 must be a multiple of 96"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(given, says, capsys):
    with pytest.raises(SystemExit) as ended:
        plan.main(["training/recipes/toy_dmd2.yaml", *given])
    assert ended.value.code == 2

    assert re.search(says, capsys.readouterr().err)


def test_measured_runs_took_what_was_planned():
    kept = json.loads(MEASURED.read_text())
    assert len(kept["cases"]) >= 4
    for name, case in kept["cases"].items():
        # A plan that says too little ends in a run that has no room; too much is the lesser fault.
        assert 0.85 < case["ratio"] < 1.25, name
