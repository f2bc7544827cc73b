"""The plan of a step: what is encoded at once on each side, and what is kept for the backward.

It is made on the host, from lengths that are known when a batch is made; no tensor is read for it. The step itself,
encoding without training, the estimate and the health line all read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from bigdssm import distributed
from bigdssm.config import EngineConfig
from bigdssm.features.ragged import gather_ranges, offsets_of
from bigdssm.loader.batch import Batch, Lengths, ListLengths
from bigdssm.models import PackedLists, RowGroup

NOTHING_PACKED = PackedLists()
ALIKE, ALIKE_CELLS = 3 / 4, 8  # rows are of like length from so much of the longest on, or so many cells below it


@dataclass(frozen=True)
class TokenBudget:
    """How much is encoded at once and how much is kept for the backward, in tokens, padding and vectors counted."""

    chunk_tokens: int  # 0: both sides whole
    retained_tokens: int
    packed: PackedLists = NOTHING_PACKED  # these have no padding to count

    @classmethod
    def of(cls, config: EngineConfig, packed: PackedLists = NOTHING_PACKED) -> TokenBudget:
        """Return the budget that a config states; what is kept by default takes no more memory than one chunk."""
        kept = config.keep_graph_tokens
        return cls(config.chunk_tokens, config.chunk_tokens if kept is None else kept, packed)


class RowRun(NamedTuple):
    """A chunk's part of a packed list: the cells [first, last) of all that are filled, in the side's order."""

    first: int
    last: int
    groups: tuple[RowGroup, ...]  # of the chunk's rows


@dataclass(frozen=True)
class Chunk:
    """Rows of one side that are encoded at once: the [first, last) of the side's order."""

    first: int
    last: int
    outputs: slice  # of the side's outputs: its vectors
    widths: Mapping[str, int]  # of its lists: what the longest of its rows uses
    cells: int  # of its lists, padding among them
    runs: Mapping[str, RowRun] = field(default_factory=dict)  # of its lists that are packed

    @property
    def num_rows(self) -> int:
        """Return its rows; 0 in a dummy, which only keeps this rank in step with the others."""
        return self.last - self.first

    @property
    def tokens(self) -> int:
        """Return what it counts in a budget: its cells, and one a vector."""
        return self.num_outputs + self.cells if self.num_rows else 1

    @property
    def num_outputs(self) -> int:
        """Return its vectors: queries, or documents."""
        return int(self.outputs.stop - self.outputs.start)


@dataclass(frozen=True)
class SidePlan:
    """The chunks of one side, rows of like length together."""

    order: np.ndarray  # int64 [rows]: the rows' numbers, chunk after chunk
    outputs: np.ndarray  # int64 [vectors]: the numbers of the rows' queries or documents, in the same order
    row_in_chunk: np.ndarray  # int64 [vectors]: the row of each among those of its chunk
    chunks: tuple[Chunk, ...]
    length: np.ndarray  # int64 [rows]: cells of each row's lists that hold something
    dummy: Chunk  # one row for nothing: a rank without a forward or backward that others make stops ZeRO
    packed: Mapping[str, int] = field(default_factory=dict)  # lists that are packed, and what pads each

    @property
    def filled(self) -> int:
        """Return the cells of lists that hold something."""
        return int(self.length.sum())

    @property
    def cells(self) -> int:
        """Return the cells of lists that are encoded, padding among them."""
        return sum(chunk.cells for chunk in self.chunks)

    def filled_up(self, number: int) -> SidePlan:
        """Return the plan with as many dummies behind as make its chunks `number`, at least one."""
        return replace(self, chunks=self.chunks + (self.dummy,) * (max(1, number) - len(self.chunks)))


def plan_side(
    lengths: Lengths,
    num_rows: int,
    chunk_tokens: int,
    outputs_of_row: np.ndarray | None = None,
    packed: frozenset[str] = NOTHING_PACKED.query,
) -> SidePlan:
    """Return chunks of rows of like length, each within the budget of tokens (at least one row), longest rows first.

    Rows are sorted by their length in the widest list, then the next: that is where padding would cost most. A budget
    of 0 puts all rows, as they are, into one chunk. outputs_of_row: the vectors that each gives, row after row; one by
    default. packed: the lists that are.
    """
    per_row = np.ones(num_rows, np.int64) if outputs_of_row is None else outputs_of_row
    length = sum((list_.filled for list_ in lengths.values()), np.zeros(num_rows, np.int64))
    fills = {name: list_.fill for name, list_ in lengths.items() if name in packed}
    widths = {name: list_.width for name, list_ in lengths.items()}
    dummy = Chunk(0, 0, slice(0, 0), widths, sum(widths.values()))
    order, bounds = np.arange(num_rows), [(0, num_rows)]
    if chunk_tokens:
        order = _longest_first(lengths, num_rows)
        bounds = list(_within(chunk_tokens, lengths, packed, per_row, order))
    starts = offsets_of(per_row)
    outputs = gather_ranges(np.arange(starts[-1]), starts[order], starts[order + 1])
    in_order = {name: offsets_of(lengths[name].filled[order]) for name in fills}
    chunks = []
    for first, last in bounds:
        rows = order[first:last]
        used = {name: _used(list_, rows) for name, list_ in lengths.items()} if chunk_tokens else widths
        runs = {name: _run(offsets[first : last + 1]) for name, offsets in in_order.items()}
        cells = (last - first) * sum(width for name, width in used.items() if name not in runs)
        its = slice(int(outputs.offsets[first]), int(outputs.offsets[last]))
        chunks.append(Chunk(first, last, its, used, cells + sum(run.last - run.first for run in runs.values()), runs))
    first_row = np.repeat([chunk.first for chunk in chunks], [chunk.num_outputs for chunk in chunks]).astype(np.int64)
    row_in_chunk = np.repeat(np.arange(num_rows), outputs.lengths) - first_row
    return SidePlan(order, outputs.values, row_in_chunk, tuple(chunks), length, dummy, fills)


def _longest_first(lengths: Lengths, num_rows: int) -> np.ndarray:
    widest_first = sorted(lengths.values(), key=lambda list_: -list_.width)
    columns = [np.maximum(1, list_.filled) for list_ in widest_first] or [np.zeros(num_rows, np.int64)]
    return np.lexsort([-column for column in reversed(columns)])


def _within(
    chunk_tokens: int, lengths: Lengths, packed: frozenset[str], per_row: np.ndarray, order: np.ndarray
) -> Iterator[tuple[int, int]]:
    """Yield the [first, last) of the order that each chunk has."""
    length_FR = {name: np.maximum(1, list_.filled)[order] for name, list_ in lengths.items()}
    first = 0
    while first < len(order):
        some = slice(first, first + max(1, chunk_tokens))
        tokens = np.cumsum(per_row[order[some]])
        number = np.arange(1, len(tokens) + 1)
        for name, length_R in length_FR.items():
            part = length_R[some]
            tokens += np.cumsum(part) if name in packed else number * np.maximum.accumulate(part)
        last = first + max(1, int((tokens <= chunk_tokens).sum()))
        yield first, last
        first = last


def _run(offsets: np.ndarray) -> RowRun:
    return RowRun(int(offsets[0]), int(offsets[-1]), like_length(np.diff(offsets)))


def like_length(length_R: np.ndarray) -> tuple[RowGroup, ...]:
    """Return rows of like length together, the longest ones first: for lengths up to T some log T groups."""
    longest_first = np.sort(length_R)[::-1]
    groups, first = [], 0
    while first < len(longest_first):
        longest = int(longest_first[first])
        shortest = min(ALIKE * longest, longest - ALIKE_CELLS)
        last = int(np.searchsorted(-longest_first, -shortest, side="right"))
        groups.append(RowGroup(last - first, longest))
        first = last
    return tuple(groups)


def agreed_plan(plan: SidePlan) -> SidePlan:
    """Return the plan with as many chunks as the rank that has most of them. A collective."""
    return plan.filled_up(int(distributed.all_reduce(torch.tensor([len(plan.chunks)]), "max")))


@dataclass(frozen=True)
class StepPlan:
    """What one rank encodes in a step, in how many pieces, and how many of them keep their graph."""

    query: SidePlan
    doc: SidePlan
    whole: bool  # both sides in one forward
    num_retained: int = 0  # of the pieces, queries' before documents': the last so many
    pairs: SidePlan | None = None  # what a cross-encoder reads beside them

    @property
    def tokens(self) -> int:
        """Return the cells of all lists (tokens, history items, values) that hold something."""
        return sum(side.filled for side in self._sides)

    @property
    def num_queries(self) -> int:
        """Return this rank's queries."""
        return len(self.query.outputs)

    @property
    def padding(self) -> float:
        """Return the share of what is encoded that is padding; 0 without lists."""
        cells = sum(side.cells for side in self._sides)
        return 1 - self.tokens / cells if cells else 0.0

    @property
    def _sides(self) -> list[SidePlan]:
        return [self.query, self.doc, *([] if self.pairs is None else [self.pairs])]


class StepRequirements(NamedTuple):
    """What the ranks agree on of a plan by its most: chunks of both sides, and of each the first whose graph is kept.

    It is the last pieces that are kept, documents behind queries: where a document's chunk is not, no query's is.
    """

    queries: int
    docs: int
    first_query: int
    first_doc: int


@dataclass(frozen=True)
class StepDraft:
    """One rank's plan of a batch, before the ranks agree on the number of chunks and on how many keep their graph."""

    query: SidePlan
    doc: SidePlan
    whole: StepPlan | None  # where one chunk a side is enough here, and may be on every rank
    needs: StepRequirements

    def agreed(self, most: StepRequirements) -> StepPlan:
        """Return the plan for the most that any rank needs, number by number."""
        if max(most.queries, most.docs) <= 1:
            assert self.whole is not None
            return self.whole
        query, doc = self.query.filled_up(most.queries), self.doc.filled_up(most.docs)
        kept_queries = 0 if most.first_doc else len(query.chunks) - most.first_query
        return StepPlan(query, doc, False, len(doc.chunks) - most.first_doc + kept_queries)


def draft_step(batch: Batch, budget: TokenBudget) -> StepDraft:
    """Return this rank's part of a batch's plan: chunks, and graphs kept from the last of them on while they fit."""
    query, doc = _sides(batch, budget, budget.chunk_tokens)
    if budget.chunk_tokens == 0:
        return StepDraft(query, doc, StepPlan(query, doc, whole=True), StepRequirements(1, 1, 0, 0))
    last_first = [chunk.tokens for chunk in reversed(query.chunks + doc.chunks)]
    unkept = len(last_first) - int((np.cumsum(last_first) <= budget.retained_tokens).sum())
    num_query, num_doc = len(query.chunks), len(doc.chunks)
    whole = StepPlan(*_sides(batch, budget, 0), whole=True) if max(num_query, num_doc) <= 1 else None
    needs = StepRequirements(num_query, num_doc, min(unkept, num_query), max(0, unkept - num_query))
    return StepDraft(query, doc, whole, needs)


def plan_step(batch: Batch, budget: TokenBudget) -> StepPlan:
    """Return the plan of a batch: with chunks equally many and as many of them kept on every rank. A collective."""
    draft = draft_step(batch, budget)
    if budget.chunk_tokens == 0:
        return draft.agreed(draft.needs)
    return draft.agreed(most_needed(draft.needs))


def most_needed(needs: StepRequirements) -> StepRequirements:
    """Return the most that any rank needs. A collective."""
    return StepRequirements(*distributed.all_reduce(torch.tensor(needs), "max").tolist())


def _sides(batch: Batch, budget: TokenBudget, chunk_tokens: int) -> tuple[SidePlan, SidePlan]:
    query, doc = budget.packed
    return (
        plan_side(batch.query_lengths, len(batch.row_ids), chunk_tokens, batch.queries_of_row, query),
        plan_side(batch.doc_lengths, len(batch.doc_ids), chunk_tokens, packed=doc),
    )


def _used(list_: ListLengths, rows: np.ndarray) -> int:
    return min(list_.width, max(1, int(list_.used[rows].max(initial=0))))
