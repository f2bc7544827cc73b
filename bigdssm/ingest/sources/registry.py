"""Opening the table at a path or URL with the source of its format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from bigdssm.errors import DataError
from bigdssm.features.columns import ReportBad, SourceBatch
from bigdssm.ingest.sources import webdataset  # noqa: F401, registers its format
from bigdssm.ingest.sources.base import SOURCES, Source
from bigdssm.ingest.sources.columnar import (
    PARQUET_SUFFIX,
    ParquetSource,
    is_saved_dataset,
    parquet_names,
    saved_dataset,
)
from bigdssm.ingest.sources.files import COMPRESSIONS, LocalFile, RemoteFile, TableFile
from bigdssm.ingest.sources.text import MissingColumn
from bigdssm.utils.urls import is_folder, is_url, join, list_names


def open_source(path: str | Path) -> Source:
    """Open the table at a path or URL: a file, a Parquet folder, or a saved dataset.

    Raises DataError: missing, or an unknown format; ConfigError: a missing package for this kind of URL.
    """
    if isinstance(path, str) and is_url(path):
        return _remote(path)
    if str(path).startswith("pipe:"):
        raise DataError(f"{path}: commands are not run; write their output to a file first")
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise DataError(f"table {path} {'is not a file' if path.exists() else 'does not exist'}")
    return _of_suffix(LocalFile(path))


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


def _folder(path: Path) -> Source:
    if is_saved_dataset(path):
        return saved_dataset(path)
    return _parquet_folder(str(path), [entry.name for entry in path.iterdir()], lambda name: LocalFile(path / name))


def _remote(url: str) -> Source:
    file = RemoteFile(url)
    try:
        if is_folder(url):
            return _parquet_folder(file.name, list_names(url), lambda name: RemoteFile(join(url, name)))
    except FileNotFoundError:
        raise DataError(f"table {file.name} does not exist") from None
    return _of_suffix(file)


def _parquet_folder(folder: str, names: Sequence[str], file: Callable[[str], TableFile]) -> Source:
    if not (used := parquet_names(folder, names)):
        raise DataError(f"table {folder} is not a file, and as a folder it has no {PARQUET_SUFFIX} files")
    return ParquetSource(*map(file, used), name=folder)
