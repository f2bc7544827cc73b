"""Makes a dataset from tables whose rows are pairs: query features, document features, relevance.

The plan: parts of the tables are read, each row checked, and its document apart (`found`, `found_documents`); documents
are numbered; rows get their split; those of train are sorted by a hash of their place, the others by place; the schema
is fitted to train; shards and catalogue are written. See docs/ingestion.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa

from bigdssm.config import DataConfig
from bigdssm.dataset.keys import SortedKeys
from bigdssm.dataset.partition import read_partition
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Feature, TextTokenizer, encode_columns
from bigdssm.features.canonical import canonical, missing
from bigdssm.features.columns import RowCheck, TimeUnits, ids, relevances, strings
from bigdssm.ingest.dataset_writer import PARTITIONS, SPLIT
from bigdssm.ingest.documents import (
    DistinctDocuments,
    StoredDocuments,
    canonical_of,
    document_rows,
    document_schema,
    first_rows,
    number_documents,
    spool_columns,
)
from bigdssm.ingest.engines.local import LocalEngine
from bigdssm.ingest.engines.spark import open_table
from bigdssm.ingest.engines.tables import FirstRows, RowFile, RowTable
from bigdssm.ingest.fitting import FittedSide, fit, schema_to_fit
from bigdssm.ingest.job import (
    BLOCK_COLUMNS,
    CATALOGUE_COLUMNS,
    Ingestion,
    IngestReport,
    IngestTarget,
    check_column_names,
    check_names,
    ingestion,
)
from bigdssm.ingest.reading import PartOfTable, columns_of_features, named_columns, read_part, row_ordinals
from bigdssm.ingest.row_keys import hash_rows, row_keys, shuffle_keys
from bigdssm.ingest.sources.base import Source
from bigdssm.ingest.sources.beir import (
    CORPUS_FILE,
    QRELS_DIR,
    QUERIES_FILE,
    check_output_folder,
    write_entries,
    write_judgements,
)
from bigdssm.ingest.splits import (
    DEFAULT_FRACTIONS,
    SPLITS,
    PairSplit,
    Splitter,
    SplitTime,
    SplitTimes,
    check_own_split,
    own_split,
)
from bigdssm.utils.atomic import new_folder, real_path
from bigdssm.utils.log import Progress, no_progress
from bigdssm.utils.string_hashing import hash_strings

ROW_COLUMNS = {
    "place": pa.int64(),
    "shuffle": pa.int64(),  # a hash of the place: train rows are written in its order
    "query_id": pa.int64(),
    "doc_id": pa.int64(),
    "content": pa.int64(),  # a hash of the document's features
    "relevance": pa.float32(),
    "split_read": pa.int32(),  # where a row alone tells it
    "unit": pa.int64(),  # what a random split keeps together
    "time": pa.float64(),
}
WRITTEN = ("place", "query_id", "doc_id", "relevance")


@dataclass(frozen=True)
class PairTables:
    """The source tables (or plain WebDataset shards) and what their columns are; features name theirs in the config."""

    files: tuple[Path | str | Source, ...]
    doc_id_column: str | None = None  # none: documents are the same where all their features are
    query_id_column: str | None = None  # none: queries are the same where all their features are
    relevance_column: str | None = None  # none: 1
    split: PairSplit | None = None  # none: the dataset's own of an append, else random
    split_column: str | None = None  # random: the group that stays together; time, column: what decides
    validation_fraction: float = DEFAULT_FRACTIONS[0]
    test_fraction: float = DEFAULT_FRACTIONS[1]
    validation_from: SplitTime = None  # split=time: from when on, in place of both fractions; test_from goes with it
    test_from: SplitTime = None
    until: SplitTime = None  # beside these: rows from then on are left out
    whole_documents: bool = False  # random: the rows of one document stay together too
    each_of: str | None = None  # a list column: every value makes a row
    beir: Path | None = None  # also write the pairs there as a BEIR collection
    raw_text: bool = False  # queries' texts stay as they are, loaders tokenise them
    dedup: bool = False  # drop further rows of one (query, document), in any split

    def __post_init__(self) -> None:
        check_column_names(self)

    @property
    def moments(self) -> SplitTimes | None:
        """Return the times that split=time divides at; None: shares of the rows decide. Raises ConfigError."""
        fractions = self.validation_fraction, self.test_fraction
        return SplitTimes.told(self.split or "random", fractions, self.validation_from, self.test_from, self.until)


def make_pairs(
    config: DataConfig, tables: PairTables, target: IngestTarget, progress: Progress = no_progress
) -> IngestReport:
    """Make (or append to) the dataset at `target.out` and return what was made.

    Raises DataError or ConfigError with nothing left half-written.
    """
    _check(config, tables, target)
    splitter = None if target.append and tables.split is None else _splitter(tables, target)
    sources = [open_table(path) for path in tables.files]
    with ingestion(config, target, sources, tables, progress) as run:
        writer, engine = run.writer, run.engine
        if tables.raw_text and not writer.append:
            writer.content["text"] = "raw"
        if any(read_partition(writer.out, name).sequence_files for name in writer.content[PARTITIONS]):
            raise DataError(f"{writer.out} holds interactions; the sub-command `interactions` appends to it")
        columns = {"doc": tables.doc_id_column, "query": tables.query_id_column}
        writer.identify(**{side: "content" if name is None else "column" for side, name in columns.items()})
        base = schema_to_fit(config, writer.out if writer.append else None, target.like)
        if splitter is None and (own := own_split(writer, get_args(PairSplit))):
            splitter = Splitter.of_dataset(own, tables.split_column)
        splitter = splitter or _splitter(tables, target)
        known = StoredDocuments.of(writer)
        reader = PairReader(tables, base, splitter, target.seed, known)
        folders = run.read("read", sources, reader)
        writer.quarantine.check()
        found = engine.table("found", [folder / "rows.parquet" for folder in folders])
        engine.table("found_documents", [folder / "documents.parquet" for folder in folders])
        documents = number_documents(engine, writer)
        if not found.num_rows:
            raise DataError(f"{tables.files[0]}: no row is left{writer.quarantine.told()}")
        splitter.divide(engine, folders)
        if not writer.append:
            writer.content[SPLIT] = splitter.described
        splits = _sorted_splits(run, tables, splitter, reader)
        sides = [FittedSide("doc", _documents_of_train(engine, base.siamese), "d", base.doc)]
        if not base.siamese:
            sides.append(FittedSide("query", splits["train"], "q", base.query))
        schema, text = fit(
            engine, base, config, sides, folder=writer.tokenizer_dir, grow=writer.append, like=target.like
        )  # fmt: skip
        encode = partial(_encoded, documents.keys, schema.query, None if writer.content["text"] == "raw" else text)
        entries = run.write_splits(splits, encode)
        if tables.beir:  # first: the same command must be good for both, and refuses a dataset that is there
            write_collection(engine, documents, tables.beir, base)
        return run.finish(schema, text, documents, entries, _train_positives(engine, documents))


def _check(config: DataConfig, tables: PairTables, target: IngestTarget) -> None:
    """Raise ConfigError or DataError on what cannot be asked for."""
    check_names(config.doc, CATALOGUE_COLUMNS, "doc")
    check_names(config.query, BLOCK_COLUMNS, "query")
    if config.targets_per_row > 1:
        raise ConfigError(f"data.targets_per_row: got {config.targets_per_row}, needs 1: pairs are no sequences")
    for name, feature in config.query.items():
        if feature.from_sequence:
            raise ConfigError(f"data.query.{name}: pairs have no histories; use the sub-command `interactions`")
    if tables.beir and target.append:
        raise ConfigError(f"--beir {tables.beir} would be of the new partition alone; leave it out with --append")
    if config.siamese and not (tables.query_id_column and tables.doc_id_column):
        raise ConfigError("data.siamese=true: a query is a document; give --query-id-column and --doc-id-column")
    if tables.beir:
        check_output_folder(tables.beir)
    if target.append and tables.split is None:
        check_own_split(
            (tables.validation_fraction, tables.test_fraction), whole_documents=tables.whole_documents,
            validation_from=tables.validation_from, test_from=tables.test_from, until=tables.until,
        )  # fmt: skip


def _splitter(tables: PairTables, target: IngestTarget) -> Splitter:
    """Return what divides the rows as the options say."""
    how, fractions = tables.split or "random", (tables.validation_fraction, tables.test_fraction)
    return Splitter(how, tables.split_column, fractions, target.seed, tables.whole_documents, tables.moments)


@dataclass(frozen=True)
class PairReader:
    """Reads a part of the tables into rows and the documents that stand in them first."""

    tables: PairTables
    schema: Schema
    splitter: Splitter
    seed: int
    known: StoredDocuments

    @cached_property
    def row_schema(self) -> pa.Schema:
        """Return the schema of rows between two steps; features wait in q0, q1, …"""
        return pa.schema([*ROW_COLUMNS.items(), *spool_columns("q", self.schema.query)])

    @property
    def columns(self) -> dict[str, str]:
        """Return the source columns of features, ids, relevance and split, and what names each."""
        tables, schema = self.tables, self.schema
        return named_columns(
            *columns_of_features(schema.query, "query"),
            *columns_of_features(schema.doc, "doc"),
            (schema.title, "data.title"),
            (tables.doc_id_column, "--doc-id-column"),
            (tables.query_id_column, "--query-id-column"),
            (tables.relevance_column, "--relevance-column"),
            *self.splitter.columns.items(),
            (tables.each_of, "--each-of"),
        )

    def __call__(self, part: PartOfTable, folder: Path) -> None:
        """Read a part into `folder`."""
        with (
            RowFile(folder / "rows.parquet", self.row_schema) as rows,
            RowFile(folder / "documents.parquet", document_schema(self.schema.doc)) as file,
            FirstRows(file, "doc_id") as documents,
        ):
            take = partial(self._read, part, rows, documents)
            read_part(part, self.columns, folder, take, each_of=self.tables.each_of)

    def _read(self, part: PartOfTable, rows: RowFile, documents: FirstRows, check: RowCheck, units: TimeUnits) -> None:
        table, *found = self._rows(check, part)
        good = pa.array(check.good)
        rows.add(table.filter(good))
        units.add(table.column("time").to_numpy()[check.good])
        for document in found:
            documents.add(self.known.compared(document.filter(good)))

    def _rows(self, check: RowCheck, part: PartOfTable) -> list[pa.Table]:
        """Return all rows of a batch, the document of each and, where queries are documents, these.

        What is wrong is reported to `check`.
        """
        tables, schema = self.tables, self.schema
        query, doc = canonical(check, schema.query), canonical(check, schema.doc)
        check.fail(missing(query, schema.query), "no query: its features are empty")
        check.fail(missing(doc, schema.doc), "no document: its features are empty")
        if tables.query_id_column is None:
            query_ids = hash_rows(query)
        else:
            query_ids = hash_strings(ids(check, tables.query_id_column))
        content = hash_rows(doc)
        name = tables.doc_id_column
        keys = row_keys(content) if name is None else ids(check, name, lacks="document")
        doc_ids = hash_strings(keys)
        if schema.siamese:
            check.fail(query_ids == doc_ids, "the document is the query itself")
        title = strings(check, schema.title) if schema.title else keys
        relevance = np.ones(len(query_ids))
        if tables.relevance_column:
            relevance = relevances(check, tables.relevance_column)
        decided = self.splitter.of_rows(check, query_ids)
        place = row_ordinals(part, check.batch, several=tables.each_of is not None)
        shuffle = shuffle_keys(place, self.seed)
        numbers = (place, shuffle, query_ids, doc_ids, content, relevance, *decided)
        values = [pa.array(v).cast(t) for v, t in zip(numbers, ROW_COLUMNS.values(), strict=True)]
        rows = pa.Table.from_arrays([*values, *query.columns], names=self.row_schema.names)
        made = [rows, document_rows(place, content, keys, title, doc)]
        if schema.siamese:
            own = strings(check, str(tables.query_id_column))
            made.append(document_rows(place, hash_rows(query), own, own, query))
        return made


def _sorted_splits(run: Ingestion, tables: PairTables, splitter: Splitter, reader: PairReader) -> dict[str, RowTable]:
    """Return the rows of every split in the order in which they are written, from the engine's `divided` rows.

    Raises DataError where train has none.
    """
    engine = run.engine
    kept = first_rows("divided", "query_id, doc_id") if tables.dedup else "SELECT *, 1 AS nth FROM divided"
    engine.view("kept", kept)
    wanted = ", ".join(name for name in reader.row_schema.names if name in WRITTEN or name not in ROW_COLUMNS)
    order = {name: "place" for name in SPLITS} | {"train": "shuffle"}
    splits = {
        name: engine.select(name, f"SELECT {wanted} FROM kept WHERE nth = 1 AND split = {number}", order=order[name])
        for number, name in enumerate(SPLITS)
    }
    ((num_rows, relevant),) = engine.fetch("SELECT count(*), CAST(max(relevance) > 0 AS INT) FROM train")
    if not num_rows:
        why = splitter.why_no_train + run.writer.quarantine.told()
        raise DataError(f"{tables.files[0]}: no row is left for the train split{why}")
    if not relevant:
        raise DataError("every relevance in the train split is 0, so that nothing can be learned from it")
    run.notes += _notes(engine, tables)
    return splits


def _notes(engine: LocalEngine, tables: PairTables) -> Iterator[str]:
    """Yield what is to be said of repeated pairs, and of documents that are several."""
    if tables.until is not None:
        ((late,),) = engine.fetch("SELECT (SELECT count(*) FROM found) - (SELECT count(*) FROM divided)")
        if late:
            yield f"{late} rows are not before --until {tables.until} and left out; their documents stay"
    if tables.dedup:
        ((repeated,),) = engine.fetch("SELECT count(*) FROM kept WHERE nth > 1")
        if repeated:
            yield f"{repeated} rows repeat a (query, document) pair and are left out"
    several = "SELECT doc_id FROM divided GROUP BY doc_id HAVING min(split) < max(split)"
    ((apart,),) = engine.fetch(f"SELECT count(*) FROM ({several})")
    if apart:
        yield f"{apart} documents have rows in several splits; --whole-documents keeps each in one"
    if tables.doc_id_column:
        other = "found.doc_id = kept.doc_id AND found.content <> kept.content AND kept.nth = 1"
        ((rows,),) = engine.fetch(f"SELECT count(*) FROM found JOIN first_documents kept ON {other}")
        if rows:
            yield f"{rows} rows give a known {tables.doc_id_column} other features; the first stay"


def _documents_of_train(engine: LocalEngine, siamese: bool) -> RowTable:
    """Return the new and changed documents that train has: the fit knows nothing of held-out rows."""
    known = "SELECT doc_id FROM train" + (" UNION SELECT query_id AS doc_id FROM train" if siamese else "")
    return engine.select(
        "documents_of_train", f"SELECT * FROM told_documents WHERE doc_id IN ({known})", order="place, doc_id"
    )


def _train_positives(engine: LocalEngine, documents: DistinctDocuments) -> tuple[np.ndarray, np.ndarray]:
    """Return the catalogue rows of documents with train rows of a relevance above 0, and how many each has, int64."""
    counted = engine.select(
        "train_positives", "SELECT doc_id, count(*) AS n FROM train WHERE relevance > 0 GROUP BY doc_id", order="doc_id"
    ).read()
    return documents.keys.find(counted.column("doc_id").to_numpy()), counted.column("n").to_numpy()


def _encoded(
    keys: SortedKeys, features: dict[str, Feature], text: TextTokenizer | None, rows: pa.Table
) -> dict[str, pa.Array]:
    """Return the columns of a block; without `text` the queries' texts stay as they are."""
    columns = canonical_of(rows, "q", features)
    done = {
        "query_id": rows.column("query_id").combine_chunks(),
        "doc": pa.array(keys.find(rows.column("doc_id").to_numpy())),
        "relevance": rows.column("relevance").combine_chunks(),
    }
    if text is None:
        raw = {name: feature.encode_raw(columns.column(name).combine_chunks()) for name, feature in features.items()}
        return done | raw
    return done | encode_columns(columns, features, text, large=False)


def write_collection(engine: LocalEngine, documents: DistinctDocuments, folder: Path, schema: Schema) -> None:
    """Write the engine's `documents` and the queries and judgements of its `divided` rows; an old one is replaced.

    A query that is a document has its key. Raises ConfigError on a relevance that is no whole number.
    """
    key, own = "lpad(lower(hex(divided.query_id)), 16, '0')", ""
    if schema.siamese:
        key, own = "own.doc_key", " JOIN documents own ON own.doc_id = divided.query_id"
    engine.view("named", f"SELECT divided.*, {key} AS query_key FROM divided{own}")
    engine.view("asked", first_rows("named", "query_id"))
    queries = engine.select("queries", "SELECT * FROM asked WHERE nth = 1", order="place, query_id")
    engine.view("paired", first_rows("named", "query_id, doc_id"))
    judged = (
        "SELECT paired.place, query_id, query_key, documents.doc_key, relevance FROM paired "
        "JOIN documents ON paired.doc_id = documents.doc_id WHERE paired.nth = 1 AND split = "
    )

    with new_folder(real_path(folder)) as aside:
        (aside / QRELS_DIR).mkdir()
        write_entries(aside / CORPUS_FILE, schema.doc, _entries(documents.table, "doc_key", "d", schema.doc))
        write_entries(aside / QUERIES_FILE, schema.query, _entries(queries, "query_key", "q", schema.query))
        for number, split in enumerate(SPLITS):
            table = engine.select(f"judged_{split}", f"{judged}{number}", order="place, query_id, doc_key")
            if table.num_rows:
                write_judgements(aside, split, _judgements(table))


def _entries(
    table: RowTable, key: str, prefix: str, features: Mapping[str, Feature]
) -> Iterator[tuple[list[str], pa.Table]]:
    for piece in table.batches():
        yield piece.column(key).to_pylist(), canonical_of(piece, prefix, features)


def _judgements(table: RowTable) -> Iterator[tuple[str, str, float]]:
    for piece in table.batches():
        columns = [piece.column(name).to_pylist() for name in ("query_key", "doc_key", "relevance")]
        yield from zip(*columns, strict=True)
