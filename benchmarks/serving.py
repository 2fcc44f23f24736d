"""How near serving comes to what the networks can do, as ratios measured in one process.

    python benchmarks/serving.py [--quick]        -> benchmarks/serving.json

- overhead: a one-step image of one user, warm, over the sum of its network passes, both of one and the same image:
  by the clock, and by CPU time, which a busy machine does not change. Medians.
- best: the engine's own best images per second, batches always full.
- share: of it, what 50 users get who each ask again when they are answered, by /v1 and by the page's route.
- crowd: 100 and 500 users of one address, and 500 of eight, who each ask once: answered, or refused with Retry-After, and
  how soon; the settings inside every PNG are compared with what its user asked for.

Clients and server share the machine's cores, so shares are a lower bound of what clients elsewhere see.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from app.connections import PER_ADDRESS, server
from app.engine import Engine
from app.http import create_app
from app.request import Request, validate
from stepdistill.errors import atomic_write

OUT = Path(__file__).with_name("serving.json")
PROMPT = "a small red circle above a large blue square on a yellow background"


class Passes:
    """The seconds, of clock and CPU, that the networks of a sampler took, by their own forward calls."""

    def __init__(self, sampler) -> None:
        self.clock, self.cpu, self._began = 0.0, 0.0, (0.0, 0.0)
        vae = sampler.pipeline.vae
        networks = (sampler.denoiser.network, vae.post_quant_conv, vae.decoder, sampler.pipeline.text_encoder)
        for network in networks:
            network.register_forward_pre_hook(self._before)
            network.register_forward_hook(self._after)

    def _before(self, *_) -> None:
        self._began = time.perf_counter(), time.thread_time()

    def _after(self, *_) -> None:
        self.clock += time.perf_counter() - self._began[0]
        self.cpu += time.thread_time() - self._began[1]


def overhead(engine: Engine, passes: Passes, count: int) -> dict[str, float]:
    """Medians of (an image's time) / (its networks' time), each pair of one and the same image."""
    clock, cpu, whole = [], [], []
    for seed in range(count):
        passes.clock = passes.cpu = 0.0
        began, used = time.perf_counter(), time.process_time()
        engine.generate(Request(PROMPT, seed=seed, steps=1))
        spent = time.perf_counter() - began
        whole.append(spent)
        clock.append(spent / passes.clock)
        cpu.append((time.process_time() - used) / passes.cpu)
    clock_ratio, cpu_ratio = statistics.median(clock), statistics.median(cpu)
    return {
        "ratio": clock_ratio,
        "cpu_ratio": cpu_ratio,
        "ms": 1000 * statistics.median(whole),
        "images": count,
    }


def best(engine: Engine, seconds: float) -> float:
    """Images per second with a queue that never runs empty."""
    ended, drawn = time.perf_counter() + seconds, 0
    size = max(engine.models.loaded["student"].sizes)
    request = validate(Request(PROMPT, seed=0, steps=1), engine.limits)
    began, waiting = time.perf_counter(), []
    while time.perf_counter() < ended:
        while len(waiting) < 3 * size:
            waiting.append(engine.submit(request))
        waiting.pop(0).future.result()
        drawn += 1
    rate = drawn / (time.perf_counter() - began)
    for job in waiting:
        job.future.result()
    return rate


def users(*words: object) -> dict:
    """What the users of benchmarks/serving_users.py saw."""
    command = [sys.executable, OUT.with_name("serving_users.py"), *words]
    return json.loads(subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE).stdout)


def share(engine: Engine, url: str, route: str, turns: int, seconds: float) -> dict:
    """What 50 users get of the engine's own best, in turns with it; the median turn."""
    seen = []
    before = best(engine, seconds / 2)
    for _ in range(turns):
        one = users(url, "steady", route, 50, seconds)
        after = best(engine, seconds / 2)
        rate = (before + after) / 2
        seen.append(one | {"best_images_per_second": rate, "share": one["images_per_second"] / rate})
        before = after
    wrong = sum(one["wrong"] for one in seen)
    shares = [one["share"] for one in seen]
    latest = seen[-1] | {"wrong": wrong, "share": statistics.median(shares)}
    return latest | {"shares": [round(share, 3) for share in shares]}


def settled(engine: Engine) -> None:
    """Wait until nothing is left that the engine does while nobody asks: loading, recording, trying sizes, hashing."""
    while any(
        entry.state == "loading" or "sha256" not in entry.about for entry in engine.entries.values()
    ) or any(model._untried for model in engine.models.loaded.values()):
        time.sleep(0.1)


def serve(engine: Engine) -> tuple[str, object]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    running = server(create_app(engine, gradio=False))
    running.install_signal_handlers = lambda: None
    threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True).start()
    while not running.started:
        time.sleep(0.01)
    return f"http://127.0.0.1:{listener.getsockname()[1]}", running


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds each")
    parser.add_argument("--threads", type=int, default=1)
    quick = (args := parser.parse_args()).quick
    engine = Engine(threads=args.threads, device="cpu").start().wait()
    settled(engine)
    model = engine.models.loaded["student"]
    measured = {
        "sizes": list(model.sizes),
        "overhead": overhead(engine, Passes(model.sampler), 20 if quick else 100),
    }
    seconds = 4.0 if quick else 8.0
    url, running = serve(engine)
    for route in ("v1", "page"):
        measured[route] = share(engine, url, route, 3 if quick else 5, seconds)
    measured["crowd"] = [users(url, "crowd", *many) for many in ((100, 1), (500, 1), (500, 8))]
    measured["connections_of_one_address"] = PER_ADDRESS
    measured["batches"] = engine.metrics.summary()["batches"]
    measured["machine"] = {
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load_average": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }  # fmt: skip
    running.should_exit = True
    engine.close()
    print(json.dumps(measured, indent=2))
    with atomic_write(OUT) as temporary:
        temporary.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
