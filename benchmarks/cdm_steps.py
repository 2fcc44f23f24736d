"""One student in one to eight steps: its distance, and how far its answers stay as wide as the data.

    python -m benchmarks.cdm_steps untold=runs/untold/student told=runs/fair/10/cdm/run/student     (writes cdm_steps.json)

Every student is measured in each number of steps (1,000 samples), and its answers x0 are followed along the way of the most
of them: "x0_std" is their standard deviation at each of its times over that of the same captions' images. `guidance` says
where along flow's time CA has anything to say: the root mean square of teacher(x_tau, c) - teacher(x_tau, no c), tau up to it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import students
from evaluation.results import machine
from stepdistill import load, scenes
from stepdistill.drawing import Sampler
from stepdistill.errors import UserError, cli_errors, quieten_libraries
from stepdistill.prediction import Prediction
from stepdistill.provenance import git_commit
from stepdistill.schedule import Flow, times_like

OUT = Path(__file__).with_suffix(".json")
STEPS = (1, 2, 3, 4, 6, 8)
# Scenes whose captions the answers are followed for.
FOLLOWED = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("students", nargs="+", metavar="NAME=STUDENT", help="exported students")
    parser.add_argument("--n", type=int, default=1000, help="samples measured (default: 1000)")
    parser.add_argument("--runs", type=Path, default=students.ROOT / "runs" / "cdm_steps", help="for samples")
    args = parser.parse_args()
    quieten_libraries()
    with cli_errors():
        pairs = [given.partition("=")[::2] for given in args.students]
        for (name, path), given in zip(pairs, args.students, strict=True):
            if not name or not path:
                raise UserError(f"students are given as NAME=DIRECTORY, got {given!r}.")
            if (serves := load(path).steps) and max(serves) < STEPS[-1]:
                raise UserError(
                    f"{given}: this student serves {list(serves)} steps, and {STEPS[-1]} are measured."
                )
        found = [scenes.image_at(i, scenes.HELD_OUT_SEED) for i in range(FOLLOWED)]
        captions = [scene.caption for scene, _ in found]
        images = torch.from_numpy(np.stack([image for _, image in found])).permute(0, 3, 1, 2)
        teacher = load(students.ROOT / students.TEACHER)
        x0 = teacher.family_.encode_images(images)
        times = load(pairs[0][1]).times(STEPS[-1])
        facts: dict[str, Any] = {
            "steps": STEPS,
            "flow_times": [round(flow_time(teacher, t), 3) for t in times],
            "guidance": [guidance_below(teacher, x0, captions, flow_time(teacher, t)) for t in times],
            "rows": [],
        }
        for name, path in pairs:
            words = ["--steps", ",".join(map(str, STEPS))]
            results = students.measure([Path(path)], args.runs / name, args.n, "fd,clip,attributes", words)
            (rows,) = students.rows_of(results).values()
            row = {"name": name, "x0_std": x0_std(load(path), captions, float(x0.std()))}
            row["by_steps"] = {
                steps: {key: one[key] for key in students.KEPT if key in one} for steps, one in rows.items()
            }
            facts["rows"].append(row)
        facts |= {"protocol": results["protocol"], "commit": git_commit(), "machine": machine("cpu")}
        students.write(OUT, facts)


def flow_time(sampler: Sampler, t: float) -> float:
    rho = sampler.denoiser.schedule.rho(torch.tensor(t, dtype=torch.float64))
    return float(Flow().t_of_rho(rho))


@torch.no_grad()
def guidance_below(teacher: Sampler, x0: Tensor, captions: list[str], top: float, points: int = 4) -> float:
    """At times tau spread evenly in (0, top), of noised images x0."""
    schedule, family, noise = teacher.denoiser.schedule, teacher.family_, torch.Generator().manual_seed(0)
    cond, uncond, squares = family.encode(captions), family.uncond(len(captions)), 0.0
    for k in range(points):
        tau = schedule.t_of_rho(Flow().rho(torch.tensor(top * (k + 0.5) / points, dtype=torch.float64)))
        t = times_like(float(tau.round()), x0)
        x = schedule.add_noise(x0, torch.randn(x0.shape, generator=noise), t)
        apart = teacher.denoiser(x, t, cond).x0 - teacher.denoiser(x, t, uncond).x0
        squares += float(apart.square().mean()) / points
    return round(squares**0.5, 4)


@torch.no_grad()
def x0_std(student: Sampler, captions: list[str], of_data: float) -> list[float]:
    """At each time of the most steps, the answers' standard deviation over the data's."""
    sampling, times, stds = student.sampling, student.times(STEPS[-1]), []
    noise = student.noise(range(len(captions)))

    def predict(*asked: Any) -> Prediction:
        said = student.denoiser(*asked)
        stds.append(round(float(said.x0.std()) / of_data, 3))
        return said

    x = sampling.first_input(student.denoiser.schedule, noise(0), times[0])
    sampling.sample(predict, x, times, noise, student.family_.encode(captions))
    return stds


if __name__ == "__main__":
    main()
