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
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from small_runs import (
    FPN,
    RETINANET,
    ROOT,
    TINY,
    logged,
    own_config,
    quick_detection,
    quick_segmentation,
    run,
)

from convmlp.common.command import STOPPED
from convmlp.common.errors import Diverged
from convmlp.openmmlab.checkpoints import find_checkpoints, read_run_checkpoint
from convmlp.openmmlab.hooks import check_finite
from convmlp.openmmlab.runner import CarefulRunner

WORKERS = [f"{part}_dataloader.{key}" for part in ("train", "val") for key in ("num_workers=1", "persistent_workers=1")]


@pytest.fixture
def boxes(scenes) -> Path:
    return scenes / "detection"


@pytest.fixture
def maps(scenes) -> Path:
    return scenes / "segmentation"


def tiny_config(base: str) -> Path:
    """A config that other processes can run, too: it brings the tiny variant."""
    Path("tiny_variant.py").write_text(f"from convmlp.zoo import VARIANTS\n\nVARIANTS['tiny'] = {TINY}\n")
    return own_config(base, "custom_imports = dict(imports=['convmlp.openmmlab', 'tiny_variant'])")


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
    return own_config(config, f"custom_hooks = {list(hooks)!r}")


def same_weights(a: Path, b: Path) -> bool:
    first, second = (read_run_checkpoint(path) for path in (a, b))
    assert [first["meta"][key] for key in ("epoch", "iter")] == [second["meta"][key] for key in ("epoch", "iter")]
    return all(torch.equal(value, second["state_dict"][key]) for key, value in first["state_dict"].items())


@contextmanager
def process(*command: object, log: str) -> Iterator[subprocess.Popen]:
    """A process with a group of its own, of which nothing is left at the end."""
    paths = os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
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


def wait_for(text: str, log: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while text not in Path(log).read_text():
        assert time.monotonic() < end, Path(log).read_text()[-3000:]
        time.sleep(0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit on CPUs")
def test_detection_goes_on_within_the_epoch_that_a_scheduler_ended(boxes, finished, said):
    """SIGTERM comes to all processes of the job, also to those that load data."""
    command = [sys.executable, ROOT / "detection.py", tiny_config(RETINANET), boxes]
    options = quick_detection(epochs=2)
    for _ in range(5):
        with process(*command, "--work-dir", "run", *options, *WORKERS, log="log.txt") as started:
            wait_for("Epoch(train) [1][1/3]", "log.txt")
            os.killpg(started.pid, signal.SIGTERM)
            assert started.wait(180) == STOPPED
        if read_run_checkpoint(find_checkpoints(Path("run"))[0])["meta"]["iter"] < 3:
            break
        shutil.rmtree("run")  # the signal came when the epoch of three iterations was over
    text = Path("log.txt").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("detection.py:")]
    [stopped] = find_checkpoints(Path("run"))
    assert line.startswith("detection.py: SIGTERM: stopped after iteration ") and line.endswith(str(stopped.resolve()))
    assert "Traceback" not in text
    assert read_run_checkpoint(stopped)["meta"]["iter"] in (1, 2)

    assert run(RETINANET, boxes, "--work-dir", "run", "--resume", *options) == 0
    assert "epoch 1 goes on after" in said()
    assert sorted(entry["step"] for entry in logged(Path("run")) if "loss" in entry) == [1, 2, 3, 4, 5, 6]
    assert not stopped.exists()
    assert same_weights(Path("run/epoch_2.pth"), finished(RETINANET) / "epoch_2.pth")


@pytest.mark.slow
def test_two_processes_stop_at_the_same_iteration(maps, said):
    options = quick_segmentation(
        "train_cfg.max_iters=8", "default_hooks.checkpoint.interval=8", "train_cfg.val_interval=8"
    )
    command = [ROOT / "dist_segmentation.sh", tiny_config(FPN), 2, maps]
    with process(*command, "--work-dir", "run", *options, log="log.txt") as started:
        wait_for("Iter(train) [2/8]", "log.txt")
        started.send_signal(signal.SIGTERM)
        started.wait(180)
    text = Path("log.txt").read_text()
    assert text.count("segmentation.py: SIGTERM: stopped after iteration") == 1
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / "segmentation.py") not in text
    [stopped] = find_checkpoints(Path("run"))

    assert run(FPN, maps, "--work-dir", "run", "--resume", *options) == 0
    assert f"Advance dataloader {read_run_checkpoint('run/iter_8.pth')['meta']['iter']}" not in said()
    assert sorted(entry["step"] for entry in logged(Path("run")) if "loss" in entry) == list(range(1, 9))
    assert [path.name for path in find_checkpoints(Path("run"))] == ["iter_8.pth"]


def test_a_run_of_iterations_stops_and_goes_on_bit_for_bit(maps, finished, said):
    hook = dict(type="Accident", what="SIGUSR1", iteration=2)
    options = quick_segmentation()
    own = with_hooks(FPN, hook)
    assert run(own, maps, "--work-dir", "run", *options) == STOPPED
    assert "segmentation.py: SIGUSR1: stopped after iteration 3; --resume continues from" in said()
    assert run(FPN, maps, "--work-dir", "run", "--resume", *options) == 0
    assert same_weights(Path("run/iter_4.pth"), finished(FPN) / "iter_4.pth")
    assert not Path("run/iter_3.pth").exists()


def test_a_validation_that_was_stopped_is_done_at_the_next_start(boxes, said):
    hook = dict(type="Accident", what="SIGTERM", iteration=3, validating=True)
    own = with_hooks(RETINANET, hook, dict(type="EMAHook"))
    assert run(own, boxes, "--work-dir", "run", *quick_detection()) == STOPPED
    assert "stopped in the validation after iteration 3; --resume continues from" in said()
    assert same_weights(Path("run/iter_3.pth"), Path("run/epoch_1.pth"))
    trained = [read_run_checkpoint(f"run/{name}.pth")["ema_state_dict"] for name in ("iter_3", "epoch_1")]
    assert all(torch.equal(value, trained[1][key]) for key, value in trained[0].items())

    own.write_text(own.read_text().replace("SIGTERM", "nothing"))
    assert run(own, boxes, "--work-dir", "run", "--resume", *quick_detection()) == 0
    assert "best: " in said() and Path("run/best_coco_bbox_mAP_epoch_1.pth").exists()


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_images(boxes, said):
    options = quick_detection("optim_wrapper.optimizer.lr=1e30", "default_hooks.checkpoint.by_epoch=False")
    more = ["default_hooks.checkpoint.interval=1", "param_scheduler.0.start_factor=1.0"]
    assert run(RETINANET, boxes, "--work-dir", "run", *options, *more) == 1
    text = said()
    [line] = [line for line in text.splitlines() if line.startswith("detection.py:")]
    images = Path("run/nonfinite.txt").resolve()
    assert line.startswith("detection.py: iteration 2, process 0: loss is nan") and "Traceback" not in text
    assert f"listed in {images}; the last good checkpoint is {Path('run/iter_1.pth').resolve()}" in line
    title, *paths = images.read_text().splitlines()
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


def test_old_checkpoints_go_when_the_new_one_is_there(boxes, monkeypatch):
    present = []
    save = CarefulRunner.save_checkpoint

    def spy(runner, out_dir, filename, *args, **kwargs):
        present.append((filename, sorted(path.name for path in Path(out_dir).glob("*.pth"))))
        save(runner, out_dir, filename, *args, **kwargs)

    monkeypatch.setattr(CarefulRunner, "save_checkpoint", spy)
    options = quick_detection("default_hooks.checkpoint.max_keep_ckpts=1", epochs=3)
    assert run(RETINANET, boxes, "--work-dir", "run", *options) == 0
    names = [name for name, _ in present]
    assert names[0] == "epoch_1.pth" and "epoch_3.pth" in names
    assert next("epoch_1.pth" in files for name, files in present if name == "epoch_2.pth")
    best = [name for name in names if name.startswith("best")]
    assert all(best[i] in files for i in range(len(best) - 1) for name, files in present if name == best[i + 1])
    assert [path.name for path in find_checkpoints(Path("run"))] == ["epoch_3.pth"]
    assert len(list(Path("run").glob("best_*.pth"))) == 1


def test_a_full_disk_leaves_the_last_checkpoints(boxes, copy_run, said):
    copy_run(RETINANET)
    before = sorted(path.name for path in Path("run").glob("*.pth"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        options = quick_detection("default_hooks.checkpoint.max_keep_ckpts=2", epochs=3)
        assert run(RETINANET, boxes, "--work-dir", "run", "--resume", *options) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    text = said()
    assert f"error: cannot write {Path('run').resolve()}/epoch_3.pth: File too large" in text
    assert "Traceback" not in text
    assert sorted(path.name for path in Path("run").iterdir() if path.suffix == ".pth") == before
    assert read_run_checkpoint("run/epoch_2.pth")["meta"]["epoch"] == 2


@pytest.mark.parametrize("what", ["lost folder", "a file in its place"])
def test_a_lost_folder_ends_the_run_in_one_line(maps, what, said):
    own = with_hooks(FPN, dict(type="Accident", what=what, iteration=1))
    assert run(own, maps, "--work-dir", "run", *quick_segmentation()) == 2
    text = said()
    assert "segmentation.py: error: cannot write" in text and "Traceback" not in text


def test_two_runs_do_not_share_a_folder(boxes, said):
    Path("run").mkdir()
    hold = "import fcntl, time; f = open('run/.lock', 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True)"
    with process(sys.executable, "-c", f"{hold}; time.sleep(60)", log="log.txt"):
        wait_for("held", "log.txt")
        assert run(RETINANET, boxes, "--work-dir", "run", "--overwrite", *quick_detection()) == 2
    assert "run is in use by" in said()
    assert [path.name for path in Path("run").iterdir()] == [".lock"]


def test_processes_that_torchrun_starts_again_go_on(boxes, copy_run, monkeypatch, said):
    copy_run(RETINANET)
    Path("run/.epoch_3.123.part.pth").touch()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    options = quick_detection(epochs=2)
    assert run(RETINANET, boxes, "--work-dir", "run", "--overwrite", *options) == 0
    text = said()
    assert "torchrun started the processes again: the run goes on" in text and "resumed epoch: 2, iter: 6" in text
    assert not Path("run/.epoch_3.123.part.pth").exists()
