"""Split of undivided images: by content, the same every time, and kept with the run."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from convmlp.classification.options import parse_options
from convmlp.classification.split import divide

from .conftest import SMALL, TINY, Result, call_main, leave_out_figures


def write_digits(root, start, stop, classes=(0, 1, 2)):
    """root/digitN/*.png of the images start to stop of each digit."""
    digits = load_digits()
    for digit in classes:
        (root / f"digit{digit}").mkdir(parents=True, exist_ok=True)
        for i in np.flatnonzero(digits.target == digit)[start:stop]:
            Image.fromarray((digits.images[i] * 15).astype("uint8")).save(root / f"digit{digit}" / f"{i:04}.png")
    return root


@pytest.fixture
def digits(tmp_path):
    """Three classes of 40 images each, not divided."""
    return write_digits(tmp_path / "digits", 0, 40)


def split(root, *arguments):
    """The items of DATA in either split."""
    items = divide(parse_options([*arguments, str(root)]))
    return {split: [item for item in items if item.split == split] for split in ("train", "val")}


def contents(items):
    return {Path(item.path).read_bytes() for item in items}


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Sides by content


def test_images_keep_their_split_when_others_come_and_names_change(digits):
    before = {split: contents(items) for split, items in split(digits).items()}
    for number, file in enumerate(sorted(digits.glob("*/*.png"))):
        file.rename(file.with_name(f"{(7 * number) % 120}.png"))
    (digits / "digit1").rename(digits / "one")
    write_digits(digits, 40, 80, classes=(0, 2))
    after = {split: contents(items) for split, items in split(digits).items()}
    assert len(after["train"]) > len(before["train"]) and before["train"] < after["train"]
    assert len(after["val"]) > len(before["val"]) and before["val"] < after["val"]


def test_files_of_the_same_content_are_in_the_same_split(digits):
    for file in digits.glob("*/*.png"):
        shutil.copy(file, file.with_stem(f"copy of {file.stem}"))
    found = split(digits)
    assert len(found["train"]) + len(found["val"]) == 240 and found["val"]
    assert not contents(found["train"]) & contents(found["val"])


@pytest.mark.parametrize("share", ["0.000001", "0.999999"])
def test_each_class_is_in_both_splits_whatever_the_share(digits, share):
    few, many = sorted(split(digits, "--val-share", share).values(), key=len)
    assert sorted(item.label for item in few) == ["digit0", "digit1", "digit2"] and len(many) == 117


def test_the_share_says_how_many_validate(tmp_path):
    root = write_digits(tmp_path, 0, 170)
    found = {share: contents(split(root, "--val-share", str(share))["val"]) for share in (0.1, 0.2, 0.5)}
    for share, val in found.items():
        assert len(val) == pytest.approx(share * 510, abs=30)
    assert found[0.1] < found[0.2] < found[0.5]


def test_a_training_folder_without_a_validation_folder_is_divided(digits, tmp_path, caplog):
    caplog.set_level("INFO", "convmlp")
    alone = contents(split(digits)["val"])
    (tmp_path / "data").mkdir()
    digits.rename(tmp_path / "data" / "train")
    write_digits(tmp_path / "data" / "test", 40, 44)
    assert contents(split(tmp_path / "data")["val"]) == alone
    assert f"{tmp_path / 'data'} has no validation folder: {tmp_path / 'data' / 'train'} is divided" in caplog.text


def test_the_share_is_not_used_where_there_is_a_validation_folder(images, caplog):
    caplog.set_level("INFO", "convmlp")
    assert divide(parse_options(["--val-share", "0.3", str(images)])) is None
    assert "--val-share 0.3 is not used: the data has a validation set" in caplog.text


def test_a_class_map_names_the_classes_that_are_divided(digits, tmp_path):
    (tmp_path / "map.txt").write_text("digit2\ndigit0\n")
    found = split(digits, "--class-map", str(tmp_path / "map.txt"))
    assert {item.label for item in found["train"]} == {item.label for item in found["val"]} == {"digit0", "digit2"}


def test_a_class_map_that_leaves_images_of_a_table_out_says_so(divided, tmp_path, caplog):
    table, map_file = divided[1].folder / "split.csv", tmp_path / "map.txt"
    map_file.write_text("digit2\ndigit0\n")
    found = split(table, "--class-map", str(map_file))
    assert {item.label for item in found["train"]} == {"digit0", "digit2"}
    assert f"{map_file} lacks the classes of 12 images of {table}" in caplog.text


def test_a_class_map_of_none_of_the_classes_is_refused(digits, tmp_path):
    (tmp_path / "map.txt").write_text("cat\ndog\n")
    code, said = call_main("--class-map", tmp_path / "map.txt", "--output", tmp_path / "out", digits)
    assert code == 2 and "digits has no image of the classes in" in said and "map.txt: cat, dog" in said


# What cannot be divided


def test_one_class_alone_is_refused(tmp_path):
    code, said = call_main("--output", tmp_path / "out", write_digits(tmp_path / "one", 0, 4, classes=(3,)))
    assert code == 2 and "one has one class only, digit3; there is nothing to tell apart" in said


@pytest.mark.parametrize("copies", [0, 1])
def test_a_class_needs_two_different_images(digits, tmp_path, copies):
    file = write_digits(digits, 0, 1, classes=(7,)) / "digit7" / "0007.png"
    for number in range(copies):
        shutil.copy(file, file.with_stem(f"copy{number}"))
    code, said = call_main("--output", tmp_path / "out", digits)
    assert code == 2 and "class digit7 has fewer than two different images (1 class like this)" in said


@pytest.mark.parametrize("share", ["0", "1", "-0.1", "20", "nan"])
def test_the_share_is_between_0_and_1(digits, share):
    code, said = call_main(f"--val-share={share}", digits)
    assert code == 2 and "--val-share must be" in said and share in said


# The split of a run


@pytest.fixture(scope="module")
def divided(tmp_path_factory) -> tuple[Path, Result]:
    """Class folders and a run on them, of one epoch; tests change copies."""
    root = tmp_path_factory.mktemp("divided")
    data = write_digits(root / "digits", 0, 12)
    with pytest.MonkeyPatch.context() as patch:
        leave_out_figures(patch)
        code, said = call_main(
            *SMALL, *TINY, "--epochs", 1, "--val-share", "0.4", "--output", root, "--experiment", "run", data
        )
    assert code == 0, said
    return data, Result(code, said, root / "run")


@pytest.fixture
def changed(divided, tmp_path):
    """A copy of the run, whose images have since been joined by others."""
    data, result = divided
    write_digits(tmp_path / "more", 12, 24)
    added = [Path(shutil.copy(file, data / file.parent.name)) for file in (tmp_path / "more").glob("*/*.png")]
    yield data, Path(shutil.copytree(result.folder, tmp_path / "out" / "run"))
    for file in added:
        file.unlink()


def test_a_run_leaves_its_split_which_is_a_table_to_train_on(divided):
    data, result = divided
    rows = rows_of(result.folder / "split.csv")
    assert [*rows[0]] == ["path", "label", "split"] and len(rows) == 36
    n_val = sum(row["split"] == "val" for row in rows)
    assert f"{data} divided by content: {36 - n_val} training and {n_val} validation images" in result.said
    ours = split(data, "--val-share", "0.4")
    assert split(result.folder / "split.csv") == ours and len(ours["val"]) == n_val


def test_a_resumed_run_keeps_its_split_though_images_were_added(changed, run):
    data, folder = changed
    before = (folder / "split.csv").read_bytes()
    code, said, _ = run("--val-share", "0.4", "--resume", "auto", data=data)
    assert code == 0 and "36 images that it does not know left out" in said, said
    assert (folder / "split.csv").read_bytes() == before
    assert sum(int(row["images"]) for row in rows_of(folder / "per_class.csv")) == before.count(b",val")


def test_an_evaluation_takes_the_validation_images_of_the_run(changed, no_figures):
    data, folder = changed
    best = float(rows_of(folder / "summary.csv")[0]["eval_top1"])
    code, said = call_main("--eval", folder / "best.pth", "-j", 0, data)
    assert code == 0 and f"top-1 {best:.2f} %" in said, said
    n_val = sum(row["split"] == "val" for row in rows_of(folder / "split.csv"))
    assert f"of {n_val} images)" in said


def test_an_evaluation_can_take_all_images(changed, no_figures):
    data, folder = changed
    code, said = call_main("--eval", folder / "best.pth", "--val-split", ".", "-j", 0, data)
    assert code == 0 and "of 72 images)" in said, said


def test_other_images_are_divided_anew_to_be_evaluated(divided, digits, tmp_path, no_figures):
    _, result = divided
    code, said = call_main("--eval", result.folder / "best.pth", "--output", tmp_path / "out", "-j", 0, digits)
    assert code == 0 and "split.csv knows none of these images: they are divided anew" in said, said
    assert f"of {len(split(digits, '--val-share', '0.4')['val'])} images)" in said


def test_an_evaluation_without_a_validation_image_says_how_to_take_all(divided, tmp_path):
    data, result = divided
    for row in rows_of(result.folder / "split.csv"):
        if row["split"] == "train":
            (tmp_path / "part" / row["label"]).mkdir(parents=True, exist_ok=True)
            (tmp_path / "part" / row["label"] / Path(row["path"]).name).symlink_to(row["path"])
    code, said = call_main("--eval", result.folder / "best.pth", "-j", 0, tmp_path / "part")
    assert code == 2 and "has no validation image among those of" in said and "--val-split . takes all images" in said


def test_an_evaluation_can_take_the_training_images_of_a_table(divided, tmp_path, no_figures):
    folder = divided[1].folder
    n_train = sum(row["split"] == "train" for row in rows_of(folder / "split.csv"))
    arguments = ["--eval", folder / "best.pth", "--val-split", "train", "--output", tmp_path / "out", "-j", 0]
    code, said = call_main(*arguments, folder / "split.csv")
    assert code == 0 and f"of {n_train} images)" in said, said
