"""How fast pictures are loaded for training, without a model."""

import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from ..errors import RunError
from .comparison import Row, Tell, spread
from .turns import Contestant, prepare_all, take_turns
from .variants import Plan, count_cores

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
        workers: Loader processes of the second row; by default the cores, up to 8.

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
        workers = workers or min(8, count_cores())
        contestants = [
            Contestant(f"loading with {n or 'no'} workers", [_worker_module()], {**common, "workers": n})
            for n in (0, workers)
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
    about = {key: contestant.about[key] for key in ("pictures", "img_size", "batch_size")}
    row = {"workers": contestant.spec["workers"], **about}
    if contestant.failed:
        return {**row, "failed": contestant.failed}
    batches = [seconds for turn in contestant.turns for seconds in turn]
    rate = about["batch_size"] / median(batches)
    return {**row, "images_per_s": rate, "spread": spread(batches), "turns": len(batches)}


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
