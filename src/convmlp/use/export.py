"""Classifiers as files for other programs: ONNX, torch.export, TorchScript, and timm's safetensors folder.

What was written is loaded again and compared with the PyTorch model before it takes its name.

A file maps normalised images (b, c, h, w) to logits (b, classes). ONNX metadata_props tell arch, class_names,
input_size, mean, std and the rest of timm's data configuration, and the temperature or the thresholds, each in JSON;
torch-export and torchscript hold all of them in an extra file, classifier.json. A safetensors folder is a model for
timm after `import convmlp.timm_models`: `timm.create_model('local-dir:FOLDER', pretrained=True)`, also for
transformers, and its README.md is a card for Hugging Face's Hub. It has no place for the temperature.
"""

import copy
import importlib.util
import inspect
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from ..common.errors import RunError, one_line, suggest
from ..common.files import check_writable, make_folder, write_atomically
from ..common.packages import need
from ..deploy import fold_batchnorm
from .card import make_card
from .classifier import Classifier, numbered_names

_logger = logging.getLogger(__name__)

Run = Callable[[torch.Tensor], torch.Tensor]
Writer = Callable[[Classifier, nn.Module, torch.Tensor, Path], Run]  # given an example, it returns what reads the file

# What names end in by default; safetensors makes a folder, whose name must not be that of a model
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".pt", "safetensors": "-safetensors"}

# How far a logit may be from the model's, over the largest logit of the batch. Measured: 5e-6 and 4e-3
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2}

MIN_SIDE = 32


@dataclass(frozen=True)
class Report:
    """What was written: `size` in bytes, and the (batch, height, width) on which it was compared with PyTorch.

    `absolute` is the largest difference of a logit from float32 PyTorch, `relative` over the largest of its batch.
    """

    path: Path
    size: int
    dtype: torch.dtype
    shapes: list[tuple[int, int, int]]
    absolute: float
    relative: float


def export(
    classifier: Classifier,
    path: str | Path,
    format: str = "onnx",
    *,
    dynamic: bool = False,
    fold: bool = False,
    half: bool = False,
    opset: int | None = None,
    overwrite: bool = False,
) -> Report:
    """Write a classifier for another program, and check what was written.

    Args:
        path: The file to write; for safetensors the folder.
        format: 'onnx', 'torch-export', 'torchscript' or 'safetensors'.
        dynamic: Any batch, height and width, from 32 px up; otherwise one image of the classifier's input size.
        fold: Fold BatchNorm into the convolutions; not for safetensors. PyTorch's ONNX exporter does so by itself.
        half: Weights, input and logits in float16; timm makes float32 of such weights when it loads them.
        opset: Of ONNX; by default PyTorch's choice. For our models it writes 18 to 25.
        overwrite: Replace what is at `path`; in a folder, the three files.

    Raises:
        RunError: a request that cannot be met, a missing package, a model that does not fit the format, or a file
            that computes something else than the model (`TOLERANCES`). What was at `path` stays then.
    """
    _check_request(path := Path(path), format, fold, opset, overwrite)
    writers: dict[str, Writer] = {
        "onnx": partial(_write_onnx, dynamic=dynamic, opset=opset),
        "torch-export": partial(_write_torch_export, dynamic=dynamic),
        "torchscript": partial(_write_torchscript, dynamic=dynamic),
        "safetensors": _write_safetensors,
    }
    reports = []

    def write_and_check(target: Path) -> None:
        dtype = torch.float16 if half else torch.float32
        report = _write_and_check(classifier, writers[format], target, dynamic, dtype, fold)
        reports.append(replace(report, path=path))

    try:
        with _quiet(), torch.no_grad():
            (_write_folder if format == "safetensors" else write_atomically)(path, write_and_check)
    except RunError:
        raise
    except Exception as error:  # of compilers, which raise anything
        _logger.debug("the export failed", exc_info=True)
        wanted = f"{format}{' with free sizes' if dynamic else ''}{' in float16' if half else ''}"
        raise RunError(f"{classifier.title} cannot be exported as {wanted}: {one_line(error)}") from error
    return reports[0]


def _check_request(path: Path, format: str, fold: bool, opset: int | None, overwrite: bool) -> None:
    if format not in SUFFIXES:
        raise RunError(f"unknown format {format}{suggest(format, SUFFIXES)}; there are {', '.join(SUFFIXES)}")
    if fold and format == "safetensors":
        raise RunError("safetensors keeps the names that timm knows, so BatchNorm cannot be folded there")
    if opset is not None and format != "onnx":
        raise RunError(f"an opset is for onnx, not for {format}")
    if format == "onnx":
        need("onnx", "onnx", "onnxscript", "onnxruntime")
    if format == "safetensors":
        make_folder(path.parent)
    else:
        check_writable(path)
    if not overwrite and (any(path.iterdir()) if path.is_dir() else path.exists()):
        raise RunError(f"{path} exists already; --overwrite replaces it")


def _write_and_check(
    classifier: Classifier, write: Writer, target: Path, dynamic: bool, dtype: torch.dtype, fold: bool
) -> Report:
    reference = copy.deepcopy(classifier.model).eval().requires_grad_(False)
    reference.to("cpu", torch.float32, memory_format=torch.contiguous_format)
    network = (fold_batchnorm(reference) if fold else copy.deepcopy(reference)).to(dtype)
    channels, h, w = classifier.data_config["input_size"]
    shapes = [(1, h, w)] * 3
    if dynamic:
        shapes = [(1, h, w), (3, h, w), (2, max(MIN_SIDE + 1, h - 31), w + 33), (1, MIN_SIDE, MIN_SIDE)]
    images = [
        torch.randn(b, channels, h, w, generator=torch.Generator().manual_seed(seed))
        for seed, (b, h, w) in enumerate(shapes)
    ]
    expected = [reference(x) for x in images]  # first of all, because the model itself may not take these sizes
    run = write(classifier, network, images[0].to(dtype), target)
    differences = _compare([run(x.to(dtype)).float() for x in images], expected, TOLERANCES[dtype])
    size = sum(file.stat().st_size for file in (target.iterdir() if target.is_dir() else [target]))
    return Report(target, size, dtype, shapes, *differences)


def _describe(classifier: Classifier) -> dict[str, Any]:
    """What a file says of itself."""
    arch = classifier.model.pretrained_cfg["architecture"]
    about = {"arch": arch, "class_names": classifier.class_names, **classifier.data_config}
    fitted = {"thresholds": classifier.thresholds, "temperature": classifier.temperature}
    return about | {key: value for key, value in fitted.items() if value not in ([], 1.0)}


def _write_onnx(
    classifier: Classifier, network: nn.Module, example: torch.Tensor, path: Path, dynamic: bool, opset: int | None
) -> Run:
    import onnxruntime

    exported = _capture(network, example, dynamic)
    program = torch.onnx.export(
        exported,
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch", 2: "height", 3: "width"},) if exported.range_constraints else None,
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # with dynamo=True
    written = program.model.opset_imports[""]
    if opset not in (None, written):
        raise RunError(f"PyTorch cannot write this model in ONNX opset {opset}, only in {written} or so")
    about = _describe(classifier)
    program.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"input": images.numpy()})[0])


def _write_torch_export(
    classifier: Classifier, network: nn.Module, example: torch.Tensor, path: Path, dynamic: bool
) -> Run:
    exported = _capture(network, example, dynamic)
    with path.open("wb") as file:  # given a path, PyTorch insists on its own suffix
        torch.export.save(exported, file, extra_files={"classifier.json": json.dumps(_describe(classifier))})
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _write_torchscript(
    classifier: Classifier, network: nn.Module, example: torch.Tensor, path: Path, dynamic: bool
) -> Run:
    scripted = torch.jit.script(network) if dynamic else torch.jit.trace(network, example, check_trace=False)
    torch.jit.save(scripted, path, _extra_files={"classifier.json": json.dumps(_describe(classifier))})
    return torch.jit.load(path)


def _write_safetensors(classifier: Classifier, network: nn.Module, example: torch.Tensor, folder: Path) -> Run:
    if classifier.thresholds:
        raise RunError("safetensors have no place for the thresholds of several labels an image: --format onnx has")
    names = classifier.class_names
    labels = {} if names == numbered_names(len(names)) else {"label_names": names}
    save_for_hf(network, str(folder), labels, safe_serialization=True, data_config=classifier.data_config)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model_args"].pop("num_classes", None)  # stands above too; transformers would pass it twice
    untrue = ("tag", "license", "origin_url") if classifier.origin != "published" else ()
    for key in ("label_names", *untrue):  # the names of these weights stand above
        config["pretrained_cfg"].pop(key, None)
    path.write_text(json.dumps(config, indent=2))
    make_card(classifier).save(folder / "README.md")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return lambda images: loaded(images.float())


def _capture(network: nn.Module, example: torch.Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    """The network as a graph. Free sizes are such that nothing is assumed of them, for 32 px make a map of 1x1."""
    if not dynamic:
        return torch.export.export(network, (example,))
    if importlib.util.find_spec("torch.fx.experimental.dynamic_spec") is None:
        raise RunError(f"free sizes need a newer PyTorch than {torch.__version__}")
    from torch.fx.experimental.dynamic_spec import ParamsSpec, ShapesSpec, ShapeVar, TensorSpec

    batch, height, width = ShapeVar("batch", min=1), ShapeVar("height", min=MIN_SIDE), ShapeVar("width", min=MIN_SIDE)
    name = next(iter(inspect.signature(network.forward).parameters))
    spec = ParamsSpec({name: TensorSpec([batch, example.shape[1], height, width])})
    return torch.export.export(network, (example,), dynamic_shapes=ShapesSpec(params=spec))


def _compare(actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> tuple[float, float]:
    """The largest difference of a logit, absolute and over the largest logit of its batch."""
    if [logits.shape for logits in actual] != [logits.shape for logits in expected]:
        raise RunError(f"the export gives logits {tuple(actual[0].shape)}, the model {tuple(expected[0].shape)}")
    absolute = torch.stack([(left - right).abs().max() for left, right in zip(actual, expected, strict=True)])
    scales = torch.stack([logits.abs().max() for logits in expected])
    relative = absolute / scales.clamp(min=torch.finfo(scales.dtype).tiny)
    worst = relative.max().item()  # NaN if there is one
    if not worst <= tolerance:
        raise RunError(f"the export differs from the model by {worst:.2g} of the largest logit ({tolerance:g} is fine)")
    return absolute.max().item(), worst


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters print, log and warn of: what comes of it is checked, and said in an error."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
