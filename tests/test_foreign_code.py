"""No file makes code run: what a recipe, a card, a pipeline directory or a protocol names is looked up, not
imported.

Each canary would leave a file behind if it ran; the test is that there is none, and one sentence instead.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import stepdistill
from evaluation.metrics import METRICS
from stepdistill.errors import UserError
from stepdistill.eyes import EYES
from stepdistill.families import FAMILIES
from stepdistill.methods import METHODS
from stepdistill.registry import allowing_code, resolve
from stepdistill.rewards import REWARDS
from training.data import DATA

ROOT = Path(__file__).resolve().parent.parent
TABLES = {
    "family": FAMILIES,
    "method": METHODS,
    "data": DATA,
    "metric": METRICS,
    "eye": EYES,
    "reward": REWARDS,
}
CANARY = """\
from pathlib import Path
Path({trace!r}).touch()
class X:
    def __init__(self, *args, **kwargs):
        Path({made!r}).touch()
"""


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module `canary` that can be imported; what it leaves behind when it runs."""
    trace, made = tmp_path / "ran", tmp_path / "made"
    (tmp_path / "canary.py").write_text(CANARY.format(trace=str(trace), made=str(made)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "canary", raising=False)
    yield trace
    sys.modules.pop("canary", None)


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def toy(out: Path, **sections: Any) -> dict[str, Any]:
    base = {"family": "toy", "method": "dmd2", "data": "toy", "run": {"steps": 1, "out": str(out)}}
    return base | sections


# -------------------------------------------------------------------------------------------- registered names


@pytest.mark.parametrize("what", TABLES)
def test_nothing_outside_a_table_is_imported_unless_allowed(canary: Path, what: str) -> None:
    said = refusal(resolve, "canary:X", TABLES[what], what, where=f"the {what}")
    assert f"the {what} 'canary:X' would import the module canary and run its class X" in said
    assert "--allow-code" in said and not canary.exists()
    with allowing_code():
        said = refusal(resolve, "canary:X", TABLES[what], what, registered_only=True)
    assert "would import the module canary" in said and "--allow-code" not in said and not canary.exists()


@pytest.mark.parametrize("what", TABLES)
def test_what_is_allowed_is_still_of_its_kind(what: str) -> None:
    """Every registered class is, and a class of another kind is never made."""
    for name in TABLES[what]:
        resolve(name, TABLES[what], what)
    with allowing_code():
        said = refusal(resolve, "subprocess:Popen", TABLES[what], what)
        assert f"Popen is no {what}" in said and "derive it from" in said
        for kind, table in TABLES.items():
            if kind != what:
                refusal(resolve, next(iter(table.values())), TABLES[what], what)


def test_permission_ends_with_its_block(canary: Path) -> None:
    with pytest.raises(RuntimeError), allowing_code():
        raise RuntimeError
    refusal(resolve, "canary:X", EYES, "eye")
    with allowing_code(), allowing_code(False):
        refusal(resolve, "canary:X", EYES, "eye")
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["", ":", "a:", ":B", ".a:B", "a b:C", "a:B.c", "../x:Y", "a\n:B", None, 3, ["a:B"], {}]
)
def test_what_is_no_name_is_said_to_be_unknown(name: Any) -> None:
    with allowing_code():
        assert f"unknown eye {name!r}" in refusal(resolve, name, EYES, "eye")


NAMED = {
    "family.name": {"family": "canary:X"},
    "method.name": {"method": "canary:X"},
    "data.name": {"data": "canary:X"},
    "method.eye": {"method": {"name": "add", "eye": "canary:X"}},
    "method.reward": {"method": {"name": "reward", "reward": "canary:X"}},
    "method.base.name": {"method": {"name": "disback", "base": {"name": "canary:X"}}},
    "method.parts.1.name": {"method": {"name": "compose", "parts": [{"name": "sim"}, {"name": "canary:X"}]}},
    "stages.0": {"stages": [{"method": "canary:X", "run": {"steps": 1}}]},
}


@pytest.mark.parametrize("field", NAMED)
def test_a_recipe_runs_no_code(canary: Path, tmp_path: Path, capsys: Any, field: str) -> None:
    from training.train import main

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(toy(tmp_path / "run", **NAMED[field])))
    for options in (["--dry-run"], [], ["--export", "latest"]):
        with pytest.raises(SystemExit) as ended:
            main([str(path), *options])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.count("\n") == 1
        if options != ["--export", "latest"]:
            assert f"{field}" in said and "would import the module canary and run its class X" in said
    assert not canary.exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_process_that_a_recipe_names_is_never_started(tmp_path: Path, capsys: Any) -> None:
    """With --allow-code neither: Popen is no eye."""
    from training.train import main

    trace = tmp_path / "ran"
    method = {"name": "add", "eye": "subprocess:Popen", "arguments": {"args": ["touch", str(trace)]}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(toy(tmp_path / "run", method=method)))
    for options, says in (([], "--allow-code"), (["--allow-code"], "Popen is no eye; derive it from")):
        with pytest.raises(SystemExit) as ended:
            main([str(path), "--dry-run", *options])
        assert ended.value.code == 2 and says in capsys.readouterr().err
    assert not trace.exists()


def test_the_command_line_allows_a_class_of_ones_own(tmp_path: Path) -> None:
    """From another directory, as a person would; and going on with the run needs the permission again."""
    (tmp_path / "own.py").write_text(
        "from stepdistill.methods.pretrain import Pretrain\nclass Mine(Pretrain):\n    pass\n"
    )
    method = {"name": "own:Mine"}
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(toy(tmp_path / "run", method=method) | {"family": {"name": "toy", "fit_steps": 1}})
    )

    def train(*options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "training.train", *options]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    done = train("recipe.yaml", "--allow-code")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["method"]["name"] == "own:Mine"
    done = train("run/recipe.yaml")
    assert done.returncode == 2 and "would import the module own and run its class Mine" in done.stderr
    done = train("run/recipe.yaml", "--allow-code")
    assert done.returncode == 0 and "finished" in done.stderr, done.stderr


# -------------------------------------------------------------------------------------------------------- cards


def student(tmp_path: Path, source: Path, card: Any) -> Path:
    path = tmp_path / "downloaded"
    shutil.copytree(source, path)
    (path / "stepdistill.json").write_text(json.dumps(card))
    return path


@pytest.mark.parametrize("family", ["canary:X", "downloaded.payload:X", "subprocess:Popen"])
def test_a_card_runs_no_code(canary: Path, tmp_path: Path, tiny_sd: Path, family: str) -> None:
    """Not even where code is allowed: the permission is for what a person named."""
    path = student(tmp_path, tiny_sd, {"family": family})
    trace = tmp_path / "payload ran"
    (path / "payload.py").write_text(CANARY.format(trace=str(trace), made=str(trace)))
    said = refusal(stepdistill.load, path)
    assert "stepdistill.json: family" in said and "would import the module" in said
    with allowing_code():
        refusal(stepdistill.load, path)
    assert not canary.exists() and not trace.exists()


@pytest.mark.parametrize("family", [3, ["sd"], {"name": "sd"}, "sd.py"])
def test_a_card_with_no_family_name_is_refused(tmp_path: Path, tiny_sd: Path, family: Any) -> None:
    assert "unknown family" in refusal(stepdistill.load, student(tmp_path, tiny_sd, {"family": family}))


# --------------------------------------------------------------------------------------------------- evaluation


def test_a_metric_of_ones_own_needs_permission(canary: Path, tmp_path: Path, capsys: Any) -> None:
    from evaluation.__main__ import main

    command = ["images", str(tmp_path), "--ref", str(tmp_path), "--metrics", "canary:X"]
    run = ["run", "--pipeline", str(tmp_path), "--out", str(tmp_path / "out"), "--metrics", "canary:X"]
    for arguments in (command, run):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        capsys.readouterr()
    assert not canary.exists()


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


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


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


# --------------------------------------------------------------------------------------------------- data files


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system", "python/name:os.system", "python/module:canary"]
)
def test_a_yaml_tag_makes_nothing(canary: Path, tmp_path: Path, tag: str) -> None:
    from evaluation.protocol import load_protocol
    from stepdistill.config import apply_overrides, read_yaml

    path = tmp_path / "x.yaml"
    path.write_text(f"a: !!{tag} ['touch {canary}']\n")
    assert "not valid YAML" in refusal(read_yaml, path)
    assert str(path) in refusal(load_protocol, path)
    assert "cannot read" in refusal(apply_overrides, {}, [f"a=!!{tag} ['touch {canary}']"])
    assert not canary.exists()


def test_statistics_are_not_unpickled(tmp_path: Path) -> None:
    import numpy as np

    from evaluation.stats import FeatureStats

    trace, path = tmp_path / "ran", tmp_path / "ref.npz"
    np.savez(path, mu=np.array([Bomb(trace)], dtype=object), sigma=np.eye(1))
    refusal(FeatureStats.load, path)
    assert not trace.exists()


def test_a_checkpoint_of_tensors_is_all_that_is_read(tmp_path: Path) -> None:
    import pickle

    import torch

    from evaluation.weights import load_file

    trace = tmp_path / "ran"
    torch.save({"x": Bomb(trace)}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Bomb(trace)))
    for name in ("a.pth", "b.pth"):
        assert name in refusal(load_file, tmp_path / name)
    assert not trace.exists()
