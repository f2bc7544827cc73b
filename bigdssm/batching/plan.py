"""The plan of a step: what is encoded at once on each side, and what is kept for the backward.

It is made on the host, from lengths that are known when a batch is made; no tensor is read for it. The step itself,
encoding without training, the estimate and the health line all read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from bigdssm import distributed
from bigdssm.batching.batch import Batch
from bigdssm.batching.lengths import Lengths
from bigdssm.config import EngineConfig


@dataclass(frozen=True)
class Budget:
    """How much is encoded at once and how much is kept for the backward, in tokens: rows × the longest row."""

    chunk_tokens: int  # 0: both sides whole
    kept_tokens: int

    @classmethod
    def of(cls, config: EngineConfig) -> Budget:
        """Return the budget that a config states; what is kept by default takes no more memory than one chunk."""
        kept = config.keep_graph_tokens
        return cls(config.chunk_tokens, config.chunk_tokens if kept is None else kept)


@dataclass(frozen=True)
class Chunk:
    """Rows of one side that are encoded at once: the [first, last) of the side's order."""

    first: int
    last: int
    widths: Mapping[str, int]  # of its lists: what the longest of its rows uses
    cells: int  # of its lists, padding among them

    @property
    def num_rows(self) -> int:
        """Return its rows; 0 in a dummy, which only keeps this rank in step with the others."""
        return self.last - self.first

    @property
    def tokens(self) -> int:
        """Return what it counts in a budget: its cells, and one a row."""
        return self.num_rows + self.cells if self.num_rows else 1


@dataclass(frozen=True)
class SidePlan:
    """The chunks of one side, rows of like length together."""

    order: np.ndarray  # int64 [rows]: the rows' numbers, chunk after chunk
    chunks: tuple[Chunk, ...]
    filled: int  # cells of the lists that hold something
    dummy: Chunk  # one row for nothing: a rank without a forward or backward that others make stops ZeRO

    @property
    def cells(self) -> int:
        """Return the cells of lists that are encoded, padding among them."""
        return sum(chunk.cells for chunk in self.chunks)

    def filled_up(self, number: int) -> SidePlan:
        """Return the plan with as many dummies behind as make its chunks `number`, at least one."""
        return replace(self, chunks=self.chunks + (self.dummy,) * (max(1, number) - len(self.chunks)))


def plan_side(lengths: Lengths, num_rows: int, chunk_tokens: int) -> SidePlan:
    """Return chunks of rows of like length, each within the budget of tokens (at least one row), longest rows first.

    Rows are sorted by their length in the widest list, then the next: that is where padding would cost most. A budget
    of 0 puts all rows, as they are, into one chunk.
    """
    filled = sum(int(list_.filled.sum()) for list_ in lengths.values())
    widths = {name: list_.width for name, list_ in lengths.items()}
    dummy = Chunk(0, 0, widths, sum(widths.values()))
    if chunk_tokens == 0:
        whole = Chunk(0, num_rows, widths, num_rows * sum(widths.values()))
        return SidePlan(np.arange(num_rows), (whole,), filled, dummy)
    widest_first = sorted(lengths.values(), key=lambda list_: -list_.width)
    columns = [np.maximum(1, list_.filled) for list_ in widest_first] or [np.zeros(num_rows, np.int64)]
    length_RF = np.stack(columns, axis=1)
    order = np.lexsort(-length_RF[:, ::-1].T)
    chunks, first = [], 0
    while first < num_rows:
        window = length_RF[order[first : first + max(1, chunk_tokens)]]
        tokens = np.arange(1, len(window) + 1) * (1 + np.maximum.accumulate(window).sum(axis=1))
        last = first + max(1, int((tokens <= chunk_tokens).sum()))
        used = {name: _used(list_.used[order[first:last]], list_.width) for name, list_ in lengths.items()}
        chunks.append(Chunk(first, last, used, (last - first) * sum(used.values())))
        first = last
    return SidePlan(order, tuple(chunks), filled, dummy)


def agreed(plan: SidePlan) -> SidePlan:
    """Return the plan with as many chunks as the rank that has most of them. A collective."""
    return plan.filled_up(int(distributed.all_reduce(torch.tensor([len(plan.chunks)]), "max")))


@dataclass(frozen=True)
class StepPlan:
    """What one rank encodes in a step, in how many pieces, and how many of them keep their graph."""

    query: SidePlan
    doc: SidePlan
    whole: bool  # both sides in one forward
    num_kept: int = 0  # of the pieces, queries' before documents': the last so many

    @property
    def tokens(self) -> int:
        """Return the cells of both sides' lists (tokens, history items, values) that hold something."""
        return self.query.filled + self.doc.filled

    @property
    def padding(self) -> float:
        """Return the share of what is encoded that is padding; 0 without lists."""
        cells = self.query.cells + self.doc.cells
        return 1 - self.tokens / cells if cells else 0.0


def plan_step(batch: Batch, budget: Budget) -> StepPlan:
    """Return the plan of a batch: with chunks equally many and as many of them kept on every rank. A collective."""
    query, doc = _sides(batch, budget.chunk_tokens)
    if budget.chunk_tokens == 0:
        return StepPlan(query, doc, whole=True)
    num_query, num_doc = distributed.all_reduce(torch.tensor([len(query.chunks), len(doc.chunks)]), "max").tolist()
    if max(num_query, num_doc) <= 1:
        return StepPlan(*_sides(batch, 0), whole=True)
    query, doc = query.filled_up(num_query), doc.filled_up(num_doc)
    last_first = [chunk.tokens for chunk in reversed(query.chunks + doc.chunks)]
    fitting = int((np.cumsum(last_first) <= budget.kept_tokens).sum())
    return StepPlan(query, doc, False, int(distributed.all_reduce(torch.tensor([fitting]), "min")))


def _sides(batch: Batch, chunk_tokens: int) -> tuple[SidePlan, SidePlan]:
    query = plan_side(batch.query_lengths, len(batch.query_ids), chunk_tokens)
    return query, plan_side(batch.doc_lengths, len(batch.doc_ids), chunk_tokens)


def _used(used: np.ndarray, width: int) -> int:
    return min(width, max(1, int(used.max())))
