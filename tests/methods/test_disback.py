"""DisBack (arXiv 2408.15991): the recorded degradation, and the way back along it."""

from __future__ import annotations

import pytest
import torch
import worlds
from torch import nn
from worlds import COUNT, world

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.methods.base import Networks


def disback(**settings):
    return world("disback", steps=(1,), **{"base": {"name": "dmd2", "guidance_scale": 3.0}} | settings)


def test_the_degradation_trains_the_fake_score_alone_and_records_it():
    made = disback(stage="degrade", path=3, interval=2)
    assert set(made.nets.modules) == {"student", "teacher", "fake_score", "path_1", "path_2"}
    optimizer = torch.optim.Adam(made.nets.fake_score.parameters(), 1e-2)
    recorded = []
    for step in range(6):
        (phase,) = made.method.phases(step)
        assert phase.trains == ("fake_score",)
        made.backward(phase, step)
        optimizer.step()
        made.method.after_step(made.nets, step, (phase.name,))
        recorded.append(made.nets.fake_score.network.enter.weight.detach().clone())
    for name, step in (("path_1", 1), ("path_2", 3)):
        assert torch.equal(made.nets.modules[name].network.enter.weight, recorded[step])
    # The end of the path is the fake score itself.
    assert not torch.equal(recorded[5], recorded[3])


def test_after_the_degradation_the_fake_score_knows_the_students_samples_better_than_the_teacher():
    made = disback(stage="degrade", path=1, interval=1000)
    optimizer = torch.optim.Adam(made.nets.fake_score.parameters(), 3e-3)

    def loss(fake) -> float:
        nets = Networks(made.nets.modules | {"fake_score": fake}, made.nets.schedule)
        with torch.no_grad():
            return sum(
                float(made.method.record(nets, made.batch(1000 + i))["total"].median()) for i in range(20)
            )

    teacher = made.family.teacher.clone()
    before = loss(teacher)
    for step in range(150):
        (phase,) = made.method.phases(step)
        made.backward(phase, step)
        optimizer.step()
    assert loss(made.nets.fake_score) < 0.8 * before


def test_backtracking_visits_the_path_backwards_and_guides_the_last_target_alone():
    base = {"name": "dmd2", "guidance_scale": 3.0, "student_every": 1}
    made = disback(path=3, interval=10, base=base)
    teacher = made.nets.teacher
    asked = []

    class Ear(nn.Module):
        def __init__(self, name, inner):
            super().__init__()
            self.name, self.inner = name, inner

        def forward(self, x_t, t, cond=None):
            asked.append((self.name, len(x_t)))
            return self.inner(x_t, t, cond)

    for name in ("path_1", "path_2", "teacher"):
        made.nets.modules[name] = Ear(name, teacher if name == "teacher" else made.nets.modules[name])
    seen = []
    for step in (0, 9, 10, 19, 20, 500):
        asked.clear()
        made.backward(next(p for p in made.method.phases(step) if p.name == "student"), step)
        seen.append(asked[0])
        assert len(asked) == 1
    plain, guided = COUNT, 2 * COUNT
    assert seen == [("path_2", plain)] * 2 + [("path_1", plain)] * 2 + [("teacher", guided)] * 2


def test_the_stages_agree_on_what_is_carried():
    record, back = (disback(stage=stage, path=3) for stage in ("degrade", "backtrack"))
    assert set(back.method.carried) <= set(record.nets.modules) and not record.method.carried
    for name in back.method.carried:
        # strict: all keys.
        back.nets.modules[name].load_state_dict(record.nets.modules[name].state_dict())
    assert back.method.carried == ("fake_score", "path_1", "path_2")


def test_the_bases_trajectories_are_computed_where_it_is_trained():
    """DMD regresses to them; the degradation needs none."""
    base = {"name": "dmd", "pair_count": 7}
    made = world("disback", steps=(1,), path=2, base=base)
    assert made.method.pairs(made.nets.schedule).count == 7
    for step in (0, 1000):
        made.backward(next(iter(made.method.phases(step))), step)
        assert all(p.grad is not None for p in made.nets.student.parameters())
    assert worlds.method("disback", steps=(1,), stage="degrade", base=base).pairs(made.nets.schedule) is None


def test_a_base_without_a_fake_score_is_refused():
    with pytest.raises(UserError, match=r"method\.base must be a method with a fake score"):
        world("disback", base={"name": "ladd"})
    with pytest.raises(UserError, match=r"method\.path must be at least 1"):
        worlds.method("disback", path=0)


def test_the_targets_means_go_from_the_students_to_the_teachers():
    """Gaussians: a student off by 2; the recorded networks' posterior means move monotonically away from the data."""
    made = disback(stage="degrade", path=4, interval=40)
    schedule = made.nets.schedule
    shift = torch.tensor([2.0, 0.0])
    made.nets.modules["student"] = Denoiser(Constant(shift), "x0", schedule)
    optimizer = torch.optim.Adam(made.nets.fake_score.parameters(), 3e-4)
    for step in range(160):
        (phase,) = made.method.phases(step)
        made.backward(phase, step)
        optimizer.step()
        made.method.after_step(made.nets, step, ("record",))
    t, batch = torch.full((COUNT,), 800.0, dtype=torch.float64), made.batch()
    x = batch.randn()

    def mean(network) -> float:
        return float(network(x, t, batch.cond).x0[:, 0].mean().detach())

    means = [mean(made.family.teacher.clone())]
    means += [mean(made.nets.modules[name]) for name in ("path_1", "path_2", "path_3", "fake_score")]
    assert means == sorted(means) and means[-1] - means[0] > 0.3


class Constant(nn.Module):
    """Everything at one place, with the tiniest dependence on the input."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, x_t, t, cond=None):
        return self.value.expand_as(x_t) + 0.05 * x_t


def test_degradation_learns_at_the_noise_levels_of_its_base():
    seen = {}
    for density in ("uniform", "lognormal"):
        base = {"name": "dmd2", "critic_density": density, "time_mean": -3.0, "time_std": 0.01}
        made = world("disback", stage="degrade", base=base)
        fake, asked = made.nets.fake_score.forward, []
        made.nets.fake_score.forward = lambda x, t, *rest, asked=asked, fake=fake: (
            asked.append(t),
            fake(x, t, *rest),
        )[1]
        (phase,) = made.method.phases(0)
        phase.terms[0][1](made.nets, made.batch(0, phase.name))
        seen[density] = made.family.schedule.rho(asked[0]).log()
    assert (seen["lognormal"] + 3).abs().max() < 0.2 < (seen["uniform"] + 3).abs().max()
