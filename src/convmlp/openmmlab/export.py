"""Detectors and segmentors as ONNX files, which need neither mmdet nor mmseg, from an image to what is on it.

What was written is run by onnxruntime and compared with `predict` before it takes its name.

A file maps an RGB image (h, w, 3), uint8, of any size, to the outputs of its graph, see `graphs`. It resizes,
normalises and pads as the config's test pipeline does, or to a fixed size of the network's input. ONNX metadata_props
tell task, model, arch, class_names, input_size (null: follows the image), mean and std (of values from 0 to 255), and
score_threshold, each in JSON.
"""

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import MMLogger
from PIL import Image
from pycocotools import mask as run_lengths

from ..common.errors import RunError, one_line
from ..common.files import check_writable, write_atomically
from ..common.output import quiet
from ..common.packages import need
from .graphs import Detector, Graph, MaskRCNN, Reader, RetinaNet, SemanticFPN
from .inference import Detections, Segmentation, TrainedModel, open_model, predict

_logger = logging.getLogger(__name__)

GRAPHS: dict[str, type[Graph]] = {"RetinaNet": RetinaNet, "MaskRCNN": MaskRCNN, "EncoderDecoder": SemanticFPN}
TASKS = {"RetinaNet": "detection", "MaskRCNN": "instance segmentation", "EncoderDecoder": "semantic segmentation"}
# The parts that the graphs know, by model; what else a config may change, the comparison finds
PARTS = {
    "RetinaNet": {"bbox_head": "RetinaHead", "bbox_head.bbox_coder": "DeltaXYWHBBoxCoder"},
    "MaskRCNN": {
        "rpn_head": "RPNHead",
        "rpn_head.bbox_coder": "DeltaXYWHBBoxCoder",
        "roi_head": "StandardRoIHead",
        "roi_head.bbox_roi_extractor": "SingleRoIExtractor",
        "roi_head.bbox_head": "Shared2FCBBoxHead",
        "roi_head.bbox_head.bbox_coder": "DeltaXYWHBBoxCoder",
        "roi_head.mask_roi_extractor": "SingleRoIExtractor",
        "roi_head.mask_head": "FCNMaskHead",
    },
    "EncoderDecoder": {"decode_head": "FPNHead"},
}

CHECKED_SIZES = [(120, 160), (150, 100), (64, 97)]  # height and width of the images that a file is compared on
# When a detection is the same: pixels of a corner, score, IoU of the masks
MAX_SHIFT, MAX_SCORE_DIFFERENCE, MIN_MASK_IOU = 1.0, 0.01, 0.9
MIN_AGREEMENT = 0.95  # share of detections or pixels; near-ties may be decided otherwise


@dataclass(frozen=True)
class Report:
    """What was written: `size` in bytes, and the share of the detections or pixels of some images that agree."""

    path: Path
    size: int
    outputs: tuple[str, ...]
    images: int
    compared: int
    agreement: float


def export(
    config: str,
    checkpoint: str,
    path: str | Path,
    *,
    img_size: tuple[int, int] | None = None,
    score_threshold: float | None = None,
    trust_checkpoint: bool = False,
    overwrite: bool = False,
) -> Report:
    """Write a trained RetinaNet, Mask R-CNN or Semantic FPN as ONNX, and check what was written.

    Args:
        config, checkpoint, trust_checkpoint: See `open_model`.
        path: The file to write.
        img_size: Fixed height and width of the network's input, into which images are made to fit; by default what
            the test pipeline makes of the image.
        score_threshold: Leave out detections below; by default that of the config's test_cfg. Not for a segmentor.
        overwrite: Replace what is at `path`.

    Raises:
        RunError: a request that cannot be met, a missing package, a model or a pipeline that has no such graph, or a
            file that finds something else than the model. What was at `path` stays then.
        CheckpointError: see `open_model`.
    """
    path = Path(path)
    need("onnx", "onnx", "onnxscript", "onnxruntime")
    check_writable(path)
    if path.exists() and not overwrite:
        raise RunError(f"{path} exists already; --overwrite replaces it")
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    model = open_model(config, checkpoint, "cpu", trust_checkpoint)
    graph = make_graph(model, img_size)
    if score_threshold is not None and not isinstance(graph, Detector):
        raise RunError("--score-threshold is for detection, and this is a segmentor")
    reports = []
    try:
        with quiet(), torch.no_grad():
            write_atomically(path, lambda file: reports.append(_write_and_check(model, graph, file, score_threshold)))
    except RunError:
        raise
    except Exception as error:  # of compilers, which raise anything
        _logger.debug("the export failed", exc_info=True)
        raise RunError(f"the model of {config} cannot be exported: {one_line(error)}") from error
    return replace(reports[0], path=path)


def make_graph(model: TrainedModel, img_size: tuple[int, int] | None = None) -> Graph:
    """The graph of a model, see `export`; it and the model share their weights.

    Raises:
        RunError: there is none for the model, its test pipeline or this size.
    """
    kind = type(model.network).__name__
    if kind not in PARTS:
        raise RunError(f"{model.config}: the model {kind} cannot be exported, only {', '.join(PARTS)}")
    for place, name in PARTS[kind].items():
        found = type(attrgetter(place)(model.network)).__name__
        if found != name:
            raise RunError(f"{model.config}: the {place} {found} cannot be exported, only {name}")
    return GRAPHS[kind](model.network, _make_reader(model, img_size)).eval()


def _make_reader(model: TrainedModel, img_size: tuple[int, int] | None) -> Reader:
    """What the test pipeline and the preprocessor do between loading and the network."""
    scale, keep_ratio = None, True
    for step in model.pipeline.transforms[1:-1]:
        if type(step).__name__ != "Resize":
            raise RunError(
                f"{model.config}: {type(step).__name__} in the test pipeline cannot be exported, only Resize"
            )
        if step.scale is None or (step.backend, step.interpolation) != ("cv2", "bilinear"):
            raise RunError(f"{model.config}: Resize in the test pipeline must have a scale, and be bilinear by cv2")
        scale, keep_ratio = step.scale, step.keep_ratio
    preprocessor = model.network.data_preprocessor
    divisor = preprocessor.pad_size_divisor if model.library == "mmdet" else 1
    if img_size and any(side % divisor for side in img_size):
        raise RunError(f"--img-size must be a multiple of {divisor}, got {img_size[0]}x{img_size[1]}")
    return Reader(preprocessor, scale, keep_ratio, divisor, img_size)


def _write_and_check(model: TrainedModel, graph: Graph, path: Path, score_threshold: float | None) -> Report:
    import onnx_ir
    import onnxruntime

    fixed = graph.reader.fixed
    sizes = CHECKED_SIZES if fixed is None else [fixed] * 2
    images = [_make_image(*size, seed) for seed, size in enumerate(sizes)]
    about = _describe(model, graph.reader)
    if isinstance(graph, Detector):
        about["score_threshold"] = graph.test_cfg.get("score_thr", 0.0) if score_threshold is None else score_threshold
        graph.test_cfg.score_thr = 0.0  # there may be no object on the images, but there is always a best detection
    expected = predict(_to_size(model, fixed), images)
    if isinstance(graph, Detector):
        # No round number: the exporter makes one of equal constants, and this one changes below
        lowest = min(each.scores.min(initial=1.0) for each in expected if isinstance(each, Detections))
        graph.score_threshold.fill_(0.999 * lowest)
    program = _to_onnx(graph, images[0])
    program.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = [session.run(None, {"image": np.asarray(image)}) for image in images]
    agreement, compared = _compare(found, expected)
    if not agreement >= MIN_AGREEMENT:
        raise RunError(
            f"the export finds something else than the model of {model.config}: {agreement:.1%} of {compared} agree, "
            f"{MIN_AGREEMENT:.0%} must; of its test_cfg the export knows only plain NMS and whole images"
        )
    if isinstance(graph, Detector):
        threshold = onnx_ir.tensor(np.float32(about["score_threshold"]), name="score_threshold")
        program.model.graph.initializers["score_threshold"].const_value = threshold
        program.save(path, external_data=False)
    return Report(path, path.stat().st_size, graph.outputs, len(images), compared, agreement)


def _make_image(height: int, width: int, seed: int) -> Image.Image:
    rough = torch.rand(1, 3, 7, 9, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(rough, (height, width), mode="bilinear")[0]
    return Image.fromarray((smooth * 255).byte().permute(1, 2, 0).numpy())


def _to_onnx(graph: Graph, image: Image.Image) -> torch.onnx.ONNXProgram:
    example = torch.from_numpy(np.array(image))
    sides = {0: torch.export.Dim("height"), 1: torch.export.Dim("width")}
    graph.requires_grad_(False).to(memory_format=torch.contiguous_format)
    program = torch.onnx.export(
        torch.export.export(graph, (example,), dynamic_shapes=(sides,)),
        input_names=["image"],
        output_names=graph.outputs,
        dynamic_shapes=({0: "height", 1: "width"},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # with dynamo=True
    return program


def _describe(model: TrainedModel, reader: Reader) -> dict[str, Any]:
    """What a file says of itself."""
    kind = type(model.network).__name__
    backbone = model.network.backbone
    return {
        "task": TASKS[kind],
        "model": kind,
        "arch": getattr(backbone, "arch", type(backbone).__name__),
        "class_names": model.class_names,
        "input_size": reader.fixed,
        "mean": reader.mean.flatten().tolist(),
        "std": reader.std.flatten().tolist(),
    }


def _to_size(model: TrainedModel, size: tuple[int, int] | None) -> TrainedModel:
    """The model with a test pipeline that resizes to this height and width."""
    if size is None:
        return model
    pipeline = copy.deepcopy(model.pipeline)
    for step in pipeline.transforms[1:-1]:
        step.scale, step.keep_ratio = size[::-1], False
    return replace(model, pipeline=pipeline)


def _compare(found: Sequence[Sequence[np.ndarray]], expected: Sequence[Detections | Segmentation]) -> tuple[float, int]:
    """The share of detections, or pixels, that are the same, and their number."""
    same = compared = 0
    for actual, reference in zip(found, expected, strict=True):
        if isinstance(reference, Segmentation):
            same += int((actual[0] == reference.label_map).sum())
            compared += reference.label_map.size
        else:
            same += sum(_contains(actual, reference, i) for i in range(len(reference.boxes)))
            compared += max(len(actual[0]), len(reference.boxes))
    return same / max(compared, 1), compared


def _contains(found: Sequence[np.ndarray], expected: Detections, i: int) -> bool:
    """Whether detection `i` is among those found."""
    boxes, scores, labels, *masks = found
    near = (labels == expected.labels[i]) & (np.abs(boxes - expected.boxes[i]).max(1) <= MAX_SHIFT)
    near &= np.abs(scores - expected.scores[i]) <= MAX_SCORE_DIFFERENCE
    if not masks or not expected.masks:
        return bool(near.any())
    mask = run_lengths.decode(expected.masks[i]).astype(bool)
    return any((mask & other).sum() >= MIN_MASK_IOU * (mask | other).sum() for other in masks[0][near])
