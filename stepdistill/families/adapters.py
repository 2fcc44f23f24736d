"""LoRAs from elsewhere, of a style or a character, merged into a teacher before anything is distilled from it.

The stock pipeline's own loader reads them, in all formats it knows (diffusers', peft's, kohya's). What it leaves out with
a warning is an error here: a teacher with half a style would be distilled for a week.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from stepdistill.errors import UserError, first_line
from stepdistill.provenance import sha256_of_files
from stepdistill.untrusted import LOADING

# The stock loaders' name for a file in a directory.
IN_DIRECTORY = "pytorch_lora_weights.safetensors"
# In a file's header, what its adapters were made with.
METADATA = "lora_adapter_metadata"
# Of that, what only says where adapters are and how strong; anything else must be as peft has it by default.
PLAIN = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora", "peft_type",
         "task_type", "base_model_name_or_path", "inference_mode", "revision", "init_lora_weights", "lora_dropout",
         "peft_version", "exclude_modules")  # fmt: skip
# Ends of the names of a pair's first matrix.
DOWN = ("lora_A.weight", "lora_down.weight", "lora.down.weight", "_lora.down.weight", "lora_A.default.weight")
NAME = "merged"


@dataclass(frozen=True)
class LoraFile:
    """A file in a recipe, written "PATH" or "PATH:scale".

    Attributes:
        path: of a safetensors file, or a directory with one of the stock name.
        scale: its updates are multiplied by this, beside its own alpha.
        sha256: of its content, by which a run that goes on knows it again; "" = as it is now.
    """

    path: str
    scale: float = 1.0
    sha256: str = ""

    @classmethod
    def of(cls, said: str | LoraFile) -> LoraFile:
        """As it is written in a recipe. Raises ValueError for what names no file."""
        if isinstance(said, str):
            path, _, scale = said.rpartition(":")
            said = cls(path, float(scale)) if path and _is_number(scale) else cls(said)
        file = Path(said.path).expanduser()
        file = file / IN_DIRECTORY if file.is_dir() else file
        if not math.isfinite(said.scale):
            raise ValueError(f"lora must have a finite scale, and {said.path} has {said.scale}.")
        if file.suffix != ".safetensors":
            raise ValueError(f"lora names {said.path}, which is no .safetensors file; convert it.")
        if not file.is_file():
            raise ValueError(f"lora names {said.path}, which is not there; give the path of a file.")
        return cls(str(file), said.scale, said.sha256 or sha256_of_files([file]))

    @property
    def fact(self) -> dict[str, Any]:
        """For a card: no path of this machine."""
        return {"file": Path(self.path).name, "scale": self.scale, "sha256": self.sha256}


def merge(pipeline: Any, files: Sequence[LoraFile], parts: Sequence[str] | None = None) -> None:
    """Add each file's updates to the weights of a pipeline, which has no adapters before and after.

    parts: components to change, by default all that the pipeline can load adapters into.

    Raises:
        UserError: a file has changed, is damaged, is of a kind the pipeline does not read, or is for another base.
    """
    for each in files:
        where = f"family.lora={each.path}"
        if not hasattr(pipeline, "load_lora_weights"):
            raise UserError(
                f"{where}: {type(pipeline).__name__} has no `load_lora_weights`; merge it into the weights elsewhere, and give"
                " that directory as family.teacher."
            )
        if sha256_of_files([Path(each.path)]) != each.sha256:
            raise UserError(
                f"{where}: its content has changed since the run began; put the file back, or choose another run.out."
            )
        _merge(pipeline, each, _pairs(Path(each.path), where), parts, where)


def _pairs(file: Path, where: str) -> int:
    """How many layers a file adapts. Raises UserError for what stock loaders would drop or misread."""
    try:
        with safe_open(file, framework="pt") as opened:
            names, metadata = list(opened.keys()), opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{where} is no readable safetensors file ({first_line(error)}); fetch it again."
        ) from None
    if any("dora_scale" in name or "lora_magnitude" in name for name in names):
        raise UserError(f"{where} is a DoRA, whose magnitudes stock pipelines leave out; give a plain LoRA.")
    pairs = sum(name.endswith(DOWN) for name in names)
    if not pairs:
        raise UserError(f"{where} holds no pairs of LoRA matrices (lora_A or lora_down); give a LoRA's file.")
    _check_metadata(metadata, where)
    return pairs


def _check_metadata(metadata: dict[str, str], where: str) -> None:
    """peft would act on it: replace weights of the base by others, for one."""
    from peft import LoraConfig

    usual = LoraConfig().to_dict()
    try:
        said = json.loads(metadata.get(METADATA, "{}"))
        settings = [(name.rpartition(".")[2], value) for name, value in said.items()]
    except (ValueError, RecursionError, AttributeError):
        raise UserError(f"{where}: {METADATA} in its header is not valid JSON; fetch it again.") from None
    for name, value in settings:
        known = PLAIN if name != "init_lora_weights" or isinstance(value, bool) else ()
        if name in known or name not in usual or value in (usual[name], None, False, [], {}):
            continue
        raise UserError(
            f"{where}: {name}={str(value)[:60]!r} in its header is more than a plain LoRA; convert it to one."
        )


def _merge(pipeline: Any, each: LoraFile, pairs: int, parts: Sequence[str] | None, where: str) -> None:
    loadable = [name for name in pipeline._lora_loadable_modules if getattr(pipeline, name, None) is not None]
    modules = {name: getattr(pipeline, name) for name in loadable}
    before = {name: _shapes(module) for name, module in modules.items()}
    file = Path(each.path)
    try:
        pipeline.load_lora_weights(
            str(file.parent),
            weight_name=file.name,
            adapter_name=NAME,
            local_files_only=True,
            use_safetensors=True,
        )
        found = sum(map(_adapted, modules.values()))
        if found >= pairs:
            pipeline.fuse_lora(
                components=list(parts or loadable),
                lora_scale=each.scale,
                safe_fusing=True,
                adapter_names=[NAME],
            )
        pipeline.unload_lora_weights()
    except UserError:
        raise
    except LOADING as error:
        raise UserError(
            f"{where} does not fit this teacher, a {type(pipeline).__name__}: it is of another base, or damaged"
            f" ({first_line(error)})."
        ) from None
    if found < pairs or before != {name: _shapes(module) for name, module in modules.items()}:
        raise UserError(
            f"{where} does not fit this teacher, a {type(pipeline).__name__}: {found} of its {pairs} layers are there; it"
            " is of another base."
        )


@contextlib.contextmanager
def _loading_by_peft(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Text encoders take adapters for the length of the block whatever peft transformers asks for: its 5.24 wants a later
    one than there is, and nothing of it is needed here.
    """
    from peft import inject_adapter_in_model, set_peft_model_state_dict
    from transformers import PreTrainedModel

    encoders = [module for module in modules if isinstance(module, PreTrainedModel)]

    def load_adapter(
        encoder: nn.Module, adapter_name: str, adapter_state_dict: Any, peft_config: Any, **_: Any
    ) -> None:
        inject_adapter_in_model(peft_config, encoder, adapter_name=adapter_name)
        set_peft_model_state_dict(encoder, adapter_state_dict, adapter_name)

    for encoder in encoders:
        encoder.load_adapter = functools.partial(load_adapter, encoder)
    try:
        yield
    finally:
        for encoder in encoders:
            del encoder.load_adapter


def _adapted(module: nn.Module) -> int:
    """Layers with the adapter that was loaded."""
    return sum(NAME in getattr(layer, "lora_A", ()) for layer in module.modules())


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
