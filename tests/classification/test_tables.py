"""Tables of images: which are understood, and what is wrong with the others."""

import pytest
from PIL import Image

from convmlp.classification.options import parse_options
from convmlp.classification.split import divide
from convmlp.classification.tables import read_table
from convmlp.common.errors import RunError

from .conftest import call_main


@pytest.fixture
def table(tmp_path):
    """Writes a table beside the folder of its images, digits/1.png to digits/8.png: table(lines) -> its path."""
    (tmp_path / "digits").mkdir()
    for number in range(1, 9):
        Image.new("L", (8, 8), number).save(tmp_path / "digits" / f"{number}.png")

    def write(*lines, name="table.csv"):
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        return tmp_path / name

    return write


def lines_of(*split):
    """Lines of images 1 to 8, which are odd and even in turn, with their splits."""
    labelled = [f"digits/{n}.png,{('even', 'odd')[n % 2]}" for n in range(1, 9)]
    return ["path,label,split", *(f"{line},{split}" for line, split in zip(labelled, split, strict=True))]


def splits(path, *arguments):
    return [item.split for item in divide(parse_options([*arguments, str(path)]))]


@pytest.mark.parametrize(
    "titles",
    ["path,label", "File Name,Class", "FILEPATH,target", "image_path,category", "\ufeffimage,label", " file , label "],
)
def test_columns_are_known_by_their_usual_names(table, tmp_path, titles):
    first, *others = read_table(table(titles, *(f"digits/{n}.png,digit {n}" for n in range(1, 4))))
    assert first == (str(tmp_path / "digits" / "1.png"), "digit 1", "") and len(others) == 2


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_commas_semicolons_and_tabs_separate_cells(table, separator):
    path = table(f"path{separator}label", f'digits/1.png{separator}"a,b;c"', f"digits/2.png{separator}d")
    assert [item.label for item in read_table(path)] == ["a,b;c", "d"]


def test_paths_are_relative_to_the_table_or_absolute(table, tmp_path, monkeypatch):
    path = table("path,label", "digits/1.png,a", f"{tmp_path}/digits/2.png,b")
    monkeypatch.chdir(tmp_path.parent)
    items = read_table(path.relative_to(tmp_path.parent))
    assert [Image.open(item.path).getpixel((0, 0)) for item in items] == [1, 2]


def test_other_columns_are_passed_over_and_repeated_rows_count_once(table):
    path = table("id,label,path", "7,a,digits/1.png", "8,b,digits/2.png", "9,a,./digits/1.png")
    assert [item.label for item in read_table(path)] == ["a", "b"]


def test_parquet_is_read(table, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"image_path": [f"digits/{n}.png" for n in range(1, 9)], "target": [n % 2 for n in range(1, 9)]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "table.parquet")
    items = read_table(tmp_path / "table.parquet")
    assert [item.label for item in items] == ["1", "0"] * 4 and items[7].path == str(tmp_path / "digits" / "8.png")
    parquet.write_table(pyarrow.table(columns | {"image_path": [{"bytes": b""}] * 8}), tmp_path / "bytes.parquet")
    with pytest.raises(RunError, match="the column image_path does not hold paths of image files"):
        read_table(tmp_path / "bytes.parquet")


def test_the_column_split_says_what_validates(table):
    assert splits(table(*lines_of(*["train"] * 6, "val", "val"))) == ["train"] * 6 + ["val"] * 2
    assert splits(table(*lines_of(*["Validation"] * 2, *["Training"] * 6))) == ["val"] * 2 + ["train"] * 6


def test_a_test_split_is_left_out_or_validates_where_nothing_else_does(table, caplog):
    caplog.set_level("INFO", "convmlp")
    assert splits(table(*lines_of(*["train"] * 4, "val", "val", "test", "test"))) == ["train"] * 4 + ["val"] * 2
    assert "2 images of test left out" in caplog.text
    assert splits(table(*lines_of(*["train"] * 4, *["test"] * 4))) == ["train"] * 4 + ["val"] * 4


def test_options_name_other_splits(table):
    path = table(*lines_of("a", "a", "a", "a", "b", "b", "train", "train"))
    assert splits(path, "--train-split", "a", "--val-split", "b") == ["train"] * 4 + ["val"] * 2


def test_without_a_split_the_images_are_divided(table):
    lines = [line.rpartition(",")[0] for line in lines_of(*[""] * 8)]
    assert set(splits(table(*lines))) == {"train", "val"}


@pytest.mark.parametrize("option", ["--train-split", "--val-split"])
def test_a_split_that_a_table_without_splits_cannot_have_is_refused(table, option):
    with pytest.raises(RunError, match=f"{option} is fold1, but .*table.csv has no column split"):
        splits(table("path,label", *GOOD), option, "fold1")


GOOD = ["digits/1.png,odd", "digits/2.png,even", "digits/3.png,odd", "digits/4.png,even"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "table.csv has no column path (path, file, filename, filepath, image, imagepath); its columns are none"),
        (["picture,label", *GOOD], "table.csv has no column path"),
        (["path,kind", *GOOD], "has no column label (label, class, target, category); its columns are path, kind"),
        (["path,label"], "table.csv has no rows"),
        (["path,label", *GOOD, "digits/nine.png,odd"], "/digits/nine.png is not there; paths are relative to the"),
        (["path,label", *GOOD, "a.png,odd", "b.png,odd"], "/a.png is not there (2 such)"),
        (["path,label", *GOOD, "digits,odd"], "/digits is a folder"),
        (["path,label", *GOOD, "digits/5.png,", "digits/6.png"], "2 images without a label, the first in row 5"),
        (["path,label", *GOOD, ",odd"], "1 image without a path, the first in row 5"),
        (["path,label", *GOOD, "digits/1.png,even"], "/digits/1.png is there twice, with the labels odd and even"),
        (lines_of(*["train"] * 7, ""), "1 image without a split, the first in row 8"),
        (lines_of(*["train"] * 7, "holdout"), "1 image with an unknown split, the first is holdout of"),
        (lines_of(*["train"] * 8), "table.csv has no val images; its splits are train"),
        ([*lines_of(*["train"] * 6, "val", "val"), "digits/8.png,even,train"], "the splits val and train"),
        (["path,label,split", *(f"{line},train" for line in GOOD), "digits/5.png,prime,val"], "alone: prime"),
    ],
)
def test_a_mistake_in_a_table_is_one_line(table, tmp_path, lines, message):
    code, said = call_main("--output", tmp_path / "out", table(*lines))
    assert code == 2 and message in said and "Traceback" not in said, said
    assert not (tmp_path / "out").exists()


def test_a_table_that_is_not_text_is_named(table, tmp_path):
    path = table("path,label")
    path.write_bytes(b"\xff\xfe\x00path")
    with pytest.raises(RunError, match=r"cannot read .*table.csv: "):
        read_table(path)
