"""Training and evaluation of image classifiers, the package behind classification.py."""

from .engine import main

__all__ = ["main"]
