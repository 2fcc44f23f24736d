"""LPIPS (arXiv 1801.03924) against its formula written out, and as the distance of CD."""

from __future__ import annotations

import perceptual
import pytest
import torch
import torch.nn.functional as nnf
import worlds
from safetensors.torch import save_file

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.lpips import LPIPS
from stepdistill.methods.assemble import assemble

SIDE = 32


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return perceptual.written(tmp_path_factory.mktemp("lpips") / "lpips_vgg.safetensors")


@pytest.fixture(scope="module")
def lpips(file):
    return LPIPS(file, side=SIDE)


def images(count: int = 2, side: int = SIDE, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def by_hand(x: torch.Tensor, y: torch.Tensor, pool) -> torch.Tensor:
    """The authors' formula: images in [-1, 1] by their scaling layer, VGG16 block by block, Eq. 1."""
    made = perceptual.weights()
    shift, scale = (
        torch.tensor(each).view(3, 1, 1) for each in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450])
    )
    x, y = ((2 * each - 1 - shift) / scale for each in (x, y))
    total = 0
    for block in range(5):
        for number in perceptual.WIDTHS:
            name = f"net.slice{block + 1}.{number}"
            if f"{name}.weight" in made:
                kernel, bias = made[f"{name}.weight"], made[f"{name}.bias"]
                x, y = (nnf.relu(nnf.conv2d(each, kernel, bias, padding=1)) for each in (x, y))
        units = [each / (each.square().sum(1, keepdim=True).sqrt() + 1e-10) for each in (x, y)]
        apart = (units[0] - units[1]).square()
        total = total + nnf.conv2d(apart, made[f"lin{block}.model.1.weight"]).mean((1, 2, 3))
        x, y = pool(x, 2), pool(y, 2)
    return total


@pytest.mark.parametrize(("pooling", "pool"), [("max", nnf.max_pool2d), ("average", nnf.avg_pool2d)])
def test_it_is_the_papers_formula(file, pooling, pool):
    x, y = images(seed=1), images(seed=2)
    found, expected = LPIPS(file, pooling, SIDE)(x, y), by_hand(x, y, pool)
    assert float(expected.min()) > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_it_is_zero_at_equality_symmetric_and_of_each_pair_alone(lpips):
    x, y = images(seed=1), images(seed=2)
    assert lpips(x, x).tolist() == [0, 0]
    assert torch.equal(lpips(x, y), lpips(y, x))
    torch.testing.assert_close(lpips(x[1:], y[1:]), lpips(x, y)[1:], rtol=1e-4, atol=1e-6)
    # A little apart is less than far apart.
    assert bool((lpips(x, x + 0.1 * (y - x)) < lpips(x, y)).all())


def test_small_images_are_enlarged_as_consistency_models_have_it(file, lpips):
    x, y = images(side=16, seed=1), images(side=16, seed=2)
    large = [nnf.interpolate(each, SIDE, mode="bilinear") for each in (x, y)]
    torch.testing.assert_close(lpips(x, y), lpips(*large), rtol=1e-4, atol=1e-6)
    assert LPIPS(file).side == 224


def test_the_slope_is_finite_where_no_feature_is(lpips):
    """ReLUs leave places without any feature, where the slope of a length is not defined."""
    x = images().requires_grad_()
    hook = lpips.layers[29].register_forward_hook(lambda layer, given, made: made * 0)
    try:
        (slope,) = torch.autograd.grad(lpips(x, images(seed=2)).sum(), x)
    finally:
        hook.remove()
    assert bool(slope.isfinite().all()) and float(slope.abs().max()) > 0


def test_half_precision_around_it_does_not_reach_it(lpips):
    x, y = images(seed=1), images(seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        found = lpips(x, y)
    assert torch.equal(found, lpips(x, y))


def test_what_is_no_file_of_it_is_named(file, tmp_path):
    with pytest.raises(UserError, match=r"method\.lpips_weights: there is no file .*nowhere"):
        LPIPS(tmp_path / "nowhere.safetensors")
    pickled = tmp_path / "vgg.pth"
    torch.save(perceptual.weights(), pickled)
    with pytest.raises(UserError, match=r"vgg\.pth cannot be read as safetensors"):
        LPIPS(pickled)
    for change in ("net.slice1.0.bias", "lin4.model.1.weight"):
        made = perceptual.weights()
        for wrong in ({}, {change: torch.zeros(7)}):
            other = tmp_path / "other.safetensors"
            save_file({key: value for key, value in made.items() if key != change} | wrong, other)
            with pytest.raises(UserError, match="does not hold the weights of LPIPS on VGG16"):
                LPIPS(other)


def test_cd_compares_what_is_decoded_and_only_the_student_has_a_gradient(lpips, file, tiny_pixel):
    """Its loss is the distance of the two answers as images; a step along its slope brings them closer."""
    from stepdistill.families.pixel import Pixel

    family = Pixel.from_directory(tiny_pixel)
    method = worlds.method("cd", distance="lpips", lpips_weights=str(file), link_weight="uniform")
    assert method.needs_decoder and not worlds.method("cd").needs_decoder
    nets = assemble(method, family)
    # For its speed.
    method.lpips.side = SIDE
    worlds.stir(nets.target)
    answers: list[torch.Tensor] = []
    plain = method.distance
    method.distance = lambda nets, *both: answers.extend(each.detach() for each in both) or plain(nets, *both)
    noise = worlds.SampleNoise(torch.arange(2), step=0, phase="student")
    x0 = 2 * images(side=8) - 1
    batch = worlds.Batch(torch.tensor([0, 1]), family.uncond(2), family.shape, noise.index, noise, x0)
    losses = method.loss(nets, batch)
    online, target = answers
    expected = by_hand(
        *(nnf.interpolate(each / 2 + 0.5, SIDE, mode="bilinear") for each in answers), nnf.max_pool2d
    )
    torch.testing.assert_close(losses["total"].detach(), expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(online, target)
    losses["total"].mean().backward()
    assert all(worlds.gradients(nets.student))
    assert not any(worlds.gradients(module)[0] for name, module in nets.modules.items() if name != "student")
    assert not any(worlds.gradients(method.lpips)) and isinstance(nets.student, Denoiser)
    # It is in no checkpoint.
    assert set(nets.modules) == {"student", "target", "teacher"}


def test_points_are_no_images(lpips):
    with pytest.raises(UserError, match=r"method\.distance=lpips compares images"):
        lpips(torch.zeros(4, 2), torch.zeros(4, 2))


def test_a_file_is_named_with_the_distance_and_not_without():
    for settings in ({"distance": "lpips"}, {"lpips_weights": "x.safetensors"}):
        with pytest.raises(UserError, match=r"method\.lpips_weights must name a file with distance=lpips"):
            worlds.method("cd", **settings)
