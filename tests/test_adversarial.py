"""Adversarial methods: games and penalties against closed forms, taps against a plain forward, LADD's two steps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import worlds
from worlds import COUNT, world

from stepdistill.discriminator import (
    Adversarial,
    Discriminator,
    chosen_blocks,
    discriminator_losses,
)
from stepdistill.errors import UserError
from stepdistill.features import block_features
from stepdistill.losses import GAN_LOSSES, approximate_r1, r1
from stepdistill.methods.base import simulate
from stepdistill.noise import SampleNoise
from stepdistill.prediction import Prediction
from stepdistill.sampling import sample, walk
from stepdistill.schedule import VP
from stepdistill.timesteps import few_step_grid

GAMES = pytest.mark.parametrize("game", GAN_LOSSES)


def logits(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None].requires_grad_()


def points(count: int = 64, dims: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------------- the games


def test_the_hinge_is_flat_beyond_its_margin_and_has_slope_one_within():
    real, fake = logits(1.5, 0.2, -3.0), logits(-1.5, -0.2, 3.0)
    discriminator, generator = GAN_LOSSES["hinge"]
    values = discriminator(real, fake)
    torch.testing.assert_close(values, torch.tensor([0.0, 1.6, 8.0], dtype=torch.float64))
    values.sum().backward()
    assert real.grad[:, 0].tolist() == [0, -1, -1] and fake.grad[:, 0].tolist() == [0, 1, 1]
    assert torch.equal(generator(fake), -fake[:, 0])


def test_the_relativistic_game_sees_differences_only():
    discriminator, generator = GAN_LOSSES["relativistic"]
    real, fake = logits(0.3, 2.0), logits(-0.1, 5.0)
    torch.testing.assert_close(discriminator(real, fake), discriminator(real + 7, fake + 7))
    torch.testing.assert_close(generator(fake, real), discriminator(fake, real))  # the roles are exchanged
    closed = torch.log1p((fake - real).exp())[:, 0]
    torch.testing.assert_close(discriminator(real, fake), closed)


@GAMES
def test_the_generator_climbs_and_the_discriminator_tells_apart(game):
    discriminator, generator = GAN_LOSSES[game]
    real, fake = logits(0.1), logits(-0.2)
    slope_real, slope_fake = torch.autograd.grad(discriminator(real, fake).sum(), (real, fake))
    assert float(slope_real) < 0 < float(slope_fake)
    (slope,) = torch.autograd.grad(generator(fake, real).sum(), fake)
    assert float(slope) < 0


@GAMES
def test_no_pull_on_a_discriminator_that_cannot_tell_equal_distributions_apart(game):
    """Logits 0 on two samples of one distribution: D's expected gradient, a linear critic's, is 0."""
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    x = points(4096)
    GAN_LOSSES[game][0](x @ weight[:, None], x.flip(0) @ weight[:, None]).mean().backward()
    assert float(weight.grad.abs().max()) < 1e-12
    # And it is the minimum: any other weight is worse. The hinge is flat there, so not better.
    worse = GAN_LOSSES[game][0](x @ torch.ones(3, 1).double(), x.flip(0) @ torch.ones(3, 1).double()).mean()
    at_zero = GAN_LOSSES[game][0](x[:, :1] * 0, x[:, :1] * 0).mean()
    assert float(worse) > float(at_zero)


# -------------------------------------------------------------------------------------------- the penalties


def quadratic(x: torch.Tensor) -> torch.Tensor:
    """Two logits, of mean |x|^2 / 2: a critic whose gradient is x itself."""
    half = x.square().sum(1, keepdim=True) / 2
    return torch.cat((half - x[:, :1], half + x[:, :1]), 1)


def test_r1_is_the_squared_slope_and_can_be_differentiated():
    x = points(6).requires_grad_()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    value = r1(scale * quadratic(x), x)
    torch.testing.assert_close(value, 1.5**2 * x.square().sum(1))
    (by_scale,) = torch.autograd.grad(value.sum(), scale)
    torch.testing.assert_close(by_scale, 2 * 1.5 * x.detach().square().sum())


def test_the_finite_difference_tends_to_r1():
    """In expectation over the nudge: E (g . n)^2 = |g|^2, with an error of order delta^2."""
    x = torch.tensor([[0.7, -0.4, 1.1]], dtype=torch.float64)
    nudge = points(200_000, seed=1)
    many = x.expand(len(nudge), -1)
    exact = float(x.square().sum())
    for delta in (0.1, 0.01):
        value = float(approximate_r1(quadratic(many), quadratic(many + delta * nudge), delta).mean())
        # (g.n + delta |n|^2 / 2)^2: the cross term has mean 0, the square adds delta^2 E|n|^4 / 4 = 15/4 delta^2.
        expected = exact + delta**2 * 15 / 4
        assert value == pytest.approx(expected, rel=5 * (2 / len(nudge)) ** 0.5)


@pytest.mark.parametrize("kind", ["exact", "finite"])
def test_penalties_are_taken_at_the_noised_input_the_critic_saw(kind):
    """real and fake are told apart by their own critics; the penalty of each is at its own x_t."""
    real, fake = points(5, seed=2), 3 * points(5, seed=3)
    config = Adversarial("non_saturating", r1_weight=0.5, r1=kind, r1_delta=1e-4, r2=True)
    nudge = points(5, seed=4)
    heard = []

    def critic(x):
        heard.append(x.detach().clone())
        return quadratic(x)

    losses = discriminator_losses(config, (critic, real), (critic, fake), lambda: nudge)

    def expected(x):
        return x.square().sum(1) if kind == "exact" else (x * nudge).sum(1).square()

    torch.testing.assert_close(losses["r1"], expected(real), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(losses["r2"], expected(fake), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(losses["total"], losses["gan"] + 0.5 * (losses["r1"] + losses["r2"]))
    at = [real, real + 1e-4 * nudge, fake, fake + 1e-4 * nudge] if kind == "finite" else [real, fake]
    for a, b in zip(heard, at, strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_penalty_no_second_call_is_made():
    calls = []
    losses = discriminator_losses(
        Adversarial(),
        (lambda x: calls.append(1) or x, points(4)),
        (lambda x: calls.append(2) or x, points(4)),
        points,
    )
    assert calls == [1, 2] and "r1" not in losses
    torch.testing.assert_close(losses["total"], losses["gan"])


def test_accuracy_counts_samples_told_right():
    real, fake = logits(1.0, 2.0, -1.0), logits(-1.0, 3.0, -2.0)
    for game, expected in (("hinge", 4 / 6), ("relativistic", 2 / 3)):
        told = discriminator_losses(
            Adversarial(game), (lambda _: real, real.detach()), (lambda _: fake, fake.detach()), points
        )
        assert float(told["accuracy"]) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------- heads and taps


def test_the_loss_of_several_heads_is_the_mean_of_theirs_when_they_have_equally_many_places():
    torch.manual_seed(0)
    heads = Discriminator([4, 6], width=16)
    maps = [torch.randn(3, 4, 2, 5), torch.randn(3, 6, 5, 2)]
    both = GAN_LOSSES["hinge"][0](heads(maps), -heads(maps))
    each = [GAN_LOSSES["hinge"][0](head(m), -head(m)) for head, m in zip(heads.heads, maps, strict=True)]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)
    uneven = [maps[0], torch.randn(3, 6, 1, 1)]
    logits = [head(m) for head, m in zip(heads.heads, uneven, strict=True)]
    assert [each.shape for each in logits] == [(3, 10), (3, 1)] and heads(uneven).shape == (3, 11)


def test_a_head_reads_maps_tokens_and_vectors_alike():
    torch.manual_seed(0)
    head = Discriminator([8], width=16).heads[0]
    tokens = torch.randn(2, 12, 8)
    as_map = tokens.transpose(1, 2).reshape(2, 8, 3, 4)
    torch.testing.assert_close(head(as_map), head(tokens))
    torch.testing.assert_close(head(tokens[:, 0]), head(tokens[:, :1]))


def test_a_residual_head_sees_the_places_around_it_and_no_further():
    torch.manual_seed(0)
    head = Discriminator([8], width=16, kernel=3).heads[0]
    # Group norms over all places would carry every change everywhere.
    head.norm, head.mix[1] = torch.nn.Identity(), torch.nn.Identity()
    before = torch.randn(2, 8, 5, 6)
    after = before.clone()
    after[:, :, 2, 3] += 1
    moved = (head(after) - head(before)).unflatten(1, (5, 6)) != 0
    assert moved[:, 1:4, 2:5].all() and moved.sum() == 2 * 9

    tokens = before.flatten(2).transpose(1, 2)
    changed = tokens.clone()
    changed[:, 10] += 1
    moved = head(changed) - head(tokens) != 0
    assert moved[:, 9:12].all() and moved.sum() == 2 * 3
    assert head(tokens[:, 0]).shape == (2, 1)  # a vector has no neighbours


@pytest.mark.parametrize("name", ["ladd", "add", "lightning"])
def test_a_residual_head_of_even_side_is_refused(name):
    with pytest.raises(UserError, match=r"method\.head_kernel must be odd and at least 1, got 2"):
        worlds.method(name, head_kernel=2)


def test_tapped_features_equal_a_plain_forwards(tiny_sd):
    """Every block of a stock UNet, against the outputs of a forward nobody cut short."""
    from stepdistill.families.sd import SD

    family = SD(SD.Config(teacher=str(tiny_sd)))
    teacher, unet = family.teacher, family.teacher.network.unet
    x, t = torch.randn(2, *family.shape), torch.tensor([10.0, 700.0], dtype=torch.float64)
    cond = family.encode(["a red circle", "a blue square"])
    names = list(chosen_blocks(teacher, "all"))
    ours = block_features(teacher, x, t, cond, names)
    plain = {}
    handles = [
        module.register_forward_hook(lambda m, i, out, name=name: plain.__setitem__(name, out))
        for name, module in unet.named_modules()
    ]
    unet(x, t.float(), cond)
    for handle in handles:
        handle.remove()
    assert len(names) == 5
    for name, feature in zip(names, ours, strict=True):
        out = plain[name.removeprefix("network.unet.")]
        assert torch.equal(feature, out if isinstance(out, torch.Tensor) else out[0])
    assert [f.shape[1] for f in ours] == list(chosen_blocks(teacher, "all").values())
    assert list(chosen_blocks(teacher, "half")) == names[:3] and list(chosen_blocks(teacher, "middle")) == [
        names[2]
    ]


# ----------------------------------------------------------------------------------------------------- LADD


def ladd(steps=(1, 2, 4), classes: int = 2, schedule: str = "vp", **settings):
    return world("ladd", steps=steps, classes=classes, schedule=schedule, **settings)


def test_the_students_gradient_comes_through_the_frozen_teachers_input():
    """Put together again from the phase's draws; with the taps cut off the input, nothing is left."""
    made = ladd()
    phase = next(iter(made.method.phases(600)))
    made.backward(phase, 600)
    ours = [p.grad.clone() for p in made.nets.student.parameters()]
    backbone = made.nets.teacher.backbone()
    assert all(p.grad is None for p in backbone.parameters())
    batch = made.batch(600, "student")
    method, schedule = made.method, made.nets.schedule
    t = method.times(made.nets, batch)
    eps = batch.randn()
    x_t = torch.where((t == 999)[:, None], eps, schedule.add_noise(batch.x0, eps, t))
    x0 = made.nets.student(x_t, t, batch.cond).x0
    tau = schedule.t_of_rho((1 + batch.generator.randn(dtype=torch.float64)).exp())
    x_tau = schedule.add_noise(x0, batch.randn(), tau)
    features = block_features(backbone, x_tau, tau, batch.cond, list(backbone.blocks))
    expected = torch.autograd.grad(
        -made.nets.discriminator(features).mean(), list(made.nets.student.parameters())
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    assert sum(float(a.abs().sum()) for a in ours) > 1e-6


def test_student_times_are_the_grids_with_the_asked_shares():
    method = worlds.method("ladd", steps=(1, 2, 4), first_weight=0.7)
    made = world(method)
    grid = sorted({t for n in (1, 2, 4) for t in few_step_grid(made.nets.schedule, n, 4)}, reverse=True)

    def shares(warm: bool) -> list[float]:
        drawn = torch.cat([method.times(made.nets, made.batch(step), warm) for step in range(200)])
        assert set(drawn.tolist()) <= set(grid)
        return [float((drawn == t).double().mean()) for t in grid]

    spread = 5 * (0.25 / (200 * COUNT)) ** 0.5
    for got, expected in zip(shares(False), (0.7, 0.1, 0.1, 0.1), strict=True):
        assert abs(got - expected) < spread
    for got, expected in zip(shares(True), (0, 0, 0.5, 0.5), strict=True):
        assert abs(got - expected) < spread
    alone = worlds.method("ladd", steps=(1,))
    assert set(alone.times(made.nets, made.batch(), True).tolist()) == {999.0}
    warm = [next(iter(method.phases(step))).terms[0][1].keywords["warm"] for step in (0, 499, 500)]
    assert warm == [True, True, False]


def test_max_time_weighting_puts_its_atom_on_pure_noise():
    """SANA-Sprint: half of the student's times are t_max, the rest lognormal in rho."""
    settings = {"student_times": "density", "first_weight": 0.5, "student_mean": 0.2, "student_std": 1.6}
    made = ladd(schedule="trig", **settings)
    t = torch.cat([made.method.times(made.nets, made.batch(step)) for step in range(400)])
    first = t == math.pi / 2
    assert abs(float(first.double().mean()) - 0.5) < 5 * (0.25 / len(t)) ** 0.5
    log_rho = made.nets.schedule.rho(t[~first]).log()
    assert abs(float(log_rho.mean()) - 0.2) < 5 * 1.6 / len(log_rho) ** 0.5
    assert abs(float(log_rho.std()) - 1.6) < 5 * 1.6 / (2 * len(log_rho)) ** 0.5


def test_the_student_starts_from_what_it_is_sampled_from():
    """At t_max pure noise, not alpha_999 x0 + sigma_999 eps; elsewhere noised data."""
    made, heard = ladd(first_weight=0.5), []
    made.nets.modules["student"] = lambda x_t, t, cond: (
        heard.append((x_t, t)) or Prediction(x_t, "x0", x_t, t, made.nets.schedule)
    )
    batch, twin = made.batch(600), made.batch(600)
    made.method.generate(made.nets, batch, False)
    ((x_t, t),) = heard
    assert torch.equal(made.method.times(made.nets, twin), t)
    eps, first = twin.randn(), t == 999
    assert bool(first.any()) and not bool(first.all())
    assert torch.equal(x_t[first], eps[first])
    torch.testing.assert_close(
        x_t[~first], made.nets.schedule.add_noise(twin.x0, eps, t)[~first], rtol=1e-6, atol=1e-6
    )


def test_the_relativistic_student_is_set_beside_real_data():
    made = ladd(gan="relativistic")
    loss = made.method.student_loss(made.nets, made.batch(600))["total"]
    batch = made.batch(600)
    x0, judged = made.method.generate(made.nets, batch, False), []
    for each in (x0, batch.x0):
        critic, x_tau = made.method.seen(made.nets, batch, each, batch.cond)
        judged.append(critic(x_tau))
    expected = torch.nn.functional.softplus(judged[1] - judged[0]).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["vp", "edm", "flow", "trig"])
def test_what_is_judged_is_the_same_under_every_schedule(schedule):
    """One level rho, whatever the schedule: the heads' inputs at equal noise are equal."""
    made = ladd(schedule=schedule, classes=1)
    batch = made.batch()
    _, x_tau = made.method.seen(made.nets, batch, batch.x0, None)
    again = made.batch()
    rho = (1 + again.generator.randn(dtype=torch.float64)).exp()
    at_unit_alpha = again.x0 + rho[:, None].float() * again.randn()
    alpha = made.nets.schedule.alpha(made.nets.schedule.t_of_rho(rho))[:, None].float()
    inside = rho < made.nets.schedule.rho(torch.tensor([made.nets.schedule.t_max], dtype=torch.float64))
    torch.testing.assert_close((x_tau / alpha)[inside], at_unit_alpha[inside], rtol=1e-4, atol=1e-4)


def test_ladds_discriminator_tells_real_from_generated_and_not_the_reverse():
    made = ladd()
    gan = made.method.discriminator_loss(made.nets, made.batch())["gan"]
    batch = made.batch()
    x0, judged = made.method.generate(made.nets, batch, False).detach(), []
    for each in (batch.x0, x0):
        critic, x_tau = made.method.seen(made.nets, batch, each, batch.cond)
        judged.append(critic(x_tau))
    torch.testing.assert_close(gan, (1 - judged[0]).relu().mean(1) + (1 + judged[1]).relu().mean(1))


def test_misaligned_pairs_are_real_data_under_anothers_condition():
    made = ladd(misaligned=True)
    heard = []
    seen = made.method.seen
    made.method.seen = lambda nets, batch, x0, cond: heard.append((x0, cond)) or seen(nets, batch, x0, cond)
    losses = made.method.discriminator_loss(made.nets, made.batch(phase="discriminator"))
    batch = made.batch()
    (x_real, c_real), (_, c_fake), (x_mis, c_mis) = heard
    assert torch.equal(x_real, x_mis) and torch.equal(x_real, batch.x0)
    assert torch.equal(c_real, batch.cond) and torch.equal(c_fake, batch.cond)
    assert torch.equal(c_mis, batch.cond.roll(1))
    torch.testing.assert_close(losses["total"], losses["gan"] + losses["misaligned"])


def test_the_discriminators_step_leaves_no_gradient_on_the_student():
    made = ladd()
    loss = made.method.discriminator_loss(made.nets, made.batch(phase="discriminator"))["total"].sum()
    student = list(made.nets.student.parameters())
    assert all(p.requires_grad for p in student)
    assert all(g is None for g in torch.autograd.grad(loss, student, allow_unused=True, retain_graph=True))
    assert not any(p.requires_grad for p in made.nets.teacher.backbone().parameters())


# ------------------------------------------------------------------------------------------------------ ADD


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
    torch.testing.assert_close(losses["gan"], -nets.discriminator(method.eye.features(x0)).mean(1))
    torch.testing.assert_close(losses["total"], losses["gan"] + 2.5 * losses["distillation"])


@pytest.mark.parametrize(("schedule", "rho"), [("vp", 2.5), ("edm", 20.0)])
def test_adds_student_starts_from_what_it_is_sampled_from(schedule, rho):
    """Pure noise at the first of its times, wherever the part that says how it is sampled begins."""
    first = {"name": "dmd2", "first_rho": rho, "init_noise": "sigma"}
    parts = [first, {"name": "add", "eye": "fourier"}]
    made, heard = world("compose", steps=(1,), schedule=schedule, parts=parts, sampling="first"), []
    made.nets.modules["student"] = lambda x_t, t, cond: (
        heard.append((x_t, t)) or Prediction(x_t, "x0", x_t, t, made.nets.schedule)
    )
    method, twin = made.method.parts[1][2], made.batch()
    method.generate(made.nets, made.batch())
    ((x_t, t),) = heard
    twin.generator.randint(0, 1)
    assert bool((t == made.method.grid(made.nets.schedule, 1)[0]).all())
    sigma = made.nets.schedule.sigma(t)[:, None].float()
    torch.testing.assert_close(x_t, sigma * twin.randn(), rtol=1e-6, atol=1e-6)


EYES = {"ladd": {"warmup": 0}, "add": {"eye": "fourier"}, "reward": {}}


@pytest.mark.parametrize(("name", "settings"), EYES.items(), ids=EYES)
def test_a_stage_can_go_on_with_a_student_of_sigma_noise(name, settings):
    """As SiD and SIM leave it: the first input, and so the exported card, is theirs."""
    settings = settings | {"first_rho": 2.5, "init_noise": "sigma"}
    assert worlds.method(name, steps=(1, 2), **settings).init_noise == "unit"  # as LCMScheduler starts
    made, heard = world(name, steps=(1,), **settings), []
    assert made.method.init_noise == "sigma"
    made.nets.modules["student"] = lambda x_t, t, cond: (
        heard.append((x_t, t)) or Prediction(x_t, "x0", x_t, t, made.nets.schedule)
    )
    if name == "reward":
        x_t, t, _ = simulate(made.method, made.nets, made.batch())
    else:
        made.method.generate(made.nets, made.batch(), *([False] if name == "ladd" else []))
        ((x_t, t),) = heard
    sigma = float(made.nets.schedule.sigma(t)[0])
    assert sigma < 0.95 and float(x_t.std()) == pytest.approx(sigma, rel=0.25)
    unit = worlds.method(name, steps=(1,), **(settings | {"init_noise": "unit"}))
    made.method.config.init_noise = "unit"
    assert unit.init_noise == made.method.init_noise == "unit"


def test_conditions_of_others_need_others():
    made = world("ladd", misaligned=True, warmup=0)
    batch = made.batch(phase="discriminator")
    noise = SampleNoise([0], step=0, phase="discriminator")
    alone = replace(
        batch,
        cond=batch.cond[:1],
        uncond=batch.uncond[:1],
        x0=batch.x0[:1],
        index=noise.index,
        generator=noise,
    )
    with pytest.raises(UserError, match=r"method\.misaligned needs .* batches of 2 at least"):
        made.method.discriminator_loss(made.nets, alone)


@pytest.mark.parametrize("name", ["dmd2", "f_distill"])
def test_the_discriminator_meets_real_and_generated_data_under_one_law(name, monkeypatch):
    """Noise level or condition alone must not tell which is which."""
    from stepdistill.methods import dmd2

    settings = {"gan_weight": 1.0, "critic_density": "lognormal", "time_mean": -2.0, "time_std": 0.01}
    made, real, fake = world(name, **settings | {"critic_dropout": 1.0}), [], []
    original, score = dmd2.block_features, made.nets.fake_score.forward

    def features(net, x_t, t, cond, blocks):
        real.append((t, cond))
        return original(net, x_t, t, cond, blocks)

    def forward(x_t, t, cond=None, **more):
        fake.append((t, cond))
        return score(x_t, t, cond, **more)

    monkeypatch.setattr(dmd2, "block_features", features)
    made.nets.fake_score.forward = forward
    batch = made.batch(phase="critic")
    made.method.critic_loss(made.nets, batch)
    for t, cond in (real[0], fake[0]):
        assert float((made.nets.schedule.rho(t).log() + 2).abs().max()) < 0.2
        assert torch.equal(cond, batch.uncond)


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
    slopes = torch.autograd.grad(made.nets.discriminator(features).mean(1).sum(), features)
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


def test_a_head_is_conditioned_by_projection():
    torch.manual_seed(0)
    heads = Discriminator([5], width=16, condition=7)
    feature, told = torch.randn(3, 4, 5), torch.randn(3, 7)
    head = heads.heads[0]
    plain = heads([feature], torch.zeros(3, 7))
    hidden = torch.nn.functional.silu(head.norm(head.enter(feature).transpose(1, 2)).transpose(1, 2))
    expected = torch.einsum("bpw,bw->bp", hidden, head.project(told)) / 4
    torch.testing.assert_close(heads([feature], told) - plain, expected)


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


# ------------------------------------------------------------------------------------------------ Lightning


def lightning(steps=(2,), schedule: str = "vp", **settings):
    return world("lightning", steps=steps, schedule=schedule, **settings)


@pytest.mark.parametrize("schedule", ["vp", "edm", "flow", "trig"])
def test_lightnings_real_is_the_predecessors_sampler_from_the_same_place(schedule):
    made = lightning(ratio=3, schedule=schedule)
    nets, method, batch = made.nets, made.method, made.batch()
    i, x_t = method.start(nets, batch)
    real = method.real(nets, batch, i, x_t)
    grid = method.grid(nets.schedule, 6)
    for position in (0, 1):
        rows = i == position
        x, cond = x_t[rows], batch.cond[rows]
        start, walked = 3 * position, None
        with torch.no_grad():
            if position == 0:
                walked = walk(nets.predecessor, x, grid[: start + 4], None, cond, rule="ode")
            else:  # to the end: a sampler's last step is x0 itself
                walked = sample(nets.predecessor, x, grid[start:], None, cond, rule="ode")
        torch.testing.assert_close(real[rows], walked, rtol=1e-4, atol=1e-5)
    assert set(i.tolist()) == {0, 1}


def test_the_student_that_is_its_own_predecessor_makes_what_is_real():
    made = lightning(ratio=1, mse_weight=1.0, gan_weight=0.0)
    made.nets.modules["predecessor"] = made.nets.student
    losses = made.method.student_loss(made.nets, made.batch())
    assert float(losses["total"].max().detach()) < 1e-10
    assert [phase.trains for phase in made.method.phases(0)] == [
        ("student",)
    ]  # no discriminator without its game


def test_lightnings_error_is_weighed_and_its_relativistic_student_set_beside_what_is_real():
    made = lightning(gan="relativistic", mse_weight=0.3, gan_weight=0.7)
    losses, batch = made.method.student_loss(made.nets, made.batch()), made.batch()
    i, x_t = made.method.start(made.nets, batch)
    x_s, _ = made.method.generate(made.nets, batch, i, x_t)
    real = made.method.real(made.nets, batch, i, x_t)
    fake, beside = (made.method.logits(made.nets, batch, i, x_t, x) for x in (x_s, real))
    torch.testing.assert_close(losses["error"], (x_s - real).square().mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["gan"], torch.nn.functional.softplus(beside - fake).mean(1))
    torch.testing.assert_close(losses["total"], 0.3 * losses["error"] + 0.7 * losses["gan"])
    # The discriminator plays the same game from the other side.
    told = made.method.discriminator_loss(made.nets, made.batch())["gan"]
    torch.testing.assert_close(told, torch.nn.functional.softplus(fake - beside).mean(1))


def test_a_conditional_discriminator_sees_both_ends_of_the_step_and_the_other_only_the_latter():
    for conditional in (True, False):
        made = lightning(conditional=conditional)
        batch = made.batch()
        i, x_t = made.method.start(made.nets, batch)
        x_s, _ = made.method.generate(made.nets, batch, i, x_t)
        x_t, x_s = x_t.detach().requires_grad_(), x_s.detach().requires_grad_()
        logits = made.method.logits(made.nets, batch, i, x_t, x_s)
        by_t, by_s = torch.autograd.grad(logits.sum(), (x_t, x_s), allow_unused=True)
        assert float(by_s.abs().max()) > 0 and (by_t is not None) == conditional
        # The features are the encoder's own at (x, t).
        middle = [made.nets.encoder.middle]
        seen = [
            block_features(
                made.nets.encoder, x_s, made.method.at(made.nets.schedule, i + 1, 1), batch.cond, middle
            )[0]
        ]
        if conditional:
            seen += block_features(
                made.nets.encoder, x_t, made.method.at(made.nets.schedule, i, 1), batch.cond, middle
            )
        torch.testing.assert_close(logits, made.nets.discriminator([torch.cat(seen, 1)]))


def test_the_encoder_is_the_teachers_first_half_with_weights_of_its_own(tiny_sd):
    from stepdistill.denoiser import parameter_count
    from stepdistill.families.sd import SD

    teacher = SD(SD.Config(teacher=str(tiny_sd))).teacher
    encoder = teacher.encoder()
    assert parameter_count(encoder) < 0.8 * parameter_count(teacher)
    x, t, cond = (
        torch.randn(2, 4, 4, 4),
        torch.tensor([10.0, 700.0], dtype=torch.float64),
        torch.randn(2, 7, 16),
    )
    names = list(chosen_blocks(teacher, "half"))
    for a, b in zip(*(block_features(each, x, t, cond, names) for each in (teacher, encoder)), strict=True):
        assert torch.equal(a, b)
    block_features(encoder, x, t, cond, names[-1:])[0].sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_unconditional_stage_goes_on_with_the_same_predecessor():
    before, after = lightning(), lightning(predecessor="same", conditional=False)
    assert after.method.carried == ("predecessor",) and before.method.carried == ()
    after.nets.predecessor.load_state_dict(before.nets.predecessor.state_dict())  # all keys match


def test_lightning_refuses_what_makes_no_sense():
    for settings, steps, says in (
        ({}, (1, 2), "one number per stage"),
        ({"ratio": 0}, (1,), r"method\.ratio must be at least 1"),
        ({"gan_weight": 0.0}, (1,), "both 0"),
    ):
        with pytest.raises(UserError, match=says):
            worlds.method("lightning", steps=steps, **settings)


# ------------------------------------------------------------------------------------------- compositions


def test_parts_that_train_more_than_the_student_still_make_one_step():
    """SANA-Sprint: sCM trains a weighting along, LADD does not; one student step on the weighted sum."""
    parts = [{"name": "scm", "first_rho": 0.0, "warmup": 1}, {"name": "ladd", "weight": 0.5, "warmup": 0}]
    made = world("compose", steps=(1, 2), schedule="trig", parts=parts)
    phases = list(made.method.phases(0))
    assert [phase.trains for phase in phases] == [("student", "scm/weighting"), ("ladd/discriminator",)]
    assert [weight for weight, _ in phases[0].terms] == [0.5, 1.0]  # the term that reaches all comes last
    made.backward(phases[0])
    ours = [p.grad.clone() for p in made.nets.student.parameters()]
    batch = made.batch()
    ladd_, scm = made.method.parts[1][2], made.method.parts[0][2]
    total = 0.5 * ladd_.student_loss(made.nets.scoped("ladd"), batch)["total"].mean()
    total = total + scm.loss(made.nets.scoped("scm"), batch, 1.0)["total"].mean()
    expected = torch.autograd.grad(total, list(made.nets.student.parameters()))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_first_part_may_say_how_the_student_is_sampled():
    """Hyper-SD: DMD2 beside TSCD rolls the student out by TCD's rule, at TCD's times."""
    parts = [{"name": "tscd", "eta": 0.5, "segments": 2}, {"name": "dmd2"}]
    with pytest.raises(UserError, match=r"method\.sampling=first"):
        worlds.method("compose", parts=parts)
    method = worlds.method("compose", steps=(4,), parts=parts, sampling="first")
    assert method.rule == "tcd" and method.eta == 0.5
    made = world(method)
    dmd2 = method.parts[1][2]
    for step in range(12):
        batch, twin = made.batch(step), made.batch(step)
        x_t, _, time = simulate(dmd2, made.nets, batch)
        twin.generator.shared_randint(0, 4)
        if time != 499:
            continue
        x = twin.randn()
        with torch.no_grad():
            rolled = walk(
                made.nets.student,
                x,
                (999.0, 749.0, 499.0),
                lambda _, twin=twin: twin.randn(),
                twin.cond,
                rule="tcd",
                eta=0.5,
            )
        torch.testing.assert_close(x_t, rolled)
        break
    else:
        raise AssertionError("the position was never drawn")


@pytest.mark.parametrize("name", ["add", "ladd", "reward"])
def test_a_stage_after_one_that_starts_lower_can_start_there_too(name):
    method, plain = worlds.method(name, steps=(1, 2), first_rho=2.5), worlds.method(name, steps=(1, 2))
    schedule = VP.from_betas()
    assert method.first_rho == 2.5
    assert method.grid(schedule, 2) == few_step_grid(schedule, 2, first_rho=2.5) != plain.grid(schedule, 2)
    with pytest.raises(UserError, match=r"first_rho must be 0 .* got -1\."):
        worlds.method(name, first_rho=-1.0)
