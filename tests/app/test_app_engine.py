"""The engine: one worker, two lanes, and requests that cannot hurt each other."""

from __future__ import annotations

import concurrent.futures
import threading
import time

import numpy as np
import pytest
from app_fakes import FakeSampler, engine_of, tiny_pair

from app.batcher import PER_SESSION
from app.engine import Engine
from app.request import Busy, Cancelled, Invalid, Request
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


def test_what_comes_before_the_models_waits_for_them():
    hold = threading.Event()

    def load(path, **_):
        assert hold.wait(5)
        return FakeSampler("student")

    engine = Engine("S", False, loader=load, device="cpu").start()
    assert engine.report()["status"] == "loading"
    early, wrong = engine.submit(Request(A)), engine.submit(Request(A, steps=3))
    with pytest.raises(Invalid, match="at least 1"):
        engine.submit({"prompt": A, "steps": 0})
    hold.set()
    assert early.future.result(30).request.steps == 1
    with pytest.raises(Invalid, match="steps must be one of 1, 2, 4"):
        wrong.future.result(5)
    with pytest.raises(Invalid, match="model must be one of student"):
        engine.submit(Request(A, model="teacher"))
    engine.close()


def test_a_student_that_cannot_be_loaded_is_said_once_and_for_all():
    def load(path, **_):
        raise UserError("nothing at S.")

    engine = Engine("S", False, loader=load, device="cpu").start()
    for ask in (engine.wait, lambda: engine.submit(Request(A))):
        with pytest.raises(UserError, match="nothing at S"):
            ask()
    assert engine.report()["status"] == "failed" and engine.report()["problem"] == "nothing at S."
    engine.close()


def several(broken=()):
    """An engine of four students, whose loads are noted."""
    loads = []

    def load(path, **_):
        loads.append(str(path))
        if str(path) in broken:
            raise UserError(f"{path} is damaged.")
        sampler = FakeSampler("student")
        sampler.kind = f"student {path}"
        return sampler

    engine = Engine(["A", "B", "C", "D"], False, loader=load, device="cpu").start().wait(30)
    return engine, loads


def test_students_are_swapped_and_a_failed_load_leaves_the_old_one_serving():
    engine, loads = several(broken=["C"])
    assert list(engine.entries) == ["student", "B", "C", "D"] and loads == ["A"]
    first = engine.generate(Request(A, seed=1)).image
    other = engine.generate(Request(A, seed=1, model="B")).image
    assert not np.array_equal(first, other)
    with pytest.raises(UserError, match="C is damaged"):
        engine.generate(Request(A, seed=1, model="C"))
    with pytest.raises(UserError, match="C is damaged"):
        engine.submit(Request(A, model="C"))
    assert np.array_equal(engine.generate(Request(A, seed=1, model="B")).image, other)
    # Two are kept: the one used longest ago makes room.
    engine.generate(Request(A, seed=1, model="D"))
    assert set(engine.models.loaded) == {"B", "D"} and engine.entries["student"].state == "idle"
    assert np.array_equal(engine.generate(Request(A, seed=1)).image, first)
    assert loads == ["A", "B", "C", "D", "A"]
    engine.close()


def test_a_failed_teacher_leaves_the_student_serving():
    def load(path, **_):
        if str(path) == "T":
            raise UserError("nothing at T.")
        return FakeSampler("student")

    engine = Engine("S", "T", loader=load, device="cpu").start().wait(30)
    until(lambda: engine.entries["teacher"].state == "failed")
    assert engine.generate(Request(A)).request.model == "student" and engine.state == "ready"
    with pytest.raises(UserError, match="nothing at T"):
        engine.submit(Request(A, model="teacher"))
    engine.close()


# Batches ----------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    tiny_pair(root)
    return root


def test_real_pipelines_are_served_as_the_sampler_draws_them(tiny):
    import stepdistill

    engine = Engine(tiny / "student", tiny / "teacher", device="cpu", attention="flash").start().wait(60)
    result = engine.generate(Request(A, seed=3, steps=2))
    until(lambda: engine.entries["teacher"].state == "ready", 60)
    engine.close()
    direct = stepdistill.load(tiny / "student")([A], [3], steps=2, chunk=1)[0].permute(1, 2, 0).numpy()
    # Another attention kernel may round a grey level differently, no more.
    assert np.abs(result.image.astype(int) - direct).max() <= 1
    assert result.about["attention"] == "flash (8/8 layers)"
    limits = engine.limits
    assert limits["student"].steps == (1, 2, 4) and limits["teacher"].default_guidance == 3.0
    assert min(result.seconds.values()) > 0


def damaged(tiny, tmp_path, part, change):
    """A copy of the student with the weights of a part changed: the sentence that it is refused with."""
    import shutil

    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny / "student", tmp_path / "broken")
    (file,) = (broken / part).glob("*.safetensors")
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})
    return broken


def refused(directory):
    engine = Engine(directory, False, device="cpu").start()
    with pytest.raises(UserError) as caught:
        engine.wait(60)
    engine.close()
    return str(caught.value)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_a_directory_that_lacks_weights_is_refused_by_their_names(tiny, tmp_path, part):
    gone = []

    def forget(weights):
        gone.append(next(name for name in weights if name.endswith("weight")))
        del weights[gone[0]]

    said = refused(damaged(tiny, tmp_path, part, forget))
    assert "lacks" in said and gone[0].split(".", 1)[1] in said and f"broken/{part}" in said


def test_a_file_that_is_cut_off_is_called_corrupt(tiny, tmp_path):
    broken = damaged(tiny, tmp_path, "unet", lambda weights: None)
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    said = refused(broken)
    assert "corrupt" in said and file.name in said


def test_weights_that_overflow_are_noticed(tiny, tmp_path):
    def overflow(weights):
        weights["conv_out.bias"] += float("inf")

    assert "is not finite" in refused(damaged(tiny, tmp_path, "unet", overflow))


def test_an_image_has_the_same_bytes_alone_and_in_any_batch(tiny):
    engine = Engine(tiny / "student", False, device="cpu").start().wait(60)
    model = engine.models.loaded["student"]
    until(lambda: not model._untried, 120)
    # On some machines two alike differ; of eight, as many users are drawn at, none does.
    assert {1, 8} <= set(model.sizes)
    alone = [engine.generate(Request(f"a red circle {i}", seed=i)).image for i in range(5)]
    jobs = engine.submit([Request(f"a red circle {i}", seed=i) for i in range(5)])
    results = [job.future.result(30) for job in jobs]
    engine.close()
    # Five run as eight, filled up, or the first alone where the worker was quicker.
    assert max(result.batch for result in results) >= 4
    for one, result in zip(alone, results, strict=True):
        assert np.array_equal(one, result.image)


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
