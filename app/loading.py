"""The models that are served: where they lie, on which device, and what they can do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from app.request import Limits
from app.run import Finite
from stepdistill import assets
from stepdistill.errors import UserError, quieten_libraries

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Models:
    """A student and optionally its teacher, loaded by `load`.

    Args:
        student, teacher: directories; None is the embedded asset. `teacher=False` serves the student alone.
        device: "auto" is CUDA where there is one. dtype: "auto" is float16 on CUDA and float32 elsewhere.
        attention: a name of `stepdistill.attention.BACKENDS`; one that cannot run fails `load`.
        threads: of torch on the CPU; None leaves torch's own choice.
        loader: (path, device=, dtype=) -> sampler; tests hand in their own.

    Raises:
        UserError: the device or the dtype is none, or is not here.
    """

    def __init__(
        self,
        student: str | Path | None = None,
        teacher: str | Path | bool | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        threads: int | None = None,
        loader: Callable[..., Any] | None = None,
    ) -> None:
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.dtype = (
            ("float16" if self.device.startswith("cuda") else "float32") if dtype == "auto" else dtype
        )
        if self.dtype not in DTYPES:
            raise UserError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {dtype!r}.")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"device={self.device} needs CUDA and this torch finds none; use --device cpu.")
        try:
            torch.device(self.device)
        except RuntimeError:
            raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}.") from None
        self.paths = {
            model: Path(assets.path(model) if path in (None, True) else path)
            for model, path in {"student": student, "teacher": teacher}.items()
            if path is not False
        }
        self.samplers: dict[str, Any] = {}
        self.finite: dict[str, Finite] = {}
        self.limits: Limits | None = None
        self._attention = attention
        self._threads = threads
        self._loader = loader
        self._chosen: dict[str, Any] = {}

    def load(self) -> Limits:
        """Load both, in the thread that is going to run them."""
        # Before anything of torch computes: the pool's size is read once per thread.
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        from stepdistill.attention import choose

        quieten_libraries()
        loader = self._loader
        if loader is None:
            from stepdistill import load as loader
        for model, path in self.paths.items():
            sampler = loader(path, device=self.device, dtype=DTYPES[self.dtype])
            self.samplers[model] = sampler
            self._chosen[model] = choose(sampler.pipeline, self._attention)
            if self.device == "cpu":
                # A quarter of a small network's time there is Python's.
                sampler.trace()
            self.finite[model] = Finite(sampler)
        self.limits = self._read_limits()
        return self.limits

    def _read_limits(self) -> Limits:
        student, teacher = self.samplers["student"], self.samplers.get("teacher")
        if teacher is not None and tuple(teacher.resolution) != tuple(student.resolution):
            raise UserError(
                f"--teacher makes {teacher.resolution} images, --student {student.resolution}; give a pair."
            )
        return Limits(
            steps=tuple(student.steps or sorted({1, 2, 4, 8, student.default_steps})),
            default_steps=student.default_steps,
            teacher_steps=teacher.default_steps if teacher else 50,
            guidance_free=student.guidance_free,
            student_guidance=student.default_guidance,
            teacher_guidance=teacher.default_guidance if teacher else 1.0,
            resolution=tuple(student.resolution),
            conditions=student.conditions,
            class_names=tuple(student.class_names) if student.class_names else None,
            student=student.name,
            teacher=teacher.name if teacher else None,
        )

    def any_prompt(self) -> str:
        """A prompt that the loaded student can draw."""
        names = self.limits.class_names
        if self.limits.conditions == "class" and names:
            return names[0]
        return "a large red circle on a blue background"

    def report(self) -> dict[str, Any]:
        """Device and dtype and, once loaded, names, attention in effect and sizes. JSON values only."""
        about: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        if self.limits is None:
            return about
        about |= {
            "student": self.limits.student,
            "teacher": self.limits.teacher,
            "steps": list(self.limits.steps),
            "size": "{1}x{0}".format(*self.limits.resolution),
            "device_name": torch.cuda.get_device_name() if self.device.startswith("cuda") else "cpu",
            "threads": torch.get_num_threads() if self._threads is None else self._threads,
        }
        for model, chosen in self._chosen.items():
            prefix = "" if model == "student" else "teacher_"
            about[f"{prefix}attention"] = str(chosen).removeprefix("attention: ")
            about[f"{prefix}attention_why"] = chosen.why
            about[f"{model}_parameters"] = dict(self.samplers[model].parameters)
        return about
