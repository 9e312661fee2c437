"""Static int8: how accurate it is, what stays float, what is kept in a file, and what is refused."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import convmlp
from convmlp.deploy import describe, int8, load, prepare

VALIDATION = 400


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    return F.interpolate(images, size=32, mode="bilinear"), torch.tensor(found.target)


@pytest.fixture(scope="module")
def model(digits) -> convmlp.ConvMLP:
    """A small one that has learned from all but the first digits."""
    torch.manual_seed(0)
    model = convmlp.ConvMLP((1, 1, 1), (32, 48, 64), (2, 2, 2), 16, 2, num_classes=10, in_chans=1, drop_path_rate=0)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    images, labels = digits
    for batch in torch.cat([VALIDATION + torch.randperm(len(images) - VALIDATION) for _ in range(4)]).split(32):
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def calibration(digits) -> list[torch.Tensor]:
    return [*digits[0][VALIDATION : VALIDATION + 256].split(32)]


@pytest.fixture(scope="module")
def prepared(model, calibration):
    return prepare(model, dtype=torch.int8, example_input=calibration[0], calibration=iter(calibration))


@pytest.mark.slow
@torch.no_grad()
def test_int8_loses_at_most_one_image_of_some_hundreds(model, prepared, digits):
    images, labels = digits[0][:VALIDATION], digits[1][:VALIDATION]
    right = (model(images).argmax(1) == labels).sum().item()
    assert right > 0.9 * VALIDATION
    assert right - (prepared(images).argmax(1) == labels).sum().item() <= 2  # 0.5 points
    assert 0 < prepared.about.difference <= int8.TOLERANCE


@pytest.mark.slow
@torch.no_grad()
def test_any_number_of_images_runs_in_int8_and_other_shapes_in_float(model, prepared, digits):
    expected = prepared(digits[0][:8])
    assert torch.equal(prepared(digits[0][:1]), expected[:1])
    larger = F.interpolate(digits[0][:2], size=40)
    assert torch.allclose(prepared(larger), model(larger), atol=1e-5)


@pytest.mark.slow
def test_an_int8_file_runs_in_a_fresh_process_without_a_compiler(prepared, digits, tmp_path):
    prepared.save(tmp_path / "int8")
    torch.save((digits[0][:8], prepared(digits[0][:8])), tmp_path / "expected.pt")
    code = f"""
import torch
from convmlp.deploy import load
images, expected = torch.load({str(tmp_path / "expected.pt")!r})
print(torch.equal(load({str(tmp_path / "int8")!r})(images), expected))
"""
    env = {key: value for key, value in os.environ.items() if key != "CXX"} | {"PATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert run.stdout == "True\n", run.stderr
    about = describe(tmp_path / "int8")
    assert (about.dtype, about.difference) == ("int8", load(tmp_path / "int8").about.difference)


class Outlier(nn.Module):
    """Two layers; in the maps of the second a channel is so large that nothing of the others is left in int8."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.coarse.weight.data[:, 0] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fine(x)
        return self.coarse(x * torch.tensor([1e4] + [1.0] * 7)[:, None, None])


@torch.no_grad()
def test_layers_stay_float_by_how_much_int8_changes_them():
    torch.manual_seed(0)
    network, batches = int8.Network(Outlier(), torch.float32), [torch.randn(4, 3, 8, 8) for _ in range(2)]
    quantised, float_layers = int8.quantise(network, batches)
    assert float_layers == ["model.coarse"]
    assert 0 < int8.difference(quantised, batches, [network(x) for x in batches]) <= int8.TOLERANCE


@torch.no_grad()
def test_where_nothing_can_be_int8_it_is_said():
    network = int8.Network(nn.Sequential(nn.ReLU()), torch.float32)
    with pytest.raises(ValueError, match="none of its 0 convolutions and linear layers can be int8"):
        int8.quantise(network, [torch.randn(4, 3, 8, 8)])


X = torch.ones(1, 1, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "int8 is calibrated on images: got no calibration"),
        (dict(calibration=[]), "int8 is calibrated on images: got an empty calibration"),
        (dict(calibration=iter([])), "int8 is calibrated on images: got an empty calibration"),
        (dict(calibration=[X, X[0]]), r"a calibration batch is \(b, 1, 32, 32\), got \(1, 32, 32\)"),
        (dict(calibration=[X[:0]]), r"a calibration batch is \(b, 1, 32, 32\), got \(0, 1, 32, 32\)"),
        (dict(calibration=[(X, 3)]), r"a calibration batch is \(b, 1, 32, 32\), got tuple"),
        (dict(calibration=[X], example_input=None), "the back end inductor compiles for a shape: got no example_input"),
        (dict(calibration=[X], backend="eager"), "the back end eager cannot compute in torch.int8"),
        (dict(calibration=[X], backend="openvino"), "the back end openvino cannot compute in torch.int8"),
        (dict(calibration=[X], dtype=torch.float32), "calibration is for int8, got it with torch.float32"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        prepare(model, **{**dict(dtype=torch.int8, example_input=X), **arguments})


def test_a_model_on_another_device_is_refused():
    with pytest.raises(ValueError, match="int8 is for x86 CPUs, got a model on meta of "):
        prepare(nn.Conv2d(1, 4, 3, device="meta"), dtype=torch.int8, example_input=X, calibration=[X])


def test_without_torchao_the_pip_line_is_given(model, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else found(name))
    with pytest.raises(RuntimeError, match="^int8 needs a missing package: pip install torchao$"):
        prepare(model, dtype=torch.int8, example_input=X, calibration=[X])


def test_without_a_compiler_int8_is_refused(model, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"^int8 needs a C\+\+ compiler"):
        prepare(model, dtype=torch.int8, example_input=X, calibration=[X])
