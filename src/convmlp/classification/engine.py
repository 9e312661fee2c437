"""What classification.py does with its options: train, or evaluate a checkpoint."""

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ..common.devices import resolve_amp_dtype
from ..common.errors import RunError
from ..common.files import HOLDER, lock_folder, make_folder, remove_leftovers, was_restarted, write_atomically
from ..deploy import Tiered
from ..exported import Exported, kind_of, open_exported
from ..timm_models import check_source, load_weights
from ..weights import read_checkpoint
from .batches import seed_all
from .check import DUPLICATES
from .checkpoints import BEST, LAST, PREVIOUS, adopt_best, as_begun, find_newest, read_training_checkpoint, restore
from .data import ImageData, open_data
from .evaluation import evaluate, log_unreadable, make_predictions
from .finite import NONFINITE
from .history import choose_metric
from .loaders import UNCHANGED, make_loader
from .losses import build_loss, class_weights
from .models import build_model, resolve_data_config
from .options import parse_options
from .probe import ProbeTrainer
from .process import Process, start_process
from .progress import ExternalLogs
from .recipes import apply_recipe, fit_into_memory
from .report import WRITTEN, conclude
from .settings import Options
from .sources import check_classes, count_classes, open_source, relabel
from .split import SPLIT, divide
from .trainer import Trainer

_logger = logging.getLogger(__name__)

# What --eval takes from a checkpoint: the model and the images, not the machine or the training
EVALUATION_SETTINGS = {"model", "model_kwargs", "gp", "img_size", "in_chans", "mean", "std", "interpolation"}
EVALUATION_SETTINGS |= {"crop_pct", "crop_mode", "amp", "amp_dtype", "channels_last", "batch_size", "dataset"}
EVALUATION_SETTINGS |= {
    "train_split",
    "val_split",
    "val_share",
    "class_map",
    "multi_label",
    "input_key",
    "target_key",
    "val_num_samples",
}


def train(options: Options, argv: list[str]) -> None:
    """Train as the options in `argv` say, and leave the run in its folder.

    Raises:
        RunError, CheckpointError: a mistake in options, data or files, found before training wherever that is possible.
        Diverged: the loss or the weights are not finite; the last good checkpoint stays.
    """
    process = start_process(options.device)
    folder = run_folder(options)
    if process.gather(process.primary and was_restarted(folder))[0]:
        options = replace(options, resume="auto", overwrite=False)
    lock = lock_folder(folder) if process.primary and (folder / HOLDER).exists() else None
    resumed = _find_resumable(options, folder)
    if resumed:
        options = as_begun(options, resumed[1])
    ExternalLogs.check(options)
    data = open_data(options, process, resumed[0].parent if resumed else None)
    if options.recipe:
        options = apply_recipe(options, argv, data.train, process, resumed[1]["args"] if resumed else None)
    trainer = _build_trainer(options, process, folder, data, resumed[1] if resumed else None)
    if resumed:
        restore(trainer, *resumed)
    if not process.primary:
        trainer.run(None)
        conclude(trainer, data)
        return
    with lock or lock_folder(folder):
        remove_leftovers(folder)
        _claim_folder(folder, resumed[0] if resumed else None)
        settings = yaml.safe_dump(trainer.options.stored(), sort_keys=False)
        write_atomically(folder / "args.yaml", lambda temporary: temporary.write_text(settings))
        data.write(folder)
        trainer.run(ExternalLogs(trainer.options, folder))
        conclude(trainer, data)


def _build_trainer(
    options: Options, process: Process, folder: Path, data: ImageData, resumed: dict[str, Any] | None
) -> Trainer:
    """The model with its loss and its loaders; a resumed run keeps its metric and its batch."""
    n_classes = len(data.class_names)
    counts = count_classes(data.train, options, n_classes)
    criterion = build_loss(options, class_weights(options, data.class_names, counts))
    metric = choose_metric(options, counts, resumed)
    seed_all(options.seed, "initialisation")
    model = build_model(options, options, data.class_names, process).to(process.device)
    data_config = resolve_data_config(options, model)
    if options.recipe and not resumed:
        options = fit_into_memory(options, model, data_config, process)
    probes = options.recipe == "probe"  # without augmentation
    train_loader = make_loader(data.train, options, data_config, process, n_classes, train=not probes)
    val_loader = make_loader(data.val, options, data_config, process, n_classes, train=False)
    parts = (model, train_loader, val_loader, data.class_names, data_config, criterion, metric)
    return (ProbeTrainer if probes else Trainer)(options, process, folder, *parts)


def check_data(options: Options) -> None:
    """Look at the images, and say what was found; with --output also write duplicates.csv."""
    folder = run_folder(options)
    if options.output and _holds_run(folder):
        raise RunError(
            f"{folder} holds a run, which keeps its {SPLIT} and {DUPLICATES}; give another --experiment NAME"
        )
    process = start_process(options.device)
    data = open_data(options, process, None)
    if process.primary and data.findings:
        _logger.info(data.findings.table())
        if options.output:
            make_folder(folder)
            data.write(folder)


def evaluate_checkpoint(options: Options, argv: list[str]) -> None:
    """Evaluate the checkpoint of --eval, or what was exported from one, on the validation images; print and write what
    came out.

    Its own settings are the defaults of the options in `argv`.
    """
    path = str(options.eval)
    options, model, content = _open_evaluated(options, argv)
    kept: Any = content if isinstance(content, dict) else {}
    process = start_process(options.device)
    items = process.on_primary(lambda: divide(options, Path(path).parent / SPLIT))
    source = open_source(options, train=False, items=items)
    if isinstance(kept.get("class_names"), list):
        source = relabel(source, kept["class_names"], path)
        options = replace(options, num_classes=len(kept["class_names"]))
    class_names = check_classes(source, source, options)
    if model is None:
        model = build_model(replace(options, pretrained=False, initial_checkpoint=None), options, class_names, process)
        load_weights(model, content, path, options.use_ema, class_names, new_head=False)
    model = model.to(process.device)
    data_config = resolve_data_config(options, model)
    if kept.get("preprocess"):  # pixels as they are, and one image at a time, because their sizes differ
        options = replace(options, batch_size=1, validation_batch_size=None)
        data_config |= {"crop_mode": UNCHANGED, "mean": [0.0] * options.in_chans, "std": [1 / 255] * options.in_chans}
    loader = make_loader(source, options, data_config, process, len(class_names), train=False)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    predictions = make_predictions(options, loader)
    dtype = (resolve_amp_dtype(options.amp_dtype, process.device) if options.amp else None) or torch.float32
    as_it_is = process.distributed or isinstance(model, Exported)
    network = model if as_it_is else Tiered(model, loader.n_images, process.device, dtype, _logger.info)
    metrics = evaluate(network, loader, options, process, predictions)
    log_unreadable(loader, process)
    if process.primary:
        folder = run_folder(options)
        make_folder(folder)
        predictions.write(folder, class_names, data_config)
        _logger.info(predictions.table(class_names))
        _logger.info(f"{path}: {predictions.figures_line(metrics)}\nimages and per_class.csv: {folder}")


def _open_evaluated(options: Options, argv: list[str]) -> tuple[Options, Exported | None, Any]:
    """The options with those of --eval below them, its model if it is an exported one, and what else it holds."""
    path = str(options.eval)
    chosen = any(argument.split("=")[0] == "--model" for argument in argv)
    if kind_of(path):
        if chosen:
            raise RunError(f"--model: {path} is a whole program, and needs none")
        model, about = open_exported(path)
        settings = {"in_chans": about["data_config"]["input_size"][0], "multi_label": bool(about["thresholds"])}
        return parse_options(argv, base=settings), model, about
    checkpoint: Any = read_checkpoint(path)
    args = checkpoint.get("args") if isinstance(checkpoint, dict) else None
    if isinstance(args, dict):
        settings = {key: value for key, value in args.items() if key in EVALUATION_SETTINGS}
        if not chosen:
            check_source(str(settings.get("model")), path)
        options = parse_options(argv, base=settings)
    return options, None, checkpoint


def run_folder(options: Options) -> Path:
    """--output/--experiment; an evaluation by default goes beside its checkpoint."""
    if options.eval and not options.output and not options.experiment:
        return Path(options.eval).parent / "eval"
    name = options.experiment or (Path(options.config).stem if options.config else options.model)
    return Path(options.output or "output") / name


def _find_resumable(options: Options, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to continue from, after making sure that no other run is overwritten unasked."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):  # before anything is created there
        raise RunError(f"cannot write to the output folder {folder}: {existing} is not a folder one may write into")
    if options.resume == "auto" and not options.overwrite:
        found = find_newest(folder)
        if found is None:
            _logger.info(f"nothing to resume in {folder}: a new run")
        return found
    source = Path(options.resume) if options.resume and options.resume != "auto" else None
    continues_there = source is not None and source.resolve().parent == folder.resolve()
    if _holds_run(folder) and not continues_there and not options.overwrite:
        raise RunError(
            f"{folder} holds a run; --resume auto continues it, --overwrite or --experiment NAME starts anew"
        )
    return (source, read_training_checkpoint(source)) if source else None


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (LAST, PREVIOUS, BEST))


def _claim_folder(folder: Path, resumed: Path | None) -> None:
    """Remove what an earlier run left, unless it is continued; bring what the one that is needs from its folder."""
    if resumed and resumed.resolve().parent == folder.resolve():
        return
    for name in (*WRITTEN, PREVIOUS, NONFINITE):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    if resumed:
        adopt_best(resumed, folder)
        if resumed.with_name(DUPLICATES).exists():
            shutil.copy(resumed.with_name(DUPLICATES), folder)
