"""A student's networks as ONNX beside its pipeline, drawn with by onnxruntime on machines where torch is slow.

    DIR/onnx/denoiser.onnx  decoder.onnx  text_encoder.onnx  onnx.json

The directory stays the stock pipeline it was; `stepdistill.load` runs the files in place of its networks, so that the app
serves, and the harness measures, what will be used. LoRA and scheduler are in them already: it is an exported student that
is converted. Sizes are fixed, but for the batch.
"""

from __future__ import annotations

import importlib
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Cond
from stepdistill.errors import UserError, atomic_write, first_line
from stepdistill.provenance import sha256_of_files
from stepdistill.tracing import Positional
from stepdistill.untrusted import read_json

if TYPE_CHECKING:
    from stepdistill.drawing import Sampler

FOLDER, FACTS = "onnx", "onnx.json"
OPSET = 17
# What conversion may change, of a network's outputs and of images in [0, 1].
TOLERANCE = 1e-3
BATCH = "batch"


def convert(sampler: Sampler, prompts: Sequence, seeds: Sequence[int]) -> dict[str, Any]:
    """Write `onnx` into a sampler's directory, and compare it with what it was made of.

    prompts, seeds: of images that are drawn both ways.

    Returns:
        What onnx.json holds: checksums, the largest differences, and how many times as fast an image is.

    Raises:
        UserError: a package is missing, the network cannot be recorded, or the difference is above `TOLERANCE`.
    """
    _need("onnx")
    _need("onnxruntime")
    if not getattr(sampler.denoiser.network, "traceable", True):
        raise UserError(
            f"the family {sampler.family!r} cannot be converted to ONNX: its network's operations depend on each prompt."
        )
    if sampler.sampling.rule == "flowmap":
        raise UserError(
            "a student that is told two times cannot be converted to ONNX; export it without --onnx."
        )
    with atomic_write(sampler.path / FOLDER) as folder:
        folder.mkdir()
        errors = {
            name: _write(folder / f"{name}.onnx", *part) for name, part in _parts(sampler, prompts).items()
        }
        facts: dict[str, Any] = {"format": 1, "errors": errors, "files": _checksums(folder)}
        facts |= _compared(sampler, Attached(sampler, folder, facts), prompts, seeds)
        worst = max(*errors.values(), facts["images"])
        if not worst <= TOLERANCE:
            raise UserError(
                f"the ONNX form differs from the student by {worst:.2g}, above {TOLERANCE:g}; draw with the student itself."
            )
        (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def attached(sampler: Sampler) -> Sampler:
    """A sampler of a directory, drawing by its ONNX files where it has such; the same sampler where it has none.

    Raises:
        UserError: onnxruntime is not installed, or the files are not those that were written.
    """
    folder = sampler.path / FOLDER
    if not (folder / FACTS).is_file():
        return sampler
    facts = read_json(folder / FACTS)
    if not isinstance(facts, dict) or facts.get("format") != 1 or facts.get("files") != _checksums(folder):
        raise UserError(
            f"{folder} is damaged: its files are not those {FACTS} names; export it again, or remove it."
        )
    if sampler.device.type == "cpu" and sampler.dtype == torch.float32:
        Attached(sampler, folder, facts).use()
    return sampler


class Attached:
    """ONNX files in the place of a sampler's networks, while it is in use."""

    def __init__(self, sampler: Sampler, folder: Path, facts: dict[str, Any]) -> None:
        self.sampler = sampler
        runs = {name: Session(folder / f"{name}.onnx") for name in facts["files"]}
        self._network = Network(runs["denoiser"], sampler.denoiser.network)
        self._own: dict[str, Any] = {"decode": lambda x0: runs["decoder"](x0)}
        if "text_encoder" in runs:
            family = sampler.family_
            self._own["encode"] = lambda prompts: runs["text_encoder"](family.token_ids(prompts))

    def use(self) -> None:
        self.sampler.denoiser.network = self._network
        vars(self.sampler.family_).update(self._own)

    def leave(self) -> None:
        """Back to the networks themselves."""
        self.sampler.denoiser.network = self._network.replaced[0]
        for name in self._own:
            vars(self.sampler.family_).pop(name, None)


class Session:
    """One ONNX file: tensors in the order of its inputs -> its output."""

    def __init__(self, file: Path) -> None:
        onnxruntime = _need("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            # Its exceptions have no common class below it.
            raise UserError(
                f"{file} cannot be read by onnxruntime: {first_line(error)}; export it again."
            ) from None
        self._inputs = [(each.name, each.type) for each in self._session.get_inputs()]

    def __call__(self, *tensors: Tensor) -> Tensor:
        kinds = {"tensor(int64)": torch.int64, "tensor(float)": torch.float32}
        given = {
            name: tensor.detach().to(kinds[kind]).contiguous().numpy()
            for (name, kind), tensor in zip(self._inputs, tensors, strict=True)
        }
        return torch.from_numpy(self._session.run(None, given)[0])


class Network(nn.Module):
    """`network(x_t, t, cond, **extras)` by a session; anything else is said by the network it stands for."""

    traceable = False

    def __init__(self, session: Session, replaced: nn.Module) -> None:
        super().__init__()
        # In a list, so as not to count as this module's own.
        self._run, self.replaced = session, [replaced]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["replaced"][0], name)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, **extras: Tensor) -> Tensor:
        return self._run(x_t, t, *_flat(cond), *extras.values())


def _flat(cond: Cond) -> list[Tensor]:
    return [] if cond is None else [cond[name] for name in sorted(cond)] if isinstance(cond, dict) else [cond]


def _parts(sampler: Sampler, prompts: Sequence) -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Each network as a function of tensors alone, and two examples of what it is given."""
    family, count = sampler.family_, 2
    told = [prompts[i % len(prompts)] for i in range(count)]
    cond = family.encode(told)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, *family.shape, generator=generator)
    t = torch.full((count,), float(sampler.times(sampler.default_steps)[0]), dtype=torch.float32)
    extras = tuple(sampler.sampling.inputs)
    scales = [torch.full((count,), float(sampler.default_guidance)) for _ in extras]
    names = sorted(cond) if isinstance(cond, dict) else None
    plain = Positional(sampler.denoiser.network, names, len(_flat(cond)), extras)
    parts: dict[str, Any] = {
        "denoiser": (plain, (x, t, *_flat(cond), *scales)),
        "decoder": (_Call(family.decode), (x,)),
    }
    # Where prompts go through one encoder and nothing else.
    if hasattr(family, "token_ids") and isinstance(cond, Tensor):
        ids = family.token_ids(told)
        if torch.equal(family.states(ids), cond):
            parts["text_encoder"] = (_Call(family.states), (ids,))
    return parts


class _Call(nn.Module):
    """A function as a module, which is what can be recorded."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, value: Tensor) -> Tensor:
        return self.function(value)


@torch.no_grad()
def _write(file: Path, module: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Record a network; the largest difference of what the file says, for one example as well as for two."""
    names = [f"input_{i}" for i in range(len(inputs))]
    try:
        with warnings.catch_warnings():
            # One per Python branch on a shape; shapes are fixed.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module.eval(), inputs, str(file), input_names=names, output_names=["output"], opset_version=OPSET,
                dynamic_axes={name: {0: BATCH} for name in [*names, "output"]}, dynamo=False,
            )  # fmt: skip
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"{file.stem} cannot be converted to ONNX: {first_line(error)}.") from None
    run, worst = Session(file), 0.0
    for count in (1, 2):
        part = tuple(each[:count] for each in inputs)
        worst = max(worst, float((run(*part) - module(*part)).abs().max()))
    return worst


def _compared(sampler: Sampler, form: Attached, prompts: Sequence, seeds: Sequence[int]) -> dict[str, Any]:
    """The largest difference of decoded images, and the time of one, in turns in one process."""
    draw = sampler.at(chunk=1)

    def images() -> Tensor:
        with torch.no_grad():
            return sampler.family_.decode(draw.x0(prompts, seeds)).clamp(0, 1)

    def seconds() -> float:
        began = time.perf_counter()
        draw(prompts[:1], seeds[:1])
        return time.perf_counter() - began

    eager, times = images(), {"eager": [], "onnx": []}
    form.use()
    difference = float((images() - eager).abs().max())
    form.leave()
    for turn in range(12):
        times["eager"].append(seconds())
        form.use()
        times["onnx"].append(seconds())
        form.leave()
        if turn < 2:
            # Both are warm now.
            times = {"eager": [], "onnx": []}
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "images": difference,
        "milliseconds": {name: round(1000 * value, 2) for name, value in medians.items()},
        "times_as_fast": round(medians["eager"] / medians["onnx"], 2),
        "threads": torch.get_num_threads(),
    }


def _checksums(folder: Path) -> dict[str, str]:
    return {file.stem: sha256_of_files([file]) for file in sorted(folder.glob("*.onnx"))}


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"ONNX needs the package {package}, which is not installed: pip install 'stepdistill[onnx]'."
        ) from None
