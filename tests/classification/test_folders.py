"""Folders of images: what is found in them, and under which labels."""

import pytest
from PIL import Image

from convmlp.classification.folders import Item, data_path, find_undivided, labels_of, list_folder, natural_order
from convmlp.classification.options import parse_options
from convmlp.common.errors import RunError


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(root / name)
    return root


def listed(root, class_names=()):
    return [(item.path, item.label) for item in list_folder(root, parse_options([str(root)]), list(class_names))]


def test_a_cell_is_one_label_or_several_where_that_is_asked_for():
    assert labels_of(Item("1.png", "cat;dog"), multi_label=False) == ["cat;dog"]
    assert labels_of(Item("1.png", " cat ;dog|big bird; "), multi_label=True) == ["cat", "dog", "big bird"]
    assert labels_of(Item("1.png", ""), multi_label=True) == []


def test_images_below_a_class_folder_have_the_name_of_the_folder_they_are_in(tmp_path):
    write(tmp_path, "b/10.png", "b/9.png", "a/deep/1.png")
    assert listed(tmp_path) == [
        (str(tmp_path / "a" / "deep" / "1.png"), "deep"),
        (str(tmp_path / "b" / "9.png"), "b"),
        (str(tmp_path / "b" / "10.png"), "b"),
    ]


@pytest.mark.parametrize("hidden", [".cache/1.png", "a/.thumbnails/1.png"])
def test_hidden_folders_are_skipped(tmp_path, hidden):
    write(tmp_path, "a/1.png", "b/1.png", hidden)
    assert [label for _, label in listed(tmp_path)] == ["a", "b"]
    assert [label for _, label in listed(tmp_path, ["a", "b"])] == ["a", "b"]


def test_names_that_differ_in_case_alone_are_two_classes_in_a_fixed_order(tmp_path):
    write(tmp_path, "a/1.png", "A/1.png", "b/1.png")
    assert natural_order(label for _, label in listed(tmp_path)) == ["A", "a", "b"]
    names = [name for letter in "abcdefghij" for name in (f"{letter.upper()}1", f"{letter}1")]
    assert natural_order(reversed([*names, *names])) == names


def test_undivided_images_are_found_whatever_the_classes_are_called(tmp_path):
    def undivided(name, *arguments):
        return find_undivided(parse_options([*arguments, str(tmp_path / name)]))

    write(tmp_path, "both/train/a/1.png", "both/valid/a/1.png")
    write(tmp_path, "half/train/a/1.png", "half/notes/1.png")
    write(tmp_path, "whole/a/1.png", "whole/b/1.png")
    write(tmp_path, "railway/train/1.png", "railway/bus/1.png")
    assert undivided("both") is None
    assert undivided("half") == tmp_path / "half" / "train"
    assert undivided("whole") == tmp_path / "whole"
    assert undivided("whole", "--train-split", "fold1") is undivided("half", "--val-split", "fold2") is None
    assert undivided("railway") == tmp_path / "railway"


def test_data_is_a_folder_or_a_table(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    write(tmp_path, "1.png")
    for name, message in (
        ("1.png", "1.png is an image; it takes a folder of images, or a table of them"),
        ("notes.txt", "notes.txt is neither a folder nor a table"),
        ("nowhere", "no such data folder: "),
    ):
        with pytest.raises(RunError, match=message):
            data_path(parse_options([str(tmp_path / name)]))
