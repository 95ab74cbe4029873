"""Tables and sentences recomputed from the record by other means; plots opened and looked at through matplotlib."""

import math

import matplotlib.image
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from hf_hpmkd import report
from hf_hpmkd.run_record import JobRecord, ModelRecord, RunRecord, TeacherRecord

pytestmark = pytest.mark.usefixtures("whole_runs")  # figures

NAMES = ["learning_curves.png", "temperature.png", "teacher_weights.png", "class_weights.png"]


def make_record(student=0.85, direct=0.83, num_rows=400):
    models = {"student": ModelRecord("student", 5_000, {"test": {"accuracy": student}}, seconds=20.25, latency_ms=0.5)}
    if direct is not None:
        models["direct"] = ModelRecord("direct", 5_000, {"test": {"accuracy": direct}}, seconds=10.0)
    return RunRecord(
        status="completed",
        parts={"parts": {"test": {"rows": num_rows}}},
        teachers=[
            TeacherRecord("a", "mlp-64", "timm", 60_000, accuracy={"test": 0.9, "validation": 0.91}, seconds=3.0),
            TeacherRecord("b|c", "sklearn:SVC", "sklearn", None, accuracy={"test": 0.8}, latency_ms=1.25),
        ],
        models=models,
        class_names=["cat", "dog", "emu"],
    )


def add_curves(record):
    record.curves = {
        "direct": [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.5}, {"step": 20, "eval_accuracy": 0.6}],
        "student": [
            {"step": 10, "loss": 9.0, "ce_loss": 2.1, "temperature": 4.0, "weight/a": 0.7, "weight/b|c": 0.3},
            {"step": 20, "loss": 8.0, "ce_loss": math.nan, "temperature": 3.0, "weight/a": 0.6, "weight/b|c": 0.4},
            {"step": 20, "eval_loss": 0.9, "eval_accuracy": 0.7},
            {"train_runtime": 3.0},
        ],
    }
    record.class_weights = [[0.7, 0.0, 0.4], [0.3, 0.0, 0.6]]
    return record


def cells_of(markdown):
    lines = [line.replace("\\|", "¦").strip("| ").split(" | ") for line in markdown.splitlines()]
    return {line[0]: line[1:] for line in lines}


def test_the_table_holds_the_numbers_of_the_record():
    table = cells_of(report.markdown_table(make_record()))
    assert list(table)[2:] == ["teacher a", "teacher b¦c", "direct", "student"]
    assert table["teacher a"] == ["60,000", "1.0x", "90.00%", "100.00%", "3.0", "-"]
    assert table["teacher b¦c"] == ["-", "-", "80.00%", "88.89%", "-", "1.25"]
    assert table["direct"] == ["5,000", "12.0x", "83.00%", "92.22%", "10.0", "-"]
    assert table["student"] == ["5,000", "12.0x", "85.00%", "94.44%", "20.2", "0.50"]


def test_both_tables_say_the_same():
    record = make_record()
    plain = report.result_table(record)
    for name, cells in cells_of(report.markdown_table(record)).items():
        if name not in ("model", ":--"):
            line = next(line for line in plain.splitlines() if line.startswith(name.replace("¦", "|")))
            assert line.split()[-6:] == cells
    assert plain.endswith(report.verdict(record))
    assert len({len(line) for line in plain.splitlines()[:6]}) == 1


def test_a_stored_retention_cannot_contradict_the_accuracies():
    record = make_record()
    record.models["student"].retention = 2.0
    assert report.rows(record)[-1].retention == pytest.approx(0.85 / 0.9)
    record.models["student"].metrics = {"test": {"macro_f1": 0.5}}  # a recipe without accuracy among its metrics
    assert report.rows(record)[-1].retention == 2.0


def test_the_margin_equals_the_formula_written_out():
    p, q = (0.85 * 400 + 1) / 402, (0.83 * 400 + 1) / 402
    expected = 1.959964 * (p * (1 - p) / 402 + q * (1 - q) / 402) ** 0.5
    assert report.difference_margin(0.85, 0.83, 400) == pytest.approx(expected)
    assert report.difference_margin(1.0, 1.0, 50) > 0.02
    assert report.difference_margin(0.9, 0.9, 40_000) < 0.1 * 1.01 * report.difference_margin(0.9, 0.9, 400)
    with pytest.raises(ValueError, match="at least 1 row"):
        report.difference_margin(0.5, 0.5, 0)


@pytest.mark.parametrize(
    ("student", "direct", "num_rows", "expected"),
    [
        (0.95, 0.80, 400, "student is better than the directly trained one: 95.00% against 80.00%, +15.00 points"),
        (0.80, 0.95, 400, "student is worse than the directly trained one: 80.00% against 95.00%, -15.00 points"),
        (0.85, 0.83, 400, "not distinguishable by this run: 85.00% against 83.00%, +2.00 points, within"),
        (0.83, 0.85, 400, "not distinguishable by this run: 83.00% against 85.00%, -2.00 points, within"),
        (0.85, 0.83, 40_000, "is better"),
        (0.83, 0.85, 40_000, "is worse"),
        (0.85, None, 400, "not also trained without teachers"),
        (0.85, 0.83, None, "not compared"),
    ],
)
def test_the_verdict(student, direct, num_rows, expected):
    text = report.verdict(make_record(student, direct, num_rows))
    assert expected in text and text.count(". ") == 0
    if "points" in text:
        margin = 100 * report.difference_margin(student, direct, num_rows)
        assert f"uncertainty of {margin:.2f} points (95 %, binomial, {num_rows:,} test rows, one run)" in text


def test_no_gain_is_claimed_over_a_direct_training_that_learned_nothing():
    record = make_record(0.95, 0.25, 400)
    record.class_names = ["a", "b", "c", "d"]
    text = report.verdict(record)
    assert "no better than guessing (25.00%, the student 95.00%)" in text and "better than the" not in text
    record.class_names.append("e")
    assert "student is better than" in report.verdict(record)


def test_a_record_without_a_student_is_told_as_such():
    record = RunRecord(status="failed")
    assert report.verdict(record) == "The run has no student (status: failed)."
    assert "failed" in report.result_table(record)


def test_plots_are_drawn_where_there_is_data_and_only_there(tmp_path):
    record = add_curves(make_record())
    written = report.draw_plots(record, tmp_path / "plots")
    assert [path.name for path in written] == NAMES
    for path in written:
        image = matplotlib.image.imread(path)
        assert image.shape[0] >= 300 and image.shape[1] >= 500 and image[..., :3].std() > 0.02
    record.curves, record.class_weights = {}, None
    assert report.draw_plots(record, tmp_path / "plots") == []
    assert list((tmp_path / "plots").iterdir()) == []


def test_the_same_record_gives_the_same_files(tmp_path):
    record = make_record()
    record.class_weights = [[0.7, 0.1, 0.4], [0.3, 0.9, 0.6]]
    first, second = report.draw_plots(record, tmp_path / "a"), report.draw_plots(record, tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def lines_of(axes):
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


def test_learning_curves_show_the_students_cross_entropy_and_percent():
    figure = report._learning_curves(add_curves(make_record()))
    losses, accuracies = figure.axes
    assert lines_of(losses)["direct"] == [2.0, 1.5]
    assert lines_of(losses)["student"][0] == 2.1 and math.isnan(lines_of(losses)["student"][1])
    assert lines_of(accuracies)["student"] == pytest.approx([70.0])
    assert lines_of(accuracies)["best teacher (a)"][0] == pytest.approx(91.0)
    assert all(axes.get_title(loc="left") and axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)


def test_weights_and_temperature_are_those_logged():
    record = add_curves(make_record())
    (axes,) = report._teacher_weights(record).axes
    drawn = lines_of(axes)
    assert drawn["teacher a"] == [0.7, 0.6] and drawn["teacher b|c"] == [0.3, 0.4]
    assert drawn["equal weights"][0] == 0.5
    (axes,) = report._temperature(record).axes
    assert lines_of(axes)["student"] == [4.0, 3.0] and axes.get_ylim()[0] == 0


def test_the_heat_map_masks_classes_without_guide_rows():
    record = add_curves(make_record())
    axes = report._class_weights(record).axes[0]
    shown = axes.images[0].get_array()
    assert shown.mask.tolist() == [[False, True, False]] * 2
    assert [text.get_text() for text in axes.texts] == ["0.70", "0.40", "0.30", "0.60"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "dog", "emu"]
    assert "no guide rows" in axes.get_xlabel()


def test_names_with_dollars_are_drawn_as_they_are(tmp_path, monkeypatch):
    """Between two of them matplotlib would read mathematics, and this one is none."""
    saved, save = {}, Figure.savefig

    def savefig(figure, path, **settings):
        saved[path.name] = figure
        save(figure, path, **settings)

    monkeypatch.setattr(Figure, "savefig", savefig)
    record = add_curves(make_record())
    record.class_names = ["$0_$25k", "$25k_$50k", "more"]
    record.teachers[0].name = "$5_$6"
    for row in record.curves["student"][:2]:
        row["weight/$5_$6"] = row.pop("weight/a")
    job = {"worker": "main", "started": 1.0, "ended": 9.0, "kind": "train $5_$6", "estimated": 5.0}
    record.jobs = [JobRecord("train $5_$6", **job)]
    assert [path.name for path in report.draw_plots(record, tmp_path)] == [*NAMES, "pipeline.png"] == list(saved)
    axes = saved["class_weights.png"].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == record.class_names
    assert [label.get_text() for label in axes.get_yticklabels()] == ["$5_$6", "b|c"]
    assert "teacher $5_$6" in lines_of(saved["teacher_weights.png"].axes[0])
    for figure in saved.values():
        assert not [text for text in figure.findobj(Text) if "$" in text.get_text() and text.get_parse_math()]


@pytest.mark.parametrize("classes", [1, 21, 200])
def test_any_number_of_classes_can_be_drawn(tmp_path, classes):
    record = make_record()
    record.class_weights = [[0.5] * classes, [0.5] * classes]
    record.class_names = [f"a class with a long name, number {number}" for number in range(classes)]
    (path,) = report.draw_plots(record, tmp_path)
    assert len(report._class_weights(record).axes[0].get_xticklabels()) <= 40
    assert matplotlib.image.imread(path).shape[1] <= 16 * 120


def test_lines_of_many_teachers_are_all_different():
    styles = [report._style("teacher", number) for number in range(20)] + [report._style("student", 0)]
    assert len({(style["color"], style.get("linestyle")) for style in styles}) == len(styles)
