"""Pipeline directories and hub ids, opened: what they may hold is looked at first."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stepdistill.completeness import check_files, check_weights
from stepdistill.errors import UserError, first_line
from stepdistill.untrusted import LOADING, check_components, check_directory, read_json

if TYPE_CHECKING:
    from stepdistill.families.base import Family

# How a model_index.json says that a pipeline has no such component.
NONE = (None, [None, None])


def _tokenizers(name: str) -> tuple[str, ...]:
    """What a model_index.json may call a tokenizer of this kind, of transformers 4 or 5."""
    return f"transformers.{name}*", "transformers.PreTrainedTokenizerFast", "transformers.TokenizersBackend"


T5_TOKENIZERS, CLIP_TOKENIZERS = _tokenizers("T5Tokenizer"), _tokenizers("CLIPTokenizer")
GEMMA_TOKENIZERS, QWEN_TOKENIZERS = _tokenizers("GemmaTokenizer"), _tokenizers("Qwen2Tokenizer")


def chat(tokenizer: Any, prompts: Iterable[str], **settings: bool) -> list[str]:
    """Each prompt as a user's message to a language model that is about to answer."""
    told = ([{"role": "user", "content": prompt}] for prompt in prompts)
    return [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **settings)
        for messages in told
    ]


def read_index(path: Path) -> dict[str, Any]:
    """model_index.json of a pipeline directory, with a clear sentence when it is not one."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give the directory of a diffusers pipeline.")
    index = path / "model_index.json"
    if not index.is_file():
        raise UserError(f"{path} is not a diffusers pipeline directory: it has no model_index.json.")
    content = read_json(index)
    # A list here would name a file of code.
    if not isinstance(content, dict) or not isinstance(content.get("_class_name"), str):
        raise UserError(
            f"{index} is damaged: not a JSON object naming a pipeline class; fetch or export it again."
        )
    return content


def fetch_index(path: Path, revision: str = "") -> dict[str, Any]:
    """model_index.json behind a hub id. Raises UserError where it cannot be reached."""
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.load_config(str(path), revision=revision or None)
    except UserError:
        raise
    except LOADING as error:
        raise UserError(
            f"{path} is no directory here, and cannot be fetched from the hub: {first_line(error)}"
        ) from None


def read_pipeline(
    path: Path,
    family: type[Family],
    *,
    dtype: torch.dtype = torch.float32,
    revision: str = "",
    variant: str = "",
    **components: Any,
) -> Any:
    """The stock pipeline in a directory or behind a hub id, from safetensors only.

    dtype: of its weights. revision: of a hub id, a branch, tag or commit. variant: of the weights' files, such as
    "fp16". components: those that are not to be loaded, as the pipeline's constructor takes them.

    Raises:
        UserError: there is none, it cannot be loaded, its files lack weights, or it names code or classes that
            `family` does not know.
    """
    from diffusers import DiffusionPipeline

    text, chosen = str(path), {"revision": revision or None, "variant": variant or None}
    hub = is_hub_id(path)
    try:
        if hub:
            index = DiffusionPipeline.load_config(text, revision=revision or None)
            _check_index(path, index, family, components)
            components = _absent(index, family) | components
            path = Path(DiffusionPipeline.download(text, use_safetensors=True, **chosen, **components))
        _check_index(path / "model_index.json", index := read_index(path), family, components)
        components = _absent(index, family) | components
        check_directory(path)
        check_files(path)
        pipeline = DiffusionPipeline.from_pretrained(
            str(path), dtype=dtype, use_safetensors=True, trust_remote_code=False,
            variant=variant or only_variant(path), **components,
        )  # fmt: skip
        check_weights(path, pipeline)
        return pipeline
    except UserError:
        raise
    except LOADING as error:
        way = ""
        if hub and "safetensors" in str(error) and not variant:
            way = "; if its files are called *.fp16.safetensors, set family.variant=fp16"
        elif hub:
            way = "; offline, fetch it before with `hf download` or give a directory"
        raise UserError(f"the pipeline at {text} cannot be loaded: {first_line(error)}{way}") from None


@contextlib.contextmanager
def understood(path: Path | str) -> Iterator[None]:
    """What a loaded pipeline's configuration says of itself may still be of another type, or nonsense: one sentence."""
    try:
        yield
    except UserError:
        raise
    except LOADING as error:
        raise UserError(
            f"the pipeline at {path} cannot be used: {first_line(error)}; fetch it again."
        ) from error


def commit_of(pipeline: Any) -> str:
    """The commit of a hub that a pipeline was fetched at; "" of a directory from elsewhere."""
    path = Path(pipeline.name_or_path or "")
    return path.name if path.parent.name == "snapshots" else ""


def only_variant(path: Path) -> str | None:
    """The variant in the names of all weights of a directory, such as fp16 of model.fp16.safetensors, or None."""
    names = [file.name for file in path.glob("*/*.safetensors")]
    # With shards model.fp16-00001-of-00002.safetensors, too.
    found = {
        match[1] if (match := re.match(r"[^.]+\.([a-z]\w*)(-\d+-of-\d+)?\.safetensors$", name)) else None
        for name in names
    }
    return found.pop() if len(found) == 1 else None


def is_hub_id(path: Path) -> bool:
    """Whether `path` is "owner/name" on a hub and no directory here."""
    text = str(path)
    return not path.exists() and not text.startswith((".", "/", "~")) and text.count("/") == 1


def every_family() -> list[tuple[str, type[Family]]]:
    """All registered families by name."""
    from stepdistill.families import FAMILIES
    from stepdistill.registry import resolve

    return [(name, resolve(name, FAMILIES, "family", registered_only=True)) for name in FAMILIES]


def _check_index(where: Path, index: Any, family: type[Family], left_out: Iterable[str]) -> None:
    name = index.get("_class_name")
    if name not in family.pipelines:
        serving = [key for key, each in every_family() if name in each.pipelines]
        way = f"set family.name={serving[0]}" if serving else "choose another directory or family"
        raise UserError(
            f"{where}: a {name} is none of the pipelines that the family {family.name!r} serves,"
            f" {', '.join(family.pipelines) or 'which are none'}; {way}."
        )
    check_components(where, index, family.components, (*left_out, *family.plain))
    lacking = [
        part for part in family.components
        if part not in family.optional and part not in left_out and index.get(part) in NONE
    ]  # fmt: skip
    if lacking:
        raise UserError(
            f"{where} lacks {', '.join(lacking)}, which a {name} needs; fetch or export the whole pipeline again."
        )


def _absent(index: Any, family: type[Family]) -> dict[str, None]:
    """What a pipeline rightly lacks: not every class knows that by itself."""
    return {part: None for part in family.optional if index.get(part) in NONE}
