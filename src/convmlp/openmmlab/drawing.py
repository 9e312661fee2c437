"""Boxes, masks and label maps drawn into pictures, see `inference`."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pycocotools import mask as run_lengths

from ..common.figures import picture_font
from ..common.images import enlargement
from .inference import SCORE_THRESHOLD, Colour, Detections, Segmentation, TrainedModel, listed, present


def draw(
    model: TrainedModel, image: Image.Image, result: Detections | Segmentation, score_threshold: float = SCORE_THRESHOLD
) -> Image.Image:
    """The picture with boxes, names and masks from a score on, or in the colours of its classes with a legend.

    Names would cover small pictures, so these are enlarged by a whole number.
    """
    factor = enlargement(*image.size)
    picture = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    font = picture_font(max(13, round(max(picture.size) / 70)))
    if isinstance(result, Segmentation):
        return _draw_label_map(model, picture, result, font)
    chosen = listed(result, score_threshold)
    boxes = (result.boxes[chosen] * factor).tolist()
    colours = [model.palette[label] for label in result.labels[chosen]]
    texts = [f"{model.class_names[result.labels[i]]} {result.scores[i]:.2f}" for i in chosen]
    masks = [] if result.masks is None else [result.masks[i] for i in chosen]
    width = max(2, round(font.size / 7))
    for mask, colour in zip(reversed(masks), reversed(colours), strict=False):  # the best come last, on top
        _paint(picture, run_lengths.decode(mask), colour, width, factor)
    pen = ImageDraw.Draw(picture)
    for box, colour in zip(reversed(boxes), reversed(colours), strict=True):
        pen.rectangle(box, outline=colour, width=width)
    _write(picture, texts, boxes, colours, font)
    return picture


def _paint(picture: Image.Image, mask: np.ndarray, colour: Colour, width: int, factor: int) -> None:
    """Tint a picture where the mask (h, w) of 0 and 1 is set, `factor` times as large, and trace its outline."""
    large = Image.fromarray(mask * 255).resize(picture.size, Image.Resampling.BICUBIC)
    outer = large.filter(ImageFilter.BoxBlur((factor - 1) / 2)).point(lambda value: 255 * (value >= 128))
    inner = outer.filter(ImageFilter.BoxBlur(width)).point(lambda value: 255 * (value == 255))
    picture.paste(colour, mask=Image.composite(Image.new("L", picture.size, 110), outer, inner))


def _write(
    picture: Image.Image,
    texts: Sequence[str],
    boxes: Sequence[Sequence[float]],
    colours: Sequence[Colour],
    font: ImageFont.FreeTypeFont,
) -> None:
    """Names of boxes above them or, where another name or the edge of the picture is, inside."""
    pen = ImageDraw.Draw(picture)
    taken: list[tuple[float, float, float]] = []
    h = font.size * 1.3
    for text, (left, top, _, bottom), colour in zip(texts, boxes, colours, strict=True):
        w = pen.textlength(text, font) + font.size * 0.5
        x = max(0, min(left, picture.width - w))
        ys = [y for y in (top - h, top, bottom - h) if 0 <= y <= picture.height - h] or [0]
        free = [y for y in ys if not any(abs(y - v) < h and x < right and u < x + w for u, v, right in taken)]
        y = [*free, ys[0]][0]
        taken.append((x, y, x + w))
        pen.rectangle((x, y, x + w, y + h), fill=colour)
        ink = "black" if np.dot(colour, (0.299, 0.587, 0.114)) > 120 else "white"
        pen.text((x + font.size * 0.25, y + h / 2), text, ink, font, anchor="lm")


def _draw_label_map(
    model: TrainedModel, picture: Image.Image, result: Segmentation, font: ImageFont.FreeTypeFont
) -> Image.Image:
    colours = np.array(model.palette, dtype=np.uint8)[result.label_map]
    picture = Image.blend(picture, Image.fromarray(colours).resize(picture.size, Image.Resampling.NEAREST), 0.5)
    labels = present(result)
    shares = [f"{share:.1f} %" if share >= 0.1 else "< 0.1 %" for share in 100 * result.shares[labels]]
    texts = [f"{model.class_names[label]}  {share}" for label, share in zip(labels, shares, strict=True)]
    line = round(font.size * 1.6)
    legend = round(max(map(font.getlength, texts))) + 3 * line
    sheet = Image.new("RGB", (picture.width + legend, max(picture.height, line * (len(texts) + 1))), "white")
    sheet.paste(picture)
    pen = ImageDraw.Draw(sheet)
    for row, (label, text) in enumerate(zip(labels, texts, strict=True)):
        left, top = picture.width + line // 2, line // 2 + row * line
        pen.rectangle((left, top + 2, left + line, top + line - 2), fill=model.palette[label])
        pen.text((left + line * 1.5, top + line / 2), text, "black", font, anchor="lm")
    return sheet
