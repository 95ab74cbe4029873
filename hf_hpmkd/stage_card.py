"""The card of one intermediate model of a chain, which is usable alone: a README.md made from the run's record."""

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_hpmkd.model_card import (
    CARD_FILE,
    data_name,
    student_name,
    task,
    usage,
)
from hf_hpmkd.public_record import data_on_hub, named_sources
from hf_hpmkd.run_record import RunRecord, StageRecord, last_name

_TABULAR = "tabular-classification"


def write_stage_card(record: RunRecord, stage: StageRecord, folder: str | os.PathLike[str]) -> Path:
    """Writes the card of one intermediate model into its folder and returns it. record: of the run, still going on."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    public = named_sources(record.public())
    kind = task(public)
    tags = ["knowledge-distillation", "hf_hpmkd", kind, "custom_code" if "auto_map" in config else None]
    values: dict[str, Any] = {
        "library_name": "hf_hpmkd" if kind == _TABULAR else "transformers",
        "pipeline_tag": kind,
        "tags": [tag for tag in tags if tag],
        "datasets": [data_name(public)] if data_on_hub(public) else None,
    }
    data = ModelCardData(**{key: value for key, value in values.items() if value is not None})
    accuracy = "" if stage.accuracy is None else f" It answers {stage.accuracy:.2%} of the validation rows right."
    sections = [
        f"# {last_name(stage.model)}, {stage.name} of a distillation chain",
        f"An intermediate model with {stage.num_params:,} parameters, trained with `hf_hpmkd` on {data_name(public)} "
        f"from {', '.join(stage.guides)}, to teach a smaller student ({student_name(public)}). It can be used alone."
        f"{accuracy} It was not measured on test rows.",
        usage(public, config, f'"chain/{folder.name}"  # the folder of this model'),
    ]
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    path = folder / CARD_FILE
    card.save(path)
    return path
