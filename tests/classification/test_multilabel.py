"""Several labels an image: thresholds, figures, and a run that predicts with them."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score

from convmlp.classification.multilabel import best_labels
from convmlp.cli import main

from .conftest import SMALL, TINY, call_main


@pytest.mark.parametrize("seed", range(5))
def test_no_other_threshold_has_a_better_f1(seed):
    draws = np.random.default_rng(seed)
    targets = draws.integers(0, 2, 40)
    probabilities = np.round(np.clip(0.5 * targets + 0.6 * draws.random(40), 0, 1), 1)  # with ties
    found = best_labels(probabilities, targets)
    scores = [f1_score(targets, probabilities >= threshold) for threshold in np.linspace(0, 1, 201)]
    assert found.f1 == pytest.approx(max(scores))
    assert found.f1 == pytest.approx(f1_score(targets, probabilities >= found.threshold))
    assert found.images == targets.sum()


def test_a_class_that_no_image_has_keeps_one_half():
    assert best_labels(np.array([0.1, 0.9]), np.array([0, 0])).threshold == 0.5


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Images of two digits side by side, 0 to 2, with their labels in a CSV; some have one label, some none."""
    root, digits = tmp_path_factory.mktemp("pairs"), load_digits()
    draws, rows = np.random.default_rng(0), []
    known = np.flatnonzero(digits.target < 4)  # 3 is no label
    for number in range(60):
        both = draws.choice(known, 2, replace=False)
        image = np.concatenate([digits.images[i] for i in both], 1)
        Image.fromarray((image * 15).astype("uint8")).resize((64, 32)).save(root / f"{number:02}.png")
        labels = sorted({f"digit{digits.target[i]}" for i in both if digits.target[i] < 3})
        rows.append([f"{number:02}.png", ";".join(labels)])
    with open(root / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path", "label"], *rows])
    return root / "labels.csv"


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):
    output = tmp_path_factory.mktemp("multi")
    code, said = call_main(*SMALL, *TINY, "--multi-label", "--output", output, "--experiment", "run", pairs)
    assert code == 0, said
    return said, output / "run"


def test_a_run_is_judged_by_the_mean_average_precision(trained):
    said, folder = trained
    rows = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    assert len(rows) == 2 and 0 < float(rows[-1]["eval_map"]) <= 100
    assert "mAP" in said and "top-1" not in said
    table = list(csv.DictReader((folder / "per_class.csv").read_text().splitlines()))
    assert [row["class"] for row in table] == ["digit0", "digit1", "digit2"]
    assert all(0 < float(row["threshold"]) < 1 for row in table)
    split = list(csv.DictReader((folder / "split.csv").read_text().splitlines()))
    assert len(split) == 60 and {";" in row["label"] for row in split} == {True, False}


def test_the_checkpoint_knows_the_thresholds_and_predict_uses_them(trained, pairs, capsys):
    _, folder = trained
    checkpoint = torch.load(folder / "best.pth", weights_only=True)
    assert len(checkpoint["thresholds"]) == 3
    checkpoint["thresholds"] = [0.0, 1.0, 0.0]  # so every image has the first and the last
    torch.save(checkpoint, folder.parent / "changed.pth")
    words = ["predict", str(pairs.parent / "00.png"), "--checkpoint", str(folder.parent / "changed.pth"), "--json", "-"]
    assert main(words) == 0
    [row] = json.loads(capsys.readouterr().out)["predictions"]
    assert {guess["name"] for guess in row["classes"]} == {"digit0", "digit2"}
    assert main([*words, "--topk", "2"]) == 2
    assert "--topk" in capsys.readouterr().err


def test_an_exported_file_has_the_thresholds_or_is_refused(trained, tmp_path, capsys):
    checkpoint = trained[1] / "best.pth"
    path = tmp_path / "program.pt"
    assert main(["export", str(checkpoint), "--format", "torchscript", "--output", str(path)]) == 0
    about = {"classifier.json": ""}
    torch.jit.load(path, _extra_files=about)
    thresholds = torch.load(checkpoint, weights_only=True)["thresholds"]
    assert json.loads(about["classifier.json"])["thresholds"] == thresholds
    assert main(["export", str(checkpoint), "--format", "safetensors", "--output", str(tmp_path / "folder")]) == 2
    assert "no place for the thresholds" in capsys.readouterr().err and not (tmp_path / "folder").exists()


def test_an_evaluation_finds_the_same(trained, pairs):
    _, folder = trained
    rows = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    best = max(float(row["eval_map"]) for row in rows)
    code, said = call_main("--eval", folder / "best.pth", "--workers", "0", pairs)
    assert code == 0 and f"mAP {best:.2f} %" in said


def test_a_recipe_leaves_out_what_does_not_go_with_several_labels(pairs, tmp_path):
    words = ["--recipe", "scratch", "--epochs", "1", "--workers", "0", *TINY, "--output", tmp_path]
    code, said = call_main("--multi-label", *words, pairs)
    assert code == 0 and "mixup" not in said, said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mixup", "0.2"], "--multi-label does not go with mixup or cutmix"),
        (["--class-weights", "auto"], "--multi-label does not go with --class-weights"),
        (["--balanced-sampling"], "--multi-label does not go with --balanced-sampling"),
        (["--eval-metric", "top1"], "--eval-metric"),
        (["--recipe", "probe"], "--recipe probe"),
        (["--dataset", "sklearn-digits"], "--multi-label needs a CSV or Parquet file"),
    ],
)
def test_what_does_not_go_with_several_labels_is_refused(pairs, tmp_path, words, message):
    code, said = call_main(*SMALL, *TINY, "--multi-label", *words, "--output", tmp_path, pairs)
    assert code == 2 and message in said


def test_folders_tell_one_label_an_image(images, tmp_path):
    code, said = call_main(*SMALL, *TINY, "--multi-label", "--output", tmp_path, images)
    assert code == 2 and "--multi-label needs a CSV or Parquet file of path and label" in said and str(images) in said
