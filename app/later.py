"""Gradio's application, made when it is needed: importing gradio takes longer than everything else of the page does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI

    from app.engine import Engine


class Later:
    """What stands for Gradio's application until somebody asks for it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._lock = threading.Lock()
        self._built: tuple[Any, Any, FastAPI] | None = None
        self._begun: asyncio.Future | None = None
        self._life: asyncio.Task | None = None

    def prepare(self) -> tuple[Any, Any, FastAPI]:
        """Import gradio and build the page, once. For a thread: it takes seconds."""
        with self._lock:
            if self._built is None:
                offline()
                from app import ui

                self._built = ui.mounted(self.engine)
            return self._built

    async def get(self) -> tuple[Any, Any]:
        """The page (`gr.Blocks`) and Gradio's application of it, whose queue runs from here on."""
        if self._life is None:
            self._begun = asyncio.get_running_loop().create_future()
            self._life = asyncio.ensure_future(self._live(self._begun))
        # Shielded: the first who asked may go away, the others still wait.
        return await asyncio.shield(self._begun)

    async def _live(self, begun: asyncio.Future) -> None:
        """Keep what Gradio starts with its application until the server stops."""
        try:
            page, app, parent = await asyncio.to_thread(self.prepare)
            async with parent.router.lifespan_context(parent):
                begun.set_result((page, app))
                await asyncio.Event().wait()
        except Exception as error:
            self._life = None
            begun.set_exception(error)

    async def close(self) -> None:
        """End what Gradio started."""
        if self._life is not None:
            self._life.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._life


def offline() -> None:
    """Settings that Gradio and the hub client read on import, so that they ask no other host."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_SHARE"] = "False"
