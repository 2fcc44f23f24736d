"""A trained student as a stock diffusers pipeline directory that knows its own sampling and carries a
model card.

The directory loads by `DiffusionPipeline.from_pretrained` where this package is not installed. What the stock
files cannot hold (the step counts it was trained for, timesteps that are call arguments, where it came from)
is in `stepdistill.json` and in the README.md beside them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from stepdistill import __version__
from stepdistill import card as cards
from stepdistill.card import Card
from stepdistill.denoiser import Denoiser, Overlay, unwrap
from stepdistill.drawing import DEFAULT_TEACHER_STEPS
from stepdistill.errors import UserError, atomic_write, full_disk
from stepdistill.families.base import Family
from stepdistill.lora import LoRA
from stepdistill.methods.base import Method
from stepdistill.provenance import git_commit
from stepdistill.pruning import Pruned


def card_of(family: Family, method: Method, recipe: dict[str, Any], **facts: Any) -> Card:
    """What a student directory says of itself; `Sampler` samples by it.

    recipe: the resolved recipe as plain values. facts: further fields of the card, such as `step` and `weights`.
    """
    sampling, student = method.sampling, not method.leaves_teacher
    times = {str(n): sampling.grid(family.schedule, n) for n in sampling.steps} if student else {}
    return Card(
        kind="student" if student else "teacher",
        name=Path(recipe["run"]["out"]).name,
        family=family.name,
        method=recipe["method"]["name"],
        sampling=sampling if student else replace(sampling, steps=(), finest=0),
        timesteps=times,
        teacher=recipe["family"].get("teacher", ""),
        settings=family.settings,
        revision=family.revision,
        loras=family.loras,
        recipe=recipe,
        commit=git_commit(short=True) or "unknown",
        stepdistill=__version__,
        **facts,
    )


# A directory -> numbers measured on exactly what lies in it, by name, for its model card.
Measured = Callable[[Path], dict[str, str]]


def write(
    family: Family, student: Denoiser, directory: Path, card: Card, measured: Measured | None = None
) -> None:
    """Write the pipeline, stepdistill.json and the model card; `directory` appears whole or not at all.

    Adapters leave merged, and beside that as a file of their own where the stock pipeline reads one.

    Raises:
        UserError: a weight is not finite.
        OSError: the disk is full.
    """
    student = unwrap(student)
    _refuse_not_finite(student, card)
    whole = student.merged() if isinstance(student, Overlay) else student
    with atomic_write(directory) as temporary:
        try:
            family.export(whole, temporary, card)
        except SafetensorError as error:
            raise (full_disk(error, directory) or error) from None
        _name_known_tokenizers(temporary)
        cards.write(card, temporary)
        if isinstance(student, LoRA):
            family.lora_file(student, temporary / "lora")
        if isinstance(student, Pruned):
            student.write(temporary / "intervals")
        told = replace(card, metrics=card.metrics | (measured(temporary) if measured else {}))
        temporary.joinpath("README.md").write_text(
            readme(family, told, (temporary / "lora").is_dir()), encoding="utf-8"
        )


def write_adapters(
    family: Family, student: LoRA, directory: Path, card: Card, measured: Measured | None = None
) -> None:
    """Write adapters alone, as `load_lora_weights` of the stock pipeline reads them, with the scheduler to draw with,
    stepdistill.json and the model card; `directory` appears whole or not at all.

    Raises:
        UserError: the family's stock pipeline reads no adapters, or draws no student of this kind; a weight is not finite.
    """
    _refuse_not_finite(student, card)
    if why := family.no_lora_file or beyond_stock(family, card):
        raise UserError(f"{why} Export it with --merge.")
    with atomic_write(directory) as temporary:
        temporary.mkdir()
        family.lora_file(student, temporary)
        family.student_scheduler(card, student.kind).save_pretrained(temporary / "scheduler")
        cards.write(card, temporary)
        told = replace(card, metrics=card.metrics | (measured(temporary) if measured else {}))
        temporary.joinpath("README.md").write_text(adapters_readme(family, told), encoding="utf-8")


def _refuse_not_finite(student: Denoiser, card: Card) -> None:
    for name, parameter in student.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise UserError(
                f"the student of step {card.step} is not exported: its weight {name} is not finite; go on from a checkpoint"
                " before, with a lower optim.lr or optim.max_grad_norm set."
            )


def base_of(card: Card) -> str:
    """What a student's adapters lie over: the teacher, or the student it began as."""
    init = (card.recipe.get("student") or {}).get("init", "teacher")
    return card.teacher if init == "teacher" else init


def _name_known_tokenizers(directory: Path) -> None:
    """Tokenizers of tokenizer.json go by the name that transformers 4 knows as well as 5."""
    for file in (directory / "model_index.json", *directory.glob("tokenizer*/tokenizer_config.json")):
        if file.is_file() and '"TokenizersBackend"' in (text := file.read_text(encoding="utf-8")):
            file.write_text(
                text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8"
            )


def readme(family: Family, card: Card, adapters: bool = False) -> str:
    """The model card, with code that runs where this package is not installed. adapters: they lie beside it in `lora`."""
    missing = beyond_stock(family, card)
    loaded = ", ".join(['"PATH_TO_THIS_DIRECTORY"', *_arguments(family.stock_load())])
    code = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({loaded})",
        *_drawn(family, card),
    ]
    if missing:
        code = _own_call(family, card)
    notes = getattr(getattr(family, "face", None), "notes", ()) if card.kind == "student" else ()
    if adapters:
        notes = (
            *notes,
            "",
            f'`lora` holds the same as adapters for `{base_of(card)}`: `pipeline.load_lora_weights("lora")`. Scheduler and'
            " call are those of this directory, not the teacher's.",
        )
    said = [f"{missing} The code below therefore needs stepdistill.", ""] if missing else []
    return _page(["library_name: diffusers", "tags: [stepdistill]"], card, said, code, notes)


def adapters_readme(family: Family, card: Card) -> str:
    """The model card of adapters alone, with code that loads what they lie over, them, and the scheduler they need."""
    base, scheduler = base_of(card), type(family.student_scheduler(card, family.teacher.kind)).__name__
    revision = {"revision": family.revision} if family.revision and base == card.teacher else {}
    loaded = ", ".join([_literal(base), *_arguments(revision | family.stock_load())])
    code = [
        "import torch",
        f"from diffusers import DiffusionPipeline, {scheduler}",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({loaded})",
        *_merged_before(family, card),
        'pipeline.load_lora_weights("PATH_TO_THIS_DIRECTORY")',
        f'pipeline.scheduler = {scheduler}.from_pretrained("PATH_TO_THIS_DIRECTORY", subfolder="scheduler")',
        *_drawn(family, card),
    ]
    head = ["library_name: diffusers", f"base_model: {_literal(base)}", "tags: [stepdistill, lora]"]
    said = [
        f"Adapters (LoRA) for `{base}`: they hold neither scheduler nor call, which the code below sets.",
        "",
    ]
    return _page(head, card, said, code, [])


def _merged_before(family: Family, card: Card) -> list[str]:
    """The lines that merge into a stock pipeline what was merged into the teacher."""
    lines, loadable = [], getattr(family.pipeline, "_lora_loadable_modules", ())
    parts = [name for name in loadable if getattr(family.pipeline, name, None) is not None]
    for each in card.loras:
        lines += [
            f"pipeline.load_lora_weights({_literal(each['file'])})",
            f"pipeline.fuse_lora(components={json.dumps(parts)}, lora_scale={each['scale']!r})",
            "pipeline.unload_lora_weights()",
        ]
    return lines


def _page(head: list[str], card: Card, said: list[str], code: list[str], notes: Sequence[str]) -> str:
    """A model card. head: its metadata; said: before the code; notes: behind the table."""
    steps = " / ".join(map(str, card.sampling.steps))
    lines = [
        "---", *head, "---",
        f"# {card.name}",
        "",
        f"A {card.method} student in {steps} steps, distilled from `{card.teacher}`."
        if card.kind == "student"
        else "A multi-step teacher.",
        "",
        *said,
        "```python",
        *code,
        "```",
        "",
        "| | |",
        "|---|---|",
    ]  # fmt: skip
    lines += [f"| {name} | {value} |" for name, value in (_facts(card) | card.metrics).items()]
    lines += ["", *notes] if notes else []
    return "\n".join([*lines, "", "The resolved recipe is in `stepdistill.json`.", ""])


def _facts(card: Card) -> dict[str, Any]:
    """The rows of the model card's table."""
    sampling = card.sampling
    at = f" at {card.revision}" if card.revision else ""
    rows = {"method": card.method, "teacher": f"{card.teacher}{at}" or "none (trained from data)"}
    if card.loras:
        rows["LoRAs merged into the teacher"] = "; ".join(
            f"`{each['file']}` x {each['scale']:g} (sha256 {each['sha256'][:16]})" for each in card.loras
        )
    if card.kind == "student":
        rows["steps"] = "; ".join(
            f"{n}: t = {', '.join(f'{t:g}' for t in ts)}" for n, ts in card.timesteps.items()
        )
        eta = f", eta {sampling.eta:g}" if sampling.rule == "tcd" else ""
        rows["sampling rule"] = f"{sampling.rule}{eta}, first input {sampling.init_noise} noise"
    if sampling.guidance == "none":
        rows["guidance"] = (
            "none at sampling: it is distilled into the weights, and a negative prompt has no effect"
        )
    else:
        rows["guidance"] = (
            f"guidance_scale g in uncond + g (cond - uncond), 1 = off; default {sampling.scale:g}"
        )
    return rows | {
        "weights": card.weights,
        "optimiser steps": "unknown" if card.step is None else card.step,
        "made at commit": card.commit,
        "licence": "that of the teacher and its data",
    }


def beyond_stock(family: Family, card: Card) -> str:
    """One sentence on why no stock pipeline samples this student, "" where one does."""
    if card.sampling.rule == "flowmap":
        return "No diffusers scheduler tells the network the time its jump ends at, as this student must be told."
    if card.sampling.rule != "tcd":
        return family.beyond_stock(card.sampling)
    if not family.schedule.discrete:
        return "TCDScheduler steps along a DDPM table only, and this student's noise levels are not from one."
    if family.conditions != "prompt" and max(card.sampling.steps) > 1 and card.sampling.eta != 0.3:
        return f"The stock pipeline passes no eta, so TCDScheduler takes 0.3, not this student's {card.sampling.eta:g}."
    return ""


def _drawn(family: Family, card: Card) -> list[str]:
    """The lines that draw an image with a stock pipeline called `pipeline`."""
    sampling = card.sampling
    steps = min(sampling.steps, default=DEFAULT_TEACHER_STEPS)
    settings, called = family.stock_steps(sampling, steps)
    told: dict[str, Any] = {"prompt": {"prompt": "PROMPT"}, "class": {"class_labels": [0]}}.get(
        family.conditions, {}
    )
    told |= {"num_inference_steps": steps} | called | family.stock_sampling(sampling, sampling.scale)
    if family.conditions == "prompt" and sampling.rule == "tcd":
        told["eta"] = sampling.eta
    lines = []
    if settings:
        made = ", ".join(["pipeline.scheduler.config", *_arguments(settings)])
        lines.append(f"pipeline.scheduler = pipeline.scheduler.from_config({made})")
    inputs = family.stock_inputs()
    if inputs:
        lines = ["from PIL import Image", *lines]
    given = [*_arguments(told), *(f"{name}={code}" for name, code in inputs.items())]
    drawn = {"images": "image", "frames": "video"}[family.output]
    return [*lines, f"{drawn} = pipeline({', '.join(given)}).{family.output}[0]"]


def _arguments(named: dict[str, Any]) -> list[str]:
    """name=value, as Python's formatters write it."""
    return [f"{name}={_literal(value)}" for name, value in named.items()]


def _literal(value: Any) -> str:
    """As Python's formatters write it: strings in double quotes."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _own_call(family: Family, card: Card) -> list[str]:
    prompt = '"PROMPT"' if family.conditions == "prompt" else "0"
    return [
        "import stepdistill",
        "",
        'sampler = stepdistill.load("PATH_TO_THIS_DIRECTORY")',
        f"image = sampler([{prompt}], seeds=[0], steps={min(card.sampling.steps)})[0]  # uint8 (3, H, W)",
    ]
