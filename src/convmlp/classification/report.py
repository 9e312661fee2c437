"""Report of a run: how its best checkpoint does on the validation images, as files and as a page."""

import json
import logging
import platform
from datetime import datetime, timezone
from typing import Any

from ..common.files import write_atomically
from ..weights import read_checkpoint
from .check import DUPLICATES, read_duplicates
from .checkpoints import BEST, LAST, versions, write_checkpoint
from .data import ImageData
from .evaluation import evaluate, log_unreadable, make_predictions
from .multilabel import LabelPredictions
from .page import draw_sheets, write_page
from .predictions import Predictions
from .sources import Source, count_classes
from .split import SPLIT
from .suspicious import SUSPICIOUS, Doubt, check_labels
from .tables import write_table
from .trainer import Trainer

_logger = logging.getLogger(__name__)

REPORT, FIGURES = "report.html", "report.json"
WRITTEN = [BEST, LAST, "summary.csv", "args.yaml", "curves.png", "confusion_matrix.png", "predictions.png"]
WRITTEN += ["per_class.csv", SPLIT, DUPLICATES, SUSPICIOUS, FIGURES, REPORT]
MOST_ROWS = 100  # of a list in the report; the CSV files and the log have all


def conclude(trainer: Trainer, data: ImageData) -> None:
    """Evaluate the best checkpoint in detail, and write what comes out; all processes take part."""
    folder, names, process = trainer.folder, trainer.class_names, trainer.process
    model = trainer.load_best()
    predictions = make_predictions(trainer.options, trainer.val_loader)
    metrics = evaluate(model, trainer.val_loader, trainer.options, process, predictions, desc="evaluating the best")
    doubts = None  # where images have several labels, or no numbers
    if isinstance(predictions, Predictions) and isinstance(data.val, Source):
        doubts = check_labels(trainer, data, model, predictions)
    for loader in (trainer.train_loader, trainer.val_loader):
        log_unreadable(loader, process)
    if not process.primary:
        return
    best = trainer.best_checkpoint
    write_checkpoint(best, {**read_checkpoint(best), **predictions.fitted()})
    predictions.write(folder, names, trainer.data_config)
    if doubts is not None:
        write_table(folder / SUSPICIOUS, Doubt._fields, doubts)
    figures = collect_figures(trainer, data, predictions, metrics, doubts or [])
    text = json.dumps(figures, indent=1, ensure_ascii=False)
    write_atomically(folder / FIGURES, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    write_page(folder / REPORT, figures, draw_sheets(trainer, predictions, doubts or [], data))
    written = ", ".join(name for name in WRITTEN if (folder / name).exists())
    _logger.info(f"best epoch {trainer.history.best_epoch}: {predictions.figures_line(metrics)}\n{folder}: {written}")
    _logger.info(f"read it in a browser: {folder / REPORT}")


def collect_figures(
    trainer: Trainer,
    data: ImageData,
    predictions: Predictions | LabelPredictions,
    metrics: dict[str, float],
    doubts: list[Doubt],
) -> dict[str, Any]:
    """All that the report says, in plain values; a figure that does not exist is null.

    Shares are in per cent where summary.csv has them so; probabilities and calibration errors are in 0 to 1.
    """
    names, duplicates = trainer.class_names, read_duplicates(trainer.folder / DUPLICATES)
    unreadable = [*trainer.train_loader.unreadable, *trainer.val_loader.unreadable]
    of_class = count_classes(data.train, trainer.options, len(names))
    classes = [{"class": name, **each} for name, each in zip(names, predictions.class_figures(), strict=True)]
    if of_class is not None:
        classes = [{**each, "training_images": int(n)} for each, n in zip(classes, of_class, strict=True)]
    figures: dict[str, Any] = {
        "title": trainer.folder.name,
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "model": trainer.options.model,
        "image_size": trainer.data_config["input_size"][-1],
        "training_images": trainer.train_loader.n_images,
        "validation_images": trainer.val_loader.n_images,
        "metrics": metrics,
        "metric": trainer.history.metric,
        "best_epoch": trainer.history.best_epoch,
        "classes": classes,
        **predictions.figures(),
        "n_suspicious": len(doubts),
        "suspicious": [each._asdict() for each in doubts[:MOST_ROWS]],
        "n_duplicates": len(duplicates),
        "duplicates": [each._asdict() for each in duplicates[:MOST_ROWS]],
        "n_unreadable": len(unreadable),
        "unreadable": unreadable[:MOST_ROWS],
        "history": trainer.history.rows,
        "settings": trainer.options.stored(),
        "versions": {**versions(), "python": platform.python_version()},
        "command": f"convmlp train -c {trainer.folder / 'args.yaml'} --experiment {trainer.folder.name}-again",
    }
    if data.findings:
        figures |= {key: getattr(data.findings, key) for key in ("smallest_side", "median_side", "largest_side")}
    without_nan: dict[str, Any] = json.loads(json.dumps(figures), parse_constant=lambda name: None)
    return without_nan
