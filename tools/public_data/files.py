"""Files of a public dataset, read line by line, and the tables read from them."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigdssm.errors import DataError
from bigdssm.sources.base import COMPRESSIONS, READING_ERRORS, TableFile


def public_data_error(path: Path, where: str, got: str, needed: str, fix: str) -> DataError:
    """Return a DataError for a source file that does not have the expected format."""
    excerpt = got if len(got) <= 80 else got[:79] + "…"
    return DataError(f"{path}{where and ', '}{where}: got {excerpt}, needs {needed}; {fix}")


def existing_file(path: Path) -> Path | None:
    """Return the file `path` or its compressed form, None if neither exists."""
    candidates = (path.with_name(path.name + suffix) for suffix in ("", *COMPRESSIONS))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def check_file(path: Path) -> None:
    """Raise DataError if `path` is not a file."""
    if not path.is_file():
        raise public_data_error(
            path, "", "a folder" if path.exists() else "no such file", "a file", "give another --source"
        )


def find_source_file(folder: Path, name: str) -> Path:
    """Return the file `name` of `folder` or its compressed form. Raises DataError: neither exists."""
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        raise public_data_error(folder, "", got, f"a folder with {name}", "pass it as --source")
    if (path := existing_file(folder / name)) is None:
        needed = f"{name} or a compressed form in it (.gz, .xz, .zst)"
        raise public_data_error(folder, "", f"no {name}", needed, "pass the folder that contains this file as --source")
    return path


class PublicFile:
    """A source file of a public dataset.

    It can be read once; errors name the current line.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind, self.number = path, kind, 0

    def lines(self, encoding: str = "utf-8") -> Iterator[str]:
        """Yield the non-empty lines of the decompressed file; `number` is the current line, from 1.

        Raises DataError: a damaged file, or bytes of another encoding.
        """
        try:
            with TableFile(self.path).stream() as stream:
                for self.number, line in enumerate(stream, 1):
                    mark = b"\xef\xbb\xbf" if self.number == 1 else b""
                    text = line.removeprefix(mark).decode(encoding).rstrip("\r\n")
                    if "\0" in text:
                        raise self._error("a NUL character", "text", "download the file again")
                    if text.strip():
                        yield text
        except UnicodeDecodeError as error:
            got, fix = f"bytes that are not {encoding}", f"convert the file ({error.reason})"
            raise self._error(got, encoding.upper(), fix) from None
        except READING_ERRORS as error:
            if isinstance(error, OSError) and error.errno:  # a system error, not a damaged file
                raise
            self.number += 1
            raise self._error(" ".join(str(error).split()), "an undamaged file", "download it again") from None

    def rows(self, columns: Sequence[str]) -> Iterator[list[str]]:
        """Yield the values of `columns` per row of a CSV file; `number` is the last line of the row.

        Raises DataError: a missing column, a row with another number of fields, or an unclosed quote.
        """
        reader = csv.reader((f"{line}\n" for line in self.lines()), strict=True)
        try:
            header = next(reader, [])
            self.number = max(self.number, 1)
            for name in columns:
                self.check(name in header, ",".join(header), f"a column {name}")
            indices, fields = [header.index(name) for name in columns], f"{len(header)} fields"
            for row in reader:
                if len(row) != len(header):
                    raise self.error(",".join(row), fields)
                yield [row[i] for i in indices]
        except csv.Error as error:
            raise self.error(str(error), "a row of CSV with closed quotes") from None

    def check(self, is_valid: bool, got: str, needed: str) -> None:
        """Raise the error of the current line if `is_valid` is false."""
        if not is_valid:
            raise self.error(got, needed)

    def check_number(self, name: str, text: str) -> None:
        """Raise DataError unless `text` is a finite number."""
        try:
            is_valid = math.isfinite(float(text)) and "_" not in text  # Python accepts 1_000
        except ValueError:
            is_valid = False
        self.check(is_valid, text, f"a number as {name}")

    def error(self, got: str, needed: str) -> DataError:
        """Return the error of the current line, which contains `got`."""
        return self._error(repr(got), needed, f"correct the line, or use another kind than {self.kind}")

    def _error(self, got: str, needed: str, fix: str) -> DataError:
        return public_data_error(self.path, f"line {self.number}", got, needed, fix)


@dataclass(frozen=True)
class PublicTable:
    """A table: file name without extension, columns, and rows, which can be read once."""

    name: str
    columns: tuple[str, ...]
    rows: Iterable[Sequence[str]]
    note: str = ""  # dropped rows, and the reason


Reader = Callable[[Path], Iterator[PublicTable]]
"""Yields the tables of a source; read each one before requesting the next. Raises DataError."""
