"""What a training step costs, in forward+backward passes of the student: every method, every phase.

    python -m benchmarks.step_time                 all rows
    python -m benchmarks.step_time dmd2 dmd2+gan   some

A UNet2DModel of about 3.5 M parameters, 32x32, batch 4, float32, one thread, class-conditional, no guidance, random
weights. In one process and in turns: the single network passes and each phase whole (zero_grad, losses, backward,
optimiser). The ratio phase / (forward+backward) of the least CPU times is what compares across machines. "own passes"
is the sum of the phase's network passes and its optimiser step, each timed apart. glibc is told to keep what is freed:
by default it hands memory back after each step and takes it again page by page, up to a tenth of a step's CPU time, the
more the higher the step's peak.

Memory: how far one DMD2 student step at batch 16 raises the process's peak, in a process of its own, beside the same
step with the teacher's graph kept until the backward pass. Results: benchmarks/step_time.json and .md; reference
figures: FastGen's on the same set-up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
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
from stepdistill.methods.assemble import assemble, trained_by
from stepdistill.methods.base import Batch, Method, Phase
from stepdistill.noise import SampleNoise
from stepdistill.provenance import git_commit
from stepdistill.registry import resolve

TABLE = Path(__file__).with_suffix(".json")
KEEP_FREED = {"MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
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
# Row: method, settings, {phase: (FastGen's ratio or None, its own passes)}. A pass is a network's forward without
# gradient, F; forward+backward, B; the encoder half forward, E; its forward+backward for all parameters, EB, or for the
# input alone, EI; a forward-mode derivative with its value, J; the optimiser's step, O. -E: a forward that is shared.
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[float | None, str]]]] = {
    "pretrain": ("pretrain", {}, {"student": (1.06, "B O")}),
    "dmd2": ("dmd2", {}, {"student": (1.75, "B F F O"), "critic": (1.40, "F B O")}),
    "dmd2+gan": (
        "dmd2",
        {"gan_weight": 1e-2},
        {"student": (1.90, "B F F EI -E O"), "critic": (1.60, "F B EB O")},
    ),
    # The critic learns on the student's last samples.
    "dmd2+gan, shared samples": (
        "dmd2",
        {"gan_weight": 1e-2, "shared_samples": True},
        {"student": (1.90, "B F F EI -E O"), "critic": (1.60, "B EB O")},
    ),
    "cd, Euler": ("cd", {"solver": "euler"}, {"student": (1.67, "B F F O")}),
    "cd, Heun": ("cd", {"solver": "heun"}, {"student": (None, "B F F F O")}),
    "ect": ("ect", {}, {"student": (1.39, "B F O")}),
    "scm": ("scm", {}, {"student": (2.3, "B F J O")}),
    "meanflow": ("meanflow", {}, {"student": (2.3, "B F J O")}),
    "ladd": (
        "ladd",
        # One head on the 8x8 features, as FastGen's.
        {"blocks": "middle", "warmup": 0},
        {"student": (1.31, "B EI O"), "discriminator": (0.57, "F E E")},
    ),
}
COMMON = {"student_every": 1, "guidance_scale": 1.0}
MEMORY_BATCH = 16


class Setup:
    """A method's networks, optimisers and batches, without a trainer."""

    def __init__(self, name: str, settings: dict[str, Any]):
        torch.manual_seed(0)
        cls = resolve(name, METHODS, "method")
        known = set(cls.Config.__dataclass_fields__)
        kept = {key: value for key, value in (COMMON | settings).items() if key in known}
        self.method: Method = cls(build(cls.Config, kept, "method"))
        self.family = Pixel(Pixel.Config(unet=UNET))
        self.family.teacher = self.family.fresh().eval().requires_grad_(False)
        with torch.no_grad():
            # Zero-initialised layers would make trivial losses.
            for parameter in self.family.teacher.parameters():
                parameter += 0.02 * torch.randn(parameter.shape)
        self.nets = assemble(self.method, self.family)
        self.optimizers = {
            name: torch.optim.AdamW(self.nets.modules[name].parameters(), 1e-6, fused=True)
            for name in trained_by(self.method, 8)
        }
        self.step, self.data = 0, 0.5 * torch.randn(MEMORY_BATCH, *self.family.shape)

    def phases(self) -> dict[str, Phase]:
        """Each phase of the first eight iterations, by name, as it is met first."""
        first: dict[str, Phase] = {}
        for step in range(8):
            for phase in self.method.phases(step):
                first.setdefault(phase.name, phase)
        return first

    def batch(self, phase: str, size: int = BATCH) -> Batch:
        """A fresh batch of the same random images, classes in turn."""
        self.step += 1
        noise, x0 = SampleNoise(range(size), step=self.step, phase=phase), self.data[:size]
        cond, uncond = self.family.encode([i % 10 for i in range(size)]), self.family.uncond(size)
        return Batch(cond, uncond, self.family.shape, noise.index, noise, x0)

    def train(self, phase: Phase, size: int = BATCH) -> None:
        """One optimiser step of a phase, whole."""
        for name in self.optimizers:
            self.nets.modules[name].requires_grad_(name in phase.trains)
            self.optimizers[name].zero_grad()
        batch = self.batch(phase.name, size)
        for weight, loss in phase.terms:
            (weight * loss(self.nets, batch)["total"].mean()).backward()
        for name in phase.trains:
            self.optimizers[name].step()

    def passes(self) -> dict[str, Callable[[], None]]:
        """Single network passes, each as a method makes it."""
        student, teacher, batch = self.nets.student, self.family.teacher, self.batch("passes")
        x_t, t = batch.x0, torch.full((BATCH,), 1.0, dtype=torch.float64)
        half = [teacher.middle]
        end = {"end": t} if "end" in self.method.sampling.inputs else {}

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

            student.requires_grad_(True)
            along = (torch.ones_like(x_t), torch.ones_like(t))
            jvp(lambda x, time: student(x, time, batch.cond, **end).x0, (x_t, t), along)

        def optimise() -> None:
            for p in student.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.optimizers["student"].step()

        named = {"F": forward, "B": both, "E": encoder, "EB": encoder_both, "EI": encoder_input}
        return named | {"J": derivative, "O": optimise}


def main() -> None:
    """Time the rows that were asked for; each is written as soon as it is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}, memory (default: all)")
    parser.add_argument("--rounds", type=int, default=6, help="timed rounds, after 2 that are not")
    parser.add_argument("--peak", choices=("free", "kept"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print(peak_growth(kept=args.peak == "kept"))
        return
    # glibc reads them when a process starts.
    if not KEEP_FREED.keys() <= os.environ.keys():
        command = [sys.executable, "-m", "benchmarks.step_time", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | KEEP_FREED)
    for row in args.rows or [*ROWS, "memory"]:
        if row not in ROWS and row != "memory":
            parser.error(f"there is no row {row!r}; choose from {', '.join(ROWS)}, memory")
        entry = memory() if row == "memory" else time_row(row, args.rounds)
        table = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
        save(table | {row: entry | about()})
        print(row, json.dumps(entry), flush=True)


def about() -> dict[str, Any]:
    """What a row was measured with."""
    return {
        "torch": torch.__version__,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "commit": git_commit(),
    }


def time_row(row: str, rounds: int) -> dict[str, Any]:
    """The row's phases and passes, timed in turns `rounds` times after two that are not."""
    name, settings, expected = ROWS[row]
    setup = Setup(name, settings)
    phases = setup.phases()
    wanted = {part.strip("-") for _, parts in expected.values() for part in parts.split()} | {"F", "B"}
    passes = setup.passes()
    jobs = {part: passes[part] for part in sorted(wanted)}
    jobs |= {phase: (lambda p=phases[phase]: setup.train(p)) for phase in expected}
    cpu: dict[str, list[float]] = {job: [] for job in jobs}
    for number in range(-2, rounds):
        for job, work in jobs.items():
            started = time.process_time()
            work()
            if number >= 0:
                cpu[job].append(1000 * (time.process_time() - started))
    least = {job: min(times) for job, times in cpu.items()}
    timed = {}
    for phase, (peer, parts) in expected.items():
        own = sum(-least[part[1:]] if part[0] == "-" else least[part] for part in parts.split())
        timed[phase] = {
            "ratio": round(least[phase] / least["B"], 3),
            "ratio_median": round(statistics.median(cpu[phase]) / statistics.median(cpu["B"]), 3),
            "fastgen": peer,
            "over_own_passes": round(least[phase] / own, 3),
            "own_passes": parts,
        }
    return {
        "phases": timed,
        "cpu_ms": {job: round(value, 1) for job, value in least.items()},
        "parameters": parameter_count(setup.nets.student),
        "rounds": rounds,
    }


def memory() -> dict[str, Any]:
    """MB by which the DMD2 student step raises the peak, without and with the teacher's graph."""
    grown = {}
    for kind in ("free", "kept"):
        command = [sys.executable, "-m", "benchmarks.step_time", "--peak", kind]
        bare = {key: value for key, value in os.environ.items() if key not in KEEP_FREED}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=bare)
        grown[kind] = float(done.stdout)
    return {
        "batch": MEMORY_BATCH,
        "peak_growth_mb": round(grown["free"]),
        "peak_growth_mb_with_teachers_graph": round(grown["kept"]),
        "saved": round(1 - grown["free"] / grown["kept"], 3),
    }


def peak_growth(kept: bool) -> float:
    """MB from after loading to the peak of two student steps. kept: the teacher is called as if it were trained."""
    setup = Setup("dmd2", {})
    ask = setup.method.teacher_at

    def with_graph(*args: Any) -> Any:
        with torch.enable_grad():
            return ask(*args)

    if kept:
        setup.method.teacher_at = with_graph
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        setup.train(setup.phases()["student"], MEMORY_BATCH)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def save(rows: dict[str, Any]) -> None:
    """Write the table as JSON and as Markdown."""
    with atomic_write(TABLE) as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        "| method | phase | step / (forward+backward) | at most (FastGen) | over the sum of its own passes |",
        "|---|---|---|---|---|",
    ]
    for row in (row for row in ROWS if row in rows):
        for phase, timed in rows[row]["phases"].items():
            own = f"{timed['over_own_passes']:.2f} ({timed['own_passes']})"
            peer = f"{timed['fastgen']:.2f}" if timed["fastgen"] else ""
            lines.append(f"| {row} | {phase} | {timed['ratio']:.2f} | {peer} | {own} |")
    if growth := rows.get("memory"):
        lines += [
            "",
            f"Peak memory of one DMD2 student step at batch {growth['batch']}: {growth['peak_growth_mb']} MB above the"
            f" loaded networks, {growth['peak_growth_mb_with_teachers_graph']} MB with the teacher's graph kept"
            f" ({growth['saved']:.0%} less).",
        ]
    with atomic_write(TABLE.with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
