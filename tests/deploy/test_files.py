"""Prepared models kept in files."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from convmlp.common.errors import CheckpointError, RunError
from convmlp.deploy import Prepared, describe, fingerprint, load, prepare

IN_ANOTHER_PROCESS = """
import sys, torch
from convmlp.deploy import load
prepared = load(sys.argv[1])
images, expected = torch.load(sys.argv[2])
print(prepared.backend, tuple(prepared.shape), prepared.any_batch)
print(all(torch.equal(actual, output) for actual, output in zip(prepared(images), expected, strict=True)))
"""


class Small(nn.Module):
    """A tuple of two outputs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.conv(x).relu()
        return self.head(x.mean((2, 3))), x


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module", params=["onnxruntime", "openvino", pytest.param("inductor", marks=pytest.mark.slow)])
def prepared(request, model) -> Prepared:
    if request.param != "inductor":
        pytest.importorskip(request.param)
    return prepare(model, example_input=torch.ones(1, 3, 8, 8), backend=request.param)


@pytest.fixture
def file(prepared, tmp_path) -> Path:
    prepared.save(tmp_path / "model.prepared")
    return tmp_path / "model.prepared"


def rewrite(file: Path, **changes: object) -> None:
    """Another description in the same file."""
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["about.json"] = json.dumps(json.loads(parts["about.json"]) | changes).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def test_a_saved_model_runs_in_a_fresh_process_without_a_compiler(prepared, file, tmp_path):
    x = torch.randn(3, 3, 8, 8)
    torch.save((x, prepared(x)), tmp_path / "expected.pt")
    env = {key: value for key, value in os.environ.items() if key != "CXX"} | {"PATH": str(tmp_path)}
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, file, tmp_path / "expected.pt"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines() == [f"{prepared.backend} (1, 3, 8, 8) True", "True"], run.stderr


def test_what_was_loaded_gives_the_same_outputs_and_can_be_saved_again(prepared, file, tmp_path):
    x = torch.randn(2, 3, 8, 8)
    loaded = load(file)
    loaded.save(tmp_path / "again")
    for outputs in (loaded(x), load(tmp_path / "again")(x)):
        assert isinstance(outputs, tuple)
        assert all(torch.equal(actual, expected) for actual, expected in zip(outputs, prepared(x), strict=True))


def test_a_file_says_what_it_was_made_of(prepared, file, model):
    about = describe(file)
    assert (about.backend, about.dtype, about.shape) == (prepared.backend, "float32", [1, 3, 8, 8])
    assert about.sha256 == fingerprint(model)
    assert about == prepared.about


def test_a_loaded_model_names_the_shape_that_it_takes(file):
    with pytest.raises(ValueError, match=r"for any number of images of shape \(3, 8, 8\), got \(1, 3, 9, 9\)"):
        load(file)(torch.ones(1, 3, 9, 9))


@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_a_damaged_file_is_one_clear_error(file, place):
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{file} is .*damaged: .+$"):
        load(file)


@pytest.mark.parametrize("content", [b"", b"not an archive", None])
def test_what_is_no_such_file_is_one_clear_error(content, tmp_path):
    path, message = tmp_path / "model", "is no file of Prepared.save, or damaged"
    if content is None:
        message = "no such file"
    else:
        path.write_bytes(content)
    for read in (load, describe):
        with pytest.raises(CheckpointError, match=message):
            read(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "made_for", "message"),
    [
        ("PyTorch", "1.0.0", "is for PyTorch 1.0.0, here is "),
        ("system", "Plan 9", "is for system Plan 9, here is "),
        ("processor", "vax", "is for processor vax, here is "),
        ("instructions", ["abacus", "slide_rule"], "is for a processor with abacus, slide_rule: prepare the model on"),
    ],
)
def test_machine_code_for_another_machine_or_pytorch_is_refused(model, key, made_for, message, tmp_path):
    prepare(model, example_input=torch.ones(1, 3, 8, 8), backend="inductor").save(tmp_path / "model")
    rewrite(tmp_path / "model", needs={**describe(tmp_path / "model").needs, key: made_for})
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "model")


def test_a_missing_runtime_is_named_with_the_pip_line(file, prepared, monkeypatch):
    if prepared.backend == "inductor":
        pytest.skip("it needs nothing but PyTorch")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == prepared.backend else found(name))
    with pytest.raises(CheckpointError, match=f"needs a missing package: pip install {prepared.backend}$"):
        load(file)


def test_an_uncompiled_model_is_not_saved(model, tmp_path):
    with pytest.raises(ValueError, match=r"nothing to save of a model uncompiled \(backend eager\)"):
        prepare(model).save(tmp_path / "model")


def test_a_place_that_cannot_be_written_is_named(prepared, tmp_path):
    with pytest.raises(RunError, match=f"cannot write {tmp_path}: it is a folder"):
        prepared.save(tmp_path)
