"""What a model reads of a prompt: how many tokens, which words it does not know, and which come after its limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from app.request import MAX_PROMPT, Invalid, shown

if TYPE_CHECKING:
    from app.engine import Engine

# Words of a vocabulary that is small enough to be shown whole.
SMALL = 200


class Reader:
    """Reads prompts as the tokenizers of an engine's models do, with copies of them: a tokenizer belongs to one thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._known: dict[str, tuple[Any, int] | None] = {}

    def read(self, model: str, prompt: str) -> dict[str, Any]:
        """Of a prompt: "tokens", "limit", "unknown" and "past" as [start, end] of its characters, and "words" where the
        model knows so few that they can be listed. {} where nothing is known of the model's tokenizer.

        Raises:
            Invalid: there is no such model, or the prompt is too long.
        """
        if model not in self.engine.entries:
            raise Invalid("model", f"there is no model {shown(model)}.")
        if len(prompt) > MAX_PROMPT:
            raise Invalid("prompt", f"prompt must have at most {MAX_PROMPT} characters, got {len(prompt)}.")
        found = self._tokenizer(model)
        if found is None:
            return {}
        tokenizer, limit = found
        read = tokenizer.encode(prompt)
        unknown = _unknown_id(tokenizer)
        special = sum(read.special_tokens_mask)
        # The last place is the end's.
        fits = limit - 1 if special > 1 else limit
        spans = list(zip(read.ids, read.offsets, read.special_tokens_mask, strict=True))
        words = sorted(word for word in tokenizer.get_vocab(with_added_tokens=False) if word.isalpha())
        return {
            "tokens": len(read.ids),
            "limit": limit,
            "unknown": [list(span) for token, span, _ in spans if token == unknown],
            "past": [list(span) for at, (_, span, own) in enumerate(spans) if at >= fits and not own],
            "words": words if len(words) <= SMALL else None,
        }

    def _tokenizer(self, model: str) -> tuple[Any, int] | None:
        if model not in self._known:
            loaded = self.engine.models.loaded.get(model) if self.engine.models is not None else None
            if loaded is None:
                return None
            self._known[model] = _copy(getattr(loaded.sampler.pipeline, "tokenizer", None))
        return self._known[model]


def _copy(tokenizer: Any) -> tuple[Any, int] | None:
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    own = Tokenizer.from_str(backend.to_str())
    own.no_truncation()
    own.no_padding()
    return own, int(tokenizer.model_max_length)


def _unknown_id(tokenizer: Any) -> int | None:
    """Of the token that stands for any unknown word; None where every text has tokens of its own."""
    name = getattr(tokenizer.model, "unk_token", None)
    # Models of byte pairs name one that never comes up.
    return tokenizer.token_to_id(name) if name and type(tokenizer.model).__name__ != "BPE" else None
