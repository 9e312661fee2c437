"""Classes of images: `convmlp predict`.

from convmlp.use.classifier import open_classifier
from convmlp.use.predict import predict

[prediction], unreadable = predict("cat.jpg", open_classifier("convmlp_s"))
print(prediction.best)  # [Guess(index=281, name='tabby, tabby cat', probability=0.62), ...]
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

from ..common.devices import count_cores
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
    asked for, if that was, and `features` are what the classes were told from, (n,), if they were asked for.
    """

    path: Path | None
    size: tuple[int, int]
    best: list[Guess]
    abstained: bool | None = None
    features: torch.Tensor | None = None

    def row(self) -> dict[str, Any]:
        """In plain values, see `tables`."""
        row: dict[str, Any] = {"image": str(self.path or "")}
        if self.abstained is not None:
            row["abstained"] = self.abstained
        if self.features is not None:
            row["features"] = self.features.tolist()
        return {**row, "classes": [guess._asdict() for guess in self.best]}


class _Opened(NamedTuple):
    path: Path | None
    size: tuple[int, int]
    tensor: torch.Tensor  # as the model takes it, (c, h, w)


class FeaturesToo(nn.Module):
    """A model of timm that gives its pooled features beside the logits: (b, classes), (b, n)."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self.model.forward_features(images)
        return self.model.forward_head(maps), self.model.forward_head(maps, pre_logits=True)


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
    sources = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
    hidden = None if progress and len(sources) > 1 else True
    each = predict_each(sources, classifier, topk, batch_size, min_confidence)
    found = list(tqdm(each, total=len(sources), unit="image", leave=False, disable=hidden))
    unreadable = [one for one in found if isinstance(one, UnreadableImage)]
    return [one for one in found if isinstance(one, Prediction)], unreadable


def predict_each(
    images: Iterable[Source],
    classifier: Classifier,
    topk: int = TOPK,
    batch_size: int = BATCH_SIZE,
    min_confidence: float | None = None,
    network: nn.Module | None = None,
) -> Iterator[Prediction | UnreadableImage]:
    """What `predict` finds, or why an image cannot be read, one by one in the order of the images.

    `network` computes in the place of the classifier's model, such as a faster form of it, or `FeaturesToo`.
    """
    if min_confidence is not None and classifier.thresholds:
        raise RunError(
            "a least confidence is for one class an image; this model has a threshold for each of its labels"
        )
    for batch in _read_batches(images, classifier, batch_size):
        opened = [one for one in batch if isinstance(one, _Opened)]
        predictions: Iterator[Prediction] = iter(())
        if opened:
            inputs = classifier.collate([one.tensor for one in opened])
            probabilities, features = _compute(inputs, classifier, network)
            best = _best(probabilities, classifier, topk)
            predictions = (
                Prediction(
                    one.path,
                    one.size,
                    guesses,
                    None if min_confidence is None else guesses[0].probability < min_confidence,
                    None if features is None else features[i],
                )
                for i, (one, guesses) in enumerate(zip(opened, best, strict=True))
            )
        for one in batch:
            yield next(predictions) if isinstance(one, _Opened) else one


def _read_batches(
    images: Iterable[Source], classifier: Classifier, batch_size: int
) -> Iterator[list[_Opened | UnreadableImage]]:
    """Batches of images, read by a thread for each core: Pillow and PyTorch work outside of Python's lock.

    While a GPU computes, the next batches are read. A CPU has its cores for one after the other, because a model whose
    threads wait for a core is slower than one that comes later.
    """
    remaining = iter(images)
    n_waiting = 1 if classifier.device.type == "cpu" else 3
    waiting: deque[list[Future[_Opened | UnreadableImage]]] = deque()
    with ThreadPoolExecutor(count_cores()) as pool:
        while True:
            while len(waiting) < n_waiting and (batch := list(islice(remaining, batch_size))):
                waiting.append([pool.submit(_open, source, classifier) for source in batch])
            if not waiting:
                return
            yield [future.result() for future in waiting.popleft()]


def _open(source: Source, classifier: Classifier) -> _Opened | UnreadableImage:
    try:
        if isinstance(source, Image.Image):
            path, image = None, to_mode(source, classifier.image_mode)
        else:
            path, image = Path(source), read_image(source, classifier.image_mode)
    except UnreadableImage as error:
        return error
    return _Opened(path, image.size, classifier.transform(image))


def _best(probabilities: torch.Tensor, classifier: Classifier, topk: int) -> list[list[Guess]]:
    """The most probable classes of each image; of several labels an image, those that reach their threshold."""
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


def classify(images: Sequence[Image.Image], classifier: Classifier) -> torch.Tensor:
    """Probabilities of Pillow images, (b, classes), float32 on the CPU."""
    return _compute(classifier.preprocess(images), classifier)[0]


@torch.inference_mode()
def _compute(
    batch: Any, classifier: Classifier, network: nn.Module | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities of a batch, see `Classifier.collate`, and its features if `network` gives them; on the CPU."""
    outputs = (network or classifier.model)(batch)
    logits, features = outputs if isinstance(outputs, (tuple, list)) else (outputs, None)
    logits = logits.float().cpu() / classifier.temperature
    probabilities = logits.sigmoid() if classifier.thresholds else logits.softmax(1)
    if not probabilities.isfinite().all():
        raise RunError(f"{classifier.title} gives values that are not finite: its weights are damaged")
    return probabilities, None if features is None else features.float().cpu()


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
