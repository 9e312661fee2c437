"""Classifiers as files for other programs: ONNX, torch.export, OpenVINO, ExecuTorch, LiteRT, and timm's folder.

What was written is loaded again and compared with the PyTorch model before it takes its name.

A file maps normalised images (b, c, h, w) to logits (b, classes), or with `preprocess` images as they are, (n, h, w, 3)
uint8, to probabilities (n, classes). It tells arch, class_names, input_size, mean, std and the rest of timm's data
configuration, and the temperature or the thresholds, each in JSON: in ONNX's metadata_props, OpenVINO's rt_info, or as
one object in torch-export's and torchscript's extra file classifier.json and ExecuTorch's method `classifier`. LiteRT
has no place for it. A safetensors folder is a model for timm after `import convmlp.timm_models`:
`timm.create_model('local-dir:FOLDER', pretrained=True)`, also for transformers, and its README.md is a card for Hugging
Face's Hub. It has no place for the temperature.
"""

import copy
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..common.errors import RunError, one_line, suggest
from ..common.files import check_writable, make_folder, write_atomically
from ..common.output import quiet
from ..common.packages import need
from ..deploy import fold_batchnorm
from ..exported import Run
from .classifier import Classifier, need_layers
from .predict import BATCH_SIZE, classify
from .preprocessing import Preprocessed
from .writers import MIN_SIDE, WRITERS, Labelled, Wishes, calibration_batches, image_batch, readable

_logger = logging.getLogger(__name__)

# What names end in by default; safetensors makes a folder, whose name must not be that of a model
SUFFIXES = {
    "onnx": ".onnx",
    "torch-export": ".pt2",
    "torchscript": ".pt",
    "safetensors": "-safetensors",
    "openvino": ".xml",
    "executorch": ".pte",
    "litert": ".tflite",
}

PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "litert": ("litert-torch",),
}

# What a format can do besides float32 files for one image of one size
ABLE = {
    "dynamic": ("onnx", "torch-export", "torchscript", "openvino"),
    "half": ("onnx", "torch-export", "torchscript", "safetensors"),
    "fold": tuple(name for name in SUFFIXES if name != "safetensors"),  # which keeps the names that timm knows
    "preprocess": ("onnx", "torch-export", "openvino"),
    "int8": ("onnx", "openvino"),
    "opset": ("onnx",),
}

# How far a logit may be from the model's, over the largest logit of the batch. Measured: 5e-6, 4e-3 and 0.2
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.int8: 0.5}

# How far a probability may be where the file preprocesses. Measured: docs/using.md
PROBABILITY = {torch.float32: 2e-2, torch.float16: 5e-2, torch.int8: 0.5}

# (height, width) of the photographs on which preprocessing is compared
PHOTO_SIZES = [(427, 640), (640, 427), (1080, 1920), (375, 500), (100, 75), (28, 28)]


class Accuracy(NamedTuple):
    """How many in a hundred of n images PyTorch and the file name rightly."""

    model: float
    file: float
    n: int


@dataclass(frozen=True)
class Report:
    """What was written: `size` in bytes, and the (batch, height, width) on which it was compared with PyTorch.

    `absolute` is the largest difference of a logit from float32 PyTorch, `relative` over the largest of its batch; of a
    file that preprocesses, of a probability. `accuracy` is there if validation images were given.
    """

    path: Path
    size: int
    dtype: torch.dtype
    shapes: list[tuple[int, int, int]]
    absolute: float
    relative: float
    accuracy: Accuracy | None = None


def export(
    classifier: Classifier,
    path: str | Path,
    format: str = "onnx",
    *,
    dynamic: bool = False,
    preprocess: bool = False,
    fold: bool = False,
    half: bool = False,
    opset: int | None = None,
    calibration: Labelled | None = None,
    validation: Labelled | None = None,
    max_drop: float = 0.5,
    overwrite: bool = False,
) -> Report:
    """Write a classifier for another program, and check what was written.

    Args:
        path: The file to write; for safetensors the folder. OpenVINO's weights go beside it, into NAME.bin.
        format: One of `SUFFIXES`.
        dynamic: Any batch, height and width, from 32 px up; otherwise one image of the classifier's input size.
        preprocess: Resizing, cropping, normalisation and softmax, for several labels sigmoid, are in the file. It takes
            any number of RGB images of one size, whichever that is, also for a model of grey images.
        fold: Fold BatchNorm into the convolutions; not for safetensors. PyTorch's ONNX exporter does so by itself.
        half: Weights, input and logits in float16; timm makes float32 of such weights when it loads them.
        opset: Of ONNX; by default PyTorch's choice. For our models it writes 18 to 25.
        calibration: Some hundreds of images of all classes with the numbers of these, such as a dataset of torchvision.
            The file then computes in int8, scaled to what these images give.
        validation: Other such images; the report then tells the accuracy of the model and of the file.
        max_drop: How many of a hundred validation images the file may lose against the model.
        overwrite: Replace what is at `path`; in a folder, the three files.

    Raises:
        RunError: a request that cannot be met, a missing package, a model that does not fit the format, or a file
            that computes something else than the model (`TOLERANCES`) or loses too much. What was at `path` stays then.
    """
    path = Path(path)
    wishes = Wishes(format, dynamic, preprocess, fold, half, opset, calibration)
    _check_request(classifier, path, wishes, validation is not None, overwrite)
    reports = []

    def write_and_check(target: Path) -> None:
        report, run = _write_and_check(classifier, target, wishes)
        if validation is not None:
            with torch.inference_mode():
                accuracy = _measure(classifier, run, validation, wishes)
            drop = accuracy.model - accuracy.file
            if drop > max_drop:
                raise RunError(
                    f"the export loses {drop:.2f} points of accuracy, from {accuracy.model:.2f} to {accuracy.file:.2f} "
                    f"% of {accuracy.n} images, and --max-drop allows {max_drop:g}"
                )
            report = replace(report, accuracy=accuracy)
        if format == "openvino":  # complete before the file that stands for both
            os.replace(target.with_suffix(".bin"), path.with_suffix(".bin"))
        reports.append(replace(report, path=path))

    try:
        with quiet(), torch.no_grad():
            (_write_folder if format == "safetensors" else write_atomically)(path, write_and_check)
    except RunError:
        raise
    except Exception as error:  # of compilers, which raise anything
        _logger.debug("the export failed", exc_info=True)
        wanted = f"{format}{' with free sizes' if dynamic or preprocess else ''}{' in float16' if half else ''}"
        raise RunError(f"{classifier.title} cannot be exported as {wanted}: {one_line(error)}") from error
    finally:
        for left in path.parent.glob(f".{path.stem}.{os.getpid()}.part.bin"):
            left.unlink()
    return reports[0]


def _check_request(classifier: Classifier, path: Path, wishes: Wishes, labelled: bool, overwrite: bool) -> None:
    need_layers(classifier, "export")
    format = wishes.format
    if format not in SUFFIXES:
        raise RunError(f"unknown format {format}{suggest(format, SUFFIXES)}; there are {', '.join(SUFFIXES)}")
    asked = vars(wishes) | {"int8": wishes.calibration}
    for wish, formats in ABLE.items():
        if asked[wish] and format not in formats:
            raise RunError(f"{wish} is for {', '.join(formats)}, not for {format}")
    if wishes.preprocess and wishes.dynamic:
        raise RunError("a file that preprocesses takes images of any size by itself, without dynamic")
    if wishes.calibration and wishes.half:
        raise RunError("a file is in int8 or in float16: give one of them")
    if labelled and classifier.thresholds:
        raise RunError("accuracy is for one class an image; this model has several labels")
    need(format, *PACKAGES.get(format, ()), *(["nncf"] if wishes.calibration and format == "openvino" else []))
    if format == "safetensors":
        make_folder(path.parent)
    else:
        check_writable(path)
    if format == "openvino" and path.suffix != ".xml":
        raise RunError(f"{path}: an OpenVINO file is called NAME.xml")
    if not overwrite and any(file.exists() for file in _files_of(path, format)):
        raise RunError(f"{path} exists already; --overwrite replaces it")


def _write_and_check(classifier: Classifier, target: Path, wishes: Wishes) -> tuple[Report, Run]:
    dtype = wishes.floating
    reference = copy.deepcopy(classifier.model).eval().requires_grad_(False)
    reference.to("cpu", torch.float32, memory_format=torch.contiguous_format)
    network = (fold_batchnorm(reference) if wishes.fold else copy.deepcopy(reference)).to(dtype)
    reference = replace(classifier, model=reference, device=torch.device("cpu"))
    if wishes.preprocess:
        images, expected = _photographs(reference, wishes)
        network = Preprocessed(reference, network, dtype).eval()
        tolerances, places = PROBABILITY, slice(1, 3)
    else:
        images, expected = _noise(reference, wishes, dtype)
        tolerances, places = TOLERANCES, slice(2, 4)
    run = WRITERS[wishes.format](reference, network, images[-1 if wishes.preprocess else 0], target, wishes)
    actual = [run(x).float() for x in images]
    differences = _compare(actual, expected, tolerances[wishes.dtype], wishes.preprocess)
    shapes: Any = [(len(x), *x.shape[places]) for x in images]
    size = sum(file.stat().st_size for file in _files_of(target, wishes.format))
    return Report(target, size, wishes.dtype, shapes, *differences), run


def _files_of(path: Path, format: str) -> list[Path]:
    """What is written: a file, OpenVINO's two, or those in a folder."""
    if path.is_dir():
        return [*path.iterdir()]
    return [path, path.with_suffix(".bin")] if format == "openvino" else [path]


def _noise(reference: Classifier, wishes: Wishes, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random batches and their logits; where int8 was calibrated, the images of that, because it fits no others."""
    channels, h, w = reference.data_config["input_size"]
    if wishes.calibration:
        images = [*islice(calibration_batches(reference, wishes), 16)]
        return images, [reference.model(x) for x in images]
    shapes = [(1, h, w)] * 3
    if wishes.dynamic:
        shapes = [(1, h, w), (3, h, w), (2, max(MIN_SIDE + 1, h - 31), w + 33), (1, MIN_SIDE, MIN_SIDE)]
    images = [
        torch.randn(b, channels, h, w, generator=torch.Generator().manual_seed(seed))
        for seed, (b, h, w) in enumerate(shapes)
    ]
    expected = [reference.model(x) for x in images]  # first of all, as the model itself may not take these sizes
    return [x.to(dtype) for x in images], expected


def _photographs(reference: Classifier, wishes: Wishes) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """scikit-learn's two photographs in several sizes, two of each, and their probabilities by way of Pillow."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    resized = [[photo.resize((w, h)) for photo in photos] for h, w in PHOTO_SIZES]
    images = [torch.cat([image_batch(reference, photo, wishes) for photo in pair]) for pair in resized]
    return images, [classify(pair, reference) for pair in resized]


def _compare(
    actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float, probabilities: bool
) -> tuple[float, float]:
    """The largest difference of an output, absolute and over the largest of its batch."""
    if [outputs.shape for outputs in actual] != [outputs.shape for outputs in expected]:
        raise RunError(f"the export gives outputs {tuple(actual[0].shape)}, the model {tuple(expected[0].shape)}")
    absolute = torch.stack([(left - right).abs().max() for left, right in zip(actual, expected, strict=True)])
    scales = torch.stack([outputs.abs().max() for outputs in expected])
    relative = absolute / scales.clamp(min=torch.finfo(scales.dtype).tiny)
    worst, what = (absolute, "a probability") if probabilities else (relative, "the largest logit")
    if not worst.max() <= tolerance:  # also if there is a NaN
        raise RunError(f"the export differs from the model by {worst.max():.2g} of {what} ({tolerance:g} is fine)")
    return absolute.max().item(), relative.max().item()


def _measure(classifier: Classifier, run: Run, validation: Labelled, wishes: Wishes) -> Accuracy:
    """The accuracy of the model and of the file, which sees one image at a time, on the images that can be read."""
    right, n = [0, 0], 0
    images = readable(validation)
    while batch := [*islice(images, BATCH_SIZE)]:
        inputs = [image_batch(classifier, image, wishes) for image, _ in batch]
        outputs = torch.cat([run(x if wishes.preprocess else x.to("cpu", wishes.floating)) for x in inputs])
        targets = torch.tensor([target for _, target in batch])
        for i, scores in enumerate((classify([image for image, _ in batch], classifier), outputs)):
            right[i] += int((scores.argmax(1) == targets).sum())
        n += len(batch)
    if not n:
        raise RunError("not one validation image could be read")
    return Accuracy(100 * right[0] / n, 100 * right[1] / n, n)


def _write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder beside `path`, then move its files; config.json comes last, to complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        path.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
            shutil.copymode(temporary / "config.json", file)  # Hugging Face's writer lets nobody else read
            os.replace(file, path / file.name)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
