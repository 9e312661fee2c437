"""The command `convmlp`, and the entry point of detection.py and segmentation.py."""

import argparse
import io
import logging
import os
import sys
from importlib import import_module

from . import __version__, doctor, train
from .common import configs
from .common.command import Parser, Verb, run
from .common.errors import RunError, suggest
from .use import commands

EXIT_CODES = "exit codes: 0 done, 1 some images were left out, 2 an error you can fix, 3 a bug"


def _add_completion_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"])


def _print_completion(options: argparse.Namespace) -> None:
    import shtab

    print(shtab.complete(build_parser(), options.shell))


COMPLETION = Verb(
    "completion", "Print the shell completion for this command.", _add_completion_options, _print_completion
)
VERBS = {verb.name: verb for verb in (train.VERB, *commands.VERBS, configs.VERB, doctor.VERB, COMPLETION)}


def build_parser() -> Parser:
    """The verbs with their options; `--help` of each is its manual."""
    description = "Train ConvMLP, or any model of timm, on your images, and use it: predict, visualise, export."
    parser = Parser(prog="convmlp", description=description, epilog=EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"convmlp {__version__}")
    parsers = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for verb in VERBS.values():
        sub = parsers.add_parser(verb.name, help=verb.help, description=verb.help, surplus=verb.surplus)
        sub.set_defaults(run=verb.run, parser=sub)
        sub.add_argument("--debug", action="store_true", help="show where an error comes from")
        verb.add_options(sub)
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command `convmlp`; without a verb it prints its help."""
    argv = sys.argv[1:] if argv is None else argv
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be anything
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each of its ten attempts
    return run("convmlp", lambda: _work(argv), debug="--debug" in argv)


def _work(argv: list[str]) -> int | None:
    if argv and not argv[0].startswith("-") and argv[0] not in VERBS:
        raise RunError(f"unknown verb {argv[0]}{suggest(argv[0], VERBS) or '; choose from ' + ', '.join(VERBS)}")
    if argv[:1] == [train.VERB.name]:
        train.train(argv[1:])  # its options are those of the program that it starts
    parser = build_parser()
    options = parser.parse(argv)
    if options.verb is None:
        parser.print_help()
        return None
    code = options.run(options)
    sys.stdout.flush()  # a closed pipe is noticed here
    return code


def run_openmmlab(script: str, argv: list[str] | None = None) -> int:
    """detection.py or segmentation.py: `convmlp.openmmlab` needs mmengine from its first import on."""
    argv = sys.argv[1:] if argv is None else argv
    way_on = "; --resume continues from the last checkpoint"
    return run(script, lambda: import_module("convmlp.openmmlab.engine").work(script, argv), way_on=way_on)
