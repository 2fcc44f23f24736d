"""`python -m evaluation run`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from evaluation.commands.common import add_device, at_least_one, names, numbers, print_warnings, progress_bar
from evaluation.settings import Settings
from stepdistill.errors import UserError, quieten_libraries
from stepdistill.registry import add_allow_code

TEXT = "Measure pipeline directories, beside their teacher, and write a report."
EXAMPLES = """\
what it does:
  Draws the protocol's samples with every pipeline, always with the same prompts and noise, and measures them.
  Samples are kept under OUT/samples, so a run that was stopped goes on where it was when the same command is
  given again. With --teacher, the teacher's guidance is swept and its least distance taken ("teacher FD");
  the teacher is also measured at the students' step counts, which is where distillation started. How different
  the seeds of a prompt are (diversity) is measured under the protocol's companion, if it names one: 8 seeds of
  some of its prompts, 2 samples for each 5 of scenes-2k; --metrics without it leaves that out. OUT gets
  results.json (everything), results.md, results.html (tables, plot, samples; one file) and pareto.png.
  Under `accelerate launch` the processes share the work and come to the same numbers, bit for bit.

examples:
  # everything about the embedded student, next to its teacher (long: 50 steps for each of 2,000 prompts)
  python -m evaluation run --pipeline assets/student --teacher assets/teacher --steps 1,2,4 --out runs/eval
  # a quick look: 200 prompts, no teacher. Its numbers are marked scenes-2k[n=200] and compare only with such
  python -m evaluation run --pipeline assets/student --n 200 --out /tmp/quick
  # a class-conditional student against real images (classes are taken in turn)
  python -m evaluation run --pipeline STUDENT --reference train.parquet --extractor FEATURE_NET --n 10000 \\
      --out OUT
  # a student with prompts against your own images, drawn for your own captions
  python -m evaluation run --pipeline STUDENT --reference MY_IMAGES --captions captions.txt --out OUT
  # eight GPUs
  accelerate launch --config_file training/accelerate/8gpu.yaml -m evaluation run --pipeline STUDENT \\
      --protocol coco14-30k --reference val2014 --captions captions.txt --device cuda --out OUT"""

# Of each setting but those of `add_device`: how it is parsed, how its value is shown, what it is.
OPTIONS: dict[str, dict[str, tuple[Callable[[str], Any], str, str]]] = {
    "what is measured": {
        "steps": (numbers(int), "1,2,4", "step counts (default: those it was trained for)"),
        "guidance": (float, "G", "guidance of --pipeline (default: its own; 1 is off)"),
        "teacher": (str, "DIR", "directory of the teacher to compare with. Its guidance is swept and the least distance "
                    "taken; it is also measured at the students' step counts, which distillation starts from"),
        "teacher_steps": (int, "50", "steps of the teacher (default: its own, usually 50)"),
        "teacher_guidance": (numbers(float), "1,1.5,2,3,5", "guidance scales to try; the one with the least distance "
                             "counts (default: 1,1.5,2,3,5). With 4 or more and over 500 samples the choice is made on "
                             "the first 500"),
    },
    "how it is measured": {
        "protocol": (str, "NAME", "see `python -m evaluation protocols` (default: scenes-2k)"),
        "n": (int, "2000", "number of samples (default: the protocol's)"),
        "teacher_n": (int, "N", "number of samples of the teacher (default: --n); a ratio uses what both have"),
        "metrics": (names, "fd,clip,...", "some of the metrics in docs/evaluation.md (default: those the protocol names)"),
        "reference": (str, "PATH", "where the protocol's reference is: a folder, .parquet file or statistics (.npz); or "
                      "real images instead of a protocol (with --captions for pipelines with prompts)"),
        "captions": (str, "FILE", "where the protocol's captions are; or your own, with --reference"),
        "captions_seed": (int, "S", "draw --n of your own captions at random with this seed (default: take them in order)"),
        "seeds": (numbers(int), "0,1,2", "measure the students on several draws of the noise, s with the protocol's seeds "
                  "plus s times its n: mean, spread, and the minimum that EDM reports"),
        "clip": (str, "DIR", "directory of the protocol's CLIP model, if not the embedded one"),
        "extractor": (str, "NAME", "scenes-v1 or the directory of a feature net (default: the protocol's)"),
        "batch": (int, "64", "batch size of the sampled networks (default: 64); compare only samples of one size bit by bit"),
        "io_batch": (int, "N", "samples asked for at a time; changes nothing but memory"),
        "latency_images": (int, "10", "images timed per model (default: 10)"),
        "throughput_batch": (int, "16", "images drawn at a time to time the throughput (default: 16; 0 leaves it out)"),
    },
    "where it goes": {"out": (str, "DIR", "directory of results.json, results.md and samples/")},
}  # fmt: skip


def add(parser: argparse.ArgumentParser) -> None:
    defaults = {setting.name: setting.default for setting in fields(Settings)}
    groups = {title: parser.add_argument_group(title) for title in OPTIONS}
    what, how, where = groups.values()
    what.add_argument(
        "--pipeline", dest="pipelines", nargs="+", required=True, metavar="DIR",
        help="pipeline directories, usually students; or owner/name, if the Hugging Face cache has it",
    )  # fmt: skip
    for title, options in OPTIONS.items():
        for name, (kind, shown, text) in options.items():
            groups[title].add_argument(
                f"--{name.replace('_', '-')}", type=kind, metavar=shown, default=defaults[name], help=text,
                required=name == "out",
            )  # fmt: skip
    add_allow_code(how)
    add_device(how)
    force = "draw samples again instead of using those kept under --out"
    where.add_argument("--force", action="store_true", help=force)


def do(args: argparse.Namespace) -> None:
    from evaluation import report
    from evaluation.processes import Processes
    from evaluation.runs import run

    if args.throughput_batch < 0:
        raise UserError(f"--throughput-batch must be at least 0, got {args.throughput_batch}.")
    at_least_one(args, "batch", "io_batch", "latency_images")
    quieten_libraries()
    settings = Settings(**{setting.name: getattr(args, setting.name) for setting in fields(Settings)})
    results = run(settings, progress_bar())
    if not Processes.join().first:
        return
    print(f"\n{results['protocol']} (hash {results['protocol_hash']}, n = {results['n']})\n")
    print(report.table(results))
    print_warnings(results["warnings"])
    written = [name for name in report.FILES if (Path(args.out) / name).is_file()]
    print(f"\nwritten: {Path(args.out) / written[0]}, {', '.join(written[1:])}")
