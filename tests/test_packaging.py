"""What pip installs from the archives: all modules, all configs, and commands that work without a checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import convmlp
from convmlp.common.configs import list_configs

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = [file for file in (ROOT / "configs").rglob("*") if file.suffix in (".py", ".yml")]
MODULES = [file for file in (ROOT / "src/convmlp").rglob("*") if file.suffix in (".py", ".md")]


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    """A folder with the source archive, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory) -> Path:
    """The wheel's content in a folder, as pip leaves it."""
    target = tmp_path_factory.mktemp("site")
    (wheel,) = archives.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def python(installed: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run Python with the installed wheel in place of the checkout."""
    env = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_the_wheel_holds_all_modules_all_configs_and_the_mark_of_types(archives):
    (wheel,) = archives.glob("*.whl")
    assert wheel.name.startswith(f"convmlp-{convmlp.__version__}-py3-none-any")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for config in CONFIGS:
            assert archive.read(f"convmlp/{config.relative_to(ROOT).as_posix()}") == config.read_bytes()
    assert len(CONFIGS) > 30 and "convmlp/py.typed" in names
    assert {f"convmlp/{file.relative_to(ROOT / 'src/convmlp').as_posix()}" for file in MODULES} <= names


def test_the_source_archive_holds_what_the_checkout_does(archives):
    (source,) = archives.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "CHANGELOG.md", "LICENSE", "README.md", "dist_classification.sh", "hubconf.py"} <= names
    assert {"tests/test_packaging.py", "docs/training.md", "tools/launch.sh", "tools/digit_scenes.py"} <= names


def test_an_installed_package_lists_and_copies_its_configs(installed, tmp_path):
    listed = python(installed, "-m", "convmlp", "configs", cwd=tmp_path)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [str(file) for file in list_configs()]
    assert "Published: 76.8 % top-1" in listed.stdout
    assert python(installed, "-m", "convmlp", "configs", "--copy", "mine", cwd=tmp_path).returncode == 0
    ours = {file.relative_to(ROOT / "configs"): file.read_bytes() for file in CONFIGS}
    copied = {file.relative_to(tmp_path / "mine"): file.read_bytes() for file in (tmp_path / "mine").rglob("*.*")}
    assert copied == ours


@pytest.mark.slow
def test_an_installed_package_trains_by_the_name_of_a_config(installed, tmp_path):
    call = "-m convmlp.classification -c quickstart --img-size 32 --epochs 1 --warmup-epochs 0 --batch-size 512 "
    call += "--workers 0 --no-model-ema --model-kwargs channels=8 n_conv_blocks=1 blocks=[1,1,1] dims=[8,16,32]"
    run = python(installed, *call.split(), cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert (tmp_path / "output/quickstart/best.pth").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["quickstart_retinanet", "segmentation/quickstart_fpn"])
def test_an_installed_package_finds_configs_of_mmdet_and_mmseg(installed, tmp_path, config):
    run = python(installed, "-m", "convmlp.openmmlab", config, "nowhere", cwd=tmp_path)
    assert run.returncode == 2
    assert run.stderr.strip().endswith("convmlp.openmmlab: error: no such data folder: nowhere")
