"""The plan of a step: the chunks of each side, their features, and the chunks whose graph is retained.

Plans are computed on the host from the lengths in a batch; no device tensor is read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.config import EngineConfig
from bigdssm.features.base import REQUEST_PREFIX
from bigdssm.features.ragged import gather_ranges, offsets_of
from bigdssm.loader.batch import Batch, Features, Lengths, Paddings, inputs_of_events, lengths_of
from bigdssm.models import Packed, PackedLists, QueryPositions, RowGroup, Values, pack
from bigdssm.utils.device import to_device

NOTHING_PACKED = PackedLists()
# A row joins a group if its length is at least this ratio of the longest, or at most this many cells shorter.
SIMILAR_RATIO, SIMILAR_CELLS = 3 / 4, 8
# Tokens per chunk: fits a CPU's caches (twice as fast as one large batch), or keeps a GPU busy.
CHUNK_TOKENS_CPU, CHUNK_TOKENS_GPU = 4096, 65536


@dataclass(frozen=True)
class TokenBudget:
    """Limits of a chunk and of the retained graphs, in tokens, including padding and one per output vector."""

    chunk_tokens: int  # 0: no chunks
    retained_tokens: int
    packed: PackedLists = NOTHING_PACKED  # lists without padding

    @classmethod
    def of(cls, config: EngineConfig, packed: PackedLists = NOTHING_PACKED) -> "TokenBudget":
        """Return the budget of a config; by default the retained graphs are as large as one chunk."""
        retained = config.keep_graph_tokens
        return cls(config.chunk_tokens, config.chunk_tokens if retained is None else retained, packed)


class RowRun(NamedTuple):
    """A chunk's slice [first, last) of the filled cells of a packed list, in the side's order."""

    first: int
    last: int
    groups: tuple[RowGroup, ...]  # of the chunk's rows


@dataclass(frozen=True)
class Chunk:
    """Rows [first, last) of a side's order that are encoded in one forward."""

    first: int
    last: int
    outputs: slice  # of the side's outputs
    widths: Mapping[str, int]  # by list, and input that is cut with it: the width of the list's longest row
    cells: int  # of all lists, including padding
    runs: Mapping[str, RowRun] = field(default_factory=dict)  # by packed list

    @property
    def num_rows(self) -> int:
        """Return the number of rows; 0 for a dummy chunk, which keeps the ranks' forwards in step."""
        return self.last - self.first

    @property
    def tokens(self) -> int:
        """Return the tokens that count towards a budget: the cells, and one per vector."""
        return self.num_outputs + self.cells if self.num_rows else 1

    @property
    def num_outputs(self) -> int:
        """Return the number of vectors (queries or documents)."""
        return int(self.outputs.stop - self.outputs.start)


@dataclass(frozen=True)
class SidePlan:
    """The chunks of one side; each has rows of similar length."""

    order: np.ndarray  # int64 [rows]: row indices, chunk after chunk
    outputs: np.ndarray  # int64 [vectors]: indices of the rows' queries or documents, in the same order
    row_in_chunk: np.ndarray  # int64 [vectors]: row within the chunk
    chunks: tuple[Chunk, ...]
    length: np.ndarray  # int64 [rows]: number of filled cells
    dummy: Chunk  # one row of padding: under ZeRO all ranks must run equally many forwards and backwards
    packed: Mapping[str, int] = field(default_factory=dict)  # padding value by packed list

    @property
    def filled(self) -> int:
        """Return the number of filled cells."""
        return int(self.length.sum())

    @property
    def cells(self) -> int:
        """Return the number of encoded cells, including padding."""
        return sum(chunk.cells for chunk in self.chunks)

    def padded_to(self, num_chunks: int) -> "SidePlan":
        """Return the plan with dummies appended up to `num_chunks` chunks, at least one."""
        return replace(self, chunks=self.chunks + (self.dummy,) * (max(1, num_chunks) - len(self.chunks)))


def plan_side(
    lengths: Lengths,
    num_rows: int,
    chunk_tokens: int,
    outputs_of_row: np.ndarray | None = None,
    packed: frozenset[str] = NOTHING_PACKED.query,
) -> SidePlan:
    """Split rows, longest first, into chunks of at most `chunk_tokens` tokens (and at least one row).

    Rows are sorted by length in the widest list first, where padding costs most. With a budget of 0 all rows are one
    chunk, unsorted. outputs_of_row: number of vectors per row, by default 1. packed: names of packed lists.
    """
    per_row = np.ones(num_rows, np.int64) if outputs_of_row is None else outputs_of_row
    length = sum((list_.filled for list_ in lengths.values()), np.zeros(num_rows, np.int64))
    fills = {name: list_.fill for name, list_ in lengths.items() if name in packed}
    widths = {name: list_.width for name, list_ in lengths.items()}
    dummy = Chunk(0, 0, slice(0, 0), widths, sum(widths.values()))
    order, bounds = np.arange(num_rows), [(0, num_rows)]
    if chunk_tokens:
        widest_first = sorted(lengths.values(), key=lambda list_: -list_.width)
        columns = [np.maximum(1, list_.filled) for list_ in widest_first] or [np.zeros(num_rows, np.int64)]
        order, bounds, last = np.lexsort([-column for column in reversed(columns)]), [], 0
        length_FR = {
            name: np.maximum(1, list_.filled if name in packed else list_.used)[order]
            for name, list_ in lengths.items()
        }
        while (first := last) < num_rows:
            # as many rows as the budget allows; a chunk is as wide as its longest row, but for packed lists
            window = slice(first, first + max(1, chunk_tokens))
            tokens = np.cumsum(per_row[order[window]])
            number = np.arange(1, len(tokens) + 1)
            for name, length_R in length_FR.items():
                length_W = length_R[window]
                tokens += np.cumsum(length_W) if name in packed else number * np.maximum.accumulate(length_W)
            last = first + max(1, int((tokens <= chunk_tokens).sum()))
            bounds.append((first, last))
    starts = offsets_of(per_row)
    outputs = gather_ranges(np.arange(starts[-1]), starts[order], starts[order + 1])
    in_order = {name: offsets_of(lengths[name].filled[order]) for name in fills}
    chunks = []
    for first, last in bounds:
        rows = order[first:last]
        used = widths
        if chunk_tokens:
            longest = {name: int(list_.used[rows].max(initial=0)) for name, list_ in lengths.items()}
            used = {name: min(width, max(1, longest[name])) for name, width in widths.items()}
        runs = {
            name: RowRun(int(ends[first]), int(ends[last]), group_by_length(np.diff(ends[first : last + 1])))
            for name, ends in in_order.items()
        }
        cells = (last - first) * sum(width for name, width in used.items() if name not in runs)
        used = used | {other: used[name] for name, list_ in lengths.items() for other in list_.inputs}
        chunk_outputs = slice(int(outputs.offsets[first]), int(outputs.offsets[last]))
        cells += sum(run.last - run.first for run in runs.values())
        chunks.append(Chunk(first, last, chunk_outputs, used, cells, runs))
    first_row = np.repeat([chunk.first for chunk in chunks], [chunk.num_outputs for chunk in chunks]).astype(np.int64)
    row_in_chunk = np.repeat(np.arange(num_rows), outputs.lengths) - first_row
    return SidePlan(order, outputs.values, row_in_chunk, tuple(chunks), length, dummy, fills)


def group_by_length(length_R: np.ndarray) -> tuple[RowGroup, ...]:
    """Group rows of similar length, longest first: O(log T) groups for lengths up to T."""
    longest_first = np.sort(length_R)[::-1]
    groups, first = [], 0
    while first < len(longest_first):
        longest = int(longest_first[first])
        shortest = min(SIMILAR_RATIO * longest, longest - SIMILAR_CELLS)
        last = int(np.searchsorted(-longest_first, -shortest, side="right"))
        groups.append(RowGroup(last - first, longest))
        first = last
    return tuple(groups)


@dataclass(frozen=True)
class StepPlan:
    """One rank's chunks of a step, and the number of them whose graph is retained."""

    query: SidePlan
    doc: SidePlan
    whole: bool  # both sides in one forward
    num_retained: int = 0  # chunks with a retained graph: the last ones, in the order queries, documents

    @property
    def tokens(self) -> int:
        """Return the number of filled cells of all lists (tokens, history items, values)."""
        return sum(side.filled for side in self._sides)

    @property
    def padding(self) -> float:
        """Return the share of padding among the encoded cells; 0 without lists."""
        cells = sum(side.cells for side in self._sides)
        return 1 - self.tokens / cells if cells else 0.0

    @property
    def _sides(self) -> list[SidePlan]:
        return [self.query, self.doc]


class ChunkCounts(NamedTuple):
    """Numbers of chunks that a rank's plan requires; the ranks take the element-wise maximum.

    Chunk order: queries, then documents. Graphs are retained from the end, so those of documents first.
    """

    queries: int = 1  # number of chunks
    docs: int = 1
    first_query: int = 0  # first chunk with a retained graph
    first_doc: int = 0


@dataclass(frozen=True)
class LocalStepPlan:
    """One rank's plan of a batch, before it is synchronized with the other ranks."""

    query: SidePlan
    doc: SidePlan
    whole: StepPlan | None  # for one chunk per side on all ranks; None if this rank needs more
    counts: ChunkCounts

    def synchronized(self, counts: ChunkCounts) -> StepPlan:
        """Return the plan for the maximum of the ranks' chunk counts."""
        if max(counts.queries, counts.docs) <= 1:
            assert self.whole is not None
            return self.whole
        query, doc = self.query.padded_to(counts.queries), self.doc.padded_to(counts.docs)
        retained = len(doc.chunks) - counts.first_doc
        if counts.first_doc == 0:
            retained += len(query.chunks) - counts.first_query
        return StepPlan(query, doc, False, retained)


def plan_locally(batch: Batch, budget: TokenBudget) -> LocalStepPlan:
    """Return this rank's plan of a batch; graphs are retained from the last chunk backwards within the budget."""
    query, doc = _sides(batch, budget, budget.chunk_tokens)
    if budget.chunk_tokens == 0:
        return LocalStepPlan(query, doc, StepPlan(query, doc, True), ChunkCounts())
    last_first = [chunk.tokens for chunk in reversed(query.chunks + doc.chunks)]
    recomputed = len(last_first) - int((np.cumsum(last_first) <= budget.retained_tokens).sum())
    num_query = len(query.chunks)
    num_doc = len(doc.chunks)
    one_forward = StepPlan(*_sides(batch, budget, 0), whole=True) if max(num_query, num_doc) <= 1 else None
    counts = ChunkCounts(
        queries=num_query,
        docs=num_doc,
        first_query=min(recomputed, num_query),
        first_doc=max(0, recomputed - num_query),
    )
    return LocalStepPlan(query, doc, one_forward, counts)


def plan_step(batch: Batch, budget: TokenBudget) -> StepPlan:
    """Return the plan of a batch, synchronized over all ranks. All ranks must call it."""
    local = plan_locally(batch, budget)
    # on the batch's device, which the process group of a caller of `cached_step` supports
    device = batch.positive.device
    return local.synchronized(max_over_ranks(local.counts, device) if budget.chunk_tokens else local.counts)


def max_over_ranks(counts: ChunkCounts, device: torch.device | str = "cpu") -> ChunkCounts:
    """Return the element-wise maximum over all ranks. All ranks must call it."""
    return ChunkCounts(*distributed.all_reduce(torch.tensor(counts, device=device), "max").tolist())


def _sides(batch: Batch, budget: TokenBudget, chunk_tokens: int) -> tuple[SidePlan, SidePlan]:
    query, doc = budget.packed
    return (
        plan_side(batch.query_lengths, len(batch.row_ids), chunk_tokens, batch.queries_of_row, query),
        plan_side(batch.doc_lengths, len(batch.doc_ids) if batch.doc else 0, chunk_tokens, packed=doc),
    )


class Chunked:
    """One side's features, split by its plan. The order of rows and outputs is sent to the device once."""

    def __init__(self, features: Features, plan: SidePlan, query_positions: QueryPositions | None = None) -> None:
        """`query_positions`: for rows with several queries."""
        self._features, self.plan = features, plan
        device = next(iter(features.values())).device
        parts = (plan.order, plan.outputs, plan.row_in_chunk)
        sent = to_device(torch.from_numpy(np.concatenate(parts)), device)
        self._order, self._outputs, row_in_chunk = sent.split([len(part) for part in parts])
        self._packed: dict[str, Packed] = {}  # list features of all rows, in the plan's order
        self._events: dict[str, Tensor] = {}  # values of their events, [P]
        for name, fill in plan.packed.items():
            runs = [chunk.runs[name] for chunk in plan.chunks if chunk.num_rows]
            last = max((run.last for run in runs), default=0)
            longest = max((run.groups[0].longest for run in runs), default=0)
            self._packed[name] = packed = pack(features[name][self._order], fill, last, longest)
            for event in inputs_of_events(name, features):  # packed by the history's cells
                self._events[event] = features[event][self._order[packed.row], packed.position]
        self._query_positions = (
            None
            if query_positions is None
            else QueryPositions(row_in_chunk, query_positions.prefix_length[self._outputs], query_positions.most)
        )

    def features(self, chunk: Chunk) -> dict[str, Values]:
        """Return the features of a chunk's rows, lists packed or cut to the longest row; one row for a dummy chunk.

        A list that is empty in all rows is not packed.
        """
        if not chunk.num_rows:
            return {**at_least_one({name: tensor[:1] for name, tensor in self._features.items()})}
        rows = slice(chunk.first, chunk.last)
        packed = {
            name: self._packed[name].slice_rows(rows, slice(run.first, run.last), run.groups)
            for name, run in chunk.runs.items()
            if run.last > run.first
        }
        events = {
            event: values[chunk.runs[name].first : chunk.runs[name].last]
            for event, values in self._events.items()
            if (name := event.partition(".")[0]) in packed
        }
        remaining = [name for name in self._features if name not in packed and name not in events]
        per_query = self.outputs(chunk)
        taken = {
            name: self._features[name][per_query if name.startswith(REQUEST_PREFIX) else self._order[rows]]
            for name in remaining
        }
        return {
            **taken,
            **{name: taken[name][:, : chunk.widths[name]] for name in chunk.widths.keys() & taken},
            **packed,
            **events,
        }

    def query_positions(self, chunk: Chunk) -> QueryPositions | None:
        """Return the positions of the chunk's queries in its rows; None: one query per row."""
        if self._query_positions is None:
            return None
        row, prefix_length, most = self._query_positions
        return QueryPositions(row[chunk.outputs], prefix_length[chunk.outputs], most)

    def outputs(self, chunk: Chunk) -> Tensor:
        """Return the indices of the chunk's queries or documents, int64; empty for a dummy chunk."""
        return self._outputs[chunk.outputs]

    def assemble(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the outputs of all chunks, [outputs, …], in the order of queries or documents."""
        output = parts[0].new_empty((len(self._outputs), *parts[0].shape[1:]))
        for part, chunk in zip(parts, self.plan.chunks, strict=True):
            output[self.outputs(chunk)] = part[: chunk.num_outputs]
        return output


def at_least_one(features: Features) -> Features:
    """Return `features`, or one row of padding if they are empty."""
    if next(iter(features.values())).shape[0] > 0:
        return features
    return {
        name: tensor.new_zeros((1, *(max(1, size) for size in tensor.shape[1:]))) for name, tensor in features.items()
    }


def encode_in_chunks(
    features: Features, pads: Paddings, num_rows: int, encode: Callable[[dict[str, Values]], Tensor],
    device: torch.device | str = "cpu", packed: frozenset[str] = NOTHING_PACKED.query,
) -> Tensor:  # fmt: skip
    """Apply `encode` to chunks of rows of similar length on `device`; outputs in row order.

    The number of chunks is equal on all ranks. The features are on the host, where the chunks are planned. `packed`
    names the lists passed without padding.
    """
    chunk_tokens = CHUNK_TOKENS_CPU if torch.device(device).type == "cpu" else CHUNK_TOKENS_GPU
    plan = plan_side(lengths_of(features, pads), num_rows, chunk_tokens, packed=packed)
    plan = plan.padded_to(int(distributed.all_reduce(torch.tensor([len(plan.chunks)]), "max")))
    side = Chunked({name: values.to(device) for name, values in features.items()}, plan)
    return side.assemble([encode(side.features(chunk)) for chunk in plan.chunks])
