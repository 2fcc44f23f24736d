"""Attention backends: what the report claims is what runs, and it equals plain math."""

from __future__ import annotations

import pytest
import torch

from stepdistill.attention import TOLERANCE, choose
from stepdistill.errors import UserError


@pytest.fixture(scope="module")
def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


class Pipeline:
    def __init__(self, unet):
        self.unet = unet


def forward(unet):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 20, 24, generator=generator)
    with torch.no_grad():
        return unet(sample, torch.tensor(500), encoder_hidden_states=context).sample


def layers_of(unet):
    # One transformer block down, one in the middle, two up, each with self- and cross-attention.
    return [m for m in unet.modules() if type(m).__name__ == "Attention"]


def test_auto_on_cpu_is_sdpa_in_every_layer(unet):
    report = choose(Pipeline(unet), "auto")
    assert (report.name, report.layers, report.total) == ("sdpa", 8, 8)
    assert str(report) == "attention: sdpa (8/8 layers)"
    assert len(layers_of(unet)) == 8
    assert {type(layer.processor).__name__ for layer in layers_of(unet)} == {"AttnProcessor2_0"}


@pytest.mark.parametrize("name", ["sdpa", "native", "flash"])
def test_a_backend_calls_what_it_says_and_equals_math(unet, name, monkeypatch):
    choose(unet, "math")
    assert {type(layer.processor).__name__ for layer in layers_of(unet)} == {"AttnProcessor"}
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    plain = forward(unet)
    assert not calls
    report = choose(unet, name)
    assert report.layers == report.total == 8
    calls.clear()
    fused = forward(unet)
    assert len(calls) == 8
    torch.testing.assert_close(fused, plain, atol=TOLERANCE[torch.float32], rtol=0)


def test_flash_names_the_kernel_that_ran(unet):
    assert "flash" in choose(unet, "flash").why
    assert "no fused kernel" in choose(unet, "math").why


def test_a_pinned_processor_can_be_set_again(unet):
    choose(unet, "flash")
    choose(unet, "flash")
    assert choose(unet, "auto").name == "sdpa"
    assert {type(layer.processor).__name__ for layer in layers_of(unet)} == {"AttnProcessor2_0"}


def test_an_impossible_backend_is_refused_and_changes_nothing(unet):
    choose(unet, "sdpa")
    before = [layer.processor for layer in layers_of(unet)]
    with pytest.raises(UserError, match=r"attention=xformers cannot run on cpu.*CUDA"):
        choose(unet, "xformers")
    assert all(a is layer.processor for a, layer in zip(before, layers_of(unet), strict=True))


def test_a_backend_that_disagrees_with_math_is_refused(unet, monkeypatch):
    class Wrong(type(layers_of(unet)[0].processor)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs) * float("nan")

    from stepdistill import attention

    choose(unet, "sdpa")
    monkeypatch.setattr(attention, "_pinned", lambda processor, kernel: Wrong())
    with pytest.raises(UserError, match="differs from plain math by nan"):
        choose(unet, "flash")
    monkeypatch.undo()
    assert choose(unet, "auto").layers == 8


def test_an_unknown_name_is_refused_with_the_nearest(unet):
    with pytest.raises(UserError, match="Did you mean 'flash'"):
        choose(unet, "flsh")


def test_a_processor_that_reads_its_own_backend_is_set_without_the_process_wide_default():
    from diffusers import FluxTransformer2DModel
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    flux = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    default = _AttentionBackendRegistry._active_backend
    math = choose(flux, "math")
    assert (math.name, math.layers, math.total) == ("math", 2, 2)
    assert choose(flux, "flash").layers == 2
    assert _AttentionBackendRegistry._active_backend == default


def test_no_attention_layers_is_said():
    report = choose(Pipeline(torch.nn.Linear(2, 2)))
    assert str(report) == "attention: none (0/0 layers)"
