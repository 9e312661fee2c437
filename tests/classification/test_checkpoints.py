"""Checkpoint files: written whole or not at all, checked when read."""

import resource
import signal
import subprocess
import sys

import pytest
import torch

from convmlp.classification.checkpoints import NEEDED_TO_RESUME, find_newest, write_checkpoint, write_last
from convmlp.classification.trainer import Trainer
from convmlp.common.errors import RunError


def make_state(epoch):
    empty = {key: kind() for key, kind in NEEDED_TO_RESUME.items()}
    return {**empty, "epoch": epoch, "state_dict": {"x": torch.arange(500.0) * epoch}}


def test_every_damage_to_a_checkpoint_is_noticed(tmp_path, caplog):
    """The newest is cut or changed anywhere: the one before it is taken, and that is said."""
    write_last(tmp_path, make_state(1))
    write_last(tmp_path, make_state(2))
    good = (tmp_path / "last.pth").read_bytes()
    generator = torch.Generator().manual_seed(0)
    for trial in range(200):
        place = int(torch.randint(len(good), (), generator=generator))
        if trial % 2:
            damaged = good[:place]
        else:
            damaged = good[:place] + bytes([good[place] ^ (1 << trial % 8)]) + good[place + 1 :]
        (tmp_path / "last.pth").write_bytes(damaged)
        path, state = find_newest(tmp_path)
        if path.name == "last.pth":  # a flipped bit that changes nothing that is read, such as a time stamp
            assert state["epoch"] == 2 and torch.equal(state["state_dict"]["x"], make_state(2)["state_dict"]["x"])
        else:
            assert state["epoch"] == 1
    assert "trying the one before it" in caplog.text


def test_a_failed_write_leaves_the_checkpoint_as_it_was(tmp_path):
    path = tmp_path / "last.pth"
    write_checkpoint(path, {"x": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises((RunError, AttributeError, TypeError)):
        write_checkpoint(path, {"x": (i for i in range(2))})  # cannot be pickled
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_a_full_disk_is_said_with_the_space_that_is_needed(tmp_path):
    (tmp_path / "last.pth").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device, 4 MB needed$"):
        write_checkpoint(tmp_path / "last.pth", {"x": torch.zeros(1_000_000), "y": [torch.zeros(10)]})


WRITE = """
import sys, torch
from pathlib import Path
from convmlp.classification.checkpoints import write_checkpoint
from convmlp.common.errors import RunError
try:
    write_checkpoint(Path(sys.argv[1]), {"x": torch.zeros(1_000_000)})
except RunError as error:
    print(error)
"""


def test_a_file_that_may_not_be_so_large_leaves_the_one_before_it(tmp_path):
    path = tmp_path / "last.pth"
    write_checkpoint(path, {"x": torch.ones(2)})
    before = path.read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    command = [sys.executable, "-c", WRITE, str(path)]
    shown = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert shown.stdout == f"cannot write {path}: File too large, 4 MB needed\n", shown.stderr
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_an_output_folder_that_vanishes_ends_the_run_with_one_line(run, monkeypatch, tmp_path):
    save = Trainer.save

    def save_nowhere(trainer, evaluated):
        trainer.folder.rename(tmp_path / "elsewhere")
        save(trainer, evaluated)

    monkeypatch.setattr(Trainer, "save", save_nowhere)
    code, said, folder = run()
    assert code == 2 and said.splitlines()[-1].endswith(
        f"cannot write {folder / 'best.pth'}: No such file or directory"
    )


def test_a_checkpoint_of_odd_content_is_refused_in_one_line(run, trained, tmp_path, capsys):
    state = torch.load(trained.folder / "last.pth", weights_only=True)
    for key, value in {"epoch": "x", "history": None, "args": [1], "optimizer": 3}.items():
        torch.save({**state, key: value}, tmp_path / "odd.pth")
        code, _, _ = run("--resume", str(tmp_path / "odd.pth"))
        error = capsys.readouterr().err
        assert code == 2 and f"is not a classification.py checkpoint: its {key} is {value!r}" in error
        assert error.count("\n") == 1
