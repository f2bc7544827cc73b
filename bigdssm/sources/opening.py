"""The entrance of tables: a path, a URL or an address of Spark is opened as the source of its format."""

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from bigdssm.errors import ConfigError, DataError
from bigdssm.features.columns import ReportBad, SourceBatch
from bigdssm.sources.base import COMPRESSIONS, SOURCES, Part, Source, TableFile
from bigdssm.sources.columnar import PARQUET_SUFFIX, ParquetSource, saved_dataset
from bigdssm.sources.text import MissingColumn
from bigdssm.utils.log import get_logger
from bigdssm.utils.urls import is_folder, is_url, join, list_names

logger = get_logger(__name__)

SPARK_PREFIX = "spark:"
SPARK_QUERY = re.compile(r"[\s(]*(select|with|from|values|table)\b", re.IGNORECASE)


class SparkTable(Source):
    """A table or SQL query of the Spark session, which the Spark engine converts to files before it is read."""

    def __init__(self, text: str) -> None:
        """`text` is the part after `spark:`, such as db.events, parquet.`/path` or SELECT …"""
        self.name = f"{SPARK_PREFIX}{text}"
        self.query = text if SPARK_QUERY.match(text) else f"SELECT * FROM {text}"

    def fingerprint(self) -> str:
        """Return the text: the rows at the start of an ingestion are used for all of it."""
        return self.name

    def size(self) -> int:
        """Return 0: unknown before reading."""
        return 0

    def split(self) -> Sequence[Part]:
        """Raise ConfigError: only the Spark engine can read it."""
        raise ConfigError(f"{self.name} is read by Spark; give --engine spark (engine='spark'), or a file")

    def read(self, part: Part, columns: Sequence[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
        """Never called, because there are no parts."""
        raise NotImplementedError


def open_table(table: str | Path | Source) -> Source:
    """Open the table at a path, URL or spark: address; a source is returned unchanged.

    Raises as `open_source`.
    """
    if isinstance(table, Source):
        return table
    text = str(table)
    return SparkTable(text.removeprefix(SPARK_PREFIX)) if text.startswith(SPARK_PREFIX) else open_source(table)


def open_source(path: str | Path) -> Source:
    """Open the table at a path or URL: a file, a Parquet folder, or a saved dataset.

    Raises DataError: missing, or an unknown format; ConfigError: a missing package for this kind of URL.
    """
    if isinstance(path, str) and is_url(path):
        remote = TableFile(path)
        try:
            if is_folder(path):
                return _parquet_folder(remote.name, list_names(path), lambda name: TableFile(join(path, name)))
        except FileNotFoundError:
            raise DataError(f"table {remote.name} does not exist") from None
        return _of_suffix(remote)
    if str(path).startswith("pipe:"):
        raise DataError(f"{path}: commands are not run; write their output to a file first")
    local = Path(path)
    if (saved := saved_dataset(local)) is not None:
        return saved
    if local.is_dir():
        return _parquet_folder(str(local), os.listdir(local), lambda name: TableFile(local / name))
    if not local.is_file():
        raise DataError(f"table {local} {'is not a file' if local.exists() else 'does not exist'}")
    return _of_suffix(TableFile(local))


def log_row(file: str, row: int, reason: str, left_out: bool = True) -> None:
    """Log a bad row, or a bad value that is read as missing; a ReportBad."""
    logger.warning("%s, row %d: %s", file, row, reason)


def read_table(path: str | Path, columns: Collection[str], report_bad: ReportBad) -> Iterator[SourceBatch]:
    """Yield all rows of the table at `path` in order, with exactly `columns`.

    Bad rows are passed to `report_bad`. `columns` may map columns to the options that name them, for messages about
    missing columns. Raises as `open_source` and `Source.batches`; DataError: no usable rows.
    """
    source, empty = open_source(path), True
    for part in source.parts():
        try:
            for batch in source.batches(part, list(columns), report_bad):
                empty = empty and not len(batch.rows)
                yield batch
        except MissingColumn as error:
            raise DataError(error.message(columns if isinstance(columns, Mapping) else {})) from None
    if empty:
        raise DataError(f"{source.name} has no usable rows")


def _of_suffix(file: TableFile) -> Source:
    compressible = {suffix: source for suffix, source in SOURCES.items() if source.compressible}
    source = SOURCES.get(Path(file.name).suffix.lower()) or compressible.get(file.suffix)
    if source is None:
        raise DataError(
            f"{file.name}: unknown table format; supported are {', '.join({**compressible, **SOURCES})}, "
            f"{', '.join(compressible)} also with {', '.join(COMPRESSIONS)}"
        )
    return source(file)


def _parquet_folder(folder: str, names: Sequence[str], file: Callable[[str], TableFile]) -> Source:
    visible = sorted(name for name in names if not name.startswith((".", "_")))  # no hidden files and markers
    if others := [name for name in visible if not name.lower().endswith(PARQUET_SUFFIX)]:
        raise DataError(
            f"{folder} is read as a folder of {PARQUET_SUFFIX} files, but has {others[0]!r}; move it away, or give "
            f"the files or folders in it one by one"
        )
    if not visible:
        raise DataError(f"table {folder} is not a file, and as a folder it has no {PARQUET_SUFFIX} files")
    return ParquetSource(*map(file, visible), name=folder)
