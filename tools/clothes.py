"""Fashion-MNIST as a folder of images: 60 000 for training and 10 000 for testing, 28x28 grey, of ten kinds of clothes.

Debian's package dataset-fashion-mnist has the four files, in /usr/share/datasets/fashion-mnist; they are also at
https://github.com/zalandoresearch/fashion-mnist.
"""

import gzip
from pathlib import Path

import numpy as np
from PIL import Image

from convmlp.common.errors import RunError
from convmlp.common.files import make_folder

PACKAGED = Path("/usr/share/datasets/fashion-mnist")
FILES = {"train": "train", "val": "t10k"}


def make_images(clothes: Path, folder: Path, counts: dict[str, int]) -> None:
    """The first images of each split, as FOLDER/SPLIT/CLASS/NUMBER.png; those that are there stay.

    Raises:
        RunError: a file is missing.
    """
    for split, count in counts.items():
        files = [clothes / f"{FILES[split]}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
        for file in files:
            if not file.exists():
                raise RunError(f"{file} is not there; Debian's package dataset-fashion-mnist has it in {PACKAGED}")
        images, labels = (np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8) for file in files)
        for number, image in enumerate(images[16:].reshape(-1, 28, 28)[:count]):
            path = folder / split / str(labels[8 + number]) / f"{number:05}.png"
            if not path.exists():
                make_folder(path.parent)
                Image.fromarray(image).save(path)
