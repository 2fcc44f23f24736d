"""Times: stages, turns, batches and speed-ups, of samplers that only report them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evaluation.metrics.latency import latencies, timings
from evaluation.values import flat
from stepdistill.drawing import Drawer


class Sleeper:
    """Stands for a Sampler: reports times that grow with the steps."""

    def __init__(self, per_call: float) -> None:
        self.per_call = per_call
        self.asked: list[tuple] = []
        self.device, self.traced = torch.device("cpu"), False

    def trace(self) -> None:
        self.traced = True

    def calls(self, guidance: float) -> int:
        return 1 if guidance == 1 else 2

    def draw(self, drawer: Drawer, prompts, seeds, on_step, negatives, timings, images) -> Tensor:
        self.asked.append((tuple(prompts), tuple(seeds), drawer.chunk))
        timings |= {"text": 0.001, "denoise": self.per_call * drawer.nfe, "decode": 0.002}
        return torch.zeros(len(prompts), 3, 8, 8, dtype=torch.uint8)


def both() -> tuple[Drawer, Drawer]:
    """A student at two steps and a teacher at fifty with guidance."""
    return Drawer(Sleeper(0.004), 2, 1.0, chunk=64), Drawer(Sleeper(0.003), 50, 3.0, chunk=64)


def test_latency_splits_stages_and_takes_turns() -> None:
    drawers = both()
    own, other = timings(drawers, ["a", "b"], images=3, batch=0)
    assert "throughput" not in own
    assert (own["denoise_ms"], own["nfe"], own["ms_per_call"]) == pytest.approx((8, 2, 4))
    assert (other["denoise_ms"], other["nfe"], other["ms_per_call"]) == pytest.approx((300, 100, 3))
    assert (own["text_ms"], own["decode_ms"]) == pytest.approx((1, 2))
    assert own["ms_p90"] >= own["ms"] > 0
    student = drawers[0].sampler
    # A warm-up comes first.
    assert [asked[0] for asked in student.asked] == [("a",), ("a",), ("b",), ("a",)]
    for drawer in drawers:
        assert [asked[1] for asked in drawer.sampler.asked] == [(0,), (0,), (1,), (2,)]
        assert drawer.sampler.traced
    assert all(asked[2] == 1 for asked in student.asked)
    student, teacher = map(flat, latencies(drawers, ["a"], images=1, batch=0))
    assert student["latency/speedup_denoise"] == pytest.approx(300 / 8) and "latency/speedup" not in teacher


def test_throughput_is_of_full_batches_in_turns() -> None:
    drawers = both()
    own, other = timings(drawers, ["a", "b"], images=1, batch=4)
    batches = [asked for asked in drawers[0].sampler.asked if len(asked[0]) == 4]
    # A warm-up comes first.
    assert [asked[0] for asked in batches] == [("a", "b", "a", "b")] * 4
    assert [asked[1] for asked in batches] == [(0, 1, 2, 3), (0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    assert all(asked[2] == 4 for asked in batches)
    assert own["throughput_batch"] == 4 and own["throughput"] > 0
    stages = [own[f"throughput_{stage}_ms"] for stage in ("text", "denoise", "decode")]
    assert stages == pytest.approx([1 / 4, 8 / 4, 2 / 4])
    assert other["throughput_denoise_ms"] == pytest.approx(300 / 4)
