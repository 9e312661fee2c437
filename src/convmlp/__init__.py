"""ConvMLP: Hierarchical Convolutional MLPs for Vision, as a library."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import ConvMLP
    from .zoo import convmlp_l, convmlp_m, convmlp_s

__version__ = "0.1.0"

__all__ = ["ConvMLP", "convmlp_l", "convmlp_m", "convmlp_s"]


def __getattr__(name: str) -> Any:
    """Import a name of the library when it is first asked for: `convmlp --help` does not wait for PyTorch."""
    if name in ("layers", "model", "zoo"):
        return import_module(f".{name}", __name__)
    if name in __all__:
        return getattr(import_module(".model" if name == "ConvMLP" else ".zoo", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
