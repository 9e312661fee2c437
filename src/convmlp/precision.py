"""Mixed precision: which type a device computes in natively."""

from contextlib import nullcontext
from typing import Any

import torch


def resolve_amp_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The type for mixed precision: bfloat16 where the device has it natively, else float16; None: float32 alone."""
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
