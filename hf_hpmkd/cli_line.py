"""The line that stands in for a recipe: teachers, student and data set, or instead of the student how much smaller.

Parse and dispatch, as `cli` does.
"""

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_hpmkd.recipe import Recipe


def add_line(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Adds the options of a line. required: whether teachers and data set must be there."""
    parser.add_argument(
        "--teacher", action="append", metavar="A", required=required, help="a teacher; give it once per teacher"
    )
    student = parser.add_mutually_exclusive_group(required=required)
    student.add_argument("--student", metavar="S", help="the small model")
    student.add_argument(
        "--compression",
        type=_times,
        metavar="X",
        help="instead of --student: a model like the largest network among the teachers with X times fewer parameters",
    )
    parser.add_argument("--dataset", metavar="D", required=required, help="Hub id, folder, file or sklearn:digits")


def _times(text: str) -> float:
    times = float(text)
    if not 1 < times < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 1, as in 10 for a tenth of the parameters, got {text}")
    return times


def is_line(args: argparse.Namespace) -> bool:
    """Whether any option of a line was given."""
    return any(value is not None for value in (args.teacher, args.student, args.compression, args.dataset))


def line_recipe(
    args: argparse.Namespace, say: Callable[[str], None], words: Sequence[str] = (), check_files: bool = False
) -> "Recipe":
    """The recipe of a line and overrides. Where --compression is in the student's place, the data are opened and the
    student found and told. Raises ValueError (RecipeError) where something is missing or wrong.
    """
    from hf_hpmkd.recipe import recipe_from_line

    given = {
        "--teacher": args.teacher,
        "--student (or --compression)": args.student or args.compression,
        "--dataset": args.dataset,
    }
    if missing := [option for option, value in given.items() if not value]:
        raise ValueError(f"distill without a recipe also needs {' and '.join(missing)}.")

    def with_student(student: str | Mapping[str, Any]) -> "Recipe":
        return recipe_from_line(args.teacher, student, args.dataset, args.output, words, check_files)

    if args.student is not None:
        return with_student(args.student)
    from hf_hpmkd.recipe_rules import student_stand_in

    like_a_teacher = with_student(student_stand_in(args.teacher))
    from hf_hpmkd.shrunk_student import shrunk_student

    student, told = shrunk_student(like_a_teacher, args.compression)
    say(told)
    return with_student(student)


def line_words(args: argparse.Namespace, words: Sequence[str]) -> str:
    """The line as it was written, in one order."""
    options = [f"--teacher={teacher}" for teacher in args.teacher]
    student = f"--compression={args.compression:g}" if args.student is None else f"--student={args.student}"
    return shlex.join([*options, student, f"--dataset={args.dataset}", *words])
