"""What a source of rows is: a table that is read in parts, each on its own, by any process."""

from __future__ import annotations

import csv
import lzma
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
from xxhash import xxh3_128_hexdigest

from bigdssm.errors import DataError
from bigdssm.features.columns import ReportBad, SourceBatch
from bigdssm.tables.batches import BYTES_PER_BATCH
from bigdssm.tables.files import TableFile

# What readers raise where a file is not what it should be.
READING_ERRORS = (pa.ArrowException, OSError, lzma.LZMAError, zlib.error, EOFError, csv.Error)


@dataclass(frozen=True)
class Part:
    """Successive rows of a source; a format may add what it finds them by."""

    number: int  # among the source's parts, from 0
    first_row: int  # in the whole source, from 1
    num_rows: int | None  # None: not known before they are read


class Source(ABC):
    """A table that workers read in parts, each on its own. Picklable; holds no open file."""

    name: str  # what messages and the quarantine call it

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def fingerprint(self) -> str:
        """Return what is another one when the content is."""

    @abstractmethod
    def size(self) -> int:
        """Return its bytes, about."""

    @abstractmethod
    def split(self) -> Sequence[Part]:
        """Return the parts for `parts`, which makes sentences of what Arrow and others raise."""

    @abstractmethod
    def read(self, part: Part, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
        """Yield a part's rows for `batches`, which makes such sentences, too."""

    def parts(self) -> Sequence[Part]:
        """Return its parts in order, at least one where it has rows: a function of the source alone.

        Raises DataError: damaged.
        """
        try:
            return self.split()
        except READING_ERRORS as error:
            raise told(error, self.name, 0) from None

    def batches(self, part: Part, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
        """Yield the rows of a part in order, with exactly `columns`, numbered in the whole source from 1.

        Bad rows go to `report_bad`. Raises DataError: missing column (naming the nearest), damaged.
        """
        seen = part.first_row - 1
        try:
            for batch in self.read(part, columns, report_bad):
                seen += len(batch.rows)
                yield batch
        except READING_ERRORS as error:
            raise told(error, self.name, seen) from None


class FileSource(Source):
    """A source in one file, or in several that hold its rows one behind the other; by default one part."""

    def __init__(self, *files: TableFile, name: str = "") -> None:
        """`name` is by default the file's."""
        self.files, self.name = files, name or files[0].name

    @property
    def file(self) -> TableFile:
        """Return the file, of a source in one."""
        (file,) = self.files
        return file

    def fingerprint(self) -> str:
        """Return a hash of the files' sizes and times, or etags."""
        return xxh3_128_hexdigest("\n".join(file.version() for file in self.files).encode())

    def size(self) -> int:
        """Return the files' bytes, compressed or not."""
        return sum(file.size() for file in self.files)

    def split(self) -> Sequence[Part]:
        """Return one: where rows of text begin is known when all before them are read."""
        return [Part(0, 1, None)]


def told(error: Exception, name: str, row: int) -> Exception:
    """Return a reader's error as a sentence on the table `name`, read up to `row`; trouble of the machine as it is."""
    if isinstance(error, OSError) and error.errno:
        return error
    detail = " ".join(str(error).split())[:300]
    if "straddling object" in detail:
        detail = f"a row of more than {BYTES_PER_BATCH:,} bytes, or a quote that is never closed"
    return DataError(f"{name} is damaged or not what its name says, after row {row}: {detail}")
