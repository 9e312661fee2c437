"""Boxes, masks and label maps of pictures, by a detector of mmdet or a segmentor of mmseg.

from PIL import Image
from convmlp.openmmlab.drawing import draw
from convmlp.openmmlab.inference import open_model, predict

model = open_model("output/quickstart_retinanet/quickstart_retinanet.py", "output/quickstart_retinanet/epoch_3.pth")
image = Image.open("scene.jpg").convert("RGB")
[result] = predict(model, [image])
draw(model, image, result).save("drawn.png")
"""

import io
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, DefaultScope
from PIL import Image
from pycocotools import mask as run_lengths

from ..common.devices import choose_device
from ..common.errors import CheckpointError, RunError
from ..weights import extract_state_dict, find_checkpoint, list_differences, shorten
from .checkpoints import read_run_checkpoint
from .datasets import leaf_datasets, set_classes
from .engine import read_config, replace_sync_bn

# What the classes of a model are called that has their number and does not tell their names
STANDARD = {"mmdet": "CocoDataset", "mmseg": "ADE20KDataset"}

SCORE_THRESHOLD = 0.3  # from this score on, detections are drawn and listed
LARGEST_LOGITS = 2**29  # values, 2 GiB in float32; 150 classes of a photograph of 12 megapixels would be 7

Colour = tuple[int, int, int]
FIRST_COLOURS = "e6194b 3cb44b ffe119 4363d8 f58231 42d4f4 f032e6 911eb4 fabed4 9a6324 aaffc3 469990"


@dataclass
class TrainedModel:
    """A detector or segmentor in evaluation mode, with what its inputs and outputs mean.

    `library` is mmdet or mmseg; `pipeline` leads from {'img': BGR uint8 (h, w, 3)} to the inputs of `network`.
    """

    config: str
    library: str
    network: BaseModel
    pipeline: Compose
    class_names: list[str]
    palette: list[Colour]


class Detections(NamedTuple):
    """What a detector finds on a picture, in its pixels.

    Boxes (n, 4) are x1, y1, x2, y2, scores (n,) lie in 0 to 1, labels (n,) are class numbers, and masks, of a model
    that has them, n run-length codes as in COCO files: `pycocotools.mask.decode` makes (h, w) of one.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[dict[str, Any]] | None


class Segmentation(NamedTuple):
    """Class numbers of a picture's pixels, (h, w), and the share of each class in them, (classes,)."""

    label_map: np.ndarray
    shares: np.ndarray


def open_model(config: str, checkpoint: str, device: str = "auto", trust_checkpoint: bool = False) -> TrainedModel:
    """A trained detector or segmentor.

    Its classes are those that the checkpoint names, whatever the config says; else the config's; else COCO's or
    ADE20K's if that is their number.

    Args:
        config: The one in the folder of the run, or the one that the run was started with.
        checkpoint: A file or URL.
        device: 'auto', 'cuda', 'mps', 'cpu', 'cuda:1', ...
        trust_checkpoint: Read by pickle, which may run code in the file.

    Raises:
        RunError: the config cannot be read, or is not of a model of mmdet or mmseg; there is no such device.
        CheckpointError: the checkpoint cannot be had or read, or does not fill the model; with the names of tensors.
    """
    chosen = choose_device(device)
    cfg = _read_config(config)
    content = read_run_checkpoint(find_checkpoint(checkpoint), trust_checkpoint)
    with _library(cfg.default_scope):
        metas = _metas(content, cfg)
        if metas[0].get("classes"):
            set_classes(cfg, metas[0]["classes"])
        replace_sync_bn(cfg.model)
        (cfg.model.get("backbone") or {}).pop("init_cfg", None)
        try:
            network = MODELS.build(cfg.model)
            pipeline = Compose(_test_steps(cfg))
        except (TypeError, ValueError, KeyError, AssertionError, AttributeError, NotImplementedError) as error:
            raise RunError(f"{config} cannot be built: {_one_line(error)}") from error
    _load(network, content, config, checkpoint)
    if cfg.get("channels_last"):
        network = network.to(memory_format=torch.channels_last)
    names, palette = _classes(metas, _number_of_classes(network, config))
    return TrainedModel(config, cfg.default_scope, network.to(chosen).eval(), pipeline, names, palette)


def _read_config(config: str) -> Config:
    cfg = read_config(config)
    if not isinstance(cfg.get("model"), dict) or cfg.get("default_scope") not in STANDARD:
        raise RunError(f"{config} is not the config of a model of mmdet or mmseg: model and default_scope say so")
    return cfg


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@contextmanager
def _library(name: str) -> Iterator[None]:
    """Lets names in configs be those of mmdet or mmseg, without the words of these on what concerns training."""
    with redirect_stdout(io.StringIO()):  # "Could not import OneDL"
        import_module(f"{name}.datasets")
    with warnings.catch_warnings(), DefaultScope.overwrite_default_scope(name):
        warnings.filterwarnings("ignore", message="Default ``avg_non_ignore`` is False")
        yield


def _metas(checkpoint: Mapping[str, Any], cfg: Config) -> list[dict[str, Any]]:
    """Classes and palettes: the checkpoint's first, those that a config's data sets are given or have, the standard."""
    meta = checkpoint.get("meta") or {}
    trained = meta.get("dataset_meta") or meta  # the second: mmdet 2, mmseg 0
    datasets = leaf_datasets(cfg).values()
    types = [*(dataset.type for dataset in datasets), STANDARD[cfg.default_scope]]
    given = [dataset.get("metainfo") or {} for dataset in datasets]
    with DATASETS.switch_scope_and_registry(cfg.default_scope) as registry:
        by_type = [registry.get(each).METAINFO for each in types if registry.get(each)]
    return [{key.lower(): value for key, value in each.items()} for each in (trained, *given, *by_type)]


def _test_steps(cfg: Config) -> list[dict[str, Any]]:
    """The steps of the test pipeline for a picture that is in memory and has no annotations."""
    datasets = leaf_datasets(cfg)
    dataset = datasets.get("test_dataloader") or datasets.get("val_dataloader") or {}
    steps = dataset.get("pipeline") or cfg.get("test_pipeline")
    if not steps or "LoadImageFromFile" not in steps[0]["type"]:
        raise RunError(f"{cfg.filename} has no test pipeline that begins with LoadImageFromFile")
    load = {**steps[0], "type": f"{cfg.default_scope}.LoadImageFromNDArray"}
    return [load, *(step for step in steps[1:] if "Annotations" not in step["type"])]


def _load(network: BaseModel, content: Mapping[str, Any], config: str, checkpoint: str) -> None:
    weights = extract_state_dict(content, use_ema=False, name=checkpoint)
    if not any(key.startswith("backbone.") for key in weights):
        raise CheckpointError(f"{checkpoint} is not of a detector or segmentor: it has no tensors of a backbone")
    differences = list_differences(weights, network.state_dict())
    if differences:
        raise CheckpointError(f"{checkpoint} does not fit {config}: {shorten(differences)}")
    network.load_state_dict(weights)


def _number_of_classes(network: BaseModel, config: str) -> int:
    for name, module in network.named_modules():
        if "head" in name and not name.startswith(("backbone.", "rpn_head")):
            if isinstance(getattr(module, "num_classes", None), int):
                return module.num_classes
    raise RunError(f"the heads of {config} do not tell their number of classes")


def _classes(metas: Sequence[Mapping[str, Any]], number: int) -> tuple[list[str], list[Colour]]:
    """Names of the classes, from the first that has this number of them, and the colours that belong to the names."""
    named = [meta for meta in metas if len(meta.get("classes") or ()) == number]
    names = list(named[0]["classes"]) if named else [f"class {i}" for i in range(number)]
    drawn = np.random.RandomState(42).randint(0, 255, (number, 3)).tolist()  # by mmseg, for want of a palette
    for meta in named:
        palette = [list(colour) for colour in meta.get("palette") or ()]
        if list(meta["classes"]) == names and len(palette) == number and palette != drawn:
            return names, [tuple(colour) for colour in palette]
    colours = iter(_colours(number))
    return names, [(0, 0, 0) if name == "background" else next(colours) for name in names]


def _colours(number: int) -> list[Colour]:
    """Colours that are easily told apart; each that comes after the first ones lies farthest from all before it."""
    colours: list[Colour] = [(red, green, blue) for red, green, blue in map(bytes.fromhex, FIRST_COLOURS.split())]
    others = np.array([rgb for rgb in itertools.product(range(15, 256, 30), repeat=3) if 150 < sum(rgb) < 700])
    nearest = np.min([np.linalg.norm(others - colour, axis=1) for colour in colours], axis=0)
    while len(colours) < number:
        farthest = others[nearest.argmax()]
        red, green, blue = farthest.tolist()
        colours.append((red, green, blue))
        nearest = np.minimum(nearest, np.linalg.norm(others - farthest, axis=1))
    return colours[:number]


@torch.inference_mode()
def predict(model: TrainedModel, images: Sequence[Image.Image]) -> list[Detections | Segmentation]:
    """Find objects on RGB pictures, or label their pixels, in the way of the model's test pipeline.

    Pictures go through the model one by one: in a batch the results would depend on the sizes of the others. How many
    boxes there are at most, and from which score on, is in the config: test_cfg.

    Raises:
        RunError: a picture that the pipeline cannot take, such as one so narrow that nothing is left of it.
    """
    return [_predict(model, image) for image in images]


def _predict(model: TrainedModel, image: Image.Image) -> Detections | Segmentation:
    bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
    try:
        packed = model.pipeline(dict(img=bgr, img_id=0))
    except Exception as error:  # OpenCV's, or of any step that a config may name
        size = f"{image.width} x {image.height} pixels"
        raise RunError(f"{model.config} cannot take a picture of {size}: {_one_line(error)}") from error
    sample = packed["data_samples"]
    if model.library == "mmseg":
        shrink = min(1, math.sqrt(LARGEST_LOGITS / (len(model.class_names) * image.width * image.height)))
        sample.set_metainfo(dict(ori_shape=tuple(max(1, round(side * shrink)) for side in sample.ori_shape)))
    [found] = model.network.test_step(dict(inputs=[packed["inputs"]], data_samples=[sample]))
    if "pred_sem_seg" in found:
        kind = np.uint8 if len(model.class_names) <= 256 else np.uint16
        label_map = found.pred_sem_seg.data[0].cpu().numpy().astype(kind)
        label_map = np.asarray(Image.fromarray(label_map).resize(image.size, Image.Resampling.NEAREST))
        shares = np.bincount(label_map.reshape(-1), minlength=len(model.class_names)) / label_map.size
        return Segmentation(label_map, shares)
    if "pred_instances" not in found:
        raise RunError(f"the model of {model.config} finds neither boxes nor label maps")
    instances = found.pred_instances.cpu().numpy()
    masks = [_encode(mask) for mask in instances.masks] if "masks" in instances else None
    return Detections(instances.bboxes, instances.scores, instances.labels, masks)


def _encode(mask: np.ndarray) -> dict[str, Any]:
    """A mask (h, w) as COCO's run-length code, in plain values."""
    code = run_lengths.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}


def to_json(
    result: Detections | Segmentation, class_names: Sequence[str], score_threshold: float = SCORE_THRESHOLD
) -> dict[str, list[dict[str, Any]]]:
    """A result in plain values: "detections" from a score on, best first, or "classes", the largest first."""
    if isinstance(result, Segmentation):
        classes = []
        for label in present(result):
            share = round(float(result.shares[label]), 6)
            mask = _encode(result.label_map == label)
            classes.append(dict(index=int(label), name=class_names[label], share=share, mask=mask))
        return {"classes": classes}
    detections = []
    for i in listed(result, score_threshold):
        label = int(result.labels[i])
        box = [round(float(side), 2) for side in result.boxes[i]]
        detections.append(dict(index=label, name=class_names[label], score=round(float(result.scores[i]), 4), box=box))
        if result.masks is not None:
            detections[-1]["mask"] = result.masks[i]
    return {"detections": detections}


def listed(result: Detections, score_threshold: float) -> np.ndarray:
    """Indices of the detections from a score on, best first."""
    order = np.argsort(-result.scores, kind="stable")
    return order[result.scores[order] >= score_threshold]


def present(result: Segmentation) -> np.ndarray:
    """Numbers of the classes on a picture, the largest first."""
    return np.argsort(-result.shares, kind="stable")[: np.count_nonzero(result.shares)]
