"""ADD (arXiv 2311.17042): the game before an eye, the teacher's opinion, the penalty at the features."""

from __future__ import annotations

import perceptual
import pytest
import torch
from worlds import COUNT, world

from stepdistill.errors import UserError
from stepdistill.prediction import Prediction


def add(**settings):
    eye = {"eye": "fourier"}
    return world("add", steps=(1, 2), **eye | settings)


def test_adds_student_loss_is_the_games_plus_the_teachers_opinion_of_the_renoised_student():
    made = add(gan="hinge", guidance_scale=2.0)
    nets, method = made.nets, made.method
    losses = method.student_loss(nets, made.batch())
    batch = made.batch()
    x0 = method.generate(nets, batch)
    t = batch.generator.randint(0, 1000).double()
    x_t = nets.schedule.add_noise(x0, batch.randn(), t)
    c, u = nets.teacher(x_t, t, batch.cond).x0, nets.teacher(x_t, t, batch.uncond).x0
    expected = nets.schedule.alpha(t) * (x0 - (u + 2 * (c - u))).square().mean(1)
    torch.testing.assert_close(losses["distillation"], expected.to(x0), rtol=1e-4, atol=1e-5)
    logits = nets.discriminator(method.eye.features(x0))
    torch.testing.assert_close(losses["gan"], -sum(each.mean(1) for each in logits))
    torch.testing.assert_close(losses["total"], losses["gan"] + 2.5 * losses["distillation"])


@pytest.mark.parametrize(("schedule", "rho"), [("vp", 2.5), ("edm", 20.0)])
def test_adds_student_starts_from_what_it_is_sampled_from(schedule, rho):
    """Pure noise at the first of its times, wherever that is."""
    parts = [{"name": "dmd2"}, {"name": "add", "eye": "fourier"}]
    start = {"first_rho": rho, "init_noise": "sigma"}
    made, heard = world("compose", steps=(1,), schedule=schedule, parts=parts, **start), []
    made.nets.modules["student"] = lambda x_t, t, cond: (
        heard.append((x_t, t)) or Prediction(x_t, "x0", x_t, t, made.nets.schedule)
    )
    method, twin = made.method.parts[1].method, made.batch()
    method.generate(made.nets, made.batch())
    ((x_t, t),) = heard
    twin.generator.randint(0, 1)
    assert bool((t == made.method.sampling.grid(made.nets.schedule, 1)[0]).all())
    sigma = made.nets.schedule.sigma(t)[:, None].float()
    torch.testing.assert_close(x_t, sigma * twin.randn(), rtol=1e-6, atol=1e-6)


def test_add_stops_the_gradient_at_the_teacher_and_lets_it_through_the_eye():
    made = add(distillation_weight=1.0)
    x0 = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss, target = made.method.distillation(made.nets, made.batch(), x0)
    (slope,) = torch.autograd.grad(loss.sum(), x0)
    alpha = made.nets.schedule.alpha(made.batch().generator.randint(0, 1000).double())
    # Only through x_hat itself: had the teacher been differentiated, its Jacobian would be in here.
    torch.testing.assert_close(
        slope, (alpha[:, None] * (x0 - target)).to(slope).detach(), rtol=1e-4, atol=1e-5
    )
    feature = made.method.eye.features(x0)[0]
    (through,) = torch.autograd.grad(feature.sum(), x0)
    assert float(through.abs().min()) > 0


def test_adds_penalty_is_the_heads_slope_at_the_features():
    made = add(r1_weight=0.3, gan="hinge")
    losses = made.method.discriminator_loss(made.nets, made.batch())
    features = made.method.eye.features(made.batch().x0)
    for feature in features:
        feature.requires_grad_()
    logits = made.nets.discriminator(features)
    slopes = torch.autograd.grad(sum(each.mean(1).sum() for each in logits), features)
    expected = sum(slope.square().flatten(1).sum(1) for slope in slopes)
    torch.testing.assert_close(losses["r1"], expected)
    torch.testing.assert_close(losses["total"], losses["gan"] + 0.3 * expected)


def test_the_eye_sees_real_and_generated_data_through_one_decoder():
    made, seen = add(), []
    features, made.nets.decode = made.method.eye.features, lambda x0: 7 + x0
    made.method.eye.features = lambda images: seen.append(images) or features(images)
    made.method.discriminator_loss(made.nets, made.batch())
    batch = made.batch()
    torch.testing.assert_close(seen[0], 7 + batch.x0)
    torch.testing.assert_close(seen[1], 7 + made.method.generate(made.nets, batch))
    made.method.student_loss(made.nets, made.batch())
    torch.testing.assert_close(seen[2], seen[1])


def test_the_clip_eye_shows_every_layer_of_the_image_tower():
    from stepdistill.eyes import ClipEye

    eye = ClipEye()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    features = eye.features(images)
    assert [f.shape for f in features] == [(2, 65, 128)] * 4 and eye.widths == (128,) * 4
    # The last layer's class token, normalised and projected, is the image's embedding.
    tower = eye.clip.model
    embedded = tower.visual_projection(tower.vision_model.post_layernorm(features[-1][:, 0]))
    torch.testing.assert_close(embedded, eye.clip.embed_images(images), rtol=1e-4, atol=1e-4)
    assert float(torch.autograd.grad(features[0].sum(), images)[0].abs().max()) > 0
    assert eye.prompts(["a red circle", "a star"], images.device).shape == (2, eye.prompt_width)
    assert len(ClipEye(layers=(2, 4)).features(images.detach())) == 2


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return perceptual.dino(tmp_path_factory.mktemp("dino"))


def test_the_dino_eye_shows_layers_of_the_stock_model(dino):
    from transformers import Dinov2Model

    from stepdistill.eyes import DinoEye

    eye, stock = DinoEye(str(dino), side=28), Dinov2Model.from_pretrained(dino).eval()
    assert eye.layers == (2, 3, 5, 6) and eye.widths == (16,) * 4 and eye.prompt_width == 0
    images = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    states = stock(pixel_values=(images - mean) / std, output_hidden_states=True).hidden_states
    for layer, feature in zip(eye.layers, eye.features(images), strict=True):
        assert feature.shape == (2, 1 + 16, 16)
        torch.testing.assert_close(feature, states[layer])
    assert not any(p.requires_grad for p in eye.model.parameters())
    # Pictures of another size are brought to its own, and their gradient comes through.
    large = torch.rand(1, 3, 40, 40, requires_grad=True)
    (slope,) = torch.autograd.grad(DinoEye(str(dino), layers=[1], side=28).features(large)[0].sum(), large)
    assert float(slope.abs().max()) > 0


def test_the_dino_eye_refuses_what_is_not_there(dino, tmp_path):
    from stepdistill.eyes import DinoEye

    for directory, more, says in (
        (tmp_path / "none", {}, r"method\.arguments\.directory: there is no directory"),
        (dino, {"layers": [7]}, r"method\.arguments\.layers must be from 1 to 6"),
        (dino, {"side": 30}, r"method\.arguments\.side must be a multiple of 7"),
    ):
        with pytest.raises(UserError, match=says):
            DinoEye(str(directory), **more)
