"""A short training of any method on a small exact mixture, without a trainer, and how far its student is from the data."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import worlds
from torch import Tensor

from stepdistill.denoiser import Denoiser
from stepdistill.families.toy import Toy
from stepdistill.methods.assemble import assemble
from stepdistill.methods.base import Batch, Method, Networks, Pairs, PairSettings
from stepdistill.noise import SampleNoise
from stepdistill.schedule import times_like
from stepdistill.solvers import ddim


def small(schedule: str = "flow", classes: int = 1) -> Toy:
    """Four wide modes and a narrow network."""
    made = Toy(Toy.Config(modes=4, std=0.2, schedule=schedule, classes=classes, fit_steps=100))
    made.teacher.width = 32
    return made


class Learner:
    """A method with its networks and an optimiser for each that it trains. pull: multiplies the student's loss."""

    def __init__(
        self, method: Method, family: Toy, lr: float = 2e-3, init: str = "teacher", pull: float = 1.0
    ):
        torch.manual_seed(0)
        self.method, self.family, self.pull = method, family, pull
        self.nets: Networks = assemble(method, family, init)
        self.lr, self.optimizers = lr, {}
        self.held: Pairs | None = None

    def run(self, steps: int, count: int = 64) -> Learner:
        """So many iterations from the first one on, batches of `count`."""
        for step in range(steps):
            ran = tuple(self.turn(phase, step, count) for phase in self.method.phases(step))
            self.method.after_step(self.nets, step, ran)
        return self

    def turn(self, phase: Any, step: int, count: int) -> str:
        for name, module in self.nets.modules.items():
            module.requires_grad_(name in phase.trains)
        batch = self.batch(step, phase.name, count)
        for weight, loss in phase.terms:
            factor = self.pull if phase.name == "student" else 1.0
            (factor * weight * loss(self.nets, batch)["total"].mean()).backward()
        for name in phase.trains:
            if name not in self.optimizers:
                parameters = [p for p in self.nets.modules[name].parameters() if p.requires_grad]
                self.optimizers[name] = torch.optim.Adam(parameters, self.lr, betas=(0.0, 0.99))
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()
        return phase.name

    def batch(self, step: int, phase: str, count: int) -> Batch:
        family, noise = self.family, SampleNoise(range(count), step=step, phase=phase)
        labels = family.prompts(None, range(count))
        cond = family.encode(labels)
        x0 = family.data(range(step * count, (step + 1) * count), cond=cond)
        pairs = self.pairs(step, count)
        return Batch(cond, family.uncond(count), family.shape, noise.index, noise, x0, pairs, labels)

    def pairs(self, step: int, count: int, held: int = 2048) -> Pairs | None:
        settings = self.method.pairs(self.family.schedule)
        if settings is None:
            return None
        if self.held is None:
            self.held = trajectories(self.family, settings, held)
        at = (torch.arange(count) + step * count) % held
        return Pairs(self.held.z[at], self.held.x0[at], self.held.states[at], None)

    @torch.no_grad()
    def draw(self, count: int, steps: int) -> Tensor:
        """Samples of the student as it is now."""
        sampling, schedule = self.method.sampling, self.family.schedule
        noise = SampleNoise(range(count), phase="draw")
        grid = sampling.grid(schedule, steps)
        x = sampling.first_input(schedule, noise.randn(2), grid[0])
        told = {"guidance": torch.ones(count)} if "guidance" in sampling.inputs else {}
        cond = self.family.encode([i % self.family.config.classes for i in range(count)])
        student: Denoiser = self.nets.student
        return sampling.sample(student, x, grid, lambda _: noise.randn(2), cond, t_min=schedule.t_min, **told)

    def distance(self, steps: int = 1) -> float:
        """Sliced W1 over its floor."""
        return self.family.sliced_w1(lambda count: self.draw(count, steps), 1024, draws=2)


@torch.no_grad()
def trajectories(family: Toy, settings: PairSettings, count: int) -> Pairs:
    """Of the exact teacher, without conditions."""
    schedule, z = family.schedule, SampleNoise(range(count), phase="pairs").randn(2)
    grid = sorted({*schedule.teacher_grid(settings.steps), *settings.times, schedule.t_min}, reverse=True)
    x, states = schedule.first_state(z, grid[0]), {}
    for t, s in itertools.pairwise(grid):
        states[t] = x
        x = ddim(family.teacher, x, times_like(t, x), times_like(s, x))
    kept = [states[t] for t in settings.times]
    return Pairs(z, x, torch.stack(kept, 1) if kept else z[:, None][:, :0], None)


def learner(name: str, family: Toy, steps: int = 1, **settings: Any) -> Learner:
    """Of a method by its name; `lr`, `init` and `pull` are the learner's, the rest is the method's and its sampling's."""
    own = {key: settings.pop(key) for key in ("lr", "init", "pull") if key in settings}
    return Learner(worlds.method(name, steps=(steps,), **settings), family, **own)
