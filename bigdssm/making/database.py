"""DuckDB, which sorts and groups what is larger than memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb

from bigdssm.making.steps import FIRST_ROW_DIGITS, ROWS_PER_READ, Table

MEMORY = "1500MB"  # of queries; more is sorted on disk
MOST_THREADS = 12  # that so much memory is enough for


class Database:
    """Knows the tables and views of a making, and answers queries of them with so many threads at most."""

    def __init__(self, spool: Path, threads: int) -> None:
        self._spool = spool
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": MEMORY,
            "temp_directory": str(spool / "sorting"),
            "threads": min(threads, MOST_THREADS),
        }
        self._database = duckdb.connect(config=settings)
        with suppress(duckdb.InvalidInputException):  # in Jupyter without widgets, where it has no bar
            self._database.execute("SET enable_progress_bar = false")  # it would stand in the making's own

    def view(self, name: str, query: str) -> None:
        """Know the rows of `query` by `name`."""
        self._database.execute(f"CREATE OR REPLACE VIEW {name} AS {query}")

    def table(self, name: str, table: Table, *, ordered: bool) -> None:
        """Know a table by `name`; one that is ordered, whose files are named by their first rows, with `number`."""
        files = f"[{', '.join(map(_quoted, table.files))}]"
        if ordered:
            number = f"CAST(left(parse_filename(filename), {FIRST_ROW_DIGITS}) AS BIGINT) + file_row_number"
            source = f"read_parquet({files}, file_row_number = true, filename = true)"
            self.view(name, f"SELECT * EXCLUDE (file_row_number, filename), {number} AS number FROM {source}")
        else:
            self.view(name, f"SELECT * FROM read_parquet({files})")

    def fetch(self, query: str) -> list[tuple[Any, ...]]:
        """Return the few rows of a query."""
        with _naming_a_full_disk(self._spool):
            return self._database.execute(query).fetchall()

    def write(self, query: str, folder: Path) -> None:
        """Write the rows of a query into one Parquet file, which is named by its first row."""
        # V2 without dictionaries: columns are written as differences, in less time and room.
        options = "FORMAT parquet, PARQUET_VERSION V2, DICTIONARY_SIZE_LIMIT 1, COMPRESSION lz4_raw"
        options += f", ROW_GROUP_SIZE {ROWS_PER_READ}"
        file = folder / f"{0:0{FIRST_ROW_DIGITS}d}.parquet"
        with _naming_a_full_disk(folder):
            self._database.execute(f"COPY ({query}) TO {_quoted(str(file))} ({options})")

    def close(self) -> None:
        """Forget all; it is in memory."""
        self._database.close()


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@contextmanager
def _naming_a_full_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except duckdb.IOException as error:
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from None
        raise
