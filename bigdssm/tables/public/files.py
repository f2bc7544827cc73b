"""Files of a public set, line by line, and the one sentence on what is wrong with them."""

from __future__ import annotations

import csv
import lzma
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from bigdssm.errors import DataError
from bigdssm.tables.files import COMPRESSIONS, LocalFile


def wrong(path: Path, where: str, got: str, needed: str, fix: str) -> DataError:
    """Return the error of a source that is not of the kind that the command line names."""
    shown = got if len(got) <= 80 else got[:79] + "…"
    return DataError(f"{path}{where and ', '}{where}: got {shown}, needs {needed}; {fix}")


def wrong_line(path: Path, number: int, got: str, needed: str, kind: str) -> DataError:
    """Return the error of a line, numbered from 1."""
    return wrong(path, f"line {number}", repr(got), needed, f"mend the line, or name another kind than {kind}")


def is_there(path: Path) -> bool:
    """Return whether there is the file `path`, as it is or compressed."""
    return any(path.with_name(path.name + suffix).is_file() for suffix in ("", *COMPRESSIONS))


def check_file(path: Path) -> None:
    """Raise DataError where there is no such file."""
    if not path.is_file():
        raise wrong(path, "", "a folder" if path.exists() else "no such file", "a file", "give another --source")


def find(folder: Path, name: str) -> Path:
    """Return the file `name` of `folder`, as it is or compressed. Raises DataError where there is neither."""
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        raise wrong(folder, "", got, f"a folder that holds {name}", "give that with --source")
    for suffix in ("", *COMPRESSIONS):
        if (path := folder / f"{name}{suffix}").is_file():
            return path
    raise wrong(folder, "", f"no {name}", f"{name} or {name}.xz in it", "give the folder that holds it with --source")


def lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """Yield a file's lines that are not empty, with their numbers from 1, its compression undone.

    Raises DataError: a damaged file, or bytes of another encoding.
    """
    number = 0
    try:
        with LocalFile(path).stream() as stream:
            for number, line in enumerate(stream, 1):
                text = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").decode(encoding).rstrip("\r\n")
                if "\0" in text:
                    raise wrong(path, f"line {number}", "a NUL character", "text", "fetch the file again")
                if text.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        got = f"bytes that are not {encoding}"
        raise wrong(path, f"line {number}", got, encoding.upper(), f"convert the file ({error.reason})") from None
    except (pa.ArrowException, OSError, lzma.LZMAError, zlib.error, EOFError) as error:
        if isinstance(error, OSError) and error.errno:  # the machine's trouble, not the file's
            raise
        detail = " ".join(str(error).split())
        raise wrong(path, f"line {number + 1}", detail, "a whole file", "fetch it again") from None


def csv_rows(path: Path, columns: Sequence[str], kind: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the values of `columns` in each row of a CSV file, with the line that the row ends on.

    Raises DataError: no such column, a row of another number of fields, or a quote that is never closed.
    """
    numbers: list[int] = [0]

    def read() -> Iterator[str]:
        for number, line in lines(path):
            numbers[0] = number
            yield f"{line}\n"

    reader = csv.reader(read(), strict=True)
    try:
        header = next(reader, [])
        if absent := [name for name in columns if name not in header]:
            raise wrong_line(path, max(numbers[0], 1), ",".join(header), f"a column {absent[0]}", kind)
        places = [header.index(name) for name in columns]
        for row in reader:
            if len(row) != len(header):
                raise wrong_line(path, numbers[0], ",".join(row), f"{len(header)} fields", kind)
            yield numbers[0], [row[place] for place in places]
    except csv.Error as error:
        raise wrong_line(path, numbers[0], str(error), "a row of CSV, quotes closed", kind) from None


def check_number(path: Path, line: int, name: str, text: str, kind: str) -> None:
    """Raise DataError unless `text` is a finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or "_" in text:  # Python's own notation
        raise wrong_line(path, line, text, f"a number as {name}", kind)
