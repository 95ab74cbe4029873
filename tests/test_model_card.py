"""The card: its metadata survives the Hub's reader, its numbers are those of the record, and it shows no path."""

import json
import re
from dataclasses import asdict, replace

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny import full_runs

from hf_hpmkd import report
from hf_hpmkd.components.adaptive_configuration import Configuration
from hf_hpmkd.memory_records import memory_row
from hf_hpmkd.model_card import hub_id, license_warning, write_card
from hf_hpmkd.run_record import AutoRecord, ChainRecord, JobRecord, KeptRecord, ModelRecord, RunRecord, TeacherRecord

METRICS = {"accuracy": 0.8513, "macro_f1": 0.8471, "calibration_error": 0.0319, "teacher_agreement": 0.9017}
CONFIGS = {
    "image-classification": {"model_type": "hpmkd_cifar_resnet", "auto_map": {"AutoConfig": "x.Y"}},
    "text-classification": {"model_type": "bert"},
    "tabular-classification": {"model_type": "hpmkd_tabular_mlp"},
}


@pytest.fixture
def record():
    return RunRecord(
        status="completed",
        recipe={
            "task": {"type": "auto"},
            "data": {"path": "owner/pictures"},
            "teachers": [{"model": "/home/jane/teachers/big.safetensors"}, {"model": "owner/vit"}, {"model": "mlp-64"}],
            "student": {"model": "cifar-resnet-8", "pretrained": False},
            "distillation": {"alpha": 0.9, "cache_dir": "/home/jane/cache"},
            "output": {"dir": "/home/jane/out"},
            "hub": {"repo_id": None},
        },
        recipe_fingerprint="c0ffee",
        seed=7,
        versions={"python": "3.11.7"},
        hardware={"cpu": "a processor", "cores": 6, "gpus": []},
        parts={
            "path": "owner/pictures",
            "name": "small",
            "kind": "hub",
            "commit": "d" * 40,
            "license": "cc-by-sa-4.0",
            "task": "image-classification",
            "parts": {
                "train": {"split": "train", "rows": 31_000, "how": "the whole split"},
                "test": {"split": "test", "rows": 2_718, "how": "the whole split"},
            },
        },
        teachers=[
            TeacherRecord(
                "big", "/home/jane/teachers/big.safetensors", "transformers", 654_321, license="cc-by-nc-4.0",
                accuracy={"test": 0.9137, "guide": 0.9226, "validation": 0.9311}, calibration_temperature=1.377,
                mean_weight=0.618, latency_ms=3.14, warnings=["gap seen in /home/jane/x.bin"],
            ),
            TeacherRecord(
                "vit", "owner/vit", "transformers", 1_234_567, commit="e" * 40, accuracy={"test": 0.9042}, seconds=None
            ),
            TeacherRecord("mlp-64", "mlp-64", "timm", 4_444, trained_here=True, accuracy={"test": 0.7}, seconds=8.8),
        ],
        models={
            "student": ModelRecord("student", 78_042, {"test": dict(METRICS)}, seconds=81.4, latency_ms=1.23),
            "direct": ModelRecord("direct", 78_042, {"test": {"accuracy": 0.8466}}, seconds=60.6),
        },
        curves={"student": [{"step": 10, "temperature": 4.0}, {"step": 20, "temperature": 3.0}]},
        class_names=["cat", "dog"],
        seconds={"student": 81.4},
    )  # fmt: skip


@pytest.fixture
def student(tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["image-classification"]))
    return folder


def card_of(record, tmp_path, plots=(), **more):
    path = write_card(record, tmp_path, tmp_path / "student", plots, **more)
    assert path == tmp_path / "README.md"
    return ModelCard.load(path, ignore_metadata_errors=False)


def test_the_metadata_survives_the_hubs_reader(record, tmp_path, student):
    card = card_of(record, tmp_path)
    found = {one.metric_type: one for one in card.data.eval_results}
    assert {name: one.metric_value for name, one in found.items()} == {
        "accuracy": 0.8513,
        "f1": 0.8471,
        "calibration_error": 0.0319,
    }
    one = found["f1"]
    assert (one.task_type, one.dataset_type, one.dataset_config, one.dataset_split, one.dataset_revision) == (
        "image-classification", "owner/pictures", "small", "test", "d" * 40,
    )  # fmt: skip
    assert one.metric_args == {"average": "macro"}
    assert one.dataset_args == {"rows": 2_718, "drawn": "the whole split"}
    data = card.data.to_dict()
    assert data["model-index"][0]["name"] == "cifar-resnet-8-pictures"
    assert data["pipeline_tag"] == "image-classification" and data["library_name"] == "transformers"
    assert data["datasets"] == ["owner/pictures"] and data["metrics"] == ["accuracy", "f1"]
    assert data["base_model"] == ["owner/vit"] and data["base_model_relation"] == "finetune"
    assert {"knowledge-distillation", "hf_hpmkd", "custom_code"} <= set(data["tags"])
    assert "license" not in data
    again = ModelCard(str(card))
    assert again.data.to_dict() == data and again.data.eval_results == card.data.eval_results


def test_what_lies_on_the_hub_is_linked(record, tmp_path, student):
    record.memory = {"where": "hf://datasets/owner/memory"}
    text = card_of(record, tmp_path).text
    for link in ("owner/vit", "datasets/owner/pictures", "datasets/owner/memory"):
        assert f"](https://huggingface.co/{link})" in text
    record.memory = {"where": "local"}
    assert "optimization memory" not in card_of(record, tmp_path).text
    assert text.count("https://huggingface.co/") == 3, "what is local has no link"


def test_a_licence_is_named_only_when_given(record, tmp_path, student):
    assert "No licence has been chosen" in card_of(record, tmp_path).text
    card = card_of(record, tmp_path, license="apache-2.0")
    assert card.data.license == "apache-2.0" and "The student: apache-2.0." in card.text


def test_local_data_and_models_are_no_hub_ids(record, tmp_path, student):
    record.parts |= {"path": "sets/pictures", "kind": "folder", "commit": None, "name": None}
    record.recipe["data"]["path"] = "sets/pictures"
    record.teachers[1].commit = None
    card = card_of(record, tmp_path)
    data = card.data.to_dict()
    assert not {"datasets", "base_model", "base_model_relation"} & data.keys()
    assert card.data.eval_results[0].dataset_type == "pictures"
    assert "sets/" not in str(card) and "owner/" not in str(card)


def test_a_student_that_began_with_weights_of_the_hub_names_them_first(record, tmp_path, student):
    record.recipe["student"] = {"model": "timm/resnet18.a1_in1k", "pretrained": True}
    card = card_of(record, tmp_path)
    assert card.data.base_model == ["timm/resnet18.a1_in1k", "owner/vit"]
    assert "This one began with weights of `timm/resnet18.a1_in1k`" in card.text
    assert "holds none of their weights" not in card.text
    record.recipe["student"]["pretrained"] = False
    assert card_of(record, tmp_path).data.base_model == ["owner/vit"]


def body_numbers(text):
    """Every number of the text outside code, tables' rulers, versions and fingerprints."""
    text = re.sub(r"```.*?```|`[^`]*`", " ", text, flags=re.DOTALL)
    text = re.sub(r"^- (versions|recipe fingerprint):.*$", " ", text, flags=re.MULTILINE)
    return re.findall(r"(?<![\w.-])[-+]?\d[\d,]*(?:\.\d+)?(?:%|x\b)?", text)


def test_every_number_of_the_text_is_recomputed_from_the_record(record, tmp_path, student):
    text = card_of(record, tmp_path).text
    student_accuracy, direct, best, rows = 0.8513, 0.8466, 0.9137, 2_718
    p, q = ((accuracy * rows + 1) / (rows + 2) for accuracy in (student_accuracy, direct))
    margin = 196 * (p * (1 - p) / (rows + 2) + q * (1 - q) / (rows + 2)) ** 0.5
    expected = {
        *("3", "2", "8", "64", "7", "6"),  # teachers, classes, names of models, seed, cores
        *("654,321", "1,234,567", "4,444", "78,042"),
        *(f"{1_234_567 / size:.1f}x" for size in (654_321, 1_234_567, 4_444, 78_042)),
        *(f"{100 * share:.2f}%" for share in (best, 0.9042, 0.7, student_accuracy, direct, 0.9226, 0.9311)),
        *(f"{100 * share / best:.2f}%" for share in (best, 0.9042, 0.7, student_accuracy, direct)),
        *(f"{100 * (student_accuracy - direct):+.2f}", f"{margin:.2f}", "95"),
        *("8.8", "81.4", "60.6", "3.14", "1.23", "1.377", "0.618"),
        *(f"{value:.4f}" for value in (*METRICS.values(), direct)),
        *("31,000", "2,718", "4.0"),  # 4.0: of the licences' names
    }
    found = body_numbers(text)
    assert len(found) > 50
    assert set(found) <= expected
    retention = f"{100 * student_accuracy / best:.2f}%"
    sentence = (
        f"a retention of {retention} relative to the best single teacher (`big`, 91.37%) on the same 2,718 test rows"
    )
    assert sentence in text


def test_changed_records_give_changed_cards(record, tmp_path, student):
    before = card_of(record, tmp_path).text
    record.models["student"].metrics["test"]["accuracy"] = 0.6011
    record.teachers[1].accuracy["test"] = 0.99
    after = card_of(record, tmp_path).text
    assert "60.11%" in after and f"{100 * 0.6011 / 0.99:.2f}%" in after and "(`vit`, 99.00%)" in after
    assert "85.13%" not in after and "85.13%" in before


def chosen(**configuration):
    """What the adaptive configuration writes down that chose so."""
    return AutoRecord(
        reason="so", knowledge="nothing", alike=[], configuration=asdict(Configuration(**configuration)), overrides={},
        features={}, trials=[], total_steps=8, budget_steps=8, extra_steps=8, seconds=1.0, deciding_seconds=0.1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("auto", "kept", "told"),
    [
        (chosen(), None, "found nothing better than direct training"),
        (chosen(learning_rate=2.0), "distilled", "Kept: the chosen student (+2.00 ± 0.50 points for the chosen one"),
        (chosen(learning_rate=2.0), "direct", "Kept: the directly trained student"),
        (chosen(alpha=0.5), "direct", "which did not prove better on validation and guide rows"),
    ],
)
def test_a_student_of_labels_alone_is_not_called_distilled(record, tmp_path, student, auto, kept, told):
    record.auto = auto
    record.kept = kept and KeptRecord(kept, 2.0, 0.5, 400, needed=1.2)
    card = card_of(record, tmp_path)
    assert told in card.text and "trained on the labels alone" in card.text.split("##")[0]
    assert ", distilled from" not in card.text
    assert card.data.base_model is None
    record.auto, record.kept = chosen(alpha=0.5), KeptRecord("distilled", 2.0, 0.5, 400, needed=1.2)
    text = card_of(record, tmp_path).text
    assert ", distilled from" in text and "400 validation and guide rows, +1.20 asked for" in text
    record.parts["parts"] = {"validation": {"rows": 400}}  # a record of before guide rows were asked too
    assert "400 validation rows, +1.20 asked for" in card_of(record, tmp_path).text


@pytest.mark.parametrize(("alpha", "name"), [(0.0, "chosen"), (0.5, "distilled")])
def test_tables_call_the_student_that_was_given_up_what_it_is(record, tmp_path, student, alpha, name):
    record.models["distilled"] = replace(record.models["student"], name="distilled")
    record.auto = chosen(alpha=alpha, learning_rate=2.0)
    record.kept = KeptRecord("direct", 0.1, 0.5, 400, needed=1.2)
    text = card_of(record, tmp_path).text
    assert f"| part | metric | direct | {name} | student |" in text
    other = {"chosen": "distilled", "distilled": "chosen"}[name]
    assert f"\n| {name} | " in text and f"\n| {other} | " not in text


def test_a_recipe_that_ignores_its_teachers_is_not_said_to_have_distilled(record, tmp_path, student):
    record.recipe["distillation"] = {"alpha": 0, "feature_weight": 0}
    text = card_of(record, tmp_path).text
    assert "trained on the labels alone" in text and "distilled from" not in text.split("##")[0]


def test_a_student_that_began_with_a_teachers_weights_names_it(record, tmp_path, student):
    """Also where it learned from the labels alone; not where the direct one, from nothing, was kept."""
    origin = record.teachers[0]
    origin.source, origin.commit, origin.trained_here = "someone/large", "e" * 40, False
    record.auto, record.chain = chosen(warm_start=True), ChainRecord(reason="none.", student_origin=origin.name)
    card = card_of(record, tmp_path)
    opening = card.text.split("##")[0]
    assert f"trained on the labels alone, from weights of its teacher `{origin.name}`, with" in opening
    assert "found nothing better than direct training" not in opening
    assert card.data.base_model == ["someone/large"]
    record.kept = KeptRecord("direct", 0.1, 0.5, 400, needed=1.2)
    card = card_of(record, tmp_path)
    assert "from weights of" not in card.text.split("##")[0] and card.data.base_model is None


@pytest.mark.parametrize(
    ("direct", "expected"),
    [(0.8466, "not distinguishable by this run"), (0.95, "is worse than"), (0.6, "is better than")],
)
def test_the_card_says_plainly_what_distillation_gave(record, tmp_path, student, direct, expected):
    record.models["direct"].metrics["test"]["accuracy"] = direct
    text = card_of(record, tmp_path).text
    others = {"not distinguishable by this run", "is worse than", "is better than"} - {expected}
    assert expected in text and not any(other in text for other in others)
    assert report.verdict(record) in text and report.markdown_table(record) in text


def test_what_was_not_done_is_not_claimed(record, tmp_path, student):
    del record.models["direct"]
    record.models["student"].metrics = {"test": {"macro_f1": float("nan")}}
    record.models["student"].latency_ms = None
    record.hardware, record.teachers = {}, []
    card = card_of(record, tmp_path)
    assert "not also trained without teachers" in card.text and "retention of" not in card.text
    assert "Whether its probabilities are calibrated" in card.text and "Speed on" not in card.text
    assert not card.data.eval_results and "model-index" not in card.data.to_dict()


def test_an_unfinished_run_is_said_to_be_one(record, tmp_path, student):
    assert "did not finish" not in card_of(record, tmp_path).text
    record.status = "interrupted"
    assert "This run did not finish (status: interrupted)" in card_of(record, tmp_path).text


def test_no_path_of_the_machine_is_shown(record, tmp_path, student):
    record.jobs = [JobRecord("data", "main", 0.0, 1.0)]
    with full_runs():
        plots = report.draw_plots(record, tmp_path / "plots")
    record.warnings = ["slow disk\nat /home/jane/slow/file.bin"]
    shown = str(card_of(record, tmp_path, plots))
    assert "jane" not in shown and "/home" not in shown and str(tmp_path) not in shown
    assert "`big.safetensors`" in shown and "slow disk at file.bin" in shown
    assert "(plots/temperature.png)" in shown
    captions = re.findall(r"!\[(.*?)\]\(plots/", shown)
    assert len(captions) == len(plots) and all(" " in caption for caption in captions)
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", shown, re.DOTALL)[1])
    assert [one["model"] for one in recipe["teachers"]] == ["big.safetensors", "owner/vit", "mlp-64"]
    assert "output" not in recipe and recipe["distillation"] == {"alpha": 0.9}
    assert record.teachers[0].source.startswith("/home/jane")  # the record itself is left as it was


def test_relative_folders_and_addresses_are_published_by_neither_card_nor_memory(record, tmp_path, student):
    record.recipe |= {
        "chain": {"models": ["clients/acme/mid", "cifar-resnet-14"]},
        "auto": {"prior": "clients/acme/prior.parquet"},
        "pipeline": {"engine": "ray", "address": "ray://10.1.2.3:10001"},
    }
    record.recipe["data"]["path"] = record.parts["path"] = "clients/acme/pay.csv"
    record.parts["kind"], record.status, record.finished = "folder", "completed", "2026-01-02T03:04:05Z"
    told = card_of(record, tmp_path).text + str(memory_row(record))
    assert "acme" not in told and "10.1.2.3" not in told
    assert all(name in told for name in ("pay.csv", "prior.parquet", "mid", "cifar-resnet-14"))


def test_a_teacher_may_have_the_name_of_another_commit(record, tmp_path, student):
    record.commits = {"hf_hpmkd": "a" * 40, "student": "b" * 40}
    record.teachers[1].name = "student"
    shown = card_of(record, tmp_path).text
    assert "student " + "b" * 40 in shown and "student " + "e" * 40 in shown


def test_plots_outside_the_folder_are_refused(record, tmp_path, student):
    with pytest.raises(ValueError, match=r"inside the card's folder.*far\.png"):
        write_card(record, tmp_path, student, [tmp_path.parent / "far.png"])
    assert not (tmp_path / "README.md").exists()


def test_a_record_without_a_student_is_refused(record, tmp_path, student):
    del record.models["student"]
    with pytest.raises(ValueError, match=r"needs a student.*\['direct'\]"):
        write_card(record, tmp_path, student)


@pytest.mark.parametrize(
    ("task", "config", "expected"),
    [
        (
            "image-classification",
            CONFIGS["image-classification"],
            ["import hf_hpmkd", "pipeline(", "trust_remote_code"],
        ),
        ("image-classification", {"model_type": "timm_wrapper"}, ['pipeline("image-classification"', ".timm_model"]),
        (
            "text-classification",
            CONFIGS["text-classification"],
            ['pipeline("text-classification"', "A text", "truncation=True"],
        ),
        ("tabular-classification", CONFIGS["tabular-classification"], ["TabularForClassification", "predict(table)"]),
    ],
)
def test_the_use_fits_the_model_and_is_python(record, tmp_path, student, task, config, expected):
    record.parts["task"] = task
    (student / "config.json").write_text(json.dumps(config))
    record.recipe["hub"]["repo_id"] = "jo/little"
    card = card_of(record, tmp_path)
    section = card.text.split("## How to use")[1].split("## ")[0]
    assert all(words in section for words in [*expected, '"jo/little"'])
    compile(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], "card", "exec")
    assert card.data.pipeline_tag == task and card.data.model_name == "little"
    assert card.data.library_name == ("hf_hpmkd" if task == "tabular-classification" else "transformers")


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        (None, "no licence is known"),
        ("Unknown", "no licence is known"),
        ("cc-by-nc-4.0", "forbids commercial use"),
        ("CC_BY_NC_SA_4.0", "forbids commercial use; share-alike"),
        ("for research and other non-commercial use", "forbids commercial use"),
        ("cc-by-sa-3.0", "share-alike"),
        ("agpl-3.0", "share-alike"),
        ("cc-by-nd-4.0", "forbids derived works"),
        ("llama3.2", "own terms"),
        ("openrail++", "own terms"),
        ("apache-2.0", None),
        ("mit", None),
        ("bsd-3-clause", None),
        ("cc-by-4.0", None),
    ],
)
def test_licences_that_restrict_are_told(license, expected):
    warning = license_warning(license)
    assert warning is None if expected is None else expected in warning


def test_the_card_lists_the_licence_of_everything_it_was_made_from(record, tmp_path, student):
    record.recipe["student"]["pretrained"] = True
    section = card_of(record, tmp_path).text.split("## Licences")[1]
    lines = [line for line in section.splitlines() if line.startswith("- ")]
    assert len(lines) == 5
    assert "share-alike" in lines[0] and "forbids commercial use" in lines[1] and "no licence is known" in lines[2]
    assert "trained in this run" in lines[3] and "no licence is known" in lines[4]


@pytest.mark.parametrize(
    ("source", "commit", "expected"),
    [
        ("owner/model", "abc", "owner/model"),
        ("owner/model", None, None),
        ("bert-base", "abc", "bert-base"),
        ("hf-hub:owner/model", None, "owner/model"),
        ("timm/resnet18.a1_in1k", None, "timm/resnet18.a1_in1k"),
        ("timm/resnet18", None, None),
        ("local-dir:models/x", "abc", None),
        ("models/t.safetensors", "abc", None),
        ("column:logits", None, None),
        ("sklearn:SVC", None, None),
        ("/home/jane/model", "abc", None),
    ],
)
def test_what_counts_as_a_hub_id(source, commit, expected):
    assert hub_id(source, commit) == expected
