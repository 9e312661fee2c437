"""Classifiers in the files of `convmlp export`, each run by the runtime that its format is for.

A further kind of file takes a line in `READERS`, and one in `kind_of` if its name alone does not tell it.
"""

import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .common.errors import RunError, one_line, some
from .common.packages import need
from .programs import load_program

Run = Callable[[torch.Tensor], torch.Tensor]


class Opened(NamedTuple):
    """What reads a file, what the file says of itself, and the images that it takes: how many (None: any), and in
    which type."""

    run: Run
    about: Mapping[str, str]
    batch: int | None
    dtype: torch.dtype


class Exported(nn.Module):
    """A classifier in a file, called as the model that it was made of: images in, logits in float32 out.

    Where the file holds the preprocessing, `takes_pixels`: then images are (b, c, h, w), or a list of (c, h, w) of
    different sizes, with values of 0 to 255, and the logits are such that softmax (for several labels sigmoid) gives
    the file's probabilities. Files are run on the CPU; logits go to where the images are.
    """

    def __init__(self, path: Path, opened: Opened, about: dict[str, Any]):
        super().__init__()
        self.path = path
        self.opened = opened
        self.takes_pixels: bool = about["preprocess"]
        self.several = bool(about["thresholds"])
        self.num_classes = len(about["class_names"])
        self.pretrained_cfg = {**about["data_config"], "architecture": about["arch"]}
        self.eval()

    @torch.no_grad()
    def forward(self, images: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        if isinstance(images, list):
            return torch.cat([self(image[None]) for image in images])
        x = images.cpu()
        if self.takes_pixels:
            x = x.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
        x = x.to(self.opened.dtype).contiguous()
        try:
            parts = [self.opened.run(part) for part in x.split(self.opened.batch or len(x))]
        except Exception as error:  # of runtimes, which raise anything
            raise RunError(f"{self.path} fails on images of shape {tuple(images.shape)}: {one_line(error)}") from error
        outputs = torch.cat(parts).float()
        if outputs.shape != (len(x), self.num_classes):
            raise RunError(
                f"{self.path} gives {tuple(outputs.shape)} for {len(x)} images of {self.num_classes} classes"
            )
        if self.takes_pixels:
            outputs = outputs.logit(eps=1e-7) if self.several else outputs.clamp(min=1e-37).log()
        return outputs.to(images.device)


def kind_of(path: str | os.PathLike) -> str | None:
    """Which of `READERS` a file is for, by its content; None for anything else, such as a checkpoint."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        start = file.read(256)
    if re.match(rb"\x08[\x01-\x20][\x12\x3a\x42]", start):  # the version, then the producer, the graph or the operators
        return "onnx"
    if re.match(rb"\s*(<\?xml[^>]*>\s*)?<net\s", start):
        return "openvino"
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = {name.partition("/")[2] for name in archive.namelist()}
        except Exception:  # one so damaged that it has no list
            return None
        return "torch-export" if "archive_format" in names or "models/model.json" in names else None
    return None


def open_exported(path: str | os.PathLike) -> tuple[Exported, dict[str, Any]]:
    """A file of `convmlp export` as a module, and what it says of itself.

    Returns:
        The module, and arch, class_names, data_config as timm names it, preprocess, thresholds and temperature.

    Raises:
        RunError: the file is damaged or unsafe, a package is missing, or the file does not tell its classes and how
            it takes its images.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind is None:
        raise RunError(f"{path} is no file of `convmlp export`: {', '.join(READERS)}")
    try:
        opened = READERS[kind](path)
    except RunError:
        raise
    except Exception as error:  # of runtimes, which raise anything
        raise RunError(f"{path} cannot be read by {kind}: {one_line(error)}") from error
    about = _read_about(path, opened.about)
    return Exported(path, opened, about), about


def _open_onnx(path: Path) -> Opened:
    need("an ONNX file", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is raised
    options.intra_op_num_threads = torch.get_num_threads()
    try:  # from memory: then the file cannot name others to be read as weights
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if re.search("external data|model_path", str(error), re.IGNORECASE):
            raise RunError(f"{path} keeps its weights in other files, which are not read: write it whole") from error
        raise
    (given,), (output,) = session.get_inputs(), session.get_outputs()
    batch = given.shape[0] if isinstance(given.shape[0], int) else None
    dtype = {"tensor(uint8)": torch.uint8, "tensor(float16)": torch.float16}.get(given.type, torch.float32)

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run([output.name], {given.name: images.numpy()})[0])

    return Opened(run, session.get_modelmeta().custom_metadata_map, batch, dtype)


def _open_torch_export(path: Path) -> Opened:
    program, text = load_program(path)
    signature = program.graph_signature
    (given,) = (node for node in program.graph.nodes if node.name in signature.user_inputs)
    example = given.meta["val"]
    batch = example.shape[0] if isinstance(example.shape[0], int) else None
    about = json.loads(text) if text else {}
    return Opened(program.module(), {key: json.dumps(value) for key, value in about.items()}, batch, example.dtype)


def _open_openvino(path: Path) -> Opened:
    need("an OpenVINO file", "openvino")
    import openvino

    model = openvino.Core().read_model(path)
    keys = model.rt_info["convmlp"] if "convmlp" in model.rt_info else ()
    about = {key: model.get_rt_info(["convmlp", key]).astype(str) for key in keys}
    # Without the hint it computes in bfloat16 where the CPU has it, faster and coarser
    precision = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(model, "CPU", precision)
    size = model.inputs[0].partial_shape[0]
    dtype = torch.uint8 if model.inputs[0].element_type == openvino.Type.u8 else torch.float32

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.array(compiled(images.numpy())[0]))

    return Opened(run, about, None if size.is_dynamic else size.get_length(), dtype)


READERS: dict[str, Callable[[Path], Opened]] = {
    "onnx": _open_onnx,
    "torch-export": _open_torch_export,
    "openvino": _open_openvino,
}


# Which form each value has; timm's own names for how images are taken, and those of ours
FORMS: dict[str, Callable[[Any], bool]] = {
    "arch": lambda value: isinstance(value, str),
    "class_names": lambda value: isinstance(value, list) and value != [] and all(isinstance(n, str) for n in value),
    "input_size": lambda value: _are_numbers(value, (3,)) and all(isinstance(n, int) and n > 0 for n in value),
    "mean": lambda value: _are_numbers(value, (1, 3)),
    "std": lambda value: _are_numbers(value, (1, 3)) and all(n > 0 for n in value),
    "interpolation": lambda value: isinstance(value, str),
    "crop_pct": lambda value: _are_numbers([value], (1,)) and value > 0,
    "crop_mode": lambda value: value is None or isinstance(value, str),
}
OPTIONAL: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "preprocess": (False, lambda value: isinstance(value, bool)),
    "thresholds": ([], lambda value: isinstance(value, list) and _are_numbers(value, (len(value),))),
    "temperature": (1.0, lambda value: _are_numbers([value], (1,)) and value > 0),
}


def _read_about(path: Path, told: Mapping[str, str]) -> dict[str, Any]:
    """What a file says of itself, in JSON by key, after checking that it says all that is needed."""
    if absent := [key for key in FORMS if key not in told]:
        raise RunError(
            f"{path} does not tell its {some(absent)}, so what it takes and gives is unknown; `convmlp export` writes "
            "files that do"
        )
    forms = FORMS | {key: form for key, (_, form) in OPTIONAL.items() if key in told}
    values: dict[str, Any] = {key: value for key, (value, _) in OPTIONAL.items()}
    for key, form in forms.items():
        try:
            values[key] = json.loads(told[key])
            right = form(values[key])
        except (ValueError, RecursionError):
            right = False
        if not right:
            raise RunError(f"{path} cannot be used: its {key} is {told[key]!r:.80}")
    if len(values["thresholds"]) not in (0, len(values["class_names"])):
        raise RunError(f"{path} contradicts itself: it has thresholds, but not one for each class")
    names = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return values | {"data_config": {name: values.pop(name) for name in names}}


def _are_numbers(value: Any, lengths: tuple[int, ...]) -> bool:
    return (
        isinstance(value, list)
        and len(value) in lengths
        and all(isinstance(n, (int, float)) and math.isfinite(n) for n in value)
    )
