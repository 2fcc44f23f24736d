"""What the consistency methods share: the boundary, the frame, the target network, students of two times."""

from __future__ import annotations

import pytest
import torch
import worlds
from gaussians import EVERY_SCHEDULE
from torch import Tensor, nn
from worlds import COUNT, world

from stepdistill.denoiser import unwrap
from stepdistill.ema import track_average
from stepdistill.families.toy import Toy
from stepdistill.methods.base import Batch, Networks, consistency
from stepdistill.noise import SampleNoise
from stepdistill.prediction import Prediction
from stepdistill.schedule import EDM, VP, Flow, TrigFlow, times_like
from stepdistill.timesteps import as_edm


@EVERY_SCHEDULE
def test_boundary_a_clean_state_is_its_own_beginning(schedule):
    x = torch.randn(COUNT, 1, dtype=torch.float64)
    low, above = times_like(schedule.t_min, x), times_like(schedule.t_min + 1e-3 * schedule.t_max, x)
    wrong = Prediction(x + 5, "x0", x, low, schedule)
    assert torch.equal(consistency(wrong), x / schedule.alpha(low)[:, None])
    assert torch.equal(consistency(Prediction(x + 5, "x0", x, above, schedule)), x + 5)


@EVERY_SCHEDULE
def test_as_edm_keeps_the_range_of_noise(schedule):
    frame = as_edm(schedule)
    assert isinstance(frame, EDM)
    ends = schedule.rho(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)).clamp(0.002, 80)
    torch.testing.assert_close(torch.tensor([frame.t_min, frame.t_max]), ends.float())
    assert as_edm(schedule, most=5.0).t_max == 5.0


def test_a_target_network_follows_slowly():
    student, target = nn.Linear(2, 2), nn.Linear(2, 2)
    before = target.weight.detach().clone()
    track_average(target, student, 0.75)
    torch.testing.assert_close(target.weight, 0.75 * before + 0.25 * student.weight)
    track_average(target, student, 0.0)
    assert torch.equal(target.weight, student.weight)


def test_a_two_time_student_starts_as_the_teacher_and_hears_its_end():
    family = Toy(Toy.Config(fit_steps=0, schedule="flow"))
    plain, student = family.student("teacher", ()), family.student("teacher", ("end",))
    x = torch.randn(COUNT, 2)
    t, end = times_like(0.7, x), times_like(0.2, x)
    assert torch.equal(student(x, t, end=end).x0, plain(x, t).x0)
    with torch.no_grad():
        student.network.end.weight.normal_()
    assert not torch.allclose(student(x, t, end=end).x0, student(x, t, end=t).x0)
    # Its end travels with the schedule it is asked in.
    trig = TrigFlow()
    x_trig = trig.add_noise(torch.zeros_like(x), x, trig.t_of_rho(Flow().rho(t))) * 0 + x
    asked = [trig.t_of_rho(Flow().rho(time)) for time in (t, end)]
    norm = (1 / torch.hypot(1 - t, t))[:, None].float()
    said = student(x_trig * norm, asked[0], in_schedule=trig, end=asked[1])
    torch.testing.assert_close(said.x0, student(x, t, end=end).x0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method", [worlds.method("cd"), worlds.method("ect"), worlds.method("scm"), worlds.method("meanflow")]
)
def test_the_gradient_through_distributed_data_parallel_is_the_networks_own(method, tmp_path):
    """Asked in another schedule and told an end, a wrapped student still answers through its wrapper."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    family = Toy(Toy.Config(schedule="vp", fit_steps=0))
    student = family.student("teacher", method.sampling.inputs)
    modules = {"student": student, "teacher": family.teacher} | method.networks(family.teacher, student)

    def gradients(online: nn.Module) -> list[Tensor]:
        student.zero_grad()
        noise = SampleNoise(range(COUNT), phase="student")
        batch = Batch(None, None, family.shape, noise.index, noise, family.data(range(COUNT)))
        nets = Networks(modules | {"student": online}, family.schedule)
        ((_, loss),) = next(iter(method.phases(5))).terms
        loss(nets, batch)["total"].mean().backward()
        return [parameter.grad.clone() for parameter in student.parameters()]

    alone = gradients(student)
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = gradients(DistributedDataParallel(student))
    finally:
        distributed.destroy_process_group()
    assert sum(float(g.abs().sum()) for g in alone) > 0
    assert all(torch.equal(a, b) for a, b in zip(alone, wrapped, strict=True))


@pytest.mark.parametrize("name", ["lcm", "cd", "tscd", "ect"])
def test_student_and_target_have_one_dropout_mask(name):
    made, drawn = world(name), []
    for network in {made.nets.student, made.nets.modules.get("target", made.nets.student)}:

        def forward(*args, plain=network.network.forward, **more):
            drawn.append(float(torch.rand(())))
            return plain(*args, **more)

        network.network.forward = forward
    made.method.loss(made.nets, made.batch())
    assert len(drawn) == 2 and drawn[0] == drawn[1]


@pytest.mark.parametrize("name", ["lcm", "cd", "tscd"])
def test_the_target_is_an_exponential_average(name):
    made = world(name, target_ema=0.8)
    student, target = made.nets.student, made.nets.target
    before = [p.detach().clone() for p in target.parameters()]
    made.method.after_step(made.nets, 0, ("student",))
    for old, new, followed in zip(before, target.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), 0.8 * old + 0.2 * followed.detach())
    wrapped = Networks(made.nets.modules | {"student": nn.DataParallel(student)}, made.nets.schedule)
    assert [n for n, _ in unwrap(wrapped.student).named_parameters()] == [
        n for n, _ in target.named_parameters()
    ]


@pytest.mark.parametrize("name", ["lcm", "cd", "tscd"])
def test_the_targets_spread_is_logged_as_the_teachers(name):
    made = world(name)
    before = made.method.loss(made.nets, made.batch())
    for parameter in made.nets.target.parameters():
        parameter.data.mul_(0.5)
    after = made.method.loss(made.nets, made.batch())
    assert after["x0_std"] == before["x0_std"]
    assert after["teacher_x0_std"] != before["teacher_x0_std"]


@pytest.mark.parametrize("schedule", ["vp", "edm", "flow"])
@pytest.mark.parametrize("name", ["lcm", "cd", "tscd"])
def test_a_link_may_count_by_the_inverse_of_the_noise_it_spans(name, schedule):
    """1 / (rho_t - rho_s) of the two noise levels asked about; where the trajectory ends both sides are known."""
    totals, made = {}, None
    for weight in ("uniform", "inverse_gap", None):
        chosen = {"link_weight": weight} if weight else {}
        made, heard = world(name, schedule=schedule, **chosen), {}
        for role in ("student", "target"):

            def forward(
                x, t, *args, role=role, heard=heard, own=made.nets.schedule,
                plain=made.nets.modules[role].forward, **more,
            ):  # fmt: skip
                heard[role] = (more.get("in_schedule") or own).rho(t)
                return plain(x, t, *args, **more)

            made.nets.modules[role].forward = forward
        totals[weight] = made.method.loss(made.nets, made.batch())["total"]
    gap = heard["student"].clamp(max=80) - heard["target"].clamp(max=80)
    expected = totals["uniform"] / gap.clamp(min=1e-3).to(totals["uniform"])
    torch.testing.assert_close(totals["inverse_gap"], expected, rtol=1e-4, atol=1e-7)
    assert float(gap.max() / gap.min()) > 3
    # By measurement on the exact toy; LCM's own is the paper's.
    torch.testing.assert_close(totals[None], totals["uniform" if name == "lcm" else "inverse_gap"])


@pytest.mark.parametrize(
    ("schedule", "second"),
    [
        ("vp", float(VP.from_betas().t_of_rho(torch.tensor(3.6021)).round())),
        ("flow", 3.6021 / 4.6021),
        ("trig", 1.3),
        # Its stock scheduler lists points of one grid.
        ("edm", EDM().few_step_grid(2)[1]),
    ],
)
def test_scms_second_time_is_at_one_noise_level(schedule, second):
    made = world("scm", steps=(1, 2, 4), schedule=schedule)
    sampling, at = made.method.sampling, made.nets.schedule
    assert sampling.grid(at, 2)[1] == pytest.approx(second, rel=1e-4)
    assert sampling.grid(at, 2)[0] == sampling.grid(at, 1)[0]
    assert len(sampling.grid(at, 4)) == 4
