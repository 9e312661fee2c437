"""Training by one verb: `convmlp train`, the front of classification.py, detection.py and segmentation.py."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from .common.command import Parser, Verb, positive_int
from .common.configs import find_config
from .common.launch import launch
from .common.packages import need

COMMAND = "convmlp train"
DESCRIPTION = """convmlp train IMAGES trains a classifier on your own images, with settings chosen from the data.
convmlp train -c CONFIG [DATA] does what a config says: one of `convmlp configs`, or a file of yours. A .yml trains a
classifier, a .py a detector or segmentor. --processes N takes N GPUs. All further options are those below; for a
detector or segmentor, convmlp train -c CONFIG --help shows them."""


def train(argv: Sequence[str]) -> NoReturn:
    """Let the program that trains take the place of this one.

    Raises:
        RunError: there is no such config, or a package is missing.
    """
    parser = Parser(prog=COMMAND, add_help=False)
    _add_options(parser)
    options, words = parser.parse_known_args(argv)
    if {"-h", "--help"} & {*words}:
        print(DESCRIPTION, end="\n\n")
    config = find_config(options.config) if options.config else None
    if config and config.suffix == ".py":
        need(f"{COMMAND} -c {options.config}", "onedl-mmengine")
        launch(options.processes, ["-m", "convmlp.openmmlab", str(config), *words], CONVMLP_COMMAND=COMMAND)
    need(COMMAND, "timm")
    if config:
        words = ["-c", str(config), *words]
    elif not any(word.partition("=")[0] in ("--recipe", "--eval") for word in words):
        words = ["--recipe", "auto", *words]
    launch(options.processes, ["-m", "convmlp.classification", *words], CONVMLP_COMMAND=COMMAND)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", metavar="FILE|NAME")
    parser.add_argument("--processes", type=positive_int, default=1, metavar="N", help="one per GPU (1)")


# For help and completion; `cli` calls `train` itself, with all the words
VERB = Verb("train", "Train on your own images, or by a config.", _add_options, lambda options: None)
