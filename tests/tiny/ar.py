"""A tiny autoregressive model of codes: 8 x 8 images of 2 x 2 places, 12 codes, random weights, the embedded tokenizer."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import VQModel
from transformers import CLIPTextConfig, CLIPTextModel

from stepdistill import assets
from stepdistill.families.autoregressive import write_index, write_network
from stepdistill.families.code_transformer import CodeShape, CodeTransformer

CODES, DIMS, LENGTH = 12, 3, 4


@functools.cache
def directory() -> Path:
    """Where it lies, built once per process. Read it; copy it before you change anything."""
    path = Path(tempfile.mkdtemp(prefix="tiny-ar-"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vqvae = VQModel(
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=DIMS, sample_size=8,
            num_vq_embeddings=CODES, vq_embed_dim=DIMS, mid_block_add_attention=False,
        )  # fmt: skip
        vqvae.quantize.embedding.weight.data.normal_()
        words = CLIPTextConfig(
            vocab_size=28, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=24, projection_dim=16, bos_token_id=1, eos_token_id=3, pad_token_id=0,
        )  # fmt: skip
        network = CodeTransformer(
            CodeShape(CODES, DIMS, LENGTH, width=16, layers=2, heads=2, text_length=16, text_width=16)
        )
        # Laws that differ from place to place, and hang on what came before.
        network.head.weight.data.normal_(std=0.5)
        network.code.weight.data.normal_()
        network.book.copy_(vqvae.quantize.embedding.weight.data)
        encoder = CLIPTextModel(words)
    vqvae.save_pretrained(path / "vqvae")
    encoder.save_pretrained(path / "text_encoder")
    (path / "tokenizer").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(assets.path("clip")) / file, path / "tokenizer" / file)
    write_network(network, path / "transformer")
    write_index(path)
    return path
