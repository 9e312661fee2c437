"""Data of a run: the splits have no image in common, and what was looked at stays as it was."""

import csv
import shutil
from pathlib import Path

import pytest
from PIL import Image

from .conftest import call_main


@pytest.fixture
def leaking(images, tmp_path):
    """The images, with two validation images in training as well."""
    data = Path(shutil.copytree(images, tmp_path / "leaking"))
    for digit in ("digit0", "digit2"):
        shutil.copy(next((data / "val" / digit).iterdir()), data / "train" / digit / "leak.png")
    return data


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Training and validation on the same files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-split", ".", "--val-split", "."], "--train-split and --val-split are both ."),
        (["--val-split", "train"], "--train-split and --val-split are both train"),
        (["--val-split", "./train"], "share 24 files"),
    ],
)
def test_options_that_name_the_same_files_twice_are_refused(run, arguments, message):
    code, said, folder = run(*arguments)
    assert code == 2 and message in said and "cannot validate" in said and not folder.exists()


@pytest.mark.parametrize("linked", ["val", "val/digit1", "val/digit1/0.png"])
def test_validation_images_that_are_links_to_training_images_are_refused(run, pictures, linked):
    place = pictures / linked
    target = pictures / "train" / Path(*Path(linked).parts[1:])
    if place.suffix:
        target = next((pictures / "train" / "digit1").iterdir())
    elif place.exists():
        shutil.rmtree(place)
    place.symlink_to(target)
    n_shared = {"val": "24 files", "val/digit1": "8 files"}.get(linked, "1 file,")
    code, said, folder = run(data=pictures)
    assert code == 2 and f"share {n_shared}" in said and "what is trained on cannot validate" in said
    assert not folder.exists()


def test_a_table_with_one_image_in_both_splits_is_refused(run, images, tmp_path):
    rows = [(path, path.parent.name, path.parts[-3]) for path in sorted(images.glob("*/*/*.png"))]
    rows.append((images / "val" / ".." / "train" / rows[0][1] / rows[0][0].name, rows[0][1], "val"))
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["path,label,split", *(",".join(map(str, row)) for row in rows)]))
    code, said, folder = run(data=table)
    assert code == 2 and "is there twice, with the splits train and val" in said and not folder.exists()


# Copies of validation images


def test_training_images_that_are_copies_of_validation_images_are_left_out(run, leaking):
    code, said, folder = run("--epochs", "1", data=leaking)
    assert code == 0 and "2 training images left out, copies of validation images, such as" in said, said
    assert "24 training and 15 validation images" in said
    rows = rows_of(folder / "duplicates.csv")
    assert [*rows[0]] == ["path", "duplicate_of", "kind", "split", "duplicate_split"]
    leaks = [row for row in rows if (row["split"], row["duplicate_split"]) == ("train", "val")]
    assert [row["path"] for row in leaks] == [
        str(leaking / "train" / name / "leak.png") for name in ("digit0", "digit2")
    ]
    assert all(Path(row["duplicate_of"]).parent.parent == leaking / "val" and row["kind"] == "exact" for row in leaks)


def test_a_resumed_run_leaves_out_the_same_without_looking_again(run, leaking):
    assert run("--epochs", "1", data=leaking).code == 0
    Image.new("L", (36, 36)).save(leaking / "train" / "digit0" / "leak.png")  # which is a copy no more
    code, said, folder = run("--resume", "auto", data=leaking)
    assert code == 0 and "2 training images left out" in said and "looked at" not in said, said
    assert len(rows_of(folder / "duplicates.csv")) >= 2


def test_a_resumed_run_finds_the_copies_again_after_the_data_has_moved(run, leaking):
    assert run("--epochs", "1", data=leaking).code == 0
    moved = leaking.rename(leaking.with_name("moved"))
    code, said, folder = run("--resume", "auto", data=moved)
    assert code == 0 and "24 training and 15 validation images" in said, said
    assert {Path(row["path"]).is_relative_to(moved) for row in rows_of(folder / "duplicates.csv")} == {True}


def test_a_run_that_goes_on_in_another_folder_leaves_out_the_same_there(run, leaking):
    _, _, folder = run("--epochs", "1", data=leaking)
    code, _, other = run("--resume", str(folder / "last.pth"), experiment="other", data=leaking)
    assert code == 0 and rows_of(other / "duplicates.csv") == rows_of(folder / "duplicates.csv")
    code, said, _ = run("--resume", "auto", "--epochs", "3", experiment="other", data=leaking)
    assert code == 0 and "2 training images left out" in said, said


def test_training_images_that_are_all_copies_are_refused(run, pictures):
    shutil.rmtree(pictures / "train")
    shutil.copytree(pictures / "val", pictures / "train")
    code, said, folder = run(data=pictures)
    assert code == 2 and "every training image is a copy of a validation image" in said and not folder.exists()


def test_a_class_whose_training_images_are_all_copies_is_named(run, pictures):
    shutil.rmtree(pictures / "train" / "digit1")
    shutil.copytree(pictures / "val" / "digit1", pictures / "train" / "digit1")
    code, said, folder = run(data=pictures)
    assert code == 2 and "every training image of digit1 is a copy of a validation image" in said
    assert not folder.exists()


def test_very_many_images_are_looked_at_only_when_asked(run, leaking, monkeypatch):
    monkeypatch.setattr("convmlp.classification.data.MOST_IMAGES", 40)
    code, said, folder = run("--epochs", "1", data=leaking)
    assert code == 0 and "41 images are not looked at before training; --check-data does that" in said
    assert "26 training and 15" in said and not (folder / "duplicates.csv").exists()
    code, said = call_main("--check-data", leaking)
    assert code == 0 and "looked at 41 images" in said


def test_a_run_says_which_images_cannot_be_read(run, pictures):
    file = next((pictures / "train" / "digit1").iterdir())
    file.write_bytes(b"")
    code, said, _ = run("--epochs", "1", data=pictures)
    assert code == 0 and f"1 image cannot be read: {file} (an empty file)" in said
    assert "looked at 38 images of 36 to 36 px (median 36), 7 to 8 a class in training" in said


# --check-data


def test_a_look_alone_prints_a_table_and_writes_nothing(leaking, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (leaking / "train" / "digit1" / "broken.png").write_bytes(b"")
    code, said = call_main("--check-data", leaking)
    assert code == 0 and [line.split() for line in said.splitlines()][:4] == [
        ["class", "training", "validation"],
        ["digit0", "9", "5"],
        ["digit1", "8", "5"],
        ["digit2", "9", "5"],
    ]
    assert "looked at 41 images" in said and "1 image cannot be read" in said and "broken.png (an empty file)" in said
    assert "2 exact and 0 near copies of validation images in training" in said and "epoch" not in said
    assert list((tmp_path / "here").iterdir()) == []


def test_a_look_alone_writes_the_copies_where_it_is_told_to(leaking, tmp_path):
    code, said = call_main("--check-data", "--output", tmp_path / "out", "--experiment", "look", leaking)
    assert code == 0 and [path.name for path in (tmp_path / "out" / "look").iterdir()] == ["duplicates.csv"], said
    assert len(rows_of(tmp_path / "out" / "look" / "duplicates.csv")) == 2


def test_a_look_alone_does_not_touch_a_run(run, leaking):
    _, _, folder = run("--epochs", "1", data=leaking)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    (leaking / "train" / "digit0" / "leak.png").unlink()
    code, said, _ = run("--check-data", data=leaking)
    assert (
        code == 2
        and "holds a run, which keeps its split.csv and duplicates.csv" in said
        and "--experiment NAME" in said
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("option", ["--eval", "--resume"])
def test_a_look_alone_does_nothing_else(leaking, option):
    code, said = call_main("--check-data", option, "best.pth", leaking)
    assert code == 2 and "--check-data only looks at the images: it does not go with --eval or --resume" in said


def test_data_sets_with_a_name_are_looked_at_when_asked():
    code, said = call_main("--check-data", "--dataset", "sklearn-digits")
    assert code == 0 and "looked at 1797 images of 8 to 8 px" in said
    assert ["0", "142", "36"] in [line.split() for line in said.splitlines()]
