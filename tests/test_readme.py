"""README and the results beside the records tell the truth: tables are those of the records, commands, recipes and
links exist.
"""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

import hf_hpmkd
from hf_hpmkd.auto_bench_report import growth, totals
from hf_hpmkd.auto_bench_report import summary as auto_summary
from hf_hpmkd.bench import bench_table
from hf_hpmkd.bench_pipeline import pipeline_table
from hf_hpmkd.cli import build_parser
from hf_hpmkd.comparison_lines import common_part
from hf_hpmkd.comparison_record import ComparisonRecord
from hf_hpmkd.comparison_report import against, overview, table
from hf_hpmkd.comparison_report import summary as comparison_summary
from hf_hpmkd.methods import choose_methods
from hf_hpmkd.recipe import load_recipe, recipe_from_line
from hf_hpmkd.recipe_rules import student_stand_in
from hf_hpmkd.run_record import RunRecord
from hf_hpmkd.run_summary import memory_table, summary

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "model_cards" / "README.md").read_text(encoding="utf-8")
LOCAL_PATH = re.compile(r"[\"' ]/(?:work|home|root|tmp|mnt)/")
COMPARISONS = sorted((ROOT / "model_cards" / "comparisons").glob("*.json"))
CHAINS = sorted((ROOT / "model_cards" / "chains").glob("*.json"))
ABLATIONS = sorted((ROOT / "model_cards" / "ablations").glob("*.json"))
TRIED = sorted((ROOT / "model_cards" / "tried").glob("*.json"))
FULL_SCHEDULE = ROOT / "model_cards" / "full_schedule" / "cifar10.json"
MEMORY_RUNS = sorted((ROOT / "model_cards" / "memory").glob("*.json"))
# What the README shows of the comparisons, against hpmkd and against cold.
COMPARED = ("hpmkd", "adaptive", "direct", "kd-best", "kd-mean", "takd", "ca-mkd", "dkd", "dist", "standardized-kd",
            "ctkd", "dml", "paper", "direct-warm")  # fmt: skip
CHAINED = ("cold", "hpmkd", "chain-previous", "chain-dense", "chain-warm", "chain-warm-previous", "long")
RECORDS = sorted((ROOT / "model_cards" / "runs").glob("*.json"))


def block(name):
    found = re.findall(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", README + RESULTS, re.DOTALL)
    assert len(found) == 1, f"{name} stands {len(found)} times in README and model_cards/README.md"
    return found[0]


def test_the_results_are_those_of_the_run_records():
    assert RECORDS
    assert block("results") == summary([RunRecord.load(path) for path in RECORDS])


def test_the_costs_are_those_of_the_bench_record():
    record = json.loads((ROOT / "model_cards" / "bench_trainer.json").read_text(encoding="utf-8"))
    assert block("bench") == bench_table(record)


def test_the_schedules_are_those_of_the_pipeline_record():
    record = json.loads((ROOT / "model_cards" / "bench_pipeline.json").read_text(encoding="utf-8"))
    assert block("pipeline") == pipeline_table(record)


def test_the_judgement_of_the_adaptive_configuration_is_that_of_its_record():
    folder = ROOT / "model_cards" / "auto"
    results = json.loads((folder / "bench.json").read_text(encoding="utf-8"))["results"]
    assert block("auto") == totals(results)
    grown, *others = (
        json.loads((folder / f"bench_{name}.json").read_text(encoding="utf-8"))["results"]
        for name in ("growth", "long_ranked", "long_calibrated", "long_grid", "minutes")
    )
    shown = f"{auto_summary(results)}\n\n## As the prior grows\n\n{growth(grown)}\n"
    titles = (
        "Images and a text",
        "Images and a text, with a grid",
        "Images and a text, at smaller rates, with a grid",
        "The tables with two minutes of tries",
    )
    for title, of in zip(titles, others, strict=True):
        shown += f"\n## {title}\n\n{auto_summary(of)}\n"
    assert (folder / "README.md").read_text(encoding="utf-8").split("\n\n", 2)[2] == shown


def test_the_comparisons_are_those_of_their_records():
    assert COMPARISONS
    records = [against(ComparisonRecord.load(path), "hpmkd") for path in COMPARISONS]
    assert block("comparisons") == overview(records, common_part(records), COMPARED)


def test_the_full_schedule_is_that_of_its_record():
    assert block("full-schedule") == table(against(ComparisonRecord.load(FULL_SCHEDULE), "hpmkd"), "test")


def test_the_chains_are_those_of_their_records():
    records = [against(ComparisonRecord.load(path), "cold") for path in CHAINS]
    assert block("chain") == overview(records, common_part(records), CHAINED)


@pytest.mark.parametrize("paths", [COMPARISONS, CHAINS, ABLATIONS], ids=["comparisons", "chains", "ablations"])
def test_the_tables_beside_the_records_are_theirs(paths):
    text = (paths[0].parent / "README.md").read_text(encoding="utf-8")
    tables = [f"## {path.stem}\n\n{comparison_summary(ComparisonRecord.load(path))}" for path in paths]
    assert text.split("\n\n", 2)[2] == "\n\n".join(tables) + "\n"


def test_the_tables_of_the_log_are_those_of_their_records():
    log = (ROOT / "model_cards" / "LOG.md").read_text(encoding="utf-8")
    found = dict(re.findall(r"<!-- tried/(\S+) -->\n(.*?)\n<!-- /tried/\1 -->", log, re.DOTALL))
    assert set(found) == {path.stem for path in TRIED}
    for path in TRIED:
        assert found[path.stem] == table(ComparisonRecord.load(path), "validation")


def test_what_the_memory_spared_is_what_its_runs_recorded():
    assert block("memory") == memory_table([RunRecord.load(path) for path in MEMORY_RUNS])


@pytest.mark.parametrize(
    "path",
    [*COMPARISONS, *CHAINS, *ABLATIONS, *TRIED, FULL_SCHEDULE],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_published_comparisons_tell_no_paths_and_their_commit(path):
    assert not LOCAL_PATH.search(path.read_text(encoding="utf-8"))
    results = ComparisonRecord.load(path).results
    assert results and all(one.commit and "+" not in one.commit for one in results)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_published_records_tell_no_paths(path):
    text = path.read_text(encoding="utf-8")
    assert not LOCAL_PATH.search(text)
    assert RunRecord.load(path).commits["hf_hpmkd"]


@pytest.mark.parametrize(
    "page",
    sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *ROOT.glob("model_cards/**/*.md"))),
)
def test_links_lead_to_files_and_headings(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text)
    for path, heading in targets:
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if heading:
            there = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", line).replace(" ", "-").lower() for line in there}


def test_commands_parse_and_name_recipes_that_exist():
    lines = [line.split("   #")[0] for line in re.findall(r"^(?:.* && )?(hpmkd [^\n]+)$", README, re.MULTILINE)]
    assert len(lines) >= 6
    parser = build_parser()
    for line in lines:
        args = parser.parse_args(shlex.split(line)[1:])
        overrides = [word for word in getattr(args, "words", []) if "=" in word]
        if getattr(args, "dataset", None):
            student = args.student or student_stand_in(args.teacher)  # what --compression finds takes the data
            recipe_from_line(args.teacher, student, args.dataset, overrides=overrides)
        elif named := [word for word in getattr(args, "words", []) if "=" not in word]:
            if named == ["recipe.yaml"]:  # what the README's `hpmkd init` wrote
                recipe_from_line(["USER/CLASSIFIER"], "timm/resnet18", "USER/DATA", overrides=overrides)
            else:
                load_recipe(*named, overrides)
        if hasattr(args, "methods"):
            choose_methods(args.methods.split(",") if args.methods else None, args.method)


def test_the_blocks_of_python_are_python_and_import_what_there_is():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        lines = [node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert lines
        exec(compile(ast.Module(lines, []), "README", "exec"), {})
    with pytest.raises(AttributeError, match="no attribute 'HPMKDTraner'"):
        getattr(hf_hpmkd, "HPMKDTraner")  # noqa: B009
    assert all(getattr(hf_hpmkd, name) for name in hf_hpmkd.__all__)


@pytest.mark.parametrize(
    ("prefix", "recipe"),
    [
        ("quickstart", "quickstart"),
        ("cifar10", "cifar10_resnet8"),
        ("adult", "adult"),
        ("trec6", "trec6"),
        ("fashion", "fashion_mnist"),
    ],
)
def test_a_recipe_expects_what_its_records_gave(prefix, recipe):
    records = [RunRecord.load(path) for path in RECORDS if path.stem.startswith(f"{prefix}-")]
    cells = [cell.strip() for cell in summary(records).splitlines()[2].strip("|").split("|")]
    direct, distilled, _, kept, _, seeds = cells[4:]
    expected = (
        f"# Expected:  test accuracy {kept} % (distilled {distilled} %, direct training {direct} %), seeds {seeds}\n"
    )
    assert expected in (ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
