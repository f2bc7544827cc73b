"""Files and folders that are whole or not there: written aside, on the disk, then renamed into their place.

What is being written stands beside its place as .NAME.unfinished, and what it replaces, between the two renames that a
folder takes, as .NAME.replaced. A writer that fails removes what it began; what a killed one left is removed, or put
back, by the next that writes to the same place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bigdssm.errors import ConfigError

UNFINISHED, REPLACED = ".unfinished", ".replaced"


def aside_of(path: Path) -> Path:
    """Return where the file or folder `path` is written before it has its name."""
    return path.with_name(f".{path.name}{UNFINISHED}")


def real_place(path: Path) -> Path:
    """Return where a file or folder that will be replaced stands: behind links, which then go on pointing at it.

    Raises ConfigError where links lead in a circle.
    """
    if not path.is_symlink():
        return path
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{path} is a link that leads nowhere: {error}") from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system within it name the file: that of a write, such as a full disk, does not by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give the place to write a file at; `path` is that file when the block ends, and as before where it raises.

    Raises ConfigError where a folder, a device or a pipe stands there, which a file must not replace.
    """
    path = real_place(path)
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no file that could be replaced; choose another place")
    aside = aside_of(path)
    try:
        with naming(aside):
            yield aside
            put_file(aside, path)
    except BaseException:
        remove(aside)
        raise


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill; `folder` is that one when the block ends, and as before where it raises."""
    aside = aside_of(folder)
    remove(aside)
    aside.mkdir(parents=True)
    try:
        yield aside
        replace_folder(aside, folder)
    except BaseException:
        remove(aside)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step. Raises OSError, which names the file."""
    with new_file(path) as aside:
        aside.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 text in one step. Raises OSError, which names the file."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: object) -> None:
    """Write `content` as a JSON file in one step. Raises ValueError: NaN or infinity; OSError, which names the file."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def put_file(aside: Path, path: Path) -> None:
    """Give the finished file `aside` the name `path`, in the same folder, once it is on the disk."""
    sync(aside)
    os.replace(aside, path)


def replace_folder(new: Path, folder: Path) -> None:
    """Put the finished folder `new` in the place of `folder`, on the same file system, once it is on the disk."""
    for path in new.rglob("*"):
        if path.is_file() and not path.is_symlink():
            sync(path)
    recover(folder)
    replaced = _replaced(folder)
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(new, folder)
    sync(folder.parent)
    remove(replaced)


def recover(folder: Path) -> None:
    """Undo or finish what a `replace_folder` that was killed between its two renames left."""
    replaced = _replaced(folder)
    if folder.exists():
        remove(replaced)
    elif replaced.exists():
        os.replace(replaced, folder)


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before what follows."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{REPLACED}")
