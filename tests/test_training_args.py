"""Every setting that cannot be used is refused with its value; the properties follow from the settings."""

import pytest

from hf_hpmkd.training_args import HPMKDTrainingArguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.5}, r"alpha.*\[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "temperature` must be above 0, got 0.0"),
        ({"temperature_schedule": "cosine", "temperature_min": 8.0, "temperature_max": 4.0}, r"got \(8.0, 4.0\)"),
        ({"kd_kind": "dist", "temperature_schedule": "learned"}, "Legal pairs"),
        ({"gate": "best"}, "gate.*got best"),
        ({"gate_entropy_weight": -1.0}, "got -1.0"),
        ({"gate_dropout": 1.0}, r"\[0, 1\), got 1.0"),
        ({"gate_hidden_size": 0}, "at least 1 unit, got 0"),
        ({"guide_every": 0}, "at least 1 step, got 0"),
        ({"temperature_schedule": "learned", "temperature": 8.0}, r"where `learned` starts.*got \(8.0, 2.0, 6.0\)"),
        ({"fp16": True, "use_cpu": False, "gate": "joint"}, "`fp16` scales gradients"),
        ({"teacher_outputs": "disk"}, "got disk"),
        ({"feature_weight": 0.1}, "needs `teacher_outputs=live`"),
        (
            {"kd_kind": "standardized_kl", "temperature_schedule": "constant", "teacher_outputs": "topk"},
            "needs the logits of all classes",
        ),
    ],
)
def test_bad_values_are_refused_with_the_value(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        HPMKDTrainingArguments(str(tmp_path), report_to="none", **settings)


def test_what_is_needed_follows_from_the_settings(tmp_path):
    def make(**settings):
        return HPMKDTrainingArguments(str(tmp_path), report_to="none", **settings)

    assert make().needs_guide and make().needs_features and make().distills
    plain = make(gate="uniform", calibrate_teachers=False, temperature_schedule="constant")
    assert not plain.needs_guide and not plain.needs_features
    assert make(gate="label", calibrate_teachers=False, temperature_schedule="learned").needs_guide
    assert not make(alpha=0.0).distills
