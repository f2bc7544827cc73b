"""Common parts of ingestion jobs: target, engine, reading of tables, and the final report."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers

from bigdssm.config import DataConfig
from bigdssm.dataset.partition import read_partition
from bigdssm.dataset.remote import COUNTS_FILE
from bigdssm.dataset.rows import EVENT_COLUMNS
from bigdssm.dataset.schema import SCHEMA_FILE, Schema
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Feature, TextTokenizer, Vector
from bigdssm.ingest.dataset_writer import PARTITIONS, VERSIONS, DatasetWriter
from bigdssm.ingest.documents import DistinctDocuments
from bigdssm.ingest.engines.local import LocalEngine
from bigdssm.ingest.engines.spark import Cluster, SparkEngine
from bigdssm.ingest.engines.tables import RowTable, read_facts
from bigdssm.ingest.reading import TablePart, UnreadableTable, bad_rows, table_parts
from bigdssm.ingest.writing import Encode, write_catalogue, write_counts, write_split
from bigdssm.sources.base import Source
from bigdssm.sources.opening import SparkTable
from bigdssm.sources.text import MissingColumn
from bigdssm.utils.hashing import code_checksum
from bigdssm.utils.log import Progress, no_progress

BLOCK_COLUMNS = ("query_id", "doc", "relevance", "sequence", "first", "end")
SEQUENCE_COLUMNS = ("query_key", "query_id", *EVENT_COLUMNS)
CATALOGUE_COLUMNS = ("doc_key", "doc_id", "content", "doc_title")
BYTES_PER_ROW = 100  # an estimate


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

    @property
    def rows_per_s(self) -> float:
        """The number of rows written per second."""
        return sum(self.rows.values()) / self.seconds


@dataclass
class Ingestion:
    """A running ingestion: its dataset writer, its engine, and the notes for the report."""

    writer: DatasetWriter
    engine: LocalEngine
    notes: list[str]
    started: float

    def read(self, step: str, sources: Sequence[Source], work: Any, features: Iterable[Feature] = ()) -> list[Path]:
        """Read all parts of tables with `work`, quarantine bad rows, and return the parts' folders.

        `features` of the tables may have matrices, which need a row for each row of a single table. Raises ConfigError:
        several tables; DataError, with a summary of the bad rows up to the error.
        """
        columns: Mapping[str, str] = work.columns
        vectors = [feature for feature in features if isinstance(feature, Vector) and feature.matrix is not None]
        if vectors and len(sources) > 1:
            raise ConfigError(f"{vectors[0].matrix}: got {len(sources)} tables, a matrix needs a single one; join them")
        try:
            sources = [self.engine.source(f"{step}_{n}_source", s, list(columns)) for n, s in enumerate(sources)]
        except MissingColumn as error:
            raise DataError(error.message(columns)) from None
        jobs: list[TablePart] = table_parts(sources)
        rows = sum(source.size() for source in sources) // BYTES_PER_ROW
        quarantine = self.writer.quarantine
        try:
            folders = self.engine.map(step, jobs, work, rows=rows)
        except UnreadableTable as error:
            done = sorted(path for path in (self.engine.spool / step).glob("[0-9]*"))
            quarantine.add(bad_rows(done))
            quarantine.add(error.bad)
            raise DataError(f"{error}{quarantine.summary()}") from None
        quarantine.add(bad_rows(folders))
        facts = [read_facts(folder) for folder in folders]
        quarantine.num_good += int(sum(some["num_good"] for some in facts))
        usable = {job.number for job, some in zip(jobs, facts, strict=True) if some["num_rows"]}
        for number, source in enumerate(sources):
            if number not in usable:
                raise DataError(f"{source.name} has no usable rows{quarantine.summary()}")
        for vector in vectors:
            vector.check_matrix(max(int(some["last_row"]) for some in facts), sources[0].name)
        return folders

    def write_splits(self, splits: Mapping[str, RowTable], encode: Encode) -> dict[str, Any]:
        """Write every non-empty split as blocks, and return the splits' metadata."""
        self.notes += [f"the split {name} is empty" for name, table in splits.items() if not table.num_rows]
        return {
            name: write_split(self.engine, name, table, encode, self.writer.partition_dir)
            for name, table in splits.items()
            if table.num_rows
        }

    def finish(
        self, schema: Schema, text: TextTokenizer | None, documents: DistinctDocuments, splits: dict[str, Any],
        positives: tuple[np.ndarray, np.ndarray], sequences: Sequence[dict[str, Any]] = (),
        withdrawals: Sequence[dict[str, Any]] = (),
    ) -> IngestReport:  # fmt: skip
        """Write counts and catalogue, commit the dataset and return the report.

        `positives`: catalogue rows of documents and their numbers of train positives, int64. A partition without
        `splits` has items alone.
        """
        writer = self.writer
        checksum = write_counts(writer.partition_dir / COUNTS_FILE, *positives)
        catalogue, versions = write_catalogue(
            self.engine, documents, schema.doc, text, writer.catalogue_dir,
            len(writer.catalogue_parts), len(writer.content.get(VERSIONS, [])),
        )  # fmt: skip
        if writer.append and splits:
            known = {name: read_partition(writer.out, name) for name in writer.content[PARTITIONS]}
            same = [name for name, partition in known.items() if partition.content["splits"] == splits]
            self.notes += [f"all rows equal those of partition {name}: is it the same table?" for name in same]
            self.notes += _held_out(splits)
        changed_docs = documents.num_changed  # before the commit removes the spool
        writer.commit(schema, catalogue, versions, splits, checksum, sequences, withdrawals)
        many = [
            f"the {entry['rows']:,} rows of split {split} have {entry['queries']:,} queries"
            for split, entry in splits.items()
            if entry["queries"] != entry["rows"]
        ]
        return IngestReport(
            out=writer.out,
            partition=writer.partition,
            rows={split: entry["rows"] for split, entry in splits.items()},
            num_docs=documents.total,
            new_docs=sum(part["rows"] for part in catalogue),
            changed_docs=changed_docs,
            new_versions=sum(part["rows"] for part in versions),
            num_bad=writer.quarantine.num_bad,
            seconds=time.monotonic() - self.started,
            notes=(*self.notes, *many),
        )


def _held_out(splits: Mapping[str, Any]) -> list[str]:
    """Return a note if an append adds fewer queries to train than to the other splits."""
    total = sum(entry["queries"] for entry in splits.values())
    held_out = total - splits["train"]["queries"]
    if 2 * held_out <= total:
        return []
    return [
        f"most queries of the partition are held out: {held_out:,} of {total:,}; with --split train all are trained on"
    ]


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
    inputs = _inputs(config, target, sources, options, matrices)
    writer = DatasetWriter(
        target.out, target.partition, config.max_bad_fraction, source=inputs,
        overwrite=target.overwrite, append=target.append,
    )  # fmt: skip
    try:
        engine = _engine(target, writer.spool, progress)
    except BaseException:  # keep the finished steps of an interrupted ingestion
        writer.release()
        raise
    with writer:
        try:
            yield Ingestion(writer, engine, [], started)
        finally:
            engine.close()


def _engine(target: IngestTarget, spool: Path, progress: Progress) -> LocalEngine:
    if target.spark is None:
        return LocalEngine(spool, progress, processes=target.processes)
    return SparkEngine(spool, progress, cluster=target.spark)


def _inputs(
    config: DataConfig, target: IngestTarget, sources: Sequence[Source], options: Any, matrices: Sequence[str]
) -> str:
    """Serialize the inputs: config, options, fingerprints of sources and code, versions."""
    like = [target.like / SCHEMA_FILE] if target.like else []
    tokenizer = [] if config.tokenizer.path is None else sorted(Path(config.tokenizer.path).glob("*.json"))
    other_files = [*like, *tokenizer, *map(Path, matrices)]
    files = [(str(path.resolve()), path.stat().st_mtime_ns) for path in other_files if path.is_file()]
    fingerprints = [source.fingerprint() for source in sources]
    code = (code_checksum(), pa.__version__, tokenizers.__version__, np.__version__)
    declared = Schema.declared(config).fingerprint()
    engine = "built-in" if target.spark is None else "spark"
    known = [asdict(config), declared, asdict(options), target.seed, files, fingerprints, code, engine]
    return json.dumps(known, default=str, sort_keys=True)


def check_column_names(tables: Any) -> None:
    """Replace '' by None in column options of a dataclass.

    Raises ConfigError: the column is required.
    """
    for option in fields(tables):
        if option.name.endswith("_column") and getattr(tables, option.name) == "":
            if "None" not in str(option.type):
                raise ConfigError(f"--{option.name.replace('_', '-')} is '', needs the name of a column")
            object.__setattr__(tables, option.name, None)


def check_reserved_names(features: Iterable[str], reserved: Sequence[str], side: str) -> None:
    """Raise ConfigError if a feature has the name of a reserved column."""
    for name in features:
        if name in reserved:
            raise ConfigError(f"data.{side}.{name}: the name is reserved for a column of the dataset; choose another")
