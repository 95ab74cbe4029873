"""The table processor and the MLP against their definitions, and the way through files."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

from hf_hpmkd.models.tabular import TabularConfig, TabularForClassification, TabularProcessor, embedding_size

CLASSES = ["no", "yes", "perhaps"]


@pytest.fixture
def table():
    return pd.DataFrame(
        {
            "age": [20, 30, 40, 50],
            "job": ["cook", None, "actor", "cook"],
            "income": [1.0, np.nan, 3.0, 5.0],
            "member": [True, False, True, True],
        }
    )


def model_for(processor, **options):
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    config = TabularConfig(
        num_numeric=processor.num_numeric, cardinalities=processor.cardinalities, **(labels | options)
    )
    return TabularForClassification(config).attach_processor(processor).eval()


def test_processor_by_hand(table):
    processor = TabularProcessor.fit(table)
    inputs = processor(table)
    age = (np.array([20, 30, 40, 50]) - 35) / np.sqrt(125)
    income = np.array([-2, 0, 0, 2]) / np.sqrt(8 / 3)
    expected = np.stack([age, income, [0, 1, 0, 0]], axis=1)
    np.testing.assert_allclose(inputs["numeric"].numpy(), expected, rtol=1e-6)
    assert inputs["numeric"].dtype == torch.float32 and inputs["categorical"].dtype == torch.int64
    # actor 1, cook 2; False 1, True 2; missing 0.
    assert inputs["categorical"].tolist() == [[2, 2], [0, 1], [1, 2], [2, 2]]
    assert processor.columns == ["age", "income", "job", "member"]
    assert (processor.num_numeric, processor.cardinalities) == (3, [3, 3])


def test_new_rows_unknown_missing_and_extreme_values(table):
    processor = TabularProcessor.fit(table)
    new = pd.DataFrame(
        {"member": [None, False], "income": [np.inf, 3.0], "job": ["pilot", "actor"], "age": [np.nan, 10**9]}
    )
    inputs = processor(new)
    assert inputs["numeric"].tolist() == [[0.0, 10.0, 0.0], [10.0, 0.0, 0.0]]
    assert inputs["categorical"].tolist() == [[0, 0], [1, 1]]
    assert {key: value.shape for key, value in processor(new[:0]).items()} == {"numeric": (0, 3), "categorical": (0, 2)}


def test_columns_without_spread_or_values():
    """They taught nothing, so whatever they are later changes nothing."""
    flat = {"flat": [7.0] * 1000, "tenth": [0.1] * 1000, "empty": [np.nan] * 1000}
    processor = TabularProcessor.fit(pd.DataFrame(flat))
    later = pd.DataFrame({"flat": [7, 8], "tenth": [0.1, 1.1], "empty": [None, 4.0]})
    assert processor(later)["numeric"].tolist() == [[0.0, 0.0, 0.0]] * 2
    older = TabularProcessor(numeric_columns=["flat"], mean=[7.0], std=[1.0])  # as they were saved before
    assert older(pd.DataFrame({"flat": [7, 8]}))["numeric"].tolist() == [[0.0], [1.0]]


def test_predicting_ignores_columns_that_the_model_does_not_read(table):
    model = model_for(TabularProcessor.fit(table))
    expected = model.predict_proba(table)
    assert np.array_equal(model.predict_proba(table.assign(label="x", id=range(4))), expected)
    with pytest.raises(ValueError, match="Missing: age"):
        model.predict(table.drop(columns="age"))


def test_column_order_is_free_and_names_count(table):
    processor = TabularProcessor.fit(table)
    turned = processor(table[["member", "income", "age", "job"]])
    assert all(torch.equal(turned[key], value) for key, value in processor(table).items())
    with pytest.raises(ValueError, match=r"Missing: income, job\. Not known: wage\."):
        processor(table.drop(columns=["income", "job"]).assign(wage=1))
    with pytest.raises(ValueError, match=r"Missing: none\. Not known: label \(leave them out: table\[processor"):
        processor(table.assign(label=0))


def test_processor_refuses(table):
    processor = TabularProcessor.fit(table)
    with pytest.raises(ValueError, match="at least one row and one column"):
        TabularProcessor.fit(table[:0])
    with pytest.raises(ValueError, match="infinite ones: income"):
        TabularProcessor.fit(table.assign(income=[1.0, np.inf, 2.0, 3.0]))
    with pytest.raises(TypeError, match=r"do not: day \(datetime64"):
        TabularProcessor.fit(pd.DataFrame({"day": pd.to_datetime(["2020-01-01", "2020-01-02"])}))
    with pytest.raises(ValueError, match=r"distinct names that are strings, got \['a', 'a'\]"):
        TabularProcessor.fit(pd.DataFrame([[1, 2]], columns=["a", "a"]))
    with pytest.raises(TypeError, match=r"'job' holds categories, but arrives as numbers \(int64\)"):
        processor(table.assign(job=[1, 2, 3, 4]))
    with pytest.raises(ValueError, match="'age' must hold numbers"):
        processor(table.assign(age=["old", "young", "old", "old"]))
    with pytest.raises(TypeError, match="DataFrame is needed, got dict"):
        processor(table.to_dict())


def test_processor_survives_its_file(table, tmp_path):
    # Names whose sorted order is not the table's: JSON sorts keys, the columns must stay as they were.
    processor = TabularProcessor.fit(table.rename(columns={"job": "z", "member": "a"}))
    before = json.dumps(processor.to_dict(), sort_keys=True)
    processor.save_pretrained(tmp_path)
    again = TabularProcessor.from_pretrained(tmp_path)
    assert json.dumps(processor.to_dict(), sort_keys=True) == before  # saving leaves no trace in the description
    assert json.dumps(again.to_dict(), sort_keys=True) == before
    assert again.categorical_columns == ["z", "a"]
    renamed = table.rename(columns={"job": "z", "member": "a"})
    assert all(torch.equal(again(renamed)[key], value) for key, value in processor(renamed).items())


def test_model_equals_its_definition(table):
    processor = TabularProcessor.fit(table)
    model = model_for(processor, hidden_sizes=[5, 4])
    inputs, state = processor(table), {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    jobs, members = inputs["categorical"].numpy().T
    x = np.concatenate(
        [inputs["numeric"].numpy(), state["embeddings.0.weight"][jobs], state["embeddings.1.weight"][members]], axis=1
    )
    for layer in ("hidden.0", "hidden.1"):
        x = np.maximum(x @ state[f"{layer}.weight"].T + state[f"{layer}.bias"], 0)
    expected = x @ state["classifier.weight"].T + state["classifier.bias"]
    with torch.no_grad():
        outputs = model(**inputs, labels=torch.tensor([0, 2, 1, 1]))
    np.testing.assert_allclose(outputs.logits.numpy(), expected, rtol=1e-4, atol=1e-6)
    logp = expected - np.log(np.exp(expected).sum(1, keepdims=True))
    assert float(outputs.loss) == pytest.approx(-logp[range(4), [0, 2, 1, 1]].mean(), rel=1e-5)
    assert list(model.modules())[-1] is model.classifier


def test_widths_follow_from_the_table(table):
    processor = TabularProcessor.fit(table)
    model = model_for(processor, hidden_sizes=[])
    assert embedding_size(3) == 3 and embedding_size(10**6) == 16
    assert model.classifier.in_features == 3 + 3 + 3 and model.classifier.out_features == 3
    assert model_for(processor, hidden_sizes=[], embedding_sizes=[1, 2]).classifier.in_features == 6


def test_unknown_category_starts_as_nothing_and_is_learnt(table):
    model = model_for(TabularProcessor.fit(table))
    assert not model.embeddings[0].weight[0].any() and model.embeddings[0].weight[1:].all()
    model(**model.processor(table), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert model.embeddings[0].weight.grad[0].any()  # row 1 has no job


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_only_in_training(table, dropout):
    model = model_for(TabularProcessor.fit(table), dropout=dropout, hidden_sizes=[64])
    inputs = model.processor(table)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
        model.train()
        assert torch.equal(model(**inputs).logits, model(**inputs).logits) == (dropout == 0)


def test_numbers_alone_and_categories_alone():
    for only in (pd.DataFrame({"a": [1, 2, 3]}), pd.DataFrame({"b": ["x", "y", "z"]})):
        assert model_for(TabularProcessor.fit(only)).predict_proba(only).shape == (3, 3)
    with pytest.raises(ValueError, match="no inputs"):
        TabularForClassification(TabularConfig())


def test_config_refuses():
    for options in ({"dropout": 1.0}, {"hidden_sizes": [0]}, {"num_numeric": -1}, {"cardinalities": [0]}):
        with pytest.raises(ValueError, match=r"`dropout` in \[0, 1\)"):
            TabularConfig(**options)
    with pytest.raises(ValueError, match="got 1 for 2 columns"):
        TabularConfig(cardinalities=[2, 3], embedding_sizes=[4])


def test_predict(table):
    model = model_for(TabularProcessor.fit(table), dropout=0.5).train()
    with torch.no_grad():
        expected = model.eval()(**model.processor(table)).logits.softmax(1).numpy()
    model.train()
    np.testing.assert_allclose(model.predict_proba(table), expected, rtol=1e-5)
    np.testing.assert_allclose(model.predict_proba(table, batch_size=3), expected, rtol=1e-5)
    assert model.predict(table) == [CLASSES[i] for i in expected.argmax(1)]
    assert model.training  # as it was
    assert model.predict(table[:0]) == []


def test_predict_needs_the_right_processor(table):
    model = model_for(TabularProcessor.fit(table))
    with pytest.raises(ValueError, match=r"of the processor 1 and \[\]"):
        model.attach_processor(TabularProcessor.fit(table[["age"]]))
    model.processor = None
    with pytest.raises(ValueError, match="attach_processor"):
        model.predict(table)


def test_saves_and_loads_with_its_processor(table, tmp_path):
    model = model_for(TabularProcessor.fit(table), hidden_sizes=[6])
    expected = model.predict_proba(table)
    model.save_pretrained(tmp_path)
    for again in (TabularForClassification.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(again) is TabularForClassification
        np.testing.assert_array_equal(again.predict_proba(table), expected)
    assert type(AutoFeatureExtractor.from_pretrained(tmp_path)) is TabularProcessor
    assert AutoConfig.from_pretrained(tmp_path).hidden_sizes == [6]
    assert "hf_hpmkd import" not in (tmp_path / "tabular.py").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"].startswith("tabular.")
    loaded, info = TabularForClassification.from_pretrained(str(tmp_path), output_loading_info=True)
    assert loaded.processor is not None and not info["missing_keys"]
    (tmp_path / "preprocessor_config.json").unlink()
    assert TabularForClassification.from_pretrained(tmp_path).processor is None


@pytest.mark.slow
def test_loads_without_the_package(table, tmp_path):
    folder = tmp_path / "student"
    model = model_for(TabularProcessor.fit(table))
    model.save_pretrained(folder)
    table.to_json(folder / "table.json", orient="table")
    code = (
        "import sys; sys.modules['hf_hpmkd'] = None\n"
        "import json, pandas, transformers\n"
        f"table = pandas.read_json({str(folder / 'table.json')!r}, orient='table')\n"
        f"model = transformers.AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        f"processor = transformers.AutoFeatureExtractor.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "assert processor.columns == model.processor.columns\n"
        "print(json.dumps([model.predict(table), model.predict_proba(table).tolist()]))"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names, probabilities = json.loads(done.stdout.splitlines()[-1])
    assert names == model.predict(table)
    np.testing.assert_allclose(probabilities, model.predict_proba(table), rtol=1e-5)
