"""How soon `python -m app` shows its page and its first image, from the start of the process.

    OMP_NUM_THREADS=1 python -m benchmarks.serving_start        -> benchmarks/serving_start.json

Seconds of the clock, and of the server's CPU time till then; each row a server of its own, on a warm disk.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from stepdistill.errors import atomic_write

OUT = Path(__file__).with_suffix(".json")
ROWS = 3
PATIENCE = 120.0
ASKED = json.dumps({"prompt": "a large red star on a black background"}).encode()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def answered(ask: Callable[[], object]) -> None:
    """Ask until it is answered; RuntimeError after two minutes."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            ask()
            return
        except OSError:
            time.sleep(0.02)
    raise RuntimeError("the server has not answered in two minutes")


def row() -> dict[str, float]:
    port, began = free_port(), time.monotonic()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "app", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:

        def spent(what: str) -> dict[str, float]:
            ticks = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            cpu = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
            return {f"{what}_s": round(time.monotonic() - began, 2), f"{what}_cpu_s": cpu}

        try:
            answered(lambda: urllib.request.urlopen(f"{url}/", timeout=PATIENCE).read())
            page = spent("page")
            call = urllib.request.Request(
                f"{url}/v1/images/generations", ASKED, {"content-type": "application/json"}
            )
            answered(lambda: urllib.request.urlopen(call, timeout=PATIENCE).read())
            return page | spent("image")
        finally:
            server.terminate()


def main() -> None:
    rows = [row() for _ in range(ROWS)]
    found = {"rows": rows, "cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 1)}
    with atomic_write(OUT) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
