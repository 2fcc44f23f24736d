"""iMF, DMF and AnyFlow: the identity, guidance inside, the conversion of a network, jumps with gradient."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
import worlds
from gaussians import EVERY_SCHEDULE, Affine, Oracle, batch_of, nets_of
from worlds import COUNT, world

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.families.sd import SD
from stepdistill.families.toy import KNOWN, MLP
from stepdistill.methods.meanflow import Point
from stepdistill.schedule import Flow, times_like

PLAIN = {"guidance_low": 1.0, "guidance_high": 1.0, "tell_guidance": False}


@EVERY_SCHEDULE
@pytest.mark.parametrize("name", ["imf", "dmf"])
def test_v_is_the_velocity_for_the_exact_average_velocity(name, schedule):
    settings = PLAIN | {"direction": "teacher", "equal_share": 0.0, "time_mean": 0.0, "time_std": 0.8}
    method = worlds.method(name, **settings, end_by="embedding")
    assert float(method.loss(nets_of(schedule), batch_of())["error"].max()) < 1e-7
    assert float(method.loss(nets_of(schedule, Affine()), batch_of())["error"].mean()) > 1e-2


def test_flow_maps_compose():
    """u(t, s) and then u(s, r) is u(t, r)."""
    student = Denoiser(Oracle(Flow()), "x0", Flow())
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]
    t, s, r = (times_like(time, x) for time in (0.9, 0.5, 0.2))
    middle = student(x, t, end=s).at(s)
    torch.testing.assert_close(student(middle, s, end=r).at(r), student(x, t, end=r).at(r), rtol=0, atol=1e-9)


def test_on_data_u_is_differentiated_along_the_networks_own_velocity():
    """Along eps - x0 its noise would be in the target."""
    method, nets, batch = worlds.method("imf", **PLAIN), nets_of(Flow(), Affine()), batch_of()
    at = method.point(nets, batch)
    own = nets.student(at.x_t, at.t, end=at.t).flow
    torch.testing.assert_close(method.along(nets, at, at.eps - batch.x0), own, rtol=0, atol=0)
    v = method.velocity(nets, batch, at)
    torch.testing.assert_close(v, at.eps - batch.x0, rtol=0, atol=0)


class Guided(torch.nn.Module):
    """x0 of a student that says, told omega, what guidance by omega is: no + omega (c - no)."""

    def forward(self, x_t, t, cond=None, guidance=None, end=None):
        return 0.5 * x_t + guidance[:, None] * 0.3 * cond[:, None]


def test_the_guided_target_is_what_a_network_that_is_right_says():
    method = worlds.method("imf", interval_low=0.2, interval_high=0.8)
    nets, batch = nets_of(Flow(), Guided()), batch_of()
    batch.cond, batch.uncond = torch.ones(COUNT), torch.zeros(COUNT)
    t = torch.linspace(0.1, 0.9, COUNT, dtype=torch.float64)
    omega, dropped = torch.full_like(t, 3.0), torch.arange(COUNT) == 8
    # Of data whose velocity is the conditional one.
    x_t = batch.x0
    said = nets.student(x_t, t, batch.cond, guidance=torch.ones_like(t), end=t)
    batch.x0, eps = said.x0, said.eps
    at = Point(x_t, t, t, eps, batch.cond, dropped, {"guidance": omega})
    inside = (t >= 0.2) & (t <= 0.8) & ~dropped
    right = nets.student(x_t, t, batch.cond, guidance=torch.where(inside, omega, 1.0), end=t).flow
    torch.testing.assert_close(method.velocity(nets, batch, at), right, rtol=1e-9, atol=1e-9)
    assert inside.any() and not inside.all()


@pytest.mark.parametrize("name", ["imf", "dmf"])
def test_the_teachers_velocity_is_guided_by_what_the_student_is_told(name):
    """u_no + omega (u_c - u_no) inside the interval; a student told nothing has the one omega there is."""
    told = name == "imf"
    scales = {
        "guidance_low": 2.0 if told else 3.0,
        "guidance_high": 8.0 if told else 3.0,
        "interval_high": 0.6,
    }
    made = world(name, direction="teacher", tell_guidance=told, **scales)
    batch = made.batch()
    at = made.method.point(made.nets, batch)
    assert set(at.told) == ({"guidance"} if told else set())
    assert not told or at.told["guidance"].unique().numel() == COUNT
    inside = (at.t <= 0.6) & ~at.dropped
    omega = torch.where(inside, at.told.get("guidance", torch.full_like(at.t, 3.0)), 1.0)
    with_, without = (
        made.nets.teacher(at.x_t, at.t, cond, in_schedule=Flow()).flow for cond in (batch.cond, batch.uncond)
    )
    right = without + omega[:, None] * (with_ - without)
    torch.testing.assert_close(
        made.method.velocity(made.nets, batch, at), right.float(), rtol=1e-4, atol=1e-5
    )
    assert inside.any() and not inside.all() and float((with_ - without)[inside].abs().max()) > 1e-2


def test_omega_is_an_input_when_it_is_sampled():
    method = worlds.method("imf", guidance_low=2.0, guidance_high=8.0)
    assert method.sampling.inputs == ("guidance", "end") and method.sampling.scale == pytest.approx(4)
    omega = method.omega(batch_of(400))
    assert 2 <= float(omega.min()) < 2.2 and 7.5 < float(omega.max()) <= 8
    for wrong in ({"guidance_low": 9.0}, {"tell_guidance": False}, {"kappa": 0.5}):
        with pytest.raises(UserError, match=r"method\.(guidance_low|tell_guidance|guidance_scale)"):
            worlds.method("imf", **wrong)


@pytest.mark.parametrize("inputs", [("end_by_depth",), ("guidance", "end_by_depth")])
def test_a_converted_unet_is_the_teacher_until_it_jumps(inputs):
    """And needs no weight that the teacher lacks, unless guidance is an input as well."""
    family = SD(SD.Config(teacher=str(tiny.directory("sd15"))))
    teacher, student = family.teacher, family.student("teacher", inputs)
    x, cond = torch.randn(2, *family.shape), family.encode(["a", "b"])
    t, r = torch.tensor([700.0, 300.0]), torch.tensor([200.0, 0.0])
    told = {"guidance": torch.full((2,), 3.0)} if "guidance" in inputs else {}
    with torch.no_grad():
        expected = teacher(x, t, cond).raw
        torch.testing.assert_close(student(x, t, cond, end=t, **told).raw, expected, rtol=1e-4, atol=1e-5)
        assert float((student(x, t, cond, end=r, **told).raw - expected).abs().max()) > 1e-3
        # Untold it is as before: nothing is left behind.
        torch.testing.assert_close(student(x, t, cond, **told).raw, expected, rtol=1e-4, atol=1e-5)
    assert (student.state_dict().keys() == teacher.state_dict().keys()) == (not told)
    # As --dry-run counts it, on tensors without content.
    student.to("meta")
    shadow = [each.to("meta") for each in (x, t, cond, r)]
    told = {name: each.to("meta") for name, each in told.items()}
    assert student(*shadow[:3], end=shadow[3], **told).raw.shape == x.shape


def test_a_converted_mlp_is_the_teacher_until_it_jumps():
    net = MLP(Flow())
    x, t = torch.randn(4, 2), torch.linspace(0.2, 0.9, 4)
    net.requires_grad_(False)
    expected = net(x, t)
    net.add_end_by_depth()
    torch.testing.assert_close(net(x, t, end=t), expected, rtol=1e-5, atol=1e-6)
    assert float((net(x, t, end=t / 2) - expected).abs().max()) > 1e-3
    # Of less noise than it was fitted at it has no notion: there all ends are one, and no jump from there moves it.
    least = Flow().t_of_rho(torch.full((4,), KNOWN))
    torch.testing.assert_close(net(x, t, end=0 * t), net(x, t, end=least), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net(x, least / 2, end=least / 4), net(x, least / 2), rtol=1e-5, atol=1e-6)


def test_dmfs_weight_is_the_logarithm_of_the_error_at_its_noise():
    method, nets = worlds.method("dmf", **PLAIN), nets_of(Flow(), Affine())
    at = method.point(nets, batch_of())
    squared = torch.linspace(0.1, 2.0, COUNT, dtype=torch.float64)
    # At the start s = 0.
    torch.testing.assert_close(
        method.weighed(nets, squared, at), (squared + 0.01).log(), rtol=1e-6, atol=1e-6
    )


def test_dmfs_level_is_of_a_mean_over_elements_and_of_the_noise_that_is_left():
    made = world("dmf")
    torch.nn.init.normal_(made.nets.weighting.leave.weight)
    at = made.method.point(made.nets, made.batch())
    squared, level = torch.linspace(0.1, 2.0, COUNT), made.nets.weighting(Flow().rho(at.t)).detach()
    right = (squared / 2 * (-level).exp() + 0.01).log() + level
    torch.testing.assert_close(made.method.weighed(made.nets, squared, at), right, rtol=1e-5, atol=1e-5)
    assert at.x_t.shape[1:] == (2,) and float(level.std()) > 0.1 and not at.t.equal(at.r)


def test_dmf_without_a_learned_weight_has_imfs():
    settings = {"weight_power": 0.5, "weight_c": 0.1, **PLAIN}
    method = worlds.method("dmf", learned_weight=False, **settings)
    nets = nets_of(Flow(), Affine())
    assert method.networks(nets.teacher, nets.student) == {}
    assert [phase.trains for phase in method.phases(0)] == [("student",)]
    at, squared = method.point(nets, batch_of()), torch.linspace(0.1, 2.0, COUNT, dtype=torch.float64)
    theirs = worlds.method("imf", direction="teacher", **settings).weighed(nets, squared, at)
    torch.testing.assert_close(method.weighed(nets, squared, at), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_dmfs_weight_is_meanflows_with_a_level_of_its_own(power):
    method, nets = worlds.method("dmf", weight_power=power, weight_c=0.1, **PLAIN), nets_of(Flow(), Affine())
    torch.nn.init.constant_(nets.weighting.leave.bias, -0.7)
    at = method.point(nets, batch_of())
    squared = torch.linspace(0.1, 2.0, COUNT, dtype=torch.float64).requires_grad_()
    method.weighed(nets, squared, at).sum().backward()
    level = torch.tensor(-0.7, dtype=torch.float64).exp()
    expected = (squared.detach() / level + 0.1) ** -power / level
    torch.testing.assert_close(squared.grad, expected, rtol=1e-5, atol=1e-6)
    # The level rests where the error it is told from is 1, for power 0.
    risen = (1 - squared.detach() * expected).sum().float()[None]
    torch.testing.assert_close(nets.weighting.leave.bias.grad, risen, rtol=1e-5, atol=1e-5)


def test_points_that_go_nowhere_have_a_density_of_their_own():
    """r = t, lognormal of equal_mean and equal_std; all others are as imf's."""
    settings = {"equal_mean": -2.0, "equal_std": 0.1, "time_mean": 2.0, "end_mean": 1.0, **PLAIN}
    for share, count in ((1.0, 400), (0.5, 400), (0.0, 400)):
        method = worlds.method("dmf", equal_share=share, **settings)
        t, r = method.times(nets_of(Flow(), Affine()), batch_of(count))
        same, rho = t == r, Flow().rho(t)
        assert abs(float(same.float().mean()) - share) < 0.1
        assert not same.any() or abs(float(rho[same].log().mean()) + 2) < 0.05
        assert same.all() or float(rho[~same].log().mean()) > 1.5
        assert bool((r <= t).all())


def test_anyflow_jumps_three_times_at_most_and_each_with_gradient():
    made = world("anyflow", steps=(1, 2, 8), schedule="flow")
    seen = []
    made.nets.student.register_forward_hook(lambda *call: seen.append(call[-1].raw))
    grid = made.method.sampling.grid(made.nets.schedule, 8)
    counts, steps = set(), set()
    for step in range(40):
        seen.clear()
        batch = made.batch(step)
        x0 = made.method.generate(made.nets, batch).x0
        counts.add(len(seen))
        slopes = torch.autograd.grad(x0.sum(), seen)
        assert all(float(slope.abs().sum()) > 0 for slope in slopes)
        places = made.method.places(made.nets, made.batch(step))
        assert len(places) == len(seen) and places[0] == grid[0] and places == sorted(places, reverse=True)
        # The one before the last jump is a step of the sampler's, in two steps or eight.
        steps.add(tuple(grid.index(place) for place in places if place in grid))
    assert counts == {1, 2, 3}
    assert {step for step in steps if len(step) == 3} <= {(0, k, k + 1) for k in range(1, 7)}


def test_anyflows_answer_is_where_the_jumps_from_the_batchs_noise_end():
    made = world("anyflow", steps=(1, 2, 8), schedule="flow")
    for step in range(6):
        twin, schedule = made.batch(step), made.nets.schedule
        places = made.method.places(made.nets, twin)
        x = made.method.sampling.first_input(schedule, twin.randn(), places[0])
        for t, end in itertools.pairwise((*places, schedule.t_min)):
            t, end = times_like(t, x), times_like(end, x)
            said = made.nets.student(x, t, twin.cond, end=end)
            x = said.at(end)
        x0 = made.method.generate(made.nets, made.batch(step)).x0
        torch.testing.assert_close(x0, said.x0, rtol=1e-5, atol=1e-5)


def test_the_flow_maps_loss_counts_as_its_weight_says():
    method = worlds.method("anyflow", flow_map_weight=0.3)
    (student, _) = method.phases(0)
    assert student.terms == ((1.0, method.student_loss), (0.3, method.flow_map_loss))


def test_without_the_flow_maps_loss_anyflow_needs_no_images():
    assert worlds.method("anyflow").needs_images
    assert not worlds.method("anyflow", flow_map_weight=0.0).needs_images
    with pytest.raises(UserError, match=r"method\.flow_map\.guidance_low"):
        worlds.method("anyflow", flow_map={"guidance_low": 9.0, "guidance_high": 8.0, "tell_guidance": False})


def test_what_a_flow_maps_section_leaves_out_is_anyflows_own():
    """Not iMF's, which learns from data, told the scale."""
    for given in ({}, {"weight_power": 0.5}):
        flow_map = worlds.method("anyflow", flow_map=given).flow_map.config
        assert (flow_map.direction, flow_map.guidance_low, flow_map.guidance_high) == ("teacher", 1.0, 1.0)
        assert not flow_map.tell_guidance


def test_anyflow_draws_its_places_itself():
    with pytest.raises(UserError, match=r"method\.simulated=passes .* leave it out"):
        worlds.method("anyflow", simulated="passes")


@pytest.mark.parametrize("direction", ["teacher", "data"])
def test_every_process_makes_the_same_passes(direction):
    """Whatever omega its samples drew: with networks in shards the others wait in each."""
    made, passes = world("imf", direction=direction), []
    for network in made.nets.modules.values():
        network.register_forward_pre_hook(lambda *_: passes.append(1))
    counts = set()
    for step in range(40):
        passes.clear()
        at = made.method.point(made.nets, batch := made.batch(step, count=1))
        made.method.velocity(made.nets, batch, at)
        counts.add(len(passes))
    assert len(counts) == 1
