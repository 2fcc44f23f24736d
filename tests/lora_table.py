"""The tables of docs/lora.md: adapters of every layout, trained for a few steps, through the stock pipeline's own loader.

PYTHONPATH=.:tests python tests/lora_table.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import tiny
import torch
import worlds
from diffusers import DiffusionPipeline
from models import TOLD, family_of
from real_layouts import LAYOUTS, adapted_layout, held
from torch import Tensor, nn

import stepdistill
from stepdistill import export
from stepdistill.denoiser import Denoiser, parameter_count
from stepdistill.errors import atomic_write
from stepdistill.families.base import Family
from stepdistill.lora import LoRA, LoraConfig
from stepdistill.schedule import times_like

ROOT = Path(__file__).parent.parent
PAGE, STACKING = ROOT / "docs" / "lora.md", ROOT / "benchmarks" / "stacking.json"
START, END = "<!-- {} -->", "<!-- end of {} -->"


def trained(family: Family) -> LoRA:
    """Adapters of rank 4 and alpha 8 that moved."""
    torch.manual_seed(0)
    student = LoraConfig(rank=4, alpha=8.0).over(family.teacher)
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        (said(family, student) - 1).square().mean().backward()
        optimiser.step()
    return student.requires_grad_(False)


def said(family: Family, denoiser: Denoiser) -> Tensor:
    x = torch.randn(2, *family.shape, generator=torch.Generator().manual_seed(1))
    t = times_like(family.schedule.t_max * 0.6, x)
    return denoiser(x, t, family.encode(TOLD[family.conditions])).raw


def difference(family: Family, network: nn.Module, expected: Tensor) -> float:
    """The largest of what a network of the same family says."""
    denoiser = Denoiser(network, family.kind, family.teacher.native).under(family.schedule)
    return float((said(family, denoiser) - expected).abs().max())


@torch.no_grad()
def row(variant: str) -> list[str]:
    """Of one layout: pipeline, layers, the largest error by the stock loader, and that of the merged pipeline."""
    family = family_of(variant)
    with torch.enable_grad():
        student = trained(family)
    expected, before = said(family, student), said(family, family.teacher)
    moved = float((expected - before).abs().max())
    recipe = {
        "family": {"teacher": str(tiny.directory(variant))},
        "method": {"name": "dmd2"},
        "run": {"out": "runs/x"},
    }
    card = export.card_of(family, worlds.method("dmd2", steps=(4,)), recipe)
    with tempfile.TemporaryDirectory() as folder:
        whole, alone = Path(folder) / "student", Path(folder) / "lora"
        export.write(family, student, whole, card)
        merged = stepdistill.load(whole).denoiser.network
        merged_error = difference(family, merged, expected)
        loader = "no loader: `--merge`"
        if not family.no_lora_file:
            export.write_adapters(family, student, alone, card)
            stock = DiffusionPipeline.from_pretrained(tiny.directory(variant), **family.stock_load())
            stock.load_lora_weights(alone)
            read = difference(family, family.face(getattr(stock, family.face.inner)), expected)
            loader = f"{read:.1e}".replace("0.0e+00", "0.0")
    name = type(family.pipeline).__name__
    targets = " ".join(dict.fromkeys(family.lora_targets))
    return [
        variant,
        f"`{name}`",
        str(len(student.adapters)),
        f"`{targets}`",
        loader,
        f"{merged_error:.0e}",
        f"{moved:.2g}",
    ]


def layouts() -> str:
    """One row for each tiny variant."""
    head = [
        "teacher",
        "stock pipeline",
        "layers",
        "targets",
        "error of `load_lora_weights`",
        "error merged",
        "moved by",
    ]
    rows = [head, ["---"] * len(head), *map(row, tiny.VARIANTS)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def memory() -> str:
    """One row for each full-size configuration."""
    head = ["network", "parameters", "one network", "student, fake score and teacher", "times one network"]
    rows = [head, ["---"] * len(head)]
    for name in LAYOUTS:
        nets, model = adapted_layout(name)
        one = 2 * parameter_count(model)
        rows.append(
            [
                name,
                f"{parameter_count(model):,}",
                f"{one / 1e9:.2f} GB",
                f"{held(nets) / 1e9:.2f} GB",
                f"{held(nets) / one:.3f}",
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def stacking() -> str:
    """One row for each student, of benchmarks/stacking.json."""
    kept = json.loads(STACKING.read_text())["kept"]
    ways = list(next(iter(kept.values())))
    rows = [["student's steps", *ways], ["---"] * (len(ways) + 1)]
    rows += [
        [of.rpartition(" ")[2], *(f"{100 * own[how]:.0f} %" for how in ways)] for of, own in kept.items()
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def replaced(page: str, name: str, table: str) -> str:
    """The page with what stands between the marks of that name made again."""
    before, _, rest = page.partition(START.format(name))
    _, _, after = rest.partition(END.format(name))
    return f"{before}{START.format(name)}\n\n{table}\n\n{END.format(name)}{after}"


def main() -> None:
    page = PAGE.read_text()
    for name, made in (("layouts", layouts), ("memory", memory), ("stacking", stacking)):
        page = replaced(page, name, made())
    with atomic_write(PAGE) as temporary:
        temporary.write_text(page)


if __name__ == "__main__":
    main()
