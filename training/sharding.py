"""Networks cut into shards, a part of every weight on each process: torch's FSDP2 in accelerate's process group.

accelerate's own preparation takes one model with its optimiser, and a GPU; here several are trained, some are only asked,
and tests have CPUs. So its configuration is read, and torch's `fully_shard` called.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from stepdistill.denoiser import Denoiser
from stepdistill.errors import UserError
from stepdistill.lora import LoRA
from stepdistill.methods.base import Method
from stepdistill.pruning import Pruned

if TYPE_CHECKING:
    from accelerate import Accelerator

    from training.recipe import Recipe

# By which `accelerate launch` tells of these kinds of training; under them `Accelerator` would refuse several networks.
_FSDP, _MESH, _DEEPSPEED = (
    "ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_DEEPSPEED",
)  # fmt: skip
_INSTEAD = "launch it with training/accelerate/8gpu_fsdp.yaml"


def _on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1", "yes")


def check_launch() -> None:
    """UserError where `accelerate launch` was told of a sharding that the trainer has not."""
    if _on(_DEEPSPEED):
        raise UserError(
            "the trainer has several networks, each with its optimiser, which DeepSpeed does not train in one process;"
            f" {_INSTEAD}: FSDP2 shards as ZeRO-3 does, and as ZeRO-2 with fsdp_reshard_after_forward=false."
        )
    if not _on(_FSDP):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            f"fsdp_version=1 keeps all weights of a network in one, which those in turn frozen cannot be; {_INSTEAD}."
        )
    for name, instead in {
        "OFFLOAD_PARAMS": "to hold less, take more processes, student.lora or student.gradient_checkpointing",
        "ACTIVATION_CHECKPOINTING": "set student.gradient_checkpointing=true in the recipe",
    }.items():
        if _on(f"FSDP_{name}"):
            raise UserError(f"fsdp_{name.lower()} is not served; set it to false: {instead}.")
    others = [
        part for part in ("TP", "CP", "SP") if int(os.environ.get(f"PARALLELISM_CONFIG_{part}_SIZE", 1)) > 1
    ]
    if _on(_MESH) and others:
        raise UserError(
            f"parallelism_config_{others[0].lower()}_size cuts single operations, which networks here are not made for; set it"
            " to 1, and shard with dp_shard_size and dp_replicate_size."
        )


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """`Accelerator` is made as for data-parallel training within the block."""
    # By default the launcher sets it, and transformers then leaves text encoders empty in all processes but one.
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    kept = {name: os.environ.pop(name) for name in (_FSDP, _MESH) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@dataclass(frozen=True)
class Sharding:
    """How networks are cut.

    Attributes:
        mesh: over processes: ("shard",), or ("replicate", "shard"), where every row of it holds all.
        reshard: whether a block's weights are given back after its forward pass, and fetched again for backward.
    """

    mesh: DeviceMesh
    reshard: bool = True

    @classmethod
    def of(cls, accelerator: Accelerator) -> Sharding | None:
        """As the run was launched; None where every process holds everything.

        Raises:
            UserError: the sizes in parallelism_config do not make the number of processes.
        """
        count, device = accelerator.num_processes, accelerator.device.type
        if count == 1 or not _on(_FSDP):
            return None
        copies = int(os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", 1)) if _on(_MESH) else 1
        parts = int(os.environ.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", count)) if _on(_MESH) else count
        if copies * parts != count:
            raise UserError(
                f"parallelism_config: dp_replicate_size={copies} times dp_shard_size={parts} must be the number of processes,"
                f" {count}."
            )
        shape, names = ((copies, parts), ("replicate", "shard")) if copies > 1 else ((parts,), ("shard",))
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
        return cls(init_device_mesh(device, shape, mesh_dim_names=names), reshard)

    def cut(self, modules: Mapping[str, nn.Module], trained: Iterable[str]) -> None:
        """Shard what is trained, and every frozen denoiser, with those that adapters adapt.

        Each of `units` has its weights fetched before its forward pass, and again in backward. What is around them is
        another. Adapters are a hundredth of what they adapt, and stay whole.
        """
        for name, module in modules.items():
            while isinstance(module, LoRA):
                module = module.base
            if isinstance(module, Denoiser):
                self._unit(module.network)
            elif name in trained:
                self._unit(module)

    def _unit(self, root: nn.Module) -> None:
        if isinstance(root, FSDPModule) or not any(True for _ in root.parameters()):
            return
        for unit in units(root):
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=self.reshard)
        # Not at the end of its forward pass: taps that record a graph up to the middle leave nothing behind that would
        # fetch it again. `_Passage` and `settle` give it back.
        fully_shard(root, mesh=self.mesh, reshard_after_forward=False)
        _Passage(root)


def units(root: nn.Module) -> list[nn.Module]:
    """Parts of a network that are fetched one at a time, inner ones first: what diffusers' model says it repeats, and a UNet's
    residual blocks; or else the blocks that can be tapped; and what of a block is also called without it.
    """
    model = getattr(root, "model", None)
    kinds = {"ResnetBlock2D", *(getattr(model, "_repeated_blocks", None) or ())}
    found = [each for each in root.modules() if type(each).__name__ in kinds]
    if not found:
        inside = dict(root.named_modules())
        found = [inside[name] for name in getattr(root, "blocks", {})]
    alone = [root.get_submodule(f"{root.inner}.{name}") for name in getattr(root, "called_alone", ())]
    return [each for each in (*alone, *found) if any(True for _ in each.parameters())]


class _Passage:
    """Gives a network's outer weights back after passes that record no graph, also where a tap ends them early."""

    def __init__(self, root: FSDPModule) -> None:
        self.recorded: list[bool] = []
        root.register_forward_pre_hook(self.enter, prepend=True)
        root.register_forward_hook(self.leave, always_call=True)

    def enter(self, *_: Any) -> None:
        self.recorded.append(torch.is_grad_enabled())

    def leave(self, root: FSDPModule, *_: Any) -> None:
        # torch waits for the optimiser at the start of a pass, and takes one that was left early for one that goes on.
        root._get_fsdp_state()._state_ctx.iter_forward_root = None
        if not self.recorded.pop():
            root.reshard()


def settle(modules: Iterable[nn.Module]) -> None:
    """Every network in shards again, whatever was done with it: its parameters can be frozen, written and read."""
    for module in modules:
        while isinstance(module, (LoRA, Pruned)):
            module = module.base
        for each in module.modules():
            if isinstance(each, FSDPModule):
                each.reshard()


def sharded(module: nn.Module) -> bool:
    """Whether parameters of the module itself are shards."""
    return any(isinstance(each, FSDPModule) for each in module.modules())


def own_part(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_sharded(recipe: Recipe, method: Method, student: nn.Module) -> None:
    """UserError for what of a recipe cannot be sharded."""
    if recipe.run.precision == "fp16":
        raise UserError("run.precision=fp16 scales gradients, which shards do not know of; use bf16 or no.")
    if isinstance(student, Pruned):
        raise UserError(
            f"method.name={recipe.method.name} trains a few blocks of a teacher held by reference, which FSDP would cut twice;"
            " launch it with training/accelerate/8gpu.yaml."
        )
    chosen = [recipe.optim.optimizer, *(own.get("optimizer") for own in recipe.optim.networks.values())]
    if "came" in chosen:
        raise UserError(
            "optim.optimizer=came averages over a matrix's rows and columns, which shards cut; use adamw, or launch it with"
            " training/accelerate/8gpu.yaml."
        )
    exact = getattr(method.config, "r1", "") == "exact" and getattr(method.config, "r1_weight", 0) > 0
    if exact:
        raise UserError(
            "method.r1=exact differentiates a gradient, for which FSDP has given the weights back; set method.r1=finite."
        )


def full(value: Tensor) -> Tensor:
    """A number that processes share, such as a norm, on each of them."""
    return value.full_tensor() if isinstance(value, DTensor) else value
