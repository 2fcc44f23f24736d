"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): images in its layout, judged here or by its own program.

Its own detector lives in an environment of its own (mmdet 2), so the two meet in files: `NNNNN/metadata.jsonl` with
the prompt's line of evaluation_metadata.jsonl and `NNNNN/samples/NNNNN.png`; and a results.jsonl with a line per
image, of which `tag` and `correct` count. `score` writes the same file with `evaluation.detector`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from evaluation.captions import CaptionFile
from evaluation.images import Images
from evaluation.settings import Place
from stepdistill.errors import UserError, atomic_write

if TYPE_CHECKING:
    from evaluation.detector import Detector

# Beside every number of `score`.
JUDGE = (
    "judged by Meta's Mask2Former of transformers, where published scores are by OpenMMLab's training of the same network; "
    "compare with such, or judge the images with GenEval's own program."
)


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


def score(folder: Path, detector: Detector, target: Path, bar: Callable[[list], Iterable] = iter) -> None:
    """Judge every image in GenEval's layout and write its results.jsonl. bar: shows how far it is, as tqdm does. Raises
    UserError if there is no such image, or a prompt's metadata.jsonl is none.
    """
    images = []
    for place in sorted(folder.glob("[0-9]*/metadata.jsonl")):
        (wanted,) = _entries(place, ("tag", "prompt", "include"))
        images += [(wanted, file) for file in sorted((place.parent / "samples").glob("*.png"))]
    if not images:
        raise UserError(
            f"there is no image at {folder / '00000' / 'samples'}; give the folder that export wrote."
        )
    lines = []
    for wanted, file in bar(images):
        with Image.open(file) as image:
            correct, reason = detector.judge(image.convert("RGB"), wanted)
        lines.append({"filename": str(file), "correct": correct, "reason": reason, **wanted})
    with atomic_write(target) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def summarise(path: Place) -> dict[str, float]:
    """`geneval`, the mean over tasks of the share of correct images, and `geneval/<task>`, from a results.jsonl.

    Standard errors are over prompts, not images: a prompt's images succeed and fail together. Raises UserError if the
    file is missing or is none of GenEval's.
    """
    tasks: dict[str, dict[str, list[bool]]] = {}
    for entry in _entries(Path(path), ("tag", "prompt", "correct")):
        tasks.setdefault(entry["tag"], {}).setdefault(entry["prompt"], []).append(bool(entry["correct"]))
    scores: dict[str, float] = {}
    for tag, prompts in tasks.items():
        images = [correct for group in prompts.values() for correct in group]
        scores[f"geneval/{tag}"] = sum(images) / len(images)
        scores[f"geneval/{tag}/se"] = _clustered(prompts.values(), scores[f"geneval/{tag}"])
    values = [scores[f"geneval/{tag}"] for tag in tasks]
    errors = [scores[f"geneval/{tag}/se"] for tag in tasks]
    overall = {
        "geneval": sum(values) / len(values),
        "geneval/se": math.sqrt(sum(error**2 for error in errors)) / len(errors),
        "images": float(sum(len(group) for prompts in tasks.values() for group in prompts.values())),
        "prompts": float(sum(map(len, tasks.values()))),
    }
    return overall | scores


def _entries(path: Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not entries or not all(set(fields) <= set(entry) for entry in entries):
            raise KeyError("tag")
    except OSError as error:
        raise UserError(f"the results {path} cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no file of GenEval: every line needs {', '.join(fields)}.") from None
    return entries


def _clustered(groups: Iterable[list[bool]], mean: float) -> float:
    """Standard error of a share of images that come in groups (linearised ratio estimate)."""
    groups = list(groups)
    k, images = len(groups), sum(map(len, groups))
    if k < 2:
        return float("nan")
    spread = sum((sum(group) - mean * len(group)) ** 2 for group in groups)
    return math.sqrt(k / (k - 1) * spread) / images
