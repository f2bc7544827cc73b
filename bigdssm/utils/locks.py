"""A lock file that allows one writer of a place at a time, and is removed when it is released."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from bigdssm.errors import DataError


class WriterLock:
    """Exclusive lock of the process that writes to a place; the system releases it when the process ends.

    What a decision depends on is read while the lock is held.
    """

    def __init__(self, path: Path, place: Path, fix: str = "wait for it or choose another --out") -> None:
        """Lock the file `path`. Raises DataError where another process, or thread, is writing `place`."""
        while True:
            self._path, self._file = path, path.open("a")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise DataError(f"another process is writing {place}; {fix}") from None
            except OSError:
                self._file.close()
                raise
            if self._is_current():
                return
            self._file.close()  # its holder removed the file between the two calls

    def close(self) -> None:
        """Release the lock and remove its file; nothing where this is done."""
        if not self._file.closed:
            if self._is_current():
                self._path.unlink()
            self._file.close()

    def _is_current(self) -> bool:
        """Return whether the path still names the locked file: a lock on a removed one excludes nobody."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def __enter__(self) -> WriterLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def lock_beside(path: Path) -> Path:
    """Return the lock file of a file or folder that is written aside and renamed."""
    return path.with_name(f".{path.name}.lock")
