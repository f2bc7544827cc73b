"""The checkpoints of a stage: each rank writes its share, rank 0 the manifest when all shares are on the disk.

Writing runs in a thread with a process group of its own, so that training can go on meanwhile. What a checkpoint is
stands in checkpoint.py.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from bigdssm import distributed
from bigdssm.checkpoints.checkpoint import (
    COMMON,
    LATEST,
    Checkpoint,
    OtherFormatError,
    ReadCheckpoint,
    check_sizes,
    checkpoints_in,
    name_of,
    rank_file,
    read_manifest,
    read_part,
    tensors_file,
    write_manifest,
)
from bigdssm.checkpoints.shares import FileShare, TensorKind, TensorPiece, even_share, whole_tensor, write_share
from bigdssm.errors import BigDSSMError, CheckpointError, PeerError
from bigdssm.utils.atomic import REPLACED, UNFINISHED, recover, remove, replace_folder, temporary_path, write_text
from bigdssm.utils.log import get_logger

logger = get_logger(__name__)

LEAVING_S = 60.0  # how long a rank that ends for an error waits for a checkpoint that is being written


@dataclass(frozen=True)
class _Job:
    """One checkpoint to be written, as far as this rank has to do with it."""

    step: int
    state: dict[str, Any]
    pieces: list[TensorPiece]
    rank_state: list[TensorPiece]
    between: Callable[[], None]  # called between this rank's files
    group: distributed.Group | None


class CheckpointStore:
    """The checkpoints of one stage, at most `keep` of them. Its methods are collectives.

    As a context it waits, at its end, for what is being written.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        state: dict[str, Any],
        common: dict[str, Tensor],
        rank_state: dict[str, Tensor],
        pieces: Iterable[TensorPiece],
        *,
        in_background: bool = False,
        between: Callable[[], None] = lambda: None,
    ) -> Path:
        """Write the checkpoint of `step` and drop the oldest; `pieces` are this rank's of weights and moments.

        `state` and the `common` tensors are the same on every rank, `rank_state` is this one's own. With
        `in_background` the tensors are copied, and written while the caller goes on; `settle` and the next save wait.
        Raises CheckpointError on every rank where any rank cannot write; earlier checkpoints are untouched.
        """
        self.settle()
        named = [(COMMON + name, tensor) for name, tensor in common.items()]
        shared = even_share(named, distributed.rank(), distributed.world_size())
        parts = [piece.on_host(copy=in_background) for some in (pieces, shared) for piece in some]
        own = [whole_tensor(name, tensor).on_host(copy=in_background) for name, tensor in rank_state.items()]
        state = json.loads(json.dumps(state))  # as it is now
        job = _Job(step, state, parts, own, between, distributed.background_group())
        self._error = None
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()
        if not in_background:
            self.settle()
        return self.folder / name_of(step)

    def settle(self) -> None:
        """Wait until nothing is being written. Raises what made the writing fail, on every rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def has_failed(self) -> bool:
        """Return True where, on this rank, it is known by now that what was being written has failed. No collective."""
        return self._error is not None

    def __enter__(self) -> CheckpointStore:
        # Now: the ranks find each other through their launcher, which may have died when they save for the last time.
        distributed.background_group()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Wait for what is being written, but not for a rank that has gone.

        Raises what made the writing fail where something else has failed to write since: the disk is full for both.
        """
        if self._thread is not None and not isinstance(error, PeerError):
            self._thread.join(LEAVING_S)
        if isinstance(error, OSError) and self._error is not None:
            raise self._error from error

    def newest_good(self) -> ReadCheckpoint | None:
        """Return the newest checkpoint that is as its manifest says, or None; damage is named in the log.

        The ranks read it together, each its part. Damaged ones are renamed: a run that goes on behind them would else
        drop its own first, as the oldest by step.
        Raises OtherFormatError, and CheckpointError where the folder cannot be read or written.
        """
        while (checkpoint := self._newest()) is not None:
            read, damage = self._read(checkpoint)
            damages = [found for found in distributed.all_gather_object(damage) if found is not None]
            if not damages:
                return read
            self._together(partial(self._set_aside, checkpoint.path, damages[0]), "rename")
        return None

    def _newest(self) -> Checkpoint | None:
        """Return the newest checkpoint whose manifest is good and whose files are there, as rank 0 sees them."""
        found: list[Checkpoint] = []

        def look() -> None:
            if not distributed.is_main():
                return
            for replaced in self.folder.glob(f".*{REPLACED}"):  # by one of the same step, when the run was killed
                recover(self.folder / replaced.name[1:].removesuffix(REPLACED))
            for path in reversed(checkpoints_in(self.folder)):
                try:
                    checkpoint = read_manifest(path)
                    check_sizes(checkpoint)
                except OtherFormatError:
                    raise
                except CheckpointError as error:
                    self._set_aside(path, str(error))
                else:
                    found.append(checkpoint)
                    return

        self._together(look, "look for")
        return distributed.broadcast_object(found[0] if found else None)

    def _read(self, checkpoint: Checkpoint) -> tuple[ReadCheckpoint | None, str | None]:
        """Return this rank's part, or what is damaged in it. Raises CheckpointError where a rank sees no such file."""
        read: list[ReadCheckpoint] = []
        damages: list[str] = []

        def part() -> None:
            try:
                read.append(read_part(checkpoint, distributed.rank(), distributed.world_size()))
            except CheckpointError as error:
                damages.append(str(error))

        self._together(part, "read")
        return (read[0] if read else None), (damages[0] if damages else None)

    def _set_aside(self, path: Path, damage: str) -> None:
        if distributed.is_main():
            logger.warning("%s; trying the one before", damage)
            target = path.with_name(f"damaged-{path.name}")
            remove(target)
            os.replace(path, target)

    def _run(self, job: _Job) -> None:
        try:
            self._write(job)
        except BaseException as error:  # for the main thread to raise
            self._error = error
            if distributed.is_main():  # its room is needed, if only for saying how the run ended
                shutil.rmtree(temporary_path(self.folder / name_of(job.step)), ignore_errors=True)

    def _write(self, job: _Job) -> None:
        path = self.folder / name_of(job.step)
        aside, rank = temporary_path(path), distributed.rank()
        self._together(lambda: self._prepare(aside), "prepare", job.group)
        written: list[tuple[FileShare, dict[str, TensorKind]]] = []

        def write() -> None:
            written.append(write_share(aside / tensors_file(rank), rank, job.pieces))
            job.between()
            share, _ = write_share(aside / rank_file(rank), rank, job.rank_state)
            written.append((replace(share, places=()), {}))

        self._together(write, "write", job.group)
        reports = distributed.gather_objects(written, job.group)
        self._together(lambda: self._publish(aside, path, job, reports), "publish", job.group)

    def _prepare(self, aside: Path) -> None:
        if distributed.is_main():
            for stale in self.folder.glob(f".*{UNFINISHED}"):
                remove(stale)
            aside.mkdir(parents=True)

    def _publish(
        self, aside: Path, path: Path, job: _Job, reports: list[list[tuple[FileShare, dict[str, TensorKind]]]]
    ) -> None:
        if not distributed.is_main():
            return
        tensors = {name: kind for report in reports for _, kinds in report for name, kind in kinds.items()}
        shares = [share for report in reports for share, _ in report]
        counts = dict.fromkeys(tensors, 0)
        for share in shares:
            for place in share.places:
                counts[place.name] += place.count
        missing = [name for name, kind in tensors.items() if counts[name] != prod(kind.shape)]
        assert not missing, f"the ranks' pieces are not all of {missing}"
        write_manifest(aside, job.step, len(reports), job.state, tensors, shares)
        replace_folder(aside, path)
        write_text(self.folder / LATEST, path.name)
        logger.info("the checkpoint of step %d is on the disk", job.step)
        for old in checkpoints_in(self.folder)[: -self._keep]:
            shutil.rmtree(old)

    def _together(self, action: Callable[[], None], verb: str, group: distributed.Group | None = None) -> None:
        error: BigDSSMError | None = None
        try:
            action()
        except BigDSSMError as problem:
            error = problem
        except (OSError, RuntimeError, SafetensorError) as problem:
            reason = " ".join(str(problem).split())
            error = CheckpointError(
                f"could not {verb} a checkpoint in {self.folder}: {reason}; the last good one stays"
            )
        distributed.raise_together(error, group)
