"""make fuzz: thousands of changed files through every loader that reads what a user may have downloaded.

Each ends in success or in one `UserError` sentence: no code runs, nothing hangs, memory stays bounded. `python tests/fuzz`
goes on where it stopped, and keeps its result in fuzz.json. A case is its target, its number and the seed.

    python tests/fuzz [--cases 10000] [--only TEXT] [--case NUMBER]      the last runs one case and shows its traceback
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE)]
RESULT = Path(os.environ.get("FUZZ_RESULT", HERE / "fuzz.json"))
SEED = 18
# Seconds of one case; bytes by which it may make its process grow, and which it may ask the system for.
DEADLINE, MEMORY, ADDRESSES = 60, 1 << 30, 6 << 30
# Cases of one child.
BATCH = 40
# Shown of each kind of failure.
SHOWN = 5
# What starts a program, or makes a class out of a pickle.
RUNS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "pickle.find_class",
    "socket.connect",
    "ctypes.dlopen",
)


def changed(target: Any, good: Path, folder: Path, rng: random.Random, trace: Path) -> str:
    """Fills `folder` with the good files, one of them changed, and says which."""
    import harm

    names = sorted({path for pattern in target.files for path in good.rglob(pattern) if path.is_file()})
    chosen = rng.choice(names)
    # Links cost nothing, and what is read is never written.
    shutil.copytree(good, folder, copy_function=os.link, dirs_exist_ok=True)
    place = folder / chosen.relative_to(good)
    place.unlink()
    content = chosen.read_bytes()
    try:
        made = harm.of(chosen.name)(rng, content)
    except (ValueError, RecursionError):
        made = harm.raw(rng, content)
    place.write_bytes(made.replace(b"{trace}", str(trace).encode()))
    return str(chosen.relative_to(good))


def answer(target: Any, folder: Path, ran: list[str], trace: Path) -> tuple[str, str]:
    """("taken" | "refused" | "failed", what it said)."""
    from stepdistill.errors import UserError

    ran.clear()
    try:
        target.read(folder)
        said = "taken", ""
    except UserError as error:
        text = str(error)
        good = text and "\n" not in text and len(text) < 2100
        said = ("refused", "") if good else ("failed", f"no sentence: {text[:200]!r}")
    except BaseException as error:
        ours = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if f"{ROOT}/tests" not in frame.filename
        ]
        near = [
            frame for frame in ours if str(ROOT) in frame.filename and "site-packages" not in frame.filename
        ]
        at = "; ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in (near[-2:] + ours[-1:]))
        said = "failed", f"{type(error).__name__} at {at}: {str(error)[:160]}"
    if ran or trace.exists():
        said = "failed", f"code: {ran or 'the canary'}"
    return said


def cases(name: str, target: Any, good: Path, numbers: list[int], pipe: int, scratch: Path) -> None:
    """In a child: every case, one line of JSON each. Never returns."""
    ran: list[str] = []
    trace = scratch / "trace"
    sys.path.insert(0, str(scratch / "canary"))
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    sys.addaudithook(
        lambda event, arguments: ran.append(f"{event} {arguments!r:.100}") if event in RUNS else None
    )
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in numbers:
        os.write(pipe, f"{number}\n".encode())
        folder = scratch / "case"
        rng = random.Random(f"{SEED}/{name}/{number}")
        which = changed(target, good, folder, rng, trace)
        start = time.monotonic()
        kind, said = answer(target, folder, ran, trace)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun) << 10
        if grown > MEMORY and kind != "failed":
            kind, said = "failed", f"memory: {grown >> 20} MiB"
        row = {
            "case": number,
            "file": which,
            "kind": kind,
            "said": said,
            "seconds": round(time.monotonic() - start, 2),
        }
        os.write(pipe, (json.dumps(row | {"grown": grown >> 20}) + "\n").encode())
        shutil.rmtree(folder, ignore_errors=True)
        if grown > MEMORY:
            # The next case has its own measure.
            break
    os._exit(0)


def lines(pipe: int, deadline: float) -> Iterator[str]:
    """Lines of a child as they come; ends where it ends, or says nothing for so many seconds."""
    rest = b""
    while select.select([pipe], [], [], deadline)[0]:
        part = os.read(pipe, 65_536)
        if not part:
            return
        *whole, rest = (rest + part).split(b"\n")
        yield from (line.decode() for line in whole)
    yield "hangs"


def batch(name: str, target: Any, good: Path, numbers: list[int], scratch: Path) -> list[dict[str, Any]]:
    """Rows of these cases, which a child tries; of one that ends it, too."""
    shutil.rmtree(scratch / "case", ignore_errors=True)
    (scratch / "trace").unlink(missing_ok=True)
    out, into = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setsid()
            os.close(out)
            cases(name, target, good, numbers, into, scratch)
        finally:
            os._exit(1)
    os.close(into)
    rows, open_ = [], None
    for line in lines(out, DEADLINE):
        if line == "hangs":
            break
        if line.isdigit():
            open_ = int(line)
        else:
            rows.append(json.loads(line))
            open_ = None
    else:
        line = "ends its process"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(out)
    if open_ is not None:
        rows.append(
            {
                "case": open_,
                "file": "",
                "kind": "failed",
                "said": f"{line} ({status})",
                "seconds": DEADLINE,
                "grown": 0,
            }
        )
    return rows


def record(kept: dict[str, Any], name: str, rows: list[dict[str, Any]]) -> None:
    at = kept["targets"].setdefault(
        name,
        {"cases": 0, "taken": 0, "refused": 0, "failed": 0, "slowest": 0.0, "most_mib": 0, "failures": {}},
    )
    for row in rows:
        at["cases"] += 1
        at[row["kind"]] += 1
        at["slowest"] = max(at["slowest"], row["seconds"])
        at["most_mib"] = max(at["most_mib"], row["grown"])
        if row["kind"] == "failed":
            how = row["said"].split(": ")[0]
            examples = at["failures"].setdefault(how, [])
            if len(examples) < SHOWN:
                examples.append({key: row[key] for key in ("case", "file", "said")})


def write(kept: dict[str, Any]) -> None:
    targets = kept["targets"].values()
    kept["summary"] = {key: sum(at[key] for at in targets) for key in ("cases", "taken", "refused", "failed")}
    partial = RESULT.with_suffix(".part")
    partial.write_text(json.dumps(kept, indent=1) + "\n")
    partial.replace(RESULT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--only", default="")
    parser.add_argument("--case", type=int)
    parser.add_argument("--fresh", action="store_true", help="forget what was tried before")
    given = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    import torch

    torch.set_num_threads(1)
    from targets import TARGETS

    from stepdistill.errors import quieten_libraries

    quieten_libraries()
    fresh = {"seed": SEED, "summary": {}, "targets": {}}
    kept = json.loads(RESULT.read_text()) if RESULT.exists() and not given.fresh else fresh
    whole = sum(target.share for target in TARGETS.values())
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (scratch / "canary").mkdir()
    (scratch / "canary" / "canary.py").write_text(
        f"from pathlib import Path\nPath({str(scratch / 'trace')!r}).touch()\nclass X:\n    pass\n"
    )
    for name, target in TARGETS.items():
        if given.only not in name:
            continue
        wanted = -(-int(given.cases * target.share) // 1) / whole
        good = scratch / "good" / name.replace(" ", "-")
        good.mkdir(parents=True)
        target.make(good)
        # As they are, they are taken; what is loaded once is loaded before any fork.
        target.read(good)
        if given.case is not None:
            folder = scratch / "case"
            print(
                changed(
                    target, good, folder, random.Random(f"{SEED}/{name}/{given.case}"), scratch / "trace"
                ),
                folder,
            )
            target.read(folder)
            continue
        done = kept["targets"].get(name, {}).get("cases", 0)
        while done < wanted:
            rows = batch(name, target, good, list(range(done, min(done + BATCH, int(wanted) + 1))), scratch)
            record(kept, name, rows)
            write(kept)
            done += len(rows)
        at = kept["targets"].get(name, {})
        print(
            f"{name}: "
            + ", ".join(f"{at.get(key)} {key}" for key in ("cases", "taken", "refused", "failed")),
            flush=True,
        )
    if given.case is None:
        shutil.rmtree(scratch, ignore_errors=True)
        write(kept)
        print(kept["summary"])
        sys.exit(kept["summary"]["failed"] > 0)


if __name__ == "__main__":
    main()
