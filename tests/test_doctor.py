"""doctor: what it says of sound, missing, unfit and broken packages."""

import subprocess
import sys
from pathlib import Path

import pytest


def installed(folder: Path, name: str, version: str) -> None:
    """Metadata of a package, as pip leaves it."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture(scope="module")
def unhealthy(tmp_path_factory) -> list[str]:
    """What doctor prints where packages are missing, unfit, broken, or in each other's way."""
    folder = tmp_path_factory.mktemp("packages")
    installed(folder, "timm", "0.4.12")
    installed(folder, "mmcv", "2.1.0")
    installed(folder, "onnxscript", "0.1")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "__init__.py").write_text("raise ImportError('libfoo.so: cannot open shared object file')")
    code = f"""
import importlib.metadata, sys
sys.path.insert(0, {str(folder)!r})
version = importlib.metadata.version
def hide(name):
    if name == "shtab":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = hide
from convmlp.cli import main
sys.exit(main(["doctor"]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 1 and "not healthy" in run.stdout, run
    return run.stdout.splitlines()


@pytest.mark.slow
def test_doctor_finds_this_installation_healthy():
    command = [Path(sys.executable).with_name("convmlp"), "doctor"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and run.stderr == "", run.stdout + run.stderr
    for subject in ("Python", "cpu", "torch", "torchvision", "timm", "onnxruntime", "convmlp_l"):
        assert f"ok      {subject} " in run.stdout
    assert "BROKEN" not in run.stdout and "\nhealthy: " in run.stdout


def test_doctor_names_a_wrong_version_and_two_packages_in_each_others_way(unhealthy):
    lines = {line.split()[1]: line for line in unhealthy if "BROKEN" in line and len(line.split()) > 3}
    assert "0.4.12, but >=1.0.31 is needed  ->  pip install 'timm>=1.0.31'" in lines["timm"]
    mmcv = next(line for line in lines.values() if "mmcv" in line)
    assert "provide the same modules" in mmcv and "pip uninstall -y" in mmcv


def test_doctor_names_what_is_missing_and_what_does_not_import(unhealthy):
    assert "missing shtab -> pip install 'shtab'".split() in [line.split() for line in unhealthy]
    broken = next(line for line in unhealthy if "BROKEN  onnx " in line)
    assert "libfoo.so" in broken and "pip install 'onnx>=1.17'" in broken
    unfit = next(line for line in unhealthy if "onnxscript " in line)
    assert unfit.split()[:4] == ["unfit", "onnxscript", "0.1,", "but"]  # of a part that is not installed whole
