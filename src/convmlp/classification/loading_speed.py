"""How fast the pictures for a training step are loaded, without the step: a process of `convmlp benchmark --loading`.

The way is that of classification.py with the augmentation of the ImageNet recipe, up to normalised batches on the
device.
"""

import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..benchmark.worker import serve
from .loaders import Loader, default_workers
from .options import parse_options
from .process import Process
from .sources import SPLIT_SYNONYMS, ReaderSource, open_source

# As configs/classification/_base_, which an installed package does not have
RECIPE = "--hflip 0.5 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --remode pixel --mixup 0.8 --cutmix 1.0 --smoothing 0.1 "
RECIPE += "--train-interpolation bicubic"
BATCH_SIZE = 32
SHORTEST_EPOCH = 200  # batches; at the start of an epoch workers have nothing to do


class Loading:
    """The batches of a folder of pictures, loaded by the process alone or by its workers."""

    def __init__(self, spec: dict[str, Any]):
        torch.set_num_threads(1)
        folder = Path(spec["folder"])
        split = "train"
        if not any((folder / f"{name}{end}").exists() for name in SPLIT_SYNONYMS[0] for end in ("", ".tar")):
            folder, split = folder.absolute().parent, folder.absolute().name
        call = f"{RECIPE} --batch-size {BATCH_SIZE} --train-split"
        self.options = parse_options([*call.split(), split, str(folder)])
        self.options.workers = spec["workers"]
        self.workers = default_workers(self.options)
        source = open_source(self.options, train=True)
        assert isinstance(source, ReaderSource)  # as of any folder
        self.source = source
        self.options.num_classes = len(self.source.class_names)
        pictures = len(self.source)
        self.source.reader.samples = self.source.reader.samples * -(-SHORTEST_EPOCH * BATCH_SIZE // pictures)
        side = spec["img_size"]
        self.data_config = {"input_size": (3, side, side), "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
        self.process = Process(torch.device(spec["device"]))
        self.epoch = 0
        self.about = {"workers": self.workers, "pictures": pictures, "img_size": side, "batch_size": BATCH_SIZE}
        self.measure(0)

    def measure(self, seconds: float) -> list[float]:
        """The mean time of a batch: they come in bursts, as many as there are workers.

        Workers start for a turn and end with it, for they would go on loading in the turns of others.
        """
        batches = self._batches()
        for _ in range(1 + 2 * self.workers):  # what was loaded ahead while the workers started
            next(batches)
        count, start, now = 0, time.perf_counter(), 0.0
        while now < seconds or count < max(2, self.workers):
            next(batches)
            count += 1
            now = time.perf_counter() - start
        batches.close()
        return [now / count]

    def _batches(self) -> Generator[Any, None, None]:
        loader = Loader(self.source, self.options, self.data_config, self.process, train=True)
        while True:
            loader.start(self.epoch)
            self.epoch += 1
            for batch in loader:
                if self.process.device.type == "cuda":
                    torch.cuda.synchronize()
                yield batch

    def peak_memory(self) -> int | None:
        return None


if __name__ == "__main__":
    serve(Loading)
