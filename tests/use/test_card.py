"""Cards for Hugging Face's Hub: what they say of published weights, of one's own, and of those of others."""

import json
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard

from convmlp import classification
from convmlp.use.card import DATASETS, make_card
from convmlp.use.classifier import Classifier, open_classifier
from convmlp.use.export import export
from convmlp.use.info import PUBLISHED
from convmlp.zoo import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["a temple", "a flower", "a | b", "größer", "<b>bold</b>"]
SCORES = {"in1k": "ImageNet", "in1k_ft_cifar10": "CIFAR-10", "in1k_ft_cifar100": "CIFAR-100"}
SCORES["in1k_ft_flowers102"] = "Flowers-102"

# The published weights


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
    assert ("50 epochs and 10" if fine_tuned else "300 epochs and 10") in card.text
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
    card = make_card(on_meta("convmlp_s", "in1k"))
    assert card.text.partition("## Citation\n\n")[2] in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("variant", ["convmlp_s", "convmlp_s_classification"])
def test_both_names_of_a_model_have_its_score(variant):
    assert make_card(on_meta(variant, "in1k")).data.eval_results[0].metric_value == 0.768


# Other weights


@pytest.fixture(scope="module")
def own(digits, tmp_path_factory) -> Path:
    """A run of classification.py with averaged weights."""
    root = tmp_path_factory.mktemp("own")
    call = f"--output {root} --experiment run --model convmlp_s --model-kwargs blocks=(1,1,1) dims=(8,16,32) "
    call += "mlp_ratios=(1,1,1) channels=8 n_conv_blocks=1 --img-size 32 --epochs 2 --warmup-epochs 0 --lr 1e-3 "
    call += f"--batch-size 30 --workers 0 --model-ema --model-ema-decay 0.5 {digits}"
    assert classification.main(call.split()) == 0
    return root / "run"


def test_the_card_of_an_own_training_tells_what_its_checkpoint_knows(own, tmp_path):
    checkpoint = torch.load(own / "last.pth")
    assert {"eval_top1", "eval_ema_top1"} < set(checkpoint["history"][-1])
    checkpoint["history"][-1] |= {"eval_top1": 12.5, "eval_ema_top1": 62.5}  # with so few images they may be equal
    torch.save(checkpoint, tmp_path / "own.pth")
    export(open_classifier(checkpoint=str(tmp_path / "own.pth"), device="cpu"), tmp_path / "folder", "safetensors")
    card = ModelCard.load(tmp_path / "folder" / "README.md")
    [result] = card.data.eval_results
    assert result.metric_value == 0.625
    assert (result.dataset_name, result.dataset_type) == ("a folder of images", "imagefolder")
    assert "Measured in training, after 2 epochs." in card.text
    assert "trained by convmlp on a folder of images, from random weights." in card.text
    assert "- classes: 3 (one; three; two)\n" in card.text
    assert "- learning rate: 0.001\n" in card.text
    assert str(own) not in card.content and str(own.parent) not in card.content
    assert "ImageNet" not in card.content and "published" not in card.content
    assert "license" not in card.data.to_dict()
    cfg = json.loads((tmp_path / "folder" / "config.json").read_text())["pretrained_cfg"]
    assert not {"tag", "license", "origin_url"} & set(cfg)


def test_a_checkpoint_within_an_epoch_has_no_score(own):
    classifier = open_classifier(checkpoint=str(own / "last.pth"), device="cpu")
    classifier.about = {**classifier.about, "epoch": 2}  # begun, not evaluated
    card = make_card(classifier)
    assert card.data.eval_results is None and card.data.metrics is None
    assert "## Results" not in card.text and "## Training" in card.text


def test_one_epoch_is_one(own):
    classifier = open_classifier(checkpoint=str(own / "last.pth"), device="cpu")
    classifier.about = {**classifier.about, "epoch": 0}
    assert "after 1 epoch." in make_card(classifier).text


@pytest.fixture
def bare() -> Classifier:
    """Weights of which nothing is known, with names of classes that Markdown would take for its own."""
    settings = dict(blocks=(1, 1, 1), dims=(8, 16, 32), mlp_ratios=(1, 1, 1), channels=8, n_conv_blocks=1)
    model = timm.create_model("convmlp_s", num_classes=5, **settings).eval()
    config = {**timm.data.resolve_data_config({}, model=model), "input_size": (3, 32, 32)}
    return Classifier("convmlp_s", model, NAMES, config, torch.device("cpu"), "bare")


@pytest.mark.parametrize(("origin", "sentence"), [("file", "is not known"), ("random", "are random")])
def test_bare_weights_and_random_ones_claim_nothing(origin, sentence, bare):
    bare.origin = origin
    card = make_card(bare)
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
