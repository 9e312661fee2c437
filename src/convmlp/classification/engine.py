"""classification.py: what to do with the options, and how mistakes are told."""

import logging
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import yaml

from ..common.command import run
from ..common.errors import RunError
from ..common.files import HOLDER, lock_folder, make_folder, remove_leftovers, was_restarted, write_atomically
from ..timm_models import check_source, load_weights
from ..weights import read_checkpoint
from . import report
from .checkpoints import BEST, LAST, PREVIOUS, adopt_best, find_newest, read_training_checkpoint
from .evaluation import Details, evaluate, log_unreadable, write_details
from .loaders import make_loader, seed_all
from .models import create_model, resolve_data_settings
from .options import parse_options, stored_options
from .process import Process, start_process
from .sources import check_classes, open_source, relabel
from .trainer import ExternalLogs, Trainer

_logger = logging.getLogger(__name__)

SCRIPT = "classification.py"

# What --eval takes from a checkpoint: the model and the images, not the machine or the training
EVALUATION_SETTINGS = {"model", "model_kwargs", "gp", "img_size", "in_chans", "mean", "std", "interpolation"}
EVALUATION_SETTINGS |= {"crop_pct", "crop_mode", "amp", "amp_dtype", "channels_last", "batch_size", "dataset"}
EVALUATION_SETTINGS |= {"val_split", "class_map", "input_key", "target_key", "val_num_samples"}


def main(argv: list[str] | None = None) -> int:
    """classification.py; the exit codes are those of `common.command.run`."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("convmlp").setLevel(logging.INFO)
    way_on = "; --resume auto continues from the last checkpoint"
    return run(SCRIPT, lambda: _work(sys.argv[1:] if argv is None else argv), way_on=way_on)


def _work(argv: list[str]) -> None:
    options = parse_options(argv)
    if options.eval:
        checkpoint = read_checkpoint(options.eval)
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get("args"), dict):
            settings = {key: value for key, value in checkpoint["args"].items() if key in EVALUATION_SETTINGS}
            if not any(argument.split("=")[0] == "--model" for argument in argv):
                check_source(str(settings.get("model")), options.eval)
            options = parse_options(argv, base=settings)
    process = start_process(options.device)
    if not process.primary:
        logging.getLogger("convmlp").setLevel(logging.ERROR)
    if options.eval:
        evaluate_checkpoint(options, process, checkpoint)
    else:
        train(options, process)


def train(options: Namespace, process: Process) -> None:
    """Train as the options say, and leave the run in its folder.

    Raises:
        RunError, CheckpointError: a mistake in options, data or files, found before training wherever that is possible.
        Diverged: the loss or the weights are not finite; the last good checkpoint stays.
    """
    folder = run_folder(options)
    restarted = process.gather(process.primary and was_restarted(folder))[0]
    if restarted:
        options.resume, options.overwrite = "auto", False
    lock = lock_folder(folder) if process.primary and (folder / HOLDER).exists() else None
    resumed = _find_resumable(options, folder)
    with process.first_on_machine():
        train_source, val_source = open_source(options, train=True), open_source(options, train=False)
    class_names = check_classes(train_source, val_source, options)
    options.num_classes = len(class_names)
    seed_all(options.seed, "initialisation")
    model = create_model(options, process, class_names).to(process.device)
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
    if not process.primary:
        trainer.run(None)
        return
    with lock or lock_folder(folder):
        remove_leftovers(folder)
        logs = ExternalLogs(options, folder)
        _claim_folder(folder, resumed[0] if resumed else None)
        settings = yaml.safe_dump(stored_options(options), sort_keys=False)
        write_atomically(folder / "args.yaml", lambda temporary: temporary.write_text(settings))
        trainer.run(logs)


def evaluate_checkpoint(options: Namespace, process: Process, checkpoint: Any) -> None:
    """Evaluate the checkpoint of --eval, already read, on the validation images; print and write what came out."""
    source = open_source(options, train=False)
    names = checkpoint.get("class_names") if isinstance(checkpoint, dict) else None
    if isinstance(names, list):
        source = relabel(source, names, options.eval)
        options.num_classes = len(names)
    class_names = check_classes(source, source, options)
    options.num_classes = len(class_names)
    no_start = {"pretrained": False, "initial_checkpoint": None}
    model = create_model(Namespace(**vars(options) | no_start), process, class_names)
    load_weights(model, checkpoint, options.eval, options.use_ema, class_names, new_head=False)
    model = model.to(process.device)
    data_config = resolve_data_settings(options, model)
    loader = make_loader(source, options, data_config, process, train=False)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    details = Details(len(class_names), loader.n_images, data_config)
    metrics = evaluate(model, loader, options, process, details, desc="evaluating")
    log_unreadable(loader, process)
    folder = run_folder(options)
    if process.primary:
        make_folder(folder)
        write_details(folder, details, class_names)
        _logger.info(report.per_class_table(details.confusion, class_names))
        _logger.info(
            f"{options.eval}: top-1 {metrics['top1']:.2f} %  top-5 {metrics['top5']:.2f} %  loss {metrics['loss']:.4f}"
            f"  on {details.confusion.sum()} images\npictures and per_class.csv: {folder}"
        )


def run_folder(options: Namespace) -> Path:
    """--output/--experiment; an evaluation by default goes beside its checkpoint."""
    if options.eval and not options.output and not options.experiment:
        return Path(options.eval).parent / "eval"
    name = options.experiment or (Path(options.config).stem if options.config else options.model)
    return Path(options.output or "output") / name


def _check_folder(folder: Path) -> None:
    """The same before anything is created, as far as that can be told."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise RunError(f"cannot write into the output folder {folder}: {existing} is not a folder one may write into")


def _find_resumable(options: Namespace, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to continue from, after making sure that no other run is overwritten unasked."""
    _check_folder(folder)
    if options.resume == "auto" and not options.overwrite:
        found = find_newest(folder)
        if found is None:
            _logger.info(f"nothing to resume in {folder}: a new run")
        return found
    source = Path(options.resume) if options.resume and options.resume != "auto" else None
    continues_there = source is not None and source.resolve().parent == folder.resolve()
    holds_a_run = any((folder / name).exists() for name in (LAST, PREVIOUS, BEST))
    if holds_a_run and not continues_there and not options.overwrite:
        raise RunError(
            f"{folder} holds a run; --resume auto continues it, --overwrite or --experiment NAME starts anew"
        )
    return (source, read_training_checkpoint(source)) if source else None


def _claim_folder(folder: Path, resumed: Path | None) -> None:
    """Remove what an earlier run left, unless it is continued, and bring the best checkpoint of the one that is."""
    if resumed and resumed.resolve().parent == folder.resolve():
        return
    for name in (LAST, PREVIOUS, BEST, "summary.csv"):
        (folder / name).unlink(missing_ok=True)
    if resumed:
        adopt_best(resumed, folder)
