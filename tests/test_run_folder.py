"""Who may use an output folder."""

import threading
from pathlib import Path

import pytest

from hf_hpmkd.run_folder import LOCK, RunFolderError, alone_in, claim, contents, require_same_rows
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
