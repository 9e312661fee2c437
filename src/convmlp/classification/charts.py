"""Charts of a run: learning curves, a confusion matrix, per-class accuracies, images with predictions."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..common.figures import new_figure, plain, save_figure
from .calibration import Bin
from .tables import write_table

LABELLED_CLASSES = 40  # more names than this cannot be read along an axis
SHEET_COLUMNS = 8

# Of columns of summary.csv, with their labels; of the accuracies the first that is there has the best epoch marked
PANELS = {
    "loss": {"train_loss": "training", "eval_loss": "validation", "eval_ema_loss": "validation, averaged"},
    "accuracy, %": {"eval_top1": "top-1", "eval_top5": "top-5", "eval_ema_top1": "top-1, averaged"}
    | {"train_top1": "top-1, training", "eval_map": "mAP", "eval_ema_map": "mAP, averaged"},
    "learning rate": {"lr": ""},
}


class Prediction(NamedTuple):
    """An evaluated image with its number, its class and the predicted one; to be drawn it is uint8 (h, w, c)."""

    image: Any
    index: int  # type: ignore[assignment]  # in the place of the method that tuples have
    target: int
    predicted: int
    probability: float


def write_summary(path: Path, history: Sequence[dict[str, float]]) -> None:
    """summary.csv: a row an epoch; what older rows lack is left empty."""
    titles = list(history[-1] | history[0])
    write_table(path, titles, [[row.get(title, "") for title in titles] for row in history])


def write_curves(path: Path, history: Sequence[dict[str, float]]) -> None:
    """curves.png: losses, accuracies and learning rate over the epochs."""
    figure = new_figure(12, 3.6)
    for axis, panel in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        draw_panel(axis, panel, history)
    save_figure(figure, path)


def draw_panel(axis: Axes, panel: str, history: Sequence[dict[str, float]]) -> None:
    """Some columns of summary.csv over the epochs, with the best epoch where they are accuracies."""
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(epochs) < 40 else None
    columns = {column: label for column, label in PANELS[panel].items() if any(column in row for row in history)}
    for column, label in columns.items():
        values = [row.get(column, math.nan) for row in history]
        axis.plot(epochs, values, marker=marker, markersize=3, label=label)
    axis.set(title=panel, xlabel="epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    if len(columns) > 1:
        axis.legend(frameon=False)
    if panel == "accuracy, %":
        column, label = next(iter(columns.items()))
        best = max(history, key=lambda row: row[column])
        axis.plot(best["epoch"], best[column], "o", markersize=8, fillstyle="none", color="black")
        axis.set_title(f"{panel} (best {label}: {best[column]:.2f}, epoch {best['epoch']:.0f})", fontsize=11)


def write_confusion(path: Path, confusion: np.ndarray, class_names: Sequence[str]) -> None:
    """confusion_matrix.png, see `confusion_figure`."""
    save_figure(confusion_figure(confusion, class_names), path)


def confusion_figure(confusion: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Counts (true class, predicted class) as a matrix; the colour is the share of the true class."""
    n = len(class_names)
    size = 8 if n > LABELLED_CLASSES else max(4, 2 + 0.42 * n)
    figure = new_figure(size * 1.1, size)
    axis = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    colours = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(colours, ax=axis, shrink=0.8, label="share of the true class")
    axis.set(xlabel="predicted", ylabel="true", title=f"{np.trace(confusion)} of {confusion.sum()} right")
    if n <= LABELLED_CLASSES:
        long_names = max(map(len, class_names)) > 3
        class_names = [_drawn(name) for name in class_names]
        axis.set_xticks(range(n), class_names, rotation=60 if long_names else 0, ha="right" if long_names else "center")
        axis.set_yticks(range(n), class_names)
        for row, column in zip(*np.nonzero(confusion), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, confusion[row, column], ha="center", va="center", color=color, fontsize=8)
    return figure


def reliability_figure(bins: Sequence[Bin]) -> Figure:
    """How often the model is right over how sure it is; the area of a point is the share of the images."""
    figure = new_figure(4.6, 4)
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], "--", color="grey", label="perfectly calibrated")
    n_images = sum(each.images for each in bins)
    confidence, accuracy = [each.confidence for each in bins], [each.accuracy for each in bins]
    axis.plot(confidence, accuracy, color="C0", alpha=0.5)
    axis.scatter(confidence, accuracy, [20 + 400 * each.images / n_images for each in bins], color="C0", alpha=0.7)
    axis.set(title="right, over how sure", xlabel="probability of the predicted class", ylabel="share that is right")
    axis.set(xlim=(0, 1.02), ylim=(-0.02, 1.04))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def write_predictions(
    path: Path, images: Sequence[Prediction], confusion: np.ndarray, class_names: Sequence[str]
) -> None:
    """predictions.png: images with the predicted class; mistakes are red and have the true class, too."""
    rows = -(-len(images) // SHEET_COLUMNS)
    figure = new_figure(1.5 * SHEET_COLUMNS, 1.75 * rows + 0.4)
    n_images, n_right = confusion.sum(), np.trace(confusion)
    title = f"{n_right} of {n_images} right"
    if n_right < n_images:
        title += "; the surest mistakes come first, in red, from as many classes as possible, then the least sure hits"
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, SHEET_COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, each in zip(axes, images, strict=False):
        right = each.target == each.predicted
        title = f"{_drawn(class_names[each.predicted])} ({100 * each.probability:.0f} %)"
        if not right:
            title += f"\nnot {_drawn(class_names[each.target])}"
        grey = each.image.shape[-1] == 1
        axis.imshow(each.image[..., 0] if grey else each.image, cmap="gray" if grey else None)
        axis.set_title(title, fontsize=8, color="black" if right else "crimson")
    save_figure(figure, path)


def class_figures(confusion: np.ndarray) -> list[dict[str, float]]:
    """Of each class, in counts: the images and the right ones; in per cent: accuracy, which is also recall, precision
    and F1. A figure that would divide by 0 is left out.
    """
    right, images, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    found: list[dict[str, float]] = []
    for hits, n_images, n_predicted in zip(right.tolist(), images.tolist(), predicted.tolist(), strict=True):
        shares = {
            "accuracy": (hits, n_images),
            "precision": (hits, n_predicted),
            "f1": (2 * hits, n_images + n_predicted),
        }
        figures = {key: 100 * part / whole for key, (part, whole) in shares.items() if whole}
        found.append({"images": n_images, "right": hits, **figures})
    return found


def write_per_class(path: Path, confusion: np.ndarray, class_names: Sequence[str]) -> None:
    """per_class.csv: see `class_figures`."""
    rows = []
    for name, figures in zip(class_names, class_figures(confusion), strict=True):
        shares = [f"{figures[key]:.2f}" if key in figures else "" for key in ("accuracy", "precision", "f1")]
        rows.append([name, figures["images"], figures["right"], *shares])
    write_table(path, ["class", "images", "right", "accuracy", "precision", "f1"], rows)


def per_class_table(confusion: np.ndarray, class_names: Sequence[str]) -> str:
    """The classes with their accuracies, the worst first; of many classes, the worst ones."""
    images = confusion.sum(1)
    accuracy = 100 * confusion.diagonal() / np.maximum(images, 1)
    present = [i for i in np.argsort(accuracy, kind="stable") if images[i]]
    width = max(len(_short(name)) for name in class_names)
    lines = [f"{_short(class_names[i]):{width}}  {accuracy[i]:6.2f} %  of {images[i]}" for i in present[:20]]
    if len(present) > 20:
        lines.append(f"... and {len(present) - 20} classes above; all are in per_class.csv")
    return "\n".join(lines)


def _short(name: str) -> str:
    """A class name for a table."""
    return name if len(name) <= 18 else name[:17] + "…"


def _drawn(name: str) -> str:
    """A class name for a figure."""
    return plain(_short(name))
