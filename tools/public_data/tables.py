"""Write the tables of a public dataset."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bigdssm.errors import DataError
from bigdssm.utils.atomic import new_file
from tools.public_data.debian import KIND, read_build_depends
from tools.public_data.files import PublicTable, Reader
from tools.public_data.movielens import read_movielens_1m, read_movielens_latest
from tools.public_data.sequences import read_s3rec, read_sasrec

READERS: dict[str, Reader] = {
    "sasrec": read_sasrec,
    "s3rec": read_s3rec,
    "movielens-1m": read_movielens_1m,
    "movielens-latest": read_movielens_latest,
    KIND: read_build_depends,
}


@dataclass(frozen=True)
class WrittenTables:
    """Result of a conversion: rows per table, number of users with an event, and notes."""

    rows: dict[str, int]
    num_users: int
    notes: list[str]


def make_tables(kind: str, source: Path, out: Path) -> WrittenTables:
    """Write interactions.tsv, items.tsv and, if users have features, users.tsv to `out`, all of them or none.

    Pairs of documents are written to pairs.tsv. Raises DataError: `source` does not match `kind`, or has no events.
    """
    rows: dict[str, int] = {}
    users: set[str] = set()
    notes = []
    with ExitStack() as stack:
        for table in READERS[kind](source):
            if not rows:
                out.mkdir(parents=True, exist_ok=True)
            rows[table.name] = _write(table, stack.enter_context(new_file(out / f"{table.name}.tsv")), users)
            notes += [table.note] if table.note else []
        if not rows.get("interactions", rows.get("pairs")):
            raise DataError(f"{source}: got no events, needs at least one; use another --source")
    return WrittenTables(rows, len(users), notes)


def _write(table: PublicTable, path: Path, users: set[str]) -> int:
    """Write a table as TSV without quoting and return its number of rows; adds users of interactions to `users`."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join(table.columns) + "\n")
        for row in table.rows:
            count += 1
            file.write("\t".join(" ".join(value.split()) for value in row) + "\n")
            if table.name == "interactions":
                users.add(row[0])
    return count
