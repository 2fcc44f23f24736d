"""Kills at random: `make soak` ends runs of every method hundreds of times, and each must end as if nobody had.

    python tests/soak.py [--out benchmarks/soak.json] [--kills 9] [--only CASE ...]

Every trial begins a run in a directory of its own, kills it (SIGKILL, sometimes SIGTERM) at a random write, network step or
measurement, flips a bit of its newest checkpoint now and then, starts it again, and so on six times. What it ends with is
compared with a run nobody disturbed: every byte of weights, optimisers, counters, previews and the exported student, and
every line of the log. Runs are forked from one warm process. OUT is written after each case; those in it are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from forks import two_processes  # noqa: E402
from runs import assert_same_run, checkpoint, of_method, same, sd  # noqa: E402

from evaluation.__main__ import main as evaluate  # noqa: E402
from stepdistill import export as exporting  # noqa: E402
from stepdistill.config import dump  # noqa: E402
from stepdistill.errors import cli_errors  # noqa: E402
from stepdistill.families.toy import Toy  # noqa: E402
from stepdistill.methods import METHODS  # noqa: E402
from stepdistill.registry import allowing_code  # noqa: E402
from training import files, monitor, precompute, preview  # noqa: E402
from training import run as running  # noqa: E402
from training.recipe import Recipe  # noqa: E402
from training.trainer import Trainer  # noqa: E402

KILLS = 6
# What a write belongs to, by a part of its path.
KINDS = {
    "/eval": "evaluation",
    "/checkpoints/": "checkpoint",
    "student": "export",
    "previews": "preview",
    "metrics": "log",
    "pairs-": "pairs",
    "cache/": "precompute",
    "recipe.yaml": "start",
}
WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
EXITS = {0, 143, -signal.SIGKILL, -signal.SIGTERM}
OFTEN = (
    "run.steps=6",
    "run.save_every=2",
    "run.keep=2",
    "run.log_every=1",
    "run.preview_every=3",
    "run.preview_count=2",
    "run.check_teacher=false",
)
MEASURED = ("run.metric=sw1", "run.metric_every=2")

# What is seldom met is met where a case is about it.
FOCUS = {
    "kd": "pairs",
    "dmd": "pairs",
    "precompute": "precompute",
    "latents and export": "export",
    "lora": "export",
}

# Written by the run under test, read by this process: the last step it began.
REACHED = multiprocessing.RawValue("i", 0)


def kind(event: str, path: str) -> str:
    """What a write belongs to."""
    for word, name in KINDS.items():
        if word in path:
            return name
    return "other"


class Killer:
    """Counts what happens in this process by kind, and ends it at one of these moments.

    Args:
        at: (kind, number) of the moment, or None for never; number: of the signal.
    """

    def __init__(self, place: Path, at: tuple[str, int] | None, number: int) -> None:
        self.place, self.at, self.number = str(place), at, number
        self.seen: Counter[str] = Counter()

    def event(self, name: str, path: str = "") -> None:
        self.seen[name] += 1
        if self.at == (name, self.seen[name]):
            if name == "half a file":
                Path(path).write_bytes(b"\x10\0\0\0")
            os.kill(os.getpid(), self.number)

    def audit(self, event: str, given: tuple[Any, ...]) -> None:
        if event not in WATCHED or (event == "open" and given[1] in ("r", "rb", None)):
            return
        path = (
            os.path.join(os.getcwd(), os.fsdecode(given[0]))
            if isinstance(given[0], (str, bytes, os.PathLike))
            else ""
        )
        if event in ("os.remove", "os.rmdir") and "/" not in str(given[0]):
            # As shutil.rmtree names what it removes.
            self.event("pruning", path)
        elif path.startswith(self.place):
            self.event(kind(event, path[len(self.place) :]), path)

    def install(self) -> None:
        sys.addaudithook(self.audit)
        save, step, phase, measure = files.save_file, Trainer.train_step, Trainer._train, monitor.measure

        def save_file(tensors: Any, path: str, metadata: Any = None) -> None:
            self.event("half a file", path)
            save(tensors, path, metadata)

        def train_step(trainer: Trainer) -> None:
            REACHED.value = trainer.state.global_step
            self.event("between steps")
            step(trainer)

        def train(trainer: Trainer, given: Any) -> None:
            self.event("within a step")
            phase(trainer, given)

        def measured(*given: Any, **named: Any) -> Any:
            self.event("measuring")
            return measure(*given, **named)

        files.save_file, Trainer.train_step, Trainer._train = save_file, train_step, train
        monitor.measure, running.measure = measured, measured


def cheap() -> None:
    """Less of what costs more than such a run; and one commit, whatever is committed meanwhile."""
    Toy.sliced_w1 = lambda self, draw: float(draw(8).std())
    for name in ("modes_covered", "shares", "trace", "shape"):
        if hasattr(Toy, name):
            setattr(Toy, name, lambda self, draw: float(draw(8).mean()))
    preview.TEACHER_STEPS = 3
    exporting.git_commit = lambda short=False: "soak"


def attempt(
    does: Callable[[], None], place: Path, at: tuple[str, int] | None, number: int
) -> tuple[int, Counter]:
    """Do it in a process of its own; (exit code, what happened by kind)."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        code = 1
        with open(place / "log.txt", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            os.chdir(place)
            killer = Killer(place, at, number)
            killer.install()
            with allowing_code(), cli_errors():
                does()
            theirs.send(killer.seen)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, ours.recv() if ours.poll() else Counter()


# ------------------------------------------------------------------------------------------------------ what is run


def one(recipe: Recipe) -> Callable[[], None]:
    return lambda: running.run(recipe)


def _rank(rank: int, recipe: Recipe) -> None:
    with allowing_code(), cli_errors():
        running.run(recipe)


def two(recipe: Recipe) -> Callable[[], None]:
    return lambda: two_processes(_rank, recipe)


def ahead(recipe: Recipe) -> Callable[[], None]:
    def does() -> None:
        Path("mine.yaml").write_text(dump(recipe))
        precompute.main(["mine.yaml"])
        running.run(recipe)

    return does


def measured() -> None:
    evaluate(
        ["run", "--pipeline", str(ROOT / "assets/student"), "--steps", "1", "--n", "8", "--io-batch", "2", "--metrics",
         "attributes", "--latency-images", "1", "--throughput-batch", "0", "--out", "eval"]
    )  # fmt: skip


def cases(teacher: Path) -> dict[str, Callable[[], None]]:
    """What each does, in the directory it is in; the same again goes on."""
    out, small = Path("run"), ("optim.batch_size=4",)
    with allowing_code():
        toys = {name: one(of_method(name, out, *OFTEN, *MEASURED)) for name in METHODS}
        return toys | {
            "accumulation": one(of_method("dmd2", out, *OFTEN, "optim.micro_batch_size=2")),
            "bf16": one(of_method("dmd2", out, *OFTEN, "run.precision=bf16")),
            "no average": one(of_method("sim", out, *OFTEN, "student.ema=0")),
            "latents and export": one(sd(out, teacher, *OFTEN, *small)),
            "lora": one(
                sd(
                    out,
                    teacher,
                    *OFTEN,
                    *small,
                    "student.lora.rank=2",
                    method={"name": "vsd", "lora_rank": 2},
                )
            ),
            "bf16 on latents": one(sd(out, teacher, *OFTEN, *small, "run.precision=bf16")),
            "precompute": ahead(sd(out, teacher, *OFTEN, *small, "run.precompute=always")),
            "two processes": two(of_method("dmd2", out, *OFTEN)),
            "two processes, accumulation": two(of_method("scm", out, *OFTEN, "optim.micro_batch_size=2")),
            "evaluation": measured,
        }


# ------------------------------------------------------------------------------------------------------ what is judged


def content(place: Path) -> dict[str, bytes]:
    """Every file that must be the same to the byte; clocks and logs are not."""
    left_out = re.compile(
        r"log\.txt|/checkpoints/|metrics\.jsonl|verified\.json|damaged|\.lock|recipe\.yaml|eval/"
    )
    files = [path for path in sorted(place.rglob("*")) if path.is_file()]
    return {str(p.relative_to(place)): p.read_bytes() for p in files if not left_out.search(str(p))}


def rows(place: Path) -> Any:
    """What an evaluation found, without what a clock did."""
    found = json.loads((place / "eval" / "results.json").read_text())["rows"]
    keep = ("sha256", "steps", "n", "samples_sha256")
    return [
        {key: row.get(key) for key in keep} | {"all": row["metrics"].get("attributes/all")} for row in found
    ]


def judge(name: str, reference: Path, place: Path) -> None:
    """AssertionError where something differs, is left over, or is there twice."""
    if name == "evaluation":
        assert rows(reference) == rows(place)
        return
    one, other = reference / "run", place / "run"
    if name.startswith("two"):
        # Sums shared between processes are rounded where a checkpoint was written.
        a, b = checkpoint(one), checkpoint(other)
        assert same(a.tensors, b.tensors) and same(a.optimizers, b.optimizers)
    else:
        assert_same_run(one, other)
    steps = [
        json.loads(line)["step"]
        for line in (other / "metrics.jsonl").read_text().splitlines()
        if '"lr"' in line
    ]
    assert steps == [1, 2, 3, 4, 5, 6], steps
    lines = [sorted(json.loads(line)) for line in (other / "metrics.jsonl").read_text().splitlines()]
    assert lines == [sorted(json.loads(line)) for line in (one / "metrics.jsonl").read_text().splitlines()]
    a, b = content(reference), content(place)
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    assert a == b, [key for key in a if a[key] != b[key]]
    assert not [path for path in other.rglob(".*") if path.name != ".lock"]


def flip(place: Path, rng: random.Random) -> str:
    """Flip a bit of the newest of several checkpoints; "" where there is only one to go on from."""
    folder = place / "run" / "checkpoints"
    steps = sorted((int(p.name) for p in folder.glob("*") if p.name.isdecimal()), reverse=True)
    if len(steps) < 2:
        return ""
    path = rng.choice([p for p in (folder / str(steps[0])).iterdir() if p.stat().st_size])
    bits = bytearray(path.read_bytes())
    bits[rng.randrange(len(bits))] ^= 1 << rng.randrange(8)
    path.write_bytes(bits)
    return f"{steps[0]}/{path.name}"


def set_aside(place: Path) -> set[tuple[str, int]]:
    """What a run has found damaged, whether or not it lived to say so."""
    return {(path.name, path.stat().st_ino) for path in place.glob("run/checkpoints/damaged-*")}


def trial(
    name: str, does: Callable[[], None], reference: Path, place: Path, moments: Counter, rng: random.Random
) -> dict:
    """One run, killed up to `KILLS` times and then left alone."""
    place.mkdir(parents=True)
    log, killed, signals = place / "log.txt", Counter(), Counter()
    flips = found = lost = 0
    # Rare kinds as often as frequent ones.
    for left in range(KILLS, -1, -1):
        number = signal.SIGTERM if rng.random() < 0.15 else signal.SIGKILL
        chosen = rng.choice(sorted(moments))
        if name in FOCUS and rng.random() < 0.7:
            chosen = FOCUS[name]
        at = (chosen, rng.randint(1, max(1, moments[chosen]))) if left else None
        before = len(log.read_text()) if log.exists() else 0
        aside = set_aside(place)
        code, _ = attempt(does, place, at, number)
        said = log.read_text()[before:]
        if at is None or code == 0:
            assert code == 0, f"{name}: ended with {code}"
        # The rest of two processes says that its other one is gone.
        expected = EXITS | ({1, 2} if name.startswith("two") else set())
        assert code in expected, f"{name}: exit code {code}"
        # One that is killed before it says so has set it aside already.
        found += "warning W01" in said or not set_aside(place) <= aside
        if resumed := re.search(r"resuming run at step (\d+)", said):
            lost = max(lost, trial.reached - int(resumed[1]))
        trial.reached = REACHED.value
        if code == 0:
            break
        killed[chosen] += 1
        signals[signal.Signals(number).name] += 1
        # Not twice what nobody has looked at yet.
        if name != "evaluation" and flips == found and rng.random() < 0.3:
            flips += bool(flip(place, rng))
    judge(name, reference, place)
    assert found == flips, f"{name}: {flips} bits flipped, {found} found"
    return {"killed": killed, "signals": signals, "flips": flips, "lost": lost}


trial.reached = 0


def soak(name: str, does: Callable[[], None], work: Path, kills: int, seed: int) -> dict[str, Any]:
    """Trials of one case until it was killed so often."""
    rng, reference = random.Random(f"{seed} {name}"), work / "reference"
    reference.mkdir(parents=True)
    code, moments = attempt(does, reference, None, 0)
    assert code == 0, f"{name}: the undisturbed run ended with {code}"
    if name.startswith("two"):
        # Counted in processes of their own; these are hit whoever comes first.
        moments = Counter({"between steps": 6, "within a step": 8, "checkpoint": 30})
    moments.pop("other", None)
    killed, signals, flips, lost, number = Counter(), Counter(), 0, 0, 0
    while killed.total() < kills:
        done = trial(name, does, reference, work / f"trial{number}", moments, rng)
        killed, signals = killed + done["killed"], signals + done["signals"]
        flips, lost = flips + done["flips"], max(lost, done["lost"])
        shutil.rmtree(work / f"trial{number}")
        number += 1
    return {
        "trials": number, "kills": killed.total(), "at": dict(killed), "signals": dict(signals),
        "flipped_bits": flips, "flipped_bits_found": flips, "steps_lost_at_most": lost,
    }  # fmt: skip


def tiny_teacher(folder: Path) -> Path:
    """The 16 x 16 pipeline of the tests."""
    import conftest

    class Factory:
        @staticmethod
        def mktemp(name: str) -> Path:
            (folder / name).mkdir(parents=True)
            return folder / name

    return conftest.tiny_sd.__wrapped__(Factory)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "soak.json")
    parser.add_argument("--kills", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cheap()
    result = json.loads(given.out.read_text()) if given.out.exists() else {"cases": {}}
    result.setdefault("failed", {})
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        work = Path(folder)
        known = cases(tiny_teacher(work / "pipelines"))
        # A run asks for a collection, which would go through all that was imported, and copy it in each fork.
        gc.collect()
        gc.freeze()
        for name in given.only or known:
            does = known[name]
            if name in result["cases"]:
                continue
            place = work / name.replace(" ", "_").replace(",", "")
            try:
                result["cases"][name] = soak(name, does, place, given.kills, given.seed)
            except AssertionError as error:
                kept = Path(tempfile.mkdtemp(prefix="soak-failed")) / "work"
                shutil.copytree(place, kept)
                print(f"{name}: FAILED {error}; what it left is in {kept}", flush=True)
                result["failed"][name] = str(error)[:200]
                write(given.out, result, given.seed)
                continue
            result["failed"].pop(name, None)
            write(given.out, result, given.seed)
            print(name, result["cases"][name], flush=True)
            shutil.rmtree(place)


def write(out: Path, result: dict[str, Any], seed: int) -> None:
    """With the totals over all cases."""
    found = result["cases"].values()
    at, signals = Counter(), Counter()
    for case in found:
        at.update(case["at"])
        signals.update(case["signals"])
    sums = {
        key: sum(case[key] for case in found)
        for key in ("trials", "kills", "flipped_bits", "flipped_bits_found")
    }
    lost = max((case["steps_lost_at_most"] for case in found), default=0)
    totals = sums | {
        "at": dict(at.most_common()),
        "signals": dict(signals),
        "steps_lost_at_most": lost,
        "save_every": 2,
        "different": len(result["failed"]),
    }
    facts = {
        "command": "make soak",
        "seed": seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "torch": torch.__version__,
    }
    kept = {"totals": totals, "cases": result["cases"], "failed": result["failed"]}
    text = json.dumps(facts | kept, indent=1)
    with contextlib.suppress(FileNotFoundError):
        os.remove(f"{out}.new")
    Path(f"{out}.new").write_text(text + "\n")
    os.replace(f"{out}.new", out)


if __name__ == "__main__":
    main()
