"""The names of a table's columns: as its header has them, and those that are asked for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

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


def require_columns(table: str, found: Collection[str], needed: Sequence[str]) -> None:
    """Raise DataError naming the first of `needed` that `table` lacks, and the nearest that it has."""
    for name in needed:
        if name not in found:
            near = difflib.get_close_matches(name, list(found), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(repr, found))}"
            raise DataError(f"{table} has no column {name!r}; {hint}")
