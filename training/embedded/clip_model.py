"""The micro-CLIP: a stock CLIPModel of a million parameters, its tokenizer of whole words, and how both are saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from stepdistill import scenes
from stepdistill.errors import atomic_write
from training.embedded import common

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerFast

# Longest prompt, with start and end.
TOKENS = 24
# Ids 0 to 3; CLIP's pooling treats an end token of id 2 differently.
SPECIAL = ("<pad>", "<start>", "<unk>", "<end>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the vocabulary; case and punctuation do not matter; other words become <unk>."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate((*SPECIAL, *scenes.VOCABULARY))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(name, ids[name]) for name in ("<start>", "<end>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TOKENS,
        pad_token="<pad>",
        bos_token="<start>",
        unk_token="<unk>",
        eos_token="<end>",
        padding_side="right",
        truncation_side="right",
        clean_up_tokenization_spaces=False,
    )


def build_model() -> CLIPModel:
    """A fresh CLIPModel with 1 M parameters."""
    from transformers import CLIPConfig, CLIPModel

    token = {
        name: SPECIAL.index(f"<{word}>") for name, word in (("pad", "pad"), ("bos", "start"), ("eos", "end"))
    }
    text = {
        "vocab_size": len(SPECIAL) + len(scenes.VOCABULARY),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": TOKENS,
        "hidden_act": "gelu",
        "projection_dim": 64,
        **{f"{name}_token_id": value for name, value in token.items()},
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "hidden_act": "gelu",
        "projection_dim": 64,
    }
    # The initialiser is scaled for widths near 1,000; at 128 it leaves the first layers nearly blind.
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=64, initializer_factor=3.0)
    )


def embed_images(model: CLIPModel, images: Tensor) -> Tensor:
    """Embeddings (N, 64), not normalised, of uint8 images (N, 3, 64, 64)."""
    return look(model, images)[0]


def look(model: CLIPModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings as `embed_images`, and the last states (N, 64, 128) of the image's patches, row by row."""
    seen = model.vision_model(pixel_values=common.to_unit(images))
    return model.visual_projection(seen.pooler_output), seen.last_hidden_state[:, 1:]


def embed_captions(model: CLIPModel, ids: Tensor) -> Tensor:
    """Embeddings (N, 64), not normalised, of token ids (N, L)."""
    return model.text_projection(model.text_model(input_ids=ids).pooler_output)


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> Tensor:
    """Ids (N, L), L the longest: attention is causal, so padding behind the end token changes no embedding."""
    return tokenizer(list(captions), padding="longest", truncation=True, return_tensors="pt").input_ids


def save(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, clip: Path, teacher: Path) -> None:
    """Write CLIP with its processors, and the teacher's text_encoder and tokenizer, in half precision."""
    from transformers import CLIPImageProcessor

    half = copy.deepcopy(model).half()
    processor = CLIPImageProcessor(
        size={"shortest_edge": 64},
        crop_size={"height": 64, "width": 64},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    with atomic_write(clip) as temporary:
        half.save_pretrained(temporary)
        save_tokenizer(tokenizer, temporary)
        processor.save_pretrained(temporary)
    with atomic_write(teacher / "text_encoder") as temporary:
        half.text_model.save_pretrained(temporary)
    with atomic_write(teacher / "tokenizer") as temporary:
        save_tokenizer(tokenizer, temporary)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the tokenizer under the class name that every release of transformers knows."""
    tokenizer.save_pretrained(out)
    config = json.loads((Path(out) / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (Path(out) / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
