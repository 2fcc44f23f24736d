"""The command line of `python -m app`: its flags, and the account in them."""

from __future__ import annotations

import argparse
import ipaddress
from pathlib import Path

from stepdistill.errors import UserError

EXAMPLES = """\
examples:
  python -m app
      the embedded student beside its teacher, at http://127.0.0.1:7860
  python -m app --check
      load both, make one image with each, print the report, exit
  python -m app --student runs/dmd2/student
      a student you distilled, beside the embedded teacher
  python -m app --student A --student B --no-teacher
      two students, to compare and to choose from
  python -m app --host 0.0.0.0 --auth-file FILE
      for other machines, behind the USER:PASSWORD in the first line of FILE
  curl http://127.0.0.1:7860/v1/images/generations -H 'content-type: application/json' \\
       -d '{"prompt": "a large green star on a black background", "seed": 7, "steps": 1}'
      one image over HTTP
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m app",
        description="Serve a few-step student and its teacher side by side: a web page and an HTTP API.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--student",
        metavar="DIR",
        action="append",
        help="student directory; repeat it for several (default: the embedded student)",
    )
    p.add_argument(
        "--teacher", metavar="DIR", help="teacher pipeline directory (default: the embedded teacher)"
    )
    p.add_argument("--no-teacher", action="store_true", help="serve the student alone")
    _add_doors(p)
    _add_networks(p)
    p.add_argument("--results", metavar="FILE", help="an evaluation's results.json for the page's Metrics")
    p.add_argument(
        "--run", metavar="DIR", action="append", default=[], help="a training run for the page's Training"
    )
    p.add_argument("--openapi", action="store_true", help="describe the HTTP API at /openapi.json")
    p.add_argument("--no-gradio", action="store_true", help="do not answer gradio_client")
    p.add_argument(
        "--check", action="store_true", help="load, make one image with each model, print the report, exit"
    )
    return p


def _add_doors(p: argparse.ArgumentParser) -> None:
    """Where the server listens, and who may come in."""
    p.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    p.add_argument(
        "--port", type=int, default=7860, help="port to listen on; 0 takes a free one (default: 7860)"
    )
    p.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="a further name this server is reached by",
    )
    door = p.add_mutually_exclusive_group()
    door.add_argument(
        "--auth",
        metavar="USER:PASSWORD",
        help="ask for this user name and password; other users of this machine can see a command line",
    )
    door.add_argument("--auth-file", metavar="FILE", help="the same, from the first line of a file")
    door.add_argument(
        "--no-auth", action="store_true", help="serve whoever reaches a --host that is not this machine alone"
    )


def _add_networks(p: argparse.ArgumentParser) -> None:
    """How the networks run."""
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    p.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"),
        help="number format of the networks (default: float16 on cuda, float32 on cpu)",
    )  # fmt: skip
    p.add_argument(
        "--attention",
        default="auto",
        help="auto, xformers, flash, sdpa or math; one that cannot run is an error",
    )
    p.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads of the networks (default: torch's choice)"
    )
    p.add_argument(
        "--decoder", metavar="DIR",
        help="AutoencoderTiny that decodes a student's images while one types; what is kept or asked for is decoded by its own",
    )  # fmt: skip
    p.add_argument(
        "--batch", type=int, metavar="N",
        help="images the networks draw at once where sizes of a batch give different bits (default: 1 on cpu, 4 on cuda)",
    )  # fmt: skip


def account_of(given: str | None, file: str | None) -> str | None:
    """The user name and the password as "USER:PASSWORD"; None where neither flag was given."""
    if file is not None:
        try:
            given = (Path(file).read_text().splitlines() or [""])[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise UserError(f"--auth-file {file} cannot be read ({reason}).") from None
    if given is None:
        return None
    user, _, password = given.partition(":")
    if not user or not password:
        name = "--auth" if file is None else f"the first line of --auth-file {file}"
        raise UserError(f"{name} must be USER:PASSWORD, with neither of them empty.")
    return given


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
