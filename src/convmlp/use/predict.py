"""Classes of images: `convmlp predict`.

from convmlp.use.classifier import open_classifier
from convmlp.use.predict import predict

[prediction], unreadable = predict("cat.jpg", open_classifier("convmlp_s"))
print(prediction.best)  # [Guess(index=281, name='tabby, tabby cat', probability=0.62), ...]
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from ..common.errors import RunError
from ..common.figures import image_font
from ..common.images import SMALLEST_DRAWN, UnreadableImage, enlargement, read_image, to_mode
from .classifier import Classifier

LARGEST_DRAWN = 1280  # pixels; a larger image is drawn smaller
SMALLEST_SEEN = 32  # pixels; of smaller images the enlargement is told
TOPK, BATCH_SIZE = 5, 16


class Guess(NamedTuple):
    """A class with its probability, 0 to 1."""

    index: int  # type: ignore[assignment]  # in the place of the method that tuples have
    name: str
    probability: float


class Prediction(NamedTuple):
    """An image, its size (width, height) in pixels, and its most probable classes, the best first.

    `path` is None for an image that was given as such. `abstained` tells whether the best one is less probable than was
    asked for, if that was.
    """

    path: Path | None
    size: tuple[int, int]
    best: list[Guess]
    abstained: bool | None = None

    def row(self) -> dict[str, Any]:
        """In plain values, see `tables`."""
        answer = {} if self.abstained is None else {"abstained": self.abstained}
        return {"image": str(self.path or ""), **answer, "classes": [guess._asdict() for guess in self.best]}


Source = str | Path | Image.Image


def predict(
    images: Source | Sequence[Source],
    classifier: Classifier,
    topk: int = TOPK,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
    min_confidence: float | None = None,
) -> tuple[list[Prediction], list[UnreadableImage]]:
    """Classify images as evaluation would: resized, cropped and normalised in the way of the classifier.

    Args:
        images: A file in any format that Pillow reads, a Pillow image, or a sequence of these.
        classifier: See `open_classifier`.
        topk: How many classes to name, where an image has one.
        batch_size: How many images the model sees at once.
        progress: Show a bar on a terminal.
        min_confidence: The probability, 0 to 1, below which the classifier abstains.

    Returns:
        What was found, in the order of `images`, and what could not be read.

    Raises:
        RunError: `min_confidence` for a model of several labels an image, or logits that are not finite.
    """
    if min_confidence is not None and classifier.thresholds:
        raise RunError(
            "a least confidence is for one class an image; this model has a threshold for each of its labels"
        )
    sources = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
    predictions: list[Prediction] = []
    unreadable: list[UnreadableImage] = []
    hidden = None if progress and len(sources) > 1 else True
    with tqdm(total=len(sources), unit="image", leave=False, disable=hidden) as bar:
        for start in range(0, len(sources), batch_size):
            batch = sources[start : start + batch_size]
            opened: list[tuple[Path | None, Image.Image]] = []
            for source in batch:
                try:
                    if isinstance(source, Image.Image):
                        opened.append((None, to_mode(source, classifier.image_mode)))
                    else:
                        opened.append((Path(source), read_image(source, classifier.image_mode)))
                except UnreadableImage as error:
                    unreadable.append(error)
            if opened:
                found = _best([image for _, image in opened], classifier, topk)
                for (path, image), best in zip(opened, found, strict=True):
                    abstained = None if min_confidence is None else best[0].probability < min_confidence
                    predictions.append(Prediction(path, image.size, best, abstained))
            bar.update(len(batch))
    return predictions, unreadable


def _best(images: Sequence[Image.Image], classifier: Classifier, topk: int) -> list[list[Guess]]:
    """The most probable classes of each image; of several labels an image, those that reach their threshold."""
    probabilities = classify(images, classifier)
    if classifier.thresholds:
        reached = probabilities >= torch.tensor(classifier.thresholds)
        ranked = probabilities.argsort(1, descending=True).tolist()
        return [
            [Guess(i, classifier.class_names[i], row[i].item()) for i in order if here[i]]
            for order, row, here in zip(ranked, probabilities, reached, strict=True)
        ]
    values, indices = probabilities.topk(min(topk, probabilities.shape[1]))
    return [
        [Guess(i, classifier.class_names[i], p) for i, p in zip(index, row, strict=True)]
        for index, row in zip(indices.tolist(), values.tolist(), strict=True)
    ]


@torch.inference_mode()
def classify(images: Sequence[Image.Image], classifier: Classifier) -> torch.Tensor:
    """Probabilities of Pillow images, (b, classes), float32 on the CPU."""
    logits = classifier.model(classifier.preprocess(images)).float().cpu() / classifier.temperature
    probabilities = logits.sigmoid() if classifier.thresholds else logits.softmax(1)
    if not probabilities.isfinite().all():
        raise RunError(f"{classifier.title} gives values that are not finite: its weights are damaged")
    return probabilities


def draw_classes(image: Image.Image, best: Sequence[Guess]) -> Image.Image:
    """The image with its classes below it, each over a bar as long as it is probable."""
    factor = min(enlargement(*image.size), LARGEST_DRAWN / max(image.size))
    size = [max(1, round(side * factor)) for side in image.size]
    image = image.convert("RGB").resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)
    width = max(image.width, SMALLEST_DRAWN)
    line = width // 20
    font = image_font(line * 0.55)
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
