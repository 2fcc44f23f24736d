"""An autoregressive model of codes and its student as denoisers of states that are codes first and noise behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.code_flow import lead
from stepdistill.denoiser import Cond, Denoiser
from stepdistill.errors import UserError
from stepdistill.families.code_transformer import Cache, CodeTransformer
from stepdistill.prediction import Prediction
from stepdistill.schedule import Schedule


@dataclass(frozen=True)
class Unrolled(Prediction):
    """What a teacher says of a state: what the codes of the noise are, found out as far as they are asked for.

    unroll: up to which place -> vectors (B, length, D), of codes up to there. `raw` is the state itself.
    """

    unroll: Callable[[int], Tensor] = field(repr=False, kw_only=True)

    @cached_property
    def x0(self) -> Tensor:
        return self.unroll(self.x_t.shape[1])

    @property
    def eps(self) -> Tensor:
        return self.x_t

    def at(self, t: Tensor) -> Tensor:
        """The state at time t: codes up to there, and behind them the noise that was there."""
        kept = self.schedule.kept(t)
        return self.schedule.add_noise(self.unroll(int(kept.max())), self.x_t, t)


@dataclass(frozen=True)
class Coded(Prediction):
    """What a student says of a state: `raw` is x0, and beside it what a loss is taken on.

    logits: (B, length, K) of the code at each place; vectors: (B, length, D), the mean that it expects there; noisy: (B,
    length) bool, the places that held noise.
    """

    logits: Tensor = field(kw_only=True)
    vectors: Tensor = field(kw_only=True)
    noisy: Tensor = field(kw_only=True)

    @property
    def eps(self) -> Tensor:
        return self.x_t


class CodeDenoiser(Denoiser):
    """Base of both."""

    network: CodeTransformer

    def _refuse(self, schedule: Schedule | None) -> None:
        if schedule is not None and not schedule.agrees(self.schedule):
            raise UserError(
                "method.name: the states of the family 'ar' are codes and noise place by place, which have no noise level in"
                " another schedule; use dd1 or dd2."
            )


@dataclass
class _Memo:
    """Keys and values of the codes a teacher was told last, and its logits of the place behind them."""

    cond: Tensor
    codes: Tensor
    cache: Cache
    logits: Tensor
    version: int


class CodeTeacher(CodeDenoiser):
    """The autoregressive model itself. One pass for each place, with the keys and values of those before it kept.

    Its answer is exact and has no gradient: the flow ends at codes.
    """

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        # In a list: no part of the module.
        self._memo: list[_Memo] = []

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond = None,
        in_schedule: Schedule | None = None,
        scale: float | Tensor | None = None,
        **extras: Tensor,
    ) -> Unrolled:
        """x_t: (B, length, D). scale: of two halves, without and with the caption, as `denoiser.guided` gives them."""
        self._refuse(in_schedule)
        if scale is not None:
            x_t, t = x_t.chunk(2)[1], t.chunk(2)[1]

        def unroll(upto: int) -> Tensor:
            return self._unroll(x_t, t, cond, scale, upto)

        return Unrolled(x_t, self.kind, x_t, t, self.schedule, unroll=unroll)

    @torch.no_grad()
    def _unroll(
        self, x_t: Tensor, t: Tensor, cond: Tensor, scale: float | Tensor | None, upto: int
    ) -> Tensor:
        network, kept = self.network, self.schedule.kept(t).to(x_t.device)
        if int(kept.min()) >= upto:
            return x_t
        codes = self._codes(x_t, int(kept.max()))
        for place in range(int(kept.min()), upto):
            found = self._draw(codes[:, :place], x_t[:, place], cond, scale)
            codes[:, place] = torch.where(place < kept, codes[:, place], found)
        done = torch.arange(x_t.shape[1], device=x_t.device) < upto
        return torch.where(done[:, None], network.book[codes].to(x_t.dtype), x_t)

    def _codes(self, x_t: Tensor, upto: int) -> Tensor:
        """The codes (B, length) of the first places of a state, 0 behind them; those told last are known."""
        codes, known = torch.zeros(x_t.shape[:2], dtype=torch.long, device=x_t.device), 0
        if self._memo:
            last = self._memo[0].codes[: len(x_t), :upto]
            if len(last) == len(x_t) and torch.equal(
                self.network.book[last].to(x_t), x_t[:, : last.shape[1]]
            ):
                known = last.shape[1]
                codes[:, :known] = last
        codes[:, known:upto] = self.network.nearest(x_t[:, known:upto])
        return codes

    def _draw(self, before: Tensor, eps: Tensor, cond: Tensor, scale: float | Tensor | None) -> Tensor:
        """The code (B,) behind the codes `before` (B, n) that its noise (B, D) leads to."""
        logits = self.logits_behind(before, cond, doubled=scale is not None)
        if scale is not None:
            logits = self.network.guide(*logits.chunk(2), scale)
        return lead(eps, logits, self.network.book)

    def logits_behind(self, before: Tensor, cond: Tensor, doubled: bool = False) -> Tensor:
        """Of the place behind codes (B, n), (B, K), in one pass over what was not told before.

        doubled: the codes stand for two halves of `cond`.
        """
        if doubled:
            before = before.repeat(2, 1)
        count, known = before.shape[1], self._known(before, cond)
        if known is None:
            rows = torch.cat((self.network.heading(cond), self.network.rows(before)), 1)
            cache = Cache(self.network.shape, len(rows), rows)
        elif (start := known.codes.shape[1]) < count:
            rows, cache = self.network.rows(before[:, start:], start), known.cache
        else:
            return known.logits
        logits = self.network.head(self.network.run(rows, cache)[:, -1]).float()
        self._memo[:] = [_Memo(cond, before.clone(), cache, logits, self._version())]
        return logits

    def _known(self, before: Tensor, cond: Tensor) -> _Memo | None:
        """What was told last, if this begins with it."""
        if not self._memo:
            return None
        memo, size = self._memo[0], self._memo[0].codes.shape[1]
        same = (
            memo.version == self._version()
            and size <= before.shape[1]
            and memo.codes.device == before.device
            and torch.equal(memo.codes, before[:, :size])
            and (memo.cond is cond or torch.equal(memo.cond, cond))
        )
        return memo if same else None

    def _version(self) -> int:
        """Moves whenever a weight is written to."""
        return sum(p._version for p in self.network.parameters())

    def clone(self) -> CodeStudent:
        """A student with this network's weights, which hears noise besides."""
        own = self.network
        network = CodeTransformer(replace(own.shape, student=True)).to(own.book.device)
        state = {name: tensor.float() for name, tensor in own.state_dict().items()}
        network.load_state_dict(network.state_dict() | state)
        return CodeStudent(network, self.kind, self.native, self.schedule).requires_grad_(True)

    def __deepcopy__(self, memo: dict[int, Any]) -> CodeTeacher:
        return type(self)(copy.deepcopy(self.network, memo), self.kind, self.native, self.schedule)


class CodeStudent(CodeDenoiser):
    """All places at once. x0 is the likeliest code where there was noise; its gradient is that of the mean code."""

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Cond = None, in_schedule: Schedule | None = None, **extras: Tensor
    ) -> Coded:
        """x_t: (B, length, D)."""
        self._refuse(in_schedule)
        network, kept = self.network, self.schedule.kept(t)
        logits, moved = network(x_t, kept, cond)
        logits, book = logits.float(), network.book
        mean = logits.softmax(-1) @ book
        likeliest = book[logits.argmax(-1)]
        # Straight through: what is drawn is a code, what learns is the mean. That says nothing of where a vector is moved to,
        # but data-parallel training waits for every parameter's gradient.
        through = mean + 0 * moved.float()
        drawn = likeliest + (through - through.detach())
        noisy = torch.arange(x_t.shape[1], device=x_t.device) >= kept.to(x_t.device)[:, None]
        x0 = torch.where(noisy[..., None], drawn, x_t)
        return Coded(
            x0, self.kind, x_t, t, self.schedule, logits=logits, vectors=mean + moved.float(), noisy=noisy
        )


class CodeLaw(nn.Module):
    """The law that a network says of codes, for a method that trains it: codes (B, length) and a caption -> logits."""

    def __init__(self, network: CodeTransformer):
        super().__init__()
        self.network = copy.deepcopy(network).float().requires_grad_(True)

    def forward(self, codes: Tensor, cond: Tensor) -> Tensor:
        return self.network.logits(codes, cond)


def relayed(student: Callable[..., Prediction], teacher: Callable[..., Prediction], since: float) -> Any:
    """What says x0 as the student does while more than the share `since` is noise, and as the teacher does from there on:
    the teacher in the loop (arXiv 2412.17153, Sec. 4.3), for as many of its passes as there is time for.
    """

    def predict(x_t: Tensor, t: Tensor, cond: Cond, **inputs: Tensor) -> Prediction:
        asked = student if float(t.max()) > since else teacher
        return asked(x_t, t, cond, **inputs)

    return predict
