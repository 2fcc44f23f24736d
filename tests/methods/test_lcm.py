"""LCM (arXiv 2310.04378): the boundary, the guided DDIM target, the embedded scale."""

from __future__ import annotations

import itertools

import pytest
import torch
import worlds
from diffusers import DiffusionPipeline
from gaussians import MEAN, STD, Affine, batch_of, gradient, nets_of
from torch import Tensor, nn
from worlds import COUNT, world

from stepdistill import export
from stepdistill.denoiser import guided
from stepdistill.errors import UserError
from stepdistill.families.faces import sinusoids
from stepdistill.families.sd import SD
from stepdistill.families.toy import gaussian_flow_map
from stepdistill.lora import LoraConfig
from stepdistill.methods.assemble import assemble
from stepdistill.methods.lcm import LCM
from stepdistill.prediction import Prediction
from stepdistill.schedule import VP, Schedule, times_like
from stepdistill.solvers import SOLVERS, ddim


@pytest.mark.parametrize("schedule", ["vp", "edm", "flow", "trig"])
def test_the_boundary_is_the_identity_without_noise(schedule):
    made = world("lcm", schedule=schedule)
    x = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(0))
    cond, g = made.batch().cond, torch.full((COUNT,), 5.0, dtype=torch.float64)

    def f(time: float) -> tuple[torch.Tensor, torch.Tensor]:
        prediction = made.nets.student(x, times_like(time, x), cond, guidance=g)
        return made.method.boundary(prediction), prediction.x0

    assert torch.equal(f(made.nets.schedule.t_min)[0], x)
    consistency, x0 = f(made.nets.schedule.t_max)
    # And x0 where there is only noise.
    torch.testing.assert_close(consistency, x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", ["vp", "edm", "flow", "trig"])
@pytest.mark.parametrize("points", [50, 80])
def test_the_boundary_is_a_switch_on_every_grid(schedule, points):
    """At all of the teacher's times but the end f is x0: c_skip + c_out = 1, so a chain of targets keeps its scale."""
    made = world("lcm", schedule=schedule, ddim_steps=points)
    times = made.method.ode_times(made.nets.schedule)[:-1]
    ones = torch.ones(len(times), 2, dtype=torch.float64)
    said = made.method.boundary(Prediction(ones, "x0", ones, times, made.nets.schedule))
    torch.testing.assert_close(said, ones, rtol=5e-3, atol=0)


def test_the_boundary_equals_lcm_scheduler():
    from diffusers import LCMScheduler

    scheduler, method, schedule = LCMScheduler(), worlds.method("lcm"), VP.from_betas()
    x_t, x0 = torch.randn(2, 3, 2, dtype=torch.float64)
    for t in (0, 1, 19, 999):
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(
            torch.tensor(float(t), dtype=torch.float64)
        )
        ours = method.boundary(Prediction(x0, "x0", x_t, times_like(float(t), x_t), schedule))
        torch.testing.assert_close(ours, skip * x_t + out * x0, rtol=1e-12, atol=1e-12)


def test_the_teachers_grid_is_the_skipping_step_grid():
    grid = worlds.method("lcm").ode_times(VP.from_betas())
    assert grid.tolist() == [float(t) for t in range(999, 0, -20)] + [0.0]


def test_without_guidance_the_target_is_conditional_ddim():
    """g = 1 (w = 0): the whole loss put together again from the teacher's plain conditional DDIM step."""
    made = world("lcm", guidance_low=1.0, guidance_high=1.0)
    nets, method, batch = made.nets, made.method, made.batch()
    grid = method.ode_times(nets.schedule)
    i = batch.generator.randint(0, 50)
    # The guidance scales.
    batch.generator.rand()
    t, s, g = grid[i], grid[i + 1], torch.ones(COUNT, dtype=torch.float64)
    x_t = nets.schedule.add_noise(batch.x0, batch.randn(), t)
    x_s = ddim(lambda x, time: nets.teacher(x, time, batch.cond), x_t, t, s)
    online = method.boundary(nets.student(x_t, t, batch.cond, guidance=g))
    target = method.boundary(nets.target(x_s, s, batch.cond, guidance=g))
    expected = (((online - target) ** 2 + 1e-3**2).sqrt() - 1e-3).mean(1)
    torch.testing.assert_close(method.loss(nets, made.batch())["total"], expected, rtol=1e-4, atol=1e-6)
    scaled = world("lcm", guidance_low=4.0, guidance_high=4.0)
    assert not torch.allclose(scaled.method.loss(scaled.nets, scaled.batch())["total"], expected, atol=1e-4)


def test_guided_x0_and_eps_fit_the_state_they_start_from():
    """w is g - 1: c + w (c - u) = u + g (c - u), and alpha x0 + sigma eps is the state again."""
    made = world("lcm")
    batch, teacher = made.batch(), made.nets.teacher
    t = times_like(399.0, batch.x0)
    x_t = made.nets.schedule.add_noise(batch.x0, batch.randn(), t)
    w = torch.linspace(0, 14, COUNT, dtype=torch.float64)
    said = guided(teacher, x_t, t, batch.cond, batch.uncond, w + 1)
    c, u = teacher(x_t, t, batch.cond), teacher(x_t, t, batch.uncond)
    torch.testing.assert_close(said.x0, c.x0 + w[:, None].float() * (c.x0 - u.x0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(said.eps, c.eps + w[:, None].float() * (c.eps - u.eps), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(said.at(t), x_t, rtol=1e-4, atol=1e-4)


def test_the_guidance_scale_is_drawn_per_sample_from_its_range():
    made = world("lcm", guidance_low=3.0, guidance_high=15.0)
    heard = []

    class Ear(nn.Module):
        def forward(self, x_t, t, cond, guidance):
            heard.append(guidance)
            return Prediction(x_t, "x0", x_t, t, made.nets.schedule)

    made.nets.modules |= {"student": Ear(), "target": Ear()}
    made.method.loss(made.nets, made.batch(count=320))
    drawn, target = heard
    # The target is told the same.
    assert torch.equal(drawn, target)
    assert 3 <= float(drawn.min()) < 4 and 14 < float(drawn.max()) <= 15 and len(drawn.unique()) == len(drawn)


def test_a_student_that_is_told_nothing_learns_the_guided_steps():
    """LCM-LoRA: the loss put together again from the teacher's step under the drawn scales, which no network hears."""
    made = world("lcm", guidance_low=3.0, guidance_high=15.0, tell_guidance=False)
    nets, method, batch = made.nets, made.method, made.batch()
    grid = method.ode_times(nets.schedule)
    i = batch.generator.randint(0, 50)
    t, s, g = grid[i], grid[i + 1], 3 + 12 * batch.generator.rand()
    x_t = nets.schedule.add_noise(batch.x0, batch.randn(), t)
    x_s = guided(nets.teacher, x_t, t, batch.cond, batch.uncond, g).at(s).float()
    online = method.boundary(nets.student(x_t, t, batch.cond))
    target = method.boundary(nets.target(x_s, s, batch.cond))
    expected = (((online - target) ** 2 + 1e-3**2).sqrt() - 1e-3).mean(1)
    torch.testing.assert_close(method.loss(nets, made.batch())["total"], expected, rtol=1e-4, atol=1e-6)
    assert method.sampling.inputs == () and method.sampling.guidance == "none"


def test_a_student_that_is_told_nothing_may_be_a_lora_whose_pipeline_is_free_of_guidance(tiny_sd, tmp_path):
    method = worlds.method("lcm", steps=(2,), guidance_low=7.5, guidance_high=7.5, tell_guidance=False)
    family = SD(SD.Config(teacher=str(tiny_sd)))
    student = worlds.stir(assemble(method, family, lora=LoraConfig(rank=2)).student)
    recipe = {"family": {"name": "sd"}, "method": {"name": "lcm"}, "run": {"out": "runs/x"}}
    card = export.card_of(family, method, recipe)
    export.write(family, student, tmp_path / "student", card)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student")
    pipeline.set_progress_bar_config(disable=True)

    def images(scale: float) -> Tensor:
        generator, size = torch.Generator().manual_seed(0), {"height": 16, "width": 16}
        call = {"num_inference_steps": 2, "guidance_scale": scale, "output_type": "pt", **size}
        return pipeline("a red circle", generator=generator, **call).images

    assert type(pipeline.scheduler).__name__ == "LCMScheduler"
    # Neither a second call nor an embedding: any scale draws the same.
    assert torch.equal(images(1.0), images(9.0))


def test_the_embedding_of_w_equals_the_stock_pipelines(tiny_sd):
    from diffusers import LatentConsistencyModelPipeline

    w = torch.tensor([0.0, 1.5, 6.5, 14.0])
    stock = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)
    torch.testing.assert_close(sinusoids(w, 256), stock, rtol=1e-6, atol=1e-6)
    # And it is of w = g - 1 that the network hears.
    student = SD(SD.Config(teacher=str(tiny_sd))).student("teacher", ("guidance",))
    heard = []
    student.network.unet.time_embedding.cond_proj.register_forward_hook(
        lambda module, told, _: heard.append(told[0])
    )
    x, g = torch.randn(2, 4, 4, 4), torch.tensor([1.0, 7.5], dtype=torch.float64)
    student(x, times_like(499.0, x), torch.randn(2, 7, 16), guidance=g)
    torch.testing.assert_close(heard[0], stock[[0, 2]], rtol=1e-6, atol=1e-6)


def test_lcm_refuses_more_steps_than_its_grid_has():
    with pytest.raises(UserError, match=r"student\.steps must be at most the 4 points .*ddim_steps\), got 8"):
        worlds.method("lcm", steps=(8,), ddim_steps=4)


class Told(nn.Module):
    """A network that is told a guidance scale and does not mind."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x_t: Tensor, t: Tensor, cond=None, guidance: Tensor | None = None) -> Tensor:
        return self.inner(x_t, t)


class ToTheEnd(nn.Module):
    """The exact flow to a schedule's last state."""

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return gaussian_flow_map(self.schedule, MEAN, STD, x_t, t, times_like(self.schedule.t_min, x_t))


def lcm(**settings) -> LCM:
    return worlds.method("lcm", guidance_low=1.0, guidance_high=1.0, **settings)


def test_lcms_loss_falls_with_the_square_of_the_step_at_the_exact_flow():
    """By four per halving, for a c far below the error: what is left is the local error of the teacher's step."""
    schedule = VP.from_betas()

    def loss(points: int, net: nn.Module) -> float:
        method = lcm(ddim_steps=points, huber_c=1e-9)
        return float(method.loss(nets_of(schedule, Told(net)), batch_of(1024))["total"].mean().detach())

    errors = [loss(points, ToTheEnd(schedule)) for points in (25, 50, 100)]
    assert all(3 < coarse / fine < 5 for coarse, fine in itertools.pairwise(errors)), errors
    assert errors[0] < 0.1 * loss(25, Affine())


def test_lcms_gradient_is_the_online_networks_alone():
    """d / sqrt(d^2 + c^2) df(x_t)/dtheta, put together again: no gradient through the target or the teacher."""
    schedule, c = VP.from_betas(), 0.1
    method = lcm(huber_c=c)
    nets, batch, twin = nets_of(schedule, Told(Affine())), batch_of(), batch_of()
    ours = gradient(method.loss(nets, batch)["total"].mean(), nets.student)
    grid = method.ode_times(schedule)
    i = twin.generator.randint(0, 50)
    # The guidance scales.
    twin.generator.rand()
    t, s = grid[i], grid[i + 1]
    x_t = schedule.add_noise(twin.x0, twin.randn(), t)
    x_s = SOLVERS["ddim"](nets.teacher, x_t, t, s)
    online, target = (method.boundary(nets.student(x, time)) for x, time in ((x_t, t), (x_s, s)))
    d = (online - target).detach()
    expected = gradient((d / (d**2 + c**2).sqrt() * online).mean(), nets.student)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_a_student_is_drawn_at_the_middle_of_its_scales():
    assert worlds.method("lcm", guidance_low=2.0, guidance_high=6.0).sampling.scale == 4.0
