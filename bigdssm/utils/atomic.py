"""Atomic writes of files and folders, locks that allow one writer, and records of changed files.

The temporary sibling is .NAME.unfinished. A replaced folder is exchanged with the new one in one system call where the
file system can; otherwise it is .NAME.replaced between two renames. A writer that fails removes its temporary files;
those of a killed writer are removed, or restored, by the next writer of the path.
"""

import ctypes
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bigdssm.errors import ConfigError, DataError
from bigdssm.utils.hashing import file_checksum

UNFINISHED, REPLACED = ".unfinished", ".replaced"
ATTRIBUTE = "user.bigdssm.written"
WRITERS: dict[Path, str] = {}  # by file of this process: its command, noted before the rename, so also after a kill
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def temporary_path(path: Path) -> Path:
    """Return the temporary path of a file or folder, in the same folder."""
    return path.with_name(f".{path.name}{UNFINISHED}")


def real_path(path: Path) -> Path:
    """Resolve links, so that replacing the result keeps them. Raises ConfigError: a circular link."""
    if not path.is_symlink():
        return path
    try:
        resolved = path.resolve()
    except RuntimeError:  # a circle, before Python 3.13
        resolved = path
    if resolved.is_symlink():
        raise ConfigError(f"{path} is a link that cannot be resolved: it leads back to itself; name another path")
    return resolved


def check_replaceable(
    folder: Path, marker: str, is_own: Callable[[dict[str, Any]], bool], otherwise: str, *, overwrite: bool = False
) -> None:
    """Raise ConfigError ("FOLDER exists and `otherwise`") if a folder holds foreign content, unless `overwrite`.

    It may be missing, empty, or hold the JSON file `marker` with an object that `is_own` accepts.
    """
    if overwrite or not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        content = json.loads((folder / marker).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not (isinstance(content, dict) and is_own(content)):
        raise ConfigError(f"{folder} exists and {otherwise}; choose another one, or --overwrite it")


def is_written_by(path: Path, command: str) -> bool:
    """Return whether a file is empty, or has the content that `command` wrote last, as `put_file` has noted.

    The note is an extended attribute, or the file .NAME.written where the file system has none.
    """
    path = real_path(path)
    if not path.stat().st_size:
        return True
    try:
        note = os.getxattr(path, ATTRIBUTE)
    except OSError:
        note = _note_file(path).read_bytes() if _note_file(path).is_file() else b""
    return note == _note(path, command)


def _note_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.written")


def _note(path: Path, command: str) -> bytes:
    return f"{command} {file_checksum(path)}".encode()


@contextmanager
def path_in_errors(path: Path) -> Iterator[None]:
    """Add `path` to an OSError without a file name, such as that of a write to a full disk; a context manager."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; rename it to `path` at the end of the block, remove it on an error.

    Raises ConfigError if `path` is a folder, a device or a pipe.
    """
    path = real_path(path)
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} exists and is no regular file; choose another path")
    temporary = temporary_path(path)
    try:
        with path_in_errors(temporary):
            yield temporary
            put_file(temporary, path)
    except BaseException:
        remove(temporary)
        raise


@contextmanager
def new_folder(folder: Path, own: Iterable[str] | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder; replace `folder` with it at the end of the block, remove it on an error.

    own: as in `replace_folder`.
    """
    temporary = temporary_path(folder)
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        replace_folder(temporary, folder, own)
    except BaseException:
        remove(temporary)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically. Raises OSError, which names the file."""
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically. Raises OSError, which names the file."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically. Raises ValueError: NaN or infinity; OSError, which names the file."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def put_file(temporary: Path, path: Path) -> None:
    """Sync the finished file `aside`, note its command (`WRITERS`), and rename it to `path`, in the same folder."""
    note = None
    if path in WRITERS:
        note = _note(temporary, WRITERS[path])
        with suppress(OSError):  # without extended attributes, the note is a file
            os.setxattr(temporary, ATTRIBUTE, note)
            note = None
    sync(temporary)
    os.replace(temporary, path)
    if note is not None:
        write_bytes(_note_file(path), note)


def replace_folder(new: Path, folder: Path, own: Iterable[str] | None = None) -> None:
    """Sync the finished folder `new` and move it to `folder`, on the same file system.

    own: patterns of the files of an earlier version; files of `folder` that match none of them are kept. None: all are
    replaced.
    """
    for path in folder.rglob("*") if own is not None and folder.is_dir() else ():
        name = path.relative_to(folder)
        is_own = (new / name).exists() or any(fnmatchcase(str(name), pattern) for pattern in own or ())
        if not is_own and (path.is_symlink() or not path.is_dir()):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(path, new / name)
    for path in new.rglob("*"):
        if path.is_file() and not path.is_symlink():
            sync(path)
    recover(folder)
    replaced = _replaced(folder)
    if folder.exists():
        os.replace(new, replaced)  # after a kill it is removed, and not resumed
        if not _exchange(replaced, folder):
            os.replace(replaced, new)
            os.replace(folder, replaced)
            os.replace(new, folder)
    else:
        os.replace(new, folder)
    sync(folder.parent)
    remove(replaced)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths atomically; return False if the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):  # not Linux, or a C library before glibc 2.28
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link an immutable file, or copy it where links are not possible, in place of `target`."""
    remove(target)  # left by a killed run
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def recover(folder: Path) -> None:
    """Complete or undo a `replace_folder` that was killed between its two renames."""
    replaced = _replaced(folder)
    if folder.exists():
        remove(replaced)
    elif replaced.exists():
        os.replace(replaced, folder)


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk (fsync)."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def hidden_version(folder: Path) -> str:
    """Return the end of a message on a missing folder that names its earlier version, '' if there is none."""
    replaced = _replaced(folder)
    if folder.exists() or not replaced.exists():
        return ""
    return f"; {replaced} is its earlier version, left by a kill: rename it to {folder.name}"


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{REPLACED}")


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


class Changes:
    """The files that a command changes or removes; with `dry_run` it only lists them."""

    def __init__(self, *, dry_run: bool = False) -> None:
        self.dry_run = dry_run
        self.files: list[dict[str, Any]] = []  # file, action, its xxh3_128 before and, unless `dry_run`, after

    @contextmanager
    def new_version(self, folder: Path) -> Iterator[Path]:
        """Yield an empty folder for new versions of files of `folder`; replace these at the end of the block, at once.

        Other files of `folder` are hard-linked. Also removes what killed writers of `folder` have left next to it.
        """
        folder = real_path(folder)
        temporary = folder.with_name(f".{folder.name}.changed")
        if not self.dry_run:
            recover(folder)
        self.remove(temporary_path(folder))
        remove(temporary)
        temporary.mkdir()
        try:
            yield temporary
            # only the files that differ from those of `folder`
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            changed = [path for path in files if self._record(folder / path.relative_to(temporary), path)]
            for path in set(files) - set(changed):
                path.unlink()
            if changed and not self.dry_run:
                replace_folder(temporary, folder, ())
        finally:
            remove(temporary)

    @contextmanager
    def new_file(self, path: Path) -> Iterator[Path]:
        """Yield a path for the new version of a file, which replaces it at the end of the block."""
        path = real_path(path)
        temporary = path.with_name(f".{path.name}.changed")
        try:
            yield temporary
            if self._record(path, temporary) and not self.dry_run:
                put_file(temporary, path)
        finally:
            remove(temporary)

    def note(self, path: Path) -> None:
        """List a file that a dry run cannot compute."""
        self._add(path, file_checksum(path), "unknown")

    def remove(self, path: Path) -> None:
        """Remove a file or a folder, if it exists."""
        if not path.exists():
            return
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            self._add(file, file_checksum(file), None)
        if not self.dry_run:
            remove(path)

    def remove_all(self, folder: Path, patterns: Sequence[str]) -> None:
        """Remove the files and folders of `folder` whose names match a pattern."""
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        for path in paths:
            if any(fnmatchcase(path.name, pattern) for pattern in patterns):
                self.remove(path)

    def _record(self, path: Path, new: Path) -> bool:
        before, after = file_checksum(path) if path.is_file() else None, file_checksum(new)
        if before != after:
            self._add(path, before, after)
        return before != after

    def _add(self, path: Path, before: str | None, after: str | None) -> None:
        action = "removed" if after is None else "changed" if before else "written"
        checksums = {"before": before} if self.dry_run else {"before": before, "after": after}
        self.files.append({"file": str(path), "action": action, **checksums})
