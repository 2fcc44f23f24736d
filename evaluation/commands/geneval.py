"""`python -m evaluation geneval`."""

from __future__ import annotations

import argparse
from pathlib import Path

from evaluation.commands.common import (
    at_least_one,
    print_values,
    print_warnings,
    progress_bar,
    writable,
    write_json,
)
from stepdistill.errors import quieten_libraries

TEXT = "Draw GenEval's images, judge them here or by its own program, and summarise."
EXAMPLES = """\
examples:
  python -m evaluation geneval run --pipeline STUDENT --captions evaluation_metadata.jsonl --out OUT
  # the same in parts, with GenEval's own detector in its own environment
  python -m evaluation geneval export --pipeline STUDENT --captions evaluation_metadata.jsonl --out OUT
  python evaluation/evaluate_images.py OUT/images --outfile results.jsonl ...
  python -m evaluation geneval summarise results.jsonl"""


def add(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="run | export | score | summarise", required=True, dest="action")
    run = actions.add_parser("run", help="export, score and summarise")
    export = actions.add_parser("export", help="draw four images of each prompt into GenEval's folder layout")
    score = actions.add_parser("score", help="judge the images in such a folder, and summarise")
    score.add_argument("images", metavar="IMAGES", help="OUT/images of export")
    score.add_argument("--out", required=True, metavar="DIR", help="gets results.jsonl and geneval.json")
    summarise = actions.add_parser("summarise", help="scores by task from a detector's results.jsonl")
    summarise.add_argument("results", metavar="RESULTS", help="results.jsonl")
    summarise.add_argument("-o", "--out", help="also write the scores to this JSON file")
    for drawing in (run, export):
        drawing.add_argument("--pipeline", required=True, metavar="DIR", help="pipeline directory")
        drawing.add_argument("--captions", metavar="FILE", help="GenEval's evaluation_metadata.jsonl")
        drawing.add_argument("--out", required=True, metavar="DIR", help="gets images/ and samples/")
        drawing.add_argument("--steps", type=int, help="sampling steps (default: the pipeline's)")
        drawing.add_argument("--guidance", type=float, metavar="G", help="guidance (default: the pipeline's)")
        drawing.add_argument("--batch", type=int, default=16, metavar="16", help="batch size of the networks")
    for judging in (run, score):
        judging.add_argument(
            "--detector", metavar="DIR", help="facebook/mask2former-swin-small-coco-instance"
        )
        judging.add_argument("--clip", metavar="DIR", help="openai/clip-vit-large-patch14, for colours")
    for computing in (run, export, score):
        computing.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")


def do(args: argparse.Namespace) -> None:
    quieten_libraries()
    if args.action == "summarise":
        _summarise(args.results, writable(args.out) if args.out else None)
        return
    from evaluation import geneval
    from evaluation.report import check_writable

    out = Path(args.out)
    check_writable(out)
    if args.action != "export":
        from evaluation.detector import Detector

        # Its weights are there before anything is drawn.
        detector = Detector(args.detector, args.clip, args.device)
    images = out / "images" if args.action != "score" else Path(args.images)
    if args.action != "score":
        _export(args, images)
    if args.action == "export":
        return
    geneval.score(images, detector, out / "results.jsonl", progress_bar())
    _summarise(out / "results.jsonl", out / "geneval.json")
    print_warnings([geneval.JUDGE])


def _export(args: argparse.Namespace, folder: Path) -> None:
    from evaluation import geneval
    from evaluation.generate import Configuration, generate
    from evaluation.plan import load_pipeline
    from evaluation.protocol import get_protocol

    at_least_one(args, "batch")
    protocol = get_protocol("geneval").located(captions=args.captions)
    sampler = load_pipeline(args.pipeline, args.device)
    drawer = sampler.at(args.steps, args.guidance, chunk=args.batch, quantise=protocol.quantise)
    n, kept = protocol.n, Path(args.out) / "samples"
    with progress_bar()(total=n, desc=f"{sampler.path.name}, {drawer.steps} steps") as bar:
        configuration = Configuration.of(drawer, protocol)
        prompts, seeds = protocol.prompts(n), protocol.seeds(n)
        samples = generate(drawer, configuration, prompts, seeds, kept, progress=bar.update)
    count = geneval.export(samples, protocol.captions, protocol.images_per_prompt, folder)
    print(f"written: {folder} ({count} prompts, {len(samples)} images)")


def _summarise(results: str | Path, target: Path | None) -> None:
    from evaluation import geneval

    scores = geneval.summarise(results)
    print(f"{scores['prompts']:.0f} prompts, {scores['images']:.0f} images")
    print_values(scores)
    if target:
        write_json(scores, target)
