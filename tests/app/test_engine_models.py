"""The engine's models: loaded while requests wait, swapped, refused where they are damaged, and served as the sampler draws."""

from __future__ import annotations

import shutil
import threading

import numpy as np
import pytest
from app_fakes import FakeSampler, engine_of, tiny_pair, until
from safetensors.torch import load_file, save_file

import stepdistill
from app.engine import Engine
from app.request import Invalid, Request
from stepdistill.errors import UserError

A = "a red circle"


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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    tiny_pair(root)
    return root


def test_real_pipelines_are_served_as_the_sampler_draws_them(tiny):
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
