"""Set-ups that tests share: diffusers' schedulers beside ours, and exported students beside stock pipelines."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stepdistill import export, load
from stepdistill.denoiser import Denoiser
from stepdistill.drawing import Sampler
from stepdistill.families.base import Family
from stepdistill.methods.base import Method
from stepdistill.prediction import Prediction
from stepdistill.sampling import Sampling
from stepdistill.schedule import Schedule

# What stock schedulers call the kinds of a network's output.
EVERY_KIND = pytest.mark.parametrize(
    ("theirs", "kind"), [("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x0")]
)


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------------- schedulers


def drawn(steps: int) -> tuple[Tensor, list[Tensor]]:
    """A first state and network outputs, float64."""
    generator = torch.Generator().manual_seed(steps)
    start, *outputs = torch.randn(steps + 1, 3, 4, 5, 5, generator=generator, dtype=torch.float64)
    return start, outputs


def seeded(like: Tensor, dtype: torch.dtype | None) -> Callable[[int], Tensor]:
    """The noise before state i + 1 of `stock_states`, drawn in `dtype`."""

    def noise(i: int) -> Tensor:
        generator = torch.Generator().manual_seed(i)
        return torch.randn(like.shape, generator=generator, dtype=dtype).to(like)

    return noise


def states(
    outputs: Iterable[Tensor],
    kind: str,
    schedule: Schedule,
    start: Tensor,
    times: Sequence[float],
    noise: Callable[[int], Tensor] | None = None,
    **how: Any,
) -> Tensor:
    """What `sample` passes through with these network outputs: every state it asks about, and the end."""
    heard, calls = [], iter(outputs)

    def predict(x_t: Tensor, t: Tensor, cond: Any) -> Prediction:
        heard.append(x_t)
        return Prediction(next(calls), kind, x_t, t, schedule)

    sampling = Sampling(**{key: how.pop(key) for key in ("rule", "eta") if key in how})
    end = sampling.sample(predict, start, times, noise, **how)
    return torch.stack((*heard, end))


def stock_states(scheduler: Any, outputs: Sequence[Tensor], start: Tensor) -> Tensor:
    """The same of a stock scheduler; its noise before state i + 1 is that of `seeded(i)`."""
    passed = [start]
    for i, (output, t) in enumerate(zip(outputs, scheduler.timesteps[: len(outputs)], strict=True)):
        generator = torch.Generator().manual_seed(i)
        passed.append(scheduler.step(output, t, passed[-1], generator=generator, return_dict=False)[0])
    return torch.stack(passed)


# ---------------------------------------------------------------------------------------------------- pipelines

PROMPT = "a small red circle above a large blue square on a yellow background"

# A process that cannot import this project and draws with stock pipelines. Each line it reads is a request, in which
#   directory, load: name the pipeline and what from_pretrained is told beside; the last one loaded is kept,
#   settings: of its scheduler are changed, call: is how it draws, seeds: one for each sample, out: where to,
# or code: is run and leaves a name `image` or `video`. Each line it writes is that path and "" or a traceback.
STOCK = """
import importlib, json, os, sys, traceback
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("stepdistill", "training", "evaluation", "app"):
            raise ImportError(name)
sys.meta_path.insert(0, Forbid())
replies, sys.stdout = sys.stdout, sys.stderr
import numpy as np, torch
from diffusers import DiffusionPipeline
drawn = []
def remembering(draw):
    def randn_tensor(*args, generator=None, **kwargs):
        noise = draw(*args, generator=generator, **kwargs)
        if generator is None:
            drawn.append(noise.float().numpy())
        return noise
    return randn_tensor
for name in ("lcm", "tcd", "scm", "flow_match_lcm"):
    module = importlib.import_module("diffusers.schedulers.scheduling_" + name)
    module.randn_tensor = remembering(module.randn_tensor)
held, pipeline, scheduler = None, None, None
def draw(directory, load, settings, call, seeds):
    global held, pipeline, scheduler
    # A later test may be given the path of one that has ended.
    asked = directory, os.stat(directory).st_mtime_ns
    if held != asked:
        pipeline = DiffusionPipeline.from_pretrained(directory, **load)
        pipeline.set_progress_bar_config(disable=True)
        held, scheduler = asked, pipeline.scheduler
    pipeline.scheduler = scheduler.from_config(scheduler.config, **settings)
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    output = pipeline(generator=generator, output_type="np", **call)
    return output.frames if hasattr(output, "frames") else output.images
for line in sys.stdin:
    request = json.loads(line)
    out, failed = request.pop("out"), ""
    drawn.clear()
    try:
        if "code" in request:
            scope = {}
            exec(request["code"], scope)
            images = np.asarray(scope["image"] if "image" in scope else scope["video"])
        else:
            images = draw(**request)
        np.savez(out, images=images, **{str(i): noise for i, noise in enumerate(drawn)})
    except Exception:
        failed = traceback.format_exc()
    print(json.dumps([out, failed]), file=replies, flush=True)
"""


@functools.cache
def stock_process() -> subprocess.Popen:
    """One for all tests of this process, away from the project's directory; it ends when its input closes."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", STOCK], cwd=tempfile.gettempdir(), **pipes)


class StockError(Exception):
    """What a stock pipeline raised, as a traceback."""


def ask_stock(tmp_path: Path, **request: Any) -> tuple[np.ndarray, list[Tensor]]:
    """(images, what its scheduler drew of the global generator) of one request to `STOCK`.

    Raises:
        StockError: the pipeline raised.
    """
    out, process = tmp_path / "stock.npz", stock_process()
    print(json.dumps(request | {"out": str(out)}), file=process.stdin, flush=True)
    answered = None
    # A test that was stopped while it waited leaves its answer behind.
    while answered != str(out):
        answered, failed = json.loads(process.stdout.readline())
    if failed:
        raise StockError(failed)
    with np.load(out) as saved:
        return saved["images"], [torch.from_numpy(saved[str(i)]) for i in range(len(saved.files) - 1)]


def stock_images(directory: Path, tmp_path: Path, seeds: Sequence[int], **call: Any) -> np.ndarray:
    """float images (N, H, W, 3) of a stock pipeline in a process that cannot import this project."""
    return ask_stock(tmp_path, directory=str(directory), load={}, settings={}, call=call, seeds=list(seeds))[
        0
    ]


def card_code(directory: Path, tmp_path: Path) -> np.ndarray:
    """What the code of a directory's model card draws as it stands, where this project cannot be imported: uint8 (H, W, 3),
    or float frames (F, H, W, 3).
    """
    code = (directory / "README.md").read_text().split("```python")[1].split("```")[0]
    code = code.replace("PATH_TO_THIS_DIRECTORY", str(directory)).replace("PROMPT", PROMPT)
    return ask_stock(tmp_path, code=code)[0]


def student_of(
    family: Family, method: Method, recipe_family: dict[str, Any]
) -> tuple[Denoiser, dict[str, Any]]:
    """The family's student with its weights moved a little, so that it is not the teacher by accident, and its card."""
    student = family.student("teacher", method.sampling.inputs).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for parameter in student.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    recipe = {
        "family": recipe_family,
        "method": {"name": type(method).__name__.lower()},
        "run": {"out": "runs/x"},
    }
    return student, export.card_of(family, method, recipe)


def exported(family: Family, method: Method, path: Path, recipe_family: dict[str, Any]) -> Sampler:
    """Such a student written to `path`, and the sampler of the one in memory."""
    student, card = student_of(family, method, recipe_family)
    export.write(family, student, path, card)
    return Sampler(family, student, path, card)


def assert_comes_back(directory: Path, sampler: Sampler, *asked: Any, **how: Any) -> None:
    """The exported student has the same weights, bit for bit, and draws the same images.

    But for a rounding: weights that were read lie elsewhere in memory, and some processors then sum in another order.
    """
    again = load(directory)
    ours, theirs = (each.denoiser.network.state_dict() for each in (sampler, again))
    # What it has besides is for an input that this student was not told.
    assert ours.keys() <= theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    apart = again(*asked, **how).int() - sampler(*asked, **how).int()
    assert int(apart.abs().max()) <= 1
