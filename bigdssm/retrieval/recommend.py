"""Bulk recommendation: the best documents of many queries as Parquet files, by any number of ranks.

OUT/    part-0000000.parquet … (ROW_SCHEMA, a row for each document of each query, best first), meta.json

A part holds the queries of one shard. It is written aside and renamed, and holds the same rows whoever made it, so that
a killed job goes on with the parts that are missing (see shards.py).
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from bigdssm.artifacts.model_folder import ModelFolder
from bigdssm.atomic import new_file, real_place, write_json
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError, DataError
from bigdssm.retrieval.bulk import BulkQueries, QuerySource
from bigdssm.retrieval.embed import in_pieces, query_vectors
from bigdssm.retrieval.filters import Filters
from bigdssm.retrieval.index import Index
from bigdssm.retrieval.scan import Allowed
from bigdssm.retrieval.shards import ShardedFolder, Work

FORMAT, META_FILE = 1, "meta.json"
ROW_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # of the source: its users in order, its rows
        ("query", pa.string()),  # the user's key, or the table's; null in a split of pairs
        ("rank", pa.int32()),  # from 1
        ("document", pa.dictionary(pa.int32(), pa.string())),
        ("score", pa.float32()),
    ]
)


@dataclass(frozen=True)
class Wanted:
    """Which documents a query gets."""

    top: int = 10
    filter: str | None = None  # see filters.py
    exclude_seen: bool | None = None  # none: as the model's data.repeats says

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ConfigError(f"--top {self.top}: needs at least 1")


@dataclass(frozen=True)
class Recommended:
    """What a call of `recommend` did."""

    queries: int
    found: int  # shards that were finished before
    seconds: float
    finished: bool  # on the rank that put the folder in place


def recommend(
    out: Path, folder: ModelFolder, index: Index, dataset: Dataset, source: QuerySource, wanted: Wanted, work: Work
) -> Recommended:
    """Write this rank's share of the best documents of all queries of `source` into the folder `out`.

    Raises CheckpointError: model, index and dataset do not belong together; ConfigError: `out` holds something else, or
    the filter is none; DataError: no queries, or a vector that is not finite.
    """
    index.check_model(folder.checksum)
    source = source.limited_to(folder.view(dataset))
    index.check_dataset(dataset)
    out = real_place(out)
    _check_free(out)
    if not source.num_rows:
        raise DataError(f"{source.identity} of {dataset.dir}: no queries")
    filters = Filters(dataset.whole.schema, dataset.whole.catalogue)
    allowed = None if wanted.filter is None else filters.allowed(wanted.filter)
    exclude = folder.config.data.excludes_seen if wanted.exclude_seen is None else wanted.exclude_seen
    job = {
        "kind": "recommendations", "format": FORMAT, **asdict(wanted), "exclude_seen": exclude,
        "source": source.identity, "model": folder.checksum, "index": index.meta.files, "dataset": dataset.fingerprint,
    }  # fmt: skip
    documents, started, queries = index.keys.combine_chunks(), time.perf_counter(), 0
    shards = ShardedFolder(out, job, source.num_rows, work)
    for shard, first, last in shards.pending("shards recommended"):
        asked = source.read(first, last)
        scores, rows = _best(folder, index, asked, min(wanted.top, index.meta.num_docs), exclude, allowed)
        with new_file(shards.aside / f"part-{shard:07d}.parquet") as aside:
            parquet.write_table(_table(asked, scores, rows, documents), aside)
        queries += len(asked.rows)
    finished = shards.finish(lambda aside: write_json(aside / META_FILE, {**job, "queries": source.num_rows}))
    return Recommended(queries, shards.found, time.perf_counter() - started, finished)


def write_csv(parts: Path, file: Path) -> None:
    """Write the recommendations of the folder `parts` as one CSV file, and remove the folder."""
    document = ROW_SCHEMA.get_field_index("document")
    plain = ROW_SCHEMA.set(document, pa.field("document", pa.string()))
    with new_file(file) as aside, csv.CSVWriter(aside, plain) as writer:
        for part in sorted(parts.glob("part-*.parquet")):
            writer.write_table(parquet.read_table(part).cast(plain))
    shutil.rmtree(parts)


def _best(
    folder: ModelFolder, index: Index, asked: BulkQueries, top: int, exclude_seen: bool, allowed: Allowed | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, catalogue rows), both [m, top], as `Index.nearest` does."""
    if not len(asked.rows):
        return np.zeros((0, top), np.float32), np.zeros((0, top), np.int64)
    encode = partial(query_vectors, folder.model)
    vectors = in_pieces(folder.schema.query, asked.columns, folder.pad_token_id, encode).numpy()
    if not np.isfinite(vectors).all():
        raise DataError(f"vectors of the queries {asked.rows[0]} to {asked.rows[-1]} hold NaN or inf")
    excluded = [asked.seen[i] for i in range(len(asked.seen))] if exclude_seen else None
    return index.nearest(vectors, top, folder.checksum, excluded, allowed)


def _table(asked: BulkQueries, scores: np.ndarray, rows: np.ndarray, documents: pa.StringArray) -> pa.Table:
    """Return what was found as rows of ROW_SCHEMA."""
    found = rows >= 0
    query, rank = np.nonzero(found)
    known, place = np.unique(rows[found], return_inverse=True)
    names = pa.DictionaryArray.from_arrays(pa.array(place, pa.int32()), documents.take(pa.array(known)))
    keys = pa.nulls(len(query), pa.string()) if asked.keys is None else pa.array(asked.keys).take(pa.array(query))
    columns = [pa.array(asked.rows[query]), keys, pa.array(rank + 1, pa.int32()), names, pa.array(scores[found])]
    return pa.table(columns, schema=ROW_SCHEMA)


def _check_free(out: Path) -> None:
    """Raise ConfigError where `out` holds something else than recommendations."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        if json.loads((out / META_FILE).read_text(encoding="utf-8"))["kind"] == "recommendations":
            return
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ConfigError(f"{out} exists and holds no recommendations; choose another --out")
