"""Trajectories of the teacher: right ends, computed once, gone on with after an interruption."""

from __future__ import annotations

import pytest
import torch
import worlds

import training.trajectories as module
from stepdistill.errors import UserError
from stepdistill.families.sd import SD
from stepdistill.families.toy import Toy, gaussian_flow_map
from stepdistill.methods.base import Batch, Networks, PairSettings
from stepdistill.noise import SampleNoise
from stepdistill.prediction import Prediction
from stepdistill.schedule import Flow, times_like
from training.data.prompts import Prompts
from training.data.toy import Toy as Indices


@pytest.fixture
def one_mode() -> Toy:
    return Toy(Toy.Config(modes=1, std=0.5, schedule="flow", fit_steps=0))


@pytest.fixture
def source() -> Indices:
    return Indices(Indices.Config(size=50))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "PART", 16)


def trajectories(family, source, settings, cache, batch=64, **how) -> module.Trajectories:
    return module.Trajectories(family, source, settings, cache).fill(batch, progress=False, **how)


def tensors(made: module.Trajectories) -> dict[str, torch.Tensor]:
    return made.shards.rows(range(made.size))


def test_they_end_where_the_flow_takes_them(one_mode, source, tmp_path):
    # 0.301 is no point of the teacher's own grid.
    settings = PairSettings(40, 300, times=(0.7, 0.301))
    made = trajectories(one_mode, source, settings, tmp_path, batch=7)
    pairs = made.rows(range(40))
    assert pairs.z.shape == pairs.x0.shape == (40, 2) and pairs.states.shape == (40, 2, 2)
    mean = one_mode.mixture.means.float()
    start = times_like(1.0, pairs.z)
    schedule = one_mode.schedule
    for time, got in ((0.7, pairs.states[:, 0]), (0.301, pairs.states[:, 1]), (0.0, pairs.x0)):
        to = times_like(time, got)
        for axis in range(2):
            column = pairs.z[:, axis : axis + 1]
            exact = gaussian_flow_map(schedule, float(mean[0, axis]), 0.5, column, start, to)
            torch.testing.assert_close(got[:, axis : axis + 1], exact, atol=0.02, rtol=0)


def test_they_are_computed_once_and_go_on_after_an_interruption(one_mode, source, tmp_path, monkeypatch):
    calls = []
    original = module._trajectory

    def counted(*arguments):
        calls.append(list(arguments[3]))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(module, "_trajectory", counted)
    settings = PairSettings(40, 5)
    with pytest.raises(KeyboardInterrupt):
        trajectories(one_mode, source, settings, tmp_path, batch=8)
    made = trajectories(one_mode, source, settings, tmp_path, batch=8)
    # The two finished files of 16 are kept.
    assert calls[5][0] == 32
    count = len(calls)
    again = trajectories(one_mode, source, settings, tmp_path, batch=8)
    fewer = trajectories(one_mode, source, PairSettings(20, 5), tmp_path)
    assert len(calls) == count and fewer.size == 20
    whole = trajectories(one_mode, source, settings, tmp_path / "other", batch=8)
    for other in (again, whole):
        for name, tensor in tensors(made).items():
            assert torch.equal(tensor, tensors(other)[name])
    assert torch.equal(tensors(fewer)["x0"], tensors(made)["x0"][:20])


def test_a_damaged_file_is_refused_or_made_again_and_other_settings_lie_elsewhere(one_mode, source, tmp_path):
    settings = PairSettings(16, 5)
    made = tensors(trajectories(one_mode, source, settings, tmp_path))
    (path,) = tmp_path.glob("pairs-*/*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        UserError, match=r"000000.safetensors is damaged; run `python -m training.precompute`"
    ):
        trajectories(one_mode, source, settings, tmp_path)
    again = trajectories(one_mode, source, settings, tmp_path, mend=True)
    assert torch.equal(made["x0"], tensors(again)["x0"])
    other = Toy(Toy.Config(modes=2, std=0.5, schedule="flow", fit_steps=0))
    for family, changed in ((one_mode, PairSettings(16, 6)), (other, settings)):
        trajectories(family, source, changed, tmp_path)
    assert len(list(tmp_path.glob("pairs-*"))) == 3


def test_conditions_and_guidance_are_the_examples(tmp_path):
    """Classes in turn, and the teacher guided by the scale asked for."""
    family = Toy(Toy.Config(modes=4, std=0.1, classes=2, schedule="flow", fit_steps=0))
    source = Indices(Indices.Config(size=6))
    made = {
        scale: trajectories(family, source, PairSettings(16, 40, scale), tmp_path) for scale in (1.0, 3.0)
    }
    pairs = made[1.0].rows(range(16))
    assert pairs.cond.tolist() == [i % 6 % 2 for i in range(16)]
    nearest = torch.cdist(pairs.x0.double(), family.mixture.means).argmin(1)
    assert torch.equal(family.mixture.classes[nearest], pairs.cond)
    assert torch.equal(tensors(made[3.0])["z"], tensors(made[1.0])["z"])
    assert not torch.allclose(tensors(made[3.0])["x0"], tensors(made[1.0])["x0"], atol=1e-3)


def test_they_are_made_for_a_pipeline_of_prompts(tiny_sd, tmp_path):
    (tmp_path / "prompts.txt").write_text("a large red star\na small blue circle\n")
    source = Prompts(Prompts.Config(path=tmp_path / "prompts.txt"))
    family = SD(SD.Config(teacher=str(tiny_sd)))
    settings = PairSettings(3, 2, 2.0, (499.0,))
    pairs = trajectories(family, source, settings, tmp_path, batch=8).rows([0, 2])
    assert pairs.x0.shape == (2, *family.shape) and pairs.states.shape == (2, 1, *family.shape)
    # Number 2 has the first prompt again.
    assert torch.equal(pairs.cond[0], pairs.cond[1])
    assert not torch.equal(pairs.x0[0], pairs.x0[1])


def test_a_teacher_that_diverges_is_one_sentence(one_mode, source, tmp_path):
    one_mode.mixture.means *= float("nan")
    with pytest.raises(UserError, match=r"method\.pair_steps"):
        trajectories(one_mode, source, PairSettings(4, 2), tmp_path)


# ---------------------------------------------------------------------------------- the methods that want them


def carried(family: Toy, method, source, tmp_path, count: int = 32) -> tuple[Networks, Batch]:
    settings = method.pairs(family.schedule)
    made = trajectories(family, source, settings, tmp_path)
    noise = SampleNoise(range(count))
    batch = Batch(None, None, family.shape, noise.index, noise, pairs=made.rows(range(count)))
    return Networks({"teacher": family.teacher}, family.schedule), batch


def test_kd_is_zero_for_the_teachers_own_map_at_every_time_of_its_grids(one_mode, source, tmp_path):
    method = worlds.method("kd", steps=(1, 2, 4), pair_count=32, pair_steps=400)
    schedule = one_mode.schedule
    assert method.pairs(schedule).times == (0.75, 0.5, 0.25)
    nets, batch = carried(one_mode, method, source, tmp_path)
    mean, met = one_mode.mixture.means.float(), []

    def oracle(x_t, t, cond=None):
        met.append(t)
        alpha, sigma = schedule.alpha(t).float()[:, None], schedule.sigma(t).float()[:, None]
        spread = (alpha**2 * 0.25 + sigma**2).sqrt()
        return Prediction(mean + 0.5 * (x_t - alpha * mean) / spread, "x0", x_t, t, schedule)

    nets.modules["student"] = oracle
    assert float(method.loss(nets, batch)["total"].max()) < 1e-4
    assert set(met[0].tolist()) == {1.0, 0.75, 0.5, 0.25}
    batch.pairs.x0 += 1
    assert float(method.loss(nets, batch)["total"].min()) > 0.9


def test_dmd_regresses_at_the_first_time_of_its_sampling_and_only_if_asked(one_mode, source, tmp_path):
    method = worlds.method("dmd", steps=(1,), pair_count=32, pair_steps=2)
    nets, batch = carried(one_mode, method, source, tmp_path)
    heard, batch.pairs.cond = [], torch.arange(32)
    nets.modules["student"] = lambda x_t, t, cond: (
        heard.append((x_t, t, cond)) or Prediction(batch.pairs.x0 + 0.5, "x0", x_t, t, one_mode.schedule)
    )
    torch.testing.assert_close(method.regression_loss(nets, batch)["total"], torch.full((32,), 0.25))
    assert torch.equal(heard[0][0], batch.pairs.z) and bool((heard[0][1] == 1).all())
    # Its own, not the batch's.
    assert heard[0][2] is batch.pairs.cond
    (student, critic) = method.phases(0)
    assert [weight for weight, _ in student.terms] == [1.0, 0.25] and len(critic.terms) == 1
    without = worlds.method("dmd", steps=(1,), regression_weight=0.0)
    assert without.pairs(Flow()) is None and len(next(iter(without.phases(0))).terms) == 1


def test_parts_of_a_composition_share_one_set_of_pairs():
    def compose(*parts):
        return worlds.method("compose", steps=(1,), parts=list(parts))

    kd, dmd = {"name": "kd", "pair_count": 10}, {"name": "dmd", "pair_count": 10}
    assert compose(kd, dmd).pairs(Flow()) == PairSettings(10, 50)
    assert compose({"name": "dmd2"}, {"name": "vsd"}).pairs(Flow()) is None
    with pytest.raises(UserError, match="different trajectory pairs"):
        compose(kd, dmd | {"pair_steps": 3}).pairs(Flow())


def test_counts_must_be_positive():
    with pytest.raises(UserError, match=r"method\.pair_count must be at least 1, got 0"):
        worlds.method("kd", steps=(1,), pair_count=0).pairs(Flow())
