"""The checker of names and docstrings reports planted findings, and none in this project."""

from __future__ import annotations

import pytest

from tools.checks.language import FOLDERS, ROOT, findings, words


@pytest.mark.parametrize(
    ("source", "finding"),
    [
        ("def found_rows(): ...", "name found_rows: use matched, result in place of 'found'"),
        ("def count(asked): ...", "name asked: use requested in place of 'asked'"),
        ("def count(*, judge): ...", "name judge: use teacher in place of 'judge'"),
        ("class RowsTold: ...", "name RowsTold: use explicit, reported in place of 'told'"),
        ("class Rows:\n    kept: int", "name kept: use retained in place of 'kept'"),
        ('"""Return what a step has read."""', "docstring 'Return what a step has read.': 'Return what'"),
        ('def rows():\n    """Rows that the reader asks for."""', "docstring 'Rows that the reader asks for.': 'asks'"),
    ],
    ids=["function", "argument", "keyword", "class", "field", "clause", "person"],
)
def test_planted_findings_are_reported(source: str, finding: str) -> None:
    assert [sentence for _, sentence in findings(source)] == [finding]


def test_standard_names_and_docstrings_have_no_findings() -> None:
    source = '''"""Read rows.

What follows the first line is not checked.
"""
def read_rows(requested):
    """Return the requested rows."""
    found = requested
    return found
def _asked(told): ...
class Rows:
    """The rows of a step."""
    retained: int
    _kept: int
'''
    assert list(findings(source)) == []


@pytest.mark.parametrize(
    ("source", "finding"),
    [
        ("def rows():\n    found = 1", "name found: use matched, result in place of 'found'"),
        ("def _rows(told): ...", "name told: use explicit, reported in place of 'told'"),
        ("def _asked_rows(): ...", "name _asked_rows: use requested in place of 'asked'"),
        ("for some in rows: ...", "name some: use a noun in place of 'some'"),
        ("self._kept = 1", "name _kept: use retained in place of 'kept'"),
        ("query = 'CREATE VIEW drawn AS SELECT 1'", "view drawn: use a noun"),
    ],
    ids=["local", "argument", "function", "loop", "attribute", "view"],
)
def test_planted_findings_of_private_names_are_reported(source: str, finding: str) -> None:
    assert finding in [sentence for _, sentence in findings(source, private=True)]
    assert list(findings(source)) == []


def test_names_are_split_into_words() -> None:
    assert words("read_HTTPHeader2") == ["read", "http", "header2"]


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_this_project_has_no_findings(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    private = folder == "bigdssm"
    every = [(path, *one) for path in paths for one in findings(path.read_text("utf-8"), private=private)]
    assert [f"{path}:{line}: {sentence}" for path, line, sentence in every] == []
