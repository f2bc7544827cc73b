"""Files of a public data set, line by line, and the tables read from them."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigdssm.errors import DataError
from bigdssm.ingest.sources.base import READING_ERRORS
from bigdssm.ingest.sources.files import COMPRESSIONS, LocalFile


def public_data_error(path: Path, where: str, got: str, needed: str, fix: str) -> DataError:
    """Return the error of a source that is not of the kind that the command line names."""
    shown = got if len(got) <= 80 else got[:79] + "…"
    return DataError(f"{path}{where and ', '}{where}: got {shown}, needs {needed}; {fix}")


def require_folder(path: Path) -> Path | None:
    """Return the file `path`, as it is or compressed, None where there is neither."""
    places = (path.with_name(path.name + suffix) for suffix in ("", *COMPRESSIONS))
    return next((place for place in places if place.is_file()), None)


def check_file(path: Path) -> None:
    """Raise DataError where there is no such file."""
    if not path.is_file():
        raise public_data_error(
            path, "", "a folder" if path.exists() else "no such file", "a file", "give another --source"
        )


def find(folder: Path, name: str) -> Path:
    """Return the file `name` of `folder`, as it is or compressed. Raises DataError where there is neither."""
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        raise public_data_error(folder, "", got, f"a folder that holds {name}", "give that with --source")
    if (path := require_folder(folder / name)) is None:
        needed = f"{name} or {name}.xz in it"
        raise public_data_error(folder, "", f"no {name}", needed, "give the folder that holds it with --source")
    return path


class PublicFile:
    """A file of a set of some kind, to be read once; what is wrong with a line is said of the one read last."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind, self.number = path, kind, 0

    def lines(self, encoding: str = "utf-8") -> Iterator[str]:
        """Yield the lines that are not empty, the compression undone; `number` is that of the last one, from 1.

        Raises DataError: a damaged file, or bytes of another encoding.
        """
        try:
            with LocalFile(self.path).stream() as stream:
                for self.number, line in enumerate(stream, 1):
                    mark = b"\xef\xbb\xbf" if self.number == 1 else b""
                    text = line.removeprefix(mark).decode(encoding).rstrip("\r\n")
                    if "\0" in text:
                        raise self._unusable("a NUL character", "text", "fetch the file again")
                    if text.strip():
                        yield text
        except UnicodeDecodeError as error:
            got, fix = f"bytes that are not {encoding}", f"convert the file ({error.reason})"
            raise self._unusable(got, encoding.upper(), fix) from None
        except READING_ERRORS as error:
            if isinstance(error, OSError) and error.errno:  # the machine's trouble, not the file's
                raise
            self.number += 1
            raise self._unusable(" ".join(str(error).split()), "a whole file", "fetch it again") from None

    def rows(self, columns: Sequence[str]) -> Iterator[list[str]]:
        """Yield the values of `columns` in each row of a CSV file; `number` is that of the line that the row ends on.

        Raises DataError: no such column, a row of another number of fields, or a quote that is never closed.
        """
        reader = csv.reader((f"{line}\n" for line in self.lines()), strict=True)
        try:
            header = next(reader, [])
            self.number = max(self.number, 1)
            for name in columns:
                self.check(name in header, ",".join(header), f"a column {name}")
            places, fields = [header.index(name) for name in columns], f"{len(header)} fields"
            for row in reader:
                if len(row) != len(header):
                    raise self.wrong(",".join(row), fields)
                yield [row[place] for place in places]
        except csv.Error as error:
            raise self.wrong(str(error), "a row of CSV, quotes closed") from None

    def check(self, fine: bool, got: str, needed: str) -> None:
        """Raise the error of the line read last, unless it is fine."""
        if not fine:
            raise self.wrong(got, needed)

    def check_number(self, name: str, text: str) -> None:
        """Raise DataError unless `text` is a finite number."""
        try:
            fine = math.isfinite(float(text)) and "_" not in text  # Python's own notation
        except ValueError:
            fine = False
        self.check(fine, text, f"a number as {name}")

    def wrong(self, got: str, needed: str) -> DataError:
        """Return the error of the line read last, where `got` stands in place of what is `needed`."""
        return self._unusable(repr(got), needed, f"mend the line, or name another kind than {self.kind}")

    def _unusable(self, got: str, needed: str, fix: str) -> DataError:
        return public_data_error(self.path, f"line {self.number}", got, needed, fix)


@dataclass(frozen=True)
class PublicTable:
    """A table's file name without ending, its columns, and its rows, which can be read once."""

    name: str
    columns: tuple[str, ...]
    rows: Iterable[Sequence[str]]
    note: str = ""  # what is not in it, and why


Reader = Callable[[Path], Iterator[PublicTable]]
"""Yields the tables of a source, each to be read before the next is asked for. Raises DataError."""
