"""The engine: one worker, two lanes, and requests that cannot hurt each other."""

from __future__ import annotations

import concurrent.futures
import threading
import time

import numpy as np
import pytest
from app_fakes import FakeSampler, engine_of, tiny_pair

from app.engine import Engine
from app.lanes import PER_SESSION, QUEUE
from app.request import Busy, Cancelled, Invalid, NumericalFailure, Request
from stepdistill.errors import UserError

A = "a red circle"


@pytest.fixture()
def pair():
    student, teacher = FakeSampler("student"), FakeSampler("teacher")
    engine = engine_of(student, teacher)
    yield engine, student, teacher
    student.gate.set()
    teacher.gate.set()
    engine.close()
    assert not engine._thread.is_alive()


def until(condition, seconds=5.0):
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, "waited too long"
        time.sleep(0.002)


def test_the_same_request_gives_the_same_image_and_another_seed_another(pair):
    engine, _, _ = pair
    one, two = (engine.generate(Request(A, seed=3)).shots["student"].image for _ in range(2))
    other = engine.generate(Request(A, seed=4)).shots["student"].image
    assert one.shape == (64, 64, 3) and one.dtype == np.uint8
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_both_run_from_one_seed_and_the_speedup_is_told(pair):
    engine, student, teacher = pair
    result = engine.generate(Request(A, model="both"))
    assert student.calls == [(A, result.request.seed, 1)]
    assert teacher.calls == [(A, result.request.seed, 50)]
    assert result.shots["student"].guidance_scale == 1.0 and result.shots["teacher"].guidance_scale == 3.0
    assert result.speedup > 1
    assert result.shots["student"].timings["total"] == pytest.approx(
        sum(result.shots["student"].timings[k] for k in ("text", "denoise", "decode"))
    )


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
    good = [jobs[i].future.result(5).shots["student"].image for i in (0, 2, 4)]
    assert all(np.array_equal(image, good[0]) for image in good)
    with pytest.raises(UserError, match="the log has the details") as caught:
        jobs[1].future.result(5)
    assert "secret" not in str(caught.value) and "secret" in caplog.text
    with pytest.raises(NumericalFailure, match="NaN"):
        jobs[3].future.result(5)
    assert engine.state == "ready" and engine.counts["failed"] == 1


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
    assert engine.generate(Request(A)).shots


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
    jobs = [engine.submit(Request(A, seed=i), "me") for i in range(1, 20)]
    assert len(engine.lanes) == PER_SESSION
    student.gate.set()
    assert first.future.result(5)
    assert [job.future.result(5).request.seed for job in jobs[-PER_SESSION:]] == [18, 19]
    for job in jobs[:-PER_SESSION]:
        with pytest.raises(Cancelled, match="newer"):
            job.future.result(5)


def test_the_queue_is_bounded(pair):
    engine, student, _ = pair
    student.gate.clear()
    student.began.clear()
    jobs = [engine.submit(Request(A, seed=0), "0")]
    assert student.began.wait(5)
    jobs += [engine.submit(Request(A, seed=i), str(i)) for i in range(1, QUEUE + 1)]
    with pytest.raises(Busy, match="try again"):
        engine.submit(Request(A), "one too many")
    student.gate.set()
    assert [job.future.result(10).request.seed for job in jobs] == list(range(QUEUE + 1))


def test_a_student_does_not_wait_behind_a_teacher(pair):
    engine, student, teacher = pair
    student.delay = 0.05
    teacher.gate.clear()
    teacher.began.clear()
    slow = engine.submit(Request(A, model="teacher", steps=20))
    assert teacher.began.wait(5)
    quick = engine.submit(Request(A, seed=5))
    teacher.gate.set()
    shot = slow.future.result(5).shots["teacher"]
    # Both are done: the student ran inside the teacher's run, and its time is not counted as the teacher's.
    assert quick.future.done() and quick.future.result().shots["student"].steps == 1
    assert slow.lent >= 0.05
    assert shot.denoise == pytest.approx(teacher.spent - slow.lent)


def test_requests_are_checked_before_they_wait(pair):
    engine, student, _ = pair
    with pytest.raises(Invalid):
        engine.submit(Request("", seed=1))
    with pytest.raises(Invalid):
        engine.submit({"prompt": A, "steps": 3})
    assert not student.calls and len(engine.lanes) == 0


def test_a_thousand_cancelled_rounds_leave_nothing_behind(pair):
    engine, _, _ = pair
    threads = threading.active_count()
    for i in range(1000):
        job = engine.submit(Request(A, seed=i), "me")
        if i % 2:
            job.cancel()
        else:
            engine.cancel("me")
    until(lambda: len(engine.lanes) == 0 and not engine.lanes.running)
    assert threading.active_count() == threads
    assert engine.generate(Request(A, seed=1)).shots


def test_before_the_models_are_there_requests_are_turned_away():
    hold = threading.Event()

    def load(path, **_):
        assert hold.wait(5)
        return FakeSampler("student")

    engine = Engine("S", False, loader=load, device="cpu").start()
    assert engine.report()["status"] == "loading"
    with pytest.raises(Busy, match="loading"):
        engine.submit(Request(A))
    hold.set()
    engine.wait(30)
    assert engine.generate(Request(A)).shots
    with pytest.raises(Invalid, match="needs a teacher"):
        engine.submit(Request(A, model="both"))
    engine.close()


def test_a_model_that_cannot_be_loaded_is_said_once_and_for_all():
    def load(path, **_):
        raise UserError("nothing at S.")

    engine = Engine("S", False, loader=load, device="cpu").start()
    for ask in (engine.wait, lambda: engine.submit(Request(A))):
        with pytest.raises(UserError, match="nothing at S"):
            ask()
    assert engine.report() == {
        "status": "failed",
        "device": "cpu",
        "dtype": "float32",
        "problem": "nothing at S.",
    }
    engine.close()


def test_the_report_says_what_is_in_effect(pair):
    report = pair[0].report()
    assert report["attention"] == "sdpa (1/1 layers)"
    assert (report["student"], report["teacher"], report["steps"]) == (
        "fake-student",
        "fake-teacher",
        [1, 2, 4],
    )
    with pytest.raises(UserError, match="xformers"):
        engine_of(attention="xformers")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    tiny_pair(root)
    return root


def test_real_pipelines_are_served_as_the_sampler_draws_them(tiny):
    import stepdistill

    engine = Engine(tiny / "student", tiny / "teacher", device="cpu", attention="flash").start().wait(60)
    result = engine.generate(Request(A, seed=3, steps=2))
    engine.close()
    direct = stepdistill.load(tiny / "student")([A], [3], steps=2, chunk=1)[0].permute(1, 2, 0).numpy()
    # Another attention kernel may round a grey level differently, no more.
    assert np.abs(result.shots["student"].image.astype(int) - direct).max() <= 1
    assert result.about["attention"] == "flash (8/8 layers)"
    assert engine.limits.steps == (1, 2, 4) and engine.limits.teacher_guidance == 3.0
    assert min(result.shots["student"].timings.values()) > 0


def test_weights_that_overflow_are_noticed(tiny, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny / "student", tmp_path / "broken")
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"] += float("inf")
    save_file(weights, file)
    engine = Engine(broken, False, device="cpu").start()
    with pytest.raises(UserError, match="is not finite"):
        engine.wait(60)
    engine.close()


def test_classes_reach_the_sampler_as_numbers():
    student = FakeSampler("student", conditions="class", class_names=("horse", "ship"))
    engine = engine_of(student, False)
    engine.generate(Request("ship", seed=1))
    assert student.calls == [(1, 1, 1)]
    engine.close()


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
