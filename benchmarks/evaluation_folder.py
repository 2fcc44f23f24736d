"""From a folder of images to a Fréchet distance's statistics: how much of the slower half is lost, and memory.

    OMP_NUM_THREADS=1 python benchmarks/evaluation_folder.py      (two CPU minutes; writes evaluation_folder.json)

Decoding alone, extracting alone (from memory), and end to end as `python -m evaluation stats` does it, on the same
images, slice by slice in turns in one process, so that a busy machine slows them alike. The share is the slower of
the first two over end to end; it needs two cores that are free. CPU time over both parts is what working side by
side costs, on any machine. Peak memory is that of fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import PIL
import torch
from PIL import Image

from evaluation.extractors import Extractor, load_extractor
from evaluation.folders import statistics
from evaluation.images import MemoryImages, open_images
from stepdistill import scenes
from stepdistill.errors import atomic_write

KINDS = {
    "png 64": (64, ".png", 5000, 1000),
    "jpeg 512": (512, ".jpg", 500, 100),
}  # side, suffix, images, slice


def written(folder: Path, side: int, suffix: str, first: int, count: int) -> Path:
    """A folder of rendered scenes."""
    folder.mkdir()
    for index in range(first, first + count):
        image = Image.fromarray(scenes.image_at(index, 3)[1])
        image.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{index:06d}{suffix}")
    return folder


def timed(call: Callable[[], object]) -> dict[str, float]:
    cpu, clock = time.process_time(), time.perf_counter()
    call()
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - clock}


def slices(folders: list[Path], extractor: Extractor) -> dict[str, dict[str, float]]:
    """Seconds of every way over all folders, in turns."""
    total: dict[str, dict[str, float]] = {}
    for turn, folder in enumerate(folders):
        pixels = MemoryImages(open_images(folder))
        ways = {
            "decode alone": lambda folder=folder: [None for _ in open_images(folder)],
            "extract alone": lambda pixels=pixels: statistics(pixels, extractor),
            "end to end": lambda folder=folder: statistics(open_images(folder), extractor),
        }
        names = list(ways)
        for name in names[turn % 3 :] + names[: turn % 3]:
            for clock, seconds in timed(ways[name]).items():
                own = total.setdefault(name, {})
                own[clock] = own.get(clock, 0.0) + seconds
    return total


_STATS = """
import sys
from evaluation.__main__ import main
main(["stats", sys.argv[1], "-o", sys.argv[2]])
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def peak_megabytes(folder: Path, out: Path) -> float:
    """Peak resident memory of `python -m evaluation stats` on a folder, in a process of its own (Linux)."""
    command = [sys.executable, "-c", _STATS, str(folder), str(out)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(found.stdout.split()[-1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=Path(__file__).with_suffix(".json"), type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    extractor = load_extractor("scenes-v1")
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as place:
        for kind, (side, suffix, count, size) in KINDS.items():
            folders = [
                written(Path(place) / f"{kind}-{start}", side, suffix, start, size)
                for start in range(0, count, size)
            ]
            extractor(next(iter(open_images(folders[0]))))  # the first call sets the networks up
            seconds = slices(folders, extractor)
            parts = [seconds[name] for name in ("decode alone", "extract alone")]
            slower = max(part["wall_s"] for part in parts)
            whole = seconds["end to end"]["wall_s"]
            found[kind] = {
                "images": count,
                "seconds": seconds,
                "images_per_second": count / whole,
                "share_of_the_slower": slower / whole,
                "cpu_over_both_parts": seconds["end to end"]["cpu_s"] / sum(part["cpu_s"] for part in parts),
            }
            print(kind, json.dumps(found[kind], indent=2))
        everything = Path(place) / "all"
        everything.mkdir()
        files = [file for folder in Path(place).glob("png 64-*") for file in folder.iterdir()]
        peaks = {}
        for count in (500, len(files)):
            for file in files[len(list(everything.iterdir())) : count]:
                file.rename(everything / file.name)
            peaks[str(count)] = peak_megabytes(everything, Path(place) / "stats.npz")
        found["peak_megabytes"] = peaks
    found |= {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            "pillow": PIL.__version__,
            "torch": torch.__version__,
        },
    }
    with atomic_write(args.out) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n")
    print("peak memory in MB:", found["peak_megabytes"])


if __name__ == "__main__":
    main()
