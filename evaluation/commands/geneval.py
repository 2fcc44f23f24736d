"""`python -m evaluation geneval`."""

from __future__ import annotations

import argparse
from pathlib import Path

from evaluation.commands.common import at_least_one, print_values, progress_bar, writable, write_json
from stepdistill.errors import quieten_libraries

TEXT = "Write images for GenEval's detector, and summarise its results."
EXAMPLES = """\
examples:
  python -m evaluation geneval export --pipeline STUDENT --captions evaluation_metadata.jsonl --out OUT
  # in GenEval's own environment: python evaluation/evaluate_images.py OUT/images --outfile results.jsonl ...
  python -m evaluation geneval summarise results.jsonl"""


def add(parser: argparse.ArgumentParser) -> None:
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


def do(args: argparse.Namespace) -> None:
    from evaluation import geneval

    if args.action == "summarise":
        target = writable(args.out) if args.out else None
        found = geneval.summarise(args.results)
        print(f"{found['prompts']:.0f} prompts, {found['images']:.0f} images")
        print_values(found)
        if target:
            write_json(found, target)
        return
    from evaluation.generate import Configuration, generate
    from evaluation.plan import load_pipeline
    from evaluation.protocol import get_protocol
    from evaluation.report import check_writable

    at_least_one(args, "batch")
    quieten_libraries()
    protocol = get_protocol("geneval").located(captions=args.captions)
    check_writable(Path(args.out))
    sampler = load_pipeline(args.pipeline, args.device)
    drawer = sampler.at(args.steps, args.guidance, chunk=args.batch, quantise=protocol.quantise)
    with progress_bar()(total=protocol.n, desc=f"{sampler.path.name}, {drawer.steps} steps") as bar:
        samples = generate(
            drawer,
            Configuration.of(drawer, protocol),
            protocol.prompts(protocol.n),
            protocol.seeds(protocol.n),
            Path(args.out) / "samples",
            progress=bar.update,
        )
    folder = Path(args.out) / "images"
    count = geneval.export(samples, protocol.captions, protocol.images_per_prompt, folder)
    print(f"written: {folder} ({count} prompts, {len(samples)} images)")
