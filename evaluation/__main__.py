"""The command line: `python -m evaluation run | images | stats | compare | doctor | protocols | picture | geneval`."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError, atomic_write, cli_errors
from stepdistill.registry import add_allow_code, allowing_code

_EXAMPLES = {
    "": """\
examples:
  python -m evaluation run --pipeline assets/student --teacher assets/teacher --steps 1,2,4 --out runs/eval
  python -m evaluation run --pipeline assets/student --n 200 --out /tmp/quick
  python -m evaluation picture --teacher assets/teacher --student assets/student --out picture.png
  python -m evaluation images MY_SAMPLES --ref MY_DATASET
  python -m evaluation doctor --protocol coco14-30k
  python -m evaluation compare runs/eval runs/other

`python -m evaluation COMMAND --help` explains each. The package also has a Python interface:
evaluation.evaluate(...).""",
    "run": """\
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
  # eight GPUs
  accelerate launch --config_file training/accelerate/8gpu.yaml -m evaluation run --pipeline STUDENT \\
      --protocol coco14-30k --reference val2014 --captions captions.txt --device cuda --out OUT""",
    "picture": """\
example:
  python -m evaluation picture --teacher assets/teacher --student assets/student --out picture.png --before \\
      --prompt "a small red circle above a large blue square on a yellow background" \\
      --prompt "a large green star on a black background" """,
    "images": """\
examples:
  python -m evaluation images MY_SAMPLES --ref MY_DATASET
  python -m evaluation images MY_SAMPLES --ref MY_DATASET --metrics fid,kid,prdc
  python -m evaluation stats MY_DATASET -o ref.npz && python -m evaluation images MY_SAMPLES --ref ref.npz

  python -m evaluation images MY_SAMPLES --ref val2014 --protocol coco14-30k --metrics fd,clip --captions FILE

A set of images is a folder with PNG, JPEG, WebP or BMP files, or a Parquet file with a column `image`.
All images of a set must have one size, unless a protocol brings them to one. The distance is named after its
feature net; only that of the Inception weights is FID.""",
    "stats": """\
example:
  python -m evaluation stats MY_DATASET -o ref.npz
  python -m evaluation stats val2014 -o coco14-val.npz --protocol coco14-30k""",
    "compare": """\
examples:
  python -m evaluation compare runs/a runs/b      # tables, and what really differs, with its standard error
  python -m evaluation compare runs/a --published # beside published numbers, if the protocol is theirs

Runs are put into one table only if protocol, number of samples, extractor and reference agree.""",
    "doctor": """\
examples:
  python -m evaluation doctor
  python -m evaluation doctor --protocol coco14-30k --reference val2014 --captions FILE --out runs/eval

With --protocol, the exit code is 2 if that protocol cannot be measured here.""",
    "geneval": """\
examples:
  python -m evaluation geneval export --pipeline STUDENT --captions evaluation_metadata.jsonl --out OUT
  # in GenEval's own environment: python evaluation/evaluate_images.py OUT/images --outfile results.jsonl ...
  python -m evaluation geneval summarise results.jsonl""",
    "protocols": """\
examples:
  python -m evaluation protocols
  python -m evaluation protocols show scenes-2k""",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and do. Wrong input ends with one sentence and exit code 2."""
    args = _parser().parse_args(argv)
    with cli_errors(), allowing_code(getattr(args, "allow_code", False)):
        args.do(args)


def _quieten() -> None:
    """Keep the loading bars and deprecation notes of the libraries below out of the report."""
    from diffusers.utils import logging as diffusers_logging
    from PIL import Image
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such an image is refused by name
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
    images = command("images", _images, "Measure one set of images against another.")
    images.add_argument("images", metavar="IMAGES", help="folder of images or .parquet file to measure")
    images.add_argument(
        "--ref", required=True, help="folder, .parquet file, or statistics (.npz) to compare with"
    )
    images.add_argument(
        "--metrics", type=_names, default=["fd"], metavar="fd,clip,...", help="what to measure (default: fd)"
    )
    add_allow_code(images)
    images.add_argument(
        "--captions", metavar="FILE", help="a caption for every image, by order of the files' names"
    )
    images.add_argument("--clip", metavar="DIR", help="directory of the CLIP model, if not the embedded one")
    images.add_argument("-o", "--out", help="also write the result to this JSON file")
    stats = command(
        "stats", _stats, "Compute the feature statistics of a set of images once, for later comparisons."
    )
    stats.add_argument("images", metavar="IMAGES", help="folder of images or .parquet file")
    stats.add_argument("-o", "--out", required=True, help="the .npz file to write")
    for added in (images, stats):
        added.add_argument(
            "--extractor",
            help="name or directory of a feature net (default: the protocol's; else inception-2015 for fid, "
            "scenes-v1 for all others)",
        )
        added.add_argument(
            "--protocol", help="crop, resize and extract as this protocol does (default: as they are)"
        )
        added.add_argument(
            "--io-batch",
            type=int,
            default=16,
            metavar="16",
            help="images decoded at a time; changes no number",
        )
        added.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    compare = command(
        "compare", _compare, "Tables of several runs, their paired differences, published numbers."
    )
    compare.add_argument(
        "runs", nargs="+", metavar="RUN", help="--out directories of runs, or results.json files"
    )
    compare.add_argument(
        "--published",
        action="store_true",
        help="also print published numbers; refused under another protocol",
    )
    _add_doctor(
        command("doctor", _doctor, "Find out whether a measurement can be made here, before it is begun.")
    )
    _add_geneval(
        command("geneval", _geneval, "Write images for GenEval's detector, and summarise its results.")
    )
    protocols = command("protocols", _protocols, "List the protocols, or show everything one fixes.")
    protocols.add_argument("action", nargs="?", choices=["show"], help="show one protocol in full, as JSON")
    protocols.add_argument("name", nargs="?", help="the protocol to show")
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--pipeline", nargs="+", required=True, metavar="DIR",
        help="pipeline directories, usually students; or owner/name, if the Hugging Face cache has it",
    )  # fmt: skip
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
    add_allow_code(how)
    how.add_argument("--captions", metavar="FILE", help="where the protocol's captions are, if it has a file")
    how.add_argument(
        "--clip", metavar="DIR", help="directory of the protocol's CLIP model, if not the embedded one"
    )
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
    how.add_argument(
        "--throughput-batch", type=int, default=16, metavar="16",
        help="images drawn at a time to time the throughput (default: 16; 0 leaves it out)",
    )  # fmt: skip
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


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--protocol", help="only this one (default: all)")
    parser.add_argument("--reference", metavar="PATH", help="where its reference is")
    parser.add_argument("--captions", metavar="FILE", help="where its captions are")
    parser.add_argument("--extractor", help="another extractor than the protocol's")
    parser.add_argument(
        "--out", default=".", metavar="DIR", help="where samples would be kept (default: here)"
    )
    parser.add_argument(
        "--settings",
        type=int,
        default=1,
        metavar="1",
        help="models times step counts to be measured (default: 1)",
    )


def _add_geneval(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="export | summarise", required=True, dest="action")
    export = actions.add_parser("export", help="draw four images of each prompt into GenEval's folder layout")
    export.add_argument("--pipeline", required=True, metavar="DIR", help="pipeline directory")
    export.add_argument("--captions", metavar="FILE", help="GenEval's evaluation_metadata.jsonl")
    export.add_argument("--out", required=True, metavar="DIR", help="gets images/ and samples/")
    export.add_argument("--steps", type=int, help="sampling steps (default: the pipeline's)")
    export.add_argument("--guidance", type=float, metavar="G", help="guidance (default: the pipeline's)")
    export.add_argument("--batch", type=int, default=16, metavar="16", help="batch size of the networks")
    export.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    summarise = actions.add_parser("summarise", help="scores by task from the detector's results.jsonl")
    summarise.add_argument("results", metavar="RESULTS", help="results.jsonl")
    summarise.add_argument("-o", "--out", help="also write the scores to this JSON file")


def _run(args: argparse.Namespace) -> None:
    from evaluation import report, run
    from evaluation.processes import Processes

    if args.throughput_batch < 0:
        raise UserError(f"--throughput-batch must be at least 0, got {args.throughput_batch}.")
    _at_least_one(args, "batch", "io_batch", "latency_images")
    _quieten()
    results = run(
        args.pipeline, args.out,
        teacher=args.teacher, steps=args.steps, guidance=args.guidance, teacher_steps=args.teacher_steps,
        teacher_guidance=args.teacher_guidance, n=args.n, teacher_n=args.teacher_n, metrics=args.metrics,
        protocol=args.protocol, reference=args.reference, captions=args.captions, extractor=args.extractor,
        clip=args.clip, batch=args.batch, io_batch=args.io_batch, device=args.device,
        latency_images=args.latency_images, throughput_batch=args.throughput_batch, force=args.force, bar=_bar(),
    )  # fmt: skip
    if not Processes.join().first:
        return
    print(f"\n{results['protocol']} (hash {results['protocol_hash']}, n = {results['n']})\n")
    print(report.table(results))
    for warning in results["warnings"]:
        print(f"warning: {warning}")
    written = [name for name in report.FILES if (Path(args.out) / name).is_file()]
    print(f"\nwritten: {Path(args.out) / written[0]}, {', '.join(written[1:])}")


def _picture(args: argparse.Namespace) -> None:
    from evaluation import picture
    from evaluation.protocols import get_protocol
    from evaluation.runner import load_pipeline

    target = _target(args.out)
    _quieten()
    if args.rows < 1:
        raise UserError(f"--rows must be at least 1, got {args.rows}.")
    teacher, student = (load_pipeline(path, args.device) for path in (args.teacher, args.student))
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
    from evaluation import folders

    target = _target(args.out) if args.out else None
    _at_least_one(args, "io_batch")
    _quieten()
    found = folders.measure(
        args.images, args.ref, metrics=args.metrics, extractor=args.extractor, protocol=args.protocol,
        captions=args.captions, clip=args.clip, io_batch=args.io_batch, device=args.device,
    )  # fmt: skip
    print(f"n = {found['n']}, reference n = {found['reference_n'] or 'not said'}")
    _print_values(found)
    for warning in found["warnings"]:
        print(f"warning: {warning}")
    if target:
        _write_json(found, target)


def _stats(args: argparse.Namespace) -> None:
    from evaluation import folders
    from evaluation.extractors import load_extractor
    from evaluation.images import Resize, open_images
    from evaluation.protocols import get_protocol

    target = _target(args.out)
    _at_least_one(args, "io_batch")
    _quieten()
    chosen = get_protocol(args.protocol) if args.protocol else None
    resize = getattr(chosen.reference, "resize", Resize()) if chosen else Resize()
    images = open_images(args.images, resize, args.io_batch)
    extractor = load_extractor(args.extractor or (chosen.extractor if chosen else "scenes-v1"), args.device)
    stats = folders.statistics(images, extractor)
    if stats.n < 2:
        raise UserError(
            f"statistics need at least 2 images, got {stats.n} in {args.images}; use more images."
        )
    stats.save(target)
    print(f"written: {target} (n = {stats.n}, {stats.dim} features of {stats.source.extractor})")
    if images.facts.duplicates:
        print(f"warning: {images.facts.duplicates} images have the same pixels as another one.")


def _compare(args: argparse.Namespace) -> None:
    from evaluation import compare

    if len(args.runs) < 2 and not args.published:
        raise UserError("compare needs at least two runs, or one and --published.")
    print(compare.text([compare.load(path) for path in args.runs], args.published))


def _doctor(args: argparse.Namespace) -> None:
    from evaluation import doctor

    _at_least_one(args, "settings")
    _quieten()
    found = doctor.examine(
        args.protocol, reference=args.reference, captions=args.captions, extractor=args.extractor, out=args.out,
        settings=args.settings,
    )  # fmt: skip
    for finding in found:
        print(f"{'ok     ' if finding.good else 'MISSING'}  {finding.name}: {finding.text}")
    missing = [finding.name for finding in found if not finding.good]
    if args.protocol and missing:
        raise UserError(f"{args.protocol} cannot be measured here yet: see {', '.join(missing)} above.")


def _geneval(args: argparse.Namespace) -> None:
    from evaluation import geneval

    if args.action == "summarise":
        target = _target(args.out) if args.out else None
        found = geneval.summarise(args.results)
        print(f"{found['prompts']:.0f} prompts, {found['images']:.0f} images")
        _print_values(found)
        if target:
            _write_json(found, target)
        return
    from evaluation.generate import Configuration, draw_with, generate, pipeline_sha256
    from evaluation.protocols import get_protocol
    from evaluation.report import check_writable
    from evaluation.runner import load_pipeline
    from evaluation.weights import pipeline_name

    _at_least_one(args, "batch")
    _quieten()
    protocol = get_protocol("geneval").located(captions=args.captions)
    check_writable(Path(args.out))
    sampler = load_pipeline(args.pipeline, args.device)
    steps = args.steps or sampler.default_steps
    guidance = sampler.default_guidance if args.guidance is None else args.guidance
    configuration = Configuration(
        pipeline_name(sampler.path).replace("/", "-"),
        pipeline_sha256(sampler.path),
        protocol.hash,
        steps,
        guidance,
        args.batch,
        args.device,
    )
    with _bar()(total=protocol.n, desc=f"{sampler.path.name}, {steps} steps") as bar:
        samples = generate(
            draw_with(sampler, steps, guidance, args.batch), configuration, protocol.prompts(protocol.n),
            protocol.seeds(protocol.n), Path(args.out) / "samples", progress=bar.update,
        )  # fmt: skip
    folder = Path(args.out) / "images"
    count = geneval.export(samples, protocol.captions, protocol.images_per_prompt, folder)
    print(f"written: {folder} ({count} prompts, {len(samples)} images)")


def _print_values(found: dict[str, Any]) -> None:
    """Every number with its standard error, one a line."""
    for name, value in found.items():
        if isinstance(value, float) and not name.endswith("/se"):
            error = found.get(f"{name}/se")
            print(f"{name} {value:.6g}" + (f" ± {error:.2g}" if error is not None else ""))


def _write_json(content: dict[str, Any], target: Path) -> None:
    with atomic_write(target) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raises UserError for an option that is given and below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")


def _bar() -> Callable[..., Any]:
    """Makes a progress bar from `total` and `desc`."""
    from functools import partial

    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 30
    return partial(tqdm, unit="image", mininterval=interval, dynamic_ncols=True)


def _protocols(args: argparse.Namespace) -> None:
    from evaluation.protocols import PROTOCOLS, get_protocol

    if args.action is None:
        for protocol in PROTOCOLS.values():
            print(f"{protocol.name:16} version {protocol.version}, hash {protocol.hash}: {protocol.about}")
        return
    if args.name is None:
        raise UserError(f"say which protocol to show: {', '.join(PROTOCOLS)}.")
    protocol = get_protocol(args.name)
    files = [part for part in (protocol.reference, protocol.captions) if getattr(part, "about", "")]
    shown = protocol.describe() | {
        "hash": protocol.hash,
        "metrics": list(protocol.metrics),
        "about": protocol.about,
        "source": protocol.source,
        "files": {part.name: part.about for part in files},
    }
    print(json.dumps(shown, indent=2))


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
