"""A file that a small loop goes on from: weights, their average, the optimiser's moments and the step."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from stepdistill.ema import EMA
from stepdistill.errors import atomic_write
from training.files import save_tensors


class Progress:
    """Of one loop. path: the file, or "" to keep nothing."""

    def __init__(
        self,
        path: str | Path,
        module: nn.Module,
        average: EMA,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
    ) -> None:
        self.path = Path(path) if str(path) else None
        self.module, self.average, self.optimizer, self.schedule = module, average, optimizer, schedule

    def keep(self, step: int) -> None:
        """Write down that `step` steps are done."""
        if self.path is None:
            return
        held = {f"module/{name}": tensor for name, tensor in self.module.state_dict().items()}
        held |= {f"average/{name}": tensor for name, tensor in self.average.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            held |= {f"optimizer/{number}/{name}": tensor for name, tensor in moments.items()}
        with atomic_write(self.path) as temporary:
            save_tensors(temporary, held, {"step": str(step)})

    def begin(self) -> int:
        """Put everything where it was; the number of steps that are done, 0 without a file."""
        if self.path is None or not self.path.is_file():
            return 0
        with safe_open(str(self.path), framework="pt") as file:
            step = int(file.metadata()["step"])
            held: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        parts: dict[str, dict[str, Tensor]] = {"module": {}, "average": {}, "optimizer": {}}
        for name, tensor in held.items():
            part, rest = name.split("/", 1)
            parts[part][rest] = tensor
        self.module.load_state_dict(parts["module"])
        self.average.load_state_dict(parts["average"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            number, moment = name.split("/", 1)
            state.setdefault(int(number), {})[moment] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        for _ in range(step):
            self.schedule.step()
        return step
