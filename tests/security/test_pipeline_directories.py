"""A pipeline directory names no class its family does not know, and no code, kernel, adapter or pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from canaries import CANARY, Bomb, refusal

import stepdistill

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------------------------------- pipeline directories


def edited(source: Path, target: Path, file: str, change: Callable[[dict], Any]) -> Path:
    """A copy of a directory with one JSON file changed, or made."""
    shutil.copytree(source, target)
    content = json.loads((target / file).read_text()) if (target / file).is_file() else {}
    (target / file).write_text(json.dumps(change(content) or content))
    return target


def payload(folder: Path, *names: str) -> Path:
    """Modules of these names all over `folder`; the file each would leave behind."""
    trace = folder.parent / "payload ran"
    code = CANARY.format(trace=str(trace), made=str(trace))
    code += "\n".join(f"{name} = X" for name in ("UNet2DConditionModel", "CLIPTextModel", "Mine"))
    for part in (folder, *(each for each in folder.iterdir() if each.is_dir())):
        for name in names:
            (part / f"{name}.py").write_text(code)
    return trace


INDEXES = {
    "a function": {"unet": ["os", "system"]},
    "a class of the standard library": {"unet": ["subprocess", "Popen"]},
    "a module beside the weights": {"unet": ["payload", "UNet2DConditionModel"]},
    "a module that can be imported": {"text_encoder": ["canary", "X"]},
    "a component of its own": {"helper": ["payload", "X"]},
    "a component of its own that is known elsewhere": {"helper": ["diffusers", "AutoencoderKL"]},
    "a pipeline in a component": {"unet": ["stable_diffusion", "StableDiffusionPipeline"]},
    "another class of diffusers": {"unet": ["diffusers", "UNet2DModel"]},
    "a class of transformers that takes code": {"text_encoder": ["transformers", "AutoModel"]},
    "a loader of diffusers": {"scheduler": ["diffusers", "OnnxRuntimeModel"]},
    "text": {"unet": "os"},
    "a number": {"unet": [1, 2]},
    "one part": {"unet": ["diffusers"]},
    "three parts": {"unet": ["diffusers", "UNet2DConditionModel", "x"]},
    "half of nothing": {"unet": [None, "UNet2DConditionModel"]},
    "a nested list": {"unet": [["os"], "system"]},
    "a mapping": {"unet": {"library": "os"}},
    "a custom pipeline": {"_class_name": ["payload", "Mine"]},
    "a community pipeline": {"_class_name": ["lpw_stable_diffusion", "X"]},
    "another pipeline": {"_class_name": "StableDiffusionXLPipeline"},
    "another pipeline's part": {
        "_class_name": "StableDiffusionXLPipeline",
        "text_encoder_2": ["os", "system"],
    },
    "a pipeline no family serves": {"_class_name": "AudioLDMPipeline"},
    "the base of all": {"_class_name": "DiffusionPipeline"},
    "no pipeline": {"_class_name": "UNet2DConditionModel"},
    "a pipeline of another family": {"_class_name": "DDPMPipeline"},
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_pipeline_names_no_class_but_its_familys(
    canary: Path, tmp_path: Path, tiny_sd: Path, case: str
) -> None:
    from stepdistill.families.sd import SD

    path = edited(tiny_sd, tmp_path / "x", "model_index.json", lambda index: index.update(INDEXES[case]))
    trace = payload(path, "payload", "pipeline")
    said = refusal(SD.from_directory, path)
    assert "model_index.json" in said
    if case != "a pipeline of another family":
        refusal(stepdistill.load, path)
    assert not trace.exists() and not canary.exists()


CONFIGS = {
    "unet/config.json": {"auto_map": {"AutoModel": "payload.Mine"}},
    "text_encoder/config.json": {"auto_map": {"AutoModel": "payload.Mine"}},
    "tokenizer/tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["payload.Mine", None]}},
    "vae/config.json": {"quantization_config": {"quant_method": "bitsandbytes"}},
    "scheduler/scheduler_config.json": {"nested": [{"auto_map": {"x": "payload.Mine"}}]},
    "text_encoder/adapter_config.json": {"base_model_name_or_path": "owner/name"},
    "unet/adapter_config.json": {},
}


@pytest.mark.parametrize("file", CONFIGS)
def test_a_configuration_names_no_code(tmp_path: Path, tiny_sd: Path, file: str) -> None:
    path = edited(tiny_sd, tmp_path / "x", file, lambda config: config.update(CONFIGS[file]))
    trace = payload(path, "payload")
    assert file in refusal(stepdistill.load, path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"]
)
def test_a_configuration_names_no_kernel(tmp_path: Path, tiny_sd: Path, key: str) -> None:
    file = "text_encoder/config.json"
    for number, kernel in enumerate(("owner/kernel", {"": "owner/kernel"}, "flash_attention_2")):
        path = edited(tiny_sd, tmp_path / str(number), file, lambda config, k=kernel: config.update({key: k}))
        said = refusal(stepdistill.load, path)
        assert file in said and key in said


@pytest.mark.parametrize("shard", ["evil.bin", "../elsewhere.safetensors", "/tmp/x.safetensors", 3, None])
def test_shards_are_safetensors_beside_their_index(tmp_path: Path, tiny_sd: Path, shard: Any) -> None:
    file = "unet/diffusion_pytorch_model.safetensors.index.json"
    path = edited(
        tiny_sd, tmp_path / "x", file, lambda index: index.update(weight_map={"conv_in.weight": shard})
    )
    assert file in refusal(stepdistill.load, path)


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("beside", [False, True])
def test_no_pickle_is_opened(tmp_path: Path, tiny_sd: Path, component: str, beside: bool) -> None:
    """Neither instead of a component's safetensors nor under their name; one that lies beside is left alone."""
    import pickle

    path, trace = tmp_path / "x", tmp_path / "ran"
    shutil.copytree(tiny_sd, path)
    (weights,) = (path / component).glob("*.safetensors")
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
        (path / component / name).write_bytes(pickle.dumps(Bomb(trace)))
    if beside:
        assert stepdistill.load(path).kind == "teacher"
        weights.write_bytes(pickle.dumps(Bomb(trace)))
    else:
        weights.unlink()
    refusal(stepdistill.load, path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\x00", b"", b"[]", b"{}", b" " * (17 << 20)])
def test_a_damaged_index_is_one_sentence(tmp_path: Path, tiny_sd: Path, content: bytes) -> None:
    path = tmp_path / "x"
    shutil.copytree(tiny_sd, path)
    (path / "model_index.json").write_bytes(content)
    assert "model_index.json" in refusal(stepdistill.load, path)


def test_what_the_families_know_is_what_they_write(tmp_path: Path, tiny_sd: Path, tiny_pixel: Path) -> None:
    """The other side: stock pipelines pass, with and without the parts that are not loaded."""
    index = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    index |= {"feature_extractor": ["transformers", "CLIPFeatureExtractor"], "requires_safety_checker": True}
    stock = edited(tiny_sd, tmp_path / "sd", "model_index.json", lambda known: known.update(index))
    for path in (tiny_sd, tiny_pixel, stock):
        assert stepdistill.load(path).kind == "teacher"


def test_a_fresh_network_is_built_beside_checked_parts(tmp_path: Path, tiny_sd: Path) -> None:
    from stepdistill.families.sd import SD

    config = {"auto_map": {"AutoTokenizer": ["payload.Mine", None]}}
    path = edited(tiny_sd, tmp_path / "x", "tokenizer/tokenizer_config.json", lambda old: old.update(config))
    trace = payload(path, "payload")
    said = refusal(SD, SD.Config(teacher=str(path), unet={"sample_size": 4}))
    assert "auto_map" in said and not trace.exists()


def test_the_layer_beside_a_pipeline_is_not_unpickled(tmp_path: Path, tiny_pixel: Path) -> None:
    import pickle

    path, trace = tmp_path / "x", tmp_path / "ran"
    shutil.copytree(tiny_pixel, path)
    (path / "end.safetensors").write_bytes(pickle.dumps(Bomb(trace)))
    assert "end.safetensors cannot be loaded" in refusal(stepdistill.load, path)
    assert not trace.exists()


def test_a_clip_names_no_code(tmp_path: Path) -> None:
    from evaluation.metrics.clip_score import ClipScore
    from stepdistill import assets
    from stepdistill.clip import Clip

    config = {"auto_map": {"AutoTokenizer": ["payload.Mine", None]}}
    path = edited(
        assets.path("clip"), tmp_path / "x", "tokenizer_config.json", lambda old: old.update(config)
    )
    trace = payload(path, "payload")
    assert "auto_map" in refusal(Clip, str(path))
    assert "auto_map" in refusal(lambda: ClipScore(path)._clip)
    assert not trace.exists()
