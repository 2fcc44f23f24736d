"""`python -m evaluation stats`."""

from __future__ import annotations

import argparse

from evaluation.commands.common import add_set_options, at_least_one, print_warnings, writable
from stepdistill.errors import UserError, quieten_libraries

TEXT = "Compute the feature statistics of a set of images once, for later comparisons."
EXAMPLES = """\
example:
  python -m evaluation stats MY_DATASET -o ref.npz
  python -m evaluation stats val2014 -o coco14-val.npz --protocol coco14-30k"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGES", help="a set of images: see `images --help`")
    parser.add_argument("-o", "--out", required=True, help="the .npz file to write")
    add_set_options(parser)


def do(args: argparse.Namespace) -> None:
    from evaluation.extractors import load_extractor
    from evaluation.facts import doubts_of
    from evaluation.files import open_images
    from evaluation.image_sets import reference_resize
    from evaluation.protocol import get_protocol

    target = writable(args.out)
    at_least_one(args, "io_batch")
    quieten_libraries()
    chosen = get_protocol(args.protocol) if args.protocol else None
    images = open_images(args.images, reference_resize(chosen), args.io_batch)
    extractor = load_extractor(
        args.extractor or (chosen.extractor if chosen else "scenes-v1"), args.device, dtype=args.dtype
    )
    stats = extractor.statistics(images.watched())
    if stats.n < 2:
        raise UserError(
            f"statistics need at least 2 images, got {stats.n} in {args.images}; use more images."
        )
    stats.prepared = str(reference_resize(chosen)) if chosen else ""
    stats.save(target)
    print(f"written: {target} (n = {stats.n}, {stats.dim} features of {stats.source.extractor})")
    print_warnings([*doubts_of(stats.facts, "images"), *extractor.doubts])
