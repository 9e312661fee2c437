"""detection.py and segmentation.py: from the command line over a config to a run of mmengine."""

import errno
import importlib.util
import os
import re
import shlex
import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config, ConfigDict
from mmengine.dist import init_dist
from mmengine.logging import MMLogger
from mmengine.utils.dl_utils import set_multi_processing

from ..common.configs import find_config
from ..common.devices import resolve_amp_dtype
from ..common.errors import RunError, suggest
from ..common.files import lock_folder, remove_leftovers, was_restarted
from .checkpoints import find_checkpoints, newest_readable
from .datasets import Request, leaf_datasets, replace_root
from .options import parse_options
from .runner import CarefulRunner
from .survival import on_main_process

Prepare = Callable[[Config, Request], str]

DRAWN_PICTURES = 50
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # such errors often name no file

# Top-level keys that mmengine reads and a config need not have
RUNNER_KEYS = (
    *("auto_scale_lr", "compile", "channels_last", "custom_hooks", "efficient_conv_bn_eval", "experiment_name"),
    *("find_unused_parameters", "load_from", "log_level", "model_wrapper_cfg", "randomness", "sync_bn"),
)
OPTIONAL_OF_OPTIMIZERS = ("clip_grad", "paramwise_cfg")


def work(script: str, argv: list[str]) -> None:
    """Do what a command line of detection.py or segmentation.py asks for.

    Args:
        script: The name of the script, for messages.
        argv: The command line without it.

    Raises:
        RunError, Diverged, Stopped: see `common.command.run`, under which this runs.
    """
    warnings.filterwarnings("ignore", message="faster_coco_eval is not installed")  # nothing here asks for it
    with ExitStack() as held:
        options = parse_options(argv, script)
        cfg = load_config(options)
        launcher = start_processes(options.launcher, cfg)
        data = "labelmaps" if cfg.get("default_scope") == "mmseg" else "coco"
        prepare = import_module(f".{data}", __package__).prepare
        cfg = on_main_process(lambda: adapt_to_data(cfg, options, prepare))
        if options.check_data:
            return
        cfg.launcher = launcher
        adapt_to_machine(cfg, options.amp)
        cfg = on_main_process(lambda: choose_work(cfg, options, held))
        if options.test:
            build_runner(cfg).test()
        else:
            train(cfg, options, script)


def load_config(options: Namespace) -> Config:
    """The config with what the command line says about it.

    Raises:
        RunError: the config cannot be read, or --cfg-options names a key that nothing reads.
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
    randomness = {"seed": None, **cfg.get("randomness", {})}  # mmdet's own configs leave it out
    if options.seed is not None:
        randomness["seed"] = options.seed
    if options.deterministic:
        randomness["deterministic"] = True
    cfg.randomness = randomness
    if options.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise RunError(f"--auto-scale-lr: {options.config} has no auto_scale_lr.base_batch_size")
        cfg.auto_scale_lr.enable = True
    if options.tensorboard:
        if importlib.util.find_spec("tensorboard") is None:
            raise RunError("--tensorboard needs a package that is not there: pip install tensorboard")
        if "vis_backends" not in (cfg.get("visualizer") or {}):
            raise RunError(f"--tensorboard: {options.config} has no visualizer with vis_backends")
        cfg.visualizer.vis_backends = [*cfg.visualizer.vis_backends, dict(type="TensorboardVisBackend")]
    return cfg


def read_config(path: str) -> Config:
    """A config of mmengine, by path or, of those in the package, by name. It is a program, and runs.

    Raises:
        RunError: it is missing, no Python, or fails.
    """
    path = str(find_config(path))
    if Path(path).suffix != ".py":  # mmengine's YAML can name any function, and does not look like a program
        raise RunError(f"a config is a Python file, NAME.py, got {path}")
    try:
        cfg = Config.fromfile(path)
        cfg.get("model"), cfg.get("default_scope")  # may import, of a config in Python's own syntax
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"cannot read the config {path}: {type(error).__name__}: {reason}") from error
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


def start_processes(launcher: str, cfg: Config) -> str:
    """Join the other processes of the run, if any: by nccl on GPUs, by gloo on CPUs.

    Returns:
        Who started the processes: none, pytorch (torchrun), slurm or mpi.
    """
    if launcher == "auto":
        launcher = _find_launcher()
    if launcher == "none":
        return launcher
    environment = cfg.get("env_cfg", {})
    set_multi_processing(**environment.get("mp_cfg", {}), distributed=True)
    if launcher == "slurm":
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    elif launcher == "mpi":
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
    else:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    missing = [name for name in (*names, "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise RunError(f"--launcher {launcher}: the environment does not say {', '.join(missing)}")
    os.environ.update(zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), [os.environ[name] for name in names], strict=True))
    os.environ.setdefault("MASTER_PORT", "29500")
    if torch.cuda.is_available():
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise RunError(f"more processes on this machine than its {torch.cuda.device_count()} GPUs")
        init_dist("pytorch", **environment.get("dist_cfg", {}))
    else:
        dist.init_process_group("gloo")
    return launcher


def _find_launcher() -> str:
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return "pytorch"
    if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return "slurm"
    return "mpi" if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ else "none"


def adapt_to_data(cfg: Config, options: Namespace, prepare: Prepare) -> Config:
    """Files, classes and the check of the data set; what it found goes to standard output."""
    check = "none" if options.skip_data_check else "all" if options.check_data else "sample"
    request = Request(
        classes=options.classes,
        reduce_zero_label=options.reduce_zero_label,
        testing=bool(options.test),
        check=check,
    )
    table = prepare(cfg, request)
    if table:
        print(f"{table}\nThe data set is in order.")
    return cfg


def adapt_to_machine(cfg: Config, amp: bool) -> None:
    """What a config written for GPUs needs to run on this machine."""
    logger = MMLogger.get_current_instance()
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        replace_sync_bn(cfg.model)
        wrapper = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
        wrapper["find_unused_parameters"] = cfg.get("find_unused_parameters", False)
        if cfg.launcher != "none":
            cfg.model_wrapper_cfg = cfg.get("model_wrapper_cfg") or wrapper
    if not amp and (has_gpu or cfg.optim_wrapper.get("type") != "AmpOptimWrapper"):
        return
    if has_gpu:
        cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
        return
    for key in ("loss_scale", "dtype", "use_fsdp"):
        cfg.optim_wrapper.pop(key, None)
    if resolve_amp_dtype("auto", torch.device("cpu")):
        cfg.optim_wrapper.type = "AutocastOptimWrapper"
    else:
        cfg.optim_wrapper.type = "OptimWrapper"
        logger.warning("mixed precision: this CPU does not compute in bfloat16 by itself, the run stays in float32")


def replace_sync_bn(node: Any) -> None:
    """SyncBN needs GPUs."""
    if isinstance(node, dict):
        if node.get("type") == "SyncBN":
            node["type"] = "BN"
        for value in node.values():
            replace_sync_bn(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            replace_sync_bn(value)


def choose_work(cfg: Config, options: Namespace, held: ExitStack) -> Config:
    """Which checkpoint the run starts from, and what becomes of an earlier run in its folder.

    Args:
        cfg: The config.
        options: The command line.
        held: Keeps the lock of the folder.

    Raises:
        RunError: the work folder holds a run, and the command line does not say what to do with it; or one is at work.
    """
    logger = MMLogger.get_current_instance()
    folder = Path(cfg.work_dir)
    if options.test:
        cfg.load_from = options.test
        draw(cfg, options.show_dir)
        return cfg
    restarted = was_restarted(folder)
    held.enter_context(lock_folder(folder))
    remove_leftovers(folder)
    if restarted and (options.resume is None or find_checkpoints(folder)):
        logger.info("torchrun started the processes again: the run goes on from its newest checkpoint")
        options.resume = "auto"
    if options.resume == "auto":
        newest = newest_readable(folder, options.trust_checkpoint, logger)
        if newest is None and find_checkpoints(folder):
            raise RunError(f"no checkpoint in {folder} can be read; --overwrite starts anew")
        if newest is None:
            logger.info(f"nothing to resume in {folder}: the run starts from the beginning")
        else:
            cfg.load_from, cfg.resume = str(newest), True
    elif options.resume:
        if find_checkpoints(folder) and Path(options.resume).resolve().parent != folder.resolve():
            raise RunError(f"{folder} holds another run than {options.resume}: --work-dir DIR keeps them apart")
        cfg.load_from, cfg.resume = options.resume, True
    elif find_checkpoints(folder):
        if not options.overwrite:
            raise RunError(f"{folder} holds a run: --resume continues it, --overwrite replaces it, or --work-dir DIR")
        for path in [*find_checkpoints(folder), *folder.glob("best_*.pth"), *folder.glob("last_checkpoint")]:
            path.unlink()
    if cfg.get("load_from") and "init_cfg" in cfg.model.get("backbone", {}):
        cfg.model.backbone.init_cfg = None  # the checkpoint has these weights, and the file may be out of reach
    return cfg


def draw(cfg: Config, folder: str | None) -> None:
    """Let the test draw its predictions, of a few pictures from all over the data set, into a folder."""
    if folder:
        hook = dict(type="DrawPredictions", folder=str(Path(folder).resolve()), limit=DRAWN_PICTURES)
        cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), hook]


def build_runner(cfg: Config) -> CarefulRunner:
    """The runner of a config.

    Raises:
        RunError: the config says something that its libraries do not understand.
    """
    try:
        return CarefulRunner.from_cfg(cfg)
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise RunError(f"{cfg.filename} cannot be built: {error}") from error


def train(cfg: Config, options: Namespace, script: str) -> None:
    """Train, and say at the end where the best checkpoint is and how to test it."""
    runner = build_runner(cfg)
    names = next(iter(leaf_datasets(cfg).values()), ConfigDict()).get("metainfo", {}).get("classes")
    if names:
        runner.logger.info(f"{len(names)} classes: {', '.join(names)}")
    folder = Path(runner.work_dir)
    try:
        runner.train()
    except AssertionError as error:  # mmcv's
        unreadable = re.findall("failed to load image: (.*)", str(error))  # of a worker, its traceback quotes the code
        if not unreadable:
            raise
        message = f"cannot read the picture {unreadable[-1]}; --check-data names all such; {runner.way_on}"
        raise RunError(message) from error
    except OSError as error:
        inside = error.filename and folder in Path(str(error.filename)).absolute().parents
        if not inside and (error.filename or error.errno not in FULL):
            raise
        raise RunError(f"cannot write {error.filename or folder}: {error.strerror}; {runner.way_on}") from error
    best = runner.message_hub.runtime_info.get("best_ckpt")
    if best:
        checkpoint = folder / Path(best).name  # the folder may have moved since
        runner.logger.info(f"best: {runner.message_hub.get_info('best_score'):.4g}, {checkpoint}")
    elif find_checkpoints(folder):
        checkpoint = find_checkpoints(folder)[0]
        runner.logger.warning(f"no validation gave a score, so there is no best checkpoint; the last: {checkpoint}")
    else:
        return
    if cfg.get("test_dataloader") is None:
        return
    config = folder / Path(cfg.filename).name  # everything that the command line said is in there
    command = ["python", script, str(config), "--classes", "config", "--test", str(checkpoint), "--show-dir"]
    runner.logger.info(f"test it: {shlex.join(command)} pictures")
    if options.show_dir:
        test = cfg.copy()
        test.load_from, test.resume = str(checkpoint), False
        draw(test, options.show_dir)
        build_runner(test).test()
