"""Options of detection.py and segmentation.py; their names are those of mmdet's and mmseg's own scripts."""

import argparse
from pathlib import Path
from typing import Any

from mmengine.config import DictAction

from ..common.command import Parser
from ..common.configs import find_config
from ..common.errors import RunError

LAUNCHERS = ("auto", "none", "pytorch", "slurm", "mpi")
EXCLUSIVE = (("test", "resume", "check_data"), ("resume", "overwrite"), ("check_data", "skip_data_check"))


class _ConfigValues(DictAction):
    """KEY=VALUE pairs, of which mmengine's own action takes the form for granted."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        for text in values:
            if not text.partition("=")[0] or "=" not in text:
                parser.error(f"--cfg-options takes KEY=VALUE, got {text}; DATA stands behind the config")
        super().__call__(parser, namespace, values, option_string)


def build_parser(script: str) -> Parser:
    """The options with their help texts; `--help` of it is the manual."""
    parser = Parser(
        prog=script,
        usage="%(prog)s CONFIG [DATA] [options]",
        description="Train a model of mmdet or mmseg with a ConvMLP backbone, or test it.",
        surplus="there is one DATA folder, behind the config; got another: {}",
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a config file, or the name of one of `convmlp configs`")
    add("data", nargs="?", metavar="DATA", help="root of the data set, in place of the config's data_root")

    add = parser.add_argument_group("what to do").add_argument
    add("--test", metavar="CHECKPOINT", help="evaluate this checkpoint instead of training")
    add("--check-data", action="store_true", help="only check the data set, all of it, and report its classes")
    add("--resume", nargs="?", const="auto", metavar="FILE", help="continue from FILE, or the run's newest checkpoint")
    add("--overwrite", action="store_true", help="replace an earlier run in the work folder")
    add("--work-dir", metavar="DIR", help="folder for checkpoints and logs; by default output/CONFIG")
    add("--show-dir", metavar="DIR", help="draw predictions into DIR: of --test, or of the best checkpoint at the end")

    add = parser.add_argument_group("data").add_argument
    add(
        "--classes",
        default="auto",
        metavar="auto|config|FILE",
        help="auto: those of the annotation file, or of DATA/classes.txt for label maps, where they differ from the "
        "config's; FILE: a text file with one name a line",
    )
    add("--reduce-zero-label", action="store_true", help="own label maps: 0 is left out, and the first class is 1")
    add("--skip-data-check", action="store_true", help="start without checking the data set")

    add = parser.add_argument_group("training").add_argument
    add("--amp", action="store_true", help="mixed precision: float16 on GPUs, bfloat16 on CPUs that have it")
    add("--auto-scale-lr", action="store_true", help="scale the learning rate from the recipe's batch to this run's")
    add("--seed", type=int, metavar="N", help="seed of all random numbers; by default the config's")
    add("--deterministic", action="store_true", help="deterministic operators where there are, at some cost in speed")
    add("--tensorboard", action="store_true", help="also log for TensorBoard (pip install tensorboard)")
    add(
        "--cfg-options",
        nargs="+",
        action=_ConfigValues,
        default={},
        metavar="KEY=VALUE",
        help="change config values: optim_wrapper.optimizer.lr=2e-4 train_dataloader.batch_size=4",
    )
    add("--trust-checkpoint", action="store_true", help="read checkpoints by pickle, which may run code in them")
    add("--launcher", choices=LAUNCHERS, default="auto", help="who started the processes; auto asks the environment")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # set by launchers older than torchrun
    return parser


def parse_options(argv: list[str], script: str) -> argparse.Namespace:
    """Options from the command line.

    Raises:
        RunError: an unknown option (the nearest is offered), a bad value, or options that exclude each other.
    """
    parser = build_parser(script)
    options = parser.parse(argv)
    task = Path(script).stem if script in ("detection.py", "segmentation.py") else ""
    options.config = str(find_config(options.config, task))
    if options.resume and Path(options.resume).is_dir():
        raise RunError(f"--resume takes a file, got the folder {options.resume}; DATA stands behind the config")
    for name in ("test", "resume"):
        file = getattr(options, name)
        if file and file != "auto" and not Path(file).is_file():
            raise RunError(f"--{name}: no such file: {file}")
    if options.classes not in ("auto", "config") and not Path(options.classes).is_file():
        raise RunError(f"--classes: no such file: {options.classes}")
    for names in EXCLUSIVE:
        given = [_option(name) for name in names if getattr(options, name)]
        if len(given) > 1:
            raise RunError(f"give one of {' and '.join(given)}")
    for name in ("amp", "auto_scale_lr", "overwrite", "tensorboard"):
        if options.test and getattr(options, name):
            raise RunError(f"{_option(name)} is for training, not for --test")
    for name in ("work_dir", "show_dir"):
        folder = getattr(options, name)
        if folder and Path(folder).exists() and not Path(folder).is_dir():
            raise RunError(f"{_option(name)} is a folder, got the file {folder}")
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise RunError(f"--seed lies between 0 and {2**32 - 1}, got {options.seed}")
    return options


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
