"""The page as Gradio holds it, with a wall inside: whatever reaches a handler, no path of a client is opened."""

from __future__ import annotations

from typing import Any

import gradio as gr


class Page(gr.Blocks):
    """`gr.Blocks` that keeps its checks on when it is mounted in another application; `draws` is what its tabs draw."""

    def __init__(self, draws: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.draws = draws
        # Gradio compares the paths of a client with its cache only where `launch` has been called, which
        # never happens to a mounted page.
        self.has_launched = True

    async def preprocess_data(self, *args: Any, **kwargs: Any) -> Any:
        """The inputs of a handler. A value that its component cannot take is the client's mistake."""
        try:
            return await super().preprocess_data(*args, **kwargs)
        except gr.Error as error:
            raise gr.Error(error.message, print_exception=False) from None
        except Exception:
            raise gr.Error("a value of the form is not one it offers.", print_exception=False) from None
