"""A dataset folder: immutable partitions, one schema, one catalogue; or a mixture of several datasets.

A mixture joins its sources: it concatenates their partitions, so row ids are unique, and stable while the mixture stays
the same. Sources share one schema and one tokenizer. They share one catalogue, or their catalogues are concatenated
(pairs only: a sequence's items are rows of one catalogue); a document in two catalogues is then two documents with one
id.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from bigdssm.config import DataConfig, SourceConfig
from bigdssm.dataset.blocks import FORGOTTEN, SEGMENT_COLUMNS, BlockLayout, good_rows, read_block, read_blocks
from bigdssm.dataset.catalogue import (
    Catalogue,
    CatalogueFile,
    MappedTable,
    Versions,
    catalogue_files,
    withdrawn_documents,
)
from bigdssm.dataset.partition import (
    CUT_OFFS,
    PARTITION_CUT_OFFS,
    Extent,
    MixturePart,
    Partition,
    SplitIndex,
    dataset_fingerprint,
    read_dataset_json,
    read_index,
    read_partition,
    short_hash,
    steps_per_round,
)
from bigdssm.dataset.remote import COUNTS_FILE, FileCache, RemoteFolder
from bigdssm.dataset.rows import (
    EVENT_PREFIX,
    TIME_COLUMN,
    VERSION_COLUMN,
    EventRules,
    EventSlices,
    Rows,
    TargetEvents,
    Targets,
)
from bigdssm.dataset.schema import Schema
from bigdssm.dataset.stamps import read_stamps
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import EventTime, Feature, History, TextTokenizer, item_codes, ragged
from bigdssm.features.base import ITEM_ROW, OUT_OF_VOCABULARY, PADDING
from bigdssm.features.categorical import categorical_of
from bigdssm.features.conditions import matching_events
from bigdssm.features.ragged import Column, Ragged, from_arrow, offsets_of
from bigdssm.features.times import TimeRule
from bigdssm.utils.arguments import checked
from bigdssm.utils.log import get_logger
from bigdssm.utils.urls import is_url

log = get_logger(__name__)

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class DatasetHeader:
    """Properties shared by all partitions of a dataset."""

    dir: Path
    name: str
    schema: Schema
    text: str = "tokens"  # encoding of texts in blocks; "raw": untokenized
    users: str = "sequences"  # where training reads user features; "rows": from blocks, as of each row
    items: str = "partitions"  # item versions are selected by partition; "events": by the time of each event
    times: Mapping[str, Any] = field(default_factory=dict)  # their unit, and the oldest and the newest time
    split: Mapping[str, Any] = field(default_factory=dict)  # how the splits were made, and the cut-off times

    @property
    def time_unit(self) -> float:
        """The unit of the times of events, in seconds."""
        return 1 / self.time_rule.per_second

    @property
    def time_rule(self) -> TimeRule:
        """The rule by which numbers are times of events."""
        return TimeRule.of_dataset(self.times)

    @property
    def cut_offs(self) -> tuple[float, ...]:
        """The times at which the splits of the first partition start, ascending; none unless they are by time."""
        times = [self.split.get(name) for name in CUT_OFFS]
        return tuple(sorted(time for time in times if time is not None))

    @property
    def dated(self) -> bool:
        """Whether item versions have times, and sequences store the version of each event."""
        return self.items == "events"


class Dataset:
    """A dataset opened for reading (`open`), or several datasets joined (`join`)."""

    def __init__(
        self, header: DatasetHeader, partitions: list[Partition], files: Sequence[CatalogueFile],
        withdrawals: Sequence[CatalogueFile] = (), item_partitions: Sequence[Partition] = (),
        extents: Sequence[Extent] = (),
    ) -> None:  # fmt: skip
        """Called by `open` and `join`.

        `files` are the files of the catalogue; those with newer versions come last. `item_partitions` have no rows.
        """
        self.header, self.partitions, self.catalogue_files = header, partitions, tuple(files)
        self.withdrawals, self.item_partitions = tuple(withdrawals), tuple(item_partitions)
        self.extents = tuple(extents)  # of its sources
        # folders of the partitions whose events decide when an item is available: with `open`, also those not opened
        self.event_folders = tuple(partition.folder for partition in partitions)
        self.dir, self.name, self.schema = header.dir, header.name, header.schema.inputs
        self.tokenizer_dir: Path | None = header.dir / "tokenizer" if header.schema.has_text else None
        self.vocab_size, self.tokenizer_hash = 0, ""
        if self.tokenizer_dir is not None:
            path = self.tokenizer_dir / TOKENIZER_FILE
            try:
                content = path.read_bytes()
                self.vocab_size = Tokenizer.from_buffer(content).get_vocab_size()
            except Exception as error:  # the tokenizers library raises bare Exceptions
                raise DataError(
                    f"{path} is not a readable tokenizer ({error}); a dataset with text features needs one"
                ) from None
            self.tokenizer_hash = short_hash(content)
        paths = [file.path for file in self.catalogue_files]
        versions = Versions.read(self.catalogue_files, dated=header.dated)
        withdrawn = withdrawn_documents(self.withdrawals, sum(file.rows for file in files if file.since is None))
        self.catalogue = Catalogue(paths, header.schema, versions, withdrawn)
        got, expected = self.catalogue.rows_per_file, [file.rows for file in self.catalogue_files]
        if got != expected:
            raise DataError(f"{self.dir}/catalogue: the files have {got} rows, dataset.json has {expected}")
        sequences = [partition.sequence_files for partition in partitions]
        if any(sequences) and not all(sequences):
            raise DataError(f"{partitions[sequences.index([])].folder} has no sequences, other partitions have some")
        tables = tuple(MappedTable(paths) for paths in sequences if paths)
        for partition, table in zip(partitions, tables, strict=False):
            expected_rows = [part["rows"] for part in partition.content["sequences"]]
            if table.rows_per_file != expected_rows:
                raise DataError(
                    f"{partition.folder}: the files of sequences have {table.rows_per_file} rows, partition.json has "
                    f"{expected_rows}; copy the partition whole"
                )
        self.sequences = MappedTable([path for paths in sequences for path in paths]) if tables else None
        self._sequence_base = offsets_of(np.array([table.num_rows for table in tables], np.int64))
        self.layout = BlockLayout.of(
            header.schema, num_docs=tuple(partition.num_docs for partition in partitions),
            vocab_size=self.vocab_size, sequences=tables, raw_text=header.text == "raw",
            row_features=header.users == "rows",
        )  # fmt: skip
        self._first_doc = np.array([partition.first_doc for partition in partitions])
        self._numbers = np.array([partition.number for partition in partitions])
        self._indexes: dict[str, SplitIndex | None] = {}
        self._counts: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # train positives by partition, with `rules`
        self.rules = EventRules()
        self.sources: tuple[MixturePart, ...] = ()  # of a mixture; empty: a single source
        self.siblings: tuple[Partition, ...] = ()  # for joined datasets: all their partitions on disk
        self.pickled: tuple[Any, ...] | None = None
        self._whole: Dataset | None = None

    @classmethod
    @checked
    def open(
        cls, folder: str | Path, partitions: Sequence[str] | None = None, *, first: str | None = None,
        cache: FileCache | None = None, extent: Extent | None = None,
    ) -> Dataset:  # fmt: skip
        """Open a dataset: all partitions, the given ones, or those from partition `first` on.

        A URL (http://, s3://, …) is read through `cache` (None: the user's default cache). `extent`: without later
        appends.

        Raises DataError: not a dataset, another format, damaged metadata, or a missing file (a missing shard does not
        raise: readers skip and count its rows).
        """
        remote = (
            RemoteFolder(str(folder), cache or FileCache.from_config(), partitions, first) if is_url(folder) else None
        )
        folder = remote.dir if remote else Path(folder)
        content = read_dataset_json(folder)
        schema = Schema.load(folder)
        if content["schema"] != schema.fingerprint():
            raise DataError(f"{folder}/schema.json does not match dataset.json; copy both again")
        if extent is not None:
            content = extent.of(content)
            if schema.vocabulary_sizes() != extent.vocabularies:
                schema = schema.cut(extent.vocabularies)
        extent = Extent(len(content["partitions"]), len(content["catalogue"]), schema.vocabulary_sizes())
        partition_names, item_partition_names = list(content["partitions"]), content.get("item_partitions", [])
        names = partition_names if partitions is None else list(partitions)
        if unknown := [name for name in [*names, *([first] if first else [])] if name not in partition_names]:
            raise DataError(f"{folder} has no partition {unknown[0]!r}, only {partition_names}")
        if first:
            names = partition_names[partition_names.index(first) :]
        if (first or partitions) and not set(names) - set(item_partition_names):
            raise DataError(f"{folder}: partition {names[0]!r} has items alone, no rows")
        names = [name for name in names if name not in item_partition_names]
        if not names:
            raise DataError(f"{folder} has no partitions; bigdssm make_shards adds one")
        if not content["catalogue"]:
            raise DataError(f"{folder}/dataset.json names no catalogue; rebuild the dataset")
        files = catalogue_files(folder, content)
        num_docs = sum(file.rows for file in files if file.since is None)
        row_partitions, item_partitions = (
            [replace(read_partition(folder, name), number=partition_names.index(name), num_docs=num_docs, remote=remote)
             for name in group]
            for group in (names, [name for name in partition_names if name in item_partition_names])
        )  # fmt: skip
        options = {name: content[name] for name in ("text", "users", "items", "times", "split") if name in content}
        header = DatasetHeader(folder, content["name"], schema, **options)
        row_partitions = [
            replace(partition, cut_offs=tuple(partition.content.get(PARTITION_CUT_OFFS, header.cut_offs)))
            for partition in row_partitions
        ]
        dataset = cls(
            header,
            row_partitions,
            files,
            catalogue_files(folder, content, ["withdrawals"]),
            item_partitions,
            [extent],
        )
        if remote is None or header.dated:  # a remote dataset without times of items has the files of `names` alone
            with_events = [name for name in partition_names if name not in item_partition_names]
            dataset.event_folders = tuple(folder / "partitions" / name for name in with_events)
        cache = None if remote is None else remote.cache
        dataset.pickled = partial(cls.open, cache=cache, extent=extent), (remote.url if remote else folder, names)
        return dataset

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by path and extent: each loader process maps the files itself."""
        assert self.pickled is not None
        return _restored, (*self.pickled, self.rules)

    def with_rules(self, rules: EventRules) -> Dataset:
        """Return a view with other rules on events: its rows have targets only.

        Raises ConfigError: a condition or visit that the events do not have.
        """
        if rules == self.rules:
            return self
        if self._whole is not None:
            return self._whole.with_rules(rules).with_schema(self.schema)
        keys = [f"data.targets.{split}" for split in rules.targets] + ["data.visit"] * rules.visit.is_set
        table = self.sequences
        if keys and (table is None or (rules.visit.is_set and rules.visit_column() not in table.schema.names)):
            needed = "events; use make_shards interactions" if table is None else rules.visit_column()
            raise ConfigError(f"{keys[-1]}: {self.dir} has no {needed}")
        conditions = {f"data.targets.{split}": text for split, text in rules.targets.items()}
        if isinstance(rules.exclude_seen, str):
            conditions["data.exclude_seen"] = rules.exclude_seen
        for key, text in conditions.items():
            matching_events(text, key, self.schema.event, lambda name: np.zeros(0, np.int32))
        if rules.visit.funnel:
            rules.steps(self.schema, np.zeros(0, np.int32))
        return self._view(rules=rules, _indexes={}, _counts={})

    def with_schema(self, schema: Schema) -> Dataset:
        """Return a view encoded by an earlier schema; unknown values are out of vocabulary."""
        if schema == self.whole.schema and not schema.trained:
            return self.whole
        return self._view(
            schema=schema, catalogue=self.whole.catalogue.with_schema(schema), _whole=self.whole,
            pickled=(Dataset.with_schema, (self.whole, schema)),
        )  # fmt: skip

    def _view(self, **changes: Any) -> Dataset:
        """Return a copy with other attributes; copy() would open the folder again, by __reduce__."""
        view = object.__new__(Dataset)
        # Cached properties are copied, too: none of them depends on rules or the schema.
        vars(view).update(vars(self), **changes)
        return view

    def with_trained_ids(self, earlier: Schema | None = None) -> Dataset:
        """Return a view in which ids without a positive train event, here or in `earlier`, are out of vocabulary."""
        rows, doc = np.flatnonzero(self.doc_counts()), dict(self.whole.schema.doc)
        for name, feature in categorical_of(doc).items():
            column = self.whole.catalogue.column(name, rows)
            codes = np.unique(column.values if isinstance(column, Ragged) else column)
            doc[name] = feature.with_trained(codes, None if earlier is None else categorical_of(earlier.doc)[name])
        return self.with_schema(replace(self.whole.schema, doc=doc))

    def newest_part(self, split: str) -> Dataset:
        """Return the newest partition with rows of `split`, opened or not; this dataset without any.

        The partitions of several folders have no order: then this dataset.
        """
        if len({partition.folder.parent for partition in self.partitions}) > 1:
            return self
        rows = self.sizes(split)[:, 0].tolist()
        filled = [part for part, number in zip(self.partitions, rows, strict=True) if number]
        if filled:
            newest = max(filled, key=lambda part: part.number)
            shared = self.catalogue_files, self.withdrawals, self.item_partitions, self.extents
            part = Dataset(self.header, [newest], *shared)
            part.event_folders = self.event_folders
            return part.with_rules(self.rules).with_schema(self.schema)
        names = [p.folder.name for p in self.partitions_on_disk() if p.content["splits"].get(split)]
        for name in [] if self.sources else reversed(names):
            assert self.whole.pickled is not None
            reopen, (where, *_) = self.whole.pickled
            part = reopen(where, [name]).with_rules(self.rules)
            if part.num_rows(split):
                return part.with_schema(self.schema)
        return self

    @property
    def whole(self) -> Dataset:
        """The dataset with its full schema, see `with_schema`."""
        return self._whole or self

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the schema, the tokenizer, and the partitions' rows and documents."""
        parts = [*self.partitions, *self.item_partitions]
        return dataset_fingerprint(self.header.schema.fingerprint(), self.tokenizer_hash, parts)

    @cached_property
    def stamp(self) -> int:
        """The stamp of this state of the folder; of one without, such as a mixture, the number of partitions."""
        without = sum(extent.partitions for extent in self.extents)
        return read_stamps(self.dir).get(self.fingerprint, without)

    @property
    def rows_fingerprint(self) -> str:
        """A hash of the dataset and the rules on events, which number its rows; without rules the `fingerprint`."""
        if not self.rules.row_keys:
            return self.fingerprint
        # The rules cannot be evaluated on emptied sequences, so their rows are numbered differently than before.
        table, emptied = self.sequences, 0
        if table is not None and table.num_rows:
            emptied = int((table.lengths("items", np.arange(table.num_rows)) == 0).sum())
        content = [self.fingerprint, self.rules.row_keys, *([emptied] if emptied else [])]
        return short_hash(json.dumps(content, sort_keys=True).encode())

    def partitions_on_disk(self) -> list[Partition]:
        """Read the metadata of all partitions in the folder, opened or not.

        Raises DataError: one is damaged.
        """
        if self.siblings:
            return list(self.siblings)
        return [read_partition(self.dir, name) for name in read_dataset_json(self.dir)["partitions"]]

    def index(self, split: str) -> SplitIndex:
        """Return the block index of a split. Raises DataError: no such split, or a damaged index."""
        if (index := self._index(split)) is None:
            split_names = sorted({name for partition in self.partitions for name in partition.content["splits"]})
            raise DataError(f"{self.dir} has no rows in split {split!r}; its splits are {split_names}")
        if not index.num_blocks:
            rules = ", ".join(f"{key}={value}" for key, value in self.rules.row_keys.items())
            raise DataError(f"{self.dir}: no event of split {split!r} is a target with {rules}; change the rule")
        return index

    def _index(self, split: str) -> SplitIndex | None:
        if split not in self._indexes:
            parts = []
            for number, partition in enumerate(self.partitions):
                expected = partition.content["splits"].get(split)
                if expected and expected["blocks"]:
                    parts.append(read_index(partition, split, number))
            index = SplitIndex.concat(parts) if parts else None
            if index is not None and self.rules.selects(split):
                index = self._with_targets(split, index)
            self._indexes[split] = index
        return self._indexes[split]

    def _with_targets(self, split: str, index: SplitIndex) -> SplitIndex:
        """Return the blocks and rows that have targets by the rules on events; reads all blocks.

        Rows that cannot be read are retained: they are counted when they are read.
        """
        assert self.sequences is not None
        schema, unit = self.whole.schema, self.header.time_unit
        targets = TargetEvents.concat(
            [
                self.rules.target_events(table, schema, unit, split, partition.cut_offs)
                for partition, table in zip(self.partitions, self.layout.sequences, strict=True)
            ]
        )
        stored_row, queries = [], index.queries.copy()
        positives: list[list[np.ndarray]] = [[np.zeros(0, np.int64)] for _ in self.partitions]
        for block, (batch, bad) in enumerate(read_blocks(index, range(index.num_blocks), self.layout)):
            stored_row.append(np.arange(index.rows[block]))
            if batch is None:
                continue
            partition, good = int(index.partition[block]), good_rows(batch, bad)
            sequence, first, end = (np.asarray(batch.column(name), np.int64)[good] for name in SEGMENT_COLUMNS)
            sequence = sequence + self._sequence_base[partition]
            result = Targets.of(self.sequences, sequence, first, end, targets)
            result = result.take(result.valid(self.layout.num_docs[partition]))
            number = np.ones(batch.num_rows, np.int64)
            number[good] = np.bincount(result.row, minlength=len(good))
            stored_row[block], queries[block] = np.flatnonzero(number), number.sum()
            positives[partition].append(result.item[result.relevance > 0])
        if split == "train":
            for number_of_partition, items in enumerate(positives):
                self._counts[number_of_partition] = np.unique(np.concatenate(items), return_counts=True)
        rows = np.array([len(part) for part in stored_row], np.int32)
        log.info("%s: %d of %d events of split %s are targets", self.dir, queries.sum(), index.queries.sum(), split)
        keep = rows > 0
        arrays = {
            name: getattr(index, name)[keep] for name in ("shard", "partition", "block", "offset", "size", "checksum")
        }
        return replace(
            index, **arrays, rows=rows[keep], queries=queries[keep], targets=targets,
            first_sequence=self._sequence_base, stored_row=np.concatenate(stored_row),
        )  # fmt: skip

    def sizes(self, split: str) -> np.ndarray:
        """Return the rows and queries of a split in each partition, int64 [partitions, 2]."""
        if not self.rules.selects(split):
            none = {"rows": 0, "queries": 0}
            parts = [partition.content["splits"].get(split, none) for partition in self.partitions]
            return np.array([(part["rows"], part["queries"]) for part in parts], np.int64).reshape(-1, 2)
        sizes = np.zeros((len(self.partitions), 2), np.int64)
        if (index := self._index(split)) is not None:
            np.add.at(sizes, index.partition, np.stack([index.rows, index.queries], 1))
        return sizes

    def num_rows(self, split: str) -> int:
        """Return the number of rows in a split, 0 without such a split."""
        return int(self.sizes(split)[:, 0].sum())

    def num_queries(self, split: str) -> int:
        """Return the number of queries in a split, 0 without such a split."""
        return int(self.sizes(split)[:, 1].sum())

    def has_segments(self, split: str) -> bool:
        """Return whether rows of a split can have several targets."""
        parts = [p.content["splits"][split] for p in self.partitions if split in p.content["splits"]]
        return any(part["queries"] > part["rows"] for part in parts)

    def doc_counts(self, partitions: range | None = None) -> np.ndarray:
        """Return the train positives per document of all or some partitions, int64 [num_docs]."""
        total = np.zeros(self.catalogue.num_docs, np.int64)
        for number in range(len(self.partitions)) if partitions is None else partitions:
            docs, counts = self._positives(number)
            total[self.partitions[number].first_doc + docs] += counts
        return total

    def _positives(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a partition's documents with train positives and their counts, int64.

        Raises DataError: the file of counts is damaged.
        """
        if self.rules.selects("train"):
            self._index("train")
            return self._counts.get(number, (np.zeros(0, np.int64),) * 2)
        partition = self.partitions[number]
        table = MappedTable([partition.folder / COUNTS_FILE])
        docs, counts = table.column("doc"), table.column("count")
        if len(docs) and (docs.min() < 0 or docs.max() >= partition.num_docs or counts.min() < 1):
            raise DataError(
                f"{table.paths[0]} counts documents outside the catalogue's {partition.num_docs}; rebuild the partition"
            )
        return docs, counts

    def check_against(self, config: DataConfig) -> None:
        """Raise ConfigError with the first feature that `config` declares differently."""
        difference = Schema.declared(config).inputs.difference(self.schema)
        if difference is not None:
            raise ConfigError(
                f"data.dir={self.dir} was built with another schema than this config's: {difference}; "
                f"rebuild the dataset with this config, or change the config"
            )

    def rows(self, split: str, step: int, row_ids: np.ndarray, batch: pa.RecordBatch) -> Rows:
        """Convert block columns (`layout.types`) to Rows.

        Targets and histories are read from the sequences.
        """
        columns: dict[str, Column] = {}
        for name, array in zip(batch.schema.names, batch.columns, strict=True):
            is_raw = pa.types.is_large_string(array.type)  # a text that is not tokenized
            columns[name] = from_arrow(self.layout.query[name].encode(array, self.tokenizer) if is_raw else array)
        partition = np.zeros(len(row_ids), np.int64)
        if len(self.partitions) > 1:
            index = self.index(split)
            partition = index.partition[np.searchsorted(index.first_row, row_ids, "right") - 1]
        if self.sequences is None:
            doc_rows = np.asarray(columns["doc"]) + self._first_doc[partition]
            query = self.limited_query({name: columns[name] for name in self.schema.query})
            return Rows(
                step=step, row_ids=row_ids, query=query,
                doc_rows=doc_rows, relevance=np.asarray(columns["relevance"]),
                query_ids=np.asarray(columns["query_id"]),
            )  # fmt: skip
        # A row is a segment of a sequence, with one query per valid target.
        table = self.sequences
        sequence, first, end = (np.asarray(columns[name], np.int64) for name in SEGMENT_COLUMNS)
        sequence = sequence + self._sequence_base[partition]
        target_events = self.index(split).targets if self.rules.selects(split) else None
        targets = Targets.of(table, sequence, first, end, target_events)
        valid = targets.valid(self.catalogue.num_docs)
        targets, single = targets.take(valid), not self.has_segments(split)
        if target_events is not None:  # histories end at the last target
            last = np.zeros_like(end)
            np.maximum.at(last, targets.row, targets.position + 1)
            end = np.where(last > 0, last, end)
        num_earlier: np.ndarray | None = None
        request: dict[str, Column] = {}
        if self.schema.request:
            num_earlier, request = self._requests(table, sequence, end, targets)
        history_end = end - 1 if num_earlier is None or not single else num_earlier
        query = {}
        history_start = np.zeros_like(end)
        for name, feature in self.schema.query.items():
            if isinstance(feature, History):
                # the history of the last query; earlier queries of the row read a prefix of it
                history, history_start = self._history(feature, table, sequence, history_end)
                query |= history
            else:
                stored = columns[name] if name in self.layout.query else table.take(name, sequence)
                query |= self.limited_query({name: stored})
        return Rows(
            step=step, row_ids=row_ids, query=query, doc_rows=targets.item, relevance=targets.relevance,
            query_ids=np.asarray(table.take("query_id", sequence[targets.row])), row=None if single else targets.row,
            position=targets.position, outcome=targets.outcome, num_earlier=num_earlier,
            history_start=history_start, sequence=sequence, request=request, num_invalid=int((~valid).sum()),
            sequences=table,
        )  # fmt: skip

    def _requests(
        self, table: MappedTable, sequence: np.ndarray, end: np.ndarray, targets: Targets
    ) -> tuple[np.ndarray, dict[str, Column]]:
        """Return the number of events before the time of each target, and the features of its request, int64 [m].

        Other events at the time of a target are not known to its query: neither their items nor their number. With
        ties=order, those before it are. The action of a funnel is that of the target's outcome.
        """
        events = EventSlices(table, sequence, np.zeros_like(end), end)
        times = events.column(TIME_COLUMN)
        begin = times.offsets[:-1][targets.row]
        num_earlier = events.num_earlier(self.schema.ties)[begin + targets.position]
        first = begin + num_earlier  # the first event of the target's time
        previous = np.where(num_earlier > 0, times.values[first - 1], np.nan)
        columns: dict[str, Column] = {}
        for name in self.schema.request:
            feature, position = self.schema.event[name], targets.position
            if targets.outcome is not None and name == self.rules.visit.action:
                position = targets.outcome
            if isinstance(feature, EventTime):
                columns[name] = feature.codes(times.values[first], previous, self.header.time_unit)
            else:
                values = table.take_slices(EVENT_PREFIX + name, sequence[targets.row], position, position + 1).values
                columns[name] = feature.without_unknown(values)
        return num_earlier, columns

    @property
    def has_times(self) -> bool:
        """Whether events have times."""
        return self.sequences is not None and TIME_COLUMN in self.sequences.schema.names

    def request_times(self, rows: Rows) -> np.ndarray:
        """Return the times of the targets of queries, float64 [m], in the unit of events; NaN without times."""
        if not self.has_times or rows.sequences is None or rows.sequence is None or rows.position is None:
            return np.full(rows.num_queries, np.nan)
        sequence, position = rows.sequence[rows.row_of_query], rows.position
        return rows.sequences.take_slices(TIME_COLUMN, sequence, position, position + 1).values

    def newest_target(self, split: str) -> float | None:
        """Return the newest time of a target of `split`, in seconds; None if targets have no times. Reads all blocks.

        A row's targets are in order of time: the last one is the newest.
        """
        index = self._index(split)
        if index is None or self.sequences is None or not self.has_times:
            return None
        newest = -np.inf
        for block, (batch, bad) in enumerate(read_blocks(index, range(index.num_blocks), self.layout)):
            if batch is None:
                continue
            good = good_rows(batch, bad)
            sequence, end = (np.asarray(batch.column(name), np.int64)[good] for name in ("sequence", "end"))
            sequence = sequence + self._sequence_base[int(index.partition[block])]
            times = self.sequences.take_slices(TIME_COLUMN, sequence, end - 1, end).values
            newest = max(newest, float(np.nanmax(times, initial=-np.inf)))
        return newest * self.header.time_unit if np.isfinite(newest) else None

    @cached_property
    def item_times(self) -> np.ndarray:
        """The time of each document's first version or first event, float64 [num_docs]; infinity: neither has one.

        Events of partitions that are not opened count, too: a document has one time in every view of a dataset.
        """
        return np.minimum(self.first_version_times, self.first_event_times)

    @property
    def first_version_times(self) -> np.ndarray:
        """The time of each document's first version, float64 [num_docs]; infinity: items have no times."""
        return self.catalogue.first_times() if self.header.dated else np.full(self.catalogue.num_docs, np.inf)

    @cached_property
    def first_event_times(self) -> np.ndarray:
        """The time of each document's first event, float64 [num_docs]; infinity: it has none, or events no times."""
        first = np.full(self.catalogue.num_docs, np.inf)
        if not self.has_times:
            return first
        for folder in self.event_folders:
            table = MappedTable(read_partition(folder.parent.parent, folder.name).sequence_files)
            for events in EventSlices.in_chunks(table):
                items, times = events.column("items").values, events.column(TIME_COLUMN).values
                valid = (items >= 0) & (items < len(first))
                np.minimum.at(first, items[valid], times[valid])
        return first

    @cached_property
    def _oldest_first(self) -> np.ndarray:
        return np.argsort(self.item_times, kind="stable")

    def later_items(self, times: np.ndarray) -> Ragged:
        """Return, per request at one of `times` (float64 [m]; NaN: unknown), the catalogue rows of later items.

        These are not available yet, see `item_times`; none in a dataset whose items have no times.
        """
        if not self.header.dated:
            return Ragged(np.zeros(0, np.int64), np.zeros(len(times) + 1, np.int64))
        order = self._oldest_first
        first = np.searchsorted(self.item_times, times, "right", sorter=order)
        return ragged.gather_ranges(order, first, np.full(len(times), len(order)))

    def target_feature(self, rows: Rows, name: str) -> np.ndarray:
        """Return a feature of the target's event per query [m]; the action of a funnel is that of the outcome."""
        assert rows.sequence is not None and rows.position is not None and rows.sequences is not None
        position = rows.position
        if rows.outcome is not None and name == self.rules.visit.action:
            position = rows.outcome
        return EventSlices(rows.sequences, rows.sequence[rows.row_of_query], position, position + 1).feature(name)

    def matching_targets(self, rows: Rows, condition: str, where: str) -> np.ndarray:
        """Return whether the target of each query matches a condition of the key `where`, bool [m]."""
        return matching_events(condition, where, self.schema.event, partial(self.target_feature, rows))

    def excluded(
        self, rows: Rows, exclude_seen: bool | str, queries: np.ndarray | None = None, *, visits: bool = True
    ) -> Ragged:
        """Return, per query, the catalogue rows of its history that are no answers, see `EventRules.excluded`.

        queries: query numbers (default: all); visits: include the items of the visit of the request.
        """
        queries = np.arange(rows.num_queries) if queries is None else queries
        items = Ragged(*rows.seen_ragged(queries))
        if rows.sequences is None or rows.sequence is None or rows.prefix is None or rows.position is None:
            return items
        sequence, position = rows.sequence[rows.row_of_query[queries]], rows.position[queries]
        events = EventSlices(rows.sequences, sequence, np.zeros_like(queries), rows.prefix[queries])
        request, visit = EventSlices(rows.sequences, sequence, position, position + 1), self.rules.visit_column()
        return self.rules.excluded(
            items, exclude_seen, self.schema, events.feature,
            (lambda: (events.column(visit), request.column(visit).values)) if visits else None, self.header.time_unit,
        )  # fmt: skip

    def one_query_per_row(self, rows: Rows) -> Rows:
        """Expand rows to one query per row, each with its newest history."""
        if rows.row is None or rows.prefix is None or rows.sequence is None or self.sequences is None:
            return rows
        sequence = rows.sequence[rows.row]
        query: dict[str, Column] = {}
        for name, feature in self.schema.query.items():
            if isinstance(feature, History):
                query |= self._history(feature, self.sequences, sequence, rows.prefix)[0]
            else:
                query[name] = ragged.take(rows.query[name], rows.row)
        query_numbers = np.arange(rows.num_queries)  # not None, which would change the random draws of the queries
        return replace(
            rows, row_ids=rows.row_ids[rows.row], query=query, sequence=sequence, row=query_numbers, history_start=None
        )

    def _history(
        self, feature: History, table: MappedTable, sequence: np.ndarray, end: np.ndarray
    ) -> tuple[dict[str, Column], np.ndarray]:
        """Return the columns of the newest events before position `end`, and the position of the first of them."""
        history_start = np.maximum(0, end - feature.max_items)
        items = table.take_slices("items", sequence, history_start, end)
        # The codes are those of the item versions that the events saw; invalid documents are out of vocabulary.
        docs, num_docs = items.values, self.catalogue.num_docs
        valid = (docs >= 0) & (docs < num_docs)
        docs = docs if valid.all() else np.where(valid, docs, 0)
        partition = self._numbers[np.searchsorted(self._sequence_base, sequence, "right") - 1]
        version = None
        if self.header.dated:
            version = table.take_slices(VERSION_COLUMN, sequence, history_start, end).values
        visible = self.catalogue.visible_rows(docs, np.repeat(partition, items.lengths), version)
        codes = item_codes(self.catalogue.codes(str(feature.of), docs if visible is None else visible))
        codes = codes if valid.all() else np.where(valid, codes, OUT_OF_VOCABULARY)
        of_events = self.event_features(table, sequence, history_start, end, self.schema.event_inputs).items()
        columns: dict[str, Column] = {f"{feature.name}.{name}": column for name, column in of_events}
        if self.rules.item_rows:
            columns[f"{feature.name}.{ITEM_ROW}"] = Ragged(np.where(valid, docs + 1, PADDING), items.offsets)
        return {feature.name: Ragged(codes, items.offsets), **columns}, history_start

    def event_features(
        self, table: MappedTable, sequence: np.ndarray, first: np.ndarray, end: np.ndarray,
        features: Mapping[str, Feature],
    ) -> dict[str, Ragged]:  # fmt: skip
        """Return `features` of the events [first, end) of sequences (int64 [rows]), by name."""
        columns = {}
        for name, feature in features.items():
            if isinstance(feature, EventTime):
                # The event before the first one, too, which may be older than the history.
                times = table.take_slices(TIME_COLUMN, sequence, np.maximum(first - 1, 0), end)
                previous = np.concatenate([[np.nan], times.values])[:-1]
                starts = times.offsets[:-1][times.lengths > 0]
                previous[starts] = np.nan
                inside = np.ones(len(previous), bool)
                inside[starts[(first > 0)[times.lengths > 0]]] = False
                codes = feature.codes(times.values[inside], previous[inside], self.header.time_unit)
                values = Ragged(codes, offsets_of(end - first))
            else:
                values = table.take_slices(EVENT_PREFIX + name, sequence, first, end)
            columns[name] = cast(Ragged, feature.without_unknown(values))
        return columns

    def limited_query(self, columns: dict[str, Column]) -> dict[str, Column]:
        """Re-encode query columns of the full schema by this view's schema, see `with_schema`."""
        if self._whole is None:
            return columns
        coded = {
            name: self.schema.doc[str(feature.of)] if isinstance(feature, History) else feature
            for name, feature in self.schema.query.items()
        }
        histories = [name for name, feature in self.schema.query.items() if isinstance(feature, History)]
        coded |= {f"{name}.{key}": event for name in histories for key, event in self.schema.event.items()}
        return {name: coded[name].without_unknown(column) for name, column in columns.items()}

    @cached_property
    def tokenizer(self) -> TextTokenizer | None:
        """The tokenizer, None without text features."""
        return None if self.tokenizer_dir is None else TextTokenizer(self.tokenizer_dir)

    def rows_for_queries(self, split: str, num_queries: int) -> int:
        """Return the number of rows (at least 1) that contain about `num_queries` queries."""
        return max(1, num_queries * self.num_rows(split) // max(1, self.num_queries(split)))

    def iterate(self, split: str, rows_per_batch: int, rank: int = 0, world_size: int = 1) -> Iterator[Rows]:
        """Yield a rank's contiguous share of a split, about `rows_per_batch` queries per batch.

        Each query becomes one row, with the history that serving would use. Unusable rows are skipped with a warning.
        """
        first, last = (self.num_rows(split) * k // world_size for k in (rank, rank + 1))
        yield from self.iterate_range(split, first, last, self.rows_for_queries(split, rows_per_batch))

    def iterate_range(self, split: str, first: int, last: int, rows_per_batch: int) -> Iterator[Rows]:
        """Yield rows [first, last) of a split in batches of `rows_per_batch` row ids, otherwise like `iterate`."""
        index = self.index(split)
        pending = [(np.empty(0, np.int64), empty_batch(self.layout))]
        block = int(np.searchsorted(index.first_row, first, "right")) - 1
        for step, begin in enumerate(range(first, last, rows_per_batch)):
            end = min(begin + rows_per_batch, last)
            while block < index.num_blocks and index.first_row[block] < end:
                batch, bad = read_block(index, block, self.layout)
                for fault in bad:
                    if fault.reason != FORGOTTEN:
                        log.warning("skipped: %s", fault)
                if batch is not None:
                    good = good_rows(batch, bad)
                    pending.append((index.first_row[block] + good, batch.take(pa.array(good)) if bad else batch))
                block += 1
            ids = np.concatenate([part[0] for part in pending])
            table = pa.concat_batches([part[1] for part in pending])
            inside, later = (ids >= begin) & (ids < end), ids >= end
            yield self.one_query_per_row(self.rows(split, step, ids[inside], table.filter(pa.array(inside))))
            pending = [(ids[later], table.filter(pa.array(later)))]


def _restored(reopen: Callable[..., Dataset], arguments: tuple[Any, ...], rules: EventRules) -> Dataset:
    """Unpickle a dataset."""
    return reopen(*arguments).with_rules(rules)


def empty_batch(layout: BlockLayout) -> pa.RecordBatch:
    """Return an empty batch of this layout."""
    return pa.RecordBatch.from_pylist([], schema=pa.schema(list(layout.types.items())))


def tokenizer_hash(folder: Path) -> str:
    """Hash the tokenizer in `folder`. Raises OSError."""
    return short_hash((folder / TOKENIZER_FILE).read_bytes())


def open_dataset(config: DataConfig, extents: Sequence[Extent] = ()) -> Dataset:
    """Open the dataset of a training config; with `extents` of its sources, without later appends.

    Raises DataError; ConfigError: incompatible sources.
    """
    cache = FileCache.from_config(config)
    source_extents: Sequence[Extent | None] = extents or [None] * max(1, len(config.mixture))
    if not config.mixture:
        dataset = Dataset.open(config.dir, first=config.from_partition, cache=cache, extent=source_extents[0])
        return dataset.with_rules(EventRules.of(config))
    parts = [
        Dataset.open(source.dir or config.dir, source.partitions or None, cache=cache, extent=extent)
        for source, extent in zip(config.mixture, source_extents, strict=True)
    ]
    units = sorted({part.header.time_unit for part in parts})
    if config.visit.gap_s is not None and len(units) > 1:
        raise ConfigError(
            f"data.visit.gap_s: the sources of data.mixture have times in units of {units[0]:g} s and {units[-1]:g} s; "
            "build all from times in one unit"
        )
    return join(parts, config.mixture, config.dir).with_rules(EventRules.of(config))


def join(parts: Sequence[Dataset], sources: Sequence[SourceConfig], main_dir: str) -> Dataset:
    """Join datasets; each becomes one MixturePart.

    Partitions outside `main_dir` are prefixed by their dataset's name.
    """
    for part, source in zip(parts[1:], sources[1:], strict=True):
        _check_same(parts[0], part, source.dir or main_dir)
    # The files of distinct catalogues, newer versions last, and each part's offset.
    files: list[CatalogueFile] = []
    starts: dict[tuple[str, ...], int] = {}
    first_doc = []
    for part in parts:
        key = tuple(file.checksum for file in part.catalogue_files)
        if key not in starts:
            if starts and part.sequences is not None:
                raise ConfigError(
                    f"data.mixture: {part.dir} cannot be mixed with {parts[0].dir}: their catalogues differ, but "
                    "datasets with histories must share one catalogue; put the interactions into one dataset, as "
                    "partitions (make_shards --append)"
                )
            starts[key] = sum(file.rows for file in files if file.since is None)
            files += [replace(file, first_doc=starts[key]) for file in part.catalogue_files]
        first_doc.append(starts[key])
    files.sort(key=lambda file: file.since is not None)
    partitions: list[Partition] = []
    mixture = []
    siblings: dict[str, Partition] = {}
    item_partitions: dict[str, Partition] = {}
    withdrawals: dict[Path, CatalogueFile] = {}
    for part, source, base in zip(parts, sources, first_doc, strict=True):
        prefix = "" if source.dir is None or _normalized(source.dir) == _normalized(main_dir) else f"{part.name}/"
        renamed = [replace(p, name=prefix + p.name, first_doc=base) for p in part.partitions]
        name = "+".join(partition.name for partition in renamed)
        mixture.append(MixturePart(name, len(partitions), len(partitions) + len(renamed), source.weight))
        partitions += renamed
        item_partitions |= {prefix + p.name: replace(p, name=prefix + p.name) for p in part.item_partitions}
        withdrawals |= {file.path: replace(file, first_doc=base) for file in part.withdrawals}
        siblings |= {prefix + p.name: replace(p, name=prefix + p.name) for p in part.partitions_on_disk()}
    names = [partition.name for partition in partitions]
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"data.mixture has the partition {duplicates[0]} twice; name each partition once; datasets must be in "
            "folders with different names"
        )
    steps_per_round([source.name for source in mixture], [source.weight for source in mixture])
    extents = [extent for part in parts for extent in part.extents]
    joined = Dataset(
        parts[0].header, partitions, files, list(withdrawals.values()), list(item_partitions.values()), extents
    )
    joined.event_folders = tuple(dict.fromkeys(folder for part in parts for folder in part.event_folders))
    joined.sources = tuple(mixture)
    joined.siblings = tuple(siblings.values())
    joined.pickled = (join, (tuple(parts), tuple(sources), main_dir))
    return joined


def _normalized(folder: str) -> str:
    return folder if is_url(folder) else os.path.realpath(folder)


def _check_same(first: Dataset, other: Dataset, name: str) -> None:
    schemas = first.header.schema, other.header.schema
    difference = schemas[0].difference(schemas[1])
    if difference is None and schemas[0] != schemas[1]:
        difference = f"data.title is {schemas[0].title!r} and {schemas[1].title!r}"
        fitted = [
            (f"{side}.{key}", feature, schemas[1].sides[side][key])
            for side, features in schemas[0].sides.items()
            for key, feature in features.items()
            if feature != schemas[1].sides[side][key]
        ]
        if fitted:
            where, *features = fitted[0]
            described = [feature.describe(first.vocab_size) for feature in features]
            difference = f"{where} was fitted to different data ({described[0]}, {described[1]})"
    if difference is None and first.tokenizer_hash != other.tokenizer_hash:
        difference = "the tokenizers differ"
    fix = f"build it with `bigdssm make_shards … --like {first.dir}`"
    for name_of_part, first_has, other_has, needed in (
        ("sequences", first.sequences is not None, other.sequences is not None, "interactions"),
        ("texts", first.header.text, other.header.text, "--raw-text"),
        ("users' features", first.header.users, other.header.users, "--users-time-column"),
        ("items' features", first.header.items, other.header.items, "--items-time-column"),
    ):
        if difference is None and first_has != other_has:
            difference, fix = f"only one of them has {name_of_part}", f"build both with {needed}, or both without"
    units = [dataset.header.time_unit for dataset in (first, other)]
    if difference is None and first.schema.event and units[0] != units[1]:
        difference = f"the times of events are in units of {units[0]:g} s and {units[1]:g} s"
        fix = "build both from times in one unit"
    if difference is not None:
        raise ConfigError(f"data.mixture: {name} cannot be mixed with {first.dir}: {difference}; {fix}")
