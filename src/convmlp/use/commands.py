"""The verbs of `convmlp` that use a trained model: visualize and info here, predict and export in their own modules."""

import argparse
from functools import partial
from pathlib import Path

from ..common.command import Verb, positive_int
from ..common.errors import RunError
from ..common.files import check_writable
from ..common.output import say, show_table
from .export_command import EXPORT
from .options import add_machine, add_pretrained
from .predict_command import PREDICT


def _visualize_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="a file; filters need none")
    add("--models", nargs="+", default=["convmlp_s"], metavar="MODEL", help="timm names or checkpoints, a row each")
    add("--kind", choices=["features", "cam", "filters"], default="features", help="cam is Grad-CAM")
    add("--classes", nargs="+", metavar="NAME|N", help="what cam looks for; by default what the model finds")
    add("--out", metavar="FILE", help="by default KIND.png")
    add_pretrained(parser)
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
    from .classifier import need_layers, open_any

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
    for classifier in classifiers:
        need_layers(classifier, "visualize")
    save_figure(make_figure(classifiers), out)
    say(f"drawn: {out}")


def _info_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="timm names or checkpoints; by default all of ours")
    add("--img-size", type=positive_int, metavar="PX", help="side of the square the model sees")
    add("--layers", action="store_true", help="the layers of several models")
    add("--depth", type=positive_int, metavar="N", help="how deep into the layers (2)")
    add("--markdown", action="store_true", help="tables for a README")


def _info(options: argparse.Namespace) -> None:
    from . import info
    from .classifier import need_layers, open_any

    if options.depth and not options.layers and len(options.models) != 1:
        raise RunError("--depth is for the layers of one model, or of several with --layers")
    rows = []
    for model in options.models or info.OURS:
        classifier = open_any(model, pretrained=False, device="cpu", img_size=options.img_size)
        need_layers(classifier, "info")
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


VERBS = [
    PREDICT,
    Verb("visualize", "Draw feature maps, class activation maps or first filters.", _visualize_options, _visualize),
    EXPORT,
    Verb(
        "info",
        "Parameters, multiply-adds, activations, published scores; the layers of one model.",
        _info_options,
        _info,
        "unexpected argument {}; models stand together, before the options",
    ),
]
