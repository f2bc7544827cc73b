"""A dataset folder: immutable partitions, one schema, one catalogue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from bigdssm.config import DataConfig
from bigdssm.dataset.blocks import BlockLayout, read_block
from bigdssm.dataset.cache import FileCache
from bigdssm.dataset.catalogue import Catalogue
from bigdssm.dataset.index import SplitIndex, read_index
from bigdssm.dataset.mapped import MappedTable
from bigdssm.dataset.partition import (
    MixtureBatches,
    MixturePart,
    Partition,
    read_dataset_json,
    read_json,
    read_partition,
    short_hash,
)
from bigdssm.dataset.remote import COUNTS_FILE, RemoteFolder
from bigdssm.dataset.rows import Rows
from bigdssm.dataset.schema import Schema
from bigdssm.dataset.sequences import Targets, versions_of
from bigdssm.dataset.versions import CatalogueFile, Versions, catalogue_files
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import History, TextTokenizer, item_codes, ragged
from bigdssm.features.base import OUT_OF_VOCABULARY
from bigdssm.features.ragged import Column, from_arrow, offsets_of
from bigdssm.utils.arguments import checked
from bigdssm.utils.log import get_logger
from bigdssm.utils.urls import is_url

log = get_logger(__name__)

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Head:
    """What holds for all partitions of a dataset."""

    dir: Path
    name: str
    schema: Schema
    text: str = "tokens"  # how texts stand in blocks; "raw": as they are
    users: str = "sequences"  # where users' features stand for training; "rows": in blocks, as of each row
    items: str = "partitions"  # what tells the version of an item that a row sees; "events": the time of each event

    @property
    def dated(self) -> bool:
        """Return whether versions of items have times, and sequences name those that events saw."""
        return self.items == "events"


class Dataset:
    """A dataset opened for reading, see `open`; or several joined, see joined.py."""

    def __init__(self, head: Head, partitions: list[Partition], files: Sequence[CatalogueFile]) -> None:
        """For `open` and `joining.join`; `files` are the catalogue's, those of versions last."""
        self.head, self.partitions, self.catalogue_files = head, partitions, tuple(files)
        self.dir, self.name, self.schema = head.dir, head.name, head.schema
        self.tokenizer_dir: Path | None = head.dir / "tokenizer" if head.schema.has_text else None
        self.pad_token_id, self.vocab_size, self.tokenizer_hash = _read_tokenizer(self.tokenizer_dir)
        paths = [file.path for file in self.catalogue_files]
        versions = Versions.read(self.catalogue_files, dated=head.dated)
        self.catalogue = Catalogue(paths, head.schema, self.pad_token_id, versions)
        got, expected = self.catalogue.file_rows, [file.rows for file in self.catalogue_files]
        if got != expected:
            raise DataError(f"{self.dir}/catalogue: the files have {got} rows, dataset.json says {expected}")
        sequences = [partition.sequence_files for partition in partitions]
        if any(sequences) and not all(sequences):
            raise DataError(f"{partitions[sequences.index([])].folder} has no sequences, other partitions have some")
        tables = tuple(MappedTable(paths) for paths in sequences if paths)
        for partition, table in zip(partitions, tables, strict=False):
            said = [part["rows"] for part in partition.content["sequences"]]
            if table.file_rows != said:
                raise DataError(
                    f"{partition.folder}: the files of sequences have {table.file_rows} rows, partition.json says "
                    f"{said}; copy the partition whole"
                )
        self.sequences = MappedTable([path for paths in sequences for path in paths]) if tables else None
        self._sequence_base = offsets_of(np.array([table.num_rows for table in tables], np.int64))
        self.layout = BlockLayout.of(
            head.schema, num_docs=tuple(partition.num_docs for partition in partitions),
            vocab_size=self.vocab_size, sequences=tables, raw_text=head.text == "raw", of_rows=head.users == "rows",
        )  # fmt: skip
        self._first_doc = np.array([partition.first_doc for partition in partitions])
        self._numbers = np.array([partition.number for partition in partitions])
        self._indexes: dict[str, SplitIndex] = {}
        self.sources: tuple[MixturePart, ...] = ()  # of a mixture; none: all partitions are one
        self.batches: MixtureBatches = "mixed"  # of a mixture
        self.siblings: tuple[Partition, ...] = ()  # all partitions that are there, where several datasets were joined
        self.pickled: tuple[Any, ...] | None = None
        self._whole: Dataset | None = None

    @classmethod
    @checked
    def open(
        cls, folder: str | Path, partitions: Sequence[str] | None = None, *, first: str | None = None,
        cache: FileCache | None = None,
    ) -> Dataset:  # fmt: skip
        """Return the dataset in `folder`, or only some of its partitions, or only those from `first` on.

        A URL (http://, s3://, …) is read through `cache` (none: the user's default one).

        Raises DataError: no dataset there, of another format, damaged metadata, or a file missing (shards aside: a
        missing shard is damage, which readers count and leave out).
        """
        remote = RemoteFolder(str(folder), cache or FileCache.of(), partitions, first) if is_url(folder) else None
        folder = remote.dir if remote else Path(folder)
        content = read_dataset_json(folder)
        schema = Schema.load(folder)
        if content["schema"] != schema.fingerprint():
            raise DataError(f"{folder}/schema.json is not the one that dataset.json was written with; copy both again")
        known = list(content["partitions"])
        names = known if partitions is None else list(partitions)
        if unknown := [name for name in [*names, *([first] if first else [])] if name not in known]:
            raise DataError(f"{folder} has no partition {unknown[0]!r}, only {known}")
        if first:
            names = known[known.index(first) :]
        if not names:
            raise DataError(f"{folder} has no partitions; bigdssm make_shards adds one")
        if not content["catalogue"]:
            raise DataError(f"{folder}/dataset.json names no catalogue; make the dataset again")
        files = catalogue_files(folder, content)
        num_docs = sum(file.rows for file in files if file.since is None)
        read = [
            replace(read_partition(folder, name), number=known.index(name), num_docs=num_docs, remote=remote)
            for name in names
        ]
        places = {name: content[name] for name in ("text", "users", "items") if name in content}
        head = Head(folder, content["name"], schema, **places)
        dataset = cls(head, read, files)
        if remote is not None:
            dataset.pickled = partial(cls.open, cache=remote.cache), (remote.url, names)
        return dataset

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the path: a loader process maps the files itself."""
        return self.pickled or (Dataset.open, (self.dir, [partition.name for partition in self.partitions]))

    def limited_to(self, schema: Schema) -> Dataset:
        """Return the dataset as an earlier `schema` of it encodes rows: values new since then are out of vocabulary."""
        if schema == self.whole.schema:
            return self.whole
        limited = copy(self)
        limited.schema, limited.catalogue = schema, self.whole.catalogue.limited_to(schema)
        limited._whole, limited.pickled = self.whole, (Dataset.limited_to, (self.whole, schema))
        return limited

    @property
    def whole(self) -> Dataset:
        """Return the dataset with its own schema: itself, unless it is limited to an earlier one."""
        return self._whole or self

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash of schema, tokenizer and the partitions' rows."""
        known = [self.head.schema.fingerprint(), self.tokenizer_hash, *(p.name + p.identity for p in self.partitions)]
        return short_hash("\n".join(known).encode())

    def partitions_on_disk(self) -> list[Partition]:
        """Return all partitions in the dataset's folder, opened or not. Raises DataError where one is damaged."""
        if self.siblings:
            return list(self.siblings)
        return [read_partition(self.dir, name) for name in read_dataset_json(self.dir)["partitions"]]

    def index(self, split: str) -> SplitIndex:
        """Return the split's blocks. Raises DataError: no such split, or a damaged index."""
        if split not in self._indexes:
            parts = []
            for number, partition in enumerate(self.partitions):
                expected = partition.content["splits"].get(split)
                if expected and expected["blocks"]:
                    parts.append(with_shards_of(partition, read_index(partition.folder, split, expected, number)))
            if not parts:
                known = sorted({name for partition in self.partitions for name in partition.content["splits"]})
                raise DataError(f"{self.dir} has no rows in split {split!r}; its splits are {known}")
            self._indexes[split] = SplitIndex.concat(parts)
        return self._indexes[split]

    def num_rows(self, split: str) -> int:
        """Return the rows of a split, 0 where the dataset has none."""
        return sum(partition.content["splits"].get(split, {"rows": 0})["rows"] for partition in self.partitions)

    def num_queries(self, split: str) -> int:
        """Return the queries that the rows of a split give, 0 where the dataset has none."""
        return sum(partition.content["splits"].get(split, {"queries": 0})["queries"] for partition in self.partitions)

    def doc_counts(self, partitions: range | None = None) -> np.ndarray:
        """Return the train positives of every document, int64 [num_docs], summed over the partitions (or some)."""
        total = np.zeros(self.catalogue.num_docs, np.int64)
        for partition in self.partitions if partitions is None else self.partitions[partitions.start : partitions.stop]:
            docs, counts = _positives(partition)
            total[partition.first_doc + docs] += counts
        return total

    def has_positives(self) -> bool:
        """Return whether any train row has a relevance above 0."""
        return any(len(_positives(partition)[0]) for partition in self.partitions)

    def check_against(self, config: DataConfig) -> None:
        """Raise ConfigError naming the first feature that `config` declares otherwise than the dataset has it."""
        difference = Schema.declared(config).difference(self.schema)
        if difference is not None:
            raise ConfigError(
                f"data.dir={self.dir} was made with another schema than this config's: {difference}; "
                f"make the dataset again with this config, or change the config"
            )

    def rows(self, split: str, step: int, row_ids: np.ndarray, batch: pa.RecordBatch) -> Rows:
        """Return block columns (`layout.types`) with row ids as Rows: targets and histories come from the sequences."""
        columns = {n: self._column(n, c) for n, c in zip(batch.schema.names, batch.columns, strict=True)}
        partition = np.zeros(len(row_ids), np.int64)
        if len(self.partitions) > 1:
            index = self.index(split)
            partition = index.partition[np.searchsorted(index.first_row, row_ids, "right") - 1]
        if self.sequences is not None:
            sequence, first, end = (np.asarray(columns[name], np.int64) for name in ("sequence", "first", "end"))
            sequence = sequence + self._sequence_base[partition]
            of_rows = {name: columns[name] for name in self.layout.query}
            return self._pieces(split, step, row_ids, self.sequences, sequence, first, end, of_rows)
        query = {name: columns[name] for name in self.schema.query}
        doc_rows = np.asarray(columns["doc"]) + self._first_doc[partition]
        return Rows(
            step=step, row_ids=row_ids, query=query, doc_rows=doc_rows, relevance=np.asarray(columns["relevance"]),
            query_ids=np.asarray(columns["query_id"]),
            doc_versions=self.catalogue.seen(doc_rows, self._numbers[partition]),
        )  # fmt: skip

    def _pieces(
        self, split: str, step: int, row_ids: np.ndarray, table: MappedTable,
        sequence: np.ndarray, first: np.ndarray, end: np.ndarray, of_rows: dict[str, Column],
    ) -> Rows:  # fmt: skip
        """Return rows that are pieces of sequences: a query for each target that can be used.

        `of_rows` are features that stand in the blocks.
        """
        targets = Targets.of(table, sequence, first, end, dated=self.head.dated)
        targets = targets.take(targets.good(self.catalogue.num_docs))
        query: dict[str, Column] = {}
        left_edge = np.zeros_like(end)
        for name, feature in self.schema.query.items():
            if isinstance(feature, History):
                # what the last query has seen; the others, of one left edge with it, have seen less of it
                query[name], left_edge = self._history(feature, table, sequence, end - 1)
            else:
                query[name] = of_rows[name] if name in of_rows else self.query_column(table, name, sequence)
        single = self.num_queries(split) == self.num_rows(split)
        return Rows(
            step=step, row_ids=row_ids, query=query, doc_rows=targets.item, relevance=targets.relevance,
            query_ids=np.asarray(table.take("query_id", sequence[targets.row])), row=None if single else targets.row,
            place=targets.place, left_edge=left_edge, sequence=sequence, sequences=table,
            doc_versions=self.catalogue.seen(targets.item, self._numbers_of(sequence[targets.row]), targets.version),
        )  # fmt: skip

    def one_query_each(self, rows: Rows) -> Rows:
        """Return rows of one query each; its history is what it has seen, the newest."""
        if rows.row is None or rows.place is None or rows.sequence is None or self.sequences is None:
            return rows
        sequence = rows.sequence[rows.row]
        query: dict[str, Column] = {}
        for name, feature in self.schema.query.items():
            if isinstance(feature, History):
                query[name] = self._history(feature, self.sequences, sequence, rows.place)[0]
            else:
                query[name] = ragged.take(rows.query[name], rows.row)
        every = np.arange(rows.num_queries)  # not None: the draws of a query among several are its own
        return replace(rows, row_ids=rows.row_ids[rows.row], query=query, sequence=sequence, row=every, left_edge=None)

    def _history(
        self, feature: History, table: MappedTable, sequence: np.ndarray, seen: np.ndarray
    ) -> tuple[Column, np.ndarray]:
        """Return the codes of the newest of the items that were seen, and the place of the oldest of them."""
        left_edge = np.maximum(0, seen - feature.max_items)
        items = table.take_slices("items", sequence, left_edge, seen)
        partition = np.repeat(self._numbers_of(sequence), items.lengths)
        version = versions_of(table, sequence, left_edge, seen) if self.head.dated else None
        return type(items)(self._codes(str(feature.of), items.values, partition, version), items.offsets), left_edge

    def _numbers_of(self, sequence: np.ndarray) -> np.ndarray:
        """Return the number, among all of its dataset, of the partition that each sequence stands in, int64."""
        return self._numbers[np.searchsorted(self._sequence_base, sequence, "right") - 1]

    def _codes(self, feature: str, docs: np.ndarray, partition: np.ndarray, version: np.ndarray | None) -> np.ndarray:
        """Return the codes of documents in histories, as `Catalogue.seen` has them.

        Of one that is none, which is bad as a target, it is unknown.
        """
        known = (docs >= 0) & (docs < self.catalogue.num_docs)
        docs = docs if known.all() else np.where(known, docs, 0)
        seen = self.catalogue.seen(docs, partition, version)
        codes = item_codes(self.catalogue.codes(feature, docs if seen is None else seen))
        return codes if known.all() else np.where(known, codes, OUT_OF_VOCABULARY)

    def _column(self, name: str, array: pa.Array) -> Column:
        """Return a block's column, texts tokenised."""
        if pa.types.is_large_string(array.type):
            array = self.layout.query[name].encode(array, self.tokenizer)
        column = from_arrow(array)
        return self.limited_query({name: column})[name] if name in self.schema.query else column

    def query_column(self, table: MappedTable, name: str, rows: np.ndarray) -> Column:
        """Return a query feature of the sequences `rows` of `table`."""
        return self.limited_query({name: table.take(name, rows)})[name]

    def limited_query(self, columns: dict[str, Column]) -> dict[str, Column]:
        """Return query columns of the whole dataset as this one encodes them, see `limited_to`."""
        if self._whole is None:
            return columns
        coded = {
            name: self.schema.doc[str(feature.of)] if isinstance(feature, History) else feature
            for name, feature in self.schema.query.items()
        }
        return {name: coded[name].without_unknown(column) for name, column in columns.items()}

    @cached_property
    def tokenizer(self) -> TextTokenizer | None:
        """Return the tokenizer, None without text features."""
        return None if self.tokenizer_dir is None else TextTokenizer(self.tokenizer_dir)

    def rows_at_once(self, split: str, num_queries: int) -> int:
        """Return how many rows give about so many queries, at least 1."""
        return max(1, num_queries * self.num_rows(split) // max(1, self.num_queries(split)))

    def iterate(self, split: str, rows_per_batch: int, rank: int = 0, world_size: int = 1) -> Iterator[Rows]:
        """Yield the rank's contiguous share of a split in dataset order, `rows_at_once` row ids at a time.

        Each query is a row of its own, with the history that it would have when it is served. What cannot be used is
        left out, and named in a warning.
        """
        first, last = (self.num_rows(split) * k // world_size for k in (rank, rank + 1))
        yield from self.between(split, first, last, self.rows_at_once(split, rows_per_batch))

    def between(self, split: str, first: int, last: int, rows_per_batch: int) -> Iterator[Rows]:
        """Yield the rows [first, last) of a split, so many row ids at a time; else as `iterate` does."""
        index = self.index(split)
        pending: list[tuple[np.ndarray, pa.RecordBatch]] = []
        block = int(np.searchsorted(index.first_row, first, "right")) - 1
        for step, begin in enumerate(range(first, last, rows_per_batch)):
            end = min(begin + rows_per_batch, last)
            while block < index.num_blocks and index.first_row[block] < end:
                pending.append(self._good_rows(index, block))
                block += 1
            ids = np.concatenate([part[0] for part in pending])
            table = pa.concat_batches([part[1] for part in pending])
            inside, later = (ids >= begin) & (ids < end), ids >= end
            yield self.one_query_each(self.rows(split, step, ids[inside], table.filter(pa.array(inside))))
            pending = [(ids[later], table.filter(pa.array(later)))]

    def _good_rows(self, index: SplitIndex, block: int) -> tuple[np.ndarray, pa.RecordBatch]:
        batch, bad = read_block(index, block, self.layout)
        for fault in bad:
            where = "" if fault.row is None else f", row {fault.row}"
            where += "" if fault.place is None else f", place {fault.place}"
            log.warning("left out: %s%s: %s", index.name(block), where, fault.reason)
        if batch is None:
            return np.empty(0, np.int64), empty_batch(self.layout)
        row_ids = np.arange(index.first_row[block], index.first_row[block + 1])
        good = np.setdiff1d(np.arange(batch.num_rows), [fault.row for fault in bad if fault.rows])
        return (row_ids[good], batch.take(pa.array(good))) if bad else (row_ids, batch)


def with_shards_of(partition: Partition, index: SplitIndex) -> SplitIndex:
    """Return an index of the partition with its shards at their URL, where it is at one."""
    if partition.remote is None:
        return index
    at, file = f"partitions/{partition.folder.name}", partition.remote.file
    return replace(index, shards=tuple(file(f"{at}/{path.name}") for path in index.shards))


def _positives(partition: Partition) -> tuple[np.ndarray, np.ndarray]:
    """Return the documents that a partition's train rows are relevant to, and how many are, int64; not read yet."""
    path = partition.folder / COUNTS_FILE
    table = MappedTable([path])
    docs, counts = table.whole("doc"), table.whole("count")
    if len(docs) and (docs.min() < 0 or docs.max() >= partition.num_docs or counts.min() < 1):
        raise DataError(
            f"{path} counts documents that the catalogue's {partition.num_docs} are not; make the partition again"
        )
    return docs, counts


def empty_batch(layout: BlockLayout) -> pa.RecordBatch:
    """Return a batch of no rows."""
    schema = pa.schema(list(layout.types.items()))
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


def tokenizer_hash(folder: Path) -> str:
    """Return a hash of the tokenizer in `folder`. Raises OSError."""
    return short_hash((folder / TOKENIZER_FILE).read_bytes())


def _read_tokenizer(folder: Path | None) -> tuple[int, int, str]:
    """Return pad token id, vocabulary size and a hash of the tokenizer."""
    if folder is None:
        return 0, 0, ""
    path = folder / TOKENIZER_FILE
    try:
        content = path.read_bytes()
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise DataError(f"{path} is no readable tokenizer ({error}); a dataset with text features needs one") from None
    declared = read_json(folder / "tokenizer_config.json", "copy the dataset whole").get("pad_token")
    name = declared.get("content") if isinstance(declared, dict) else declared
    pad = tokenizer.token_to_id(name) if name else None
    if pad is None:
        raise DataError(f"{folder}: the tokenizer has no padding token ({name!r}); add one and make the dataset again")
    return pad, tokenizer.get_vocab_size(), short_hash(content)
