"""Tables of what was found, and names of drawn copies."""

import csv
import io
import json
from pathlib import Path

import pytest
from pyarrow import parquet
from rich.console import Console

from convmlp.use.tables import drawn_names, make_table, write_csv, write_json, write_json_lines, write_parquet

DOG = dict(index=1, name="dog", score=0.5, box=[1.0, 2.0, 30.4, 40.0], mask={"size": [4, 4], "counts": "x"})


def shown(rows) -> list[list[str]]:
    console = Console(width=200, file=io.StringIO())
    console.print(make_table(rows))
    return [line.split() for line in console.file.getvalue().splitlines() if line.strip()]


def test_a_table_names_each_image_once_and_says_where_nothing_was_found():
    lines = shown([{"image": "a.png", "detections": [DOG, DOG]}, {"image": "b.png", "detections": []}])
    assert lines[0] == ["image", "class", "score", "box"]
    assert lines[2:] == [
        ["a.png", "dog", "50.0", "%", "1,", "2,", "30,", "40"],
        ["dog", "50.0", "%", "1,", "2,", "30,", "40"],
        ["b.png", "nothing", "found"],
    ]


def test_an_answer_that_is_not_sure_enough_says_so_on_the_screen_and_in_csv():
    cat = dict(index=0, name="cat", probability=0.4)
    rows = [{"image": f"{i}.png", "abstained": i == 0, "classes": [cat, cat]} for i in range(2)]
    assert [line[1:-2] for line in shown(rows)[2:]] == [["not", "sure:", "cat"], [], ["cat"], []]
    file = io.StringIO()
    write_csv(file, rows)
    found = [*csv.DictReader(io.StringIO(file.getvalue()))]
    assert [row["abstained"] for row in found] == ["True", "True", "False", "False"]


def test_csv_has_a_line_for_each_thing_found_and_its_columns_where_nothing_was():
    for detections in ([DOG], []):
        file = io.StringIO()
        write_csv(file, [{"image": "a.png", "detections": detections}])
        rows = list(csv.reader(io.StringIO(file.getvalue())))
        assert rows[0] == ["image", "rank", "index", "name", "score", "x1", "y1", "x2", "y2"]
        assert rows[1:] == [["a.png", "1", "1", "dog", "0.5", "1.0", "2.0", "30.4", "40.0"]] * len(detections)


def test_drawings_of_images_of_one_name_do_not_overwrite_each_other():
    names = [*("x/a.png", "y/a.png", "y/b.png", "y/b.jpg", "y_a.png"), *("a/b_c.png", "a_b/c.png", "x/c.png", "A.png")]
    paths = [Path(name) for name in names]
    names = drawn_names(paths)
    assert len({name.lower() for name in names}) == len(paths)
    assert all(name.endswith(".png") and "/" not in name for name in names)
    assert drawn_names([Path("x/a.jpg"), Path("y/b.png")]) == ["a.png", "b.png"]


@pytest.mark.parametrize("kind", ["classes", "detections"])
def test_parquet_has_a_row_for_each_image_with_lists_as_they_are(kind, tmp_path):
    found = {key: DOG[key] for key in ("index", "name")} | {"probability": 0.5} if kind == "classes" else DOG
    first = {"image": "a.png", "features": [0.5, 2.0]} if kind == "classes" else {"image": "a.png"}
    rows = [{**first, kind: []}, {"image": "b.png", "error": "b.png: empty"}, {**first, "image": "c", kind: [found]}]
    write_parquet(tmp_path / "x.parquet", iter(rows))
    assert parquet.read_table(tmp_path / "x.parquet").to_pylist() == [rows[0], rows[2]]


def test_json_and_json_lines_hold_every_row_and_what_could_not_be_read():
    rows = [{"image": "a.png", "classes": []}, {"image": "b.png", "error": "b.png: empty"}]
    whole, lines = io.StringIO(), io.StringIO()
    write_json(whole, iter(rows))
    write_json_lines(lines, iter(rows))
    assert json.loads(whole.getvalue()) == {"predictions": rows[:1], "unreadable": ["b.png: empty"]}
    assert [json.loads(line) for line in lines.getvalue().splitlines()] == rows
