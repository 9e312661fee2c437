"""Models that are compiled once that pays."""

from functools import partial
from pathlib import Path

import pytest
import torch

from convmlp.deploy import FullBatches, Tiered, prepare, tiered
from convmlp.model import ConvMLP

CPU = torch.device("cpu")


@pytest.fixture
def model() -> ConvMLP:
    torch.manual_seed(0)
    return ConvMLP((1, 1, 1), (16, 32, 64), (1, 1, 1), 16, 1, num_classes=5).eval()


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """Where prepared models are kept; they are so at once, by a back end that needs no compiler."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(tiered, "prepare", partial(prepare, backend="onnxruntime"))
    monkeypatch.setattr(tiered, "COMPILING", 0)
    monkeypatch.setattr(tiered, "LOADING", 0)
    return tmp_path / "hub" / "prepared"


def predict(model: ConvMLP, said: list[str], images: torch.Tensor) -> list[torch.Tensor]:
    network = Tiered(model, len(images), CPU, torch.float32, said.append)
    with torch.inference_mode():
        return [network(batch) for batch in images.split(4)]


def test_few_images_are_left_to_the_model(model, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    images, said = torch.randn(14, 3, 32, 32), []
    outputs = predict(model, said, images)
    with torch.inference_mode():
        assert all(torch.equal(*pair) for pair in zip(outputs, map(model, images.split(4)), strict=True))
    assert said == [] and not any(tmp_path.rglob("*.prepared"))


def test_many_are_compiled_once_and_kept(model, folder, monkeypatch):
    images, said = torch.randn(14, 3, 32, 32), []
    with torch.inference_mode():
        expected = [model(batch) for batch in images.split(4)]
    for _ in range(2):  # the second time from the file
        outputs = predict(model, said, images)
        assert all(torch.equal(*pair) for pair in zip(outputs[:2], expected[:2], strict=True))
        for output, wanted in zip(outputs[2:], expected[2:], strict=True):
            assert not torch.equal(output, wanted)
            torch.testing.assert_close(output, wanted, rtol=0, atol=1e-4 * wanted.abs().max())
        monkeypatch.setattr(tiered, "prepare", None)
    [line] = said
    [file] = folder.iterdir()
    assert line.startswith("compiled in ") and line.endswith(f"s for 6 more images, in float32; kept in {file}")


def test_other_weights_and_sizes_and_damaged_files_are_compiled_anew(model, folder, monkeypatch):
    monkeypatch.setattr(tiered, "KEPT", 3)
    said: list[str] = []
    predict(model, said, torch.randn(10, 3, 32, 32))
    predict(model, said, torch.randn(10, 3, 48, 48))
    with torch.no_grad():
        model.head.weight.mul_(2)
    predict(model, said, torch.randn(10, 3, 32, 32))
    files = {*folder.iterdir()}
    assert len(said) == len(files) == 3
    newest = max(files, key=lambda file: file.stat().st_mtime_ns)
    newest.write_bytes(b"damaged")
    predict(model, said, torch.randn(10, 3, 32, 32))
    assert len(said) == 4 and {*folder.iterdir()} == files
    predict(model, said, torch.randn(10, 3, 64, 64))
    assert len({*folder.iterdir()}) == 3


def test_a_last_batch_is_filled_up_for_a_model_of_one_shape():
    class Fixed(torch.nn.Module):
        def forward(self, images):
            assert images.shape == (4, 3, 8, 8)
            return images.mean((2, 3)), images

    images = torch.randn(6, 3, 8, 8)
    for batch in images.split(4):
        pooled, same = FullBatches(Fixed(), 4)(batch)
        assert torch.equal(pooled, batch.mean((2, 3))) and torch.equal(same, batch)
