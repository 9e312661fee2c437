"""The variants, where the published weights are, and how weights get into a model."""

import hashlib
import logging
import os
import zipfile
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch

from .errors import CheckpointError
from .model import ConvMLP

_logger = logging.getLogger(__name__)

# fmt: off
VARIANTS: dict[str, dict[str, Any]] = {
    "convmlp_s": dict(blocks=(2, 4, 2), dims=(128, 256, 512), mlp_ratios=(2, 2, 2), channels=64, n_conv_blocks=2),
    "convmlp_m": dict(blocks=(3, 6, 3), dims=(128, 256, 512), mlp_ratios=(3, 3, 3), channels=64, n_conv_blocks=3),
    "convmlp_l": dict(blocks=(4, 8, 3), dims=(192, 384, 768), mlp_ratios=(3, 3, 3), channels=96, n_conv_blocks=3),
}
# fmt: on

PURE_MLP = dict(conv_stage=False, conv_downsample=False, spatial_connect=False)
PURE_MLPS = {name.replace("conv", "pure_"): {**settings, **PURE_MLP} for name, settings in VARIANTS.items()}

MIRRORS = (
    "https://shi-labs.com/projects/convmlp/checkpoints/",
    "http://ix.cs.uoregon.edu/~alih/conv-mlp/checkpoints/",
)


def checkpoint_urls(variant: str, dataset: str = "imagenet") -> list[str]:
    """Where the published weights of a variant are: imagenet, cifar10, cifar100 or flowers102."""
    return [f"{mirror}{variant}_{dataset}.pth" for mirror in MIRRORS]


def convmlp_s(
    pretrained: bool | str | os.PathLike = False, progress: bool = False, classifier_head: bool = True, **kwargs: Any
) -> ConvMLP:
    """ConvMLP-S: 9.0 M parameters, 2.4 GMACs at 224x224.

    Args:
        pretrained: True for the published ImageNet-1k weights, or the path or URL of a checkpoint. It may differ
            from the model in classes (the head then starts afresh, which is logged), input channels, and head.
        progress: Show a progress bar while downloading.
        classifier_head: False for the bare backbone, see `ConvMLP`.
        **kwargs: Arguments of `ConvMLP`: num_classes, in_chans, drop_path_rate, ...

    Raises:
        CheckpointError: the weights cannot be downloaded, read, or do not fit.
        TypeError: unknown keyword.
    """
    return _create("convmlp_s", pretrained, progress, classifier_head=classifier_head, **kwargs)


def convmlp_m(
    pretrained: bool | str | os.PathLike = False, progress: bool = False, classifier_head: bool = True, **kwargs: Any
) -> ConvMLP:
    """ConvMLP-M: 17.4 M parameters, 3.9 GMACs at 224x224. Arguments as for `convmlp_s`."""
    return _create("convmlp_m", pretrained, progress, classifier_head=classifier_head, **kwargs)


def convmlp_l(
    pretrained: bool | str | os.PathLike = False, progress: bool = False, classifier_head: bool = True, **kwargs: Any
) -> ConvMLP:
    """ConvMLP-L: 42.7 M parameters, 9.9 GMACs at 224x224. Arguments as for `convmlp_s`."""
    return _create("convmlp_l", pretrained, progress, classifier_head=classifier_head, **kwargs)


def _create(variant: str, pretrained: bool | str | os.PathLike, progress: bool, **kwargs: Any) -> ConvMLP:
    if not isinstance(pretrained, (bool, str, os.PathLike)):
        raise TypeError(f"pretrained is True, False, a path or a URL, got {pretrained!r}")
    model = ConvMLP(**{**VARIANTS[variant], **kwargs})
    if pretrained is not False:
        load_pretrained(model, checkpoint_urls(variant) if pretrained is True else pretrained, progress)
    return model


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
    model.load_state_dict(state_dict, assign=on_meta)


def find_checkpoint(source: str | os.PathLike | Sequence[str], progress: bool = False) -> Path:
    """The local file behind a path, a URL, or URLs of the same file to try in turn, downloaded if need be."""
    if not isinstance(source, (str, os.PathLike)):
        return download(source, progress)
    if str(source).startswith("file://"):
        return Path(url2pathname(urlparse(str(source)).path))
    if "://" in str(source):
        return download([str(source)], progress, name=_cache_name(str(source)))
    return Path(source)


def _cache_name(url: str) -> str:
    """Two files of one name, at two addresses, are two files."""
    path = Path(urlparse(url).path)
    return f"{path.stem}-{hashlib.sha256(url.encode()).hexdigest()[:8]}{path.suffix}"


def download(urls: Sequence[str], progress: bool = False, name: str | None = None) -> Path:
    """The file behind the first URL that works, kept in torch.hub's cache under `name` (by default the URL's).

    A download is read before it takes its name in the cache, so that neither half a file nor the error page of a dead
    link is ever taken for a checkpoint.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    target = folder / (name or Path(urlparse(urls[0]).path).name)
    if target.exists():
        return target
    failures = []
    partial = target.with_name(f"{target.stem}.{os.getpid()}.part{target.suffix}")
    for url in urls:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(partial), progress=progress)
            read_checkpoint(partial)
            os.replace(partial, target)
            return target
        except (OSError, HTTPException, ValueError, CheckpointError) as error:
            failures.append(f"  {url}: {error}".replace(str(partial), "what it sent"))
        finally:
            partial.unlink(missing_ok=True)
    raise CheckpointError(
        "could not download the weights:\n" + "\n".join(failures) + f"\nPut the file by hand at {target}"
    )


def read_checkpoint(path: str | os.PathLike) -> Any:
    """The content of a checkpoint on the CPU, by safetensors or `torch.load(weights_only=True)`: no code runs."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load itself does not check the CRCs
            if damaged:
                raise CheckpointError(f"{path} is damaged: wrong checksum in {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{path} needs a missing package: pip install {error.name}") from error
    except Exception as error:  # a damaged pickle raises at least nine exception types
        raise CheckpointError(
            f"{path} is truncated, not a checkpoint, or holds more than tensors and plain values "
            f"({type(error).__name__})"
        ) from error


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
    return {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in state_dict.items()}


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
    if conv in adapted and adapted[conv].ndim == 4:
        adapted[conv] = _adapt_in_chans(adapted[conv], own[conv].shape[1])

    head = adapted.get("head.weight")
    new_head = head is not None and head.ndim == 2 and len(head) != model.num_classes
    if new_head:
        adapted["head.weight"], adapted["head.bias"] = own["head.weight"], own["head.bias"]

    differences = list_differences(adapted, own)
    if differences:
        fitting = fitting_variant(state_dict)
        hint = f". It fits {fitting}" if fitting else ""
        raise CheckpointError(f"{name} does not fit the model: {shorten(differences)}{hint}")
    if new_head:
        _logger.warning(
            f"{name} has {len(head)} classes, the model {model.num_classes}: the head starts from its initialisation"
        )
    return adapted


def list_differences(state_dict: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> list[str]:
    """What keeps a state_dict from filling a model whose own is `own`: names and shapes, in words."""
    differences = [f"{key} is missing" for key in own if key not in state_dict]
    differences += [f"{key} is not in the model" for key in state_dict if key not in own]
    differences += [
        f"{key} is {tuple(state_dict[key].shape)}, the model has {tuple(value.shape)}"
        for key, value in own.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]
    return differences


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
    repeats = -(-in_chans // channels)
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, repeats, 1, 1)[:, :in_chans] * (channels / in_chans)


def fitting_variant(state_dict: Mapping[str, torch.Tensor]) -> str | None:
    """The variant a state_dict belongs to, whatever its head and input channels, or None."""

    def shapes(weights: Mapping[str, torch.Tensor], first: str) -> dict[str, torch.Size]:
        return {k: v.shape for k, v in weights.items() if k != first and not k.startswith(("norm.", "head."))}

    with torch.device("meta"):
        for variant, settings in {**VARIANTS, **PURE_MLPS}.items():
            own = ConvMLP(**settings).state_dict()
            first = next(iter(own))
            if first in state_dict and shapes(own, first) == shapes(state_dict, first):
                return variant
    return None
