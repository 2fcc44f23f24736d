"""A LoRA of a style, merged into the teacher before it is distilled: in every format, with its own strength, and never half."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
import worlds
from models import family_of
from peft import LoraConfig as PeftConfig
from runs import sd
from safetensors.torch import load_file, save_file

from stepdistill import card, export
from stepdistill.config import plain
from stepdistill.errors import UserError
from stepdistill.lora import LoRA, LoraConfig
from stepdistill.schedule import times_like
from training import run as running
from training.checkpoint import RunDirectory
from training.recipe import recipe_from

PROMPTS = ["a red circle", "two stars"]


def style(family, seed: int = 0, rank: int = 2) -> LoRA:
    torch.manual_seed(seed)
    return worlds.stir(LoraConfig(rank).over(family.teacher))


def written(adapters: LoRA, folder: Path, layout: str = "peft", alpha: float = 0.0) -> Path:
    """The adapters in a file of that layout; alpha: they are written that much too strong, as the file then says."""
    folder.mkdir(exist_ok=True)
    path, rank = folder / f"{layout}.safetensors", adapters.rank
    strength = rank / alpha if alpha else 1.0
    found, inner = {}, "unet"
    for name, (down, up) in adapters.adapters.items():
        layer = name.replace("/", ".").removeprefix(f"{inner}.")
        kohya = f"lora_{inner}_{layer.replace('.', '_')}"
        names = {
            "peft": (f"{inner}.{layer}.lora_A.weight", f"{inner}.{layer}.lora_B.weight"),
            "diffusers": (f"{inner}.{layer}.lora.down.weight", f"{inner}.{layer}.lora.up.weight"),
            "kohya": (f"{kohya}.lora_down.weight", f"{kohya}.lora_up.weight"),
        }[layout]
        found |= dict(zip(names, (down.weight.detach().clone(), strength * up.weight.detach()), strict=True))
        if layout == "kohya":
            found[f"{kohya}.alpha"] = torch.tensor(alpha or rank)
    header = {}
    if alpha and layout == "peft":
        settings = PeftConfig(
            r=rank, lora_alpha=alpha, target_modules=["to_q", "to_k", "to_v", "to_out.0"]
        ).to_dict()
        settings = {f"{inner}.{key}": value for key, value in settings.items() if value != {}}
        header = {"lora_adapter_metadata": json.dumps(settings, default=lambda each: sorted(each))}
    save_file(found, path, header)
    return path


def said(family, denoiser=None) -> torch.Tensor:
    x = torch.randn(2, *family.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return (denoiser or family.teacher)(
            x, times_like(family.schedule.t_max * 0.6, x), family.encode(PROMPTS)
        ).raw


@pytest.mark.parametrize(
    ("layout", "alpha"), [("peft", 0.0), ("peft", 4.0), ("diffusers", 0.0), ("kohya", 4.0)]
)
def test_a_file_of_any_layout_is_in_the_teacher_with_its_own_strength(layout, alpha, tmp_path):
    base = family_of("sd15")
    adapters = style(base)
    path = written(adapters, tmp_path, layout, alpha)
    merged = family_of("sd15", lora=str(path))
    torch.testing.assert_close(said(merged), said(base, adapters), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(said(merged), said(base), atol=1e-3)
    # Nothing of the adapters is left: what is exported is a plain pipeline.
    assert merged.teacher.state_dict().keys() == base.teacher.state_dict().keys()
    half = family_of("sd15", lora=f"{path}:0.5")
    adapters.scale /= 2
    torch.testing.assert_close(said(half), said(base, adapters), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["flux-schnell", "sd3"])
def test_what_students_leave_is_read_as_well_and_several_add_up(variant, tmp_path):
    base = family_of(variant)
    one, two = style(base, 1), style(base, 2)
    for number, each in enumerate((one, two)):
        base.lora_file(each, tmp_path / str(number))
    # A directory stands for its file.
    merged = family_of(variant, lora=[str(tmp_path / "0"), f"{tmp_path / '1'}:2"])
    first, second = one.merged(), two
    second.scale *= 2
    twin = LoRA(first, second.rank, second.scale, second.targets)
    twin.load_state_dict(second.state_dict())
    torch.testing.assert_close(said(merged), said(base, twin), rtol=1e-4, atol=1e-4)
    assert [each["scale"] for each in merged.loras] == [1.0, 2.0]


def test_a_text_encoders_part_is_merged_and_comes_back_with_it(tmp_path):
    plain_, expected, rank, alpha = family_of("sd15"), family_of("sd15"), 2, 4.0
    content, generator = {}, torch.Generator().manual_seed(0)
    for name, layer in expected.pipeline.text_encoder.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj", "out_proj")):
            down = 0.1 * torch.randn(rank, layer.in_features, generator=generator)
            up = torch.randn(layer.out_features, rank, generator=generator)
            with torch.no_grad():
                layer.weight += alpha / rank * up @ down
            # As trainers name it, whose encoders have one more level.
            kohya = "lora_te_text_model_" + name.removeprefix("text_model.").replace(".", "_")
            content |= {
                f"{kohya}.lora_down.weight": down,
                f"{kohya}.lora_up.weight": up,
                f"{kohya}.alpha": torch.tensor(alpha),
            }
    save_file(content, tmp_path / "text.safetensors")
    merged = family_of("sd15", lora=str(tmp_path / "text.safetensors"))
    torch.testing.assert_close(merged.encode(PROMPTS), expected.encode(PROMPTS), rtol=1e-4, atol=1e-5)
    before = merged.encode(PROMPTS)
    assert not torch.allclose(before, plain_.encode(PROMPTS), atol=1e-4)
    assert merged.text_key() != plain_.text_key()
    unet = {name: value.clone() for name, value in merged.teacher.state_dict().items()}
    merged.drop_text(), merged.load_text()
    torch.testing.assert_close(merged.encode(PROMPTS), before)
    assert all(torch.equal(value, unet[name]) for name, value in merged.teacher.state_dict().items())


def test_a_file_that_does_not_fit_is_one_sentence(tmp_path):
    base = family_of("sd15")
    path = written(style(base), tmp_path)
    content = load_file(path)
    for name, changed, header, says in (
        (
            "narrow",
            {k: v[:, :3] if "lora_A" in k else v for k, v in content.items()},
            {},
            "does not fit this teacher",
        ),
        (
            "elsewhere",
            {k.replace("blocks", "layers"): v for k, v in content.items()},
            {},
            "does not fit this teacher",
        ),
        ("other", {k.replace("unet.", "transformer."): v for k, v in content.items()}, {}, "0 of its"),
        (
            "half",
            {k.replace("up_blocks", "in_blocks"): v for k, v in content.items()},
            {},
            "it is of another base",
        ),
        ("none", {"unet.bias": torch.zeros(3)}, {}, "holds no pairs"),
        ("dora", content | {"unet.a.dora_scale": torch.ones(2)}, {}, "is a DoRA"),
        ("nan", {k: v * torch.nan for k, v in content.items()}, {}, "does not fit this teacher"),
        (
            "header",
            content,
            {"lora_adapter_metadata": '{"unet.init_lora_weights": "pissa", "unet.r": 2}'},
            "pissa",
        ),
        ("json", content, {"lora_adapter_metadata": "{"}, "not valid JSON"),
    ):
        file = tmp_path / f"{name}.safetensors"
        save_file({k: v.contiguous() for k, v in changed.items()}, file, header)
        with pytest.raises(UserError, match=says) as raised:
            family_of("sd15", lora=str(file))
        assert "\n" not in str(raised.value) and "family.lora" in str(raised.value), name
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    (tmp_path / "pickle.bin").write_bytes(b"no")
    for file, says in (
        ("broken.safetensors", "no readable safetensors"),
        ("pickle.bin", r"family\.lora names .*pickle\.bin, which is no \.safetensors file"),
        ("missing.safetensors:0.5", "is not there"),
    ):
        with pytest.raises(UserError, match=says):
            family_of("sd15", lora=str(tmp_path / file))
    with pytest.raises(UserError, match="PixArtSigmaPipeline has no `load_lora_weights`"):
        family_of("pixart-sigma", lora=str(path))


def test_the_card_and_the_run_know_it_by_its_content(tmp_path, short_runs, accelerator_state):
    teacher = tiny.directory("sd15")
    path = written(style(family_of("sd15")), tmp_path / "style")
    family = {"name": "sd", "teacher": str(teacher), "lora": f"{path}:0.5"}
    data = {"name": "scenes", "size": 8, "resolution": 32}
    recipe = sd(tmp_path / "run", teacher, "run.steps=1", "optim.batch_size=2", family=family, data=data)
    assert recipe_from(plain(recipe.mapping())) == recipe
    running.run(recipe)
    known = card.read(tmp_path / "run/student").loras
    (fact,) = known
    assert (fact["file"], fact["scale"], len(fact["sha256"])) == ("peft.safetensors", 0.5, 64)
    assert (
        f"`peft.safetensors` x 0.5 (sha256 {fact['sha256'][:16]})"
        in (tmp_path / "run/student/README.md").read_text()
    )
    written(style(family_of("sd15"), seed=9), tmp_path / "style")
    with pytest.raises(UserError, match=r"holds a run with family\.lora"):
        RunDirectory(tmp_path / "run").check(sd(tmp_path / "run", teacher, family=family, data=data))
    with pytest.raises(UserError, match="its content has changed since the run began"):
        recipe.family.make()


def test_adapters_over_a_merged_style_say_so(tmp_path):
    family = family_of("sd15", lora=str(written(style(family_of("sd15")), tmp_path / "style")))
    method = worlds.method("dmd2", steps=(1,))
    recipe = {"family": {"teacher": "t"}, "method": {"name": "dmd2"}, "run": {"out": "runs/x"}}
    export.write_adapters(family, style(family, 3), tmp_path / "out", export.card_of(family, method, recipe))
    code = (tmp_path / "out/README.md").read_text().split("```python")[1].split("```")[0]
    lines = [line for line in code.splitlines() if "lora" in line]
    assert lines == [
        'pipeline.load_lora_weights("peft.safetensors")',
        'pipeline.fuse_lora(components=["unet", "text_encoder"], lora_scale=1.0)',
        "pipeline.unload_lora_weights()",
        'pipeline.load_lora_weights("PATH_TO_THIS_DIRECTORY")',
    ]
