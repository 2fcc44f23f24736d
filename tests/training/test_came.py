"""CAME (arXiv 2307.02047): its equations one number at a time, what it keeps, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch
from runs import assert_same_run, checkpoint, interrupt_in, toy
from torch import nn

from stepdistill.errors import Interrupted, UserError
from training.came import CAME, fresh
from training.forecast import forecast
from training.optimizers import state_bytes
from training.run import build, run
from training.sections import OptimConfig
from training.sharding import check_sharded

pytestmark = pytest.mark.usefixtures("accelerator_state")

BETAS, LR = (0.8, 0.9, 0.95), 0.01


def by_hand(
    weights: list[list[float]], gradients: list[list[list[float]]], decay: float
) -> list[list[float]]:
    """Algorithm 2 of the paper on a matrix, sums over rows and columns as it has them; decay as its authors' code has it."""
    n, m = len(weights), len(weights[0])
    cells = [(i, j) for i in range(n) for j in range(m)]
    p = {(i, j): weights[i][j] for i, j in cells}
    mu = dict.fromkeys(cells, 0.0)
    r, big_r = ([0.0] * n for _ in range(2))
    c, big_c = ([0.0] * m for _ in range(2))
    beta_1, beta_2, beta_3 = BETAS
    for g in gradients:
        squares = {(i, j): g[i][j] ** 2 + 1e-30 for i, j in cells}
        r = [beta_2 * r[i] + (1 - beta_2) * sum(squares[i, j] for j in range(m)) for i in range(n)]
        c = [beta_2 * c[j] + (1 - beta_2) * sum(squares[i, j] for i in range(n)) for j in range(m)]
        u = {(i, j): g[i][j] / math.sqrt(r[i] * c[j] / sum(r)) for i, j in cells}
        rms = math.sqrt(sum(u[at] ** 2 for at in cells) / (n * m))
        u = {at: u[at] / max(1.0, rms) for at in cells}
        mu = {at: beta_1 * mu[at] + (1 - beta_1) * u[at] for at in cells}
        unsure = {at: (u[at] - mu[at]) ** 2 + 1e-16 for at in cells}
        big_r = [beta_3 * big_r[i] + (1 - beta_3) * sum(unsure[i, j] for j in range(m)) for i in range(n)]
        big_c = [beta_3 * big_c[j] + (1 - beta_3) * sum(unsure[i, j] for i in range(n)) for j in range(m)]
        for i, j in cells:
            s = big_r[i] * big_c[j] / sum(big_r)
            p[i, j] += -LR * decay * p[i, j] - LR * mu[i, j] / math.sqrt(s)
    return [[p[i, j] for j in range(m)] for i in range(n)]


def stepped(start: torch.Tensor, gradients: torch.Tensor, decay: float = 0.0) -> torch.Tensor:
    parameter = nn.Parameter(start.clone())
    optimizer = CAME([parameter], LR, BETAS, decay)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_matrix_moves_as_the_papers_equations_say(decay):
    start, gradients = drawn(3, 4), 3 * drawn(6, 3, 4) + 0.5
    expected = torch.tensor(by_hand(start.tolist(), gradients.tolist(), decay), dtype=torch.float64)
    torch.testing.assert_close(stepped(start, gradients, decay), expected, rtol=1e-10, atol=1e-12)
    # The factors of one row are its cells: nothing is lost.
    flat, row = (
        stepped(start[:1], gradients[:, :1]),
        by_hand(start[:1].tolist(), gradients[:, :1].tolist(), 0.0),
    )
    torch.testing.assert_close(flat, torch.tensor(row, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_a_kernel_is_the_matrix_of_its_outputs():
    start, gradients = drawn(4, 3, 2, 2), drawn(5, 4, 3, 2, 2)
    matrix = stepped(start.flatten(1), gradients.flatten(2))
    torch.testing.assert_close(stepped(start, gradients), matrix.view(4, 3, 2, 2))


def test_a_vector_is_clipped_rmsprop_with_momentum():
    """No average of it is factored, and it has no instability, as in the authors' code."""
    start, gradients = drawn(5), drawn(4, 5)
    p, v, mu = start.clone(), torch.zeros(5).double(), torch.zeros(5).double()
    for g in gradients:
        v = BETAS[1] * v + (1 - BETAS[1]) * (g**2 + 1e-30)
        u = g / v.sqrt()
        u = u / max(1.0, float(u.square().mean().sqrt()))
        mu = BETAS[0] * mu + (1 - BETAS[0]) * u
        p = p - LR * mu
    torch.testing.assert_close(stepped(start, gradients), p)
    assert stepped(drawn(1)[0], drawn(3)).shape == ()


def test_it_does_not_hang_on_the_gradients_scale_and_rests_without_one():
    start, gradients = drawn(3, 4), drawn(6, 3, 4)
    torch.testing.assert_close(stepped(start, 1e6 * gradients), stepped(start, gradients))
    torch.testing.assert_close(stepped(start, 0 * gradients), start)


def test_steps_that_agree_are_bold_and_those_that_do_not_are_timid():
    """A clipped step of momentum alone is of lr at most; divided by what is known of its instability it is more, or less."""
    steady = torch.ones(4, 4).double()

    def last(gradients: list[torch.Tensor]) -> float:
        moved = [stepped(torch.zeros(4, 4).double(), torch.stack(gradients[:n])) for n in (12, 11)]
        return float((moved[0] - moved[1]).abs().mean()) / LR

    assert last([steady] * 12) > 2 and last([steady, -steady] * 6) < 0.5


@pytest.mark.parametrize("shape", [(64, 48), (16, 8, 3, 3), (40,), ()])
def test_what_it_keeps_beside_the_momentum_grows_with_the_sides(shape):
    parameter = nn.Parameter(drawn(*shape))
    optimizer = CAME([parameter], LR)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter]
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in fresh(parameter.to("meta")).items()
    }
    beside = sum(value.numel() for key, value in state.items() if key != "mu")
    size = parameter.numel()
    assert beside == (2 * (shape[0] + size // shape[0]) if len(shape) > 1 else size)
    layer = nn.Module()
    layer.register_parameter("weight", parameter)
    assert state_bytes(layer, "came") == 8 * (size + beside) and state_bytes(layer, "adamw") == 16 * size


def test_it_finds_the_minimum_of_a_quadratic():
    """Of badly scaled curvature, in a matrix and a vector."""
    goal, bias = drawn(8, 6), drawn(6)
    weight, offset = nn.Parameter(torch.zeros(8, 6).double()), nn.Parameter(torch.zeros(6).double())
    curvature = 10 ** torch.linspace(-2, 2, 48).double().view(8, 6)
    optimizer = CAME([weight, offset], 0.02)
    losses = []
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 400)
        optimizer.zero_grad()
        loss = (curvature * (weight - goal).square()).sum() + (offset - bias).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 1e-4 * losses[0]


def test_a_run_with_it_goes_on_bit_for_bit_and_forgets_nothing(tmp_path, short_runs, monkeypatch):
    """Its state is in the checkpoint, tensors and three betas, in shapes that are not the parameters'."""
    how = ("optim.optimizer=came", "optim.betas=[0.9, 0.99, 0.999]", "optim.lr=1e-4", "run.save_every=3")
    run(toy(tmp_path / "whole", *how))
    with monkeypatch.context() as patch:
        interrupt_in(patch, 3)
        with pytest.raises(Interrupted):
            run(toy(tmp_path / "parts", *how))
    run(toy(tmp_path / "parts", *how))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    kept = checkpoint(tmp_path / "parts").optimizer("student")
    assert {"mu", "v_rows", "v_columns", "S_rows", "S_columns"} in [
        set(state) for state in kept["state"].values()
    ]
    assert kept["param_groups"][0]["betas"] == (0.9, 0.99, 0.999)


def test_the_forecast_counts_what_it_keeps(tmp_path):
    def moments(name: str) -> int:
        recipe = toy(tmp_path / name, f"optim.optimizer={name}")
        family, sources = build(recipe)
        student = forecast(recipe, family, sources[0]).networks["student"]
        return student.optimizer

    assert 0.5 * moments("adamw") < moments("came") < 0.6 * moments("adamw")


def test_betas_and_eps_are_those_of_the_optimiser():
    assert OptimConfig(optimizer="came", betas=(0.9, 0.999, 0.9999)).for_network("student").betas[2] == 0.9999
    assert CAME([nn.Parameter(drawn(2))], LR, (0.9, 0.99)).param_groups[0]["betas"] == (0.9, 0.99, 0.9999)
    for settings, says in (
        ({"betas": (0.9, 0.99, 0.999)}, r"betas must be two numbers in \[0, 1\) with optimizer=adamw"),
        ({"betas": (0.9,), "optimizer": "came"}, r"betas must be two or three numbers"),
        ({"betas": (0.9, 0.99, 1.0), "optimizer": "came"}, r"betas must be two or three numbers in \[0, 1\)"),
        ({"eps": 1e-6, "optimizer": "came"}, "eps must be left out with optimizer=came"),
    ):
        with pytest.raises(ValueError, match=says):
            OptimConfig(**settings)


@pytest.mark.parametrize("key", ["optim.optimizer", "optim.fake_score.optimizer"])
def test_shards_are_refused(tmp_path, key):
    recipe = toy(tmp_path, f"{key}=came")
    with pytest.raises(UserError, match=r"optim\.optimizer=came averages over a matrix's rows and columns"):
        check_sharded(recipe, recipe.new_method(), nn.Linear(1, 1))
