"""The machine that a run is on: its processes, and a CPU where the config expects GPUs."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import broadcast_object_list, init_dist, is_main_process
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.utils.dl_utils import set_multi_processing
from torch import nn

from ..common.devices import resolve_amp_dtype
from ..common.errors import RunError
from .configs import replace_sync_bn

# By launcher: where it tells a process its number, how many there are, and its number on this machine
ENVIRONMENT = {
    "pytorch": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
T = TypeVar("T")


def start_processes(launcher: str, cfg: Config) -> str:
    """Join the other processes of the run, if any: by nccl on GPUs, by gloo on CPUs.

    Returns:
        Who started the processes: none, pytorch (torchrun), slurm or mpi.

    Raises:
        RunError: the environment lacks what the launcher should have set, or there are too few GPUs.
    """
    if launcher == "auto":
        launcher = _find_launcher()
    if launcher == "none":
        return launcher
    settings = cfg.get("env_cfg", {})
    set_multi_processing(**settings.get("mp_cfg", {}), distributed=True)
    names = ENVIRONMENT[launcher]
    missing = [name for name in (*names, "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise RunError(f"--launcher {launcher}: the environment does not say {', '.join(missing)}")
    os.environ.update(zip(ENVIRONMENT["pytorch"], [os.environ[name] for name in names], strict=True))
    os.environ.setdefault("MASTER_PORT", "29500")
    if torch.cuda.is_available():
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise RunError(f"more processes on this machine than its {torch.cuda.device_count()} GPUs")
        init_dist("pytorch", **settings.get("dist_cfg", {}))
    else:
        dist.init_process_group("gloo")
    return launcher


def _find_launcher() -> str:
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return "pytorch"
    if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return "slurm"
    return "mpi" if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ else "none"


def on_main_process(work: Callable[[], T]) -> T:
    """Let the first process do it, and give its result, or its error, to all."""
    result: list[Any] = [None, None]
    if is_main_process():
        try:
            result[0] = work()
        except RunError as error:
            result[1] = type(error), str(error)
    broadcast_object_list(result)
    value, failure = result
    if failure:
        kind, message = failure
        raise kind(message)
    return value


def adapt_to_machine(cfg: Config, amp: bool) -> None:
    """What a config written for GPUs needs to run on this machine; `amp` asks for mixed precision."""
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        replace_sync_bn(cfg.model)
        wrapper = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
        wrapper["find_unused_parameters"] = cfg.get("find_unused_parameters", False)
        if cfg.launcher != "none":
            cfg.model_wrapper_cfg = cfg.get("model_wrapper_cfg") or wrapper

    optimization = cfg.get("optim_wrapper")  # a config to test need not have one
    if not optimization or not (amp or (not has_gpu and optimization.get("type") == "AmpOptimWrapper")):
        return
    if has_gpu:
        optimization.update(type="AmpOptimWrapper", loss_scale="dynamic")
        return
    for key in ("loss_scale", "dtype", "use_fsdp"):
        optimization.pop(key, None)
    if resolve_amp_dtype("auto", torch.device("cpu")):
        optimization.type = "AutocastOptimWrapper"
    else:
        optimization.type = "OptimWrapper"
        MMLogger.get_current_instance().warning(
            "mixed precision: this CPU has no bfloat16 of its own, the run stays in float32"
        )


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """Training steps in bfloat16 autocast; mmengine's AmpOptimWrapper, made for float16 on GPUs, refuses CPUs."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.device_type = get_device()

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast(self.device_type, torch.bfloat16):
            yield
