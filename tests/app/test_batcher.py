"""Turns: who is drawn next and with whom, by a clock of our own."""

from __future__ import annotations

import pytest

from app import batcher
from app.batcher import Batcher, Job
from app.request import Busy, Cancelled, Request


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture()
def clock():
    return Clock()


def job(seed, session=None, steps=1, model="student", **fields):
    return Job(Request("a", seed=seed, steps=steps, model=model, guidance_scale=1.0), session, **fields)


def seeds(jobs):
    return [one.request.seed for one in jobs]


def test_whether_there_is_room_can_be_asked_without_a_job():
    batcher = Batcher()
    jobs = [Job(Request("a", steps=1)) for _ in range(3)]
    batcher.add(jobs)
    assert batcher.full() is None
    batcher.took(jobs[0].key, 11.0, 1)
    busy = batcher.full()
    assert busy.retry_after == 3 and "3 images are waiting" in str(busy)


def test_every_sessions_first_comes_before_anybodys_second(clock):
    line = Batcher(lambda key: 3, clock)
    line.add([job(i, "many") for i in range(6)])
    for seed, session in ((10, "b"), (11, "c"), (12, None)):
        line.add([job(seed, session)])
    assert seeds(line.take()) == [0, 10, 11]
    # What runs counts as a turn that was had.
    assert seeds(line.take()) == [12, 1, 2]
    assert seeds(line.take()) == [3, 4, 5] and line.take() == []


def test_a_batch_has_one_key_and_nobody_is_waited_for(clock):
    line = Batcher(lambda key: 8, clock)
    line.add([job(1)])
    assert seeds(line.take()) == [1]
    for one in (job(1), job(2, steps=2), job(3), job(4, model="b"), job(5)):
        line.add([one])
    assert [seeds(line.take()) for _ in range(3)] == [[1, 3, 5], [2], [4]]


def test_what_is_drawn_live_comes_a_turn_later(clock):
    line = Batcher(lambda key: 1, clock)
    line.add([job(1, "typing", live=True)])
    line.add([job(2, "waiting")])
    assert seeds(line.take()) == [2] and seeds(line.take()) == [1]


def test_a_long_run_waits_behind_short_ones_but_not_for_ever(clock):
    line = Batcher(lambda key: 8, clock)
    line.add([job(0, steps=50, model="teacher")])
    line.add([job(1)])
    assert seeds(line.take()) == [1]
    line.add([job(2)])
    clock.now = batcher.PATIENCE + 0.1
    assert line.take(short_only=True) and line.take(short_only=True) == []
    line.add([job(3)])
    assert seeds(line.take()) == [0] and seeds(line.take()) == [3]


def test_a_wait_that_would_be_too_long_is_refused_with_its_end(clock):
    line = Batcher(lambda key: 1, clock)
    line.took(("student", 1, 1.0, False), 8.0, 1)
    for i in range(4):
        line.add([job(i, str(i))])
    with pytest.raises(Busy, match="4 images are waiting") as caught:
        line.add([job(9, "late")])
    assert caught.value.retry_after == 2
    # The estimate follows what images take.
    for _ in range(40):
        line.took(("student", 1, 1.0, False), 0.1, 1)
    assert line.add([job(9, "late")]) == 0


def test_stop_ends_what_came_before_it_and_no_other(clock):
    line = Batcher(lambda key: 1, clock)
    old, new = job(1, "me", number=3), job(2, "me", number=5)
    line.add([old])
    line.add([new])
    line.add([job(3, "other", number=1)])
    assert line.cancel("me", through=4) == 1 and isinstance(old.future.exception(0), Cancelled)
    with pytest.raises(Cancelled):
        line.add([job(4, "me", number=4)])
    assert seeds(line.take()) == [2] and seeds(line.take()) == [3]


def test_stops_are_remembered_of_so_many_sessions(monkeypatch, clock):
    monkeypatch.setattr(batcher, "REMEMBERED", 3)
    line = Batcher(clock=clock)
    for i in range(10):
        line.cancel(str(i), through=1)
    assert len(line._stops) == 3
