"""Runs of classification.py on folders of real digits, with a ConvMLP of a few thousand weights."""

import contextlib
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from convmlp.classification import charts, main, report

ROOT = Path(__file__).parents[2]
TINY = "--model-kwargs blocks=[1,1,1] dims=[8,16,32] mlp_ratios=[1,1,1] channels=8 n_conv_blocks=1".split()
SMALL = "--img-size 32 --batch-size 8 --epochs 2 --warmup-epochs 0 --workers 0 --lr 1e-3".split()
RANDOM = "--aa rand-m9-mstd0.5-inc1 --mixup 0.8 --cutmix 1 --reprob 0.5 --drop 0.1 --model-ema --model-ema-decay 0.9"
RANDOM_EVERYTHING = [*RANDOM.split(), "--balanced-sampling", "--aug-repeats", "2", "--checkpoint-interval", "1"]


class Result(NamedTuple):
    """What a run left: its exit code, what it said, and its folder."""

    code: int
    said: str
    folder: Path


def call_main(*arguments: object) -> tuple[int, str]:
    """classification.py in this process: the exit code, and all that it logs or writes to standard error."""
    said, error = io.StringIO(), io.StringIO()
    handler, logger = logging.StreamHandler(said), logging.getLogger("convmlp")
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stderr(error):
            code = main([str(argument) for argument in arguments])
    finally:
        logger.removeHandler(handler)
        sys.stderr.write(error.getvalue())  # for capsys
    return code, said.getvalue() + error.getvalue()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 24 training and 15 validation images, which no test changes."""
    root, digits = tmp_path_factory.mktemp("data"), load_digits()
    for split, places in {"train": slice(0, 8), "val": slice(8, 13)}.items():
        for digit in range(3):
            folder = root / split / f"digit{digit}"
            folder.mkdir(parents=True)
            for i in np.flatnonzero(digits.target == digit)[places]:
                Image.fromarray((digits.images[i] * 15).astype("uint8")).resize((36, 36)).save(folder / f"{i:04d}.png")
    return root


@pytest.fixture(scope="session")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run of two epochs, which no test changes."""
    output = tmp_path_factory.mktemp("trained")
    code, said = call_main(*SMALL, *TINY, "--output", output, "--experiment", "run", images)
    assert code == 0, said
    return Result(code, said, output / "run")


def leave_out_figures(patch: pytest.MonkeyPatch) -> None:
    """They take longer than the training here; the shared run draws them all."""
    for name in ("write_curves", "write_confusion", "write_predictions"):
        patch.setattr(charts, name, lambda path, *rest: path.write_bytes(b""))
    patch.setattr(report, "draw_sheets", lambda *rest: [])
    patch.setattr(report, "write_page", lambda path, *rest: path.write_bytes(b""))


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_figures(monkeypatch)


@pytest.fixture
def run(images: Path, tmp_path: Path, no_figures: None) -> Callable[..., Result]:
    """Runs classification.py in this process: run(options..., experiment=, data=, model=) -> Result."""

    def call(*arguments: str, experiment: str = "run", data: Path = images, model: list[str] = TINY) -> Result:
        output = tmp_path / "out"
        code, said = call_main(*SMALL, *model, "--output", output, "--experiment", experiment, *arguments, data)
        return Result(code, said, output / experiment)

    return call


@pytest.fixture
def earlier(trained: Result, tmp_path: Path) -> Path:
    """A copy of the shared run, in the folder where `run` goes on with it."""
    return Path(shutil.copytree(trained.folder, tmp_path / "out" / "run"))


@pytest.fixture(scope="session")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run with all kinds of random draws leaves when nobody disturbs it."""
    output = tmp_path_factory.mktemp("undisturbed")
    arguments = [*SMALL, *TINY, "--output", output, "--experiment", "run", *RANDOM_EVERYTHING]
    code, said = call_main(*arguments, images)
    assert code == 0, said
    return output / "run"


@pytest.fixture
def start(images: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts dist_classification.sh: start(processes, options..., experiment=) -> Popen with its `log`, a file."""
    started: list[subprocess.Popen] = []

    def call(
        processes: int,
        *arguments: str,
        experiment: str = "run",
        data: Path = images,
        preparation: Callable[[], None] | None = None,
        **environment: str,
    ) -> subprocess.Popen:
        command = [str(ROOT / "dist_classification.sh"), str(processes), *SMALL, "--output", str(tmp_path / "out")]
        command += ["--experiment", experiment, "--log-interval", "1", *arguments, str(data)]
        log = open(tmp_path / f"{experiment}.log", "a+")
        environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
        process = subprocess.Popen(command, stderr=log, env=environment, preexec_fn=preparation, start_new_session=True)
        process.log = Path(log.name)  # type: ignore[attr-defined]
        started.append(process)
        return process

    yield call
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
