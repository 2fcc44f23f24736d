"""`python -m training.export`: a student, or its adapters, out of a run's directory alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import LCM, checkpoint, labelled_images, pixel, same, sd, toy
from safetensors.torch import load_file
from stock import ask_stock, card_code

import stepdistill
from evaluation.generate import pipeline_sha256
from training import export, exporting
from training import run as running
from training.checkpoint import RunDirectory
from training.recipe import recipe_from

pytestmark = pytest.mark.usefixtures("short_runs")
LORA = ("student.lora.rank=2", "student.lora.alpha=4", "student.ema=0.5", "run.steps=2")


@pytest.fixture(scope="module")
def once() -> dict[str, Path]:
    """What one test has made and others copy."""
    return {}


@pytest.fixture
def adapters(once, tmp_path, tmp_path_factory, tiny_sd) -> Path:
    """The directory of a run that trained adapters, apart from where it was made."""
    if not once:
        made, method = tmp_path_factory.mktemp("adapters") / "made", {"name": "vsd", "lora_rank": 2}
        running.run(sd(made, tiny_sd, *LORA, "run.save_every=1", method=method))
        once["run"] = made
    return Path(shutil.copytree(once["run"], tmp_path / "moved"))


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        export.main(list(arguments))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return said


def test_adapters_leave_alone_and_their_card_draws_what_the_whole_pipeline_draws(adapters, tmp_path, capsys):
    export.main([str(adapters)])
    assert capsys.readouterr().out == f"exported to {adapters / 'lora'}\n"
    files = sorted(str(path.relative_to(adapters / "lora")) for path in (adapters / "lora").rglob("*.*"))
    assert files == [
        "README.md", "pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json", "stepdistill.json"
    ]  # fmt: skip
    shutil.rmtree(adapters / "student")
    export.main([str(adapters), "--merge"])
    assert capsys.readouterr().out == f"exported to {adapters / 'student'}\n"
    torch.manual_seed(0)
    theirs = drawn(adapters / "lora", tmp_path)
    whole = drawn(adapters / "student", tmp_path)
    assert abs(theirs.astype(int) - whole).max() <= 1 and whole.std() > 1


def drawn(directory: Path, tmp_path: Path):
    code = (directory / "README.md").read_text().split("```python")[1].split("```")[0]
    code = code.replace("PATH_TO_THIS_DIRECTORY", str(directory)).replace('"PROMPT"', '"a red circle"')
    return ask_stock(tmp_path, code=f"import torch\ntorch.manual_seed(5)\n{code}")[0]


def test_any_checkpoint_leaves_with_either_weights(tmp_path, tiny_sd, capsys):
    run, settings = tmp_path / "run", ("run.steps=3", "run.save_every=1", "run.keep=3", "student.ema=0.9")
    running.run(sd(run, tiny_sd, *settings))
    final = unet(run / "student")
    shutil.rmtree(run / "student")
    RunDirectory(run, keep=3).record_best(2, 0.5)
    found = {}
    for which, step in (("1", 1), ("best", 2), ("latest", 3)):
        for weights in ("ema", "raw"):
            place = tmp_path / f"{step}-{weights}"
            export.main([str(run), "--checkpoint", which, "--weights", weights, "-o", str(place)])
            assert capsys.readouterr().out == f"exported to {place}\n"
            sampler = stepdistill.load(place)
            assert (sampler.kind, sampler.steps) == ("student", (1, 2))
            assert sampler.card.step == step and sampler.card.weights == weights
            found[step, weights] = unet(place)
    # Merging what has no adapters changes nothing.
    export.main([str(run), "--merge"])
    assert same(unet(run / "student"), final) and same(found[3, "ema"], final)
    assert not same(found[3, "raw"], final) and not same(found[1, "ema"], final)
    raw = checkpoint(run, 1).tensors["student"]
    assert torch.equal(found[1, "raw"]["conv_in.weight"], raw["network.unet.conv_in.weight"])
    assert card_code(run / "student", tmp_path).std() > 1


def unet(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "unet/diffusion_pytorch_model.safetensors")


def test_a_staged_student_is_exported_with_its_last_method(tmp_path, tiny_sd):
    mapping = sd(tmp_path / "run", tiny_sd).mapping()
    del mapping["method"]
    mapping["stages"] = [
        {"method": {**LCM, "ddim_steps": 4}, "run": {"steps": 1}},
        {"method": {"name": "dmd2"}, "run": {"steps": 1}},
    ]
    del mapping["run"]["steps"]
    running.run(recipe_from(mapping))
    sampler = stepdistill.load(tmp_path / "run" / "student")
    assert sampler.card.method == "dmd2" and sampler.guidance_free and sampler.sampling.inputs == ()
    # The grid its times are taken from is still the one it was first taught.
    assert sampler.sampling.finest == 4
    assert [stage["method"]["name"] for stage in sampler.card.recipe["stages"]] == ["lcm", "dmd2"]


@pytest.mark.parametrize("kind", ["pixel", "sd"])
def test_export_needs_no_data_and_writes_the_same_again(kind, tmp_path, request):
    teacher, images = request.getfixturevalue(f"tiny_{kind}"), tmp_path / "images"
    if kind == "pixel":
        running.run(pixel(tmp_path / "run", teacher, labelled_images(images), "student.ema=0.9"))
    else:
        images.mkdir()
        (images / "prompts.txt").write_text("a red circle\na blue star on a white background\n")
        data = {"name": "prompts", "path": str(images / "prompts.txt")}
        running.run(
            sd(tmp_path / "run", teacher, "run.steps=1", method={"name": "vsd", "lora_rank": 2}, data=data)
        )
    written, again = tmp_path / "run" / "student", tmp_path / "again"
    shutil.rmtree(images)
    export.main([str(tmp_path / "run"), "-o", str(again)])
    files = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((written / file).read_bytes() == (again / file).read_bytes() for file in files)


def test_numbers_measured_on_just_this_student_stand_on_its_card(tmp_path, tiny_sd):
    run = tmp_path / "run"
    running.run(sd(run, tiny_sd, "run.steps=2", "run.save_every=1"))
    content = (run / "student/stepdistill.json").read_bytes()
    with open(run / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"step": 2, "metric/fd:scenes-v1": 12.345678}) + "\n" + '{"step": 2, "met')
    (run / "results").mkdir()
    row = {"steps": 1, "n": 500, "metrics": {"fd:mine": 3.14159, "fd:mine/se": 0.271, "attributes/all": 0.5}}
    row["metrics"]["diversity:mine"] = 2.5
    beside = {"better": "higher", "main": True, "protocol": "scenes-seeds[n=200]"}
    results = {
        "protocol": "scenes-2k[n=500]",
        "rows": [row | {"sha256": pipeline_sha256(run / "student")}, row | {"sha256": "of another"}],
        "values": {"fd:mine": {"better": "lower", "main": True}, "attributes/all": {"better": "higher", "main": False},
                   "diversity:mine": beside},
    }  # fmt: skip
    (run / "results/results.json").write_text(json.dumps(results))
    # Again and again, by another commit as well.
    for commit in ("one", "another"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exporting.export, "git_commit", lambda short, commit=commit: commit)
            export.main([str(run)])
        readme = (run / "student/README.md").read_text()
        assert "| fd:scenes-v1 | 12.35 |" in readme
        assert "| fd:mine at 1 step (n = 500, scenes-2k[n=500]) | 3.142 ± 0.27 |" in readme
        assert "| diversity:mine at 1 step (scenes-seeds[n=200]) | 2.5 |" in readme
        assert "attributes/all" not in readme
        assert (run / "student/stepdistill.json").read_bytes() == content
    export.main([str(run), "--checkpoint", "1", "-o", str(tmp_path / "early")])
    assert "fd:" not in (tmp_path / "early/README.md").read_text()


def test_what_cannot_be_exported_is_one_sentence(adapters, tmp_path, tiny_sd, capsys, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for arguments, says in (
        ([str(tmp_path / "nowhere")], "it has no recipe.yaml"),
        ([str(adapters), "--checkpoint", "7"], "no complete checkpoint"),
        ([str(adapters), "--checkpoint", "newest"], "has checkpoints of steps [1, 2]"),
        ([str(adapters), "-o", str(tmp_path / "mine")], "holds something else than an exported student"),
        ([str(adapters), "--push", "a/b/c"], "give owner/name"),
        ([str(adapters), "--push", "me/mine"], "there is no token for the hub"),
    ):
        assert says in refused(capsys, *arguments)
    assert (tmp_path / "mine/notes.txt").read_text() == "keep me"
    running.run(toy(tmp_path / "toy", "run.steps=1"))
    capsys.readouterr()
    assert "has no pipeline to export to" in refused(capsys, str(tmp_path / "toy"))
    (adapters / "checkpoints/1/student.safetensors").write_bytes(b"x")
    assert "no complete checkpoint" in refused(capsys, str(adapters), "--checkpoint", "1")
    # Of a family whose pipeline reads none.
    monkeypatch.setattr(
        "stepdistill.families.sd.SD.no_lora_file", "This pipeline has no `load_lora_weights`."
    )
    assert "Export it with --merge." in refused(capsys, str(adapters))
    assert not (adapters / "lora").exists()


def test_a_push_says_what_the_hub_said(adapters, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    said = refused(capsys, str(adapters), "--push", "me/mine")
    assert "the hub cannot be written to" in said and (adapters / "lora/README.md").is_file()
    asked = []

    class Hub:
        def create_repo(self, name, **settings):
            asked.append((name, settings))
            return type("Url", (str,), {"repo_id": name})(f"https://hub/{name}")

        def upload_folder(self, *, folder_path, repo_id, commit_message):
            asked.append((Path(folder_path), repo_id))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    export.main([str(adapters), "--push", "me/mine", "--private"])
    assert capsys.readouterr().out.endswith("pushed to https://hub/me/mine\n")
    assert asked == [
        ("me/mine", {"private": True, "exist_ok": True}), (adapters / "lora", "me/mine")
    ]  # fmt: skip
