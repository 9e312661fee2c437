"""The verb predict: images in, classes, boxes or label maps out, in tables and drawings."""

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ..common.command import Verb, fraction, positive_int
from ..common.errors import RunError, plural
from ..common.files import check_writable, make_folder, write_atomically
from ..common.output import say, show_table, write_result
from .options import add_machine, refuse

RESULTS = ("json", "jsonl", "csv", "parquet")
SHOWN = 100  # images in the table on the screen, if all of them are in a file

Row = dict[str, Any]
Drawn = Callable[[Path], Path] | None  # where the drawn copy of an image goes
# Given the images that are left, their rows: of an image that cannot be read or predicted, "image" and "error"
Predict = Callable[[Sequence[Path]], Iterator[Row]]


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    places = "files, folders, or patterns in quotes; a file of `convmlp export` may stand first"
    add("images", nargs="+", metavar="IMAGE|FOLDER|GLOB", help=places)
    add("--model", metavar="NAME", help="a ConvMLP or any other model of timm; convmlp_s without a checkpoint")
    add("--checkpoint", metavar="FILE|URL", help="trained weights, or a file of `convmlp export`")
    add("--class-map", metavar="FILE", help="class names, one a line, for weights that do not tell theirs")
    add("--topk", type=positive_int, metavar="N", help="how many classes to name (5)")
    add("--min-confidence", type=fraction, metavar="P", help="abstain where the best class is less probable")
    add("--features", action="store_true", help="also what the classes are told from: numbers, in JSON and Parquet")
    add("--exact", action="store_true", help="compute in float32 with PyTorch as it is, also where more is faster")
    add("--config", metavar="FILE", help="config of the detector or segmentor that --checkpoint is of")
    add("--score-threshold", type=fraction, metavar="P", help="leave out detections below (0.3)")
    add("--trust-checkpoint", action="store_true", help="with --config: read by pickle, which may run code")
    add("--batch-size", type=positive_int, metavar="N", help="images at once (16)")
    add("--json", metavar="FILE", help="write the result as JSON; - is the screen")
    add("--jsonl", metavar="FILE", help="write the result as JSON lines; - is the screen")
    add("--csv", metavar="FILE", help="write the result as CSV; - is the screen")
    add("--parquet", metavar="FILE", help="write the result as Parquet")
    add("--resume", action="store_true", help="go on where an interrupted command stopped")
    add("--save-dir", metavar="DIR", help="draw the result into copies of the images")
    add_machine(parser)


def predict(options: argparse.Namespace) -> int:
    """Predict what is on the images, and leave the results where the options say."""
    from tqdm import tqdm

    from ..common.images import find_images
    from ..exported import kind_of
    from .journal import Journal

    if not (options.checkpoint or options.model) and kind_of(options.images[0]):
        options.checkpoint = options.images.pop(0)
        if not options.images:
            raise RunError(f"{options.checkpoint} is an exported classifier: name images behind it")
    paths = list(dict.fromkeys(path for place in options.images for path in find_images(place)))
    files = _check_results(options)
    drawn = _plan_drawings(options, paths)
    predict_images, settings = (_objects if options.config else _classes)(options, drawn)
    journal = Journal(files[0] if files else None, settings, options.resume)
    left = [path for path in paths if str(path) not in journal.done]
    hidden = None if len(left) > 1 else True
    try:
        for row in tqdm(predict_images(left), total=len(left), unit="image", leave=False, disable=hidden):
            journal.add(row)
    except KeyboardInterrupt:
        if journal.path:
            say(f"{plural(journal.n_rows, 'image')} of {len(paths)} in {journal.path}; --resume goes on from there")
        raise
    _write_results(options, journal, is_in_file=bool(files))
    if options.save_dir:
        say(f"{plural(journal.n_rows - journal.n_errors, 'image')} drawn in {options.save_dir}")
    if journal.n_errors:
        for row in journal:
            if "error" in row:
                say(f"skipped: {row['error']}")
        say(f"{journal.n_errors} of {plural(journal.n_rows, 'image')} left out")
    journal.finish()
    return 1 if journal.n_errors else 0


def _check_results(options: argparse.Namespace) -> list[Path]:
    """The files that the results go to; raises `RunError` for a place where they cannot."""
    from ..common.packages import need

    places: dict[str, str] = {}
    for kind in RESULTS:
        place = getattr(options, kind)
        if place in places:
            raise RunError(f"--{places[place]} and --{kind} cannot both be {place}")
        if place and place != "-":
            check_writable(Path(place))
        if place:
            places[place] = kind
    if options.parquet:
        need("--parquet", "pyarrow")
    if options.parquet == "-":
        raise RunError("--parquet is not for the screen: name a file")
    if options.features and not (options.json or options.jsonl or options.parquet):
        raise RunError("--features go into JSON or Parquet: name a file by --parquet, --jsonl or --json")
    files = [Path(place) for place in places if place != "-" and not Path(place).is_char_device()]
    if options.resume and not files:
        raise RunError("--resume goes on with results in a file: name that of the interrupted command")
    return files


def _plan_drawings(options: argparse.Namespace, paths: Sequence[Path]) -> Drawn:
    from .tables import drawn_names

    if options.save_dir is None:
        return None
    make_folder(Path(options.save_dir))
    copies = [Path(options.save_dir, name) for name in drawn_names(paths)]
    if replaced := {copy.resolve() for copy in copies} & {path.resolve() for path in paths}:
        raise RunError(f"--save-dir {options.save_dir} holds the images: {min(replaced).name} would be replaced")
    return dict(zip(paths, copies, strict=True)).__getitem__


def _write_results(options: argparse.Namespace, rows: Any, is_in_file: bool) -> None:
    from . import tables

    write_result(options.json, lambda file: tables.write_json(file, rows))
    write_result(options.jsonl, lambda file: tables.write_json_lines(file, rows))
    write_result(options.csv, lambda file: tables.write_csv(file, rows))
    if options.parquet:
        write_atomically(Path(options.parquet), lambda path: tables.write_parquet(path, rows))
        say(f"written: {options.parquet}")
    if "-" in (options.json, options.jsonl, options.csv):
        return
    readable = (row for row in rows if "error" not in row)
    shown = list(islice(readable, SHOWN if is_in_file else None))
    if shown:
        show_table(tables.make_table(shown))
    if next(readable, None):
        say(f"the first {SHOWN} images; all are in the file")


def _classes(options: argparse.Namespace, drawn: Drawn) -> tuple[Predict, Mapping[str, Any]]:
    refuse(options, ("score_threshold", "trust_checkpoint"), "is for detection and segmentation: --config FILE")

    import torch

    from ..common.devices import resolve_amp_dtype
    from ..common.images import UnreadableImage, read_image
    from ..deploy import Tiered
    from ..exported import Exported
    from . import predict as work
    from .classifier import need_layers, open_classifier

    classifier = open_classifier(
        options.model, options.checkpoint, device=options.device, img_size=options.img_size, class_map=options.class_map
    )
    if options.topk and classifier.thresholds:
        raise RunError("--topk is for one class an image; this model names every label that reaches its threshold")
    topk, batch_size = options.topk or work.TOPK, options.batch_size or work.BATCH_SIZE
    if options.features:
        need_layers(classifier, "--features")
    network = work.FeaturesToo(classifier.model) if options.features else classifier.model
    exact = options.exact or isinstance(network, Exported)
    dtype = resolve_amp_dtype("auto", classifier.device) or torch.float32

    def predict_images(paths: Sequence[Path]) -> Iterator[Row]:
        fast = network if exact else Tiered(network, len(paths), classifier.device, dtype, say)
        small: list[work.Prediction] = []
        found = work.predict_each(paths, classifier, topk, batch_size, options.min_confidence, fast)
        for path, one in zip(paths, found, strict=True):
            if isinstance(one, UnreadableImage):
                yield {"image": str(path), "error": str(one)}
                continue
            if drawn:
                write_atomically(drawn(path), work.draw_classes(read_image(path), one.best).save)
            if min(one.size) < work.SMALLEST_SEEN:
                small.append(one)
            yield one.row()
        if small:
            (width, height), side = small[0].size, classifier.data_config["input_size"][-1]
            example = f"{small[0].path}, {width}x{height} px"
            say(f"enlarged to {side} px: {len(small)} of {plural(len(paths), 'image')}, such as {example}")

    names = ("topk", "min_confidence", "features", "img_size", "class_map")
    settings = {"model": classifier.title, **{name: getattr(options, name) for name in names}}
    return predict_images, settings


def _objects(options: argparse.Namespace, drawn: Drawn) -> tuple[Predict, Mapping[str, Any]]:
    names = ("model", "class_map", "img_size", "topk", "batch_size", "min_confidence", "features", "exact")
    refuse(options, names, "is for classifiers, not for --config")
    if not options.checkpoint:
        raise RunError("--config needs the trained weights: --checkpoint FILE")

    from mmengine.logging import MMLogger

    MMLogger.get_current_instance().setLevel(logging.WARNING)  # what the next import logs would be among the results
    from ..openmmlab.inference import predict_files

    given = ("config", "checkpoint", "score_threshold", "trust_checkpoint", "device")
    settings = {name: getattr(options, name) for name in given}
    return partial(predict_files, drawn=drawn, **settings), settings


PREDICT = Verb(
    "predict",
    "Classify images; with --config, detect or segment what is on them.",
    add_options,
    predict,
    "unexpected argument {}; images stand together, before the options",
)
