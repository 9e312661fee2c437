"""Sources of images, and mistakes in the data."""

import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from convmlp.classification.options import parse_options
from convmlp.classification.sources import Source, check_classes, count_classes, open_source, relabel
from convmlp.common.errors import RunError


def options_for(root, *arguments):
    return parse_options([*arguments, str(root)])


def test_digits_are_held_out_in_equal_shares_and_never_trained_on():
    options = parse_options(["--dataset", "sklearn-digits"])
    train, held_out, again = (open_source(options, train=train) for train in (True, False, False))
    assert (len(train), len(held_out)) == (1437, 360)
    assert min(Counter(held_out.load(i)[1] for i in range(360)).values()) >= 34
    assert held_out.class_names == [str(i) for i in range(10)] and held_out.name(3) == "digits held-out image 3"
    assert all(held_out.load(i) == again.load(i) for i in range(360))
    assert held_out.load(0)[0].size == (8, 8) and held_out.targets()[7] == held_out.load(7)[1]
    images = Counter(source.load(i)[0].tobytes() for source in (train, held_out) for i in range(len(source)))
    assert images == Counter(np.round(image * 255 / 16).astype(np.uint8).tobytes() for image in load_digits().images)


@pytest.mark.parametrize("names", [("train", "val"), ("train", "validation"), ("training", "valid")])
def test_image_folders_are_found_under_their_usual_names(make_pictures, names):
    root = make_pictures(splits={names[0]: 4, names[1]: 2})
    options = options_for(root)
    train, val = open_source(options, True), open_source(options, False)
    assert (len(train), len(val)) == (12, 6)
    assert check_classes(train, val, parse_options([])) == ["digit0", "digit1", "digit2"]
    assert train.load(11)[1] == 2 and train.name(11).endswith(".png")


def test_tar_files_hold_the_same_images_as_their_folders(pictures, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    for split in ("train", "val"):
        with tarfile.open(tars / f"{split}.tar", "w") as archive:
            archive.add(pictures / split, arcname=".")
    ours, theirs = (open_source(options_for(root), True) for root in (tars, pictures))
    assert ours.class_names == ["digit0", "digit1", "digit2"] and len(ours) == len(theirs) == 24
    for i in range(24):
        assert ours.load(i) == theirs.load(i)
    assert ours.targets().tolist() == theirs.targets().tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert count_classes(ours, parse_options([]), 4).tolist() == [8, 8, 8, 0]


def test_targets_are_told_without_reading_an_image_and_as_the_classes_are_numbered(pictures):
    for file in pictures.glob("train/*/*.png"):
        file.write_bytes(b"")
    source = relabel(open_source(options_for(pictures), True), ["digit1", "digit2", "digit0"], "x.pth")
    assert source.targets().tolist() == [2] * 8 + [0] * 8 + [1] * 8


def test_datasets_with_several_targets_an_image_do_not_tell_them():
    class Boxes:
        classes = ["a", "b"]
        targets = [[1, 0], [0, 1]]

        def __len__(self):
            return 2

    assert (
        Source(Boxes(), "boxes").targets() is None
        and count_classes(Source(Boxes(), "boxes"), parse_options([]), 2) is None
    )


def test_hugging_face_folders_are_read(pictures):
    train = open_source(options_for(pictures / "train", "--dataset", f"hfds/{pictures}"), True)
    assert len(train) == 24 and train.class_names == ["digit0", "digit1", "digit2"]
    image, target = train.load(23)
    assert image.size == (36, 36) and target == 2
    assert train.targets().tolist() == [train.load(i)[1] for i in range(24)]


def write_mnist(folder, images, labels, prefix):
    folder.mkdir(parents=True, exist_ok=True)
    header = np.array([0x00000803, *images.shape], dtype=">i4").tobytes()
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
    header = np.array([0x00000801, len(labels)], dtype=">i4").tobytes()
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.astype(np.uint8).tobytes())


def test_torchvision_datasets_with_a_train_flag_are_read(tmp_path):
    digits = load_digits()
    images = np.round(digits.images[:360] * 255 / 16).astype(np.uint8)
    for prefix in ("train", "t10k"):
        write_mnist(tmp_path / "MNIST" / "raw", np.kron(images, np.ones((3, 3), np.uint8)), digits.target[:360], prefix)
    options = options_for(tmp_path, "--dataset", "tv-MNIST", "--num-classes", "10")
    train = open_source(options, True)
    assert len(train) == 360 and len(train.class_names) == 10
    image, target = open_source(options, False).load(7)
    assert image.size == (24, 24) and target == digits.target[7]
    assert train.targets().tolist() == digits.target[:360].tolist()


def test_torchvision_datasets_with_splits_are_read_under_synonyms(make_pictures):
    root = make_pictures("country211", splits={"train": 3, "valid": 2, "test": 1}).parent
    for name in ("validation", "val", "valid"):
        options = options_for(root, "--dataset", "tv-Country211", "--val-split", name)
        assert len(open_source(options, False)) == 6
    assert len(open_source(options_for(root, "--dataset", "tv-Country211", "--val-split", "test"), False)) == 3
    with pytest.raises(RunError, match="no split 'nope'"):
        open_source(options_for(root, "--dataset", "tv-Country211", "--val-split", "nope"), False)


@pytest.mark.slow
def test_classes_are_numbered_by_name_alone_whatever_the_hashes(make_pictures):
    root = make_pictures(classes=(0, 1, 2), splits={"train": 2, "val": 1})
    for split in ("train", "val"):
        for digit, name in enumerate(("b", "A", "a")):  # A and a are ties of timm's sorting key
            (root / split / f"digit{digit}").rename(root / split / name)
    script = "from convmlp.classification import sources, options as o; import sys;"
    script += "s = sources.open_source(o.parse_options([sys.argv[1]]), True); print(s.class_names, s.load(0)[1])"
    command = [sys.executable, "-c", script, str(root)]
    for seed in ("0", "1", "2", "3"):
        shown = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": seed})
        assert shown.stdout == "['A', 'a', 'b'] 0\n", shown.stderr


def test_hidden_folders_are_passed_over_and_many_formats_read(make_pictures):
    root = make_pictures()
    (root / "train" / ".ipynb_checkpoints").mkdir()
    for i, extension in enumerate(("bmp", "webp", "tif", "gif", "ppm")):
        image_file = sorted((root / "train" / "digit1").iterdir())[i]
        Image.open(image_file).convert("L").save(image_file.with_suffix(f".{extension}"))
        Image.open(image_file).save(root / "train" / ".ipynb_checkpoints" / image_file.name)
        image_file.unlink()
    train = open_source(options_for(root), True)
    assert len(train) == 24 and train.class_names == ["digit0", "digit1", "digit2"]
    assert [train.load(i)[1] for i in range(24)] == [0] * 8 + [1] * 8 + [2] * 8


def test_a_class_map_orders_classes_and_says_which_folders_it_leaves_out(pictures, tmp_path, caplog):
    (tmp_path / "map.txt").write_text("digit2\ndigit0\n")
    source = open_source(options_for(pictures, "--class-map", str(tmp_path / "map.txt")), True)
    assert source.class_names == ["digit2", "digit0"] and len(source) == 16
    assert "lacks 1 folder of" in caplog.text and "digit1" in caplog.text


def test_a_source_can_take_the_class_numbers_of_a_checkpoint(make_pictures):
    source = open_source(options_for(make_pictures(classes=(1, 2))), True)
    relabelled = relabel(source, ["digit2", "digit0", "digit1"], "best.pth")
    assert (source.load(0)[1], source.load(15)[1]) == (0, 1)
    assert (relabelled.load(0)[1], relabelled.load(15)[1]) == (2, 0)
    assert relabel(source, ["digit1", "digit2"], "best.pth") is source
    with pytest.raises(RunError, match="best.pth does not know the class digit2 of the data"):
        relabel(source, ["digit1", "digit7"], "best.pth")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataset", "tv-CIFAR11"], "no dataset CIFAR11; did you mean CIFAR10?"),
        (["--dataset", "tv-cifar10"], "no dataset cifar10; did you mean CIFAR10?"),
        (["--dataset", "tv-CIFAR10"], "--download"),
        (["--dataset", "tv-FakeData"], "neither train= nor split="),
        (["--dataset", "digits"], "did you mean sklearn-digits?"),
        (["--train-split", "nope"], "no nope folder"),
        (["--class-map", "nowhere.txt"], "cannot read the class names in nowhere.txt: No such file"),
        (["--dataset", "tv-Kinetics"], "cannot open Kinetics"),
        (["--dataset", "hfds/nowhere/at/all"], "cannot open --dataset hfds/nowhere/at/all"),
    ],
)
def test_data_that_is_not_there_is_an_error_with_the_way_out(pictures, arguments, message):
    with pytest.raises(RunError) as error:
        open_source(options_for(pictures, *arguments), True)
    assert message in str(error.value)


def test_missing_folders_are_named(tmp_path):
    for root, message in ((tmp_path / "nope", "no such data folder"), (tmp_path, "no train folder in")):
        with pytest.raises(RunError, match=message):
            open_source(options_for(root), True)
    with pytest.raises(RunError, match="no data folder"):
        open_source(parse_options([]), True)


def test_images_outside_class_folders_are_refused(pictures):
    image_file = next((pictures / "train" / "digit0").iterdir())
    image_file.rename(pictures / "train" / "loose.png")
    with pytest.raises(RunError, match="holds images beside its class folders"):
        open_source(options_for(pictures), True)


def test_class_folders_of_one_name_are_refused(pictures):
    for name in ("digit0", "digit1"):
        (pictures / "train" / name).rename(pictures / "train" / "parked")
        (pictures / "train" / name).mkdir()
        (pictures / "train" / "parked").rename(pictures / "train" / name / "small")
    with pytest.raises(RunError, match="two class folders in .* have one name: "):
        open_source(options_for(pictures), True)


def test_a_broken_tar_file_is_named(tmp_path):
    (tmp_path / "train.tar").write_bytes(b"nothing like a tar file" * 100)
    with pytest.raises(RunError, match="cannot read .*train.tar"):
        open_source(options_for(tmp_path), True)


def test_empty_class_folders_are_named(pictures):
    (pictures / "train" / "digit9").mkdir()
    with pytest.raises(RunError, match="class folder .*digit9 holds no images"):
        open_source(options_for(pictures), True)


def test_classes_must_agree_between_train_val_and_num_classes(make_pictures):
    root = make_pictures()
    for image_file in (root / "val" / "digit2").iterdir():
        image_file.unlink()
    (root / "val" / "digit2").rmdir()
    train, val = (open_source(options_for(root), is_train) for is_train in (True, False))
    with pytest.raises(
        RunError, match="training data has 3 classes, the validation data 2; only one of them has digit2"
    ):
        check_classes(train, val, parse_options([]))
    with pytest.raises(RunError, match="--num-classes is 7, but the data has 3"):
        check_classes(train, train, parse_options(["--num-classes", "7"]))
    with pytest.raises(RunError, match="give --num-classes"):
        check_classes(SimpleNamespace(class_names=[]), SimpleNamespace(class_names=[]), parse_options([]))


def test_names_that_differ_in_case_alone_have_an_order(make_pictures):
    root = make_pictures(splits={"train": 2, "val": 1})
    for digit, name in enumerate(("b", "A", "a")):
        (root / "train" / f"digit{digit}").rename(root / "train" / name)
    train = open_source(options_for(root), True)
    assert train.class_names == ["A", "a", "b"]
    for i in range(6):
        assert train.class_names[train.load(i)[1]] == Path(train.name(i)).parent.name
