"""Build a dataset from tables of pairs (query features, document features, relevance), and append items to it.

Steps: read and validate rows and their documents (`pair_rows`, `document_rows`); number documents; assign splits; sort
train rows by a hash of their ordinal, other rows by ordinal; fit the schema to train; write shards and catalogue. See
docs/ingestion.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import pyarrow as pa

from bigdssm.config import DataConfig
from bigdssm.config.keys import SPLITS
from bigdssm.dataset.catalogue import DOCUMENT_COLUMN, WITHDRAWN_COLUMN, catalogue_files, withdrawn_documents
from bigdssm.dataset.partition import read_partition
from bigdssm.dataset.schema import Schema, SortedKeys, hash_rows, row_keys, shuffle_keys
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Feature, TextTokenizer, encode_columns
from bigdssm.features.canonical import canonical, missing
from bigdssm.features.columns import ids, relevances, strings
from bigdssm.features.times import DeclaredUnit, TimeRule
from bigdssm.ingest.dataset_writer import AS_OF, PARTITIONS, SPLIT, WITHDRAWALS
from bigdssm.ingest.documents import (
    DistinctDocuments,
    StoredDocuments,
    canonical_columns,
    document_rows,
    document_schema,
    first_rows,
    number_documents,
    number_versions,
    spool_columns,
)
from bigdssm.ingest.engines import FirstRows, LocalEngine, RowFile, RowTable
from bigdssm.ingest.fitting import FittedSide, document_sides, fit, of_tables, schema_to_fit
from bigdssm.ingest.interactions import read_items
from bigdssm.ingest.job import (
    BLOCK_COLUMNS,
    CATALOGUE_COLUMNS,
    ColumnOptions,
    Ingestion,
    IngestReport,
    IngestTarget,
    TablePart,
    check_options,
    check_reserved_names,
    column_options,
    feature_columns,
    ingestion,
    read_part,
    row_ordinals,
    write_arrow,
)
from bigdssm.ingest.splits import (
    PairSplit,
    SplitOptions,
    Splitter,
    recorded_split,
)
from bigdssm.ingest.times import declared_rule, record_times, time_rule
from bigdssm.sources.base import Source
from bigdssm.sources.beir import (
    COLLECTION,
    CORPUS_FILE,
    META_FILE,
    OWN_FILES,
    QRELS_DIR,
    QUERIES_FILE,
    check_output_folder,
    write_entries,
    write_judgements,
)
from bigdssm.sources.opening import open_table
from bigdssm.utils.atomic import new_folder, real_path, write_json
from bigdssm.utils.hashing import hash_strings
from bigdssm.utils.log import Progress, no_progress

ROW_COLUMNS = {
    "place": pa.int64(),  # the row ordinal
    "shuffle": pa.int64(),  # a hash of the ordinal: the order of train rows
    "query_id": pa.int64(),
    "doc_id": pa.int64(),
    "content": pa.int64(),  # a hash of the document's features
    "relevance": pa.float32(),
    "split_read": pa.int32(),  # if it depends on the row alone
    "unit": pa.int64(),  # kept together by a random split
    "time": pa.float64(),
}
WRITTEN = ("place", "query_id", "doc_id", "relevance")


@dataclass(frozen=True)
class PairTables(SplitOptions):
    """The source tables (or plain WebDataset shards) and their columns.

    Feature columns are in the config.
    """

    files: tuple[Path | str | Source, ...]
    doc_id_column: str | None = None  # None: documents with equal features are equal
    query_id_column: str | None = None  # None: queries with equal features are equal
    relevance_column: str | None = None  # None: relevance 1
    default_split: ClassVar[str] = "random"
    split: PairSplit | None = field(default=None, kw_only=True)
    split_column: str | None = None  # random: the group column; time, column: the deciding column
    whole_documents: bool = False  # random: also keep the rows of a document together
    each_of: str | None = None  # a list column: one row per value
    beir: Path | None = None  # also write the pairs there as a BEIR collection
    raw_text: bool = False  # store query texts untokenized; loaders tokenize them
    dedup: bool = False  # drop repeated (query, document) rows, over all splits


def make_pairs(
    config: DataConfig, tables: PairTables, target: IngestTarget, progress: Progress = no_progress
) -> IngestReport:
    """Build a dataset from pairs at `target.out`, or append to it.

    Raises DataError, ConfigError.
    """
    _check(config, tables, target)
    _new_splitter(tables, target.seed, declared_rule(config, tables.time_unit))  # validates the options
    sources = [open_table(path) for path in tables.files]
    with ingestion(config, target, sources, tables, progress) as run:
        writer, engine = run.writer, run.engine
        if tables.raw_text and not writer.append:
            writer.content["text"] = "raw"
        if any(read_partition(writer.out, name).sequence_files for name in writer.content[PARTITIONS]):
            raise DataError(f"{writer.out} holds interactions; the sub-command `interactions` appends to it")
        id_columns = {"doc": tables.doc_id_column, "query": tables.query_id_column}
        writer.record_id_sources(**{side: "content" if name is None else "column" for side, name in id_columns.items()})
        base = schema_to_fit(config, writer.out if writer.append else None, target.like)
        rule = time_rule(writer, config, tables.time_unit)
        if tables.split is None and (recorded := recorded_split(writer, get_args(PairSplit))):
            splitter = Splitter.of_dataset(recorded, tables.split_column, rule)
        else:
            splitter = _new_splitter(tables, target.seed, rule)
        schema_read = of_tables(base, config)
        columns = column_options(
            *feature_columns(schema_read.query, "query"), *feature_columns(schema_read.doc, "doc"),
            *feature_columns(schema_read.filter, "filter"),
            (schema_read.title, "data.title"), (tables.doc_id_column, "--doc-id-column"),
            (tables.query_id_column, "--query-id-column"), (tables.relevance_column, "--relevance-column"),
            *splitter.columns.items(), (tables.each_of, "--each-of"),
        )  # fmt: skip
        work = partial(
            _read_pairs_part, columns, tables, schema_read, splitter, target.seed, StoredDocuments.of(writer)
        )
        features = [*schema_read.query.values(), *schema_read.doc.values()]
        folders = run.read("read", sources, columns, work, features)
        writer.quarantine.check()
        rows = engine.table("pair_rows", [folder / "rows.parquet" for folder in folders])
        engine.table("document_rows", [folder / "documents.parquet" for folder in folders])
        documents = number_documents(engine, writer)
        if not rows.num_rows:
            raise DataError(f"{tables.files[0]}: no rows remain{writer.quarantine.summary()}")
        if writer.append and tables.split is None and splitter.description.get("whole_documents"):
            ((known_documents,),) = engine.fetch("SELECT count(*) FROM first_documents WHERE nth = 1 AND document >= 0")
            if known_documents:
                raise DataError(
                    f"{known_documents:,} documents of {tables.files[0]} are in {writer.out} already, whose split "
                    "keeps the rows of a document together; make the dataset again with all tables, or give --split"
                )
        splitter.divide(engine, writer, folders, siamese=config.siamese)
        if not writer.append:
            writer.content[SPLIT] = splitter.description
        splits = _sorted_splits(run, tables, splitter, [name for name, _ in spool_columns("q", schema_read.query)])
        # the schema is not fitted to held-out rows
        train_ids = "SELECT doc_id FROM train" + (" UNION SELECT query_id AS doc_id FROM train" if base.siamese else "")
        query = f"SELECT * FROM unique_documents WHERE doc_id IN ({train_ids})"
        train_documents = engine.select("train_documents", query, order="place, doc_id")
        sides = document_sides(engine, base, documents, train_documents)
        if not base.siamese:
            sides.append(FittedSide("query", splits["train"], "q", base.query))
        schema, text = fit(
            engine, base, config, sides, folder=writer.tokenizer_dir, grow=writer.append, like=target.like
        )  # fmt: skip
        encode = partial(_encoded, documents.keys, schema.query, None if writer.content["text"] == "raw" else text)
        entries = run.write_splits(splits, encode)
        if tables.beir:  # before the commit: a repeated command would reject the existing dataset
            write_collection(engine, documents, tables.beir, base, dedup=tables.dedup)
        query = "SELECT doc_id, count(*) AS n FROM train WHERE relevance > 0 GROUP BY doc_id"
        counted = engine.select("train_positives", query, order="doc_id").read()
        positives = (documents.keys.find(counted.column("doc_id").to_numpy()), counted.column("n").to_numpy())
        return run.finish(schema, text, documents, entries, positives)


def _new_splitter(tables: PairTables, seed: int, rule: TimeRule) -> Splitter:
    """Return the splitter that the options describe. Raises ConfigError."""
    return Splitter(
        tables.split or "random",
        tables.split_column,
        tables.fractions,
        seed,
        tables.whole_documents,
        split_times=tables.split_times(rule),
        rule=rule,
    )


def _check(config: DataConfig, tables: PairTables, target: IngestTarget) -> None:
    """Validate the combination of options. Raises ConfigError, DataError."""
    check_reserved_names([*config.doc, *config.filter], CATALOGUE_COLUMNS, "doc")
    check_reserved_names(config.query, BLOCK_COLUMNS, "query")
    rules = [  # (whether it is violated, message)
        (
            config.targets_per_row > 1,
            f"data.targets_per_row: got {config.targets_per_row}, needs 1: pairs are not sequences",
        ),
        *(
            (feature.from_sequence, f"data.query.{name}: pairs have no histories; use the sub-command `interactions`")
            for name, feature in config.query.items()
        ),
        (
            bool(tables.beir) and target.append,
            f"--beir {tables.beir} would have the new partition only; leave it out with --append",
        ),
        (
            tables.time_unit is not None and not target.append and tables.split != "time",
            f"--time-unit {tables.time_unit} has no effect without --split time; leave it out",
        ),
        (
            config.siamese and not (tables.query_id_column and tables.doc_id_column),
            "data.siamese=true: a query is a document; give --query-id-column and --doc-id-column",
        ),
    ]
    check_options(rules)
    if tables.beir:
        check_output_folder(tables.beir, overwrite=target.overwrite)
    if target.append:
        tables.check_recorded(whole_documents=tables.whole_documents)


def _read_pairs_part(
    columns: Mapping[str, str], tables: PairTables, schema: Schema, splitter: Splitter, seed: int,
    stored: StoredDocuments, part: TablePart, folder: Path,
) -> None:  # fmt: skip
    """Read a part of a table into rows, with features in columns q0, q1, …, and their distinct documents."""
    row_schema = pa.schema([*ROW_COLUMNS.items(), *spool_columns("q", schema.query)])
    with (
        RowFile(folder / "rows.parquet", row_schema) as row_file,
        RowFile(folder / "documents.parquet", document_schema(schema.documents)) as file,
        FirstRows(file, "doc_id") as documents,
        read_part(part, columns, folder, each_of=tables.each_of) as (batches, summary),
    ):
        for check in batches:
            query, doc = canonical(check, schema.query), canonical(check, schema.documents)
            check.fail(missing(doc, schema.doc), "no document: its features are empty")
            if tables.query_id_column is None:
                query_ids = hash_rows(query)
            else:
                query_ids = hash_strings(ids(check, tables.query_id_column))
            content_hash = hash_rows(doc)
            name = tables.doc_id_column
            keys = (
                row_keys(hash_rows(doc.select(list(schema.doc))))
                if name is None
                else ids(check, name, lacks="document")
            )
            doc_ids = hash_strings(keys)
            if schema.siamese:
                check.fail(query_ids == doc_ids, "the document is the query itself")
            title = strings(check, schema.title) if schema.title else keys
            relevance = np.ones(len(query_ids))
            if tables.relevance_column:
                relevance = relevances(check, tables.relevance_column)
            split, unit, times = splitter.assign(check, query_ids)
            # Rows of split `none` add documents alone; in siamese datasets their queries are documents, too.
            no_query = missing(query, schema.query)
            if not schema.siamese:
                no_query &= split < len(SPLITS)
            check.fail(no_query, "no query: its features are empty")
            ordinals = row_ordinals(part, check.batch, several=tables.each_of is not None)
            numbers = (
                ordinals,
                shuffle_keys(ordinals, seed),
                query_ids,
                doc_ids,
                content_hash,
                relevance,
                split,
                unit,
                times.values,
            )
            values = [pa.array(v).cast(t) for v, t in zip(numbers, ROW_COLUMNS.values(), strict=True)]
            good = pa.array(check.good)
            row_file.add(pa.Table.from_arrays([*values, *query.columns], names=row_schema.names).filter(good))
            summary.add(check.batch, times, check.good)
            documents.add(stored.compare(document_rows(ordinals, content_hash, keys, title, doc).filter(good)))
            if schema.siamese:  # the queries are documents, too
                query_keys = strings(check, str(tables.query_id_column))
                queries = document_rows(ordinals, hash_rows(query), query_keys, query_keys, query)
                documents.add(stored.compare(queries.filter(good)))


def _sorted_splits(
    run: Ingestion, tables: PairTables, splitter: Splitter, query_columns: list[str]
) -> dict[str, RowTable]:
    """Return every split's rows in their final order, from the view `assigned_rows`.

    Raises DataError: no train rows.
    """
    engine = run.engine
    numbered = "SELECT *, 1 AS nth FROM assigned_rows"
    engine.view("numbered_rows", first_rows("assigned_rows", "query_id, doc_id") if tables.dedup else numbered)
    unique = f"SELECT {', '.join([*WRITTEN, *query_columns])} FROM numbered_rows WHERE nth = 1"
    splits = {
        name: engine.select(name, f"{unique} AND split = {number}", order="shuffle" if name == "train" else "place")
        for number, name in enumerate(SPLITS)
    }
    ((num_rows, relevant),) = engine.fetch("SELECT count(*), CAST(max(relevance) > 0 AS INT) FROM train")
    if not num_rows:
        raise DataError(
            f"{tables.files[0]}: no rows remain for the train split{splitter.no_train_hint}"
            f"{run.writer.quarantine.summary()}"
        )
    if not relevant:
        raise DataError("every relevance in the train split is 0: there are no positives to learn from")
    # notes on late rows, repeated pairs, and documents in several splits or forms
    if tables.until is not None:
        run.note_count(
            "SELECT (SELECT count(*) FROM pair_rows) - (SELECT count(*) FROM assigned_rows)",
            f"rows are not before --until {tables.until} and dropped; their documents remain",
        )
    if tables.dedup:
        run.note_count(
            "SELECT count(*) FROM numbered_rows WHERE nth > 1",
            "rows repeat a (query, document) pair and are dropped",
        )
    in_several = "SELECT doc_id FROM assigned_rows GROUP BY doc_id HAVING min(split) < max(split)"
    ((num_documents,),) = engine.fetch(f"SELECT count(*) FROM ({in_several})")
    if num_documents:
        have = "1 document has" if num_documents == 1 else f"{num_documents} documents have"
        run.notes.append(f"{have} rows in several splits; --whole-documents keeps each in one")
    if tables.doc_id_column:
        other = "r.doc_id = d.doc_id AND r.content <> d.content AND d.nth = 1"
        run.note_count(
            f"SELECT count(*) FROM pair_rows r JOIN first_documents d ON {other}",
            f"rows have other features for the same {tables.doc_id_column}; the first row's are used",
        )
    return splits


def _encoded(
    keys: SortedKeys, features: dict[str, Feature], text: TextTokenizer | None, rows: pa.Table
) -> dict[str, pa.Array]:
    """Return the columns of a block; without `text`, query texts are not tokenized."""
    columns = canonical_columns(rows, "q", features)
    encoded = {
        "query_id": rows.column("query_id").combine_chunks(),
        "doc": pa.array(keys.find(rows.column("doc_id").to_numpy())),
        "relevance": rows.column("relevance").combine_chunks(),
    }
    if text is None:
        raw = {name: feature.encode_raw(columns.column(name).combine_chunks()) for name, feature in features.items()}
        return encoded | raw
    return encoded | encode_columns(columns, features, text, large=False)


def write_collection(
    engine: LocalEngine, documents: DistinctDocuments, folder: Path, schema: Schema, *, dedup: bool
) -> None:
    """Write the pairs as a BEIR collection, replacing an existing one: one judgement per pair and split.

    With `dedup` one per pair. Siamese queries have their document keys. Raises ConfigError: a relevance is not an
    integer, or an id has a tab or line break.
    """
    key, query_documents = "lpad(lower(hex(assigned_rows.query_id)), 16, '0')", ""
    if schema.siamese:
        key, query_documents = "own.doc_key", " JOIN documents own ON own.doc_id = assigned_rows.query_id"
    engine.view("keyed_rows", f"SELECT assigned_rows.*, {key} AS query_key FROM assigned_rows{query_documents}")
    engine.view("keyed_queries", first_rows("keyed_rows", "query_id"))
    queries = engine.select("queries", "SELECT * FROM keyed_queries WHERE nth = 1", order="place, query_id")
    engine.view("keyed_pairs", first_rows("keyed_rows", "query_id, doc_id" if dedup else "query_id, doc_id, split"))
    judgements = (
        "SELECT keyed_pairs.place, query_id, query_key, documents.doc_key, relevance FROM keyed_pairs "
        "JOIN documents ON keyed_pairs.doc_id = documents.doc_id WHERE keyed_pairs.nth = 1 AND split = "
    )

    with new_folder(real_path(folder), OWN_FILES) as unfinished:
        (unfinished / QRELS_DIR).mkdir()
        write_json(unfinished / META_FILE, COLLECTION)
        for name, table, key_column, prefix, features in (
            (CORPUS_FILE, documents.table, "doc_key", "d", schema.doc),
            (QUERIES_FILE, queries, "query_key", "q", schema.query),
        ):
            entries = (
                (piece.column(key_column).to_pylist(), canonical_columns(piece, prefix, features))
                for piece in table.batches()
            )
            write_entries(unfinished / name, features, entries)
        for number, split in enumerate(SPLITS):
            table = engine.select(f"judgements_{split}", f"{judgements}{number}", order="place, query_id, doc_key")
            if table.num_rows:
                pieces = (piece.select(["query_key", "doc_key", "relevance"]) for piece in table.batches())
                rows = (zip(*(column.to_pylist() for column in piece.columns), strict=True) for piece in pieces)
                write_judgements(unfinished, split, chain.from_iterable(rows))


NO_POSITIVES = np.zeros(0, np.int64), np.zeros(0, np.int64)


@dataclass(frozen=True)
class ItemTables(ColumnOptions):
    """The source tables and their columns; at least one table."""

    items: Path | str | Source | None = None
    withdrawn: Path | str | Source | None = None  # only its item column is read
    item_column: str = "item_id"
    items_time_column: str | None = None  # start of validity of a row of items; None: one row per item
    time_unit: DeclaredUnit | None = None  # of numbers in columns of times; None: data.time_unit


def make_items(
    config: DataConfig, tables: ItemTables, target: IngestTarget, progress: Progress = no_progress
) -> IngestReport:
    """Append a partition of items, without rows, to the dataset at `target.out`.

    An item of `items` that was withdrawn is back, unless `withdrawn` has it, too. Raises DataError, ConfigError.
    """
    if tables.time_unit is not None and tables.items_time_column is None:
        raise ConfigError(f"--time-unit {tables.time_unit} needs --items-time-column")
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
            rule = time_rule(writer, config, tables.time_unit)
            documents, times = read_items(
                run, tables.item_column, tables.items_time_column, of_tables(base, config), items, rule
            )
            if times:
                record_times(writer, rule, {f"{items.name}, column {tables.items_time_column!r}": times})
            sides = document_sides(engine, base, documents)
        # the items that are withdrawn, and those of `items` that are back
        files = catalogue_files(writer.out, writer.content, [WITHDRAWALS])
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
