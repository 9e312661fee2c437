"""Optional packages: which module each provides, and what to say if one is missing."""

import importlib.util

from .errors import RunError

# Packages whose module has another name
MODULES = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "ImageHash": "imagehash",
    "grad-cam": "pytorch_grad_cam",
    "onedl-mmcv": "mmcv",
    "onedl-mmengine": "mmengine",
    "onedl-mmdetection": "mmdet",
    "onedl-mmsegmentation": "mmseg",
}


def missing(*packages: str) -> list[str]:
    """Which of these packages are not installed."""
    return [name for name in packages if importlib.util.find_spec(module_of(name)) is None]


def need(what: str, *packages: str) -> None:
    """Make sure that packages are installed before they are used, or raise `RunError` with the pip line."""
    if absent := missing(*packages):
        raise RunError(f"{what} needs a missing package: {pip_line(*absent)}")


def pip_line(*packages: str) -> str:
    """The command that installs packages. OpenMMLab's go together, in the versions that the extra pins."""
    extras = ["'convmlp[openmmlab]'"] if any(name.startswith("onedl-") for name in packages) else []
    return " ".join(["pip install", *extras, *(name for name in packages if not name.startswith("onedl-"))])


def module_of(package: str) -> str:
    """The module that a package provides."""
    return MODULES.get(package, package.replace("-", "_"))


def package_of(module: str) -> str:
    """The package that provides a module."""
    return next((package for package, name in MODULES.items() if name == module), module)
