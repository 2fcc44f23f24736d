"""The flow from noise to codes against what is known of it: quantiles in one dimension, planes, shares, the two-token law."""

from __future__ import annotations

import math

import torch

from stepdistill.code_flow import code_mean, flow_to_codes, score
from stepdistill.noise import SampleNoise

NORMAL = torch.distributions.Normal(0.0, 1.0)


def noise(count: int, dims: int) -> torch.Tensor:
    return SampleNoise(range(count), phase="codes").randn(dims, dtype=torch.float64)


def test_in_one_dimension_it_is_the_quantile_map():
    """Trajectories on a line never cross, so the lowest p_1 of the noise goes to the lowest code, and so on."""
    codes, p = torch.tensor([[-1.1], [0.2], [1.4]]).double(), torch.tensor([0.3, 0.15, 0.55]).double()
    eps = noise(4000, 1)
    found = flow_to_codes(eps, p.log().expand(len(eps), -1), codes)
    borders = NORMAL.icdf(p.cumsum(0)[:-1])
    right = torch.searchsorted(borders, eps[:, 0].contiguous())
    near = (eps - borders).abs().min(1).values < 0.03
    assert torch.equal(found[~near], right[~near])


def test_between_two_codes_in_space_the_border_is_a_plane_across_their_line():
    codes, p = torch.tensor([[0.3, -1.0, 0.8], [1.2, 0.5, -0.4]]).double(), 0.2
    eps = noise(4000, 3)
    along = codes[1] - codes[0]
    place = eps @ along / along.norm()
    found = flow_to_codes(eps, torch.tensor([p, 1 - p]).double().log().expand(len(eps), -1), codes)
    border = NORMAL.icdf(torch.tensor(p, dtype=torch.float64))
    near = (place - border).abs() < 0.03
    assert torch.equal(found[~near], (place > border).long()[~near])


def test_each_code_gets_its_share_and_rows_have_laws_of_their_own():
    codes = noise(9, 4)
    p = torch.linspace(1, 9, 9).double() / 45
    p[3] = 0
    p = p / p.sum()
    eps = noise(6000, 4)
    # Every second row under the reversed law, by vectors of its own.
    log_p = torch.where((torch.arange(6000) % 2 == 0)[:, None], p.log(), p.flip(0).log())
    found = flow_to_codes(eps, log_p, codes.expand(6000, -1, -1))
    for first, law in ((0, p), (1, p.flip(0))):
        shares = torch.bincount(found[first::2], minlength=9) / 3000
        assert (shares - law).abs().max() < 4 * math.sqrt(0.2 * 0.8 / 3000)
        assert shares[law == 0].sum() == 0


def test_mean_and_score_are_those_of_the_noised_law():
    """The score is the gradient of log sum_j p_j N(x; s c_j, (1 - s)^2), and the mean follows from it (Tweedie)."""
    codes, log_p = noise(5, 3), torch.tensor([0.1, 0.4, 0.2, 0.05, 0.25]).double().log()
    x, s = (0.5 * noise(7, 3)).requires_grad_(), torch.linspace(0, 0.9, 7, dtype=torch.float64)[:, None]
    squared = (x[:, None] - s[..., None] * codes).square().sum(-1)
    density = (log_p - squared / (2 * (1 - s) ** 2)).logsumexp(1)
    (right,) = torch.autograd.grad(density.sum(), x)
    told = log_p.expand(7, -1)
    assert torch.allclose(score(x, s, told, codes), right, atol=1e-10)
    tweedie = (x + (1 - s) ** 2 * right)[1:] / s[1:]
    assert torch.allclose(code_mean(x, s, told, codes)[1:], tweedie, atol=1e-8)


def test_of_two_tokens_that_agree_the_composed_map_crosses_few_and_independent_decoding_half():
    """The law {00, 11} with 2 % noise: each token alone is a fair coin."""
    codes, eps = torch.tensor([[-1.0], [1.0]]).double(), noise(4000, 2)
    fair = torch.full((4000, 2), 0.5).double().log()
    first = flow_to_codes(eps[:, :1], fair, codes)
    follows = torch.tensor([[0.98, 0.02], [0.02, 0.98]]).double().log()[first]
    second = flow_to_codes(eps[:, 1:], follows, codes)
    alone = flow_to_codes(eps[:, 1:], fair, codes)
    crossed, independent = (float((first != each).double().mean()) for each in (second, alone))
    assert crossed <= 0.05 and abs(independent - 0.5) < 0.03
    assert abs(crossed - 0.02) < 0.01
