"""Makes a dataset from tables whose rows are pairs: query features, document features, relevance.

Two passes in bounded memory. The first reads the tables, checks rows, numbers the distinct documents and fits the
schema; its rows wait on disk in buckets by a shuffle key. The second sorts bucket by bucket, tokenises and writes.
In memory stay one bucket, the vocabularies, and about 50 bytes a distinct document.

A run that was killed is taken up where its journals say, see passes.py. What comes out is the same to the byte.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bigdssm.config import DataConfig
from bigdssm.dataset.dataset import read_partition
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Feature, TextTokenizer, encode_columns, texts_of
from bigdssm.features.columns import RowCheck, SourceBatch, is_empty, relevances, strings
from bigdssm.features.fitting import canonical, missing
from bigdssm.making.catalogue_writer import KEY_COLUMNS, CatalogueWriter, check_names
from bigdssm.making.dataset_writer import PARTITIONS, DatasetWriter
from bigdssm.making.journal import State
from bigdssm.making.making import (
    BLOCK_COLUMNS,
    Fitting,
    Report,
    Target,
    commit,
)
from bigdssm.making.passes import Reading, SplitRows, fit, write_splits
from bigdssm.making.row_spool import RowSpool, ShuffleSpool, num_buckets
from bigdssm.progress import Progress, no_progress
from bigdssm.string_hashes import hash_strings
from bigdssm.tables.beir import BeirWriter
from bigdssm.tables.explode import exploded
from bigdssm.tables.hashing import KeyIndex, hash_rows, row_keys, shuffle_keys
from bigdssm.tables.pair_splits import SPLITS, PairSplit, Splitter, pair_hash
from bigdssm.tables.sources import check_table, read_table
from bigdssm.tables.webdataset_source import check_shard, is_shard, read_shard


@dataclass(frozen=True)
class PairTables:
    """The source tables (or plain WebDataset shards) and what their columns are; features name theirs in the config."""

    files: tuple[Path, ...]
    doc_id_column: str | None = None  # none: documents are the same where all their features are
    query_id_column: str | None = None  # none: queries are the same where all their features are
    relevance_column: str | None = None  # none: 1
    split: PairSplit = "random"
    split_column: str | None = None  # random: the group that stays together; time, column: what decides
    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    whole_documents: bool = (
        False  # random: the rows of one document stay together too; 40 bytes a row, in an extra pass
    )
    each_of: str | None = None  # a list column: every value makes a row
    beir: Path | None = None  # also write the pairs there as a BEIR collection
    raw_text: bool = False  # queries' texts stay as they are, loaders tokenise them
    dedup: bool = False  # drop further rows of one (query, document), in any split; 16 bytes a pair


def make_pairs(config: DataConfig, tables: PairTables, target: Target, progress: Progress = no_progress) -> Report:
    """Make (or append to) the dataset at `target.out` and return what was made.

    Raises DataError or ConfigError with nothing left half-written.
    """
    started = time.monotonic()
    check_names(config.doc, [name for name, _ in KEY_COLUMNS], "doc")
    check_names(config.query, BLOCK_COLUMNS, "query")
    if config.targets_per_row > 1:
        raise ConfigError(f"data.targets_per_row: got {config.targets_per_row}, needs 1: pairs are no sequences")
    for name, feature in config.query.items():
        if feature.from_sequence:
            raise ConfigError(f"data.query.{name}: pairs have no histories; use the sub-command `interactions`")
    fractions = (tables.validation_fraction, tables.test_fraction)
    splitter = Splitter(tables.split, tables.split_column, fractions, target.seed, tables.whole_documents)
    for path in tables.files:
        if is_shard(path):
            check_shard(path)
        else:
            check_table(path)
    with target.open(config, tables.files, tables) as writer:
        if tables.raw_text and not writer.append:
            writer.content["text"] = "raw"
        if any(read_partition(writer.out, name).sequence_files for name in writer.content[PARTITIONS]):
            raise DataError(f"{writer.out} holds interactions; the sub-command `interactions` appends to it")
        columns = {"doc": tables.doc_id_column, "query": tables.query_id_column}
        writer.identify(**{side: "content" if name is None else "column" for side, name in columns.items()})
        making = _PairMaking(config, tables, target, writer, splitter, progress)
        if not making.reading.whole:
            if splitter.needs_thresholds:
                splitter.learn(RowCheck(batch, _ignore) for batch in making.batches(splitter.columns, _ignore))
            if tables.whole_documents:
                splitter.join(*making.units_and_documents())
            making.read()
        making.check()
        schema, text = fit(writer, making.fitting, making.texts)
        raw_text = writer.content["text"] == "raw"
        splits, counts = write_splits(
            writer, making.splits, lambda table: _encoded(table, schema.query, text, raw_text), _positives,
            making.catalogue.num_docs, making.notes, progress,
        )  # fmt: skip
        return commit(writer, making.catalogue, schema, text, splits, counts, started, making.notes, making.beir)


def _positives(table: pa.Table) -> np.ndarray:
    relevant: np.ndarray = table.column("relevance").to_numpy() > 0
    docs: np.ndarray = table.column("doc").to_numpy()[relevant]
    return docs


def _ignore(file: str, row: int, reason: str, left_out: bool = True) -> None:
    """Bad rows met while looking for time thresholds are reported by the reading that follows."""


class _PairMaking:
    """The state between the passes."""

    def __init__(
        self,
        config: DataConfig,
        tables: PairTables,
        target: Target,
        writer: DatasetWriter,
        splitter: Splitter,
        progress: Progress,
    ) -> None:
        self.tables, self.target, self.writer = tables, target, writer
        self.splitter, self.progress = splitter, progress
        self.fitting = Fitting(config, writer, target.like)
        self.notes: list[str] = []
        base = self.fitting.base
        self.query, self.doc, self.display = base.query, base.doc, config.display
        self.reading = Reading(writer, self._state)
        done = self.reading.begun
        self.catalogue = CatalogueWriter(
            writer.spool, base.doc, writer.catalogue_parts, done["catalogue"] if done else None
        )
        self.documents = _PerDocument()
        self.seen_pairs, self.place, self.repeated = KeyIndex(), 0, 0
        if done:
            self.fitting.restore(done["fitting"])
            self.documents.restore(done["documents"])
            self.seen_pairs.restore(done["seen_pairs"])
            self.place, self.repeated = done["counts"]
        fields = [("query_id", pa.int64()), ("doc", pa.int64()), ("relevance", pa.float32())]
        fields += [(f"feature.{name}", feature.canonical_type) for name, feature in base.query.items()]
        self.row_schema = pa.schema(fields)
        spools = done["spools"] if done else [None] * len(SPLITS)
        self.train = ShuffleSpool(writer.spool, self.row_schema, num_buckets(tables.files), spools[0])
        self.held_out = [
            RowSpool(writer.spool / f"{name}.arrows", self.row_schema, state)
            for name, state in zip(SPLITS[1:], spools[1:], strict=True)
        ]
        self.splits: dict[str, SplitRows] = dict(zip(SPLITS, (self.train, *self.held_out), strict=True))
        self.beir = None
        if tables.beir:
            self.beir = BeirWriter(
                tables.beir, writer.spool / "beir", self.query, self.doc, done["beir"] if done else None
            )

    def batches(self, columns: Sequence[str], report_bad: Any) -> Iterator[SourceBatch]:
        each_of = self.tables.each_of
        wanted = list(dict.fromkeys([*columns, *([each_of] if each_of else [])]))
        for path in self.tables.files:
            read = read_shard if is_shard(path) else read_table
            for batch in read(path, wanted, report_bad):
                yield exploded(batch, each_of, report_bad) if each_of else batch

    @property
    def columns(self) -> list[str]:
        """Return the source columns of features, ids, relevance and split."""
        tables = self.tables
        named = (self.display, tables.doc_id_column, tables.query_id_column, tables.relevance_column)
        features = [c for side in (self.query, self.doc) for feature in side.values() for c in feature.source_columns]
        return features + [name for name in named if name] + self.splitter.columns

    def units_and_documents(self) -> tuple[np.ndarray, np.ndarray]:
        """Return what the split keeps together and the content of its document for every row, int64 [rows]."""
        units, contents = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for batch in self.batches(self.columns, _ignore):
            check = RowCheck(batch, _ignore)
            query, doc = canonical(check, self.query), canonical(check, self.doc)
            units.append(self.splitter.units(check, self._query_ids(check, query))[check.good])
            contents.append(hash_rows(doc)[check.good])
        return np.concatenate(units), np.concatenate(contents)

    def read(self) -> None:
        """Pass 1: every row checked, numbered, split, counted for the fit, and spooled."""
        tables, quarantine = self.tables, self.writer.quarantine
        for batch in self.reading.batches("pairs", lambda report_bad: self.batches(self.columns, report_bad)):
            check = RowCheck(batch, quarantine.report)
            query, doc = canonical(check, self.query), canonical(check, self.doc)
            check.fail(missing(query, self.query), "no query: its features are empty")
            check.fail(missing(doc, self.doc), "no document: its features are empty")
            query_ids = self._query_ids(check, query)
            contents = hash_rows(doc)
            keys = self._doc_keys(check, contents)
            display = strings(check, self.display) if self.display else keys
            relevance = np.ones(len(query_ids))
            if tables.relevance_column:
                relevance = relevances(check, tables.relevance_column)
            split = self.splitter.split(check, query_ids)
            good = check.good
            quarantine.num_good += int(good.sum())
            mask = pa.array(good)
            doc = doc.filter(mask)
            docs, first = self.catalogue.add(keys.filter(mask), display.filter(mask), doc)
            self.documents.grow(self.catalogue.num_docs)
            self.documents.note(docs, first, contents[good], split[good])
            query_ids, split, relevance = query_ids[good], split[good], relevance[good]
            shuffle = shuffle_keys(np.flatnonzero(good) + self.place, self.target.seed)
            self.place += len(good)
            keep = np.ones(len(docs), bool)
            if tables.dedup:
                keep[:] = False
                keep[self.seen_pairs.add(pair_hash(query_ids, docs))[1]] = True
                self.repeated += int((~keep).sum())
            query = query.filter(mask)
            if self.beir is not None:
                names = [SPLITS[number] for number in split.tolist()]
                pair_ids = pair_hash(query_ids, docs)
                self.beir.add(doc, first, keys.filter(mask), query, query_ids, names, relevance, pair_ids)
            in_train = keep & (split == 0)
            self._fit(query, doc, docs, in_train)
            values = [pa.array(query_ids), pa.array(docs), pa.array(relevance.astype(np.float32))]
            rows = pa.table([*values, *query.columns], schema=self.row_schema)
            self.train.add(rows.filter(pa.array(in_train)), shuffle[in_train])
            for number, spool in enumerate(self.held_out, 1):
                spool.add(rows.filter(pa.array(keep & (split == number))))
            self.progress("reading", self.place, None)
        self.reading.finish()

    def _state(self) -> State:
        """Return all that the rows so far have led to."""
        return {
            "counts": [self.place, self.repeated],
            "fitting": self.fitting.state(),
            "catalogue": self.catalogue.state(),
            "documents": self.documents.state(),
            "seen_pairs": self.seen_pairs.state(),
            "spools": [self.train.state(), *(spool.state() for spool in self.held_out)],
            "beir": self.beir.state() if self.beir else None,
        }

    def check(self) -> None:
        """Say what is to be said of the rows that were read. Raises DataError."""
        tables = self.tables
        self.writer.quarantine.check()
        if not self.train.num_rows:
            why = self.splitter.why_no_train if self.place else ""
            told = self.writer.quarantine.told()
            raise DataError(f"{self.tables.files[0]}: no row is left for the train split{why}{told}")
        if self.repeated:
            self.notes.append(f"{self.repeated} rows repeat a (query, document) pair and are left out")
        if apart := self.documents.num_in_several_splits:
            self.notes.append(f"{apart} documents have rows in several splits; --whole-documents keeps each in one")
        if self.documents.num_changed:
            self.notes.append(
                f"{self.documents.num_changed} rows give a known {tables.doc_id_column} other features; the first stay"
            )

    def texts(self) -> Iterator[list[str]]:
        """Yield the texts of train queries and of documents that train rows have, for the tokenizer."""
        first = self.catalogue.first_new
        for table in self.catalogue.new_documents():
            seen = pa.array(self.documents.fitted[first : first + table.num_rows])
            first += table.num_rows
            for name in texts_of(self.doc):
                yield table.column(name).filter(seen).to_pylist()
        for table in self.train.unordered():
            for name in texts_of(self.query):
                yield table.column(f"feature.{name}").to_pylist()

    def _query_ids(self, check: RowCheck, query: pa.Table) -> np.ndarray:
        name = self.tables.query_id_column
        if name is None:
            return hash_rows(query)
        ids = strings(check, name)
        check.fail(is_empty(ids), f"{name} is empty")
        return hash_strings(ids)

    def _doc_keys(self, check: RowCheck, contents: np.ndarray) -> pa.Array:
        name = self.tables.doc_id_column
        if name is None:
            return row_keys(contents)
        keys = strings(check, name)
        check.fail(is_empty(keys), f"no document: {name} is empty")
        return keys

    def _fit(self, query: pa.Table, doc: pa.Table, docs: np.ndarray, in_train: np.ndarray) -> None:
        """Count train queries, and each document at its first train row: the fit knows nothing of held-out rows."""
        self.fitting.query.update(query.filter(pa.array(in_train)))
        places = np.flatnonzero(in_train & ~self.documents.fitted[docs] & (docs >= self.catalogue.first_new))
        distinct, first = np.unique(docs[places], return_index=True)
        self.documents.fitted[distinct] = True
        self.fitting.doc.update(doc.take(pa.array(np.sort(places[first]))))


class _PerDocument:
    """A hash of each document's features as first met, and whether the fit has counted it."""

    def __init__(self) -> None:
        self.fitted = np.zeros(1024, bool)
        self._content = np.zeros(1024, np.int64)  # 0: of an earlier partition, not known
        self._splits = np.zeros(1024, np.uint8)  # bit s: a row is in split s
        self.num_changed = 0

    def grow(self, num_docs: int) -> None:
        while len(self.fitted) < num_docs:
            self.fitted = np.concatenate([self.fitted, np.zeros_like(self.fitted)])
            self._content = np.concatenate([self._content, np.zeros_like(self._content)])
            self._splits = np.concatenate([self._splits, np.zeros_like(self._splits)])

    def state(self) -> list[np.ndarray]:
        return [self.fitted, self._content, self._splits, np.array([self.num_changed])]

    def restore(self, state: list[np.ndarray]) -> None:
        self.fitted, self._content, self._splits, changed = state
        self.num_changed = int(changed[0])

    @property
    def num_in_several_splits(self) -> int:
        return int((np.bitwise_count(self._splits) > 1).sum())

    def note(self, docs: np.ndarray, first: np.ndarray, contents: np.ndarray, split: np.ndarray) -> None:
        np.bitwise_or.at(self._splits, docs, (1 << split).astype(np.uint8))
        self._content[docs[first]] = contents[first]
        known = self._content[docs]
        self.num_changed += int(((known != contents) & (known != 0)).sum())


def _encoded(
    table: pa.Table, features: dict[str, Feature], text: TextTokenizer | None, raw_text: bool
) -> dict[str, pa.Array]:
    columns = pa.table({name: table.column(f"feature.{name}") for name in features})
    done = {name: table.column(name).combine_chunks() for name in ("query_id", "doc", "relevance")}
    if raw_text:
        raw = {name: feature.encode_raw(columns.column(name).combine_chunks()) for name, feature in features.items()}
        return done | raw
    return done | encode_columns(columns, features, text, large=False)
