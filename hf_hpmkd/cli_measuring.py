"""Commands that measure: `bench`, and `prior`, which is made of measurements. Parse and dispatch, as `cli` does."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from hf_hpmkd.cli_line import positive

Command = Callable[..., argparse.ArgumentParser]
"""`(group, name, help, handler)` makes one command."""


def add_measuring_commands(commands: argparse._SubParsersAction, command: Command) -> None:
    """Adds `bench` and `prior` to the commands."""
    bench = commands.add_parser("bench", help="Measure.")
    group = bench.add_subparsers(title="bench commands", required=True, metavar="COMMAND")
    one = command(group, "trainer", "Time per step of HPMKDTrainer against Trainer.", _bench_trainer)
    one.add_argument("--output", type=Path, metavar="FILE", help="also write the figures to this JSON file")
    one.add_argument("--steps", type=int, default=200, help="optimizer steps per side (default: 200)")

    one = command(
        group, "pipeline", "Runs by one process and by workers; the schedules of the simulator.", _bench_pipeline
    )
    one.add_argument("recipe", metavar="RECIPE")
    one.add_argument("words", nargs="*", metavar="section.key=value", help="overrides")
    one.add_argument("--output", type=Path, metavar="FILE", help="also write the figures to this JSON file")
    one.add_argument("--turns", type=int, default=1, help="runs per side; 0 leaves them out (default: 1)")

    one = command(group, "auto", "The adaptive configuration against fixed values and a grid.", _bench_auto)
    _add_tables(one)
    one.add_argument("--seeds", type=int, default=3, help="seeds per table (default: 3)")
    one.add_argument("--grid-seeds", type=int, default=3, help="of these, also train the grid (default: 3)")
    one.add_argument(
        "--mode",
        type=_mode,
        default="fast",
        metavar="fast | thorough | MINUTES",
        help="budget of the tries (default: fast)",
    )
    one.add_argument("--prior", type=Path, metavar="FILE", help="prior to judge (default: the one of the package)")
    one.add_argument("--records", default="all", metavar="all,0,50", help="also judge with so many runs of the prior")
    one.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder; the same command goes on in it")
    one.set_defaults(after_stop="The same command goes on where this one stood.")

    prior = commands.add_parser("prior", help="What the adaptive configuration knows before the first run.")
    group = prior.add_subparsers(title="prior commands", required=True, metavar="COMMAND")
    one = command(group, "build", "Make a prior by short real runs over tables, images or texts.", _prior_build)
    _add_tables(one)
    one.add_argument(
        "--runs",
        type=int,
        default=1_600,
        metavar="N",
        help="runs to have at the end, the contenders on every table first (default: 1600)",
    )
    one.add_argument("--output", type=Path, required=True, metavar="FILE", help="Parquet file; goes on if it is there")
    one.set_defaults(after_stop="The same command goes on where this one stood.")
    one = command(group, "show", "Where a prior comes from.", _prior_show)
    one.add_argument("file", nargs="?", type=Path, metavar="FILE", help="prior (default: the one of the package)")


def _mode(text: str) -> str | float:
    if text in ("fast", "thorough"):
        return text
    return positive(text, 0, "fast, thorough, or minutes above 0")


def _add_tables(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="folder with a folder of Parquet files per table"
    )
    parser.add_argument("--tables", metavar="A,B", help="only these tables (default: all)")


def _bench_trainer(args: argparse.Namespace) -> None:
    from hf_hpmkd.bench import bench_trainer

    bench_trainer(args.output, steps=args.steps)


def _bench_pipeline(args: argparse.Namespace) -> None:
    from hf_hpmkd.bench_pipeline import bench_pipeline

    bench_pipeline(args.recipe, args.words, args.output, args.turns)


def _bench_auto(args: argparse.Namespace) -> None:
    from hf_hpmkd.auto_bench import Settings, bench_auto

    counts = [None, *(int(word) for word in args.records.split(",") if word != "all")]
    tables = args.tables.split(",") if args.tables else None
    settings = Settings(
        args.data, args.output, tables, args.seeds, args.grid_seeds, args.mode, args.prior, records=counts
    )
    print(bench_auto(settings, say=print))


def _prior_build(args: argparse.Namespace) -> None:
    from hf_hpmkd.prior_build import build_prior

    tables = args.tables.split(",") if args.tables else None
    print(f"{args.output} has {build_prior(args.data, args.runs, args.output, tables, say=print)} runs.")


def _prior_show(args: argparse.Namespace) -> None:
    from hf_hpmkd.configuration_examples import provenance

    print(json.dumps(provenance(args.file), indent=1))
