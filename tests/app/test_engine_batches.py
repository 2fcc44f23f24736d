"""The engine's batches: who waits is drawn together, and nobody suffers for another's request."""

from __future__ import annotations

import numpy as np
import pytest
from app_fakes import FakeSampler, engine_of

from app.request import Cancelled, Request
from stepdistill.errors import UserError

A = "a red circle"


@pytest.fixture()
def four():
    """An engine whose networks run four images at once, with its first batch held at the gate."""
    student = FakeSampler("student")
    engine = engine_of(student, False, batch=4)
    student.gate.clear()
    student.began.clear()
    held = engine.submit(Request(A, seed=99))
    assert student.began.wait(5)
    yield engine, student
    student.gate.set()
    assert held.future.result(5)
    engine.close()


def test_who_waits_is_drawn_together_and_each_gets_his_own(four):
    engine, student = four
    jobs = [engine.submit(Request(f"{A} {i}", seed=i), str(i)) for i in range(6)]
    other = engine.submit(Request(A, seed=7, steps=2), "other")
    student.gate.set()
    results = [job.future.result(5) for job in jobs]
    assert [result.request.seed for result in results] == list(range(6))
    assert [result.request.prompt for result in results] == [f"{A} {i}" for i in range(6)]
    assert [result.batch for result in results] == [4] * 4 + [2] * 2 and other.future.result(5).batch == 1
    # One size of the networks, whoever waits.
    assert set(student.chunks) == {4}
    alone = engine.generate(Request(f"{A} 3", seed=3))
    assert np.array_equal(alone.image, results[3].image)


def test_in_a_batch_a_poison_request_hurts_only_its_owner(four):
    engine, student = four
    prompts = [A, "poison", "overflow", A]
    jobs = [engine.submit(Request(prompt, seed=1), str(i)) for i, prompt in enumerate(prompts)]
    student.gate.set()
    assert np.array_equal(jobs[0].future.result(5).image, jobs[3].future.result(5).image)
    with pytest.raises(UserError, match="the log has the details"):
        jobs[1].future.result(5)
    with pytest.raises(UserError, match="not finite"):
        jobs[2].future.result(5)


def test_when_memory_runs_out_batches_become_smaller(four):
    engine, student = four
    jobs = [engine.submit(Request(f"memory {i}", seed=i), str(i)) for i in range(4)]
    student.gate.set()
    assert [job.future.result(5).request.seed for job in jobs] == list(range(4))
    assert engine._cap(jobs[0].key) == 1 and engine.metrics.counts()["out_of_memory"] >= 1


def test_one_of_a_batch_can_be_stopped(four):
    engine, student = four
    mine = engine.submit(Request(A, seed=1), "me")
    other = engine.submit(Request(A, seed=2), "other")
    assert engine.cancel("me") == 1
    student.gate.set()
    with pytest.raises(Cancelled):
        mine.future.result(5)
    assert other.future.result(5).request.seed == 2
