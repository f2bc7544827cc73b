"""A table on its way from a public set to its file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Table:
    """A table's file name without ending, its columns, and its rows, which can be read once."""

    name: str
    columns: tuple[str, ...]
    rows: Iterable[Sequence[str]]
    note: str = ""  # what is not in it, and why


Reader = Callable[[Path], Iterator[Table]]
"""Yields the tables of a source, each to be read before the next is asked for. Raises DataError."""
