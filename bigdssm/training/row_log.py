"""The consumed row ids of every step and rank, to prove that a resumed run saw what it should (debug.log_row_ids)."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import Tensor


class RowLog:
    """`row_ids-<rank>.jsonl` in a stage folder: {"step": s, "row_ids": […]} a line."""

    def __init__(self, folder: Path, rank: int, world_size: int, next_step: int) -> None:
        """Open the log, cut back to the steps before `next_step`; rank 0 cuts those of ranks that are no more, too."""
        path = _path(folder, rank)
        _cut_back(path, next_step)
        other = world_size
        while rank == 0 and _path(folder, other).exists():
            _cut_back(_path(folder, other), next_step)
            other += 1
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, row_ids: Tensor) -> None:
        """Append one step."""
        self._file.write(json.dumps({"step": step, "row_ids": row_ids.tolist()}) + "\n")
        self._file.flush()


def _path(folder: Path, rank: int) -> Path:
    return folder / f"row_ids-{rank:05d}.jsonl"


def _cut_back(path: Path, next_step: int) -> None:
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.endswith("}") and json.loads(line)["step"] < next_step:  # a killed run may leave half a line
                kept.append(line + "\n")
    rewritten = path.with_suffix(".unfinished")
    rewritten.write_text("".join(kept), encoding="utf-8")
    os.replace(rewritten, path)
