"""Atomic creation of datasets, and appends of immutable partitions.

A new dataset is written to a hidden sibling folder and renamed; a partition is written to a hidden folder inside the
dataset and moved in, with `dataset.json` replaced last. An ingestion with the same inputs as an interrupted one
resumes its finished steps; otherwise they are deleted.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from bigdssm.dataset.dataset import TOKENIZER_FILE
from bigdssm.dataset.partition import (
    PARTITION_CUT_OFFS,
    dataset_fingerprint,
    read_dataset_json,
    read_partition,
    short_hash,
)
from bigdssm.dataset.remote import KEYS_SUFFIX
from bigdssm.dataset.schema import QUARANTINE_FILE, SCHEMA_FILE, VOCABULARIES, Schema
from bigdssm.dataset.stamps import STAMPS_FILE, read_stamps, with_new_stamp
from bigdssm.errors import ConfigError, DataError, UnavailableError
from bigdssm.utils.atomic import (
    UNFINISHED,
    WriterLock,
    lock_path,
    new_file,
    real_path,
    recover,
    remove,
    replace_folder,
    sync,
    temporary_path,
    write_json,
)
from bigdssm.utils.hashing import file_checksum

DATASET_FILE = "dataset.json"
TOKENIZER, CATALOGUE, VERSIONS, PARTITIONS = "tokenizer", "catalogue", "versions", "partitions"
WITHDRAWALS, ITEM_PARTITIONS = "withdrawals", "item_partitions"
AS_OF = {"users": "rows", "items": "events"}  # the reference time of features that change
SPLIT = "split"  # the split of the first partition, reused by appends without --split
TIMES = "times"  # the unit of times, and the oldest and the newest one
OTHER_TIMES = {  # ends of messages: an existing dataset without times, with an append that has some; and conversely
    "users": (
        "one row of features per user, so leave out --users-time-column here, too",
        "user features as of each row, so give --users-time-column here, too",
    ),
    "items": (
        "one row of features per item, so leave out --items-time-column here, too",
        "item features as of each event, so give --items-time-column here, too",
    ),
    TIMES: (
        "no event times to compare these with; leave out the time column here, too (--time-column ''), or rebuild the "
        "dataset with one",
        "event times, so give --time-column here, too",
    ),
}
LOCK = ".lock"  # inside an existing dataset
OWN_FILES = (
    DATASET_FILE, SCHEMA_FILE, QUARANTINE_FILE, STAMPS_FILE, LOCK,
    *(f"{name}/*" for name in (TOKENIZER, CATALOGUE, PARTITIONS, VOCABULARIES, UNFINISHED)),
)  # fmt: skip
PREVIOUS_SCHEMA = "schema.previous.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The row-specific parts of a reason.
PARTICULAR = re.compile(r"'.*'|\".*\"|(?<!\S)-?\d[\d.,e+-]*(?![\w-])")
MAX_KINDS = 100

BadSourceRow = tuple[str, int, str, bool]
"""File, row, reason, and whether the row is skipped (otherwise the bad value is treated as missing)."""


class Quarantine:
    """Writes bad rows to a file, in order, and counts them by kind of reason."""

    def __init__(self, path: Path, final_path: Path, partition: str, max_bad_fraction: float) -> None:
        """Write to `path`; `final_path` is the file's location if the ingestion fails."""
        self.path, self.final_path = path, final_path
        self._partition, self._max_bad_fraction = partition, max_bad_fraction
        self._file = path.open("w", encoding="utf-8")
        self._first = ""
        self._kinds: Counter[str] = Counter()
        self.num_bad = self.num_left_out = self.num_good = 0

    def add(self, rows: Iterable[BadSourceRow]) -> None:
        """Write bad rows."""
        for file, row, reason, left_out in rows:
            self.num_bad += 1
            self.num_left_out += left_out
            kind = PARTICULAR.sub("…", reason)
            if kind in self._kinds or len(self._kinds) < MAX_KINDS:
                self._kinds[kind] += 1
            self._first = self._first or f"{file}, row {row}: {reason}"
            record = {"partition": self._partition, "file": file, "row": row, "reason": reason, "left_out": left_out}
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def check(self) -> None:
        """Raise DataError if there are too many bad rows."""
        total, limit = self.num_left_out + self.num_good, self._max_bad_fraction
        if self.num_bad > limit * total:
            counted = f"{self.num_bad} of {total} rows are bad or have bad values, all tables together"
            raise DataError(f"{counted}, more than data.max_bad_fraction={limit}{self.summary()}")

    def summary(self) -> str:
        """Return the most frequent reasons, the first bad row and the file, to end a message."""
        if not self.num_bad:
            return ""
        reasons = ", ".join(f"{count} × {kind}" for kind, count in self._kinds.most_common(3))
        return f": {reasons}; the first is {self._first}; all are in {self.final_path}"

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class DatasetWriter:
    """A dataset under construction: fill partition, tokenizer and catalogue, then `commit`.

    As a context manager it deletes the unfinished dataset after an error in the data or the config, and saves the
    quarantine as OUT.quarantine.jsonl.
    """

    def __init__(
        self, out: Path, partition: str, max_bad_fraction: float, *, source: str, overwrite: bool = False,
        append: bool = False,
    ) -> None:  # fmt: skip
        """`source` identifies the inputs: an interrupted ingestion of the same inputs is resumed."""
        out = real_path(out)
        self.out, self.partition, self.append = out, partition, append
        plain = re.fullmatch(r"[^./\\][^/\\]*", partition) and partition.isprintable()
        if not plain or len(partition.encode()) > 255:
            raise ConfigError(f"partition name {partition!r} must be a plain folder name")
        self.content: dict[str, Any] = {"catalogue": [], PARTITIONS: [], "text": "tokens"}
        self.cut_offs: list[float] | None = None  # times at which splits of a partition of events start
        self.staging = out / UNFINISHED if append else temporary_path(out)
        try:
            with ExitStack() as locks:
                self._claim(locks)
                self._open(overwrite)
                self._locks = locks.pop_all()
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            raise ConfigError(
                f"{out} cannot be written ({error.strerror}: {error.filename}); choose another --out"
            ) from None
        inputs = {"source": source, "partition": partition, "before": self.content}
        inputs_hash = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        # named by the inputs, so that workers left over from another ingestion cannot write here
        self.spool = self.staging / f"spool-{inputs_hash[:16]}"
        # the spool is renamed to this before the dataset gets its final name
        self._used_spool = self.staging.with_name(f"{self.staging.name}-spool")
        remove(self._used_spool)
        if not self.spool.exists():  # keep the finished steps of an interrupted ingestion of the same inputs only
            for path in self.staging.iterdir():
                remove(path)
            self.spool.mkdir()
        if append and not (self.staging / PREVIOUS_SCHEMA).exists():
            shutil.copyfile(out / SCHEMA_FILE, self.staging / PREVIOUS_SCHEMA)
        self.partition_dir = self.staging / PARTITIONS / partition
        self.catalogue_dir = self.staging / CATALOGUE  # for new files
        self.tokenizer_dir = (out if append else self.staging) / TOKENIZER  # an append uses the existing tokenizer
        for folder in (self.partition_dir, self.catalogue_dir):
            folder.mkdir(parents=True, exist_ok=True)
        final_path = out.parent / f"{out.name}.{QUARANTINE_FILE}"
        self.quarantine = Quarantine(self.staging / QUARANTINE_FILE, final_path, partition, max_bad_fraction)

    def _claim(self, locks: ExitStack) -> None:
        """Lock the output. Raises DataError: another process writes there.

        Nothing else is read before, because another process may change it.
        """
        if not self.append:
            self.out.parent.mkdir(parents=True, exist_ok=True)
        # an append needs no access to the parent folder, except to recover an interrupted replacement
        if not self.append or (not self.out.exists() and self.out.parent.is_dir()):
            locks.enter_context(WriterLock(lock_path(self.out), self.out))
            recover(self.out)
        if (self.out / DATASET_FILE).exists():
            locks.enter_context(WriterLock(self.out / LOCK, self.out))

    def _open(self, overwrite: bool) -> None:
        """Read the existing dataset, and create the staging folder."""
        if self.append:
            content = read_dataset_json(self.out)
            previous = self.out / UNFINISHED / PREVIOUS_SCHEMA
            if Schema.load(self.out).fingerprint() != content["schema"] and previous.exists():
                os.replace(previous, self.out / SCHEMA_FILE)  # an append was interrupted between its last two renames
            if self.partition in content[PARTITIONS]:
                raise DataError(
                    f"{self.out} already has a partition {self.partition!r}; partitions are never rewritten"
                )
            self.content = {"text": "tokens", **content}
        else:
            _check_free(self.out, overwrite)
        self.staging.mkdir(parents=True, exist_ok=True)

    @property
    def num_existing_docs(self) -> int:
        """The number of existing documents."""
        return sum(part["rows"] for part in self.content["catalogue"])

    @property
    def key_files(self) -> list[Path]:
        """The existing key files of documents; not every catalogue file has one."""
        files = ((self.out / part["file"]).with_suffix(KEYS_SUFFIX) for part in self.content["catalogue"])
        return [file for file in files if file.exists()]

    def record_id_sources(self, **ids: Literal["column", "content"]) -> None:
        """Record the identity of documents (`doc`) and queries: an id column, or their features.

        Raises ConfigError: it differs from the existing dataset's.
        """
        recorded = self.content.get("ids", ids if not self.append else {})
        for side, source in recorded.items():
            if ids[side] != source:
                fix = {"column": f"give --{side}-id-column", "content": f"leave out --{side}-id-column"}[source]
                raise ConfigError(
                    f"{self.out} identifies each {side} by its {'id' if source == 'column' else 'features'}, so {fix} "
                    "here, too; otherwise existing ones would be added as new"
                )
        self.content["ids"] = recorded

    def record_times(self, kind: Literal["users", "items", "times"], has_times: bool) -> None:
        """Record whether user features are as of each row, item features as of each event, or events have times.

        Raises ConfigError: it differs from the existing dataset's.
        """
        if self.append and (kind in self.content) != has_times:
            without, with_times = OTHER_TIMES[kind]
            raise ConfigError(f"{self.out} has {without if has_times else with_times}")
        if has_times:
            self.content.setdefault(kind, AS_OF.get(kind, {}))

    def commit(
        self, schema: Schema, catalogue: list[dict[str, Any]], versions: list[dict[str, Any]], splits: dict[str, Any],
        counts_checksum: str, sequences: Sequence[dict[str, Any]], withdrawals: Sequence[dict[str, Any]] = (),
    ) -> None:  # fmt: skip
        """Write partition.json and dataset.json, and move everything into place.

        `catalogue`: the files of new documents; `versions`: the files of new versions of existing ones; `withdrawals`:
        those of documents withdrawn or back.
        """
        self.quarantine.close()
        described: dict[str, Any] = {"name": self.partition, "splits": splits, "counts_checksum": counts_checksum}
        if sequences:
            described["sequences"] = list(sequences)
        documents = [part["checksum"] for part in [*catalogue, *versions, *withdrawals]]  # rows have only their numbers
        digest = hashlib.sha256(json.dumps({**described, "documents": documents}, sort_keys=True).encode()).hexdigest()
        described["fingerprint"] = digest[:16]
        if self.cut_offs is not None:
            described[PARTITION_CUT_OFFS] = self.cut_offs
        write_json(self.partition_dir / "partition.json", described)
        later = {
            kind: [
                *self.content.get(kind, []),
                *({**part, "file": f"{CATALOGUE}/{part['file']}", "since": self.partition} for part in parts),
            ]
            for kind, parts in ((VERSIONS, versions), (WITHDRAWALS, withdrawals))
        }
        later[ITEM_PARTITIONS] = [*self.content.get(ITEM_PARTITIONS, []), *([] if splits else [self.partition])]
        tokenizer = dict(self.content.get(TOKENIZER, {}))
        if not self.append:
            tokenizer = {path.name: file_checksum(path, bits=64) for path in sorted(self.tokenizer_dir.glob("*"))}
        dataset = {
            "format": schema.format,
            "name": self.out.resolve().name,
            "schema": schema.fingerprint(),
            "text": self.content["text"],
            "ids": self.content["ids"],
            **{name: self.content[name] for name in (*AS_OF, SPLIT, TIMES) if name in self.content},
            **{kind: entries for kind, entries in later.items() if entries},
            "tokenizer": tokenizer,
            "catalogue": [
                *self.content["catalogue"],
                *({**part, "file": f"{CATALOGUE}/{part['file']}"} for part in catalogue),
            ],
            PARTITIONS: [*self.content[PARTITIONS], self.partition],
        }
        schema = schema.save(self.staging)
        write_json(self.staging / DATASET_FILE, dataset)
        stamps = with_new_stamp(read_stamps(self.out), self._fingerprint(dataset, schema))
        write_json(self.staging / STAMPS_FILE, stamps)
        for path in self.staging.rglob("*"):
            if path.is_file() and not path.is_relative_to(self.spool):
                sync(path)
        os.replace(self.spool, self._used_spool)  # a rename is faster than removal, and loses nothing if killed
        if self.append:
            for path in sorted(self.catalogue_dir.iterdir()):
                os.replace(path, self.out / CATALOGUE / path.name)
            target = self.out / PARTITIONS / self.partition
            remove(target)  # not in dataset.json: left by an interrupted append
            os.replace(self.partition_dir, target)
            # append the partition's bad rows, replacing those of an interrupted append
            quarantine = self.out / QUARANTINE_FILE
            with new_file(quarantine) as unfinished, unfinished.open("w", encoding="utf-8") as file:
                if quarantine.exists():
                    with quarantine.open(encoding="utf-8") as existing:
                        file.writelines(line for line in existing if json.loads(line)["partition"] != self.partition)
                with self.quarantine.path.open(encoding="utf-8") as new_rows:
                    file.writelines(new_rows)
            (self.out / VOCABULARIES).mkdir(exist_ok=True)
            for part in schema.vocabulary_files:  # existing ones are hard links to the same files
                os.replace(part.path, self.out / VOCABULARIES / part.path.name)
            os.replace(self.staging / STAMPS_FILE, self.out / STAMPS_FILE)  # before the state that it has a stamp of
            os.replace(self.staging / SCHEMA_FILE, self.out / SCHEMA_FILE)
            os.replace(self.staging / DATASET_FILE, self.out / DATASET_FILE)
            shutil.rmtree(self.staging)
        else:
            replace_folder(self.staging, self.out, OWN_FILES)
        remove(self._used_spool)
        self._locks.close()

    def _fingerprint(self, dataset: dict[str, Any], schema: Schema) -> str:
        """Return the `Dataset.fingerprint` of the dataset when it is committed; `dataset` is its dataset.json."""
        items = dataset.get(ITEM_PARTITIONS, [])
        rows = [name for name in dataset[PARTITIONS] if name not in items]
        folders = {name: self.out for name in dataset[PARTITIONS]} | {self.partition: self.staging}
        partitions = [read_partition(folders[name], name) for name in [*rows, *items]]
        tokenizer = short_hash((self.tokenizer_dir / TOKENIZER_FILE).read_bytes()) if schema.has_text else ""
        return dataset_fingerprint(schema.fingerprint(), tokenizer, partitions)

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        # Errors of write() have no filename.
        if isinstance(value, OSError) and value.errno in NO_ROOM and not value.filename:
            value.filename = str(self.staging)
        self.quarantine.close()
        expected = kind is not None and issubclass(kind, (ConfigError, DataError))
        if expected and not isinstance(value, UnavailableError) and self.staging.exists():
            if self.quarantine.num_bad:
                shutil.copyfile(self.quarantine.path, self.quarantine.final_path)
            shutil.rmtree(self.staging)
        self._locks.close()

    def release(self) -> None:
        """Leave the finished steps for a later ingestion to resume.

        Delete the staging folder if there are none.
        """
        self.quarantine.close()
        if not any(self.spool.iterdir()):
            shutil.rmtree(self.staging)
        self._locks.close()


def _check_free(out: Path, overwrite: bool) -> None:
    """Raise DataError unless a dataset can be written to `out`."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out} is a file, needs a folder; choose another --out")
    holds_dataset = (out / DATASET_FILE).exists()
    if holds_dataset and not overwrite:
        raise DataError(f"{out} already holds a dataset; use --overwrite, --append NAME or another --out")
    if not holds_dataset and any(out.iterdir()):
        raise DataError(f"{out} is not empty and holds no dataset; choose another --out")
