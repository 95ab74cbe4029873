"""Keeps the level rule: imports go downwards only. Reads the source, imports nothing of ours."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_hpmkd"

# From the bottom up; inside a level from left to right. A file may import what stands before it, nothing else. A folder
# (tasks, models, metrics, components) is one word; what its files do among themselves is their matter, save components.
LEVELS = (
    ("vocabulary", "sklearn_estimators", "losses", "heads", "paired_tests", "meta_features", "run_environment",
     "progress", "run_record", "public_record", "memory_records", "memory_files", "memory_index", "hub_client", "tasks",
     "models", "metrics"),
    ("components", "engines", "expected_gain", "configuration_examples", "training_args", "dataset_rows",
     "data_source", "data_config", "data_columns", "data", "model_names", "classifiers", "model_shapes",
     "intermediate_models", "warm_start", "fitted_start", "model_cost",
     "model_identity"),
    (
        "class_names", "teacher_kinds", "sklearn_teachers", "teachers", "teacher_output_file", "foreign_outputs",
        "teacher_outputs", "teacher_cache", "gantt", "report", "run_summary", "comparison_record", "comparison_lines",
        "comparison_report", "auto_bench_report", "model_card", "stage_card", "run_folder", "hub_store", "memory_hub",
        "memory_commands",
    ),
    ("control_teachers", "distiller", "layer_hints", "trainer", "baselines", "stopped_training", "training_folder",
     "stacked_students"),
    (
        "recipe_faults", "recipe_rules", "search_budget", "recipe", "recipe_configuration", "recipe_text",
        "recipe_parts", "shrunk_student",
        "run_memory",
        "classifier_training", "job_graph", "evaluation", "kept_classifiers",
        "teacher_training", "run_context", "chain_stages", "chain_probes", "chain", "kept_student", "run_steps",
        "run_ahead", "launched_job", "student_features", "stacked_tries", "planned_tries", "quick_validation",
        "plan", "plan_schedule",
        "distill", "table_runs", "prior_build", "auto_bench",
        "methods", "ablation", "tuning", "compare_jobs", "compare", "bench", "bench_pipeline",
    ),
    ("cli_line", "cli_measuring", "cli", "__main__"),
)  # fmt: skip
ORDER = [unit for level in LEVELS for unit in level]

# Stricter than the order: these import this much of ours at most.
ONLY = {
    "vocabulary": set(),
    "sklearn_estimators": set(),
    "data_config": set(),
    "losses": {"vocabulary"},
    "heads": set(),
    "model_identity": set(),
    "paired_tests": set(),
    "meta_features": set(),
    "run_environment": set(),
    "run_record": set(),
    "tasks": {"vocabulary"},
    "models": set(),
    "model_names": {"vocabulary"},
    "warm_start": {"heads", "models", "tasks"},
    "fitted_start": {"models", "warm_start"},
    "layer_hints": {"heads", "tasks", "teacher_kinds", "teacher_outputs", "vocabulary", "warm_start"},
    "stopped_training": {"classifiers", "tasks"},
    "metrics": set(),
    "progress": set(),
    "public_record": {"run_record"},
    "memory_records": {"public_record", "run_record"},
    "memory_index": {"memory_records", "memory_files"},
    "memory_files": set(),
    "components": {"vocabulary", "losses", "memory_records", "memory_index", "memory_files"},
    "expected_gain": {"components", "meta_features"},
    "configuration_examples": {"components", "meta_features", "memory_records"},
    "engines": {"components"},
    "class_names": set(),
    "gantt": set(),
    "report": {"run_record", "gantt"},
    "run_summary": {"run_record", "report"},
    "comparison_record": {"run_record"},
    "auto_bench_report": {"components", "paired_tests", "report"},
    "comparison_lines": {"comparison_record", "paired_tests"},
    "comparison_report": {"comparison_record", "comparison_lines", "paired_tests", "gantt", "report", "run_record"},
    "model_card": {"public_record", "run_record", "report"},
    "stage_card": {"public_record", "run_record", "model_card"},
    "hub_client": set(),
    "hub_store": {"public_record", "run_record", "model_card", "hub_client"},
    "memory_hub": {"memory_records", "memory_files", "hub_client", "components"},
    "run_folder": {"run_record"},
    "recipe_faults": set(),
    "recipe_rules": {"vocabulary", "sklearn_estimators", "model_names", "recipe_faults"},
    "search_budget": set(),
    "stacked_students": {"losses", "models"},
    "__main__": {"cli"},
}

FILES = sorted(PACKAGE.rglob("*.py"))


def dotted_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def unit(name: str) -> str:
    return name.split(".")[0]


def our_imports(source: str, name: str = "x") -> set[str]:
    """Modules of ours, without the package's name, that a source imports anywhere, save for type checkers alone."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively (line {node.lineno}); write the whole name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {module.removeprefix("hf_hpmkd.") for module in found if module.startswith("hf_hpmkd.")}


def imports_of(file: Path) -> set[str]:
    return our_imports(file.read_text(encoding="utf-8"), dotted_name(file))


@pytest.mark.parametrize("file", FILES, ids=dotted_name)
def test_imports_go_downwards(file: Path) -> None:
    name = dotted_name(file)
    if name == "__init__":
        top = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
        assert {alias.name for node in top if node.module == "hf_hpmkd" for alias in node.names} <= {"models"}
        return
    assert unit(name) in ORDER, f"{name} has no level yet: give it a place in LEVELS"
    for imported in imports_of(file):
        if unit(imported) == unit(name):
            continue
        assert unit(imported) in ORDER, f"{name} imports {imported}, which has no level"
        assert ORDER.index(unit(imported)) < ORDER.index(unit(name)), (
            f"{name} imports {imported}, which stands above it"
        )
        if unit(name) in ONLY:
            assert unit(imported) in ONLY[unit(name)], f"{name} may import {ONLY[unit(name)] or 'nothing'} of ours"


def test_components_never_import_each_other() -> None:
    for file in (PACKAGE / "components").glob("*.py"):
        assert not [name for name in imports_of(file) if unit(name) == "components"], file.name


def test_the_trainer_knows_two_components() -> None:
    known = {name.split(".")[1] for unit in ("trainer", "distiller", "training_args")
             for name in imports_of(PACKAGE / f"{unit}.py") if name.startswith("components.")}  # fmt: skip
    assert known <= {"attention_ensemble", "temperature_scheduler"}


def test_model_files_stand_alone() -> None:
    """They are copied beside a saved model, where nothing of ours is installed."""
    for file in (PACKAGE / "models").glob("*.py"):
        if file.name != "__init__.py":
            assert not imports_of(file), file.name


def test_the_command_line_imports_only_python_at_the_top() -> None:
    more: dict[str, set[str]] = {
        "cli": {"hf_hpmkd"},
        "cli_line": set(),
        "cli_measuring": {"hf_hpmkd"},
        "recipe_faults": {"yaml", "pydantic"},
    }
    for name in more:
        body = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8")).body
        modules = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
        modules |= {str(node.module) for node in body if isinstance(node, ast.ImportFrom)}
        assert {module.split(".")[0] for module in modules} <= set(sys.stdlib_module_names) | more[name], name
        assert {module for module in modules if module.startswith("hf_hpmkd")} <= {
            "hf_hpmkd.cli_line",
            "hf_hpmkd.cli_measuring",
        }


def test_nothing_is_pickled() -> None:
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not names & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}, file.name
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"torch.save", "torch.load"}, file.name


def test_files_stay_readable() -> None:
    """Past about 450 lines a file usually holds two things."""
    long = {dotted_name(file): count for file in FILES if (count := len(file.read_text().splitlines())) > 480}
    assert not long
    assert not list(PACKAGE.rglob("utils.py"))


def test_every_file_opens_with_its_job() -> None:
    for file in FILES:
        assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), file


def test_the_reader_of_imports_sees_all_kinds() -> None:
    source = (
        "import hf_hpmkd.a\nfrom hf_hpmkd import b\nfrom hf_hpmkd.c import d\nimport os\n"
        "def f():\n    from hf_hpmkd.e import g\n"
        "if TYPE_CHECKING:\n    from hf_hpmkd.never import h\n"
    )
    assert {name.split(".")[0] for name in our_imports(source)} == {"a", "b", "c", "e"}
    with pytest.raises(AssertionError, match="imports relatively"):
        our_imports("from . import losses")
