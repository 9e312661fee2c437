"""Models made ready for inference: `prepare` for speed, `fold_batchnorm` alone for what goes to a file."""

from .backends import DTYPES, PACKAGES
from .files import About, describe
from .folding import fold_batchnorm
from .prepared import Prepared, fingerprint, load, prepare
from .tiered import FullBatches, Tiered

__all__ = [
    "DTYPES",
    "PACKAGES",
    "About",
    "FullBatches",
    "Prepared",
    "Tiered",
    "describe",
    "fingerprint",
    "fold_batchnorm",
    "load",
    "prepare",
]
