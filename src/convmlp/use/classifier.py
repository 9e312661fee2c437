"""A classifier ready for use: its weights, the names of its classes, and how it takes its images."""

import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from ..common.classes import read_class_names
from ..common.devices import choose_device
from ..common.errors import CheckpointError, RunError, plural
from ..common.images import to_mode
from ..exported import Exported, kind_of, open_exported
from ..model import ConvMLP
from ..timm_models import (  # and our models are registered with timm
    SOURCES,
    TimmModel,
    check_name,
    check_source,
    create_timm_model,
    has_fixed_size,
    layer_names,
    load_weights,
    per_channel,
)
from ..weights import extract_state_dict, find_checkpoint, fitting_variant, read_checkpoint
from ..zoo import VARIANTS, variant_of

SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".ckpt", ".safetensors", ".onnx", ".pt2", ".xml")
SMALLEST, LARGEST = 32, 16384  # pixels on a side of what a model sees

# Arguments of a model that a checkpoint cannot set: they are given by what it holds, or read other files
RESERVED = """name pretrained progress option num_classes in_chans global_pool img_size
    pretrained_cfg pretrained_cfg_overlay checkpoint_path cache_dir""".split()


@dataclass
class Classifier:
    """A model in evaluation mode with what its inputs and outputs mean.

    `name` is timm's, `title` also says which weights these are; `data_config` is timm's: input_size (c, h, w), mean,
    std, interpolation, crop_pct, crop_mode. `origin` is where the weights come from: 'published', 'random', or 'file',
    and `about` the args, epoch and history that it has if it is a checkpoint of classification.py. `thresholds` are the
    least probabilities of the classes if an image may have several. Logits are divided by `temperature`, which was
    fitted to validation images, so that what has a probability of 80 % is right four times out of five.

    The `model` of a file that `convmlp export` wrote is an `Exported`. If that holds the preprocessing, `transform` and
    `preprocess` leave it to the file.
    """

    name: str
    model: TimmModel
    class_names: list[str]
    data_config: dict[str, Any]
    device: torch.device
    title: str
    origin: str = "file"
    about: Mapping[str, Any] = field(default_factory=dict)
    thresholds: list[float] = field(default_factory=list)
    temperature: float = 1.0

    @property
    def image_mode(self) -> str:
        """Pillow's name for the channels that the model takes."""
        channels = self.data_config["input_size"][0]
        if channels not in (1, 3):
            raise RunError(f"{self.title} takes {plural(channels, 'channel')}, and images are read as 1 or 3")
        return "L" if channels == 1 else "RGB"

    @property
    def takes_pixels(self) -> bool:
        """Whether the model is a file that resizes and normalises by itself."""
        return isinstance(self.model, Exported) and self.model.takes_pixels

    @cached_property
    def transform(self) -> Any:
        """From a Pillow image to a normalised tensor, (c, h, w): resize, crop, as in evaluation."""
        return pil_to_tensor if self.takes_pixels else create_transform(**self.data_config)

    def preprocess(self, images: Sequence[Image.Image]) -> Any:
        """Pillow images of any mode to a batch as the model takes it, see `collate`."""
        images = [image if image.mode == self.image_mode else to_mode(image, self.image_mode) for image in images]
        return self.collate([self.transform(image) for image in images])

    def collate(self, tensors: list[torch.Tensor]) -> Any:
        """What `transform` made of images, as a batch on the model's device, (b, c, h, w).

        For a model that `takes_pixels` they stay a list, (c, h, w) uint8, because each has a size of its own.
        """
        return tensors if self.takes_pixels else torch.stack(tensors).to(self.device)


def open_classifier(
    model: str | None = None,
    checkpoint: str | None = None,
    pretrained: bool = True,
    device: str = "auto",
    img_size: int | None = None,
    class_map: str | None = None,
) -> Classifier:
    """A classifier by the name of its model, by a checkpoint, or both.

    Args:
        model: Any timm name, ours among them, or a folder as `local-dir:FOLDER`; convmlp_s by default. A training
            checkpoint knows its model, and bare weights of ours are recognised.
        checkpoint: A file or URL: of classification.py, or bare weights. Averaged weights are preferred. Or a file
            that `convmlp export` wrote for ONNX Runtime, torch.export or OpenVINO, which that runs on the CPU.
        pretrained: Without a checkpoint, take the published weights; False leaves them random.
        device: 'auto', 'cuda', 'mps', 'cpu', 'cuda:1', ...
        img_size: Side of the square that the model sees, in pixels; by default what it was trained with.
        class_map: Text file of class names, one a line, for weights that do not tell theirs.

    Raises:
        RunError, CheckpointError: an unknown name, or weights that cannot be had or do not fit.
    """
    chosen = choose_device(device)
    if img_size is not None and not SMALLEST <= img_size <= LARGEST:
        raise RunError(f"--img-size must be between {SMALLEST} and {LARGEST} px, got {img_size}")
    if not checkpoint and model and not is_model(model) and kind_of(model):
        model, checkpoint = None, model
    if checkpoint and (folder := _hub_folder(checkpoint)):
        model, checkpoint = f"local-dir:{folder}", None
    if checkpoint is None:
        classifier = _create(model or "convmlp_s", pretrained, img_size)
    elif kind_of(checkpoint):
        classifier = _open_exported(model, checkpoint, device)
        chosen = torch.device("cpu")
    else:
        classifier = _load(model, checkpoint)
    if class_map:
        number = len(classifier.class_names)
        classifier.class_names = read_class_names(class_map, unique=False)
        if len(classifier.class_names) != number:
            given = plural(len(classifier.class_names), "class")
            raise RunError(f"{class_map} names {given}, {checkpoint or classifier.name} has {number}")
    channels, *_, side = classifier.data_config["input_size"]
    if img_size and img_size != side:
        if classifier.takes_pixels or checkpoint and has_fixed_size(classifier.name):
            raise RunError(f"--img-size: {classifier.title} works only at its own {side} px")
        classifier.data_config = {**classifier.data_config, "input_size": (channels, img_size, img_size)}
    classifier.model.to(chosen).eval()
    classifier.device = chosen
    return classifier


def open_any(model_or_checkpoint: str, **settings: Any) -> Classifier:
    """A classifier by one text, the name of a model or a checkpoint; other arguments as for `open_classifier`.

    A name that timm knows is that model, whatever the current folder holds: `./convmlp_s` is the file or folder there.
    """
    text = model_or_checkpoint
    is_file = os.path.isfile(text) or _hub_folder(text) or text.endswith(SUFFIXES) or "://" in text
    model, checkpoint = (None, text) if is_file and not is_model(text) else (text, None)
    return open_classifier(model, checkpoint, **settings)


def is_model(text: str) -> bool:
    """Whether this is a name that timm knows, alone or with a tag that it knows."""
    name, _, tag = text.partition(".")
    return timm.is_model(name) and (not tag or text in timm.list_pretrained(f"{name}.*"))


def _create(name: str, pretrained: bool, img_size: int | None) -> Classifier:
    """A model with published weights, those of a folder, or random ones."""
    check_name("--model", name)
    settings: dict[str, Any] = {"img_size": img_size} if img_size and has_fixed_size(name) else {}
    network = create_timm_model(name, pretrained, **settings)
    title = name if pretrained else f"{name} (random weights)"
    origin = "random" if not pretrained else "file" if name.startswith(SOURCES) else "published"
    return Classifier(name, network, _class_names(network), _data_config(network), torch.device("cpu"), title, origin)


def _load(model: str | None, checkpoint: str) -> Classifier:
    """The model of a checkpoint, which may also know its class_names, data_config and args."""
    path = find_checkpoint(checkpoint)
    try:
        content = read_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(_explain(error, path)) from error
    weights = extract_state_dict(content, name=str(path))
    about = content if isinstance(content, Mapping) and isinstance(content.get("arch"), str) else {}
    _check_about(about, path)
    if any(key.startswith("backbone.") for key in weights):
        raise RunError(f"{path} is a detector or segmentor: name its config too, --config FILE")
    name = model or about.get("arch") or _published_name(checkpoint, weights) or fitting_variant(weights)
    if name is None:
        raise RunError(f"{path} does not tell its model: --model NAME")
    built, stated = (variant_of(text) or text.partition(".")[0] for text in (name, about.get("arch", name)))
    if built != stated:  # whatever their tags; ours have two names each
        raise RunError(f"{path} is of {about['arch']}, not of --model {model}; it needs no --model")
    check_name("--model", name)
    if not model:
        check_source(name, str(path))
    network = _build(name, weights, about, path)
    load_weights(network, content, str(path))
    names = about.get("class_names") or _class_names(network)
    config = about.get("data_config") or _data_config(network)
    known = {key: about[key] for key in ("args", "epoch", "history") if key in about}
    fitted = {key: about[key] for key in ("thresholds", "temperature") if key in about}
    title = f"{name} of {checkpoint}"
    return Classifier(name, network, names, config, torch.device("cpu"), title, "file", known, **fitted)


def _open_exported(model: str | None, path: str, device: str) -> Classifier:
    """A file that `convmlp export` wrote, as a classifier."""
    if model:
        raise RunError(f"--model {model}: {path} is a whole program, and needs no --model")
    if device not in ("auto", "cpu"):
        raise RunError(f"--device {device}: {path} is run on the CPU")
    network, about = open_exported(path)
    fitted = {"thresholds": about["thresholds"], "temperature": 1.0 if about["preprocess"] else about["temperature"]}
    data_config = {**about["data_config"], "input_size": tuple(about["data_config"]["input_size"])}
    check_data_config(data_config, path)
    return Classifier(
        about["arch"], network, about["class_names"], data_config, torch.device("cpu"), path, "file", **fitted
    )


def need_layers(classifier: Classifier, verb: str) -> None:
    """Make sure that a classifier is a PyTorch model, not a file for another program."""
    if isinstance(classifier.model, Exported):
        raise RunError(
            f"{classifier.title} is an exported program, without layers: {verb} takes the checkpoint it is of"
        )


def _build(name: str, weights: Mapping[str, torch.Tensor], about: Mapping[str, Any], path: Path) -> TimmModel:
    """The model that these weights fit, not yet filled with them."""
    args = about.get("args") or {}
    head, first_conv = (weights.get(f"{layer}.weight") for layer in layer_names(name))
    if head is None or head.ndim == 0 or len(head) == 0:
        raise RunError(f"{path} holds no head of {name}, so it cannot classify")
    classes = about.get("class_names")
    if classes and len(classes) != len(head):
        raise CheckpointError(f"{path} names {plural(len(classes), 'class')}, its head has {len(head)}")
    conv_chans = first_conv.shape[1:2] if first_conv is not None and first_conv.ndim == 4 else ()
    in_chans = args.get("in_chans") or (conv_chans[0] if conv_chans else 3)
    settings = {"global_pool": args["gp"]} if args.get("gp") else {}
    if about and has_fixed_size(name):
        settings["img_size"] = about["data_config"]["input_size"][-1]
    settings |= dict(num_classes=len(head), in_chans=in_chans)
    network = create_timm_model(name, **settings, **(args.get("model_kwargs") or {}))
    channels = {in_chans, *(conv_chans if isinstance(network, ConvMLP) else ())}
    channels |= {about["data_config"]["input_size"][0]} if about else set()
    if len(channels) > 1:
        raise CheckpointError(f"{path} contradicts itself: its images have {' or '.join(map(str, channels))} channels")
    return network


def _explain(error: CheckpointError, path: Path) -> str:
    """Why a file is not a checkpoint."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.rpartition("/")[2] for name in archive.namelist()}
    except Exception:  # no archive, or one so damaged that it has no list
        members = set()
    if "constants.pkl" in members:
        return f"{error}; docs/using.md says how to run one"
    if members:
        return f"{error}; one of a detector or segmentor needs its --config FILE"
    return str(error)


def _check_about(about: Mapping[str, Any], path: Path) -> None:
    """What a checkpoint says beside its weights, in the form that classification.py gives it."""
    if not about:
        return
    names, args = about.get("class_names"), about.get("args")
    thresholds, temperature = about.get("thresholds", []), about.get("temperature", 1.0)
    settings = args.get("model_kwargs") or {} if isinstance(args, Mapping) else None
    config: Any = about.get("data_config")
    sides: Any = config.get("input_size") if isinstance(config, Mapping) else None
    right = {
        "class_names": isinstance(names, list) and all(isinstance(name, str) for name in names),
        "args": isinstance(settings, Mapping) and all(isinstance(key, str) and key not in RESERVED for key in settings),
        "data_config": isinstance(sides, (list, tuple))
        and len(sides) == 3
        and all(isinstance(n, int) and 0 < n <= LARGEST for n in sides),
        "thresholds": isinstance(thresholds, list)
        and all(isinstance(value, float) and 0 <= value <= 1 for value in thresholds)
        and len(thresholds) in (0, len(names or ())),
        "temperature": isinstance(temperature, float) and 0 < temperature < math.inf,
    }
    for key, holds in right.items():
        if not holds:
            value = about.get(key)
            raise CheckpointError(f"{path} is not a classification.py checkpoint: its {key} is {value!r:.80}")
    check_data_config(config, path)


def check_data_config(config: Mapping[str, Any], path: str | Path) -> None:
    """Make sure that timm takes a data_config of a file."""
    channels = config["input_size"][0]
    mode = "L" if channels == 1 else "RGB"
    try:
        create_transform(**{**config, "input_size": (channels, 32, 32)})(Image.new(mode, (40, 36)))
    except Exception as error:  # of whatever the values lead to
        raise CheckpointError(f"{path}: its data_config cannot be used: {type(error).__name__}: {error}") from error


def _hub_folder(checkpoint: str) -> Path | None:
    """The folder of a model in Hugging Face's form, by its own path or that of the weights in it."""
    path = Path(checkpoint)
    folder = path.parent if path.name == "model.safetensors" else path
    return folder if os.path.isfile(folder / "config.json") and path.exists() else None


def _published_name(source: str, weights: Mapping[str, torch.Tensor]) -> str | None:
    """The timm name of a published file, which says how it was normalised: convmlp_s_cifar10.pth has its own way."""
    names = [name for variant in VARIANTS for name in timm.list_pretrained(f"{variant}.*")]
    files = {str(timm.get_pretrained_cfg_value(name, "url")).rpartition("/")[2]: name for name in names}
    return files.get(source.rpartition("/")[2]) if fitting_variant(weights) else None


def _data_config(network: TimmModel) -> dict[str, Any]:
    """timm's, for the channels that the model really has."""
    names = network.pretrained_cfg.get("first_conv") or ""
    layer = dict(network.named_modules()).get(names if isinstance(names, str) else names[0])
    chans = layer.in_channels if isinstance(layer, nn.Conv2d) else 3
    config = resolve_data_config({}, model=network)
    statistics = {key: per_channel(config[key], chans) for key in ("mean", "std")}
    return {**config, **statistics, "input_size": (chans, *config["input_size"][1:])}


def _class_names(network: TimmModel) -> list[str]:
    """The names that a pretrained model's configuration holds, ImageNet's, or numbers."""
    names = network.pretrained_cfg.get("label_names")
    if names and len(names) == network.num_classes:
        return list(names)
    if subset := infer_imagenet_subset(network):
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(info.num_classes())]
    return numbered_names(network.num_classes)


def numbered_names(n: int) -> list[str]:
    """What stands in for the names of n classes that nobody named."""
    return [f"class {i}" for i in range(n)]
