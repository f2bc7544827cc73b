"""The names of a table's columns: as its header has them, and those that are asked for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence

from bigdssm.errors import DataError

# RecBole writes each column's type into the header, as in `item_id:token`.
HEADER_TYPE = re.compile(r":(token|float)(_seq)?\Z")


def column_names(table: str, header: Sequence[str]) -> list[str]:
    """Return the columns' names without RecBole's types. Raises DataError where `table` has one twice."""
    names = [HEADER_TYPE.sub("", name).strip() for name in header]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"{table} has the column {twice[0]!r} twice")
    return names


class MissingColumn(DataError):
    """A column that a table lacks; who reads the table knows which option or feature names it."""

    def __init__(self, table: str, column: str, hint: str) -> None:
        super().__init__(table, column, hint)
        self.column = column

    def __str__(self) -> str:
        return self.named_by({})

    def named_by(self, names: Mapping[str, str]) -> str:
        """Return the sentence; `names` holds the option or feature that names each column."""
        table, column, hint = self.args
        by = f", which {names[column]} names" if column in names else ""
        return f"{table} has no column {column!r}{by}; {hint}"


def require_columns(table: str, found: Collection[str], needed: Sequence[str]) -> None:
    """Raise MissingColumn naming the first of `needed` that `table` lacks, and the nearest that it has."""
    for name in needed:
        if name not in found:
            near = difflib.get_close_matches(name, list(found), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(repr, found))}"
            raise MissingColumn(table, name, hint)
