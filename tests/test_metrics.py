"""Metrics: invariance to batches, calibration on distorted images, and agreement with their definitions."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import evaluation
from evaluation.decoding import decode
from evaluation.extractors import Extractor, load_extractor
from evaluation.frechet import frechet_distance
from evaluation.generate import SHARD, Configuration, generate
from evaluation.images import MemoryImages, open_images, rechunked
from evaluation.metrics import METRICS, get_metrics
from evaluation.metrics.attributes import Attributes
from evaluation.metrics.base import Inputs
from evaluation.metrics.clip_score import ClipScore
from evaluation.metrics.fd import FrechetDistance
from evaluation.metrics.latency import Latency, Timed, measure
from evaluation.protocol import PROTOCOLS, get_protocol, real_images
from evaluation.reference import reference_stats
from evaluation.references import FileReference, SceneReference
from evaluation.stats import FeatureStats
from stepdistill import scenes
from stepdistill.assets import ROOT
from stepdistill.errors import UserError


def tiny_extractor(name: str = "tiny", dim: int = 24) -> Extractor:
    """A random three-layer network: random features are enough to notice blur, noise and missing classes."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / np.prod(shape[1:]) ** 0.5

    layers = [weight(12, 3, 5, 5), weight(16, 12, 3, 3), weight(dim // 2, 16, 3, 3)]
    layers[0][:6] -= layers[0][:6].mean((2, 3), keepdim=True)  # half of the first filters see edges alone

    def network(images: Tensor) -> Tensor:
        x = images.float() / 127.5 - 1
        for layer in layers:
            x = F.leaky_relu(F.conv2d(x, layer, stride=2, padding=1), 0.1)
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)

    return Extractor(name, dim, "0" * 64, network, chunk=16)


def pictures(first: int, count: int, seed: int = 7) -> Tensor:
    drawn = np.stack([scenes.image_at(index, seed)[1] for index in range(first, first + count)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()


def stats_of(images: Tensor, extractor: Extractor) -> FeatureStats:
    return FeatureStats(extractor.dim, extractor.source).add(extractor(images))


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return tiny_extractor()


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    return pictures(0, 400), pictures(400, 400)


# -------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_distance_has_the_same_bits_for_every_batch_size(batch: int, extractor: Extractor, data) -> None:
    images, reference = data[0][:203], stats_of(data[1], extractor)

    def measured(batches) -> dict[str, float]:
        inputs = Inputs(images=MemoryImages(batches), extractor=extractor, reference=reference)
        return FrechetDistance().compute(inputs)

    whole = measured([images])
    assert measured(images.split(batch)) == whole
    assert set(whole) == {"fd:tiny", "fd:tiny/se", "fd:tiny/infinity", "fd:tiny/infinity/se"}
    assert whole["fd:tiny/se"] > 0 and whole["fd:tiny/infinity"] < whole["fd:tiny"]


def test_padding_does_not_leak_into_features(extractor: Extractor, data) -> None:
    torch.testing.assert_close(extractor(data[0][:5]), extractor(data[0][:16])[:5], rtol=0, atol=1e-6)
    assert extractor(data[0][:5]).shape == (5, 24)


def test_rechunked_keeps_order_and_sizes() -> None:
    rows = torch.arange(100)
    for sizes in ([100], [1] * 100, [33, 0, 40, 27]):
        parts = list(rechunked(rows.split(sizes), 16))
        assert [len(part) for part in parts] == [16] * 6 + [4]
        assert torch.equal(torch.cat(parts), rows)


def test_first_takes_exactly_so_many(data) -> None:
    images = MemoryImages(data[0].split(64))
    assert torch.equal(torch.cat(list(images.first(100))), data[0][:100]) and len(images.first(100)) == 100
    assert images.first(1000) is images


# -------------------------------------------------------------------------------- calibration


def rising(levels: list[Tensor], reference: FeatureStats, extractor: Extractor) -> list[float]:
    return [frechet_distance(stats_of(level, extractor), reference) for level in levels]


def test_distance_rises_with_blur(extractor: Extractor, data) -> None:
    def blurred(sigma: float) -> Tensor:
        if not sigma:
            return data[0]
        at = torch.arange(-6, 7).float()
        kernel = torch.exp(-(at**2) / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).repeat(3, 1, 1)
        x = F.pad(data[0].float(), (6, 6, 6, 6), mode="replicate")
        x = F.conv2d(F.conv2d(x, kernel[:, :, :, None], groups=3), kernel[:, :, None, :], groups=3)
        return x.round().to(torch.uint8)

    found = rising([blurred(s) for s in (0, 0.8, 1.2, 2, 3)], stats_of(data[1], extractor), extractor)
    assert found == sorted(found) and found[-1] > 3 * found[0]


def test_distance_rises_with_noise(extractor: Extractor, data) -> None:
    noise = torch.randn(data[0].shape, generator=torch.Generator().manual_seed(0))
    levels = [(data[0] + s * noise).clamp(0, 255).to(torch.uint8) for s in (0.0, 16, 32, 64, 100)]
    found = rising(levels, stats_of(data[1], extractor), extractor)
    assert found == sorted(found) and found[-1] > 3 * found[0]


def test_distance_rises_with_dropped_classes(extractor: Extractor, data) -> None:
    background = [scenes.scene_at(index, 7).background for index in range(400)]

    def without(count: int) -> Tensor:
        dropped = set(list(scenes.COLOURS)[len(scenes.COLOURS) - count :])
        return data[0][torch.tensor([colour not in dropped for colour in background])]

    found = rising([without(count) for count in (0, 2, 4, 6)], stats_of(data[1], extractor), extractor)
    assert found == sorted(found) and found[-1] > 3 * found[0]


# -------------------------------------------------------------------------------- attributes and CLIP


def test_attributes_of_rendered_scenes_and_of_the_wrong_captions() -> None:
    captions = [scenes.scene_at(index, 7).caption for index in range(60)]
    right = Attributes().compute(Inputs(images=MemoryImages(pictures(0, 60).split(9)), captions=captions))
    moved = captions[1:] + captions[:1]
    wrong = Attributes().compute(Inputs(images=MemoryImages([pictures(0, 60)]), captions=moved))
    assert right["attributes/all"] > 0.95 and wrong["attributes/all"] < 0.1
    assert {f"attributes/{name}" for name in (*scenes.ATTRIBUTES, "all")} < set(right)
    whole = scenes.attribute_accuracy(pictures(0, 60).permute(0, 2, 3, 1).numpy(), moved)
    split = Attributes().compute(Inputs(images=MemoryImages(pictures(0, 60).split(7)), captions=moved))
    assert split == wrong
    assert whole == {name: pytest.approx(split[f"attributes/{name}"], abs=1e-12) for name in whole}
    share = wrong["attributes/all"]
    assert wrong["attributes/all/se"] == pytest.approx((share * (1 - share) / 60) ** 0.5)


def test_attributes_refuse_captions_that_are_none() -> None:
    with pytest.raises(UserError, match="2 images and 1 captions"):
        Attributes().compute(Inputs(images=MemoryImages([pictures(0, 2)]), captions=["a photo of a cat"]))
    with pytest.raises(UserError, match="describes no scene"):
        Attributes().compute(Inputs(images=MemoryImages([pictures(0, 1)]), captions=["a photo of a cat"]))


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory) -> Path:
    """A random CLIPModel saved as the embedded one is: weights, tokenizer, preprocessor_config.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("clip")
    words = ("<pad>", "<start>", "<unk>", "<end>", *scenes.VOCABULARY)
    ids = {word: index for index, word in enumerate(words)}
    tokens = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unk>",
        model_max_length=24,
    )  # fmt: skip
    tokenizer.save_pretrained(path)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(ids), "max_position_embeddings": 24}
    text |= {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    vision = {"image_size": 64, "patch_size": 16}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=small | text, vision_config=small | vision, projection_dim=8)
    model = CLIPModel(config)
    model.save_pretrained(path)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def test_clip_score_is_the_mean_cosine(clip_directory: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    images, captions = pictures(0, 70), [scenes.scene_at(index, 7).caption for index in range(70)]
    inputs = Inputs(images=MemoryImages(images.split(33)), captions=captions)
    found = ClipScore(clip_directory, "tiny").compute(inputs)
    model = CLIPModel.from_pretrained(clip_directory)
    tokenizer = AutoTokenizer.from_pretrained(clip_directory)
    pixels = (images.float() / 255 - 0.5) / 0.25
    with torch.no_grad():  # the definition, through the towers themselves, one caption at a time
        pictured = model.visual_projection(model.vision_model(pixels).pooler_output)
        pooled = [model.text_model(**tokenizer(text, return_tensors="pt")).pooler_output for text in captions]
        spoken = model.text_projection(torch.cat(pooled))
    cosine = (F.normalize(pictured, dim=1) * F.normalize(spoken, dim=1)).sum(1).double()
    assert found["clip:tiny"] == pytest.approx(100 * cosine.mean().item(), abs=1e-4)
    assert found["clip:tiny/se"] == pytest.approx(100 * cosine.std().item() / 70**0.5, abs=1e-4)


def test_clip_score_takes_what_older_transformers_return(clip_directory: Path, monkeypatch) -> None:
    images, captions = pictures(0, 4), [scenes.scene_at(index, 7).caption for index in range(4)]
    score = ClipScore(clip_directory)
    now = score.cosines([images], captions)
    model = score._clip.model
    for name in ("get_image_features", "get_text_features"):
        inner = getattr(model, name)

        def bare(inner=inner, **inputs):
            output = inner(**inputs)
            return output if isinstance(output, Tensor) else output.pooler_output

        monkeypatch.setattr(model, name, bare)
    assert torch.equal(score.cosines([images], captions), now)


def test_clip_score_does_not_depend_on_the_batch_and_wants_one_caption_each(clip_directory: Path) -> None:
    images, captions = pictures(0, 60), [scenes.scene_at(index, 7).caption for index in range(60)]
    score = ClipScore(clip_directory)
    assert torch.equal(score.cosines([images], captions), score.cosines(images.split(7), captions))
    with pytest.raises(UserError, match="60 images and 59 captions"):
        score.cosines([images], captions[:59])


# -------------------------------------------------------------------------------- latency


class Sleeper:
    """Stands for an ImageSampler: reports times that grow with the steps."""

    def __init__(self, per_call: float) -> None:
        self.per_call = per_call
        self.asked: list[tuple] = []
        self.device, self.traced = torch.device("cpu"), False

    def trace(self) -> None:
        self.traced = True

    def calls(self, guidance: float) -> int:
        return 1 if guidance == 1 else 2

    def __call__(self, prompts, seeds, *, steps, guidance_scale, chunk, timings) -> Tensor:
        self.asked.append((tuple(prompts), tuple(seeds), steps, guidance_scale, chunk))
        denoise = self.per_call * steps * self.calls(guidance_scale)
        timings |= {"text": 0.001, "denoise": denoise, "decode": 0.002}
        return torch.zeros(len(prompts), 3, 8, 8, dtype=torch.uint8)


def test_latency_splits_stages_and_takes_turns() -> None:
    student, teacher = Sleeper(0.004), Sleeper(0.003)
    entries = [Timed(student, 2, 1.0), Timed(teacher, 50, 3.0)]
    own, other = measure(entries, ["a", "b"], images=3, batch=0)
    assert "throughput" not in own
    assert (own["denoise_ms"], own["nfe"], own["ms_per_call"]) == pytest.approx((8, 2, 4))
    assert (other["denoise_ms"], other["nfe"], other["ms_per_call"]) == pytest.approx((300, 100, 3))
    assert (own["text_ms"], own["decode_ms"]) == pytest.approx((1, 2))
    assert own["ms_p90"] >= own["ms"] > 0
    assert [asked[0] for asked in student.asked] == [("a",), ("a",), ("b",), ("a",)]  # a warm-up comes first
    for sampler in (student, teacher):
        assert [asked[1] for asked in sampler.asked] == [(0,), (0,), (1,), (2,)]
    assert all(asked[4] == 1 for asked in student.asked)
    found = Latency().compute(Inputs(timed=entries, captions=["a"]))
    assert found["latency/speedup_denoise"] == pytest.approx(300 / 8)


def test_throughput_is_of_full_batches_in_turns() -> None:
    student, teacher = Sleeper(0.004), Sleeper(0.003)
    own, other = measure([Timed(student, 2, 1.0), Timed(teacher, 50, 3.0)], ["a", "b"], images=1, batch=4)
    batches = [asked for asked in student.asked if len(asked[0]) == 4]
    assert [asked[0] for asked in batches] == [("a", "b", "a", "b")] * 4  # a warm-up comes first
    assert [asked[1] for asked in batches] == [(0, 1, 2, 3), (0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    assert all(asked[4] == 4 for asked in batches)
    assert own["throughput_batch"] == 4 and own["throughput"] > 0
    stages = [own[f"throughput_{stage}_ms"] for stage in ("text", "denoise", "decode")]
    assert stages == pytest.approx([1 / 4, 8 / 4, 2 / 4])
    assert other["throughput_denoise_ms"] == pytest.approx(300 / 4)


# -------------------------------------------------------------------------------- protocols


def test_protocol_hash_covers_what_changes_a_number() -> None:
    from dataclasses import replace

    protocol = get_protocol("scenes-2k")
    assert protocol.hash == "e91ba17ff0c64669"
    assert replace(protocol, about="other words").hash == protocol.hash
    for change in ({"n": 1000}, {"first_seed": 5}, {"reference": SceneReference(first=0)}, {"version": 2}):
        assert replace(protocol, **change).hash != protocol.hash


def test_scenes_2k_asks_for_scenes_its_reference_has_not() -> None:
    protocol = PROTOCOLS["scenes-2k"]
    assert protocol.prompts(3) == [scenes.scene_at(index, 1_000_003).caption for index in range(3)]
    assert protocol.seeds(3) == [0, 1, 2]
    assert (protocol.label(2000), protocol.label(500)) == ("scenes-2k", "scenes-2k[n=500]")
    assert protocol.reference.first >= protocol.n and len(protocol.reference) == 4000
    first = next(iter(protocol.reference))[0]
    assert np.array_equal(first.permute(1, 2, 0).numpy(), scenes.image_at(10_000, 1_000_003)[1])


def test_reference_statistics_are_kept_and_made_again_when_damaged(tmp_path, monkeypatch, extractor) -> None:
    from dataclasses import replace

    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path))
    protocol = replace(PROTOCOLS["scenes-2k"], reference=SceneReference(n=110))
    stats = reference_stats(protocol, extractor)
    (kept,) = (tmp_path / "statistics").iterdir()
    assert protocol.hash in kept.name and stats.n == 110
    monkeypatch.setattr(SceneReference, "__iter__", lambda self: pytest.fail("the cache was not used"))
    assert np.array_equal(reference_stats(protocol, extractor).cov, stats.cov)
    monkeypatch.undo()
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path))
    kept.write_bytes(b"half a file")
    assert np.array_equal(reference_stats(protocol, extractor).cov, stats.cov)


def test_changed_pixels_are_another_reference(tmp_path) -> None:
    save_images(tmp_path, pictures(0, 3))
    before = FileReference.open(tmp_path)
    changed = pictures(0, 3)
    changed[1, 0, 0, 0] ^= 1
    save_images(tmp_path, changed)
    assert FileReference.open(tmp_path).sha256() != before.sha256()


# -------------------------------------------------------------------------------- evaluate


def test_evaluate_a_perfect_and_a_bad_sampler(tmp_path, monkeypatch) -> None:
    from dataclasses import replace

    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path))
    protocol = replace(PROTOCOLS["scenes-2k"], reference=SceneReference(n=400))
    asked: list[int] = []

    def perfect(prompts, seeds) -> Tensor:
        asked.append(len(prompts))
        wanted = map(scenes.parse_caption, prompts)
        drawn = [
            scenes.render(scene, np.random.default_rng(s)) for scene, s in zip(wanted, seeds, strict=True)
        ]
        return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)

    def grey(prompts, seeds) -> Tensor:
        return torch.full((len(prompts), 3, 64, 64), 128, dtype=torch.uint8)

    options = {"protocol": protocol, "n": 100, "metrics": ("fd", "attributes"), "extractor": tiny_extractor()}
    good, bad = evaluation.evaluate(perfect, **options), evaluation.evaluate(grey, **options)
    assert asked == [64, 36]
    assert good["protocol"] == "scenes-2k[n=100]" and good["n"] == 100
    assert good["fd:tiny"] < 0.1 * bad["fd:tiny"]
    assert good["attributes/all"] > 0.95 and bad["attributes/all"] == 0
    assert evaluation.evaluate(perfect, **options, batch=7) == good


def test_evaluate_class_conditional_against_real_images(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    save_images(tmp_path / "real", pictures(0, 30))
    asked: list[int] = []

    def sampler(classes, seeds) -> Tensor:
        asked.extend(classes)
        return pictures(int(seeds[0]), len(classes))

    found = evaluation.evaluate(
        sampler, reference=tmp_path / "real", classes=4, metrics=("fd",), extractor=tiny_extractor()
    )
    assert asked == [index % 4 for index in range(30)]
    assert found["protocol"] == "images:real" and found["fd:tiny"] < 1e-8
    with pytest.raises(UserError, match="'clip' cannot be measured here"):
        evaluation.evaluate(sampler, reference=tmp_path / "real", metrics=("fd", "clip"))


def test_evaluate_refuses_what_makes_no_sense() -> None:
    def wrong(prompts, seeds) -> Tensor:
        return torch.zeros(len(prompts) - 1, 3, 8, 8, dtype=torch.uint8)

    def floats(prompts, seeds) -> Tensor:
        return torch.zeros(len(prompts), 3, 8, 8)

    with pytest.raises(UserError, match="at least 2 samples, got 1"):
        evaluation.evaluate(wrong, n=1, metrics=("attributes",))
    with pytest.raises(UserError, match=r"'atributes'\. Did you mean 'attributes'"):
        evaluation.evaluate(wrong, n=4, metrics=("atributes",))
    with pytest.raises(UserError, match="no protocol 'scenes'"):
        evaluation.evaluate(wrong, protocol="scenes")
    with pytest.raises(UserError, match="'latency' cannot be measured here"):
        evaluation.evaluate(wrong, n=4, metrics=("latency",))
    with pytest.raises(UserError, match="3 images for 4 prompts"):
        evaluation.evaluate(wrong, n=4, metrics=("attributes",))
    with pytest.raises(UserError, match="uint8 tensor"):
        evaluation.evaluate(floats, n=4, metrics=("attributes",))


def test_evaluate_is_called_as_the_documentation_says(tmp_path, monkeypatch) -> None:
    from evaluation import FeatureStats, evaluate, frechet_distance

    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path))
    drawn = pictures(0, 30)

    def sampler(prompts, seeds) -> Tensor:
        return drawn[: len(prompts)]

    net = tiny_extractor()
    reference = FeatureStats(net.dim, net.source).add(net(pictures(100, 40)))
    found = evaluate(sampler, "scenes-2k", n=30, metrics=("fd",), extractor=net, reference=reference)
    truth = frechet_distance(FeatureStats(net.dim, net.source).add(net(drawn)), reference)
    assert found["fd:tiny"] == pytest.approx(truth, rel=1e-9)
    with pytest.raises(AttributeError):
        evaluation.frechet  # noqa: B018


def test_what_a_metric_cannot_be_computed_from_is_said_before_anything_is_drawn() -> None:
    def sampler(prompts, seeds) -> Tensor:
        raise AssertionError("a sample was drawn")

    for metric, n, reason in (
        ("fid", 20, "FID is defined by the extractor inception-2015, and scenes-v1 is in use"),
        ("is", 20, "needs a classifier"),
        ("prdc", 5, "more than 5 images on each side, got 5"),
        ("diversity", 3, "every prompt here has one"),
    ):
        with pytest.raises(UserError, match=reason):
            evaluation.evaluate(sampler, n=n, metrics=(metric,))
    with pytest.raises(UserError, match=r"preprocessor_config\.json cannot be read"):
        evaluation.evaluate(sampler, n=20, metrics=("clip",), clip=Path(__file__).parent)


def test_a_value_stands_for_its_metric() -> None:
    assert list(get_metrics(["attributes/all", "attributes", "attributes/count"], METRICS)) == ["attributes"]


@pytest.mark.skipif(
    not all((ROOT / name).is_dir() for name in ("scenes-v1", "clip")),
    reason="needs assets/scenes-v1 and assets/clip",
)
def test_embedded_networks_tell_right_from_wrong(tmp_path, monkeypatch) -> None:
    from dataclasses import replace

    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path))
    protocol = replace(PROTOCOLS["scenes-2k"], reference=SceneReference(n=400))

    def draw(shift: int, noise: float):
        def sampler(prompts, seeds) -> Tensor:
            drawn = np.stack([scenes.image_at(seed + shift, protocol.prompt_seed)[1] for seed in seeds])
            noisy = drawn + noise * np.random.default_rng(int(seeds[0])).standard_normal(drawn.shape)
            return torch.from_numpy(np.clip(noisy, 0, 255).astype(np.uint8)).permute(0, 3, 1, 2)

        return sampler

    right, noisy, moved = (
        evaluation.evaluate(draw(shift, noise), protocol=protocol, n=200)
        for shift, noise in ((0, 0), (0, 40), (1, 0))
    )
    assert right["fd:scenes-v1"] < 0.2 * noisy["fd:scenes-v1"]
    assert moved["fd:scenes-v1"] == pytest.approx(right["fd:scenes-v1"], abs=5 * right["fd:scenes-v1/se"])
    assert right["clip:scenes-v1"] > moved["clip:scenes-v1"] + 30
    assert right["attributes/all"] > 0.95 and moved["attributes/all"] < 0.1


def test_every_metric_says_what_it_needs() -> None:
    fields = set(Inputs.__dataclass_fields__)
    for name in ("fd", "attributes", "latency"):
        (metric,) = get_metrics([name], METRICS).values()
        assert metric.needs and metric.needs <= fields


# -------------------------------------------------------------------------------- kept samples


def configuration(**changes) -> Configuration:
    usual = {"pipeline": "student", "pipeline_sha256": "0", "protocol": "p", "steps": 1, "guidance": 1.0}
    return Configuration(**(usual | {"chunk": 50, "device": "cpu"} | changes))


def test_samples_are_resumed_extended_and_forced(tmp_path) -> None:
    asked: list[int] = []

    def sampler(prompts, seeds) -> Tensor:
        asked.extend(seeds)
        if len(asked) == 250:
            raise KeyboardInterrupt
        return torch.stack([torch.full((3, 4, 4), seed % 251, dtype=torch.uint8) for seed in seeds])

    def collect(count: int, **options) -> Tensor:
        names = [str(index) for index in range(count)]
        return torch.cat(list(generate(sampler, configuration(), names, range(count), tmp_path, **options)))

    with pytest.raises(KeyboardInterrupt):
        collect(250)
    asked.clear()
    want = torch.arange(250) % 251
    assert torch.equal(collect(200)[:, 0, 0, 0], want[:200])
    assert asked == list(range(SHARD, 200))  # the first shard was kept
    asked.clear()
    assert torch.equal(collect(240)[:, 0, 0, 0], want[:240])
    assert asked == list(range(200, 240))  # the second is completed
    asked.clear()
    assert len(collect(100)) == 100 and not asked
    assert len(collect(100, force=True)) == 100 and asked == list(range(100))
    (folder,) = tmp_path.iterdir()
    shard = folder / "0000000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    asked.clear()
    assert len(collect(100)) == 100 and len(asked) == 100


def test_every_setting_has_its_own_samples() -> None:
    changes = {
        "steps": 2,
        "guidance": 2.0,
        "pipeline_sha256": "1",
        "protocol": "q",
        "chunk": 1,
        "device": "cuda",
    }
    keys = {configuration(**{name: value}).key for name, value in changes.items()}
    assert len(keys | {configuration().key}) == len(changes) + 1


# -------------------------------------------------------------------------------- files


def save_images(folder: Path, images: Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:03d}.png")


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def test_folder_and_parquet_give_the_same_images(tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = pictures(0, 70)
    save_images(tmp_path / "folder", images)
    files = sorted((tmp_path / "folder").iterdir())
    cells = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    table = pa.table({"image": cells, "label": list(range(70))})
    pq.write_table(table, tmp_path / "data.parquet", row_group_size=20)
    for path in (tmp_path / "folder", tmp_path / "data.parquet"):
        opened = open_images(path)
        assert len(opened) == 70 and torch.equal(torch.cat(list(opened)), images)
    pq.write_table(pa.table({"pixels": [1]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="columns pixels; one named `image`"):
        open_images(tmp_path / "other.parquet")


def test_lossless_formats_are_turned_into_rgb() -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    for image in (grey, grey.convert("RGBA"), grey.convert("LA"), grey.convert("P"), grey.convert("RGB")):
        found = decode(encoded(image), "x").pixels
        assert found.shape == (8, 8, 3) and np.array_equal(found[:, :, 0], np.asarray(grey))


def deep_png(channels: int) -> bytes:
    """A PNG of 8 x 8 pixels with 16 bits a channel, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 8, 8, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x12\x34" * 8 * channels) * 8)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_images_that_cannot_be_used(tmp_path) -> None:
    clear = Image.new("RGBA", (8, 8), (1, 2, 3, 100))
    with pytest.raises(UserError, match="x has transparent pixels"):
        decode(encoded(clear), "x")
    with pytest.raises(UserError, match="x has 16 bits a channel"):
        decode(encoded(Image.fromarray(np.zeros((8, 8), np.uint16))), "x")
    for channels in (3, 4):  # Pillow opens these as 8-bit RGB and RGBA
        with pytest.raises(UserError, match="x has 16 bits a channel"):
            decode(deep_png(channels), "x")
    with pytest.raises(UserError, match=r"cannot be read as an image \(its format is none that is known\)"):
        decode(b"hello", "x")
    with pytest.raises(UserError, match="pixel format CMYK"):
        decode(encoded(Image.new("CMYK", (8, 8)), "JPEG"), "x")
    with pytest.raises(UserError, match="cannot be read as an image"):
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        decode(encoded(Image.fromarray(noise))[:900], "x")
    with pytest.raises(UserError, match="there is nothing at"):
        open_images(tmp_path / "missing")
    with pytest.raises(UserError, match="there is no image"):
        open_images(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (9, 8)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png is 9x8 but .*a\.png is 8x8"):
        list(open_images(tmp_path))


def test_extractor_from_a_directory(tmp_path) -> None:
    from evaluation.feature_net import FeatureNet

    torch.manual_seed(0)
    net = FeatureNet("mine", 32, 16, {"label": ["a", "b"]})
    net.save(tmp_path / "net")
    first = load_extractor(tmp_path / "net")
    images = pictures(0, 5)
    assert (first.name, first.dim) == ("mine", 16) and "32" in first.resize
    torch.testing.assert_close(first(images), FeatureNet.load(tmp_path / "net")(images), rtol=0, atol=1e-5)
    with torch.no_grad():
        nn.init.ones_(net.head.weight)
    net.save(tmp_path / "net")
    assert load_extractor(tmp_path / "net").sha256 != first.sha256
    with pytest.raises(UserError, match=r"no extractor 'scenes-v2'.*Did you mean 'scenes-v1'"):
        load_extractor("scenes-v2")


def test_real_images_are_known_by_content(tmp_path) -> None:
    save_images(tmp_path / "a", pictures(0, 3))
    save_images(tmp_path / "b" / "a", pictures(0, 3))
    one, other = real_images(tmp_path / "a", classes=10), real_images(tmp_path / "b" / "a", classes=10)
    assert one.hash == other.hash and one.hash != real_images(tmp_path / "a").hash
