"""classification.py: what to do with the options, and how mistakes are told."""

import logging
import os
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from ..zoo import CheckpointError, read_checkpoint
from . import report
from .checkpoints import BEST, LAST, PREVIOUS, find_newest, read_training_checkpoint
from .evaluation import Details, evaluate, log_unreadable, write_details
from .loaders import make_loader, seed_all
from .models import create_model, load_weights, resolve_data_settings
from .options import RunError, parse_options, stored_options
from .process import Process, start_process
from .sources import check_classes, open_source
from .trainer import Diverged, Trainer

_logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """classification.py: exit code 0, 2 for a mistake in the call or the data, 1 for a run that failed."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("convmlp").setLevel(logging.INFO)
    try:
        options = parse_options(argv)
        if options.eval:
            checkpoint = read_checkpoint(options.eval)
            if isinstance(checkpoint, dict) and isinstance(checkpoint.get("args"), dict):
                options = parse_options(argv, base=checkpoint["args"])
        process = start_process(options.device)
        if not process.primary:
            logging.getLogger("convmlp").setLevel(logging.ERROR)
        if options.eval:
            evaluate_checkpoint(options, process)
        else:
            train(options, process)
        return 0
    except (RunError, CheckpointError) as error:
        _complain(f"error: {error}")
        return 2
    except Diverged as error:
        _complain(str(error))
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _complain(message: str) -> None:
    rank = int(os.environ.get("RANK", 0))
    if rank:  # an error of all processes is shown once: by the first, whose end ends the others in this time
        time.sleep(5)
        message = f"process {rank}: {message}"
    print(f"classification.py: {message}", file=sys.stderr)


def train(options: Namespace, process: Process) -> None:
    """Train as the options say, and leave the run in its folder.

    Raises:
        RunError, CheckpointError: a mistake in options, data or files, found before training wherever that is possible.
        Diverged: the loss or the weights are not finite; the last good checkpoint stays.
    """
    folder = run_folder(options)
    resumed = _find_resumable(options, folder)
    train_source, val_source = open_source(options, train=True), open_source(options, train=False)
    class_names = check_classes(train_source, val_source, options)
    options.num_classes = len(class_names)
    seed_all(options.seed, "initialisation")
    model = create_model(options, process).to(process.device)
    data_config = resolve_data_settings(options, model)
    trainer = Trainer(
        options,
        process,
        folder,
        model,
        make_loader(train_source, options, data_config, process, train=True),
        make_loader(val_source, options, data_config, process, train=False),
        class_names,
        data_config,
    )
    if resumed:
        trainer.load(*resumed)
    if process.primary:
        _claim_folder(folder, keep=bool(resumed))
        (folder / "args.yaml").write_text(yaml.safe_dump(stored_options(options), sort_keys=False))
    trainer.run()


def evaluate_checkpoint(options: Namespace, process: Process) -> None:
    """Evaluate the checkpoint of --eval on the validation images; print and write what came out."""
    source = open_source(options, train=False)
    class_names = check_classes(source, source, options)
    options.num_classes = len(class_names)
    model = create_model(Namespace(**{**vars(options), "pretrained": False, "initial_checkpoint": None}), process)
    load_weights(model, options.eval, options.use_ema, new_head=False)
    model = model.to(process.device)
    data_config = resolve_data_settings(options, model)
    loader = make_loader(source, options, data_config, process, train=False)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    details = Details(len(class_names), loader.n_images, data_config)
    metrics = evaluate(model, loader, options, process, details, desc="evaluating")
    folder = run_folder(options)
    if process.primary:
        _make_folder(folder)
        log_unreadable(loader)
        write_details(folder, details, class_names)
        _logger.info(report.per_class_table(details.confusion, class_names))
        _logger.info(
            f"{options.eval}: top-1 {metrics['top1']:.2f} %  top-5 {metrics['top5']:.2f} %  loss {metrics['loss']:.4f}"
            f"  on {details.confusion.sum()} images\npictures and per_class.csv: {folder}"
        )


def run_folder(options: Namespace) -> Path:
    """--output/--experiment; the experiment is by default the config's or the model's name."""
    name = options.experiment or (Path(options.config).stem if options.config else options.model)
    return Path(options.output) / (f"{name}-eval" if options.eval and not options.experiment else name)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"cannot write into the output folder {folder}: {error.strerror}") from error


def _find_resumable(options: Namespace, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to continue from, after making sure that no other run is overwritten unasked."""
    _make_folder(folder)
    if options.resume == "auto" and not options.overwrite:
        found = find_newest(folder)
        if found is None:
            _logger.info(f"nothing to resume in {folder}: a new run")
        return found
    source = Path(options.resume) if options.resume and options.resume != "auto" else None
    continues_there = source is not None and source.resolve().parent == folder.resolve()
    if (folder / LAST).exists() and not continues_there and not options.overwrite:
        raise RunError(
            f"{folder} holds a run; --resume auto continues it, --overwrite or --experiment NAME starts anew"
        )
    return (source, read_training_checkpoint(source)) if source else None


def _claim_folder(folder: Path, keep: bool) -> None:
    """Remove what an earlier run left, unless it is continued."""
    if not keep:
        for name in (LAST, PREVIOUS, BEST, "summary.csv"):
            (folder / name).unlink(missing_ok=True)
