"""Files of class names."""

import pytest

from convmlp.common.classes import read_class_names
from convmlp.common.errors import RunError


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_names_stand_one_a_line(tmp_path, end):
    path = tmp_path / "classes.txt"
    path.write_bytes(b"\xef\xbb\xbf" + f"cat\n  großer Hund {end}".encode())
    assert read_class_names(path) == ["cat", "großer Hund"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the class names in .*: No such file"),
        (b"\xff\xfe\x00", "cannot read the class names in"),
        (b"\n", "must hold one class name a line"),
        (b"cat\n\ndog", "must hold one class name a line, without empty lines"),
        (b"cat\ndog\ncat\n", "names 'cat' more than once"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "classes.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=message):
        read_class_names(path)


def test_names_that_need_not_be_unique_may_repeat(tmp_path):
    (tmp_path / "imagenet.txt").write_text("crane\ncrane\n")
    assert read_class_names(tmp_path / "imagenet.txt", unique=False) == ["crane", "crane"]
