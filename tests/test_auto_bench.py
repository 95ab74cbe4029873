"""The judgement of the adaptive configuration: its sums by hand, and one small real run."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from datasets import ClassLabel, Dataset
from PIL import Image
from sklearn.datasets import load_wine

from hf_hpmkd import auto_bench, prior_build
from hf_hpmkd.auto_bench import Settings, bench_auto
from hf_hpmkd.auto_bench_report import summary
from hf_hpmkd.classifier_training import student_schedule, train_or_load
from hf_hpmkd.components.adaptive_configuration import DIRECT, FASTER, SPACE, Configuration, Example
from hf_hpmkd.configuration_examples import SCHEMA, prior_row, provenance, read_prior
from hf_hpmkd.distill import student_builder
from hf_hpmkd.expected_gain import by_setting, contended
from hf_hpmkd.prior_build import build_prior
from hf_hpmkd.recipe import recipe_from_line
from hf_hpmkd.recipe_configuration import overrides_of, with_values
from hf_hpmkd.recipe_rules import family
from hf_hpmkd.table_runs import TableRuns, kind_of


def result(data: str, seed: int, direct: float, auto: float, grid: list[tuple[float, float]]) -> dict:
    about = {
        "distils": auto != direct,
        "chosen": "direct training" if auto == direct else "alpha 0.9, T 4, forward_kl, gate mixture",
        "trial_seconds": 2.0,
        "deciding_seconds": 0.5,
        "extra_steps": 100,
        "trials": [],
    }
    methods = {
        "direct": {"accuracy": direct},
        "faster": {"accuracy": direct + 0.01},
        "fixed": {"accuracy": direct - 0.02},
        "auto": {"accuracy": auto, **about, "total_steps": 100},
    }
    cells = [{"accuracy": accuracy, "validation": validation} for accuracy, validation in grid]
    return {"data": data, "seed": seed, "test_rows": 100, "train_rows": 1_000, "methods": methods, "grid": cells}


def test_gains_and_regrets_are_those_done_by_hand() -> None:
    grid = [(0.80, 0.5), (0.90, 0.9)]  # the first cell is direct training; with one more to try, random finds the best
    results = [result("a", 0, 0.80, 0.85, grid), result("a", 1, 0.80, 0.85, grid), result("b", 0, 0.80, 0.80, grid)]
    text = summary(results)
    row_a = next(line for line in text.splitlines() if line.startswith("| a "))
    assert [cell.strip() for cell in row_a.strip("|").split("|")] == [
        "a", "2", "80.00", "+1.00", "-2.00", "+5.00 (+5.00 to +5.00)", "2 of 2",
        "10.00", "9.00", "12.00", "5.00", "0.00", "0.00",
    ]  # fmt: skip
    assert "Mean gain of auto +2.50 (" in text and "2 data sets, 3 runs" in text
    assert "Mean gain of fixed -2.00" in text
    assert (
        "Of 3 runs 2 kept a distilled student, and gained +5.00 there; 1 chose plain direct training at once." in text
    )
    assert "(3 runs): direct 10.00, faster 9.00, fixed 12.00, auto 7.50, random 0.00, whole grid 0.00; of" in text
    assert "On 1 of 1 sets the 95 % interval" in text  # b has one seed, and no interval


def test_a_worse_cell_on_validation_rows_is_not_found_by_random_search() -> None:
    text = summary([result("a", 0, 0.80, 0.80, [(0.80, 0.9), (0.90, 0.5)])])
    assert (
        "random 10.00, whole grid 10.00" in text
        and "Of 1 runs 0 kept a distilled student; 1 chose plain direct training at once." in text
    )


def test_a_distilled_student_that_was_given_up_counts_as_none() -> None:
    given_up = result("a", 1, 0.80, 0.80, [(0.80, 0.9), (0.90, 0.5)])
    given_up["methods"]["auto"] |= {"distils": True, "kept": "direct", "chosen": "alpha 0.9, T 4"}
    text = summary([result("a", 0, 0.80, 0.84, [(0.80, 0.9), (0.90, 0.5)]), given_up])
    assert "| 1 of 2 |" in text
    assert "Of 2 runs 1 kept a distilled student, and gained +4.00 there; 1 chose something else and gave it" in text
    assert "at once" not in text


def test_gains_are_told_for_the_sets_with_enough_rows_alone() -> None:
    grid = [(0.80, 0.9), (0.90, 0.5)]
    large, small = result("large", 0, 0.80, 0.81, grid), result("small", 0, 0.20, 0.80, grid)
    assert "training rows and more" not in summary([large, small])
    small["train_rows"] = 999
    text = summary([large, small])
    assert "Mean gain of auto +30.50 (" in text
    assert "On the 1 sets with 1,000 training rows and more: faster +1.00, fixed -2.00, auto +1.00." in text


def test_it_is_told_what_the_proof_costs() -> None:
    grid = [(0.80, 0.9), (0.90, 0.5)]
    good, bad = result("a", 0, 0.80, 0.80, grid), result("b", 0, 0.80, 0.80, grid)
    good["methods"]["auto"] |= {"kept": "direct", "unproven": 0.86}
    bad["methods"]["auto"] |= {"kept": "direct", "unproven": 0.78}
    text = summary([good, bad, result("c", 0, 0.80, 0.79, grid)])
    assert "Had every student been kept, the mean gain would be +1.00 (" in text  # of +6, -2 and -1
    assert "with a loss in 2 runs instead of 1." in text


def test_what_tries_add_is_told_without_what_went_on() -> None:
    first, second = result("a", 0, 0.80, 0.84, []), result("b", 0, 0.80, 0.80, [])
    winner = {"name": first["methods"]["auto"]["chosen"], "seconds": 4.0}
    first["methods"]["auto"]["trials"] = [
        {"name": "given up", "seconds": 1.0}, {"name": "second", "seconds": 2.0}, winner,
        {"name": "second", "seconds": 5.0}, winner | {"seconds": 9.0},
    ]  # fmt: skip
    second["methods"]["auto"]["trials"] = [{"name": "given up", "seconds": 3.0}]
    told = "Tries took 2.0 s a run, 4.5 s of it (at most 6.0) on tries that did not go on"  # 1 + 5 beside the winner, 3
    assert told in summary([first, second])
    first["methods"]["auto"]["seeds"] = 4  # many at once, of which none goes on: the winner's 9 too
    assert "9.0 s of it (at most 15.0) on tries that did not go on" in summary([first, second])


def test_losses_are_told_from_what_one_test_row_may_do() -> None:
    grid = [(0.80, 0.9), (0.90, 0.5)]
    lost = [result("lost", seed, 0.80, 0.788, grid) for seed in range(3)]  # a row of the hundred is 1 point
    row = [result("row", seed, 0.80, 0.791, grid) for seed in range(3)]
    assert "On 1 of 2 sets" in summary([*lost, *row]) and "; not on lost." in summary([*lost, *row])


def test_regrets_are_of_the_seeds_that_trained_the_grid() -> None:
    grid = [(0.80, 0.9), (0.90, 0.5)]
    faster = result("a", 1, 0.10, 0.10, [])
    faster["methods"]["auto"]["chosen"] = "direct training, learning_rate x2"
    text = summary([result("a", 0, 0.80, 0.88, grid), faster, result("b", 0, 0.50, 0.50, [])])
    assert "(1 runs): direct 10.00, faster 9.00, fixed 12.00, auto 2.00, random 10.00, whole grid 10.00" in text
    assert "; 1 kept direct training of another kind" in text
    assert next(line for line in text.splitlines() if line.startswith("| b ")).endswith("|  |  |  |  |  |")


def test_regrets_of_sets_with_many_test_rows_are_told_apart() -> None:
    grid = [(0.80, 0.9), (0.90, 0.5)]
    few, many = result("a", 0, 0.80, 0.88, grid), result("b", 0, 0.80, 0.85, grid) | {"test_rows": 1_000}
    assert "On the 1 sets with 1,000 test rows and more: direct 10.00, faster 9.00, fixed 12.00, auto 5.00," in summary(
        [few, many]
    )
    for alike in ([few], [many]):
        assert "test rows and more" not in summary(alike)


def test_random_search_trains_as_much_as_auto_did_beside_direct_training() -> None:
    """One other try, and the whole student where that is another than the directly trained one."""
    one = result("a", 0, 0.80, 0.80, [(0.80, 0.5), (0.84, 0.6), (0.90, 0.9)])
    assert float(summary([one]).split("random ")[-1].split(",")[0]) == pytest.approx(3.0, abs=0.5)  # 0.84 or 0.90
    one["methods"]["auto"]["chosen"] = "alpha 0.5"
    assert "random 0.00" in summary([one])  # both


def test_without_a_grid_there_are_gains_and_no_regrets() -> None:
    text = summary([result("a", 0, 0.80, 0.88, []), result("a", 1, 0.80, 0.86, [])])
    assert "Mean gain of auto +7.00" in text and "Mean regret" not in text
    assert "regret direct" not in text


def test_more_runs_of_the_prior_are_compared_on_the_sets_that_have_them() -> None:
    grid = [(0.80, 0.9), (0.90, 0.5)]
    grown, other = result("a", 0, 0.80, 0.88, grid), result("b", 0, 0.80, 0.60, grid)
    grown["methods"]["auto-10"] = {**grown["methods"]["auto"], "accuracy": 0.83, "trial_seconds": 3.0}
    grown["methods"]["auto-0"] = {**grown["methods"]["auto"], "accuracy": 0.81, "trial_seconds": 4.0}
    without = result("a", 1, 0.80, 0.10, grid)  # a run without them changes nothing
    rows = [line.strip("|").split("|") for line in summary([grown, without, other]).splitlines()[-3:]]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["0", "1", "+1.00", "9.00", "4.0"],
        ["10", "1", "+3.00", "7.00", "3.0"],
        ["all", "1", "+8.00", "2.00", "2.0"],
    ]
    assert "regret auto-10" not in summary([grown, other]) and "regret auto-10" in summary([grown])


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tables of ours, and what makes a run on them short."""
    frame = load_wine(as_frame=True).frame.rename(columns={"target": "label"})
    frame.columns = [column.replace("/", "_") for column in frame.columns]
    for name in ("red", "white"):
        (tmp_path / "data" / name).mkdir(parents=True)
        frame = frame.sample(frac=1.0, random_state=len(name))
        rows = Dataset.from_pandas(frame, preserve_index=False).cast_column("label", ClassLabel(names=["a", "b", "c"]))
        rows.select(range(130)).to_parquet(tmp_path / "data" / name / "train.parquet")
        rows.select(range(130, 178)).to_parquet(tmp_path / "data" / name / "test.parquet")
    from hf_hpmkd import table_runs

    few = ({"model": "mlp-8", "epochs": 1}, {"model": "sklearn:LogisticRegression"})
    monkeypatch.setattr(table_runs, "TEACHERS", few)
    short = replace(auto_bench._TRAININGS["table"], grid=auto_bench.GRID[:2])
    monkeypatch.setitem(auto_bench._TRAININGS, "table", short)
    monkeypatch.setattr(prior_build, "SETTINGS_PER_TABLE", 1)
    monkeypatch.setattr(prior_build, "RUNS_PER_SETTING", 2)
    monkeypatch.setattr(prior_build, "_STEPS", (16,))
    monkeypatch.setattr(prior_build, "CONTENDERS", (FASTER, Configuration(alpha=0.5, temperature=1.0)))
    monkeypatch.setattr(prior_build, "MIN_STEPS", 16)
    return tmp_path / "data"


@pytest.mark.slow
def test_a_prior_is_built_goes_on_and_is_judged_without_the_judged(tables: Path, tmp_path: Path, monkeypatch) -> None:
    prior, said = tmp_path / "prior.parquet", []
    assert build_prior(tables, 2, prior, say=said.append) == 2
    first = read_prior(prior)
    assert len(said) == 1 and "contenders" in said[0] and {one.data for one in first} == {"red"}
    assert build_prior(tables, 4, prior, say=said.append) == 4  # only what is missing is run
    examples = read_prior(prior)
    assert len(said) == 2 and [one.data for one in examples] == ["red", "red", "white", "white"]
    assert [one.gain for one in examples[:2]] == [one.gain for one in first]
    assert [one.configuration for one in examples] == [*prior_build.CONTENDERS] * 2  # each has them before all else
    assert build_prior(tables, 6, tmp_path / "more.parquet", say=said.append) == 6
    assert [one.data for one in read_prior(tmp_path / "more.parquet")][4:] == ["red", "red"]
    for one in examples:
        known = {"landmark_accuracy", "teacher_accuracy", "log_rows", "overfit", "warm_start", "log_learning_rate"}
        assert known <= set(one.features)
        assert one.noise > 0 and all(-100 <= value <= 100 for value in (*one.early, one.gain))
    about = provenance(prior)
    assert about["runs"] == 4 and about["direct_runs_beside"] == 2 and about["data"] == ["red", "white"]
    assert str(tmp_path) not in json.dumps(about)

    known = []
    monkeypatch.setattr(auto_bench, "write_prior", lambda rows, about, path: known.extend(row["data"] for row in rows)
                        or original(rows, about, path))  # fmt: skip
    settings = Settings(tables, tmp_path / "bench", ["red"], seeds=1, prior=prior, student="mlp-3", epochs=2)
    text = bench_auto(settings, say=said.append)
    assert known == ["white", "white"]
    assert "| red" in text and (tmp_path / "bench" / "gains.png").stat().st_size > 5000
    found = json.loads((tmp_path / "bench" / "red-0.json").read_text())
    assert found["test_rows"] == 48 and found["train_rows"] + found["validation_rows"] < 130
    assert set(found["methods"]) == {"direct", "faster", "fixed", "auto"} and len(found["grid"]) == 2
    assert found["methods"]["auto"]["deciding_seconds"] > 0
    auto = found["methods"]["auto"]
    assert ("kept" in auto) == ("unproven" in auto) == (auto["chosen"] != str(DIRECT))
    before = (tmp_path / "bench" / "red-0.json").stat().st_mtime_ns
    bench_auto(settings, say=said.append)
    assert (tmp_path / "bench" / "red-0.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="red-0.json was judged with .*mlp-3"):
        bench_auto(replace(settings, student="mlp-4"), say=said.append)


original = auto_bench.write_prior


def test_students_are_trained_as_long_as_those_of_a_line_without_a_recipe(tmp_path: Path) -> None:
    line = recipe_from_line(["mlp-8"], "mlp-4", "sklearn:wine")
    settings = Settings(tmp_path, tmp_path / "bench")
    assert settings.min_steps == settings.told()["min_steps"] == line.training.min_steps > 0
    assert replace(settings, epochs=2).min_steps == 0  # as in a line that says how long


def test_unknown_tables_are_told_before_any_work(tables: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no table green"):
        build_prior(tables, 1, tmp_path / "prior.parquet", ["green"])
    with pytest.raises(ValueError, match="no table green"):
        bench_auto(Settings(tables, tmp_path / "bench", ["green"]))
    with pytest.raises(FileNotFoundError, match="must hold a folder of Parquet files"):
        build_prior(tmp_path / "data" / "red", 1, tmp_path / "prior.parquet")


def test_folders_of_images_are_told_from_tables(tables: Path, tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (8, 8), (20 * index, 0, 0)) for index in range(4)]
    (tmp_path / "pictures").mkdir()
    Dataset.from_dict({"image": pictures, "label": [0, 1, 0, 1]}).to_parquet(tmp_path / "pictures" / "train.parquet")
    (tmp_path / "words").mkdir()
    Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).to_parquet(tmp_path / "words" / "train.parquet")
    assert [kind_of(one) for one in (tmp_path / "pictures", tmp_path / "words", tables / "red")] == [
        "image", "text", "table",
    ]  # fmt: skip
    runs = TableRuns(tmp_path / "pictures", tmp_path / "place", seed=0)
    assert runs.recipe.student.model.startswith("cifar-resnet")
    assert runs.recipe.teachers[0].model.startswith("cifar-resnet")


def test_draws_go_together_and_cover_the_space() -> None:
    import numpy as np

    random = np.random.default_rng(0)
    drawn = [prior_build.draw(random) for _ in range(600)]
    assert {one.alpha for one in drawn} == {0.0, 0.25, 0.5, 0.75, 0.9, 1.0}
    assert {one.kd_kind for one in drawn} == {"forward_kl", "standardized_kl", "dkd", "dist"}
    assert Configuration() not in drawn
    assert {one.learning_rate for one in drawn} == set(SPACE["learning_rate"]) and max(SPACE["learning_rate"]) == 4
    assert {one.warm_start for one in drawn} == {True, False} and not any(
        one.warm_start and one.distils for one in drawn
    )
    assert not any(prior_build.draw(random, can_start=False).warm_start for _ in range(300))


def test_a_student_starts_only_from_teachers_that_it_may_hear(tables: Path, tmp_path: Path) -> None:
    runs = TableRuns(tables / "red", tmp_path / "place", 0, warm_start=True)
    recipe = runs.recipe
    assert runs.can_start(recipe, [0, 1]) and not runs.can_start(recipe, [1])  # mlp-8, and a LogisticRegression
    taught = Configuration(alpha=0.5)
    first = {"max_steps": 1, "learning_rate": 1e-9, "evaluations": 1}
    short = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **first))
    cold = student_builder(short, runs.parts)().model
    for heard, starts in (([0, 1], True), ([1], False)):
        trained = runs.teach(short, taught, heard, runs.parts.validation).trained
        same = torch.allclose(trained.classifier.model.classifier.weight, cold.classifier.weight, atol=1e-6)
        assert same != starts
        assert runs.features(short, heard, 1)["warm_start"] == starts
    assert runs.features(short, [0], 1)["log_learning_rate"] == pytest.approx(-9)


def test_on_the_way_a_student_is_judged_as_a_try_is(tables: Path, tmp_path: Path) -> None:
    """By the mean of its weights, as of one that is stopped there."""
    runs = TableRuns(tables / "red", tmp_path / "place", 0, training={"max_steps": 16, "learning_rate": 0.01})
    taught = runs.teach(runs.recipe, FASTER, [], runs.parts.validation, averaged_at=[2, 4, 8])
    recipe = with_values(runs.recipe, overrides_of(FASTER, runs.recipe))
    rows, schedule = (runs.parts.train, runs.parts.validation), student_schedule(recipe)
    for step, accuracy in taught.averaged.items():
        build = student_builder(recipe, runs.parts)
        stopped = train_or_load("try", build, recipe, schedule, tmp_path / f"try-{step}", *rows, stop_at=step)
        assert float(runs.right(stopped, runs.parts.validation).float().mean()) == accuracy
    assert list(taught.averaged) == [2, 4, 8] and len({*taught.averaged.values(), taught.accuracy}) > 2


def _log_of_a_prior(folder: Path, **marks: object) -> list[Example]:
    """Three rows in `prior.jsonl`, and the examples that they are."""
    of_setting = {"student": "mlp-4", "taught_by": "mlp-8, mlp-16", "steps": 16, "base_learning_rate": 0.01, "seed": 0}
    about = {**dict.fromkeys(SCHEMA.names), **of_setting}
    examples = [replace(one, data="red") for one in read_prior()[:3]]
    rows = [{**prior_row(one, about), "last": index == 2, **marks} for index, one in enumerate(examples)]
    (folder / "prior.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return examples


@pytest.mark.parametrize(
    "marks", [{}, {"version": prior_build._VERSION - 1}, {"version": prior_build._VERSION, "x": 1}]
)
def test_a_prior_of_another_version_is_not_gone_on_with(tables: Path, tmp_path: Path, marks) -> None:
    _log_of_a_prior(tmp_path, contender=True, **marks)
    with pytest.raises(ValueError, match="prior.jsonl must hold rows of this version"):
        build_prior(tables, 4, tmp_path / "prior.parquet")


def test_a_prior_whose_rows_are_all_there_is_written_again(tables: Path, tmp_path: Path, monkeypatch) -> None:
    """As after a run that was stopped before it wrote the Parquet file; no table is run for that."""
    examples = _log_of_a_prior(tmp_path, contender=True, version=prior_build._VERSION)
    monkeypatch.setattr(prior_build, "_contenders_on_table", None)
    monkeypatch.setattr(prior_build, "_rows_of_table", None)
    assert build_prior(tables, 3, tmp_path / "prior.parquet", say=lambda line: None) == 3
    found = read_prior(tmp_path / "prior.parquet")
    assert [(one.data, one.configuration, one.gain) for one in found] == [
        ("red", one.configuration, pytest.approx(one.gain)) for one in examples
    ]
    assert provenance(tmp_path / "prior.parquet")["runs"] == 3


@pytest.mark.parametrize("test_rows", [0, 48])
def test_judged_on_drawn_rows_where_a_table_has_no_test_split(tables: Path, tmp_path: Path, monkeypatch, test_rows):
    """As many as its split has where that is small; without one, a recipe's usual share."""
    if not test_rows:
        (tables / "red" / "test.parquet").unlink()
    asked, drawn = [], []

    class Stopped(Exception):
        pass

    def look(*args, **sections):
        asked.append(sections["data"])
        drawn.append(len(TableRuns(*args, **sections).parts.test))
        raise Stopped

    monkeypatch.setattr(auto_bench, "TableRuns", look)
    with pytest.raises(Stopped):
        auto_bench._judge(Settings(tables, tmp_path / "bench"), tables / "red", 0)
    (data,), (rows,) = asked, drawn
    assert data.get("test_size", 0) == test_rows and ("test_size" in data) == bool(test_rows)
    assert rows == test_rows if test_rows else 0 < rows < 130 / 2


def test_small_tables_are_split_anew_for_each_seed(tables: Path, tmp_path: Path) -> None:
    whole = auto_bench._joined(tables / "red", tmp_path / "joined")
    drawn = []
    for seed in range(2):
        runs = TableRuns(whole, tmp_path / f"place-{seed}", seed, data={"test_size": 48})
        assert len(runs.parts.test) == 48
        drawn.append(runs.parts.test.labels.tolist())
        assert sum(map(len, (runs.parts.train, runs.parts.guide, runs.parts.validation, runs.parts.test))) == 178
    assert drawn[0] != drawn[1]


def test_a_smaller_prior_is_of_whole_settings(tmp_path: Path) -> None:
    """Or none would tell what all contenders gain, and more runs would seem to be worth another thing than they are."""
    auto_bench._write_left_out(None, "letter", 200, 0, tmp_path / "prior.parquet")
    found = read_prior(tmp_path / "prior.parquet")
    assert len(found) == 200 and "letter" not in {one.data for one in found}
    whole = sorted(map(len, by_setting(read_prior(leave_out=["letter"]))))
    sizes = [len(of) for of in by_setting(found)]
    assert set(sizes[:-1]) <= set(whole) and len(sizes) < 40
    assert contended(found)


def test_every_kind_of_data_has_students_of_its_own() -> None:
    families = {"table": {"mlp"}, "image": {"cifar-resnet"}, "text": {"bert"}}
    assert set(get_args(get_type_hints(kind_of)["return"])) == set(families)
    assert {kind: {family(one) for one in students} for kind, students in prior_build.STUDENTS.items()} == families
