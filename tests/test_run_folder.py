"""Who may use an output folder."""

import threading
from pathlib import Path

import pytest

from hf_hpmkd.run_folder import (
    LOCK,
    REPLACED,
    RunFolderError,
    alone_in,
    claim,
    contents,
    drop_replaced,
    require_same_processes,
    require_same_rows,
    restore_replaced,
)
from hf_hpmkd.run_record import RECORD_FILE, RunRecord


def test_a_folder_is_for_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    told: list[BaseException] = []

    def other() -> None:
        try:
            with alone_in(folder):
                pass
        except RunFolderError as error:
            told.append(error)

    with alone_in(folder):
        assert claim(folder, "a") is None  # the lock is nothing that somebody has put there
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another is running in" in str(told[0])
    assert not contents(folder) and not (folder / LOCK).exists()
    other()
    assert len(told) == 1


def test_what_is_replaced_is_removed_while_others_are_kept_out(tmp_path: Path) -> None:
    RunRecord(recipe_fingerprint="a").save(tmp_path / RECORD_FILE)
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("{}")
    with alone_in(tmp_path):
        assert claim(tmp_path, "b", overwrite=True) is None
        assert not contents(tmp_path) and (tmp_path / LOCK).exists()


def begun(folder: Path, status: str, fingerprint: str = "a") -> None:
    RunRecord(status=status, recipe_fingerprint=fingerprint).save(folder / RECORD_FILE)
    (folder / "direct" / "checkpoints").mkdir(parents=True)
    (folder / "direct" / "config.json").write_text("{}")


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_an_unfinished_run_of_the_same_recipe_is_not_replaced_but_goes_on(tmp_path: Path, status: str) -> None:
    begun(tmp_path, status)
    with alone_in(tmp_path):
        record = claim(tmp_path, "a", overwrite=True)
    assert record is not None and record.status == status
    assert contents(tmp_path) == {RECORD_FILE, "direct"} and (tmp_path / "direct" / "config.json").read_text() == "{}"


@pytest.mark.parametrize(("status", "fingerprint"), [("completed", "a"), ("completed", "b"), ("interrupted", "b")])
def test_a_finished_run_and_one_of_another_recipe_are_replaced(tmp_path: Path, status: str, fingerprint: str) -> None:
    begun(tmp_path, status, fingerprint)
    with alone_in(tmp_path):
        assert claim(tmp_path, "a", overwrite=True) is None
    assert not contents(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"format_version": 1000000}'])
def test_a_run_whose_record_cannot_be_read_is_replaced(tmp_path: Path, content: bytes) -> None:
    begun(tmp_path, "interrupted")
    (tmp_path / RECORD_FILE).write_bytes(content)
    with alone_in(tmp_path):
        with pytest.raises(ValueError):
            claim(tmp_path, "a")
        assert (tmp_path / "direct" / "config.json").exists()
        assert claim(tmp_path, "a", overwrite=True) is None
    assert not contents(tmp_path)


def test_rows_that_have_changed_are_refused(tmp_path: Path) -> None:
    known = {"train": "1", "test": "2"}
    assert require_same_rows(tmp_path, {"train": "0"}, known) == known  # nothing was trained, so data may be mended
    (tmp_path / "direct").mkdir()
    assert require_same_rows(tmp_path, {}, known) == require_same_rows(tmp_path, known, known) == known
    with pytest.raises(RunFolderError, match="rows of test are others than the run in"):
        require_same_rows(tmp_path, known, {"train": "1", "test": "3"})
    with pytest.raises(RunFolderError, match="or replace the run with `output.overwrite=true`"):
        require_same_rows(tmp_path, known, {"train": "1", "test": "3"}, finished=True)


@pytest.mark.parametrize("made", [False, True])
def test_a_run_that_is_replaced_goes_when_the_new_one_can_be_trained_and_not_before(tmp_path: Path, made: bool) -> None:
    begun(tmp_path, "completed")
    assert claim(tmp_path, "b", overwrite=True) is None
    RunRecord(recipe_fingerprint="b").save(tmp_path / RECORD_FILE)
    other = claim(tmp_path, "b")  # as a run's other processes do
    assert other is not None and other.recipe_fingerprint == "b"
    if made:
        (tmp_path / "teachers").mkdir()
    restore_replaced(tmp_path)  # as after a fault
    if made:  # nothing that was made is lost, nor what was there before
        assert contents(tmp_path) == {RECORD_FILE, "teachers"} and (tmp_path / REPLACED / "direct").is_dir()
        assert claim(tmp_path, "c", overwrite=True) is None  # of the two the finished one is the one to keep
        restore_replaced(tmp_path)
    assert contents(tmp_path) == {RECORD_FILE, "direct"} and not (tmp_path / REPLACED).exists()
    assert RunRecord.load(tmp_path / RECORD_FILE).recipe_fingerprint == "a"
    assert claim(tmp_path, "b", overwrite=True) is None
    drop_replaced(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_with_as_many_processes_as_before(tmp_path: Path) -> None:
    require_same_processes(tmp_path, 2, 1)  # nothing was trained
    begun(tmp_path, "interrupted")
    require_same_processes(tmp_path, 2, 2)
    require_same_processes(tmp_path, None, 2)
    with pytest.raises(RunFolderError, match="began with 2 and there are 1"):
        require_same_processes(tmp_path, 2, 1)
