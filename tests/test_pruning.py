"""Blocks that leave a network: which, what stands in their place, and that the rest is as it was."""

from __future__ import annotations

import copy
import hashlib
import inspect
from typing import ClassVar

import pytest
import tiny
import torch
from models import TOLD, family_of
from torch import nn

from stepdistill import export, load
from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.methods.ppcl import PPCL, matched
from stepdistill.pruning import Interval, Pruned, check, plug, recording, streams, with_blocks
from stepdistill.redundancy import Found, Probe, choose, cka, find, probes, stream_inputs
from stepdistill.schedule import Flow

# Of each family whose networks can be cut.
CUT = [
    "sd3",
    "sd3.5",
    "pixart-alpha",
    "dit",
    "sana",
    "flux-dev",
    "flux2-klein",
    "qwen-image",
    "z-image",
    "lumina2",
    "wan",
]
LAYERS = 5


def deep(variant: str):
    """A variant's family with five blocks in each list and weights off their first values, of which some are zero."""
    family = family_of(variant)
    face, model = family.teacher.network, family.teacher.network.model
    counts = dict.fromkeys(face.prunable.values(), LAYERS)
    if variant == "sd3.5":
        counts["dual_attention_layers"] = (0, 3)
    config = {key: value for key, value in model.config.items() if key != "_use_default_values"}
    torch.manual_seed(0)
    twin = type(face)(type(model).from_config(config | counts))
    for parameter in twin.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    family.teacher = Denoiser(twin, family.kind, family.schedule).eval().requires_grad_(False)
    return family


def inputs(family, count: int = 2):
    torch.manual_seed(1)
    t = torch.full((count,), 0.6 * family.schedule.t_max, dtype=torch.float64)
    return torch.randn(count, *family.shape), t, family.encode(TOLD[family.conditions][:count])


def without(denoiser: Denoiser, gone: list[Interval]):
    """Its output while all blocks of the intervals but the first hand on what they are given."""

    def skip(_block, args, kwargs, output):
        pair = not isinstance(output, torch.Tensor)
        given = stream_inputs(inspect.signature(_block.forward), args, kwargs, pair)
        return tuple(given) if pair else given[0]

    model = denoiser.network.model
    blocks = [model.get_submodule(each.stack)[i] for each in gone for i in each.blocks if i != each.first]
    return [block.register_forward_hook(skip, with_kwargs=True) for block in blocks]


@pytest.mark.parametrize("variant", CUT)
def test_a_deleted_block_is_an_identity_and_leaves_as_a_stock_pipeline(variant, tmp_path):
    """To the bit, in memory and after saving and reloading."""
    family = deep(variant)
    gone = [Interval(stack, 1, 2) for stack in family.teacher.network.prunable]
    x_t, t, cond = inputs(family)
    handles = without(family.teacher, gone)
    expected = family.teacher(x_t, t, cond).raw
    for handle in handles:
        handle.remove()
    pruned = Pruned(family.teacher, gone)
    assert torch.equal(pruned(x_t, t, cond).raw, expected)
    assert not torch.equal(family.teacher(x_t, t, cond).raw, expected)
    # The teacher is as it was.
    assert all(len(family.teacher.network.model.get_submodule(each.stack)) == LAYERS for each in gone)
    settings = {"family": {"name": family.name}, "method": {"name": "ppcl"}, "run": {"out": "runs/x"}}
    card = export.card_of(family, PPCL(PPCL.Config()), settings)
    export.write(family, pruned, tmp_path / "student", card)
    again = type(family).from_directory(tmp_path / "student", family.settings).teacher
    for stack, count in family.teacher.network.prunable.items():
        assert (
            again.network.model.config[count] == LAYERS - 1 == len(again.network.model.get_submodule(stack))
        )
    assert torch.equal(again(x_t, t, cond).raw, expected)
    # Plugged into the teacher from their files, intervals give the same.
    files = sorted((tmp_path / "student" / "intervals").iterdir())
    assert torch.equal(plug(family.teacher, files)(x_t, t, cond).raw, expected)


def digests(denoiser: Denoiser) -> dict[str, str]:
    return {
        name: hashlib.sha256(value.numpy().tobytes()).hexdigest()
        for name, value in denoiser.network.state_dict().items()
    }


def test_any_subset_is_plugged_in_and_all_else_stays_byte_for_byte(tmp_path):
    family = deep("flux-dev")
    gone = [Interval("transformer_blocks", 0, 1), Interval("single_transformer_blocks", 2, 4)]
    pruned = Pruned(family.teacher, gone)
    for parameter in pruned.parameters():
        parameter.data += 1
    pruned.write(tmp_path)
    assert torch.equal(plug(family.teacher, [])(*inputs(family)).raw, family.teacher(*inputs(family)).raw)
    before = digests(family.teacher)
    one = plug(family.teacher, [tmp_path / f"{gone[0]}.safetensors"])
    after = digests(one)
    # Blocks behind the interval moved by one; everything else has its name and its bytes.
    for name, digest in after.items():
        head, found, tail = name.partition("transformer.transformer_blocks.")
        index, _, rest = tail.partition(".")
        old = f"{head}{found}{int(index) + 1}.{rest}" if found else name
        assert (digest == before[old]) == (index != "0"), name
    assert digests(family.teacher) == before
    both = plug(family.teacher, sorted(tmp_path.iterdir()))
    assert len(both.network.model.single_transformer_blocks) == LAYERS - 2
    assert torch.equal(both(*inputs(family)).raw, pruned(*inputs(family)).raw)


def test_files_of_another_teacher_and_damaged_ones_are_refused(tmp_path):
    family = deep("flux-dev")
    path = (
        Pruned(family.teacher, [Interval("transformer_blocks", 0, 1)]).write(tmp_path)
        / "transformer_blocks.0-1.safetensors"
    )
    other = family.teacher.clone()
    for parameter in other.parameters():
        parameter.data *= 1.1
    with pytest.raises(UserError, match="distilled from another network"):
        plug(other, [path])
    # Held in half precision it is the same teacher.
    plug(copy.deepcopy(family.teacher).bfloat16(), [path])
    with pytest.raises(UserError, match="holds block 0, which another interval holds too"):
        plug(family.teacher, [path, path])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="is no file of an interval"):
        plug(family.teacher, [path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no intervals"):
        load(tiny.directory("flux-dev"), intervals=tmp_path / "empty")


@pytest.mark.parametrize(
    ("variant", "interval", "why"),
    [
        (
            "sd3",
            "transformer_blocks.3-4",
            "holds block 4, which cannot go: the last block leaves the text out",
        ),
        (
            "dit",
            "transformer_blocks.0-1",
            "holds block 0, which cannot go: the first block embeds time and class",
        ),
        ("flux-dev", "single_transformer_blocks.3-5", "goes beyond block 4"),
        ("flux-dev", "blocks.0-1", "it has transformer_blocks and single_transformer_blocks"),
        ("flux-dev", "transformer_blocks.2-1", "is no interval of blocks"),
        ("chroma", "transformer_blocks.0-1", "modulation by its place in a table"),
        ("hunyuan_dit", "blocks.0-1", "second half takes what the first leaves"),
        ("sdxl", "down_blocks.0-1", "those of a UNet differ in size"),
    ],
)
def test_blocks_that_cannot_go_are_refused_by_the_reason(variant, interval, why):
    family = deep(variant) if variant in CUT else family_of(variant)
    with pytest.raises(UserError, match=why) as caught:
        check(family.teacher.network, [Interval.parse(interval)])
    assert str(caught.value).count(".\n") == 0 and str(caught.value).endswith(".")


def test_what_a_replacement_is_given_is_the_teachers_and_a_copy_loses_nothing():
    """On [u, u] the copy of block u is block u: loss 0; on longer intervals the gradient is the replacements' alone."""
    family = deep("sd3")
    x_t, t, cond = inputs(family)
    same, longer = [Interval("transformer_blocks", 1, 1)], [Interval("transformer_blocks", 1, 3)]
    for intervals in (same, longer):
        student = Pruned(family.teacher, intervals)
        with torch.no_grad(), recording(family.teacher, intervals) as told:
            family.teacher(x_t, t, cond)
        made = student(told=told)
        cosine, length = matched(made[intervals[0]], told[intervals[0]].target)
        if intervals is same:
            assert float((1 - cosine).abs().max()) < 1e-6 and float(length.max()) == 0
            continue
        assert float((1 - cosine).min()) > 1e-4
        (2 * (1 - cosine) + length).sum().backward()
        assert all(parameter.grad is not None for parameter in student.parameters())
        assert all(parameter.grad is None for parameter in family.teacher.parameters())
    assert len(recording_hooks(family.teacher)) == 0


def recording_hooks(denoiser: Denoiser) -> list:
    return [
        hook for module in denoiser.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)
    ]


def test_the_loss_is_twice_one_minus_the_cosine_of_what_is_there():
    a, b = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    cosine = matched((a,), (b,))[0]
    apart = nn.functional.normalize(a, dim=-1) - nn.functional.normalize(b, dim=-1)
    expected = apart.square().sum(-1).mean(1)
    torch.testing.assert_close(2 * (1 - cosine), expected)
    # Scale shows in the second term alone; the text that a last block leaves out counts for nothing.
    scaled, longer = matched((a, 3 * b), (None, b))
    torch.testing.assert_close(scaled, torch.ones(2))
    torch.testing.assert_close(longer, torch.full((2,), float(torch.tensor(3.0).log().square())))
    b[:, 0] = 0
    torch.testing.assert_close(matched((b,), (b,))[0], torch.ones(2))


# ------------------------------------------------------------------------------------------------------ what is found


class Residual(nn.Module):
    """h + strength f(h): affine for `bent` = 0, and far from it for a large one."""

    def __init__(self, width: int, strength: float, bent: float):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.strength, self.bent = strength, bent

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        a = self.a(hidden_states)
        return hidden_states + self.strength * self.b(a + self.bent * torch.sin(3 * a))


class Stack(nn.Module):
    """A face over a list of such blocks: x_t (B, N, C) tokens."""

    prunable: ClassVar = {"layers": "count"}

    def __init__(self, blocks: list[Residual]):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(blocks)

    def fixed(self, stack: str) -> dict[int, str]:
        return {}

    def forward(self, x_t, t, cond):
        for block in self.model.layers:
            x_t = block(x_t)
        return x_t


def planted(*kinds: tuple[float, float], width: int = 8) -> tuple[Denoiser, list]:
    torch.manual_seed(0)
    network = Stack([Residual(width, strength, bent) for strength, bent in kinds]).requires_grad_(False)
    samples = [(torch.randn(64, 4, width), torch.zeros(64), None) for _ in range(2)]
    return Denoiser(network, "flow", Flow()), samples


# A first block that is bent a little, so that what is behind it shows.
FIRST, BENT, AFFINE = (0.3, 4.0), (1.0, 4.0), (1.0, 0.0)


def test_an_exactly_affine_block_leaves_no_residual():
    denoiser, samples = planted(AFFINE, BENT)
    made = probes(denoiser, "layers", samples, [0, 1])
    x_t = torch.randn(16, 4, 8)
    first, second = denoiser.network.model.layers
    torch.testing.assert_close(made[0](x_t), first(x_t), atol=1e-4, rtol=1e-4)
    error = (made[1](x_t) - second(x_t)).norm() / (second(x_t) - x_t).norm()
    assert 0.2 < float(error) < 1.0


def test_probes_take_text_and_image_of_joint_blocks():
    family = deep("sd3")
    sample = inputs(family)
    made = probes(family.teacher, "transformer_blocks", [sample], [1])[1]
    block = family.teacher.network.model.transformer_blocks[1]
    with torch.no_grad(), recording(family.teacher, [Interval("transformer_blocks", 1, 1)]) as told:
        family.teacher(*sample)
    (each,) = told.values()
    for ours, theirs in zip(streams(made(*each.args, **each.kwargs)), each.target, strict=True):
        assert ours.shape == theirs.shape and isinstance(made, Probe) and block is not made


def test_planted_affine_blocks_are_the_ones_that_go():
    """Bent, affine, affine, affine, bent ...: behind the first, three blocks add what a linear map can."""
    denoiser, samples = planted(FIRST, AFFINE, AFFINE, AFFINE, BENT, BENT, BENT, BENT)
    found = find(denoiser, samples)
    assert found[0].interval == Interval("layers", 0, 3) and abs(found[0].harm) < 1e-6
    assert all(each.harm > 1e-3 for each in found[1:])
    # The intervals follow one another.
    assert [each.interval.first for each in found[1:]] == [each.interval.last + 1 for each in found[:-1]]
    assert choose(found, 3) == [Interval("layers", 0, 3)]
    assert choose(found, 2) == [Interval("layers", 0, 2)]
    # The blocks are those they were.
    assert all(isinstance(block, Residual) for block in denoiser.network.model.layers)


def test_more_is_removed_where_it_does_the_least_harm():
    found = [
        Found(Interval("layers", 0, 1), (), 0.01),
        Found(Interval("layers", 2, 4), (), 0.5),
        Found(Interval("layers", 5, 7), (), 0.018),
    ]
    assert [str(each) for each in choose(found, 3)] == ["layers.0-1", "layers.5-7"]
    assert [str(each) for each in choose(found, 4)] == ["layers.0-1", "layers.2-3", "layers.5-7"]
    assert choose(found, 0) == []


def test_cka_knows_rotations_and_scales_and_nothing_of_what_is_independent():
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert cka(x, 3 * x @ rotation + 1) == pytest.approx(1, abs=1e-6)
    assert cka(x, torch.randn(400, 6)) < 0.1


def test_a_pruned_network_shares_what_stays():
    family = deep("flux-dev")
    face = family.teacher.network
    interval = Interval("transformer_blocks", 1, 2)
    twin = with_blocks(face, {interval: copy.deepcopy(face.model.transformer_blocks[1])})
    ours = {id(parameter) for parameter in twin.parameters()}
    theirs = {id(parameter) for parameter in face.parameters()}
    block = sum(1 for _ in face.model.transformer_blocks[1].parameters())
    assert len(ours - theirs) == block and len(theirs - ours) == 2 * block
    assert twin.model.config.num_layers == LAYERS - 1 and face.model.config.num_layers == LAYERS
