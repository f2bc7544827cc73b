"""Makes a dataset folder appear whole or not at all, and lets one grow by immutable partitions.

A new dataset is written into a hidden folder beside its place and renamed; a partition is written into a hidden folder
inside the dataset and moved in, `dataset.json` replaced last. What a killed run leaves is taken up by the next one, if
it makes the same of the same, as far as the journals go; else it is cleared.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from bigdssm.atomic import UNFINISHED, aside_of, real_place, recover, remove, replace_folder, write_json
from bigdssm.dataset.dataset import FORMAT
from bigdssm.dataset.mapped import MappedTable
from bigdssm.errors import BigDSSMError, ConfigError, DataError
from bigdssm.hashing import file_checksum
from bigdssm.making.journal import Journal, State
from bigdssm.schema import SCHEMA_FILE, VOCABULARIES, Schema

DATASET_FILE, QUARANTINE_FILE = "dataset.json", "quarantine.jsonl"
TOKENIZER, CATALOGUE, PARTITIONS = "tokenizer", "catalogue", "partitions"
LOCK, READING, WRITING = "lock", "reading.npz", "writing.npz"
PREVIOUS_SCHEMA = "schema.previous.json"
PARTICULAR = (
    r"'.*'|\".*\"|(?<!\S)-?\d[\d.,e+-]*(?![\w-])"  # what one bad row's reason has and another's of the kind has not
)
MAX_KINDS = 100
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Quarantine:
    """Counts bad rows and writes them, one JSON object a line; past a fraction of all rows it stops the work."""

    def __init__(self, path: Path, kept: Path, partition: str, max_bad_fraction: float) -> None:
        """Write to `path`; `kept` is where the file will stand if the work fails."""
        self.path = path
        self._kept, self._partition, self._max_bad_fraction = kept, partition, max_bad_fraction
        self._file = path.open("a", encoding="utf-8")
        self._first = ""
        self._kinds: dict[str, int] = {}
        self.num_bad = 0
        self.num_left_out = 0
        self.num_good = 0

    def state(self) -> State:
        """Return what `restore` takes to go on from here."""
        self._file.flush()
        counts = [self.num_bad, self.num_left_out, self.num_good, self._first, dict(self._kinds)]
        return {"size": os.fstat(self._file.fileno()).st_size, "counts": counts}

    def restore(self, state: State) -> None:
        """Become what gave `state`, the file cut back to it."""
        os.truncate(self.path, state["size"])
        self.num_bad, self.num_left_out, self.num_good, self._first, self._kinds = state["counts"]

    def report(self, file: str, row: int, reason: str, left_out: bool = True) -> None:
        """Record a bad row, or (not left out) a bad value of a row that stays."""
        self.num_bad += 1
        self.num_left_out += left_out
        kind = re.sub(PARTICULAR, "…", reason)
        if kind in self._kinds or len(self._kinds) < MAX_KINDS:
            self._kinds[kind] = self._kinds.get(kind, 0) + 1
        self._first = self._first or f"{file}, row {row}: {reason}"
        record = {"partition": self._partition, "file": file, "row": row, "reason": reason, "left_out": left_out}
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def check(self) -> None:
        """Raise DataError, naming the first bad row, where there are too many."""
        total, limit = self.num_left_out + self.num_good, self._max_bad_fraction
        if self.num_bad > limit * total:
            told = f"{self.num_bad} of {total} rows are bad or have bad values, all tables together"
            raise DataError(f"{told}, more than data.max_bad_fraction={limit}{self.told()}")

    def told(self) -> str:
        """Return the commonest reasons with their counts, the first bad row and the file, to end a sentence with."""
        if not self.num_bad:
            return ""
        kinds = sorted(self._kinds.items(), key=lambda item: -item[1])[:3]
        said = ", ".join(f"{count} × {kind}" for kind, count in kinds)
        return f": {said}; the first is {self._first}; all are in {self._kept}"

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class DatasetWriter:
    """A dataset being made: write into `partition_dir`, `tokenizer_dir` and `catalogue_file`, then `commit`.

    As a context manager it clears up after an error in the data or the config, keeping the quarantine as
    OUT.quarantine.jsonl.
    """

    def __init__(
        self, out: Path, partition: str, max_bad_fraction: float, *, source: str, overwrite: bool = False,
        append: bool = False,
    ) -> None:  # fmt: skip
        """`source` tells what is made of what: what a killed run with the same one has done stands in the journals."""
        out = real_place(out)
        self.out, self.partition, self.append = out, partition, append
        plain = re.fullmatch(r"[^./\\][^/\\]*", partition) and partition.isprintable()
        if not plain or len(partition.encode()) > 255:
            raise ConfigError(f"partition name {partition!r} must be a plain folder name")
        self.content: dict[str, Any] = {"catalogue": [], PARTITIONS: [], "text": "tokens"}
        self.staging = out / UNFINISHED if append else aside_of(out)
        try:
            recover(out)
            if append:
                self.content = self._open_for_append()
            else:
                _check_free(out, overwrite)
            self._lock = _claim(self.staging, out)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            raise ConfigError(
                f"{out} cannot be written ({error.strerror}: {error.filename}); choose another --out"
            ) from None
        self.spool = self.staging / "spool"
        places = {"source": source, "partition": partition, "before": self.content}
        fingerprint = hashlib.sha256(json.dumps(places, sort_keys=True).encode()).hexdigest()
        self.reading, self.writing = (Journal(self.spool / name, fingerprint) for name in (READING, WRITING))
        if self.reading.state is None:
            _clear(self.staging)
            self.spool.mkdir()
        self.read: State | None = None  # how everything stands after the reading
        self.written: State = dict(self.writing.state or {})
        if append and not (self.staging / PREVIOUS_SCHEMA).exists():
            shutil.copyfile(out / SCHEMA_FILE, self.staging / PREVIOUS_SCHEMA)
        self.partition_dir = self.staging / PARTITIONS / partition
        for folder in (self.partition_dir, self.staging / CATALOGUE):
            folder.mkdir(parents=True, exist_ok=True)
        self._kept = out.parent / f"{out.name}.{QUARANTINE_FILE}"
        self.quarantine = Quarantine(self.staging / QUARANTINE_FILE, self._kept, partition, max_bad_fraction)

    @property
    def tokenizer_dir(self) -> Path:
        """Return the folder of the dataset's tokenizer; an appended partition uses the one that is there."""
        return (self.out if self.append else self.staging) / TOKENIZER

    @property
    def catalogue_file(self) -> Path:
        """Return where the new catalogue part goes."""
        return self.staging / CATALOGUE / f"{len(self.content['catalogue']):06d}.arrow"

    @property
    def catalogue_parts(self) -> list[Path]:
        """Return the catalogue files that the dataset has already."""
        return [self.out / part["file"] for part in self.content["catalogue"]]

    def identify(self, **ids: Literal["column", "content"]) -> None:
        """Note what tells documents (`doc`) and queries apart: a column of ids, or their features.

        Raises ConfigError where the dataset that grows has it otherwise: what it has would be added as new.
        """
        known = self.content.get("ids", ids if not self.append else {})
        for side, source in known.items():
            if ids[side] != source:
                fix = {"column": f"give --{side}-id-column", "content": f"leave out --{side}-id-column"}[source]
                raise ConfigError(
                    f"{self.out} tells each {side} by its {'id' if source == 'column' else 'features'}, so {fix} here, "
                    "too: else what it has already would be added as new"
                )
        self.content["ids"] = known

    def note(self, **parts: Any) -> None:
        """Note how far the writing is, where some time has passed since the last note; `parts` become the state's."""
        self.written |= parts
        if self.read is not None and self.writing.due:
            if self.reading.state is not self.read:
                self.reading.save(self.read, self.staging)
            self.writing.save(self.written, self.staging)

    def commit(
        self, schema: Schema, new_docs: int, catalogue_checksum: str, splits: dict[str, Any], counts: np.ndarray
    ) -> None:
        """Write the partition's and the dataset's JSON and move everything into place."""
        self.quarantine.close()
        np.save(self.partition_dir / "counts.npy", counts)
        described = {"name": self.partition, "splits": splits, "num_docs": len(counts)}
        described["counts_checksum"] = file_checksum(self.partition_dir / "counts.npy", bits=64)
        if parts := sorted(self.partition_dir.glob("sequences-*.arrow")):
            rows = MappedTable(parts).file_rows
            described["sequences"] = [
                {"file": path.name, "rows": count, "checksum": file_checksum(path, bits=64)}
                for path, count in zip(parts, rows, strict=True)
            ]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        write_json(self.partition_dir / "partition.json", {**described, "fingerprint": digest[:16]})
        catalogue = list(self.content["catalogue"])
        if new_docs:
            file = f"{CATALOGUE}/{self.catalogue_file.name}"
            catalogue.append({"file": file, "rows": new_docs, "checksum": catalogue_checksum})
        dataset = {
            "format": FORMAT,
            "name": self.out.resolve().name,
            "schema": schema.fingerprint(),
            "text": self.content["text"],
            "ids": self.content["ids"],
            "tokenizer": self._tokenizer_checksums(),
            "catalogue": catalogue,
            PARTITIONS: [*self.content[PARTITIONS], self.partition],
        }
        schema = schema.save(self.staging)
        write_json(self.staging / DATASET_FILE, dataset)
        for name in (READING, WRITING):  # first: they speak of what is removed now
            (self.spool / name).unlink(missing_ok=True)
        shutil.rmtree(self.spool)
        if self.append:
            self._move_in(new_docs, schema)
        else:
            self._replace()

    def _tokenizer_checksums(self) -> dict[str, str]:
        """Return the checksum of each of the tokenizer's files; an append repeats those that are recorded."""
        if self.append:
            return dict(self.content.get(TOKENIZER, {}))
        return {path.name: file_checksum(path, bits=64) for path in sorted(self.tokenizer_dir.glob("*"))}

    def _open_for_append(self) -> dict[str, Any]:
        content = read_dataset_json(self.out)
        previous = self.out / UNFINISHED / PREVIOUS_SCHEMA
        if Schema.load(self.out).fingerprint() != content["schema"] and previous.exists():
            os.replace(previous, self.out / SCHEMA_FILE)  # an append was killed between its last two renames
        if self.partition in content[PARTITIONS]:
            raise DataError(f"{self.out} has a partition {self.partition!r} already; partitions are never rewritten")
        return {"text": "tokens", **content}

    def _move_in(self, new_docs: int, schema: Schema) -> None:
        if new_docs:
            os.replace(self.catalogue_file, self.out / CATALOGUE / self.catalogue_file.name)
        place = self.out / PARTITIONS / self.partition
        remove(place)  # dataset.json does not know it: a killed run's
        os.replace(self.partition_dir, place)
        with (self.out / QUARANTINE_FILE).open("ab") as target:
            target.write(self.quarantine.path.read_bytes())
        (self.out / VOCABULARIES).mkdir(exist_ok=True)
        for part in schema.vocabulary_files:  # those that were there are other names of the same files
            os.replace(part.path, self.out / VOCABULARIES / part.path.name)
        os.replace(self.staging / SCHEMA_FILE, self.out / SCHEMA_FILE)
        os.replace(self.staging / DATASET_FILE, self.out / DATASET_FILE)
        shutil.rmtree(self.staging)
        self._lock.close()

    def _replace(self) -> None:
        (self.staging / LOCK).unlink()
        replace_folder(self.staging, self.out)
        self._lock.close()

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(value, OSError) and value.errno in NO_ROOM and not value.filename:  # a write has no name to give
            value.filename = str(self.staging)
        self.quarantine.close()
        useless = kind is not None and (issubclass(kind, BigDSSMError) or self.reading.state is None)
        if useless and self.staging.exists():
            if self.quarantine.num_bad:
                shutil.copyfile(self.quarantine.path, self._kept)
            shutil.rmtree(self.staging)
        self._lock.close()


def read_dataset_json(folder: Path) -> dict[str, Any]:
    """Return the content of a dataset's dataset.json. Raises DataError where it is missing or not of this format."""
    path = folder / DATASET_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["format"] == FORMAT
    except FileNotFoundError:
        raise DataError(f"{folder} is no dataset: it has no {DATASET_FILE}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error!r}") from None
    if not known:
        raise DataError(
            f"{path} has format {content['format']}, this version reads {FORMAT}; make it again with make_shards"
        )
    return dict(content)


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out} is a file, needs a folder; choose another --out")
    if (out / DATASET_FILE).exists():
        if not overwrite:
            raise DataError(f"{out} holds a dataset already; use --overwrite, --append NAME or another --out")
    elif any(out.iterdir()):
        raise DataError(f"{out} is not empty and holds no dataset; choose another --out")


def _claim(staging: Path, out: Path) -> Any:
    """Return the locked lock file of a staging folder. Raises DataError where another process works in it."""
    staging.mkdir(parents=True, exist_ok=True)
    lock = (staging / LOCK).open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise DataError(f"another process is writing {out}; wait for it or choose another --out") from None
    return lock


def _clear(staging: Path) -> None:
    for path in staging.iterdir():
        if path.name != LOCK:
            remove(path)
