"""The journal of finished work: resuming, a line cut off, and files that are not this run's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nettrim import staging
from nettrim.experiments.journal import Journal
from nettrim.status import InvalidInput

HEADER = {"experiment": "curves", "seed": 0, "gains": (0.1, 0.2)}


def filled(path: Path) -> Path:
    """A journal of three records."""
    with Journal(path, HEADER) as journal:
        for i in range(3):
            journal.add(f"point {i}", {"value": i / 7, "list": [1, None, "ä\u2028\n"]})
    return path


def test_records_come_back_and_work_continues(tmp_path: Path) -> None:
    path = filled(tmp_path / "journal.jsonl")
    with Journal(path, HEADER) as journal:
        assert list(journal.records) == ["point 0", "point 1", "point 2"]
        assert "point 1" in journal and "point 3" not in journal
        assert journal.records["point 2"] == {"value": 2 / 7, "list": [1, None, "ä\u2028\n"]}
        journal.add("point 3", {"value": 3.0})
    assert list(Journal(path, HEADER).records) == ["point 0", "point 1", "point 2", "point 3"]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 5
    assert list(tmp_path.iterdir()) == [path]  # no second file stays behind


def test_a_record_is_in_the_file_at_once_and_returned_as_it_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, HEADER) as journal:
        given = journal.add("a", {"pair": (1, 2), "n": 0.1})
        assert given == {"pair": [1, 2], "n": 0.1} == journal.records["a"]
        assert Journal(path, HEADER).records == {"a": given}


def test_the_later_record_of_a_key_counts(tmp_path: Path) -> None:
    path = filled(tmp_path / "journal.jsonl")
    with Journal(path, HEADER) as journal:
        journal.add("point 0", {"value": -1})
    assert Journal(path, HEADER).records["point 0"] == {"value": -1}


def test_an_error_inside_keeps_what_was_added(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with pytest.raises(KeyboardInterrupt), Journal(path, HEADER) as journal:
        journal.add("a", {})
        raise KeyboardInterrupt
    assert "a" in Journal(path, HEADER)


def test_nan_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, HEADER) as journal:
        with pytest.raises(ValueError, match="not JSON compliant"):
            journal.add("a", {"value": float("nan")})
        assert "a" not in journal
        journal.add("b", {})
    assert list(Journal(path, HEADER).records) == ["b"]


def test_a_last_line_cut_anywhere_is_dropped_and_written_again(tmp_path: Path) -> None:
    path = filled(tmp_path / "journal.jsonl")
    whole = path.read_bytes()
    last = len(whole[:-1].rpartition(b"\n")[0]) + 1

    @given(st.integers(last, len(whole) - 2))
    def check(length: int) -> None:
        path.write_bytes(whole[:length])
        with Journal(path, HEADER) as journal:
            assert list(journal.records) == ["point 0", "point 1"]
            journal.add("point 2", {"value": 2 / 7, "list": [1, None, "ä\u2028\n"]})
        assert path.read_bytes() == whole

    check()


def test_a_whole_last_line_without_its_end_counts(tmp_path: Path) -> None:
    path = filled(tmp_path / "journal.jsonl")
    path.write_bytes(path.read_bytes()[:-1])
    with Journal(path, HEADER) as journal:
        assert "point 2" in journal
        journal.add("point 3", {})
    assert list(Journal(path, HEADER).records) == ["point 0", "point 1", "point 2", "point 3"]


def test_a_header_cut_off_begins_anew(tmp_path: Path) -> None:
    path = filled(tmp_path / "journal.jsonl")
    for content in ("", '{"experiment": "cur'):
        path.write_text(content, encoding="utf-8")
        with Journal(path, HEADER) as journal:
            assert not journal.records
        assert json.loads(path.read_text(encoding="utf-8")) == staging.mark("journal") | json.loads(json.dumps(HEADER))


@pytest.mark.parametrize("change", [{"seed": 1}, {"gains": (0.1, 0.3)}, {"more": None}])
def test_another_runs_file_is_refused_and_left_alone(tmp_path: Path, change: dict[str, object]) -> None:
    path = filled(tmp_path / "journal.jsonl")
    before = path.read_bytes()
    with pytest.raises(InvalidInput, match=r"journal\.jsonl must belong to a run with .*choose another folder, or resume=False"):
        Journal(path, HEADER | change)
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["{half", "5", "[]", '{"key": "x"}', "null"])
def test_a_broken_line_in_the_middle_is_refused_by_number(tmp_path: Path, line: str) -> None:
    path = filled(tmp_path / "journal.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[3:]]) + "\n", encoding="utf-8")
    with pytest.raises(InvalidInput, match=r"one JSON record a line, found something else in line 3"):
        Journal(path, HEADER)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are\nnotes\n", encoding="utf-8")
    with pytest.raises(InvalidInput, match="found something else in line 1"):
        Journal(path, HEADER)


def test_without_resume_it_begins_anew(tmp_path: Path) -> None:
    path = filled(tmp_path / "journal.jsonl")
    other = HEADER | {"seed": 1}
    with Journal(path, other, resume=False) as journal:
        assert not journal.records
        journal.add("a", {})
    assert list(Journal(path, other).records) == ["a"]


def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text("shopping list")
    with pytest.raises(InvalidInput, match="must be a journal"):
        Journal(path, HEADER)
    path.write_text("")
    with Journal(path, HEADER) as journal:
        assert journal.records == {}


def test_a_whole_line_that_is_no_record_is_refused_at_the_end_too(tmp_path: Path) -> None:
    path = filled(tmp_path / "journal.jsonl")
    path.write_text(path.read_text() + '{"other": 1}\n')
    with pytest.raises(InvalidInput, match="one JSON record a line"):
        Journal(path, HEADER)


def test_two_at_once_do_not_write_the_same_file(tmp_path: Path) -> None:
    """The second would replace the file, and what the first finishes would be written to one that nobody finds any more."""
    path = tmp_path / "runs.jsonl"
    with Journal(path, {"seed": 0}) as first:
        first.add("a", {"value": 1})
        with pytest.raises(InvalidInput, match="another process is writing"), Journal(path, {"seed": 0}):
            pass
        first.add("b", {"value": 2})
    with Journal(path, {"seed": 0}) as after:
        assert set(after.records) == {"a", "b"}
