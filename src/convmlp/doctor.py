"""Diagnosis of an installation: what is there, whether it works together, and how to fix it. `convmlp doctor`."""

import argparse
import importlib
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from .common.command import Verb
from .common.errors import one_line
from .common.packages import module_of

PACKAGE = "convmlp"
GROUPS = {
    "timm": "training classifiers",
    "tools": "predict, visualize, export",
    "openmmlab": "detection and segmentation",
}
# Packages that provide the same modules
RIVALS = {
    "onedl-mmcv": ("mmcv", "mmcv-lite", "mmcv-full"),
    "onedl-mmengine": ("mmengine", "mmengine-lite"),
    "onedl-mmdetection": ("mmdet",),
    "onedl-mmsegmentation": ("mmsegmentation",),
}
GOOD, MISSING, BROKEN = "ok", "missing", "BROKEN"
UNFIT = "unfit"  # installed, but not in a required version


class Finding(NamedTuple):
    """One check: its subject, its state ("ok", "missing", "unfit" or "BROKEN"), the details, and the fix.

    Missing and unfit packages matter only to users of their part; what is broken matters to everybody.
    """

    subject: str
    state: str
    detail: str
    fix: str = ""


def examine() -> Iterator[tuple[str, list[Finding]]]:
    """The parts of an installation in turn: the title, and its findings."""
    yield "machine", _machine()
    requirements = [Requirement(text) for text in metadata.requires(PACKAGE) or []]
    base = [r for r in requirements if "extra" not in str(r.marker)]
    yield "models", [*_packages(base), _try("torchvision works with this PyTorch", _use_torchvision)]
    for extra, purpose in GROUPS.items():
        own = [r for r in requirements if f'extra == "{extra}"' in str(r.marker) and r.name != PACKAGE]
        findings = _packages(own)
        if extra == "openmmlab" and not any(finding.state == MISSING for finding in findings):
            findings.append(_try("operators of mmcv", _operators))
        yield f"{purpose} [{extra}]", findings
    yield "published weights", _weights()


def _machine() -> list[Finding]:
    findings = [Finding("Python", GOOD, f"{platform.python_version()} on {platform.platform(terse=True)}")]
    try:
        import torch

        from .common.devices import resolve_amp_dtype
    except Exception as error:
        return [*findings, Finding("devices", BROKEN, f"PyTorch cannot be imported: {error}", "pip install torch")]
    devices = {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    devices["cpu"] = f"threads: {torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}"
    for device, description in devices.items():
        dtype = resolve_amp_dtype("auto", torch.device(device))
        amp = f"mixed precision in {str(dtype).removeprefix('torch.')}" if dtype else "float32 only"
        findings.append(Finding(device, GOOD, f"{description}; {amp}"))
    if not torch.cuda.is_available() and torch.version.cuda and Path("/proc/driver/nvidia").exists():
        detail = f"an NVIDIA driver is installed, but PyTorch (CUDA {torch.version.cuda}) finds no GPU"
        findings.append(Finding("cuda", BROKEN, detail, "nvidia-smi  # is the driver new enough?"))
    return findings


def _packages(requirements: list[Requirement]) -> list[Finding]:
    """The packages of a part. If some are missing, the part is not in use, and an unfit version does no harm."""
    findings = [_package(requirement) for requirement in requirements]
    if any(finding.state == MISSING for finding in findings):
        return findings
    return [finding._replace(state=BROKEN) if finding.state == UNFIT else finding for finding in findings]


def _package(requirement: Requirement) -> Finding:
    """Whether a package is installed, in a required version, and can be imported."""
    name = requirement.name
    fix = f"pip install '{name}{requirement.specifier}'"
    rivals = {rival: found for rival in RIVALS.get(name, ()) if (found := _version(rival))}
    version = _version(name)
    if version and rivals:
        both = " ".join([name, *rivals])
        detail = f"{name} and {next(iter(rivals))} provide the same modules"
        return Finding(name, BROKEN, detail, f"pip uninstall -y {both} && {fix}")
    if rivals:
        name, version = next(iter(rivals.items()))
    elif not version:
        return Finding(name, MISSING, "", fix)
    elif not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, UNFIT, f"{version}, but {requirement.specifier} is needed", fix)
    module = module_of(requirement.name)
    if module in ("mmdet", "mmseg"):  # they need the operators, which are checked next
        return Finding(name, GOOD, version)

    def use() -> str:
        importlib.import_module(module)
        return version

    return _try(name, use, fix)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _try(subject: str, use: Callable[[], str], fix: str = "") -> Finding:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Finding(subject, GOOD, use())
        except Exception as error:  # whatever a broken installation raises
            return Finding(subject, BROKEN, one_line(f"{type(error).__name__}: {error}", 160), fix)


def _use_torchvision() -> str:
    import torch
    from torchvision.ops import nms

    nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    return "yes"


def _operators() -> str:
    """Whether mmdet and mmseg import, and where mmcv's operators come from."""
    logging.disable(logging.INFO)  # the finding says it
    try:
        for module in (f"{PACKAGE}.openmmlab", "mmcv.ops", "mmdet.models", "mmseg.models"):
            importlib.import_module(module)
    finally:
        logging.disable(logging.NOTSET)
    if getattr(sys.modules["mmcv._ext"], "__file__", None):
        return "compiled (mmcv._ext)"
    return "torchvision's instead of mmcv._ext: NMS, soft-NMS, RoIAlign, focal loss"


def _weights() -> list[Finding]:
    import torch

    from .zoo import VARIANTS, checkpoint_urls

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    findings = []
    for variant in VARIANTS:
        path = folder / checkpoint_urls(variant)[0].rpartition("/")[2]
        detail = f"{path}, {path.stat().st_size / 1e6:.0f} MB" if path.exists() else "downloaded when first used"
        findings.append(Finding(variant, GOOD, detail))
    if folder.exists() and not os.access(folder, os.W_OK):
        findings.append(Finding("cache", BROKEN, f"{folder} cannot be written", "export TORCH_HOME=..."))
    return findings


def _run(options: argparse.Namespace) -> int:
    states = set()
    for title, findings in examine():
        print(title)
        for subject, state, detail, fix in findings:
            hint = f"  ->  {fix}" if fix and state != GOOD else ""
            print(f"  {state:8}{subject:36}{detail}{hint}")
            states.add(state)
    if BROKEN in states:
        print("not healthy: see BROKEN above")
        return 1
    print("healthy:", "what is missing is needed only for its part" if states > {GOOD} else "everything is installed")
    return 0


VERB = Verb(
    "doctor", "Show what is installed, whether it works, and how to install what is missing.", lambda parser: None, _run
)
