"""The card of a classifier for Hugging Face's Hub: what it is, what it scores, how to load it, how it was trained."""

from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..model import ConvMLP
from .classifier import Classifier, numbered_names
from .info import PUBLISHED, grouped, measure

PAPER = "https://arxiv.org/abs/2109.04454"
CITATION = """\
```bibtex
@article{li2021convmlp,
  title={ConvMLP: Hierarchical Convolutional MLPs for Vision},
  author={Jiachen Li and Ali Hassani and Steven Walton and Humphrey Shi},
  journal={arXiv preprint arXiv:2109.04454},
  year={2021}
}
```
"""

IMPORT = "import convmlp.timm_models  # tells timm of the architecture\n"
WHY_IMPORT = """\
timm and transformers do not know this architecture by themselves: install convmlp, and import `convmlp.timm_models`
before a model is made. Without the import timm says `Unknown model`; transformers asks for a newer timm, which does not
help.

"""
LOADING = """\
`FOLDER` is where this file lies. For a repository on the Hub write `hf-hub:USER/NAME` instead of `local-dir:FOLDER`,
and `USER/NAME` instead of `FOLDER`.

```python
import timm
import torch
from PIL import Image
<import>
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
with torch.no_grad():
    logits = model(transform(Image.open("photo.jpg").convert("RGB")).unsqueeze(0))
```

`num_classes=0` gives pooled features instead, `features_only=True` maps at several strides.

```python
from transformers import pipeline
<import>
print(pipeline("image-classification", "FOLDER")("photo.jpg"))
```

`AutoModelForImageClassification`, `AutoModel` and `AutoImageProcessor` take the same folder. In a shell, with convmlp:

```shell
convmlp predict photo.jpg --checkpoint FOLDER
```
"""

FROM_SCRATCH = "300 epochs and 10 of cool-down with AdamW, from scratch"
FINE_TUNED = "50 epochs and 10 of cool-down with AdamW, from the ImageNet weights"


class Dataset(NamedTuple):
    """What published weights were trained on: its name in `info.PUBLISHED`, and on the Hub where it is there.

    `config` is the recipe under configs/classification, with {} for the variant.
    """

    name: str
    hub: str | None
    split: str | None
    config: str
    recipe: str


# By timm's tag
DATASETS = {
    "in1k": Dataset("ImageNet", "ILSVRC/imagenet-1k", "validation", "{}_imagenet.yml", FROM_SCRATCH),
    "in1k_ft_cifar10": Dataset("CIFAR-10", "uoft-cs/cifar10", "test", "finetuned/{}_cifar10.yml", FINE_TUNED),
    "in1k_ft_cifar100": Dataset("CIFAR-100", "uoft-cs/cifar100", "test", "finetuned/{}_cifar100.yml", FINE_TUNED),
    "in1k_ft_flowers102": Dataset("Flowers-102", None, None, "finetuned/{}_flowers102.yml", FINE_TUNED),
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


class Story(NamedTuple):
    """Where weights come from, in a sentence, what they score, and how they were trained, as far as that is known."""

    origin: str
    score: EvalResult | None = None
    measured: str = ""
    training: str = ""
    datasets: list[str] | None = None


def make_card(classifier: Classifier) -> ModelCard:
    """The README.md of a classifier in timm's folder. What is not known is left out.

    It has a score for the published weights of ConvMLP, and for a checkpoint of classification.py that was evaluated
    before it was written; and a licence for published weights, since that of others is for their owner to choose.
    """
    cfg = classifier.model.pretrained_cfg
    is_ours = isinstance(classifier.model, ConvMLP)
    name = _full_name(classifier)
    story = _tell(classifier)
    data = ModelCardData(
        library_name="timm",
        license=cfg.get("license") if classifier.origin == "published" else None,
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", *(["convmlp"] if is_ours else [])],
        datasets=story.datasets,
        metrics=["accuracy"] if story.score else None,
        model_name=name if story.score else None,
        eval_results=[story.score] if story.score else None,
    )
    family = f"of the [ConvMLP paper]({PAPER})" if is_ours else "one of timm's"
    loading = LOADING.replace("<import>\n", f"{IMPORT}\n" if is_ours else "\n")
    sections = {
        "Results": _results(story.score, story.measured) if story.score else "",
        "Model": _list(_facts(classifier)),
        "Use": (WHY_IMPORT if is_ours else "") + loading,
        "Training": story.training,
        "Licence": _licence(classifier),
        "Citation": CITATION if is_ours else "",
    }
    text = f"# {name}\n\nAn image classifier; its architecture, `{cfg['architecture']}`, is {family}. {story.origin}\n"
    text += "".join(f"\n## {title}\n\n{section}" for title, section in sections.items() if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _full_name(classifier: Classifier) -> str:
    """timm's name, with the tag that says which of the published weights these are."""
    cfg = classifier.model.pretrained_cfg
    tag = cfg.get("tag") if classifier.origin == "published" else None
    return ".".join(filter(None, [cfg["architecture"], tag]))


def _tell(classifier: Classifier) -> Story:
    cfg = classifier.model.pretrained_cfg
    if classifier.origin == "random":
        return Story("Its weights are random: it was not trained, and what it answers means nothing.")
    if classifier.origin == "published" and isinstance(classifier.model, ConvMLP):
        return _tell_published(cfg)
    if classifier.origin == "published":
        return Story(f"Its weights are those that timm has for `{_full_name(classifier)}`.")
    if classifier.about:
        return _tell_own(classifier.about)
    return Story("How its weights were trained is not known: the file that they are from does not say it.")


def _tell_published(cfg: Mapping[str, Any]) -> Story:
    variant, dataset = cfg["architecture"].removesuffix("_classification"), DATASETS[cfg["tag"]]
    stages = list(dict.fromkeys([DATASETS["in1k"], dataset]))
    trained = " and then on ".join(stage.name for stage in stages)
    return Story(
        f"Its weights are those that the paper's authors published, trained on {trained}.",
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset.hub or dataset.name,
            dataset_name=dataset.name,
            dataset_split=dataset.split,
            metric_type="accuracy",
            metric_name="top-1 accuracy",
            metric_value=round(PUBLISHED[variant][dataset.name] / 100, 4),
            source_name="ConvMLP paper",
            source_url=PAPER,
        ),
        f"As [published by the paper]({PAPER}), at {cfg['input_size'][-1]} px; not measured again for this card.",
        f"{dataset.recipe}. The whole recipe is `configs/classification/{dataset.config.format(variant)}` in the "
        "repository of convmlp.\n",
        [stage.hub for stage in stages if stage.hub],
    )


def _tell_own(about: Mapping[str, Any]) -> Story:
    """Of a checkpoint of classification.py. Where its pictures lay is nobody's business."""
    args = about.get("args") or {}
    data = args.get("dataset") or "a folder of pictures"
    start = "from random weights"
    if args.get("initial_checkpoint"):
        start = "from another checkpoint"
    elif args.get("pretrained"):
        start = "from published weights"
    settings = {words: args.get(key) for key, words in SETTINGS.items()}
    story = Story(
        f"Its weights were trained by convmlp on {data}, {start}.",
        training=_list({words: value for words, value in settings.items() if value}),
    )
    row = next((row for row in about.get("history") or () if row["epoch"] == about["epoch"]), None)
    if row is None:  # written within an epoch
        return story
    score = EvalResult(
        task_type="image-classification",
        dataset_type=args.get("dataset") or "imagefolder",
        dataset_name=data,
        dataset_split=args.get("val_split"),
        metric_type="accuracy",
        metric_name="top-1 accuracy",
        metric_value=round(row["eval_ema_top1" if args.get("model_ema") else "eval_top1"] / 100, 4),
    )
    return story._replace(score=score, measured=f"Measured in training, after {row['epoch'] + 1} epochs.")


def _facts(classifier: Classifier) -> dict[str, str]:
    config, names = classifier.data_config, classifier.class_names
    channels, height, width = config["input_size"]
    cost = measure(classifier.model, config["input_size"])
    known = "; ".join([*names[:MOST_NAMES], *(["... (all in config.json)"] if len(names) > MOST_NAMES else [])])
    return {
        "parameters": grouped(cost.parameters),
        "multiply-adds": f"{cost.macs / 1e9:.3f} G",
        "input": f"{channels} x {height} x {width} (channels, height, width), values from 0 to 1, normalised",
        "mean": ", ".join(f"{value:g}" for value in config["mean"]),
        "standard deviation": ", ".join(f"{value:g}" for value in config["std"]),
        "resizing, in timm's words": ", ".join(f"{key} {config[key]}" for key in RESIZING),
        "classes": f"{len(names)}" if names == numbered_names(len(names)) else f"{len(names)} ({known})",
    }


def _results(score: EvalResult, measured: str) -> str:
    split = f", {score.dataset_split}" if score.dataset_split else ""
    row = {f"{score.metric_name} on {score.dataset_name}{split}": f"{100 * score.metric_value:.1f} %"}
    return f"{_list(row)}\n{measured}\n"


def _licence(classifier: Classifier) -> str:
    cfg = classifier.model.pretrained_cfg
    if classifier.origin != "published":
        return "That of the weights is for their owner to choose: add `license:` to the head of this file.\n"
    origin = f", at {cfg['origin_url']}" if cfg.get("origin_url") else ""
    return f"The weights were published under {cfg['license']}{origin}.\n" if cfg.get("license") else ""


def _list(rows: Mapping[str, Any]) -> str:
    """A list in Markdown; names of classes and the like may be any text."""
    return "".join(f"- {_plain(key)}: {_plain(value)}\n" for key, value in rows.items())


def _plain(text: Any) -> str:
    return " ".join(escape(str(text), quote=False).split())
