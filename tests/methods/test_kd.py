"""KD (arXiv 2101.02388): regression to the teacher's trajectories, under the conditions these were drawn with."""

from __future__ import annotations

import torch
from worlds import world


def test_the_student_is_told_the_conditions_of_its_pairs():
    made, heard = world("kd"), []
    made.nets.student.register_forward_pre_hook(lambda _, args: heard.append(args[2]))
    batch = made.batch()
    made.method.loss(made.nets, batch)
    assert torch.equal(heard[0], batch.pairs.cond) and not torch.equal(heard[0], batch.cond)
