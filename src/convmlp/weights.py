"""Weights: finding, downloading, reading and adapting checkpoints."""

import hashlib
import logging
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urlparse
from urllib.request import Request, url2pathname, urlopen

import torch

from .common.errors import CheckpointError
from .common.packages import package_of, pip_line
from .model import VARIANTS, ConvMLP
from .variations import PURE_MLPS, build

_logger = logging.getLogger(__name__)

FIRST_CONVS = ("tokenizer.block.0.weight", "tokenizer.projection.weight")  # of ConvMLP, of Pure-MLP

FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
WHOLE = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}

LARGEST_DOWNLOAD = 4 * 2**30  # bytes; the weights of ConvMLP-L take 0.17 GB, its training checkpoints 0.7
TIMEOUT = 30  # seconds without a byte from the server
CHUNK = 2**17  # bytes


def load_pretrained(
    model: ConvMLP, source: str | os.PathLike | Sequence[str], progress: bool = False, use_ema: bool = True
) -> None:
    """Load a checkpoint into a model, adapting what may differ and refusing everything else.

    Input channels are adapted (summed for one, repeated and rescaled otherwise). A head of another number of classes
    keeps the initialisation of the model, with a warning in the log. A model without head, or without final norm,
    leaves those of the file aside.

    Args:
        model: Any `ConvMLP`.
        source: A file (`torch.save` or safetensors; a bare state_dict, or a training checkpoint with `state_dict`
            and perhaps `state_dict_ema`), a URL, or URLs of the same file to try in turn.
        progress: Show a progress bar while downloading.
        use_ema: Prefer the averaged weights where the file has them.

    Raises:
        CheckpointError: the file cannot be had, is damaged or foreign, or its names or shapes differ from the model.
    """
    path = find_checkpoint(source, progress)
    on_meta = any(p.is_meta for p in model.parameters())
    if on_meta:
        model._set_head(model.num_classes, model.global_pool)  # a real one: the file may not fill it
    state_dict = extract_state_dict(read_checkpoint(path), use_ema, name=str(path))
    state_dict = adapt_state_dict(state_dict, model, name=str(path))
    if on_meta:  # a file in half precision is no reason for a model in half precision
        own = model.state_dict()
        state_dict = {key: tensor.to(own[key].dtype) for key, tensor in state_dict.items()}
    model.load_state_dict(state_dict, assign=on_meta)


def find_checkpoint(source: str | os.PathLike | Sequence[str], progress: bool = False) -> Path:
    """The local file behind a path, a URL, or URLs of the same file to try in turn, downloaded if need be.

    Raises:
        CheckpointError: it cannot be downloaded, or has another hash than its URL says, see `expected_hash`.
    """
    if not isinstance(source, (str, os.PathLike)):
        return download(source, progress)
    address = str(source)
    if address.startswith("file://"):
        path = Path(url2pathname(urlparse(address).path))
        if urldefrag(address).fragment and path.is_file():
            _check_hash(path, expected_hash(address))
        return path
    if "://" not in address:
        return Path(source)
    path = Path(urlparse(address).path)  # two files of the same name at two addresses get two names
    name = f"{path.stem[:100]}-{hashlib.sha256(address.encode()).hexdigest()[:8]}{path.suffix[:20]}"
    return download([address], progress, name)


def expected_hash(url: str) -> str:
    """The SHA-256 that a URL says its file has, or its beginning, or ''.

    It stands behind the URL as #sha256=HEX, or in the name as torch.hub has it: NAME-HEX.pth, eight digits or more.
    Decimal digits alone are taken for a date. Anything else behind the # raises `CheckpointError`.
    """
    address, fragment = urldefrag(url)
    if fragment:
        found = re.fullmatch(r"sha256=([0-9a-fA-F]{8,64})", fragment)
        if not found:
            raise CheckpointError(f"{url}: #{fragment} is not #sha256=HEX, the first 8 to all 64 digits of a SHA-256")
        return found[1].lower()
    found = re.search(r"-([0-9a-f]{8,64})\.\w+$", urlparse(address).path)
    return found[1] if found and not found[1].isdecimal() else ""


def _check_hash(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if not digest.hexdigest().startswith(expected):
        raise CheckpointError(f"{path} has the wrong SHA-256: expected {expected}, found {digest.hexdigest()}")


def download(urls: Sequence[str], progress: bool = False, name: str | None = None, folder: Path | None = None) -> Path:
    """The file behind the first URL that works, kept in `folder` (torch.hub's cache) under `name` (the URL's).

    A download is read before it takes its name in the cache, so that neither half a file nor the error page of a dead
    link is ever taken for a checkpoint; its hash is checked where the URL has one, see `expected_hash`. A process that
    is killed leaves a file that ends in .part. torch.hub's own download knows neither a limit nor a time-out, and takes
    a broken connection for the end of the file.

    Raises:
        CheckpointError: no URL works; why, for each of them.
    """
    folder = folder or Path(torch.hub.get_dir()) / "checkpoints"
    target = folder / (name or Path(urlparse(urls[0]).path).name)
    if target.exists():
        return target
    failures = []
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    for url in urls:
        try:
            expected = expected_hash(url)
            folder.mkdir(parents=True, exist_ok=True)
            _fetch(url, partial, progress)
            _check_hash(partial, expected)
            read_checkpoint(partial, target.suffix)
            os.replace(partial, target)
            return target
        except (OSError, HTTPException, ValueError, CheckpointError) as error:
            failures.append(f"  {url}: {error}".replace(str(partial), "what it sent"))
        finally:
            partial.unlink(missing_ok=True)
    raise CheckpointError(
        "\n".join(["could not download the weights:", *failures, f"Put the file by hand at {target}"])
    )


def _fetch(url: str, path: Path, progress: bool) -> None:
    """Write what a URL sends, or raise `CheckpointError` if it is too large or breaks off."""
    request = Request(url, headers={"User-Agent": "torch.hub"})  # some servers refuse Python's own name
    with urlopen(request, timeout=TIMEOUT) as answer, path.open("wb") as file:
        length = getattr(answer, "length", None)
        if (length or 0) > LARGEST_DOWNLOAD:
            raise CheckpointError(f"it announces {length} bytes, the limit for downloads is {LARGEST_DOWNLOAD}")
        size = 0
        with torch.hub.tqdm(total=length, disable=not progress, unit="B", unit_scale=True, unit_divisor=1024) as bar:
            while chunk := answer.read(CHUNK):
                size += len(chunk)
                if size > LARGEST_DOWNLOAD:
                    raise CheckpointError(f"it sends more than {LARGEST_DOWNLOAD} bytes, the limit for downloads")
                file.write(chunk)
                bar.update(len(chunk))
    if length is not None and size < length:
        raise CheckpointError(f"the connection broke off after {size} of {length} bytes")


def read_checkpoint(path: str | os.PathLike, suffix: str | None = None) -> Any:
    """The content of a checkpoint on the CPU, by safetensors or `torch.load(weights_only=True)`: no code runs.

    Args:
        path: A file.
        suffix: That of its final name, if it has another one for now.

    Raises:
        CheckpointError: it is missing, damaged, a TorchScript archive, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not os.path.isfile(path):  # Path.is_file fails on a name that is too long
        raise CheckpointError(f"no such checkpoint: {path}")
    try:
        if (suffix or path.suffix) == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickles, before they are refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{path} needs a missing package: {pip_line(package_of(error.name or ''))}") from error
    except Exception as error:  # a damaged pickle raises at least nine exception types
        reasons = "is truncated, not a checkpoint, or holds more than tensors and plain values"
        raise CheckpointError(f"{path} {reasons} ({type(error).__name__})") from error


def _check_archive(path: Path) -> None:
    """What torch.load does not look at: checksums, and whether a small file claims to be a huge one."""
    with zipfile.ZipFile(path) as archive:
        files = archive.infolist()
        if any(file.filename.endswith("/constants.pkl") for file in files):
            raise CheckpointError(f"{path} is a TorchScript archive, a program; give the checkpoint it was made of")
        if sum(file.file_size for file in files) > path.stat().st_size:  # torch.save compresses nothing
            raise CheckpointError(f"{path} is compressed, which no checkpoint is: it may unpack to any size")
        damaged = archive.testzip()
    if damaged:
        raise CheckpointError(f"{path} is damaged: wrong checksum in {damaged}")


def extract_state_dict(checkpoint: Any, use_ema: bool = True, name: str = "the checkpoint") -> dict[str, torch.Tensor]:
    """The weights in a bare state_dict or a training checkpoint, without the prefixes of DDP and torch.compile."""
    state_dict = checkpoint
    if isinstance(checkpoint, Mapping):
        for key in ("state_dict_ema", "state_dict", "model"):
            if isinstance(checkpoint.get(key), Mapping) and (use_ema or key != "state_dict_ema"):
                state_dict = checkpoint[key]
                break
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state_dict.items()
    ):
        raise CheckpointError(f"{name} holds no weights: neither a state_dict nor a training checkpoint")
    keys = [key.replace("_orig_mod.", "").removeprefix("module.") for key in state_dict]
    repeated = next((key for key, times in Counter(keys).items() if times > 1), None)
    if repeated is not None:
        raise CheckpointError(f"{name} holds {repeated} twice, with and without a prefix of DDP or torch.compile")
    return dict(zip(keys, state_dict.values(), strict=True))


def adapt_state_dict(
    state_dict: Mapping[str, torch.Tensor], model: ConvMLP, name: str = "the checkpoint"
) -> dict[str, torch.Tensor]:
    """Make a state_dict fit a model as `load_pretrained` describes, or raise `CheckpointError`."""
    own = model.state_dict()
    adapted = dict(state_dict)
    for part in ("head", "norm"):
        if f"{part}.weight" not in own:
            adapted = {key: value for key, value in adapted.items() if not key.startswith(f"{part}.")}

    conv = next(iter(own))
    if conv in adapted and adapted[conv].ndim == 4 and adapted[conv].shape[1] and is_alike(adapted[conv], own[conv]):
        adapted[conv] = _adapt_in_chans(adapted[conv], own[conv].shape[1])

    head = adapted.get("head.weight")
    n_classes, width = head.shape if head is not None and head.ndim == 2 else (model.num_classes, model.num_features)
    new_head = n_classes != model.num_classes
    if new_head and width == model.num_features and "head.bias" in adapted:
        adapted["head.weight"], adapted["head.bias"] = own["head.weight"], own["head.bias"]

    differences = list_differences(adapted, own)
    if differences:
        fitting = fitting_variant(state_dict)
        hint = f". It fits {fitting}" if fitting else ""
        raise CheckpointError(f"{name} does not fit the model: {shorten(differences)}{hint}")
    if new_head:
        _logger.warning(
            f"{name} has {n_classes} classes, the model {model.num_classes}: the head starts from its initialisation"
        )
    return adapted


def list_differences(state_dict: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> list[str]:
    """What keeps a state_dict from filling a model whose own is `own`: names, shapes and types, in words."""
    shared = [key for key in own if key in state_dict]
    shapes = {key: (tuple(state_dict[key].shape), tuple(own[key].shape)) for key in shared}
    return [
        *(f"{key} is missing" for key in own if key not in state_dict),
        *(f"{key} is not in the model" for key in state_dict if key not in own),
        *(f"{key} is {found}, the model has {wanted}" for key, (found, wanted) in shapes.items() if found != wanted),
        *list_other_types(state_dict, own),
    ]


def list_other_types(state_dict: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> list[str]:
    """The tensors of a state_dict that would lose their numbers in those of `own`, or have none, in words."""

    def describe(tensor: torch.Tensor) -> str:
        layout = "" if tensor.layout == torch.strided else f"{tensor.layout} "
        return "without values" if tensor.is_meta else f"{layout}{tensor.dtype}".replace("torch.", "")

    return [
        f"{key} is {describe(state_dict[key])}, the model has {str(value.dtype).removeprefix('torch.')}"
        for key, value in own.items()
        if key in state_dict and state_dict[key].shape == value.shape and not is_alike(state_dict[key], value)
    ]


def is_alike(tensor: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether a tensor of a file may fill one of a model: both floating, in whatever precision, or both whole."""
    kinds = ({tensor.dtype, own.dtype} <= kind for kind in (FLOATING, WHOLE, {own.dtype}))
    return any(kinds) and tensor.layout == torch.strided and not tensor.is_meta


def shorten(differences: Sequence[str]) -> str:
    """The first three of many."""
    more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
    return "; ".join(differences[:3]) + more


def _adapt_in_chans(weight: torch.Tensor, in_chans: int) -> torch.Tensor:
    """(out, c, k, k) -> (out, in_chans, k, k), by timm's rule.

    The response to a grey image stays the same for one channel and multiples of c, and nearly so otherwise.
    """
    channels = weight.shape[1]
    if channels == in_chans:
        return weight
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, torch.arange(in_chans) % channels] * (channels / in_chans)


def fitting_variant(state_dict: Mapping[str, torch.Tensor]) -> str | None:
    """The variant a state_dict belongs to, whatever its head and input channels, or None."""
    shapes = _shapes(state_dict)
    return next((variant for variant, known in _known_shapes().items() if shapes == known), None)


@cache
def _known_shapes() -> dict[str, dict[str, torch.Size]]:
    with torch.device("meta"):
        return {name: _shapes(build(**settings).state_dict()) for name, settings in {**VARIANTS, **PURE_MLPS}.items()}


def _shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    """Of all but the head and the final norm; of the first convolution only its output, for any input channels."""
    body = {key: weight.shape for key, weight in weights.items() if not key.startswith(("norm.", "head."))}
    return {key: shape[:1] if key in FIRST_CONVS else shape for key, shape in body.items()}
