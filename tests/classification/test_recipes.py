"""Recipes: what they choose for the images at hand, what the user's options change in it, and what fits into memory."""

import shutil

import pytest
import torch
import yaml
from torch import nn

import convmlp
from convmlp import zoo
from convmlp.classification.options import parse_options
from convmlp.classification.process import Process
from convmlp.classification.recipes import fit_into_memory

from .conftest import TINY, call_main


@pytest.fixture
def train(images, tmp_path, no_figures, monkeypatch):
    """Runs a recipe on the shared images of 36 px: train(options...) -> exit code, what was said, its settings."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(zoo, "MIRRORS", (f"file://{tmp_path}/nowhere/",))

    def call(*words, data=images):
        output = ["--workers", "0", "--output", tmp_path / "out", "--experiment", "run"]
        code, said = call_main(*words, *output, data)
        stored = tmp_path / "out" / "run" / "args.yaml"
        return code, said, yaml.safe_load(stored.read_text()) if stored.exists() else {}

    return call


def test_settings_follow_from_the_number_and_the_size_of_the_images(train):
    code, said, settings = train("--recipe", "scratch", *TINY, "--epochs", "1")
    assert code == 0 and "recipe scratch for 24 training images of 36 px (the median side)" in said
    assert (settings["img_size"], settings["batch_size"], settings["crop_pct"]) == (48, 8, 1.0)
    assert settings["lr"] == pytest.approx(1e-3 * (8 / 64) ** 0.5)
    assert settings["recipe"] is None  # so that args.yaml is a config that repeats the run


def test_what_the_user_sets_stays_and_the_rest_follows_it(train):
    words = "--recipe scratch --epochs 2 --batch-size 12 --img-size 96 --mixup 0".split()
    code, said, settings = train(*words, *TINY)
    assert code == 0
    assert (settings["img_size"], settings["batch_size"], settings["epochs"], settings["mixup"]) == (96, 12, 2, 0)
    assert settings["crop_pct"] is None and settings["warmup_epochs"] == 1
    assert settings["lr"] == pytest.approx(1e-3 * (12 / 64) ** 0.5)


def test_a_run_that_goes_on_keeps_its_settings(train):
    assert train("--recipe", "scratch", *TINY, "--epochs", "1", "--lr", "0.01")[0] == 0
    code, said, settings = train("--recipe", "scratch", *TINY, "--epochs", "2", "--resume", "auto")
    assert code == 0 and "recipe scratch for" not in said
    assert settings["lr"] == 0.01 and settings["epochs"] == 2 and settings["mixup"] == 0.2


def test_without_published_weights_auto_trains_from_scratch_and_says_so(train):
    code, said, settings = train("--recipe", "auto", *TINY, "--epochs", "1")
    assert code == 0 and "the published weights of convmlp_s cannot be had: training from scratch" in said
    assert settings["pretrained"] is False and settings["layer_decay"] is None


def test_with_published_weights_auto_fine_tunes_them(train, tmp_path):
    weights = tmp_path / "hub" / "hub" / "checkpoints" / "convmlp_s_imagenet.pth"
    weights.parent.mkdir(parents=True)
    torch.save(convmlp.convmlp_s().state_dict(), weights)
    code, said, settings = train("--recipe", "auto", "--epochs", "1", "--img-size", "32")
    assert code == 0 and "recipe finetune for 24 training images" in said
    assert settings["pretrained"] is True and settings["layer_decay"] == 0.8


def test_fine_tuning_without_weights_is_an_error(train):
    code, said, _ = train("--recipe", "finetune", *TINY)
    assert code == 2 and "could not download the weights" in said and "--no-pretrained" in said


def test_the_settings_of_a_run_are_a_config_that_repeats_it(train, tmp_path):
    for recipe in ("scratch", "probe"):
        words = ["--recipe", recipe, "--no-pretrained", *TINY, *(["--epochs", "1"] if recipe == "scratch" else [])]
        assert train(*words, "--overwrite")[0] == 0
        run = tmp_path / "out" / "run"
        first = torch.load(run / "best.pth", weights_only=True)["state_dict"]
        config = shutil.copy(run / "args.yaml", tmp_path / "again.yml")
        assert train("-c", str(config), "--overwrite")[0] == 0
        again = torch.load(run / "best.pth", weights_only=True)["state_dict"]
        assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.parametrize(
    "words",
    ["--model-ema", "--epochs 3", "--lr 0.1", "--class-weights auto", "--balanced-sampling", "--freeze 2", "--mixup 1"],
)
def test_what_a_probe_cannot_use_is_refused(train, words):
    code, said, _ = train("--recipe", "probe", "--no-pretrained", *TINY, *words.split())
    assert code == 2 and f"{words.split()[0]} does not go with --recipe probe" in said


def test_a_run_that_trained_does_not_go_on_as_a_probe(train):
    assert train("--recipe", "scratch", *TINY, "--epochs", "1")[0] == 0
    code, said, _ = train("--recipe", "probe", *TINY, "--epochs", "2", "--resume", "auto")
    assert code == 2 and "--recipe probe begins a run" in said


def test_streams_cannot_be_counted(train, images):
    words = ["--recipe", "scratch", "--dataset", "wds/", "--num-classes", "3", "--train-num-samples", "24"]
    code, said, _ = train(*words)
    assert code == 2 and "streamed data cannot be counted: give a config, -c FILE" in said


class Greedy(nn.Module):
    """Takes more memory than there can be, for more than two images."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, images):
        torch.empty(2 ** (50 if len(images) > 2 else 10))
        return self.linear(images.mean((2, 3)))


def test_an_odd_batch_that_does_not_fit_is_an_error():
    with pytest.raises(convmlp.common.errors.RunError, match="too small for 7 images of 32 px.*--batch-size N"):
        fitted(7, Greedy())


def fitted(batch_size: int, model: nn.Module):
    options = parse_options(["--batch-size", str(batch_size), "--grad-accum-steps", "3"])
    return fit_into_memory(options, model, {"input_size": [3, 32, 32]}, Process(torch.device("cpu")))


def test_a_batch_that_does_not_fit_is_halved_and_its_updates_stay():
    options = fitted(8, Greedy())
    assert (options.batch_size, options.grad_accum_steps) == (2, 12)


def test_a_batch_that_fits_stays_and_so_does_the_model():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 32, 32))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert fitted(8, model).batch_size == 8
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_on_a_cpu_a_batch_that_the_memory_left_cannot_hold_is_not_even_tried(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 32 * 32, 2))
    kept = 4 * 64 * 32 * 32  # bytes for an image: the map that ReLU and the linear layer share; the input is small
    monkeypatch.setattr("convmlp.classification.recipes._free_bytes", lambda: 20 * 2 * kept)
    assert fitted(64, model).batch_size == 16
    monkeypatch.undo()
    assert fitted(64, model).batch_size == 64


class Greedier(Greedy):
    def forward(self, images):
        torch.empty(2**50)


def test_where_not_even_two_images_fit_the_error_names_ways_out():
    with pytest.raises(convmlp.common.errors.RunError, match="too small for 2 images of 32 px: --img-size PX"):
        fitted(8, Greedier())
