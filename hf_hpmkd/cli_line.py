"""The line that stands in for a recipe: teachers, student and data set, or instead of the student how much smaller.

Parse and dispatch, as `cli` does.
"""

import argparse
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_hpmkd.recipe import Recipe


def add_line(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Adds the options of a line. required: whether all must be there."""
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


def positive(text: str, above: float, rule: str) -> float:
    """A number above a bound, for argparse, whose message is the rule and what arrived."""
    try:
        number = float(text)
    except ValueError:
        number = above
    if not above < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
    return number


def _times(text: str) -> float:
    return positive(text, 1, "a number above 1, as 10 for a tenth of the parameters")


def is_line(args: argparse.Namespace) -> bool:
    """Whether any option of a line was given."""
    return any(value is not None for value in (args.teacher, args.student, args.compression, args.dataset))


def line_recipe(
    args: argparse.Namespace, say: Callable[[str], None], words: Sequence[str] = (), check_files: bool = False
) -> "Recipe":
    """The recipe of a line and overrides. Where --compression is in the student's place, the data are opened and the
    student found and told. Raises ValueError (RecipeError) where something is missing or wrong.
    """
    from hf_hpmkd.recipe import RecipeError, recipe_from_line

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
    if said := [word for word in words if re.match(r"student\b", word.strip())]:
        raise ValueError(
            f"--compression finds the student, got {said[0]} too. Leave one of the two out, or name the student with "
            "--student."
        )
    from hf_hpmkd.recipe_rules import student_stand_in

    try:
        like_a_teacher = with_student(student_stand_in(args.teacher))
    except RecipeError as error:  # nobody has named the student
        others = [fault for fault in error.faults if not fault.startswith("student.")]
        raise RecipeError("the command line", others or error.faults) from None
    from hf_hpmkd.shrunk_student import shrunk_student

    student, told = shrunk_student(like_a_teacher, args.compression)
    say(told)
    return with_student(student)


def line_words(args: argparse.Namespace, words: Sequence[str]) -> str:
    """The line as a command has it, in one order."""
    options = [f"--teacher={teacher}" for teacher in args.teacher]
    student = f"--compression={args.compression:.15g}" if args.student is None else f"--student={args.student}"
    return shlex.join([*options, student, f"--dataset={args.dataset}", *words])


def installed_version() -> str:
    """As pip knows it; a checkout on a path has none."""
    try:
        return version("hf_hpmkd")
    except PackageNotFoundError:
        return "(not installed)"


def file_and_words(words: Sequence[str], default: str = "recipe.yaml") -> tuple[str, list[str]]:
    """The file to write, and the overrides, of the words of `init`. Raises ValueError for more than one file, and for
    one that is not called a YAML file: an override without its value would be another.
    """
    overrides = [word for word in words if re.match(r"[a-z_]+(\.\w+)*=", word)]
    files = [word for word in words if word not in overrides]
    if len(files) > 1:
        raise ValueError(f"init writes one file, got {' and '.join(files)}. The rest must be section.key=value.")
    file = next(iter(files), default)
    if not file.endswith((".yaml", ".yml")):
        raise ValueError(
            f"init writes a file whose name ends in .yaml or .yml, got {file}. An override is section.key=value."
        )
    return file, overrides
