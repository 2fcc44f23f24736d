"""`python -m evaluation protocols`."""

from __future__ import annotations

import argparse
import json

from stepdistill.errors import UserError

TEXT = "List the protocols, or show everything one fixes."
EXAMPLES = """\
examples:
  python -m evaluation protocols
  python -m evaluation protocols show scenes-2k"""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", choices=["show"], help="show one protocol in full, as JSON")
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
    files = [part for part in (protocol.reference, protocol.captions) if getattr(part, "about", "")]
    shown = protocol.describe() | {
        "hash": protocol.hash,
        "metrics": list(protocol.metrics),
        "about": protocol.about,
        "source": protocol.source,
        "files": {part.name: part.about for part in files},
    }
    print(json.dumps(shown, indent=2))
