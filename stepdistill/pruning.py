"""Networks of which intervals of blocks are replaced by one block each, plugged in and out (PPCL, arXiv 2511.16156).

    face = with_blocks(face, {Interval("transformer_blocks", 3, 5): block})      # shares all that stays
    student = Pruned(teacher, intervals)                                         # trains the replacements alone
    stepdistill.load("teacher", intervals=["transformer_blocks.3-5.safetensors"])

A replaced network is one of upstream's own with fewer blocks and corrected counts, so it leaves as a stock pipeline.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepdistill.denoiser import Denoiser, Overlay
from stepdistill.errors import UserError, atomic_write, first_line
from stepdistill.prediction import Prediction

# How far the lengths of a teacher's parameters may be from those an interval was distilled from: half precision rounds.
SAME = 0.02


@dataclass(frozen=True, order=True)
class Interval:
    """Blocks `first` to `last`, both included, of the list `stack`; one block stands in their place, at `first`."""

    stack: str
    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> Interval:
        """As it is written: "transformer_blocks.3-5". Raises UserError."""
        found = re.fullmatch(r"(\w+)\.(\d+)-(\d+)", text)
        if not found or int(found[3]) < int(found[2]):
            raise UserError(
                f"method.intervals: {text!r} is no interval of blocks; write LIST.FIRST-LAST, transformer_blocks.3-5 say."
            )
        return cls(found[1], int(found[2]), int(found[3]))

    def __str__(self) -> str:
        return f"{self.stack}.{self.first}-{self.last}"

    @property
    def blocks(self) -> range:
        return range(self.first, self.last + 1)

    @property
    def removed(self) -> int:
        """Blocks fewer that the network has with it."""
        return self.last - self.first


def movable(face: nn.Module) -> dict[str, list[int]]:
    """Of each list of blocks, those that an interval may hold.

    Raises:
        UserError: none may, and why.
    """
    if not getattr(face, "prunable", {}):
        why = getattr(face, "unpruned", "") or "its network has no list of blocks that are all of one kind"
        raise UserError(f"family.teacher: no blocks of it can be removed: {why}.")
    return {
        stack: [i for i in range(len(face.model.get_submodule(stack))) if i not in face.fixed(stack)]
        for stack in face.prunable
    }


def check(face: nn.Module, intervals: Sequence[Interval]) -> None:
    """Raise UserError for intervals whose blocks cannot go, are not there, or are in another interval as well."""
    free, taken = movable(face), set()
    for each in intervals:
        if each.stack not in free:
            raise UserError(
                f"method.intervals: {each} names a list that this network has none of; it has {' and '.join(free)}."
            )
        count = len(face.model.get_submodule(each.stack))
        if each.last >= count:
            raise UserError(
                f"method.intervals: {each} goes beyond block {count - 1}, the last of {each.stack}."
            )
        for i in each.blocks:
            if i not in free[each.stack]:
                raise UserError(
                    f"method.intervals: {each} holds block {i}, which cannot go: {face.fixed(each.stack)[i]}."
                )
            if (each.stack, i) in taken:
                raise UserError(
                    f"method.intervals: {each} holds block {i}, which another interval holds too."
                )
            taken.add((each.stack, i))


def with_blocks(face: nn.Module, replacements: Mapping[Interval, nn.Module]) -> nn.Module:
    """A face like `face` with one block in the place of each interval. All other parameters are those of `face`, shared.

    Raises:
        UserError: as `check` does.
    """
    check(face, list(replacements))
    at = {(each.stack, each.first): (each, block) for each, block in replacements.items()}
    gone = {(each.stack, i) for each in replacements for i in each.blocks}
    twin, model = _shallow(face), _shallow(face.model)
    setattr(twin, face.inner, model)
    kept: dict[str, list[int]] = {}
    for stack in face.prunable:
        old, blocks, kept[stack] = face.model.get_submodule(stack), [], []
        for i, block in enumerate(old):
            if (stack, i) in gone and (stack, i) not in at:
                continue
            blocks.append(at[stack, i][1] if (stack, i) in at else block)
            kept[stack].append(i)
        setattr(model, stack, nn.ModuleList(blocks))
    counts = face.recounted(kept)
    model.register_to_config(**counts)
    # A model made from a partial configuration would put back the defaults of what it was not told.
    if untold := model.config.get("_use_default_values"):
        model.register_to_config(_use_default_values=[name for name in untold if name not in counts])
    return twin


def _shallow(module: nn.Module) -> nn.Module:
    """A module with its own table of submodules, which are those of `module`."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin


# ---------------------------------------------------------------------------------------------------- while distilling


@dataclass
class Told:
    """What a block was called with, and what came out of the last of its interval: one tensor per stream."""

    args: tuple
    kwargs: dict[str, Any]
    target: tuple[Tensor, ...]


def streams(output: Any) -> tuple[Tensor, ...]:
    """What a block returns, as a tuple: the image's tokens, or the text's and the image's."""
    return (output,) if isinstance(output, Tensor) else tuple(output)


@contextlib.contextmanager
def recording(denoiser: Denoiser, intervals: Iterable[Interval]) -> Iterator[dict[Interval, Told]]:
    """What goes in and out of each interval of `denoiser`, filled by each of its forwards in the block."""
    found: dict[Interval, Told] = {}
    model, handles = denoiser.network.model, []

    def begin(each: Interval):
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found[each] = Told(args, kwargs, ())

        return hook

    def end(each: Interval):
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            found[each].target = streams(output)

        return hook

    for each in intervals:
        blocks = model.get_submodule(each.stack)
        handles.append(blocks[each.first].register_forward_pre_hook(begin(each), with_kwargs=True))
        handles.append(blocks[each.last].register_forward_hook(end(each)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Pruned(Overlay):
    """`base` with one block in the place of each interval, a copy of the interval's first at the beginning.

    Raises:
        UserError: as `check` does.
    """

    def __init__(self, base: Denoiser, intervals: Sequence[Interval]) -> None:
        super().__init__(base)
        self.intervals = tuple(sorted(intervals))
        check(base.network, self.intervals)
        blocks = {each: base.network.model.get_submodule(each.stack)[each.first] for each in self.intervals}
        # Names of modules cannot hold dots.
        self.replacements = nn.ModuleDict(
            {str(each).replace(".", "/"): copy.deepcopy(block).float() for each, block in blocks.items()}
        ).requires_grad_(True)
        # In a list, as the base is.
        self._network = [with_blocks(base.network, self.by_interval)]

    @property
    def network(self) -> nn.Module:
        return self._network[0]

    @property
    def by_interval(self) -> dict[Interval, nn.Module]:
        return dict(zip(self.intervals, self.replacements.values(), strict=True))

    def requires_grad_(self, requires_grad: bool = True) -> Pruned:
        self.replacements.requires_grad_(requires_grad)
        return self

    def forward(
        self, *inputs: Any, told: Mapping[Interval, Told] | None = None, **extras: Any
    ) -> Prediction | dict[Interval, tuple[Tensor, ...]]:
        """As any denoiser's. told: what each interval of the teacher was called with; then what each replacement makes of
        it, by stream, through this module as data-parallel training needs it.
        """
        if told is None:
            return super().forward(*inputs, **extras)
        return {
            each: streams(block(*told[each].args, **told[each].kwargs))
            for each, block in self.by_interval.items()
        }

    def merged(self) -> Denoiser:
        """A whole denoiser of its own that says the same."""
        dtype = next(self.base.network.parameters()).dtype
        whole = Denoiser(copy.deepcopy(self.network), self.kind, self.native, self.schedule)
        return whole.to(dtype).train(self.training)

    def clone(self) -> Denoiser:
        """A whole one, as other methods begin with."""
        return self.merged().float().requires_grad_(True)

    def write(self, directory: Path) -> Path:
        """Each replacement as a file LIST.FIRST-LAST.safetensors that `plug` reads."""
        directory.mkdir(parents=True, exist_ok=True)
        for each, block in self.by_interval.items():
            tensors = {name: value.detach().cpu().contiguous() for name, value in block.state_dict().items()}
            said = {"interval": str(each), "teacher": json.dumps(_lengths(self.base.network, each))}
            with atomic_write(directory / f"{each}.safetensors") as temporary:
                save_file(tensors, str(temporary), said)
        return directory


def _lengths(face: nn.Module, interval: Interval) -> list[float]:
    """The lengths of the parameters of the first and the last block of an interval, by which a teacher is known again."""
    blocks = face.model.get_submodule(interval.stack)
    ends = (blocks[interval.first], blocks[interval.last])
    return [float(p.detach().float().norm()) for block in ends for p in block.parameters()]


# ------------------------------------------------------------------------------------------------- plugged in at load


def files(intervals: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files of intervals: those listed, or all of a directory.

    Raises:
        UserError: there are none.
    """
    if isinstance(intervals, (str, Path)):
        path = Path(intervals)
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{path} holds no intervals, files LIST.FIRST-LAST.safetensors.")
        return found
    return [Path(each) for each in intervals]


def plug(denoiser: Denoiser, paths: Sequence[Path]) -> Denoiser:
    """`denoiser` with the intervals of these files plugged in; what is not replaced is shared with it.

    Raises:
        UserError: a file is damaged, was distilled from another network, or its blocks cannot go.
    """
    replacements: dict[Interval, nn.Module] = {}
    for path in paths:
        interval, known, tensors = _read(path)
        check(denoiser.network, [*replacements, interval])
        ours = _lengths(denoiser.network, interval)
        if len(known) != len(ours) or any(
            abs(a - b) > SAME * max(a, 1e-3) for a, b in zip(known, ours, strict=True)
        ):
            raise UserError(
                f"{path} was distilled from another network than the one it is to be plugged into."
            )
        first = denoiser.network.model.get_submodule(interval.stack)[interval.first]
        block = copy.deepcopy(first)
        try:
            block.load_state_dict(tensors)
        except RuntimeError as error:
            raise UserError(
                f"{path} does not fit {interval.stack}.{interval.first}: {first_line(error)}"
            ) from None
        replacements[interval] = block
    network = with_blocks(denoiser.network, replacements)
    return Denoiser(network, denoiser.kind, denoiser.native, denoiser.schedule).train(denoiser.training)


def _read(path: Path) -> tuple[Interval, list[float], dict[str, Tensor]]:
    """(interval, lengths of the teacher's parameters, tensors) of a file."""
    try:
        with safe_open(str(path), "pt") as file:
            said = file.metadata() or {}
        known = json.loads(said["teacher"])
        if not isinstance(known, list) or not all(isinstance(each, float) for each in known):
            raise ValueError("no list of numbers")
        return Interval.parse(said["interval"]), known, load_file(str(path))
    except (OSError, SafetensorError, KeyError, ValueError, UserError) as error:
        raise UserError(f"{path} is no file of an interval: {first_line(error)}") from None
