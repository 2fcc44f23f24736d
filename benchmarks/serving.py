"""How near serving comes to what the networks can do, as ratios measured in one process.

    python benchmarks/serving.py [--quick]        -> benchmarks/serving.json

- overhead: a one-step image of one user, warm, over the sum of its network passes, both medians, interleaved.
- best: the engine's own best images per second, batches always full.
- share: of it, what 50 users get who each ask again when they are answered, by /v1 and by the page's route.
- crowd: 100 and 500 users who each ask once: answered, or refused with Retry-After, and how soon; the settings inside
  every PNG are compared with what its user asked for.

Clients and server share the process and its cores, so shares are a lower bound of what clients elsewhere see.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import resource
import socket
import statistics
import threading
import time
from pathlib import Path

import httpx
import torch

from app import png
from app.connections import PER_ADDRESS, server
from app.engine import Engine
from app.http import create_app
from app.request import Request, validate
from stepdistill import scenes
from stepdistill.errors import atomic_write

OUT = Path(__file__).with_name("serving.json")
PROMPT = "a small red circle above a large blue square on a yellow background"


class Passes:
    """The seconds that the networks of a sampler took, by their own forward calls."""

    def __init__(self, sampler) -> None:
        self.seconds, self._began = 0.0, 0.0
        for network in (
            sampler.denoiser.network,
            sampler.pipeline.vae.decoder,
            sampler.pipeline.text_encoder,
        ):
            network.register_forward_pre_hook(self._before)
            network.register_forward_hook(self._after)

    def _before(self, *_) -> None:
        self._began = time.perf_counter()

    def _after(self, *_) -> None:
        self.seconds += time.perf_counter() - self._began


def overhead(engine: Engine, passes: Passes, count: int) -> dict[str, float]:
    """Median of (an image's time) / (its networks' time), each pair of one and the same image."""
    ratios, whole = [], []
    for seed in range(count):
        passes.seconds = 0.0
        began = time.perf_counter()
        engine.generate(Request(PROMPT, seed=seed, steps=1))
        spent = time.perf_counter() - began
        whole.append(spent)
        ratios.append(spent / passes.seconds)
    return {"ratio": statistics.median(ratios), "ms": 1000 * statistics.median(whole), "images": count}


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


def asked(route: str, user: int, seed: int) -> tuple[str, dict]:
    """Address and body of one image, with a prompt that is this user's own."""
    request = {"prompt": scenes.scene_at(user).caption, "seed": seed, "steps": 1}
    if route == "page":
        return "/api/generate", {"request": request, "session": f"user-{user}", "number": seed, "n": 1}
    return "/v1/images/generations", request


def right(route: str, answer: httpx.Response, body: dict) -> bool:
    """Whether the settings inside the PNG are those that were asked for."""
    if route == "page":
        data, wanted = json.loads(answer.text.splitlines()[-1])["png"], body["request"]
    else:
        data, wanted = answer.json()["data"][0]["b64_json"], body
    settings = json.loads(png.read_png(base64.b64decode(data))[1])
    return all(settings[name] == wanted[name] for name in ("prompt", "seed", "steps"))


async def steady(url: str, route: str, users: int, seconds: float) -> dict:
    """Users who ask again and again."""
    ended, latencies, wrong = time.perf_counter() + seconds, [], 0
    limits = httpx.Limits(max_connections=users, max_keepalive_connections=users)

    async def user(client: httpx.AsyncClient, number: int) -> None:
        nonlocal wrong
        seed = 0
        while time.perf_counter() < ended:
            seed += 1
            path, body = asked(route, number, seed)
            began = time.perf_counter()
            answer = await client.post(path, json=body)
            latencies.append(time.perf_counter() - began)
            wrong += answer.status_code != 200 or not right(route, answer, body)

    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        began = time.perf_counter()
        await asyncio.gather(*(user(client, number) for number in range(users)))
        spent = time.perf_counter() - began
    ordered = sorted(latencies)
    return {
        "users": users, "images_per_second": len(latencies) / spent, "wrong": wrong,
        "p50": ordered[len(ordered) // 2], "p95": ordered[int(0.95 * len(ordered))],
    }  # fmt: skip


async def crowd(url: str, users: int) -> dict:
    """Users who all ask once, each by a connection of his own."""
    limits = httpx.Limits(max_connections=users, max_keepalive_connections=0)
    answered, refused, slow, wrong, lost = 0, 0, 0, 0, 0
    latencies = []

    async def user(client: httpx.AsyncClient, number: int) -> None:
        nonlocal answered, refused, slow, wrong, lost
        path, body = asked("v1", number, number)
        began = time.perf_counter()
        try:
            answer = await client.post(path, json=body)
        except httpx.HTTPError:
            lost += 1
            return
        spent = time.perf_counter() - began
        if answer.status_code == 200:
            answered += 1
            latencies.append(spent)
            wrong += not right("v1", answer, body)
        elif answer.status_code == 503 and answer.headers.get("retry-after"):
            refused += 1
            slow += spent > 1
        else:
            lost += 1

    async with httpx.AsyncClient(base_url=url, timeout=180, limits=limits) as client:
        await asyncio.gather(*(user(client, number) for number in range(users)))
    return {
        "users": users, "answered": answered, "refused_with_retry_after": refused, "refused_after_a_second": slow, "lost": lost,
        "mixed_up": wrong, "p95": sorted(latencies)[int(0.95 * len(latencies))] if latencies else None,
    }  # fmt: skip


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
    while engine.entries["teacher"].state != "ready" or engine.models.loaded["student"]._untried:
        time.sleep(0.1)
    model = engine.models.loaded["student"]
    measured = {
        "sizes": list(model.sizes),
        "overhead": overhead(engine, Passes(model.sampler), 20 if quick else 100),
    }
    seconds = 4.0 if quick else 15.0
    url, running = serve(engine)
    for route in ("v1", "page"):
        before = best(engine, seconds)
        users = asyncio.run(steady(url, route, 50, seconds))
        rate = (before + best(engine, seconds)) / 2
        measured[route] = users | {"best_images_per_second": rate, "share": users["images_per_second"] / rate}
    measured["crowd"] = [asyncio.run(crowd(url, users)) for users in (100, 500)]
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
