"""The text of `gr.HTML`, the one component that would run a script in it: numbers and escaped names only."""

from __future__ import annotations

import html

from app.engine import Engine
from app.result import Result, Shot


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.9995 else f"{value * 1000:.0f} ms"


def steps(count: int) -> str:
    return f"{count} step" + ("s" if count != 1 else "")


def head(name: str, facts: str, part: float | None = None, stale: bool = False) -> str:
    """The line over an image: `part` of its run is done; `stale` dims an image of an earlier request."""
    bar = "" if part is None else f'<i class="bar"><i style="width:{100 * part:.0f}%"></i></i>'
    kind = "model-head stale" if stale else "model-head"
    return f'<div class="{kind}"><b>{name}</b><span>{html.escape(facts)}</span>{bar}</div>'


def facts(result: Result, model: str) -> str:
    shot = result.shots[model]
    return f"{steps(shot.steps)} · {_seconds(shot.total)}"


def hint() -> str:
    return '<p class="hint">Press Generate: both images start from the same noise.</p>'


def verdict(shots: dict[str, Shot]) -> str:
    """The line people look at, and under it where the time went, both models on one scale."""
    order = [shots[model] for model in ("teacher", "student") if model in shots]
    longest = max(shot.total for shot in order) or 1.0
    parts = [f"<span>{shot.model} {steps(shot.steps)} <b>{_seconds(shot.total)}</b></span>" for shot in order]
    if len(order) == 2:
        ratio = order[0].total / max(order[1].total, 1e-9)
        parts.append(f'<span class="times">{ratio:.{0 if ratio >= 10 else 1}f}×</span>')
    rows = "".join(_split(shot, longest) for shot in order)
    key = "".join(f'<i class="{name}"></i>{name} ' for name in ("text", "denoise", "decode"))
    return (
        f'<div class="line">{"".join(parts)}</div><div class="split">{rows}</div><div class="key">{key}</div>'
    )


def _split(shot: Shot, longest: float) -> str:
    stages = (("text", shot.text), ("denoise", shot.denoise), ("decode", shot.decode))
    bars = "".join(
        f'<i class="{name}" style="width:{100 * value / longest:.2f}%"></i>' for name, value in stages
    )
    sums = " + ".join(f"{name} {_seconds(value)}" for name, value in stages)
    return f'<div class="row"><em>{shot.model}</em><div class="track">{bars}</div><small>{sums}</small></div>'


def status(engine: Engine) -> str:
    """The pill in the corner."""
    text = {"ready": "ready", "failed": "not available", "closed": "stopped"}
    return f'<span class="pill {engine.state}">{text.get(engine.state, "loading the models")}</span>'


def footer(engine: Engine) -> str:
    about = engine.report()
    if about.get("problem"):
        return f'<div class="facts"><span class="bad">{html.escape(about["problem"])}</span></div>'
    parts = []
    for model in ("student", "teacher"):
        if about.get(model):
            count = sum(about.get(f"{model}_parameters", {}).values())
            name = model if about[model] == model else f"{model}: {about[model]}"
            parts.append(f"{name} ({_count(count)} parameters)" if count else name)
    parts.append(f"{about.get('device_name', about['device'])}, {about['dtype']}")
    if "attention" in about:
        parts.append(f"attention: {about['attention']}")
    if about["device"] == "cpu" and "threads" in about:
        parts.append(f"{about['threads']} thread" + ("s" if about["threads"] != 1 else ""))
    return '<div class="facts">' + "".join(f"<span>{html.escape(part)}</span>" for part in parts) + "</div>"


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number:,}"
