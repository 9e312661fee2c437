"""The verb export: a model for other programs, checked against PyTorch."""

import argparse
import logging
from pathlib import Path
from typing import Any

from ..common.command import Verb, fraction, image_size, points, positive_int
from ..common.errors import RunError, plural
from ..common.output import say
from .options import add_pretrained, refuse

N_CALIBRATION = 300  # images; more of them take longer and change little


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="CHECKPOINT|MODEL", help="a checkpoint, or a timm name")
    add("--model", metavar="NAME", help="the timm name of a checkpoint that does not tell its model")
    formats = ["onnx", "torch-export", "openvino", "executorch", "litert", "safetensors", "torchscript"]
    add("--format", choices=formats, default="onnx", help="onnx by default; PyTorch will drop torchscript")
    add("--output", metavar="PATH", help="file, or folder for safetensors; by default named by the model")
    add("--overwrite", action="store_true", help="replace what is there")
    add("--preprocess", action="store_true", help="from uint8 images of any size, (n, h, w, 3), to probabilities")
    add("--dynamic", action="store_true", help="any batch and image size, not just one image of the model's own size")
    add("--fold", action="store_true", help="fold BatchNorm into the convolutions")
    add("--half", action="store_true", help="float16")
    add("--int8", action="store_true", help="int8 for onnx and openvino; needs --calibrate")
    add("--calibrate", metavar="FOLDER", help="images that --int8 is scaled by: up to 300 of the training images there")
    add("--data", metavar="FOLDER", help="count accuracy before and after on the validation images there")
    add("--max-drop", type=points, metavar="N", help="refuse a file that loses more points on --data (0.5)")
    add("--opset", type=positive_int, metavar="N", help="of ONNX; by default PyTorch's")
    add("--class-map", metavar="FILE", help="class names, one a line, for weights that do not tell theirs")
    add("--img-size", type=image_size, metavar="PX|HxW", help="side of the square the model sees; HxW with --config")
    add("--config", metavar="FILE", help="config of the detector or segmentor that CHECKPOINT is of")
    add("--score-threshold", type=fraction, metavar="P", help="leave out detections below (the config's test_cfg)")
    add("--trust-checkpoint", action="store_true", help="with --config: read by pickle, which may run code")
    add_pretrained(parser)


def export(options: argparse.Namespace) -> None:
    """Write a classifier, or with --config a detector or segmentor."""
    (_objects if options.config else _classes)(options)


def _classes(options: argparse.Namespace) -> None:
    refuse(options, ("score_threshold", "trust_checkpoint"), "is for detection and segmentation: --config FILE")
    height, width = options.img_size or (None, None)
    if height != width:
        raise RunError(f"--img-size: a classifier sees a square, got {height}x{width}")

    from .classifier import open_any, open_classifier
    from .export import SUFFIXES
    from .export import export as write

    settings = dict(pretrained=options.pretrained, device="cpu", img_size=height, class_map=options.class_map)
    if options.model:
        classifier = open_classifier(options.model, options.source, **settings)
    else:
        classifier = open_any(options.source, **settings)
    path = options.output or classifier.model.pretrained_cfg["architecture"] + SUFFIXES[options.format]
    names = ("dynamic", "preprocess", "fold", "half", "opset", "overwrite")
    wishes = {name: getattr(options, name) for name in names} | _labelled_images(options, classifier)
    report = write(classifier, path, options.format, **wishes)
    shapes = ", ".join("x".join(map(str, shape)) for shape in dict.fromkeys(report.shapes))
    dtype = str(report.dtype).removeprefix("torch.")
    say(f"written: {report.path} ({report.size / 1e6:.1f} MB, {dtype})")
    what = "probabilities" if options.preprocess else "logits"
    differences = f"{report.absolute:.1e}, {report.relative:.1e} of the largest"
    say(f"compared with PyTorch on {shapes} (batch x height x width): {what} differ by at most {differences}")
    if report.accuracy:
        model, file, n = report.accuracy
        say(f"accuracy on {plural(n, 'image')} of {options.data}: PyTorch {model:.2f} %, {report.path} {file:.2f} %")


def _labelled_images(options: argparse.Namespace, classifier: Any) -> dict[str, Any]:
    """The images that the export is calibrated and checked by."""
    if options.int8 != bool(options.calibrate):
        raise RunError("--int8 and --calibrate FOLDER go together")
    if options.max_drop is not None and not options.data:
        raise RunError("--max-drop needs the images that it is counted on: --data FOLDER")
    if not (options.calibrate or options.data):
        return {}

    from ..classification.labelled import labelled_images, spread

    known = (options.source, classifier.class_names)
    wishes: dict[str, Any] = {}
    if options.calibrate:
        images = labelled_images(options.calibrate, *known, train=True, multi_label=bool(classifier.thresholds))
        wishes["calibration"] = spread(images, N_CALIBRATION)
    if options.data:
        wishes["validation"] = labelled_images(options.data, *known, train=False)
    if options.max_drop is not None:
        wishes["max_drop"] = options.max_drop
    return wishes


def _objects(options: argparse.Namespace) -> None:
    names = ("model", "dynamic", "preprocess", "fold", "half", "int8", "calibrate", "data", "max_drop", "opset")
    refuse(options, (*names, "class_map"), "is for classifiers, not for --config")
    if options.format != "onnx":
        raise RunError(f"--format {options.format} is for classifiers; with --config there is onnx")
    if not options.pretrained:
        raise RunError("--no-pretrained is for classifiers; --config needs trained weights")

    from mmengine.logging import MMLogger

    MMLogger.get_current_instance().setLevel(logging.WARNING)  # the next import speaks
    from ..openmmlab.export import export as write

    report = write(
        options.config,
        options.source,
        options.output or Path(options.config).stem + ".onnx",
        img_size=options.img_size,
        score_threshold=options.score_threshold,
        trust_checkpoint=options.trust_checkpoint,
        overwrite=options.overwrite,
    )
    say(f"written: {report.path} ({report.size / 1e6:.1f} MB; image -> {', '.join(report.outputs)})")
    what = "pixels" if "label_map" in report.outputs else "detections"
    say(f"compared with PyTorch on {report.images} images: {report.agreement:.1%} of {report.compared} {what} agree")


EXPORT = Verb("export", "Write a model for other programs, and check the file against PyTorch.", add_options, export)
