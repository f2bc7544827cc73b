"""Rank-aware logging, metrics as JSON records (one per line), and a progress bar on the terminal."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from bigdssm.utils.atomic import path_in_errors, write_text


def is_first_rank() -> bool:
    """Return whether this process is rank 0 according to the environment, or has no launcher."""
    return os.environ.get("RANK", "") in ("", "0")


def _is_logged(record: logging.LogRecord) -> bool:
    """Return whether to log a record, for which its rank is set: on ranks other than 0, from WARNING on."""
    rank = int(os.environ.get("RANK", "0"))
    record.rank = rank
    return rank == 0 or record.levelno >= logging.WARNING


class _CurrentStderr(logging.StreamHandler):
    """Writes to the current sys.stderr, which a live progress bar replaces."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


def get_logger(name: str) -> logging.Logger:
    """Return the logger `name`; pass `__name__`."""
    return logging.getLogger(name)


def setup_logging() -> None:
    """Log the package's records to stderr as `[rank] message`; called once per command."""
    handler = _CurrentStderr()
    handler.addFilter(_is_logged)
    handler.setFormatter(logging.Formatter("[%(rank)s] %(message)s"))
    root = logging.getLogger("bigdssm")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False


@contextmanager
def default_logging() -> Iterator[None]:
    """Set up logging as in a command within the block, unless the program has handlers."""
    root = logging.getLogger("bigdssm")
    if root.hasHandlers():
        yield
        return
    level, propagate = root.level, root.propagate
    setup_logging()
    try:
        yield
    finally:
        root.handlers.clear()
        root.setLevel(level)
        root.propagate = propagate


class MetricsWriter:
    """Appends one JSON object per line to `path` and flushes each line, so that a killed run keeps them."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        with path.open("rb") as written:
            length = written.seek(0, os.SEEK_END)
            written.seek(max(0, length - 1))
            if length and written.read() != b"\n":  # a line truncated by a kill: start a new one
                self._file.write("\n")

    def write(self, record: dict[str, Any]) -> None:
        """Append `record`; its values must be JSON types. Raises OSError, which names the file."""
        with path_in_errors(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file. Raises OSError, which names the file: buffered data cannot be written."""
        with path_in_errors(self._path):
            self._file.close()


def read_records(path: Path, key: str) -> list[dict[str, Any]]:
    """Read the JSON records with `key` from a file, one per line; none if the file does not exist.

    Invalid lines (truncated by a kill, or edited) are skipped with a warning.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            record[key]
            records.append(record)
        except (ValueError, KeyError, TypeError):
            get_logger(__name__).warning("%s: skipped line %d, which is no record with a %s", path, number, key)
    return records


def truncate_records(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a file of records with a `step`, retaining those that `keep` accepts; invalid lines are dropped."""
    if not path.exists():
        return
    retained = [json.dumps(record) + "\n" for record in read_records(path, "step") if keep(record)]
    write_text(path, "".join(retained))


def metric_label(name: str) -> str:
    """Return the display name of a metric, such as `NDCG@10` for ndcg_at_10."""
    base, _, cut_off = name.partition("_at_")
    label = base.upper() if len(base) <= 4 else base.capitalize()
    return f"{label}@{cut_off}" if cut_off else label


def rank_file(folder: Path, name: str, rank: int) -> Path:
    """Return the path of a rank's file of records."""
    return folder / f"{name}-{rank:05d}.jsonl"


def truncate_rank_records(
    folder: Path, name: str, rank: int, world_size: int, keep: Callable[[dict[str, Any]], bool]
) -> Path:
    """Apply `truncate_records` to this rank's file and return it; rank 0 also handles files of removed ranks."""
    truncate_records(rank_file(folder, name, rank), keep)
    other = world_size
    while rank == 0 and rank_file(folder, name, other).exists():
        truncate_records(rank_file(folder, name, other), keep)
        other += 1
    return rank_file(folder, name, rank)


Progress = Callable[[str, int, int | None], None]
"""Called as progress(phase, done, total); total None: unknown."""


def no_progress(phase: str, done: int, total: int | None) -> None:
    """Ignore progress: the default of `Progress` arguments."""


class ProgressBar:
    """A progress bar of rank 0 on stderr, displayed after `delay_s` seconds if stderr is a terminal.

    Call it as `progress(phase, done, total)`; total None: unknown. A new phase starts a new bar.
    """

    def __init__(self, delay_s: float = 2.0) -> None:
        self._delay_s = delay_s
        self._started = time.monotonic()
        self._console = Console(stderr=True, force_jupyter=False)  # a notebook shows the lines of the log
        self._progress: RichProgress | None = None
        self._phase = ""

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    @property
    def is_live(self) -> bool:
        """Return whether the bar is displayed."""
        return self._progress is not None

    def __call__(self, phase: str, done: int, total: int | None = None, note: str = "") -> None:
        """Display `done` of `total` in `phase`, followed by `note`."""
        if self._progress is None:
            hidden = not self._console.is_terminal or not is_first_rank()
            if hidden or time.monotonic() - self._started < self._delay_s:
                return
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn())
            note_column = TextColumn("{task.fields[note]}")
            self._progress = RichProgress(*columns, TimeRemainingColumn(), note_column, console=self._console)
            self._progress.start()
            self._console.show_cursor()  # it would stay hidden if the watchdog ends the process
        if phase != self._phase:
            self._phase = phase
            self._task = self._progress.add_task(phase, total=total, note=note)
        self._progress.update(self._task, completed=done, total=total, note=note)
