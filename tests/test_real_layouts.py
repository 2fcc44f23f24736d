"""What a run of adapters holds beside one full-size network, counted without a byte of weights."""

from __future__ import annotations

import pytest
from real_layouts import LAYOUTS, adapted_layout, held

from stepdistill.denoiser import parameter_count


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_a_student_and_a_fake_score_of_adapters_take_little_beside_one_network(name):
    nets, model = adapted_layout(name)
    assert parameter_count(model) == pytest.approx(LAYOUTS[name]["parameters"], rel=2e-3)
    assert set(nets.modules) == {"student", "fake_score", "teacher"}
    one = 2 * parameter_count(model)
    # Adapters are float32 over a base in bfloat16.
    assert one < held(nets) <= 1.25 * one
