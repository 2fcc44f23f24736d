"""Mutations of files: bytes at random, and what a person who means harm would write in their place."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

# A pickle that imports `canary`, and one that runs a program.
PICKLES = (b"ccanary\nX\n.", b"cos\nsystem\n(S'touch {trace}'\ntR.")
TEXTS = (
    "canary:X",
    "canary.X",
    "../../../../etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "~",
    "\x00",
    "\ud800",
    "\x1b[2J",
    "",
    " ",
    ".",
    "..",
    "x" * 5000,
    "http://127.0.0.1:9/x",
    "__import__('canary')",
    "${HOME}",
    "%s%n",
    "NaN",
    "None",
    "\u202e",
    "a\nb",
    "\\",
    "-1",
    "subprocess",
    "torch.load",
    "os.system",
    "$(touch {trace})",
    "é" * 300,
)
NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    255,
    65_536,
    10**6,
    10**9,
    2**31,
    2**32,
    2**53,
    2**63,
    2**64,
    10**30,
    -(10**9),
    -(2**63),
    1e308,
    1e-308,
    0.5,
    1.5,
    -0.0,
    float("nan"),
    float("inf"),
    float("-inf"),
)
KEYS = (
    "auto_map",
    "_class_name",
    "custom_pipelines",
    "__reduce__",
    "format",
    "kind",
    "name",
    "",
    "quantization_config",
    "_implementation",
)


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value, mostly a bad one."""
    kind = rng.randrange(10 if depth < 2 else 6)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return rng.choice(TEXTS)
    if kind < 6:
        return rng.choice((None, True, False, [], {}))
    if kind < 8:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 8:
        return {rng.choice(KEYS + TEXTS): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    deep: Any = rng.choice((1, "x"))
    for _ in range(rng.choice((50, 200, 900))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return deep


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    found, pending = [], [tree]
    while pending:
        part = pending.pop()
        keys = list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
        found += [(part, key) for key in keys]
        pending += [part[key] for key in keys]
    return found


def tree(rng: random.Random, found: Any) -> Any:
    """The JSON value with one to three places changed."""
    for _ in range(rng.randrange(1, 4)):
        spots = places(found)
        if not spots or rng.random() < 0.02:
            return value(rng)
        holder, key = rng.choice(spots)
        act = rng.randrange(8)
        if act == 0 and isinstance(holder, dict):
            del holder[key]
        elif act == 1 and isinstance(holder, dict):
            holder[rng.choice(KEYS + TEXTS)] = value(rng)
        elif act == 2 and isinstance(holder[key], (int, float)):
            holder[key] = rng.choice(NUMBERS)
        elif act == 3 and isinstance(holder[key], str):
            holder[key] = rng.choice(TEXTS)
        elif act == 4 and isinstance(holder[key], list):
            holder[key] = holder[key] * rng.choice((0, 2, 3000))
        else:
            holder[key] = value(rng)
    return found


def json_text(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.2:
        return text(rng, content)
    dumped = json.dumps(tree(rng, json.loads(content)))
    if rng.random() < 0.05:
        dumped = dumped.replace("1", "9" * 6000, 1)
    return dumped.encode("utf-8", "surrogatepass")


def raw(rng: random.Random, content: bytes) -> bytes:
    """Bits flipped, bytes cut out, doubled, put in or put last."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.5 else min(len(data), rng.randrange(1, 400))
        act = rng.randrange(7)
        if act < 2 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif act == 2:
            del data[at : at + rng.randrange(1, 40)]
        elif act == 3:
            data[at:at] = data[at : at + rng.randrange(1, 400)]
        elif act == 4:
            data[at : at + 8] = rng.choice(
                (b"\xff" * 8, b"\0" * 8, b"\x7f" * 8, struct.pack("<Q", 1 << rng.randrange(64)))
            )
        elif act == 5:
            data[at:at] = rng.choice((*PICKLES, b"\0" * 100, b"PK\x03\x04", b"%!PS-Adobe", b"\x80\x04."))
        elif rng.random() < 0.3:
            data = data[:at]
    return bytes(data) if rng.random() < 0.98 else rng.choice(PICKLES)


def text(rng: random.Random, content: bytes) -> bytes:
    """Lines dropped, doubled or replaced, and words of harm put anywhere."""
    if rng.random() < 0.3:
        return raw(rng, content)
    lines = content.decode("utf-8", "replace").split("\n")
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(lines))
        act = rng.randrange(6)
        if act == 0:
            lines[at] = rng.choice(TEXTS)
        elif act == 1:
            lines.insert(at, lines[at] * rng.choice((1, 200)))
        elif act == 2 and len(lines) > 1:
            del lines[at]
        elif act == 3:
            lines[at] = json.dumps(value(rng))
        else:
            cut = rng.randrange(len(lines[at]) + 1)
            lines[at] = (
                lines[at][:cut]
                + rng.choice((*TEXTS, '"', "{", "[" * 3000, "'", ",", ": ", "\t"))
                + lines[at][cut:]
            )
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def yaml_text(rng: random.Random, content: bytes) -> bytes:
    """As `text` does, with a changed tree or with what YAML alone can say."""
    import yaml

    act = rng.random()
    if act < 0.4:
        return text(rng, content)
    if act < 0.8:
        # JSON is YAML.
        return json.dumps(tree(rng, yaml.safe_load(content))).encode("utf-8", "surrogatepass")
    lines = content.decode().split("\n")
    said = rng.choice(
        (
            "!!python/object/apply:os.system ['touch {trace}']",
            "!!python/name:canary.X",
            "!!python/object/new:canary.X []",
            "&a [*a, *a]",
            "&a {<<: *a}",
            "!!binary AAAA",
            "!!set {a, b}",
            "!!omap [a: 1]",
            "2026-02-30",
            "9" * 6000,
            "0o777",
            "1:30:00",
            "? [a]",
            "*b",
            "[" + "&x [" * 60 + "]" * 61,
            "!!float nan",
            "!!timestamp 2026-01-01",
            "!<tag:yaml.org,2002:python/module:canary> ''",
        )
    )
    at = rng.randrange(len(lines))
    name = lines[at].split(":")[0] if ":" in lines[at] else "family"
    lines[at] = f"{name}: {said}"
    return "\n".join(lines).encode()


def safetensors(rng: random.Random, content: bytes) -> bytes:
    """A file of tensors with a changed header, of the right length or not, or changed bytes."""
    if rng.random() < 0.4:
        return raw(rng, content)
    (length,) = struct.unpack("<Q", content[:8])
    head = json.dumps(tree(rng, json.loads(content[8 : 8 + length]))).encode("utf-8", "surrogatepass")
    said = len(head) if rng.random() < 0.9 else rng.choice((0, 1, 1 << 30, 1 << 40, 1 << 63, len(head) + 1))
    return struct.pack("<Q", said % (1 << 64)) + head + content[8 + length :]


Harm = Callable[[random.Random, bytes], bytes]


def of(name: str) -> Harm:
    """What is done to a file of this name."""
    suffix = name.rpartition(".")[2]
    known = {
        "json": json_text,
        "yaml": yaml_text,
        "safetensors": safetensors,
        "txt": text,
        "csv": text,
        "jsonl": text,
    }
    return known.get(suffix, raw)
