"""The card of a classifier for Hugging Face's Hub: what it is, what it scores, how to load it, how it was trained.

Its text is the template beside this module, card.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..common.configs import config_folder
from ..common.errors import plural
from ..model import ConvMLP
from ..zoo import variant_of
from .classifier import Classifier, numbered_names
from .info import PUBLISHED, grouped, measure

PAPER = "https://arxiv.org/abs/2109.04454"


class Dataset(NamedTuple):
    """What published weights were trained on: its name in `info.PUBLISHED`, and on the Hub where it is there.

    `config` is the recipe under configs/classification, with {} for the variant.
    """

    name: str
    hub: str | None
    split: str | None
    config: str


# By timm's tag
DATASETS = {
    "in1k": Dataset("ImageNet", "ILSVRC/imagenet-1k", "validation", "{}_imagenet.yml"),
    "in1k_ft_cifar10": Dataset("CIFAR-10", "uoft-cs/cifar10", "test", "finetuned/{}_cifar10.yml"),
    "in1k_ft_cifar100": Dataset("CIFAR-100", "uoft-cs/cifar100", "test", "finetuned/{}_cifar100.yml"),
    "in1k_ft_flowers102": Dataset("Flowers-102", None, None, "finetuned/{}_flowers102.yml"),
}

# Options of classification.py that a card tells
SETTINGS = {
    "batch_size": "images a step and process",
    "opt": "optimizer",
    "lr": "learning rate",
    "sched": "schedule",
    "weight_decay": "weight decay",
    "smoothing": "label smoothing",
    "aa": "augmentation",
    "mixup": "mixup",
    "cutmix": "cutmix",
}

RESIZING = ("interpolation", "crop_pct", "crop_mode")
MOST_NAMES = 20


@dataclass
class History:
    """Where weights come from, in a sentence, what they score, and how they were trained, as far as that is known."""

    origin: str
    score: EvalResult | None = None
    measured: str = ""
    recipe: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    datasets: list[str] | None = None


def make_card(classifier: Classifier) -> ModelCard:
    """The README.md of a classifier in timm's folder. What is not known is left out.

    It has a score for the published weights of ConvMLP, and for a checkpoint of classification.py that was evaluated
    before it was written; and a licence for published weights, since that of others is for their owner to choose.
    """
    cfg = classifier.model.pretrained_cfg
    is_ours = isinstance(classifier.model, ConvMLP)
    is_published = classifier.origin == "published"
    licence = cfg.get("license") if is_published else None
    # timm's name, with the tag that says which of the published weights these are
    name = ".".join(filter(None, [cfg["architecture"], cfg.get("tag") if is_published else None]))
    history = _find_history(classifier, name)
    score = history.score
    data = ModelCardData(
        library_name="timm",
        license=licence,
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", *(["convmlp"] if is_ours else [])],
        datasets=history.datasets,
        metrics=["accuracy"] if score else None,
        model_name=name if score else None,
        eval_results=[score] if score else None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md")),
        name=name,
        architecture=cfg["architecture"],
        paper=PAPER,
        is_ours=is_ours,
        origin=history.origin,
        score=score,
        data_set=_plain(", ".join(filter(None, [score.dataset_name, score.dataset_split]))) if score else "",
        measured=history.measured,
        facts=_plain_items(_facts(classifier)),
        recipe=history.recipe,
        settings=_plain_items(history.settings),
        is_published=is_published,
        licence=licence,
        source=cfg.get("origin_url"),
    )


def _find_history(classifier: Classifier, name: str) -> History:
    if classifier.origin == "random":
        return History("Its weights are random: it was not trained, and its answers mean nothing.")
    if classifier.origin == "published" and isinstance(classifier.model, ConvMLP):
        return _published_history(classifier.model.pretrained_cfg)
    if classifier.origin == "published":
        return History(f"Its weights are those that timm has for `{name}`.")
    if classifier.about:
        return _own_history(classifier.about)
    return History("How its weights were trained is not known: the file that they are from does not say it.")


def _published_history(cfg: Any) -> History:
    variant, dataset = str(variant_of(cfg["architecture"])), DATASETS[cfg["tag"]]
    stages = list(dict.fromkeys([DATASETS["in1k"], dataset]))
    trained = " and then on ".join(stage.name for stage in stages)
    config = Path("classification", dataset.config.format(variant))
    recipe = _read_recipe(config_folder() / config)
    start = "from the ImageNet weights" if recipe.get("pretrained") else "from scratch"
    return History(
        f"Its weights are those that the paper's authors published, trained on {trained}.",
        _accuracy(
            PUBLISHED[variant][dataset.name],
            dataset.hub or dataset.name,
            dataset.name,
            dataset.split,
            source_name="ConvMLP paper",
            source_url=PAPER,
        ),
        f"As [published by the paper]({PAPER}), at {cfg['input_size'][-1]} px; not measured again for this card.",
        f"{plural(recipe['epochs'], 'epoch')} and {recipe['cooldown_epochs']} of cool-down with AdamW, {start}. "
        f"The whole recipe is `configs/{config.as_posix()}` in the repository of convmlp.",
        datasets=[stage.hub for stage in stages if stage.hub],
    )


def _read_recipe(config: Path) -> dict[str, Any]:
    """The values of a config of classification.py over those of its base."""
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    base = values.pop("base", None)
    return {**(_read_recipe(config.parent / base) if base else {}), **values}


def _own_history(about: Mapping[str, Any]) -> History:
    """Of a checkpoint of classification.py. Where its images lay is nobody's business."""
    args = about.get("args") or {}
    data = args.get("dataset") or "a folder of images"
    start = "published weights" if args.get("pretrained") else "random weights"
    if args.get("initial_checkpoint"):
        start = "another checkpoint"
    history = History(
        f"Its weights were trained by convmlp on {data}, from {start}.",
        settings={words: args[key] for key, words in SETTINGS.items() if args.get(key)},
    )
    row = next((row for row in about.get("history") or () if row["epoch"] == about["epoch"]), None)
    if row:  # else it was written within an epoch
        history.measured = f"Measured in training, after {plural(row['epoch'] + 1, 'epoch')}."
        top1 = row["eval_ema_top1" if args.get("model_ema") else "eval_top1"]
        history.score = _accuracy(top1, args.get("dataset") or "imagefolder", data, args.get("val_split"))
    return history


def _accuracy(top1: float, dataset_type: str, name: str, split: str | None, **source: Any) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        dataset_type=dataset_type,
        dataset_name=name,
        dataset_split=split,
        metric_type="accuracy",
        metric_name="top-1 accuracy",
        metric_value=round(top1 / 100, 4),
        **source,
    )


def _facts(classifier: Classifier) -> dict[str, str]:
    config, names = classifier.data_config, classifier.class_names
    channels, height, width = config["input_size"]
    cost = measure(classifier.model, config["input_size"])
    more = "; ... (all in config.json)" if len(names) > MOST_NAMES else ""
    known = "" if names == numbered_names(len(names)) else f" ({'; '.join(names[:MOST_NAMES])}{more})"
    return {
        "parameters": grouped(cost.parameters),
        "multiply-adds": f"{cost.macs / 1e9:.3f} G",
        "input": f"{channels} x {height} x {width} (channels, height, width), values from 0 to 1, normalised",
        "mean": ", ".join(f"{value:g}" for value in config["mean"]),
        "standard deviation": ", ".join(f"{value:g}" for value in config["std"]),
        "resizing, in timm's words": ", ".join(f"{key} {config[key]}" for key in RESIZING),
        "classes": f"{len(names)}{known}",
    }


def _plain_items(rows: Mapping[str, Any]) -> dict[str, str]:
    """For lists in Markdown; names of classes and the like may be any text."""
    return {_plain(key): _plain(value) for key, value in rows.items()}


def _plain(text: Any) -> str:
    return " ".join(escape(str(text), quote=False).split())
