"""Folders for Hugging Face's Hub: what timm, transformers and convmlp make of them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.datasets import Flowers102
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    TimmBackbone,
    pipeline,
)

import convmlp
import convmlp.timm_models  # noqa: F401
from convmlp import cli
from convmlp.use.classifier import Classifier, open_classifier
from convmlp.use.export import export

pytestmark = pytest.mark.slow

TINY = dict(blocks=(1, 1, 1), dims=(16, 24, 192), mlp_ratios=(2, 2, 2), channels=8, n_conv_blocks=1)
NAMES = ["a temple", "a flower", "a | b", "größer", "<b>bold</b>"]


def build(**settings) -> Classifier:
    torch.manual_seed(1)
    model = timm.create_model("convmlp_s", num_classes=5, **TINY).eval()
    config = dict(
        input_size=(3, 64, 64),
        interpolation="bilinear",
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        crop_pct=0.8,
        crop_mode="center",
    )
    return Classifier("convmlp_s", model, NAMES, config, torch.device("cpu"), "tiny", **settings)


@pytest.fixture(scope="module")
def tiny() -> Classifier:
    return build()


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "tiny"
    export(tiny, path, "safetensors")
    return path


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0])


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(7))


def assert_close(actual: torch.Tensor, expected: torch.Tensor):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


# Loading


@torch.no_grad()
def test_timm_and_transformers_give_the_logits_of_the_model(folder, tiny, x):
    expected = tiny.model(x)
    wrapper = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert_close(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x), expected)
    assert_close(wrapper(x).logits, expected)
    assert list(wrapper.config.id2label.values()) == NAMES


@torch.no_grad()
def test_the_processor_of_transformers_prepares_images_as_convmlp_does(folder, tiny, photo):
    assert_close(AutoImageProcessor.from_pretrained(folder)(photo).pixel_values, tiny.preprocess([photo]))


@torch.no_grad()
def test_the_pipeline_names_the_classes_that_convmlp_names(folder, tiny, photo):
    found = pipeline("image-classification", str(folder), device="cpu")(photo, top_k=5)
    scores = tiny.model(tiny.preprocess([photo])).softmax(-1)[0]
    expected = sorted(zip(scores.tolist(), NAMES, strict=True), reverse=True)
    assert [guess["label"] for guess in found] == [name for _, name in expected]
    assert [guess["score"] for guess in found] == pytest.approx([score for score, _ in expected], rel=1e-4)


@torch.no_grad()
def test_features_and_maps_come_without_the_head(folder, tiny, x):
    features = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()(x)
    maps = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()(x)
    assert_close(features, tiny.model.forward_head(tiny.model.forward_features(x), pre_logits=True))
    output = AutoModel.from_pretrained(folder).eval()(x, output_hidden_states=True)
    assert_close(output.pooler_output, features)
    backbone = TimmBackbone.from_pretrained(f"local-dir:{folder}", out_indices=(0, 1, 2, 3)).eval()
    for expected, hidden, level in zip(maps, output.hidden_states, backbone(x).feature_maps, strict=True):
        assert_close(hidden, expected)
        assert_close(level, expected)


@torch.no_grad()
def test_what_transformers_saves_again_opens_everywhere(folder, tiny, x, tmp_path):
    AutoModelForImageClassification.from_pretrained(folder).save_pretrained(tmp_path)
    opened = open_classifier(checkpoint=str(tmp_path), device="cpu")
    assert opened.class_names == NAMES
    assert_close(opened.model(x), tiny.model(x))


@torch.no_grad()
def test_a_folder_in_half_precision_stays_so_in_transformers(tiny, x, tmp_path):
    export(tiny, tmp_path / "half", "safetensors", half=True)
    wrapper = AutoModelForImageClassification.from_pretrained(tmp_path / "half").eval()
    assert wrapper.dtype == torch.float16
    torch.testing.assert_close(wrapper(x).logits.float(), tiny.model(x), rtol=0.02, atol=0.002)


def test_a_folder_starts_a_training_on_other_classes(folder, x):
    model = AutoModelForImageClassification.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    loss = model(x, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert model.timm_model.head.weight.shape == (3, 192)
    assert all(parameter.grad is not None for parameter in model.parameters())


def run_offline(code: str, home: Path) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_repository_of_the_hub_loads_by_its_name(folder, tiny, x, tmp_path):
    repository, revision = tmp_path / "hub" / "models--somebody--tiny", "0" * 40
    shutil.copytree(folder, repository / "snapshots" / revision)  # as huggingface_hub keeps what it has downloaded
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    torch.save(x, tmp_path / "x.pth")
    code = f"""
import timm, torch
import convmlp.timm_models
from convmlp.use.classifier import open_classifier
from transformers import AutoModelForImageClassification
models = [
    timm.create_model("hf-hub:somebody/tiny", pretrained=True),
    AutoModelForImageClassification.from_pretrained("somebody/tiny"),
    open_classifier("hf-hub:somebody/tiny", device="cpu").model,
]
x = torch.load({str(tmp_path / "x.pth")!r})
with torch.no_grad():
    outputs = [model.eval()(x) for model in models]
torch.save([getattr(output, "logits", output) for output in outputs], {str(tmp_path / "logits.pth")!r})
"""
    run_offline(code, tmp_path)
    expected = tiny.model(x).detach()
    outputs = torch.load(tmp_path / "logits.pth")
    assert len(outputs) == 3
    for logits in outputs:
        assert_close(logits, expected)


def test_without_the_import_neither_knows_the_architecture_as_the_card_says(folder, tmp_path):
    code = f"""
import timm
from transformers import AutoImageProcessor, AutoModelForImageClassification
AutoImageProcessor.from_pretrained({str(folder)!r})
for load in (
    lambda: timm.create_model("local-dir:{folder}", pretrained=True),
    lambda: AutoModelForImageClassification.from_pretrained({str(folder)!r}),
):
    try:
        load()
    except Exception as error:
        print(error)
"""
    timm_says, transformers_says = run_offline(code, tmp_path).splitlines()
    assert timm_says == "Unknown model (convmlp_s)"
    assert "upgrade timm" in transformers_says
    card = " ".join((folder / "README.md").read_text().split())
    assert "Without the import timm says `Unknown model`; transformers asks for a newer timm" in card


def test_the_code_of_a_card_runs(folder, photo, tmp_path):
    photo.save(tmp_path / "photo.jpg")
    blocks = (folder / "README.md").read_text().split("```python\n")[1:]
    code = "".join(block.split("```")[0].replace("FOLDER", str(folder)) for block in blocks)
    assert len(blocks) == 2
    printed = run_offline(f"import os; os.chdir({str(tmp_path)!r})\n{code}print(tuple(logits.shape))", tmp_path)
    assert "'label': " in printed
    assert printed.splitlines()[-1] == "(1, 5)"


# The published weights


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A torch.hub cache, and no network."""

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("socket.create_connection", refuse)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("dataset", "names"), [("flowers102", Flowers102.classes), ("cifar10", [f"LABEL_{i}" for i in range(10)])]
)
@torch.no_grad()
def test_published_weights_become_a_folder(dataset, names, cache, tmp_path, capsys):
    torch.manual_seed(1)
    torch.save(convmlp.convmlp_s(num_classes=len(names)).state_dict(), cache / f"convmlp_s_{dataset}.pth")
    model, out = f"convmlp_s.in1k_ft_{dataset}", tmp_path / "folder"
    assert cli.main(["export", model, "--format", "safetensors", "--output", str(out)]) == 0
    wrapper = AutoModelForImageClassification.from_pretrained(out).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = convmlp.convmlp_s(num_classes=len(names), pretrained=cache / f"convmlp_s_{dataset}.pth").eval()(x)
    assert_close(wrapper(x).logits, expected)
    assert list(wrapper.config.id2label.values()) == names
    config = json.loads((out / "config.json").read_text())
    assert config["pretrained_cfg"]["tag"] == f"in1k_ft_{dataset}"
    assert config["pretrained_cfg"]["license"] == "apache-2.0"
    assert f"# {model}\n" in (out / "README.md").read_text()


def test_names_that_no_package_has_can_be_given(cache, tmp_path, capsys):
    torch.save(convmlp.convmlp_s(num_classes=10).state_dict(), cache / "convmlp_s_cifar10.pth")
    names = [f"kind {i}" for i in range(10)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    call = ["export", "convmlp_s.in1k_ft_cifar10", "--format", "safetensors", "--img-size", "32"]
    assert cli.main([*call, "--class-map", str(tmp_path / "names.txt"), "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == names
    assert "(kind 0; kind 1;" in (tmp_path / "out" / "README.md").read_text()
