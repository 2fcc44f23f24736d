"""From a folder of images to a Fréchet distance's statistics: how much of the slower half is lost, and memory.

    OMP_NUM_THREADS=1 python benchmarks/evaluation_folder.py      (three CPU minutes; writes evaluation_folder.json)

Decoding alone, extracting alone (from memory), and end to end as `python -m evaluation stats` does it, on the same
images, slice by slice in turns in one process, so that a busy machine slows them alike. The share is the slower of
the first two over end to end; on one core, where nothing can be done side by side, it is a lower bound. CPU time
over both parts is what working side by side costs, on any machine. Peak memory is that of fresh processes.

Where torch-fidelity is installed (`pip install --no-deps torch-fidelity`), its own way from a folder to the same
statistics takes its turns too, at its defaults, with the same feature network plugged in by its interface: once the
network as it is, which is what a user would plug in, and once the copy of it that we run ("prepared"), which leaves
only what is around the network. Its CPU seconds include those of its loader's processes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import PIL
import torch
from PIL import Image

from evaluation.extractors import Extractor, load_extractor
from evaluation.feature_net import FeatureNet
from evaluation.files import open_images
from evaluation.images import MemoryImages
from evaluation.results import machine
from stepdistill import assets, scenes
from stepdistill.errors import atomic_write

# side, suffix, images, slice.
KINDS = {
    "png 64": (64, ".png", 5000, 1000),
    "jpeg 512": (512, ".jpg", 500, 100),
}


def installed(*names: str) -> dict[str, str]:
    """Versions of those packages that are here."""
    return {name: version(name) for name in names if importlib.util.find_spec(name.replace("-", "_"))}


def written(folder: Path, side: int, suffix: str, first: int, count: int) -> Path:
    """A folder of rendered scenes."""
    folder.mkdir()
    for index in range(first, first + count):
        image = Image.fromarray(scenes.image_at(index, 3)[1])
        image.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{index:06d}{suffix}")
    return folder


def cpu_seconds() -> float:
    """Of this process and of children that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def timed(call: Callable[[], object]) -> dict[str, float]:
    cpu, clock = cpu_seconds(), time.perf_counter()
    call()
    return {"cpu_s": cpu_seconds() - cpu, "wall_s": time.perf_counter() - clock}


def torch_fidelity(network: torch.nn.Module, name: str, dim: int) -> Callable[[Path], dict]:
    """torch-fidelity's way from a folder to mean and covariance with `network`. Raises ImportError without it."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.metric_fid import fid_input_id_to_statistics
    from torch_fidelity.registry import register_feature_extractor
    from torch_fidelity.utils import create_feature_extractor

    layer = str(dim)

    class Plugged(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **options: object) -> None:
            super().__init__(name, features_list)
            self.network = network

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return (layer,)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return layer

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.network(images),)

    register_feature_extractor(name, Plugged)
    options = {"cuda": False, "verbose": False, "cache": False}
    plugged = create_feature_extractor(name, [layer], **options)
    return lambda folder: fid_input_id_to_statistics(1, plugged, layer, input1=str(folder), **options)


def peers() -> dict[str, Callable[[Path], dict]]:
    """torch-fidelity with the network as it is and as we run it; nothing where it is not installed."""
    network = FeatureNet.load(assets.path("scenes-v1"))
    try:
        return {
            "torch-fidelity": torch_fidelity(network, "scenes-v1", network.dim),
            "torch-fidelity, prepared": torch_fidelity(network.for_inference(), "prepared", network.dim),
        }
    except ImportError:
        return {}


def disagreement(folder: Path, extractor: Extractor, peer: Callable[[Path], dict]) -> float:
    """Largest difference of the two covariances, relative to the largest entry."""
    own, theirs = extractor.statistics(open_images(folder)).cov, peer(folder)["sigma"]
    return float(abs(own - theirs).max() / abs(own).max())


def slices(
    folders: list[Path], extractor: Extractor, others: dict[str, Callable[[Path], dict]]
) -> dict[str, dict[str, float]]:
    """Seconds of every way over all folders, in turns."""
    total: dict[str, dict[str, float]] = {}
    for turn, folder in enumerate(folders):
        pixels = MemoryImages(open_images(folder))
        ways = {
            "decode alone": lambda folder=folder: [None for _ in open_images(folder)],
            "extract alone": lambda pixels=pixels: extractor.statistics(pixels),
            "end to end": lambda folder=folder: extractor.statistics(open_images(folder)),
        }
        ways |= {name: lambda folder=folder, peer=peer: peer(folder) for name, peer in others.items()}
        names = list(ways)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
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
    others = peers()
    with tempfile.TemporaryDirectory() as place:
        for kind, (side, suffix, count, size) in KINDS.items():
            folders = [
                written(Path(place) / f"{kind}-{start}", side, suffix, start, size)
                for start in range(0, count, size)
            ]
            # The first call sets the networks up.
            extractor(next(iter(open_images(folders[0]))))
            seconds = slices(folders, extractor, others)
            parts = [seconds[name] for name in ("decode alone", "extract alone")]
            slower = max(part["wall_s"] for part in parts)
            whole = seconds["end to end"]["wall_s"]
            found[kind] = {
                "images": count,
                "seconds": seconds,
                "images_per_second": count / whole,
                "share_of_the_slower": slower / whole,
                "cpu_over_both_parts": seconds["end to end"]["cpu_s"] / sum(part["cpu_s"] for part in parts),
            } | {
                f"times_faster_than_{name}": {
                    clock: taken / seconds["end to end"][clock] for clock, taken in seconds[name].items()
                }
                for name in others
            }
            if others:
                found[kind]["covariance_differs_by"] = disagreement(
                    folders[0], extractor, others["torch-fidelity"]
                )
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
        "cores_used": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": machine("cpu")["cpu"],
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            "pillow": PIL.__version__,
            "torch": torch.__version__,
            **installed("torch-fidelity"),
        },
    }
    with atomic_write(args.out) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n")
    print("peak memory in MB:", found["peak_megabytes"])


if __name__ == "__main__":
    main()
