"""Files of `convmlp export`, and of others, as modules: what they give, what they tell, what is refused."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from convmlp.common.errors import RunError
from convmlp.exported import kind_of, open_exported

ABOUT = {
    "arch": "convmlp_s",
    "class_names": ["a", "b", "c"],
    "input_size": [3, 8, 8],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def write(path: Path, about: dict | None = None, batch: int | str = "batch", pixels: bool = False) -> Path:
    """A file whose outputs are the means of the channels; of pixels, their shares of the whole."""
    about = ABOUT if about is None else about
    shape = [batch, "h", "w", 3] if pixels else [batch, 3, 8, 8]
    kind = TensorProto.UINT8 if pixels else TensorProto.FLOAT
    given, output = helper.make_tensor_value_info("x", kind, shape), helper.make_tensor_value_info("y", 1, None)
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=1),
        helper.make_node("ReduceMean", ["f", "axes"], ["m"], keepdims=0),
    ]
    nodes += [helper.make_node("ReduceSum", ["m", "last"], ["s"]), helper.make_node("Div", ["m", "s"], ["share"])]
    nodes += [helper.make_node("Identity", ["share" if pixels else "m"], ["y"])]
    axes = [
        numpy_helper.from_array(np.array([1, 2] if pixels else [2, 3]), "axes"),
        numpy_helper.from_array(np.array([1]), "last"),
    ]
    graph = helper.make_graph(nodes, "g", [given], [output], axes)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {key: json.dumps(value) for key, value in about.items()})
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("batch", ["batch", 1, 2])
def test_a_fixed_batch_takes_any_that_it_divides(batch, tmp_path):
    network, about = open_exported(write(tmp_path / "x.onnx", batch=batch))
    images = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(network(images), images.mean((2, 3)))
    assert about["class_names"] == ["a", "b", "c"] and about["data_config"]["mean"] == [0.5] * 3
    assert (about["temperature"], about["thresholds"], about["preprocess"]) == (1.0, [], False)


def test_pixels_of_different_sizes_give_logits_of_the_probabilities(tmp_path):
    path = write(tmp_path / "x.onnx", {**ABOUT, "preprocess": True}, pixels=True)
    network, _ = open_exported(path)
    assert network.takes_pixels
    images = [torch.randint(1, 255, (3, 5, 9), dtype=torch.uint8), torch.randint(1, 255, (3, 12, 7), dtype=torch.uint8)]
    shares = [image.float().mean((1, 2)) / image.float().mean((1, 2)).sum() for image in images]
    torch.testing.assert_close(network(images).softmax(1), torch.stack(shares))
    several, _ = open_exported(
        write(tmp_path / "y.onnx", {**ABOUT, "preprocess": True, "thresholds": [0.5] * 3}, pixels=True)
    )
    torch.testing.assert_close(several(images).sigmoid(), torch.stack(shares))


def test_grey_images_are_given_in_three_channels(tmp_path):
    path = write(tmp_path / "x.onnx", {**ABOUT, "preprocess": True}, pixels=True)
    grey = torch.randint(1, 255, (2, 1, 6, 6)).float()  # as a loader gives them
    torch.testing.assert_close(open_exported(path)[0](grey).softmax(1), torch.full((2, 3), 1 / 3))


def test_what_does_not_fit_is_one_error(tmp_path):
    network, _ = open_exported(write(tmp_path / "x.onnx"))
    with pytest.raises(RunError, match=r"x.onnx fails on images of shape \(1, 3, 9, 9\): "):
        network(torch.rand(1, 3, 9, 9))
    network, _ = open_exported(write(tmp_path / "y.onnx", {**ABOUT, "class_names": ["a", "b"]}))
    with pytest.raises(RunError, match=r"gives \(1, 3\) for 1 images of 2 classes"):
        network(torch.rand(1, 3, 8, 8))


def test_a_file_that_says_too_little_is_refused(tmp_path):
    path = write(
        tmp_path / "x.onnx", {key: value for key, value in ABOUT.items() if key not in ("mean", "class_names")}
    )
    with pytest.raises(RunError, match="x.onnx does not tell its class_names, mean, .*`convmlp export` writes files"):
        open_exported(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_names", "cat"),
        ("class_names", []),
        ("class_names", [1, 2, 3]),
        ("input_size", [3, 8]),
        ("input_size", [3, 8, -1]),
        ("mean", [0.5, "x", 0.5]),
        ("std", [0.2, 0.0, 0.2]),
        ("std", [0.2, float("nan"), 0.2]),
        ("crop_pct", 0),
        ("crop_mode", 3),
        ("temperature", -1),
        ("thresholds", {"a": 1}),
        ("preprocess", "yes"),
    ],
)
def test_a_value_of_a_wrong_form_is_named(key, value, tmp_path):
    with pytest.raises(RunError, match=f"x.onnx cannot be used: its {key} is "):
        open_exported(write(tmp_path / "x.onnx", {**ABOUT, key: value}))


def test_thresholds_are_as_many_as_classes(tmp_path):
    with pytest.raises(RunError, match="thresholds, but not one for each class"):
        open_exported(write(tmp_path / "x.onnx", {**ABOUT, "thresholds": [0.5]}))


# Files of strangers


@pytest.mark.parametrize("place", ["{outside}", "../secret.bin", "inside.bin"])
def test_no_other_file_is_read_for_weights(place, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for secret in (tmp_path / "secret.bin", folder / "inside.bin"):
        secret.write_bytes(np.array([1, 2], np.int64).tobytes())
    model = onnx.load(write(folder / "x.onnx"))
    axes = model.graph.initializer[0]
    axes.ClearField("raw_data")
    axes.data_location = TensorProto.EXTERNAL
    axes.external_data.add(key="location", value=place.format(outside=tmp_path / "secret.bin"))
    (folder / "x.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(RunError, match="x.onnx keeps its weights in other files, which are not read"):
        open_exported(folder / "x.onnx")


def test_operators_of_others_are_not_known(tmp_path):
    model = onnx.load(write(tmp_path / "x.onnx"))
    model.opset_import.append(helper.make_opsetid("evil", 1))
    model.graph.node[-1].domain = "evil"
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(RunError, match="x.onnx cannot be read by onnx: .*evil:Identity"):
        open_exported(tmp_path / "x.onnx")


def test_kinds_are_told_by_their_content(tmp_path):
    (tmp_path / "text.onnx").write_text("nonsense")
    (tmp_path / "x").write_text('<?xml version="1.0"?>\n<net name="x" version="11">')
    torch.save({"a": 1}, tmp_path / "checkpoint.pt2")
    assert kind_of(write(tmp_path / "model.pth")) == "onnx"
    assert kind_of(tmp_path / "x") == "openvino"
    assert [kind_of(tmp_path / name) for name in ("text.onnx", "checkpoint.pt2", "none", ".")] == [None] * 4
    with pytest.raises(RunError, match="is no file of `convmlp export`"):
        open_exported(tmp_path / "text.onnx")


def test_a_damaged_openvino_file_is_one_error(tmp_path):
    pytest.importorskip("openvino")
    (tmp_path / "x.xml").write_text('<?xml version="1.0"?>\n<net name="x" version="11"><layers>')
    with pytest.raises(RunError, match="x.xml cannot be read by openvino: "):
        open_exported(tmp_path / "x.xml")
