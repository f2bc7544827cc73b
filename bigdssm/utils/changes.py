"""New versions of existing folders and files, with a record of the checksums before and after."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bigdssm.utils.atomic import put_file, real_path, recover, remove, replace_folder, temporary_path
from bigdssm.utils.hashing import file_checksum


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
            if self._compare(temporary, folder) and not self.dry_run:
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

    def _compare(self, temporary: Path, folder: Path) -> bool:
        """Remove the files of `aside` that equal those of `folder`; return whether any are left."""
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        changed = [self._record(folder / path.relative_to(temporary), path) for path in files]
        for path in (path for path, is_changed in zip(files, changed, strict=True) if not is_changed):
            path.unlink()
        return any(changed)

    def _record(self, path: Path, new: Path) -> bool:
        before, after = file_checksum(path) if path.is_file() else None, file_checksum(new)
        if before != after:
            self._add(path, before, after)
        return before != after

    def _add(self, path: Path, before: str | None, after: str | None) -> None:
        action = "removed" if after is None else "changed" if before else "written"
        checksums = {"before": before} if self.dry_run else {"before": before, "after": after}
        self.files.append({"file": str(path), "action": action, **checksums})
