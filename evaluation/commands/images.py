"""`python -m evaluation images`."""

from __future__ import annotations

import argparse

from evaluation.commands.common import (
    add_set_options,
    at_least_one,
    names,
    print_values,
    print_warnings,
    writable,
    write_json,
)
from stepdistill.errors import quieten_libraries
from stepdistill.registry import add_allow_code

TEXT = "Measure one set of images against another."
EXAMPLES = """\
examples:
  python -m evaluation images MY_SAMPLES --ref MY_DATASET
  python -m evaluation images MY_SAMPLES --ref MY_DATASET --metrics fid,kid,prdc
  python -m evaluation stats MY_DATASET -o ref.npz && python -m evaluation images MY_SAMPLES --ref ref.npz

  python -m evaluation images MY_SAMPLES --captions captions.jsonl --metrics clip --clip CLIP_MODEL
  python -m evaluation images MY_SAMPLES --ref val2014 --protocol coco14-30k --metrics fid,clip --captions FILE

A set of images is a folder of images, of Parquet files (a column `image` or `img`) or of WebDataset .tar files; a
.zip, .tar or .parquet file; or an .npy or .npz array (uint8 N, H, W, 3). A pattern "data/train-*.parquet" names some
files. All images of a set must have one size, unless a protocol brings them to one. The distance is named after its
feature net; only that of the Inception weights is FID."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGES", help="the set to measure: see below")
    parser.add_argument(
        "--ref", help="another set, or statistics (.npz), to compare with; not needed for clip and attributes"
    )
    parser.add_argument(
        "--metrics", type=names, default=["fd"], metavar="fd,clip,...", help="what to measure (default: fd)"
    )
    add_allow_code(parser)
    parser.add_argument(
        "--captions",
        metavar="FILE",
        help="a caption for every image: by name (.jsonl, .csv, COCO's .json) or in natural order of the names (.txt)",
    )
    parser.add_argument("--clip", metavar="DIR", help="directory of the CLIP model, if not the embedded one")
    parser.add_argument("-o", "--out", help="also write the result to this JSON file")
    add_set_options(parser)


def do(args: argparse.Namespace) -> None:
    from evaluation.image_sets import measure_set

    target = writable(args.out) if args.out else None
    at_least_one(args, "io_batch")
    quieten_libraries()
    result = measure_set(
        args.images, args.ref, metrics=args.metrics, extractor=args.extractor, protocol=args.protocol,
        captions=args.captions, clip=args.clip, io_batch=args.io_batch, device=args.device, dtype=args.dtype,
    )  # fmt: skip
    print(
        f"n = {result['n']}" + (f", reference n = {result['reference_n'] or 'not said'}" if args.ref else "")
    )
    if result["protocol"]:
        print(f"{result['protocol']} (hash {result['protocol_hash']})")
    print_values(result)
    print_warnings(result["warnings"])
    if target:
        write_json(result, target)
