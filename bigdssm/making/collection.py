"""The pairs of a making as a BEIR collection, for those who evaluate on one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

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
    key, own = "lpad(lower(hex(divided.query_id)), 16, '0')", ""
    if schema.siamese:
        key, own = "own.doc_key", " JOIN documents own ON own.doc_id = divided.query_id"
    engine.view("named", f"SELECT divided.*, {key} AS query_key FROM divided{own}")
    engine.view("asked", first_of("named", "query_id"))
    queries = engine.select("queries", "SELECT * FROM asked WHERE nth = 1", order="place, query_id")
    engine.view("paired", first_of("named", "query_id, doc_id"))
    judged = (
        "SELECT paired.place, query_id, query_key, documents.doc_key, relevance FROM paired "
        "JOIN documents ON paired.doc_id = documents.doc_id WHERE paired.nth = 1 AND split = "
    )

    with new_folder(real_place(folder)) as aside:
        (aside / QRELS_DIR).mkdir()
        write_entries(aside / CORPUS_FILE, schema.doc, _entries(documents.table, "doc_key", "d", schema.doc))
        write_entries(aside / QUERIES_FILE, schema.query, _entries(queries, "query_key", "q", schema.query))
        for number, split in enumerate(SPLITS):
            table = engine.select(f"judged_{split}", f"{judged}{number}", order="place, query_id, doc_key")
            if table.num_rows:
                write_judgements(aside, split, _judgements(table))


def _entries(
    table: Table, key: str, prefix: str, features: Mapping[str, Feature]
) -> Iterator[tuple[list[str], pa.Table]]:
    for piece in table.batches():
        yield piece.column(key).to_pylist(), canonical_of(piece, prefix, features)


def _judgements(table: Table) -> Iterator[tuple[str, str, float]]:
    for piece in table.batches():
        columns = [piece.column(name).to_pylist() for name in ("query_key", "doc_key", "relevance")]
        yield from zip(*columns, strict=True)
