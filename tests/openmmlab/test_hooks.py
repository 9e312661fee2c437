"""Detection and segmentation runs that are stopped, that diverge, or that lose their disk."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from convmlp.openmmlab.survival import Diverged, check_finite
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from test_model import golden_weights
from test_openmmlab_runs import (  # noqa: F401
    CONFIGS,
    QUICK_DETECTION,
    QUICK_SEGMENTATION,
    ROOT,
    data,
    logged,
    pytestmark,
    quick,
    quick_segmentation,
    run,
    said,
    workplace,
)

import convmlp
from convmlp.common.command import STOPPED
from convmlp.openmmlab.checkpoints import find_checkpoints, read_run_checkpoint
from convmlp.openmmlab.runner import CarefulRunner

WORKERS = [f"{part}_dataloader.{key}" for part in ("train", "val") for key in ("num_workers=1", "persistent_workers=1")]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("torch_home")
    (home / "hub" / "checkpoints").mkdir(parents=True)
    state_dict = golden_weights(convmlp.convmlp_s()).state_dict()
    torch.save(state_dict, home / "hub" / "checkpoints" / "convmlp_s_imagenet.pth")
    return home


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data, weights) -> Path:  # noqa: F811
    """A run of two epochs, of 3 iterations each, that keeps one checkpoint."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    present = []
    save = CarefulRunner.save_checkpoint

    def spy(runner, out_dir, filename, *args, **kwargs):
        present.append((filename, sorted(path.name for path in Path(out_dir).glob("*.pth"))))
        save(runner, out_dir, filename, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(weights))
        patch.setattr(CarefulRunner, "save_checkpoint", spy)
        options = quick("default_hooks.checkpoint.max_keep_ckpts=1", epochs=2)
        assert run(QUICK_DETECTION, data / "detection", "--work-dir", folder, *options) == 0
    folder.with_name("present").write_text(repr(present))
    return folder


@HOOKS.register_module()
class Accident(Hook):
    """Something happens before a step of training or validation."""

    priority = "VERY_HIGH"

    def __init__(self, what: str, iteration: int, validating: bool = False):
        self.what = what
        self.iteration = iteration
        self.validating = validating

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration and not self.validating:
            self._happen(runner)

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration and self.validating:
            self._happen(runner)

    def _happen(self, runner):
        if self.what.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.what))
        elif self.what == "lost folder":
            shutil.rmtree(runner.work_dir)
        elif self.what == "a file in its place":
            shutil.rmtree(runner.work_dir)
            Path(runner.work_dir).touch()


def with_hooks(config: str, *hooks: dict) -> Path:
    """A config of the user's own, on top of one of ours."""
    folder = Path("own") / Path(config).parent
    folder.mkdir(parents=True)
    file = folder / "own.py"
    file.write_text(f"_base_ = {str(CONFIGS / config)!r}\ncustom_hooks = {list(hooks)!r}\n")
    return file.resolve()


def same_weights(a: Path, b: Path) -> bool:
    first, second = (read_run_checkpoint(path) for path in (a, b))
    assert [first["meta"][key] for key in ("epoch", "iter")] == [second["meta"][key] for key in ("epoch", "iter")]
    return all(torch.equal(value, second["state_dict"][key]) for key, value in first["state_dict"].items())


@contextmanager
def process(*command: object, log: str) -> Iterator[subprocess.Popen]:
    """A process with a group of its own, of which nothing is left at the end."""
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    with open(log, "w") as out:
        started = subprocess.Popen(
            [str(part) for part in command], env=env, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield started
    finally:
        try:
            os.killpg(started.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        started.wait()


def wait_for(text: str, log: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while text not in Path(log).read_text():
        assert time.monotonic() < end, Path(log).read_text()[-3000:]
        time.sleep(0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit on CPUs")
def test_detection_goes_on_within_the_epoch_that_a_scheduler_ended(data, finished, said):  # noqa: F811
    """SIGTERM comes to all processes of the job, also to those that load data."""
    command = [sys.executable, ROOT / "detection.py", CONFIGS / QUICK_DETECTION, data / "detection"]
    options = quick(epochs=2)
    with process(*command, "--work-dir", "run", *options, *WORKERS, log="log.txt") as started:
        wait_for("Epoch(train) [1][1/3]", "log.txt")
        os.killpg(started.pid, signal.SIGTERM)
        assert started.wait(60) == STOPPED
    text = Path("log.txt").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("detection.py:")]
    [stopped] = find_checkpoints(Path("run"))
    assert line.startswith("detection.py: SIGTERM: stopped after iteration ") and line.endswith(str(stopped.resolve()))
    assert "Traceback" not in text
    assert read_run_checkpoint(stopped)["meta"]["iter"] in (1, 2)

    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", "--resume", *options) == 0
    assert "epoch 1 goes on after" in said()
    assert sorted(entry["step"] for entry in logged(Path("run")) if "loss" in entry) == [1, 2, 3, 4, 5, 6]
    assert not stopped.exists()
    assert same_weights(Path("run/epoch_2.pth"), finished / "epoch_2.pth")


def test_two_processes_stop_at_the_same_iteration(data, said):  # noqa: F811
    options = quick_segmentation(
        "train_cfg.max_iters=8", "default_hooks.checkpoint.interval=8", "train_cfg.val_interval=8"
    )
    command = [ROOT / "dist_segmentation.sh", CONFIGS / QUICK_SEGMENTATION, 2, data / "segmentation"]
    with process(*command, "--work-dir", "run", *options, log="log.txt") as started:
        wait_for("Iter(train) [2/8]", "log.txt")
        started.send_signal(signal.SIGTERM)
        started.wait(60)
    text = Path("log.txt").read_text()
    assert text.count("segmentation.py: SIGTERM: stopped after iteration") == 1
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / "segmentation.py") not in text
    [stopped] = find_checkpoints(Path("run"))

    assert run(QUICK_SEGMENTATION, data / "segmentation", "--work-dir", "run", "--resume", *options) == 0
    assert f"Advance dataloader {read_run_checkpoint('run/iter_8.pth')['meta']['iter']}" not in said()
    assert sorted(entry["step"] for entry in logged(Path("run")) if "loss" in entry) == list(range(1, 9))
    assert [path.name for path in find_checkpoints(Path("run"))] == ["iter_8.pth"]


def test_a_run_of_iterations_stops_and_goes_on_bit_for_bit(data, said):  # noqa: F811
    hook = dict(type="Accident", what="SIGUSR1", iteration=2)
    options = quick_segmentation()
    assert run(QUICK_SEGMENTATION, data / "segmentation", "--work-dir", "whole", *options) == 0
    own = with_hooks(QUICK_SEGMENTATION, hook)
    assert run(own, data / "segmentation", "--work-dir", "run", *options) == STOPPED
    assert "segmentation.py: SIGUSR1: stopped after iteration 3; --resume continues from" in said()
    assert run(QUICK_SEGMENTATION, data / "segmentation", "--work-dir", "run", "--resume", *options) == 0
    assert same_weights(Path("run/iter_4.pth"), Path("whole/iter_4.pth"))
    assert not Path("run/iter_3.pth").exists()


def test_a_validation_that_was_stopped_is_done_at_the_next_start(data, said):  # noqa: F811
    hook = dict(type="Accident", what="SIGTERM", iteration=3, validating=True)
    own = with_hooks(QUICK_DETECTION, hook, dict(type="EMAHook"))
    assert run(own, data / "detection", "--work-dir", "run", *quick()) == STOPPED
    assert "stopped in the validation after iteration 3; --resume continues from" in said()
    assert same_weights(Path("run/iter_3.pth"), Path("run/epoch_1.pth"))
    trained = [read_run_checkpoint(f"run/{name}.pth")["ema_state_dict"] for name in ("iter_3", "epoch_1")]
    assert all(torch.equal(value, trained[1][key]) for key, value in trained[0].items())

    own.write_text(own.read_text().replace("SIGTERM", "nothing"))
    assert run(own, data / "detection", "--work-dir", "run", "--resume", *quick()) == 0
    assert "best: " in said() and Path("run/best_coco_bbox_mAP_epoch_1.pth").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_pictures(data, said):  # noqa: F811
    options = quick("optim_wrapper.optimizer.lr=1e30", "default_hooks.checkpoint.by_epoch=False")
    more = ["default_hooks.checkpoint.interval=1", "param_scheduler.0.start_factor=1.0"]
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", *options, *more) == 1
    text = said()
    [line] = [line for line in text.splitlines() if line.startswith("detection.py:")]
    pictures = Path("run/nonfinite_batch.txt").resolve()
    assert line.startswith("detection.py: iteration 2, process 0: loss is nan") and "Traceback" not in text
    assert f"listed in {pictures}; the last good checkpoint is {Path('run/iter_1.pth').resolve()}" in line
    title, *paths = pictures.read_text().splitlines()
    assert len(paths) == 4 and all(Path(path).is_file() for path in paths)
    assert [path.name for path in find_checkpoints(Path("run"))] == ["iter_1.pth"]


def test_weights_that_are_not_finite_are_not_written():
    class Run:
        last_saved = resumed_from = None

    good = {"meta": {"iter": 7}, "state_dict": {"weight": torch.ones(2), "count": torch.tensor(1)}}
    check_finite(Run(), good)
    averaged = {**good, "ema_state_dict": {"module.weight": torch.tensor([1.0, torch.inf])}}
    with pytest.raises(Diverged, match="^module.weight is not finite at iteration 7, so no checkpoint is written"):
        check_finite(Run(), averaged)


def test_old_checkpoints_go_when_the_new_one_is_there(finished):
    present = eval(finished.with_name("present").read_text())
    names = [name for name, _ in present]
    assert names[0] == "epoch_1.pth" and "epoch_2.pth" in names
    assert next("epoch_1.pth" in files for name, files in present if name == "epoch_2.pth")
    best = [name for name in names if name.startswith("best")]
    assert all(best[0] in files for name, files in present if name in best[1:])
    assert [path.name for path in find_checkpoints(finished)] == ["epoch_2.pth"]
    assert len(list(finished.glob("best_*.pth"))) == 1


def test_a_full_disk_leaves_the_last_checkpoints(data, finished, said):  # noqa: F811
    shutil.copytree(finished, "run")
    before = sorted(path.name for path in Path("run").glob("*.pth"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**22, hard))
    try:
        options = quick("default_hooks.checkpoint.max_keep_ckpts=1", epochs=3)
        assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", "--resume", *options) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    text = said()
    assert f"error: cannot write {Path('run').resolve()}/epoch_3.pth: File too large" in text
    assert "Traceback" not in text
    assert sorted(path.name for path in Path("run").iterdir() if path.suffix == ".pth") == before
    assert read_run_checkpoint("run/epoch_2.pth")["meta"]["epoch"] == 2


@pytest.mark.parametrize("what", ["lost folder", "a file in its place"])
def test_a_lost_folder_ends_the_run_in_one_line(what, data, said):  # noqa: F811
    own = with_hooks(QUICK_SEGMENTATION, dict(type="Accident", what=what, iteration=1))
    assert run(own, data / "segmentation", "--work-dir", "run", *quick_segmentation()) == 2
    text = said()
    assert "segmentation.py: error: cannot write" in text and "Traceback" not in text


def test_two_runs_do_not_share_a_folder(data, said):  # noqa: F811
    Path("run").mkdir()
    hold = "import fcntl, time; f = open('run/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True)"
    with process(sys.executable, "-c", f"{hold}; time.sleep(60)", log="log.txt"):
        wait_for("held", "log.txt")
        assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", "--overwrite", *quick()) == 2
    assert "run is in use by" in said()
    assert [path.name for path in Path("run").iterdir()] == [".lock"]


def test_processes_that_torchrun_starts_again_go_on(data, finished, monkeypatch, said):  # noqa: F811
    shutil.copytree(finished, "run")
    Path("run/.epoch_3.123.part.pth").touch()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    options = quick(epochs=2)
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", "--overwrite", *options) == 0
    text = said()
    assert "torchrun started the processes again: the run goes on" in text and "resumed epoch: 2, iter: 6" in text
    assert not Path("run/.epoch_3.123.part.pth").exists()
