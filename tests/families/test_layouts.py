"""Teachers outside the usual layout: served as their pipelines draw them, or refused by the field that says so."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
import worlds
from diffusers import (
    AutoencoderTiny,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    LDMPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.schedulers import CMStochasticIterativeScheduler
from models import SEEDS, drawn_by_both, family_of, model_world, step_of_each_phase
from stock import assert_comes_back, exported, stock_images
from tiny.sd import build
from tiny.sdxl import build as build_sdxl

from stepdistill.errors import UserError
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.families.sdxl import SDXL
from stepdistill.methods.assemble import assemble

PIXEL = {
    "sample_size": 8, "block_out_channels": (16, 16), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"),
}  # fmt: skip


def sd(tmp_path, *, vae=None, **unet):
    """Directory of a tiny Stable Diffusion whose UNet, or VAE, is another."""
    torch.manual_seed(0)
    pipeline, path = build(), tmp_path / "teacher"
    if unet:
        pipeline.register_modules(unet=other(pipeline.unet, **unet))
    if vae is not None:
        pipeline.register_modules(vae=vae)
    pipeline.save_pretrained(path)
    return path


def other(unet, **settings):
    config = dict(unet.config) | settings
    # Of what it was made without; it would undo ours.
    config.pop("_use_default_values", None)
    return UNet2DConditionModel.from_config(config)


def ddpm(tmp_path, scheduler=None, **unet):
    torch.manual_seed(0)
    path = tmp_path / "teacher"
    DDPMPipeline(UNet2DModel(**PIXEL | unet), scheduler or DDPMScheduler()).save_pretrained(path)
    return path


# ------------------------------------------------------------------------------------------------------------- served


def test_of_a_learned_variance_the_first_half_is_kept(tmp_path):
    path = sd(tmp_path, out_channels=8)
    whole = DiffusionPipeline.from_pretrained(path).unet
    family = SD.from_directory(path)
    x, t, cond = torch.randn(2, *family.shape), torch.tensor([10.0, 900.0]), family.encode(["a", "b"])
    raw = family.teacher(x, t, cond).raw
    torch.testing.assert_close(raw, whole(x, t, cond).sample[:, :4])
    sampler = exported(family, worlds.method("dmd2", steps=(4,)), tmp_path / "student", {"teacher": ""})
    ours = sampler(["a red circle"], [5], steps=4, chunk=1).permute(0, 2, 3, 1).numpy()
    call = {"prompt": "a red circle", "num_inference_steps": 4, "seeds": [5]}
    assert np.abs(stock_images(tmp_path / "student", tmp_path, **call) * 255 - ours).max() <= 1


def test_a_pixel_teacher_with_a_learned_variance_leaves_without(tmp_path):
    path = ddpm(tmp_path, DDPMScheduler(variance_type="learned_range"), out_channels=6)
    whole = DiffusionPipeline.from_pretrained(path).unet
    family = Pixel(Pixel.Config(teacher=str(path)))
    assert family.shape == (3, 8, 8)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 900.0])
    torch.testing.assert_close(family.teacher(x, t).raw, whole(x, t).sample[:, :3])
    call = {"batch_size": 1, "num_inference_steps": 2, "seeds": [5]}
    sampler = exported(family, worlds.method("dmd2", steps=(2,)), tmp_path / "student", {"teacher": ""})
    ours = sampler([0], [5], steps=2, chunk=1).permute(0, 2, 3, 1).numpy()
    assert np.abs(stock_images(tmp_path / "student", tmp_path, **call) * 255 - ours).max() <= 1
    # A teacher that was trained on leaves with a scheduler that asks for no variance either.
    exported(family, worlds.method("pretrain"), tmp_path / "again", {"teacher": ""})
    assert stock_images(tmp_path / "again", tmp_path, **call).std() > 0.01


def test_a_tiny_decoder_decodes(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )  # fmt: skip
    path = sd(tmp_path, vae=vae)
    family = SD.from_directory(path)
    ours, theirs = drawn_by_both(family, path, 3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert family.encode_images(images).shape == (2, *family.shape)
    assert family.parameters()["decoder"] == sum(p.numel() for p in vae.decoder.parameters())


def test_the_statistics_that_a_vae_says_are_the_pipelines(tmp_path):
    pipeline = build_sdxl()
    pipeline.vae.register_to_config(latents_mean=[-1.6, 1.1, 0.4, -0.2], latents_std=[8.4, 5.9, 0.5, 1.3])
    pipeline.save_pretrained(tmp_path / "teacher")
    family = SDXL.from_directory(tmp_path / "teacher")
    ours, theirs = drawn_by_both(family, tmp_path / "teacher", 3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    z = torch.randn(2, *family.shape)
    torch.testing.assert_close(family.denormalised(family.normalised(z)), z)


def test_a_unet_without_a_size_of_its_own_is_given_one(tmp_path):
    path = sd(tmp_path, sample_size=None)
    with pytest.raises(UserError, match=r"family\.resolution.*says no size of its own"):
        SD.from_directory(path)
    family = SD.from_directory(path, {"resolution": [32, 48]})
    ours, theirs = drawn_by_both(family, path, 3)
    assert ours.shape == (2, 3, 32, 48)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_grey_images_are_learnt_and_drawn(tmp_path):
    family = Pixel(Pixel.Config(teacher=str(ddpm(tmp_path, in_channels=1, out_channels=1))))
    assert family.shape == (1, 8, 8)
    red = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    red[:, 0] = 255
    x0 = family.encode_images(red)
    assert x0.shape == (1, 1, 8, 8) and float(x0[0, 0, 0, 0]) == pytest.approx(2 * 0.299 - 1, abs=1e-5)
    grey = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    torch.testing.assert_close(family.decode(family.encode_images(grey)), grey / 255)
    assert all(step_of_each_phase(model_world(family, "dmd2")).values())
    sampler = exported(family, worlds.method("dmd2", steps=(2,)), tmp_path / "student", {"teacher": ""})
    ours = sampler([0], [5], steps=2, chunk=1)
    assert ours.shape == (1, 3, 8, 8) and bool((ours[:, :1] == ours).all())
    stock = stock_images(tmp_path / "student", tmp_path, batch_size=1, num_inference_steps=2, seeds=[5])
    assert np.abs(stock[..., 0] * 255 - ours[:, 0].numpy()).max() <= 1


@pytest.fixture
def without_null(tmp_path):
    """Ten classes and ten embeddings, as published consistency models of ImageNet have them."""
    torch.manual_seed(0)
    path = tmp_path / "teacher"
    unet = UNet2DModel(**PIXEL, num_class_embeds=10)
    ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler()).save_pretrained(path)
    return path


def test_classes_without_one_that_means_none_are_drawn_unguided(without_null, tmp_path):
    with pytest.raises(UserError, match=r"between 0 and 8.*family\.null_class=false"):
        Pixel(Pixel.Config(teacher=str(without_null))).encode([9])
    family = Pixel(Pixel.Config(teacher=str(without_null), null_class=False))
    assert (family.classes, family.guidable, family.uncond(2)) == (10, False, None)
    assert family.encode([9]).tolist() == [9]
    names = tuple("abcdefghij")
    assert not Pixel(Pixel.Config(teacher=str(without_null), class_names=names)).guidable
    with pytest.raises(UserError, match=r"method\.guidance_scale=3: .*set method\.guidance_scale=1"):
        assemble(worlds.method("dmd2", guidance_scale=3.0), family)
    method = worlds.method("dmd2", steps=(2,), guidance_scale=1.0)
    assert all(step_of_each_phase(model_world(family, "dmd2", guidance_scale=1.0)).values())
    sampler = exported(family, method, tmp_path / "student", {"teacher": ""})
    ours = sampler([9, 0], SEEDS, steps=2, chunk=2)
    assert_comes_back(tmp_path / "student", sampler, [9, 0], SEEDS, steps=2, chunk=2)
    call = {"class_labels": [9, 0], "batch_size": 2, "num_inference_steps": 2, "seeds": SEEDS}
    stock = stock_images(tmp_path / "student", tmp_path, **call)
    assert np.abs(stock * 255 - ours.permute(0, 2, 3, 1).numpy()).max() <= 1


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("unet", "says"),
    [
        ({"in_channels": 9}, r"in_channels=9 in unet/config\.json.*fills in masks"),
        ({"in_channels": 8}, r"in_channels=8 in unet/config\.json"),
        ({"out_channels": 5}, r"out_channels=5 in unet/config\.json"),
        ({"num_class_embeds": 7}, r"num_class_embeds=7 in unet/config\.json"),
        (
            {"class_embed_type": "timestep"},
            r"class_embed_type='timestep' in unet/config\.json",
        ),
        (
            {"addition_embed_type": "text"},
            r"addition_embed_type='text' in unet/config\.json",
        ),
        (
            {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 32},
            r"encoder_hid_dim_type='text_proj' in unet/config\.json",
        ),
    ],
)
def test_a_unet_that_must_be_told_more_is_refused_at_load(tmp_path, unet, says):
    with pytest.raises(UserError, match=says):
        SD.from_directory(sd(tmp_path, **unet))


def test_a_refiner_is_refused_at_load(tmp_path):
    pipeline = build_sdxl()
    pipeline.register_modules(unet=other(pipeline.unet, projection_class_embeddings_input_dim=5 * 8 + 32))
    pipeline.save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"projection_class_embeddings_input_dim=72 .*choose a base model"):
        SDXL.from_directory(tmp_path / "teacher")


@pytest.mark.parametrize(
    ("unet", "says"),
    [
        (
            {"in_channels": 6, "out_channels": 6},
            r"in_channels=6 in unet/config\.json, where images have 3 or 1",
        ),
        ({"out_channels": 4}, r"out_channels=4 in unet/config\.json"),
        ({"class_embed_type": "timestep"}, r"class_embed_type='timestep' in unet/config\.json"),
        ({"sample_size": None}, r"sample_size in unet/config\.json is null"),
    ],
)
def test_a_pixel_unet_of_another_layout_is_refused_at_load(tmp_path, unet, says):
    with pytest.raises(UserError, match=says):
        Pixel(Pixel.Config(teacher=str(ddpm(tmp_path, **unet))))


def test_another_pipeline_under_a_familys_name_is_refused_at_load(tmp_path):
    stock = DiffusionPipeline.from_pretrained(tiny.directory("sd15"))
    unet = other(stock.unet, in_channels=9)
    StableDiffusionInpaintPipeline(
        **dict(stock.components) | {"unet": unet}, requires_safety_checker=False
    ).save_pretrained(tmp_path / "inpaint")
    with pytest.raises(UserError, match="a StableDiffusionInpaintPipeline is none of the pipelines"):
        SD.from_directory(tmp_path / "inpaint")
    with pytest.raises(UserError, match="a DDPMPipeline is none of the pipelines"):
        SD.from_directory(ddpm(tmp_path))
    vqvae = VQModel(block_out_channels=(8,), norm_num_groups=4)
    LDMPipeline(vqvae, UNet2DModel(**PIXEL), DDIMScheduler()).save_pretrained(tmp_path / "ldm")
    with pytest.raises(UserError, match="a LDMPipeline is none of the pipelines"):
        Pixel(Pixel.Config(teacher=str(tmp_path / "ldm")))


def test_the_usual_layout_is_neither_cut_nor_refused():
    family = family_of("sd15")
    stock = DiffusionPipeline.from_pretrained(tiny.directory("sd15"))
    assert torch.equal(family.pipeline.unet.conv_out.weight, stock.unet.conv_out.weight)
    assert type(family.scheduler) is type(stock.scheduler)
