"""Output distillation: a smaller network learns to denoise as the teacher does (BK-SDM, arXiv 2305.15798).

    minimise E  w_task || target(x0, eps, t) - student(x_t, t, c) ||^2  +  w_out || teacher(x_t, t, c) - student(x_t, t, c) ||^2

What heals a network that blocks were taken from: `student.init` is its directory, `family.teacher` the whole one. The
data's target is one draw of x0 and eps, and the teacher's prediction their mean, so the second term says the same as the
first with far less noise (a step costs a forward pass of the teacher more). The paper's third term, between features,
asks for blocks in pairs and is left out. Conditions are dropped at random, and the unguided teacher is asked what the
student is asked, so what is left behind is guided as the teacher is, and is a teacher for any method.

Normal ranges: "output" falls by a factor of three and more, to what the network has no room for; "task" falls little,
since most of it is the spread of x0 that no network knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stepdistill.errors import UserError
from stepdistill.losses import denoising, moments
from stepdistill.methods.base import Batch, Losses, Networks
from stepdistill.methods.pretrain import Pretrain


class OutputKD(Pretrain):
    needs_teacher = True

    @dataclass
    class Config(Pretrain.Config):
        # w_task and w_out; both 1 in the paper.
        task_weight: float = 1.0
        output_weight: float = 1.0

        def __post_init__(self) -> None:
            for name in ("task_weight", "output_weight"):
                if not getattr(self, name) >= 0:
                    raise UserError(f"method.{name} must be 0 or more, got {getattr(self, name)}.")
            if not self.task_weight + self.output_weight > 0:
                raise UserError(
                    "method.task_weight and method.output_weight are both 0, so nothing is learnt; set one."
                )

    def loss(self, nets: Networks, batch: Batch) -> Losses:
        x_t, eps, t, cond = self.noised(nets, batch)
        prediction = nets.student(x_t, t, cond)
        with torch.no_grad():
            teacher = nets.teacher(x_t, t, cond)
            # With these as x0 and eps the target is the teacher's prediction, in the kind that the student predicts.
            teacher_x0, teacher_eps = teacher.x0, teacher.eps
        task = denoising(prediction, batch.x0, eps, nets.sigma_data)
        output = denoising(prediction, teacher_x0, teacher_eps, nets.sigma_data)
        total = self.config.task_weight * task + self.config.output_weight * output
        return (
            {"total": total, "task": task.detach(), "output": output.detach()}
            | moments(prediction.x0)
            | moments(teacher_x0, "teacher_")
        )
