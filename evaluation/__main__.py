"""The command line: `python -m evaluation run | picture | images | stats | protocols`."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError, atomic_write, cli_errors

_EXAMPLES = {
    "": """\
examples:
  python -m evaluation run --pipeline assets/student --teacher assets/teacher --steps 1,2,4 --out runs/eval
  python -m evaluation run --pipeline assets/student --n 200 --out /tmp/quick
  python -m evaluation picture --teacher assets/teacher --student assets/student --out picture.png
  python -m evaluation images MY_SAMPLES --ref MY_DATASET

`python -m evaluation COMMAND --help` explains each. The package also has a Python interface:
evaluation.evaluate(...).""",
    "run": """\
what it does:
  Draws the protocol's samples with every pipeline, always with the same prompts and noise, and measures them.
  Samples are kept under OUT/samples, so a run that was stopped goes on where it was when the same command is
  given again. With --teacher, the teacher's guidance is swept and its least distance taken ("teacher FD");
  the teacher is also measured at the students' step counts, which is where distillation started. OUT gets
  results.json (everything) and results.md.

examples:
  # everything about the embedded student, next to its teacher (long: 50 steps for each of 2,000 prompts)
  python -m evaluation run --pipeline assets/student --teacher assets/teacher --steps 1,2,4 --out runs/eval
  # a quick look: 200 prompts, no teacher. Its numbers are marked scenes-2k[n=200] and compare only with such
  python -m evaluation run --pipeline assets/student --n 200 --out /tmp/quick
  # a class-conditional student against real images (classes are taken in turn)
  python -m evaluation run --pipeline STUDENT --reference train.parquet --extractor FEATURE_NET --n 10000 \\
      --out OUT""",
    "picture": """\
example:
  python -m evaluation picture --teacher assets/teacher --student assets/student --out picture.png --before \\
      --prompt "a small red circle above a large blue square on a yellow background" \\
      --prompt "a large green star on a black background" """,
    "images": """\
examples:
  python -m evaluation images MY_SAMPLES --ref MY_DATASET
  python -m evaluation stats MY_DATASET -o ref.npz && python -m evaluation images MY_SAMPLES --ref ref.npz

A set of images is a folder with PNG, JPEG, WebP or BMP files, or a Parquet file with a column `image`.
All images of a set must have one size. The distance is named after its feature net; it is not FID.""",
    "stats": """\
example:
  python -m evaluation stats MY_DATASET -o ref.npz""",
    "protocols": """\
examples:
  python -m evaluation protocols
  python -m evaluation protocols show scenes-2k""",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and do. Wrong input ends with one sentence and exit code 2."""
    args = _parser().parse_args(argv)
    with cli_errors():
        args.do(args)


def _quieten() -> None:
    """Keep the loading bars and deprecation notes of the libraries below out of the report."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore", FutureWarning)
    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation",
        description="How good and how fast a few-step student is, next to its teacher.",
        epilog=_EXAMPLES[""],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, do: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=_EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(do=do)
        return added

    _add_run(command("run", _run, "Measure pipeline directories, beside their teacher, and write a report."))
    _add_picture(
        command("picture", _picture, "Draw teacher and student side by side on the same prompts and noise.")
    )
    images = command("images", _images, "Fréchet distance of one set of images to another.")
    images.add_argument("images", metavar="IMAGES", help="folder of images or .parquet file to measure")
    images.add_argument(
        "--ref", required=True, help="folder, .parquet file, or statistics (.npz) to compare with"
    )
    images.add_argument(
        "--extractor", default="scenes-v1", help="scenes-v1 (default) or the directory of a feature net"
    )
    images.add_argument("-o", "--out", help="also write the result to this JSON file")
    stats = command(
        "stats", _stats, "Compute the feature statistics of a set of images once, for later comparisons."
    )
    stats.add_argument("images", metavar="IMAGES", help="folder of images or .parquet file")
    stats.add_argument("-o", "--out", required=True, help="the .npz file to write")
    stats.add_argument(
        "--extractor", default="scenes-v1", help="scenes-v1 (default) or the directory of a feature net"
    )
    protocols = command("protocols", _protocols, "List the protocols, or show everything one fixes.")
    protocols.add_argument("action", nargs="?", choices=["show"], help="show one protocol in full, as JSON")
    protocols.add_argument("name", nargs="?", help="the protocol to show")
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--pipeline", nargs="+", required=True, metavar="DIR", help="pipeline directories, usually students"
    )
    what.add_argument(
        "--steps", type=_numbers(int), metavar="1,2,4", help="step counts (default: those it was trained for)"
    )
    what.add_argument(
        "--guidance", type=float, metavar="G", help="guidance of --pipeline (default: its own; 1 is off)"
    )
    what.add_argument("--teacher", metavar="DIR", help="pipeline directory of the teacher to compare with")
    what.add_argument(
        "--teacher-steps", type=int, metavar="50", help="steps of the teacher (default: its own, usually 50)"
    )
    what.add_argument(
        "--teacher-guidance", type=_numbers(float), default=[1.0, 1.5, 2.0, 3.0, 5.0], metavar="1,1.5,2,3,5",
        help="guidance scales to try; the one with the least distance counts (default: 1,1.5,2,3,5). With 4 "
        "or more and over 500 samples the choice is made on the first 500",
    )  # fmt: skip
    how = parser.add_argument_group("how it is measured")
    how.add_argument(
        "--protocol", default="scenes-2k", help="see `python -m evaluation protocols` (default: scenes-2k)"
    )
    how.add_argument("--n", type=int, metavar="2000", help="number of samples (default: the protocol's)")
    how.add_argument(
        "--teacher-n", type=int, metavar="N", help="number of samples of the teacher (default: --n)"
    )
    how.add_argument(
        "--metrics", type=_names, metavar="fd,clip,...",
        help="some of fd, clip, attributes, latency (default: all the protocol has)",
    )  # fmt: skip
    how.add_argument(
        "--reference",
        metavar="PATH",
        help="where the protocol's reference is: a folder, .parquet file or statistics (.npz); or real images "
        "instead of a protocol (pipelines without prompts)",
    )
    how.add_argument("--captions", metavar="FILE", help="where the protocol's captions are, if it has a file")
    how.add_argument(
        "--extractor", help="scenes-v1 or the directory of a feature net (default: the protocol's)"
    )
    how.add_argument(
        "--batch", type=int, default=64, metavar="64",
        help="batch size of the sampled networks (default: 64); compare only samples of one size bit by bit",
    )  # fmt: skip
    how.add_argument(
        "--io-batch", type=int, metavar="N", help="samples asked for at a time; changes nothing but memory"
    )
    how.add_argument(
        "--latency-images", type=int, default=10, metavar="10", help="images timed per model (default: 10)"
    )
    how.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    where = parser.add_argument_group("where it goes")
    where.add_argument(
        "--out", required=True, metavar="DIR", help="directory of results.json, results.md and samples/"
    )
    where.add_argument(
        "--force", action="store_true", help="draw samples again instead of using those kept under --out"
    )


def _add_picture(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, metavar="DIR", help="pipeline directory of the teacher")
    parser.add_argument("--student", required=True, metavar="DIR", help="pipeline directory of the student")
    parser.add_argument("--out", required=True, metavar="PNG", help="the picture to write")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a prompt (or class number); may be repeated"
    )
    parser.add_argument(
        "--rows", type=int, default=6, help="number of the protocol's prompts when no --prompt is given (6)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="noise seed of the first row, counting up (default: 0)"
    )
    parser.add_argument(
        "--teacher-steps", type=int, metavar="50", help="steps of the teacher (default: its own)"
    )
    parser.add_argument(
        "--teacher-guidance", type=float, metavar="G", help="guidance of the teacher (default: its own)"
    )
    parser.add_argument(
        "--student-steps", type=_numbers(int), metavar="4,1", help="columns of the student (default: 4,1)"
    )
    parser.add_argument(
        "--before", action="store_true", help="add the teacher at the student's least steps as a last column"
    )
    parser.add_argument(
        "--smooth", action="store_true", help="enlarge bicubically instead of showing the pixels"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")


def _run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from evaluation import report, run
    from evaluation.processes import Processes

    for name in ("batch", "io_batch", "latency_images"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
    _quieten()
    # Into a log file a line every half minute is enough; a terminal wants it to move.
    interval = 0.5 if sys.stderr.isatty() else 30

    def bar(total: int, desc: str) -> Any:
        return tqdm(total=total, desc=desc, unit="image", mininterval=interval, dynamic_ncols=True)

    results = run(
        args.pipeline, args.out,
        teacher=args.teacher, steps=args.steps, guidance=args.guidance, teacher_steps=args.teacher_steps,
        teacher_guidance=args.teacher_guidance, n=args.n, teacher_n=args.teacher_n, metrics=args.metrics,
        protocol=args.protocol, reference=args.reference, captions=args.captions, extractor=args.extractor,
        batch=args.batch, io_batch=args.io_batch, device=args.device, latency_images=args.latency_images, force=args.force, bar=bar,
    )  # fmt: skip
    if not Processes.join().first:
        return
    print(f"\n{results['protocol']} (hash {results['protocol_hash']}, n = {results['n']})\n")
    print(report.table(results))
    for warning in results["warnings"]:
        print(f"warning: {warning}")
    print(f"\nwritten: {Path(args.out) / 'results.json'} and results.md")


def _picture(args: argparse.Namespace) -> None:
    from evaluation import picture
    from evaluation.protocols import get_protocol
    from stepdistill import load

    target = _target(args.out)
    _quieten()
    if args.rows < 1:
        raise UserError(f"--rows must be at least 1, got {args.rows}.")
    teacher, student = load(args.teacher, device=args.device), load(args.student, device=args.device)
    if teacher.conditions != student.conditions:
        raise UserError(
            f"the teacher takes a {teacher.conditions}, the student a {student.conditions}; compare others."
        )
    if teacher.conditions == "prompt":
        prompts: list[Any] = args.prompt or get_protocol("scenes-2k").prompts(args.rows)
        captions = prompts
    else:
        names = teacher.class_names or ("",)
        prompts = [
            _class_number(text, len(names))
            for text in args.prompt or map(str, range(min(args.rows, len(names))))
        ]
        captions = [names[number] for number in prompts]
    columns = picture.columns_of(
        teacher, student, teacher_steps=args.teacher_steps, teacher_guidance=args.teacher_guidance,
        student_steps=args.student_steps, before=args.before,
    )  # fmt: skip
    images, seconds = picture.draw(columns, prompts, range(args.seed, args.seed + len(prompts)))
    headings = [column.heading for column in columns]
    picture.save(picture.compose(images, seconds, captions, headings, smooth=args.smooth), target)
    print(f"written: {target}")


def _images(args: argparse.Namespace) -> None:
    from evaluation.extractors import load_extractor
    from evaluation.images import open_images
    from evaluation.metrics.base import Inputs
    from evaluation.metrics.fd import FrechetDistance
    from evaluation.stats import FeatureStats

    target = _target(args.out) if args.out else None
    images = open_images(args.images)
    reference = Path(args.ref)
    against = None if reference.suffix == ".npz" else open_images(reference)
    extractor = load_extractor(args.extractor)
    if against is None:
        stats = FeatureStats.load(reference, expect=extractor.source)
    else:
        stats = _statistics(against, extractor)
    inputs = Inputs(images=images, extractor=extractor, reference=stats)
    found = FrechetDistance().compute(inputs)
    name = f"fd:{extractor.name}"
    counts = f"n = {inputs.folds.n}, reference n = {stats.n}"
    print(f"{name} {found[name]:.6g} ± {found[name + '/se']:.2g}  ({counts})")
    if Path(args.images).resolve() == reference.resolve():
        print("warning: the images were compared with themselves.")
    if min(inputs.folds.n, stats.n) <= extractor.dim:
        print(
            f"warning: no more images than the {extractor.dim} features; the distance is biased far upwards."
        )
    if target:
        content = found | {
            "n": inputs.folds.n,
            "reference_n": stats.n,
            "extractor": extractor.name,
            "sha256": extractor.sha256,
        }
        with atomic_write(target) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")


def _stats(args: argparse.Namespace) -> None:
    from evaluation.extractors import load_extractor
    from evaluation.images import open_images

    target = _target(args.out)
    stats = _statistics(open_images(args.images), load_extractor(args.extractor))
    stats.save(target)
    print(f"written: {target} (n = {stats.n}, {stats.dim} features of {stats.source.extractor})")


def _statistics(images: Any, extractor: Any) -> Any:
    from evaluation.stats import FeatureStats

    stats = FeatureStats(extractor.dim, extractor.source)
    for features in extractor.stream(images):
        stats.add(features)
    return stats


def _protocols(args: argparse.Namespace) -> None:
    from evaluation.protocols import PROTOCOLS, get_protocol

    if args.action is None:
        for protocol in PROTOCOLS.values():
            print(f"{protocol.name}  version {protocol.version}, hash {protocol.hash}: {protocol.about}")
        return
    if args.name is None:
        raise UserError(f"say which protocol to show: {', '.join(PROTOCOLS)}.")
    protocol = get_protocol(args.name)
    print(json.dumps(protocol.describe() | {"hash": protocol.hash, "about": protocol.about}, indent=2))


def _target(path: str) -> Path:
    """A file that can be written. Raises UserError otherwise."""
    from evaluation.report import check_writable

    if Path(path).is_dir():
        raise UserError(f"--out {path} is a directory; give the path of the file to write.")
    check_writable(Path(path).parent)
    return Path(path)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(kind: type) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        try:
            found = [kind(part) for part in text.split(",") if part.strip()]
        except ValueError:
            found = []
        if not found:
            example = "1,2,4" if kind is int else "1,1.5,2"
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like {example}")
        return found

    return parse


def _class_number(text: str, classes: int) -> int:
    if not text.isdigit() or int(text) >= max(classes, 1):
        raise UserError(
            f"--prompt {text!r} is no class of this model; give a number from 0 to {max(classes, 1) - 1}."
        )
    return int(text)


if __name__ == "__main__":
    main()
