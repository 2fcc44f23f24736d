"""The port of the 2015 Inception network, resizing, and the extractors made of public networks.

No public weights are needed: networks get seeded random ones. Against torch-fidelity itself where it can be
imported (`pip download --no-deps torch-fidelity`, and the wheel's folder on PYTHONPATH), and always against
torchvision's blocks with the pooling of the TensorFlow graph.
"""

from __future__ import annotations

import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fakes import random_state
from torch import Tensor

from evaluation import weights
from evaluation.clip import clip_pixels
from evaluation.extractors import EXTRACTORS, _hub_positions, load_extractor
from evaluation.inception import SPATIAL, Inception, clean_bicubic, logits_of, tf1_bilinear, torch_bilinear
from stepdistill.errors import UserError


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(
        0, 256, (2, 3, 64, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


# -------------------------------------------------------------------------------- Inception


def test_layers_are_those_of_the_published_file(state) -> None:
    convolutions = [name for name in state if name.endswith("conv.weight")]
    assert len(convolutions) == 94 and len(state) == 94 * 6 + 2
    assert state["fc.weight"].shape == (1008, 2048)
    assert sum(value.numel() for value in state.values() if value.is_floating_point()) == 23_885_392


def test_agrees_with_torchvisions_blocks_under_tensorflows_pooling(state, images, monkeypatch) -> None:
    from torchvision.models import inception as theirs

    pooled = []

    def pool(x: Tensor, **options) -> Tensor:
        pooled.append(x.shape)
        # Of the last block.
        if len(pooled) == 9:
            return F.max_pool2d(x, **options)
        return F.avg_pool2d(x, **options, count_include_pad=False)

    monkeypatch.setattr(theirs, "F", types.SimpleNamespace(**{**vars(F), "avg_pool2d": pool}))
    net = theirs.Inception3(1008, aux_logits=False, transform_input=False, init_weights=False)
    net.load_state_dict(state)
    net.eval()
    net.fc, net.dropout = torch.nn.Identity(), torch.nn.Identity()
    pixels = tf1_bilinear(images)
    with torch.no_grad():
        truth = net((pixels - 128) / 128)
        found = Inception.from_state(state)(pixels)
    assert len(pooled) == 9
    assert found.std(0).mean() > 1e-3 * found.abs().mean()
    assert relative(found, truth) < 1e-6 and float((found - truth).abs().max()) < 1e-5


def test_agrees_with_torch_fidelity(state, images, tmp_path) -> None:
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.save(state, tmp_path / "random.pth")
    kinds = ["2048", "logits_unbiased"]
    net = theirs.FeatureExtractorInceptionV3("random", kinds, str(tmp_path / "random.pth"))
    port = Inception.from_state(state)
    # Enlarged and reduced.
    for batch in (images, images.repeat(1, 1, 5, 7)):
        with torch.no_grad():
            truth, logits = net(batch)
            found = port(tf1_bilinear(batch))
        print("largest feature difference", float((found - truth).abs().max()), relative(found, truth))
        assert float((found - truth).abs().max()) < 1e-5
        ours = logits_of(port.fc.weight.numpy())(found.double().numpy())
        assert relative(torch.from_numpy(ours).float(), logits) < 1e-5


def test_weights_of_another_network_are_refused(state) -> None:
    other = dict(state)
    del other["Mixed_7c.branch_pool.conv.weight"]
    with pytest.raises(UserError, match=r"does not fit the Inception network of 2015.*Mixed_7c\.branch_pool"):
        Inception.from_state(other)


def test_extractor_from_random_weights(state, images, tmp_path, monkeypatch) -> None:
    from dataclasses import replace

    torch.save(state, tmp_path / "weights-inception-2015-12-05-6726825d.pth")
    with pytest.raises(UserError, match="is not the published file"):
        load_extractor("inception-2015", weights=tmp_path)
    monkeypatch.setitem(
        weights.WEIGHTS, "inception-2015", replace(weights.WEIGHTS["inception-2015"], sha256="")
    )
    first = load_extractor("inception-2015", weights=tmp_path)
    assert (first.dim, first.side, first.sha256) == (2048, 299, weights.content_sha256(state))
    first = type(first)(**{**vars(first), "chunk": 2})
    features = first(images)
    with torch.no_grad():
        torch.testing.assert_close(
            features, Inception.from_state(state)(tf1_bilinear(images)), rtol=0, atol=1e-5
        )
    assert first.head(features.numpy()).shape == (2, 1008)
    clean = load_extractor("inception-2015-clean", weights=tmp_path)
    assert clean.sha256 == first.sha256 and clean.source != first.source and clean.name != first.name


# -------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("size", [(5, 9), (40, 33), (299, 17)])
def test_tf1_bilinear_is_its_definition(size) -> None:
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 255
    found = tf1_bilinear(x, 23)
    height, width = size
    for i, j in ((0, 0), (22, 22), (7, 15), (21, 3)):
        y, z = i * height / 23, j * width / 23
        top, left = int(y), int(z)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        dy, dz = y - top, z - left
        truth = (
            x[..., top, left] * (1 - dy) * (1 - dz) + x[..., top, right] * (1 - dy) * dz
            + x[..., bottom, left] * dy * (1 - dz) + x[..., bottom, right] * dy * dz
        )  # fmt: skip
        torch.testing.assert_close(found[..., i, j], truth, rtol=1e-4, atol=1e-2)
    # Corners are not aligned and pixels have no centres: what is not resized downwards keeps its first column.
    side = min(height, 13)
    kept = tf1_bilinear(x[..., :side, :], side)[..., 0]
    torch.testing.assert_close(kept, x[..., :side, 0], rtol=1e-6, atol=0)


def test_tf1_bilinear_has_torch_fidelitys_bits(images) -> None:
    theirs = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    for batch in (images, images.repeat(1, 1, 7, 7)):
        truth = theirs.interpolate_bilinear_2d_like_tensorflow1x(
            batch.float(), (299, 299), align_corners=False
        )
        assert torch.equal(tf1_bilinear(batch), truth)


def bicubic_matrix(before: int, after: int) -> np.ndarray:
    """(after, before): Keys' cubic with a = -0.5, widened when it reduces, normalised, cut off at the borders."""

    def cubic(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0))

    scale = before / after
    centre = (np.arange(after) + 0.5) * scale
    found = cubic((np.arange(before) + 0.5 - centre[:, None]) / max(scale, 1))
    return found / found.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(20, 31), (80, 70)])
def test_clean_bicubic_is_antialiased_float_and_clipped(size) -> None:
    x = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x[0, :, :, : size[1] // 2] = 0
    # Overshoots at the edge.
    x[0, :, :, size[1] // 2 :] = 255
    found = clean_bicubic(x, 41).numpy()
    exact = bicubic_matrix(size[0], 41) @ x.numpy().astype(float) @ bicubic_matrix(size[1], 41).T
    assert exact.min() < -1 and exact.max() > 256
    np.testing.assert_allclose(found, exact.clip(0, 255), atol=1e-3)
    # Nothing is rounded to grey levels.
    assert np.abs(found - found.round()).max() > 0.1


def test_torch_bilinear_is_pytorch_fids(images) -> None:
    """Its values and, through the network's own scaling, its bits."""
    resized = F.interpolate(images.float() / 255, (299, 299), mode="bilinear", align_corners=False)
    assert torch.equal((torch_bilinear(images) - 128) / 128, 2 * resized - 1)


def test_spatial_features_are_the_first_channels_of_mixed_6(state, images) -> None:
    """TensorFlow's mixed_6 is torchvision's Mixed_6d, whose output begins with its 1 x 1 branch."""
    net, seen = Inception.from_state(state), []
    net.Mixed_6d.register_forward_hook(lambda module, given, output: seen.append(output))
    pixels = tf1_bilinear(images, 107)
    with torch.no_grad():
        net(pixels)
        found = net.spatial(pixels)
    n, _, height, width = seen[0].shape
    assert torch.equal(found.view(n, height, width, 7).permute(0, 3, 1, 2), seen[0][:, :7])
    assert SPATIAL == 7 * 17 * 17


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    x = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    assert torch.equal(clean_bicubic(x), x.float()) and torch.equal(tf1_bilinear(x), x.float())


def test_clip_pixels_are_what_torchvision_and_pillow_make() -> None:
    from PIL import Image
    from torchvision.transforms import v2

    mean, std = torch.tensor([0.48, 0.46, 0.41]).view(3, 1, 1), torch.tensor([0.27, 0.26, 0.28]).view(3, 1, 1)
    usual = v2.Compose([v2.Resize(32, v2.InterpolationMode.BICUBIC), v2.CenterCrop(32), v2.PILToTensor()])
    for size in ((32, 32), (45, 70), (71, 40), (20, 33)):
        x = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
        picture = Image.fromarray(x[0].permute(1, 2, 0).numpy())
        truth = (usual(picture).float() / 255 - mean) / std
        assert torch.equal(clip_pixels(x, 32, mean, std)[0], truth), size


# -------------------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    from transformers import CLIPConfig, CLIPModel

    path = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=small | {"vocab_size": 50, "max_position_embeddings": 8},
        vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=12,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(path)
    settings = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


def test_clip_extractor_gives_projected_embeddings(clip_folder) -> None:
    from transformers import CLIPModel

    images = torch.randint(0, 256, (3, 3, 40, 56), dtype=torch.uint8)
    extractor = load_extractor("clip-vit-b32", weights=clip_folder)
    assert (extractor.name, extractor.dim, extractor.side) == ("clip-vit-b32", 12, 32)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    mean, std = torch.tensor([0.48, 0.46, 0.41]).view(3, 1, 1), torch.tensor([0.27, 0.26, 0.28]).view(3, 1, 1)
    with torch.no_grad():
        pooled = model.vision_model(clip_pixels(images, 32, mean, std)).pooler_output
        truth = model.visual_projection(pooled)
    torch.testing.assert_close(extractor(images), truth, rtol=1e-5, atol=1e-6)
    settings = clip_folder / "preprocessor_config.json"
    content = settings.read_text()
    settings.write_text("{}")
    with pytest.raises(UserError, match=r"preprocessor_config\.json cannot be read"):
        load_extractor("clip-vit-b32", weights=clip_folder)
    settings.write_text(content)


def test_bfloat16_has_a_name_of_its_own_and_says_what_it_changed(clip_folder) -> None:
    images = torch.randint(0, 256, (70, 3, 40, 56), dtype=torch.uint8)
    exact = load_extractor("clip-vit-b32", weights=clip_folder)(images)
    for half in (
        load_extractor("clip-vit-b32-bf16", weights=clip_folder),
        load_extractor("clip-vit-b32", weights=clip_folder, dtype="bfloat16"),
    ):
        assert half.source.extractor == "clip-vit-b32-bf16"
        rows = half(images)
        assert rows.dtype == torch.float32 and 0 < relative(rows, exact) < 0.02
        (doubt,) = half.doubts
        share = float((rows[:50] - exact[:50]).norm() / exact[:50].norm())
        assert doubt.endswith(
            f"-bf16 ran in bfloat16, which changed what it gave for its first batch by {share:.2%}."
        )
    # Networks with published numbers in float32 alone.
    assert load_extractor("scenes-v1", dtype="bfloat16").name == "scenes-v1"
    with pytest.raises(UserError, match="no extractor 'scenes-v1-bf16'"):
        load_extractor("scenes-v1-bf16")


def test_a_model_with_weights_missing_is_refused(clip_folder, tmp_path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights of a CLIPModel, like visual_projection\.weight"):
        load_extractor("clip-vit-b32", weights=folder)


def test_dino_features_and_its_position_embeddings(tmp_path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=518, patch_size=14
    )
    model = Dinov2Model(config).eval()
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    model.save_pretrained(tmp_path)
    table = model.embeddings.position_embeddings.detach().clone()
    # Output patch i samples the table of 37 x 37 at (i + 0.5) * 37 / 16.1 - 0.5, by the cubic with a = -0.75.
    at = (np.arange(16) + 0.5) * 37 / 16.1 - 0.5
    matrix = np.zeros((16, 37))
    for i, position in enumerate(at):
        for tap in range(-1, 3):
            x = abs(position - np.floor(position) - tap)
            a = -0.75
            near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            matrix[i, int(np.clip(np.floor(position) + tap, 0, 36))] += near if x <= 1 else far
    grid = table[0, 1:].double().numpy().reshape(37, 37, 8)
    truth = torch.from_numpy(np.einsum("ia,jb,abc->ijc", matrix, matrix, grid).reshape(256, 8)).float()
    usual = model.embeddings.interpolate_pos_encoding(torch.zeros(1, 257, 8), 224, 224)[0, 1:].detach()
    _hub_positions(model, 224)
    found = model.embeddings.position_embeddings[0]
    torch.testing.assert_close(found[1:], truth, rtol=0, atol=1e-4)
    # It makes a difference.
    assert torch.equal(found[0], table[0, 0]) and relative(usual, truth) > 0.01

    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    extractor = load_extractor("dinov2-vitl14", weights=tmp_path)
    with torch.no_grad():
        features = model((images / 255 - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor(images), features, rtol=1e-5, atol=1e-5)
    small = torch.randint(0, 256, (1, 3, 30, 50), dtype=torch.uint8)
    assert extractor(small).shape == (1, 8)


@pytest.mark.parametrize("name", sorted(set(EXTRACTORS) - {"scenes-v1", "clip-scenes-v1"}))
def test_public_networks_that_are_not_here_are_named_at_once(name: str, monkeypatch, tmp_path) -> None:
    for variable in ("STEPDISTILL_WEIGHTS", "STEPDISTILL_CACHE", "TORCH_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    with pytest.raises(weights.MissingWeights, match=str(tmp_path)):
        load_extractor(name)
