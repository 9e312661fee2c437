"""Classes of pictures: `convmlp predict`.

from convmlp.use.classifier import open_classifier
from convmlp.use.predict import predict

predictions, unreadable = predict(["cat.jpg"], open_classifier("convmlp_s"))
print(predictions[0].best)  # [Guess(index=281, name='tabby, tabby cat', probability=0.62), ...]
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from ..common.errors import RunError
from ..common.figures import picture_font
from ..common.images import UnreadableImage, read_image
from .classifier import Classifier

SMALLEST_DRAWN, LARGEST_DRAWN = 384, 1280  # pixels; labels would cover a small picture
SMALLEST_SEEN = 32
TOPK, BATCH_SIZE = 5, 16


class Guess(NamedTuple):
    """A class with its probability, 0 to 1."""

    index: int  # type: ignore[assignment]  # in the place of the method that tuples have
    name: str
    probability: float


class Prediction(NamedTuple):
    """A picture, its size (width, height) in pixels, and its most probable classes, the best first."""

    path: Path
    size: tuple[int, int]
    best: list[Guess]

    def row(self) -> dict[str, Any]:
        """In plain values, see `results`."""
        return {"picture": str(self.path), "classes": [guess._asdict() for guess in self.best]}


def predict(
    paths: Sequence[str | Path],
    classifier: Classifier,
    topk: int = TOPK,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
) -> tuple[list[Prediction], list[UnreadableImage]]:
    """Classify pictures as evaluation would: resized, cropped and normalised in the way of the classifier.

    Args:
        paths: Files in any format that Pillow reads.
        classifier: See `open_classifier`.
        topk: How many classes to name.
        batch_size: How many pictures the model sees at once.
        progress: Show a bar on a terminal.

    Returns:
        What was found, in the order of `paths`, and what could not be read.
    """
    predictions: list[Prediction] = []
    unreadable: list[UnreadableImage] = []
    bar = tqdm(total=len(paths), unit="picture", leave=False, disable=None if progress and len(paths) > 1 else True)
    with bar:
        for names in _batches(paths, batch_size):
            images = []
            for name in names:
                try:
                    images.append((Path(name), read_image(name, classifier.image_mode)))
                except UnreadableImage as error:
                    unreadable.append(error)
            if images:
                probabilities = classify([image for _, image in images], classifier)
                values, indices = probabilities.topk(min(topk, probabilities.shape[1]))
                for (path, image), row, index in zip(images, values.tolist(), indices.tolist(), strict=True):
                    best = [Guess(i, classifier.class_names[i], p) for i, p in zip(index, row, strict=True)]
                    predictions.append(Prediction(path, image.size, best))
            bar.update(len(names))
    return predictions, unreadable


@torch.inference_mode()
def classify(images: Sequence[Image.Image], classifier: Classifier) -> torch.Tensor:
    """Probabilities of Pillow images, (b, classes), float32 on the CPU."""
    probabilities = classifier.model(classifier.preprocess(images)).float().softmax(1).cpu()
    if not probabilities.isfinite().all():
        raise RunError(f"{classifier.title} gives values that are not finite: its weights are damaged")
    return probabilities


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def draw(image: Image.Image, best: Sequence[Guess]) -> Image.Image:
    """The picture with its classes below it, each over a bar as long as it is probable."""
    factor: float = max(1, math.ceil(SMALLEST_DRAWN / min(image.size)))
    factor = min(factor, LARGEST_DRAWN / max(image.size))
    size = [max(1, round(side * factor)) for side in image.size]
    image = image.convert("RGB").resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)
    width = max(image.width, SMALLEST_DRAWN)
    line = width // 20
    font = picture_font(line * 0.55)
    sheet = Image.new("RGB", (width, image.height + line * len(best) + line // 2), "white")
    sheet.paste(image, ((width - image.width) // 2, 0))
    pen = ImageDraw.Draw(sheet)
    for i, guess in enumerate(best):
        top = image.height + line // 4 + i * line
        pen.rectangle((0, top + 1, guess.probability * (width - 1), top + line - 2), fill="#bcd9f0")
        share = f"{100 * guess.probability:.1f} %"
        right = width - line // 3 - pen.textlength(share, font)
        pen.text((right, top + line / 2), share, "black", font, anchor="lm")
        name = " ".join(guess.name.split())
        while pen.textlength(name, font) > right - line:
            name = name.rstrip("…")[:-1] + "…"
        pen.text((line // 3, top + line / 2), name, "black", font, anchor="lm")
    return sheet
