"""Training and evaluation of image classifiers, the package behind classification.py."""

import logging
import sys
from collections.abc import Sequence

from ..common.command import run
from .options import SCRIPT, parse_options


def main(argv: Sequence[str] | None = None) -> int:
    """classification.py; the exit codes are those of `common.command.run`."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("convmlp").setLevel(logging.INFO)
    way_on = "; --resume auto continues from the last checkpoint"
    return run(SCRIPT, lambda: _work(list(sys.argv[1:] if argv is None else argv)), way_on=way_on)


def _work(argv: list[str]) -> None:
    options = parse_options(argv)  # which ends here with --help, before PyTorch is imported
    from .engine import check_data, evaluate_checkpoint, train

    if options.check_data:
        check_data(options)
    elif options.eval:
        evaluate_checkpoint(options, argv)
    else:
        train(options, argv)
