"""The page: a prompt, the student's image beside the teacher's, and how long each took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.engine import Engine
from app.handlers import Handlers
from app.layout import lay_out
from app.page import Page

HEAD = '<meta name="color-scheme" content="light dark">'


def build(engine: Engine) -> gr.Blocks:
    """The page of `engine`, which may still be loading."""
    with Page(
        title="stepdistill", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True
    ) as page:
        Handlers(engine, lay_out(engine)).connect(page)
    return page


def look() -> dict[str, Any]:
    """Theme, styles and head of the page. System fonts: nothing is fetched from another host."""
    theme = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
    )
    return {"theme": theme, "css": (Path(__file__).parent / "page.css").read_text(), "head": HEAD}
