"""What `accelerate launch --config_file` reads says what its header promises."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from hf_hpmkd.distill import check_launch, check_precision
from hf_hpmkd.recipe import load_recipe

FOLDER = Path(__file__).parents[1] / "recipes" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_it(path):
    config = load_config_from_file(str(path))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}[path.stem.split("_")[0]]
    assert config.distributed_type == kind
    assert config.num_processes >= 2 and not config.use_cpu  # which would start one process
    assert config.fsdp_config.get("fsdp_version") == (2 if kind == "FSDP" else None)
    assert config.deepspeed_config.get("zero_stage") == (2 if kind == "DEEPSPEED" else None)
    if kind == "FSDP":  # the student is saved whole
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_header_says_how_and_whether_it_was_tried(path):
    text = path.read_text(encoding="utf-8")
    assert all(word in text for word in ("# Command:", "# Hardware:", "# Tried:"))
    assert f"--config_file recipes/accelerate/{path.name} -m hf_hpmkd distill" in text


def test_there_is_one_for_each_way():
    assert {path.stem.split("_")[0] for path in FILES} == {"ddp", "fsdp2", "deepspeed"}


def test_fp16_needs_a_gpu():
    recipe = load_recipe("quickstart", ["training.precision=fp16"])
    check_precision(recipe, "cuda")
    with pytest.raises(ValueError, match="fp16 needs a GPU, .*Use fp32 or bf16"):
        check_precision(recipe, "cpu")
    check_precision(load_recipe("quickstart", ["training.precision=bf16"]), "cpu")


@pytest.mark.parametrize("asked", ["FSDP", "DEEPSPEED"])
def test_what_accelerate_leaves_out_without_a_gpu_is_refused(asked, monkeypatch):
    check_launch("cpu")
    monkeypatch.setenv(f"ACCELERATE_USE_{asked}", "true")
    check_launch("cuda")
    with pytest.raises(ValueError, match=f"accelerate has {asked} for GPUs alone.*ddp_cpu.yaml"):
        check_launch("cpu")


@pytest.mark.parametrize(
    "asked",
    [
        {"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    ],
    ids=["fsdp", "deepspeed"],
)
def test_what_would_leave_a_student_in_pieces_is_refused(asked, monkeypatch):
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="FULL_STATE_DICT, or DeepSpeed up to ZeRO stage 2"):
        check_launch("cuda")
