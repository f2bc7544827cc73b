"""The pairs of a making as a BEIR collection, for those who evaluate on one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from bigdssm.atomic import new_folder, real_place
from bigdssm.features import Feature
from bigdssm.making.documents import Documents, canonical_of, first_of
from bigdssm.making.engine import Engine
from bigdssm.making.splits import SPLITS
from bigdssm.making.steps import Table
from bigdssm.tables.beir import CORPUS_FILE, QRELS_DIR, QUERIES_FILE, write_entries, write_judgements


def write_collection(
    engine: Engine, documents: Documents, folder: Path, query: Mapping[str, Feature], doc: Mapping[str, Feature]
) -> None:
    """Write the engine's `documents` and the queries and judgements of its `divided` rows; an old one is replaced.

    Raises ConfigError on a relevance that is no whole number.
    """
    engine.view("asked", first_of("divided", "query_id"))
    queries = engine.select("queries", "SELECT * FROM asked WHERE nth = 1", order="place, query_id")
    engine.view("paired", first_of("divided", "query_id, doc_id"))
    judged = (
        "SELECT paired.place, paired.query_id, documents.doc_key, paired.relevance FROM paired "
        "JOIN documents ON paired.doc_id = documents.doc_id WHERE paired.nth = 1 AND paired.split = "
    )

    with new_folder(real_place(folder)) as aside:
        (aside / QRELS_DIR).mkdir()
        write_entries(aside / CORPUS_FILE, doc, _documents(documents.table, doc))
        write_entries(aside / QUERIES_FILE, query, _queries(queries, query))
        for number, split in enumerate(SPLITS):
            table = engine.select(f"judged_{split}", f"{judged}{number}", order="place, query_id, doc_key")
            write_judgements(aside, split, _judgements(table))


def _documents(table: Table, features: Mapping[str, Feature]) -> Iterator[tuple[list[str], pa.Table]]:
    for piece in table.batches():
        yield piece.column("doc_key").to_pylist(), canonical_of(piece, "d", features)


def _queries(table: Table, features: Mapping[str, Feature]) -> Iterator[tuple[list[str], pa.Table]]:
    for piece in table.batches():
        yield _names(piece.column("query_id")), canonical_of(piece, "q", features)


def _judgements(table: Table) -> Iterator[tuple[str, str, float]]:
    for piece in table.batches():
        yield from zip(
            _names(piece.column("query_id")), piece.column("doc_key").to_pylist(),
            piece.column("relevance").to_pylist(), strict=True,
        )  # fmt: skip


def _names(ids: pa.ChunkedArray) -> list[str]:
    return [f"{value:016x}" for value in ids.to_numpy().view(np.uint64).tolist()]
