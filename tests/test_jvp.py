"""Forward-mode derivatives through real networks against central differences, and what they leave behind."""

from __future__ import annotations

import pytest
import torch
import worlds
from torch import nn

from stepdistill.denoiser import Denoiser
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.jvp import difference, directional, fine_step, jvp, same_draws, upwind
from stepdistill.methods.meanflow import Point
from stepdistill.schedule import EDM, VP, Flow, TrigFlow, times_like


def test_both_agree_with_a_closed_form():
    x, dx = torch.randn(2, 5, 3, dtype=torch.float64)
    t, dt = torch.rand(2, 5, dtype=torch.float64)

    def f(x, t):
        return x.sin() * t[:, None] ** 2

    exact = x.cos() * dx * t[:, None] ** 2 + x.sin() * (2 * t * dt)[:, None]
    value, along = jvp(f, (x, t), (dx, dt))
    assert torch.equal(value, f(x, t))
    torch.testing.assert_close(along, exact, rtol=1e-12, atol=1e-12)
    value, along = difference(f, (x, t), (dx, dt), 1e-4)
    torch.testing.assert_close(value, f(x, t), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(along, exact, rtol=1e-6, atol=1e-7)
    errors = [float((difference(f, (x, t), (dx, dt), h)[1] - exact).norm()) for h in (0.1, 0.05)]
    # Second order.
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    errors = [float((upwind(f, (x, t), (dx, dt), h)[1] - exact).norm()) for h in (1e-3, 5e-4)]
    # First order, from behind.
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)
    value, along = upwind(f, (x, t), (dx, dt), 0.5)
    assert torch.equal(value, f(x, t))
    torch.testing.assert_close(along, (f(x, t) - f(x - 0.5 * dx, t - 0.5 * dt)) / 0.5)
    for how in ("forward", "difference"):
        torch.testing.assert_close(
            directional(how, f, (x, t), (dx, dt), 1e-4)[1], exact, rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize(
    ("ahead", "behind", "first", "last"),
    [
        (1.0, 1.0, 0.4, 0.6),
        (0.0, 1.0, 0.3, 0.5),
        (0.02, 1.0, 0.32, 0.52),
        (1.0, 0.05, 0.45, 0.65),
        (-0.3, 1.0, 0.3, 0.5),
        # Less than the window is there.
        (0.04, 0.05, 0.45, 0.54),
    ],
)
def test_a_differences_points_move_away_from_an_end_together(ahead, behind, first, last):
    """The slope of t^2 between two times is their sum, so it says where they are: 2h = 0.2 apart, wherever there is room."""
    t = torch.tensor([0.5], dtype=torch.float64)
    room = torch.full_like(t, ahead), torch.full_like(t, behind)
    for step in (0.1, torch.full_like(t, 0.1)):
        value, slope = difference(torch.square, (t,), (torch.ones_like(t),), step, room)
        assert float(slope) == pytest.approx(first + last, rel=1e-12)
        assert float(value) == pytest.approx((first**2 + last**2) / 2, rel=1e-12)


def test_a_constant_has_a_zero_derivative_and_expanded_times_are_fine():
    x = torch.randn(4, 2)
    # One number in memory.
    t = times_like(0.3, x)
    value, along = jvp(lambda x, t: torch.ones_like(x), (x, t), (x, torch.ones_like(t)))
    assert torch.equal(along, torch.zeros_like(value))
    _, along = jvp(lambda x, t: x * t[:, None].float(), (x, t), (torch.zeros_like(x), torch.ones_like(t)))
    torch.testing.assert_close(along, x)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 8, 3, stride=2, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular", dilation=2),
        nn.GroupNorm(2, 4),
        nn.GroupNorm(4, 4, affine=False),
    ],
    ids=str,
)
def test_convolutions_and_norms_have_autograds_own_derivative(layer):
    """Our cheaper rules against forward mode without them, also where attention leaves an input transposed."""
    layer = layer.double().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    for x, dx in (
        torch.randn(2, 2, 4, 8, 8, dtype=torch.float64),
        torch.randn(2, 2, 8, 8, 4, dtype=torch.float64).movedim(-1, 2),
    ):
        exact = torch.func.jvp(layer, (x.contiguous(),), (dx.contiguous(),))
        torch.testing.assert_close(jvp(layer, (x,), (dx,)), exact, rtol=1e-12, atol=1e-12)


def test_a_weights_own_derivative_is_not_forgotten():
    x, weight, dx, dw = torch.randn(4, 3, 3, 3, 3, dtype=torch.float64)
    _, along = jvp(lambda x, w: nn.functional.conv2d(x, w, padding=1), (x, weight), (dx, dw))
    a, b = (nn.functional.conv2d(*pair, padding=1) for pair in ((dx, weight), (x, dw)))
    torch.testing.assert_close(along, a + b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tau", [0.05, 0.8, 1.5])
@pytest.mark.parametrize("schedule", [TrigFlow(), Flow()], ids=["F", "flow"])
def test_through_stock_unets_in_another_schedule(tiny_sd, tiny_pixel, tau, schedule):
    """UNet2DConditionModel (attention, text, VP table) and UNet2DModel (EDM), along x and t, told an end."""
    torch.manual_seed(0)
    for family, cond in (
        (SD(SD.Config(teacher=str(tiny_sd))), torch.randn(3, 7, 16, dtype=torch.float64)),
        (Pixel(Pixel.Config(teacher=str(tiny_pixel))), torch.tensor([0, 1, 3])),
    ):
        student = family.student("teacher", ("end",)).double()
        generator = torch.Generator().manual_seed(0)
        x, dx = torch.randn(2, 3, *family.shape, generator=generator, dtype=torch.float64)
        t = schedule.t_of_rho(TrigFlow().rho(torch.tensor([tau, 0.9 * tau, 0.8 * tau], dtype=torch.float64)))

        end = 0.5 * t

        def network(x, t, student=student, cond=cond, end=end):
            said = student(x, t, cond, in_schedule=schedule, end=end)
            return said.F if isinstance(schedule, TrigFlow) else said.flow

        # As sCM moves: evenly in log rho, so that a step spans alike many of the network's own timesteps.
        dt = schedule.alpha(t) * schedule.sigma(t)
        _, exact = jvp(network, (x, t), (dx, dt))
        # The networks embed their time in float32, which is what limits the differences.
        _, along = difference(network, (x, t), (dx, dt), 1e-4)
        assert float((exact - along).norm() / exact.norm()) < 2e-2
        _, still = difference(network, (x, t), (dx, torch.zeros_like(t)), 1e-5)
        _, exact = jvp(network, (x, t), (dx, torch.zeros_like(t)))
        assert float((exact - still).norm() / exact.norm()) < 1e-5


def test_no_graph_is_left_and_parameters_get_no_gradient():
    net = nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    for how in ("forward", "difference", "upwind"):
        value, along = directional(how, net, (x,), (torch.ones(2, 3),))
        assert not value.requires_grad and not along.requires_grad
    # An ordinary pass afterwards is not disturbed.
    net(x).sum().backward()
    assert net.weight.grad is not None and x.grad is not None


def test_paired_passes_draw_the_same_dropout():
    drop, x = nn.Dropout(0.5), torch.ones(64)
    torch.manual_seed(0)
    with same_draws(x):
        first = drop(x)
    assert torch.equal(drop(x), first)
    assert not torch.equal(drop(x), first)
    # Both halves of a difference use one mask, and so the difference is of the function, not of the masks.
    _, along = difference(drop, (x,), (torch.ones(64),), 1e-2)
    assert set(along.round(decimals=2).tolist()) <= {0.0, 2.0}


def test_it_goes_through_a_wrapper_as_through_the_network():
    """`in_schedule` and `end` reach the network inside DataParallel-like wrappers, as `under` cannot."""

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    class Ear(nn.Module):
        def forward(self, x_t, t, cond=None, end=None):
            heard.append((t, end))
            return x_t

    heard: list = []
    denoiser = Denoiser(Ear(), "x0", Flow())
    x, trig = torch.randn(2, 3), TrigFlow()
    t = times_like(0.6, x)
    said = Wrapper(denoiser)(x, t, None, in_schedule=trig, end=t / 2)
    assert said.schedule is trig
    torch.testing.assert_close(Flow().rho(heard[0][0]), trig.rho(t))
    torch.testing.assert_close(Flow().rho(heard[0][1]), trig.rho(t / 2))
    torch.testing.assert_close(said.x0, denoiser.under(trig)(x, t).x0)


def test_through_a_norm_behind_attention_at_an_inner_level():
    """Attention's residual leaves the activations transposed, and group normalisation wants to view them."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=[8, 16, 16],
        down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        attention_head_dim=16,
        norm_num_groups=8,
    ).double().eval()  # fmt: skip
    x, d = (torch.randn(2, 3, 16, 16, dtype=torch.float64) for _ in range(2))

    def function(x: torch.Tensor) -> torch.Tensor:
        return unet(x, torch.tensor([3.0, 7.0])).sample

    value, tangent = jvp(function, (x,), (d,))
    _, slope = difference(function, (x,), (d,), 1e-4)
    torch.testing.assert_close(tangent, slope, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(value, function(x), rtol=1e-10, atol=1e-10)


class Wave(nn.Module):
    """The fastest wave of a network's time embedding: a radian for each unit of its own time."""

    extras, blocks = {}, {}

    def __init__(self, told):
        super().__init__()
        self.told = told

    def forward(self, x_t, t, cond=None, end=None):
        return x_t * torch.sin(self.told(t))[:, None]


WAVES = {
    "flow": (Flow(), "flow", lambda t: 1000 * t),
    "vp": (VP.from_betas(), "v", lambda t: t),
    "edm": (EDM(), "x0", lambda t: 250 * t.log()),
}


@pytest.mark.parametrize("native", WAVES)
@pytest.mark.parametrize("name", ["scm", "meanflow"])
def test_the_step_of_a_difference_follows_the_networks_own_time(name, native):
    """A step of 1e-3 in flow time is a radian of a network that is told 1000 t, and a sixth of its slope is lost."""
    schedule, kind, told = WAVES[native]
    student = Denoiser(Wave(told), kind, schedule)
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 64, 3, generator=generator, dtype=torch.float64)
    s = torch.linspace(0.2, 0.9, 64, dtype=torch.float64)
    slopes = {}
    for how in ("forward", "difference"):
        method = worlds.method(name, derivative=how)
        if name == "meanflow":
            slopes[how] = method.derivative(student, Point(x, s, s / 2, v, None, s > 1, {}), v)
        else:
            trig = TrigFlow()
            time = trig.t_of_rho(s / (1 - s))
            slopes[how] = method.tangent(student, None, trig, x, time, v, 1.0)[1]
    error = (slopes["difference"] - slopes["forward"]).norm() / slopes["forward"].norm()
    assert float(error) < 5e-3


def test_a_fine_step_is_a_tenth_of_a_unit_and_never_long():
    t, one = torch.tensor([0.2, 0.7], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    assert fine_step(Flow(), Flow(), t, one).tolist() == pytest.approx([1e-4, 1e-4])
    assert fine_step(Flow(), Flow(), t, 0 * one).tolist() == pytest.approx([1e-3, 1e-3])
    table, trig = VP.from_betas(), TrigFlow()
    step = fine_step(table, trig, t, one)
    moved = [table.t_of_rho(trig.rho(t + sign * step)) for sign in (1, -1)]
    expected = (2 * 0.1 * (t.new_tensor([999.0]) / 1000)).expand(2)
    free = step < 1e-3
    torch.testing.assert_close((moved[0] - moved[1])[free], expected[free], rtol=2e-2, atol=0)
    assert free.any()
