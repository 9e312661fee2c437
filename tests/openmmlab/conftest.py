"""Scenes, weights and a place to work in for the tests of detection and segmentation."""

import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from digit_scenes import write_detection, write_segmentation
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer
from small_runs import QUICK, RETINANET, TINY, run
from untrained import FRUIT, UNSURE, build, save

from convmlp import ConvMLP
from convmlp.openmmlab.inference import TrainedModel, open_model
from convmlp.zoo import VARIANTS


@pytest.fixture(scope="session", autouse=True)
def plain_configs() -> Iterator[None]:
    """Nine tenths of a small run would be yapf, which lays out the config for the log and for every checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **style: (text, True))
        yield


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """detection/ and segmentation/, of 12 training and 3 validation images each, and the weights tiny.pth."""
    folder = tmp_path_factory.mktemp("scenes")
    write_detection(folder / "detection", train=12, val=3, size=64, seed=0)
    write_segmentation(folder / "segmentation", train=12, val=3, size=64, seed=0)
    torch.manual_seed(0)
    torch.save(ConvMLP(**TINY, num_classes=10).state_dict(), folder / "tiny.pth")
    return folder


@pytest.fixture
def detection(scenes, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(scenes / "detection", tmp_path / "detection"))


@pytest.fixture
def segmentation(scenes, tmp_path) -> Path:
    return Path(shutil.copytree(scenes / "segmentation", tmp_path / "segmentation"))


def forget_earlier_runs() -> None:
    """mmengine keeps a logger, a visualizer and a scope for the whole process, which write to the earlier files."""
    for kind in (MMLogger, MessageHub, DefaultScope, *all_visualizers(Visualizer)):
        kind._instance_dict.clear()


def all_visualizers(kind: type) -> Iterator[type]:
    yield kind
    for each in kind.__subclasses__():
        yield from all_visualizers(each)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch, scenes) -> Iterator[Path]:
    """An empty folder to run in, but for the tiny variant's weights."""
    forget_earlier_runs()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(VARIANTS, "tiny", TINY)
    (tmp_path / "tiny.pth").symlink_to(scenes / "tiny.pth")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Default ``avg_non_ignore``")
        warnings.filterwarnings("ignore", message="The draw is False")
        yield tmp_path
    forget_earlier_runs()


@pytest.fixture
def said(capfd) -> Callable[[], str]:
    """All that was printed since the last call."""

    def read() -> str:
        captured = capfd.readouterr()
        return captured.out + captured.err

    return read


@pytest.fixture
def check(said) -> Callable[..., tuple[int, str]]:
    """Runs --check-data: exit code, and all that was printed."""

    def check(config: str, data: Path, *options: str) -> tuple[int, str]:
        return run(config, data, "--check-data", *options), said()

    return check


@pytest.fixture(scope="session")
def finished(scenes, tmp_path_factory) -> Callable[[str], Path]:
    """The work folder of a run that is through: two epochs of three steps, or four steps. Not to be written into."""

    @cache
    def finish(config: str) -> Path:
        folder = tmp_path_factory.mktemp(Path(config).stem)
        options = QUICK[config](epochs=2) if config == RETINANET else QUICK[config]()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setitem(VARIANTS, "tiny", TINY)
            (folder / "tiny.pth").symlink_to(scenes / "tiny.pth")
            assert run(config, scenes / Path(config).parent.name, "--work-dir", "run", *options) == 0
        forget_earlier_runs()
        return folder / "run"

    return finish


@pytest.fixture
def copy_run(finished) -> Callable[..., Path]:
    """A copy of a finished run, as run/ in the current folder."""
    return lambda config: Path(shutil.copytree(finished(config), "run"))


@pytest.fixture(scope="module")
def tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, "tiny", TINY)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny) -> dict[Path, tuple[str, str]]:
    """By quickstart a config of its own for three classes, and a checkpoint of it as a run writes it."""
    found = {}
    for base, change in UNSURE.items():
        folder = tmp_path_factory.mktemp(base.stem)
        config = folder / base.name
        config.write_text(f"_base_ = {str(base)!r}\n{change}\n")
        found[base] = str(config), save(build(config), folder / "best.pth", dataset_meta=dict(classes=tuple(FRUIT)))
    return found


@pytest.fixture(scope="module")
def models(runs) -> dict[Path, TrainedModel]:
    return {base: open_model(*run, device="cpu") for base, run in runs.items()}
