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
    parser.add_argument("--teacher", required=True, metavar="DIR", help="pipeline directory of the teacher")
    parser.add_argument("--student", required=True, metavar="DIR", help="pipeline directory of the student")
    parser.add_argument("--out", required=True, metavar="PNG", help="the picture to write")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a prompt (or class number); may be repeated"
    )
    parser.add_argument(
        "--rows", type=int, default=6, help="number of the protocol's prompts when no --prompt is given (6)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="noise seed of the first row, counting up (default: 0)"
    )
    parser.add_argument(
        "--teacher-steps", type=int, metavar="50", help="steps of the teacher (default: its own)"
    )
    parser.add_argument(
        "--teacher-guidance", type=float, metavar="G", help="guidance of the teacher (default: its own)"
    )
    parser.add_argument(
        "--student-steps", type=numbers(int), metavar="4,1", help="columns of the student (default: 4,1)"
    )
    parser.add_argument(
        "--before", action="store_true", help="add the teacher at the student's least steps as a last column"
    )
    parser.add_argument(
        "--smooth", action="store_true", help="enlarge bicubically instead of showing the pixels"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")


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
            class_number(text, len(names))
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


def class_number(text: str, classes: int) -> int:
    if not text.isdigit() or int(text) >= max(classes, 1):
        raise UserError(
            f"--prompt {text!r} is no class of this model; give a number from 0 to {max(classes, 1) - 1}."
        )
    return int(text)
