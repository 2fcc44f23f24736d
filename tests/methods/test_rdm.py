"""RDM (arXiv 2604.28190, 2607.02375): the two distances, the cached gradient, who may judge."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import worlds
from worlds import COUNT, world

from stepdistill import assets
from stepdistill.errors import UserError
from stepdistill.eyes import ClipEye, Eye, FourierEye
from stepdistill.methods.base import Networks
from stepdistill.representation import Moments, frechet, mmd
from training.measure import check_judge
from training.sections import RunConfig

ROOT = Path(__file__).resolve().parents[2]


def drawn(count: int = 24, width: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_moments(x: torch.Tensor, real: torch.Tensor, memory: float = 0.0) -> torch.Tensor:
    return frechet(*Moments([x.shape[1]]).blended(0, x, real, memory))


@pytest.mark.parametrize("distance", [of_moments, mmd])
def test_the_gradient_is_that_of_differences(distance):
    x, real = drawn(6).requires_grad_(), 0.5 + drawn(8, seed=1)
    assert torch.autograd.gradcheck(lambda x: distance(x, real), (x,), eps=1e-6, atol=1e-6)


def test_the_frechet_distance_is_0_on_itself_and_the_closed_form_of_gaussians():
    x = drawn(400)
    assert float(of_moments(x, x)) == pytest.approx(0, abs=1e-9)
    mean, real_mean = torch.tensor([[1.0, 0.0], [-1.0, 2.0]], dtype=torch.float64)
    stds, real_stds = torch.tensor([[1.0, 0.5], [2.0, 0.1]], dtype=torch.float64)
    found = frechet(mean, torch.diag(stds**2), real_mean, torch.diag(real_stds**2))
    expected = (mean - real_mean).square().sum() + (stds - real_stds).square().sum()
    assert float(found) == pytest.approx(float(expected))


def test_directions_without_spread_have_a_finite_gradient():
    """More features than samples: clamped roots of zeros would make it NaN."""
    x = drawn(4, 9).requires_grad_()
    of_moments(x, drawn(4, 9, seed=1)).backward()
    assert bool(torch.isfinite(x.grad).all()) and float(x.grad.abs().sum()) > 0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_features_that_are_not_finite_make_the_distance_nan_and_are_forgotten(wrong):
    """So that `run.on_nonfinite` decides, and what was seen before stays."""
    held, good, bad = Moments([3]), drawn(), drawn(seed=1)
    held.update([(good, good)], memory=0.9)
    bad[2, 1] = wrong
    assert (
        frechet(*held.blended(0, bad, good, 0.9)).isnan()
        and frechet(*held.blended(0, good, bad, 0.9)).isnan()
    )
    before = held.generated_0.clone(), held.real_0.clone()
    held.update([(bad, bad)], memory=0.9)
    assert torch.equal(held.generated_0, before[0]) and torch.equal(held.real_0, before[1])
    # Of either side: both are of as many updates.
    held.update([(bad, drawn(seed=2))], memory=0.9)
    assert torch.equal(held.real_0, before[1]) and held.updates == 1


def test_autocast_leaves_mmd_alone():
    """Its distances are differences of products that are larger than they are."""
    x, real = (5 + drawn(16, seed=i).float() for i in range(2))
    plain = mmd(x.requires_grad_(), real)
    (slope,) = torch.autograd.grad(plain, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = mmd(x, real)
    assert torch.equal(cast, plain) and torch.equal(torch.autograd.grad(cast, x)[0], slope)


def test_mmd_is_unbiased_and_grows_with_a_shift():
    same = torch.stack([mmd(drawn(32, seed=2 * i), drawn(32, seed=2 * i + 1)) for i in range(60)])
    assert abs(float(same.mean())) < 4 * float(same.std()) / 60**0.5
    apart = [float(mmd(drawn(64) + shift, drawn(64, seed=1))) for shift in (0.0, 0.5, 1.0)]
    assert apart == sorted(apart) and apart[-1] > 0.05


def test_running_moments_are_means_at_first_and_then_forget():
    held, batches = Moments([3]), [drawn(seed=i) for i in range(4)]
    for batch in batches[:3]:
        held.update([(batch, batch)], memory=0.9)
    m, s, *_ = held.blended(0, batches[3], batches[3], 0.9)
    everything = torch.cat(batches)
    torch.testing.assert_close(m, everything.mean(0))
    torch.testing.assert_close(s, torch.cov(everything.T, correction=0))
    held.updates.fill_(1000)
    later = held.blended(0, batches[3], batches[3], 0.9)[0]
    torch.testing.assert_close(later, 0.9 * torch.cat(batches[:3]).mean(0) + 0.1 * batches[3].mean(0))


@pytest.mark.parametrize("distance", ["mmd", "fd"])
def test_a_gaussian_student_reaches_the_datas_mean_and_covariance(distance):
    """From a unit one; the running moments give the gradient of a batch its share alone, and do not bias where it ends."""
    true = torch.tensor([[1.2, 0.0], [0.7, 0.4]], dtype=torch.float64), torch.tensor([1.5, -1.0]).double()
    factor = torch.eye(2, dtype=torch.float64).requires_grad_()
    mean = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer, held = torch.optim.Adam([factor, mean], lr=0.03), Moments([2])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 300)
    for step in range(300):
        real = drawn(256, 2, 2 * step) @ true[0].T + true[1]
        ours = drawn(256, 2, 2 * step + 1) @ factor.T + mean
        loss = mmd(ours, real) if distance == "mmd" else frechet(*held.blended(0, ours, real, 0.9))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        held.update([(ours.detach(), real)], 0.9)
    torch.testing.assert_close(mean.detach(), true[1], atol=0.05, rtol=0)
    torch.testing.assert_close((factor @ factor.T).detach(), true[0] @ true[0].T, atol=0.12, rtol=0)


@pytest.mark.parametrize("distance", ["mmd", "fd"])
def test_cached_chunks_have_the_gradient_of_one_statistic_over_all(distance):
    """Which the mean of the chunks' own statistics has not."""
    made = world("rdm", distance=distance, chunks=3, encoders=worlds.SETTINGS["rdm"]["encoders"])
    student, method = list(made.nets.student.parameters()), made.method
    ours = torch.autograd.grad(method.loss(made.nets, made.batch())["total"].mean(), student)
    batch = made.batch()
    real = method.encoders.features(batch.x0, batch.prompts)[0]
    first = method.sampling.grid(made.nets.schedule, 1)[0]
    chunks = []
    for _ in range(3):
        x = method.sampling.first_input(made.nets.schedule, batch.randn(), first)
        x0 = made.nets.student(x, torch.full((COUNT,), first, dtype=torch.float64), batch.cond).x0
        chunks.append(method.encoders.features(x0, batch.prompts)[0])

    def statistic(features: torch.Tensor) -> torch.Tensor:
        return mmd(features, real) if distance == "mmd" else of_moments(features, real)

    whole = torch.autograd.grad(statistic(torch.cat(chunks)), student, retain_graph=True)
    parts = torch.autograd.grad(sum(map(statistic, chunks)) / 3, student)
    for a, b in zip(ours, whole, strict=True):
        torch.testing.assert_close(a, b.to(a), rtol=1e-3, atol=1e-5)
    assert max(float((a - b).abs().max()) for a, b in zip(ours, parts, strict=True)) > 1e-4


class Looking(Eye):
    """Points at two places, theirs and the origin's mirror of it twice as far, and captions as one number."""

    widths, prompt_width = (2,), 1

    def features(self, images):
        return [torch.stack((images, -2 * images), 1)]

    def prompts(self, prompts, device):
        return torch.tensor([[float(each)] for each in prompts], device=device)


def test_features_are_means_over_places_beside_the_weighed_captions():
    made = world("rdm", prompt_weight=0.25, chunks=2, encoders=[{"name": f"{__name__}:Looking"}])
    batch = made.batch()
    (found,) = made.method.encoders.features(batch.x0, batch.prompts)
    told = torch.tensor([[0.25 * label] for label in batch.prompts])
    torch.testing.assert_close(found, torch.cat((-batch.x0 / 2, told), 1))
    # Classes will do for this eye, and not for CLIP.
    assert not made.method.needs_captions
    clip = [{"name": "clip"}]
    assert worlds.method("rdm", prompt_weight=0.25, encoders=clip).needs_captions
    assert not worlds.method("rdm", encoders=clip).needs_captions


def test_real_and_generated_samples_are_decoded_before_they_are_looked_at(monkeypatch):
    made, seen = world("rdm", chunks=2, encoders=[{"name": f"{__name__}:Looking"}]), []
    nets = Networks(made.nets.modules, made.nets.schedule, lambda x0: 3 * x0 + 1)
    plain = Looking.features
    monkeypatch.setattr(Looking, "features", lambda eye, x: seen.append(x.detach()) or plain(eye, x))
    batch = made.batch()
    made.method.loss(nets, batch)
    assert seen[0].equal(3 * batch.x0 + 1)
    first, twin = made.method.sampling.grid(nets.schedule, 1)[0], made.batch()
    for images in seen[1:]:
        x = made.method.sampling.first_input(nets.schedule, twin.randn(), first)
        x0 = nets.student(x, torch.full((COUNT,), first, dtype=torch.float64), twin.cond).x0
        torch.testing.assert_close(images, 3 * x0 + 1)
    assert len(seen) == 3


def test_encoders_count_as_their_weights_say():
    eyes = [
        {"name": "fourier", "arguments": {"width": width}, "weight": weight}
        for width, weight in ((8, 0.25), (4, 3.0))
    ]
    made = world("rdm", chunks=2, encoders=eyes)
    losses = made.method.loss(made.nets, made.batch())
    right = 0.25 * losses["distance_0"] + 3 * losses["distance_1"]
    torch.testing.assert_close(losses["total"], right.expand(COUNT))


def test_a_step_adds_its_features_to_the_running_moments():
    made = world("rdm", distance="fd", memory=0.9, chunks=2, encoders=worlds.SETTINGS["rdm"]["encoders"])
    method, moments = made.method, made.nets.moments
    held = Moments([2 * 8])
    for step in range(12):
        method.loss(made.nets, made.batch(step))
        (passed,) = method._seen
        held.update(passed, 0.9)
        method.after_step(made.nets, step, ("student",))
        assert method._seen == []
    for (_, one), (_, other) in zip(held.named_buffers(), moments.named_buffers(), strict=True):
        torch.testing.assert_close(one, other)
    assert float(moments.updates) == 12


def judged(metric: str) -> RunConfig:
    return RunConfig(steps=1, out="run", metric=metric, metric_every=10)


TRAINED_ON_CLIP = {
    "rdm": {"encoders": [{"name": "clip"}]},
    "reward": {},
    "add": {"eye": "clip"},
    "compose": {"parts": [{"name": "dmd2"}, {"name": "reward"}]},
}


@pytest.mark.parametrize("name", TRAINED_ON_CLIP)
def test_a_network_that_is_trained_on_is_refused_as_the_judge(name):
    method = worlds.method(name, **TRAINED_ON_CLIP[name])
    for metric in ("clip", "clip:scenes-v1", f"fd:{assets.path('clip')}"):
        with pytest.raises(UserError, match=r"run\.metric=.*its method trains on"):
            check_judge(judged(metric), method)
    for metric in ("fd", "fd:scenes-v1", "attributes"):
        check_judge(judged(metric), method)


@pytest.mark.parametrize("name", ["dmd2", "rdm", "add"])
def test_what_a_method_does_not_train_on_may_judge(name):
    own = {"rdm": {"encoders": [{"name": "fourier"}]}, "add": {"eye": "fourier"}}
    check_judge(judged("clip"), worlds.method(name, **own.get(name, {})))


def test_evaluation_computes_its_distances_itself():
    for path in (ROOT / "evaluation").rglob("*.py"):
        tree = ast.parse(path.read_text())
        named = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        named += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
        assert not [name for name in named if "representation" in name or name.endswith(".rdm")], path


@pytest.mark.parametrize("count", [1, 2])
def test_one_real_sample_is_refused_where_reals_are_compared(count):
    """And is enough, however few, where the past's moments stand beside it."""
    for distance in ("mmd", "fd"):
        made = world("rdm", **worlds.SETTINGS["rdm"], distance=distance)
        if (count, distance) == (1, "mmd"):
            with pytest.raises(UserError, match=r"set optim\.micro_batch_size to at least 2"):
                made.method.loss(made.nets, made.batch(count=1))
        else:
            total = made.method.loss(made.nets, made.batch(count=count))["total"]
            slopes = torch.autograd.grad(total.mean(), list(made.nets.student.parameters()))
            assert all(bool(torch.isfinite(slope).all()) for slope in slopes)


@pytest.mark.parametrize(
    "wrong", [{"steps": (1, 2)}, {"chunks": 0}, {"encoders": []}, {"encoders": [{"weight": -1}]}]
)
def test_what_it_cannot_do_is_refused(wrong):
    with pytest.raises(UserError, match=r"student\.steps|method\.(chunks|encoders)"):
        worlds.method("rdm", **wrong)


@pytest.mark.parametrize("name", ["rdm", "add"])
def test_arguments_that_no_eye_takes_are_named(name):
    given = {"name": "fourier", "arguments": {"foo": 1}}
    settings = (
        {"encoders": [{"name": "fourier"}, given]}
        if name == "rdm"
        else {"eye": "fourier", "arguments": {"foo": 1}}
    )
    where = r"method\.encoders\.1" if name == "rdm" else "method"
    method = worlds.method(name, **settings)
    # However often it is asked: the eye before it is not all there is.
    for _ in range(2):
        with pytest.raises(UserError, match=rf"^{where}\.arguments do not fit fourier: .*'foo'"):
            _ = method.trained_on


def test_eyes_refuse_what_they_cannot_look_at():
    with pytest.raises(UserError, match=r"makes \(3, 8, 8\); .* for images choose clip or dino"):
        FourierEye().features(torch.rand(2, 3, 8, 8))
    with pytest.raises(
        UserError, match=r"points of 3 numbers, and this family makes \(2,\); give its arguments dims"
    ):
        FourierEye(dims=3).features(torch.rand(4, 2))
    with pytest.raises(
        UserError, match=r"the eye clip looks at images .* makes \(2,\); for points choose fourier"
    ):
        ClipEye().features(torch.rand(4, 2))


def test_the_moments_are_of_all_passes_and_processes():
    """Of an iteration; those of halves, in passes or on two processes, are those of the whole."""
    settings = {"distance": "fd", "encoders": [{"name": "fourier", "arguments": {"width": 8}}], "chunks": 1}

    def after(*halves, average=None):
        made = world("rdm", **settings)
        features = drawn(16, made.nets.moments.real_0.shape[0] - 1)
        for rows in halves:
            made.method._seen.append([(features[rows], 2 * features[rows])])
        made.method.after_step(made.nets, 0, ("student",))
        if average:
            made.method.averaged(made.nets, average)
        return list(made.nets.moments.buffers())

    first, second, both = slice(0, 8), slice(8, 16), slice(0, 16)
    whole, theirs = after(both), after(second)
    torch.testing.assert_close(after(first, second), whole)
    torch.testing.assert_close(after(first, average=lambda value: (value + theirs.pop(0)) / 2), whole)
