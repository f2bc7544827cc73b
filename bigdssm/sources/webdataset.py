"""WebDataset shards as tables: one row per sample, with columns from text members.

    x.json         the object's keys are columns       x.query.txt    column `query`
    x.doc.json     columns `doc.<key>`                 x.txt          column `txt`
                                                       __key__        the name up to the first dot

Other members (images, …) are skipped unread. Nothing is unpickled, no command is run, no key becomes a path. Truncated
shards and damaged headers are rejected; webdataset's reader would silently stop there.
"""

import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, ClassVar

from bigdssm.errors import DataError
from bigdssm.features.columns import ReportBad, SourceBatch
from bigdssm.sources.base import FileSource, Part, TableFile, register_source
from bigdssm.sources.text import MAX_RECORD_BYTES, Record, parse_object, record_batches

UNPICKLED_SUFFIXES = ("pyd", "pickle", "pkl", "pth")  # by webdataset's decoders
TEXT_SUFFIXES = ("txt", "text", "json", "cls", "id")
KEY = "__key__"


@register_source
class WebDatasetSource(FileSource):
    """A shard, with one row per sample."""

    suffixes: ClassVar[tuple[str, ...]] = (".tar",)
    compressible: ClassVar[bool] = True

    def split(self) -> Sequence[Part]:
        """Return a single part. Raises DataError: truncated or rejected, see `check_shard`."""
        check_shard(self.file)
        return super().split()

    def read(self, part: Part, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
        """Yield the samples; bad ones are reported.

        Raises DataError: no samples, or a duplicate member.
        """
        empty = True
        with self.file.stream() as stream:
            for batch in record_batches(self.name, self._records(stream, report_bad), columns, report_bad):
                empty = False
                yield batch
        if empty:
            raise DataError(f"{self.name} has no usable samples")

    def _records(self, stream: BinaryIO, report_bad: ReportBad) -> Iterator[tuple[int, Record, int]]:
        from webdataset.tariterators import group_by_keys, tar_file_iterator  # imports torch: seconds per worker

        members = ({**member, "__url__": self.name} for member in tar_file_iterator(stream, select_files=is_text))
        try:
            for row, sample in enumerate(group_by_keys(members), 1):
                try:
                    record = record_of(sample)
                except ValueError as error:
                    report_bad(self.name, row, f"sample {sample[KEY]!r}: {error}")
                    continue
                yield row, record, sum(len(content) for content in sample.values())
        except ValueError as error:  # a duplicate member in a sample
            raise DataError(f"{self.name}: {error.args[0]}; give every sample a unique key") from None


def check_shard(file: TableFile) -> bool:
    """Return whether there are texts. Raises DataError: a damaged tar header, a member that readers would unpickle."""
    last = "the beginning"
    has_texts = False
    with file.open() as compressed, tempfile.TemporaryFile() as unpacked:
        stream = compressed
        if not compressed.seekable():  # zstd
            shutil.copyfileobj(compressed, unpacked)
            unpacked.seek(0)
            stream = unpacked
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    setattr(tar, "members", [])  # noqa: B010 (not in the stubs; bounds memory)
                    last = f"member {member.name!r}"
                    if member.name.lower().endswith(tuple(f".{suffix}" for suffix in UNPICKLED_SUFFIXES)):
                        raise DataError(f"{file.name}: {last} is a pickle, which can run code; rejected, omit it")
                    if is_text(member.name):
                        has_texts = True
                        if member.size > MAX_RECORD_BYTES:
                            raise DataError(
                                f"{file.name}: {last} has {member.size:,} bytes, at most {MAX_RECORD_BYTES:,} are read"
                            )
                # tarfile takes an early end for that of the archive, which is a block of zeros
                stream.seek(tar.offset)
                end = stream.read(tarfile.BLOCKSIZE)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"{file.name} is damaged or truncated after {last}: {error}") from None
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise DataError(f"{file.name} is damaged or truncated after {last}: no end-of-archive marker; get it again")
    return has_texts


def is_text(name: str) -> bool:
    """Return whether a member has the suffix of a text file."""
    return name.lower().endswith(tuple(f".{suffix}" for suffix in TEXT_SUFFIXES))


def record_of(sample: dict[str, Any]) -> Record:
    """Return a sample's columns.

    Raises ValueError: not UTF-8, not a JSON object, or a duplicate column.
    """
    record: Record = {KEY: sample[KEY]}
    for suffix, member in sample.items():
        if suffix.startswith("__"):
            continue
        name, _, kind = suffix.rpartition(".")
        try:
            text = member.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"invalid UTF-8 in .{suffix} at byte {error.start}") from None
        columns: Record = {name or kind: text}
        if kind == "json":
            try:
                content = parse_object(text)
            except json.JSONDecodeError as error:
                raise ValueError(f".{suffix} is not JSON: {error}") from None
            except ValueError as error:
                raise ValueError(f".{suffix} is {error}") from None
            columns = {f"{name}.{key}" if name else key: value for key, value in content.items()}
        for column in columns:
            if column in record:
                raise ValueError(f"column {column!r} comes from .{suffix} and from another member")
        record |= columns
    return record
