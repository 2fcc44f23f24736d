"""Every registered method: whose parameters get a gradient in which phase, and each paper's equations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import worlds
from torch import nn
from worlds import COUNT, EVERY, SETTINGS, STEPS, gradients, weights, world

from stepdistill.denoiser import Denoiser, guided, unwrap
from stepdistill.errors import UserError
from stepdistill.families.base import sinusoids
from stepdistill.families.sd import SD
from stepdistill.families.toy import gaussian_flow_map
from stepdistill.losses import distribution_matching
from stepdistill.methods import METHODS
from stepdistill.methods.base import Batch, Method, Networks, Phase, simulate
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.pretrain import Pretrain
from stepdistill.noise import SampleNoise
from stepdistill.prediction import Prediction
from stepdistill.sampling import RULES
from stepdistill.schedule import EDM, VP, Flow, TrigFlow, expand
from stepdistill.solvers import ddim
from stepdistill.timesteps import draw, few_step_grid, times_like

# ------------------------------------------------------------------------------- the contract of all methods


@EVERY
def test_each_phase_reaches_the_named_networks_and_no_other(name, settings):
    made = world(name, **settings)
    seen = set()
    for phase, early in ((phase, step < 3) for step in range(10) for phase in made.method.phases(step)):
        if phase.trains in seen and not early:  # targets that take turns are looked at one by one
            continue
        seen.add(phase.trains)
        made.backward(phase)
        assert "teacher" not in phase.trains
        for other, module in made.nets.modules.items():
            reached = gradients(module)
            assert all(reached) if other in phase.trains else not any(reached), (phase.name, other)
            if other in phase.trains:
                assert sum(float(p.grad.abs().sum()) for p in module.parameters()) > 0
    assert seen


@EVERY
def test_what_only_gives_targets_is_a_constant(name, settings):
    """With nothing frozen: teacher, target, predecessor and path get no gradient, but for the teacher of SIM and
    SiD, which is differentiated through its input.
    """
    made = world(name, **settings)
    held = [key for key in made.nets.modules if re.match("teacher|target|predecessor|path_", key)]
    for module in made.nets.modules.values():
        module.requires_grad_(True)
    for step in range(3):
        for phase in made.method.phases(step):
            for _, loss in phase.terms:
                loss(made.nets, made.batch(step, phase.name))["total"].mean().backward()
    reached = {key for key in held if any(gradients(made.nets.modules[key]))}
    assert reached == ({"teacher"} if name in ("sim", "sid") else set())


@EVERY
def test_all_trained_parameters_move_and_the_rest_stays_byte_for_byte(name, settings):
    made = world(name, **settings)
    trained, before = made.trained, weights(made)
    optimizers = {key: torch.optim.Adam(made.nets.modules[key].parameters(), 1e-3) for key in trained}
    for step in range(6):
        ran = list(made.method.phases(step))
        for phase in ran:
            made.backward(phase, step)
            for key in phase.trains:
                optimizers[key].step()
        made.method.after_step(made.nets, step, tuple(phase.name for phase in ran))
    for key, after in weights(made).items():
        moved = {part: not torch.equal(before[key][part], value) for part, value in after.items()}
        if key in trained | {"target"}:  # which follows the student without being trained
            assert all(moved[part] for part, _ in made.nets.modules[key].named_parameters()), key
        else:
            assert moved and not any(moved.values()), key


@EVERY
def test_losses_are_per_sample_and_repeat_themselves(name, settings):
    made = world(name, **settings)
    for phase in made.method.phases(0):
        for _, loss in phase.terms:
            values, again = (loss(made.nets, made.batch(3, phase.name)) for _ in range(2))
            assert values["total"].shape == (COUNT,) and bool(torch.isfinite(values["total"]).all())
            assert all(value.shape in ((COUNT,), ()) for value in values.values())
            for key in values:
                assert torch.equal(values[key], again[key]), key


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in ("cd", "tscd", "scm", "meanflow", "boot", "dmd2", "sim", "sid", "diff_instruct", "vsd", "dmd")),
        ("ect", {"teacher_step": True}),
        ("tsm", {"cond_dropout": 0.0}),
        ("progressive", {"predecessor": "teacher"}),
        ("lightning", {"predecessor": "teacher", "mse_weight": 1.0}),
        ("add", SETTINGS["add"]),
        ("f_distill", {}),
    ],
)  # fmt: skip
def test_guidance_is_of_the_teacher_alone_and_of_one_convention(name, settings):
    """A teacher that is guided in itself, u + 3 (c - u), asked without guidance, teaches the same."""
    made = world(name, **settings)
    mixture, config = made.nets.teacher.network, made.method.config
    plain, none = mixture.forward, made.family.config.classes

    def in_itself(x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        c, u = plain(x_t.double(), t, cond), plain(x_t.double(), t, torch.full_like(cond, none))
        return (u + 3 * (c - u)).to(x_t.dtype)

    def losses(scale: float) -> list[torch.Tensor]:
        config.guidance_scale = scale
        phase = next(iter(made.method.phases(0)))
        return [loss(made.nets, made.batch(3))["total"].detach() for _, loss in phase.terms]

    without, asked = losses(1.0), losses(3.0)
    mixture.forward = in_itself
    for term, (a, b) in enumerate(zip(asked, losses(1.0), strict=True)):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)
        assert term or not torch.allclose(without[term], a, rtol=1e-2)


@EVERY
def test_state_survives_a_round_trip(name, settings):
    made, other = (world(name, **settings) for _ in range(2))
    for step in range(3):
        made.method.after_step(made.nets, step, ("student",))
    other.method.load_state_dict(made.method.state_dict())
    assert other.method.state_dict() == made.method.state_dict()
    for key, module in other.nets.modules.items():
        module.load_state_dict(made.nets.modules[key].state_dict())


@EVERY
def test_grids_and_declarations(name, settings):
    method = worlds.method(name, steps=STEPS.get(name, (1, 2, 4)), **settings)
    for steps in method.steps:
        grid = method.grid(VP.from_betas(), steps)
        assert len(grid) == steps and grid == tuple(sorted(grid, reverse=True))
        assert grid[0] == 999 or method.first_rho
    assert method.rule in RULES and method.guidance_scale >= 1
    for wrong in ((), (0,)):
        with pytest.raises(UserError, match=r"student\.steps"):
            worlds.method(name, steps=wrong, **settings)


@pytest.mark.parametrize(
    ("name", "settings"), [("tsm", {}), ("reward", {"rule": "ode"}), ("progressive", {})]
)
def test_students_of_the_rule_ode_are_called_when_ddim_scheduler_calls_them(name, settings):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")
    for steps in (1, 2, 3, 4, 6, 7):
        scheduler.set_timesteps(steps)
        method = worlds.method(name, steps=(steps,), **(SETTINGS.get(name, {}) | settings))
        assert list(method.grid(VP.from_betas(), steps)) == scheduler.timesteps.tolist()


# Updates in 20 iterations by what is trained; of any other method the student is, in every one.
FAKE = {"student": 20, "fake_score": 20}
GAN = {"student": 20, "discriminator": 20}
UPDATES: dict[str, dict[str, int]] = {
    **dict.fromkeys(("sim", "sid", "diff_instruct", "vsd", "dmd"), FAKE),
    **dict.fromkeys(("ladd", "add"), GAN),
    "lightning": GAN | {"encoder": 20},
    "dmd2": {"student": 4, "fake_score": 20},
    "disback": {"student": 4, "fake_score": 20},
    "f_distill": {"student": 4, "fake_score": 20, "discriminator": 20},
    "scm": {"student": 20, "weighting": 20},
    "compose": {"student": 4, "dmd2/fake_score": 20, "dmd21/fake_score": 20},
}


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        *((name, SETTINGS.get(name, {}), UPDATES.get(name, {"student": 20})) for name in METHODS),
        ("dmd2", {"student_every": 10, "gan_weight": 1.0}, {"student": 2, "fake_score": 20, "discriminator": 20}),
        ("sim", {"student_every": 3}, {"student": 7, "fake_score": 20}),
        ("ladd", {"student_every": 4}, {"student": 5, "discriminator": 20}),
        ("disback", {"stage": "degrade"}, {"fake_score": 20}),
        ("scm", {"learned_weight": False}, {"student": 20}),
        ("lightning", {"gan_weight": 0.0, "mse_weight": 1.0}, {"student": 20}),
        (
            "compose",
            {"parts": [{"name": "dmd2"}, {"name": "dmd2", "student_every": 2}]},
            {"student": 12, "dmd2/fake_score": 20, "dmd21/fake_score": 20},
        ),
    ],
)  # fmt: skip
def test_updates_in_20_iterations(name, settings, expected):
    """One optimiser step per network and iteration at most, the student's first, on all that a run will train."""
    method, counts = worlds.method(name, **settings), {}
    for step in range(20):
        phases = list(method.phases(step))
        trained = [key for phase in phases for key in phase.trains]
        assert len(trained) == len(set(trained)) and all(phase.terms for phase in phases)
        if "student" in trained and name != "compose":  # where parts take turns each of its own accord
            assert "student" in phases[0].trains
        for key in trained:
            counts[key] = counts.get(key, 0) + 1
    assert counts == expected
    assert set(counts) - {"student"} <= set(world(method).nets.modules)


# ------------------------------------------------------------------------------------------------------ DMD2


def test_dmd2_without_gan_never_touches_images():
    made = world("dmd2")
    assert not made.method.needs_images
    batch = made.batch()
    assert batch.x0 is None
    for phase in made.method.phases(0):
        for _, loss in phase.terms:
            loss(made.nets, batch)
    assert worlds.method("dmd2", gan_weight=0.1).needs_images


def test_the_students_gradient_is_fake_minus_guided_real():
    """Put together again from the phase's draws: simulate, t, eps; guided teacher, unguided fake score."""
    settings = {"guidance_scale": 3.0, "normalise": True}
    made = world("dmd2", steps=(1,), **settings)
    nets, method = made.nets, made.method
    made.backward(next(iter(method.phases(0))))
    ours = [p.grad.clone() for p in nets.student.parameters()]
    batch = made.batch(phase="student")
    x_t, t, _ = simulate(method, nets, batch)
    x0 = nets.student(x_t, t, batch.cond).x0
    t = method.times(nets, batch, 0.02, 0.98)
    assert float(t.min()) >= 20 and float(t.max()) < 980
    noisy = nets.schedule.add_noise(x0.detach(), batch.randn(), t)
    cond, uncond = nets.teacher(noisy, t, batch.cond).x0, nets.teacher(noisy, t, batch.uncond).x0
    real, fake = uncond + 3.0 * (cond - uncond), nets.fake_score(noisy, t, batch.cond).x0
    weight = (x0 - real).abs().mean(1, keepdim=True).detach()
    pull = ((fake - real) / weight / x0[0].numel() / COUNT).detach()
    expected = torch.autograd.grad(x0, list(nets.student.parameters()), pull)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_no_pull_when_the_fake_score_is_the_teacher():
    made = world("dmd2", guidance_scale=1.0)
    made.nets.modules["fake_score"] = made.nets.teacher
    made.backward(next(iter(made.method.phases(0))))
    assert all(float(p.grad.abs().max()) == 0 for p in made.nets.student.parameters())


def test_the_gan_gradient_flows_through_the_frozen_fake_scores_input():
    """With the matching gradient at zero, what is left comes through the critic's input alone."""

    def student_gradient(gan_weight: float) -> float:
        made = world("dmd2", guidance_scale=1.0, gan_weight=1e-9)
        made.method.config.gan_weight = gan_weight
        frozen = made.nets.fake_score

        class Agreeing(Denoiser):  # predicts what the teacher does, but keeps its own network for the taps
            def forward(self, x_t, t, cond=None, **extras):
                inner = super().forward(x_t, t, cond, **extras)
                exact = made.nets.teacher(x_t, t, cond).x0
                return Prediction(exact + 0 * inner.raw.detach(), "x0", x_t, t, inner.schedule)

        made.nets.modules["fake_score"] = Agreeing(frozen.network, frozen.kind, frozen.native)
        made.backward(next(iter(made.method.phases(0))))
        assert not any(gradients(made.nets.fake_score)) and not any(gradients(made.nets.discriminator))
        return sum(float(p.grad.abs().sum()) for p in made.nets.student.parameters())

    assert student_gradient(0.0) == 0
    assert student_gradient(1.0) > 1e-4


@pytest.mark.parametrize("name", ["dmd2", "f_distill"])
def test_beside_a_gan_the_scores_and_their_weight_are_constants_all_the_same(name):
    """The fake score's pass has a graph up to the tapped block and none behind it."""
    made, said = world(name, gan_weight=0.1, student_every=1), []
    for network in (made.nets.teacher, made.nets.fake_score):
        network.register_forward_hook(lambda *call: said.append(call[-1].raw))
    weigh = made.method.weight
    made.method.weight = lambda *asked: said.append(weigh(*asked)) or said[-1]
    losses = made.method.student_loss(made.nets, made.batch())
    real, fake, weight = said
    assert not (real.requires_grad or fake.requires_grad or (weight is not None and weight.requires_grad))
    assert losses["gan"].requires_grad and (weight is None) == (name == "dmd2")


def test_the_critic_learns_both_from_denoising_and_from_the_gan():
    made = world("dmd2", gan_weight=1e-3)
    losses = made.method.critic_loss(made.nets, made.batch(phase="critic"))
    torch.testing.assert_close(losses["total"], losses["denoising"] + 1e-2 * losses["gan"])
    (through,) = torch.autograd.grad(
        losses["gan"].sum(), made.nets.fake_score.network.enter.weight, retain_graph=True
    )
    assert float(through.abs().max()) > 0  # the GAN trains the fake score's body as well
    assert not any(p.grad is not None for p in made.nets.student.parameters())
    assert (
        torch.autograd.grad(losses["total"].sum(), made.nets.student.network.enter.weight, allow_unused=True)[
            0
        ]
        is None
    )


def test_the_critic_tells_real_from_generated_and_not_the_reverse():
    made = world("dmd2", gan_weight=1e-3)
    made.method.judge = lambda nets, seen, count: torch.full((count, 1), -50.0)  # what the student made
    made.method.logits = lambda nets, x0, batch: torch.full((len(x0), 1), 50.0)
    losses = made.method.critic_loss(made.nets, made.batch(phase="critic"))
    assert float(losses["gan"].max()) < 1e-6 and float(losses["accuracy"]) == 1


def test_the_critics_optimum_is_the_students_own_posterior_mean():
    """Denoising on what G makes: the exact denoiser of G's distribution has a lower loss than the teacher."""
    made = world("dmd2", steps=(1,), classes=1, schedule="flow", time_density="lognormal", time_mean=-0.5)
    nets, shift = made.nets, torch.tensor([0.5, -0.3])

    class Shifted(nn.Module):
        def forward(self, x_t, t, cond=None):
            return made.family.data(range(len(x_t)), seed=3) + shift

    class Moved(nn.Module):
        """The teacher's answer, of a mixture moved by `shift`."""

        def forward(self, x_t, t, cond=None):
            alpha = expand(nets.schedule.alpha(t), x_t)
            return nets.teacher(x_t - alpha * shift, t, cond).x0 + shift

    nets.modules["student"] = Denoiser(Shifted(), "x0", nets.schedule)

    def loss(fake: Denoiser) -> float:
        nets.modules["fake_score"] = fake
        return sum(float(made.method.critic_loss(nets, made.batch(i))["total"].mean()) for i in range(20))

    assert loss(Denoiser(Moved(), "x0", nets.schedule)) < 0.9 * loss(nets.teacher)


@pytest.mark.parametrize(
    "schedule", [VP.from_betas(), EDM(), Flow(), TrigFlow()], ids=["vp", "edm", "flow", "trig"]
)
def test_backward_simulation_with_an_oracle_student_lands_on_the_marginal(schedule):
    """x at t_K ~ N(alpha mu, alpha^2 s^2 + sigma^2) for every K, and every K of every step count is met."""
    mean, std, n = 0.3, 0.4, 20_000
    method = worlds.method("dmd2", steps=(1, 2, 4))

    def oracle(x_t, t, cond=None):
        end = torch.full_like(t, schedule.t_min)
        return Prediction(gaussian_flow_map(schedule, mean, std, x_t, t, end), "x0", x_t, t, schedule)

    nets, met = Networks({"student": oracle}, schedule), {}
    for step in range(40):
        noise = SampleNoise(range(n if step < 25 else 2), step=step, phase="student")
        batch = Batch(None, None, (1,), noise.index, noise)
        x_t, t, time = simulate(method, nets, batch)
        assert bool((t == time).all()) and not x_t.requires_grad
        met[time] = met.get(time, 0) + 1
        if step >= 25:
            continue
        alpha, sigma = float(schedule.alpha(t[:1])), float(schedule.sigma(t[:1]))
        spread = (alpha**2 * std**2 + sigma**2) ** 0.5
        # EDM's and VP's first states have mean 0 where the marginals have alpha 0.3: a shift of x0 by 0.002 and 0.008.
        bias = alpha * mean if time == schedule.t_max else 0.008 if isinstance(schedule, VP) else 0.002
        assert abs(float(x_t.double().mean()) - alpha * mean) < 5 * spread / n**0.5 + bias
        assert abs(float(x_t.double().std()) - spread) < 5 * spread / (2 * n) ** 0.5
    assert set(met) == {time for count in (1, 2, 4) for time in few_step_grid(schedule, count, 4)}
    assert met[schedule.t_max] > 10  # pure noise: K = 0 of all three counts


@pytest.mark.parametrize(
    ("by", "shares"),  # of 84: seven states, three counts, these as 4 : 2 : 1, or four states
    [
        ("states", {999.0: 36, 749.0: 12, 499.0: 24, 249.0: 12}),
        ("counts", {999.0: 49, 749.0: 7, 499.0: 21, 249.0: 7}),
        ("passes", {999.0: 63, 749.0: 3, 499.0: 15, 249.0: 3}),
        ("longest", {999.0: 21, 749.0: 21, 499.0: 21, 249.0: 21}),
    ],
)
def test_backward_simulation_meets_every_state_or_every_count_alike(by, shares):
    made = world("dmd2", steps=(1, 2, 4), simulated=by)
    made.nets.modules["student"] = lambda x_t, t, cond: Prediction(x_t, "x0", x_t, t, made.nets.schedule)
    met: dict[float, int] = {}
    for step in range(840):
        time = simulate(made.method, made.nets, made.batch(step), by=by)[2]
        met[time] = met.get(time, 0) + 1
    assert set(met) == set(shares)
    assert all(abs(met[time] - 10 * share) < 4 * (10 * share) ** 0.5 for time, share in shares.items())


@pytest.mark.parametrize("name", ["dmd2", "sid"])
def test_shared_samples_are_those_of_the_students_update_with_their_conditions(name):
    made = world(name, shared_samples=True)
    drawn, seen = [], []
    made.nets.student.register_forward_hook(lambda *call: drawn.append(call[-1].x0))
    made.nets.fake_score.register_forward_pre_hook(lambda _, args: seen.append(args))
    first, second = made.batch(0), made.batch(1)
    second.cond = second.cond.flip(0)
    used = []
    for batch in (first, second):  # two passes of accumulation
        made.method.student_loss(made.nets, batch)
        used.append(drawn[-1])
    calls = len(drawn)
    for x0, batch, fresh in zip(used, (first, second), (made.batch(2), made.batch(3)), strict=True):
        seen.clear()
        losses, shared = made.method.denoise(made.nets, fresh)
        losses["total"].mean().backward()  # into the fake score; nothing of the student's graph is kept
        assert torch.equal(shared, x0) and not shared.requires_grad
        assert torch.equal(seen[0][2], batch.cond)
    assert len(drawn) == calls, "the critic called the student"
    made.method.critic_loss(made.nets, made.batch(4))  # without an update of the student it draws its own
    assert len(drawn) > calls


def test_backward_simulation_uses_the_students_own_rule_and_pure_noise_first():
    made = world("dmd2", steps=(2,))
    heard = []
    made.nets.modules["student"] = lambda x_t, t, cond: (
        heard.append((x_t, t)) or Prediction(torch.full_like(x_t, 0.5), "x0", x_t, t, made.nets.schedule)
    )
    for step in range(8):
        heard.clear()
        batch, twin = made.batch(step), made.batch(step)
        x_t, _, time = simulate(made.method, made.nets, batch)
        twin.generator.shared_randint(0, 2)
        first, fresh = twin.randn(), twin.randn()
        if time == 999:
            assert torch.equal(x_t, first) and not heard  # not noised with alpha_999 = 0.07
        else:
            assert time == 499 and torch.equal(heard[0][0], first)
            half = torch.full_like(first, 0.5)
            torch.testing.assert_close(
                x_t, made.nets.schedule.add_noise(half, fresh, times_like(499.0, first))
            )


@pytest.mark.parametrize(
    ("name", "law"),
    [(n, "lognormal") for n in ("sim", "sid", "diff_instruct")] + [(n, "uniform") for n in ("dmd", "dmd2", "vsd")],
)  # fmt: skip
def test_the_fake_score_learns_by_its_own_law_over_all_noise_levels(name, law):
    """SiD's student is compared at Karras levels up to 0.8, DMD's within 0.02 .. 0.98: the critic sees all."""

    class Ear(nn.Module):
        sigma_data = 1.0

        def forward(self, x_t, t, cond=None):
            heard.append(t)
            return Prediction(x_t, "x0", x_t, t, made.nets.schedule)

    heard, made = [], world(name, steps=(1,))
    made.nets.modules["fake_score"] = Ear()
    for step in range(4):
        batch, twin = made.batch(step), made.batch(step)
        made.method.critic_loss(made.nets, batch)
        made.method.generate(made.nets, twin)
        assert torch.equal(heard[-1], draw(law, made.nets.schedule, twin.generator))


@pytest.mark.parametrize("name", ["sid", "vsd"])
def test_the_fake_score_is_guided_by_its_own_scale(name):
    made = world(name, steps=(1,), fake_guidance_scale=2.0, guidance_scale=5.0)
    batch, fake = made.batch(), made.nets.fake_score
    x_t, t = batch.randn(), times_like(500.0, batch.randn())
    with torch.no_grad():
        for parameter in fake.parameters():
            parameter += 0.1
        c, u = (fake(x_t, t, told).x0 for told in (batch.cond, batch.uncond))
        said = made.method.fake_at(made.nets, batch, x_t, t).x0
    torch.testing.assert_close(said, u + 2 * (c - u), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(said, c, rtol=1e-2)


# ------------------------------------------------------------------------------------------------- MeanFlow


def test_meanflow_weighs_the_square_summed_over_a_sample():
    settings = {"direction": "data", "equal_share": 1.0, "cond_dropout": 0.0, "weight_power": 0.5}
    made = world("meanflow", schedule="flow", **settings | {"weight_c": 0.1})
    losses, batch = made.method.loss(made.nets, made.batch()), made.batch()
    t, _ = made.method.times(made.nets, batch)
    eps = batch.randn()
    u = made.nets.student(Flow().add_noise(batch.x0, eps, t), t, batch.cond, end=t).flow
    squared = (u - (eps - batch.x0)).square().sum(1)
    torch.testing.assert_close(losses["total"], squared / (squared + 0.1).sqrt(), rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- LCM


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
    torch.testing.assert_close(consistency, x0, rtol=1e-4, atol=1e-4)  # and x0 where there is only noise


@pytest.mark.parametrize("schedule", ["vp", "edm", "flow", "trig"])
@pytest.mark.parametrize("points", [50, 80])
def test_the_boundary_is_a_switch_on_every_grid(schedule, points):
    """At all of the teacher's times but the end f is x0: c_skip + c_out = 1, so that a chain of targets keeps its
    scale."""
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
    batch.generator.rand()  # the guidance scales
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
    for step in range(20):
        made.method.loss(made.nets, made.batch(step))
    assert all(
        torch.equal(a, b) for a, b in zip(heard[::2], heard[1::2], strict=True)
    )  # target told the same
    drawn = torch.cat(heard[::2])
    assert 3 <= float(drawn.min()) < 4 and 14 < float(drawn.max()) <= 15 and len(drawn.unique()) == len(drawn)


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


@pytest.mark.parametrize("name", ["lcm", "cd", "tscd", "ect"])
def test_student_and_target_have_one_dropout_mask(name):
    made, drawn = world(name), []
    for network in {made.nets.student, made.nets.modules.get("target", made.nets.student)}:

        def forward(*args, plain=network.network.forward, **more):
            drawn.append(float(torch.rand(())))
            return plain(*args, **more)

        network.network.forward = forward
    made.method.loss(made.nets, made.batch())
    assert len(drawn) == 2 and drawn[0] == drawn[1]


@pytest.mark.parametrize("name", ["lcm", "cd", "tscd"])
def test_the_target_is_an_exponential_average(name):
    made = world(name, target_ema=0.8)
    student, target = made.nets.student, made.nets.target
    before = [p.detach().clone() for p in target.parameters()]
    made.method.after_step(made.nets, 0, ("student",))
    for old, new, followed in zip(before, target.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), 0.8 * old + 0.2 * followed.detach())
    wrapped = Networks(made.nets.modules | {"student": nn.DataParallel(student)}, made.nets.schedule)
    assert [n for n, _ in unwrap(wrapped.student).named_parameters()] == [
        n for n, _ in target.named_parameters()
    ]


def test_lcm_refuses_more_steps_than_its_grid_has():
    with pytest.raises(UserError, match=r"student\.steps must be at most method\.ddim_steps = 4"):
        worlds.method("lcm", steps=(8,), ddim_steps=4)


# -------------------------------------------------------------------------------------------------- pretrain


def test_pretrain_drops_the_asked_share_of_conditions():
    heard = []
    made = world("pretrain", cond_dropout=0.25)

    class Ear(Denoiser):
        def forward(self, x_t, t, cond=None):
            heard.append(cond)
            return super().forward(x_t, t, cond)

    student = made.nets.student
    made.nets.modules["student"] = Ear(student.network, student.kind, student.native)
    for step in range(100):
        made.method.loss(made.nets, made.batch(step))
    told, given = torch.cat(heard), made.batch().cond.repeat(100)
    dropped = told == 2
    assert abs(float(dropped.double().mean()) - 0.25) < 5 * (0.25 * 0.75 / 1600) ** 0.5
    assert torch.equal(told[~dropped], given[~dropped])


@pytest.mark.parametrize("method", [Pretrain, DMD2])
def test_edms_weight_takes_the_networks_own_sigma_data(method):
    """The pixel family is preconditioned with 0.5: c_out-sized errors then weigh 1 at every noise level."""
    made = world({Pretrain: "pretrain", DMD2: "dmd2"}[method], steps=(1,), classes=1, schedule="edm")
    name = "student" if method is Pretrain else "fake_score"
    data = 0.5

    class Off(nn.Module):
        sigma_data = data

        def forward(self, x_t, t, cond=None):
            sigma = expand(t, x_t)
            return target + sigma * data / (sigma**2 + data**2).sqrt()

    target = torch.full((COUNT, 2), 0.3)
    made.nets.modules[name] = Denoiser(Off(), "x0", made.nets.schedule)
    batch = made.batch(images=True)
    batch.x0 = target
    if method is DMD2:
        made.nets.modules["student"] = Denoiser(Constant(target), "x0", made.nets.schedule)
        total = made.method.critic_loss(made.nets, batch)["total"]
    else:
        total = made.method.loss(made.nets, batch)["total"]
    torch.testing.assert_close(total, torch.ones(COUNT), rtol=1e-3, atol=1e-3)


class Constant(nn.Module):
    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = value

    def forward(self, x_t, t, cond=None):
        return self.value


# --------------------------------------------------------------------------------------------------- compose


class Pull(Method):
    """The student's mean square towards `to`, with a network of its own and a counter to remember."""

    @dataclass
    class Config:
        to: float = 0.0

    needs_teacher = False

    def __init__(self, config: Any, steps=(1,)):
        super().__init__(config, steps)
        self.count = 0

    def networks(self, teacher, student):
        return {"scale": nn.Linear(1, 1, bias=False)}

    def phases(self, step):
        yield Phase("student", ("student",), ((1.0, self.loss),))
        yield Phase("scale", ("scale",), ((1.0, self.own),))

    def loss(self, nets, batch):
        x = batch.randn()
        x0 = nets.student(x, times_like(500.0, x), batch.cond).x0
        return {"total": (nets.scale.weight.detach() * (x0 - self.config.to)).square().mean(1)}

    def own(self, nets, batch):
        return {"total": (nets.scale.weight - self.config.to).square().expand(COUNT, 1).mean(1)}

    def after_step(self, nets, step, ran):
        self.count += ran.count("scale")

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Other(Pull):
    finest = 50


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(METHODS, "pull", f"{__name__}:Pull")
    monkeypatch.setitem(METHODS, "other", f"{__name__}:Other")


def test_a_composition_is_the_weighted_sum_of_its_parts(registered):
    parts = [{"name": "pull", "to": 1.0}, {"name": "pull", "to": -2.0, "weight": 0.3}]
    made = world("compose", steps=(1,), parts=parts)
    assert set(made.nets.modules) == {"student", "pull/scale", "pull1/scale"}
    with torch.no_grad():
        made.nets.modules["pull/scale"].weight.fill_(1.5)
        made.nets.modules["pull1/scale"].weight.fill_(0.7)
    phases = list(made.method.phases(0))
    assert [phase.trains for phase in phases] == [("student",), ("pull/scale",), ("pull1/scale",)]
    assert [weight for weight, _ in phases[0].terms] == [1.0, 0.3]
    made.backward(phases[0])
    ours = [p.grad.clone() for p in made.nets.student.parameters()]
    batch, total = made.batch(), 0.0
    for to, scale, weight in ((1.0, 1.5, 1.0), (-2.0, 0.7, 0.3)):  # one batch, drawn from in the parts' order
        x = batch.randn()
        x0 = made.nets.student(x, times_like(500.0, x), batch.cond).x0
        total = total + weight * (scale * (x0 - to)).square().mean()
    expected = torch.autograd.grad(total, list(made.nets.student.parameters()))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    made.backward(phases[2])
    assert float(made.nets.modules["pull1/scale"].weight.grad) == pytest.approx(
        0.3 * 2 * (0.7 + 2.0), rel=1e-5
    )


def test_a_composition_of_dmd2_with_itself_is_the_sum_of_its_parts():
    """The parts' losses, each with its own fake score, drawn one after another from one batch."""
    whole = world(
        "compose", steps=(1,), parts=[{"name": "dmd2", "weight": 0.5}, {"name": "dmd2", "weight": 0.5}]
    )
    whole.backward(next(iter(whole.method.phases(0))))
    ours = [p.grad.clone() for p in whole.nets.student.parameters()]
    alone = [worlds.method("dmd2", steps=(1,)) for _ in range(2)]
    batch = whole.batch()
    for number, method in enumerate(alone):
        scope = whole.nets.scoped(("dmd2", "dmd21")[number])
        loss = method.student_loss(scope, batch)["total"].mean()
        parts = torch.autograd.grad(loss, list(whole.nets.student.parameters()))
        ours = [a - 0.5 * b for a, b in zip(ours, parts, strict=True)]
    assert max(float(a.abs().max()) for a in ours) < 1e-6


def test_parts_keep_their_networks_and_states_apart(registered, own_code):
    method = worlds.method(
        "compose",
        steps=(1,),
        parts=[{"name": "pull"}, {"name": f"{__name__}:Pull"}, {"name": f"{__name__}:Pull"}],
    )
    scopes = [scope for scope, *_ in method.parts]
    assert len(set(scopes)) == 3 and scopes[:2] == ["pull", "Pull"]
    assert set(world(method).nets.modules) == {"student"} | {f"{scope}/scale" for scope in scopes}
    made = world(method)
    method.after_step(made.nets, 0, ("student", f"{scopes[1]}/scale"))
    method.after_step(made.nets, 1, tuple(phase.name for phase in method.phases(1)))
    state = method.state_dict()
    other = worlds.method(
        "compose",
        steps=(1,),
        parts=[{"name": "pull"}, {"name": f"{__name__}:Pull"}, {"name": f"{__name__}:Pull"}],
    )
    other.load_state_dict(state)
    assert set(state) == {f"{scope}/count" for scope in scopes}
    assert other.state_dict() == state and state[f"{scopes[1]}/count"] == 2


def test_in_a_composition_the_student_comes_before_every_critic():
    parts = [{"name": "dmd2", "student_every": 2}, {"name": "vsd", "student_every": 1}]
    method = worlds.method("compose", parts=parts)
    for step in range(2):
        names = [phase.name for phase in method.phases(step)]
        assert names == ["student", "dmd2/critic", "vsd/critic"]


def test_a_composition_carries_what_its_parts_carry():
    parts = [{"name": "dmd2", "carry_fake_score": True}, {"name": "dmd2"}]
    made = world("compose", parts=parts)
    assert made.method.carried == ("dmd2/fake_score",) and set(made.method.carried) < set(made.nets.modules)


def test_what_does_not_fit_together_is_refused(registered):
    for parts, says in (
        ([{"name": "pull"}], "at least two"),
        ([{"name": "dmd2"}, {"name": "lcm"}], "cannot be composed"),  # the students take different inputs
        ([{"name": "dmd2"}, {"name": "pretrain"}], "cannot be composed"),  # different sampling rules
        ([{"name": "pull"}, {"name": "other"}], "cannot be composed"),  # different sampling times
        ([{"name": "dmd2"}, {"name": "dmd3"}], "unknown method 'dmd3'"),
        ([{"name": "dmd2"}, {"name": "dmd2", "gan": 1}], r"method\.parts\.1"),
    ):
        with pytest.raises(UserError, match=says):
            worlds.method("compose", steps=(1,), parts=parts)


def test_scoped_networks_name_what_is_missing():
    nets = Networks({"student": nn.Identity(), "a/own": nn.Identity()}, Flow())
    assert nets.scoped("a").own is nets.modules["a/own"]
    with pytest.raises(AttributeError, match="no network 'own'; there are student"):
        _ = nets.own
    assert distribution_matching(torch.ones(2, 1), torch.ones(2, 1), torch.ones(2, 1)).tolist() == [0, 0]


@pytest.mark.parametrize("which", ["middle", "half", "all"])
def test_dmd2_judges_by_every_block_it_is_told_to_look_at(which):
    made = world("dmd2", steps=(1,), gan_weight=1.0, gan_blocks=which)
    blocks = made.nets.teacher.blocks
    upto = list(blocks).index(made.nets.teacher.middle)
    count = {"middle": 1, "half": upto + 1, "all": len(blocks)}[which]
    heads = made.nets.discriminator.heads
    assert len(heads) == count
    made.method.critic_loss(made.nets, made.batch(0, "critic"))["total"].mean().backward()
    assert all(head.leave.weight.grad.abs().sum() > 0 for head in heads)
