"""Make small sets of real images to try detection, segmentation and classification on, without a download.

    pip install scikit-learn scikit-image
    python tools/digit_scenes.py OUT

Handwritten digits (scikit-learn's, 8x8 pixels) are enlarged and pasted, bright, on darkened pieces of the photographs
that scikit-learn and scikit-image ship. 360 of the 1797 digits and three of the photographs are only for validation.

    OUT/detection       boxes and outlines of up to six digits per image, COCO layout
    OUT/segmentation    label maps of such images, ADE20K layout; classes.txt names the labels, starting at 0
    OUT/crops           one digit per image, in a folder per class

A digit's mask is what can be seen of its filled outline: the holes of 0, 6, 8 and 9 belong to it.
"""

import argparse
import functools
import json
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

try:
    import skimage
    import sklearn.datasets
    from scipy import ndimage
    from skimage.measure import find_contours
    from sklearn.model_selection import train_test_split
except ImportError as error:
    raise ImportError(f"digit_scenes.py lacks {error.name}: pip install scikit-learn scikit-image") from None

CLASSES = "zero one two three four five six seven eight nine".split()
N_VAL_DIGITS = 360
PHOTOGRAPHS = {
    "train": "china.jpg flower.jpg astronaut.png brick.png camera.png cell.png clock_motion.png coins.png grass.png "
    "gravel.png hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png retina.jpg",
    "val": "chelsea.png coffee.png rocket.jpg",
}
MAX_DIGITS = 6
MAX_OVERLAP = 0.1  # of the smaller of two boxes
INK_FROM, INK_TO = 0.2, 0.65  # shares of full ink where a digit begins to show, and where it hides what is behind
MASK_FROM = 80  # of 255: at half, thin strokes fall apart and open rings stay unfilled

Box = tuple[int, int, int, int]  # left, top, right, bottom


class Material(NamedTuple):
    """What the images of a split are made of."""

    digits: np.ndarray
    targets: np.ndarray
    photographs: list[Image.Image]


def write_detection(folder: Path, train: int = 1500, val: int = 200, size: int = 128, seed: int = 0) -> None:
    """Write images and their instances in COCO's layout; the category ids go from 1, "zero", to 10, "nine"."""
    categories = [{"id": i, "name": name, "supercategory": "digit"} for i, name in enumerate(CLASSES, 1)]
    for split, count in (("train", train), ("val", val)):
        content: dict[str, list] = {"images": [], "annotations": [], "categories": categories}
        for i in range(count):
            image, owners, targets = _scene("detection", split, i, seed, size, sides=(20, 56))
            name = f"{i + 1:06}.jpg"
            _save(image, folder / f"{split}2017" / name)
            content["images"].append({"id": i + 1, "file_name": name, "width": size, "height": size})
            for owner, target in enumerate(targets, 1):
                ids = {"id": len(content["annotations"]) + 1, "image_id": i + 1, "category_id": target + 1}
                content["annotations"].append({**ids, **_shape(owners == owner), "iscrowd": 0})
        path = folder / "annotations" / f"instances_{split}2017.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, separators=(",", ":")))


def write_segmentation(folder: Path, train: int = 1500, val: int = 200, size: int = 128, seed: int = 0) -> None:
    """Write images and label maps in ADE20K's layout; label 0 is the background, 1 "zero", 10 "nine"."""
    for split, split_folder, count in (("train", "training", train), ("val", "validation", val)):
        for i in range(count):
            image, owners, targets = _scene("segmentation", split, i, seed, size, sides=(32, 60))
            labels = np.array([0, *(target + 1 for target in targets)], dtype=np.uint8)[owners]
            _save(image, folder / "images" / split_folder / f"{i + 1:06}.jpg")
            _save(Image.fromarray(labels), folder / "annotations" / split_folder / f"{i + 1:06}.png")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in ("background", *CLASSES)))


def write_crops(folder: Path, train: int = 6000, val: int = 1000, size: int = 64, seed: int = 0) -> None:
    """Write images of one digit each, the ten digits in turn, into a folder per class."""
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            image = _crop(split, i, seed, size)
            _save(image, folder / split / CLASSES[i % 10] / f"{i + 1:06}.jpg")


PARTS = {"detection": write_detection, "segmentation": write_segmentation, "crops": write_crops}


def _generator(seed: int, part: str, split: str, index: int) -> np.random.Generator:
    """An image's own random numbers, so that a smaller set is the beginning of a larger one."""
    return np.random.default_rng([seed, list(PARTS).index(part), int(split == "val"), index])


@functools.cache
def _material(split: str) -> Material:
    digits = sklearn.datasets.load_digits()
    # Split as the sklearn-digits of classification.py are: a model trained on those has not seen these for validation.
    parts = train_test_split(
        digits.images, digits.target, test_size=N_VAL_DIGITS, stratify=digits.target, random_state=0
    )
    # Read as files, because skimage.data would download what it does not find.
    folders = (Path(sklearn.datasets.__file__).parent / "images", Path(skimage.__file__).parent / "data")
    photographs = []
    for name in PHOTOGRAPHS[split].split():
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"neither {folders[0]} nor {folders[1]} holds {name}; scikit-image 0.26 ships it")
        photographs.append(Image.open(path).convert("RGB"))
    held_out = int(split == "val")
    return Material(parts[held_out], parts[2 + held_out], photographs)


def _scene(
    part: str, split: str, index: int, seed: int, size: int, sides: tuple[int, int]
) -> tuple[Image.Image, np.ndarray, list[int]]:
    """An image of digits, the number from 1 of the digit that owns each pixel (0 for none), and what they show."""
    rng = _generator(seed, part, split, index)
    material = _material(split)
    image = _background(rng, material, size)
    owners = Image.new("L", (size, size))
    boxes: list[Box] = []
    targets: list[int] = []
    for _ in range(rng.integers(1, MAX_DIGITS + 1)):
        sample = rng.integers(len(material.digits))
        alpha = _enlarge(material.digits[sample], rng.integers(sides[0], sides[1] + 1))
        mask = _filled(alpha)
        left, top, right, bottom = mask.getbbox()
        for _ in range(20):
            x, y = rng.integers((-left, -top), (size - right + 1, size - bottom + 1)).tolist()
            box = (x + left, y + top, x + right, y + bottom)
            if all(_overlap(box, other) <= MAX_OVERLAP for other in boxes):
                boxes.append(box)
                targets.append(int(material.targets[sample]))
                image.paste(_bright(rng), (x, y), alpha)
                owners.paste(len(boxes), (x, y), mask)
                break
    return image, np.asarray(owners), targets


def _crop(split: str, index: int, seed: int, size: int) -> Image.Image:
    """An image of a digit near the middle, on a background as in the scenes, half as bright, or black."""
    rng = _generator(seed, "crops", split, index)
    material = _material(split)
    image = ImageEnhance.Brightness(_background(rng, material, size)).enhance(rng.choice([1, 0.5, 0]))
    sample = rng.choice(np.flatnonzero(material.targets == index % 10))
    alpha = _enlarge(material.digits[sample], round(rng.uniform(24, 56) / 64 * size))
    free = size - alpha.width
    # Up to an eighth of the image off the middle; no more than the digit's empty frame may reach over the edge.
    jitter = rng.uniform(-0.5, 0.5, 2) * min(max(free, 0), size / 4)
    image.paste(_bright(rng), tuple(int(value) for value in free / 2 + jitter), alpha)
    return image


def _background(rng: np.random.Generator, material: Material, size: int) -> Image.Image:
    photograph = material.photographs[rng.integers(len(material.photographs))]
    side = min(rng.uniform(1, 2) * size, *photograph.size)
    x, y = (rng.uniform(0, length - side) for length in photograph.size)
    piece = photograph.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    return ImageEnhance.Brightness(piece).enhance(rng.uniform(0.35, 0.7))


def _bright(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(rng.integers(200, 256, 3).tolist())


def _enlarge(digit: np.ndarray, side: int) -> Image.Image:
    """How much of the background the digit hides, its 8x8 pixels made `side` wide in an empty frame of one of them."""
    frame = round(side * 10 / 8)
    padded = Image.fromarray(np.pad(digit / 16, 1).astype(np.float32))
    ink = np.asarray(padded.resize((frame, frame), Image.Resampling.BICUBIC))
    alpha = np.clip((ink - INK_FROM) / (INK_TO - INK_FROM), 0, 1)
    return Image.fromarray(np.round(alpha * 255).astype(np.uint8))


def _filled(alpha: Image.Image) -> Image.Image:
    regions, _ = ndimage.label(np.asarray(alpha) < MASK_FROM)
    return Image.fromarray(regions != regions[0, 0])  # all but the region outside, which has the corner


def _overlap(a: Box, b: Box) -> float:
    """The area that two boxes share, as a fraction of the smaller one's."""
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return shared / min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))


def _shape(mask: np.ndarray) -> dict[str, list | int]:
    """COCO's description of a mask: its box, area and outlines, in coordinates of pixels' edges."""
    left, top, right, bottom = Image.fromarray(mask).getbbox()
    polygons = []
    # find_contours counts from the middle of a pixel, and leaves outlines open at the edge of what it is given.
    for outline in find_contours(np.pad(mask[top:bottom, left:right], 1).astype(float), 0.5):
        points = outline[:-1, ::-1] + (left - 0.5, top - 0.5)
        turns = np.diff(points, axis=0, prepend=points[-1:]) != np.diff(points, axis=0, append=points[:1])
        polygons.append(points[turns.any(axis=1)].ravel().tolist())
    return {"bbox": [left, top, right - left, bottom - top], "area": int(mask.sum()), "segmentation": polygons}


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)


def make(out: Path, settings: dict[str, dict[str, int]]) -> str:
    """Write the parts that are not there yet, each with its settings; return a line about it.

    Raises:
        ValueError: a part is there with other settings.
    """
    start = time.perf_counter()
    record_path = out / "digit_scenes.json"
    record = json.loads(record_path.read_text()) if record_path.is_file() else {}
    missing = [part for part in settings if not (out / part).exists()]
    for part in settings:
        if part not in missing and record.get(part) != settings[part]:
            made = " ".join(f"{key}={value}" for key, value in record.get(part, {}).items()) or "unknown settings"
            raise ValueError(f"{out / part} was made with {made}; remove it or name another OUT")
    if not missing:
        return f"{out} already holds {', '.join(settings)} with these settings; nothing to do"
    for part in missing:
        unfinished = out / f"{part}.unfinished"  # renamed at the end, so that a stopped run leaves no half part
        shutil.rmtree(unfinished, ignore_errors=True)
        PARTS[part](unfinished, **settings[part])
        record[part] = settings[part]
        record_path.write_text(json.dumps(record, indent=2) + "\n")
        unfinished.rename(out / part)
    counts = ", ".join(f"{part} {settings[part]['train']} + {settings[part]['val']}" for part in missing)
    return f"{out}: {counts} images (train + val) in {time.perf_counter() - start:.1f} s"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="digit_scenes.py", description=__doc__.partition("\n")[0])
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write into")
    numbers = {  # option: default, least, what it is; the ten digits take turns in the crops
        "train": (1500, 1, "training scenes"),
        "val": (200, 1, "validation scenes"),
        "size": (128, 64, "width and height of a scene in pixels"),
        "crops": (6000, 10, "training crops"),
        "crops-val": (1000, 10, "validation crops"),
        "seed": (0, 0, "another seed makes other images"),
    }
    for name, (default, _, what) in numbers.items():
        parser.add_argument(f"--{name}", metavar="N", type=int, default=default, help=f"{what} ({default})")
    parser.add_argument("--only", choices=PARTS, action="append", help="write only this part; may be repeated")
    options = parser.parse_args(arguments)
    for name, (_, least, _) in numbers.items():
        if getattr(options, name.replace("-", "_")) < least:
            sys.exit(f"digit_scenes.py: --{name} must be {least} or more")
    scenes = {"train": options.train, "val": options.val, "size": options.size, "seed": options.seed}
    crops = {"train": options.crops, "val": options.crops_val, "size": 64, "seed": options.seed}
    settings = {part: crops if part == "crops" else scenes for part in PARTS if part in (options.only or PARTS)}
    try:
        print(make(options.out, settings))
    except (OSError, ValueError) as error:
        sys.exit(f"digit_scenes.py: {error}")


if __name__ == "__main__":
    main()
