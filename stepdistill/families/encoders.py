"""Text encoders and what they are known by: they leave memory once all prompts are encoded, and come back for others."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.families.reading import only_variant
from stepdistill.provenance import sha256_of_files, sha256_of_weights

# Fields of a configuration that say where weights lie, not what they are.
WHERE = ("teacher", "revision", "variant", "lora")


class TextParts(Family):
    """A family whose pipeline turns prompts into conditions by encoders of its own.

    Attributes:
        text_parts: those components, of no use once all prompts are encoded.
    """

    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder",)
    config: Any
    # Components that have left memory, with their classes, and what they were known by.
    _dropped: Mapping[str, type] = {}
    _key: str = ""

    def text_modules(self) -> dict[str, nn.Module]:
        """Those of `text_parts` that the pipeline has, in memory now."""
        text = {name: getattr(self.pipeline, name, None) for name in self.text_parts}
        return {name: part for name, part in text.items() if part is not None}

    @property
    def has_text(self) -> bool:
        # A pipeline that is not whole has no place its parts come back from.
        return self.pipeline is not None and bool(self._dropped or self.text_modules())

    def text_key(self) -> str:
        if not self._key:
            config = {name: value for name, value in asdict(self.config).items() if name not in WHERE}
            parts = {name: described(part) for name, part in self.text_modules().items()}
            said = [
                self.name,
                type(self.pipeline).__name__,
                config,
                list(self.resolution),
                parts,
                self._tokenizers(),
            ]
            self._key = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()
        return self._key

    def _tokenizers(self) -> dict[str, str]:
        """A checksum of the files of each tokenizer, whatever kind it is."""
        found = {}
        for name, part in self.pipeline.components.items():
            if name.startswith(("tokenizer", "processor")) and part is not None:
                with tempfile.TemporaryDirectory() as folder:
                    part.save_pretrained(folder)
                    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
                    found[name] = sha256_of_files(files, Path(folder))
        return found

    def drop_text(self) -> None:
        if self.has_text and not self._dropped:
            self._dropped = {name: type(part) for name, part in self.text_modules().items()}
            self.pipeline.register_modules(**dict.fromkeys(self._dropped))

    def load_text(self) -> None:
        dropped, self._dropped = self._dropped, {}
        for name, kind in dropped.items():
            path = self.pipeline.name_or_path
            part = kind.from_pretrained(
                path, subfolder=name, dtype=getattr(torch, self.config.dtype), use_safetensors=True,
                variant=self.config.variant or only_variant(Path(path)),
            )  # fmt: skip
            self.pipeline.register_modules(**{name: part.eval().requires_grad_(False)})


def described(module: nn.Module) -> list[str]:
    """What a module's output depends on: its class, configuration and weights."""
    config = module.config if isinstance(module.config, Mapping) else module.config.to_dict()
    kept = {name: value for name, value in dict(config).items() if not name.startswith("_")}
    return [type(module).__name__, json.dumps(kept, sort_keys=True, default=str), sha256_of_weights(module)]


def limit_tokens(tokenizers: Mapping[str, Any], modules: Mapping[str, nn.Module], where: Path) -> None:
    """Let no tokenizer give more than its encoder has places for, which one without a limit of its own would.

    Raises:
        UserError: a tokenizer has more words than its encoder knows.
    """
    for name, tokenizer in tokenizers.items():
        config = getattr(modules.get(name.replace("tokenizer", "text_encoder")), "config", None)
        places = getattr(config, "max_position_embeddings", None)
        if places and tokenizer.model_max_length > places:
            tokenizer.model_max_length = places
        words = getattr(config, "vocab_size", None)
        if words and len(tokenizer) > words:
            raise UserError(
                f"{where}: the {name} has {len(tokenizer)} words, of which its encoder knows {words}; fetch it again."
            )
