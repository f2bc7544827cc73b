"""Lock files that allow one writer per path."""

import fcntl
import os
from pathlib import Path

from bigdssm.errors import DataError


class WriterLock:
    """Exclusive lock of a writer; the system releases it when the process ends.

    Read the state that a decision depends on while holding the lock.
    """

    def __init__(self, path: Path, target: Path, fix: str = "wait for it or choose another --out") -> None:
        """Lock the file `path`. Raises DataError if another process or thread is writing `target`."""
        while True:
            self._path, self._file = path, path.open("a")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise DataError(f"another process is writing {target}; {fix}") from None
            except OSError:
                self._file.close()
                raise
            if self._is_current():
                return
            self._file.close()  # its holder removed the file between the two calls

    def close(self) -> None:
        """Release the lock and remove its file; idempotent."""
        if not self._file.closed:
            if self._is_current():
                self._path.unlink()
            self._file.close()

    def _is_current(self) -> bool:
        """Return whether the path still names the locked file: a lock on a removed file excludes no other writer."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def __enter__(self) -> "WriterLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def lock_path(path: Path) -> Path:
    """Return the path of the lock file for an atomically written file or folder."""
    return path.with_name(f".{path.name}.lock")
