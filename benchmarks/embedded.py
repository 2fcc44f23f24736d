"""Every method on the embedded teacher: FD ratio, seed diversity, attributes, CLIP score, CPU minutes, peak memory.

    python -m benchmarks.embedded                               two methods per family, then all other recipes
                                                                training/recipes/scenes_*.yaml, for hours
    python -m benchmarks.embedded dmd2 sim run.steps=600        some, with values of their recipes replaced
    python -m benchmarks.embedded --report                      measure and tabulate what has been trained so far
    python -m benchmarks.embedded --teacher transformer         training/recipes/transformer_*.yaml likewise

Training goes on where it was when the same command is given again, and so does measuring. Runs lie under
runs/embedded/<method>; results: benchmarks/embedded.json, .md and .png (all methods, same prompts and seeds), of the
transformer runs/embedded_transformer and benchmarks/embedded_transformer.*.
Teacher: 50 DDIM steps at the guidance with the least distance; same N, reference and seeds for all.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import students
from benchmarks.metered import account
from benchmarks.students import ROOT, read, write
from stepdistill.errors import UserError, cli_errors, nearest

TABLES = {"unet": "assets/teacher", "transformer": "assets/transformer"}
# Two of each family.
FIRST = ("cd", "lcm", "sim", "sid", "dmd2", "diff_instruct", "ladd", "add")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words", nargs="*", help="names after scenes_ (default: all), and section.key=value for their recipes"
    )
    parser.add_argument(
        "--teacher", choices=list(TABLES), default="unet", help="whose students (default: unet)"
    )
    parser.add_argument("--n", type=int, default=1000, help="samples measured (default: 1000)")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    table = Table(args.teacher)
    with cli_errors():
        every = students.distillations(table.teacher)
        overrides = [word for word in args.words if "=" in word]
        names = [word for word in args.words if "=" not in word]
        for name in names:
            if name not in every:
                wanted = students.recipe_of(name, table.teacher).name
                raise UserError(
                    f"there is no recipe {wanted} that distils {table.teacher}.{nearest(name, every)}"
                )
        first = [name for name in FIRST if name in every]
        for name in names or [*first, *(name for name in every if name not in first)]:
            if not args.report:
                table.train(name, overrides)
        if table.done():
            table.tabulate(args.n)


class Table:
    """The students of one embedded teacher."""

    def __init__(self, teacher: str) -> None:
        name = "embedded" if teacher == "unet" else f"embedded_{teacher}"
        self.teacher, self.runs = TABLES[teacher], ROOT / "runs" / name
        self.path = Path(__file__).with_name(f"{name}.json")

    def done(self) -> list[str]:
        """Methods whose students are there."""
        return sorted(path.parents[1].name for path in self.runs.glob("*/student/stepdistill.json"))

    def train(self, name: str, overrides: list[str]) -> None:
        """Run or continue one recipe, and keep what it cost and what was replaced in it."""
        out = self.runs / name
        status = students.train(
            students.recipe_of(name, self.teacher), out, overrides, account=out / "account"
        )
        write(out / "overrides.json", overrides)
        print(f"{name}: {'done' if status == 0 else f'failed with {status}'}", flush=True)

    def tabulate(self, n: int) -> None:
        """Measure all trained students beside the teacher in one evaluation, and draw them."""
        names = self.done()
        trained = [self.runs / name / "student" for name in names]
        found = students.measure(
            trained, self.runs / "results", n, "fd,diversity,clip,attributes", teacher=self.teacher
        )
        rows: dict[str, Any] = {}
        for path, by_steps in students.rows_of(found).items():
            run = Path(path).parent
            kept = {
                steps: {key: one[key] for key in (*students.KEPT, *students.SEEDS) if key in one}
                for steps, one in by_steps.items()
            }
            cost = account(run / "account")
            rows[run.name] = {
                "steps": kept,
                "recipe": str(students.recipe_of(run.name, self.teacher).relative_to(ROOT)),
                "iterations": students.last_step(run),
                "cpu_seconds": cost["cpu_seconds"],
                "peak_mib": cost["peak_mib"],
                "overrides": read(run / "overrides.json") or [],
            }
        (teacher,) = students.rows_of(found, "teacher").values()
        about = {
            key: found[key]
            for key in ("protocol", "companion", "n", "machine", "git_commit", "date")
            if key in found
        }
        self.save({"teacher": next(iter(teacher.values())), "students": rows, "about": about})
        shown = [(name, path, None) for name, path in zip(names, trained, strict=True)]
        students.draw([("teacher", ROOT / self.teacher, None), *shown], self.path.with_suffix(".png"))

    def save(self, table: dict[str, Any]) -> None:
        write(self.path, table)
        lines = students.markdown(sorted(table["students"].items()))
        changed = {name: row["overrides"] for name, row in table["students"].items() if row.get("overrides")}
        if changed:
            lines += [
                "",
                f"Recipes are training/recipes/{students.PREFIXES[self.teacher]}*.yaml, but for:",
                "",
            ]
            lines += [f"- {name}: `{' '.join(words)}`" for name, words in sorted(changed.items())]
        write(self.path.with_suffix(".md"), "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
