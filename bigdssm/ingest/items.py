"""Append items to a dataset without events: new ones, new versions of features, withdrawals."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bigdssm.config import DataConfig
from bigdssm.dataset.catalogue import DOCUMENT_COLUMN, WITHDRAWN_COLUMN, later_files, withdrawn_documents
from bigdssm.dataset.keys import SortedKeys
from bigdssm.errors import ConfigError, DataError
from bigdssm.features.columns import check_time_units, ids
from bigdssm.ingest.dataset_writer import AS_OF, TIMES, WITHDRAWALS
from bigdssm.ingest.documents import (
    document_schema,
    number_documents,
    number_versions,
)
from bigdssm.ingest.engines.local import RowFile, RowTable
from bigdssm.ingest.fitting import document_sides, fit, of_tables, schema_to_fit
from bigdssm.ingest.interactions import read_items
from bigdssm.ingest.job import ColumnOptions, IngestReport, IngestTarget, ingestion, write_arrow
from bigdssm.ingest.reading import TablePart, column_options, read_part
from bigdssm.sources.base import Source
from bigdssm.sources.opening import open_table
from bigdssm.utils.log import Progress, no_progress
from bigdssm.utils.string_hashing import hash_strings

NO_POSITIVES = np.zeros(0, np.int64), np.zeros(0, np.int64)


@dataclass(frozen=True)
class ItemTables(ColumnOptions):
    """The source tables and their columns; at least one table."""

    items: Path | str | Source | None = None
    withdrawn: Path | str | Source | None = None  # only its item column is read
    item_column: str = "item_id"
    items_time_column: str | None = None  # start of validity of a row of items; None: one row per item


def make_items(
    config: DataConfig, tables: ItemTables, target: IngestTarget, progress: Progress = no_progress
) -> IngestReport:
    """Append a partition of items, without rows, to the dataset at `target.out`.

    An item of `items` that was withdrawn is back, unless `withdrawn` has it, too. Raises DataError, ConfigError.
    """
    items = None if tables.items is None else open_table(tables.items)
    withdrawn = None if tables.withdrawn is None else open_table(tables.withdrawn)
    sources = [source for source in (items, withdrawn) if source is not None]
    with ingestion(config, target, sources, tables, progress) as run:
        writer, engine = run.writer, run.engine
        if writer.content.setdefault("ids", {}).get("doc") == "content":
            raise ConfigError(f"{writer.out} identifies each doc by its features, not by an id; append pairs instead")
        base, sides = schema_to_fit(config, writer.out, target.like), []
        if items is None:
            has_times = writer.content.get("items") == AS_OF["items"]
            path = engine.spool / "no_documents.parquet"
            with RowFile(path, document_schema(base.documents, has_times=has_times)):
                pass
            rows = engine.table("document_rows", [path])
            documents = number_versions(engine, writer, rows) if has_times else number_documents(engine, writer)
        else:
            writer.record_times("items", tables.items_time_column is not None)
            documents, times = read_items(
                run, tables.item_column, tables.items_time_column, of_tables(base, config), items
            )
            where = f"{items.name}, column {tables.items_time_column!r}, with the events of {writer.out},"
            check_time_units([writer.content[TIMES], *times] if times else [], where)
            sides = document_sides(engine, base, documents)
        # the items that are withdrawn, and those of `items` that are back
        files = later_files(writer.out, writer.content, WITHDRAWALS)
        before, requested, with_rows = withdrawn_documents(files, writer.num_existing_docs), *NO_POSITIVES
        if withdrawn is not None:
            columns = column_options((tables.item_column, "--item-column"))
            work = partial(_read_withdrawn_part, columns, tables.item_column, documents.keys, str(writer.out))
            folders = run.read("withdrawn", [withdrawn], columns, work)
            read = RowTable.of(folder / "documents.parquet" for folder in folders).read()
            requested = np.unique(read.column(DOCUMENT_COLUMN).to_numpy())
        if len(before):
            query = f"SELECT DISTINCT {DOCUMENT_COLUMN} FROM document_rows WHERE {DOCUMENT_COLUMN} >= 0"
            with_rows = engine.select("listed_documents", query, order=DOCUMENT_COLUMN).read().column(0).to_numpy()
        new = np.setdiff1d(requested, before)
        returned = np.setdiff1d(np.intersect1d(before, with_rows), requested)
        withdrawals: list[dict[str, Any]] = []
        if len(new) + len(returned):
            run.notes.append(f"items withdrawn: {len(new)}, back: {len(returned)}")
            changed = np.concatenate([new, returned])
            order = np.argsort(changed)
            states = (np.arange(len(changed)) < len(new)).astype(np.int8)
            rows_of_file = {DOCUMENT_COLUMN: pa.array(changed[order]), WITHDRAWN_COLUMN: pa.array(states[order])}
            path = writer.catalogue_dir / f"{WITHDRAWALS}-{len(files):06d}.arrow"
            withdrawals.append(write_arrow(path, rows_of_file))
        writer.quarantine.check()
        if not (documents.table.num_rows or documents.num_changed or withdrawals):
            names = " and ".join(source.name for source in sources)
            raise DataError(f"{names}: no item is new, changed, withdrawn or back; {writer.out} stays as it is")
        schema, text = fit(engine, base, config, sides, folder=writer.tokenizer_dir, grow=True, like=None)
        return run.finish(schema, text, documents, {}, NO_POSITIVES, withdrawals=withdrawals)


def _read_withdrawn_part(
    columns: Mapping[str, str], key: str, known_items: SortedKeys, dataset: str, part: TablePart, folder: Path
) -> None:
    schema = pa.schema([(DOCUMENT_COLUMN, pa.int64())])
    with RowFile(folder / "documents.parquet", schema) as file, read_part(part, columns, folder) as (batches, _):
        for check in batches:
            keys = ids(check, key)
            documents = known_items.find(hash_strings(keys))
            check.fail(documents < 0, f"{key} {{}} is no item of {dataset}", keys)
            file.add(pa.table({DOCUMENT_COLUMN: documents[check.good]}))
