"""Drawing from an image: the stock pipelines' walk, a student's own levels, and the two ends of strength."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch

from stepdistill import assets, load, scenes
from stepdistill.errors import UserError
from stepdistill.families import FAMILIES
from stepdistill.families.reading import every_family
from stepdistill.image_to_image import left_of, left_of_levels

PROMPTS = ["a large green star on a black background", "a small red circle on a white background"]
SEEDS = [3, 4]


@pytest.fixture(scope="module")
def student():
    return load(assets.path("student"))


@pytest.fixture(scope="module")
def teacher():
    return load(assets.path("teacher"))


@pytest.fixture(scope="module")
def images():
    drawn = [torch.from_numpy(scenes.image_at(i)[1]) for i in (0, 1)]
    return torch.stack(drawn).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("strength", [0.3, 0.58, 0.8])
def test_a_teacher_draws_what_the_stock_pipeline_does_from_the_same_noise(teacher, images, strength):
    own = teacher.pipeline
    parts = {name: part for name, part in own.components.items() if name != "image_encoder"}
    stock = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    x0 = teacher.family_.encode_images(images)
    theirs = stock(
        PROMPTS, image=x0, strength=strength, num_inference_steps=10, guidance_scale=3.0, output_type="latent",
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
    ).images  # fmt: skip
    drawer = teacher.at(10, 3.0, strength=strength, chunk=2)
    ours = drawer.x0(PROMPTS, SEEDS, images=images)
    assert drawer.nfe == 2 * int(10 * strength) and drawer.label.endswith(f"strength {strength:g}")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_student_is_called_at_levels_of_its_own_as_the_stock_scheduler_chooses_them(
    student, steps, strength
):
    times = student.times(steps, strength)
    assert set(times) <= set(student.levels) and list(times) == sorted(times, reverse=True)
    left = int(4 * strength)
    assert len(times) == min(steps, left) and times[0] == student.levels[4 - left]
    scheduler = diffusers.LCMScheduler.from_pretrained(student.path, subfolder="scheduler")
    if steps <= left:
        scheduler.set_timesteps(steps, strength=strength)
        assert scheduler.timesteps.tolist() == list(times)


def test_the_levels_of_a_student_are_those_of_its_most_steps(student, teacher):
    assert student.levels == student.times(4) and len(student.levels) == 4
    for steps in (1, 2, 4):
        assert left_of_levels(student.levels, steps, 1.0) == student.times(steps)


def test_how_many_steps_are_left():
    assert left_of((4, 3, 2, 1), 0.5) == (2, 1) and left_of((4, 3, 2, 1), 0.2) == ()
    assert left_of(range(50), 0.58) == tuple(range(22, 50))
    # Pipelines of flow models round up.
    assert left_of((4, 3, 2, 1), 0.3, up=True) == (2, 1) and left_of((4, 3), 1.0, up=True) == (4, 3)
    assert left_of_levels((4, 3, 2, 1), 4, 0.5) == (2, 1) and left_of_levels((4, 3, 2, 1), 1, 0.2) == ()


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_full_strength_is_text_to_image_bit_for_bit(which, images, request):
    sampler = request.getfixturevalue(which)
    steps = 2 if which == "student" else 4
    plain = sampler(PROMPTS, SEEDS, steps=steps, chunk=2)
    assert torch.equal(sampler(PROMPTS, SEEDS, steps=steps, chunk=2, images=images, strength=1.0), plain)
    less = sampler(PROMPTS, SEEDS, steps=steps, chunk=2, images=images, strength=0.5)
    assert not torch.equal(less, plain)


def test_strength_near_zero_gives_back_what_the_vae_makes_of_the_image(student, teacher, images):
    @torch.no_grad()
    def around(sampler):
        """The images through the VAE and back, 0 to 255."""
        return 255 * sampler.family_.decode(sampler.family_.encode_images(images)).clamp(0, 1)

    # Of a student no step is left below its lowest level, and nothing but the VAE is run.
    spent, told = {}, []
    none = student(
        PROMPTS, SEEDS, chunk=2, images=images, strength=0.2, timings=spent, on_step=lambda *n: told.append(n)
    )
    assert torch.equal(none, around(student).round().to(torch.uint8)) and told == [] and spent["encode"] > 0
    # One step of a hundred, at the lowest of its noise levels.
    (time,) = teacher.times(100, 0.01)
    level = float(teacher.denoiser.schedule.rho(torch.tensor([time])))
    captions = [scenes.scene_at(i).caption for i in (0, 1)]
    one = teacher(captions, SEEDS, steps=100, guidance_scale=1.0, chunk=2, images=images, strength=0.01)
    assert level < 0.2 and (one - around(teacher)).abs().mean() < 8


def test_images_that_cannot_be_drawn_from_are_one_sentence(student, images, monkeypatch):
    draw = student.at(2, strength=0.5)
    with pytest.raises(UserError, match=r"strength=0\.5 says how far images are changed; give images"):
        draw(PROMPTS, SEEDS)
    for wrong in (images.float(), images[:1], images[..., :32], "a.png"):
        with pytest.raises(UserError, match=r"images must be a uint8 tensor of shape \(2, 3, 64, 64\)"):
            draw(PROMPTS, SEEDS, images=wrong)
    for wrong in (0, -1, 1.5, float("nan")):
        with pytest.raises(UserError, match="strength must be above 0 and at most 1"):
            student.at(2, strength=wrong)
    monkeypatch.setattr(student, "image_to_image", False)
    with pytest.raises(UserError, match="cannot draw from images: it was trained at one noise level alone"):
        draw(PROMPTS, SEEDS, images=images)
    monkeypatch.setattr(student.family_, "image_to_image", "", raising=False)
    with pytest.raises(UserError, match="pipelines of the family 'sd' do not draw from images"):
        draw(PROMPTS, SEEDS, images=images)


def test_an_image_depends_on_its_own_one_alone(student, images):
    alone = student(PROMPTS[1:], SEEDS[1:], steps=2, chunk=2, images=images[1:], strength=0.75)
    both = student(PROMPTS, SEEDS, steps=2, chunk=2, images=images, strength=0.75)
    assert torch.equal(both[1:], alone)


def test_families_that_draw_from_images_name_a_pipeline_that_does():
    named = {family.name: family.image_to_image for _, family in every_family()}
    assert set(named) <= set(FAMILIES) and {"sd", "sdxl", "sd3", "flux"} <= {n for n, p in named.items() if p}
    assert not named["sd_inpaint"] and not named["pixel"] and not named["dit"]
    for pipeline in filter(None, named.values()):
        assert "strength" in inspect.signature(getattr(diffusers, pipeline).__call__).parameters
