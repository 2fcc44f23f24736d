"""The networks that are served, in the thread that runs them: loading, swapping, and drawing a batch.

The only module of the app that knows torch, with `app.model`; the engine imports it in its worker thread, when
the page already answers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from app.catalog import Entry
from app.model import Model
from stepdistill.errors import UserError, quieten_libraries

log = logging.getLogger("stepdistill.app")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Students in memory at once, so that any two can be compared.
KEEP = 2


class Models:
    """What `load` and `draw` work with.

    Args:
        device: "auto" is CUDA where there is one. dtype: "auto" is float16 on CUDA and float32 elsewhere.
        attention: a name of `stepdistill.attention.BACKENDS`; one that cannot run fails `load`.
        threads: of torch on the CPU; None leaves torch's own choice.
        batch: images that the networks draw at once where sizes give different bits; None is 1 on the CPU, 4 on CUDA.
        decoder: directory of an AutoencoderTiny that few-step students are decoded by while somebody types.
        loader: (path, device=, dtype=) -> sampler; tests hand in their own.

    Raises:
        UserError: the device or the dtype is none, or is not here.
    """

    def __init__(
        self,
        *,
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        threads: int | None = None,
        batch: int | None = None,
        decoder: str | Path | None = None,
        loader: Callable[..., Any] | None = None,
    ) -> None:
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        cuda = self.device.startswith("cuda")
        if cuda and not torch.cuda.is_available():
            raise UserError(f"device={self.device} needs CUDA and this torch finds none; use --device cpu.")
        try:
            torch.device(self.device)
        except RuntimeError:
            raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}.") from None
        self.dtype = ("float16" if cuda else "float32") if dtype == "auto" else dtype
        if self.dtype not in DTYPES:
            raise UserError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {dtype!r}.")
        # Before anything of torch computes: the pool's size is read once per thread.
        if threads is not None:
            torch.set_num_threads(threads)
        quieten_libraries()
        self.attention, self.loader, self.decoder = attention, loader, decoder
        self.batch = batch or (4 if cuda else 1)
        # By id, the latest used last.
        self.loaded: dict[str, Model] = {}

    def load(self, entry: Entry) -> Model:
        """The model of a catalog entry, ready to draw. What was loaded before stays until this one is.

        Raises:
            UserError: it cannot be served.
        """
        if entry.id in self.loaded:
            self.loaded[entry.id] = self.loaded.pop(entry.id)
            return self.loaded[entry.id]
        loader = self.loader
        if loader is None:
            from stepdistill import load as loader
        sampler = loader(entry.path, device=self.device, dtype=DTYPES[self.dtype])
        model = Model(entry, sampler, self.attention, self.batch, self.decoder)
        model.warm_up()
        self.loaded[entry.id] = model
        entry.limits, entry.about = model.limits(), self.about() | model.about
        students = [other for other in self.loaded if other != "teacher"]
        for other in students[: max(0, len(students) - KEEP)]:
            self._drop(other)
        return model

    def _drop(self, name: str) -> None:
        model = self.loaded.pop(name)
        model.entry.state = "idle"
        del model
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def about(self) -> dict[str, Any]:
        """Machine and number format, plain values."""
        cuda = self.device.startswith("cuda")
        return {
            "device": self.device,
            "device_name": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "dtype": self.dtype,
            "threads": torch.get_num_threads(),
        }
