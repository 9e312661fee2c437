"""Accuracy on Fashion-MNIST: a call trains, tests, writes a table, and keeps what is complete."""

import gzip
import json

import accuracy
import clothes
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from convmlp.common.command import run
from convmlp.common.errors import RunError

TINY = {"blocks": [1, 1, 1], "dims": [8, 16, 32], "mlp_ratios": [1, 1, 1], "channels": 8, "n_conv_blocks": 1}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Digits in the form of Fashion-MNIST's four files."""
    folder, data = tmp_path_factory.mktemp("digits"), load_digits()
    for prefix, part in {"train": slice(0, 200), "t10k": slice(200, 240)}.items():
        images = [Image.fromarray((image * 15).astype(np.uint8)).resize((28, 28)) for image in data.images[part]]
        content = {
            "images-idx3": bytes(16) + b"".join(map(Image.Image.tobytes, images)),
            "labels-idx1": bytes(8) + data.target[part].astype(np.uint8).tobytes(),
        }
        for kind, values in content.items():
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(values))
    return folder


def test_images_are_written_by_class_and_a_missing_file_is_named(digits, tmp_path):
    labels = load_digits().target
    for split, (first, count) in {"train": (0, 30), "val": (200, 20)}.items():
        clothes.make_images(digits, tmp_path / split, split, count)
        found = {int(path.stem): path.parent.name for path in (tmp_path / split).glob("*/*.png")}
        assert found == {number: clothes.NAMES[labels[first + number]] for number in range(count)}
    with pytest.raises(RunError, match="train-images-idx3-ubyte.gz is not there; Debian's package"):
        clothes.make_images(tmp_path, tmp_path / "x", "train", 1)


@pytest.mark.slow
def test_seeds_are_compared_and_complete_runs_are_kept(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "PEERS", {"small ConvMLP-S": ("convmlp_s", TINY)})
    words = [digits, "--models", *accuracy.PEERS, "--images", 160, "--epochs", 1, "--seeds", 0, 1, "--output", tmp_path]
    call = [str(word) for word in words]
    assert run("accuracy.py", lambda: accuracy.work(call)) == 0
    table = (tmp_path / "accuracy.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    [row] = rows
    seeds = [float(value) for value in row[4].split(", ")]
    assert row[0] == "| small ConvMLP-S" and len(seeds) == 2 and seeds[0] != seeds[1]
    assert float(row[3]) == pytest.approx(np.mean(seeds), abs=0.01)
    with Image.open(tmp_path / "accuracy.png") as image:
        assert image.width > image.height
    for file in tmp_path.glob("*/minutes.json"):
        assert 0 < json.loads(file.read_text()) < 5
        file.write_text("7")
    assert run("accuracy.py", lambda: accuracy.work(call)) == 0
    assert (tmp_path / "accuracy.md").read_text().count("| 7.0 |") == 1
