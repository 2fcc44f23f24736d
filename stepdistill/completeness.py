"""Whether a pipeline's weights were all in its files.

A library that does not find a tensor in a file draws it at random and says so in its log; what such a pipeline draws
is noise. So the names in the files are compared with those in the networks before anything is drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from stepdistill.errors import UserError

# Names in a message.
SHOWN = 5


def check_files(path: Path) -> None:
    """UserError for a safetensors file in a pipeline directory that is cut off or damaged."""
    for file in sorted(path.glob("*/*.safetensors")):
        _names(file)


def check_weights(path: Path, pipeline: Any) -> None:
    """UserError, with the names, where a network of a loaded pipeline has weights that its files lack."""
    for part, network in pipeline.components.items():
        folder = path / part
        if not isinstance(network, nn.Module) or not folder.is_dir():
            continue
        held = {name for file in sorted(folder.glob("*.safetensors")) for name in _names(file)}
        state = network.state_dict(keep_vars=True)
        there = {tensor.data_ptr() for name, tensor in state.items() if name in held}
        # Tied weights are stored once.
        absent = [
            name for name, tensor in state.items() if name not in held and tensor.data_ptr() not in there
        ]
        if held and absent and (lacking := _lacking(folder, network)):
            more = f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
            raise UserError(
                f"{folder} lacks {', '.join(lacking[:SHOWN])}{more}, which its {type(network).__name__} needs; fetch or "
                "export it again."
            )


def _lacking(folder: Path, network: nn.Module) -> list[str]:
    """What the library itself misses: it knows older names of the same tensors."""
    _, found = type(network).from_pretrained(str(folder), output_loading_info=True, use_safetensors=True)
    return sorted(found["missing_keys"])


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is corrupt or cut off ({str(error).splitlines()[0][:100]}); fetch or export it again."
        ) from None
