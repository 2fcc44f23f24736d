"""Tiny stock pipelines built from configuration: the real ones' `from_pretrained` path without downloads."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from pathlib import Path

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Keep what libraries and earlier tests have left out of later collections: each run of a trainer asks for one,
    which took a second once everything was imported.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is computed once is computed once per session of tests, and leaves no trace in the checkout."""
    from training import precompute

    precompute.CACHE = tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionPipeline directory with random weights: 16x16 images, 4x4x4 latents, v-prediction."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from training.embedded.clip import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length, projection_dim=8,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16, mid_block_add_attention=False,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 16), cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        steps_offset=1, prediction_type="v_prediction", timestep_spacing="trailing",
    )  # fmt: skip
    path = tmp_path_factory.mktemp("pipelines") / "sd"
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(path)  # fmt: skip
    return path


@pytest.fixture(scope="session")
def tiny_pixel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional ConsistencyModelPipeline with random weights: 8x8 images, 3 classes and "no class"."""
    import torch
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=8, num_class_embeds=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("pipelines") / "pixel"
    ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler()).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional DDPMPipeline directory with random weights, eps-prediction."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("pipelines") / "ddpm"
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(path)
    return path


@pytest.fixture
def own_code():
    """As under --allow-code: a test may name its own classes "module:Class"."""
    from stepdistill.registry import allowing_code

    with allowing_code():
        yield


@pytest.fixture
def accelerator_state():
    """Forget accelerate's process-wide state after the test: a precision is fixed once per process otherwise."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def short_runs(accelerator_state: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a few steps: caches stay out of the checkout, and what costs more than such a run does less. The toy's
    own metrics look at few points, and the teacher of a preview takes three steps.
    """
    from stepdistill.families.toy import Toy
    from training import preview

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Toy, "sliced_w1", lambda self, draw: float(draw(8).std()))
    monkeypatch.setattr(preview, "TEACHER_STEPS", 3)
    monkeypatch.setattr(Toy, "modes_covered", lambda self, draw: float(len(draw(8))))
