"""Page of a report: report.html, one file that needs no network."""

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from PIL import Image

from ..common.activation import activation_maps, blend
from ..common.errors import RunError
from ..common.figures import new_figure
from ..common.files import write_atomically
from ..common.images import to_image, to_mode
from ..common.packages import missing, pip_line
from . import charts
from .calibration import Bin
from .charts import Prediction
from .check import image_names
from .data import ImageData
from .multilabel import LabelPredictions
from .predictions import Predictions
from .sources import Source
from .suspicious import Doubt
from .trainer import Trainer

SHOWN = 12  # pictures a sheet
LARGEST = 160  # px of a picture
SMALLEST_MAP = 4  # px of a feature map that tells where a model looks
AT_ONCE = 8  # pictures, whose gradients need memory


class Picture(NamedTuple):
    """An image of a sheet, its caption and perhaps where the model looked; images are data URIs."""

    image: str
    caption: str
    path: str = ""
    heat: str = ""


class Sheet(NamedTuple):
    """Pictures under a title, with a word on what they are."""

    title: str
    text: str
    pictures: list[Picture]


def write_page(path: Path, figures: dict[str, Any], sheets: Sequence[Sheet]) -> None:
    """The page of a report's figures, see `report.collect_figures`."""
    environment = Environment(
        loader=PackageLoader(__package__, "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("report.html").render(charts=_charts(figures), sheets=sheets, **figures)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _charts(figures: dict[str, Any]) -> dict[str, str]:
    """Curves, confusion matrix and reliability diagram, as data URIs."""
    drawn = {}
    for panel in charts.PANELS:
        drawn[panel] = new_figure(4.6, 3.4)
        charts.draw_panel(drawn[panel].subplots(), panel, figures["history"])
    if "confusion" in figures:
        names = [each["class"] for each in figures["classes"]]
        drawn["confusion"] = charts.confusion_figure(np.array(figures["confusion"]), names)
        drawn["reliability"] = charts.reliability_figure([Bin(**each) for each in figures["calibration"]["bins"]])
    return {name: _svg(figure) for name, figure in drawn.items()}


def _svg(figure: Figure) -> str:
    file = BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _data_uri("svg+xml", file.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def draw_sheets(
    trainer: Trainer, predictions: Predictions | LabelPredictions, doubts: Sequence[Doubt], data: ImageData
) -> list[Sheet]:
    """The surest mistakes, the least sure hits, and images whose labels are probably wrong."""
    if isinstance(predictions, LabelPredictions):
        return []
    mistakes, hits = predictions.mistakes[:SHOWN], predictions.hits[:SHOWN]
    heats, text = _heats(trainer, [*mistakes, *hits])
    paths = image_names(data.val) if predictions.indices else []
    pictures = []
    for each, heat in zip([*mistakes, *hits], heats, strict=True):
        caption = f"{trainer.class_names[each.predicted]} ({each.probability:.0%})"
        if each.target != each.predicted:
            caption += f", not {trainer.class_names[each.target]}"
        pictures.append(Picture(_png(_pixels(each, trainer)), caption, paths[each.index] if paths else "", heat))
    sheets = [
        Sheet("The surest mistakes", text, pictures[: len(mistakes)]),
        Sheet("The least sure hits", text, pictures[len(mistakes) :]),
        Sheet(
            "Labels to check",
            "The model takes these images for another class, and is as sure as of the images that are labelled so.",
            _draw_doubts(doubts[:SHOWN], data),
        ),
    ]
    return [sheet for sheet in sheets if sheet.pictures]


def _draw_doubts(doubts: Sequence[Doubt], data: ImageData) -> list[Picture]:
    sources = (source for source in (data.train, data.val) if isinstance(source, Source))
    places = {path: (source, i) for source in sources for i, path in enumerate(image_names(source))} if doubts else {}
    pictures = []
    for each in doubts:
        source, index = places[each.path]
        label, suggested = (
            f"{each.label} ({each.label_probability:.0%})",
            f"{each.suggested} ({each.suggested_probability:.0%})",
        )
        what = {"train": "training", "val": "validation"}[each.split]
        image = to_mode(source.load(index)[0], "RGB")
        pictures.append(Picture(_png(np.asarray(image)), f"{what}: labelled {label}, rather {suggested}", each.path))
    return pictures


def _heats(trainer: Trainer, shown: Sequence[Prediction]) -> tuple[list[str], str]:
    """For each prediction the image with where the model looked for what it found, or ''; and a word on them."""
    nothing = [""] * len(shown)
    if not shown:
        return nothing, ""
    if missing("grad-cam"):
        return nothing, f"After {pip_line('grad-cam')} the report of a run also shows where the model looks."
    maps: list[np.ndarray] = []
    try:
        for start in range(0, len(shown), AT_ONCE):
            part = shown[start : start + AT_ONCE]
            images = torch.stack([each.image for each in part]).to(trainer.process.device)
            classes = [each.predicted for each in part]
            maps += [*activation_maps(trainer.network, images, classes, trainer.options.model, SMALLEST_MAP)]
    except RunError as error:
        return nothing, f"Where the model looks cannot be told: {error}."
    heats = [np.round(255 * blend(_pixels(each, trainer), heat)) for each, heat in zip(shown, maps, strict=True)]
    return [
        _png(heat.astype(np.uint8)) for heat in heats
    ], "On the right: where the model looked for that class, by Grad-CAM."


def _pixels(shown: Prediction, trainer: Trainer) -> np.ndarray:
    return to_image(shown.image, trainer.data_config["mean"], trainer.data_config["std"])


def _png(pixels: np.ndarray) -> str:
    """An image (h, w, channels), uint8, as a data URI, no larger than it is shown."""
    image, file = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels), BytesIO()
    image.thumbnail((LARGEST, LARGEST))
    image.save(file, "PNG")
    return _data_uri("png", file.getvalue())
