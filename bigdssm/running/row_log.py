"""Row ids by step and rank, in a stage folder: of the steps that were skipped, and of all (debug.log_row_ids)."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from bigdssm.atomic import naming
from bigdssm.log import cut_back_of_rank

CONSUMED, SKIPPED = "row_ids", "skipped_rows"


class RowLog:
    """`<name>-<rank>.jsonl` in a stage folder, from its first line on: {"step": s, "row_ids": […]} a line."""

    def __init__(self, folder: Path, name: str, rank: int, world_size: int, next_step: int) -> None:
        """Cut the log back to the steps before `next_step`; rank 0 cuts those of ranks that are no more, too."""
        self.path = cut_back_of_rank(folder, name, rank, world_size, lambda record: record["step"] < next_step)

    def write(self, step: int, row_ids: Tensor) -> None:
        """Append one step. Raises OSError, which names the file."""
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "row_ids": row_ids.tolist()}) + "\n")
