"""Fashion-MNIST as a folder of images: 60 000 for training and 10 000 for testing, 28x28 grey, of ten kinds of clothes.

    python tools/clothes.py FOLDER [--images 2000] [--clothes CLOTHES]    # FOLDER/CLASS/NUMBER.png

Debian's package dataset-fashion-mnist has the four files, in /usr/share/datasets/fashion-mnist; they are also at
https://github.com/zalandoresearch/fashion-mnist.
"""

import argparse
import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from convmlp.common.command import Parser, positive_int, run
from convmlp.common.errors import RunError
from convmlp.common.files import make_folder

PACKAGED = Path("/usr/share/datasets/fashion-mnist")
FILES = {"train": "train", "val": "t10k"}
NAMES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")


def make_images(clothes: Path, folder: Path, split: str, count: int) -> None:
    """The first images of a split, as FOLDER/CLASS/NUMBER.png; those that are there stay.

    Raises:
        RunError: a file is missing.
    """
    files = [clothes / f"{FILES[split]}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    for file in files:
        if not file.exists():
            raise RunError(f"{file} is not there; Debian's package dataset-fashion-mnist has it in {PACKAGED}")
    images, labels = (np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8) for file in files)
    for number, image in enumerate(images[16:].reshape(-1, 28, 28)[:count]):
        path = folder / NAMES[labels[8 + number]] / f"{number:05}.png"
        if not path.exists():
            make_folder(path.parent)
            Image.fromarray(image).save(path)


def work(argv: list[str]) -> None:
    parser = Parser(prog="clothes.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--images", type=positive_int, default=2000, metavar="N", help="the first training images (2000)"
    )
    parser.add_argument("--clothes", type=Path, default=PACKAGED, help="the folder of the four files")
    options = parser.parse(argv)
    make_images(options.clothes, options.folder, "train", options.images)


if __name__ == "__main__":
    sys.exit(run("clothes.py", lambda: work(sys.argv[1:])))
