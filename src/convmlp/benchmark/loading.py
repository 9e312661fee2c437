"""How fast pictures are loaded for training, without a model."""

import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from ..common.errors import RunError
from .comparison import Row, Tell, spread
from .turns import Contestant, prepare_all, take_turns
from .variants import Plan

WORKER = "classification.loading_speed"  # started by name: nothing outside the training imports it
SAMPLES, SAMPLE_SIZE = 64, (500, 400)  # the size of most pictures in ImageNet
SAMPLE_QUALITY = 95
DEFAULT_SIZE = 224  # pixels, what ConvMLP is trained with


def count_steps(plan: Plan) -> int:
    """How often `compare_loading` will tell what it is doing."""
    return 2 * (1 + plan.rounds)


def compare_loading(
    plan: Plan, folder: str | None, workers: int | None = None, tell: Tell = lambda what: None
) -> list[Row]:
    """Images per second of the training pipeline: a row for the process alone, on one core, and one with workers.

    Args:
        plan: Tells the size that a model would see, the device, rounds and seconds.
        folder: Holds pictures as for training, train/CLASS/*, or CLASS/*; None: pieces of two photographs.
        workers: Loader processes of the second row; by default as many as in training.

    Raises:
        RunError: the folder cannot be read.
    """
    if folder is not None and not Path(folder).is_dir():
        raise RunError(f"no such data folder: {folder}")
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            write_samples(Path(temporary) / "train" / "photographs")
        side = plan.img_size or DEFAULT_SIZE
        common = {"folder": folder or temporary, "img_size": side, "device": plan.device, "threads": 1}
        contestants = [
            Contestant(title, [_worker_module()], {**common, "workers": n})
            for title, n in (("loading on one core", 0), ("loading with workers", workers))
        ]
        try:
            prepare_all(contestants, tell)
            failed = next((contestant.failed for contestant in contestants if contestant.failed), None)
            if failed:
                raise RunError(f"the pictures in {folder or 'a folder of samples'} cannot be loaded: {failed}")
            take_turns(contestants, plan.rounds, plan.seconds, tell)
        finally:
            for contestant in contestants:
                contestant.close()
    return [_row(contestant) for contestant in contestants]


def _worker_module() -> str:
    return f"{__package__.rpartition('.')[0]}.{WORKER}"


def _row(contestant: Contestant) -> Row:
    about = {key: contestant.about[key] for key in ("workers", "pictures", "img_size", "batch_size")}
    if contestant.failed:
        return {**about, "failed": contestant.failed}
    batches = [seconds for turn in contestant.turns for seconds in turn]
    rate = about["batch_size"] / median(batches)
    return {**about, "images_per_s": rate, "spread": spread(batches), "turns": len(batches)}


def write_samples(folder: Path) -> None:
    """JPEG files of the size that is usual in ImageNet, pieces of two photographs."""
    folder.mkdir(parents=True)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rng = np.random.default_rng(0)
    for number in range(SAMPLES):
        photograph = photographs[number % len(photographs)]
        width, height = (side * rng.uniform(0.75, 1) for side in photograph.size)
        x, y = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - height)
        piece = photograph.resize(SAMPLE_SIZE, Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
        piece.save(folder / f"{number:02}.jpg", quality=SAMPLE_QUALITY)
