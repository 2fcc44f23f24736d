"""Exact teachers: Gaussian and 2-D mixture data, whose every score, denoiser and guided version is a
closed form.

A method that is wrong by a sign or a missing detach still has a finite loss on images; here it fails to reach
a known answer within two minutes of one CPU core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from stepdistill.denoiser import Cond, Denoiser
from stepdistill.families.base import Family
from stepdistill.families.faces import zero_linear
from stepdistill.families.measures import Measures
from stepdistill.losses import denoising
from stepdistill.noise import SampleNoise
from stepdistill.schedule import EDM, VP, Flow, Schedule, TrigFlow, expand

SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "vp": VP.from_betas,
    "edm": EDM,
    "flow": Flow,
    "trig": TrigFlow,
}


class Mixture(nn.Module):
    """x0 ~ sum_k pi_k N(mu_k, std^2 I): the exact network, kind "x0", under any schedule.

    means: (K, D), std: scalar, weights: (K,). classes: (K,) the class each mode belongs to; cond is (B,)
    int64 class indices, a value of `no_class` (= number of classes) or None meaning all modes.
    """

    def __init__(
        self,
        schedule: Schedule,
        means: Tensor,
        std: float,
        weights: Tensor | None = None,
        classes: Tensor | None = None,
    ):
        super().__init__()
        self.schedule, self.std = schedule, std
        self.means = means.double()
        self.weights = (
            torch.full((len(means),), 1 / len(means)).double() if weights is None else weights.double()
        )
        self.classes = torch.zeros(len(means), dtype=torch.long) if classes is None else classes
        self.no_class = int(self.classes.max()) + 1

    def _log_weights(self, cond: Tensor | None, count: int, device: torch.device) -> Tensor:
        log = self.weights.to(device).log().expand(count, -1)
        if cond is None:
            return log
        kept = (self.classes.to(device)[None] == cond[:, None]) | (cond[:, None] == self.no_class)
        return log.masked_fill(~kept, -math.inf).log_softmax(1)

    def log_prob(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """log p_t(x_t), (B,)."""
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        variance = alpha**2 * self.std**2 + sigma**2
        squared = (x_t[:, None].double() - alpha[..., None] * self.means.to(x_t.device)).square().sum(-1)
        log = self._log_weights(cond, len(x_t), x_t.device) - squared / (2 * variance)
        return (log - x_t.shape[1] / 2 * (2 * math.pi * variance).log()).logsumexp(1)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """E[x0 | x_t]: each mode's posterior mean, weighted by its responsibility. float64 inside."""
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        variance, means = alpha**2 * self.std**2 + sigma**2, self.means.to(x_t.device)
        # (B, K, D).
        offset = x_t[:, None].double() - alpha[..., None] * means
        log = self._log_weights(cond, len(x_t), x_t.device) - offset.square().sum(-1) / (2 * variance)
        responsibility = log.softmax(1)
        posterior = means + (alpha * self.std**2 / variance)[..., None] * offset
        return (responsibility[..., None] * posterior).sum(1).to(x_t.dtype)

    def draw(self, noise: SampleNoise, cond: Tensor | None = None) -> Tensor:
        """Exact samples (B, D), float32."""
        device = noise.index.device
        weights = self._log_weights(cond, len(noise.index), device).exp().cumsum(1)
        mode = (noise.rand()[:, None] > weights).sum(1).clamp(max=len(self.means) - 1)
        return (
            self.means.to(device)[mode] + self.std * noise.randn(self.means.shape[1], dtype=torch.float64)
        ).float()


def gaussian(schedule: Schedule, mean: Sequence[float], std: float) -> Mixture:
    """One mode: N(mean, std^2 I)."""
    return Mixture(schedule, torch.tensor([list(mean)], dtype=torch.float64), std)


def gaussian_flow_map(
    schedule: Schedule, mean: float, std: float, x_t: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    """Where the probability-flow ODE of N(mean, std^2) takes x_t from t to s: standardise at t, undo it at s."""

    def moments(time: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = expand(schedule.alpha(time), x_t), expand(schedule.sigma(time), x_t)
        return alpha * mean, (alpha**2 * std**2 + sigma**2).sqrt()

    (mean_t, std_t), (mean_s, std_s) = moments(t), moments(s)
    return mean_s + std_s * (x_t - mean_t) / std_t


# An MLP is fitted where |log rho| < FITTED. Below KNOWN a logarithm of the noise tells it nothing that it has learned.
FITTED = 3.6
KNOWN = math.exp(-FITTED)


class MLP(nn.Module):
    """A small denoiser for points: EDM-preconditioned (sigma_data 1) on the state at unit norm, conditioned
    on log rho.

    blocks: each hidden layer can be tapped; cond, guidance and the end of a jump enter as embeddings.
    """

    middle, behind_middle = "hidden.1", ("hidden.2", "leave")

    def __init__(self, schedule: Schedule, dims: int = 2, classes: int = 0, width: int = 128):
        super().__init__()
        self.schedule, self.width = schedule, width
        self.register_buffer("frequencies", torch.exp(torch.linspace(math.log(0.25), math.log(8.0), 16)))
        self.enter = nn.Linear(dims + 33, width)
        self.hidden = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(width, width)) for _ in range(3))
        self.leave = nn.Sequential(nn.SiLU(), nn.Linear(width, dims))
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.guidance: nn.Linear | None = None
        self.end: nn.Linear | None = None
        self.end_by_depth = False

    @property
    def extras(self) -> dict[str, Callable[[], None]]:
        return {"guidance": self.add_guidance, "end": self.add_end, "end_by_depth": self.add_end_by_depth}

    @property
    def blocks(self) -> dict[str, int]:
        return {f"hidden.{i}": self.width for i in range(len(self.hidden))}

    def add_guidance(self) -> None:
        if self.guidance is None:
            self.guidance = zero_linear(1, self.width)

    def add_end(self) -> None:
        if self.end is None:
            self.end = zero_linear(33, self.width)

    def add_end_by_depth(self) -> None:
        """From the second layer on, the end of a jump in the place of its beginning; a jump of no length is as it was."""
        self.end_by_depth = True

    def _noise_features(self, t: Tensor, like: Tensor, least: float = 1e-3) -> Tensor:
        """log rho / 4 and its sinusoids, (B, 33)."""
        log_rho = expand(self.schedule.rho(t).clamp(least, 1e3).log() / 4, like)
        angles = log_rho * self.frequencies.to(like.dtype)
        return torch.cat((log_rho, angles.sin(), angles.cos()), 1)

    def _end_features(self, end: Tensor, like: Tensor) -> Tensor:
        """rho / (1 + rho) and its sinusoids, (B, 33): unlike its logarithm smooth at rho = 0, where jumps end."""
        rho = self.schedule.rho(end)
        place = expand(rho / (1 + rho), like)
        angles = place * self.frequencies.to(like.dtype)
        return torch.cat((place, angles.sin(), angles.cos()), 1)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Tensor | None = None,
        guidance: Tensor | None = None,
        end: Tensor | None = None,
    ) -> Tensor:
        alpha, sigma = (expand(f(t), x_t) for f in (self.schedule.alpha, self.schedule.sigma))
        norm = (alpha**2 + sigma**2).sqrt()
        state = x_t / norm
        h = self.enter(torch.cat((state, self._noise_features(t, x_t)), 1))
        if self.label is not None:
            h = h + self.label(
                x_t.new_full((len(x_t),), self.label.num_embeddings - 1, dtype=torch.long)
                if cond is None
                else cond
            )
        if self.guidance is not None and guidance is not None:
            h = h + self.guidance(guidance[:, None].to(h) / 10)
        if self.end is not None and end is not None:
            h = h + self.end(self._end_features(end, x_t))
        for i, layer in enumerate(self.hidden):
            if i == 1 and self.end_by_depth and end is not None:
                moved = self._noise_features(end, x_t, KNOWN) - self._noise_features(t, x_t, KNOWN)
                h = h + moved @ self.enter.weight[:, -moved.shape[1] :].T
            h = h + layer(h)
        # x0 = (alpha x_t + sigma F) / (alpha^2 + sigma^2)^(1/2) on the unit-norm state: exact at sigma = 0.
        return (alpha * state + sigma * self.leave(h)) / norm


class ExactTeacher(Denoiser):
    """A mixture as a denoiser. Its `clone` cannot copy weights it has not: it fits an MLP to the exact x0."""

    def __init__(self, mixture: Mixture, fit_steps: int = 1000, width: int = 128):
        super().__init__(mixture, "x0", mixture.schedule)
        self.fit_steps, self.width = fit_steps, width
        # In a list, so as not to count as the teacher's own parameters.
        self._fitted: list[Denoiser] = []

    @property
    def blocks(self) -> dict[str, int]:
        return {f"network.hidden.{i}": self.width for i in range(3)}

    @property
    def middle(self) -> str:
        return f"network.{MLP.middle}"

    def clone(self) -> Denoiser:
        """An MLP denoiser trained on the exact posterior mean, the same one at every call."""
        return self.backbone().clone()

    def backbone(self) -> Denoiser:
        """That MLP itself, frozen."""
        if not self._fitted:
            self._fitted.append(self._fit().requires_grad_(False))
        return self._fitted[0]

    def _fit(self) -> Denoiser:
        mixture, schedule = self.network, self.schedule
        classes = mixture.no_class if mixture.no_class > 1 else 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            student = Denoiser(MLP(schedule, mixture.means.shape[1], classes, self.width), "x0", schedule)
        optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.fit_steps)
        with torch.enable_grad():
            for step in range(self.fit_steps):
                noise = SampleNoise(range(512), step=step, phase="fit")
                cond = noise.randint(0, classes + 1) if classes else None
                x0, eps = mixture.draw(noise, cond), noise.randn(mixture.means.shape[1])
                t = schedule.t_of_rho((6 * noise.rand() - 3).mul(FITTED / 3).exp())
                x_t = schedule.add_noise(x0, eps, t)
                target = mixture(x_t, t, cond)
                loss = denoising(student(x_t, t, cond), target, eps).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                decay.step()
        return student


class Toy(Measures, Family):
    """Modes on a circle, of unequal weights and off the origin; the data have unit variance per coordinate, on average.

    Equal weights would forgive a student that spreads its points evenly, and a mean of zero one that starts from noise
    where a table ends a little before it.
    """

    name = "toy"
    init_noises = ("unit", "sigma")
    exportable, own_data, preview_count = False, True, 1024

    @dataclass
    class Config:
        modes: int = 8
        # Of each mode.
        std: float = 0.1
        # Shares rise around the circle from 1 - uneven to 1 + uneven times the equal one.
        uneven: float = 0.5
        # Of the data.
        mean: tuple[float, float] = (0.4, -0.3)
        # Modes are dealt to the classes in turn; 1 = unconditional.
        classes: int = 1
        schedule: Literal["vp", "edm", "flow", "trig"] = "vp"
        # Of the MLP that starts as the teacher.
        fit_steps: int = 1000
        # Of a student with random weights.
        student_width: int = 128

        def __post_init__(self) -> None:
            for name, most in (("modes", 10_000), ("classes", self.modes), ("student_width", 65_536)):
                if not 1 <= getattr(self, name) <= most:
                    raise ValueError(f"{name} must be from 1 to {most:,}, got {getattr(self, name)}.")
            if self.fit_steps < 0:
                raise ValueError(f"fit_steps must be 0 or more, got {self.fit_steps}.")
            if not 0 < self.std < math.inf:
                raise ValueError(f"std must be above 0, got {self.std:g}.")
            if not -1 < self.uneven < 1:
                raise ValueError(f"uneven must be above -1 and below 1, got {self.uneven:g}.")

    def __init__(self, config: Toy.Config):
        self.config = config
        angle = 2 * math.pi * torch.arange(config.modes, dtype=torch.float64) / config.modes
        classes = torch.arange(config.modes) % config.classes
        weights = torch.linspace(1 - config.uneven, 1 + config.uneven, config.modes, dtype=torch.float64)
        # Classes are dealt in turn, so they have equal shares.
        weights = weights / weights.new_zeros(config.classes).index_add(0, classes, weights)[classes]
        weights = weights / config.classes
        means = torch.stack((angle.cos(), angle.sin()), 1)
        means = means - weights @ means
        # One mode alone has no spread.
        if config.modes > 1:
            means = means / (weights @ means.square()).mean().sqrt()
        means = means + means.new_tensor(config.mean)
        self.schedule, self.kind = SCHEDULES[config.schedule](), "x0"
        self.mixture = Mixture(self.schedule, means, config.std, weights, classes)
        self.teacher = ExactTeacher(self.mixture, config.fit_steps)
        self.shape, self.resolution = (2,), (96, 96)
        self.conditions = "class" if config.classes > 1 else "none"
        self.class_names = tuple(str(i) for i in range(config.classes)) if config.classes > 1 else None
        self.metrics = self.measures()

    def fresh(self) -> Denoiser:
        classes = self.mixture.no_class if self.mixture.no_class > 1 else 0
        return Denoiser(MLP(self.schedule, 2, classes, self.config.student_width), "x0", self.schedule)

    def encode(self, prompts: Sequence[int]) -> Cond:
        return torch.as_tensor([int(label) for label in prompts]) if self.conditions == "class" else None

    def uncond(self, count: int) -> Cond:
        return torch.full((count,), self.config.classes) if self.conditions == "class" else None

    def data(self, index: Sequence[int], seed: int = 0, cond: Cond = None) -> Tensor:
        """Exact samples, one per index, (N, 2)."""
        return self.mixture.draw(SampleNoise(index, seed=seed, phase="data"), cond)

    def prompts(self, source: Any, indices: Sequence[int], uses: Sequence[int] | None = None) -> list:
        """Classes in turn, all of them or those of the source's partition."""
        classes = range(self.config.classes)
        if source is not None and len(classes) > 1:
            classes = source.config.block(len(classes))
        return [classes[i % len(classes)] for i in indices]

    def examples(self, source: object, indices: Sequence[int]) -> Tensor:
        return self.data(indices, cond=self.encode(self.prompts(source, indices)))

    def decode(self, x0: Tensor) -> Tensor:
        return x0

    def picture(self, x0: Tensor) -> np.ndarray:
        """A scatter of the points on [-2.2, 2.2]^2, uint8 (192, 192, 3)."""
        size = 192
        counts = np.zeros((size, size))
        places = ((x0.detach().cpu().numpy() + 2.2) / 4.4 * size).astype(int)
        inside = ((places >= 0) & (places < size)).all(1)
        np.add.at(counts, (size - 1 - places[inside, 1], places[inside, 0]), 1)
        shade = 255 - np.clip(counts / max(1, len(places) / 600) * 255, 0, 255)
        return np.repeat(shade.astype(np.uint8)[..., None], 3, 2)
