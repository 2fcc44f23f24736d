"""What every network is told in a method's losses: the samples' own conditions, at whatever place it is called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from worlds import EVERY, World, world

from stepdistill.denoiser import Denoiser

# Their losses drop conditions, or look at none on purpose.
DROPS = {"pretrain", "tsm", "vsd", "decoupled_dmd", "cdm"}


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
                assert heard and all(any(torch.equal(cond, one) for one in known) for cond in heard), (
                    phase.name
                )


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
