"""One face for student, teacher and fake score: `denoiser(x_t, t, cond) -> Prediction`, in any schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.prediction import Prediction
from stepdistill.schedule import Schedule, expand

# What a network is told besides x_t and t: a tensor, a dict of tensors (all with the batch first), or
# nothing.
Cond = Tensor | dict[str, Tensor] | None


class Denoiser(nn.Module):
    """A network together with the schedule and the kind of quantity it was trained for.

    Args:
        network: `network(x_t, t, cond, **extras) -> raw`, with x_t (B, ...) and t (B,) in `native` time.
        kind: what `raw` is, one of `prediction.KINDS`.
        native: the schedule the network was trained under.
        schedule: the schedule callers speak; `native` when not given.

    Called under another schedule, the state is moved to the native time of equal rho and rescaled to its
    norm; x0 is the same picture in both, so it alone is carried back (methods.md frame, "model wrapping
    between schedules").
    """

    def __init__(self, network: nn.Module, kind: str, native: Schedule, schedule: Schedule | None = None):
        super().__init__()
        self.network = network
        self.kind = kind
        self.native = native
        self.schedule = schedule or native

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond = None,
        in_schedule: Schedule | None = None,
        scale: float | Tensor | None = None,
        **extras: Tensor,
    ) -> Prediction:
        """x_t: (B, ...); t: (B,) in `in_schedule`, by default `self.schedule`; extras: what the student alone
        is told: `guidance` (B,), or `end` (B,), the time in the same schedule a two-time student jumps to.

        scale: of a network with a guidance rule of its own (`guided`): inputs are then two halves, without and
            with the condition, and what comes back is one.

        `in_schedule` is for methods defined in one schedule (sCM's TrigFlow, MeanFlow's flow): unlike `under`
        it reaches the network through whatever wraps this module for training. The raw output is brought to
        at least float32 before any algebra.
        """
        ours, native = in_schedule or self.schedule, self.native
        x_native, t_native = x_t, t
        if ours is not native:
            t_native = native.time_of(ours, t)
            if "end" in extras:
                extras = extras | {"end": native.time_of(ours, extras["end"])}
            # Same ratio, and stable as alpha goes to 0: both norms are taken of (alpha, sigma).
            norm = torch.hypot(native.alpha(t_native), native.sigma(t_native)) / torch.hypot(
                ours.alpha(t), ours.sigma(t)
            )
            x_native = x_t * expand(norm, x_t)
        raw = self._raw(x_native, t_native, cond, extras)
        if scale is not None:
            raw = self.network.guide(*raw.chunk(2), scale)
            x_t, t, x_native, t_native = (each[: len(raw)] for each in (x_t, t, x_native, t_native))
        if ours is native:
            return Prediction(raw, self.kind, x_t, t, native)
        return Prediction(Prediction(raw, self.kind, x_native, t_native, native).x0, "x0", x_t, t, ours)

    def _raw(self, x_t: Tensor, t: Tensor, cond: Cond, extras: dict[str, Tensor]) -> Tensor:
        raw = self.network(x_t, t, cond, **extras)
        return raw if raw.dtype == torch.float64 else raw.float()

    @property
    def blocks(self) -> dict[str, int]:
        """Blocks worth tapping in forward order, name -> channels (`features.tap`)."""
        return {f"network.{name}": channels for name, channels in self.network.blocks.items()}

    @property
    def middle(self) -> str:
        """The bottleneck among `blocks`."""
        return f"network.{self.network.middle}"

    @property
    def sigma_data(self) -> float:
        """The data's standard deviation in EDM's loss weight: what the network is preconditioned with,
        else 1.
        """
        return getattr(self.network, "sigma_data", None) or 1.0

    def backbone(self) -> Denoiser:
        """The network whose activations a discriminator taps: this one. An exact teacher has none and gives
        the network fitted to it.
        """
        return self

    def encoder(self) -> Denoiser:
        """A trainable copy that ends at the middle block, for a discriminator whose features are trained: a
        `features.Encoder`.
        """
        from stepdistill.features import Encoder

        twin = self.clone()
        for name in twin.network.behind_middle:
            parent, _, leaf = name.rpartition(".")
            holder = twin.network.get_submodule(parent)
            setattr(holder, leaf, nn.ModuleList() if isinstance(getattr(holder, leaf), nn.Module) else None)
        ended = Encoder(twin.network, twin.kind, twin.native, twin.schedule).train(twin.training)
        # What its last block makes of a text is heard no more.
        return ended.requires_grad_(True)

    def under(self, schedule: Schedule) -> Denoiser:
        """The same network (shared, not copied) spoken to in another schedule."""
        return Denoiser(self.network, self.kind, self.native, schedule)

    def requires_grad_(self, requires_grad: bool = True) -> Denoiser:
        """As any module's, but for what the output does not depend on: data-parallel training waits for every gradient
        that is wanted, and none arrives there.
        """
        super().requires_grad_(requires_grad)
        for name in getattr(self.network, "unheard", ()):
            self.network.get_submodule(name).requires_grad_(False)
        return self

    def clone(self) -> Denoiser:
        """A copy with its own trainable parameters: how a student or a fake score starts from the teacher."""
        twin = copy.deepcopy(self)
        halves = {p.dtype for p in twin.parameters()} & {torch.float16, torch.bfloat16}
        # What is trained is float32, however the teacher is held.
        return (twin.float() if halves else twin).requires_grad_(True)


class Overlay(Denoiser):
    """`base` with parameters over it, as its subclass has them; it says what `network` does, by default that of the base.

    Its parameters and its state are those over the base alone: the base is held by reference and belongs to whoever
    made it, so freezing, training, saving and moving this module never touch the base's.
    """

    def __init__(self, base: Denoiser):
        nn.Module.__init__(self)
        # In a list, so as not to count as this module's own parameters.
        self._base = [base]

    @property
    def base(self) -> Denoiser:
        return self._base[0]

    @property
    def network(self) -> nn.Module:
        return self.base.network

    @property
    def kind(self) -> str:
        return self.base.kind

    @property
    def native(self) -> Schedule:
        return self.base.native

    @property
    def schedule(self) -> Schedule:
        return self.base.schedule

    def merged(self) -> Denoiser:
        """A whole denoiser of its own that says the same."""
        raise NotImplementedError


def guided(
    denoiser: Callable[..., Prediction],
    x_t: Tensor,
    t: Tensor,
    cond: Cond,
    uncond: Cond,
    scale: float | Tensor,
    **told: Tensor,
) -> Prediction:
    """Classifier-free guidance, uncond + scale (cond - uncond); scale 1 is off and costs one call.

    Guidance is linear, so guiding x0, eps, v or flow at the same (x_t, t) is the same thing (Ho & Salimans
    2022). A network whose pipeline rescales the result has a rule `guide(unconditional, conditional, scale)` for
    its own raw output.
    scale: a number, or (B,) one per sample. Both halves run in one call of batch 2B. told: what else the network is
        told, (B,) each.
    """
    if not isinstance(scale, Tensor) and scale == 1:
        return denoiser(x_t, t, cond, **told)
    if uncond is None and cond is not None:
        raise UserError(
            "this model has no condition that stands for none, so it cannot be guided; set the scale to 1."
        )
    if isinstance(scale, Tensor):
        scale = expand(scale, x_t)
    halves = torch.cat((x_t, x_t)), torch.cat((t, t)), map_cond(lambda u, c: torch.cat((u, c)), uncond, cond)
    told = {name: torch.cat((value, value)) for name, value in told.items()}
    network = getattr(unwrap(getattr(denoiser, "func", denoiser)), "network", None)
    if hasattr(network, "guide"):
        return denoiser(*halves, scale=scale, **told)
    both = denoiser(*halves, **told)
    unconditional, conditional = both.raw.chunk(2)
    raw = unconditional + scale * (conditional - unconditional)
    return Prediction(raw, both.kind, x_t, t, both.schedule)


def map_cond(function: Callable[..., Any], *conds: Cond) -> Any:
    """Apply `function` to the matching tensors of one or more conditions; None stays None.

    Raises:
        ValueError: the conditions are not of one form (a guided call without `uncond`, say).
    """
    first = conds[0]
    if any(type(cond) is not type(first) for cond in conds):
        raise ValueError("cond and uncond must have the same form; guidance needs both")
    if first is None:
        return None
    if isinstance(first, dict):
        return {key: function(*(cond[key] for cond in conds)) for key in first}
    return function(*conds)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and friends; hooks and attributes live there."""
    while isinstance(getattr(module, "module", None), nn.Module):
        module = module.module
    return getattr(module, "_orig_mod", module)


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has wrapped it, whatever else has."""
    while not hasattr(module, "_orig_mod"):
        if not isinstance(getattr(module, "module", None), nn.Module):
            return False
        module = module.module
    return True


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
