"""One checkpoint on the disk: a directory of safetensors and JSON, nothing pickled, every file with its SHA-256.

`state.json`, written last, lists the other files with sizes and checksums, and carries a checksum of itself. What is
read back is therefore what was written; a file that was cut, or one bit of which was flipped, is named.

    NAME.safetensors   NAME.optimizer.safetensors   NAME.optimizer.json   extra.json   state.json

of every network NAME. Where networks lie in shards, NAME and NAME.optimizer are directories with a file of each process
(`training.dcp`). Either form is read by any number of processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from stepdistill.errors import UserError, first_line
from stepdistill.provenance import sha256_of_files
from training import dcp
from training.files import SUFFIX, flush, save_tensors
from training.sharding import own_part

# 1 marked tuples in JSON, 2 had no checksums.
FORMAT = 3
# Files whose checksums are computed at a time.
AT_ONCE = 8
# Of a file: bytes and SHA-256.
Sums = dict[str, tuple[int, str]]
Found = TypeVar("Found")


class Damaged(UserError):
    """A checkpoint is not what was written. The message names the file, without a full stop."""


class Stateful(Protocol):
    """A network, or an average of one."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> Any: ...


@dataclass
class Checkpoint:
    """What was written. Its tensors stay on the disk until they are asked for, and what asks for them raises `Damaged`.

    Attributes:
        networks, trained: names of networks, and of those with an optimiser.
        extra: plain values.
    """

    folder: Path
    step: int
    networks: tuple[str, ...]
    trained: tuple[str, ...]
    extra: dict[str, Any]

    def load_into(self, name: str, module: Stateful) -> None:
        """The weights of the network `name`, in place, into a module of the same make; every key must match.

        Raises:
            UserError: it is of another make, adapters in place of a whole network for one.
            Damaged: it cannot be read.
        """
        theirs = self.shapes(name) if name in self.networks else {}
        own = module.state_dict()
        if theirs == {key: value.shape for key, value in own.items()}:
            self.read(name, own)
            module.load_state_dict(own)
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

    def shapes(self, name: str) -> dict[str, torch.Size]:
        """Of the tensors of a network."""
        found = self._said(lambda: dcp.layout(self._place(_stem(name))))
        return {key: shape for key, (shape, _) in found.items()}

    def read(self, name: str, into: Mapping[str, Tensor]) -> None:
        """Fill tensors by name, shards or whole, with those of a network."""
        self._said(lambda: dcp.read(self._place(_stem(name)), into))

    def weights(self, name: str) -> dict[str, Tensor]:
        """The tensors of a network, whole, on the CPU."""
        return self._said(lambda: self._tensors(_stem(name), lambda key: None))

    def optimizer(self, name: str, parameters: Sequence[Tensor] = ()) -> dict[str, Any]:
        """torch's `state_dict()` of an optimiser, with tensors placed as `parameters` are, else whole on the CPU."""
        return self._said(lambda: self._optimizer(name, parameters))

    @cached_property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Every network, in memory from here on."""
        return {name: self.weights(name) for name in self.networks}

    @cached_property
    def optimizers(self) -> dict[str, dict[str, Any]]:
        """Every optimiser, in memory from here on."""
        return {name: self.optimizer(name) for name in self.trained}

    def _said(self, reads: Callable[[], Found]) -> Found:
        try:
            return reads()
        except _UNREADABLE as error:
            raise Damaged(
                f"{self.folder} cannot be read: {first_line(error)}; bring its files back, or remove it to go on from the one"
                " before"
            ) from None

    def _place(self, stem: str) -> Path:
        file = self.folder / f"{stem}{SUFFIX}"
        return file if file.is_file() else self.folder / stem

    def _tensors(self, stem: str, like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
        found, place = {}, self._place(stem)
        for name, (shape, dtype) in dcp.layout(place).items():
            model = like(name)
            fits = model is not None and model.shape == shape
            found[name] = torch.empty_like(model, dtype=dtype) if fits else torch.empty(shape, dtype=dtype)
        dcp.read(place, found)
        return found

    def _optimizer(self, name: str, parameters: Sequence[Tensor]) -> dict[str, Any]:
        stem, like = f"{_stem(name)}.optimizer", dict(enumerate(parameters))
        states: dict[int, dict[str, Tensor]] = {}
        found = self._tensors(stem, lambda key: like.get(int(key.split(".")[1])))
        for key, tensor in found.items():
            _, number, kind = key.split(".")
            states.setdefault(int(number), {})[kind] = tensor
        groups = json.loads((self.folder / f"{stem}.json").read_text(encoding="utf-8"))["param_groups"]
        for group in groups:
            betas = group["betas"]
            # As format 1 marked it.
            group["betas"] = tuple(betas["__tuple__"] if isinstance(betas, dict) else betas)
        return {"state": dict(sorted(states.items())), "param_groups": groups}


# What safetensors, torch and JSON raise for a file that is not what it should be.
_UNREADABLE = (
    SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, AssertionError,
)  # fmt: skip


def write(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    optimizers: Mapping[str, Mapping[str, Any]],
    extra: Mapping[str, Any],
) -> None:
    """Make the directory `folder`, which is complete when this returns; arguments as of `RunDirectory.save`."""
    folder.mkdir()
    for stem, state in _parts(tensors, optimizers).items():
        save_tensors(folder / f"{stem}{SUFFIX}", state)
    finish(folder, step, list(tensors), optimizers, extra, _sums(folder, folder.iterdir()))


def write_shards(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], optimizers: Mapping[str, Mapping[str, Any]]
) -> Sums:
    """What this process holds, into `folder`; all processes of a run call it, and `finish` completes it.

    Raises:
        OSError: in all of them, where one could not write.
    """
    files: list[Path] = []
    for stem, state in _parts(tensors, optimizers).items():
        files += dcp.write(folder / stem, state)
    return _sums(folder, files)


def finish(
    folder: Path,
    step: int,
    networks: Sequence[str],
    optimizers: Mapping[str, Mapping[str, Any]],
    extra: Mapping[str, Any],
    tensors: Sums,
) -> None:
    """Write what is plain, and last what makes the directory a checkpoint. tensors: the files that hold them.

    Raises:
        UserError: files of other processes are not where this one looks.
    """
    if away := [name for name in tensors if not (folder / name).is_file()]:
        raise UserError(
            f"run.out: {away[0]} was written by another process and is not in {folder.parent}; give a directory that all"
            " machines share."
        )
    for name, state in optimizers.items():
        write_json(folder / f"{_stem(name)}.optimizer.json", {"param_groups": state["param_groups"]})
    write_json(folder / "extra.json", extra)
    files = dict(sorted((tensors | _sums(folder, folder.glob("*.json"))).items()))
    state = {
        "format": FORMAT,
        "step": step,
        "networks": list(networks),
        "optimizers": list(optimizers),
        "files": {name: size for name, (size, _) in files.items()},
        "sha256": {name: digest for name, (_, digest) in files.items()},
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
    expected = state["sha256"]
    # Reading and hashing let other threads go on.
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda name: sha256_of_files([folder / name]), expected)
        for name, digest in zip(expected, found, strict=True):
            if digest != expected[name]:
                raise Damaged(f"{name} has another checksum than when it was written")


def read(folder: Path) -> Checkpoint:
    """Raises `Damaged` for what cannot be opened; what can be but is not what was written is found by `verify`."""
    state = _listed(folder)
    try:
        extra = json.loads((folder / "extra.json").read_text(encoding="utf-8"))
        return Checkpoint(folder, state["step"], tuple(state["networks"]), tuple(state["optimizers"]), extra)
    except _UNREADABLE as error:
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
    return tensor.is_floating_point() and not bool(own_part(tensor).isfinite().all())


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


def _parts(
    tensors: Mapping[str, Mapping[str, Tensor]], optimizers: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Tensor]]:
    """Tensors by the names of their files, without endings."""
    parts = {_stem(name): dict(state) for name, state in tensors.items()}
    for name, state in optimizers.items():
        moments = {f"state.{number}.{kind}": tensor for number, kind, tensor in _states(state)}
        parts[f"{_stem(name)}.optimizer"] = moments
    return parts


def _states(optimizer: Mapping[str, Any]) -> Iterator[tuple[int, str, Tensor]]:
    for number, part in optimizer["state"].items():
        for name, tensor in part.items():
            yield number, name, tensor


def _sums(folder: Path, files: Iterable[Path]) -> Sums:
    return {
        file.relative_to(folder).as_posix(): (file.stat().st_size, sha256_of_files([file])) for file in files
    }
