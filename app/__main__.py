"""python -m app: the page, the HTTP API, and a check of both models.

The page answers before torch is imported, and draws what was asked meanwhile once the models are there; /healthz
says 503 until then.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.options import account_of, is_loopback, parser
from stepdistill.errors import UserError, cli_errors

if TYPE_CHECKING:
    import uvicorn

    from app.engine import Engine
    from app.later import Later

# Seconds after which gradio is imported, unless it was asked for before.
GRADIO_AFTER = 20.0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(argv)
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port must be 0 to 65535, got {args.port}.")
    if args.threads is not None and not 1 <= args.threads <= 1024:
        raise UserError(f"--threads must be 1 to 1024, got {args.threads}.")
    if args.no_teacher and args.teacher:
        raise UserError("--teacher and --no-teacher contradict each other; give one of them.")
    if args.batch is not None and not 1 <= args.batch <= 64:
        raise UserError(f"--batch must be 1 to 64, got {args.batch}.")
    for name in ("student", "teacher", "run", "decoder"):
        given = getattr(args, name)
        for path in given if isinstance(given, list) else [given]:
            if path is not None and not Path(path).is_dir():
                kind = {"run": "run", "decoder": "tiny decoder"}.get(name, "diffusers pipeline")
                raise UserError(f"--{name} {path} is not a directory; give the directory of a {kind}.")
    if args.results is not None and not Path(args.results).is_file():
        raise UserError(f"--results {args.results} is not a file; give an evaluation's results.json.")
    account = account_of(args.auth, args.auth_file)
    if account is None and not (args.check or args.no_auth or is_loopback(args.host)):
        raise UserError(
            f"--host {args.host} can be reached from other machines; "
            "ask for a password with --auth-file FILE, or serve everybody with --no-auth."
        )
    listener = None if args.check else _listen(args.host, args.port)

    from app.engine import Engine

    engine = Engine(
        args.student,
        False if args.no_teacher else args.teacher,
        device=args.device,
        dtype=args.dtype,
        attention=args.attention,
        threads=args.threads,
        batch=args.batch,
        decoder=args.decoder,
    )
    if listener is None:
        return check(engine)
    shown = {"openapi": args.openapi, "gradio": not args.no_gradio, "runs": tuple(map(Path, args.run))}
    shown["results"] = Path(args.results) if args.results else _results(args)
    return serve(engine, listener, args.host, args.allow_host, account, **shown)


def check(engine: Engine) -> int:
    """Load, make one image with each model from the same noise, and print the report."""
    from app.request import Request

    engine.start().wait()
    limits = engine.limits["student"]
    prompt = limits.class_names[0] if limits.conditions == "class" and limits.class_names else ""
    prompt = prompt or "a small red circle above a large blue square on a yellow background"
    results = {name: engine.generate(Request(prompt, seed=0, model=name)) for name in engine.entries}
    for key, value in engine.report().items():
        if key not in ("counts", "models", "queue"):
            print(f"{key}: {value}")
    for name, result in results.items():
        split = ", ".join(f"{stage} {value:.4f} s" for stage, value in result.seconds.items())
        print(f"{name} ({result.name}) {result.request.steps} steps: {split}")
    if "teacher" in results:
        print(f"speed-up: {results['teacher'].total / max(results['student'].total, 1e-9):.1f}x")
    engine.close()
    return 0


def serve(
    engine: Engine,
    listener: socket.socket,
    host: str,
    names: list[str],
    account: str | None = None,
    **shown: Any,
) -> int:
    """Serve until interrupted; `shown` goes to `app.http.create_app`.

    Returns 0 after Ctrl-C or SIGTERM, 2 when the models could not be loaded.
    """
    from app.connections import server as server_of
    from app.http import LOOPBACK, create_app
    from app.later import offline

    offline()
    with tempfile.TemporaryDirectory(prefix="stepdistill-app-") as cache:
        # Gradio keeps served images in files; in a directory of our own they go when the server goes.
        os.environ["GRADIO_TEMP_DIR"] = os.path.realpath(cache)
        port = listener.getsockname()[1]
        everywhere = host in ("0.0.0.0", "::", "")
        if account is None and not is_loopback(host):
            print(
                f"warning: listening on {host}: whoever reaches this address can use it; there is no login.",
                file=sys.stderr,
            )
        app = create_app(
            engine,
            hosts=[*LOOPBACK, host, socket.gethostname(), *names],
            any_address=everywhere,
            account=account,
            **shown,
        )
        url = f"http://{_in_url('127.0.0.1' if everywhere else host)}:{port}"
        server = server_of(app, engine.drain)
        threading.Thread(
            target=_announce,
            args=(engine, server, url, app.state.later if shown.get("gradio", True) else None),
            daemon=True,
        ).start()
        # uvicorn passes the signal on once it has stopped; SIGTERM too must come back here to tidy up.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
        ended = engine.close(1.0)
    if engine.problem:
        raise UserError(engine.problem)
    print("stopped", flush=True)
    if not ended:
        # Libraries that are being loaded abort where their thread is taken from them at the end of Python.
        os._exit(0)
    return 0


def _announce(engine: Engine, server: uvicorn.Server, url: str, later: Later | None) -> None:
    """Print the URL once the page answers, begin to load, and print the report once the models draw.

    Where they cannot be loaded the server ends.
    """
    while not server.started and not server.should_exit:
        time.sleep(0.02)
    loading = engine.state in ("new", "loading")
    print(f"page: {url}" + (" (the models are loading)" if loading else ""), flush=True)
    engine.start()
    try:
        engine.wait()
    except UserError:
        server.should_exit = True
        return
    if engine.state == "ready":
        report = engine.report()
        about = f"{report['device']}, {report['dtype']}, attention {report['attention']}"
        print(f"ready: {url} ({engine.entries['student'].title}, {about})", flush=True)
        if later is not None:
            # Others first: it is needed by few, and its import takes seconds.
            time.sleep(GRADIO_AFTER)
            later.prepare()


def _results(args: argparse.Namespace) -> Path | None:
    """The numbers of the embedded pair, where it is served."""
    from stepdistill import assets

    found = assets.ROOT / "report" / "results.json"
    return found if args.student is None and found.is_file() else None


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before anything heavy is loaded, so a busy port is known at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise UserError(f"--host {host!r} is not an address of this machine.") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(1024)
    except OverflowError:
        raise UserError(f"--port must be 0 to 65535, got {port}.") from None
    except PermissionError:
        raise UserError(
            f"port {port} needs more rights than you have; give another with --port, such as --port 7861."
        ) from None
    except OSError as error:
        listener.close()
        if error.errno == 98 or "in use" in str(error):
            raise UserError(
                f"port {port} is in use; give another with --port, such as --port {port + 1}."
            ) from None
        raise UserError(f"cannot listen on --host {host} ({error.strerror}).") from None
    return listener


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


if __name__ == "__main__":
    # diffusers and transformers import them where they find them: two CPU seconds, and no use in serving.
    for unused in ("peft", "scipy"):
        sys.modules.setdefault(unused, None)
    with cli_errors():
        raise SystemExit(main())
