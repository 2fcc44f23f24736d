"""Games and penalties against closed forms, heads, and taps against a plain forward."""

from __future__ import annotations

import pytest
import torch
import worlds

from stepdistill.discriminator import (
    Adversarial,
    Discriminator,
    Head,
    chosen_blocks,
    discriminator_losses,
    generator_loss,
)
from stepdistill.errors import UserError
from stepdistill.features import block_features
from stepdistill.losses import GAN_LOSSES, approximate_r1, r1

GAMES = pytest.mark.parametrize("game", GAN_LOSSES)


def logits(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None].requires_grad_()


def points(count: int = 64, dims: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_hinge_is_flat_beyond_its_margin_and_has_slope_one_within():
    real, fake = logits(1.5, 0.2, -3.0), logits(-1.5, -0.2, 3.0)
    discriminator, generator = GAN_LOSSES["hinge"]
    values = discriminator(real, fake)
    torch.testing.assert_close(values, torch.tensor([0.0, 1.6, 8.0], dtype=torch.float64))
    values.sum().backward()
    assert real.grad[:, 0].tolist() == [0, -1, -1] and fake.grad[:, 0].tolist() == [0, 1, 1]
    assert torch.equal(generator(fake), -fake[:, 0])


def test_the_relativistic_game_sees_differences_only():
    discriminator, generator = GAN_LOSSES["relativistic"]
    real, fake = logits(0.3, 2.0), logits(-0.1, 5.0)
    torch.testing.assert_close(discriminator(real, fake), discriminator(real + 7, fake + 7))
    # The roles are exchanged.
    torch.testing.assert_close(generator(fake, real), discriminator(fake, real))
    closed = torch.log1p((fake - real).exp())[:, 0]
    torch.testing.assert_close(discriminator(real, fake), closed)


@GAMES
def test_the_generator_climbs_and_the_discriminator_tells_apart(game):
    discriminator, generator = GAN_LOSSES[game]
    real, fake = logits(0.1), logits(-0.2)
    slope_real, slope_fake = torch.autograd.grad(discriminator(real, fake).sum(), (real, fake))
    assert float(slope_real) < 0 < float(slope_fake)
    (slope,) = torch.autograd.grad(generator(fake, real).sum(), fake)
    assert float(slope) < 0


@GAMES
def test_no_pull_on_a_discriminator_that_cannot_tell_equal_distributions_apart(game):
    """Logits 0 on two samples of one distribution: D's expected gradient, a linear critic's, is 0."""
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    x = points(4096)
    GAN_LOSSES[game][0](x @ weight[:, None], x.flip(0) @ weight[:, None]).mean().backward()
    assert float(weight.grad.abs().max()) < 1e-12
    # And it is the minimum: any other weight is worse. The hinge is flat there, so not better.
    worse = GAN_LOSSES[game][0](x @ torch.ones(3, 1).double(), x.flip(0) @ torch.ones(3, 1).double()).mean()
    at_zero = GAN_LOSSES[game][0](x[:, :1] * 0, x[:, :1] * 0).mean()
    assert float(worse) > float(at_zero)


def quadratic(x: torch.Tensor) -> torch.Tensor:
    """Two logits, of mean |x|^2 / 2: a critic whose gradient is x itself."""
    half = x.square().sum(1, keepdim=True) / 2
    return torch.cat((half - x[:, :1], half + x[:, :1]), 1)


def test_r1_is_the_squared_slope_and_can_be_differentiated():
    x = points(6).requires_grad_()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    value = r1(scale * quadratic(x), x)
    torch.testing.assert_close(value, 1.5**2 * x.square().sum(1))
    (by_scale,) = torch.autograd.grad(value.sum(), scale)
    torch.testing.assert_close(by_scale, 2 * 1.5 * x.detach().square().sum())


def test_the_finite_difference_tends_to_r1():
    """In expectation over the nudge: E (g . n)^2 = |g|^2, with an error of order delta^2."""
    x = torch.tensor([[0.7, -0.4, 1.1]], dtype=torch.float64)
    nudge = points(200_000, seed=1)
    many = x.expand(len(nudge), -1)
    exact = float(x.square().sum())
    for delta in (0.1, 0.01):
        value = float(approximate_r1(quadratic(many), quadratic(many + delta * nudge), delta).mean())
        # (g.n + delta |n|^2 / 2)^2: the cross term has mean 0, the square adds delta^2 E|n|^4 / 4 = 15/4 delta^2.
        expected = exact + delta**2 * 15 / 4
        assert value == pytest.approx(expected, rel=5 * (2 / len(nudge)) ** 0.5)


@pytest.mark.parametrize("kind", ["exact", "finite"])
def test_penalties_are_taken_at_the_noised_input_the_critic_saw(kind):
    """real and fake are told apart by their own critics; the penalty of each is at its own x_t."""
    real, fake = points(5, seed=2), 3 * points(5, seed=3)
    config = Adversarial("non_saturating", r1_weight=0.5, r1=kind, r1_delta=1e-4, r2=True)
    nudge = points(5, seed=4)
    heard = []

    def critic(x):
        heard.append(x.detach().clone())
        return quadratic(x)

    losses = discriminator_losses(config, (critic, real), (critic, fake), lambda: nudge)

    def expected(x):
        return x.square().sum(1) if kind == "exact" else (x * nudge).sum(1).square()

    torch.testing.assert_close(losses["r1"], expected(real), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(losses["r2"], expected(fake), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(losses["total"], losses["gan"] + 0.5 * (losses["r1"] + losses["r2"]))
    at = [real, real + 1e-4 * nudge, fake, fake + 1e-4 * nudge] if kind == "finite" else [real, fake]
    for a, b in zip(heard, at, strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_penalty_no_second_call_is_made():
    calls = []
    losses = discriminator_losses(
        Adversarial(),
        (lambda x: calls.append(1) or x, points(4)),
        (lambda x: calls.append(2) or x, points(4)),
        points,
    )
    assert calls == [1, 2] and "r1" not in losses
    torch.testing.assert_close(losses["total"], losses["gan"])


@GAMES
def test_the_real_ones_are_played_again_against_misaligned_fakes(game):
    """Both games pull on the real logits."""
    real, fake, other = logits(0.3, -0.6), logits(-0.1, 0.4), logits(0.2, -0.5)
    critics = [(lambda _, each=each: each, each.detach()) for each in (real, fake, other)]
    losses = discriminator_losses(Adversarial(game), *critics[:2], points, critics[2])
    play = GAN_LOSSES[game][0]
    expected = play(real, fake) + play(real, other)
    torch.testing.assert_close(losses["total"], expected)
    ours, theirs = (
        torch.autograd.grad(each.sum(), (real, fake, other)) for each in (losses["total"], expected)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_accuracy_counts_samples_told_right():
    real, fake = logits(1.0, 2.0, -1.0), logits(-1.0, 3.0, -2.0)
    for game, expected in (("hinge", 4 / 6), ("relativistic", 2 / 3)):
        told = discriminator_losses(
            Adversarial(game), (lambda _: real, real.detach()), (lambda _: fake, fake.detach()), points
        )
        assert float(told["accuracy"]) == pytest.approx(expected)


@GAMES
@pytest.mark.parametrize("how", ["mean", "sum"])
def test_every_head_counts_alike_however_many_places_it_has(game, how):
    """Stable Diffusion's middle block has 64 places of 11,000: side by side it would be half a percent of the loss."""
    torch.manual_seed(0)
    heads = Discriminator([4, 6], width=16)
    real, fake = ([torch.randn(3, 4, 2, 5), torch.randn(3, 6, 1, 1)] for _ in range(2))
    assert [each.shape for each in heads(real)] == [(3, 10), (3, 1)]
    config = Adversarial(game, heads=how)
    told = discriminator_losses(
        config, (lambda _: heads(real), points(3)), (lambda _: heads(fake), points(3)), points
    )
    play, answer = GAN_LOSSES[game]
    each = [play(head(r), head(f)) for head, r, f in zip(heads.heads, real, fake, strict=True)]
    torch.testing.assert_close(told["gan"], (each[0] + each[1]) / (2 if how == "mean" else 1))
    each = [answer(head(f), head(r)) for head, r, f in zip(heads.heads, real, fake, strict=True)]
    said = generator_loss(config, heads(fake), heads(real) if game == "relativistic" else None)
    torch.testing.assert_close(said, (each[0] + each[1]) / (2 if how == "mean" else 1))
    means = [
        sum(head(r).mean(1) for head, r in zip(heads.heads, many, strict=True)) / 2 for many in (real, fake)
    ]
    torch.testing.assert_close(told["real_logit"], means[0])
    torch.testing.assert_close(told["fake_logit"], means[1])


@pytest.mark.parametrize("kind", ["exact", "finite"])
@pytest.mark.parametrize("how", ["mean", "sum"])
def test_the_penalty_is_of_all_heads_together(kind, how):
    """D = a.x averaged or summed with b.x over three places: its slope is (a + b) / 2 or a + b."""
    a, b = torch.tensor([1.0, 2.0, -1.0]).double(), torch.tensor([0.5, 0.0, 3.0]).double()

    def critic(x):
        return [(x @ a)[:, None], (x @ b)[:, None].expand(-1, 3)]

    config = Adversarial("hinge", r1_weight=1.0, r1=kind, r1_delta=1e-3, heads=how)
    nudge = points(4, seed=3)
    told = discriminator_losses(config, (critic, points(4)), (critic, points(4)), lambda: nudge)
    slope = (a + b) / (2 if how == "mean" else 1)
    expected = slope.square().sum().expand(4) if kind == "exact" else (nudge @ slope).square()
    torch.testing.assert_close(told["r1"], expected, rtol=1e-6, atol=1e-9)


def test_the_papers_that_sum_over_heads_do():
    assert {name: worlds.method(name).config.heads for name in ("add", "ladd", "lightning")} == {
        "add": "sum",
        "ladd": "sum",
        "lightning": "mean",
    }


def test_a_head_reads_maps_tokens_and_vectors_alike():
    torch.manual_seed(0)
    head = Discriminator([8], width=16).heads[0]
    tokens = torch.randn(2, 12, 8)
    as_map = tokens.transpose(1, 2).reshape(2, 8, 3, 4)
    torch.testing.assert_close(head(as_map), head(tokens))
    torch.testing.assert_close(head(tokens[:, 0]), head(tokens[:, :1]))


def test_a_residual_head_sees_the_places_around_it_and_no_further():
    torch.manual_seed(0)
    head = Discriminator([8], width=16, kernel=3).heads[0]
    # Group norms over all places would carry every change everywhere.
    head.norm, head.mix[1] = torch.nn.Identity(), torch.nn.Identity()
    before = torch.randn(2, 8, 5, 6)
    after = before.clone()
    after[:, :, 2, 3] += 1
    moved = (head(after) - head(before)).unflatten(1, (5, 6)) != 0
    assert moved[:, 1:4, 2:5].all() and moved.sum() == 2 * 9

    tokens = before.flatten(2).transpose(1, 2)
    changed = tokens.clone()
    changed[:, 10] += 1
    moved = head(changed) - head(tokens) != 0
    assert moved[:, 9:12].all() and moved.sum() == 2 * 3
    # A vector has no neighbours.
    assert head(tokens[:, 0]).shape == (2, 1)


@pytest.mark.parametrize("name", ["ladd", "add", "lightning"])
def test_a_residual_head_of_even_side_is_refused(name):
    with pytest.raises(UserError, match=r"method\.head_kernel must be odd and at least 1, got 2"):
        worlds.method(name, head_kernel=2)


def test_tapped_features_equal_a_plain_forwards(tiny_sd):
    """Every block of a stock UNet, against the outputs of a forward nobody cut short."""
    from stepdistill.families.sd import SD

    family = SD(SD.Config(teacher=str(tiny_sd)))
    teacher, unet = family.teacher, family.teacher.network.unet
    x, t = torch.randn(2, *family.shape), torch.tensor([10.0, 700.0], dtype=torch.float64)
    cond = family.encode(["a red circle", "a blue square"])
    names = list(chosen_blocks(teacher, "all"))
    ours = block_features(teacher, x, t, cond, names)
    plain = {}
    handles = [
        module.register_forward_hook(lambda m, i, out, name=name: plain.__setitem__(name, out))
        for name, module in unet.named_modules()
    ]
    unet(x, t.float(), cond)
    for handle in handles:
        handle.remove()
    assert len(names) == 5
    for name, feature in zip(names, ours, strict=True):
        out = plain[name.removeprefix("network.unet.")]
        assert torch.equal(feature, out if isinstance(out, torch.Tensor) else out[0])
    assert [f.shape[1] for f in ours] == list(chosen_blocks(teacher, "all").values())
    assert list(chosen_blocks(teacher, "half")) == names[:3] and list(chosen_blocks(teacher, "middle")) == [
        names[2]
    ]


def test_a_head_is_conditioned_by_projection():
    torch.manual_seed(0)
    heads = Discriminator([5], width=16, condition=7)
    feature, told = torch.randn(3, 4, 5), torch.randn(3, 7)
    head = heads.heads[0]
    (plain,), (conditional,) = heads([feature], torch.zeros(3, 7)), heads([feature], told)
    hidden = torch.nn.functional.silu(head.norm(head.enter(feature).transpose(1, 2)).transpose(1, 2))
    expected = torch.einsum("bpw,bw->bp", hidden, head.project(told)) / 4
    torch.testing.assert_close(conditional - plain, expected)


def test_what_is_judged_gets_no_gradient_from_the_discriminators_step():
    """Whatever made it, and whether or not a penalty looks at its slope."""
    for settings in ({}, {"r1_weight": 1.0, "r1": "exact", "r2": True}):
        x = torch.randn(4, 3, requires_grad=True)
        heads = torch.nn.Linear(3, 2)
        losses = discriminator_losses(
            Adversarial(**settings), (heads, 2 * x), (heads, 3 * x), lambda: torch.randn(4, 3)
        )
        assert torch.autograd.grad(losses["total"].sum(), x, allow_unused=True) == (None,)


def test_a_head_that_looks_around_keeps_its_size():
    plain, wide = Head(3, width=16), Head(3, width=16, kernel=3)
    wide.load_state_dict(plain.state_dict(), strict=False)
    # Its convolution says nothing.
    torch.nn.init.zeros_(wide.mix[0].weight), torch.nn.init.zeros_(wide.mix[0].bias)
    features = torch.randn(2, 3, 4, 4)
    bias = plain.leave.bias
    torch.testing.assert_close(wide(features) - bias, (plain(features) - bias) * 0.5**0.5)
