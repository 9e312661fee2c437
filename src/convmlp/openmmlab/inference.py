"""Boxes, masks and label maps of images, by a detector of mmdet or a segmentor of mmseg.

from PIL import Image
from convmlp.openmmlab.inference import draw, open_model, predict

model = open_model("output/quickstart_retinanet/quickstart_retinanet.py", "output/quickstart_retinanet/epoch_3.pth")
image = Image.open("scene.jpg").convert("RGB")
[result] = predict(model, [image])
draw(model, image, result).save("drawn.png")
"""

import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.structures import InstanceData
from PIL import Image
from pycocotools import mask as run_lengths

from ..common.devices import choose_device
from ..common.errors import CheckpointError, RunError, one_line
from ..common.files import write_atomically
from ..common.images import read_image
from ..weights import extract_state_dict, find_checkpoint, list_differences, shorten
from .checkpoints import read_run_checkpoint
from .configs import leaf_datasets, read_config, replace_sync_bn, set_num_classes
from .datasets import Colour, choose_palette
from .drawing import draw_instances, draw_label_map

# What the classes of a model are called that has their number and does not tell their names
STANDARD = {"mmdet": "CocoDataset", "mmseg": "ADE20KDataset"}

SCORE_THRESHOLD = 0.3  # from this score on, detections are drawn and listed
LARGEST_LOGITS = 2**29  # values, 2 GiB in float32; 150 classes of a photograph of 12 megapixels would be 7


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
    """What a detector finds on an image, in its pixels.

    Boxes (n, 4) are x1, y1, x2, y2, scores (n,) lie in 0 to 1, labels (n,) are class numbers, and masks, of a model
    that has them, n run-length codes as in COCO files: `pycocotools.mask.decode` makes (h, w) of one.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[dict[str, Any]] | None


class Segmentation(NamedTuple):
    """Class numbers of an image's pixels, (h, w), and the share of each class in them, (classes,)."""

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
    cfg = read_config(config)
    if not isinstance(cfg.get("model"), dict) or cfg.get("default_scope") not in STANDARD:
        raise RunError(f"{config} is not the config of a model of mmdet or mmseg: model and default_scope say so")
    content = read_run_checkpoint(find_checkpoint(checkpoint), trust_checkpoint)
    with _library(cfg.default_scope):
        metas = _metas(content, cfg)
        if metas[0].get("classes"):
            set_num_classes(cfg.model, len(metas[0]["classes"]))
        replace_sync_bn(cfg.model)
        (cfg.model.get("backbone") or {}).pop("init_cfg", None)
        try:
            network = MODELS.build(cfg.model)
            pipeline = Compose(_test_steps(cfg))
        except (TypeError, ValueError, KeyError, AssertionError, AttributeError, NotImplementedError) as error:
            raise RunError(f"{config} cannot be built: {one_line(error)}") from error
    _load(network, content, config, checkpoint)
    if cfg.get("channels_last"):
        network = network.to(memory_format=torch.channels_last)
    names = _class_names(metas, _number_of_classes(network, config))
    palette = choose_palette(metas, names)
    return TrainedModel(config, cfg.default_scope, network.to(chosen).eval(), pipeline, names, palette)


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
    """The steps of the test pipeline for an image that is in memory and has no annotations."""
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


def _class_names(metas: Sequence[Mapping[str, Any]], number: int) -> list[str]:
    """From the first that names this number of classes."""
    unnamed = [f"class {i}" for i in range(number)]
    return list(next((meta["classes"] for meta in metas if len(meta.get("classes") or ()) == number), unnamed))


@torch.inference_mode()
def predict(model: TrainedModel, images: Sequence[Image.Image]) -> list[Detections | Segmentation]:
    """Find objects on RGB images, or label their pixels, in the way of the model's test pipeline.

    Images go through the model one by one: in a batch the results would depend on the sizes of the others. How many
    boxes there are at most, and from which score on, is in the config: test_cfg.

    Raises:
        RunError: an image that the pipeline cannot take, such as one so narrow that nothing is left of it.
    """
    return [_predict(model, image) for image in images]


def _predict(model: TrainedModel, image: Image.Image) -> Detections | Segmentation:
    bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
    try:
        packed = model.pipeline(dict(img=bgr, img_id=0))
    except Exception as error:  # OpenCV's, or of any step that a config may name
        size = f"{image.width} x {image.height} pixels"
        raise RunError(f"{model.config} cannot take an image of {size}: {one_line(error)}") from error
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
        for label in np.argsort(-result.shares, kind="stable")[: np.count_nonzero(result.shares)]:  # those present
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


def draw(
    model: TrainedModel, image: Image.Image, result: Detections | Segmentation, score_threshold: float = SCORE_THRESHOLD
) -> Image.Image:
    """The image with boxes, names and masks from a score on, or in the colours of its classes with a legend.

    Names would cover small images, so these are enlarged by a whole number.
    """
    if isinstance(result, Segmentation):
        return draw_label_map(image, result.label_map, model.class_names, model.palette)
    chosen = listed(result, score_threshold)[::-1]  # the best come last, on top
    found = InstanceData(
        bboxes=torch.from_numpy(result.boxes[chosen]),
        scores=torch.from_numpy(result.scores[chosen]),
        labels=torch.from_numpy(result.labels[chosen]),
    )
    if result.masks is not None:
        masks = [run_lengths.decode(result.masks[i]) for i in chosen]
        found.masks = torch.from_numpy(np.array(masks, dtype=bool).reshape(-1, image.height, image.width))
    return draw_instances(image, found, model.class_names, model.palette)


def predict_files(
    paths: Sequence[str | Path],
    config: str,
    checkpoint: str,
    *,
    device: str = "auto",
    score_threshold: float | None = None,
    trust_checkpoint: bool = False,
    drawn: Callable[[Path], Path] | None = None,
) -> Iterator[dict[str, Any]]:
    """Open a model, see `open_model`, and predict image by image.

    Args:
        score_threshold: Leave out detections below; None for `SCORE_THRESHOLD`. Not for a segmentor.
        drawn: From the path of an image to that of its drawn copy.

    Yields:
        A row {"image": path, "detections" or "classes": [...]} for each image, see `to_json`; {"image": path, "error":
        message} for one that cannot be read or predicted.

    Raises:
        RunError: the model cannot be opened, a drawn copy cannot be written, or a threshold is given to a segmentor.
    """
    MMLogger.get_current_instance().setLevel(logging.WARNING)  # its news would stand among the results
    model = open_model(config, checkpoint, device, trust_checkpoint)
    if model.library == "mmseg" and score_threshold is not None:
        raise RunError("--score-threshold is for detection, and this is a segmentor")
    threshold = SCORE_THRESHOLD if score_threshold is None else score_threshold
    for path in paths:
        try:
            image = read_image(path)
            [result] = predict(model, [image])
        except RunError as error:
            yield {"image": str(path), "error": str(error)}
            continue
        if drawn:
            write_atomically(drawn(Path(path)), draw(model, image, result, threshold).save)
        yield {"image": str(path), **to_json(result, model.class_names, threshold)}
