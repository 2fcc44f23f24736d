"""Every loader that reads what a user may have downloaded, with files it takes as they are.

A target is a folder of good files, of which one is changed at a time, and what reads the folder.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import perceptual
import pyarrow as pa
import pyarrow.parquet as pq
import tiny
import torch
from examples import encoded, noise, source
from safetensors.torch import load_file, save_file

import stepdistill
from app import readback
from app import results as app_results
from app import runs as app_runs
from app.png import write_png
from app.request import Request
from app.settings import settings
from evaluation import compare, geneval
from evaluation.captions import read_captions
from evaluation.decoding import decode
from evaluation.feature_net import FeatureNet
from evaluation.files import open_images
from evaluation.protocol import load_protocol
from evaluation.stats import FeatureStats, Source
from stepdistill import assets
from stepdistill import card as cards
from stepdistill.clip import Clip
from stepdistill.lpips import LPIPS
from training import saved
from training.data.decoding import decoded
from training.recipe import load_recipe
from training.shards import Shards

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Target:
    """make: writes good files into a folder. read: what reads the folder. files: patterns of what is changed.

    share: of all cases, beside other targets': a loader of whole pipelines takes a hundred times a header's time.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    files: tuple[str, ...] = ("*",)
    share: float = 1.0


def pipeline(variant: str, **extra: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        shutil.copytree(tiny.directory(variant), folder, dirs_exist_ok=True)
        for name, content in extra.items():
            (folder / name.replace("_json", ".json")).write_text(content)

    return make


def drawn(folder: Path) -> None:
    sampler = stepdistill.load(folder)
    sampler.at(1, 1.0)(["a red circle"], [0])


CARD = json.dumps(
    {
        "format": 2,
        "kind": "student",
        "name": "x",
        "family": "sd",
        "method": "dmd2",
        "sampling": {"steps": [1, 2], "rule": "renoise"},
        "timesteps": {"1": [999.0], "2": [999.0, 499.0]},
        "teacher": "t",
        "recipe": {"run": {"steps": 3}},
        "step": 3,
        "weights": "ema",
        "metrics": {"fd": 1.0},
        "settings": {"resolution": [16, 16]},
    }
)


def card_alone(folder: Path) -> None:
    (folder / cards.NAME).write_text(CARD)


def students(folder: Path) -> None:
    for name in ("0", "1"):
        shutil.copytree(tiny.directory("sd15"), folder / name)
        (folder / name / cards.NAME).write_text(CARD)
    routing = {"by": "prompt", "centroids": [[0.1] * 64, [0.2] * 64]}
    card = {"format": 2, "kind": "students", "family": "sd", "students": ["0", "1"], "routing": routing}
    (folder / cards.NAME).write_text(json.dumps(card))


def images(folder: Path) -> None:
    for i, form in enumerate(("PNG", "JPEG", "WEBP", "BMP")):
        (folder / f"{i}.{form.lower()}").write_bytes(encoded(noise(i), form))


def one_image(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        cut = decoded(content, [(8, 8)])
        assert isinstance(cut, str) or cut.pixels.shape
        decode(content, file.name)


def captioned(folder: Path) -> None:
    for i in range(4):
        (folder / f"{i}.png").write_bytes(encoded(noise(i, 4, 4)))
    (folder / "0.txt").write_text("a\nb\n")
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "1.png", "text": "c"}\n{"file_name": "2.png", "text": ["d", "e"]}\n'
    )


def with_table(folder: Path) -> None:
    for i in range(3):
        (folder / f"{i}.png").write_bytes(encoded(noise(i, 4, 4)))
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,b\n")


def read_source(name: str, **config: Any) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        data = source(
            name, path=folder, **({} if name == "prompts" else {"resolution": 8, "memory_gb": 0}), **config
        )
        list(data.all_captions())
        if name != "prompts":
            data.images(range(min(4, data.size)))

    return read


def table(folder: Path) -> None:
    rows = {"image": [encoded(noise(i, 4, 4)) for i in range(6)], "text": [["a", f"b {i}"] for i in range(6)]}
    pq.write_table(pa.table({**rows, "label": list(range(6))}), folder / "x.parquet", row_group_size=3)


def tar(folder: Path) -> None:
    with tarfile.open(folder / "x.tar", "w") as file:
        for i in range(4):
            for suffix, content in (
                ("png", encoded(noise(i, 4, 4))),
                ("txt", b"a caption"),
                ("json", b'{"text": "x"}'),
            ):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


def archive(folder: Path) -> None:
    with zipfile.ZipFile(folder / "x.zip", "w") as file:
        for i in range(4):
            file.writestr(f"0000{i}/img{i}.png", encoded(noise(i, 8, 8)))
        file.writestr("dataset.json", json.dumps({"labels": [["00000/img0.png", 1]]}))


def all_images(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        for _ in open_images(file):
            pass


def statistics(folder: Path) -> None:
    np.savez(folder / "fid.npz", mu=np.zeros(8), sigma=np.eye(8))
    FeatureStats.of_moments(np.zeros(8), np.eye(8), 100, Source("inception-2015", "0" * 64)).save(
        folder / "own.npz"
    )


def read_statistics(file: Path) -> None:
    FeatureStats.load(file, Source("inception-2015", "0" * 64))


def every(read: Callable[[Path], Any]) -> Callable[[Path], None]:
    def each(folder: Path) -> None:
        for file in sorted(folder.iterdir()):
            read(file)

    return each


def arrays(folder: Path) -> None:
    np.save(folder / "a.npy", np.stack([noise(i, 8, 8) for i in range(3)]))
    np.savez(folder / "b.npz", np.stack([noise(i, 8, 8) for i in range(3)]))


def captions(folder: Path) -> None:
    (folder / "a.txt").write_text("a\nb\n")
    (folder / "b.json").write_text(json.dumps([{"caption": "a"}, {"caption": "b"}]))
    (folder / "c.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (folder / "d.csv").write_text("caption\na\nb\n")


def prompt_files(folder: Path) -> None:
    (folder / "a.txt").write_text("a\nb\n")
    (folder / "b.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')


def recipes(folder: Path) -> None:
    shutil.copy(ROOT / "training/recipes/toy_dmd2.yaml", folder / "r.yaml")


def recipe_with_stages(folder: Path) -> None:
    shutil.copy(ROOT / "training/recipes/scenes_hyper_sd.yaml", folder / "r.yaml")


def protocols(folder: Path) -> None:
    for name in ("scenes-2k", "coco14-30k"):
        shutil.copy(ROOT / f"evaluation/protocols/{name}.yaml", folder / f"{name}.yaml")


def loras(folder: Path) -> None:
    shutil.copytree(tiny.directory("sd15"), folder / "teacher")
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    held = load_file(folder / "teacher/unet/diffusion_pytorch_model.safetensors")
    width = held[f"{name.removeprefix('unet.')}.weight"].shape
    tensors = {
        f"{name}.lora_A.weight": torch.ones(2, width[1]),
        f"{name}.lora_B.weight": torch.zeros(width[0], 2),
    }
    save_file(tensors, folder / "lora.safetensors", {"format": "pt"})


def with_lora(folder: Path) -> None:
    from stepdistill.config import build
    from stepdistill.families.sd import SD

    SD(
        build(
            SD.Config,
            {"teacher": str(folder / "teacher"), "lora": [str(folder / "lora.safetensors")]},
            "family",
        )
    )


def checkpoints(folder: Path) -> None:
    moments = {
        "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}},
        "param_groups": [{"lr": 0.1, "params": [0]}],
    }
    tensors, optimizers, extra = (
        {"student": {"w": torch.zeros(2)}},
        {"student": moments},
        {"state": {"seed": 1}},
    )
    saved.write(folder / "00000003", 3, tensors, optimizers, extra)
    shards = folder / "00000004"
    sums = saved.write_shards(shards, tensors, optimizers)
    saved.finish(shards, 4, ["student"], optimizers, extra, sums)


def checkpoint(folder: Path) -> None:
    for place in (folder / "00000003", folder / "00000004"):
        try:
            saved.complete(place)
            saved.verify(place)
            found = saved.read(place)
            _ = found.tensors, found.optimizers
        except saved.Damaged:
            # What a run makes a sentence of.
            pass


def opened(folder: Path) -> Shards:
    return Shards(folder, "rows", {"a": 1}, 6, 3)


def read_store(folder: Path) -> None:
    shards = opened(folder)
    if shards.complete:
        shards.check()
        shards.rows(range(6))


def store(folder: Path) -> None:
    rows = torch.arange(12.0).reshape(6, 2)
    opened(folder).fill(lambda indices: {"x": rows[list(indices)]})


def tokens(folder: Path) -> None:
    shutil.copytree(assets.path("clip"), folder, dirs_exist_ok=True)


def clip(folder: Path) -> None:
    Clip(str(folder)).embed_texts(["a red circle"])


def results(folder: Path) -> None:
    content = json.loads((ROOT / "assets/results/results.json").read_text())
    content["rows"] = content["rows"][:2]
    (folder / "results.json").write_text(json.dumps(content))


def both_results(folder: Path) -> None:
    app_results.read(folder / "results.json")
    found = [compare.load(folder / "results.json")]
    compare.text(found * 2)


def drawn_png(folder: Path) -> None:
    (folder / "a.png").write_bytes(
        write_png(noise(0, 8, 8), settings(Request("a", seed=1, steps=1, guidance_scale=1.0)))
    )


def read_back(folder: Path) -> None:
    from app.catalog import Entry

    readback.read((folder / "a.png").read_bytes(), {"student": Entry("student", folder, "x")})


def run_directory(folder: Path) -> None:
    (folder / "recipe.yaml").write_text((ROOT / "training/recipes/toy_dmd2.yaml").read_text())
    rows = [{"step": i, "student/total": 0.5, "time": 1.0} for i in range(5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


TARGETS = {
    "card": Target(card_alone, cards.read, share=2),
    "student": Target(pipeline("sd15", stepdistill_json=CARD), drawn, (cards.NAME,), 0.2),
    "students": Target(students, drawn, (cards.NAME,), 0.1),
    "pipeline.json": Target(pipeline("sd15"), drawn, ("*.json",), 0.6),
    "pipeline.flow": Target(pipeline("sd3"), stepdistill.load, ("*.json",), 0.15),
    "pipeline.weights": Target(pipeline("sd15"), stepdistill.load, ("*.safetensors",), 0.3),
    # Of 59 MB.
    "lpips": Target(
        lambda folder: perceptual.written(folder / "lpips.safetensors"),
        lambda folder: LPIPS(folder / "lpips.safetensors"),
        share=0.02,
    ),
    "clip": Target(tokens, clip, ("*.json", "*.safetensors"), 0.3),
    "features": Target(
        lambda folder: shutil.copytree(assets.path("scenes-v1"), folder, dirs_exist_ok=True),
        FeatureNet.load,
        share=0.3,
    ),
    "lora": Target(loras, with_lora, ("lora.safetensors",), 0.2),
    "recipe": Target(recipes, lambda folder: load_recipe(folder / "r.yaml"), share=2),
    "recipe.stages": Target(recipe_with_stages, lambda folder: load_recipe(folder / "r.yaml"), share=1),
    "protocol": Target(protocols, every(load_protocol), share=1.5),
    "image": Target(images, one_image, share=2),
    "folder": Target(captioned, read_source("folder"), share=2),
    "folder.csv": Target(with_table, read_source("folder"), share=1),
    "parquet": Target(table, read_source("parquet"), share=2),
    "tar": Target(tar, read_source("webdataset"), share=2),
    "prompts": Target(prompt_files, every(lambda file: source("prompts", path=file)), share=0.5),
    "captions": Target(captions, every(read_captions), share=2),
    "archive": Target(archive, all_images, share=1.5),
    "evaluated parquet": Target(table, all_images, share=1),
    "evaluated tar": Target(tar, all_images, share=1),
    "statistics": Target(statistics, every(read_statistics), share=2),
    "arrays": Target(arrays, all_images, share=1.5),
    "checkpoint": Target(checkpoints, checkpoint, share=1.5),
    "store": Target(store, read_store, share=1),
    "results": Target(results, both_results, share=1),
    "geneval": Target(
        lambda folder: (folder / "r.jsonl").write_text(
            '{"tag": "color", "correct": true, "prompt": "a"}\n' * 3
        ),
        lambda folder: geneval.summarise(folder / "r.jsonl"),
        share=0.5,
    ),
    "drawn image": Target(drawn_png, read_back, share=1),
    "run directory": Target(run_directory, lambda folder: app_runs.read([folder]), share=1),
}
