"""Inpainting: what the UNet sees of an image and a mask is what its stock pipeline shows it, in training and in students."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import worlds
from diffusers import DDIMScheduler, DiffusionPipeline
from models import TOLD, step_of_each_phase
from runs import assert_same_run, interrupt_in, toy
from stock import card_code, exported
from tiny.sd import build
from worlds import World

from stepdistill.denoiser import guided
from stepdistill.errors import UserError
from stepdistill.families.sd import SD
from stepdistill.families.sd_inpaint import SDInpaint, random_masks
from stepdistill.methods.assemble import assemble
from stepdistill.noise import SampleNoise
from stepdistill.sampling import MANY_STEPS
from training import run as running
from training.data.base import Source

PROMPTS, SEEDS, STEPS = TOLD["prompt"], [5, 6], 4


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inpaint") / "teacher"
    torch.manual_seed(0)
    build(inpaint=True).save_pretrained(path)
    return path


@pytest.fixture
def family(teacher) -> SDInpaint:
    return SDInpaint(SDInpaint.Config(teacher=str(teacher)))


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """Two images, uint8, and masks of a half each."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8))
    masks = torch.zeros(2, 1, 32, 32)
    masks[0, :, :, 12:], masks[1, :, 7:19] = 1, 1
    return images, masks


def stock(directory: Path, hidden: dict, images, masks, steps: int, **call) -> torch.Tensor:
    pipeline = DiffusionPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    if isinstance(steps, int) and "ddim" in call:
        call.pop("ddim")
        pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
        )
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    # The pipeline draws of the latents' distribution what we take the mean of.
    return pipeline(
        list(PROMPTS), image=images / 127.5 - 1, mask_image=masks, masked_image_latents=hidden["masked"], generator=generators,
        num_inference_steps=steps, height=32, width=32, output_type="latent", **call,
    ).images  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_teacher_fills_a_mask_as_its_stock_pipeline_does(family, teacher, guidance):
    images, masks = pictures()
    hidden = family.hidden(images, masks)
    cond, uncond = family.encode(PROMPTS) | hidden, family.uncond(2) | hidden
    noise = torch.stack(
        [torch.randn(family.shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    )
    times = MANY_STEPS.grid(family.schedule, STEPS)

    def predict(x_t, t, c):
        return guided(family.teacher, x_t, t, c, uncond, guidance)

    with torch.no_grad():
        x_t = MANY_STEPS.first_input(family.schedule, noise, times[0])
        ours = MANY_STEPS.sample(predict, x_t, times, lambda n: noise, cond, t_min=family.schedule.t_min)
    theirs = stock(teacher, hidden, images, masks, STEPS, guidance_scale=guidance, ddim=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    plain = stock(
        teacher,
        family.hidden(images, 1 - masks),
        images,
        1 - masks,
        STEPS,
        guidance_scale=guidance,
        ddim=True,
    )
    assert not torch.allclose(theirs, plain, atol=1e-2)


def test_masks_are_of_their_samples_alone_and_of_every_kind():
    many = random_masks(SampleNoise(range(200), step=3), 24, 36)
    assert many.shape == (200, 1, 24, 36) and set(many.unique().tolist()) == {0.0, 1.0}
    # Whatever batch a sample is in, and only in its own step.
    assert torch.equal(random_masks(SampleNoise(range(50, 60), step=3), 24, 36), many[50:60])
    assert not torch.equal(random_masks(SampleNoise(range(200), step=4), 24, 36), many)
    shares = many.mean((1, 2, 3))
    assert 0.03 < float((shares == 1).float().mean()) < 0.2 and float(shares.min()) > 0
    filled = [
        bool(mask[rows[:, None], columns].all())
        for mask in many[:, 0]
        for rows, columns in [(mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0])]
    ]
    assert 0.4 < np.mean(filled) < 0.7


@pytest.mark.parametrize("name", ["dmd2", "lcm", pytest.param("scm", marks=pytest.mark.slow)])
def test_methods_train_on_masks(family, name):
    own = {"gan_weight": 1e-2} if name == "dmd2" else worlds.SETTINGS.get(name, {})
    method = worlds.method(name, **own)
    torch.manual_seed(0)
    nets = assemble(method, family)
    worlds.stir(nets.student)
    images, masks = pictures()

    class Pictures(Source):
        def images(self, indices):
            return images[list(indices)].movedim(1, -1).numpy()

    source = Pictures(None)
    source.captions = tuple(PROMPTS)
    made = World(method, family, nets, nets.student, source)
    plain = family.encode

    def encode(prompts):
        return plain(prompts) | family.hidden(images, masks)

    family.encode = encode
    for trained, distances in step_of_each_phase(made).items():
        assert set(trained) == set(distances) and all(distances.values())


def test_a_run_draws_masks_over_its_images_and_goes_on_bit_for_bit(
    teacher, tmp_path, monkeypatch, short_runs
):
    def recipe(out: str):
        family = {"name": "sd_inpaint", "teacher": str(teacher)}
        data = {"name": "scenes", "size": 8, "resolution": 32}
        settings = ("run.steps=2", "run.log_every=1", "optim.batch_size=2", "method.student_every=1")
        return toy(tmp_path / out, *settings, family=family, data=data)

    seen, original = [], SDInpaint.completed

    def completed(self, *given):
        cond, uncond = original(self, *given)
        assert torch.equal(cond["mask"], uncond["mask"]) and torch.equal(cond["masked"], uncond["masked"])
        seen.append(cond["mask"])
        return cond, uncond

    monkeypatch.setattr(SDInpaint, "completed", completed)
    running.run(recipe("whole"))
    assert len(seen) == 4 and len({mask.numpy().tobytes() for mask in seen}) == 4
    with monkeypatch.context() as patch:
        interrupt_in(patch, 0)
        with pytest.raises(KeyboardInterrupt):
            running.run(recipe("halves"))
    running.run(recipe("halves"))
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


@pytest.mark.parametrize("name", ["dmd2", "progressive"])
def test_a_student_leaves_as_the_stock_inpainting_pipeline(family, teacher, tmp_path, name):
    method = worlds.method(name, steps=(4,))
    sampler = exported(family, method, tmp_path / "student", {"teacher": str(teacher)})
    grey, everything = torch.full((2, 3, 32, 32), 127, dtype=torch.uint8), torch.ones(2, 1, 32, 32)
    ours = sampler.at(4, chunk=2).x0(PROMPTS, SEEDS)
    hidden = family.hidden(grey, everything)
    assert card_code(tmp_path / "student", tmp_path).std() > 1
    theirs = stock(tmp_path / "student", hidden, grey, everything, 4, guidance_scale=1.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_what_is_no_inpainting_is_refused_and_says_where_it_belongs(family, teacher, tiny_sd, tmp_path):
    with pytest.raises(UserError, match=r"set family\.name=sd_inpaint"):
        SD(SD.Config(teacher=str(teacher)))
    with pytest.raises(UserError, match=r"set family\.name=sd\."):
        SDInpaint(SDInpaint.Config(teacher=str(tiny_sd)))
    with pytest.raises(UserError, match=r"student\.init=random"):
        family.student("random", ())
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    recipe = toy(
        tmp_path / "run",
        family={"name": "sd_inpaint", "teacher": str(teacher)},
        data={"name": "prompts", "path": str(prompts)},
    )
    with pytest.raises(UserError, match=r"is told parts of images, and data\.name=prompts has none"):
        running.build(recipe)
