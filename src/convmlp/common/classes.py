"""Names of classes and of the parts of a data set."""

from pathlib import Path

from .errors import RunError

# What people call the parts of a data set
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}


def read_class_names(path: str | Path, unique: bool = True) -> list[str]:
    """Class names from a text file, one a line. ImageNet's are not `unique`: two of its classes are called crane.

    Raises:
        RunError: it cannot be read, is empty, or has an empty line or a name twice.
    """
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read the class names in {path}: {getattr(error, 'strerror', error)}") from error
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise RunError(f"{path} must hold one class name a line, without empty lines")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if unique and repeated:
        raise RunError(f"{path} names {repeated[0]!r} more than once")
    return names
