"""A log of answered requests as a table of Parquet files, written by a thread of each worker."""

import fcntl
import json
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.features import Categorical, Column, Feature, History, Numeric
from bigdssm.features.base import FIRST_CODE
from bigdssm.features.conditions import conditions, parse_filter
from bigdssm.retrieval.queries import DocumentNames, first_users
from bigdssm.serving.searcher import Searcher
from bigdssm.utils.atomic import Changes, new_file
from bigdssm.utils.log import get_logger

if TYPE_CHECKING:
    from prometheus_client import Counter as PrometheusCounter

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
        "cached": pa.bool_(),  # null: `forget_in_log` changed the row
    }
)
FLUSH_S, ROLL_S, ROLL_BYTES = 1.0, 600.0, 64 << 20
MOST_WAITING = 10_000  # records of a worker
PART, COMPLETE = ".part", ".parquet"  # suffixes of an open Arrow stream, and of a file that no one changes
NAME_TIME = "%Y%m%dT%H%M%SZ"  # the beginning of names: when a file was opened
DAY_S = 86_400
COMPARED_KEYS = 1000  # of users, or of items
LEAST_SHARE = 0.25  # of keys that are values of a feature: an id, and not such as an age
logger = get_logger(__name__)


def _row(
    request: str, answered: float, content: str, columns: Mapping[str, Column], documents: Sequence[Mapping[str, Any]],
    searcher: Searcher, cached: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return the row of COLUMNS of an answer; `content` is the request, JSON."""
    body = {name: value for name, value in json.loads(content).items() if value is not None}
    model, index = searcher.versions
    return {
        "request": request, "time": answered, "user": body.get("user"), "body": json.dumps(body, ensure_ascii=False),
        "features": json.dumps(searcher.queries.decoded(columns), ensure_ascii=False),
        "filter": body.get("filter"), "exclude": body.get("exclude"), "model": model, "index": index,
        "document": [document["key"] for document in documents],
        "score": [document["score"] for document in documents], "cached": cached,
    }  # fmt: skip


class RequestLog:
    """Writes answers to `folder`, and removes its files of more than `days` days ago.

    A record is in a file within FLUSH_S, and in a complete one within ROLL_S or ROLL_BYTES. An open file of a process
    that was killed is completed by the next writer.
    """

    def __init__(self, folder: Path, days: float, counter: "PrometheusCounter") -> None:
        """`counter` has the label `result`: written or lost. Raises ConfigError: the folder cannot be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _open_part(folder).close()
        except OSError as error:
            raise ConfigError(
                f"--log-requests {folder}: cannot write: {error.strerror}; choose another folder"
            ) from None
        self._folder, self._days, self._counter = folder, days, counter
        # Rows of answers to compute: features are decoded by the writing thread.
        self._waiting: queue.Queue[Callable[[], dict[str, Any]]] = queue.Queue(MOST_WAITING)
        self._stop = threading.Event()
        self._part: BinaryIO | None = None
        self._thread = threading.Thread(target=self._run, name="request log", daemon=True)
        self._thread.start()

    def put(self, body: str, columns: Mapping[str, Column], documents: Sequence[Mapping[str, Any]], searcher: Searcher,
            cached: bool) -> str:  # fmt: skip
        """Log an answer without waiting, and return the id of the request; if the queue is full, it is lost."""
        request = uuid.uuid4().hex
        try:
            self._waiting.put_nowait(partial(_row, request, time.time(), body, columns, documents, searcher, cached))
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
                is_full = self._part is not None and self._part.tell() >= ROLL_BYTES
                if stopping or is_full or time.monotonic() >= self._roll_at:  # without a file, too: old ones
                    self._roll()
            except Exception as error:  # such as a full disk: requests are answered all the same
                self._part = None
                logger.warning("%s: cannot write: %s; the next file is tried", self._folder, error)

    def _write(self, answers: Sequence[Callable[[], dict[str, Any]]]) -> None:
        try:
            batch = pa.RecordBatch.from_pylist([row() for row in answers], COLUMNS)
            if self._part is None:
                self._part = _open_part(self._folder)
                self._writer = pa.ipc.new_stream(self._part, COLUMNS)
            self._writer.write_batch(batch)
            self._part.flush()
        except BaseException:
            self._counter.labels("lost").inc(len(answers))
            raise
        self._counter.labels("written").inc(len(answers))

    def _roll(self) -> None:
        """Complete the open file and those of killed processes, and remove old ones."""
        self._roll_at = time.monotonic() + ROLL_S
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


def forget_in_log(
    folder: Path, users: Collection[str], items: Collection[str], changes: Changes, titles: Collection[str] = (),
    dataset: Dataset | None = None,
) -> list[Path]:  # fmt: skip
    """Remove the requests of `users`, and empty `items` (keys), their `titles`, and `users` in those of others.

    Whole values are compared, in every field that may have ids of the kind: a user and an item may have the same id,
    and with a `dataset` numbers and categories without ids are known. A part of a longer text stays. Positions of other
    documents stay, and `cached` of a changed row is null. Returns files that a server is writing, which are not
    changed: they are complete after ROLL_S at the latest.
    """
    in_use = complete_parts(folder) if not changes.dry_run else sorted(folder.glob(f"*{PART}"))
    ids = _Ids(users, items, titles, dataset)
    for path in sorted(folder.glob(f"*{COMPLETE}")):
        before = pq.read_table(path).to_pylist()
        rows = [ids.rewrite(row) for row in before if not ids.is_of_user(row)]
        if not rows:
            changes.remove(path)
        elif rows != before:
            with changes.new_file(path) as temporary:
                pq.write_table(pa.Table.from_pylist(rows, COLUMNS), temporary, compression="zstd")
    return in_use


class _Ids:
    """Forgotten ids, and the fields of a row that may have them."""

    def __init__(
        self, users: Collection[str], items: Collection[str], titles: Collection[str], dataset: Dataset | None
    ) -> None:
        self.users, self.items = frozenset(users), frozenset(items)
        # of the items, as in requests
        self.names = DocumentNames(sorted(items), sorted(title for title in titles if title.strip()))
        # Names of features without such ids, those of events with a dot before; of unknown ones nothing is excluded.
        self.without_users: Collection[str] = ()
        self.without_items: Collection[str] = ()
        self.numeric: Collection[str] = ()  # features of filters
        if dataset is not None:
            features = {**dataset.schema.query, **{f".{name}": f for name, f in dataset.schema.event.items()}}
            user_keys = [] if dataset.sequences is None else first_users(dataset.sequences, COMPARED_KEYS)
            item_keys = dataset.catalogue.keys(np.arange(min(COMPARED_KEYS, dataset.catalogue.num_docs)))
            self.without_users = {name for name, feature in features.items() if not _has_ids(feature, user_keys)}
            self.without_items = {
                name
                for name, feature in features.items()
                if not isinstance(feature, History) and not _has_ids(feature, item_keys)
            }
            filters = dataset.catalogue.filterable
            self.numeric = {name for name, feature in filters.items() if isinstance(feature, Numeric)}

    def is_of_user(self, row: Mapping[str, Any]) -> bool:
        """Return whether the user, or a single value of a query feature, is one of `users`."""
        body = json.loads(row["body"])
        values = [row["user"], body.get("user")]
        for features in (body.get("features") or {}, json.loads(row["features"])):
            values += [value for name, value in features.items() if "." not in name and name not in self.without_users]
        return any(_text(value) in self.users for value in values)

    def rewrite(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the row without items, and without users as values of the features of others."""
        body, features = json.loads(row["body"]), json.loads(row["features"])
        for values in (row_filter := {"filter": row["filter"]}, body):
            if self._is_in_filter(values.get("filter")):
                values["filter"] = None
        if body.get("document") in self.items:  # the features are those of the item
            body["document"], features = None, {}
        if body.get("exclude"):
            body["exclude"] = [key for key in body["exclude"] if key not in self.items]
        if body.get("events"):
            unknown = self.names.rows([event["item"] for event in body["events"]]) < 0
            body["events"] = list(compress(body["events"], unknown.tolist()))
        features = {name: self._emptied(name, value) for name, value in features.items()}
        if body.get("features"):
            body["features"] = self._requested(body["features"])
        for event in body.get("events") or ():
            if event.get("features"):
                event["features"] = self._requested(event["features"], ".")
        if body.get("context"):
            body["context"] = self._requested(body["context"], ".")
        exclude = row["exclude"] and [key for key in row["exclude"] if key not in self.items]
        documents = [None if key in self.items else key for key in row["document"]]
        new = {**row, **row_filter, "exclude": exclude, "document": documents}
        for name, content in (("body", body), ("features", features)):
            if content != json.loads(row[name]):
                new[name] = json.dumps(content, ensure_ascii=False)
        return new if new == row else new | {"cached": None}

    def _emptied(self, name: str, value: Any) -> Any:
        """Return a feature's value with null in place of ids; features of events are HISTORY.NAME, or .NAME."""
        _, dot, event = name.partition(".")
        name = dot + event or name
        ids: set[str] = set()
        if name not in self.without_items:
            ids |= self.items
        if name not in self.without_users:
            ids |= self.users
        if isinstance(value, list):
            return [None if _text(element) in ids else element for element in value]
        return None if _text(value) in ids else value

    def _requested(self, features: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """Return the features of a request without ids; a list is shorter, since null is no element of one."""
        emptied = {name: self._emptied(prefix + name, value) for name, value in features.items()}
        return {
            name: [element for element in value if element is not None] if isinstance(value, list) else value
            for name, value in emptied.items()
        }

    def _is_in_filter(self, text: str | None) -> bool:
        if text is None:
            return False
        try:
            parts = [part for part in conditions(parse_filter(text)) if part.feature not in self.numeric]
        except ConfigError:
            return True
        values = [str(value) for part in parts for value in part.values]
        return bool((self.names.rows(values) >= 0).any()) or any(value.strip() in self.users for value in values)


def _has_ids(feature: Feature, keys: Sequence[str]) -> bool:
    """Return whether the values of a feature are ids of users, or of items, to judge by some of their keys."""
    if not isinstance(feature, Categorical):
        return False
    if feature.hash_buckets or not keys:
        return True
    codes = np.asarray(feature.codes(pa.array(keys, pa.large_string())))
    return bool((codes >= FIRST_CODE).mean() >= LEAST_SHARE)


def _text(value: Any) -> str | None:
    """Return a single value as the text of an id."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        return value.strip()
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
