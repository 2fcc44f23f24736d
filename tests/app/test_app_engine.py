"""The engine: one worker, two lanes, and requests that cannot hurt each other."""

from __future__ import annotations

import concurrent.futures
import threading
import time

import numpy as np
import pytest
from app_fakes import FakeSampler, engine_of, until

from app.batcher import PER_SESSION
from app.request import Busy, Cancelled, Invalid, Request
from stepdistill.errors import UserError

A = "a red circle"


def test_the_same_request_gives_the_same_image_and_another_seed_another(pair):
    engine, _, _ = pair
    one, two = (engine.generate(Request(A, seed=3)).image for _ in range(2))
    other = engine.generate(Request(A, seed=4)).image
    assert one.shape == (64, 64, 3) and one.dtype == np.uint8
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_teacher_and_student_run_from_one_seed(pair):
    engine, student, teacher = pair
    few = engine.generate(Request(A, seed=5))
    many = engine.generate(Request(A, seed=5, model="teacher"))
    assert student.calls == [(A, 5, 1)] and teacher.calls == [(A, 5, 50)]
    assert few.request.guidance_scale == 1.0 and many.request.guidance_scale == 3.0
    assert few.total == pytest.approx(sum(few.seconds[k] for k in ("text", "denoise", "decode")))
    assert many.total > few.total


def test_one_thread_runs_every_network_call(pair):
    engine, student, teacher = pair
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        models = ["student", "teacher"] * 8
        results = list(pool.map(lambda i: engine.generate(Request(A, seed=i, model=models[i])), range(16)))
    assert [r.request.seed for r in results] == list(range(16))
    assert student.threads == teacher.threads == {engine._thread.ident}


def test_a_poison_request_hurts_only_its_owner(pair, caplog):
    engine, _, _ = pair
    prompts = [A, "poison", A, "overflow", A]
    jobs = [engine.submit(Request(prompt, seed=1)) for prompt in prompts]
    good = [jobs[i].future.result(5).image for i in (0, 2, 4)]
    assert all(np.array_equal(image, good[0]) for image in good)
    with pytest.raises(UserError, match="the log has the details") as caught:
        jobs[1].future.result(5)
    assert "secret" not in str(caught.value) and "secret" in caplog.text
    with pytest.raises(UserError, match="not finite"):
        jobs[3].future.result(5)
    assert engine.state == "ready" and engine.metrics.counts()["failed"] == 1


def test_a_running_teacher_stops_at_its_next_step(pair):
    engine, _, teacher = pair
    teacher.gate.clear()
    teacher.began.clear()
    job = engine.submit(Request(A, model="teacher"), "me")
    assert teacher.began.wait(5)
    assert engine.cancel("someone else") == 0 and not job.stop.is_set()
    assert engine.cancel("me") == 1
    teacher.gate.set()
    with pytest.raises(Cancelled):
        job.future.result(5)
    assert job.progress[0] == 1
    assert engine.generate(Request(A)).image is not None


def test_a_waiting_request_can_be_dropped(pair):
    engine, student, _ = pair
    student.gate.clear()
    student.began.clear()
    running = engine.submit(Request(A, seed=1))
    assert student.began.wait(5)
    waiting = engine.submit(Request(A, seed=2), "me")
    assert engine.cancel("me") == 1
    student.gate.set()
    with pytest.raises(Cancelled):
        waiting.future.result(5)
    running.future.result(5)
    assert [call[1] for call in student.calls] == [1]


def test_the_newest_requests_of_a_session_win(pair):
    engine, student, _ = pair
    student.gate.clear()
    student.began.clear()
    first = engine.submit(Request(A, seed=0), "me")
    assert student.began.wait(5)
    count = PER_SESSION + 4
    jobs = [engine.submit(Request(A, seed=i), "me") for i in range(1, count + 1)]
    assert len(engine.batcher) == PER_SESSION
    student.gate.set()
    assert first.future.result(5)
    kept = [job.future.result(5).request.seed for job in jobs[-PER_SESSION:]]
    assert kept == list(range(count - PER_SESSION + 1, count + 1))
    for job in jobs[:-PER_SESSION]:
        with pytest.raises(Cancelled, match="newer"):
            job.future.result(5)


def test_of_what_is_drawn_live_only_the_newest_waits(pair):
    engine, student, _ = pair
    student.gate.clear()
    student.began.clear()
    engine.submit(Request(A, seed=0), "me", live=True)
    assert student.began.wait(5)
    kept = engine.submit(Request(A, seed=1), "me")
    jobs = [engine.submit(Request(A, seed=i), "me", live=True) for i in range(2, 9)]
    assert len(engine.batcher) == 2
    student.gate.set()
    assert jobs[-1].future.result(5).request.seed == 8 and kept.future.result(5).request.seed == 1


def test_a_student_does_not_wait_behind_a_teacher(pair):
    engine, student, teacher = pair
    student.delay, teacher.delay = 0.05, 0.01
    teacher.gate.clear()
    teacher.began.clear()
    slow = engine.submit(Request(A, model="teacher", steps=20))
    assert teacher.began.wait(5)
    quick = engine.submit(Request(A, seed=5))
    teacher.gate.set()
    result = slow.future.result(5)
    # Both are done: the student ran inside the teacher's run, and its time is not counted as the teacher's.
    assert quick.future.done() and quick.future.result().request.steps == 1
    assert slow.lent >= 0.05
    assert result.seconds["denoise"] == pytest.approx(teacher.spent - slow.lent)


def test_requests_are_checked_before_they_wait(pair):
    engine, student, _ = pair
    with pytest.raises(Invalid):
        engine.submit(Request("", seed=1))
    with pytest.raises(Invalid):
        engine.submit({"prompt": A, "steps": 3})
    assert not student.calls and len(engine.batcher) == 0


def test_a_thousand_cancelled_rounds_leave_nothing_behind(pair):
    engine, _, _ = pair
    threads = threading.active_count()
    for i in range(1000):
        job = engine.submit(Request(A, seed=i), "me")
        if i % 2:
            job.cancel()
        else:
            engine.cancel("me")
    until(lambda: len(engine.batcher) == 0 and not engine.batcher.running)
    assert threading.active_count() == threads
    assert engine.generate(Request(A, seed=1)).request.seed == 1


def test_a_request_that_comes_after_its_stop_does_not_start(pair):
    engine, student, _ = pair
    assert engine.cancel("me", through=7) == 0
    with pytest.raises(Cancelled):
        engine.submit(Request(A), "me", number=7)
    assert engine.submit(Request(A), "me", number=8).future.result(5)
    assert engine.submit(Request(A), "other", number=7).future.result(5)
    assert len(student.calls) == 2


def test_students_in_a_loop_do_not_starve_a_teacher(pair):
    engine, student, teacher = pair
    student.delay, teacher.delay = 0.01, 0.004
    ended = threading.Event()

    def loop(i):
        count = 0
        while not ended.is_set():
            engine.generate(Request(A, seed=i), f"loop {i}")
            count += 1
        return count

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        loops = [pool.submit(loop, i) for i in range(6)]
        try:
            began = time.perf_counter()
            engine.generate(Request(A, model="teacher"), "teacher", timeout=20)
            waited = time.perf_counter() - began
        finally:
            ended.set()
        assert all(loop.result(5) > 3 for loop in loops)
    # Two seconds until it is its turn, and then at least half of the device.
    assert waited < 6


def test_draining_draws_what_waits_and_takes_nothing_new(pair):
    engine, student, _ = pair
    student.gate.clear()
    student.began.clear()
    running = engine.submit(Request(A))
    assert student.began.wait(5)
    waiting = engine.submit(Request(A, seed=4))
    engine.drain(5)
    with pytest.raises(Busy, match="stopping"):
        engine.submit(Request(A))
    student.gate.set()
    assert running.future.result(5) and waiting.future.result(5)


def test_what_is_not_drawn_in_time_is_refused(pair):
    engine, student, _ = pair
    student.gate.clear()
    student.began.clear()
    running, waiting = engine.submit(Request(A)), None
    assert student.began.wait(5)
    waiting = engine.submit(Request(A, seed=4))
    engine.drain(0.05)
    with pytest.raises(Busy, match="stopping"):
        waiting.future.result(5)
    student.gate.set()
    with pytest.raises(Cancelled):
        running.future.result(5)


def test_the_report_says_what_is_in_effect(pair):
    report = pair[0].report()
    assert report["attention"] == "sdpa (1/1 layers)"
    assert report["models"] == {"student": "ready", "teacher": "ready"}
    with pytest.raises(UserError, match="xformers"):
        engine_of(attention="xformers")


def test_close_refuses_what_waits():
    student = FakeSampler("student")
    engine = engine_of(student, False)
    student.gate.clear()
    student.began.clear()
    running = engine.submit(Request(A))
    assert student.began.wait(5)
    waiting = engine.submit(Request(A))
    closer = threading.Thread(target=engine.close)
    closer.start()
    until(lambda: engine.state == "closed")
    student.gate.set()
    closer.join(5)
    for job in (running, waiting):
        with pytest.raises(Cancelled):
            job.future.result(5)
