"""Every registered method: whose parameters get a gradient in which phase, what stays, what it declares."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import torch
import worlds
from torch import nn
from worlds import COUNT, EVERY, SETTINGS, STEPS, gradients, weights, world

from stepdistill import export
from stepdistill.errors import UserError
from stepdistill.losses import distribution_matching
from stepdistill.methods import METHODS
from stepdistill.methods.base import Networks
from stepdistill.registry import resolve
from stepdistill.sampling import RULES
from stepdistill.schedule import VP, Flow


@EVERY
def test_each_phase_reaches_the_named_networks_and_no_other(name, settings):
    made = world(name, **settings)
    seen = set()
    for phase, early in ((phase, step < 3) for step in range(10) for phase in made.method.phases(step)):
        # Targets that take turns are looked at one by one.
        if phase.trains in seen and not early:
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
    assert reached == ({"teacher"} if name in ("sim", "sid", "sida") else set())


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
        # Which follows the student without being trained.
        if key in trained | {"target", "moments"}:
            assert all(moved[part] for part, _ in made.nets.modules[key].named_parameters()), key
        else:
            assert moved and not any(moved.values()), key


@EVERY
def test_what_begins_as_a_copy_is_one_of_the_right_network(name, settings):
    """Target, predecessor and start of the student as the stage began; fake score and encoder of the teacher."""
    made = world(name, **settings)
    sources = {"target": made.before, "predecessor": made.before, "start": made.before}
    if made.method.needs_teacher:
        sources |= dict.fromkeys(("fake_score", "encoder"), made.nets.teacher.backbone())
    for key, module in made.nets.modules.items():
        if source := sources.get(key.rpartition("/")[2]):
            ours, theirs = (each.network.state_dict() for each in (module, source))
            shared = ours.keys() & theirs.keys()
            assert shared and all(torch.equal(ours[part], theirs[part]) for part in shared), key


@EVERY
def test_what_it_leaves_is_drawn_by_the_steps_it_was_trained_for(name, settings):
    """With a teacher of its own or without: but for what is a teacher itself."""
    made = world(name, **settings)
    recipe = {"run": {"out": "run"}, "method": {"name": name}, "family": {}}
    card = export.card_of(made.family, made.method, recipe)
    left = (
        ("teacher", ())
        if name in ("pretrain", "ppcl", "output_kd")
        else ("student", made.method.sampling.steps)
    )
    assert (card.kind, card.sampling.steps) == left


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
        *((name, {}) for name in ("cd", "tscd", "scm", "boot", "dmd2", "sim", "sid", "diff_instruct", "vsd", "dmd")),
        # Its adaptive weight makes every loss nearly 1.
        ("meanflow", {"weight_power": 0.0}),
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
    for steps in method.sampling.steps:
        grid = method.sampling.grid(VP.from_betas(), steps)
        assert len(grid) == steps and grid == tuple(sorted(grid, reverse=True))
        assert grid[0] == 999 or method.sampling.first_rho
    assert method.sampling.rule in RULES and method.sampling.scale >= 1
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
        assert list(method.sampling.grid(VP.from_betas(), steps)) == scheduler.timesteps.tolist()


# Updates in 20 iterations by what is trained; of any other method the student is, in every one.
FAKE = {"student": 20, "fake_score": 20}
GAN = {"student": 20, "discriminator": 20}
UPDATES: dict[str, dict[str, int]] = {
    **dict.fromkeys(("sim", "sid", "diff_instruct", "vsd", "dmd"), FAKE),
    **dict.fromkeys(("ladd", "add"), GAN),
    "lightning": GAN | {"encoder": 20},
    **{name: {"student": 4, "fake_score": 20} for name in ("dmd2", "decoupled_dmd", "cdm")},
    "sida": GAN | {"fake_score": 20},
    "disback": {"student": 4, "fake_score": 20},
    "f_distill": {"student": 4, "fake_score": 20, "discriminator": 20},
    "scm": {"student": 20, "weighting": 20},
    "dmf": {"student": 20, "weighting": 20},
    "anyflow": {"student": 4, "fake_score": 20},
    "phased_dmd": {"student": 4, "fake_score": 10, "fake_score_1": 10},
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
        # Where parts take turns each of its own accord.
        if "student" in trained and name != "compose":
            assert "student" in phases[0].trains
        for key in trained:
            counts[key] = counts.get(key, 0) + 1
    assert counts == expected
    assert set(counts) - {"student"} <= set(world(method).nets.modules)


def test_scoped_networks_name_what_is_missing():
    nets = Networks({"student": nn.Identity(), "a/own": nn.Identity()}, Flow())
    assert nets.scoped("a").own is nets.modules["a/own"]
    both = Networks({"own": nn.Identity(), "a/own": nn.Identity()}, Flow())
    assert both.scoped("a").own is both.modules["a/own"]
    with pytest.raises(AttributeError, match="no network 'own'; there are student"):
        _ = nets.own
    assert distribution_matching(torch.ones(2, 1), torch.ones(2, 1), torch.ones(2, 1)).tolist() == [0, 0]


@pytest.mark.parametrize("name", METHODS)
def test_spreads_and_scales_below_nothing_are_refused(name):
    for field in fields(resolve(name, METHODS, "method").Config):
        if field.type == "float" and (field.name.endswith("_std") or "guidance" in field.name):
            with pytest.raises(UserError, match=rf"^method.*\b{field.name}\b.*-0\.5"):
                worlds.method(name, **(SETTINGS.get(name, {}) | {field.name: -0.5}))
