"""Opening a classifier: by a name, by a checkpoint, by a folder of Hugging Face, and what each says of itself."""

import warnings
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from convmlp import ConvMLP, classification
from convmlp.common.errors import CheckpointError, RunError
from convmlp.use.classifier import open_any, open_classifier
from convmlp.use.export import export
from convmlp.use.info import measure
from convmlp.use.predict import predict

CLASSES = ["one", "three", "two"]


def test_a_training_checkpoint_tells_everything(trained):
    classifier = open_classifier(checkpoint=str(trained / "best.pth"))
    assert classifier.class_names == CLASSES
    assert list(classifier.data_config["input_size"]) == [1, 40, 40] and classifier.image_mode == "L"
    assert list(classifier.data_config["mean"]) == [0.4] and classifier.data_config["crop_pct"] == 1.0
    assert not any("connect" in name for name, _ in classifier.model.named_modules() if "norm" not in name)
    assert not classifier.model.training


def test_a_checkpoint_of_another_model_is_refused(trained):
    with pytest.raises(RunError, match="is of convmlp_s, not of --model convmlp_m"):
        open_classifier("convmlp_m", str(trained / "best.pth"))


@pytest.mark.parametrize(
    ("arch", "model"),
    [
        ("convmlp_s_classification", "convmlp_s"),
        ("convmlp_s", "convmlp_s_classification"),
        ("convmlp_s", "convmlp_s_classification.in1k"),
    ],
)
def test_both_names_of_a_model_open_its_checkpoints(arch, model, trained, tmp_path):
    checkpoint = torch.load(trained / "best.pth", weights_only=True)
    torch.save({**checkpoint, "arch": arch}, tmp_path / "renamed.pth")
    classifier = open_classifier(model, str(tmp_path / "renamed.pth"))
    assert isinstance(classifier.model, ConvMLP) and classifier.class_names == CLASSES


def test_bare_weights_of_ours_are_recognised(tmp_path):
    model = timm.create_model("convmlp_m", num_classes=7, in_chans=1)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    classifier = open_any(str(tmp_path / "mine.pth"))
    assert classifier.name == "convmlp_m" and len(classifier.class_names) == 7 and classifier.image_mode == "L"
    x = torch.randn(1, 1, 64, 64)
    assert classifier.model(x).equal(model.eval()(x))


def test_a_published_file_is_normalised_in_its_own_way(tmp_path):
    model = timm.create_model("convmlp_s", num_classes=10)
    torch.save(model.state_dict(), tmp_path / "convmlp_s_cifar10.pth")
    classifier = open_any(str(tmp_path / "convmlp_s_cifar10.pth"))
    assert classifier.data_config["mean"] == (0.4914, 0.4822, 0.4465) and classifier.data_config["crop_pct"] == 1.0


def test_weights_of_any_timm_model_open_by_its_name(tmp_path):
    model = timm.create_model("resnet10t", num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(RunError, match="does not tell its model: --model NAME"):
        open_any(str(tmp_path / "resnet.pth"))
    (tmp_path / "names.txt").write_text("cat\ndog\nNew York\n")
    classifier = open_classifier("resnet10t", str(tmp_path / "resnet.pth"), class_map=str(tmp_path / "names.txt"))
    assert classifier.class_names == ["cat", "dog", "New York"]
    x = torch.randn(1, 3, 64, 64)
    assert classifier.model(x).equal(model(x))


def test_models_of_one_image_size_open_at_the_size_they_were_trained_with(digits, tmp_path):
    call = f"--output {tmp_path} --experiment vit --model vit_tiny_patch16_224 --model-kwargs depth=1 --img-size 64 "
    call += f"--epochs 1 --warmup-epochs 0 --batch-size 10 --workers 0 {digits}"
    assert classification.main(call.split()) == 0
    path = str(tmp_path / "vit" / "best.pth")
    classifier = open_any(path, device="cpu")
    predictions, unreadable = predict(sorted((digits / "val" / "one").iterdir()), classifier)
    assert len(predictions) == 10 and unreadable == []
    with pytest.raises(RunError, match="works only at its own 64 px"):
        open_any(path, img_size=96)


def test_models_of_one_image_size_can_be_built_for_another(make_classifier):
    classifier = make_classifier("mixer_s32_224", img_size=64)
    assert measure(classifier.model, classifier.data_config["input_size"]).macs > 0


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory) -> Path:
    """The trained classifier as a folder of Hugging Face."""
    path = tmp_path_factory.mktemp("exported") / "folder"
    export(open_classifier(checkpoint=str(trained / "best.pth")), path, "safetensors")
    return path


def test_a_folder_of_hugging_face_is_opened_by_its_own_path(trained, folder):
    own = open_classifier(checkpoint=str(trained / "best.pth"))
    x = torch.randn(2, 1, 40, 40)
    for path in (folder, folder / "model.safetensors"):
        classifier = open_any(str(path))
        assert classifier.class_names == CLASSES and classifier.data_config["crop_pct"] == 1.0
        assert classifier.model(x).equal(own.model(x))


def test_the_name_of_a_model_is_that_model_whatever_lies_in_the_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("convmlp_s", "resnet10t.c3_in1k"):
        (tmp_path / name).symlink_to(folder)
        assert len(open_any(name, pretrained=False).class_names) == 1000
        assert open_any(f"./{name}").class_names == CLASSES


def test_a_file_that_begins_like_a_model_is_that_file(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "convmlp_s.best").write_bytes((trained / "best.pth").read_bytes())
    assert open_any("convmlp_s.best").class_names == CLASSES


def test_without_a_checkpoint_no_folder_is_taken_for_one(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere").symlink_to(folder)
    assert open_classifier("resnet10t", pretrained=False).name == "resnet10t"


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_the_last_name_needs_no_line_of_its_own_behind_it(end, trained, tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\nc" + end)
    classifier = open_classifier(checkpoint=str(trained / "best.pth"), class_map=str(tmp_path / "names.txt"))
    assert classifier.class_names == ["a", "b", "c"]


@pytest.mark.parametrize(("text", "given"), [("cat\ndog\n", "2 classes"), ("cat\n", "1 class")])
def test_names_that_do_not_fit_the_classes_are_refused(text, given, tmp_path, trained):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(RunError, match=f"names {given}, .*best.pth has 3"):
        open_classifier(checkpoint=str(trained / "best.pth"), class_map=str(tmp_path / "names.txt"))


def test_a_detector_needs_its_config(tmp_path):
    torch.save({"state_dict": {"backbone.tokenizer.block.0.weight": torch.zeros(1)}}, tmp_path / "detector.pth")
    with pytest.raises(RunError, match="name its config too, --config FILE"):
        open_any(str(tmp_path / "detector.pth"))


def test_imagenet_classes_have_their_names(make_classifier):
    names = make_classifier().class_names
    assert len(names) == 1000 and names[281] == "tabby, tabby cat"


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """A small network as the programs that `convmlp export` writes."""
    folder = tmp_path_factory.mktemp("programs")
    network, x = nn.Conv2d(3, 4, 3).eval(), torch.zeros(1, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(network, (x,)), folder / "x.pt2")
        program = torch.onnx.export(network, (x,), dynamo=True, verbose=False)
        program.save(folder / "x.onnx", external_data=False)
        program.save(folder / "apart.onnx", external_data=True)
        torch.jit.save(torch.jit.trace(network, x), folder / "x.pt")
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("apart.onnx", "keeps its weights in other files, which are not read: write it whole"),
        ("x.onnx", "does not tell its arch, class_names, input_size and 5 more, so .*; `convmlp export` writes files"),
        ("x.pt2", "is not read: .*, which no file of `convmlp export` holds"),
        ("x.pt", "is a TorchScript archive, a program; give the checkpoint it was made of; docs/using.md says how"),
    ],
)
def test_a_program_of_others_is_refused_with_the_reason(name, message, programs):
    with pytest.raises(RunError, match=message):
        open_any(str(programs / name))
    assert (Path(__file__).parents[2] / "docs/using.md").is_file()


def test_a_damaged_file_is_not_called_a_program(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="truncated, not a checkpoint"):
        open_any(str(tmp_path / "x.onnx"))
