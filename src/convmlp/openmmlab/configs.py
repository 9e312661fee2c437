"""Configs of mmengine: reading, and changing them as the command line and the data ask."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from ..common.configs import find_config
from ..common.errors import RunError, one_line, suggest
from ..common.packages import need

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
# Top-level keys that mmengine reads and a config need not have
RUNNER_KEYS = (
    *("auto_scale_lr", "compile", "channels_last", "custom_hooks", "efficient_conv_bn_eval", "experiment_name"),
    *("find_unused_parameters", "load_from", "log_level", "model_wrapper_cfg", "randomness", "sync_bn"),
)
OPTIONAL_OF_OPTIMIZERS = ("clip_grad", "paramwise_cfg")


def read_config(path: str) -> Config:
    """A config of mmengine, by path or, of those in the package, by name. It is a program, and runs.

    Raises:
        RunError: it is missing, not Python, or fails.
    """
    path = str(find_config(path))
    if Path(path).suffix != ".py":  # mmengine's YAML can name any function, and does not look like a program
        raise RunError(f"a config must be a Python file, NAME.py, got {path}")
    try:
        cfg = Config.fromfile(path)
        cfg.get("model"), cfg.get("default_scope")  # may import, of a config in Python's own syntax
    except Exception as error:
        raise RunError(f"cannot read the config {path}: {type(error).__name__}: {one_line(error)}") from error
    return cfg


def load_config(options: Namespace) -> Config:
    """The config of a run, changed as the command line says.

    Raises:
        RunError: the config cannot be read, or lacks what an option needs; --cfg-options names a key that nothing
            reads; DATA is not a folder.
    """
    cfg = read_config(options.config)
    for key in ("model", "test_dataloader") if options.test else ("model", "train_dataloader", "optim_wrapper"):
        if cfg.get(key) is None:
            raise RunError(f"{options.config} has no {key}: it is not the config of a model to train or test")
    for key in options.cfg_options:
        _check_key(cfg, key)
    try:
        cfg.merge_from_dict(options.cfg_options)
    except (KeyError, TypeError, IndexError) as error:
        raise RunError(f"--cfg-options: {error}") from error
    if options.data:
        replace_root(cfg, options.data)

    cfg.work_dir = options.work_dir or cfg.get("work_dir") or str(Path("output") / Path(options.config).stem)
    cfg.trust_checkpoint = options.trust_checkpoint
    cfg.randomness = {"seed": None, **cfg.get("randomness", {})}  # mmdet's own configs leave it out
    if options.seed is not None:
        cfg.randomness.seed = options.seed
    if options.deterministic:
        cfg.randomness.deterministic = True
    if options.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise RunError(f"--auto-scale-lr: {options.config} has no auto_scale_lr.base_batch_size")
        cfg.auto_scale_lr.enable = True
    if options.tensorboard:
        need("--tensorboard", "tensorboard")
        if "vis_backends" not in (cfg.get("visualizer") or {}):
            raise RunError(f"--tensorboard: {options.config} has no visualizer with vis_backends")
        cfg.visualizer.vis_backends = [*cfg.visualizer.vis_backends, dict(type="TensorboardVisBackend")]
    return cfg


def _check_key(cfg: Config, key: str) -> None:
    """A --cfg-options key must lead to something: only its last part may be new, and that not at the top."""
    node: Any = cfg
    *path, last = key.split(".")
    for part in path:
        if isinstance(node, (list, tuple)) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, (dict, Config)) and part in node:
            node = node[part]
        elif path[0] == "optim_wrapper" and part in OPTIONAL_OF_OPTIMIZERS:
            return
        else:
            known = list(node) if isinstance(node, (dict, Config)) else []
            raise RunError(f"--cfg-options {key}: the config has no {part!r} there{suggest(part, map(str, known))}")
    if not path and last not in node and last not in RUNNER_KEYS:
        raise RunError(f"--cfg-options: the config has no key {last!r}{suggest(last, [*map(str, node), *RUNNER_KEYS])}")


def leaf_datasets(cfg: Config) -> dict[str, ConfigDict]:
    """The data set of each loader, out of wrappers such as RepeatDataset.

    A loader of several data sets (ConcatDataset) is left out: nothing here can follow it.
    """
    found = {}
    for loader in LOADERS:
        dataset = (cfg.get(loader) or {}).get("dataset")
        while dataset is not None and "dataset" in dataset:
            dataset = dataset.dataset
        if dataset is not None and "datasets" not in dataset:
            found[loader] = dataset
    return found


def replace_root(cfg: Config, root: str) -> None:
    """Put `root` in the place of every data_root of the config, wherever a path starts with it.

    Raises:
        RunError: the config names no data_root, or there is no folder `root`.
    """
    if not Path(root).is_dir():
        raise RunError(f"no such data folder: {root}")
    roots = {cfg.get("data_root"), *(dataset.get("data_root") for dataset in leaf_datasets(cfg).values())}
    olds = sorted((old.rstrip("/") for old in roots if old), key=len, reverse=True)
    if not olds:
        raise RunError(f"{cfg.filename} names no data_root that DATA could replace")

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(replaced(item) for item in value)
        if isinstance(value, str):
            for old in olds:
                if f"{value}/".startswith(f"{old}/"):
                    return str(Path(root, value[len(old) :].lstrip("/")))
        return value

    for key in cfg:
        cfg[key] = replaced(cfg[key])


def nested_dicts(node: Any) -> Iterator[dict[str, Any]]:
    """All mappings in a part of a config, the outer ones first."""
    if isinstance(node, dict):
        yield node
    if isinstance(node, (dict, list, tuple)):
        for value in node.values() if isinstance(node, dict) else node:
            yield from nested_dicts(value)


def set_num_classes(model: Any, number: int) -> None:
    """Give every head of a model in a config this number of classes.

    Raises:
        RunError: a loss weighs another number of classes.
    """
    for node in nested_dicts(model):
        if "num_classes" in node and not str(node.get("type")).endswith("RPNHead"):
            node["num_classes"] = number
        weights = node.get("class_weight")
        if isinstance(weights, (list, tuple)) and len(weights) not in (number, number + 1):  # one for the background
            raise RunError(f"class_weight of a loss in the config has {len(weights)} values for {number} classes")


def replace_sync_bn(model: Any) -> None:
    """Make each SyncBN of a model in a config a BN: it needs GPUs."""
    for node in nested_dicts(model):
        if node.get("type") == "SyncBN":
            node["type"] = "BN"
