"""Set-ups that tests share: every method by its name, and a method with its networks on the toy.

All tests make their methods by `method` and their worlds by `world`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from tiny import ar
from torch import nn

from stepdistill.config import build
from stepdistill.denoiser import Cond, Denoiser, map_cond
from stepdistill.families.autoregressive import Autoregressive
from stepdistill.families.base import Family
from stepdistill.families.toy import Toy
from stepdistill.methods import CODE_METHODS, EVERY_METHOD, METHODS
from stepdistill.methods.assemble import assemble
from stepdistill.methods.base import Batch, Method, Networks, Pairs, Phase
from stepdistill.noise import SampleNoise
from stepdistill.registry import allowing_code, resolve
from stepdistill.rewards import RewardModel
from stepdistill.sampling import Sampling

# Samples of a world's batch.
COUNT = 16
# Of a family of codes.
CAPTIONS = ["a small red circle on a blue background", "a large cyan star on a white background"]

# Methods that need settings to exist, and variants worth a row; any other registered name runs on defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "compose": {"parts": [{"name": "dmd2"}, {"name": "dmd2", "weight": 0.5}]},
    # Within its margin the hinge gives the last bias +1 and -1: no move, and rightly so.
    "ladd": {"gan": "non_saturating", "warmup": 3},
    # A longer path begins at what the fake score begins as, where there is no pull, and rightly so.
    "disback": {"path": 1},
    # Both of its losses, and its critic.
    "dd2": {"imitation_steps": 3},
    # On points: an eye and a reward of the tests' own.
    "lightning": {"mse_weight": 1.0},
    "add": {"eye": "fourier", "gan": "non_saturating"},
    "reward": {"reward": f"{__name__}:Towards", "margin": 10.0},
    "rdm": {"encoders": [{"name": "fourier", "arguments": {"width": 8}}], "chunks": 2},
}
VARIANTS = [(name, SETTINGS.get(name, {})) for name in (*METHODS, *CODE_METHODS)] + [
    ("dmd2", {"gan_weight": 1e-2}),
    ("progressive", {"predecessor": "teacher"}),
    ("imf", {"direction": "teacher"}),
    ("sida", {"divergence": "forward_kl"}),
    ("cdm", {"tell_place": True, "critic_pull": 0.0}),
    ("dmd2", {"tell_place": True, "gan_weight": 1e-2}),
    ("rdm", SETTINGS["rdm"] | {"distance": "fd"}),
    ("reward", SETTINGS["reward"] | {"anchor_weight": 0.5}),
    ("disback", {"stage": "degrade"}),
    ("disback", {"path": 3, "interval": 1, "base": {"name": "dmd2", "student_every": 1}}),
    ("lightning", {"predecessor": "teacher", "conditional": False}),
    ("output_kd", {"task_weight": 0.5}),
    ("compose", {"parts": [{"name": "dmd2", "gan_weight": 1e-2}, {"name": "dmd2", "student_every": 2}]}),
]
EVERY = pytest.mark.parametrize(
    ("name", "settings"), VARIANTS, ids=[f"{n}{i}" for i, (n, _) in enumerate(VARIANTS)]
)
# A recipe's `student:` section; all else is the method's own.
SAMPLED = {each.name for each in fields(Sampling)} - {"steps"}
# Of methods whose student serves one number of steps; all others are made for one and two.
STEPS = {"boot": (1,), "progressive": (2,), "lightning": (2,), "phased_dmd": (2,), "rdm": (1,)}


def method(name: str, steps: Sequence[int] | None = None, **settings: Any) -> Method:
    """A registered method, or "module:Class", with these settings: its own and those of `Sampling`."""
    steps = STEPS.get(name, (1, 2)) if steps is None else steps
    sampled = {key: settings.pop(key) for key in SAMPLED & settings.keys()}
    # Eyes and rewards are the tests' own.
    with allowing_code():
        cls = resolve(name, EVERY_METHOD, "method")
        config = build(cls.Config, settings, "method")
        return cls(config, Sampling.of(steps, cls.sampled(config), sampled))


@dataclass
class World:
    """A method on a family, without a trainer. before: the student as it was when the networks were made; source: of
    the data, None for a family that draws its own.
    """

    method: Method
    family: Family
    nets: Networks
    before: Denoiser
    source: Any = None

    def batch(
        self, step: int = 0, phase: str = "student", images: bool | None = None, count: int = COUNT
    ) -> Batch:
        family, index = self.family, torch.arange(count)
        images = self.method.needs_images if images is None else images
        labels = (CAPTIONS * count)[:count] if family.of_codes else family.prompts(self.source, range(count))
        x0 = family.examples(self.source, range(count)) if images else None
        noise = SampleNoise(index, step=step, phase=phase)
        cond = family.encode(labels)
        pairs = self.pairs(step, cond, count)
        return Batch(cond, family.uncond(count), family.shape, index, noise, x0, pairs, labels)

    def pairs(self, step: int, cond: Cond, count: int) -> Pairs | None:
        """Stand-ins for the teacher's trajectories, under other conditions than the batch's."""
        settings = self.method.pairs(self.family.schedule)
        if settings is None:
            return None
        noise = SampleNoise(range(count), step=step, phase="pairs")
        points = noise.randn(2 + len(settings.times), *self.family.shape)
        return Pairs(points[:, 0], points[:, 1], points[:, 2:], map_cond(lambda c: c.flip(0), cond))

    def backward(self, phase: Phase, step: int = 0, count: int = COUNT) -> None:
        """As the trainer does it: everything but `trains` frozen, the terms one after another."""
        for module in self.nets.modules.values():
            module.requires_grad_(False)
            for parameter in module.parameters():
                parameter.grad = None
        for name in phase.trains:
            self.nets.modules[name].requires_grad_(True)
        batch = self.batch(step, phase.name, count=count)
        for weight, loss in phase.terms:
            (weight * loss(self.nets, batch)["total"].mean()).backward()

    @property
    def trained(self) -> set[str]:
        return {name for step in range(100) for phase in self.method.phases(step) for name in phase.trains}


def world(
    made: str | Method,
    steps: Sequence[int] | None = None,
    classes: int = 2,
    schedule: str = "vp",
    **settings: Any,
) -> World:
    """A method, or the one of that name with these steps and settings, on the toy."""
    if isinstance(made, str):
        made = method(made, steps, **settings)
    if made.for_codes:
        family: Family = Autoregressive.from_directory(ar.directory())
    else:
        family = Toy(Toy.Config(modes=4, classes=classes, fit_steps=0, schedule=schedule))
        family.teacher.width = 32
    torch.manual_seed(0)
    # As at any time but a run's first: the student is no copy of the teacher when others are made from either one,
    before = stir(family.student("teacher", ()))
    nets = assemble(made, family, before=before)
    # and it has moved on from those that were made from it.
    for name, module in nets.modules.items():
        if name == "student" or name.startswith("path_"):
            stir(module)
    if made.needs_teacher and not made.for_codes:
        # The exact teacher has no weights: one that its answer hangs on shows whether anything reaches it.
        mixture = family.teacher.network
        mixture.weight, plain = nn.Parameter(torch.ones(1), requires_grad=False), mixture.forward
        mixture.forward = lambda x_t, t, cond=None: mixture.weight * plain(x_t, t, cond)
    return World(made, family, nets, before)


def stir(module: nn.Module) -> nn.Module:
    """The module, its parameters moved a little."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return module


def gradients(module: nn.Module) -> list[bool]:
    return [parameter.grad is not None for parameter in module.parameters()]


def weights(made: World) -> dict[str, dict[str, torch.Tensor]]:
    """All networks' tensors now, with the teacher's backbone, which is nobody's parameter."""
    modules = dict(made.nets.modules)
    if "teacher" in modules:
        modules["backbone"] = modules["teacher"].backbone()
    return {
        key: {name: value.clone() for name, value in module.state_dict().items()}
        for key, module in modules.items()
    }


class Doubles(SampleNoise):
    """Noise in float64, for identities."""

    def randn(self, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return super().randn(*shape, dtype=dtype)


class Towards(RewardModel):
    """A reward of points: -|x - (2, 0)|^2, with its prompts kept. shape: what it gives, right or one of the wrongs."""

    def __init__(self, shape: str = "right"):
        self.shape, self.heard = shape, []

    def __call__(self, images: torch.Tensor, prompts: Sequence) -> Any:
        self.heard.append(list(prompts))
        score = -(images - torch.tensor([2.0, 0.0])).square().sum(1)
        return {"right": score, "wrong": score[:, None], "detached": score.detach(), "number": 1.0}[
            self.shape
        ]
