"""The checkpoints of a stage: each rank writes its share, then rank 0 writes the manifest.

Writing runs in a thread with a separate process group, concurrently with training. See checkpoint.py for the format.
Rows of sharded tables that are unchanged since the checkpoint before are not written again: its row files are linked.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from safetensors import SafetensorError
from torch import Tensor

from bigdssm import distributed
from bigdssm.checkpoints.checkpoint import (
    COMMON,
    LATEST,
    TABLES,
    Checkpoint,
    FileShare,
    LoadedCheckpoint,
    TensorPiece,
    TensorSpec,
    UnsupportedFormatError,
    check_sizes,
    checkpoint_name,
    checkpoints_in,
    even_share,
    load_checkpoint,
    rank_file,
    read_manifest,
    tables_file,
    tensors_file,
    whole_tensor,
    write_manifest,
    write_share,
)
from bigdssm.errors import BigDSSMError, CheckpointError, PeerError
from bigdssm.tables.files import row_count, table_tensors
from bigdssm.tables.sharded import ShardedTables
from bigdssm.utils.atomic import (
    REPLACED,
    UNFINISHED,
    link_or_copy,
    recover,
    remove,
    replace_folder,
    temporary_path,
    write_text,
)  # fmt: skip
from bigdssm.utils.device import on_current_device
from bigdssm.utils.log import get_logger

T = TypeVar("T")
logger = get_logger(__name__)

EXIT_TIMEOUT_S = 60.0  # how long a rank that exits with an error waits for a checkpoint in progress
MAX_ROW_FILES = 16  # of a rank in a checkpoint; the next one has all rows in one file


@dataclass(frozen=True)
class _RowFiles:
    """This rank's row files of a checkpoint, in their order."""

    folder: Path
    steps: int  # applied before it was saved
    shares: tuple[FileShare, ...] = ()
    rows: tuple[int, ...] = ()  # of each file

    def is_complete(self) -> bool:
        """Return True if the files exist with their sizes."""
        files = ((self.folder / share.file, share.size) for share in self.shares)
        return all(file.is_file() and file.stat().st_size == size for file, size in files)


class CheckpointStore:
    """The checkpoints of one stage, at most `keep` of them. Its methods are collectives.

    As a context manager, it waits at exit for a checkpoint in progress.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.between_files: Callable[[int], None] = lambda step: None  # called when a part of the files is written
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._row_files: _RowFiles | None = None  # of the last checkpoint that this object has written

    def save(
        self,
        step: int,
        state: dict[str, Any],
        common: dict[str, Tensor],
        rank_state: dict[str, Tensor],
        pieces: Iterable[TensorPiece],
        tables: ShardedTables | None = None,
        *,
        in_background: bool = False,
    ) -> Path:
        """Write the checkpoint of `step` and remove the oldest ones.

        pieces: this rank's pieces of weights and optimizer states. `state` and `common` are equal on every rank;
        `rank_state` is local. in_background: copy the tensors and write them in a thread; `wait` and the next save
        wait for it. Raises CheckpointError on every rank if any rank cannot write; earlier checkpoints are untouched.
        """
        self.wait()
        named = [(COMMON + name, tensor) for name, tensor in common.items()]
        shared = even_share(named, distributed.rank(), distributed.world_size())
        parts = [piece.on_host(copy=in_background) for piece in chain(pieces, shared)]
        local = [whole_tensor(name, tensor).on_host(copy=in_background) for name, tensor in rank_state.items()]
        table_rows = None if tables is None else self._changed_rows(tables)
        state = json.loads(json.dumps(state))  # a deep copy
        group = distributed.background_group()

        def write() -> None:
            try:
                self._write(step, state, parts, local, table_rows, group)
            except BaseException as error:  # raised by the main thread
                self._error = error
                if distributed.is_main():  # frees disk space, which the end record of the run needs
                    shutil.rmtree(temporary_path(self.folder / checkpoint_name(step)), ignore_errors=True)

        self._error = None
        self._thread = threading.Thread(target=on_current_device(write), name="checkpoint", daemon=True)
        self._thread.start()
        if not in_background:
            self.wait()
        return self.folder / checkpoint_name(step)

    def _changed_rows(self, tables: ShardedTables) -> tuple[dict[str, Tensor], _RowFiles]:
        """Return a copy of the rows to be written, and the row files with them, but for the share of the last one.

        The rows are those that changed since the last checkpoint, in addition to its files, or all of them.
        """
        parent = self._row_files
        known_from = max(store.evictions_known_from for store in tables.stores.values())
        if parent and known_from <= parent.steps and len(parent.shares) < MAX_ROW_FILES and parent.is_complete():
            tensors = table_tensors(tables, parent.steps)
            if sum(parent.rows[1:]) + (rows := row_count(tensors)) <= parent.rows[0]:
                return tensors, replace(parent, steps=tables.steps, rows=(*parent.rows, rows))
            del tensors  # before all rows are copied
        tensors = table_tensors(tables)
        return tensors, _RowFiles(self.folder, tables.steps, rows=(row_count(tensors),))

    def wait(self) -> None:
        """Wait for a checkpoint in progress. Raises the error of a failed write, on every rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def has_failed(self) -> bool:
        """Return True if the write in progress has already failed on this rank. Not a collective."""
        return self._error is not None

    def __enter__(self) -> "CheckpointStore":
        # created early: the ranks connect through their launcher, which may have exited before the last save
        distributed.background_group()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Wait for a checkpoint in progress, unless a peer has failed.

        Raises the error of a failed write in place of a later OSError, which has the same cause (a full disk).
        """
        if self._thread is not None and not isinstance(error, PeerError):
            self._thread.join(EXIT_TIMEOUT_S)
        if isinstance(error, OSError) and self._error is not None:
            raise self._error from error

    def newest_valid(self) -> LoadedCheckpoint | None:
        """Load the newest intact checkpoint, each rank its share; None without one. Damage is logged.

        Damaged checkpoints are renamed: otherwise a resumed run, whose steps are lower, would remove its own
        checkpoints as the oldest. Raises UnsupportedFormatError; CheckpointError: the folder cannot be read or written.
        """
        self._row_files = None
        while (checkpoint := self._newest()) is not None:
            read, damage = self._read(checkpoint)
            damages = [reported for reported in distributed.all_gather_object(damage) if reported is not None]
            if not damages:
                return read
            self._run_collectively(partial(self._move_damaged, checkpoint.path, damages[0]), "rename")
        return None

    def _newest(self) -> Checkpoint | None:
        """Return the newest checkpoint with a valid manifest and complete files, as seen by rank 0."""

        def find() -> Checkpoint | None:
            if not distributed.is_main():
                return None
            for replaced in self.folder.glob(f".*{REPLACED}"):  # left by a run killed while replacing the same step
                recover(self.folder / replaced.name[1:].removesuffix(REPLACED))
            for path in reversed(checkpoints_in(self.folder)):
                try:
                    checkpoint = read_manifest(path)
                    check_sizes(checkpoint)
                    return checkpoint
                except UnsupportedFormatError:
                    raise
                except CheckpointError as error:
                    self._move_damaged(path, str(error))
            return None

        return distributed.broadcast_object(self._run_collectively(find, "find"))

    def _read(self, checkpoint: Checkpoint) -> tuple[LoadedCheckpoint | None, str | None]:
        """Return this rank's share, or a description of its damage. Raises CheckpointError: unreadable on a rank."""

        def read() -> tuple[LoadedCheckpoint | None, str | None]:
            try:
                return load_checkpoint(checkpoint, distributed.rank(), distributed.world_size()), None
            except CheckpointError as error:
                return None, str(error)

        return self._run_collectively(read, "read")

    def _move_damaged(self, path: Path, damage: str) -> None:
        if distributed.is_main():
            logger.warning("%s; trying the previous checkpoint", damage)
            target = path.with_name(f"damaged-{path.name}")
            remove(target)
            os.replace(path, target)

    def _write(
        self, step: int, state: dict[str, Any], pieces: list[TensorPiece], rank_state: list[TensorPiece],
        table_rows: tuple[dict[str, Tensor], _RowFiles] | None, group: distributed.Group | None,
    ) -> None:  # fmt: skip
        path = self.folder / checkpoint_name(step)
        unfinished, rank = temporary_path(path), distributed.rank()

        def prepare() -> None:
            if distributed.is_main():
                for stale in self.folder.glob(f".*{UNFINISHED}"):
                    remove(stale)
                unfinished.mkdir(parents=True)

        def write() -> tuple[list[tuple[FileShare, dict[str, TensorSpec]]], _RowFiles | None]:
            written = [write_share(unfinished / tensors_file(rank), rank, pieces)]
            self.between_files(step)
            share, _ = write_share(unfinished / rank_file(rank), rank, rank_state)
            written.append((replace(share, locations=()), {}))
            if table_rows is None:
                return written, None
            # link the row files of the last checkpoint, and write a further one
            tensors, files = table_rows
            for linked in files.shares:
                link_or_copy(files.folder / linked.file, unfinished / linked.file)
            rows = [whole_tensor(name, tensor) for name, tensor in tensors.items()]
            share, _ = write_share(unfinished / tables_file(rank, len(files.shares)), rank, rows)
            shares = (*files.shares, replace(share, locations=()))
            return [*written, *((share, {}) for share in shares)], replace(files, folder=path, shares=shares)

        def publish() -> None:
            if not distributed.is_main():
                return
            tensors = {name: kind for report in reports for _, kinds in report for name, kind in kinds.items()}
            shares = [share for report in reports for share, _ in report]
            counts = dict.fromkeys(tensors, 0)
            for share in shares:
                for location in share.locations:
                    counts[location.name] += location.count
            missing = [name for name, kind in tensors.items() if counts[name] != prod(kind.shape)]
            assert not missing, f"the ranks' pieces do not cover {missing}"
            write_manifest(unfinished, step, len(reports), state, tensors, shares)
            replace_folder(unfinished, path)
            write_text(self.folder / LATEST, path.name)
            # the last row file of each rank was written, the others were linked
            row_files = [share for share in shares if share.file.startswith(TABLES)]
            newest = {share.owner: share.size for share in sorted(row_files, key=lambda share: share.file)}
            new_bytes, all_bytes = sum(newest.values()), sum(share.size for share in row_files)
            row_bytes = (
                f"; rows of sharded tables: {new_bytes:,} bytes written, {all_bytes - new_bytes:,} in linked files"
            )
            logger.info("wrote the checkpoint of step %d%s", step, row_bytes if row_files else "")
            for old in checkpoints_in(self.folder)[: -self._keep]:
                shutil.rmtree(old)

        self._run_collectively(prepare, "prepare", group)
        written, files = self._run_collectively(write, "write", group)
        reports = distributed.all_gather_object(written, group)
        self._run_collectively(publish, "publish", group)
        self._row_files = files

    def _run_collectively(self, action: Callable[[], T], verb: str, group: distributed.Group | None = None) -> T:
        """Return the result of an action of each rank. Raises CheckpointError on every rank if it fails on any."""
        error: BigDSSMError | None = None
        try:
            result = action()
        except BigDSSMError as problem:
            error = problem
        except (OSError, RuntimeError, SafetensorError) as problem:
            reason = " ".join(str(problem).split())
            error = CheckpointError(
                f"could not {verb} a checkpoint in {self.folder}: {reason}; the last valid one is kept"
            )
        distributed.raise_together(error, group)
        return result
