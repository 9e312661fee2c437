"""Exports by a user's hand: each kind of file predicts and is evaluated as its checkpoint, or does not come to be."""

import re
from pathlib import Path

import pytest
import torch

from convmlp import classification
from convmlp.classification.labelled import labelled_images, spread
from convmlp.common.errors import RunError
from convmlp.use import export as exporting
from convmlp.use.classifier import open_classifier
from convmlp.use.export import export
from convmlp.use.predict import predict

KINDS = {  # and the package without which a kind is not tried
    "onnx": "",
    "onnx --preprocess": "",
    "onnx --int8": "",
    "onnx --int8 --preprocess": "",
    "onnx --dynamic": "",
    "onnx --half": "",
    "torch-export": "",
    "torch-export --preprocess": "",
    "torch-export --dynamic": "",
    "openvino": "openvino",
    "openvino --preprocess": "openvino",
    "openvino --int8": "nncf",
    "openvino --int8 --preprocess": "nncf",
    "executorch": "executorch",
    "litert": "litert_torch",
}
OWN = ("executorch", "litert")  # which `predict` does not read
quick = ("torch-export", "torch-export --preprocess")
each_kind = pytest.mark.parametrize(
    "kind", [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)


@pytest.fixture
def best(trained) -> Path:
    return trained / "best.pth"


@pytest.fixture
def val(digits) -> list[Path]:
    return sorted((digits / "val").rglob("*.png"))


@pytest.fixture
def write(best, digits, verb, tmp_path):
    """Export by the command, with the accuracy on the digits; returns the file and what was said."""

    def run(kind: str, *more: object) -> tuple[Path, str]:
        format, *flags = kind.split()
        path = tmp_path / f"digits{exporting.SUFFIXES[format]}"
        calibrate = ("--calibrate", digits) if "--int8" in flags else ()
        words = ("--format", format, *flags, *calibrate, "--data", digits, "--output", path, *more)
        code, out, err = verb("export", best, *words)
        assert code == 0, err
        return path, out + err

    return run


@each_kind
def test_a_file_predicts_and_is_evaluated_as_its_checkpoint(kind, write, best, digits, val, verb, tmp_path):
    if KINDS[kind]:
        pytest.importorskip(KINDS[kind])
    path, out = write(kind, "--max-drop", 10)
    accuracies = re.search(r"accuracy on 30 images of .*: PyTorch ([\d.]+) %, .* ([\d.]+) %", out)
    assert accuracies and abs(float(accuracies[1]) - float(accuracies[2])) < (7 if "int8" in kind else 0.01)
    if kind in OWN:
        return
    classifier, file = open_classifier(checkpoint=str(best), device="cpu"), open_classifier(checkpoint=str(path))
    assert file.class_names == classifier.class_names and file.takes_pixels == ("--preprocess" in kind)
    expected, found = predict(val, classifier, 3)[0], predict(val, file, 3)[0]
    same = sum(left.best[0].name == right.best[0].name for left, right in zip(expected, found, strict=True))
    assert same >= (25 if "int8" in kind else 30)
    for left, right in zip(expected, found, strict=True) if "int8" not in kind else ():
        probabilities = {guess.name: guess.probability for guess in right.best}
        assert all(abs(probabilities[guess.name] - guess.probability) < 0.01 for guess in left.best)
    code, out, _ = verb("predict", path, val[0], "--json", "-")
    assert code == 0 and f'"name": "{found[0].best[0].name}"' in out
    words = ["--eval", str(path), "--workers", "0", "--output", str(tmp_path / "eval"), str(digits)]
    assert classification.main(words) == 0
    assert (tmp_path / "eval" / "convmlp_s" / "per_class.csv").exists()


def test_a_file_that_loses_too_much_does_not_come_to_be(best, digits, tmp_path, monkeypatch):
    classifier = open_classifier(checkpoint=str(best), device="cpu")
    images = labelled_images(str(digits), str(best), classifier.class_names, train=False)
    measured = exporting._measure
    monkeypatch.setattr(exporting, "_measure", lambda *args: measured(*args)._replace(file=10.0))
    path = tmp_path / "x.pt2"
    path.write_text("mine")
    with pytest.raises(
        RunError, match=r"loses \d+\.\d+ points of accuracy, from .* to 10.00 % of 30 images, and --max-dr"
    ):
        export(classifier, path, "torch-export", validation=images, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt2"] and path.read_text() == "mine"


def test_calibration_images_are_of_all_classes(best, digits):
    names = open_classifier(checkpoint=str(best), device="cpu").class_names
    images = labelled_images(str(digits), str(best), names, train=True)
    chosen = spread(images, 8)
    targets = [chosen[i][1] for i in range(len(chosen))]
    assert sorted(targets.count(number) for number in range(3)) == [2, 3, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--int8"], "--int8 and --calibrate FOLDER go together"),
        (["--calibrate", "{digits}"], "--int8 and --calibrate FOLDER go together"),
        (["--max-drop", "1"], "--max-drop needs the images that it is counted on: --data FOLDER"),
        (["--data", "nowhere"], "no such data folder: nowhere"),
        (["--max-drop", "-1", "--data", "x"], "must be between 0 and 100"),
    ],
)
def test_wishes_that_contradict_each_other_are_one_error(words, message, best, digits, fails):
    assert message in fails("export", best, *(word.format(digits=digits) for word in words))


@pytest.fixture
def program(best, tmp_path) -> Path:
    classifier = open_classifier(checkpoint=str(best), device="cpu")
    export(classifier, tmp_path / "digits.pt2", "torch-export", preprocess=True)
    return tmp_path / "digits.pt2"


def test_verbs_that_need_layers_say_so(program, val, fails):
    for words in (("info", program), ("export", program), ("visualize", val[0], "--models", program)):
        assert "is an exported program, without layers" in fails(*words)


def test_an_exported_file_takes_no_model_and_no_other_size(program, val, fails, verb):
    assert "needs no --model" in fails("predict", val[0], "--checkpoint", program, "--model", "convmlp_s")
    assert "works only at its own 40 px" in fails("predict", val[0], "--checkpoint", program, "--img-size", "64")
    assert "name images behind it" in fails("predict", program)
    assert verb("predict", val[0], "--model", program).code == 0


def test_a_program_tells_nothing_of_the_machine_that_wrote_it(program):
    assert str(Path(torch.__file__).parent).encode() not in program.read_bytes()
