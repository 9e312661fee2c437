"""Classification runs that are killed, stopped, starved of disk space, or fed with numbers that are not finite."""

import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from convmlp.classification import main
from convmlp.classification.checkpoints import find_newest, write_last
from convmlp.classification.trainer import Trainer
from convmlp.common.command import STOPPED
from convmlp.common.errors import RunError
from convmlp.common.files import lock_folder

ROOT = Path(__file__).parents[1]
SMALL = ["--img-size", "32", "--batch-size", "8", "--epochs", "2", "--warmup-epochs", "0", "--workers", "1"]
RANDOM = ["--model-ema", "--model-ema-decay", "0.9", "--mixup", "0.5", "--reprob", "0.5", "--drop", "0.1"]
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(pictures, tmp_path, capsys):
    """Runs classification.py in this process: run(options..., experiment=) -> (exit code, stderr, folder)."""

    def call(*arguments, experiment="run", data=pictures):
        code = main([*SMALL, "--output", str(tmp_path / "out"), "--experiment", experiment, *arguments, str(data)])
        return code, capsys.readouterr().err, tmp_path / "out" / experiment

    return call


@pytest.fixture
def undisturbed(run):
    """What a run with `RANDOM` leaves when nobody disturbs it."""
    code, err, folder = run(*RANDOM, experiment="undisturbed")
    assert code == 0, err
    return folder


@pytest.fixture
def start(pictures, tmp_path):
    """Starts dist_classification.sh: start(processes, options..., experiment=, limit=) -> Popen, its stderr a file."""
    started = []

    def call(processes, *arguments, experiment="run", preparation=None, **environment):
        command = [str(ROOT / "dist_classification.sh"), str(processes), *SMALL, "--output", str(tmp_path / "out")]
        command += ["--experiment", experiment, "--log-interval", "1", *arguments, str(pictures)]
        log = open(tmp_path / f"{experiment}.log", "a+")
        process = subprocess.Popen(
            command, stderr=log, env={**ENVIRONMENT, **environment}, preexec_fn=preparation, start_new_session=True
        )
        process.log = Path(log.name)
        started.append(process)
        return process

    yield call
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(text, process, seconds=240):
    end = time.monotonic() + seconds
    while text not in process.log.read_text():
        assert process.poll() is None and time.monotonic() < end, process.log.read_text()
        time.sleep(0.02)


def read(path):
    return torch.load(path, weights_only=True)


def assert_same(ours, theirs):
    """Two runs left the same checkpoint and summary."""
    assert (ours / "summary.csv").read_bytes() == (theirs / "summary.csv").read_bytes()
    ours, theirs = read(ours / "last.pth"), read(theirs / "last.pth")
    for key in ("state_dict", "state_dict_ema"):
        for name, value in theirs.get(key, {}).items():
            assert torch.equal(ours[key][name], value), name
    assert ours["history"] == theirs["history"] and ours["updates"] == theirs["updates"]


# Kills


@pytest.mark.parametrize("processes, kills", [(1, 2), (2, 1)])
def test_a_run_survives_kills_bit_for_bit(processes, kills):
    command = [sys.executable, str(ROOT / "scripts" / "survive.py"), "--kills", str(kills), "--processes"]
    result = subprocess.run([*command, str(processes)], capture_output=True, text=True, timeout=900, env=ENVIRONMENT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{kills} kills survived of {kills}, in 1 runs; largest difference 0.0" in result.stdout


# Signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_the_run_after_the_step_and_it_goes_on_from_there(run, undisturbed, monkeypatch, name):
    clip, sent = Trainer._clip_gradients, []

    def signalled(trainer):
        if trainer.batch == 2 and not sent:
            sent.append(os.kill(os.getpid(), getattr(signal, name)))
        return clip(trainer)

    monkeypatch.setattr(Trainer, "_clip_gradients", signalled)
    code, err, folder = run(*RANDOM)
    assert code == STOPPED and f"{name}: saved at batch 2 of epoch 0; --resume auto goes on from there" in err
    assert run(*RANDOM, "--resume", "auto")[0] == 0
    assert_same(folder, undisturbed)


def test_a_signal_to_the_script_stops_all_its_processes(start, tmp_path):
    arguments = ["--epochs", "3", "--batch-size", "2", "--resume", "auto"]
    process = start(2, *arguments)
    wait_for("epoch 0 batch 2/", process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == STOPPED
    assert "--resume auto goes on from there" in process.log.read_text()
    state = read(tmp_path / "out" / "run" / "last.pth")
    assert state["batch"] > 0 and not state["evaluated"] and state["world_size"] == 2
    again = start(2, *arguments)
    assert again.wait(240) == 0 and f"epoch {state['epoch']}, batch {state['batch']}" in again.log.read_text()
    assert len(read(tmp_path / "out" / "run" / "last.pth")["history"]) == 3


def test_a_signal_during_validation_does_not_wait_for_its_end(run, undisturbed, monkeypatch):
    evaluate_epoch, sent = Trainer._evaluate_epoch, []

    def signalled(trainer, train_loss):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return evaluate_epoch(trainer, train_loss)

    monkeypatch.setattr(Trainer, "_evaluate_epoch", signalled)
    code, err, folder = run(*RANDOM)
    assert code == STOPPED and "SIGTERM: saved at batch 3 of epoch 0" in err
    assert run(*RANDOM, "--resume", "auto")[0] == 0
    assert_same(folder, undisturbed)


def test_a_second_interrupt_does_not_wait(run, monkeypatch):
    clip, earlier = Trainer._clip_gradients, signal.getsignal(signal.SIGINT)

    def interrupted_twice(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return clip(trainer)

    monkeypatch.setattr(Trainer, "_clip_gradients", interrupted_twice)
    code, err, folder = run()
    assert code == 130 and "interrupted" in err and not (folder / "last.pth").exists()
    assert signal.getsignal(signal.SIGINT) is earlier


def test_a_dead_process_ends_the_others_with_a_word_and_a_restart_goes_on(start, tmp_path):
    import psutil

    arguments = ["--batch-size", "2", "--epochs", "3", "--checkpoint-interval", "1", "--overwrite"]
    for experiment, restarts in (("dead", "0"), ("restarted", "1")):
        process = start(2, *arguments, experiment=experiment, MAX_RESTARTS=restarts)
        wait_for("epoch 0 batch 2/", process)
        ranks = [p for p in psutil.Process(process.pid).children() if "classification.py" in " ".join(p.cmdline())]
        ranks[-1].kill()
        code = process.wait(120)
        log = process.log.read_text()
        if restarts == "0":
            assert code == 128 + signal.SIGKILL and "another process of the run has ended" in log
        else:
            assert code == 0 and "resuming from" in log, log
            assert len(read(tmp_path / "out" / experiment / "last.pth")["history"]) == 3


# Files


def test_a_full_disk_ends_the_run_with_the_last_good_checkpoint(start, run, tmp_path):
    code, err, folder = run("--epochs", "1")
    size = (folder / "last.pth").stat().st_size

    def limit():  # files larger than this cannot be written, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    before = (folder / "last.pth").read_bytes()
    process = start(1, "--resume", "auto", preparation=limit)
    assert process.wait(240) == 2
    last_line = process.log.read_text().splitlines()[-1]
    assert f"cannot write {folder / 'last.pth'}" in last_line or f"cannot write {folder / 'best.pth'}" in last_line
    assert (folder / "last.pth").read_bytes() == before
    assert not list(folder.glob(".*.part*"))


def test_an_output_folder_that_vanishes_ends_the_run_with_one_line(run, monkeypatch, tmp_path):
    save = Trainer.save

    def save_nowhere(trainer, evaluated):
        trainer.folder.rename(tmp_path / "elsewhere")
        save(trainer, evaluated)

    monkeypatch.setattr(Trainer, "save", save_nowhere)
    code, err, folder = run()
    assert code == 2 and f"cannot write {folder}" in err.splitlines()[-1]


def test_what_a_killed_write_leaves_is_removed(run):
    code, err, folder = run("--epochs", "1")
    (folder / ".last.123.part.pth").write_bytes(b"half a checkpoint")
    code, err, folder = run("--resume", "auto")
    assert code == 0 and not list(folder.glob(".*.part*")), err


def test_every_damage_to_a_checkpoint_is_noticed(tmp_path, make_state, caplog):
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


@pytest.fixture
def make_state():
    from convmlp.classification.checkpoints import NEEDED_TO_RESUME

    def make(epoch):
        empty = {key: kind() for key, kind in NEEDED_TO_RESUME.items()}
        return {**empty, "epoch": epoch, "state_dict": {"x": torch.arange(500.0) * epoch}}

    return make


HOLD = "import sys, time; from pathlib import Path; from convmlp.common.files import lock_folder\n"
HOLD += "file = lock_folder(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def test_two_runs_do_not_write_into_one_folder(run, tmp_path):
    folder = tmp_path / "out" / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for arguments in ([], ["--overwrite"], ["--resume", "auto"]):
            code, err, _ = run(*arguments)
            assert code == 2 and f"{folder} is in use by process {holder.pid} on " in err and err.count("\n") == 1
    finally:
        holder.kill()
        holder.wait()
    assert run("--epochs", "1")[0] == 0  # what a killed process held is free


def test_a_lock_is_free_when_its_file_is_closed(tmp_path):
    with lock_folder(tmp_path):
        pass
    other = subprocess.run([sys.executable, "-c", HOLD.replace("60", "0"), str(tmp_path)], capture_output=True)
    assert other.stdout == b"held\n"


# Numbers


@pytest.fixture
def poison(monkeypatch):
    """Makes the gradients, or the loss, of these batches of epoch 0 not finite."""

    def apply(batches, where):
        call = torch.nn.Module.__call__

        def loss_is_nan(task, *arguments, **named):
            result = call(task, *arguments, **named)
            if isinstance(result, dict) and "loss" in result and len(seen) in batches and task.training:
                result["loss"] = result["loss"] * float("nan")
            if isinstance(result, dict) and "loss" in result:
                seen.append(1)
            return result

        clip = Trainer._clip_gradients

        def gradient_is_infinite(trainer):
            if (trainer.batch - 1) in batches and trainer.epoch == 0:
                trainer.model.head.weight.grad[0, 0] = float("inf")
            return clip(trainer)

        seen = []
        if where == "loss":
            monkeypatch.setattr(torch.nn.Module, "__call__", loss_is_nan)
        else:
            monkeypatch.setattr(Trainer, "_clip_gradients", gradient_is_infinite)

    return apply


@pytest.mark.parametrize("where, what", [("loss", "the loss is nan"), ("gradient", "the norm of the gradients is inf")])
def test_numbers_that_are_not_finite_end_the_run_and_name_the_pictures(run, poison, where, what):
    poison({1}, where)
    code, err, folder = run()
    assert code == 1 and f"{what} at batch 1 of epoch 0" in err and "no checkpoint was written yet" in err
    lines = (folder / "nonfinite.txt").read_text().splitlines()
    assert lines[0] == f"epoch 0, batch 1, process 0: {what}"
    assert len(lines) == 1 + 8 and all(line.endswith(".png") for line in lines[1:])


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_some_updates_may_be_left_out_without_a_trace(run, poison, caplog, where, accumulate):
    arguments = ["--batch-size", "4", "--grad-accum-steps", str(accumulate), "--model-ema", "--skip-nonfinite", "1"]
    poison({accumulate * 2 - 1}, where)
    code, err, folder = run(*arguments)
    assert code == 0 and f"batch {accumulate * 2 - 1} of epoch 0 is left out" in caplog.text, err
    state = read(folder / "last.pth")
    assert state["skipped"] == 1 and state["updates"] == 2 * 6 // accumulate
    for part in ("state_dict", "state_dict_ema"):
        assert all(torch.isfinite(value).all() for value in state[part].values())
    assert math.isfinite(state["history"][0]["train_loss"])


def test_no_more_updates_than_allowed_are_left_out(run, poison):
    poison({0, 2}, "gradient")
    code, err, folder = run("--skip-nonfinite", "1")
    assert code == 1 and "more than --skip-nonfinite 1" in err
    assert len((folder / "nonfinite.txt").read_text().split("epoch 0")) == 3


def test_averages_and_moments_that_are_not_finite_are_not_saved(run, monkeypatch):
    save = Trainer.save

    def poison_then_save(trainer, evaluated):
        next(iter(trainer.optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = float("inf")
        save(trainer, evaluated)

    monkeypatch.setattr(Trainer, "save", poison_then_save)
    code, err, folder = run("--epochs", "1")
    assert code == 1 and "optimizer.state." in err and "exp_avg_sq is not finite" in err
    assert not (folder / "last.pth").exists()


# Several processes


def test_one_two_and_four_processes_evaluate_and_train_alike(start, make_pictures, tmp_path):
    """19 validation pictures do not divide by anything; Pure-MLP has no BatchNorm, and nothing mixes pictures."""
    make_pictures("extra", classes=(3,), splits={"train": 8, "val": 4})
    for split in ("train", "val"):
        (tmp_path / "extra" / split / "digit3").rename(tmp_path / "pictures" / split / "digit3")
    arguments = ["--model", "pure_mlp_s", "--opt", "sgd", "--lr", "0.05", "--aa", "rand-m9-mstd0.5-inc1", "--no-amp"]
    best = str(tmp_path / "out" / "of1" / "best.pth")
    states, tables = [], []
    for n in (1, 2, 4):
        process = start(n, *arguments, "--batch-size", str(8 // n), "--drop-path", "0", experiment=f"of{n}")
        assert process.wait(300) == 0, process.log.read_text()
        states.append(read(tmp_path / "out" / f"of{n}" / "last.pth"))
        assert start(n, "--eval", best, "--batch-size", "3", experiment=f"eval{n}").wait(300) == 0
        tables.append((tmp_path / "out" / f"eval{n}" / "per_class.csv").read_text())
    assert tables[0] == tables[1] == tables[2]
    one = states[0]
    for several in states[1:]:
        for name, weight in one["state_dict"].items():
            torch.testing.assert_close(several["state_dict"][name], weight, rtol=1e-4, atol=1e-6)
        for row, other in zip(one["history"], several["history"], strict=True):
            assert (row["eval_top1"], row["eval_top5"]) == (other["eval_top1"], other["eval_top5"])
            assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


def test_an_unknown_process_count_of_a_checkpoint_is_named(run, tmp_path):
    code, err, folder = run("--checkpoint-interval", "1", "--epochs", "1")
    state = read(folder / "last.pth") | {"batch": 1, "evaluated": False, "world_size": 2}
    torch.save(state, folder / "last.pth")
    code, err, _ = run("--resume", "auto")
    assert code == 2 and "continues only with the same 2 processes" in err


def test_a_locked_folder_is_named_in_python(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        holder.stdout.readline()
        with pytest.raises(RunError, match="is in use by process"):
            lock_folder(tmp_path)
    finally:
        holder.kill()
        holder.wait()
