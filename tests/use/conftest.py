"""What the tests of trained classifiers share: a short run on real digits, a photograph, and how verbs are called."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from sklearn.datasets import load_digits

from convmlp import classification, cli
from convmlp.use.classifier import Classifier, open_classifier


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """train/CLASS/*.png and val/CLASS/*.png of real digits, 36x36."""
    root = tmp_path_factory.mktemp("digits")
    content = load_digits()
    for digit, name in ((1, "one"), (3, "three"), (2, "two")):
        for number, i in enumerate(np.flatnonzero(content.target == digit)[:30]):
            folder = root / ("train" if number < 20 else "val") / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((content.images[i] * 15).astype("uint8")).resize((36, 36)).save(folder / f"{name}{i}.png")
    return root


@pytest.fixture(scope="session")
def trained(digits, tmp_path_factory) -> Path:
    """The folder of a short run of classification.py on the digits, grey, small, with a switch of the model set."""
    output = tmp_path_factory.mktemp("output")
    call = f"--output {output} --experiment run --model convmlp_s --model-kwargs spatial_connect=False "
    call += "blocks=(1,1,1) dims=(16,32,64) mlp_ratios=(1,1,1) channels=16 n_conv_blocks=1 --img-size 40 "
    call += "--in-chans 1 --epochs 5 --warmup-epochs 0 --batch-size 10 --hflip 0 --lr 3e-3 --workers 0 --mean 0.4 "
    call += f"--std 0.3 --crop-pct 1.0 --color-jitter 0 --scale 0.8 1.0 {digits}"
    assert classification.main(call.split()) == 0
    return output / "run"


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "chelsea.png"
    Image.fromarray(data.chelsea()).save(path)
    return path


@pytest.fixture(scope="session")
def make_classifier() -> Callable[..., Classifier]:
    def make(name: str = "convmlp_s", **kwargs) -> Classifier:
        torch.manual_seed(0)
        return open_classifier(name, pretrained=False, device="cpu", **kwargs)

    return make


@pytest.fixture
def verb(capsys) -> Callable[..., Outcome]:
    """Run a verb of the command in this process; returns its exit code and what it wrote."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        return Outcome(cli.main([str(argument) for argument in arguments]), *capsys.readouterr())

    return run


@pytest.fixture
def fails(verb) -> Callable[..., str]:
    """Run a verb that must end with exit code 2 and one line on standard error; returns the line."""

    def run(*arguments: object) -> str:
        code, out, err = verb(*arguments)
        assert code == 2 and out == ""
        assert err.startswith("convmlp: error: ") and err.count("\n") == 1
        return err

    return run
