"""Files that are whole or not there, and folders that belong to one run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from convmlp.common.errors import RunError
from convmlp.common.files import check_writable, lock_folder, remove_leftovers, was_restarted, write_atomically


def test_a_failure_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("earlier")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise ValueError

    with pytest.raises(ValueError):
        write_atomically(path, fail)
    assert path.read_text() == "earlier"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_file_is_written_where_folders_cannot_be_opened(tmp_path, monkeypatch):
    """As on Windows, where that raises PermissionError."""
    really_open = os.open

    def open_files_alone(path, flags, *more, **settings):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return really_open(path, flags, *more, **settings)

    monkeypatch.setattr(os, "open", open_files_alone)
    write_atomically(tmp_path / "file.txt", lambda temporary: temporary.write_text("whole"))
    assert (tmp_path / "file.txt").read_text() == "whole"


def test_links_are_followed_and_what_is_not_a_file_is_written_into(tmp_path):
    (tmp_path / "target").write_text("earlier")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(tmp_path / "link", lambda temporary: temporary.write_text("new"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
    write_atomically(Path("/dev/null"), lambda path: path.write_text("gone"))
    assert not Path("/dev/null").is_file()


def test_what_cannot_be_written_is_named_before_long_work(tmp_path):
    with pytest.raises(RunError, match="is a folder"):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write to the output folder"):
        check_writable(tmp_path / "file" / "below")


HOLD = "import sys, time; from pathlib import Path; from convmlp.common.files import lock_folder\n"
HOLD += "lock = lock_folder(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def test_a_folder_belongs_to_one_process_until_that_ends_in_whatever_way(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"{tmp_path} is in use by process {process.pid} on .*; two runs"):
            lock_folder(tmp_path)
    finally:
        process.kill()
        process.wait()
    for _ in range(2):  # who leaves the context leaves the folder to the next
        with lock_folder(tmp_path), pytest.raises(RunError, match="in use by process"):
            lock_folder(tmp_path)


def test_a_process_that_torchrun_started_again_knows_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    with lock_folder(tmp_path):
        pass
    assert not was_restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert was_restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "other")
    assert not was_restarted(tmp_path)
    assert not was_restarted(tmp_path / "new")


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".last.123.part.pth").touch()
    (tmp_path / "last.pth").touch()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["last.pth"]
