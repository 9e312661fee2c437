"""Folders for Hugging Face's Hub: their cards, and what timm, transformers and convmlp make of them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
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
from convmlp import classification, cli
from convmlp.use.card import CITATION, DATASETS, make_card
from convmlp.use.classifier import Classifier, open_classifier
from convmlp.use.export import export
from convmlp.use.info import PUBLISHED
from convmlp.zoo import VARIANTS

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(blocks=(1, 1, 1), dims=(16, 24, 192), mlp_ratios=(2, 2, 2), channels=8, n_conv_blocks=1)
NAMES = ["a temple", "a flower", "a | b", "größer", "<b>bold</b>"]
SCORES = {"in1k": "ImageNet", "in1k_ft_cifar10": "CIFAR-10", "in1k_ft_cifar100": "CIFAR-100"}
SCORES["in1k_ft_flowers102"] = "Flowers-102"


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


def front_matter(path: Path) -> dict:
    return yaml.safe_load(path.read_text().split("---\n")[1])


# Loading


@torch.no_grad()
def test_timm_and_transformers_give_the_logits_of_the_model(folder, tiny, x):
    expected = tiny.model(x)
    wrapper = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert_close(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x), expected)
    assert_close(wrapper(x).logits, expected)
    assert list(wrapper.config.id2label.values()) == NAMES


@torch.no_grad()
def test_the_processor_of_transformers_prepares_pictures_as_convmlp_does(folder, tiny, photo):
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
    """A torch.hub cache, and no mirror that can be reached."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("convmlp.use.classifier.MIRRORS", ("http://127.0.0.1:9/",))
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


def on_meta(variant: str, tag: str, origin: str = "published") -> Classifier:
    """A classifier of published weights, but for the weights."""
    with torch.device("meta"):
        model = timm.create_model(f"{variant}.{tag}").eval()
    config = timm.data.resolve_data_config({}, model=model)
    names = [f"class {i}" for i in range(model.num_classes)]
    return Classifier(f"{variant}.{tag}", model, names, config, torch.device("meta"), variant, origin)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tag", SCORES)
def test_cards_of_published_weights_tell_what_is_known(variant, tag, tmp_path):
    make_card(on_meta(variant, tag)).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    fine_tuned = tag != "in1k"
    name, score = SCORES[tag], PUBLISHED[variant][SCORES[tag]]
    [result] = card.data.eval_results
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "timm")
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.model_name == f"{variant}.{tag}"
    assert card.data.datasets[0] == "ILSVRC/imagenet-1k"
    assert (result.metric_type, result.dataset_name) == ("accuracy", name)
    assert result.metric_value == pytest.approx(score / 100)
    assert result.source_url == "https://arxiv.org/abs/2109.04454"
    assert f": {score:.1f} %\n\nAs [published by the paper](" in card.text
    assert ("trained on ImageNet and then on" in card.text) == fine_tuned

    config = ROOT / "configs" / "classification" / DATASETS[tag].config.format(variant)
    assert f"`{config.relative_to(ROOT)}`" in card.text
    recipe = resolved(config)
    assert f"{recipe['epochs']} epochs and {recipe['cooldown_epochs']} of cool-down with AdamW" in card.text
    assert ("from the ImageNet weights" in card.text) == bool(recipe.get("pretrained"))
    assert recipe["opt"] == "adamw"
    assert f"- mean: {', '.join(f'{value:g}' for value in recipe['mean'])}\n" in card.text
    assert f"crop_pct {recipe['crop_pct']}" in card.text
    assert "None" not in card.content and "class 0" not in card.content


def resolved(path: Path) -> dict:
    """The values of a config over those of its bases."""
    values = yaml.safe_load(path.read_text())
    base = values.pop("base", None)
    return {**(resolved(path.parent / base) if base else {}), **values}


def test_the_citation_is_that_of_the_readme():
    assert CITATION in (ROOT / "README.md").read_text()


# Other weights


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A run of classification.py on two photographs of each of two classes."""
    root = tmp_path_factory.mktemp("own")
    china, flower = (Image.fromarray(picture) for picture in load_sample_images().images)
    for split in ("train", "val"):
        for name, picture in (("china", china), ("flower", flower)):
            (root / "pictures" / split / name).mkdir(parents=True)
            for i in range(2):
                picture.crop((200 * i, 0, 200 * i + 300, 300)).resize((40, 40)).save(
                    root / "pictures" / split / name / f"{i}.png"
                )
    call = f"--output {root} --experiment run --model convmlp_s --img-size 32 --epochs 2 --warmup-epochs 0 --lr 1e-3 "
    call += f"--batch-size 4 --workers 0 --model-ema --model-ema-decay 0.5 {root / 'pictures'}"
    assert classification.main(call.split()) == 0
    return root / "run"


def test_the_card_of_an_own_training_tells_what_its_checkpoint_knows(own, tmp_path):
    checkpoint = torch.load(own / "last.pth")
    assert {"eval_top1", "eval_ema_top1"} < set(checkpoint["history"][-1])
    checkpoint["history"][-1] |= {"eval_top1": 12.5, "eval_ema_top1": 62.5}  # with so few pictures they may be equal
    torch.save(checkpoint, tmp_path / "own.pth")
    export(open_classifier(checkpoint=str(tmp_path / "own.pth"), device="cpu"), tmp_path / "folder", "safetensors")
    card = ModelCard.load(tmp_path / "folder" / "README.md")
    [result] = card.data.eval_results
    assert result.metric_value == 0.625
    assert (result.dataset_name, result.dataset_type) == ("a folder of pictures", "imagefolder")
    assert "Measured in training, after 2 epochs." in card.text
    assert "trained by convmlp on a folder of pictures, from random weights." in card.text
    assert "- classes: 2 (china; flower)\n" in card.text
    assert "- learning rate: 0.001\n" in card.text
    assert str(own) not in card.content and str(own.parent) not in card.content
    assert "ImageNet" not in card.content and "published" not in card.content
    assert "license" not in front_matter(tmp_path / "folder" / "README.md")
    cfg = json.loads((tmp_path / "folder" / "config.json").read_text())["pretrained_cfg"]
    assert not {"tag", "license", "origin_url"} & set(cfg)


def test_a_checkpoint_within_an_epoch_has_no_score(own):
    classifier = open_classifier(checkpoint=str(own / "last.pth"), device="cpu")
    classifier.about = {**classifier.about, "epoch": 2}  # begun, not evaluated
    card = make_card(classifier)
    assert card.data.eval_results is None and card.data.metrics is None
    assert "## Results" not in card.text and "## Training" in card.text


def test_bare_weights_and_random_ones_claim_nothing():
    for origin, sentence in (("file", "is not known"), ("random", "are random")):
        card = make_card(build(origin=origin))
        assert card.data.eval_results is None and card.data.license is None and card.data.datasets is None
        assert sentence in card.text
        assert not any(title in card.text for title in ("## Results", "## Training"))
        assert "a temple; a flower; a | b; größer; &lt;b&gt;bold&lt;/b&gt;" in card.text


def test_the_card_of_another_model_of_timm_needs_no_import():
    classifier = on_meta("resnet18", "a1_in1k")
    card = make_card(classifier)
    assert card.data.license == "apache-2.0" and card.data.eval_results is None
    assert "those that timm has for `resnet18.a1_in1k`" in card.text
    assert "convmlp.timm_models" not in card.text and "ConvMLP" not in card.text
