"""`python -m evaluation protocols`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from stepdistill.errors import UserError

if TYPE_CHECKING:
    from evaluation.protocol import Protocol

TEXT = "List the protocols, or show everything one fixes."
EXAMPLES = """\
examples:
  python -m evaluation protocols
  python -m evaluation protocols show scenes-2k"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", nargs="?", choices=["show"], help="show one protocol in full, as JSON, and what it needs"
    )
    parser.add_argument("name", nargs="?", help="the protocol to show")


def do(args: argparse.Namespace) -> None:
    from evaluation.protocol import PROTOCOLS, get_protocol

    if args.action is None:
        for protocol in PROTOCOLS.values():
            print(f"{protocol.name:16} version {protocol.version}, hash {protocol.hash}: {protocol.about}")
        return
    if args.name is None:
        raise UserError(f"say which protocol to show: {', '.join(PROTOCOLS)}.")
    protocol = get_protocol(args.name)
    shown = protocol.describe() | {
        "hash": protocol.hash,
        "metrics": list(protocol.metrics),
        **({"companion": protocol.companion} if protocol.companion else {}),
        "about": protocol.about,
        "source": protocol.source,
        "needs": needs(protocol),
    }
    print(json.dumps(shown, indent=2))


def needs(protocol: Protocol) -> list[str]:
    """What has to be downloaded, how large it is, where it goes, and whether it is there."""
    from evaluation.metrics.clip_score import VARIANTS
    from evaluation.references import reference_folders
    from evaluation.weights import WEIGHTS, MissingWeights, find

    needed = []
    weights = protocol.extractor.removesuffix("-clean").removesuffix("-pytorch").removesuffix("-spatial")
    for name in (weights, VARIANTS.get(protocol.clip, ""), *protocol.networks):
        if name in WEIGHTS:
            one = WEIGHTS[name]
            sha256 = f", sha256 {one.sha256}..." if one.sha256 else ""
            try:
                there = f"here: {find(name)}"
            except MissingWeights:
                there = f"get them with: {one.how}"
            needed.append(f"weights {name} ({one.size} MB, {one.licence}{sha256}); {there}")
    for part, option in ((protocol.reference, "--reference"), (protocol.captions, "--captions")):
        if getattr(part, "about", ""):
            suffix = "" if part is protocol.reference else ".txt, .jsonl, .json or .csv"
            places = " or ".join(f"{folder / part.name}{suffix}" for folder in reference_folders())
            how = "; ".join(part.files) or part.about
            needed.append(f"{part.name}: {how}; {part.about} Put it at {places}, or name it with {option}.")
            if pin := getattr(part, "ends", ""):
                needed[-1] += (
                    f" It is known by its {part.characters} characters and the sha256 of its ends, {pin}."
                )
    return needed
