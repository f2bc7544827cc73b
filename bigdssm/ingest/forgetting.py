"""Remove users and items from a dataset: their rows become empty in place, so orders, numbers and fingerprints stay.

A user is a sequence, or the rows of pairs with its query id; an item is a document, in all its versions. Everything is
written to new files, and the dataset's folder is replaced at once.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from bigdssm.dataset.blocks import read_range
from bigdssm.dataset.catalogue import DOCUMENT_COLUMN, WITHDRAWN_COLUMN, catalogue_files
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.partition import INDEX_COLUMNS, Partition, SplitIndex, read_dataset_json, read_index
from bigdssm.dataset.remote import KEYS_SUFFIX, SEQUENCE_KEYS_FILE
from bigdssm.dataset.rows import EVENT_PREFIX, FORGOTTEN_DOC, FORGOTTEN_ID
from bigdssm.dataset.schema import QUARANTINE_FILE, mix
from bigdssm.errors import ConfigError
from bigdssm.features import Feature, Text, stored_features
from bigdssm.features.base import FIRST_CODE
from bigdssm.features.categorical import boolean_indices, categorical_of
from bigdssm.ingest.dataset_writer import CATALOGUE, DATASET_FILE, LOCK, PARTITIONS, WITHDRAWALS
from bigdssm.ingest.job import block_content, write_arrow, write_index, write_tar
from bigdssm.utils.array_file import open_arrow
from bigdssm.utils.atomic import UNFINISHED, Changes, WriterLock, lock_path, real_path, recover, write_json
from bigdssm.utils.hashing import hash_strings
from bigdssm.utils.urls import is_url

REDACTED = "forgotten"  # the reason of a bad row in quarantine.jsonl that named a forgotten id
QUOTED_CHARACTERS = 50  # of a value in a reason, at least: see RowCheck


@dataclass
class Forgotten:
    """The documents, codes and rows that a dataset has forgotten, by this and earlier deletions."""

    users: int = 0  # found, and removed now
    items: int = 0
    documents: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # catalogue rows, ascending
    # Codes without a value, int64 ascending, by side and feature: of the ids, and those that no other row has.
    codes: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    train_rows: dict[str, np.ndarray] = field(default_factory=dict)  # numbers within the train split, by partition
    shared: list[str] = field(default_factory=list)  # vocabularies with an id that other rows use


@contextmanager
def forget(folder: str | Path, users: Sequence[str], items: Sequence[str], changes: Changes) -> Iterator[Forgotten]:
    """Yield the result of removing ids from a dataset; replace its files at the end of the block.

    So other folders can be changed before it: if killed, the same call finds the same again. Ids that the dataset does
    not have are skipped. Raises ConfigError: a dataset at a URL, or queries without ids; DataError: another process
    writes it.
    """
    if is_url(folder):
        raise ConfigError(f"--data {folder}: a dataset at a URL cannot be changed; change a copy, and upload it")
    folder = real_path(Path(folder))
    with ExitStack() as stack:
        if folder.parent.is_dir():
            stack.enter_context(WriterLock(lock_path(folder), folder, "wait for it"))
            recover(folder)
        content = read_dataset_json(folder)
        stack.enter_context(WriterLock(folder / LOCK, folder, "wait for it"))
        dataset = Dataset.open(folder)
        if users and content.get("ids", {}).get("query") == "content":
            raise ConfigError(f"--user: {folder} identifies queries by their features, so it has no users")
        target = stack.enter_context(changes.new_version(folder))
        changes.remove_all(folder, [UNFINISHED, f"{UNFINISHED}-spool"])  # of an interrupted append
        changes.remove_all(folder.parent, [f".{folder.name}{UNFINISHED}-spool"])
        deletion = _Deletion(dataset, content, users, items, target)
        ids = [*users, *items]
        _redact(folder / QUARANTINE_FILE, target / QUARANTINE_FILE, ids)
        outside = folder.parent / f"{folder.name}.{QUARANTINE_FILE}"
        if outside.exists():
            with changes.new_file(outside) as new:
                _redact(outside, new, ids)
        yield deletion.forgotten


class _Deletion:
    """The new files of a dataset, in the folder `target`."""

    def __init__(
        self, dataset: Dataset, content: dict[str, Any], users: Sequence[str], items: Sequence[str], target: Path
    ) -> None:
        self._dataset, self._content, self._target = dataset, content, target
        self._schema = dataset.header.schema
        self._users, self._items = set(users), set(items)
        self._ids = {"query": list(users), "doc": list(items), "filter": list(items), "event": []}
        if self._schema.siamese:
            self._ids["query"] = self._ids["doc"] = [*users, *items]
        self._query_ids = hash_strings(pa.array(self._ids["query"], pa.large_string()))
        rows = dataset.catalogue.rows_by_key(items) if len(items) else np.zeros(0, np.int64)
        self._documents = np.unique(rows[rows >= 0])
        self._removed: dict[tuple[str, str], list[np.ndarray]] = {}  # codes of forgotten rows
        self._used: dict[tuple[str, str], np.ndarray] = {}  # mask of the codes of other rows
        self._removed_ids: set[int] = set()  # query ids
        self.forgotten = Forgotten(items=len(self._documents))
        # write all files that change
        for number, partition in enumerate(self._dataset.partitions):
            self._write_partition(number, partition)
        self._write_catalogue()
        self.forgotten.users = len(self._removed_ids)
        self._schema.erase(self._erased_codes(), self._target)
        write_json(self._target / DATASET_FILE, self._content)

    # ----- partitions

    def _write_partition(self, number: int, partition: Partition) -> None:
        folder = self._target / PARTITIONS / partition.name
        folder.mkdir(parents=True)
        described = json.loads(json.dumps(partition.content))
        new, emptied, first = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
        user = stored_features(self._schema.query)
        event = {EVENT_PREFIX + name: feature for name, feature in stored_features(self._schema.event).items()}
        for entry, path in zip(described.get("sequences", []), partition.sequence_files, strict=True):
            batch = open_arrow(path).get_batch(0)
            ids = batch["query_id"].to_numpy()
            was_empty = np.diff(np.asarray(batch["items"].offsets)) == 0
            of_users = np.isin(ids, self._query_ids) & ~was_empty
            keys = batch["query_key"].take(pa.array(np.flatnonzero(of_users))).to_pylist()
            of_users[of_users] = [key in self._users for key in keys]  # no hash collision
            self._removed_ids |= set(ids[of_users].tolist())
            empty: dict[str, Any] = {name: [] for name in batch.schema.names if name not in user}
            values = {**empty, "query_key": "", "query_id": FORGOTTEN_ID}
            columns = self._blanked(batch, of_users, was_empty, {"query": user, "event": event}, values)
            if columns is not None:
                entry["checksum"] = write_arrow(folder / entry["file"], columns)["checksum"]
            new.append(first + np.flatnonzero(of_users))
            emptied.append(first + np.flatnonzero(of_users | was_empty))
            first += batch.num_rows
        if len(np.concatenate(new)):
            _drop_keys(partition.folder / SEQUENCE_KEYS_FILE, folder / SEQUENCE_KEYS_FILE, np.concatenate(new))
        for split in described["splits"]:
            rows = self._write_split(number, partition, split, np.concatenate(emptied), described["splits"][split])
            if split == "train":
                self.forgotten.train_rows[partition.name] = rows
        if described != partition.content:
            write_json(folder / "partition.json", {**described, "identity": partition.identity})

    def _write_split(
        self, number: int, partition: Partition, split: str, sequences: np.ndarray, entry: dict[str, Any]
    ) -> np.ndarray:
        """Write the shards of a split with rows to empty, and its index; return the numbers of all empty rows."""
        index, layout = read_index(partition, split, number), self._dataset.layout
        rows, contents = [np.zeros(0, np.int64)], {}
        for block in range(index.num_blocks):
            content = _bytes_of(index, block)
            if xxhash.xxh3_64_intdigest(content) != int(index.checksum[block]):  # damaged: readers skip it, too
                continue
            batch = pa.ipc.open_stream(content).read_next_batch()  # with all its columns
            if layout.sequences:
                is_empty = np.isin(batch["sequence"].to_numpy(), sequences)
                is_new = is_empty if layout.query else np.zeros(batch.num_rows, bool)
                values = {}
            else:
                was_empty = batch["doc"].to_numpy() == FORGOTTEN_DOC
                is_new = np.isin(batch["query_id"].to_numpy(), self._query_ids) & ~was_empty
                is_empty = is_new | was_empty
                self._removed_ids |= set(batch["query_id"].to_numpy()[is_new].tolist())
                values = {"query_id": FORGOTTEN_ID, "doc": FORGOTTEN_DOC, "relevance": 0}
            rows.append(index.first_row[block] + np.flatnonzero(is_empty))
            columns = self._blanked(batch, is_new, is_empty & ~is_new, {"query": layout.query}, values)
            if columns is not None:
                contents[block] = block_content(pa.RecordBatch.from_pydict(columns, schema=batch.schema))
        if not contents:
            return np.concatenate(rows)
        # the shards with blocks of new contents, and the index
        folder = self._target / PARTITIONS / partition.name
        arrays = {name: getattr(index, name).copy() for name in INDEX_COLUMNS}
        for shard in np.unique(index.shard[list(contents)]).tolist():
            blocks = np.flatnonzero(index.shard == shard).tolist()
            stored = ((block, _bytes_of(index, block)) for block in blocks)
            arrays["offset"][blocks] = write_tar(
                folder / index.shards[shard].name,
                ((int(index.block[block]), contents.get(block, content)) for block, content in stored),
            )
        for block, content in contents.items():
            arrays["size"][block], arrays["checksum"][block] = len(content), xxhash.xxh3_64_intdigest(content)
        names = [shard.name for shard in index.shards]
        entry["index_checksum"] = write_index(folder, split, names, index.shard, arrays)
        return np.concatenate(rows)

    # ----- catalogue

    def _write_catalogue(self) -> None:
        folder = self._target / CATALOGUE
        folder.mkdir()
        files = catalogue_files(self._dataset.dir, self._content)
        entries = [*self._content["catalogue"], *self._content.get("versions", [])]
        first, documents = 0, [self._documents]
        for file, entry in zip(files, entries, strict=True):
            batch = open_arrow(file.path).get_batch(0)
            numbers = first + np.arange(batch.num_rows) if file.since is None else batch[DOCUMENT_COLUMN].to_numpy()
            first += batch.num_rows * (file.since is None)
            was_empty = pc.equal(batch["doc_key"], "").to_numpy(zero_copy_only=False)
            is_new = np.isin(numbers, self._documents) & ~was_empty
            documents.append(numbers[was_empty])
            sides = {"doc": self._schema.doc, "filter": self._schema.filter}
            columns = self._blanked(batch, is_new, was_empty, sides, {"doc_key": "", "doc_title": "", "content": 0})
            if columns is not None:
                # ids stay distinct: equal ids would be one document
                forgotten_ids = mix(numbers, "forgotten", 0).view(np.int64)  # unrelated to the keys
                columns["doc_id"] = pa.array(np.where(is_new, forgotten_ids, batch["doc_id"].to_numpy()))
                entry["checksum"] = write_arrow(self._target / entry["file"], columns)["checksum"]
        self.forgotten.documents = np.unique(np.concatenate(documents))
        if not len(self._documents):
            return
        for path in sorted((self._dataset.dir / CATALOGUE).glob(f"*{KEYS_SUFFIX}")):
            _drop_keys(path, folder / path.name, self._documents)
        withdrawn = np.setdiff1d(self._documents, self._dataset.catalogue.withdrawn)
        if len(withdrawn):  # a forgotten item is no answer
            earlier = self._content.setdefault(WITHDRAWALS, [])
            states = pa.array(np.ones(len(withdrawn), np.int8))
            columns = {DOCUMENT_COLUMN: pa.array(withdrawn), WITHDRAWN_COLUMN: states}
            written = write_arrow(folder / f"{WITHDRAWALS}-{len(earlier):06d}.arrow", columns)
            since = self._content[PARTITIONS][-1]
            earlier.append({**written, "file": f"{CATALOGUE}/{written['file']}", "since": since})

    # ----- codes

    def _blanked(
        self, batch: pa.RecordBatch, removed: np.ndarray, was_empty: np.ndarray,
        sides: Mapping[str, Mapping[str, Feature]], values: Mapping[str, Any],
    ) -> dict[str, pa.Array] | None:  # fmt: skip
        """Return the columns with `values`, else missing features, in the rows `removed`; None: no row is removed.

        Record the codes of removed rows, and which codes others have; of hashed values those of the ids alone.
        """
        blank = {name: pa.array([value], batch.schema.field(name).type) for name, value in values.items()}
        for side, features in sides.items():
            for column, feature in categorical_of(features).items():
                key = side, column.removeprefix(EVENT_PREFIX)
                of_others = _codes(batch[column], ~removed & ~was_empty)
                if feature.hash_buckets:
                    of_ids = self._codes_of_ids[key]
                    self._used.setdefault(key, np.zeros(len(of_ids), bool))[np.isin(of_ids, of_others)] = True
                else:
                    self._used.setdefault(key, np.zeros(feature.num_codes, bool))[of_others] = True
                    self._removed.setdefault(key, []).append(_codes(batch[column], removed))
            blank |= {name: self._missing(f, batch[name].type) for name, f in features.items() if name not in values}
        if not removed.any():
            return None
        rows = pa.array(np.where(removed, batch.num_rows, np.arange(batch.num_rows)))
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        return columns | {name: pa.concat_arrays([columns[name], value]).take(rows) for name, value in blank.items()}

    @cached_property
    def _codes_of_ids(self) -> dict[tuple[str, str], np.ndarray]:
        """The codes of the ids in all categorical features, int64 ascending, by side and feature."""
        codes = {}
        for side, features in self._schema.sides.items():
            for name, feature in categorical_of(features).items():
                of_ids = np.unique(feature.codes(pa.array(self._ids[side], pa.large_string()))).astype(np.int64)
                codes[side, name] = of_ids[of_ids >= FIRST_CODE]
        return codes

    def _erased_codes(self) -> dict[tuple[str, str], np.ndarray]:
        """Return the codes without a value, see `Forgotten.codes`."""
        for (side, name), of_ids in self._codes_of_ids.items():
            feature = categorical_of(self._schema.sides[side])[name]
            keys = [("query", name), ("doc", name)] if self._schema.siamese else [(side, name)]  # one vocabulary
            candidates, size = of_ids, len(of_ids) if feature.hash_buckets else feature.num_codes
            used = np.zeros(size, bool)
            for key in keys:
                used |= self._used.get(key, np.zeros(size, bool))
            if not feature.hash_buckets:
                removed = [part for key in keys for part in self._removed.get(key, [])]
                candidates = np.unique(np.concatenate([of_ids, *removed]))
                candidates = candidates[candidates >= FIRST_CODE]
                used = used[candidates]
            if boolean_indices(feature.vocabulary):  # not ids; each value gives the other one its spellings
                used = np.ones(len(candidates), bool)
            if np.isin(of_ids, candidates[used]).any():
                self.forgotten.shared.append(f"{side}.{name}")
            earlier = FIRST_CODE + feature.vocabulary.erased_indices
            self.forgotten.codes[side, name] = np.union1d(earlier, candidates[~used])
        return self.forgotten.codes

    def _missing(self, feature: Feature, stored: pa.DataType) -> pa.Array:
        """Return a missing value as stored in a column of this type, [1]."""
        value = pa.array([feature.missing], feature.canonical_type)
        if isinstance(feature, Text) and stored == feature.raw_type:
            return feature.encode_raw(value)
        return feature.encode(value, self._dataset.tokenizer, large=True).cast(stored)


def _bytes_of(index: SplitIndex, block: int) -> bytes:
    shard = index.shards[index.shard[block]]
    assert isinstance(shard, Path)
    return read_range(shard, int(index.offset[block]), int(index.size[block]))


def _codes(column: pa.Array, mask: np.ndarray) -> np.ndarray:
    """Return the distinct codes of the rows of `mask`, int64."""
    selected = column.filter(pa.array(mask))
    if pa.types.is_list(selected.type) or pa.types.is_large_list(selected.type):
        selected = selected.flatten()
    return np.unique(selected.to_numpy()).astype(np.int64)


def _drop_keys(path: Path, target: Path, rows: np.ndarray) -> None:
    """Write a file of sorted keys without those of `rows`."""
    keys = np.load(path, allow_pickle=False)
    np.save(target, keys[:, ~np.isin(keys[1], rows)])


def _redact(path: Path, target: Path, ids: Sequence[str]) -> None:
    """Write bad rows, without the reasons that name an id; long values are cut off in them."""
    if not path.exists():
        return
    texts = {text for key in ids for text in (key, repr(key)[1:-1])}
    complete = [rf"(?<!\w){re.escape(text)}(?!\w)" for text in texts if len(text) <= QUOTED_CHARACTERS]
    cut_off = [re.escape(text[:QUOTED_CHARACTERS]) for text in texts if len(text) > QUOTED_CHARACTERS]
    names_id = re.compile("|".join([*complete, *cut_off]) or r"(?!)")
    with path.open(encoding="utf-8") as lines, target.open("w", encoding="utf-8") as file:
        for line in lines:
            record = json.loads(line)
            if names_id.search(record["reason"]):
                line = json.dumps({**record, "reason": REDACTED}, ensure_ascii=False) + "\n"
            file.write(line)
