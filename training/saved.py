"""One checkpoint on the disk: a directory of safetensors and JSON, nothing pickled, every file with its SHA-256.

`state.json`, written last, lists the other files with sizes and checksums, and carries a checksum of itself. What is
read back is therefore what was written; a file that was cut, or one bit of which was flipped, is named.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stepdistill.errors import UserError, first_line
from stepdistill.provenance import sha256_of_files
from training.files import flush, save_tensors
from training.sharding import placed

# 1 marked tuples in JSON, 2 had no checksums.
FORMAT = 3


class Damaged(Exception):
    """A checkpoint is not what was written. The message names the file, without a full stop."""


@dataclass(frozen=True)
class Checkpoint:
    """What `write` was given; tensors are on the CPU, and share nothing with the files."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    optimizers: dict[str, dict[str, Any]]
    extra: dict[str, Any]

    def load_into(self, name: str, module: nn.Module) -> None:
        """The weights of the network `name` into a module of the same make; every key must match.

        Raises:
            UserError: it is of another make, adapters in place of a whole network for one.
        """
        theirs, own = self.tensors.get(name, {}), module.state_dict()
        if {key: value.shape for key, value in theirs.items()} == {key: v.shape for key, v in own.items()}:
            module.load_state_dict(placed(theirs, own))
            return
        held, wanted = (
            "adapters" if any(key.startswith("adapters.") for key in keys) else "a whole network"
            for keys in (theirs, own)
        )
        if held == wanted:
            held, wanted = "one of another size or rank", "this"
        raise UserError(
            f"the checkpoint of step {self.step} has {held} for {name!r}, and this recipe makes {wanted}; set student and"
            " method back to what the run was begun with, or use --fresh."
        )


def write(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    optimizers: Mapping[str, Mapping[str, Any]],
    extra: Mapping[str, Any],
) -> None:
    """Make the directory `folder`, which is complete when this returns; arguments as of `RunDirectory.save`."""
    folder.mkdir()
    for name, state in tensors.items():
        save_tensors(folder / f"{_stem(name)}.safetensors", state)
    for name, state in optimizers.items():
        _write_optimizer(folder / f"{_stem(name)}.optimizer", state)
    write_json(folder / "extra.json", extra)
    written = sorted(folder.iterdir())
    state = {
        "format": FORMAT,
        "step": step,
        "networks": list(tensors),
        "optimizers": list(optimizers),
        "files": {file.name: file.stat().st_size for file in written},
        "sha256": {file.name: sha256_of_files([file]) for file in written},
    }
    write_json(folder / "state.json", state | {"self": _digest(state)})


def complete(folder: Path) -> bool:
    """Whether all files are there in their sizes, which costs next to nothing to ask."""
    try:
        _listed(folder)
    except Damaged:
        return False
    return True


def verify(folder: Path) -> None:
    """Read every byte. Of a format without checksums, everything is opened and must be finite.

    Raises:
        Damaged: a file is missing, cut or changed, or a number of an older format's is not finite.
    """
    state = _listed(folder)
    if state["format"] < FORMAT:
        checkpoint = read(folder)
        if found := not_finite(checkpoint.tensors, checkpoint.optimizers):
            raise Damaged(f"{found} is not finite")
        return
    for name, expected in state["sha256"].items():
        if sha256_of_files([folder / name]) != expected:
            raise Damaged(f"{name} has another checksum than when it was written")


def read(folder: Path) -> Checkpoint:
    """Raises `Damaged` for what cannot be read; what can be read but is not what was written is found by `verify`."""
    state = _listed(folder)
    try:
        tensors = {name: _tensors(folder / f"{_stem(name)}.safetensors") for name in state["networks"]}
        optimizers = {
            name: _read_optimizer(folder / f"{_stem(name)}.optimizer") for name in state["optimizers"]
        }
        extra = json.loads((folder / "extra.json").read_text(encoding="utf-8"))
        return Checkpoint(state["step"], tensors, optimizers, extra)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(first_line(error)) from None


def not_finite(
    tensors: Mapping[str, Mapping[str, Tensor]], optimizers: Mapping[str, Mapping[str, Any]]
) -> str:
    """The first tensor that holds NaN or infinity, in words; "" = there is none."""
    for network, state in tensors.items():
        for name, tensor in state.items():
            if _broken(tensor):
                return f"{name} of {network}"
    for network, state in optimizers.items():
        for number, name, tensor in _states(state):
            if _broken(tensor):
                return f"the optimiser's {name} of parameter {number} of {network}"
    return ""


def _broken(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(tensor.isfinite().all())


def write_json(path: Path, tree: Any) -> None:
    """Onto the disk, and flushed."""
    path.write_text(json.dumps(tree), encoding="utf-8")
    flush(path)


def _listed(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose files are there in their sizes."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["format"] >= FORMAT and state.pop("self") != _digest(state):
            raise Damaged("state.json has another checksum than when it was written")
        for name, size in state["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise Damaged(f"{name} is {'cut' if path.is_file() else 'missing'}")
        return state
    except OSError:
        raise Damaged("state.json is missing: it was not finished") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged("state.json cannot be read") from None


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _stem(network: str) -> str:
    """A composition's networks are called "part/name"; a file cannot be."""
    return network.replace("/", "+")


def _tensors(path: Path) -> dict[str, Tensor]:
    """Copies: views of the file would keep it on the disk after it is pruned, and end the run where it is cut."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _states(optimizer: Mapping[str, Any]) -> Iterator[tuple[int, str, Tensor]]:
    for number, part in optimizer["state"].items():
        for name, tensor in part.items():
            yield number, name, tensor


def _write_optimizer(path: Path, state: Mapping[str, Any]) -> None:
    """PATH.safetensors with the tensors of every parameter's state, PATH.json with the groups' settings."""
    tensors = {f"state.{number}.{name}": tensor for number, name, tensor in _states(state)}
    save_tensors(path.with_name(f"{path.name}.safetensors"), tensors)
    write_json(path.with_name(f"{path.name}.json"), {"param_groups": state["param_groups"]})


def _read_optimizer(path: Path) -> dict[str, Any]:
    """What `_write_optimizer` wrote, and what format 1 did, whose JSON marks a tuple as {"__tuple__": [...]}."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _tensors(path.with_name(f"{path.name}.safetensors")).items():
        _, number, key = name.split(".")
        states.setdefault(int(number), {})[key] = tensor
    groups = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))["param_groups"]
    for group in groups:
        betas = group["betas"]
        group["betas"] = tuple(betas["__tuple__"] if isinstance(betas, dict) else betas)
    return {"state": dict(sorted(states.items())), "param_groups": groups}
