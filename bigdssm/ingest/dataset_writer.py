"""Makes a dataset folder appear whole or not at all, and lets one grow by immutable partitions.

A new dataset is written into a hidden folder beside its place and renamed; a partition is written into a hidden folder
inside the dataset and moved in, `dataset.json` replaced last. What a killed run finished is taken up by the next one,
if it makes the same of the same; else it is cleared.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from bigdssm.dataset.partition import FORMAT, read_dataset_json
from bigdssm.dataset.remote import KEYS_SUFFIX
from bigdssm.dataset.schema import SCHEMA_FILE, VOCABULARIES, Schema
from bigdssm.errors import ConfigError, DataError, UnavailableError
from bigdssm.features.columns import TimeUnits
from bigdssm.ingest.reading import Quarantine
from bigdssm.utils.atomic import (
    UNFINISHED,
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
from bigdssm.utils.locks import WriterLock, lock_path

DATASET_FILE, QUARANTINE_FILE = "dataset.json", "quarantine.jsonl"
TOKENIZER, CATALOGUE, VERSIONS, PARTITIONS = "tokenizer", "catalogue", "versions", "partitions"
AS_OF = {"users": "rows", "items": "events"}  # what sees features that change as of its time
SPLIT = "split"  # how the first partition was split, as an append without --split is
TIMES = "times"  # of events: in which units they are
LOCK = ".lock"  # inside a dataset that grows or is replaced
PREVIOUS_SCHEMA = "schema.previous.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DatasetWriter:
    """A dataset being made: write into `partition_dir`, `tokenizer_dir` and `catalogue_dir`, then `commit`.

    As a context manager it clears up after an error in the data or the config, keeping the quarantine as
    OUT.quarantine.jsonl.
    """

    def __init__(
        self, out: Path, partition: str, max_bad_fraction: float, *, source: str, overwrite: bool = False,
        append: bool = False,
    ) -> None:  # fmt: skip
        """`source` tells what is made of what: a making goes on with what a killed one of the same has finished."""
        out = real_path(out)
        self.out, self.partition, self.append = out, partition, append
        plain = re.fullmatch(r"[^./\\][^/\\]*", partition) and partition.isprintable()
        if not plain or len(partition.encode()) > 255:
            raise ConfigError(f"partition name {partition!r} must be a plain folder name")
        self.content: dict[str, Any] = {"catalogue": [], PARTITIONS: [], "text": "tokens"}
        self.staging = out / UNFINISHED if append else temporary_path(out)
        self._locks = ExitStack()
        try:
            self._claim()
            self._open(overwrite)
        except OSError as error:
            self._locks.close()
            if error.errno in NO_ROOM:
                raise
            raise ConfigError(
                f"{out} cannot be written ({error.strerror}: {error.filename}); choose another --out"
            ) from None
        except BaseException:
            self._locks.close()
            raise
        places = {"source": source, "partition": partition, "before": self.content}
        made_of = hashlib.sha256(json.dumps(places, sort_keys=True).encode()).hexdigest()
        # By what is made: a worker that a killed making of something else has left behind finds its folder gone.
        self.spool = self.staging / f"spool-{made_of[:16]}"
        # Where it is put when it is not needed any more, before the dataset gets its name.
        self._used_spool = self.staging.with_name(f"{self.staging.name}-spool")
        self._take_up()
        if append and not (self.staging / PREVIOUS_SCHEMA).exists():
            shutil.copyfile(out / SCHEMA_FILE, self.staging / PREVIOUS_SCHEMA)
        self.partition_dir = self.staging / PARTITIONS / partition
        self.catalogue_dir = self.staging / CATALOGUE  # its new files
        self.tokenizer_dir = (out if append else self.staging) / TOKENIZER  # an appended partition uses what is there
        for folder in (self.partition_dir, self.catalogue_dir):
            folder.mkdir(parents=True, exist_ok=True)
        kept = out.parent / f"{out.name}.{QUARANTINE_FILE}"
        self.quarantine = Quarantine(self.staging / QUARANTINE_FILE, kept, partition, max_bad_fraction)

    def _claim(self) -> None:
        """Lock the place. Raises DataError where another process writes there.

        Nothing that a decision depends on is read before: another process may be about to change it.
        """
        if not self.append:
            self.out.parent.mkdir(parents=True, exist_ok=True)
        # An append needs no access to the folder around the dataset, except where a replacement was killed.
        if not self.append or (not self.out.exists() and self.out.parent.is_dir()):
            self._locks.enter_context(WriterLock(lock_path(self.out), self.out))
            recover(self.out)
        if (self.out / DATASET_FILE).exists():
            self._locks.enter_context(WriterLock(self.out / LOCK, self.out))

    def _open(self, overwrite: bool) -> None:
        """Read what the dataset has, and make the folder that is filled."""
        if self.append:
            self.content = self._open_for_append()
        else:
            _check_free(self.out, overwrite)
        self.staging.mkdir(parents=True, exist_ok=True)

    def _take_up(self) -> None:
        """Keep what a killed run left where it was made of the same, else clear it."""
        remove(self._used_spool)
        if not self.spool.exists():
            for left in self.staging.iterdir():
                remove(left)
            self.spool.mkdir()

    @property
    def catalogue_parts(self) -> list[Path]:
        """Return the catalogue files that the dataset has already."""
        return [self.out / part["file"] for part in self.content["catalogue"]]

    @property
    def num_known_docs(self) -> int:
        """Return the documents that the dataset has already."""
        return sum(part["rows"] for part in self.content["catalogue"])

    @property
    def key_files(self) -> list[Path]:
        """Return the key files of the documents that the dataset has already; not every part has its own."""
        return [keys for path in self.catalogue_parts if (keys := path.with_suffix(KEYS_SUFFIX)).exists()]

    @property
    def new_key_file(self) -> Path:
        """Return the place of the new documents' key file: beside their first part."""
        return self.catalogue_dir / f"{len(self.catalogue_parts):06d}{KEYS_SUFFIX}"

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

    def record_times(self, side: Literal["users", "items"], dated: bool) -> None:
        """Note whether features of users are those as of each row, or those of items those as of each event.

        Raises ConfigError where it is otherwise in the dataset that grows.
        """
        known = side in self.content if self.append else dated
        if known != dated:
            one = f"one row of features for each {side[:-1]}"
            have = f"{side}' features as of each {AS_OF[side][:-1]}" if known else one
            fix = "give" if known else "leave out"
            raise ConfigError(f"{self.out} has {have}, so {fix} --{side}-time-column here, too")
        if dated:
            self.content[side] = AS_OF[side]

    def note_event_times(self, has_times: bool) -> None:
        """Note whether events have times. Raises ConfigError where it is otherwise in the dataset that grows."""
        if self.append and (TIMES in self.content) != has_times:
            if has_times:
                raise ConfigError(
                    f"{self.out} has no times of its events, to compare these with; leave out the time column here, "
                    "too (--time-column ''), or make the dataset again with one"
                )
            raise ConfigError(f"{self.out} has times of its events, so give --time-column here, too")
        if has_times:
            self.content.setdefault(TIMES, TimeUnits().facts())

    def commit(
        self, schema: Schema, catalogue: list[dict[str, Any]], versions: list[dict[str, Any]], splits: dict[str, Any],
        counts_checksum: str, sequences: Sequence[dict[str, Any]],
    ) -> None:  # fmt: skip
        """Write the partition's and the dataset's JSON and move everything into place.

        `catalogue` are the files of new documents, `versions` those of known ones with other features.
        """
        self.quarantine.close()
        described: dict[str, Any] = {"name": self.partition, "splits": splits, "counts_checksum": counts_checksum}
        if sequences:
            described["sequences"] = list(sequences)
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        write_json(self.partition_dir / "partition.json", {**described, "fingerprint": digest[:16]})
        new = [{**part, "file": f"{CATALOGUE}/{part['file']}"} for part in catalogue]
        newer = [{**part, "file": f"{CATALOGUE}/{part['file']}", "since": self.partition} for part in versions]
        newer = [*self.content.get(VERSIONS, []), *newer]
        dataset = {
            "format": FORMAT,
            "name": self.out.resolve().name,
            "schema": schema.fingerprint(),
            "text": self.content["text"],
            "ids": self.content["ids"],
            **{name: self.content[name] for name in (*AS_OF, SPLIT, TIMES) if name in self.content},
            **({VERSIONS: newer} if newer else {}),
            "tokenizer": self._tokenizer_checksums(),
            "catalogue": [*self.content["catalogue"], *new],
            PARTITIONS: [*self.content[PARTITIONS], self.partition],
        }
        schema = schema.save(self.staging)
        write_json(self.staging / DATASET_FILE, dataset)
        for path in self.staging.rglob("*"):
            if path.is_file() and not path.is_relative_to(self.spool):
                sync(path)
        os.replace(self.spool, self._used_spool)  # not removed, which takes time: a kill until then loses nothing
        if self.append:
            self._move_in(schema)
        else:
            replace_folder(self.staging, self.out)
        remove(self._used_spool)
        self._locks.close()

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

    def _move_in(self, schema: Schema) -> None:
        for path in sorted(self.catalogue_dir.iterdir()):
            os.replace(path, self.out / CATALOGUE / path.name)
        place = self.out / PARTITIONS / self.partition
        remove(place)  # dataset.json does not know it: a killed run's
        os.replace(self.partition_dir, place)
        self._join_quarantine(self.out / QUARANTINE_FILE)
        (self.out / VOCABULARIES).mkdir(exist_ok=True)
        for part in schema.vocabulary_files:  # those that were there are other names of the same files
            os.replace(part.path, self.out / VOCABULARIES / part.path.name)
        os.replace(self.staging / SCHEMA_FILE, self.out / SCHEMA_FILE)
        os.replace(self.staging / DATASET_FILE, self.out / DATASET_FILE)
        shutil.rmtree(self.staging)

    def _join_quarantine(self, path: Path) -> None:
        """Add the partition's bad rows to the dataset's, once: a killed making may have done it."""
        with new_file(path) as aside, aside.open("w", encoding="utf-8") as target:
            with path.open(encoding="utf-8") as known:
                target.writelines(line for line in known if json.loads(line)["partition"] != self.partition)
            with self.quarantine.path.open(encoding="utf-8") as own:
                target.writelines(own)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(value, OSError) and value.errno in NO_ROOM and not value.filename:  # a write has no name to give
            value.filename = str(self.staging)
        self.quarantine.close()
        told = kind is not None and issubclass(kind, (ConfigError, DataError))
        if told and not isinstance(value, UnavailableError) and self.staging.exists():
            if self.quarantine.num_bad:
                shutil.copyfile(self.quarantine.path, self.quarantine.kept)
            shutil.rmtree(self.staging)
        self._locks.close()

    def release(self) -> None:
        """Leave the making as a killed one would be left, nothing where nothing is finished."""
        self.quarantine.close()
        if not any(self.spool.iterdir()):
            shutil.rmtree(self.staging)
        self._locks.close()


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
