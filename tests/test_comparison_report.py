"""Tables and figures of a comparison, from records made by hand; every figure computed a second time."""

import dataclasses

import numpy as np
import pytest
from matplotlib.axes import Axes
from scipy import stats

from hf_hpmkd.comparison_lines import kept, lines
from hf_hpmkd.comparison_record import ComparisonRecord, Look, MethodRecord, Result, Score, Trial
from hf_hpmkd.comparison_report import (
    against,
    draw_compression,
    draw_plots,
    overview,
    show,
    summary,
    table,
)
from hf_hpmkd.run_record import TeacherRecord

SEEDS = range(4)
SHARES = {"direct": (0.70, 0.72, 0.69, 0.71), "kd": (0.74, 0.75, 0.72, 0.76), "odd": (0.70, 0.71, 0.70, 0.72)}
ROWS = 300
RECIPE = {"data": {"path": "/home/me/data"}, "student": {"model": "mlp-4"}, "training": {"epochs": 5}}


def hits(share, seed, name):
    right = np.zeros(ROWS, dtype=bool)
    right[np.random.default_rng([seed, len(name)]).permutation(ROWS)[: round(share * ROWS)]] = True
    return right


def make(seeds=SEEDS, parts=("validation",)):
    record = ComparisonRecord("r.yaml", RECIPE, "f", "direct", seeds=list(seeds))
    record.methods = [MethodRecord(name, f"what {name} is") for name in ("kd", "direct", "odd")]
    for seed in seeds:
        record.teachers[f"seed-{seed}"] = [
            TeacherRecord("a", "a", "torch", accuracy={"validation": 0.8, "test": 0.75}),
            TeacherRecord("b", "b", "torch", accuracy={"validation": 0.9, "test": 0.7}),
        ]
        for name, shares in SHARES.items():
            result = Result(name, seed, "f", status="completed", taught_by=f"seed-{seed}", seconds=10.0 + seed)
            result.scores = {part: Score.of(hits(shares[seed], seed, name)) for part in parts}
            result.steps, result.num_params, result.threads = 100, 37, 1
            record.results.append(result)
    return record


def test_methods_that_ended_with_the_same_students_are_one_hypothesis():
    record = make()
    before = {line.method: line for line in lines(record, "validation")}
    record.methods += [MethodRecord("copy", "kd again"), MethodRecord("again", "direct again")]
    for name, source in (("copy", "kd"), ("again", "direct")):
        record.results += [dataclasses.replace(one, method=name) for one in record.of_method(source).values()]
    after = {line.method: line for line in lines(record, "validation")}
    assert after["kd"].p == after["copy"].p == before["kd"].p and after["odd"].p == before["odd"].p
    assert after["again"].p == 1 and after["direct"].p is None
    text = summary(record)
    assert "Holm's correction for 2 comparisons with direct. " in text.replace("\n", " ")
    assert "Ended with the same students, which are compared once: kd and copy; direct and again." in text


def test_students_that_differ_on_test_rows_alone_are_two_hypotheses():
    """On either part, so that both are corrected for the same number."""
    raw = stats.ttest_rel(SHARES["kd"], SHARES["direct"]).pvalue
    for equal, count in ((True, 2), (False, 3)):
        record = make(parts=("validation", "test"))
        record.methods.append(MethodRecord("copy", "kd again"))
        for one in record.of_method("kd").values():
            scores = dict(one.scores)
            if not equal:  # as many rows, but others
                scores["test"] = Score.of(np.roll(one.scores["test"].right(), 1))
            record.results.append(dataclasses.replace(one, method="copy", scores=scores))
        for part in ("validation", "test"):
            found = {line.method: line for line in lines(record, part)}
            assert found["kd"].p == found["copy"].p == pytest.approx(count * raw, rel=1e-6)
        text = summary(record).replace("\n", " ")
        assert f"Holm's correction for {count} comparisons with direct." in text
        assert ("Ended with the same students" in text) == equal


def with_copy(of, rows=None, **weights):
    """A record with the method `copy`, whose answers are those of another. rows: so many of each part."""
    record = make()
    record.methods.append(MethodRecord("copy", f"{of} again"))
    record.results += [dataclasses.replace(one, method="copy") for one in record.of_method(of).values()]
    for one in record.results:
        one.scores = {"validation": Score.of(one.scores["validation"].right()[:rows])}
        one.weights = f"{weights[one.method]}, seed {one.seed}" if weights else None
    return record


@pytest.mark.parametrize("of", ["kd", "direct"])
@pytest.mark.parametrize(
    ("rows", "weights", "equal"),
    [
        (None, {}, True),
        (199, {}, False),
        (200, {}, True),
        (200, {"direct": "a", "kd": "b", "odd": "c", "copy": "d"}, False),
        (15, {"direct": "a", "kd": "b", "odd": "c", "copy": None}, True),
    ],
)
def test_the_same_students_are_told_by_weights_and_without_by_many_rows(of, rows, weights, equal):
    """Few rows may be answered alike by chance, and Holm's correction would then be for too few methods."""
    if weights and weights["copy"] is None:
        weights = {**weights, "copy": weights[of]}
    text = summary(with_copy(of, rows, **weights))
    assert ("Ended with the same students" in text) == equal
    assert f"Holm's correction for {2 if equal else 3} comparisons with direct." in text


def test_of_mixed_records_the_weights_are_not_asked():
    record = with_copy("kd", direct="a", kd="b", odd="c", copy="d")
    record.of_method("odd")[0].weights = None
    assert "Ended with the same students, which are compared once: kd and copy." in summary(record)


def test_before_all_have_test_scores_students_are_told_apart_by_validation_rows():
    record = make()
    record.methods.append(MethodRecord("copy", "kd again"))
    record.results += [dataclasses.replace(one, method="copy") for one in record.of_method("kd").values()]
    for one in record.of_method("copy").values():
        one.scores = {**one.scores, "test": Score.of(hits(0.5, one.seed, "copy"))}
    text = summary(record)
    assert "Ended with the same students on validation rows, which are compared once: kd and copy." in text


def test_a_learning_rate_at_the_edge_of_what_was_tried_is_told():
    record = make()
    record.recipe = {**RECIPE, "training": {"learning_rate": 0.1}}

    def tried(method, chosen, *rates):
        words = [[f"training.learning_rate={rate:g}"] if rate else [] for rate in rates]
        return [Trial(method, word, 0.5, 1.0, rate == chosen) for word, rate in zip(words, rates, strict=True)]

    # kd has a rate of its own, 3; direct stays at the recipe's, which is the smallest; odd has its best inside.
    record.trials = (
        tried("kd", 6, None, 1.5, 6) + tried("direct", None, None, 0.2, 0.4) + tried("odd", 0.2, None, 0.2, 0.4)
    )
    overrides = {"kd": ["training.learning_rate=3", "training.learning_rate=6"], "odd": ["training.learning_rate=0.2"]}
    record.methods = [dataclasses.replace(one, overrides=overrides.get(one.name, [])) for one in record.methods]
    assert record.at_the_edge() == {"largest": ["kd"], "smallest": ["direct"]}
    text = summary(record).replace("\n", " ")
    assert "Of the learning rates tried the largest was chosen for kd, which" in text
    assert "the smallest was chosen for direct, which" in text
    record.trials = tried("odd", None, None)  # a single one has no edge
    assert record.at_the_edge() == {}


def test_bits_come_back():
    right = hits(0.4, 1, "x")
    score = Score.of(right)
    assert (score.right() == right).all() and score.rows == ROWS and len(score.hits) == 2 * 38
    assert score.accuracy == pytest.approx(0.4)


def test_of_direct_and_hpmkd_the_one_that_validation_rows_choose():
    """On validation rows: worse, even, and better; on test rows the other way round, so that it shows."""
    record = ComparisonRecord("r.yaml", RECIPE, "f", "direct", seeds=[0, 1, 2])
    record.methods = [MethodRecord("direct", "labels"), MethodRecord("hpmkd", "the recipe")]
    first = {"direct": [200, 200, 200], "hpmkd": [150, 200, 250]}
    for name, counts in first.items():
        for seed, count in enumerate(counts):
            result = Result(name, seed, "f", status="completed", seconds=10.0)
            tested = 180 if name == "direct" else 190 + seed
            shares = {"validation": count, "test": tested}
            result.scores = {part: Score.of(np.arange(ROWS) < number) for part, number in shares.items()}
            record.results.append(result)
    kept = next(line for line in lines(record, "test", with_kept=True) if line.method == "kept")
    assert kept.accuracy.mean == pytest.approx((180 + 191 + 192) / 3 / ROWS) and kept.seconds.mean == 20
    assert kept.p is None and [line.method for line in lines(record, "test")] == ["direct", "hpmkd"]
    text = summary(record)
    assert "- kept: of hpmkd and direct" in text and text.index("| hpmkd") < text.index("| kept")
    assert "kept" not in summary(make())


@pytest.mark.parametrize(
    ("section", "values", "chooses"),
    [
        ("distillation", {"keep": "better", "direct": True}, True),
        ("distillation", {"keep": "distilled"}, False),
        ("distillation", {"direct": False}, False),
        ("auto", {"mode": "off"}, True),
        ("auto", {"mode": "fast"}, False),
    ],
)
def test_nothing_is_kept_where_a_run_of_the_recipe_does_not_choose(section, values, chooses):
    record = make()
    record.recipe = {**RECIPE, section: values}
    record.methods = [
        dataclasses.replace(one, name="hpmkd" if one.name == "kd" else one.name) for one in record.methods
    ]
    for one in record.results:
        one.method = "hpmkd" if one.method == "kd" else one.method
    assert list(kept(record)) == (list(SEEDS) if chooses else [])
    assert ("- kept: " in summary(record)) == ("| kept" in summary(record)) == chooses
    assert ("- `kept`: " in overview([record, record], "validation")) == chooses


def test_lines_recomputed():
    found = {line.method: line for line in lines(make(), "validation")}
    assert list(found) == ["direct", "kd", "odd"]  # the baseline first
    raw = [stats.ttest_rel(SHARES[name], SHARES["direct"]).pvalue for name in ("kd", "odd")]
    assert raw[0] < raw[1]
    assert found["kd"].p == pytest.approx(2 * raw[0], rel=1e-6)
    assert found["odd"].p == pytest.approx(max(2 * raw[0], raw[1]), rel=1e-6)
    assert found["direct"].p is None and found["direct"].difference is None
    for name, line in found.items():
        assert line.accuracy.mean == pytest.approx(np.mean(SHARES[name]))
        assert line.accuracy.sd == pytest.approx(np.std(SHARES[name], ddof=1))
        assert line.retention == pytest.approx(np.mean(SHARES[name]) / 0.9)
        assert line.seconds.mean == pytest.approx(11.5)
    differences = np.subtract(SHARES["kd"], SHARES["direct"])
    interval = stats.t.interval(0.95, 3, differences.mean(), stats.sem(differences))
    assert (found["kd"].difference.low, found["kd"].difference.high) == pytest.approx(interval)


def test_pairs_are_made_by_seed_and_not_by_order():
    shuffled = make()
    shuffled.results = shuffled.results[::-1]
    assert lines(shuffled, "validation") == lines(make(), "validation")


def test_a_method_with_a_missing_seed_is_compared_on_the_others():
    record = make()
    record.results = [one for one in record.results if (one.method, one.seed) != ("kd", 0)]
    line = next(line for line in lines(record, "validation") if line.method == "kd")
    assert line.difference.count == 3
    assert line.difference.mean == pytest.approx(np.mean(np.subtract(SHARES["kd"], SHARES["direct"])[1:]))
    assert "Not every method has all 4 seeds" in summary(record)


def test_a_seed_that_the_baseline_lacks_is_left_out_of_the_difference():
    record = make()
    record.results = [one for one in record.results if (one.method, one.seed) != ("direct", 3)]
    line = next(line for line in lines(record, "validation") if line.method == "kd")
    assert line.accuracy.count == 4 and line.difference.count == 3
    assert line.p is not None


def test_another_baseline_comes_first():
    record = make()
    record.baseline = "odd"
    assert [line.method for line in lines(record, "validation")] == ["odd", "kd", "direct"]
    assert "difference to odd" in table(record, "validation")


def test_one_seed_is_tested_by_rows():
    found = {line.method: line for line in lines(make([0]), "validation")}
    first, second = (hits(SHARES[name][0], 0, name) for name in ("kd", "direct"))
    discordant = int((first & ~second).sum()), int((second & ~first).sum())
    raw = stats.binomtest(discordant[0], sum(discordant)).pvalue
    other = [hits(SHARES["odd"][0], 0, "odd"), second]
    pair = int((other[0] & ~other[1]).sum()), int((other[1] & ~other[0]).sum())
    raw_other = stats.binomtest(pair[0], sum(pair)).pvalue
    assert raw < raw_other
    assert found["kd"].p == pytest.approx(min(1, 2 * raw)) and found["kd"].by_rows
    assert "McNemar" in summary(make([0])) and "paired t" in summary(make())


def test_tests_of_two_kinds_stand_in_no_table():
    record = make()
    record.results = [one for one in record.results if one.method != "kd" or one.seed == 0]
    found = {line.method: line for line in lines(record, "validation")}
    assert found["kd"].p is None and not any(line.by_rows for line in found.values())
    assert found["odd"].p == pytest.approx(stats.ttest_rel(SHARES["odd"], SHARES["direct"]).pvalue)
    assert "McNemar" not in summary(record) and "paired t" in summary(record)


def test_each_part_is_told_of_as_it_was_tested():
    """Seeds that were added after the test part was opened."""
    record = make(parts=("validation", "test"))
    record.results = [one for one in record.results if one.method != "odd"]
    for one in record.results:
        one.scores = one.scores if one.seed == 0 else {"validation": one.scores["validation"]}
    text = summary(record)
    assert "Tests on validation rows: paired t over the seeds that both have, two-sided. Holm's" in text
    assert "Tests with one seed on test rows: McNemar's exact test" in text
    assert "Not every method has all 4 seeds on test rows" in text
    assert [line.by_rows for line in lines(record, "test")] == [False, True]


def test_differences_that_are_all_alike_have_no_interval():
    record = make()
    for seed in SEEDS:
        right = record.of_method("direct")[seed].scores["validation"].right()
        right[np.flatnonzero(~right)[:3]] = True
        record.of_method("kd")[seed].scores["validation"] = Score.of(right)
    assert "| +1.00 | - |" in table(record, "validation")


def test_the_table_in_words():
    text = table(make(), "validation")
    assert "| direct | 70.50 ± 1.29 | - | - | 78.3% | 11.5 ± 1.3 | 4 |" in text
    assert "difference to direct, points" in text
    assert "+3.75 (+2.23 to +5.27)" in text


def test_the_test_part_is_shown_where_it_was_opened():
    closed, opened = make(), make(parts=("validation", "test"))
    opened.looks = [Look("2026-01-01T00:00:00Z", {"kd": [0]}), Look("2026-01-02T00:00:00Z", {"odd": [0]})]
    assert "test accuracy" not in summary(closed) and "was not opened" in summary(closed)
    assert "test accuracy" in summary(opened) and "was opened 2 times" in summary(opened)
    assert lines(opened, "test")[0].retention == pytest.approx(np.mean(SHARES["direct"]) / 0.75)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 90}, "The terms were not equal in steps: "),
        ({"num_params": 38}, "students differ in parameters"),
        ({"threads": 2}, "different numbers of threads"),
        ({"commit": "another"}, "different versions of this package"),
    ],
)
def test_what_weakens_the_figures_is_said(change, said):
    record = make()
    assert said not in summary(record)
    vars(record.results[0]).update(change)
    assert said in summary(record)


def test_several_comparisons_side_by_side():
    other = make()
    other.results = [one for one in other.results if one.method != "odd"]
    text = overview([make(), other], "validation")
    rows = {cells[1].strip(): cells[2:4] for line in text.splitlines() if len(cells := line.split("|")) == 5}
    kd, base = np.array(SHARES["kd"]), np.array(SHARES["direct"])
    p = stats.ttest_rel(kd, base).pvalue
    assert p < 0.05 / 2  # corrected for the two that are compared
    expected = f" {100 * kd.mean():.2f} ± {100 * kd.std(ddof=1):.2f} ({100 * (kd - base).mean():+.2f}*) "
    assert rows["kd"] == [expected, expected]
    assert rows["direct"][0] == f" {100 * base.mean():.2f} ± {100 * base.std(ddof=1):.2f} "
    assert "*" not in rows["odd"][0] and rows["odd"][1] == " - "
    assert "over 4 seeds" in text and "difference to direct in points" in text


def test_side_by_side_it_is_said_how_each_was_tested():
    several, one = "paired t", "McNemar's with one seed"
    told = {several: [make(), make()], one: [make([0]), make([0])], f"{several} or {one}": [make(), make([0])]}
    for tests, records in told.items():
        assert f"where p < 0.05 ({tests}," in overview(records, "validation")
    assert "McNemar" not in overview(told[several], "validation")
    assert "paired t" not in overview(told[one], "validation")


def test_what_the_methods_are_is_said_once_below_all_columns():
    text = overview([make(), make([0])], "validation")
    assert text.count("| direct |") == 1 and text.count("- `direct`: ") == 1
    other = make()
    other.parts["path"] = "elsewhere/wine"
    direct = next(method for method in other.methods if method.name == "direct")
    other.methods[other.methods.index(direct)] = dataclasses.replace(direct, description="another")
    listed = next(line for line in overview([make(), other], "validation").splitlines() if line.startswith("- `dir"))
    assert listed == f"- `direct`: {direct.description} (data); another (wine)"


def test_some_methods_are_shown_and_all_are_corrected_for():
    text = overview([make(), make()], "validation", ["odd", "kd", "nowhere"])
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert rows[2:] == ["odd", "kd"]
    assert next(line for line in text.splitlines() if line.startswith("| kd")) in overview(
        [make(), make()], "validation"
    )
    assert "- `direct`" not in text and "- `kd`" in text


def test_another_baseline(tmp_path):
    turned = {line.method: line for line in lines(against(make(), "kd"), "validation")}
    known = {line.method: line for line in lines(make(), "validation")}
    assert turned["kd"].difference is None
    assert turned["direct"].difference.mean == pytest.approx(-known["kd"].difference.mean)
    make().save(tmp_path / "comparison.json")
    assert "difference to kd, points" in show([tmp_path], baseline="kd")
    assert show([tmp_path, tmp_path], shown=["odd"]).count("\n| odd |") == 3  # side by side, and in either table
    assert show([tmp_path, tmp_path], shown=["odd"]).count("\n| kd |") == 2
    with pytest.raises(ValueError, match=r"one of the methods \(kd, direct, odd\), got 'none'"):
        show([tmp_path], baseline="none")


def test_compression_is_that_of_the_largest_teacher(tmp_path, monkeypatch):
    drawn, original = [], Axes.plot

    def plot(self, x, y, *rest, **more):
        drawn.append((x, y, more["label"]))
        return original(self, x, y, *rest, **more)

    monkeypatch.setattr(Axes, "plot", plot)
    record = make()
    with pytest.raises(ValueError, match="a teacher and a student of known size"):
        draw_compression([record], "validation", tmp_path / "plot.png")
    for teachers in record.teachers.values():
        for size, teacher in zip((500, 300), teachers, strict=False):
            teacher.num_params = size
    for result in record.results:
        result.num_params = 50
    draw_compression([record, record], "validation", tmp_path / "plots" / "plot.png")
    assert {x for x, _, _ in drawn} == {10} and (tmp_path / "plots" / "plot.png").stat().st_size > 1000
    direct = [(y, label) for _, y, label in drawn if label in ("direct", None)][0]
    assert direct == (pytest.approx(100 * lines(record, "validation")[0].retention), "direct")
    assert sum(label is None for _, _, label in drawn) == len(record.methods)  # the second time without a label
    drawn.clear()
    record.methods = [dataclasses.replace(one, name={"kd": "hpmkd"}.get(one.name, one.name)) for one in record.methods]
    for result in record.results:
        result.method = {"kd": "hpmkd"}.get(result.method, result.method)
    draw_compression([record], "validation", tmp_path / "plots" / "kept.png", ["kept"])
    assert [label for _, _, label in drawn] == ["kept"]


def test_plots_are_drawn(tmp_path):
    for record in (make(), make([0]), make(parts=("validation", "test"))):
        files = draw_plots(record, tmp_path / "plots")
        assert [file.name for file in files] == ["accuracy.png", "accuracy_seconds.png"]
        assert all(file.stat().st_size > 5000 for file in files)
    assert draw_plots(make([]), tmp_path / "none") == [] and not (tmp_path / "none").exists()


def test_a_record_is_read_back_and_published_without_paths(tmp_path):
    record = make(parts=("validation", "test"))
    record.looks = [Look("2026-01-01T00:00:00Z", {"kd": [0]})]
    record.save(tmp_path / "comparison.json")
    assert ComparisonRecord.load(tmp_path / "comparison.json") == record
    public = record.public()
    assert public.recipe == {**RECIPE, "data": {"path": "data"}}
    assert summary(public) == summary(record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "reads up to 1. Update"),
        ({"sedes": []}, "sedes"),
        ({"seeds": "three"}, "seeds"),
    ],
)
def test_records_that_cannot_be_read(change, message):
    with pytest.raises(ValueError, match=message):
        ComparisonRecord.from_dict({**make().to_dict(), **change}, "x")
