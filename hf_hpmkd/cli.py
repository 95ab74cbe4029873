"""The command line: parse and dispatch, no logic. What a handler needs is imported inside it, so that --help is quick.

Exit codes: 0 done; 1 the reader of the output has left; 2 a fault in what was asked, told in one message; 130 stopped
by Ctrl-C; 143 by SIGTERM, which job schedulers and containers send and which ends a run as Ctrl-C does.
"""

import argparse
import difflib
import json
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from hf_hpmkd.cli_line import add_line, file_and_words, installed_version, is_line, line_recipe, line_words
from hf_hpmkd.cli_measuring import add_measuring_commands

if TYPE_CHECKING:
    from hf_hpmkd.methods import Method
    from hf_hpmkd.recipe import Recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Under `accelerate launch` only rank 0 prints."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = build_parser()
    # argparse wants all positional words in one place; overrides may also stand behind an option.
    args, late = parser.parse_known_args(arguments)
    if strays := [word for word in late if word.startswith("-") or "=" not in word or not hasattr(args, "words")]:
        close = difflib.get_close_matches(strays[0].partition("=")[0], args.options)
        args.fail(f"unrecognized arguments: {' '.join(strays)}" + (f"; did you mean {close[0]}?" if close else ""))
    if late:
        args.words = [*args.words, *late]
    try:
        with _terminated_like_interrupted():
            args.handler(args)
    except KeyboardInterrupt as stop:
        _say(f"\nhpmkd: stopped. {args.after_stop or 'Nothing was left half done.'}", sys.stderr)
        return 143 if isinstance(stop, _Terminated) else 130
    except BrokenPipeError:
        # The reader of our output (head, less) has left. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not args.after_stop or getattr(args, "list", False) or getattr(args, "table", None):  # it only prints
            return 0
        with suppress(BrokenPipeError):  # stderr may have had the same reader
            _say(f"hpmkd: stopped, because the reader of its output has left. {args.after_stop}", sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        if args.debug:
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")  # the file that is missing may be missing on another machine alone
        print(f"hpmkd: {'' if rank == '0' else f'[rank {rank}] '}error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, too, leaves the record of what it ended. Signals are for the main thread to set."""

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _say(text: str, stream: TextIO | None = None) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=stream or sys.stdout, flush=True)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `handler`."""
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="hpmkd", description="HPM-KD: several large teachers into one small student, for Hugging Face."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {installed_version()}")
    parser.set_defaults(after_stop="")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(group: argparse._SubParsersAction, name: str, text: str, handler: object) -> argparse.ArgumentParser:
        made = group.add_parser(name, help=text, description=text, parents=[debug], allow_abbrev=False)
        made.set_defaults(handler=handler, fail=made.error, options=made._option_string_actions)
        return made

    one = command(commands, "distill", "Run a recipe, or one line of teachers, student and data set.", _distill)
    one.usage = (
        "hpmkd distill RECIPE [section.key=value ...] [--output DIR] [--overwrite] [--memory WHERE | --no-memory]\n"
        "       hpmkd distill --teacher A --teacher B {--student S | --compression X} --dataset D [--output DIR]\n"
        "                     [section.key=value ...]"
    )
    one.add_argument("words", nargs="*", metavar="RECIPE | section.key=value", help="recipe file or name; overrides")
    add_line(one)
    one.add_argument("--output", metavar="DIR", help="folder of the run")
    one.add_argument("--overwrite", action="store_true", help="replace a finished or different run in that folder")
    _add_run_memory(one)
    one.set_defaults(after_stop="The same command resumes the run from its last checkpoint.")

    one = command(commands, "quickstart", "A first distillation: digits, three teachers, two minutes.", _quickstart)
    one.add_argument("words", nargs="*", metavar="section.key=value", help="overrides")
    one.add_argument("--overwrite", action="store_true", help="replace a finished or different run in that folder")
    _add_run_memory(one)
    one.set_defaults(after_stop="The same command resumes the run from its last checkpoint.")

    one = command(commands, "init", "Write the recipe of such a line, with comments, to a file.", _init)
    one.add_argument("words", nargs="*", metavar="FILE | section.key=value", help="default: recipe.yaml; overrides")
    add_line(one, required=True)
    one.add_argument("--output", metavar="DIR", help="folder of the run")

    one = command(commands, "plan", "What a recipe would do: parameters, disk, memory, steps. Trains nothing.", _plan)
    one.add_argument("recipe", metavar="RECIPE")
    one.add_argument("words", nargs="*", metavar="section.key=value", help="overrides")
    one.add_argument(
        "--workers", metavar="N | A,B,C", help="simulate its jobs on so many workers (local data): 2, or 1,8"
    )
    one.add_argument("--gantt", type=Path, metavar="FILE", help="draw the last of these schedules (PNG)")

    one = command(commands, "compare", "Train several methods on equal terms over several seeds, and test.", _compare)
    _add_compare(one)
    one.set_defaults(after_stop="The same command goes on where this one stood.")

    one = command(commands, "ablate", "Train a recipe without each of its components, and compare.", _ablate)
    one.add_argument("recipe", metavar="RECIPE")
    one.add_argument("words", nargs="*", metavar="section.key=value", help="overrides")
    _add_comparison(one, "-ablation")
    one.set_defaults(after_stop="The same command goes on where this one stood.")

    recipe = commands.add_parser("recipe", help="Check, list or describe recipes.")
    group = recipe.add_subparsers(title="recipe commands", required=True, metavar="COMMAND")
    one = command(group, "check", "Tell every fault of a recipe.", _recipe_check)
    one.add_argument("recipe", metavar="FILE")
    one.add_argument("words", nargs="*", metavar="section.key=value", help="overrides")
    command(group, "schema", "Print the JSON Schema of recipes.", _recipe_schema)
    command(group, "list", "List the recipes that come with the package.", _recipe_list)

    cache = commands.add_parser("cache", help="The teacher outputs kept on disk.")
    group = cache.add_subparsers(title="cache commands", required=True, metavar="COMMAND")
    one = command(group, "ls", "List what is kept.", _cache_ls)
    _add_cache_dir(one)
    one = command(group, "verify", "Read every file and compare its checksum.", _cache_verify)
    _add_cache_dir(one)
    one = command(group, "clear", "Delete what is kept.", _cache_clear)
    _add_cache_dir(one)
    one.add_argument("--older-than", type=float, metavar="DAYS", help="only files not used for so many days")

    memory = commands.add_parser("memory", help="What earlier runs left: records, teacher outputs, models.")
    _add_memory_commands(memory.add_subparsers(title="memory commands", required=True, metavar="COMMAND"), command)

    add_measuring_commands(commands, command)

    one = command(commands, "report", "One Markdown table of finished runs, seeds of a recipe together.", _report)
    one.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or a run record (JSON)")

    one = command(commands, "push", "Publish a finished run: student, card, records.", _push)
    one.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    one.add_argument("repo_id", metavar="REPO_ID", help="user/name")
    one.add_argument("--public", action="store_true", help="create the repository as public (default: private)")
    return parser


def _add_run_memory(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--memory", metavar="WHERE", help="memory to use: a folder, or hf://datasets/USER/NAME")
    which.add_argument("--no-memory", action="store_true", help="neither read nor add to a memory")


def _add_memory_commands(group: argparse._SubParsersAction, command: Callable[..., argparse.ArgumentParser]) -> None:
    def add(name: str, text: str) -> argparse.ArgumentParser:
        made = command(group, name, text, _memory)
        made.set_defaults(job=name)
        made.add_argument(
            "--memory", type=Path, metavar="DIR", help="folder (default: $HPMKD_MEMORY, or in the HF home)"
        )
        return made

    add("ls", "List the runs that are remembered.")
    one = add("show", "Everything about one run or model.")
    one.add_argument("id", metavar="ID", help="the beginning of its id or key")
    one = add("push", "Add what is here to a shared memory, in one commit.")
    one.add_argument("where", metavar="WHERE", help="hf://datasets/USER/NAME, or USER/NAME")
    one.add_argument("ids", nargs="*", metavar="ID", help="only these runs, models and outputs (default: all runs)")
    one.add_argument("--models", action="store_true", help="also all models")
    one.add_argument("--outputs", action="store_true", help="also all teacher outputs")
    one.add_argument("--cache-dir", type=Path, metavar="DIR", help="folder of the outputs (default: the memory's)")
    one.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    one = add("pull", "Take what a shared memory has into this one.")
    one.add_argument("where", metavar="WHERE", help="hf://datasets/USER/NAME, or USER/NAME")
    one.add_argument("--models", action="store_true", help="also all models")
    one.add_argument("--outputs", action="store_true", help="also all teacher outputs; runs check them before use")
    one = add("merge", "Take what the memory in another folder has, or a folder of teacher outputs, into this one.")
    one.add_argument("folder", metavar="DIR", type=Path)
    add("verify", "Read every file and compare its checksum.")
    one = add("gc", "Clear away what stopped runs left, and what is above a limit.")
    one.add_argument("--limit-gb", type=float, metavar="GB", help="evict the least recently used above so many GB")
    add("stats", "Sizes, and how often runs found what they needed.")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "hpmkd compare RECIPE [section.key=value ...] [--methods A,B,C] [--method 'NAME: section.key=value ...'] "
        "[--seeds N]\n                     [--tune N] [--output DIR] [--jobs N] [--final] "
        "[--memory WHERE | --no-memory]\n"
        "       hpmkd compare --table DIR [--plot FILE]\n"
        "       hpmkd compare --list"
    )
    add = parser.add_argument
    add("words", nargs="*", metavar="RECIPE | section.key=value", help="recipe file or name; values for all methods")
    add(
        "--methods",
        metavar="A,B,C",
        help="methods by name (default: direct,kd-best,kd-mean,hpmkd; see --list); with --table: those to show side by "
        "side (default: all)",
    )
    add(
        "--method",
        action="append",
        default=[],
        metavar="'NAME: ...'",
        help="a method of your own, beside those of --methods: 'soft: distillation.temperature=8' changes the recipe, "
        "'soft: kd-mean distillation.temperature=8' builds on a method; give it once per method",
    )
    add("--baseline", metavar="NAME", help="method that the others are tested against (default: the first)")
    add(
        "--tune",
        type=int,
        default=0,
        metavar="N",
        help="full trainings that each method spends on choosing alpha, temperature and learning rate; of 6 and more a "
        "third or more tries the best again with other seeds (default: 0)",
    )
    _add_comparison(parser, "-compare")
    add(
        "--table",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="print the table of comparisons again (folders or files comparison.json)",
    )
    add("--plot", type=Path, metavar="FILE", help="with --table: also draw retention against compression, all in one")
    add("--list", action="store_true", help="list the methods that come with the package")


def _add_comparison(parser: argparse.ArgumentParser, suffix: str) -> None:
    add = parser.add_argument
    add("--seeds", default="3", metavar="N | A,B,C", help="3 (the default) takes 0,1,2; a comma makes it a list: 7,")
    add("--output", metavar="DIR", type=Path, help=f"folder (default: the recipe's, with {suffix}); it may be added to")
    add("--jobs", type=int, default=1, metavar="N", help="students trained at a time, in processes that share the CPU")
    add(
        "--teacher-seed",
        type=int,
        metavar="K",
        help="teachers trained on the spot are trained once, with this seed (default: anew for each seed)",
    )
    add("--final", action="store_true", help="also score on the test part; every look at it goes into the record")
    _add_run_memory(parser)


def _add_cache_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="folder (default: $HPMKD_CACHE, or the memory's)")


def _distill(args: argparse.Namespace) -> None:
    words = [*args.words, *_options_as_words(args)]
    if not is_line(args):
        from hf_hpmkd.recipe import load_recipe

        if not words or "=" in words[0]:
            raise ValueError(
                "distill needs a recipe (a file, or a name from `hpmkd recipe list`), or --teacher, --student (or "
                "--compression) and --dataset."
            )
        if args.output is not None:
            words.append(f"output.dir={json.dumps(args.output)}")
        recipe = load_recipe(words[0], words[1:], check_files=True)
        source = shlex.join(words)
    else:
        if words and "=" not in words[0]:
            raise ValueError(
                f"give a recipe ({words[0]}) or --teacher, --student (or --compression) and --dataset, not both. "
                "What a recipe says is changed with section.key=value: data.path=D, student.model=S, "
                "teachers.0.model=A."
            )
        recipe = line_recipe(args, _say, words, check_files=True)
        source = line_words(args, words)
    _run(recipe, source)


def _quickstart(args: argparse.Namespace) -> None:
    from hf_hpmkd.recipe import load_recipe

    words = [*args.words, *_options_as_words(args)]
    _run(load_recipe("quickstart", words, check_files=True), shlex.join(["quickstart", *words]))


def _options_as_words(args: argparse.Namespace) -> list[str]:
    return [*(["output.overwrite=true"] if args.overwrite else []), *_memory_words(args)]


def _memory_words(args: argparse.Namespace) -> list[str]:
    if args.no_memory:
        return ["memory.use=false"]
    return [] if args.memory is None else ["memory.use=true", f"memory.path={json.dumps(args.memory)}"]


def _run(recipe: "Recipe", source: str) -> None:
    from hf_hpmkd.distill import distill

    distill(recipe, source)


def _init(args: argparse.Namespace) -> None:
    from hf_hpmkd.recipe_text import recipe_text

    file, words = file_and_words(args.words)
    exists = f"{file} exists and is not overwritten. Remove it, or name another file."
    if os.path.lexists(file):
        raise ValueError(exists)
    recipe = line_recipe(args, _say, words)
    name = shlex.quote(file)
    header = f"Written by `hpmkd init`. See what it would do:  hpmkd plan {name}\nRun it:  hpmkd distill {name}"
    try:
        with open(file, "x", encoding="utf-8") as target:
            target.write(recipe_text(recipe, header))
    except FileExistsError:
        raise ValueError(exists) from None  # since then
    _say(f"Wrote {file}. Next:  hpmkd plan {name}")


def _plan(args: argparse.Namespace) -> None:
    from hf_hpmkd.recipe import load_recipe

    if args.gantt is not None and args.workers is None:
        raise ValueError("--gantt draws the schedule on so many workers: give --workers N too.")
    workers = args.workers.split(",") if args.workers is not None else []
    if not all(word.isdigit() and int(word) > 0 for word in workers):
        raise ValueError(f"--workers must be numbers from 1 on, as 2 or 1,8,64, got {args.workers!r}.")
    recipe = load_recipe(args.recipe, args.words)
    from hf_hpmkd.plan import plan

    _say(plan(recipe))
    if workers:
        from hf_hpmkd.plan_schedule import plan_schedule

        _say("\n" + plan_schedule(recipe, [int(word) for word in workers], args.gantt))


def _compare(args: argparse.Namespace) -> None:
    from hf_hpmkd.methods import choose_methods, describe_methods
    from hf_hpmkd.recipe import load_recipe

    if args.list:
        return _say(describe_methods())
    if args.table is not None:
        from hf_hpmkd.comparison_report import show

        shown = args.methods.split(",") if args.methods else None
        return _say(show(args.table, args.plot, args.baseline, shown))
    if not args.words or "=" in args.words[0]:
        raise ValueError("compare needs a recipe: a file, or a name from `hpmkd recipe list`.")
    methods = choose_methods(args.methods.split(",") if args.methods else None, args.method)
    words = [*args.words, *_memory_words(args)]
    recipe = load_recipe(words[0], words[1:], check_files=True)
    _run_comparison(args, recipe, methods, "-compare", words, args.baseline, args.tune)


def _ablate(args: argparse.Namespace) -> None:
    from hf_hpmkd.ablation import FULL, ablation_methods
    from hf_hpmkd.recipe import load_recipe

    words = [args.recipe, *args.words, *_memory_words(args)]
    recipe = load_recipe(words[0], words[1:], check_files=True)
    _run_comparison(args, recipe, ablation_methods(recipe), "-ablation", words, FULL)


def _run_comparison(
    args: argparse.Namespace,
    recipe: "Recipe",
    methods: "list[Method]",
    suffix: str,
    words: list[str],
    baseline: str | None,
    tune: int = 0,
) -> None:
    from hf_hpmkd.compare import Settings, compare

    folder = (args.output or Path(f"{recipe.output.dir}{suffix}")).expanduser()
    settings = Settings(methods, _seeds(args.seeds), folder, baseline, args.teacher_seed, args.final, args.jobs, tune)
    compare(recipe, settings, shlex.join(words), say=_say)


def _seeds(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if len(words) > 1 and not words[-1]:
        words.pop()
    if not all(word.isdigit() for word in words) or text.strip() == "0":
        raise ValueError(f"--seeds must be how many (3) or which (0,1,2; one alone as 7,), got {text!r}.")
    return [int(word) for word in words] if "," in text else list(range(int(text)))


def _recipe_check(args: argparse.Namespace) -> None:
    from hf_hpmkd.recipe import fingerprint, load_recipe

    recipe = load_recipe(args.recipe, args.words, check_files=True)
    _say(f"{args.recipe} is sound ({len(recipe.teachers)} teachers, fingerprint {fingerprint(recipe)[:12]}).")


def _recipe_schema(args: argparse.Namespace) -> None:
    from hf_hpmkd.recipe import recipe_schema

    _say(json.dumps(recipe_schema(), indent=2))


def _recipe_list(args: argparse.Namespace) -> None:
    from hf_hpmkd.recipe import bundled_recipes

    for name, path in bundled_recipes().items():
        comments = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        _say(f"{name:20} {comments[0] if comments else ''}")


def _cache_ls(args: argparse.Namespace) -> None:
    from hf_hpmkd.teacher_cache import TeacherCache

    _say(TeacherCache(args.cache_dir).ls())


def _cache_verify(args: argparse.Namespace) -> None:
    from hf_hpmkd.teacher_cache import TeacherCache

    _say(TeacherCache(args.cache_dir).verify())


def _cache_clear(args: argparse.Namespace) -> None:
    from hf_hpmkd.teacher_cache import TeacherCache

    _say(TeacherCache(args.cache_dir).clear(older_than=args.older_than))


def _memory(args: argparse.Namespace) -> None:
    from hf_hpmkd.memory_commands import run_command

    _say(run_command(args.job, args))


def _report(args: argparse.Namespace) -> None:
    from hf_hpmkd.run_record import RECORD_FILE, RunRecord
    from hf_hpmkd.run_summary import summary

    files = [run / RECORD_FILE if run.is_dir() else run for run in args.runs]
    _say(summary([RunRecord.load(file) for file in files]))


def _push(args: argparse.Namespace) -> None:
    from hf_hpmkd.hub_store import push_run

    _say(f"Published as {push_run(args.run_dir, args.repo_id, private=not args.public)}.")


if __name__ == "__main__":
    sys.exit(main())
