"""The flow from Gaussian noise to a discrete law over code vectors, in closed form (Liu et al. 2024, "Distilled Decoding 1",
arXiv 2412.17153, Sec. 3.2).

A code q is c_j with probability p_j, noise eps is N(0, I), and x_s = (1 - s) eps + s q, data at s = 1. Of such a path the
marginal velocity needs no network:

    dx / ds = (E[q | x_s] - x_s) / (1 - s),   E[q | x] = sum_j c_j softmax_j(log p_j - |x - s c_j|^2 / 2 (1 - s)^2)

Its ODE takes all but a null set of noise to exactly one code, and to c_j the share p_j of it: where a language model
draws a code at random, this map draws it from noise, so that a whole image is a function of noise.
"""

from __future__ import annotations

from torch import Tensor

# Of Heun's rule, the last of them Euler's, which ends at the mean itself; ten leave points between the codes.
STEPS = 30
# Codes that are drawn from; the rest of a law of hundreds has a few thousandths of the probability, and most of the work.
LIKELIEST = 64


def code_mean(x: Tensor, s: float | Tensor, log_p: Tensor, codes: Tensor) -> Tensor:
    """E[q | x_s = x], (N, D).

    x: (N, D); s: in [0, 1), a number or (N, 1); log_p: (N, K), up to a constant; codes: (K, D), or (N, K, D) where each row
    has codes of its own.
    """
    shares = posterior(x, s, log_p, codes)
    return (shares[:, None] @ codes)[:, 0] if codes.ndim == 3 else shares @ codes


def posterior(x: Tensor, s: float | Tensor, log_p: Tensor, codes: Tensor) -> Tensor:
    """p(q = c_j | x_s = x), (N, K); arguments as `code_mean` takes them."""
    inner = (codes @ x[..., None])[..., 0] if codes.ndim == 3 else x @ codes.T
    # -|x - s c|^2 / 2 (1 - s)^2 without what is the same for all codes.
    nearness = (s * inner - 0.5 * s**2 * codes.square().sum(-1)) / (1 - s) ** 2
    return (log_p + nearness).softmax(-1)


def score(x: Tensor, s: float | Tensor, log_p: Tensor, codes: Tensor) -> Tensor:
    """grad log p_s(x) = (s E[q | x] - x) / (1 - s)^2, (N, D): exact, given the law of the code ("Distilled Decoding 2",
    arXiv 2510.21003). Arguments as `code_mean` takes them.
    """
    return (s * code_mean(x, s, log_p, codes) - x) / (1 - s) ** 2


def flow_to_codes(eps: Tensor, log_p: Tensor, codes: Tensor, steps: int = STEPS) -> Tensor:
    """Which code the ODE takes noise to: numbers (N,), int64.

    eps: (N, D); log_p: (N, K) up to a constant, -inf for a code that cannot be; codes: (K, D) or (N, K, D).
    """
    x, size = eps, 1 / steps
    for number in range(steps - 1):
        s, after = number * size, (number + 1) * size
        here = (code_mean(x, s, log_p, codes) - x) / (1 - s)
        ahead = x + size * here
        there = (code_mean(ahead, after, log_p, codes) - ahead) / (1 - after)
        x = x + 0.5 * size * (here + there)
    # From there Euler's step ends at the mean, which lies at a code unless the noise was on a border.
    return posterior(x, 1 - size, log_p, codes).argmax(-1)


def lead(eps: Tensor, logits: Tensor, codes: Tensor) -> Tensor:
    """`flow_to_codes` among the LIKELIEST codes of each law alone: numbers (N,), int64. logits: (N, K); codes: (K, D)."""
    log_p, likely = logits.log_softmax(-1).topk(min(LIKELIEST, logits.shape[-1]))
    found = flow_to_codes(eps.float(), log_p.float(), codes[likely].float())
    return likely.gather(1, found[:, None])[:, 0]
