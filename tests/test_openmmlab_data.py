"""What detection.py and segmentation.py say about data sets: layouts, classes, and every mistake in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from digit_scenes import write_detection, write_segmentation
from mmengine.config import Config
from mmengine.logging import MMLogger
from PIL import Image

from convmlp.openmmlab import coco, labelmaps
from convmlp.openmmlab.datasets import Request, replace_root
from convmlp.openmmlab.engine import main

ROOT = Path(__file__).resolve().parents[1]
RETINANET = str(ROOT / "configs/detection/retinanet_convmlp_s_fpn_1x_coco.py")
MASKRCNN = str(ROOT / "configs/detection/maskrcnn_convmlp_s_fpn_1x_coco.py")
FPN = str(ROOT / "configs/segmentation/fpn_convmlp_s_512x512_40k_ade20k.py")
VAL_DIGIT = 3  # one that occurs in the few pictures of val
VAL_LABEL = 7
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_detection(folder / "detection", train=12, val=3, size=64, seed=0)
    write_segmentation(folder / "segmentation", train=12, val=3, size=64, seed=0)
    return folder


@pytest.fixture
def detection(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals / "detection", tmp_path / "detection"))


@pytest.fixture
def segmentation(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals / "segmentation", tmp_path / "segmentation"))


@pytest.fixture
def check(capfd) -> Callable[..., tuple[int, str]]:
    """Runs --check-data: exit code, and all that was printed."""
    MMLogger._instance_dict.clear()  # or its handlers keep on writing to the output of an earlier test

    def run(config: str, data: Path, *options: str) -> tuple[int, str]:
        script, prepare = (
            ("segmentation.py", labelmaps.prepare) if "segmentation" in config else ("detection.py", coco.prepare)
        )
        code = main(script, prepare, [config, str(data), "--check-data", *options])
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return run


def change(data: Path, split: str, edit: Callable[[dict], object]) -> None:
    file = data / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


# Detection


def test_a_good_data_set_is_counted_by_class(detection, check):
    code, said = check(RETINANET, detection)
    content = json.loads((detection / "annotations/instances_train2017.json").read_text())
    eights = sum(a["category_id"] == 9 for a in content["annotations"])
    assert code == 0, said
    assert "The data set is in order." in said
    assert any(line.split()[:2] == ["eight", str(eights)] for line in said.splitlines())
    assert "10 classes from" in said and "in place of the config's 80: zero, one," in said


def missing_folder(data: Path) -> None:
    shutil.rmtree(data / "annotations")


def absent_images(data: Path) -> None:
    (data / "train2017/000002.jpg").unlink()
    (data / "train2017/000004.jpg").unlink()


def not_json(data: Path) -> None:
    (data / "annotations/instances_train2017.json").write_text('{"images": [')


def zero_size(content: dict) -> None:
    content["annotations"][0]["bbox"][2] = 0


def outside(content: dict) -> None:
    content["annotations"][0]["bbox"] = [50, 10, 40, 10]


def truncate_one(data: Path) -> None:
    (data / "train2017/000002.jpg").write_bytes(b"")


def crowds(content: dict) -> None:
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1


def tiny(content: dict) -> None:
    """Pictures of 30 pixels, as the file has it; all boxes go where they fit."""
    for annotation in content["annotations"]:
        annotation.update(bbox=[0, 0, 20, 20])
    for image in content["images"]:
        image.update(width=30)


def drop_class(data: Path, split: str, digit: int) -> None:
    change(data, split, lambda c: c.update(annotations=[a for a in c["annotations"] if a["category_id"] != digit + 1]))


def corners(content: dict) -> None:
    """x1, y1, x2, y2 instead of x, y, width, height, the commonest mistake of all."""
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [x, y, x + width, y + height]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing_folder, "there is no annotation file for train in"),
        (absent_images, "train: 2 images are not in"),
        (not_json, "instances_train2017.json is not valid JSON"),
        (lambda d: change(d, "train", lambda c: c.pop("categories")), "it has no list 'categories'"),
        (lambda d: change(d, "val", lambda c: c.update(annotations=[])), "instances_val2017.json has no annotations"),
        (
            lambda d: change(d, "train", lambda c: c.update(annotations=[])),
            "instances_train2017.json has no annotations",
        ),
        (lambda d: change(d, "train", lambda c: c["annotations"][3].pop("area")), "1 annotations have no 'area'"),
        (
            lambda d: change(d, "train", lambda c: c["annotations"][0].update(category_id=77)),
            "category ids of annotations are unknown, the categories have 1, 2,",
        ),
        (
            lambda d: change(d, "train", lambda c: c["annotations"][0].update(image_id=999)),
            "annotations belong to images that are not listed",
        ),
        (lambda d: change(d, "train", zero_size), "1 boxes have no size or reach out of the image"),
        (lambda d: change(d, "train", outside), "1 boxes have no size or reach out of the image"),
        (lambda d: change(d, "train", corners), "boxes have no size or reach out of the image (x, y, width, height"),
        (
            lambda d: change(d, "val", lambda c: c["categories"][3].update(name="trois")),
            "the categories of train and val differ: three (id 4) only in train, trois (id 4) only in val",
        ),
        (
            lambda d: change(d, "val", lambda c: c["categories"].reverse()),
            "the categories of train and val differ: their order",
        ),
        (lambda d: drop_class(d, "train", VAL_DIGIT), f"classes that val has and train has not: {DIGITS[VAL_DIGIT]}"),
        (
            lambda d: change(d, "train", lambda c: c["annotations"][1].update(id=c["annotations"][0]["id"])),
            "1 annotations share an id",
        ),
        (
            lambda d: change(d, "train", lambda c: c["images"][1].update(id=c["images"][0]["id"])),
            "1 images share an id",
        ),
        (truncate_one, "train: 1 images cannot be read: 000002.jpg"),
        (
            lambda d: change(d, "train", lambda c: c["images"][0].update(width=128, height=128)),
            "train: 1 images have another size than the file says: 000001.jpg",
        ),
        (
            lambda d: change(d, "train", lambda c: c["categories"].append({"id": 1, "name": "bis"})),
            "2 categories have the id 1",
        ),
        (
            lambda d: change(d, "train", lambda c: c["categories"][1].update(name="zero")),
            "2 categories have the name 'zero'",
        ),
        (
            lambda d: change(d, "train", crowds),
            "train: no image of 32 pixels or more has a box of the classes zero, one,",
        ),
        (lambda d: change(d, "train", lambda c: c["categories"].append("eleven")), "categories holds 'eleven'"),
        (lambda d: change(d, "train", lambda c: c["images"][0].update(width="64")), "images with id 1 has width '64'"),
        (lambda d: change(d, "train", lambda c: c["annotations"][0].update(area=None)), "has area None"),
    ],
)
def test_every_mistake_in_a_coco_data_set_is_one_clear_line(detection, check, spoil, message):
    spoil(detection)
    code, said = check(RETINANET, detection)
    assert code == 2
    assert message in said
    assert "Traceback" not in said


def test_the_expected_tree_is_shown(tmp_path, check):
    code, said = check(RETINANET, tmp_path)
    assert code == 2
    assert "DATA/annotations/instances_train2017.json" in said and "DATA/val2017/*.jpg" in said


def test_several_mistakes_are_told_at_once(detection, check):
    absent_images(detection)
    change(detection, "val", zero_size)
    code, said = check(RETINANET, detection)
    assert code == 2
    assert "train: 2 images are not in" in said and "val: 1 boxes have no size" in said


def test_masks_are_asked_for_only_where_they_are_needed(detection, check):
    change(detection, "train", lambda c: c["annotations"][0].pop("segmentation"))
    change(detection, "train", lambda c: c["annotations"][1].update(segmentation=[[1, 2, 3, 4]]))
    assert check(RETINANET, detection)[0] == 0
    code, said = check(MASKRCNN, detection)
    assert code == 2 and "train: 1 annotations have no segmentation" in said
    assert "1 annotations have a segmentation that is neither polygons of three points or more nor RLE" in said


def test_a_few_bad_boxes_among_thousands_are_only_named(detection, check):
    """As in COCO itself, which has two boxes of no height among 860 001."""

    def repeat(content: dict) -> None:
        first = content["annotations"][0]
        start = len(content["annotations"]) + 1
        content["annotations"] += [{**first, "id": start + i} for i in range(2000)]
        content["annotations"][-1]["bbox"] = [5, 5, 10, 0]

    change(detection, "train", repeat)
    code, said = check(RETINANET, detection)
    assert code == 0
    assert "WARNING - train: 1 boxes have no size" in said


def test_images_that_training_passes_over_are_named(detection, check):
    def empty(content: dict) -> None:
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != content["images"][0]["id"]]

    change(detection, "val", empty)
    assert "not trained on" not in check(RETINANET, detection)[1]
    change(detection, "train", empty)
    change(detection, "val", lambda c: c.update(annotations=c["annotations"][:1]))
    _, said = check(RETINANET, detection)
    assert "WARNING - train: 1 images are not trained on, having no box of a class, or being smaller than 32 " in said
    assert "32 pixels: 000001.jpg" in said


def test_a_missing_first_image_does_not_hide_the_others(detection, tmp_path, check):
    own = tmp_path / "own"
    for split in ("train", "val"):
        shutil.copytree(detection / f"{split}2017", own / "images" / split)
    shutil.copytree(detection / "annotations", own / "annotations")
    (own / "images/train/000001.jpg").unlink()
    code, said = check(RETINANET, own)
    assert code == 2 and f"train: 1 images are not in {own}/images/train: 000001.jpg" in said


def own_config(folder: Path, text: str) -> str:
    (folder / "own.py").write_text(text)
    return str(folder / "own.py")


@pytest.mark.parametrize(("config", "kind"), [(RETINANET, "single CocoDataset"), (FPN, "single folder of label maps")])
def test_data_that_cannot_be_followed_is_refused(config, kind, originals, tmp_path, capfd):
    """Its classes could not be set, and it would be trained on with labels of a meaning of their own."""
    own = own_config(
        tmp_path,
        f"_base_ = {config!r}\n"
        "train_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', "
        "datasets=[_base_.train_dataloader.dataset, _base_.train_dataloader.dataset]))\n",
    )
    script, prepare = ("segmentation.py", labelmaps.prepare) if config == FPN else ("detection.py", coco.prepare)
    data = originals / ("segmentation" if config == FPN else "detection")
    assert main(script, prepare, [own, str(data), "--check-data"]) == 2
    said = capfd.readouterr().err
    assert f"is not a {kind}" in said and "--classes config --skip-data-check" in said


def test_a_config_of_the_other_task_is_refused(originals, capfd):
    assert main("detection.py", coco.prepare, [FPN, str(originals / "segmentation"), "--check-data"]) == 2
    assert "is not a single CocoDataset" in capfd.readouterr().err


def test_heads_count_the_classes_of_the_config_too(originals, tmp_path):
    """A config that names its classes and forgets the heads would fail in the first validation."""
    root = originals / "detection"
    names = [name for name in reversed(DIGITS) if name != "two"]
    cfg = Config.fromfile(
        own_config(
            tmp_path,
            f"_base_ = {MASKRCNN!r}\ndata_root = 'elsewhere/'\nmeta = dict(classes={names!r})\n"
            "train_dataloader = dict(dataset=dict(metainfo=meta))\n"
            "val_dataloader = dict(dataset=dict(metainfo=meta))\n",
        )
    )
    replace_root(cfg, str(root))
    coco.prepare(cfg, Request(classes="config"))
    assert cfg.model.roi_head.bbox_head.num_classes == cfg.model.roi_head.mask_head.num_classes == 9
    # mmdet numbers classes in the order of the annotation file, whatever order a config has
    assert cfg.train_dataloader.dataset.metainfo.classes == tuple(name for name in DIGITS if name != "two")
    assert cfg.train_dataloader.dataset.ann_file.startswith(str(root))


def test_weights_of_a_loss_must_fit_the_classes(originals, tmp_path, capfd):
    config = str(ROOT / "configs/segmentation/quickstart_fpn.py")
    (tmp_path / "names.txt").write_text("\n".join(["background", *DIGITS, "ten"]))
    argv = [config, str(originals / "segmentation"), "--check-data", "--classes", str(tmp_path / "names.txt")]
    assert main("segmentation.py", labelmaps.prepare, argv) == 2
    assert "class_weight of a loss in the config has 11 values for 12 classes" in capfd.readouterr().err


@pytest.mark.parametrize("config", [RETINANET, FPN])
def test_the_data_folder_replaces_the_configs_everywhere(config, originals):
    cfg = Config.fromfile(config)
    cfg.val_dataloader.batch_size = 3  # the test loader is no longer a copy, but in the same place
    old = cfg.data_root.rstrip("/")
    segmentation = config == FPN
    root = originals / ("segmentation" if segmentation else "detection")
    replace_root(cfg, str(root))
    assert old not in cfg.pretty_text
    (labelmaps if segmentation else coco).prepare(cfg, Request())
    datasets = [cfg[f"{part}_dataloader"].dataset for part in ("train", "val", "test")]
    paths = [[*dataset.data_prefix.values(), *filter(None, [dataset.get("ann_file")])] for dataset in datasets]
    assert paths[1] == paths[2] != paths[0]
    assert all(Path(path).exists() and Path(path).is_relative_to(root) for path in sum(paths, []))
    assert len({tuple(dataset.metainfo.classes) for dataset in datasets}) == 1
    if not segmentation:
        assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == datasets[1].ann_file


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/{}.json", "{}"),
        ("annotations/instances_{}.json", "images/{}"),
        ("annotations/{}.json", "images"),
        ("{}/_annotations.coco.json", "{}"),
        ("{}.json", ""),
    ],
)
def test_other_usual_layouts_are_found(detection, tmp_path, check, annotations, images):
    own = tmp_path / "own"
    for split in ("train", "val"):
        target = own / images.format(split)
        target.mkdir(parents=True, exist_ok=True)
        rename = {}
        for picture in (detection / f"{split}2017").iterdir():
            rename[picture.name] = f"{split}_{picture.name}"
            shutil.copy(picture, target / rename[picture.name])
        file = own / annotations.format(split)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = json.loads((detection / f"annotations/instances_{split}2017.json").read_text())
        for image in content["images"]:
            image["file_name"] = rename[image["file_name"]]
        file.write_text(json.dumps(content))
    code, said = check(RETINANET, own)
    assert code == 0, said


def test_classes_of_a_text_file_are_a_choice_of_the_categories(detection, tmp_path, check):
    names = tmp_path / "names.txt"
    names.write_text("seven\nthree\n")
    code, said = check(RETINANET, detection, "--classes", str(names))
    assert code == 0
    assert "2 classes from" in said and ": three, seven" in said  # in the order of the annotation file
    names.write_text("seven\ntrois\n")
    code, said = check(RETINANET, detection, "--classes", str(names))
    assert code == 2 and "has no category trois, which" in said and "names.txt has; it has zero, one," in said


def test_classes_of_the_config_must_be_there(detection, check):
    code, said = check(RETINANET, detection, "--classes", "config")
    assert code == 2 and "has no category person, bicycle, car and 77 more, which the config has" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "one class name a line"), ("a\n\nb\n", "without empty lines"), ("a\nb\na\n", "names 'a' more than once")],
)
def test_bad_lists_of_names_are_refused(detection, tmp_path, check, text, message):
    (tmp_path / "names.txt").write_text(text)
    code, said = check(RETINANET, detection, "--classes", str(tmp_path / "names.txt"))
    assert code == 2 and message in said


# Segmentation


def relabel(data: Path, split: str, edit: Callable[[np.ndarray], np.ndarray], name: str = "*") -> None:
    for file in sorted((data / "annotations" / split).glob(f"{name}.png")):
        Image.fromarray(edit(np.array(Image.open(file)))).save(file)


def test_good_label_maps_are_counted_by_class(segmentation, check):
    code, said = check(FPN, segmentation)
    total = sum(
        int((np.array(Image.open(f)) == 5).sum()) for f in (segmentation / "annotations/training").glob("*.png")
    )
    assert code == 0, said
    assert any(line.split()[:2] == ["four", str(total)] for line in said.splitlines())
    assert "11 classes from" in said and "(label 0 is the first): background, zero," in said


def resize_one(data: Path) -> None:
    file = data / "annotations/training/000001.png"
    Image.open(file).resize((32, 32)).save(file)


def colour_one(data: Path) -> None:
    file = data / "annotations/training/000001.png"
    Image.open(file).convert("RGB").save(file)


def deepen_one(data: Path) -> None:
    file = data / "annotations/training/000001.png"
    Image.fromarray(np.array(Image.open(file)).astype(np.uint16)).save(file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: shutil.rmtree(d / "annotations"), "there are no images and label maps for train in"),
        (lambda d: shutil.rmtree(d / "images/validation"), "there are no images and label maps for val in"),
        (lambda d: [f.unlink() for f in (d / "images/training").iterdir()], "holds no pictures"),
        (lambda d: (d / "images/training/000003.jpg").unlink(), "train: 1 label maps have no image in"),
        (lambda d: (d / "annotations/training/000003.png").unlink(), "train: 1 images have no label map in"),
        (
            lambda d: relabel(d, "training", lambda m: np.where(m == 0, 11, m), "000002"),
            "label values 11 are outside of the 11 classes (0 to 10) and not 255, in 1 label maps: 000002",
        ),
        (resize_one, "train: 1 label maps differ in size from their image: 000001.png"),
        (colour_one, "train: 1 label maps have several channels (mode RGB); one channel of class numbers is needed"),
        (deepen_one, "train: 1 label maps have 16 bits or more; 8 are needed: 000001.png"),
        (
            lambda d: relabel(d, "training", lambda m: np.where(m > 0, 255, 0).astype(np.uint8)),
            "hold nothing but 0 and 255; 255 means left out, so a mask of 0 and 255 must become 0 and 1",
        ),
        (lambda d: relabel(d, "training", lambda m: np.full_like(m, 255)), "no pixel of the label maps in"),
        (
            lambda d: relabel(d, "training", lambda m: np.where(m == VAL_LABEL, 0, m).astype(np.uint8)),
            f"classes that val has and train has not: {DIGITS[VAL_LABEL - 1]}",
        ),
        (lambda d: (d / "annotations/training/000001.png").write_bytes(b"nonsense"), "1 label maps cannot be read"),
        (lambda d: (d / "images/training/000001.jpg").write_bytes(b"nonsense"), "images that cannot be read"),
        (lambda d: (d / "classes.txt").write_text("a\n\nb\n"), "without empty lines"),
    ],
)
def test_every_mistake_in_label_maps_is_one_clear_line(segmentation, check, spoil, message):
    spoil(segmentation)
    code, said = check(FPN, segmentation)
    assert code == 2
    assert message in said
    assert "Traceback" not in said


def test_the_folder_above_is_told_from_the_folder_itself(segmentation, check):
    code, said = check(FPN, segmentation.parent)
    assert code == 2 and "DATA/images/training/NAME.jpg" in said
    assert f"The folder {segmentation} looks like it" in said


def test_label_maps_with_a_palette_hold_class_numbers(segmentation, check):
    before = check(FPN, segmentation)[1].splitlines()[-13:]
    for file in (segmentation / "annotations").rglob("*.png"):
        picture = Image.fromarray(np.array(Image.open(file)), "P")
        picture.putpalette([value for i in range(256) for value in (255 - i, i, 3 * i % 256)])
        picture.save(file)
    code, said = check(FPN, segmentation)
    assert code == 0 and said.splitlines()[-13:] == before


def test_zero_may_mean_unlabelled(segmentation, check):
    (segmentation / "classes.txt").write_text("\n".join(DIGITS))
    code, said = check(FPN, segmentation)
    assert code == 2 and "label values 10 are outside of the 10 classes (0 to 9)" in said
    code, said = check(FPN, segmentation, "--reduce-zero-label")
    assert code == 0, said
    assert "label 0 is left out and 1 is the first" in said


def test_without_own_names_the_classes_are_the_configs(segmentation, check):
    names = (segmentation / "classes.txt").rename(segmentation.parent / "names.txt")
    code, said = check(FPN, segmentation)
    assert code == 0 and "wall" in said and "classes never occur" in said
    code, said = check(FPN, segmentation, "--classes", str(names))
    assert code == 0 and "11 classes from" in said


def test_zero_is_left_out_whatever_names_the_classes_come_from(segmentation, tmp_path):
    (segmentation / "classes.txt").unlink()
    cfg = Config.fromfile(
        own_config(
            tmp_path,
            f"_base_ = {FPN!r}\nmeta = dict(classes={DIGITS!r})\n"
            "own = dict(type='BaseSegDataset', reduce_zero_label=False, metainfo=meta)\n"
            "train_dataloader = dict(dataset=own)\n"
            "val_dataloader = dict(dataset=own)\n"
            "test_dataloader = val_dataloader\n",
        )
    )
    replace_root(cfg, str(segmentation))
    labelmaps.prepare(cfg, Request(reduce_zero_label=True))
    assert cfg.train_dataloader.dataset.reduce_zero_label and cfg.test_dataloader.dataset.reduce_zero_label
    assert cfg.model.decode_head.num_classes == 10


def test_folders_are_listed_a_few_times_however_many_files_they_hold(segmentation, check, monkeypatch):
    """ADE20K has 20 000 label maps: a listing for each would take hours."""
    listed = []
    original = labelmaps._files
    monkeypatch.setattr(labelmaps, "_files", lambda folder: listed.append(folder) or original(folder))
    assert check(FPN, segmentation)[0] == 0
    first = len(listed)
    for kind, suffix in (("images", ".jpg"), ("annotations", ".png")):
        folder = segmentation / kind / "training"
        for i in range(50):
            shutil.copy(folder / f"000001{suffix}", folder / f"more{i}{suffix}")
    assert check(FPN, segmentation)[0] == 0
    assert len(listed) == 2 * first


def test_folders_behind_links_are_read(segmentation, tmp_path, check):
    for kind in ("images", "annotations"):
        folder = segmentation / kind / "training"
        folder.rename(tmp_path / kind)
        folder.mkdir()
        (folder / "more").symlink_to(tmp_path / kind)
        (folder / "._000001.png").touch()
    code, said = check(FPN, segmentation)
    assert code == 0, said


@pytest.mark.parametrize(
    ("images", "labels", "suffix"),
    [("images/{}", "labels/{}", ".png"), ("{}/images", "{}/masks", ".png"), ("images/{}", "masks/{}", ".jpeg")],
)
def test_other_usual_layouts_of_label_maps_are_found(segmentation, tmp_path, check, images, labels, suffix):
    own = tmp_path / "own"
    for split, name in (("training", "train"), ("validation", "val")):
        for picture in (segmentation / "images" / split).iterdir():
            target = own / images.format(name) / f"{picture.stem}{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(picture).save(target)
        shutil.copytree(segmentation / "annotations" / split, own / labels.format(name))
    shutil.copy(segmentation / "classes.txt", own)
    code, said = check(FPN, own)
    assert code == 0, said
