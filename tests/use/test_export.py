"""Exported files: that they give the model's logits, say what they are, and that nothing else is ever written."""

import copy
import json
import logging
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, StdConv2d
from torch import nn

import convmlp.timm_models  # noqa: F401
from convmlp.common.errors import RunError
from convmlp.deploy import fold_batchnorm
from convmlp.use.classifier import Classifier, open_classifier
from convmlp.use.export import SUFFIXES, Report, export

TINY = dict(blocks=(1, 1, 1), dims=(16, 24, 192), mlp_ratios=(2, 2, 2), channels=8, n_conv_blocks=1)
FILES = ("onnx", "torch-export", "torchscript")
FORMATS = (*FILES, "safetensors")  # the others are in test_writers.py

each_format = pytest.mark.parametrize("format", FORMATS)
each_file = pytest.mark.parametrize("format", FILES)

# An export to ONNX takes seconds: the quick tests of ONNX share the files of `written`
slow_onnx = pytest.param("onnx", marks=pytest.mark.slow)
each_new_format = pytest.mark.parametrize("format", [slow_onnx, *FORMATS[1:]])
each_new_file = pytest.mark.parametrize("format", [slow_onnx, *FILES[1:]])


def build(name: str = "convmlp_s", size: int = 64, **settings) -> Classifier:
    """Random weights, and statistics of BatchNorm that no initialisation gives."""
    torch.manual_seed(1)
    model = timm.create_model(name, **{"num_classes": 5, **settings}).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values, low in ((norm.running_mean, -0.5), (norm.running_var, 0.5), (norm.bias, -0.5)):
                nn.init.uniform_(values, low, low + 1)
    channels = settings.get("in_chans", 3)
    return Classifier(
        name=name,
        model=model,
        class_names=[f"Größe {i}" for i in range(model.num_classes)],
        data_config=dict(
            input_size=(channels, size, size),
            interpolation="bilinear",
            mean=(0.1, 0.2, 0.3)[:channels],
            std=(0.4, 0.5, 0.6)[:channels],
            crop_pct=0.8,
            crop_mode="border",
        ),
        device=torch.device("cpu"),
        title=name,
    )


@pytest.fixture(scope="module")
def tiny() -> Classifier:
    return replace(build(**TINY), temperature=2.0)


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory) -> Callable[..., Report]:
    """The tiny classifier exported, each way once."""

    @cache
    def get(format: str, **settings) -> Report:
        return export(tiny, tmp_path_factory.mktemp(format) / f"tiny{SUFFIXES[format]}", format, **settings)

    return get


def load(path: Path, format: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if format == "onnx":
        session = onnxruntime.InferenceSession(path)
        return lambda x: torch.from_numpy(session.run(["logits"], {"input": x.numpy()})[0])
    if format == "torch-export":
        return torch.export.load(path).module()
    if format == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return torch.jit.load(path)
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


def images(b: int = 1, h: int = 64, w: int = 64, channels: int = 3, seed: int = 7) -> torch.Tensor:
    return torch.randn(b, channels, h, w, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def difference(run: Callable, model: nn.Module, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> float:
    """Of the logits, over the largest."""
    expected, actual = model(x), run(x.to(dtype)).float()
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def inside(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def as_json(value) -> str:
    return json.dumps(value, sort_keys=True)


# Logits


@each_format
def test_what_is_written_gives_the_logits_of_the_model(format, written, tiny):
    report = written(format)
    folder = report.path.parent
    assert difference(load(report.path, format), tiny.model, images()) < 1e-5
    name = report.path.name
    in_folder = [f"{name}/{file}" for file in ("README.md", "config.json", "model.safetensors")]
    assert inside(folder) == [name, *(in_folder if format == "safetensors" else [])]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert report == Report(report.path, size, torch.float32, [(1, 64, 64)] * 3, report.absolute, report.relative)
    assert 0 <= report.relative < 1e-5


@each_format
def test_half_is_half_the_size_and_near(format, written, tiny):
    before = {key: value.clone() for key, value in tiny.model.state_dict().items()}
    report = written(format, half=True)
    dtype = torch.float32 if format == "safetensors" else torch.float16
    assert 0 < difference(load(report.path, format), tiny.model, images(), dtype) < 5e-3
    assert report.dtype == torch.float16
    assert 0 < report.relative < 5e-3
    assert report.size < 0.7 * written(format).size
    after = tiny.model.state_dict()
    assert all(after[key].dtype == before[key].dtype and after[key].equal(before[key]) for key in before)


@each_file
def test_with_free_sizes_any_image_runs(format, written, tiny):
    report = written(format, dynamic=True)
    assert report.shapes == [(1, 64, 64), (3, 64, 64), (2, 33, 97), (1, 32, 32)]
    run = load(report.path, format)
    for shape in ((1, 32, 32), (4, 64, 64), (2, 47, 101), (1, 32, 160)):
        assert difference(run, tiny.model, images(*shape)) < 1e-5


def test_free_sizes_have_names_in_onnx(written):
    session = onnxruntime.InferenceSession(written("onnx", dynamic=True).path)
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert session.get_outputs()[0].shape == ["batch", 5]


@pytest.mark.slow
def test_padding_follows_the_size_where_patches_replace_convolutions(tmp_path):
    classifier = build(**TINY, conv_stage=False)
    export(classifier, tmp_path / "patches.onnx", dynamic=True)
    run = load(tmp_path / "patches.onnx", "onnx")
    assert all(difference(run, classifier.model, images(1, h, w)) < 1e-5 for h, w in ((32, 33), (50, 39)))


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
@pytest.mark.parametrize("shape", [(2, 64, 64), (1, 96, 64)])
def test_without_free_sizes_other_images_are_refused(format, shape, written):
    run = load(written(format).path, format)
    with pytest.raises(Exception, match="invalid dimensions|Guard failed"):
        run(images(*shape))


@each_new_format
def test_exporting_prints_and_warns_nothing(format, tiny, tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(tiny, tmp_path / "tiny", format, half=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_any_model_of_timm_will_do(tmp_path):
    classifier = build("resnet10t", num_classes=3)
    export(classifier, tmp_path / "resnet.onnx", fold=True)
    assert difference(load(tmp_path / "resnet.onnx", "onnx"), classifier.model, images()) < 1e-5


def test_a_model_that_cannot_take_other_sizes_is_refused(tmp_path, capfd):
    classifier = build("vit_tiny_patch16_224", depth=1, size=224)
    with pytest.raises(RunError, match=r"vit_tiny_patch16_224 cannot .* with free sizes: Input height \(193\)"):
        export(classifier, tmp_path / "vit.onnx", dynamic=True)
    assert inside(tmp_path) == []
    assert capfd.readouterr() == ("", "")


class Choosing(nn.Module):
    """Does one thing to large maps, (b, h, w, c), and another to small ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 1:
            return 2 * x
        return x


def test_a_choice_by_size_is_kept_or_refused(tmp_path, capfd):
    classifier = build(**TINY)
    classifier.model.norm = Choosing()
    export(classifier, tmp_path / "tiny.pt", "torchscript", dynamic=True)
    run = load(tmp_path / "tiny.pt", "torchscript")
    assert all(difference(run, classifier.model, images(1, side, side)) < 1e-5 for side in (32, 64))
    with pytest.raises(RunError, match="convmlp_s cannot be exported as torch-export with free sizes: Could not guard"):
        export(classifier, tmp_path / "tiny", "torch-export", dynamic=True)
    assert inside(tmp_path) == ["tiny.pt"]
    assert capfd.readouterr() == ("", "")


# Folding


def test_folding_keeps_the_logits_of_convmlp_s():
    model = build().model.train()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    folded = fold_batchnorm(model)
    assert norms == 9
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == norms
    assert model.training
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not any(module.training for module in folded.modules())
    kinds = [type(layer).__name__ for layer in folded.tokenizer.block]
    assert kinds == ["Conv2d", "Identity", "ReLU"] * 3 + ["MaxPool2d"]
    model.eval()
    assert 0 < difference(folded, model, images(2, 64, 96)) < 1e-5


class Skipping(nn.Sequential):
    """Not what its layers say in their order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[0](x) + self[1](self[0](x))


@pytest.mark.parametrize(
    "layers",
    [
        nn.Sequential(nn.Conv2d(3, 3, 3), BatchNormAct2d(3)),
        nn.Sequential(StdConv2d(3, 3, 3), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)),
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)),
        nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.BatchNorm2d(3)),
        Skipping(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)),
    ],
)
def test_only_what_folds_exactly_is_folded(layers):
    folded = fold_batchnorm(layers)
    assert [type(layer) for layer in folded] == [type(layer) for layer in layers]
    assert difference(folded, layers.eval(), images()) == 0


def test_folding_takes_every_pair_of_a_row():
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5)
    ).eval()
    for norm in (layers[1], layers[3]):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    folded = fold_batchnorm(layers)
    assert [type(layer) for layer in folded] == [nn.Conv2d, nn.Identity] * 2
    assert difference(folded, layers, images()) < 1e-5


def test_a_folded_file_has_no_batch_normalization(written, tiny):
    plain, folded = (written("torch-export", **settings).path for settings in ({}, {"fold": True}))
    names = {path: [str(node.target) for node in torch.export.load(path).graph.nodes] for path in (plain, folded)}
    assert sum("batch_norm" in name for name in names[plain]) == 6
    assert not any("batch_norm" in name for name in names[folded])
    assert difference(load(folded, "torch-export"), tiny.model, images()) < 1e-5

    operators = {node.op_type for node in onnx.load(written("onnx", fold=True).path).graph.node}
    assert {"Conv", "LayerNormalization"} < operators
    assert "BatchNormalization" not in operators


# What a file says of itself


def test_onnx_tells_classes_and_preprocessing(written, tiny):
    path = written("onnx").path
    told = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    about = {"arch": "convmlp_s", "class_names": tiny.class_names, **tiny.data_config, "temperature": 2.0}
    assert {key: json.loads(value) for key, value in told.items()} == json.loads(as_json(about))
    onnx.checker.check_model(onnx.load(path), full_check=True)


def test_the_opset_is_the_one_asked_for(written):
    graph = onnx.load(written("onnx", opset=22).path)
    assert [entry.version for entry in graph.opset_import if not entry.domain] == [22]


def test_torch_alone_reads_its_own_formats(written, tiny, tmp_path):
    for format in ("torch-export", "torchscript"):
        shutil.copy(written(format).path, tmp_path)
    torch.save({"x": images(), "logits": tiny.model(images()).detach()}, tmp_path / "expected")
    code = """
import sys, warnings
sys.modules.update(dict.fromkeys(["convmlp", "timm", "onnx"]))
import torch
warnings.simplefilter("ignore")
expected = torch.load("expected")
about = {"classifier.json": ""}
for run in (torch.export.load("tiny.pt2", extra_files=about).module(), torch.jit.load("tiny.pt", _extra_files=about)):
    torch.testing.assert_close(run(expected["x"]), expected["logits"], rtol=1e-5, atol=1e-5)
    text = about["classifier.json"]
    print(text if isinstance(text, str) else text.decode())
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    about = {"arch": "convmlp_s", "class_names": tiny.class_names, **tiny.data_config, "temperature": 2.0}
    assert [json.loads(line) for line in run.stdout.splitlines()] == [json.loads(as_json(about))] * 2


# timm's folder


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("convmlp_s", {}),
        ("convmlp_s", {**TINY, "num_classes": 7, "size": 96}),
        ("convmlp_s", {**TINY, "in_chans": 1}),
        ("convmlp_s", {**TINY, "spatial_connect": False, "global_pool": "max"}),
        ("convmlp_s", {**TINY, "conv_stage": False}),
        ("pure_mlp_s", TINY),
        ("resnet10t", {"size": 160}),
    ],
)
def test_a_folder_gives_back_the_whole_classifier(name, settings, tmp_path):
    classifier = build(name, **settings)
    folder = tmp_path / "folder"
    export(classifier, folder, "safetensors")
    x = images(channels=classifier.data_config["input_size"][0])
    assert difference(load(folder, "safetensors"), classifier.model, x) == 0

    opened = open_classifier(f"local-dir:{folder}", device="cpu")
    assert difference(opened.model, classifier.model, x) == 0
    assert opened.class_names == classifier.class_names
    assert as_json(opened.data_config) == as_json(classifier.data_config)
    assert opened.model.num_classes == classifier.model.num_classes


def test_a_folder_fits_other_classes_in_timm(written, tiny):
    model = timm.create_model(f"local-dir:{written('safetensors').path}", pretrained=True, num_classes=9)
    own, other = tiny.model.state_dict(), model.state_dict()
    assert other["head.weight"].shape == (9, 192)
    assert all(other[key].equal(own[key]) for key in own if not key.startswith("head."))


# Refusals


def forget_batchnorm(model: nn.Module) -> nn.Module:
    """A fold that is wrong: it drops the norms."""
    model = copy.deepcopy(model)
    for block in model.modules():
        if isinstance(block, nn.Sequential):
            for i, layer in enumerate(block):
                block[i] = nn.Identity() if isinstance(layer, nn.BatchNorm2d) else layer
    return model


@each_new_file
def test_a_file_that_computes_something_else_is_not_written(format, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("convmlp.use.export.fold_batchnorm", forget_batchnorm)
    with pytest.raises(RunError, match="the export differs from the model by .* of the largest logit"):
        export(tiny, tmp_path / "new" / "file", format, fold=True)
    assert inside(tmp_path) == ["new"]


def test_a_folder_that_builds_another_model_is_not_written(tmp_path):
    classifier = build(**TINY)
    classifier.model.stages[0].blocks[0].channel_mlp1.act = nn.ReLU()  # which timm knows nothing of
    with pytest.raises(RunError, match="the export differs from the model"):
        export(classifier, tmp_path / "folder", "safetensors")
    assert inside(tmp_path) == []


def test_weights_too_large_for_half_are_refused(tmp_path):
    classifier = build(**TINY)
    classifier.model.head.weight.data[:, ::2] = 1e6
    classifier.model.head.weight.data[:, 1::2] = -1e6  # infinities of both signs in half: NaN
    export(classifier, tmp_path / "whole", "torchscript")
    for format in ("torchscript", "safetensors"):
        with pytest.raises(RunError, match="differs from the model by nan"):
            export(classifier, tmp_path / "half", format, half=True)
    assert inside(tmp_path) == ["whole"]


def test_a_refused_file_leaves_the_one_it_should_replace(tiny, tmp_path, monkeypatch):
    path = tmp_path / "tiny.pt"
    path.write_text("mine")
    monkeypatch.setattr("convmlp.use.export.fold_batchnorm", forget_batchnorm)
    with pytest.raises(RunError, match="differs"):
        export(tiny, path, "torchscript", fold=True, overwrite=True)
    assert path.read_text() == "mine"
    assert inside(tmp_path) == ["tiny.pt"]


@each_file
def test_a_file_is_replaced_only_when_asked(format, tiny, tmp_path):
    path = tmp_path / "tiny"
    path.write_text("mine")
    with pytest.raises(RunError, match=r"tiny exists already"):
        export(tiny, path, format)
    assert path.read_text() == "mine"
    if format == "torchscript":
        export(tiny, path, format, overwrite=True)
        assert difference(load(path, format), tiny.model, images()) < 1e-5
    assert inside(tmp_path) == ["tiny"]


def test_a_folder_is_added_to_only_when_asked(tiny, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    export(tiny, folder, "safetensors")
    (folder / "config.json").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"folder exists already"):
        export(tiny, folder, "safetensors")
    assert (folder / "config.json").read_text() == "mine"
    export(tiny, folder, "safetensors", overwrite=True)
    assert difference(load(folder, "safetensors"), tiny.model, images()) == 0
    assert inside(tmp_path) == [
        "folder",
        *(f"folder/{name}" for name in ("README.md", "config.json", "model.safetensors", "notes.txt")),
    ]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (dict(format="onxx"), "unknown format onxx; did you mean onnx?; there are onnx, torch-export"),
        (
            dict(format="safetensors", fold=True),
            "fold is for onnx, torch-export, torchscript, openvino, executorch, litert, not",
        ),
        (dict(format="torch-export", opset=20), "opset is for onnx, not for torch-export"),
        (dict(format="torchscript", preprocess=True), "preprocess is for onnx, torch-export, openvino, not for torchs"),
        (dict(preprocess=True, dynamic=True), "takes images of any size by itself, without dynamic"),
        (dict(format="torch-export", calibration=[0]), "int8 is for onnx, openvino, not for torch-export"),
        (dict(calibration=[0], half=True), "a file is in int8 or in float16: give one of them"),
        (dict(format="openvino"), "an OpenVINO file is called NAME.xml"),
        pytest.param(dict(opset=99), "PyTorch cannot write this model in ONNX opset 99", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_is_said_in_one_line(request_, message, tiny, tmp_path, capfd, caplog):
    with pytest.raises(RunError) as error:
        export(tiny, tmp_path / "tiny", **request_)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert inside(tmp_path) == []


@each_format
def test_a_place_that_cannot_be_written_is_refused_before_the_work(format, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("copy.deepcopy", None)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write to the output folder .*file"):
        export(tiny, tmp_path / "file" / "model", format)


@each_file
def test_a_folder_in_place_of_a_file_is_refused(format, tiny, tmp_path):
    with pytest.raises(RunError, match="it is a folder"):
        export(tiny, tmp_path, format, overwrite=True)
    assert inside(tmp_path) == []


def test_a_file_in_place_of_the_folder_stays(tiny, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="cannot write .*file: File exists"):
        export(tiny, tmp_path / "file", "safetensors", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"
    assert inside(tmp_path) == ["file"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_its_pip_line(package, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RunError, match=f"onnx needs a missing package: pip install {package}$"):
        export(tiny, tmp_path / "tiny.onnx")
    export(tiny, tmp_path / "tiny.pt", "torchscript")
    assert inside(tmp_path) == ["tiny.pt"]
