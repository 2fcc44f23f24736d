"""Faces: diffusers' denoisers spoken to as `network(x_t, t, cond, **extras) -> raw`, and what families share of them."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Cond
from stepdistill.families.depth import second_half_at

# What of a diffusers UNet comes after its middle block.
BEHIND_MIDDLE = ("unet.up_blocks", "unet.conv_norm_out", "unet.conv_out")
# Of the embedded guidance scale or end time, LCM's time_cond_proj_dim.
COND_PROJ_DIM = 256


class Face(nn.Module):
    """A diffusers model held as `unet` or `transformer`, called alike whatever its own arguments are.

    x_t: (B, *shape) and raw of the same shape, unpacked; t: (B,) in the teacher's schedule; cond: batch first.
    It must hold nothing but the model: a student is a deep copy of it.

    Attributes:
        inner: the name the pipeline has for the model.
        extras: what it can be told besides x_t, t and cond -> how it is made ready for that, changing nothing at
            first.
        blocks: worth tapping, in forward order, name -> channels; middle: the bottleneck or the middle one.
        behind_middle: submodules that only matter behind it.
        traceable: its operations depend on shapes alone; False where on the length of each prompt, say.
        uncheckpointed: why its activations cannot be computed again in backward, "" = they can.
        unheard: submodules that the output does not depend on, such as what a last block makes of the text.
        notes: what people who use an exported student should know, a sentence each, for its model card.
        prunable: lists of blocks that may become shorter (`stepdistill.pruning`) -> the configuration's count of them.
        unpruned: why there are none, the end of a sentence; "" where there are.
    """

    inner: ClassVar[str]
    traceable: ClassVar[bool] = True
    uncheckpointed: ClassVar[str] = ""
    unheard: tuple[str, ...] = ()
    notes: ClassVar[tuple[str, ...]] = ()
    prunable: ClassVar[Mapping[str, str]] = {}
    unpruned: ClassVar[str] = ""
    middle: str
    blocks: dict[str, int]
    behind_middle: tuple[str, ...]

    def __init__(self, model: nn.Module):
        super().__init__()
        setattr(self, self.inner, model)

    @property
    def model(self) -> nn.Module:
        return getattr(self, self.inner)

    @property
    def extras(self) -> dict[str, Callable[[], None]]:
        return {}

    @property
    def told(self) -> tuple[str, ...]:
        """Of `extras`, what it was trained to be told, so that untold it is another network."""
        return ()

    def leaving(self, inputs: Sequence[str] = ()) -> nn.Module:
        """The model as it leaves with a student that is told `inputs`, made so that the pipeline's default call does the
        least harm.
        """
        return self.model

    def image_part(self, name: str, output: Any, x_t: Tensor, cond: Cond) -> Tensor:
        """Of what the block `name` returned, the features of the image: (B, C, h, w) or (B, N, C)."""
        return output if isinstance(output, Tensor) else output[0]

    def fixed(self, stack: str) -> dict[int, str]:
        """Blocks at an end of a list of `prunable` that cannot go -> why, a part of a sentence."""
        return {}

    def recounted(self, kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The configuration's fields that change where of each list of `prunable` the blocks `kept` remain."""
        return {self.prunable[stack]: len(blocks) for stack, blocks in kept.items()}


class UNetFace(Face):
    """A UNet2DConditionModel whose condition becomes keyword arguments by `arguments`."""

    inner, middle, behind_middle = "unet", "unet.mid_block", BEHIND_MIDDLE
    unpruned = "those of a UNet differ in size, and the second half takes what the first leaves"
    notes = (
        "ControlNets of the teacher work with this student.",
        "To begin a new one, call `ControlNetModel.from_unet` on the teacher's UNet: the student's has a `time_cond_proj`,"
        " which ControlNets do not know.",
    )

    # Whether an end is told to the second half in the place of t (`second_half_at`), not embedded.
    end_by_depth = False

    @property
    def extras(self) -> dict[str, Callable[[], None]]:
        told = dict.fromkeys(("guidance", "end"), self.add_cond_proj)
        return told | {"end_by_depth": self.add_end_by_depth}

    @property
    def blocks(self) -> dict[str, int]:
        return unet_blocks(self.unet)

    def arguments(self, cond: Cond, dtype: torch.dtype) -> dict[str, Any]:
        """What the UNet is told of a condition: the text encoder's states (B, tokens, width), for one."""
        return {"encoder_hidden_states": cond.to(dtype)}

    def sample(self, x_t: Tensor, cond: Cond) -> Tensor:
        """What the UNet is given to denoise: x_t (B, C, h, w), with further channels behind it where it takes such."""
        return x_t

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Cond, guidance: Tensor | None = None, end: Tensor | None = None
    ) -> Tensor:
        """guidance: (B,) the scale g; the embedding is of w = g - 1, as the exported pipeline makes it. end:
        (B,) the time a two-time student jumps to. Through time_cond_proj, which two of them share in halves.
        """
        dtype, time = self.unet.dtype, t.to(x_t.device, torch.float32)
        scalars = [] if guidance is None else [guidance - 1]
        if end is not None and not self.end_by_depth:
            scalars.append(end / 1000)
        embedded = None
        if scalars:
            width = self.unet.config.time_cond_proj_dim // len(scalars)
            embedded = torch.cat([sinusoids(each, width) for each in scalars], 1).to(x_t.device, dtype)
        told, sample = self.arguments(cond, dtype), self.sample(x_t, cond).to(dtype)
        with contextlib.ExitStack() as halves:
            if end is not None and self.end_by_depth:
                later = end.to(x_t.device, torch.float32)
                halves.enter_context(second_half_at(self.unet, time, later, condition=embedded))
            return self.unet(sample, time, timestep_cond=embedded, **told).sample

    @property
    def told(self) -> tuple[str, ...]:
        projection = getattr(self.unet.time_embedding, "cond_proj", None)
        return ("guidance",) if projection is not None and bool(projection.weight.any()) else ()

    def leaving(self, inputs: Sequence[str] = ()) -> nn.Module:
        """With a time_cond_proj, which keeps stock pipelines from classifier-free guidance at any scale. They tell it that
        scale, so it is zero for a student that was trained without, whatever the student started from.
        """
        if self.unet.config.time_cond_proj_dim is None:
            return with_time_cond(self.unet)
        if inputs or not self.told:
            return self.unet
        untold = copy.deepcopy(self.unet)
        nn.init.zeros_(untold.time_embedding.cond_proj.weight)
        return untold

    def add_cond_proj(self) -> None:
        """Give the UNet an embedded guidance scale or end time; its projection starts at zero, so nothing
        changes at first.
        """
        if self.unet.config.time_cond_proj_dim is None:
            self.unet = with_time_cond(self.unet).train(self.unet.training)

    def add_end_by_depth(self) -> None:
        self.end_by_depth = True


class TransformerFace(Face):
    """A diffusers transformer: lists of blocks, of which each returns the image's tokens, alone or with the text's.

    Attributes:
        stacks: lists of blocks in forward order -> where a block's output has the image: "whole", "second" (of a
            pair), "first tokens" or "last tokens" of one sequence.
        tail: submodules and parameters behind the last block.
        patch: side of the latents' patch that makes one token.
        text_only: in a block of two streams, what asks for the text and makes something of it. Of the last block that
            is the only part nobody hears; its keys and values are heard by the image.
        last_stack_only: submodules that make what blocks of the last stack alone are told.
        refiners: lists of blocks before the first stack, which hear of the time that the first blocks hear of.
        called_alone: parts of blocks that the model calls from outside of them as well, which shards must know.

    A `forward` that `ends_late` decorates takes the end of a jump, by depth alone: nothing is made ready for it.
    """

    inner = "transformer"
    stacks: ClassVar[dict[str, str]] = {"transformer_blocks": "whole"}
    tail: ClassVar[tuple[str, ...]] = ("norm_out", "proj_out", "scale_shift_table")
    text_only: ClassVar[tuple[str, ...]] = (
        "attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "ff_context",
    )  # fmt: skip

    last_stack_only: ClassVar[tuple[str, ...]] = ()
    refiners: ClassVar[tuple[str, ...]] = ()
    called_alone: ClassVar[tuple[str, ...]] = ()

    @property
    def extras(self) -> dict[str, Callable[[], None]]:
        return {"end_by_depth": lambda: None} if getattr(self.forward, "ends_late", False) else {}

    @property
    def patch(self) -> int:
        return self.transformer.config.patch_size

    @property
    def width(self) -> int:
        config = self.transformer.config
        return config.num_attention_heads * config.attention_head_dim

    @property
    def blocks(self) -> dict[str, int]:
        return {
            f"transformer.{stack}.{i}": self.width
            for stack in self.stacks
            for i in range(len(self.transformer.get_submodule(stack)))
        }

    @property
    def middle(self) -> str:
        names = list(self.blocks)
        return names[(len(names) - 1) // 2]

    @property
    def behind_middle(self) -> tuple[str, ...]:
        names = list(self.blocks)
        tail = (f"transformer.{name}" for name in self.tail if hasattr(self.transformer, name))
        return (*names[names.index(self.middle) + 1 :], *tail)

    @property
    def unheard(self) -> tuple[str, ...]:
        """Of the last block there is: in a discriminator's encoder the middle one."""
        *_, last = (name for name in self.blocks if any(True for _ in self.get_submodule(name).parameters()))
        block = dict(self.get_submodule(last).named_modules())
        text = tuple(f"{last}.{part}" for part in self.text_only if part in block)
        cut = last.split(".")[-2] != list(self.stacks)[-1]
        return (*text, *(f"transformer.{name}" for name in self.last_stack_only if cut))

    def tokens(self, x_t: Tensor) -> int:
        """Of one image, whose latents are x_t (B, C, [F,] h, w)."""
        return x_t[0, 0].numel() // self.patch**2

    def image_part(self, name: str, output: Any, x_t: Tensor, cond: Cond) -> Tensor:
        where = self.stacks[name.split(".")[-2]]
        if where == "second":
            return output[1]
        if where == "first tokens":
            return output[:, : self.tokens(x_t)]
        if where == "last tokens":
            return output[:, -self.tokens(x_t) :]
        return output


def without_variance(raw: Tensor, x_t: Tensor) -> Tensor:
    """The first of raw's channels, as many as x_t has: where a network learned its variance too (Nichol & Dhariwal
    2021, arXiv 2102.09672), that is the second half, of no use to a student.
    """
    return raw[:, : x_t.shape[1]]


def pack(x: Tensor, patch: int = 2) -> Tensor:
    """(B, C, h, w) -> (B, h w / patch^2, patch^2 C), the order (C, dy, dx) within a token."""
    batch, channels, h, w = x.shape
    x = x.reshape(batch, channels, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch**2)


def unpack(tokens: Tensor, h: int, w: int, patch: int = 2) -> Tensor:
    """The reverse of `pack`, for latents of h x w."""
    batch, _, width = tokens.shape
    x = tokens.reshape(batch, h // patch, w // patch, width // patch**2, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, h, w)


def with_time_cond(unet: nn.Module) -> nn.Module:
    """A copy of `unet` with a zero time_cond_proj, which changes nothing at first."""
    config = dict(unet.config) | {"time_cond_proj_dim": COND_PROJ_DIM}
    # Of a UNet made from a partial configuration; it would undo ours.
    config.pop("_use_default_values", None)
    twin = cast(type(unet).from_config(config), unet.device, unet.dtype)
    missing, unexpected = twin.load_state_dict(unet.state_dict(), strict=False)
    assert missing == ["time_embedding.cond_proj.weight"] and not unexpected, (missing, unexpected)
    nn.init.zeros_(twin.time_embedding.cond_proj.weight)
    return twin


def cast(module: nn.Module, device: str | torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """`module.to(device, dtype)`, None = as it is. The dtype is named only where it changes: diffusers' models warn
    whenever it is.
    """
    module.to(device)
    floating = next((p.dtype for p in module.parameters() if p.is_floating_point()), dtype)
    return module if dtype in (None, floating) else module.to(dtype)


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer that adds nothing until it is trained."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def sinusoids(value: Tensor, dim: int) -> Tensor:
    """Sines and cosines of 1000 value at falling frequencies, (B,) -> (B, dim): the formula stock pipelines
    embed `guidance_scale - 1` with, and, of t / 1000, the one UNets embed their time with.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = 1000 * value.float()[:, None] * frequencies.to(value.device)[None]
    return torch.cat((angles.sin(), angles.cos()), 1)


def unet_blocks(unet: nn.Module) -> dict[str, int]:
    """Down, middle and up blocks of a diffusers UNet held as `unet`, in forward order, name -> channels."""
    widths = list(unet.config.block_out_channels)
    down = {f"unet.down_blocks.{i}": width for i, width in enumerate(widths)}
    up = {f"unet.up_blocks.{i}": width for i, width in enumerate(reversed(widths))}
    return down | {"unet.mid_block": widths[-1]} | up
