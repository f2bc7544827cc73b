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
from bigdssm.schema import Schema
from bigdssm.tables.beir import CORPUS_FILE, QRELS_DIR, QUERIES_FILE, write_entries, write_judgements


def write_collection(engine: Engine, documents: Documents, folder: Path, schema: Schema) -> None:
    """Write the engine's `documents` and the queries and judgements of its `divided` rows; an old one is replaced.

    A query that is a document has its key. Raises ConfigError on a relevance that is no whole number.
    """
    query, doc = schema.query, schema.doc
    key, own = "", ""
    if schema.siamese:
        keys = "(SELECT doc_id AS own_id, doc_key AS query_key FROM documents)"
        key, own = ", query_key", f"JOIN {keys} own ON own_id = {{}}.query_id "
    engine.view("asked", first_of("divided", "query_id"))
    asked = f"SELECT asked.*{key} FROM asked {own.format('asked')}WHERE nth = 1"
    queries = engine.select("queries", asked, order="place, query_id")
    engine.view("paired", first_of("divided", "query_id, doc_id"))
    judged = (
        f"SELECT paired.place, paired.query_id, documents.doc_key, paired.relevance{key} FROM paired "
        f"JOIN documents ON paired.doc_id = documents.doc_id {own.format('paired')}"
        "WHERE paired.nth = 1 AND paired.split = "
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
        yield _names(piece), canonical_of(piece, "q", features)


def _judgements(table: Table) -> Iterator[tuple[str, str, float]]:
    for piece in table.batches():
        yield from zip(
            _names(piece), piece.column("doc_key").to_pylist(),
            piece.column("relevance").to_pylist(), strict=True,
        )  # fmt: skip


def _names(rows: pa.Table) -> list[str]:
    if "query_key" in rows.column_names:
        keys: list[str] = rows.column("query_key").to_pylist()
        return keys
    return [f"{value:016x}" for value in rows.column("query_id").to_numpy().view(np.uint64).tolist()]
