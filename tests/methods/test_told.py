"""What every network is told in a method's losses: the samples' own conditions, at whatever place it is called."""

from __future__ import annotations

import pytest
import torch
import worlds
from test_pruning import deep
from torch import Tensor
from worlds import EVERY, World, world

from stepdistill.denoiser import Denoiser
from stepdistill.methods.base import Batch, Networks
from stepdistill.methods.ppcl import PPCL
from stepdistill.noise import SampleNoise
from stepdistill.schedule import TrigFlow

# Their losses drop conditions, or look at none on purpose.
DROPS = {"pretrain", "output_kd", "tsm", "vsd", "decoupled_dmd", "cdm", "imf", "dmf", "twinflow"}

# Their networks are asked token by token.
BY_TOKEN = {"dd1", "dd2"}


def listened(made: World, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The conditions that denoisers are called with, from here on."""
    heard: list[Tensor] = []
    forward = Denoiser.forward

    def listen(self, x_t, t, cond=None, *args, **kwargs):
        heard.append(cond)
        return forward(self, x_t, t, cond, *args, **kwargs)

    monkeypatch.setattr(Denoiser, "forward", listen)
    return heard


def unguided(method) -> None:
    """Every scale 1, where guidance costs no call without a condition."""
    for each in (
        method,
        getattr(method, "base", None),
        *(part.method for part in getattr(method, "parts", ())),
    ):
        for name in vars(each.config) if each is not None else ():
            if "guidance" in name and "diversity" not in name:
                # LCM's is a range, and an input.
                setattr(each.config, name, 1.0 if name.endswith("_scale") else getattr(each.config, name))


@EVERY
def test_no_network_is_told_anothers_condition(name, settings, monkeypatch):
    if name in DROPS or name == "lcm":
        pytest.skip("drops conditions, or guides by a range")
    made = world(name, **settings)
    unguided(made.method)
    heard = listened(made, monkeypatch)
    for step in range(4):
        for phase in made.method.phases(step):
            for _, loss in phase.terms:
                batch = made.batch(step, phase.name)
                own = batch.pairs.cond if batch.pairs is not None and name == "kd" else batch.cond
                known = [own] + ([batch.pairs.cond] if batch.pairs is not None else [])
                heard.clear()
                loss(made.nets, batch)
                assert heard or name in BY_TOKEN
                assert all(any(torch.equal(cond, one) for one in known) for cond in heard), phase.name


@pytest.mark.parametrize("name", ["lcm", "cd", "tscd", "boot", "progressive", "lightning"])
def test_guidance_alone_asks_without_a_condition(name, monkeypatch):
    """Both halves in one call, the one without the condition first; all else hears the samples' own."""
    settings = {"predecessor": "teacher"} if name in ("progressive", "lightning") else {}
    if name == "lightning":
        settings |= {"mse_weight": 1.0, "gan_weight": 0.0}
    made = world(name, **settings)
    made.method.config.guidance_scale = 2.0
    heard, batch = listened(made, monkeypatch), made.batch()
    for phase in made.method.phases(0):
        for _, loss in phase.terms:
            loss(made.nets, batch)
    both = torch.cat((batch.uncond, batch.cond))
    told = [cond for cond in heard if len(cond) == len(both)]
    assert told and all(torch.equal(cond, both) for cond in told)
    assert all(torch.equal(cond, batch.cond) for cond in heard if len(cond) != len(both))


def test_ladds_misaligned_images_are_seen_under_anothers_condition(monkeypatch):
    made = world("ladd", misaligned=True, warmup=0)
    heard, batch = listened(made, monkeypatch), made.batch()
    made.method.discriminator_loss(made.nets, batch)
    assert torch.equal(heard[-1], batch.cond.roll(1, 0)) and not torch.equal(heard[-1], batch.cond)


def test_adds_heads_hear_the_captions(monkeypatch):
    made = world("add", eye="fourier")
    method, batch = made.method, made.batch()
    features = method.eye.features(batch.x0)
    heard = []
    monkeypatch.setattr(
        made.nets.discriminator, "forward", lambda seen, condition=None: heard.append(condition) or [seen[0]]
    )
    vector, critic = method.packed(made.nets, features, told := torch.randn(len(batch.x0), 3))
    critic(vector)
    assert heard == [told]


@pytest.mark.parametrize("name", ["kd", "dmd"])
def test_pairs_are_of_the_guided_teacher(name):
    made = world(name, guidance_scale=3.0, pair_count=5, pair_steps=7)
    wanted = made.method.pairs(made.nets.schedule)
    assert (wanted.count, wanted.steps, wanted.guidance_scale) == (5, 7, 3.0)


def test_dmd_regresses_where_its_longest_sampling_begins(monkeypatch):
    made, times = world("dmd", steps=(1, 4)), []
    made.nets.student.register_forward_pre_hook(lambda _, told: times.append(float(told[1][0])))
    made.method.regression_loss(made.nets, made.batch())
    assert times == [made.nets.schedule.t_max]


@pytest.mark.parametrize(("paired", "same"), [(True, True), (False, False)])
def test_real_data_are_judged_at_levels_of_their_own_unless_paired(paired, same, monkeypatch):
    made = world("dmd2", gan_weight=1.0, gan_paired=paired)
    times = []
    made.nets.fake_score.register_forward_pre_hook(lambda _, told: times.append(told[1]))
    made.method.critic_loss(made.nets, made.batch())
    fake, real = times
    assert torch.equal(fake, real) == same


def test_what_the_papers_name_is_the_default():
    """Sigma noise of Diff-Instruct, Hyper-SD's eta, SwiftBrush's dropped conditions."""
    assert worlds.method("diff_instruct", steps=(1,)).sampling.init_noise == "sigma"
    assert worlds.method("tscd").sampling.eta == 0.3
    assert worlds.method("vsd").config.critic_dropout == 0.1


def test_cdms_second_term_has_its_weight():
    made = world("cdm", between_weight=0.25)
    losses = made.method.student_loss(made.nets, made.batch())
    rest = losses["matching"] + losses["augmentation"]
    torch.testing.assert_close(losses["total"], rest + 0.25 * losses["between"])


def test_scms_path_through_data_goes_where_noising_goes():
    made = world("scm", direction="data")
    trig, batch, eps = TrigFlow(), made.batch(), torch.randn(16, 2)
    t = torch.linspace(0.1, 1.4, 16, dtype=torch.float64)
    said = made.method.velocity(made.nets, batch, trig, trig.add_noise(batch.x0, eps, t), t, eps)
    ahead, behind = (trig.add_noise(batch.x0, eps, t + h) for h in (1e-3, -1e-3))
    torch.testing.assert_close(said, (ahead - behind) / 2e-3, rtol=1e-2, atol=1e-2)


def test_ects_neighbour_is_in_units_of_the_datas_deviation():
    method = world("ect").method
    t = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(method.ratio(2 * t, 3, 2.0), method.ratio(t, 3))
    seen = []
    for unit in (1.0, 2.0):
        made = world("ect", schedule="edm")
        made.nets.student.network.sigma_data = unit
        seen.append(made.method.loss(made.nets, made.batch(2), stage=3)["ratio"])
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-2, atol=1e-3)


def test_ppcl_learns_from_a_constant_teacher_and_weighs_lengths():
    family = deep("sd3")
    method = PPCL(PPCL.Config(intervals=("transformer_blocks.1-3",), length_weight=0.5, cond_dropout=0.0))
    nets = Networks(
        {"student": method.student_over(family.teacher), "teacher": family.teacher}, family.schedule
    )
    noise = SampleNoise(range(2))
    cond = family.encode(["a", "b"])
    batch = Batch(cond, family.uncond(2), family.shape, noise.index, noise, torch.randn(2, *family.shape))
    for parameter in family.teacher.parameters():
        parameter.requires_grad_(True)
    losses = method.loss(nets, batch)
    torch.testing.assert_close(losses["total"].detach(), 2 * (1 - losses["cosine"]) + 0.5 * losses["length"])
    losses["total"].sum().backward()
    assert all(parameter.grad is None for parameter in family.teacher.parameters())
