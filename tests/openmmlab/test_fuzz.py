"""Data sets that are damaged in any way are refused in one line, and what passes the check really loads."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from digit_scenes import write_detection, write_segmentation
from fuzzing import attempt, damage, damages, odd_values, print_cases, tries
from hypothesis import example, given
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from convmlp.common.errors import RunError
from convmlp.openmmlab.configs import replace_root
from convmlp.openmmlab.datasets import Request, adapt_to_data

ROOT = Path(__file__).resolve().parents[2]
RETINANET = ROOT / "configs/detection/retinanet_convmlp_s_fpn_1x_coco.py"
MASKRCNN = ROOT / "configs/detection/maskrcnn_convmlp_s_fpn_1x_coco.py"
FPN = ROOT / "configs/segmentation/fpn_convmlp_s_512x512_40k_ade20k.py"
SIZE = 64


@pytest.fixture(scope="module", autouse=True)
def report(request) -> Iterator[None]:
    yield
    print_cases(request)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    write_detection(folder / "detection", train=4, val=2, size=SIZE, seed=0)
    write_segmentation(folder / "segmentation", train=4, val=2, size=SIZE, seed=0)
    for file in (folder / "detection/annotations").iterdir():  # the few pictures of val would lack classes
        content = json.loads(file.read_text())
        for annotation in content["annotations"]:
            annotation["category_id"] = 1
        file.write_text(json.dumps(content))
    for file in (folder / "segmentation/annotations").glob("*/*.png"):
        Image.fromarray(np.minimum(np.asarray(Image.open(file)), 1)).save(file)
    return folder


@pytest.fixture(scope="module")
def configs() -> dict[Path, Config]:
    return {path: Config.fromfile(path) for path in (RETINANET, MASKRCNN, FPN)}


def shrink(cfg: Config) -> None:
    """Pictures of the pipelines stay small, and nothing waits for other processes."""
    for loader in ("train_dataloader", "val_dataloader"):
        for step in cfg[loader].dataset.pipeline:
            if "scale" in step:
                step.scale = (SIZE, SIZE)
            if "crop_size" in step:
                step.crop_size = (SIZE // 2, SIZE // 2)


def load_everything(cfg: Config, library: str) -> int:
    """Build the data sets of a checked config as a run would, and take every sample through its pipeline."""
    registry = __import__(f"{library}.registry", fromlist=["DATASETS"]).DATASETS
    __import__(f"{library}.datasets")
    init_default_scope(library)
    seen = 0
    for loader in ("train_dataloader", "val_dataloader"):
        dataset = registry.build({**cfg[loader].dataset, "lazy_init": False})
        for i in range(len(dataset)):
            sample = dataset.prepare_data(i)
            if sample is not None:
                assert sample["inputs"].ndim == 3
                seen += 1
    return seen


# Detection

NAMES = {
    "images": ["id", "file_name", "width", "height"],
    "annotations": ["id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "ignore"],
    "categories": ["id", "name", "supercategory"],
}
coordinates = st.one_of(
    st.integers(-3, SIZE + 3),
    st.floats(0, SIZE),
    st.sampled_from([0, 1e-9, float("nan"), float("inf"), 1e30, "1", "x", None, True, [1]]),
)
boxes = st.lists(st.one_of(st.integers(0, 20), coordinates), min_size=3, max_size=5)
polygons = st.lists(st.lists(st.one_of(st.floats(0, SIZE), coordinates), max_size=10), max_size=3)
rles = st.fixed_dictionaries(
    {},
    optional={
        "size": st.one_of(st.just([SIZE, SIZE]), st.lists(st.one_of(st.just(SIZE), coordinates), max_size=3)),
        "counts": st.one_of(
            st.sampled_from([[SIZE * SIZE], [0, SIZE * SIZE], [100, 20, SIZE * SIZE - 120], "P2X1", "", b"".decode()]),
            st.lists(st.integers(-1, SIZE * SIZE), max_size=5),
            st.lists(coordinates, max_size=4),
            st.text(max_size=6),
            st.text(alphabet=[chr(c) for c in range(48, 112)], max_size=12),
        ),
    },
)
file_names = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", ".", "..", "/", "a\0b", "x" * 300, "\ud800", "../train2017/000001.jpg", "000002.jpg", "a\nb"]),
)
values = {
    "bbox": boxes,
    "segmentation": st.one_of(polygons, polygons, rles, rles),
    "file_name": file_names,
    "id": st.one_of(st.integers(0, 5), st.text(max_size=2)),
    "image_id": st.integers(0, 5),
    "category_id": st.integers(0, 11),
    "iscrowd": st.sampled_from([0, 1, True, 2]),
    "area": coordinates,
    "ignore": st.sampled_from([0, 1, True]),
}
MISSING = object()


@st.composite
def coco_edits(draw: Any) -> list[tuple[str, int, str, Any]]:
    """Which list, which entry, which key, what for."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        part = draw(st.sampled_from(["images", "annotations", "annotations", "annotations", "categories"]))
        key = draw(st.one_of(st.sampled_from(NAMES[part]), st.sampled_from([*NAMES[part], "bbox", "segmentation"])))
        value = draw(st.one_of(*[values.get(key, odd_values)] * 4, odd_values, st.just(MISSING)))
        found.append((part, draw(st.integers(0, 20)), key, value))
    return found


whole_edits = st.tuples(st.sampled_from(["images", "annotations", "categories", "info"]), odd_values)


def change(file: Path, edits: list[tuple[str, int, str, Any]], whole: tuple[str, Any] | None) -> None:
    content = json.loads(file.read_text())
    for part, index, key, value in edits:
        entry = content[part][index % len(content[part])]
        if value is MISSING:
            entry.pop(key, None)
        else:
            entry[key] = value
    if whole:
        content[whole[0]] = whole[1]
    file.write_text(json.dumps(content))


def check_detection(configs: dict[Path, Config], path: Path, data: Path) -> None:
    cfg = configs[path].copy()
    replace_root(cfg, str(data))
    error = attempt(f"coco, {path.stem.partition('_')[0]}", lambda: adapt_to_data(cfg, Request(check="all")))
    if isinstance(error, RunError):
        assert "\n" in str(error) or str(data) in str(error) or "categor" in str(error), error
    else:
        shrink(cfg)
        assert load_everything(cfg, "mmdet")


NASTY_EDITS = [
    ("annotations", 0, "bbox", ["1", "2", "3", "4"]),
    ("annotations", 0, "segmentation", [["a", "b", "c", "d", "e", "f"]]),
    ("annotations", 0, "segmentation", [[1, 2, 3, 4, None, 6]]),
    ("annotations", 0, "segmentation", [[1, 2, 3, 4, float("nan"), 6]]),
    ("annotations", 0, "segmentation", [[1, 2, 3, 4, 5, 1e30]]),
    ("annotations", 0, "segmentation", {"size": [SIZE, SIZE], "counts": "garbage"}),
    ("annotations", 0, "segmentation", {"size": [SIZE, SIZE], "counts": [5, 5]}),
    ("annotations", 0, "segmentation", {"size": [SIZE, SIZE], "counts": [-5, SIZE * SIZE + 5]}),
    ("annotations", 0, "segmentation", {"size": [9, 9], "counts": [81]}),
    ("annotations", 0, "segmentation", {"size": None, "counts": None}),
    ("images", 0, "file_name", "x" * 300),
    ("images", 0, "file_name", "\ud800"),
]


@pytest.mark.parametrize("edit", NASTY_EDITS)
def test_nasty_annotations_are_refused(originals, configs, edit):
    with tempfile.TemporaryDirectory() as place:
        data = Path(shutil.copytree(originals / "detection", Path(place, "data")))
        change(data / "annotations/instances_train2017.json", [edit], None)
        cfg = configs[MASKRCNN].copy()
        replace_root(cfg, str(data))
        with pytest.raises(RunError):
            adapt_to_data(cfg, Request(check="all"))


@pytest.mark.slow
@tries(60, 1200)
@given(
    st.sampled_from([RETINANET, MASKRCNN, MASKRCNN]),
    coco_edits(),
    st.one_of(*[st.none()] * 6, whole_edits),
    st.sampled_from(["train", "val"]),
)
def test_annotations_load_or_are_refused(originals, configs, path, edits, whole, split):
    with tempfile.TemporaryDirectory() as place:
        data = Path(shutil.copytree(originals / "detection", Path(place, "data")))
        change(data / f"annotations/instances_{split}2017.json", edits, whole)
        check_detection(configs, path, data)


@pytest.mark.slow
@tries(30, 600)
@given(st.one_of(damages, st.binary(max_size=40)), st.sampled_from(["annotations", "picture"]))
def test_damaged_files_of_detection_load_or_are_refused(originals, configs, how, target):
    with tempfile.TemporaryDirectory() as place:
        data = Path(shutil.copytree(originals / "detection", Path(place, "data")))
        file = data / ("annotations/instances_train2017.json" if target == "annotations" else "train2017/000001.jpg")
        file.write_bytes(how if isinstance(how, bytes) else damage(file.read_bytes(), how))
        check_detection(configs, RETINANET, data)


# Segmentation

map_edits = st.lists(
    st.one_of(
        st.tuples(st.just("values"), st.lists(st.integers(0, 255), min_size=1, max_size=4)),
        st.tuples(st.just("size"), st.tuples(st.integers(1, 70), st.integers(1, 70))),
        st.tuples(st.just("mode"), st.sampled_from("1 L P LA RGB RGBA I I;16 F CMYK".split())),
        st.tuples(st.just("format"), st.sampled_from("PNG GIF TIFF BMP JPEG WEBP PPM".split())),
        st.tuples(st.just("damage"), damages),
        st.tuples(st.just("bytes"), st.binary(max_size=30)),
        st.tuples(st.just("missing"), st.none()),
        st.tuples(st.just("folder"), st.none()),
        st.tuples(st.just("rename"), st.sampled_from(["a.png", "a.jpg", "000001.PNG", ".png", "000002.png.png"])),
        st.tuples(st.just("link"), st.sampled_from(["nowhere", "000002.png", "000001.png"])),
    ),
    max_size=2,
)
class_files = st.one_of(
    *[st.none()] * 4,
    st.binary(max_size=20),
    st.lists(st.text(max_size=4), max_size=12).map(lambda names: "\n".join(names).encode()),
    st.sampled_from([b"a\nb", b"a\nb\n\n", b"a\na", b"\n".join(b"%d" % i for i in range(300))]),
)


def change_picture(file: Path, edits: list[tuple[str, Any]]) -> None:
    for kind, how in edits:
        if not file.is_file():
            return
        if kind in ("values", "size", "mode", "format"):
            try:
                picture = Image.open(file)
                picture.load()
                if kind == "values":
                    picture = Image.fromarray(np.resize(np.array(how, dtype=np.uint8), picture.size[::-1]))
                elif kind == "size":
                    picture = picture.resize(how)
                elif kind == "mode":
                    picture = picture.convert(how)
                picture.save(file, how if kind == "format" else {".jpg": "JPEG"}.get(file.suffix, "PNG"))
            except Exception:  # a picture that an earlier change spoiled, or a mode that the format does not have
                return
        elif kind == "damage":
            file.write_bytes(damage(file.read_bytes(), how))
        elif kind == "bytes":
            file.write_bytes(how)
        elif kind == "rename":
            file.rename(file.with_name(how))
        else:
            file.unlink()
            if kind == "folder":
                file.mkdir()
            elif kind == "link":
                file.symlink_to(how)


@pytest.mark.slow
@tries(60, 1500)
@given(
    st.sampled_from(["annotations/training/000001.png", "annotations/validation/000002.png"]),
    map_edits,
    st.one_of(*[st.just([])] * 3, map_edits),
    class_files,
    st.booleans(),
)
@example("annotations/training/000001.png", [("size", (1, 1))], [("size", (1, 1))], None, False)
@example("annotations/validation/000002.png", [("size", (9, 1))], [("size", (9, 1))], None, True)
def test_label_maps_load_or_are_refused(originals, configs, name, edits, image_edits, classes, reduce_zero_label):
    with tempfile.TemporaryDirectory() as place:
        data = Path(shutil.copytree(originals / "segmentation", Path(place, "data")))
        change_picture(data / name, edits)
        change_picture(data / name.replace("annotations", "images").replace(".png", ".jpg"), image_edits)
        if classes is not None:
            (data / "classes.txt").write_bytes(classes)
        cfg = configs[FPN].copy()
        replace_root(cfg, str(data))
        request = Request(check="all", reduce_zero_label=reduce_zero_label)
        error = attempt("label maps", lambda: adapt_to_data(cfg, request))
        if isinstance(error, RunError):
            assert str(data) in str(error) or "classes" in str(error), error
        else:
            shrink(cfg)
            assert load_everything(cfg, "mmseg")
