"""model-index.yml, OpenMMLab's list of checkpoints, says of each what the configs and the code say."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import import_modules_from_strings

import convmlp
from convmlp.classification.options import load_config
from convmlp.config_files import list_configs
from convmlp.info import DOWNSTREAM, PUBLISHED, Cost, count_parameters, measure
from convmlp.zoo import MIRRORS, VARIANTS, checkpoint_urls

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / name for name in yaml.safe_load((ROOT / "model-index.yml").read_text())["Import"]]
CONTENTS = [yaml.safe_load(file.read_text()) for file in FILES]
ENTRIES = [entry for content in CONTENTS for entry in content["Models"]]
CLASSIFIERS, DETECTORS, SEGMENTORS = (
    [pytest.param(entry, id=entry["Name"]) for entry in ENTRIES if entry["Config"].startswith(f"configs/{task}/")]
    for task in ("classification", "detection", "segmentation")
)


def variant_of(entry: dict[str, Any]) -> str:
    [variant] = [name for name in VARIANTS if name in entry["Name"]]
    return variant


def results(entry: dict[str, Any]) -> list[tuple[str, str, dict[str, float]]]:
    return [(result["Task"], result["Dataset"], result["Metrics"]) for result in entry["Results"]]


def read_config(entry: dict[str, Any]) -> Config:
    cfg = Config.fromfile(ROOT / entry["Config"])
    import_modules_from_strings(["mmdet.models", "mmseg.models"])  # by now without compiled operators
    return cfg


def parameters_of(cfg: Config) -> int:
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device("meta"):
        return count_parameters(MODELS.build(cfg.model))


def test_every_published_config_has_one_entry():
    published = [config for config in list_configs() if not config.name.startswith(("quickstart", "template"))]
    assert len(published) == 21
    assert Counter(entry["Config"] for entry in ENTRIES) == Counter(f"configs/{config}" for config in published)
    assert [len(entries) for entries in (CLASSIFIERS, DETECTORS, SEGMENTORS)] == [12, 6, 3]


@pytest.mark.parametrize("key", ["Name", "Weights"])
def test_no_two_entries_share(key):
    assert len({entry[key] for entry in ENTRIES}) == len(ENTRIES)


@pytest.mark.parametrize("entry", [*CLASSIFIERS, *DETECTORS, *SEGMENTORS])
def test_an_entry_is_named_after_its_config(entry):
    assert entry["Name"] == Path(entry["Config"]).stem
    assert (ROOT / entry["Config"]).is_file()


@pytest.mark.parametrize("content", CONTENTS, ids=[file.parent.name for file in FILES])
def test_collections_are_those_of_the_models_and_their_files_exist(content):
    collections = content["Collections"]
    assert {entry["In Collection"] for entry in content["Models"]} == {entry["Name"] for entry in collections}
    folder = FILES[CONTENTS.index(content)].parent
    for collection in collections:
        assert (folder / collection["README"]).is_file()  # readers look from the file that names it
        assert (ROOT / collection["Code"]).is_file()
        assert collection["Paper"]["URL"] == "https://arxiv.org/abs/2109.04454"


@pytest.mark.parametrize("entry", CLASSIFIERS)
def test_a_classifier(entry):
    variant, dataset, metadata = variant_of(entry), entry["Name"].rpartition("_")[2], entry["Metadata"]
    config = load_config(ROOT / entry["Config"])
    assert config["model"] == f"{variant}_classification"
    assert metadata["Epochs"] == config["epochs"]
    assert metadata["Batch Size per GPU"] == config["batch_size"]

    with torch.device("meta"):
        model = getattr(convmlp, variant)(num_classes=config["num_classes"])
    cost: Cost = measure(model, (3, 224, 224))
    assert (metadata["Parameters"], metadata["FLOPs"]) == (cost.parameters, cost.macs)

    name = {"imagenet": "ImageNet", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "flowers102": "Flowers-102"}[
        dataset
    ]
    shown = "ImageNet-1k" if name == "ImageNet" else name
    assert metadata["Training Data"] == shown
    assert results(entry) == [("Image Classification", shown, {"Top 1 Accuracy": PUBLISHED[variant][name]})]
    assert entry["Weights"] == checkpoint_urls(variant, dataset)[0]


@pytest.mark.parametrize("entry", DETECTORS)
def test_a_detector(entry):
    variant, metadata = variant_of(entry), entry["Metadata"]
    kind = entry["Name"].partition("_")[0]
    title = {"retinanet": "RetinaNet", "maskrcnn": "Mask R-CNN"}[kind]
    cfg = read_config(entry)
    assert cfg.model.backbone.arch == variant
    assert entry["In Collection"] == f"ConvMLP {title}"
    assert metadata["Parameters"] == parameters_of(cfg)
    assert metadata["Epochs"] == cfg.train_cfg.max_epochs
    assert metadata["Batch Size per GPU"] == cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size / 8

    scores = DOWNSTREAM[variant]
    expected = [("Object Detection", "COCO", {"box AP": scores[f"{title} box AP"]})]
    if kind == "maskrcnn":
        expected.append(("Instance Segmentation", "COCO", {"mask AP": scores["mask AP"]}))
    assert results(entry) == expected
    assert entry["Weights"] == f"{MIRRORS[0]}detection/{kind}_{variant}_coco.pth"


@pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore``")
@pytest.mark.parametrize("entry", SEGMENTORS)
def test_a_segmentor(entry):
    variant, metadata = variant_of(entry), entry["Metadata"]
    cfg = read_config(entry)
    assert cfg.model.backbone.arch == variant
    assert metadata["Parameters"] == parameters_of(cfg)
    assert metadata["Iterations"] == cfg.train_cfg.max_iters
    assert metadata["Batch Size per GPU"] == cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size / 8
    assert results(entry) == [("Semantic Segmentation", "ADE20K", {"mIoU": DOWNSTREAM[variant]["Semantic FPN mIoU"]})]
    assert entry["Weights"] == f"{MIRRORS[0]}segmentation/sem_fpn_{variant}_ade20k.pth"
