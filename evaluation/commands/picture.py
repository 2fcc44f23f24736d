"""`python -m evaluation picture`."""

from __future__ import annotations

import argparse
from typing import Any

from evaluation.commands.common import numbers, writable
from stepdistill.errors import UserError, quieten_libraries

TEXT = "Draw teacher and student side by side on the same prompts and noise."
EXAMPLES = """\
example:
  python -m evaluation picture --teacher assets/teacher --student assets/student --out picture.png --before \\
      --prompt "a small red circle above a large blue square on a yellow background" \\
      --prompt "a large green star on a black background" """


def add(parser: argparse.ArgumentParser) -> None:
    for name, text in (("teacher", "teacher"), ("student", "student")):
        parser.add_argument(
            f"--{name}", required=True, metavar="DIR", help=f"pipeline directory of the {text}"
        )
    parser.add_argument("--out", required=True, metavar="PNG", help="the picture to write")
    options: dict[str, tuple[dict[str, Any], str]] = {
        "prompt": ({"action": "append", "metavar": "TEXT"}, "a prompt (or class number); may be repeated"),
        "rows": (
            {"type": int, "default": 6},
            "number of the protocol's prompts when no --prompt is given (6)",
        ),
        "seed": ({"type": int, "default": 0}, "noise seed of the first row, counting up (default: 0)"),
        "teacher-steps": ({"type": int, "metavar": "50"}, "steps of the teacher (default: its own)"),
        "teacher-guidance": ({"type": float, "metavar": "G"}, "guidance of the teacher (default: its own)"),
        "student-steps": ({"type": numbers(int), "metavar": "4,1"}, "columns of the student (default: 4,1)"),
        "before": ({"action": "store_true"}, "add the teacher at the student's least steps as a last column"),
        "smooth": ({"action": "store_true"}, "enlarge bicubically instead of showing the pixels"),
        "device": ({"default": "cpu"}, "cpu (default), cuda, ..."),
    }
    for name, (how, text) in options.items():
        parser.add_argument(f"--{name}", help=text, **how)


def do(args: argparse.Namespace) -> None:
    from evaluation import picture
    from evaluation.plan import load_pipeline
    from evaluation.protocol import get_protocol

    target = writable(args.out)
    quieten_libraries()
    if args.rows < 1:
        raise UserError(f"--rows must be at least 1, got {args.rows}.")
    teacher, student = (load_pipeline(path, args.device) for path in (args.teacher, args.student))
    if teacher.conditions != student.conditions:
        raise UserError(
            f"the teacher takes a {teacher.conditions}, the student a {student.conditions}; compare others."
        )
    if teacher.conditions == "prompt":
        prompts: list[Any] = args.prompt or get_protocol("scenes-2k").prompts(args.rows)
        captions = prompts
    else:
        names = teacher.class_names or ("",)
        prompts = [
            _class_number(text, len(names))
            for text in args.prompt or map(str, range(min(args.rows, len(names))))
        ]
        captions = [names[number] for number in prompts]
    columns = picture.columns_of(
        teacher, student, teacher_steps=args.teacher_steps, teacher_guidance=args.teacher_guidance,
        student_steps=args.student_steps, before=args.before,
    )  # fmt: skip
    images, seconds = picture.draw(columns, prompts, range(args.seed, args.seed + len(prompts)))
    headings = [column.heading for column in columns]
    picture.save(picture.compose(images, seconds, captions, headings, smooth=args.smooth), target)
    print(f"written: {target}")


def _class_number(text: str, classes: int) -> int:
    if not text.isdigit() or int(text) >= max(classes, 1):
        raise UserError(
            f"--prompt {text!r} is no class of this model; give a number from 0 to {max(classes, 1) - 1}."
        )
    return int(text)
