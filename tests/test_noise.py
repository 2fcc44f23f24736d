"""Philox against published vectors; random numbers that belong to a sample."""

from __future__ import annotations

import itertools

import pytest
import torch

from stepdistill.noise import SampleNoise, philox

# Random123's kat_vectors, philox 4x32 10: counter, key -> words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_words(counter, key, expected):
    made = philox(tuple(torch.tensor([word]) for word in words(counter)), tuple(words(key)))
    assert [int(word) for word in made] == words(expected)


def test_philox_works_elementwise():
    columns = zip(*(words(counter) for counter, key, _ in KNOWN[:1] * 3), strict=True)
    made = philox(tuple(torch.tensor(column) for column in columns), (0, 0))
    assert [[int(word[i]) for word in made] for i in range(3)] == [words(KNOWN[0][2])] * 3


def test_sample_noise_is_philox_of_the_sample():
    """The counter is (element, draw, index, 0), so another implementation can draw the same numbers."""
    noise = SampleNoise([5], seed=3, step=7, phase="student")
    key = noise._key
    block = philox(tuple(torch.tensor([word]) for word in (0, 1, 5, 0)), key)
    assert noise._words(4).tolist() == [[int(word) for word in block]]
    assert key[1] == 7


def draws(index, **kwargs) -> list[torch.Tensor]:
    noise = SampleNoise(index, **kwargs)
    return [noise.randn(3, 4), noise.rand(5), noise.randint(0, 1000), noise.randn(7), noise.rand()]


def test_a_samples_numbers_are_independent_of_its_batch():
    whole = draws(range(12), seed=1, step=4, phase="critic")
    # Two processes.
    halves = [draws(part, seed=1, step=4, phase="critic") for part in (range(6), range(6, 12))]
    shuffled = draws([11, 3, 7], seed=1, step=4, phase="critic")
    for i, drawn in enumerate(whole):
        assert torch.equal(drawn, torch.cat([half[i] for half in halves]))
        assert torch.equal(drawn[[11, 3, 7]], shuffled[i])


@pytest.mark.parametrize("other", [{"seed": 2}, {"step": 5}, {"phase": "student"}])
def test_other_seeds_steps_and_phases_give_other_numbers(other):
    base = {"seed": 1, "step": 4, "phase": "critic"}
    for one, two in zip(draws(range(64), **base), draws(range(64), **(base | other)), strict=True):
        same = (one == two).double().mean()
        assert float(same) < 0.05


def test_every_draw_is_new():
    noise = SampleNoise(range(1000))
    one, two, three = noise.randn(), noise.randn(), noise.randn()
    for a, b in ((one, two), (two, three), (one, three)):
        assert not torch.equal(a, b)
        assert abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) < 0.12


def test_moments():
    noise = SampleNoise(range(20_000), seed=5)
    normal, uniform = noise.randn(8, dtype=torch.float64), noise.rand(8)
    n = normal.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(normal.pow(power).mean()) - moment) < 5 * (variance / n) ** 0.5
    assert abs(float(uniform.mean()) - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert abs(float(uniform.square().mean()) - 1 / 3) < 5 * (4 / 45 / n) ** 0.5
    # The tails are there.
    assert float(normal.abs().max()) > 4


def test_uniforms_are_float64_and_never_an_end():
    noise = SampleNoise([0])
    assert noise.rand(3).dtype == torch.float64
    for word, least, most in ((0, 0.0, 1e-9), (0xFFFFFFFF, 1 - 1e-9, 1.0)):
        noise._words = lambda count, word=word: torch.full((1, count), word, dtype=torch.int64)
        assert least < float(noise.rand()) < most
        assert bool(torch.isfinite(noise.randn(4)).all())


def test_neighbours_are_uncorrelated():
    """Neighbouring samples, elements, steps and draws: no correlation beyond 5 standard errors."""
    n = 20_000
    noise = SampleNoise(range(n), step=1)
    grid = noise.randn(4, dtype=torch.float64)
    again = SampleNoise(range(n), step=2).randn(4, dtype=torch.float64)
    pairs = [(grid[:-1, 0], grid[1:, 0]), (grid[:, 0], grid[:, 1]), (grid[:, 0], grid[:, 2]), (grid, again)]
    pairs.append((grid, noise.randn(4, dtype=torch.float64)))
    pairs += [(a.square(), b.square()) for a, b in pairs]
    for a, b in pairs:
        stacked = torch.stack((a.flatten(), b.flatten()))
        assert abs(float(torch.corrcoef(stacked)[0, 1])) < 5 / a.numel() ** 0.5


def test_randint_is_uniform_over_its_range():
    drawn = SampleNoise(range(30_000)).randint(3, 10)
    assert drawn.dtype == torch.int64
    counts = torch.bincount(drawn, minlength=10)
    assert counts[:3].sum() == 0 and len(counts) == 10
    expected = 30_000 / 7
    # chi^2 with 6 degrees of freedom.
    assert float(((counts[3:] - expected) ** 2 / expected).sum()) < 30


def test_a_shared_number_is_equal_on_all_parts_and_uniform_over_steps():
    parts = [SampleNoise(part, seed=2, step=9, phase="x") for part in (range(4), range(4, 8), [100])]
    for part in parts:
        part.randn(3)
    assert len({tuple(part.shared_randint(0, 1000) for _ in range(3)) for part in parts}) == 1
    counts = torch.zeros(4)
    for step in range(2000):
        counts[SampleNoise([0], step=step, phase="student").shared_randint(0, 4)] += 1
    # chi^2 with 3 degrees of freedom.
    assert float(((counts - 500) ** 2 / 500).sum()) < 25
    again = [SampleNoise([0], step=step).shared_randint(0, 2) for step in range(400)]
    pairs = sum(a == b for a, b in itertools.pairwise(again))
    # Neither constant nor alternating.
    assert 150 < pairs < 250


def test_shapes():
    noise = SampleNoise(torch.arange(3))
    assert noise.randn(2, 5).shape == (3, 2, 5) and noise.randn(2, 5).dtype == torch.float32
    assert noise.randn().shape == noise.rand().shape == noise.randint(0, 2).shape == (3,)
    # An odd count.
    assert noise.randn(3).shape == (3, 3)


def test_every_shared_number_is_a_new_one():
    noise = SampleNoise(range(3), step=5)
    assert len({noise.shared_randint(0, 2**30) for _ in range(8)}) == 8
