"""Several processes of a run: they train and evaluate like one, and stop together."""

import signal
import subprocess
import time

import psutil
import pytest
import torch

from convmlp.common.command import STOPPED

from .conftest import ROOT, TINY


def read(path):
    return torch.load(path, weights_only=True)


def wait_for(text, process, seconds=240):
    end = time.monotonic() + seconds
    while text not in process.log.read_text():
        assert process.poll() is None and time.monotonic() < end, process.log.read_text()
        time.sleep(0.02)


def finish(process, code=0):
    """What a process said, which ended as it should."""
    assert process.wait(300) == code, process.log.read_text()
    return process.log.read_text()


def test_two_processes_train_together_and_one_evaluates_what_they_learned(start, images, tmp_path):
    finish(start(2, *TINY, "--batch-size", "4", "--epochs", "1", experiment="both"))
    state = read(tmp_path / "out" / "both" / "last.pth")
    assert state["world_size"] == 2 and state["updates"] == 3 and len(state["history"]) == 1
    assert "(process" not in (tmp_path / "both.log").read_text()
    rows = (tmp_path / "out" / "both" / "per_class.csv").read_text().splitlines()[1:]
    assert sum(int(row.split(",")[1]) for row in rows) == 15


@pytest.mark.slow
def test_a_process_without_validation_images_waits_for_no_one(start, make_pictures, tmp_path):
    data = make_pictures("one", classes=(3,), splits={"train": 16, "val": 1})
    said = finish(start(2, *TINY, "--batch-size", "4", "--epochs", "1", experiment="one", data=data))
    assert "(1 of 1 image)" in said and (tmp_path / "out" / "one" / "predictions.png").exists()


@pytest.mark.slow
def test_one_and_three_processes_evaluate_and_train_alike(start, make_pictures, tmp_path):
    """19 validation images do not divide by anything; Pure-MLP has no BatchNorm, and nothing mixes images."""
    data = make_pictures()
    extra = make_pictures("extra", classes=(3,), splits={"train": 8, "val": 4})
    for split in ("train", "val"):
        (extra / split / "digit3").rename(data / split / "digit3")
    arguments = ["--model", "pure_mlp_s", "--opt", "sgd", "--lr", "0.05", "--aa", "rand-m9-mstd0.5-inc1", "--no-amp"]
    best = str(tmp_path / "out" / "of1" / "best.pth")
    states, tables = [], []
    for n in (1, 3):
        batch = ["--batch-size", str(6 // n), "--drop-path", "0"]
        finish(start(n, *arguments, *batch, experiment=f"of{n}", data=data))
        states.append(read(tmp_path / "out" / f"of{n}" / "last.pth"))
        finish(start(n, "--eval", best, "--batch-size", "3", experiment=f"eval{n}", data=data))
        tables.append((tmp_path / "out" / f"eval{n}" / "per_class.csv").read_text())
    assert tables[0] == tables[1]
    one = states[0]
    for several in states[1:]:
        for name, weight in one["state_dict"].items():
            torch.testing.assert_close(several["state_dict"][name], weight, rtol=1e-4, atol=1e-6)
        for row, other in zip(one["history"], several["history"], strict=True):
            assert (row["eval_top1"], row["eval_top5"]) == (other["eval_top1"], other["eval_top5"])
            assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_signal_to_the_script_stops_all_its_processes(start, tmp_path):
    arguments = [*TINY, "--epochs", "6", "--batch-size", "2", "--resume", "auto"]
    process = start(2, *arguments)
    wait_for("epoch 0 batch 2/", process)
    process.send_signal(signal.SIGUSR1)
    assert "--resume auto goes on from there" in finish(process, STOPPED)
    state = read(tmp_path / "out" / "run" / "last.pth")
    assert state["world_size"] == 2 and len(state["history"]) < 6
    said = finish(start(2, *arguments))
    assert "resuming from" in said
    assert len(read(tmp_path / "out" / "run" / "last.pth")["history"]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("restarts", ["0", "1"])
def test_a_dead_process_ends_the_others_with_a_word_and_a_restart_goes_on(start, tmp_path, restarts):
    arguments = ["--batch-size", "2", "--epochs", "3", "--checkpoint-interval", "1", "--overwrite"]
    process = start(2, *arguments, MAX_RESTARTS=restarts)
    wait_for("epoch 0 batch 2/", process)
    ranks = [p for p in psutil.Process(process.pid).children() if "classification.py" in " ".join(p.cmdline())]
    ranks[-1].kill()
    if restarts == "0":
        assert "another process of the run has ended" in finish(process, 128 + signal.SIGKILL)
    else:
        assert "resuming from" in finish(process)
        assert len(read(tmp_path / "out" / "run" / "last.pth")["history"]) == 3


def test_the_script_refuses_a_wrong_number_of_processes():
    result = subprocess.run([ROOT / "dist_classification.sh", "all"], capture_output=True, text=True)
    assert result.returncode == 2 and "got 'all' as the number" in result.stderr
