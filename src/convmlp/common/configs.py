"""The configs that come with the package, by path or by name."""

import argparse
import shutil
from pathlib import Path

from .command import Verb
from .errors import RunError, plural, suggest
from .files import check_writable, write_atomically

BASES = "_base_"  # the folder of configs that others build on


def config_folder() -> Path:
    """Holds classification/, detection/ and segmentation/: in the installed package, else at the root of a checkout."""
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[3] / "configs"


def list_configs(task: str = "", bases: bool = False) -> list[Path]:
    """The configs of a task, or all, relative to their folder; with `bases` also those that only others build on."""
    folder = config_folder()
    files = sorted(file.relative_to(folder) for kind in ("py", "yml") for file in (folder / task).rglob(f"*.{kind}"))
    return [file for file in files if bases or BASES not in file.parts]


def find_config(name: str, task: str = "") -> Path:
    """The file of this name, else the config that comes with the package.

    Args:
        name: A path; or, for a config of the package, its name ('convmlp_s_imagenet') or the end of its path
            ('configs/classification/convmlp_s_imagenet.yml').
        task: Only among those of 'classification', 'detection' or 'segmentation'.

    Raises:
        RunError: neither exists; the message suggests the nearest name.
    """
    path = Path(name)
    try:
        if path.is_file():
            return path
    except (OSError, ValueError):  # the name is too long, or has a null byte
        pass
    ours = list_configs(task, bases=BASES in path.parts)
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    for file in ours:
        if parts and parts in (file.parts[-len(parts) :], file.with_suffix("").parts[-len(parts) :]):
            return config_folder() / file
    nearby = [str(file) for file in path.parent.glob("*")] if path.suffix else []
    known = [*nearby, *(file.stem for file in ours)]
    hint = suggest(name, known) or suggest(path.stem, known) or "; `convmlp configs` lists those of the package"
    raise RunError(f"no such config: {name}{hint}")


def title(config: Path) -> str:
    """The description of a config: its first comment that is not a command."""
    lines = (config_folder() / config).read_text(encoding="utf-8").splitlines()
    comments = [line.lstrip("# ") for line in lines if line.startswith("#")]
    return next((comment for comment in comments if not comment.startswith("./")), "")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="with --copy: only this config")
    parser.add_argument("--copy", metavar="PATH", help="into this new folder, or with NAME into this new file")


def _run(options: argparse.Namespace) -> None:
    if options.copy is None:
        if options.name:
            raise RunError(f"where should {options.name} be copied to? convmlp configs {options.name} --copy FILE")
        configs = list_configs()
        width = max(len(str(config)) for config in configs)
        for config in configs:
            print(f"{config!s:{width}}  {title(config)}")
        return
    destination = Path(options.copy)
    if destination.exists():
        raise RunError(f"{destination} exists: name a new {'file' if options.name else 'folder'}")
    if options.name:
        _copy_config(options.name, destination)
        print(f"copied to {destination}")
        return
    try:
        shutil.copytree(config_folder(), destination, ignore=shutil.ignore_patterns("__pycache__"))
    except OSError as error:
        raise RunError(f"cannot write {destination}: {error.strerror or error}") from error
    print(f"{plural(sum(file.is_file() for file in destination.rglob('*')), 'file')} copied to {destination}")


def _copy_config(name: str, destination: Path) -> None:
    """Copy one YAML config; what it builds on is found in the package."""
    config = find_config(name)
    if config.suffix == ".py":  # mmengine looks for the base of a config beside it
        raise RunError(f"{name} builds on configs beside it: `convmlp configs --copy DIR` copies them all")
    check_writable(destination)
    write_atomically(destination, lambda temporary: shutil.copyfile(config, temporary))


VERB = Verb("configs", "List the configs that come with the package, or copy them to change them.", _add_options, _run)
