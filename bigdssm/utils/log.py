"""Rank-aware logging and the metrics.jsonl writer."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from bigdssm.utils.atomic import naming, write_text


def is_first_rank() -> bool:
    """Return whether this process is rank 0 by what a launcher told it, or has no launcher."""
    return os.environ.get("RANK", "") in ("", "0")


class _MainRankOnly(logging.Filter):
    """Lets records below WARNING through on rank 0 only, so that N ranks do not print a line N times."""

    def filter(self, record: logging.LogRecord) -> bool:
        rank = int(os.environ.get("RANK", "0"))
        record.rank = rank
        return rank == 0 or record.levelno >= logging.WARNING


class _CurrentStderr(logging.StreamHandler):
    """Writes to what sys.stderr is at the moment, so that lines pass above a live progress bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


def get_logger(name: str) -> logging.Logger:
    """Return the logger `name`; call it with `__name__`."""
    return logging.getLogger(name)


def setup_logging(level: int = logging.INFO) -> None:
    """Send the package's records to stderr as `[rank] message`; called once, by a command."""
    handler = _CurrentStderr()
    handler.addFilter(_MainRankOnly())
    handler.setFormatter(logging.Formatter("[%(rank)s] %(message)s"))
    root = logging.getLogger("bigdssm")
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False


@contextmanager
def default_logging() -> Iterator[None]:
    """Log as a command does in a program that has no handlers of its own, and take it back at the end."""
    root = logging.getLogger("bigdssm")
    if root.hasHandlers():
        yield
        return
    before = root.level, root.propagate
    setup_logging()
    try:
        yield
    finally:
        root.handlers.clear()
        root.setLevel(before[0])
        root.propagate = before[1]


class MetricsWriter:
    """Appends one JSON object a line to `path`; each line is flushed, so a killed run keeps what it wrote."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        with path.open("rb") as written:
            length = written.seek(0, os.SEEK_END)
            written.seek(max(0, length - 1))
            if length and written.read() != b"\n":  # cut off by a kill: the next record must not be lost with it
                self._file.write("\n")

    def write(self, record: dict[str, Any]) -> None:
        """Append `record`; its values must be JSON types. Raises OSError, which names the file."""
        with naming(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file. Raises OSError, which names it, where what failed to be written fails again."""
        with naming(self._path):
            self._file.close()


def read_records(path: Path, key: str) -> list[dict[str, Any]]:
    """Return the records (JSON, one a line) of a file that have `key`, none where there is no file.

    What is no such record, since a kill cut it off or somebody edited the file, is left out with a warning.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            record[key]
            found.append(record)
        except (ValueError, KeyError, TypeError):
            get_logger(__name__).warning("%s: left out line %d, which is no record of a %s", path, number, key)
    return found


def cut_back(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leave in a file of records with a `step` those that `keep` wants; what a kill cut off goes, too."""
    if not path.exists():
        return
    kept = [json.dumps(record) + "\n" for record in read_records(path, "step") if keep(record)]
    write_text(path, "".join(kept))


def rank_file(folder: Path, name: str, rank: int) -> Path:
    """Return the file of records that one rank writes."""
    return folder / f"{name}-{rank:05d}.jsonl"


def cut_back_of_rank(
    folder: Path, name: str, rank: int, world_size: int, keep: Callable[[dict[str, Any]], bool]
) -> Path:
    """Cut back and return this rank's file of records; rank 0 cuts those of ranks that are no more, too."""
    cut_back(rank_file(folder, name, rank), keep)
    other = world_size
    while rank == 0 and rank_file(folder, name, other).exists():
        cut_back(rank_file(folder, name, other), keep)
        other += 1
    return rank_file(folder, name, rank)


Progress = Callable[[str, int, int | None], None]
"""Called as progress(what is being done, how much is done, how much there is or None: unknown)."""


def no_progress(what: str, done: int, total: int | None) -> None:
    """Show nothing."""
