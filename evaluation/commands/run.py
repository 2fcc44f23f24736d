"""`python -m evaluation run`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from evaluation.commands.common import at_least_one, names, numbers, progress_bar
from stepdistill.errors import UserError, quieten_libraries
from stepdistill.registry import add_allow_code

TEXT = "Measure pipeline directories, beside their teacher, and write a report."
EXAMPLES = """\
what it does:
  Draws the protocol's samples with every pipeline, always with the same prompts and noise, and measures them.
  Samples are kept under OUT/samples, so a run that was stopped goes on where it was when the same command is
  given again. With --teacher, the teacher's guidance is swept and its least distance taken ("teacher FD");
  the teacher is also measured at the students' step counts, which is where distillation started. OUT gets
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


def add(parser: argparse.ArgumentParser) -> None:
    _add_what(parser.add_argument_group("what is measured"))
    _add_how(parser.add_argument_group("how it is measured"))
    where = parser.add_argument_group("where it goes")
    where.add_argument(
        "--out", required=True, metavar="DIR", help="directory of results.json, results.md and samples/"
    )
    where.add_argument(
        "--force", action="store_true", help="draw samples again instead of using those kept under --out"
    )


def _add_what(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pipeline", dest="pipelines", nargs="+", required=True, metavar="DIR",
        help="pipeline directories, usually students; or owner/name, if the Hugging Face cache has it",
    )  # fmt: skip
    group.add_argument(
        "--steps", type=numbers(int), metavar="1,2,4", help="step counts (default: those it was trained for)"
    )
    group.add_argument(
        "--guidance", type=float, metavar="G", help="guidance of --pipeline (default: its own; 1 is off)"
    )
    group.add_argument("--teacher", metavar="DIR", help="pipeline directory of the teacher to compare with")
    group.add_argument(
        "--teacher-steps", type=int, metavar="50", help="steps of the teacher (default: its own, usually 50)"
    )
    group.add_argument(
        "--teacher-guidance", type=numbers(float), default=[1.0, 1.5, 2.0, 3.0, 5.0], metavar="1,1.5,2,3,5",
        help="guidance scales to try; the one with the least distance counts (default: 1,1.5,2,3,5). With 4 "
        "or more and over 500 samples the choice is made on the first 500",
    )  # fmt: skip


def _add_how(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--protocol", default="scenes-2k", help="see `python -m evaluation protocols` (default: scenes-2k)"
    )
    group.add_argument("--n", type=int, metavar="2000", help="number of samples (default: the protocol's)")
    group.add_argument(
        "--teacher-n", type=int, metavar="N", help="number of samples of the teacher (default: --n)"
    )
    group.add_argument(
        "--metrics", type=names, metavar="fd,clip,...",
        help="some of the metrics in docs/evaluation.md (default: those the protocol names)",
    )  # fmt: skip
    group.add_argument(
        "--reference", metavar="PATH",
        help="where the protocol's reference is: a folder, .parquet file or statistics (.npz); or real images "
        "instead of a protocol (with --captions for pipelines with prompts)",
    )  # fmt: skip
    add_allow_code(group)
    group.add_argument(
        "--captions", metavar="FILE", help="where the protocol's captions are; or your own, with --reference"
    )
    group.add_argument(
        "--captions-seed", type=int, default=-1, metavar="S",
        help="draw --n of your own captions at random with this seed (default: take them in order)",
    )  # fmt: skip
    group.add_argument(
        "--seeds", type=numbers(int), default=[0], metavar="0,1,2",
        help="measure the students on several draws of the noise: mean, spread, and the minimum that EDM reports",
    )  # fmt: skip
    group.add_argument(
        "--clip", metavar="DIR", help="directory of the protocol's CLIP model, if not the embedded one"
    )
    group.add_argument(
        "--extractor", help="scenes-v1 or the directory of a feature net (default: the protocol's)"
    )
    group.add_argument(
        "--batch", type=int, default=64, metavar="64",
        help="batch size of the sampled networks (default: 64); compare only samples of one size bit by bit",
    )  # fmt: skip
    group.add_argument(
        "--io-batch", type=int, metavar="N", help="samples asked for at a time; changes nothing but memory"
    )
    group.add_argument(
        "--latency-images", type=int, default=10, metavar="10", help="images timed per model (default: 10)"
    )
    group.add_argument(
        "--throughput-batch", type=int, default=16, metavar="16",
        help="images drawn at a time to time the throughput (default: 16; 0 leaves it out)",
    )  # fmt: skip
    group.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")


def do(args: argparse.Namespace) -> None:
    from evaluation import report
    from evaluation.plan import Settings
    from evaluation.processes import Processes
    from evaluation.runs import run

    if args.throughput_batch < 0:
        raise UserError(f"--throughput-batch must be at least 0, got {args.throughput_batch}.")
    at_least_one(args, "batch", "io_batch", "latency_images")
    quieten_libraries()
    # Every option of a run is called as its setting is.
    settings = {field.name: getattr(args, field.name) for field in fields(Settings)}
    results = run(Settings(**settings), progress_bar())
    if not Processes.join().first:
        return
    print(f"\n{results['protocol']} (hash {results['protocol_hash']}, n = {results['n']})\n")
    print(report.table(results))
    for warning in results["warnings"]:
        print(f"warning: {warning}")
    written = [name for name in report.FILES if (Path(args.out) / name).is_file()]
    print(f"\nwritten: {Path(args.out) / written[0]}, {', '.join(written[1:])}")
