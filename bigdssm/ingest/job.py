"""Common parts of ingestion jobs: target, engine, reading of tables, writing of catalogue and shards, the final report.

Each file is written by one job, with a fixed number of rows or blocks, so its bytes do not depend on the number of
workers.
"""

import io
import json
import os
import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import xxhash

from bigdssm.config import DataConfig
from bigdssm.dataset.catalogue import DOCUMENT_COLUMN, SINCE_COLUMN
from bigdssm.dataset.partition import INDEX_COLUMNS, read_partition
from bigdssm.dataset.remote import COUNTS_FILE
from bigdssm.dataset.rows import EVENT_COLUMNS
from bigdssm.dataset.schema import SCHEMA_FILE, Schema
from bigdssm.errors import ConfigError, DataError, UnavailableError
from bigdssm.features import Feature, TextTokenizer, Vector, encode_columns
from bigdssm.features.columns import ReportBad, RowCheck, SourceBatch
from bigdssm.features.times import TimeSummary
from bigdssm.ingest.dataset_writer import PARTITIONS, VERSIONS, BadSourceRow, DatasetWriter
from bigdssm.ingest.documents import DistinctDocuments, canonical_columns
from bigdssm.ingest.engines import (
    ROWS_PER_READ,
    LocalEngine,
    RowTable,
    StepFunction,
    UnreadableTable,
    ranges,
    read_facts,
    write_facts,
)
from bigdssm.ingest.spark import Cluster, SparkEngine
from bigdssm.sources.base import Part, Source
from bigdssm.sources.opening import SparkTable
from bigdssm.sources.text import MissingColumn
from bigdssm.utils.hashing import code_checksum, file_checksum
from bigdssm.utils.log import Progress, no_progress

MAX_VALUES = 1 << 12  # per row
ORDINAL_BITS = 47  # for a row's number within its table
NTH_BITS = MAX_VALUES.bit_length() - 1  # the lowest of these: for the number of an unnested value
MAX_TABLES = 1 << (63 - ORDINAL_BITS)
BAD = "bad.jsonl"
MAX_REPORTED = 1 << 16  # bad rows before a fatal error
BLOCK_COLUMNS = ("query_id", "doc", "relevance", "sequence", "first", "end")
SEQUENCE_COLUMNS = ("query_key", "query_id", *EVENT_COLUMNS)
CATALOGUE_COLUMNS = ("doc_key", "doc_id", "content", "doc_title")
BYTES_PER_ROW = 100  # an estimate
MAX_BLOCK_ROWS, MIN_BLOCK_ROWS = 2048, 256
TARGET_BLOCKS = 64  # per split; with fewer, lanes share blocks and shuffling is weaker
BLOCKS_PER_SHARD = 512
DOCUMENTS_PER_FILE = 1 << 17
TAR_HEADER_BYTES = 512
_IPC = pa.ipc.IpcWriteOptions(compression="zstd")

Encode = Callable[[pa.Table], dict[str, pa.Array]]
"""Returns block columns for rows of a split; picklable."""


def explode(batch: SourceBatch, name: str, report_bad: ReportBad) -> SourceBatch:
    """Unnest the list column `name`: one row per value.

    Rows without values, or with more than MAX_VALUES, are reported and skipped. Raises DataError: not a list column.
    """
    column = batch.table.column(name).combine_chunks()
    if pa.types.is_null(column.type):  # by chance no row of the batch has a value
        column = column.cast(pa.list_(pa.string()))
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise DataError(f"{batch.file}: column {name!r} holds {column.type}, --each-of needs lists")
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    check = RowCheck(batch, report_bad)
    check.fail(lengths == 0, f"{name} holds no value")
    check.fail(lengths > MAX_VALUES, f"{name} holds {{}} values, at most {MAX_VALUES} are allowed", lengths)
    parent = np.repeat(np.flatnonzero(check.good), lengths[check.good])
    values = column.filter(pa.array(check.good)).flatten()
    table = batch.table.take(pa.array(parent)).set_column(batch.table.column_names.index(name), name, values)
    return SourceBatch(batch.file, table, batch.rows[parent])


@dataclass(frozen=True)
class TablePart:
    """A part of a table, read by one worker."""

    source: Source
    number: int  # of the table within the ingestion
    part: Part


def column_options(*columns: tuple[str | None, str]) -> dict[str, str]:
    """Map each distinct column to the option, or else the feature, that names it.

    None is dropped.
    """
    names: dict[str, str] = {}
    for column, by in columns:
        if column and (column not in names or by.startswith("--")):
            names[column] = by
    return names


def feature_columns(features: Mapping[str, Feature], side: str) -> list[tuple[str | None, str]]:
    """Return (source column, config key) of one side's features."""
    return [(column, f"data.{side}.{name}") for name, feature in features.items() for column in feature.source_columns]


def row_ordinals(part: TablePart, batch: SourceBatch, *, several: bool = False) -> np.ndarray:
    """Return a unique, ordered key of every row: (table, row), int64 [rows] ≥ 0.

    `several`: adjacent rows may have equal numbers (after `explode`); then also the index within these.
    """
    rows = batch.rows - 1
    if several:
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        nth = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
        rows = (rows << NTH_BITS) + nth
    return (np.int64(part.number) << ORDINAL_BITS) + rows


@contextmanager
def read_part(
    part: TablePart, columns: Mapping[str, str], folder: Path, *, each_of: str | None = None
) -> Iterator[tuple[Iterator[RowCheck], TimeSummary]]:
    """Read a part: yield an iterator over its batches, to be validated, and a summary, to add their times to.

    At the end counts and bad rows are written to `folder`. `columns` maps required columns to the options that name
    them, for messages. The list column `each_of` is unnested. Raises UnreadableTable.
    """
    num_rows, num_good, last_row = 0, 0, 0
    summary = TimeSummary()
    newest = deque[BadSourceRow](maxlen=MAX_REPORTED)

    def report_bad(file: str, row: int, reason: str, left_out: bool = True) -> None:
        nonlocal last_row
        last_row = max(last_row, row)
        newest.append((file, row, reason, left_out))
        lines.write(json.dumps(newest[-1]) + "\n")

    def batches() -> Iterator[RowCheck]:
        nonlocal num_rows, num_good, last_row
        for batch in part.source.batches(part.part, list(columns), report_bad):
            num_rows += len(batch.rows)
            last_row = max(last_row, int(batch.rows.max(initial=0)))
            check = RowCheck(explode(batch, each_of, report_bad) if each_of else batch, report_bad)
            yield check
            num_good += int(check.good.sum())

    with (folder / BAD).open("w", encoding="utf-8") as lines:
        try:
            yield batches(), summary
        except UnavailableError:
            raise
        except DataError as error:
            message = error.message(columns) if isinstance(error, MissingColumn) else str(error)
            raise UnreadableTable(message, list(newest)) from None
    write_facts(folder, num_rows=num_rows, num_good=num_good, last_row=last_row, times=summary.facts())


def bad_rows(folders: Iterable[Path]) -> Iterator[BadSourceRow]:
    """Yield the bad rows of a step's folders, in order."""
    for folder in folders:
        with (folder / BAD).open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


class ColumnOptions:
    """Base of the dataclasses of source tables and their columns: '' for a column means None."""

    def __post_init__(self) -> None:
        """Raises ConfigError: the column is required."""
        for option in fields(self):  # type: ignore[arg-type]
            if option.name.endswith("_column") and getattr(self, option.name) == "":
                if "None" not in str(option.type):
                    raise ConfigError(f"--{option.name.replace('_', '-')} is '', needs the name of a column")
                object.__setattr__(self, option.name, None)


@dataclass(frozen=True)
class IngestTarget:
    """The destination of a dataset, and the engine that builds it."""

    out: Path
    partition: str = "base"
    overwrite: bool = False
    append: bool = False
    seed: int = 0
    like: Path | None = None  # a dataset whose schema and tokenizer are reused, so that both can be mixed
    processes: int = 0  # of the built-in engine; 0: one per core
    spark: Cluster | None = None  # None: the built-in engine, on this machine


@dataclass(frozen=True)
class IngestReport:
    """The outcome of an ingestion."""

    out: Path | str  # the folder, or its URL
    partition: str
    rows: dict[str, int]  # by split
    num_docs: int
    new_docs: int
    changed_docs: int  # existing documents with new versions
    new_versions: int  # of these and, if items have times, of new documents after their first version
    num_bad: int
    seconds: float
    notes: tuple[str, ...] = field(default=())


@dataclass
class Ingestion:
    """A running ingestion: its dataset writer, its engine, and the notes for the report."""

    writer: DatasetWriter
    engine: LocalEngine
    notes: list[str]
    started: float

    def read(
        self, step: str, sources: Sequence[Source], columns: Mapping[str, str], work: StepFunction,
        features: Iterable[Feature] = (),
    ) -> list[Path]:  # fmt: skip
        """Read all parts of tables with `work`, quarantine bad rows, and return the parts' folders.

        `columns` maps the required columns to the options that name them, for messages. `features` of the tables may
        have matrices, which need a row for each row of a single table. Raises ConfigError:
        several tables; DataError, with a summary of the bad rows up to the error.
        """
        vectors = [feature for feature in features if isinstance(feature, Vector) and feature.matrix is not None]
        if vectors and len(sources) > 1:
            raise ConfigError(f"{vectors[0].matrix}: got {len(sources)} tables, a matrix needs a single one; join them")
        try:
            sources = [self.engine.source(f"{step}_{n}_source", s, list(columns)) for n, s in enumerate(sources)]
        except MissingColumn as error:
            raise DataError(error.message(columns)) from None
        if len(sources) > MAX_TABLES:
            raise DataError(f"{len(sources)} tables are given, at most {MAX_TABLES} are supported; join some of them")
        jobs = [TablePart(source, number, part) for number, source in enumerate(sources) for part in source.parts()]
        rows = sum(source.size() for source in sources) // BYTES_PER_ROW
        quarantine = self.writer.quarantine
        try:
            folders = self.engine.map(step, jobs, work, rows=rows)
        except UnreadableTable as error:
            quarantine.add(bad_rows(sorted((self.engine.spool / step).glob("[0-9]*"))))
            quarantine.add(error.args[1])
            raise DataError(f"{error}{quarantine.summary()}") from None
        quarantine.add(bad_rows(folders))
        facts = [read_facts(folder) for folder in folders]
        quarantine.num_good += int(sum(part_facts["num_good"] for part_facts in facts))
        usable = {job.number for job, part_facts in zip(jobs, facts, strict=True) if part_facts["num_rows"]}
        if unusable := [source for number, source in enumerate(sources) if number not in usable]:
            raise DataError(f"{unusable[0].name} has no usable rows{quarantine.summary()}")
        for vector in vectors:
            vector.check_matrix(max(int(part_facts["last_row"]) for part_facts in facts), sources[0].name)
        return folders

    def note_count(self, query: str, note: str) -> None:
        """Add a note that begins with the number that a query returns, unless it is 0."""
        ((number,),) = self.engine.fetch(query)
        if number:
            self.notes.append(f"{number} {note}")

    def write_splits(self, splits: Mapping[str, RowTable], encode: Encode) -> dict[str, Any]:
        """Write every non-empty split as shards of encoded blocks and an index.

        Returns the metadata {"rows", "queries", "blocks", "shards", "index_checksum"} by split.
        """
        self.notes += [f"the split {name} is empty" for name, table in splits.items() if not table.num_rows]
        written: dict[str, Any] = {}
        for split, table in splits.items():
            if not table.num_rows:
                continue
            rows_per_block = block_rows(table.num_rows)
            jobs = list(enumerate(ranges(table, rows_per_block * BLOCKS_PER_SHARD)))
            work = partial(_write_shard, split, table, encode, rows_per_block)
            folders = self.engine.map(f"write_{split}", jobs, work, rows=table.num_rows)
            entries = move_files(folders, self.writer.partition_dir)
            shards = [entry["file"] for entry in entries]
            shard = np.repeat(np.arange(len(entries), dtype=np.int32), [len(entry["rows"]) for entry in entries])
            index = {
                name: np.array([number for entry in entries for number in entry[name]], dtype)
                for name, dtype in INDEX_COLUMNS.items()
            }
            written[split] = {
                "rows": int(index["rows"].sum()),
                "queries": int(index["queries"].sum()),
                "blocks": len(shard),
                "shards": shards,
                "index_checksum": write_index(self.writer.partition_dir, split, shards, shard, index),
            }
        return written

    def finish(
        self, schema: Schema, text: TextTokenizer | None, documents: DistinctDocuments, splits: dict[str, Any],
        positives: tuple[np.ndarray, np.ndarray], sequences: Sequence[dict[str, Any]] = (),
        withdrawals: Sequence[dict[str, Any]] = (),
    ) -> IngestReport:  # fmt: skip
        """Write counts and catalogue, commit the dataset and return the report.

        `positives`: catalogue rows of documents and their numbers of train positives, int64. A partition without
        `splits` has items alone. Raises ConfigError: a feature has the reserved name of the versions' column.
        """
        writer = self.writer
        docs, counts = positives
        order = np.argsort(docs)
        columns = {"doc": pa.array(docs[order]), "count": pa.array(counts[order])}
        checksum = write_arrow(writer.partition_dir / COUNTS_FILE, columns)["checksum"]
        # the files of new documents, and those of new versions of documents
        times = (SINCE_COLUMN,) if documents.versions is not None else ()
        tables = [("catalogue", documents.table, "", times, len(writer.content["catalogue"]))]
        if documents.changed is not None and documents.changed.num_rows:
            if DOCUMENT_COLUMN in schema.documents:
                raise ConfigError(
                    f"data.doc.{DOCUMENT_COLUMN}: the name is reserved in files of document versions, and "
                    f"{documents.changed.num_rows} documents have changed; rebuild the dataset with another name"
                )
            first_file = len(writer.content.get(VERSIONS, []))
            tables.append(("versions", documents.changed, "versions-", (DOCUMENT_COLUMN, *times), first_file))
        files: dict[str, list[dict[str, Any]]] = {"versions": []}
        for step, table, prefix, columns_of_versions, first_file in tables:
            jobs = list(enumerate(ranges(table, DOCUMENTS_PER_FILE), first_file))
            work = partial(_write_documents, table, schema.documents, text, prefix, columns_of_versions)
            files[step] = move_files(self.engine.map(step, jobs, work, rows=table.num_rows), writer.catalogue_dir)
        if writer.append and splits:
            partitions = {name: read_partition(writer.out, name) for name in writer.content[PARTITIONS]}
            same = [name for name, partition in partitions.items() if partition.content["splits"] == splits]
            self.notes += [f"all rows equal those of partition {name}: is it the same table?" for name in same]
            total = sum(entry["queries"] for entry in splits.values())
            held_out = total - splits["train"]["queries"]
            if 2 * held_out > total:
                counted = f"most queries of the partition are held out: {held_out:,} of {total:,}"
                self.notes.append(f"{counted}; with --split train all are trained on")
        changed_docs = documents.num_changed  # before the commit removes the spool
        writer.commit(schema, files["catalogue"], files["versions"], splits, checksum, sequences, withdrawals)
        query_notes = [
            f"the {entry['rows']:,} rows of split {split} have {entry['queries']:,} queries"
            for split, entry in splits.items()
            if entry["queries"] != entry["rows"]
        ]
        return IngestReport(
            out=writer.out,
            partition=writer.partition,
            rows={split: entry["rows"] for split, entry in splits.items()},
            num_docs=documents.total,
            new_docs=sum(part["rows"] for part in files["catalogue"]),
            changed_docs=changed_docs,
            new_versions=sum(part["rows"] for part in files["versions"]),
            num_bad=writer.quarantine.num_bad,
            seconds=time.monotonic() - self.started,
            notes=(*self.notes, *query_notes),
        )


@contextmanager
def ingestion(
    config: DataConfig, target: IngestTarget, sources: Sequence[Source], options: Any, progress: Progress = no_progress
) -> Iterator[Ingestion]:
    """Start an ingestion, or resume an interrupted one with the same `sources` and `options`.

    Raises DataError, ConfigError: `target.out` cannot be written.
    """
    started = time.monotonic()
    features = (*config.query.values(), *config.doc.values())
    matrices = [feature.matrix for feature in features if isinstance(feature, Vector) and feature.matrix]
    if matrices and any(isinstance(source, SparkTable) for source in sources):
        raise ConfigError(f"{matrices[0]}: a matrix is indexed by row number, which rows of a Spark query do not have")
    # an interrupted ingestion is resumed if config, options, fingerprints of tables and code, and versions are equal
    tokenizer = [] if config.tokenizer.path is None else sorted(Path(config.tokenizer.path).glob("*.json"))
    other_files = [*([target.like / SCHEMA_FILE] if target.like else []), *tokenizer, *map(Path, matrices)]
    inputs = [
        asdict(config),
        Schema.declared(config).fingerprint(),
        asdict(options),
        target.seed,
        [(str(path.resolve()), path.stat().st_mtime_ns) for path in other_files if path.is_file()],
        [source.fingerprint() for source in sources],
        (code_checksum(), pa.__version__, tokenizers.__version__, np.__version__),
        "built-in" if target.spark is None else "spark",
    ]
    writer = DatasetWriter(
        target.out, target.partition, config.max_bad_fraction,
        source=json.dumps(inputs, default=str, sort_keys=True),
        overwrite=target.overwrite, append=target.append,
    )  # fmt: skip
    try:
        if target.spark is None:
            engine = LocalEngine(writer.spool, progress, processes=target.processes)
        else:
            engine = SparkEngine(writer.spool, progress, cluster=target.spark)
    except BaseException:  # keep the finished steps of an interrupted ingestion
        writer.release()
        raise
    with writer:
        try:
            yield Ingestion(writer, engine, [], started)
        finally:
            engine.close()


def check_options(rules: Iterable[tuple[bool, str]]) -> None:
    """Raise ConfigError with the message of the first rule, (whether it is violated, message), that is violated."""
    for is_violated, message in rules:
        if is_violated:
            raise ConfigError(message)


def check_reserved_names(features: Iterable[str], reserved: Sequence[str], side: str) -> None:
    """Raise ConfigError if a feature has the name of a reserved column."""
    if taken := [name for name in features if name in reserved]:
        raise ConfigError(f"data.{side}.{taken[0]}: the name is reserved for a column of the dataset; choose another")


def write_arrow(path: Path, columns: dict[str, pa.Array]) -> dict[str, Any]:
    """Write non-null columns as a single uncompressed batch of an Arrow file.

    Return {"file", "rows", "checksum"}. A single batch gives readers random access to the mapped file without copies.
    """
    batch = _compact(pa.RecordBatch.from_pydict(columns))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return {"file": path.name, "rows": batch.num_rows, "checksum": file_checksum(path, bits=64)}


def _compact(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Copy rows to new buffers: the padding of a slice would contain the data after it."""
    return rows.take(pa.array(np.arange(rows.num_rows)))


def move_files(folders: Sequence[Path], target: Path) -> list[dict[str, Any]]:
    """Move the files of jobs to `target`, and return their metadata (the fact `made`).

    Files already moved by an interrupted ingestion are skipped.
    """
    entries = [read_facts(folder)["made"] for folder in folders]
    for folder, entry in zip(folders, entries, strict=True):
        if (source := folder / entry["file"]).exists():
            os.replace(source, target / entry["file"])
    return entries


def _write_documents(
    table: RowTable, features: dict[str, Feature], text: TextTokenizer | None, prefix: str, more_columns: Sequence[str],
    job: tuple[int, tuple[int, int]], folder: Path,
) -> None:  # fmt: skip
    number, (first, end) = job
    rows = table.read(first, end)
    names = ("doc_key", "doc_id", "content", "doc_title", *more_columns)
    columns = {name: rows.column(name).combine_chunks() for name in names}
    for name in ("doc_key", "doc_title"):
        columns[name] = columns[name].cast(pa.large_string())
    columns |= encode_columns(canonical_columns(rows, "d", features), features, text, large=True)
    write_facts(folder, made=write_arrow(folder / f"{prefix}{number:06d}.arrow", columns))


def block_rows(num_rows: int) -> int:
    """Return the number of rows per block for a split of `num_rows`."""
    return max(MIN_BLOCK_ROWS, min(MAX_BLOCK_ROWS, num_rows // TARGET_BLOCKS))


def write_index(folder: Path, split: str, shards: Sequence[str], shard: np.ndarray, index: Mapping[str, Any]) -> str:
    """Write the index of a split, of blocks in the files `shards` by number; return its checksum."""
    shard_names = pa.DictionaryArray.from_arrays(shard, pa.array(shards, pa.string()))
    columns = {"shard": shard_names, **{name: pa.array(index[name]) for name in INDEX_COLUMNS}}
    return str(write_arrow(folder / f"{split}.index.arrow", columns)["checksum"])


def _write_shard(
    split: str, table: RowTable, encode: Encode, rows_per_block: int, job: tuple[int, tuple[int, int]], folder: Path
) -> None:
    """Write one shard, a plain tar of blocks as Arrow streams, and its index entries."""
    shard, (first, end) = job
    path = folder / f"{split}-{shard:06d}.tar"
    index: dict[str, list[int]] = {name: [] for name in INDEX_COLUMNS}

    def contents() -> Iterator[tuple[int, bytes]]:
        rows_per_call = max(1, ROWS_PER_READ // rows_per_block) * rows_per_block  # several blocks are encoded at once
        for start in range(first, end, rows_per_call):
            rows = pa.RecordBatch.from_pydict(encode(table.read(start, min(start + rows_per_call, end))))
            for start_of_block in range(0, rows.num_rows, rows_per_block):
                block = rows.slice(start_of_block, rows_per_block)
                content = block_content(block)
                # one query per row or, for segments of sequences, one per target
                queries = block.num_rows
                if "first" in block.schema.names:
                    queries = int(block.column("end").to_numpy().sum() - block.column("first").to_numpy().sum())
                entry = (len(content), block.num_rows, queries, xxhash.xxh3_64_intdigest(content))
                for name, value in zip(("size", "rows", "queries", "checksum"), entry, strict=True):
                    index[name].append(value)
                yield (start + start_of_block) // rows_per_block, content

    index["offset"] = write_tar(path, contents())
    write_facts(folder, made={"file": path.name, **index})


def block_content(block: pa.RecordBatch) -> bytes:
    """Return the bytes of a block, an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, block.schema, options=_IPC) as arrow:
        arrow.write_batch(_compact(block))
    return bytes(sink.getvalue())


def write_tar(path: Path, contents: Iterable[tuple[int, bytes]]) -> list[int]:
    """Write a shard of blocks (number in the split, bytes), and return their offsets."""
    offsets = []
    with path.open("wb") as stream, tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
        for number, content in contents:
            offsets.append(tar.offset + TAR_HEADER_BYTES)
            # the header that webdataset's TarWriter would write; importing it loads torch, seconds per worker
            member = tarfile.TarInfo(f"{number:08d}.arrow")
            member.size, member.mode, member.uname, member.gname = len(content), 0o444, "bigdata", "bigdata"
            tar.addfile(member, io.BytesIO(content))
    return offsets
