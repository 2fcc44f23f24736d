"""What leaves: stock directories that draw the in-memory sampler's image where stepdistill cannot be imported."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import worlds
from stock import PROMPT, assert_comes_back, exported, stock_images

from stepdistill import load
from stepdistill.errors import UserError
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_exported_sd_student_equals_the_in_memory_sampler(tiny_sd, tmp_path, steps):
    family = SD(SD.Config(teacher=str(tiny_sd)))
    directory = tmp_path / "student"
    sampler = exported(family, worlds.method("dmd2", steps=(1, 2, 4)), directory, {"teacher": str(tiny_sd)})
    in_memory = sampler([PROMPT, PROMPT], [5, 6], steps=steps, chunk=2).permute(0, 2, 3, 1).numpy()
    reloaded = load(directory)([PROMPT, PROMPT], [5, 6], steps=steps, chunk=2).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(in_memory, reloaded)
    stock = stock_images(
        directory, tmp_path, prompt=[PROMPT, PROMPT], num_inference_steps=steps, seeds=[5, 6]
    )
    assert np.abs(stock * 255 - in_memory).max() <= 1.0
    # A picture, not one grey.
    assert in_memory.std() > 1


@pytest.mark.parametrize("steps", [1, 4])
def test_a_deterministic_student_equals_the_stock_ddim_pipeline(tiny_sd, tmp_path, steps):
    family, directory = SD(SD.Config(teacher=str(tiny_sd))), tmp_path / "student"
    method = worlds.method("progressive", steps=(steps,))
    sampler = exported(family, method, directory, {"teacher": str(tiny_sd)})
    ours = sampler([PROMPT, PROMPT], [5, 6], steps=steps, chunk=2).permute(0, 2, 3, 1).numpy()
    call = {"prompt": [PROMPT, PROMPT], "num_inference_steps": steps, "seeds": [5, 6]}
    assert np.abs(stock_images(directory, tmp_path, **call) * 255 - ours).max() <= 1.0


@pytest.mark.parametrize(("steps", "noise", "first"), [((1,), "sigma", 625), ((1, 4), "unit", 623)])
def test_a_student_that_starts_at_a_lower_noise_level_equals_the_stock_pipeline(
    tiny_sd, tmp_path, steps, noise, first
):
    """SiD from rho = 2.5: sigma noise in one step (Euler), unit noise where it renoises (LCM)."""
    family = SD(SD.Config(teacher=str(tiny_sd)))
    directory = tmp_path / "student"
    sampler = exported(family, worlds.method("sid", steps=steps), directory, {"teacher": str(tiny_sd)})
    assert sampler.sampling.init_noise == noise and sampler.times(max(steps))[0] == first
    call = {"prompt": [PROMPT, PROMPT], "num_inference_steps": max(steps), "seeds": [5, 6]}
    ours = sampler([PROMPT, PROMPT], [5, 6], steps=max(steps), chunk=2).permute(0, 2, 3, 1).numpy()
    reloaded = load(directory)
    assert reloaded.times(max(steps)) == sampler.times(max(steps))
    again = reloaded([PROMPT, PROMPT], [5, 6], steps=max(steps), chunk=2).permute(0, 2, 3, 1).numpy()
    # The shorter table is read from 32-bit betas.
    assert np.abs(ours.astype(int) - again).max() <= 1
    assert np.abs(stock_images(directory, tmp_path, **call) * 255 - ours).max() <= 1.0
    assert ours.std() > 1


def test_a_pixel_student_that_starts_at_a_lower_noise_level_equals_the_stock_pipeline(tiny_pixel, tmp_path):
    family = Pixel(Pixel.Config(teacher=str(tiny_pixel)))
    directory = tmp_path / "student"
    sampler = exported(family, worlds.method("sid", steps=(1,)), directory, {"teacher": str(tiny_pixel)})
    assert sampler.times(1) == pytest.approx((2.5,))
    ours = sampler([2, 0], [5, 6], steps=1, chunk=2).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(load(directory)([2, 0], [5, 6], chunk=2).permute(0, 2, 3, 1).numpy(), ours)
    call = {"class_labels": [2, 0], "batch_size": 2, "num_inference_steps": 1, "seeds": [5, 6]}
    assert np.abs(stock_images(directory, tmp_path, **call) * 255 - ours).max() <= 1.0


def test_a_guidance_embedded_student_equals_the_stock_pipeline(tiny_sd, tmp_path):
    family = SD(SD.Config(teacher=str(tiny_sd)))
    directory = tmp_path / "student"
    sampler = exported(family, worlds.method("lcm", steps=(1, 4)), directory, {"teacher": str(tiny_sd)})
    for guidance in (4.0, 12.0):
        ours = sampler([PROMPT], [7], steps=4, guidance_scale=guidance, chunk=1)
        stock = stock_images(
            directory, tmp_path, prompt=[PROMPT], num_inference_steps=4, guidance_scale=guidance, seeds=[7]
        )
        assert np.abs(stock * 255 - ours.permute(0, 2, 3, 1).numpy()).max() <= 1.0
    other = sampler([PROMPT], [7], steps=4, guidance_scale=4.0, chunk=1)
    # The scale reaches the network.
    assert not torch.equal(ours, other)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_exported_pixel_student_equals_the_in_memory_sampler(tiny_pixel, tmp_path, steps):
    family = Pixel(Pixel.Config(teacher=str(tiny_pixel)))
    directory = tmp_path / "student"
    sampler = exported(family, worlds.method("dmd2", steps=(1, 4)), directory, {"teacher": str(tiny_pixel)})
    ours = sampler([2, 0], [5, 6], steps=steps, chunk=2).permute(0, 2, 3, 1).numpy()
    call = {"class_labels": [2, 0], "batch_size": 2, "num_inference_steps": steps, "seeds": [5, 6]}
    assert np.abs(stock_images(directory, tmp_path, **call) * 255 - ours).max() <= 1.0


def test_an_unconditional_ddpm_student_equals_the_stock_pipeline(tiny_ddpm, tmp_path):
    family = Pixel(Pixel.Config(teacher=str(tiny_ddpm)))
    directory = tmp_path / "student"
    sampler = exported(family, worlds.method("dmd2", steps=(1, 2)), directory, {"teacher": str(tiny_ddpm)})
    ours = sampler([0], [5], steps=2, chunk=1).permute(0, 2, 3, 1).numpy()
    stock = stock_images(directory, tmp_path, batch_size=1, num_inference_steps=2, seeds=[5])
    assert np.abs(stock * 255 - ours).max() <= 1.0


def test_the_teacher_sampler_equals_the_stock_ddim_pipeline(tiny_sd, tmp_path):
    ours = load(tiny_sd)([PROMPT], [5], steps=10, guidance_scale=3.0, chunk=1).permute(0, 2, 3, 1).numpy()
    stock = stock_images(
        tiny_sd, tmp_path, prompt=[PROMPT], num_inference_steps=10, guidance_scale=3.0, seeds=[5]
    )
    assert np.abs(stock * 255 - ours).max() <= 1.0


def test_the_pipelines_own_defaults_say_what_to_pass(tiny_sd, tmp_path):
    """50 steps and guidance 7.5 are the stock defaults: the first is refused by the scheduler, the second has
    no effect.
    """
    from diffusers import DiffusionPipeline

    directory = tmp_path / "student"
    exported(
        SD(SD.Config(teacher=str(tiny_sd))),
        worlds.method("dmd2", steps=(1, 2, 4)),
        directory,
        {"teacher": str(tiny_sd)},
    )
    pipeline = DiffusionPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    # The default 50, and one more than it was made for.
    for wrong in ({}, {"num_inference_steps": 5}):
        with pytest.raises(ValueError, match="original_steps"):
            pipeline(PROMPT, **wrong)

    def draw(guidance):
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            PROMPT, num_inference_steps=2, guidance_scale=guidance, generator=generator, output_type="np"
        ).images

    assert np.array_equal(draw(7.5), draw(1.0))


def test_the_card_holds_code_that_runs(tiny_sd, tmp_path):
    directory = tmp_path / "student"
    exported(
        SD(SD.Config(teacher=str(tiny_sd))),
        worlds.method("dmd2", steps=(1, 2, 4)),
        directory,
        {"teacher": str(tiny_sd)},
    )
    code = (directory / "README.md").read_text().split("```python")[1].split("```")[0]
    scope: dict = {}
    exec(code.replace("PATH_TO_THIS_DIRECTORY", str(directory)).replace("PROMPT", PROMPT), scope)
    assert scope["image"].size == (16, 16)
    # The prompt itself, in no further quotes.
    assert 'prompt="PROMPT"' in code
    card = json.loads((directory / "stepdistill.json").read_text())
    assert card["sampling"]["steps"] == [1, 2, 4] and card["timesteps"]["4"] == [999, 749, 499, 249]


def test_what_a_student_cannot_serve_is_refused_in_one_sentence(tiny_sd, tmp_path):
    family = SD(SD.Config(teacher=str(tiny_sd)))
    sampler = exported(
        family, worlds.method("dmd2", steps=(1, 2, 4)), tmp_path / "student", {"teacher": str(tiny_sd)}
    )
    for wrong, says in (
        ({"steps": 3}, "1, 2, 4"),
        ({"steps": 1, "guidance_scale": 7.5}, "guidance"),
        ({"steps": 1, "negative_prompts": ["a star"]}, "negative prompt"),
        ({"steps": True}, "whole number"),
    ):
        with pytest.raises(UserError, match=says):
            sampler([PROMPT], [0], **wrong)
    with pytest.raises(UserError, match="one length"):
        sampler([PROMPT], [0, 1])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: (d / "model_index.json").unlink(), "model_index.json"),
        (lambda d: (d / "model_index.json").write_text("{"), "damaged"),
        (lambda d: (d / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"no"), "corrupt or cut off"),
        (
            lambda d: (d / "unet/diffusion_pytorch_model.safetensors").rename(
                d / "unet/diffusion_pytorch_model.bin"
            ),
            "pickled weights",
        ),
        (lambda d: (d / "stepdistill.json").write_text("{"), "not JSON"),
    ],
)
def test_a_damaged_directory_is_one_sentence(tiny_sd, tmp_path, damage, says):
    import shutil

    directory = tmp_path / "copy"
    shutil.copytree(tiny_sd, directory)
    damage(directory)
    with pytest.raises(UserError, match=says):
        load(directory)
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_tcd_student_equals_the_stock_pipeline_at_its_eta(tiny_sd, tmp_path, eta):
    family = SD(SD.Config(teacher=str(tiny_sd)))
    directory = tmp_path / "student"
    method = worlds.method("tscd", steps=(1, 2, 4), segments=1, eta=eta)
    sampler = exported(family, method, directory, {"teacher": str(tiny_sd)})
    for steps in (1, 4):
        ours = sampler([PROMPT], [7], steps=steps, chunk=1)
        assert_comes_back(directory, sampler, [PROMPT], [7], steps=steps, chunk=1)
        stock = stock_images(
            directory, tmp_path, prompt=[PROMPT], num_inference_steps=steps, eta=eta, seeds=[7]
        )
        assert np.abs(stock * 255 - ours.permute(0, 2, 3, 1).numpy()).max() <= 1.0
    assert f"eta={eta:g}" in (directory / "README.md").read_text()


def test_a_two_time_student_comes_back_as_it_left_and_says_what_stock_pipelines_lack(
    tiny_sd, tiny_pixel, tmp_path
):
    for family, told in (
        (SD(SD.Config(teacher=str(tiny_sd))), PROMPT),
        (Pixel(Pixel.Config(teacher=str(tiny_pixel))), 2),
    ):
        directory = tmp_path / family.name
        sampler = exported(family, worlds.method("meanflow", steps=(1, 2)), directory, {"teacher": ""})
        for steps in (1, 2):
            assert_comes_back(directory, sampler, [told], [7], steps=steps, chunk=1)
        readme = (directory / "README.md").read_text()
        assert "No diffusers scheduler tells the network the time its jump ends at" in readme
        code = readme.split("```python")[1].split("```")[0]
        scope: dict = {}
        exec(code.replace("PATH_TO_THIS_DIRECTORY", str(directory)).replace("PROMPT", PROMPT), scope)
        assert scope["image"].shape[0] == 3


def test_where_no_stock_scheduler_fits_the_card_says_why(tiny_pixel, tiny_ddpm, tmp_path):
    method = worlds.method("tscd", steps=(1, 2), segments=1, eta=0.5)
    for name, says in ((tiny_pixel, "DDPM table only"), (tiny_ddpm, "passes no eta")):
        family = Pixel(Pixel.Config(teacher=str(name)))
        exported(family, method, tmp_path / name.name, {"teacher": ""})
        assert says in (tmp_path / name.name / "README.md").read_text()


def test_a_smaller_student_leaves_as_a_stock_pipeline(tiny_sd, tmp_path):
    """Its UNet is made from a partial configuration, beside a teacher of another width."""
    from stepdistill import export, load
    from stepdistill.families.sd import SD

    small = {
        "sample_size": 4, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": [8, 8],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 4, "norm_num_groups": 4,
    }  # fmt: skip
    family = SD(SD.Config(teacher=str(tiny_sd), student_unet=small))
    student = family.student("random", ()).eval()
    recipe = {"family": {"teacher": str(tiny_sd)}, "method": {"name": "dmd2"}, "run": {"out": "runs/x"}}
    export.write(family, student, tmp_path / "student", export.card_of(family, worlds.method("dmd2"), recipe))
    loaded = load(tmp_path / "student")
    assert loaded.parameters["denoiser"] < 0.6 * sum(p.numel() for p in family.teacher.parameters())
    x, t, cond = (
        torch.randn(2, 4, 4, 4),
        torch.tensor([10.0, 700.0], dtype=torch.float64),
        torch.randn(2, 7, 16),
    )
    torch.testing.assert_close(loaded.denoiser(x, t, cond).raw, student(x, t, cond).raw)
