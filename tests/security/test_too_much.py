"""Nothing that a file asks for is more than a person would mean: it is refused before anything is built or walked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import worlds
from canaries import refusal

import stepdistill
from stepdistill.config import apply_overrides, build
from stepdistill.errors import LONGEST, UserError
from stepdistill.families.toy import Toy
from stepdistill.sampling import Sampling
from stepdistill.yaml_files import read_yaml
from training.sections import OptimConfig, RunConfig

# Each line stands for ten times the line before.
ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 2000))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ALIASES, "more than 100,000 values, each alias counted"),
        (CHAIN, "nested over more than 40 levels"),
        ("a: &a {b: *a}", "nested over more than 40 levels"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested over more than 40 levels"),
        ("{a: " * 100 + "1" + "}" * 100, "nested over more than 40 levels"),
        ("a: " + "9" * 6000, "not valid YAML: Exceeds the limit"),
        ("a: 2026-02-30", "not valid YAML"),
        ("? [1, 2]\n: 3", "not valid YAML"),
        ("a: !!python/object/apply:os.system [exit]", "not valid YAML"),
        ("a: \0", "not valid YAML"),
        ("a: " + "x" * (1 << 20), "it has more than 1 MiB"),
    ],
)
def test_yaml_of_more_than_a_person_writes_is_a_sentence(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert said in refusal(read_yaml, tmp_path / "r.yaml")
    if len(text) < 10_000 and "\n" not in text and text[0] == "a":
        assert "cannot read" in refusal(apply_overrides, {}, [f"a={text[3:]}"])


def test_a_sentence_is_no_longer_than_a_screen_and_moves_no_cursor() -> None:
    said = str(UserError("x" * 10_000_000))
    assert len(said) < LONGEST + 20
    assert str(UserError("a\x1b[2J\n\ud800é")) == "a\\x1b[2J\\n\\ud800é"
    assert str(UserError("12").args[0]) == "12"


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (RunConfig, {"steps": 10**400}),
        (RunConfig, {"steps": 10**18}),
        (RunConfig, {"steps": 1, "seed": 2**63}),
        (RunConfig, {"steps": 1, "preview_count": 10**12}),
        (OptimConfig, {"batch_size": 10**12}),
        (OptimConfig, {"lr": 10**400}),
        (Toy.Config, {"modes": 0}),
        (Toy.Config, {"modes": 10**9}),
        (Toy.Config, {"classes": 0}),
        (Toy.Config, {"classes": -2}),
        (Toy.Config, {"modes": 2, "classes": 3}),
        (Toy.Config, {"std": 0}),
        (Toy.Config, {"uneven": 1.0}),
        (Toy.Config, {"fit_steps": -1}),
        (Sampling, {"steps": [10**9]}),
        (Sampling, {"finest": 10**9}),
    ],
)
def test_numbers_out_of_all_range_are_refused_by_name(cls: Any, values: dict[str, Any]) -> None:
    values = ({"out": "runs/x"} if cls is RunConfig else {}) | values
    assert list(values)[-1] in refusal(build, cls, values, "here")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dmd2", {"gan_weight": -1.0}),
        ("dmd2", {"gan_weight": 1.0, "gan_critic_weight": -0.1}),
        ("dmd", {"regression_weight": -1.0}),
        ("dmd2", {"critic_dropout": 1.5}),
        ("meanflow", {"equal_share": -0.1}),
        ("cd", {"target_ema": 1.0}),
        ("cd", {"guidance_scale": float("inf")}),
    ],
)
def test_weights_below_nothing_and_shares_of_no_whole_are_refused(
    name: str, settings: dict[str, Any]
) -> None:
    assert f"method.{list(settings)[-1]} must be" in refusal(worlds.method, name, **settings)


def test_a_part_of_a_composition_is_refused_by_its_place() -> None:
    parts = [{"name": "dmd2"}, {"name": "dmd2", "gan_weight": -1}]
    assert "method.parts.1.gan_weight must be 0 or more" in refusal(worlds.method, "compose", parts=parts)
    for weight in ("much", -1, [1]):
        parts = [{"name": "dmd2"}, {"name": "dmd2", "weight": weight}]
        assert "method.parts.1.weight" in refusal(worlds.method, "compose", parts=parts)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("unet", "layers_per_block", 10**6),
        ("unet", "transformer_layers_per_block", [10**6, 1]),
        ("unet", "block_out_channels", [16] * 2000),
        ("text_encoder", "num_hidden_layers", 10**6),
        ("scheduler", "num_train_timesteps", 10**9),
        ("scheduler", "beta_end", 5),
        ("scheduler", "trained_betas", [1.0] * 10),
        ("unet", "sample_size", "x"),
        ("unet", "sample_size", -1),
    ],
)
def test_a_configuration_that_asks_for_no_possible_network_is_one_sentence(
    file: str, key: str, value: Any, tmp_path: Path
) -> None:
    directory = tmp_path / "teacher"
    shutil.copytree(tiny.directory("sd15"), directory)
    (path,) = [p for p in (directory / file).glob("*config.json") if p.name != "generation_config.json"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refusal(stepdistill.load, directory)


def test_a_card_of_too_many_students_is_refused(tmp_path: Path) -> None:
    card = {"format": 2, "kind": "students", "students": ["0"] * 100_000}
    (tmp_path / "stepdistill.json").write_text(json.dumps(card))
    assert "students must be at most" in refusal(stepdistill.load, tmp_path)
