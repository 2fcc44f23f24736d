"""Pipelines that paint, a tiny feature net, and references small enough for a test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import Painter, tiny_extractor, without_plots

import stepdistill
from evaluation import protocol as protocols
from evaluation.extractors import Extractor
from evaluation.feature_net import FeatureNet
from evaluation.metrics import mmd, prdc
from evaluation.protocol import PROTOCOLS
from evaluation.references import SceneReference
from stepdistill import scenes
from stepdistill.errors import UserError


@pytest.fixture(scope="session")
def extractor() -> Extractor:
    return tiny_extractor()


@pytest.fixture(scope="session")
def net(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("extractor") / "tiny"
    torch.manual_seed(0)
    FeatureNet("tiny", 32, 16, {"label": ["a", "b"]}).save(path)
    return path


@pytest.fixture(params=[1000, 7])
def block(request, monkeypatch) -> int:
    """Blocks larger than all sets, and blocks which divide nothing."""
    for module in (mmd, prdc):
        monkeypatch.setattr(module, "_BLOCK", request.param)
    return request.param


@pytest.fixture
def no_plots(monkeypatch) -> None:
    without_plots(monkeypatch)


@pytest.fixture
def painters(tmp_path, monkeypatch) -> dict[str, Painter]:
    """`stepdistill.load` finds a teacher and a student under tmp_path; the reference is small."""
    found = {}
    for kind in ("teacher", "student"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "model_index.json").write_text("{}")
        found[kind] = Painter(tmp_path / kind, kind)

    def load(path, device="cpu", dtype=torch.float32) -> Painter:
        if Path(path).name not in found:
            raise UserError(f"{path} does not exist.")
        return found[Path(path).name]

    monkeypatch.setattr(stepdistill, "load", load)
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    small = replace(PROTOCOLS["scenes-2k"], reference=SceneReference(n=100))
    monkeypatch.setitem(protocols.PROTOCOLS, "scenes-2k", small)
    return found


@pytest.fixture(scope="session")
def clip_directory(tmp_path_factory) -> Path:
    """A random CLIPModel saved as the embedded one is: weights, tokenizer, preprocessor_config.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("clip")
    words = ("<pad>", "<start>", "<unk>", "<end>", *scenes.VOCABULARY)
    ids = {word: index for index, word in enumerate(words)}
    tokens = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unk>",
        model_max_length=24,
    )  # fmt: skip
    tokenizer.save_pretrained(path)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(ids), "max_position_embeddings": 24}
    text |= {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    vision = {"image_size": 64, "patch_size": 16}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=small | text, vision_config=small | vision, projection_dim=8)
    model = CLIPModel(config)
    model.save_pretrained(path)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path
