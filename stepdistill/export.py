"""A trained student as a stock diffusers pipeline directory that knows its own sampling and carries a model
card.

The directory loads by `DiffusionPipeline.from_pretrained` where this package is not installed. What the stock
files cannot hold (the step counts it was trained for, timesteps that are call arguments, where it came from)
is in `stepdistill.json` and in the README.md beside them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stepdistill import __version__
from stepdistill.denoiser import Denoiser, unwrap
from stepdistill.errors import atomic_write
from stepdistill.families.base import Family
from stepdistill.methods.base import Method
from stepdistill.provenance import git_commit
from stepdistill.sampling import CARD
from stepdistill.schedule import VP


def card_of(family: Family, method: Method, recipe: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """What a student directory says of itself; `ImageSampler` samples by it.

    recipe: the resolved recipe as plain values. facts: further entries, such as `step` and `weights`.
    """
    kind = "student" if method.needs_teacher else "teacher"
    card: dict[str, Any] = {
        "format": 1,
        "stepdistill": __version__,
        "kind": kind,
        "name": Path(recipe["run"]["out"]).name,
        "family": family.name,
        "method": recipe["method"]["name"],
        "rule": method.rule,
        "eta": method.eta,
        "init_noise": method.init_noise,
        "first_rho": method.first_rho,
        "extras": list(method.student_extras),
        "guidance_free": method.guidance_free,
        "guidance_scale": method.guidance_scale,
        "teacher": recipe["family"].get("teacher", ""),
        "recipe": recipe,
        "commit": git_commit(short=True) or "unknown",
    }
    if kind == "student":
        times = {str(n): method.grid(family.schedule, n) for n in method.steps}
        card |= {"steps": list(method.steps), "finest": method.finest, "timesteps": times}
    return card | facts


def write(family: Family, student: Denoiser, directory: Path, card: dict[str, Any]) -> None:
    """Write the pipeline, stepdistill.json and the model card; `directory` appears whole or not at all."""
    with atomic_write(directory) as temporary:
        family.export(unwrap(student), temporary, card)
        temporary.joinpath(CARD).write_text(json.dumps(card, indent=2) + "\n")
        temporary.joinpath("README.md").write_text(readme(family, card))


def readme(family: Family, card: dict[str, Any]) -> str:
    """The model card, with code that runs where this package is not installed."""
    student, missing = card["kind"] == "student", beyond_stock(family, card)
    lines = [
        "---", "library_name: diffusers", "tags: [stepdistill]", "---",
        f"# {card['name']}",
        "",
        f"A {card['method']} student in {' / '.join(map(str, card['steps']))} steps, distilled from `{card['teacher']}`."
        if student
        else "A multi-step teacher.",
        "",
        *([f"{missing} The code below therefore needs stepdistill.", ""] if missing else []),
        "```python",
        *(_own_call(family, card) if missing else _stock_call(family, card)),
        "```",
        "",
        "| | |",
        "|---|---|",
    ]  # fmt: skip
    rows = {"method": card["method"], "teacher": card["teacher"] or "none (trained from data)"}
    if student:
        rows["steps"] = "; ".join(
            f"{n}: t = {', '.join(f'{t:g}' for t in ts)}" for n, ts in card["timesteps"].items()
        )
        eta = f", eta {card['eta']:g}" if card["rule"] == "tcd" else ""
        rows["sampling rule"] = f"{card['rule']}{eta}, first input {card['init_noise']} noise"
    if card["guidance_free"]:
        rows["guidance"] = (
            "none at sampling: it is distilled into the weights, and a negative prompt has no effect"
        )
    else:
        rows["guidance"] = (
            f"guidance_scale g in uncond + g (cond - uncond), 1 = off; default {card['guidance_scale']:g}"
        )
    rows |= {
        "weights": card.get("weights", "raw"),
        "optimiser steps": card.get("step", "unknown"),
        "made at commit": card["commit"],
        "licence": "that of the teacher and its data",
    }
    lines += [f"| {key} | {value} |" for key, value in rows.items()]
    for name, value in card.get("metrics", {}).items():
        lines.append(f"| {name} | {value} |")
    return "\n".join([*lines, "", "The resolved recipe is in `stepdistill.json`.", ""])


def beyond_stock(family: Family, card: dict[str, Any]) -> str:
    """One sentence on why no stock pipeline samples this student, "" where one does."""
    if card["rule"] == "flowmap":
        return "No diffusers scheduler tells the network the time its jump ends at, as this student must be told."
    if card["rule"] != "tcd":
        return ""
    if not isinstance(family.schedule, VP):
        return "TCDScheduler steps along a DDPM table only, and this student's noise levels are not from one."
    if family.conditions != "prompt" and max(card["steps"]) > 1 and card["eta"] != 0.3:
        return f"The stock pipeline passes no eta, so TCDScheduler takes 0.3, not this student's {card['eta']:g}."
    return ""


def _stock_call(family: Family, card: dict[str, Any]) -> list[str]:
    """The lines of the card that draw an image where this package is not installed."""
    steps = min(card.get("steps", [50]))
    if family.conditions == "prompt":
        guidance = "" if card["guidance_free"] else f", guidance_scale={card['guidance_scale']:g}"
        eta = f", eta={card['eta']:g}" if card["rule"] == "tcd" else ""
        call = f'pipeline("PROMPT", num_inference_steps={steps}{guidance}{eta})'
    else:
        label = ", class_labels=0" if family.conditions == "class" else ""
        call = f"pipeline(num_inference_steps={steps}{label})"
    return [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        'pipeline = DiffusionPipeline.from_pretrained("PATH_TO_THIS_DIRECTORY")',
        f"image = {call}.images[0]",
    ]


def _own_call(family: Family, card: dict[str, Any]) -> list[str]:
    prompt = '"PROMPT"' if family.conditions == "prompt" else "0"
    return [
        "import stepdistill",
        "",
        'sampler = stepdistill.load("PATH_TO_THIS_DIRECTORY")',
        f"image = sampler([{prompt}], seeds=[0], steps={min(card['steps'])})[0]  # uint8 (3, H, W)",
    ]
