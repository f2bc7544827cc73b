"""A log of answered requests as a table of Parquet files, written by a thread of each worker."""

from __future__ import annotations

import fcntl
import json
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from bigdssm.errors import ConfigError
from bigdssm.features import Column
from bigdssm.serving.searcher import Searcher
from bigdssm.utils.atomic import new_file
from bigdssm.utils.changes import Changes
from bigdssm.utils.log import get_logger

if TYPE_CHECKING:
    from prometheus_client import Counter

COLUMNS = pa.schema(
    {
        "request": pa.string(),  # id, that of the answer
        "time": pa.float64(),  # of the answer, seconds since 1970
        "user": pa.string(),
        "body": pa.string(),  # the request, JSON
        "features": pa.string(),  # of the query as the model read them, JSON
        "filter": pa.string(),
        "exclude": pa.list_(pa.string()),
        "model": pa.string(),  # checksum
        "index": pa.string(),
        "document": pa.list_(pa.string()),  # keys of the answer, in the order shown
        "score": pa.list_(pa.float64()),
        "cached": pa.bool_(),
    }
)
FLUSH_S, ROLL_S, ROLL_BYTES = 1.0, 600.0, 64 << 20
MOST_WAITING = 10_000  # records of a worker
PART, COMPLETE = ".part", ".parquet"  # suffixes of an open Arrow stream, and of a file that no one changes
NAME_TIME = "%Y%m%dT%H%M%SZ"  # the beginning of names: when a file was opened
DAY_S = 86_400
logger = get_logger(__name__)


@dataclass(frozen=True)
class LoggedAnswer:
    """An answer that waits for being written; features are decoded by the writing thread."""

    request: str
    time: float
    body: str
    columns: Mapping[str, Column]
    documents: Sequence[Mapping[str, Any]]
    searcher: Searcher
    cached: bool

    def row(self) -> dict[str, Any]:
        """Return the row of COLUMNS."""
        body = {name: value for name, value in json.loads(self.body).items() if value is not None}
        model, index = self.searcher.versions
        return {
            "request": self.request, "time": self.time, "user": body.get("user"),
            "body": json.dumps(body, ensure_ascii=False),
            "features": json.dumps(self.searcher.queries.decoded(self.columns), ensure_ascii=False),
            "filter": body.get("filter"), "exclude": body.get("exclude"), "model": model, "index": index,
            "document": [document["key"] for document in self.documents],
            "score": [document["score"] for document in self.documents], "cached": self.cached,
        }  # fmt: skip


class RequestLog:
    """Writes answers to `folder`, and removes its files of more than `days` days ago.

    A record is in a file within FLUSH_S, and in a complete one within ROLL_S or ROLL_BYTES. An open file of a process
    that was killed is completed by the next writer.
    """

    def __init__(self, folder: Path, days: float, counter: Counter) -> None:
        """`counter` has the label `result`: written or lost. Raises ConfigError: the folder cannot be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _open_part(folder).close()
        except OSError as error:
            raise ConfigError(
                f"--log-requests {folder}: cannot write: {error.strerror}; choose another folder"
            ) from None
        self._folder, self._days, self._counter = folder, days, counter
        self._waiting: queue.Queue[LoggedAnswer] = queue.Queue(MOST_WAITING)
        self._stop = threading.Event()
        self._part: BinaryIO | None = None
        self._thread = threading.Thread(target=self._run, name="request log", daemon=True)
        self._thread.start()

    def put(self, body: str, columns: Mapping[str, Column], documents: Sequence[Mapping[str, Any]], searcher: Searcher,
            cached: bool) -> str:  # fmt: skip
        """Log an answer without waiting, and return the id of the request; if the queue is full, it is lost."""
        request = uuid.uuid4().hex
        try:
            self._waiting.put_nowait(LoggedAnswer(request, time.time(), body, columns, documents, searcher, cached))
        except queue.Full:
            self._counter.labels("lost").inc()
        return request

    def close(self) -> None:
        """Write all waiting records, and complete the file."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        stopping = False
        self._roll()
        while not stopping:
            stopping = self._stop.wait(FLUSH_S)
            answers = [self._waiting.get_nowait() for _ in range(self._waiting.qsize())]
            try:
                if answers:
                    self._write(answers)
                if self._part is not None and (
                    stopping or time.monotonic() >= self._roll_at or self._part.tell() >= ROLL_BYTES
                ):
                    self._roll()
            except Exception as error:  # such as a full disk: requests are answered all the same
                self._part = None
                logger.warning("%s: cannot write: %s; the next file is tried", self._folder, error)

    def _write(self, answers: Sequence[LoggedAnswer]) -> None:
        try:
            batch = pa.RecordBatch.from_pylist([answer.row() for answer in answers], COLUMNS)
            if self._part is None:
                self._part, self._roll_at = _open_part(self._folder), time.monotonic() + ROLL_S
                self._writer = pa.ipc.new_stream(self._part, COLUMNS)
            self._writer.write_batch(batch)
            self._part.flush()
        except BaseException:
            self._counter.labels("lost").inc(len(answers))
            raise
        self._counter.labels("written").inc(len(answers))

    def _roll(self) -> None:
        """Complete the open file and those of killed processes, and remove old ones."""
        if self._part is not None:
            part, self._part = self._part, None
            part.close()
        complete_parts(self._folder)
        oldest = time.strftime(NAME_TIME, time.gmtime(time.time() - self._days * DAY_S))
        for path in self._folder.glob(f"*{COMPLETE}"):
            if path.name < oldest:
                path.unlink(missing_ok=True)


def _open_part(folder: Path) -> BinaryIO:
    """Return a new open file, locked until it is closed or the process ends."""
    name = f"{time.strftime(NAME_TIME, time.gmtime())}-{os.getpid()}-{uuid.uuid4().hex[:8]}{PART}"
    part = (folder / name).open("xb")
    fcntl.flock(part, fcntl.LOCK_EX)
    return part


def complete_parts(folder: Path) -> list[Path]:
    """Write the complete records of open files without a writer as Parquet; return the files that have one."""
    in_use = []
    for path in sorted(folder.glob(f"*{PART}")):
        with suppress(FileNotFoundError), path.open("rb") as part:
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                in_use.append(path)
                continue
            complete = path.with_suffix(COMPLETE)
            # else it is complete since a process was killed before it removed the other
            if path.exists() and not complete.exists() and (batches := list(_batches(part))):
                with new_file(complete) as temporary:
                    pq.write_table(pa.Table.from_batches(batches, COLUMNS), temporary, compression="zstd")
            path.unlink()
    return in_use


def _batches(part: BinaryIO) -> Iterator[pa.RecordBatch]:
    """Yield the batches of an Arrow stream up to the one that was being written."""
    with suppress(pa.ArrowInvalid, OSError):
        yield from pa.ipc.open_stream(part)


def read_log(folder: Path) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a folder's complete files, oldest file first. Raises ConfigError: there are none."""
    paths = sorted(folder.glob(f"*{COMPLETE}"))
    if not paths:
        raise ConfigError(f"{folder} has no complete log of requests; give a folder of bigdssm serve --log-requests")
    for path in paths:
        yield from pq.ParquetFile(path).iter_batches(1024)


def forget_in_log(folder: Path, users: Collection[str], items: Collection[str], changes: Changes) -> list[Path]:
    """Remove the requests of `users`, and empty `items` (keys and titles) in those of others.

    A user's id also counts as a value of a request's features. Positions of other documents stay. Returns files that a
    server is writing, which are not changed: they are complete after ROLL_S at the latest.
    """
    in_use, item_ids = complete_parts(folder) if not changes.dry_run else sorted(folder.glob(f"*{PART}")), set(items)
    named = re.compile("|".join(rf"(?<!\w){re.escape(item)}(?!\w)" for item in item_ids)) if item_ids else None

    def without(value: Any, name: str = "") -> Any:
        if isinstance(value, str):
            is_named = value in item_ids or (name == "filter" and named is not None and named.search(value))
            return None if is_named else value
        if isinstance(value, dict):
            return {key: without(one, key) for key, one in value.items()}
        return [without(one) for one in value] if isinstance(value, list) else value

    def values(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list | dict):
            for one in value.values() if isinstance(value, dict) else value:
                yield from values(one)

    for path in sorted(folder.glob(f"*{COMPLETE}")):
        rows = []
        for row in pq.read_table(path).to_pylist():
            row |= {name: json.loads(row[name]) for name in ("body", "features")}
            if not set(users).isdisjoint(values([row["user"], row["body"], row["features"]])):
                continue
            row = without(row)
            for name in {"events", "exclude"} & set(row["body"]):
                entries = [one["item"] if name == "events" else one for one in row["body"][name]]
                row["body"][name] = list(compress(row["body"][name], [one is not None for one in entries]))
            rows.append(row | {name: json.dumps(row[name], ensure_ascii=False) for name in ("body", "features")})
        table = pa.Table.from_pylist(rows, COLUMNS)
        if not rows:
            changes.remove(path)
        elif not table.equals(pq.read_table(path)):
            with changes.new_file(path) as temporary:
                pq.write_table(table, temporary, compression="zstd")
    return in_use
