"""A student's networks as ONNX: the same images, drawn by whatever loads its directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import worlds
from stock import exported

from app.catalog import Entry
from app.model import Model
from app.request import Request
from evaluation.generate import Configuration
from evaluation.protocol import PROTOCOLS
from stepdistill import load, onnx_form
from stepdistill.errors import UserError
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from training.export import to_onnx

PROMPTS = ["a small red circle on a black background", "a large blue star"]


def student(kind: str, teacher: Path, path: Path, method: str = "dmd2"):
    family = {"sd": SD, "pixel": Pixel}[kind]
    family = family(family.Config(teacher=str(teacher)))
    return exported(family, worlds.method(method, steps=(1, 4)), path, {"teacher": str(teacher)})


@pytest.mark.parametrize(("kind", "method"), [("sd", "dmd2"), ("sd", "lcm"), ("pixel", "dmd2")])
def test_a_loaded_directory_draws_by_its_onnx_files_what_it_drew_before(
    kind, method, request, tmp_path, monkeypatch
):
    pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    path = tmp_path / "student"
    student(kind, request.getfixturevalue(f"tiny_{kind}"), path, method)
    told = PROMPTS if kind == "sd" else [2, 0]
    before = load(path).at(4, chunk=2).x0(told, [5, 6])
    before_it = Configuration.of(load(path).at(4), PROTOCOLS["scenes-2k"])
    said = to_onnx(path)
    facts = json.loads((path / "onnx/onnx.json").read_text())
    assert f"{facts['times_as_fast']:g} times as fast" in said and facts["images"] <= onnx_form.TOLERANCE
    assert set(facts["files"]) == {"denoiser", "decoder", *(["text_encoder"] if kind == "sd" else [])}
    sampler = load(path)
    assert isinstance(sampler.denoiser.network, onnx_form.Network)
    # Any batch, not the recorded one alone.
    for chunk in (1, 2, 3):
        torch.testing.assert_close(sampler.at(4, chunk=chunk).x0(told, [5, 6]), before, rtol=0, atol=1e-3)
    assert sampler(told, [5, 6]).float().std() > 1
    if method == "dmd2" and kind == "sd":
        served_and_measured(path, before_it, monkeypatch)
    if method == "lcm":
        # The scale still reaches the network.
        assert not torch.allclose(
            sampler.at(4, 2.0).x0(told, [5, 6]), sampler.at(4, 9.0).x0(told, [5, 6]), atol=1e-4
        )
    (path / "onnx/decoder.onnx").write_bytes(b"no")
    with pytest.raises(UserError, match="is damaged"):
        load(path)
    shutil.rmtree(path / "onnx")
    assert torch.equal(load(path).at(4, chunk=2).x0(told, [5, 6]), before)


def served_and_measured(path: Path, before: Configuration, monkeypatch) -> None:
    """The app draws by the files, and no sample of the harness that was drawn without them is taken for one of theirs."""
    ran, run = [], onnx_form.Session.__call__
    monkeypatch.setattr(
        onnx_form.Session, "__call__", lambda self, *given: (ran.append(self), run(self, *given))[1]
    )
    model = Model(Entry("student", path, "student"), load(path), "auto")
    model.draw([Request(PROMPTS[0], seed=5, steps=4, guidance_scale=1.0)])
    # The encoder, four passes of the denoiser, the decoder.
    assert len(ran) == 6 and len(set(ran)) == 3
    after = Configuration.of(model.sampler.at(4), PROTOCOLS["scenes-2k"])
    assert (after.pipeline, after.steps) == (before.pipeline, before.steps) and after.key != before.key


def test_without_its_packages_conversion_says_what_to_install(tiny_sd, tmp_path, monkeypatch):
    sampler = student("sd", tiny_sd, tmp_path / "student")

    def lacking(name):
        raise ImportError(name)

    monkeypatch.setattr(onnx_form.importlib, "import_module", lacking)
    with pytest.raises(UserError, match=r"pip install 'stepdistill\[onnx\]'"):
        onnx_form.convert(sampler, PROMPTS, [0, 1])
    assert not (tmp_path / "student/onnx").exists()
