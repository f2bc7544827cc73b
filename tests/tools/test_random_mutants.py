"""Random mutants: each kind on a small source, the order of drawing, and code that is never changed."""

from __future__ import annotations

import ast
import textwrap
from itertools import islice

import pytest

from tools.checks.random_mutants import KINDS, Mutant, Statements, draw

SOURCE = '''
"""Module 1."""
from __future__ import annotations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Rows"]
LIMIT = 3


class Rows:
    """Rows of 2 columns."""

    width: int = 7

    def take(self, rows: Sequence[int], first: int = 5) -> list[tuple[int, ...]]:
        """Return 1 < 2 rows."""
        number: dict[str, int] = {"one": 1}
        if first < 0 or first > len(rows):
            raise ValueError(f"first is {first + 1}" + str(first - 1))
        logger.info("taken %d", first + 1)
        print(first + 1)
        assert first + 1 > 0
        total = 0
        for row in range(first, len(rows)):
            total += -rows[row] * 2
        rows.append(total)
        errors.append(DataError(1 + 1))
        if TYPE_CHECKING:
            total = total - 9
        return [row for row in rows[first : first + 2] if row in number]
'''


def changes(body: str) -> set[tuple[str, str, str]]:
    """Return (kind, before, after) of all mutants of a function's body."""
    source = "def function():\n" + textwrap.indent(body, "    ")
    return {(mutant.kind, mutant.before, mutant.after) for mutant in all_mutants(source)}


def all_mutants(source: str) -> list[Mutant]:
    statements = Statements("module.py", source)
    return [mutant for site in statements.sites for mutant in statements.mutants(site)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return a < b", {("comparison", "a < b", "a <= b")}),
        ("return a == b", {("comparison", "a == b", "a != b")}),
        ("return a in b", {("comparison", "a in b", "a not in b")}),
        ("return a is None", {("comparison", "a is None", "a is not None")}),
        ("return a < b < c", {("comparison", "a < b < c", after) for after in ("a <= b < c", "a < b <= c")}),
        ("return 4", {("constant", "4", "5")}),
        ("return True", {("constant", "True", "False")}),
        ("return None, 'text', f'{a + 1}'", set()),
        ("return a + b", {("operator", "a + b", "a - b")}),
        ("return a * b", {("operator", "a * b", "a / b")}),
        ("return a and b", {("operator", "a and b", "a or b")}),
        ("return -a", {("operator", "-a", "a")}),
        ("return 'a' + b", set()),
        ("if a:\n    pass", {("branch", "a", "not a"), ("branch", "a", "False")}),
        ("return a if b else c", {("branch", "b", "not b")}),
        ("return [a for a in b if a]", {("branch", "a", "not a")}),
        ("return a[2]", {("off by one", "2", "3")}),
        ("return a[-1]", {("off by one", "-1", "0")}),
        ("return a[:, b:]", {("off by one", "b", "b + 1")}),
        ("return a[b]", set()),
        ("return range(a)", {("off by one", "a", "a + 1")}),
        ("a.append(b)", {("dropped", "a.append(b)", "pass")}),
        ("a += b", {("dropped", "a += b", "a = b"), ("dropped", "a += b", "pass"), ("operator", "a += b", "a -= b")}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_mutants_of_a_statement(body: str, expected: set[tuple[str, str, str]]) -> None:
    assert changes(body) == expected


def test_a_compound_statement_has_the_mutants_of_its_header_alone() -> None:
    header, body = Statements("module.py", "def function():\n    while a < b:\n        c()\n").sites
    statements = Statements("module.py", "def function():\n    while a < b:\n        c()\n")
    assert [mutant.kind for mutant in statements.mutants(header)] == ["comparison"]
    assert [mutant.kind for mutant in statements.mutants(body)] == ["dropped"]


def test_every_mutant_compiles_differs_and_changes_its_own_text_alone() -> None:
    mutants = all_mutants(SOURCE)
    assert {mutant.kind for mutant in mutants} == set(KINDS)
    for mutant in mutants:
        compile(mutant.source, "module.py", "exec")
        assert ast.dump(ast.parse(mutant.source)) != ast.dump(ast.parse(SOURCE))
        changed = [line for line in mutant.source.splitlines() if line not in SOURCE.splitlines()]
        assert len(changed) == 1
        assert mutant.after in changed[0]
        assert SOURCE.splitlines()[mutant.line - 1][mutant.column :].startswith(mutant.before)


def test_text_annotations_output_and_errors_are_never_changed() -> None:
    source_lines = SOURCE.splitlines()
    fixed = (
        '"""',
        "import",
        "LIMIT",
        "width",
        "__all__",
        "def ",
        "class ",
        "raise",
        "logger",
        "print",
        "assert",
        "- 9",
    )
    lines = {number for number, line in enumerate(source_lines, 1) if any(word in line for word in fixed)}
    mutants = all_mutants(SOURCE)
    assert not lines & {mutant.line for mutant in mutants}
    assert not [mutant for mutant in mutants if "DataError" in mutant.before and mutant.kind != "dropped"]
    annotated = source_lines.index('        number: dict[str, int] = {"one": 1}') + 1
    assert [mutant.after for mutant in mutants if mutant.line == annotated] == ["2"]


def test_columns_after_text_that_is_not_ascii() -> None:
    (mutant,) = all_mutants('def function():\n    return "αβ×", 1\n')
    assert mutant.source == 'def function():\n    return "αβ×", 2\n'


def test_an_expression_of_several_lines_has_the_line_of_its_code() -> None:
    source = "def function():\n    return call(\n        a,\n        b\n        + 1,\n    )\n"
    assert {(mutant.kind, mutant.line) for mutant in all_mutants(source)} == {("operator", 4), ("constant", 5)}


def test_drawing_is_a_function_of_the_seed_and_draws_a_statement_once() -> None:
    sources = {"first.py": SOURCE, "second.py": SOURCE}
    first = list(draw(sources, 1))
    assert first == list(draw(dict(reversed(sources.items())), 1))
    assert first != list(draw(sources, 2))
    places = [(mutant.file, mutant.line) for mutant in first]
    assert len(places) == len(set(places)) == len([site for site, _ in _sites_with_mutants(sources)])


def test_a_selection_does_not_change_the_order() -> None:
    sources = {"first.py": SOURCE, "second.py": SOURCE}
    selected = list(islice(draw(sources, 1, is_drawn=lambda site: site.file == "second.py"), 5))
    assert selected == [mutant for mutant in draw(sources, 1) if mutant.file == "second.py"][:5]
    kinds = {mutant.kind for mutant in draw(sources, 1, is_selected=lambda mutant: mutant.kind == "operator")}
    assert kinds == {"operator"}


def _sites_with_mutants(sources: dict[str, str]) -> list[tuple[str, int]]:
    found = []
    for file, source in sources.items():
        statements = Statements(file, source)
        found += [(file, site.number) for site in statements.sites if statements.mutants(site)]
    return found
