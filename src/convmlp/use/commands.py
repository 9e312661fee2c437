"""The verbs of `convmlp` that use a trained model: predict (in a module of its own), visualize, export, info."""

import argparse
import logging
from functools import partial
from pathlib import Path

from ..common.command import Verb, fraction, image_size, positive_int
from ..common.errors import RunError
from ..common.files import check_writable
from ..common.output import say, show_table
from .predict_command import VERB, add_machine, refuse


def _visualize_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="a file; filters need none")
    add("--models", nargs="+", default=["convmlp_s"], metavar="MODEL", help="timm names or checkpoints, a row each")
    add("--kind", choices=["features", "cam", "filters"], default="features", help="cam is Grad-CAM")
    add("--classes", nargs="+", metavar="NAME|N", help="what cam looks for; by default what the model finds")
    add("--out", metavar="FILE", help="by default KIND.png")
    _add_pretrained(parser)
    add_machine(parser)


def _visualize(options: argparse.Namespace) -> None:
    out = Path(options.out or f"{options.kind}.png")
    out = out if out.suffix else out.with_suffix(".png")
    check_writable(out)
    if not options.image and options.kind != "filters":
        raise RunError(f"--kind {options.kind} needs an image: convmlp visualize IMAGE, before --models")
    if options.kind == "filters" and (options.image or options.img_size):
        raise RunError("--kind filters shows what the models are made of: it takes no image and no --img-size")
    if options.classes and options.kind != "cam":
        raise RunError("--classes is for --kind cam")

    from ..common.figures import check_format, save_figure
    from ..common.images import read_image
    from . import visualize
    from .classifier import open_any

    check_format(out)
    if options.kind == "filters":
        make_figure = visualize.filter_figure
    elif options.kind == "features":
        make_figure = partial(visualize.feature_figure, read_image(options.image))
    else:
        make_figure = partial(visualize.cam_figure, read_image(options.image), wanted=options.classes or ())
    classifiers = [
        open_any(model, pretrained=options.pretrained, device=options.device, img_size=options.img_size)
        for model in options.models
    ]
    save_figure(make_figure(classifiers), out)
    say(f"drawn: {out}")


def _export_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="CHECKPOINT|MODEL", help="a checkpoint, or a timm name")
    add("--model", metavar="NAME", help="the timm name of a checkpoint that does not tell its model")
    add("--format", choices=["onnx", "torch-export", "torchscript", "safetensors"], default="onnx")
    add("--output", metavar="PATH", help="file, or folder for safetensors; by default named by the model")
    add("--overwrite", action="store_true", help="replace what is there")
    add("--dynamic", action="store_true", help="any batch and image size, not just one image of the model's own size")
    add("--fold", action="store_true", help="fold BatchNorm into the convolutions")
    add("--half", action="store_true", help="float16")
    add("--opset", type=positive_int, metavar="N", help="of ONNX; by default PyTorch's")
    add("--class-map", metavar="FILE", help="class names, one a line, for weights that do not tell theirs")
    add("--img-size", type=image_size, metavar="PX|HxW", help="side of the square the model sees; HxW with --config")
    add("--config", metavar="FILE", help="config of the detector or segmentor that CHECKPOINT is of")
    add("--score-threshold", type=fraction, metavar="P", help="leave out detections below (the config's test_cfg)")
    add("--trust-checkpoint", action="store_true", help="with --config: read by pickle, which may run code")
    _add_pretrained(parser)


def _export(options: argparse.Namespace) -> None:
    (_export_objects if options.config else _export_classes)(options)


def _export_classes(options: argparse.Namespace) -> None:
    refuse(options, ("score_threshold", "trust_checkpoint"), "is for detection and segmentation: --config FILE")
    height, width = options.img_size or (None, None)
    if height != width:
        raise RunError(f"--img-size: a classifier sees a square, got {height}x{width}")

    from .classifier import open_any, open_classifier
    from .export import SUFFIXES, export

    settings = dict(pretrained=options.pretrained, device="cpu", img_size=height, class_map=options.class_map)
    if options.model:
        classifier = open_classifier(options.model, options.source, **settings)
    else:
        classifier = open_any(options.source, **settings)
    path = options.output or classifier.model.pretrained_cfg["architecture"] + SUFFIXES[options.format]
    wishes = {name: getattr(options, name) for name in ("dynamic", "fold", "half", "opset", "overwrite")}
    report = export(classifier, path, options.format, **wishes)
    shapes = ", ".join("x".join(map(str, shape)) for shape in dict.fromkeys(report.shapes))
    dtype = str(report.dtype).removeprefix("torch.")
    say(f"written: {report.path} ({report.size / 1e6:.1f} MB, {dtype})")
    differences = f"{report.absolute:.1e}, {report.relative:.1e} of the largest"
    say(f"compared with PyTorch on {shapes} (batch x height x width): logits differ by at most {differences}")


def _export_objects(options: argparse.Namespace) -> None:
    names = ("model", "dynamic", "fold", "half", "opset", "class_map")
    refuse(options, names, "is for classifiers, not for --config")
    if options.format != "onnx":
        raise RunError(f"--format {options.format} is for classifiers; with --config there is onnx")
    if not options.pretrained:
        raise RunError("--no-pretrained is for classifiers; --config needs trained weights")

    from mmengine.logging import MMLogger

    MMLogger.get_current_instance().setLevel(logging.WARNING)  # the next import speaks
    from ..openmmlab.export import export

    report = export(
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


def _info_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="timm names or checkpoints; by default all of ours")
    add("--img-size", type=positive_int, metavar="PX", help="side of the square the model sees")
    add("--layers", action="store_true", help="the layers of several models")
    add("--depth", type=positive_int, metavar="N", help="how deep into the layers (2)")
    add("--markdown", action="store_true", help="tables for a README")


def _info(options: argparse.Namespace) -> None:
    from . import info
    from .classifier import open_any

    if options.depth and not options.layers and len(options.models) != 1:
        raise RunError("--depth is for the layers of one model, or of several with --layers")
    rows = []
    for model in options.models or info.OURS:
        classifier = open_any(model, pretrained=False, device="cpu", img_size=options.img_size)
        size = classifier.data_config["input_size"]
        rows.append((model, info.measure(classifier.model, size), size[-1]))
    if options.layers or len(options.models) == 1:
        for name, cost, _ in rows:
            title = f"{name}:" if len(rows) > 1 else ""
            show_table(info.layer_table(cost, options.depth or 2, options.markdown), title)
    show_table(info.cost_table(rows, options.markdown))
    if not options.models:
        show_table(info.downstream_table(options.markdown))
        print("Scores as published by the paper: top-1 in per cent; COCO box and mask AP; ADE20K mIoU.")


def _add_pretrained(parser: argparse.ArgumentParser) -> None:
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--pretrained", action=switch, default=True, help="published weights; or random ones")


VERBS = [
    VERB,
    Verb("visualize", "Draw feature maps, class activation maps or first filters.", _visualize_options, _visualize),
    Verb("export", "Write a model for other programs, and check the file against PyTorch.", _export_options, _export),
    Verb(
        "info",
        "Parameters, multiply-adds, activations, published scores; the layers of one model.",
        _info_options,
        _info,
        "unexpected argument {}; models stand together, before the options",
    ),
]
