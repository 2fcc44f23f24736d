"""How much of what independent decoding loses a student of one or two passes wins back.

    OMP_NUM_THREADS=1 python -m benchmarks.distilled_decoding --student DIRECTORY      (writes distilled_decoding.json)

Beside the teacher, a pass for each code, and its student, two more ways to draw are measured on the same prompts and seeds:
independent, each code from another of the teacher's images of that prompt, so that every place has its own law and nothing
agrees; and the teacher in the loop, which keeps the first half of the student's answer and says the rest itself. "Gap
closed" is (FD of independent - FD) / (FD of independent - FD of the teacher). Agreement is the share of codes that are
those of the teacher's map for the same noise. Diversity is of the protocol's companion, as a ratio to the teacher's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import stepdistill
from evaluation import evaluate
from evaluation.results import machine
from stepdistill.denoiser import guided
from stepdistill.drawing import Drawer
from stepdistill.errors import atomic_write, cli_errors, quieten_libraries
from stepdistill.families.code_denoisers import relayed
from stepdistill.provenance import sha256_of_weights
from stepdistill.scenes import ATTRIBUTES, HELD_OUT_SEED, scene_at

OUT = Path(__file__).with_suffix(".json")
# The teacher's images of a prompt that independent codes are taken from, and images of one call of it.
OTHERS, BATCH = 8, 128
DIVERSITY = "diversity:scenes-v1"
X0 = Callable[[Sequence[str], Sequence[int]], Tensor]


def independent(teacher: Drawer) -> X0:
    """Each code of an image from one of OTHERS that the teacher draws, all of its prompt."""

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        many = [prompt for prompt in prompts for _ in range(OTHERS)]
        numbers = [10**6 + OTHERS * seed + i for seed in seeds for i in range(OTHERS)]
        codes = teacher.x0(many, numbers).unflatten(0, (len(prompts), OTHERS))
        chosen = torch.randint(OTHERS, codes[:, 0, :, :1].shape, generator=torch.Generator().manual_seed(0))
        return codes.gather(1, chosen[:, None].expand(-1, 1, -1, codes.shape[-1]))[:, 0]

    return draw


def in_the_loop(student: Drawer, teacher: Drawer, since: float = 0.5) -> X0:
    """The student's first places, and the teacher from there on."""

    @torch.no_grad()
    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        family = teacher.sampler.family_
        uncond = family.uncond(len(prompts))

        def ask(x_t: Tensor, t: Tensor, cond: Tensor) -> Any:
            return guided(teacher.sampler.denoiser, x_t, t, cond, uncond, teacher.guidance)

        noise = teacher.sampler.noise(seeds)
        both, sampling = relayed(student.sampler.denoiser, ask, since), student.sampler.sampling
        return sampling.sample(both, noise(0), (1.0, since), noise, family.encode(prompts))

    return draw


def measured(draw: X0, family: Any, count: int) -> tuple[dict[str, float], Tensor]:
    """FD, the seeds' diversity and the checker's rates, and the codes of the protocol's own images."""
    kept = []

    @torch.no_grad()
    def images(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        x0 = draw(prompts, seeds)
        kept.append(x0)
        return (255 * family.decode(x0).clamp(0, 1)).round().to(torch.uint8)

    found = evaluate(images, "scenes-2k", n=count, metrics=("fd", "diversity", "attributes"), batch=BATCH)
    names = ("fd:scenes-v1", DIVERSITY, "attributes/all", *(f"attributes/{each}" for each in ATTRIBUTES))
    values = {name: found[name] for key in names for name in (key, f"{key}/se") if name in found}
    return values, torch.cat(kept)[:count]


def timed(drawer: Drawer, rounds: int = 3) -> float:
    """Milliseconds of an image's passes, 16 at a time, the least of some rounds."""
    prompts, seeds, best = [scene_at(i).caption for i in range(16)], list(range(16)), float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        drawer.x0(prompts, seeds)
        best = min(best, time.perf_counter() - began)
    return 1000 * best / 16


def picture(draws: dict[str, X0], family: Any, path: Path) -> None:
    """A row for each way to draw, the same prompts and seeds."""
    prompts, seeds = [scene_at(i, HELD_OUT_SEED).caption for i in range(10)], list(range(10))
    rows = [torch.from_numpy(family.picture(draw(prompts, seeds))) for draw in draws.values()]
    with atomic_write(path) as temporary:
        Image.fromarray(torch.cat(rows).numpy()).resize((1280, 128 * len(rows))).save(temporary, format="PNG")


def ways(teacher: Drawer, students: Sequence[Any]) -> dict[str, X0]:
    """Every way to draw, by its row's name; students by the methods that made them."""
    found: dict[str, X0] = {"teacher": teacher.x0, "independent": independent(teacher)}
    for each in students:
        name = each.card.method
        found |= {f"{name}, {n} pass{'es' * (n > 1)}": each.at(n, chunk=BATCH).x0 for n in each.steps}
        found[f"{name}, teacher in the loop"] = in_the_loop(each.at(chunk=BATCH), teacher)
    return found


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All rows; those of the teacher and of independent codes are taken from the file where it has them."""
    teacher, students = stepdistill.load(args.teacher), [stepdistill.load(path) for path in args.student]
    family, full = teacher.family_, teacher.at(guidance=args.guidance, chunk=BATCH)
    settings = {"n": args.n, "guidance": args.guidance, "teacher": sha256_of_weights(teacher.denoiser)[:16]}
    kept = json.loads(OUT.read_text()) if OUT.is_file() else {}
    rows = kept["rows"] if kept.get("settings") == settings else {}
    draws, right = ways(full, students), None
    for name, draw in draws.items():
        if name == "independent" and DIVERSITY in rows.get(name, {}):
            continue
        rows[name], codes = measured(draw, family, args.n)
        right = codes if right is None else right
        rows[name]["agreement"] = float((codes - right).abs().amax(-1).lt(1e-4).float().mean())
        print(name, rows[name], flush=True)
    ends = [rows[name]["fd:scenes-v1"] for name in ("independent", "teacher")]
    for row in rows.values():
        row["gap_closed"] = (ends[0] - row["fd:scenes-v1"]) / (ends[0] - ends[1])
        if DIVERSITY in row:
            row[f"{DIVERSITY}/of_teacher"] = row[DIVERSITY] / rows["teacher"][DIVERSITY]
        row["of_teachers_rate"] = row["attributes/all"] / max(rows["teacher"]["attributes/all"], 1e-9)
    passes = {"teacher": teacher.at(guidance=args.guidance)}
    passes |= {f"{each.card.method}, {n}": each.at(n) for each in students for n in each.steps}
    if students:
        shown = {name: draw for name, draw in draws.items() if "loop" not in name}
        picture(shown, family, Path(args.picture))
    return {
        "command": f"python -m benchmarks.distilled_decoding --student {' '.join(args.student)} --n {args.n}"
        f" --guidance {args.guidance:g}",
        "machine": machine("cpu"),
        "settings": settings,
        "rows": rows,
        "milliseconds_per_image": {name: round(timed(drawer), 2) for name, drawer in passes.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", default="assets/ar")
    parser.add_argument("--student", nargs="*", default=[], help="directories; none: the teacher alone")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--guidance", type=float, default=2.0, help="of the teacher")
    parser.add_argument("--picture", default="assets/pictures/distilled_decoding.png")
    args = parser.parse_args()
    with cli_errors():
        quieten_libraries()
        found = compare(args)
        with atomic_write(OUT) as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
