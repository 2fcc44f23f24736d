"""How samplers of flow models bend an even grid of times."""

from __future__ import annotations

from collections.abc import Sequence


def even(times: Sequence[float]) -> bool:
    """Whether falling times go down towards zero in equal steps, the last of which would reach it."""
    return all(abs(t - times[0] * (1 - i / len(times))) < 1e-9 for i, t in enumerate(times))


def shifted(t: float, shift: float) -> float:
    """t -> S t / (1 + (S - 1) t), a factor S of rho = t / (1 - t) (Esser et al. 2024, Eq. 23); 1 is off."""
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


def stretched(times: Sequence[float], terminal: float) -> tuple[float, ...]:
    """Falling `times` stretched about 1 until the last is `terminal`; one time alone stays."""
    if not terminal or len(times) == 1:
        return tuple(times)
    factor = (1 - terminal) / (1 - times[-1])
    return tuple(1 - factor * (1 - t) for t in times)


def dynamic_mu(tokens: int, base_shift: float, max_shift: float, base_tokens: int, max_tokens: int) -> float:
    """The exponent of a shift e^mu by resolution: linear in the tokens of an image (Esser et al. 2024, Sec. 5.3.2, as
    FLUX.1's pipeline has it).
    """
    return base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)


def bent(shift: float, steps: int, smallest: float = 0.001) -> tuple[float, float]:
    """(shift, terminal) by which times that are even from 1 to the shifted `smallest` become S w / (1 + (S - 1) w) at
    w = 1, .., 1 / steps, for S = `shift` and at least two steps.

    A scheduler that is told a number of steps alone makes such times, shifts them by s and stretches them to its
    terminal: a Moebius map of w that leaves 1 where it is, as the wanted one is. They agree at the other end where
    the terminal is S / (N + S - 1), and between where s = 1 + (S - 1) a / (1 + (S - 1)(1 - a)) with
    a = (1 - 1/N) / (1 - m), m the shifted `smallest`, which depends on s a little.
    """
    found = shift
    for _ in range(50):
        a = (1 - 1 / steps) / (1 - shifted(smallest, found))
        found = 1 + (shift - 1) * a / (1 + (shift - 1) * (1 - a))
    return found, shift / (steps + shift - 1)
