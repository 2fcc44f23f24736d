"""What a training step costs, in forward+backward passes of the student: every method, every phase.

    python -m benchmarks.step_time                 all rows
    python -m benchmarks.step_time dmd2 dmd2+gan   some

A UNet2DModel of about 3.5 M parameters, 32x32, batch 4, float32, one thread, class-conditional, no guidance,
random weights. In one process and in turns: the no-grad forward, forward+backward, and each phase whole
(zero_grad, losses, backward, optimiser). The ratio phase / (forward+backward) of the least CPU times is what
compares across machines. "own passes" is the sum of the phase's network passes and its optimiser step, each timed
apart. Results: benchmarks/step_time.json and .md; reference figures: FastGen's on the same set-up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stepdistill.config import build
from stepdistill.denoiser import parameter_count
from stepdistill.errors import atomic_write
from stepdistill.families.pixel import Pixel
from stepdistill.features import block_features
from stepdistill.methods import METHODS
from stepdistill.methods.base import Batch, Method, Networks, Phase
from stepdistill.noise import SampleNoise
from stepdistill.registry import resolve

TABLE = Path(__file__).with_suffix(".json")
BATCH = 4
UNET = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 3,
    "block_out_channels": [64, 72, 72],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 72,
    "norm_num_groups": 8,
    "num_class_embeds": 10,
}
# Row: method, settings, {phase: (FastGen's ratio or None, its own passes)}. Passes: B forward+backward,
# F no-grad forward, E forward of the encoder half, EB the same with its backward, J forward-mode derivative.
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[float | None, str]]]] = {
    "pretrain": ("pretrain", {}, {"student": (1.06, "B")}),
    "dmd2": (
        "dmd2",
        {"student_every": 1, "guidance_scale": 1.0},
        {"student": (1.75, "B F F"), "critic": (1.40, "F B")},
    ),
    "dmd2+gan": (
        "dmd2",
        {"student_every": 1, "guidance_scale": 1.0, "gan_weight": 1e-2},
        {"student": (1.90, "B F F EI"), "critic": (1.60, "F B EB EB")},
    ),
    "cd": ("cd", {}, {"student": (1.67, "B F F")}),
    "ect": ("ect", {}, {"student": (1.39, "B F")}),
    "scm": ("scm", {"guidance_scale": 1.0}, {"student": (2.3, "B F J")}),
    "meanflow": ("meanflow", {"guidance_scale": 1.0}, {"student": (2.3, "B F J")}),
    "ladd": (
        "ladd",
        {"blocks": "half", "warmup": 0},
        {"student": (1.31, "B EI"), "discriminator": (0.57, "F E E")},
    ),
}


class Setup:
    """A method's networks, optimisers and batches, without a trainer."""

    def __init__(self, name: str, settings: dict[str, Any]):
        torch.manual_seed(0)
        cls = resolve(name, METHODS, "method")
        known = set(cls.Config.__dataclass_fields__)
        self.method: Method = cls(
            build(cls.Config, {k: v for k, v in settings.items() if k in known}, "method"), (1,)
        )
        self.family = Pixel(Pixel.Config(unet=UNET))
        teacher = self.family.fresh().eval().requires_grad_(False)
        with torch.no_grad():
            for parameter in teacher.parameters():  # zero-initialised layers would make trivial losses
                parameter += 0.02 * torch.randn(parameter.shape)
        student = teacher.clone()
        for extra in self.method.student_extras:
            student.network.extras[extra]()
        extras = self.method.networks(teacher, student)
        self.nets = Networks({"teacher": teacher, "student": student, **extras}, self.family.schedule)
        trained = {n for step in range(8) for phase in self.method.phases(step) for n in phase.trains}
        self.optimizers = {
            n: torch.optim.AdamW(list(self.nets.modules[n].parameters()), 1e-6) for n in trained
        }
        self.step = 0

    def phases(self) -> dict[str, Phase]:
        found: dict[str, Phase] = {}
        for step in range(8):
            for phase in self.method.phases(step):
                found.setdefault(phase.name, phase)
        return found

    def batch(self, phase: str) -> Batch:
        self.step += 1
        noise = SampleNoise(range(BATCH), step=self.step, phase=phase)
        x0 = 0.5 * noise.randn(*self.family.shape)
        cond, uncond = self.family.encode(range(BATCH)), self.family.uncond(BATCH)
        return Batch(cond, uncond, self.family.shape, noise.index, noise, x0)

    def run(self, phase: Phase) -> None:
        for name in self.optimizers:
            self.nets.modules[name].requires_grad_(name in phase.trains)
            self.optimizers[name].zero_grad()
        batch = self.batch(phase.name)
        for weight, loss in phase.terms:
            (weight * loss(self.nets, batch)["total"].mean()).backward()
        for name in phase.trains:
            self.optimizers[name].step()

    def passes(self) -> dict[str, Callable[[], None]]:
        """Single network passes, each as a method makes it."""
        student, teacher, batch = self.nets.student, self.nets.teacher, self.batch("passes")
        x_t, t = batch.x0, torch.full((BATCH,), 1.0, dtype=torch.float64)
        half = [teacher.middle]
        end = {"end": t} if "end" in self.method.student_extras else {}

        def forward() -> None:
            with torch.no_grad():
                _ = teacher(x_t, t, batch.cond).x0

        def both() -> None:
            student.requires_grad_(True)
            student(x_t, t, batch.cond, **end).x0.square().mean().backward()
            student.zero_grad()

        def encoder() -> None:
            with torch.no_grad():
                block_features(teacher, x_t, t, batch.cond, half)

        def encoder_both() -> None:
            student.requires_grad_(True)
            block_features(student, x_t, t, batch.cond, half)[0].square().mean().backward()
            student.zero_grad()

        def encoder_input() -> None:
            x = x_t.clone().requires_grad_(True)
            block_features(teacher, x, t, batch.cond, half)[0].square().mean().backward()

        def derivative() -> None:
            from stepdistill.jvp import jvp

            jvp(lambda x: student(x, t, batch.cond, **end).x0, (x_t,), (torch.ones_like(x_t),))

        def optimise() -> None:
            for p in student.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.optimizers["student"].step()

        named = {"F": forward, "B": both, "E": encoder, "EB": encoder_both, "EI": encoder_input}
        return named | {"J": derivative, "O": optimise}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=6, help="timed rounds, after 2 that are not")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for row in args.rows or ROWS:
        if row not in ROWS:
            parser.error(f"there is no row {row!r}; choose from {', '.join(ROWS)}")
        found = measure(row, args.rounds)
        table = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
        save(table | {row: found})
        print(row, json.dumps(found["phases"]), flush=True)


def measure(row: str, rounds: int) -> dict[str, Any]:
    name, settings, expected = ROWS[row]
    setup = Setup(name, settings)
    phases = setup.phases()
    wanted = sorted({part for _, parts in expected.values() for part in parts.split()} | {"F", "B", "O"})
    jobs = {part: setup.passes()[part] for part in wanted}
    jobs |= {phase: (lambda p=phases[phase]: setup.run(p)) for phase in expected}
    cpu: dict[str, list[float]] = {job: [] for job in jobs}
    for number in range(-2, rounds):
        for job, run in jobs.items():
            started = time.process_time()
            run()
            if number >= 0:
                cpu[job].append(1000 * (time.process_time() - started))
    least = {job: min(times) for job, times in cpu.items()}
    found = {}
    for phase, (peer, parts) in expected.items():
        own = sum(least[part] for part in [*parts.split(), "O"])
        found[phase] = {
            "ratio": round(least[phase] / least["B"], 3),
            "ratio_median": round(statistics.median(cpu[phase]) / statistics.median(cpu["B"]), 3),
            "fastgen": peer,
            "over_own_passes": round(least[phase] / own, 3),
            "own_passes": f"{parts} O",
        }
    return {
        "phases": found,
        "cpu_ms": {job: round(value, 1) for job, value in least.items()},
        "parameters": parameter_count(setup.nets.student),
        "rounds": rounds,
        "torch": torch.__version__,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }


def save(rows: dict[str, Any]) -> None:
    with atomic_write(TABLE) as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        "| method | phase | step / (forward+backward) | at most (FastGen) | over the sum of its own passes |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=list(ROWS).index):
        for phase, found in rows[row]["phases"].items():
            own = f"{found['over_own_passes']:.2f} ({found['own_passes']})"
            peer = f"{found['fastgen']:.2f}" if found["fastgen"] else ""
            lines.append(f"| {row} | {phase} | {found['ratio']:.2f} | {peer} | {own} |")
    with atomic_write(TABLE.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
