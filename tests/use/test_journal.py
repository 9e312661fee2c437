"""The journal of results: what an interrupted command left is gone on with, and nothing else is."""

import pytest

from convmlp.common.errors import RunError
from convmlp.use.journal import Journal

ROWS = [{"image": "a\udce9.png", "classes": []}, {"image": "b.png", "error": "b.png: empty"}]


def test_rows_of_an_interrupted_command_are_gone_on_with(tmp_path):
    begun = Journal(tmp_path / "x.csv", {"topk": 5}, resume=False)
    for row in ROWS:
        begun.add(row)
    with open(tmp_path / "x.csv.partial", "ab") as file:
        file.write(b'{"image": "c.pn')  # the power failed
    resumed = Journal(tmp_path / "x.csv", {"topk": 5}, resume=True)
    assert resumed.done == {row["image"] for row in ROWS} and (resumed.n_rows, resumed.n_errors) == (2, 1)
    resumed.add({"image": "c.png", "classes": []})
    assert [row["image"] for row in resumed] == ["a\udce9.png", "b.png", "c.png"]
    assert list(resumed)[:2] == ROWS  # and can be read again
    resumed.finish()
    assert not any(tmp_path.iterdir())


def test_a_journal_of_other_settings_is_refused_and_stays(tmp_path):
    Journal(tmp_path / "x.csv", {"topk": 5}, resume=False).add(ROWS[0])
    before = (tmp_path / "x.csv.partial").read_bytes()
    with pytest.raises(RunError, match=r'x.csv.partial was begun with {"topk": 5}, not with {"topk": 3}'):
        Journal(tmp_path / "x.csv", {"topk": 3}, resume=True)
    assert (tmp_path / "x.csv.partial").read_bytes() == before


def test_without_resume_and_without_a_result_it_begins_anew(tmp_path):
    Journal(tmp_path / "x.csv", {}, resume=False).add(ROWS[0])
    assert list(Journal(tmp_path / "x.csv", {}, resume=False)) == []
    nowhere = Journal(None, {}, resume=False)
    nowhere.add(ROWS[1])
    assert list(nowhere) == ROWS[1:]
    nowhere.finish()
