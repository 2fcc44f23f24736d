"""A family without a class that means none: every setting of guidance is refused by its place, and its off value trains."""

from __future__ import annotations

import copy

import pytest
import worlds

from stepdistill.errors import UserError
from stepdistill.families.toy import Toy
from stepdistill.methods.assemble import assemble

# The method, settings beside, and by setting what is refused and what is off.
CASES = [
    ("dmd2", {}, {"guidance_scale": (1.75, 1)}),
    ("vsd", {}, {"guidance_scale": (4.5, 1), "fake_guidance_scale": (4.5, 1)}),
    ("lcm", {}, {"guidance_low": (3.0, 1), "guidance_high": (15.0, 1)}),
    ("sid", {"steps": (1,)}, {"critic_guidance_scale": (2.0, 1)}),
    ("decoupled_dmd", {}, {"augmentation": (7.0, 0)}),
    ("cdm", {}, {"augmentation": (7.0, 0)}),
    ("imf", {}, {"guidance_high": (8.0, 1)}),
    ("dmf", {}, {"guidance_low": (2.5, 1), "guidance_high": (2.5, 1)}),
    ("meanflow", {"direction": "data"}, {"kappa": (0.5, 0)}),
    (
        "diff_instruct",
        {"steps": (2,), "diversity_weight": 0.05},
        {"diversity_guidance": (3.0, 0)},
    ),
    ("disback", {"base": {"name": "cdm"}}, {"base.augmentation": (7.0, 0)}),
    (
        "anyflow",
        {"guidance_scale": 1.0, "flow_map": {"tell_guidance": False, "guidance_low": 2.0}},
        {"flow_map.guidance_low": (2.0, 1), "flow_map.guidance_high": (2.0, 1)},
    ),
    (
        "compose",
        {"parts": [{"name": "dmd2", "guidance_scale": 1.0}, {"name": "decoupled_dmd"}]},
        {"parts.1.augmentation": (7.0, 0)},
    ),
    (
        "compose",
        {"parts": [{"name": "disback", "base": {"name": "dmd2"}}, {"name": "diff_instruct"}]},
        {"parts.0.base.guidance_scale": (1.75, 1)},
    ),
]


def toy(guidable: bool = False, classes: int = 2) -> Toy:
    family = Toy(Toy.Config(modes=4, classes=classes, fit_steps=0))
    family.teacher.width = 32
    family.guidable = guidable
    if not guidable:
        family.uncond = lambda count: None
    return family


def given(settings: dict, at: dict) -> dict:
    """The settings, with others at these places."""
    made = copy.deepcopy(settings)
    for place, value in at.items():
        *path, last = place.split(".")
        here = made
        for name in path:
            here = here[int(name)] if isinstance(here, list) else here[name]
        here[last] = value
    return made


@pytest.mark.parametrize(
    ("name", "settings", "scales"), CASES, ids=[f"{n}{i}" for i, (n, *_) in enumerate(CASES)]
)
def test_what_cannot_be_guided_is_told_which_settings_to_set(name, settings, scales):
    on, off = ({key: both[i] for key, both in scales.items()} for i in (0, 1))
    guided = worlds.method(name, **given(settings, on))
    with pytest.raises(UserError) as caught:
        assemble(guided, toy())
    said = str(caught.value)
    assert said.startswith(" and ".join(f"method.{key}={value:g}" for key, value in on.items()) + ": "), said
    assert said.endswith(
        "set " + " and ".join(f"method.{key}={value}" for key, value in off.items()) + "."
    ), said
    method, family = worlds.method(name, **given(settings, off)), toy()
    nets = assemble(method, family)
    made = worlds.World(method, family, nets, nets.student)
    for phase in method.phases(0):
        made.backward(phase)
    # What is told nothing at all has nothing to be guided by, and goes on.
    for family in (toy(guidable=True), toy(guidable=True, classes=1)):
        assemble(guided, family)
