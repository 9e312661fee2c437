"""Export of detectors and segmentors: ONNX files against `predict`, what they say of themselves, mistakes."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from pycocotools import mask as run_lengths
from untrained import FPN, FRUIT, MASKRCNN, RETINANET, build, image_of, save

from convmlp import cli, convmlp_s
from convmlp.common.errors import RunError
from convmlp.openmmlab.export import export
from convmlp.openmmlab.graphs import RetinaNet
from convmlp.openmmlab.inference import predict

SIZES = [(128, 128), (200, 90), (50, 120), (333, 97)]


def load(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def about(path: Path) -> dict:
    return {each.key: json.loads(each.value) for each in onnx.load(path).metadata_props}


# Files; each takes most of a minute to write


@pytest.mark.slow
@pytest.mark.parametrize("base", [RETINANET, MASKRCNN, FPN])
def test_a_file_finds_what_predict_does(base, runs, models):
    report = export(*runs[base], "x.onnx")
    assert report.agreement > 0.98 and report.compared > 10
    assert report.size == Path("x.onnx").stat().st_size
    session = load(Path("x.onnx"))
    assert [output.name for output in session.get_outputs()] == list(report.outputs)
    for size in SIZES:
        [expected] = predict(models[base], [image_of(*size)])
        found = session.run(None, {"image": np.asarray(image_of(*size))})
        if base == FPN:
            assert (found[0] == expected.label_map).mean() > 0.999
            continue
        np.testing.assert_allclose(found[1], expected.scores, atol=1e-4)
        np.testing.assert_allclose(found[0], expected.boxes, atol=1e-2)
        np.testing.assert_array_equal(found[2], expected.labels)
        for mask, code in zip(found[3] if base == MASKRCNN else [], expected.masks or [], strict=True):
            assert (mask != run_lengths.decode(code)).mean() < 1e-3
    said = about(Path("x.onnx"))
    assert said["class_names"] == FRUIT
    assert (said["arch"], said["input_size"]) == ("tiny", None)
    assert said["mean"] == pytest.approx([123.675, 116.28, 103.53])


@pytest.mark.slow
@pytest.mark.parametrize("base", [MASKRCNN, FPN])
def test_a_file_of_a_fixed_size(base, runs):
    report = export(*runs[base], "x.onnx", img_size=(64, 96))
    assert report.agreement > 0.98
    assert about(Path("x.onnx"))["input_size"] == [64, 96]
    for width, height in SIZES:
        *_, last = load(Path("x.onnx")).run(None, {"image": np.asarray(image_of(width, height))})
        assert last.shape[-2:] == (height, width)


@pytest.mark.slow
def test_a_threshold_leaves_out_detections_and_no_detection_is_none(runs, models):
    scores = predict(models[MASKRCNN], [image_of(128, 128)])[0].scores
    middle = float(np.sort(scores)[-3:-1].mean())  # two are above
    export(*runs[MASKRCNN], "x.onnx", score_threshold=middle)
    assert about(Path("x.onnx"))["score_threshold"] == middle
    found = load(Path("x.onnx")).run(["scores"], {"image": np.asarray(image_of(128, 128))})[0]
    np.testing.assert_allclose(found, np.sort(scores)[::-1][:2], atol=1e-4)
    export(*runs[MASKRCNN], "x.onnx", score_threshold=1.0, overwrite=True)
    shapes = [each.shape for each in load(Path("x.onnx")).run(None, {"image": np.asarray(image_of(60, 40))})]
    assert shapes == [(0, 4), (0,), (0,), (0, 40, 60)]


@pytest.mark.slow
def test_a_file_that_finds_something_else_is_an_error(runs, monkeypatch):
    forward = RetinaNet.forward

    def shifted(graph, image):
        boxes, scores, labels = forward(graph, image)
        return boxes + 2, scores, labels

    monkeypatch.setattr(RetinaNet, "forward", shifted)
    Path("x.onnx").write_text("of before")
    with pytest.raises(RunError, match="the export finds something else than the model of .*: 0.0% of"):
        export(*runs[RETINANET], "x.onnx", overwrite=True)
    assert Path("x.onnx").read_text() == "of before"
    assert [path.name for path in Path().glob("*x*")] == ["x.onnx"]


@pytest.mark.slow
def test_the_command_names_the_file_by_the_config_and_says_what_agrees(runs, capfd):
    config, checkpoint = runs[FPN]
    capfd.readouterr()
    assert cli.main(["export", "--config", config, checkpoint]) == 0
    out, said = capfd.readouterr()
    assert out == ""
    first, second = said.splitlines()
    assert first.startswith("written: quickstart_fpn.onnx (") and first.endswith("image -> label_map)")
    assert second.startswith("compared with PyTorch on 3 images: 100.0% of ") and second.endswith(" pixels agree")


# Mistakes


@pytest.fixture
def call(capfd):
    """Runs `convmlp export`: the lines that it says, of a call that must fail."""

    def call(*words: str) -> list[str]:
        capfd.readouterr()
        assert cli.main(["export", *map(str, words)]) == 2
        return capfd.readouterr().err.splitlines()

    return call


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model convmlp_s", "--model is for classifiers, not for --config"),
        ("--dynamic", "--dynamic is for classifiers, not for --config"),
        ("--fold", "--fold is for classifiers, not for --config"),
        ("--half", "--half is for classifiers, not for --config"),
        ("--opset 18", "--opset is for classifiers, not for --config"),
        ("--class-map names.txt", "--class-map is for classifiers, not for --config"),
        ("--no-pretrained", "--no-pretrained is for classifiers; --config needs trained weights"),
        ("--format torch-export", "--format torch-export is for classifiers; with --config there is onnx"),
        ("--img-size 64x", "--img-size: must be a side or HEIGHTxWIDTH in pixels, got 64x"),
        ("--img-size 0x64", "--img-size: must be a side or HEIGHTxWIDTH in pixels, got 0x64"),
        ("--img-size 100", "--img-size must be a multiple of 32, got 100x100"),
        ("--output taken.onnx", "taken.onnx exists already; --overwrite replaces it"),
        ("--output taken.onnx/x.onnx", "cannot write to the output folder taken.onnx"),
    ],
)
def test_wrong_calls_end_in_one_line(words, message, runs, call):
    Path("taken.onnx").write_text("mine")
    config, checkpoint = runs[RETINANET]
    [line] = call("--config", config, checkpoint, *words.split())
    assert message in line
    assert Path("taken.onnx").read_text() == "mine"


def test_other_checkpoints_end_in_one_line(runs, call):
    config, _ = runs[RETINANET]
    torch.save(convmlp_s().state_dict(), "classifier.pth")
    [line] = call("--config", config, "classifier.pth")
    assert "classifier.pth is not of a detector or segmentor: it has no tensors of a backbone" in line
    [line] = call("--config", config, runs[MASKRCNN][1])
    assert f"does not fit {config}" in line


def test_options_of_detection_need_a_config(call):
    for option in ("--score-threshold=0.5", "--trust-checkpoint"):
        [line] = call("convmlp_s", option)
        assert "is for detection and segmentation: --config FILE" in line
    [line] = call("convmlp_s", "--img-size", "64x96")
    assert "--img-size: a classifier sees a square, got 64x96" in line


def test_a_segmentor_has_no_scores(runs):
    with pytest.raises(RunError, match="--score-threshold is for detection, and this is a segmentor"):
        export(*runs[FPN], "x.onnx", score_threshold=0.5)


SEGFORMER = """
model = dict(neck=None, decode_head=dict(_delete_=True, type="SegformerHead", in_channels=[8, 8, 16, 32],
    in_index=[0, 1, 2, 3], channels=8, num_classes=3, norm_cfg=dict(type="BN"),
    loss_decode=dict(type="CrossEntropyLoss")))
"""
PADDED = """
steps = [dict(type="LoadImageFromFile"), dict(type="Resize", scale=(64, 64), keep_ratio=True),
    dict(type="Pad", size_divisor=32), dict(type="PackDetInputs")]
test_dataloader = dict(dataset=dict(pipeline=steps))
"""


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (
            RETINANET,
            "model = dict(type='ATSS')",
            "the model ATSS cannot be exported, only RetinaNet, MaskRCNN, Enc",
        ),
        (FPN, SEGFORMER, "the decode_head SegformerHead cannot be exported, only FPNHead"),
        (RETINANET, PADDED, "Pad in the test pipeline cannot be exported, only Resize"),
        (
            RETINANET,
            PADDED.replace("scale=(64, 64)", "scale_factor=2.0").replace('dict(type="Pad", size_divisor=32), ', ""),
            "Resize in the test pipeline must have a scale, and be bilinear by cv2",
        ),
    ],
)
def test_other_models_and_pipelines_are_told_which_there_are(base, change, message, runs, tmp_path):
    config = tmp_path / "own.py"
    config.write_text(f"_base_ = {runs[base][0]!r}\n{change}\n")
    checkpoint = save(build(config), tmp_path / "own.pth", dataset_meta=dict(classes=FRUIT))
    with pytest.raises(RunError, match=message):
        export(str(config), checkpoint, "x.onnx")
    assert not Path("x.onnx").exists()
