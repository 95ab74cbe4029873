"""Settings that every test shares."""

import os
import sys
from pathlib import Path

# Set before anything imports torch or the Hub client.
sys.path.insert(0, str(Path(__file__).parent))  # for `import tiny`, in every import mode
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _same_machine(tmp_path_factory):
    """For fixtures of a wider scope too: one thread, which rounds as it always does, and no memory of the user."""
    torch.set_num_threads(1)
    os.environ["HPMKD_MEMORY"] = str(tmp_path_factory.mktemp("memory"))


@pytest.fixture(autouse=True)
def _same_start(tmp_path, monkeypatch):
    """Every test starts from the same random state, in a cache and home of its own."""
    torch.manual_seed(0)
    monkeypatch.setenv("HPMKD_CACHE", str(tmp_path / "hpmkd-cache"))
    monkeypatch.setenv("HPMKD_MEMORY", str(tmp_path / "hpmkd-memory"))


@pytest.fixture(scope="session", autouse=True)
def _short_runs():
    from tiny import shorten_runs  # not above: the process that hands out the tests needs none of it

    shorten_runs()


@pytest.fixture(scope="module")
def whole_runs():
    """`full_runs` for the tests of a module."""
    from tiny import full_runs

    with full_runs():
        yield
