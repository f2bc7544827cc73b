"""Plain WebDataset shards by other writers as a table: one row a sample, its columns out of the members that are text.

    x.json         the object's keys are columns       x.query.txt    column `query`
    x.doc.json     columns `doc.<key>`                 x.txt          column `txt`
                                                       __key__        what stands before the first dot

Other members (images, …) are skipped unread. Nothing is unpickled, no command is run, no key becomes a path. A shard
that was cut or has a damaged header is refused: webdataset's reader would end there as if it were whole.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.tariterators import group_by_keys, tar_file_iterator

from bigdssm.errors import DataError
from bigdssm.tables.sources import (
    BYTES_PER_BATCH,
    MAX_LINE_BYTES,
    ROWS_PER_BATCH,
    ReportBad,
    SourceBatch,
    open_source,
    parse_object,
    record_batch,
    split_suffix,
    stream_source,
)

UNPICKLED_SUFFIXES = ("pyd", "pickle", "pkl", "pth")
TEXT_SUFFIXES = ("txt", "text", "json", "cls", "id")
KEY = "__key__"


def is_shard(path: Path) -> bool:
    """Return True where the name is that of a tar, also a compressed one."""
    return split_suffix(path)[0] == ".tar"


def read_shard(path: Path, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
    """Yield the samples of a shard that `check_shard` passes, in order, with exactly `columns`; bad ones are reported.

    Raises DataError: no samples, a member twice in a sample, or no column of a name (naming the nearest).
    """
    records: list[dict[str, Any]] = []
    rows: list[int] = []
    num_bytes, checked = 0, False
    with stream_source(path, split_suffix(path)[1]) as stream:
        for row, sample in enumerate(_samples(path, stream), 1):
            try:
                records.append(record_of(sample))
            except (ValueError, RecursionError) as error:
                report_bad(str(path), row, f"sample {sample[KEY]!r}: {error}")
                continue
            rows.append(row)
            num_bytes += sum(len(content) for content in sample.values())
            if len(records) >= ROWS_PER_BATCH or num_bytes >= BYTES_PER_BATCH:
                yield record_batch(path, records, rows, columns, checked, report_bad)
                records, rows, num_bytes, checked = [], [], 0, True
    if records:
        yield record_batch(path, records, rows, columns, checked, report_bad)
    elif not checked:
        raise DataError(f"{path} has no usable samples")


def check_shard(path: Path) -> None:
    """Raise DataError unless every header of the tar is whole and no member is one that readers unpickle."""
    if str(path).startswith("pipe:"):
        raise DataError(f"{path}: commands are not run; write their output to a .tar first")
    if not path.is_file():
        raise DataError(f"shard {path} does not exist")
    last = "the beginning"
    with open_source(path, split_suffix(path)[1]) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    setattr(tar, "members", [])  # noqa: B010 (not in its stubs; it would keep them all)
                    last = f"member {member.name!r}"
                    if member.name.lower().endswith(tuple(f".{suffix}" for suffix in UNPICKLED_SUFFIXES)):
                        raise DataError(f"{path}: {last} holds code for whoever unpickles it; refused, leave it out")
                    if is_text(member.name) and member.size > MAX_LINE_BYTES:
                        raise DataError(
                            f"{path}: {last} has {member.size:,} bytes, at most {MAX_LINE_BYTES:,} are read"
                        )
                stream.seek(tar.offset)
                end = stream.read(tarfile.BLOCKSIZE)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"{path} is damaged or cut behind {last}: {error}") from None
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise DataError(f"{path} is damaged or cut behind {last}: no end of a tar stands there; get it again")


def _samples(path: Path, stream: BinaryIO) -> Iterator[dict[str, Any]]:
    members = tar_file_iterator(stream, select_files=is_text)
    try:
        yield from group_by_keys({**member, "__url__": str(path)} for member in members)
    except ValueError as error:  # a member of one name twice in a sample
        raise DataError(f"{path}: {error.args[0]}; give every sample a key of its own") from None


def is_text(name: str) -> bool:
    """Return True where a member's name says that its content is text."""
    return name.lower().endswith(tuple(f".{suffix}" for suffix in TEXT_SUFFIXES))


def record_of(sample: dict[str, Any]) -> dict[str, Any]:
    """Return a sample's columns. Raises ValueError: not UTF-8, no JSON object, or a column that comes twice."""
    record: dict[str, Any] = {KEY: sample[KEY]}
    for suffix, content in sample.items():
        if suffix.startswith("__"):
            continue
        name, _, kind = suffix.rpartition(".")
        try:
            text = content.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"invalid UTF-8 in .{suffix} at byte {error.start}") from None
        found = _columns(suffix, name, text) if kind == "json" else {name or kind: text}
        for column in found:
            if column in record:
                raise ValueError(f"column {column!r} comes from .{suffix} and from another member")
        record |= found
    return record


def _columns(suffix: str, name: str, text: str) -> dict[str, Any]:
    try:
        content = parse_object(text)
    except json.JSONDecodeError as error:
        raise ValueError(f".{suffix} is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f".{suffix} is {error}") from None
    return {f"{name}.{key}" if name else key: value for key, value in content.items()}
