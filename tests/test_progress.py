"""What progress bars leave in a file, and what in a terminal."""

import io
import itertools
import sys

import pytest

from hf_hpmkd.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def states(monkeypatch: pytest.MonkeyPatch, out: io.StringIO, **options: bool) -> list[str]:
    """What a bar of 1,000 steps, each of them a second or more, draws one after the other."""
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr("tqdm.std.time", itertools.count(1_000_000.0).__next__)
    bar = progress_bar(total=1000, desc="work", miniters=1, **options)
    for _ in range(1000):
        bar.update()
    bar.close()
    return [state for state in out.getvalue().split("\r") if "work" in state]


def test_a_file_gets_a_state_now_and_then_and_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = states(monkeypatch, io.StringIO())
    assert 20 < len(drawn) < 80
    assert "1000/1000" in drawn[-1]


def test_a_terminal_sees_every_second_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(states(monkeypatch, Terminal())) >= 1000


def test_short_work_inside_longer_work_stays_out_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(monkeypatch, io.StringIO(), passing=True) == []
    assert len(states(monkeypatch, Terminal(), passing=True)) >= 1000


def test_a_bar_that_is_not_shown_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(monkeypatch, Terminal(), shown=False) == []
