"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): write the images its detector reads, read what it writes.

Its detector lives in an environment of its own (mmdet 2), so the two meet in files: `NNNNN/metadata.jsonl` with
the prompt's line of evaluation_metadata.jsonl and `NNNNN/samples/NNNNN.png`; and a results.jsonl with a line per
image, of which `tag` and `correct` count.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.captions import CaptionFile
from evaluation.images import Images
from stepdistill.errors import UserError, atomic_write


def export(images: Images, captions: CaptionFile, per_prompt: int, folder: Path) -> int:
    """Write every sample into the folder layout GenEval reads. Returns the number of prompts.

    images: uint8, `per_prompt` consecutive ones for each line of `captions`, which must be a .jsonl file.
    """
    lines = [line for line in Path(captions.path).read_text(encoding="utf-8").splitlines() if line.strip()]
    index = 0
    for batch in images:
        for image in batch:
            prompt, number = divmod(index, per_prompt)
            place = folder / f"{prompt:05d}"
            if number == 0:
                with atomic_write(place / "metadata.jsonl") as temporary:
                    temporary.write_text(lines[prompt])
            with atomic_write(place / "samples" / f"{number:05d}.png") as temporary:
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, format="PNG")
            index += 1
    return -(-index // per_prompt)


def summarise(path: str | os.PathLike[str]) -> dict[str, float]:
    """`geneval`, the mean over tasks of the share of correct images, and `geneval/<task>`, from a results.jsonl.

    Standard errors are over prompts, not images: a prompt's images succeed and fail together.

    Raises:
        UserError: the file is missing or is none of GenEval's.
    """
    tasks: dict[str, dict[str, list[bool]]] = {}
    for entry in _entries(Path(path)):
        tasks.setdefault(entry["tag"], {}).setdefault(entry["prompt"], []).append(bool(entry["correct"]))
    found: dict[str, float] = {}
    for tag, prompts in tasks.items():
        images = [correct for group in prompts.values() for correct in group]
        found[f"geneval/{tag}"] = sum(images) / len(images)
        found[f"geneval/{tag}/se"] = _clustered(prompts.values(), found[f"geneval/{tag}"])
    values = [found[f"geneval/{tag}"] for tag in tasks]
    errors = [found[f"geneval/{tag}/se"] for tag in tasks]
    overall = {
        "geneval": sum(values) / len(values),
        "geneval/se": math.sqrt(sum(error**2 for error in errors)) / len(errors),
        "images": float(sum(len(group) for prompts in tasks.values() for group in prompts.values())),
        "prompts": float(sum(map(len, tasks.values()))),
    }
    return overall | found


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not found or not all({"tag", "prompt", "correct"} <= set(entry) for entry in found):
            raise KeyError("tag")
    except OSError as error:
        raise UserError(f"the results {path} cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is no results.jsonl of GenEval: every line needs tag, prompt and correct."
        ) from None
    return found


def _clustered(groups: Iterable[list[bool]], mean: float) -> float:
    """Standard error of a share of images that come in groups (linearised ratio estimate)."""
    groups = list(groups)
    k, images = len(groups), sum(map(len, groups))
    if k < 2:
        return float("nan")
    spread = sum((sum(group) - mean * len(group)) ** 2 for group in groups)
    return math.sqrt(k / (k - 1) * spread) / images
