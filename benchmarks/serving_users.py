"""Users of a server, for benchmarks/serving.py, in a process of their own: so they take no time of the server's Python.

python benchmarks/serving_users.py URL steady ROUTE USERS SECONDS
python benchmarks/serving_users.py URL crowd USERS ADDRESSES
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from collections import Counter
from urllib.parse import urlsplit

import httpx

from app import png
from stepdistill import scenes


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


async def crowd(url: str, users: int, addresses: int) -> dict:
    """Users who all ask once, each by a connection of his own, from so many addresses of this machine.

    By sockets: a client library's own time for 500 connections would stand in the numbers.
    """
    counts: Counter[str] = Counter()
    latencies, refusals = [], []
    place = urlsplit(url)

    async def user(number: int) -> None:
        path, body = asked("v1", number, number)
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: {place.netloc}\r\ncontent-type: application/json\r\nconnection: close"
        began = time.perf_counter()
        try:
            own = (f"127.0.0.{1 + number % addresses}", 0)
            reader, writer = await asyncio.open_connection(place.hostname, place.port, local_addr=own)
            writer.write(f"{head}\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)
            whole = await asyncio.wait_for(reader.read(-1), 180)
            writer.close()
        except (OSError, TimeoutError) as error:
            counts[f"lost: {type(error).__name__}"] += 1
            return
        spent = time.perf_counter() - began
        lines, _, content = whole.partition(b"\r\n\r\n")
        status, *headers = lines.decode("latin-1").lower().split("\r\n")
        answer = httpx.Response(int((status.split() or ["", "0"])[1] or 0) or 599, content=content)
        if answer.status_code == 200:
            latencies.append(spent)
            counts["mixed up"] += not right("v1", answer, body)
        elif answer.status_code == 503 and any(line.startswith("retry-after:") for line in headers):
            refusals.append(spent)
        else:
            counts[f"lost: {answer.status_code}"] += 1

    await asyncio.gather(*(user(number) for number in range(users)))
    return {
        "users": users, "addresses": addresses, "answered": len(latencies), "refused_with_retry_after": len(refusals),
        "slowest_refusal": max(refusals, default=None), "lost": sum(n for name, n in counts.items() if "lost" in name),
        "mixed_up": counts["mixed up"], "p95": sorted(latencies)[int(0.95 * len(latencies))] if latencies else None,
    }  # fmt: skip


def main() -> None:
    url, kind, *rest = sys.argv[1:]
    if kind == "steady":
        said = asyncio.run(steady(url, rest[0], int(rest[1]), float(rest[2])))
    else:
        said = asyncio.run(crowd(url, int(rest[0]), int(rest[1])))
    print(json.dumps(said))


if __name__ == "__main__":
    main()
