"""Devices: how one is chosen, and which dtype mixed precision uses on it."""

import ctypes
import os
import re
import sys
from contextlib import nullcontext
from typing import Any

import torch

from .errors import RunError, plural


def choose_device(name: str) -> torch.device:
    """'auto' (cuda, else mps, else cpu) or a device by name; raises `RunError` if this machine has no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"(cuda|mps|cpu)(:\d+)?", name):
        raise RunError(f"unknown --device {name}; auto, cuda, mps or cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RunError(f"--device {name}: PyTorch finds no GPU here; --device auto takes what is there")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RunError(f"--device {name}: this machine has {plural(torch.cuda.device_count(), 'GPU')}, counted from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RunError("--device mps: PyTorch finds no MPS device here; --device auto takes what is there")
    return device


def count_cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_amp_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The dtype for mixed precision: bfloat16 if the device has it natively, else float16; None for float32."""
    if choice != "auto":
        return getattr(torch, choice)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
        return torch.bfloat16 if native else None
    return torch.bfloat16


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """Mixed precision, or nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def return_freed_memory() -> None:
    """Give the memory that was freed back to the system; glibc keeps it, as `common.launch` tells it to."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim:
            trim(0)
