"""The autoregressive family: its teacher as a map from noise, its student's inputs, its directories, what it refuses."""

from __future__ import annotations

import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import worlds
from tiny import ar
from worlds import method, world

import stepdistill
from evaluation.plan import _teacher_drawers
from evaluation.settings import Settings
from stepdistill import export
from stepdistill.code_flow import flow_to_codes
from stepdistill.denoiser import guided
from stepdistill.errors import UserError
from stepdistill.families.autoregressive import Autoregressive
from stepdistill.families.code_denoisers import CodeStudent, relayed
from stepdistill.families.toy import Toy
from stepdistill.lora import LoraConfig
from stepdistill.methods.assemble import assemble
from stepdistill.noise import SampleNoise
from stepdistill.schedule import Prefix, times_like
from training import run as running
from training.check_teacher import subject_of
from training.recipe import load_recipe
from training.train import main

CAPTIONS = [*worlds.CAPTIONS, ""] * 4
COUNT = len(CAPTIONS)


@pytest.fixture(scope="module")
def family():
    return Autoregressive.from_directory(ar.directory())


@pytest.fixture
def noise(family):
    return SampleNoise(range(COUNT), phase="ar").randn(*family.shape)


def naive(family, noise, scale=1.0):
    """Codes (B, L) by a whole pass for each place, nothing kept."""
    network, codes = family.teacher.network, torch.zeros(COUNT, ar.LENGTH, dtype=torch.long)
    cond, uncond = family.encode(CAPTIONS), family.uncond(COUNT)
    for place in range(ar.LENGTH):
        logits = network.logits(codes, cond)[:, place]
        if scale != 1:
            empty = network.logits(codes, uncond)[:, place]
            logits = empty + scale * (logits - empty)
        codes[:, place] = flow_to_codes(noise[:, place], logits.log_softmax(-1), network.book)
    return codes


@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_the_teacher_is_one_map_from_noise_however_many_steps_it_is_asked_in(family, noise, scale):
    cond, uncond, schedule = family.encode(CAPTIONS), family.uncond(COUNT), family.schedule
    book, expected = family.teacher.network.book, naive(family, noise, scale)
    assert len(expected.unique()) > ar.CODES // 2

    def ask(x_t, t, c):
        return guided(family.teacher, x_t, t, c, uncond, scale)

    for steps in (1, 2, ar.LENGTH):
        grid = family.many_steps.grid(schedule, steps)
        x0 = family.many_steps.sample(ask, noise, grid, lambda i: noise, cond)
        assert torch.equal(x0, book[expected]), steps


@torch.no_grad()
def test_what_the_teacher_kept_is_not_used_for_others(family, noise):
    """Other weights, another caption or another beginning: as if it had kept nothing."""
    teacher, cond = family.teacher, family.encode(CAPTIONS)
    codes = naive(family, noise)
    teacher.logits_behind(codes[:, :2], cond)
    for before, told in ((codes[:, :3], cond.flip(0)), (codes[:, :3].flip(0), cond)):
        right = teacher.network.logits(torch.nn.functional.pad(before, (0, 1)), told)[:, 3]
        assert torch.allclose(teacher.logits_behind(before, told), right, atol=1e-5)
        teacher.logits_behind(codes[:, :2], cond)
    teacher.network.head.bias += 1
    try:
        moved = teacher.network.logits(codes, cond)[:, 2]
        assert torch.allclose(teacher.logits_behind(codes[:, :2], cond), moved, atol=1e-5)
    finally:
        teacher.network.head.bias -= 1


@torch.no_grad()
def test_a_student_begins_as_its_teacher_and_hears_no_later_noise(family, noise):
    cond, student = family.encode(CAPTIONS), family.student("teacher", ())
    assert isinstance(student, CodeStudent)
    book, codes = family.teacher.network.book, naive(family, noise)
    # Behind three codes its logits are the teacher's, moved towards the noise of that place.
    t = times_like(1 / ar.LENGTH, noise)
    said = student(family.schedule.add_noise(book[codes], noise, t), t, cond)
    right = family.teacher.network.logits(codes, cond)[:, 3] + noise[:, 3] @ book.T
    assert torch.allclose(said.logits[:, 3], right, atol=1e-5)
    # The first places are what they were, and what is drawn is codes.
    assert torch.equal(said.x0[:, :3], book[codes[:, :3]])
    assert torch.allclose(said.x0, book[student.network.nearest(said.x0)], atol=1e-6)
    torch.manual_seed(0)
    for parameter in student.parameters():
        parameter += 0.1 * torch.randn(parameter.shape)
    one = times_like(1.0, noise)
    plain = student(noise, one, cond).logits
    for place in range(ar.LENGTH):
        other = noise.clone()
        other[:, place] += 1
        moved = (student(other, one, cond).logits - plain).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [i >= place for i in range(ar.LENGTH)]


def test_time_is_the_share_of_places_that_are_noise():
    schedule = Prefix(8)
    x0, eps = torch.ones(3, 8, 2), torch.zeros(3, 8, 2)
    t = torch.tensor([1.0, 0.75, 0.0], dtype=torch.float64)
    assert schedule.kept(t).tolist() == [0, 2, 8]
    assert schedule.add_noise(x0, eps, t).sum((1, 2)).tolist() == [0, 4, 16]
    assert schedule.few_step_grid(2) == (1.0, 0.5) and schedule.teacher_grid(4) == (1.0, 0.75, 0.5, 0.25)
    for grid in (schedule.few_step_grid, schedule.few_step_ode_grid):
        assert len(grid(8, 50)) == 8
        with pytest.raises(UserError, match="9 steps are more than the 8 places"):
            grid(9, 50)
    assert schedule.agrees(Prefix(8)) and not schedule.agrees(Prefix(4))


def test_a_student_leaves_as_a_directory_that_is_loaded_again(family, tmp_path, noise):
    made, student = method("dd1"), family.student("teacher", ())
    recipe = {"run": {"out": "runs/x"}, "method": {"name": "dd1"}, "family": {"teacher": "t"}}
    export.write(family, student, tmp_path / "student", export.card_of(family, made, recipe))
    sampler = stepdistill.load(tmp_path / "student")
    assert sampler.kind == "student" and sampler.steps == (1, 2) and sampler.resolution == (8, 8)
    assert sampler.card.timesteps == {"1": (1.0,), "2": (1.0, 0.5)}
    with torch.no_grad():
        again = sampler.denoiser(noise, times_like(1.0, noise), family.encode(CAPTIONS)).x0
        assert torch.equal(again, student(noise, times_like(1.0, noise), family.encode(CAPTIONS)).x0)
    assert sampler(CAPTIONS[:2], seeds=[0, 1], steps=2).shape == (2, 3, 8, 8)
    assert "needs stepdistill" in (tmp_path / "student" / "README.md").read_text()
    teacher = stepdistill.load(ar.directory())
    assert teacher.kind == "teacher" and teacher.steps == (ar.LENGTH,) and teacher.at().nfe == 2 * ar.LENGTH
    assert teacher(CAPTIONS[:2], seeds=[0, 1]).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"width": 8}, "must give whole numbers for codes"),
        ({"codes": 1.5}, "must give whole numbers for codes"),
        ({"codes": 7}, "cannot be loaded"),
    ],
)
def test_a_directory_that_is_none_is_one_sentence(tmp_path, content, said):
    path = shutil.copytree(ar.directory(), tmp_path / "broken")
    config = json.loads((path / "transformer" / "config.json").read_text())
    config = content if "width" in content else config | content
    (path / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        stepdistill.load(path)


def test_methods_of_codes_and_others_do_not_mix(family):
    with pytest.raises(UserError, match=r"set method\.name to dd1"):
        assemble(method("dmd2"), family)
    with pytest.raises(UserError, match=r"use family\.name=ar"):
        assemble(method("dd1"), Toy(Toy.Config(fit_steps=0)))


@torch.no_grad()
def test_a_teacher_in_the_loop_goes_on_from_the_students_codes(family, noise):
    cond, student = family.encode(CAPTIONS), family.student("teacher", ())
    both = relayed(student, family.teacher, 0.5)
    x0 = family.many_steps.sample(both, noise, (1.0, 0.5), lambda i: noise, cond)
    first, half = student(noise, times_like(1.0, noise), cond).x0[:, :2], times_like(0.5, noise)
    assert torch.equal(x0[:, :2], first)
    state = torch.cat((first, noise[:, 2:]), 1)
    assert torch.equal(x0, family.teacher(state, half, cond).x0)


@pytest.mark.parametrize("name", ["dd1", "dd2"])
def test_methods_of_codes_learn_the_map(family, name):
    """Of a tiny teacher, with its pairs or without: the share of codes that are the map's, on other noise."""
    made = world(name)
    student = made.nets.student.requires_grad_(True)
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    cond = family.encode(CAPTIONS)

    def pairs(step):
        index = torch.arange(48)
        z = SampleNoise(index, step=step, phase="pairs").randn(*family.shape)
        told = cond.repeat(4, 1, 1)
        with torch.no_grad():
            return z, family.teacher(z, times_like(1.0, z), told).x0, told

    def agreement():
        z, x0, told = pairs(10**6)
        with torch.no_grad():
            return float(
                (student(z, times_like(1.0, z), told).x0 - x0).abs().amax(-1).lt(1e-4).float().mean()
            )

    before = agreement()
    for step in range(100):
        batch = made.batch(step, count=48)
        if name == "dd1":
            batch.pairs.z, batch.pairs.x0, batch.pairs.cond = pairs(step)
        (phase, *_) = made.method.phases(0)
        optimizer.zero_grad()
        phase.terms[0][1](made.nets, batch)["total"].mean().backward()
        optimizer.step()
    assert before < 0.5 and agreement() > before + 0.25, (before, agreement())


def test_dd1s_loss_is_of_the_places_that_are_noise_alone():
    made = world("dd1", vector_weight=0.25, steps=(2,))
    nets, counts = made.nets, set()
    for step in range(4):
        batch, twin = made.batch(step), made.batch(step)
        losses = made.method.loss(nets, batch)
        times = torch.tensor(made.method.times(nets.schedule), dtype=torch.float64)
        t = times[twin.generator.randint(0, len(times))]
        x_t = nets.schedule.add_noise(twin.pairs.x0, twin.pairs.z, t)
        said = nets.student(x_t, t, twin.pairs.cond)
        right = nets.student.network.nearest(twin.pairs.x0)
        chosen = said.logits.log_softmax(-1).gather(-1, right[..., None])[..., 0]
        each = 0.25 * (said.vectors - twin.pairs.x0).square().mean(-1) - chosen
        expected = torch.stack([row[noisy].mean() for row, noisy in zip(each, said.noisy, strict=True)])
        torch.testing.assert_close(losses["total"], expected, rtol=1e-5, atol=1e-5)
        counts |= set(said.noisy.sum(1).tolist())
    # All of them, and half.
    assert len(counts) == 2


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_dd2_goes_from_the_fake_laws_mean_to_the_teachers(scale):
    """Only where there is noise, for codes the student said, the scores constants."""
    made = world("dd2", imitation_steps=0, steps=(2,), guidance_scale=scale)
    nets, student = made.nets, list(made.nets.student.requires_grad_(True).parameters())
    with torch.no_grad():
        nets.fake_score.network.head.bias[0] += 2
    book = nets.teacher.network.book
    for step in range(4):
        total = made.method.matching(nets, made.batch(step))["total"]
        ours = torch.autograd.grad(total.sum(), student, allow_unused=True)
        twin = made.batch(step)
        said, codes, _ = made.method.generate(nets, twin)
        with torch.no_grad():
            told, free = (nets.teacher.network.logits(codes, cond) for cond in (twin.cond, twin.uncond))
            guided_law = free.log_softmax(-1) + scale * (told.log_softmax(-1) - free.log_softmax(-1))
            laws = [law.softmax(-1) for law in (nets.fake_score(codes, twin.cond), guided_law)]
            assert float((told - free).abs().max()) > 1e-3
            s = 0.02 + 0.78 * twin.generator.rand(codes.shape[1]).float()
            noise = twin.randn()
            x_s = (1 - s)[..., None] * noise + s[..., None] * said.x0
            # Posterior means of a code under x_s = (1 - s) noise + s code.
            apart = (x_s[..., None, :] - s[..., None, None] * book).square().sum(-1)
            likely = (-apart / (2 * (1 - s)[..., None] ** 2)).double()
            fake, real = ((likely + law.double().log()).softmax(-1).to(book) @ book for law in laws)
            pull = (fake - real) * said.noisy[..., None] / said.x0[0].numel()
            value = pull.square().flatten(1).sum(1) * said.x0[0].numel() / 2
        torch.testing.assert_close(total, value, rtol=1e-3, atol=1e-6)
        # Of the mean code: what is drawn does not hang on the vector beside it.
        mean = said.logits.softmax(-1) @ book
        right = torch.autograd.grad(mean, student, pull, allow_unused=True)
        vector = [*nets.student.network.vector.parameters()]
        assert not any(a.any() for a, p in zip(ours, student, strict=True) if any(p is q for q in vector))
        seen = [(a, b) for a, b in zip(ours, right, strict=True) if b is not None]
        assert seen and max(float(a.abs().max()) for a, _ in seen) > 1e-4
        for one, other in seen:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["dd1", "dd2"])
def test_adapters_are_refused_for_students_of_codes(name, family):
    """A teacher hears no noise, so what adapts it would not either."""
    with pytest.raises(UserError, match=r"student\.lora: .* set student\.lora\.rank to 0"):
        assemble(method(name), family, lora=LoraConfig(rank=2))


def test_dd2_imitates_first_and_its_fake_law_learns_what_the_student_says():
    made = world("dd2", imitation_steps=5)
    method, nets, step = made.method, made.nets, 7
    assert [next(method.phases(i)).terms[0][1] for i in (0, 4, 5, 6)] == [
        *[method.imitation] * 2,
        *[method.matching] * 2,
    ]
    assert [len([*method.phases(i)]) for i in (0, 3, 4, 5)] == [1, 1, 2, 2]
    loss = method.critic_loss(nets, made.batch(step))["total"]
    _, codes, _ = method.generate(nets, twin := made.batch(step))
    law = nets.fake_score(codes, twin.cond).log_softmax(-1)
    torch.testing.assert_close(loss, -law.gather(-1, codes[..., None])[..., 0].mean(1))


@pytest.mark.parametrize("rule", ["ode", "renoise"])
def test_dd2s_codes_are_those_kept_and_those_said(rule):
    """And the noise beside them is what each place was, or would be, said from."""
    made = world("dd2", steps=(2,), rule=rule)
    network, kept = made.nets.student.network, 0
    for step in range(4):
        asked = []
        hook = made.nets.student.register_forward_pre_hook(lambda _, args, asked=asked: asked.append(args[0]))
        said, codes, z = made.method.generate(made.nets, made.batch(step))
        hook.remove()
        x_t, noisy = asked[-1], said.noisy
        assert codes[noisy].equal(said.logits.argmax(-1)[noisy])
        assert codes[~noisy].equal(network.nearest(x_t)[~noisy])
        assert z[noisy].equal(x_t[noisy]) and z[~noisy].equal(made.batch(step).randn()[~noisy])
        kept += int((~noisy).sum())
    assert kept


def test_dd2_has_no_pull_where_the_students_law_is_the_teachers():
    """And where it is not, the pull at x is that of the two laws' means."""
    made = world("dd2", imitation_steps=0, steps=(1,))
    nets, batch = made.nets, made.batch(0)
    nets.fake_score.load_state_dict({f"network.{k}": v for k, v in nets.teacher.network.state_dict().items()})
    assert made.method.matching(nets, batch)["gap"].max() < 1e-10
    with torch.no_grad():
        nets.fake_score.network.head.bias[0] += 5
    assert made.method.matching(nets, made.batch(0))["gap"].median() > 1e-2


def test_a_run_of_codes_draws_previews_and_is_counted_from_random_weights(tmp_path, capsys):
    """Its teacher has one number of steps, and its fake score is a law, which believes no image."""
    settings = [
        f"family.teacher={ar.directory()}", "data.size=8", "run.steps=2", "optim.batch_size=2", "run.preview_every=1",
        "run.preview_count=1", "method.imitation_steps=1", f"run.out={tmp_path / 'run'}", "run.check_teacher=false",
    ]  # fmt: skip
    recipe = load_recipe("training/recipes/scenes_dd2.yaml", settings)
    running.run(recipe)
    assert len(list((tmp_path / "run" / "previews").glob("*.png"))) == 3
    main(["training/recipes/scenes_dd2.yaml", *settings, "student.init=random", "--dry-run"])
    assert "in phase 'student'" in capsys.readouterr().out


def test_a_teacher_of_codes_is_not_checked_by_denoising():
    with pytest.raises(UserError, match="says codes one after another"):
        subject_of(str(ar.directory()), [], "")


def test_a_teacher_that_is_asked_for_other_steps_than_its_places_is_refused():
    """And the students' counts, which it does not take, are left out."""
    teacher, other = stepdistill.load(ar.directory()), SimpleNamespace(steps=2)
    settings = partial(Settings, pipelines=(), out="out")
    for asked in (None, ar.LENGTH):
        drawers = _teacher_drawers(teacher, [other], settings(teacher_steps=asked), "round")
        assert [drawer.steps for each in drawers for drawer in each][:1] == [ar.LENGTH] and len(drawers) == 1
    with pytest.raises(UserError, match=f"steps=50 .* use one of {ar.LENGTH}"):
        _teacher_drawers(teacher, [other], settings(teacher_steps=50), "round")
