"""DisBack (arXiv 2408.15991): the recorded degradation, and the way back along it."""

from __future__ import annotations

import json

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


GUIDING = [
    {"name": "decoupled_dmd"},
    {"name": "cdm"},
    {"name": "dmd2", "diversity_weight": 0.05, "diversity_guidance": 3.0},
    {"name": "anyflow", "flow_map": {"direction": "teacher", "guidance_low": 3.0, "guidance_high": 3.0, "tell_guidance": False}},
    {"name": "sid", "guidance_scale": 3.0, "fake_guidance_scale": 3.0, "critic_guidance_scale": 3.0},
]  # fmt: skip


@pytest.mark.parametrize("base", GUIDING, ids=lambda base: base["name"])
def test_nothing_of_the_base_guides_before_the_last_target(base):
    """Records know no empty condition, so on the way none is asked for; at the teacher the base guides as ever."""
    made = world("disback", steps=(2,), path=2, interval=1, base=base | {"student_every": 1})

    def empty(step: int) -> set[str]:
        """Networks that are asked for the empty condition in this iteration."""
        found = set()

        class Ear(nn.Module):
            def __init__(self, name, inner):
                super().__init__()
                self.name, self.inner = name, inner

            def __getattr__(self, name):
                return super().__getattr__(name) if name in ("name", "inner") else getattr(self.inner, name)

            def forward(self, x_t, t, cond=None, **told):
                if (cond == nothing).any():
                    found.add(self.name)
                return self.inner(x_t, t, cond, **told)

        nets = Networks(
            {name: Ear(name, module) for name, module in made.nets.modules.items()}, made.nets.schedule
        )
        for phase in made.method.phases(step):
            batch = made.batch(step, phase.name)
            nothing = batch.uncond.flatten()[0]
            for _, loss in phase.terms:
                loss(nets, batch)
        return found

    assert empty(0) == set()
    assert "teacher" in empty(1)


def test_a_record_learns_plain_scores_whatever_guides_the_bases_critic():
    """SiD-LSG's critic denoises by its guided answer; asked plainly, such a record would say something else."""
    base = {"name": "sid", "critic_guidance_scale": 3.0}
    made = disback(stage="degrade", base=base)
    asked = []
    made.nets.fake_score.register_forward_pre_hook(lambda _, args: asked.append(len(args[0])))
    (phase,) = made.method.phases(0)
    made.backward(phase)
    assert asked == [COUNT]


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ({"name": "phased_dmd"}, r"^method\.base\.name=phased_dmd: .* set it to dmd2"),
        ({"name": "dmd2", "tell_place": True}, r"^method\.base\.tell_place=true: .* set it to false\.$"),
        ({"name": "cdm", "tell_place": True, "critic_pull": 0.0}, r"^method\.base\.tell_place=true"),
        ({"name": "vsd"}, r"^method\.base=vsd: its fake score must be a whole network"),
        (
            {"name": "dmd2", "fake_score_lora": {"rank": 2}},
            r"^method\.base=dmd2: .* without a fake_score_lora",
        ),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("stage", ["degrade", "backtrack"])
def test_what_cannot_be_recorded_and_carried_is_refused_before_the_first_stage(base, says, stage):
    with pytest.raises(UserError, match=says):
        world("disback", steps=(2,), stage=stage, base=base)


def test_what_the_base_has_learnt_on_the_way_outlives_a_checkpoint_and_the_last_turn():
    """f-distill's mean ratios: a run taken up anywhere goes on as one that was never left."""
    base = {"name": "f_distill", "time_bins": 2, "bin_decay": 0.75, "student_every": 1}

    def run(made, steps) -> list[float]:
        losses = []
        for step in steps:
            phase = next(iter(made.method.phases(step)))
            losses.append(float(phase.terms[0][1](made.nets, made.batch(step))["total"].mean().detach()))
            made.method.after_step(made.nets, step, (phase.name,))
        return losses

    whole = disback(path=2, interval=3, base=base)
    run(whole, range(2))
    # In JSON and back, as in a checkpoint.
    at_2 = json.loads(json.dumps(whole.method.state_dict()))
    expected = run(whole, range(2, 3))
    at_3 = whole.method.state_dict()
    expected += run(whole, range(3, 5))
    assert any(at_2["ratio_means"]) and any(at_3["ratio_means"])
    # From on the way, and from where the teacher's turn begins.
    for state, first in ((at_2, 2), (at_3, 3)):
        resumed = disback(path=2, interval=3, base=base)
        resumed.method.load_state_dict(state)
        assert run(resumed, range(first, 5)) == expected[first - 2 :]
        fresh = disback(path=2, interval=3, base=base)
        assert run(fresh, range(first, first + 1)) != expected[first - 2 : first - 1]
