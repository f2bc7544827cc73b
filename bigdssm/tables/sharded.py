"""Tables that are sharded by rows: fetch the rows of a batch, look them up, return their gradients, and update them.

    working = tables.fetch({"doc_item_id": rows})      # distinct rows of this rank's batch; collective
    vectors = working.look_up("doc_item_id", positions)   # an ordinary differentiable look-up
    square = tables.reduce(working)                    # after the last backward; collective
    tables.commit(coefficient, lr_factor)              # or tables.discard()

A step takes four all-to-alls per width: counts, rows, values, gradients, and one more where rows are admitted by
occurrences; their sizes follow the distinct rows of the
batches, and not the tables. Every rank calls `fetch` and `reduce` in every step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bigdssm import distributed
from bigdssm.config.components import TableOptimizerConfig
from bigdssm.features.base import OUT_OF_VOCABULARY
from bigdssm.tables.rows import RowPartition, RowStore, TableSpec, table_key
from bigdssm.utils.device import to_device

TRIM_STEPS = 64  # steps between two evictions above a capacity, which read the steps of all rows
PADDING_POSITION = 0  # its vector is zero; the rows of a working set follow


@dataclass(frozen=True)
class Route:
    """The exchange of rows of all tables of one width between this rank and their owners."""

    names: tuple[str, ...]
    order: np.ndarray  # int64 [sent]: this rank's rows of all tables, by owner, then table
    sent: list[int]  # rows to each owner
    received: list[int]  # rows that each rank requests from this one
    requested: np.ndarray  # int64 [received]: rows, by rank, then table
    table_of: np.ndarray  # int64 [received]: number of the table


@dataclass
class WorkingSet:
    """The rows of a step on this rank: per table a leaf tensor, row 0 for padding, then the fetched rows in order."""

    leaves: dict[str, Tensor]  # float32 [1 + rows, d]
    routes: list[Route]
    dtype: torch.dtype = torch.float32  # of looked-up vectors
    # int64 [1 + rows]: the position that is looked up for each one, that of the row out of vocabulary for rows that are
    # not admitted; absent if all are
    instead: dict[str, Tensor] = field(default_factory=dict)
    # int64 [1 + codes, hashes]: the positions of the rows of each fetched code, whose vector is their sum
    hashed: dict[str, Tensor] = field(default_factory=dict)

    def look_up(self, name: str, positions: Tensor) -> Tensor:
        """Return vectors [*positions.shape, d]: position k > 0 is the k-th fetched row or code, 0 is zeros."""
        if name in self.hashed:
            positions = self.hashed[name][positions]
        if name in self.instead:
            positions = self.instead[name][positions]
        vectors = nn.functional.embedding(positions, self.leaves[name], padding_idx=PADDING_POSITION)
        return (vectors.sum(-2) if name in self.hashed else vectors).to(self.dtype)


class ShardedTables:
    """Tables whose rows are divided over the ranks. `fetch`, `look_up` and `reduce` are collectives."""

    def __init__(
        self, specs: Sequence[TableSpec], optimizer: TableOptimizerConfig, seed: int, *,
        device: torch.device | None = None, storage: torch.device | None = None, folder: Path | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        """device: of working sets and gradients; storage: of rows and states, by default the same.

        folder: files that hold rows and states instead of memory. dtype: of looked-up vectors.
        """
        self.specs = {spec.name: spec for spec in specs}
        self.optimizer = optimizer
        self.sent_bytes = self.num_exchanges = 0  # of this rank, to other ranks
        self._device, self._dtype = device or torch.device("cpu"), dtype
        self.partition = RowPartition(distributed.rank(), distributed.world_size())
        self.stores = {
            spec.name: RowStore(
                spec,
                table_key(seed, spec.name),
                self.partition,
                optimizer,
                storage or self._device,
                folder,
            )
            for spec in specs
        }
        # by table: distinct rows of this rank, int64 [n], and their mean gradients of a step, float32 [n, d]
        self._pending: dict[str, tuple[np.ndarray, Tensor]] = {}
        self.steps = 0  # that have been applied

    def fetch(self, rows: Mapping[str, np.ndarray]) -> WorkingSet:
        """Return the working set of distinct rows, or codes, int64 [n] of each table, without row 0, on the host.

        A table whose rows are admitted by occurrences also fetches the row out of vocabulary.
        """
        working = WorkingSet({}, [], self._dtype)
        requested: dict[str, np.ndarray] = {}  # by table: distinct rows
        widths: dict[int, list[str]] = {}
        for name, spec in self.specs.items():
            distinct = rows.get(name, np.zeros(0, np.int64))
            if spec.hash_rows:  # the rows of codes, and the positions of the rows of each code
                padded = spec.hashed(np.append(PADDING_POSITION, distinct))
                distinct, positions = np.unique(padded, return_inverse=True)
                distinct = distinct[1:]  # 0 is the first
                working.hashed[name] = to_device(torch.from_numpy(positions.reshape(padded.shape)), self._device)
            if spec.admit_after > 1 and OUT_OF_VOCABULARY not in distinct[:1]:
                distinct = np.append(distinct, OUT_OF_VOCABULARY)
            requested[name] = distinct
            widths.setdefault(spec.dim, []).append(name)
        world = self.partition.world_size
        for dim, names in widths.items():
            # exchange the numbers of rows, and the rows, with their owners
            lengths = [len(requested[name]) for name in names]
            table_of = np.repeat(np.arange(len(names)), lengths)
            all_rows = np.concatenate([requested[name] for name in names]).astype(np.int64)
            owner = self.partition.owner(all_rows)
            order = np.lexsort((table_of, owner))
            counts = np.bincount(owner * len(names) + table_of, minlength=world * len(names)).reshape(world, len(names))
            requested_counts = self._exchange(torch.from_numpy(counts), [1] * world, [1] * world).numpy()
            sent, received = counts.sum(1).tolist(), requested_counts.sum(1).tolist()
            owned_rows = self._exchange(torch.from_numpy(all_rows[order]), sent, received).numpy()
            owned_table = np.repeat(np.tile(np.arange(len(names)), world), requested_counts.ravel())
            working.routes.append(Route(tuple(names), order, sent, received, owned_rows, owned_table))
            # read the rows that this rank owns, and return their values to the ranks that requested them
            owned = torch.empty(len(owned_rows), dim, device=self._device)
            admitted = np.zeros(len(owned_rows), np.int64)
            by_admission = any(self.specs[name].admit_after > 1 for name in names)
            for number, name in enumerate(names):
                of_table = np.flatnonzero(owned_table == number)
                read = to_device(self.stores[name].read(owned_rows[of_table], self.steps), self._device)
                owned.index_copy_(0, to_device(torch.from_numpy(of_table), self._device), read)
                if by_admission:
                    admitted[of_table] = self.stores[name].is_admitted(owned_rows[of_table], self.steps)
            values = self._exchange(owned, received, sent)
            index = to_device(torch.from_numpy(order), self._device)
            in_order = torch.empty_like(values).index_copy_(0, index, values)
            for name, part in zip(names, in_order.split(lengths), strict=True):
                working.leaves[name] = torch.cat([part.new_zeros(1, dim), part]).requires_grad_()
            if not by_admission:
                continue
            # rows that are not admitted look up the row out of vocabulary
            answers = self._exchange(torch.from_numpy(admitted), received, sent)
            used_rows = torch.empty_like(answers).index_copy_(0, torch.from_numpy(order), answers)
            for name, used in zip(names, used_rows.split(lengths), strict=True):
                if self.specs[name].admit_after > 1:
                    unknown = int(np.flatnonzero(requested[name] == OUT_OF_VOCABULARY)[0]) + 1
                    instead = np.where(used.numpy(), np.arange(1, len(used) + 1), unknown)
                    instead = np.append(PADDING_POSITION, instead)
                    working.instead[name] = to_device(torch.from_numpy(instead), self._device)
        return working

    @torch.no_grad()
    def look_up(self, name: str, rows: Tensor) -> Tensor:
        """Return vectors [*rows.shape, d] of any rows int64 of a table, zeros for row 0."""
        distinct, inverse = np.unique(rows.detach().cpu().numpy(), return_inverse=True)
        first = int(len(distinct) > 0 and distinct[0] == 0)
        positions = torch.from_numpy(inverse.reshape(rows.shape) + 1 - first)
        return self.fetch({name: distinct[first:]}).look_up(name, positions.to(self._device)).detach()

    def reduce(self, working: WorkingSet) -> Tensor:
        """Send the gradients of a working set to the owners of its rows; return the sum of squares over all tables.

        Gradients are those of the mean over ranks of the ranks' losses; the result is float64 [], equal on every rank.
        """
        square, self._pending = torch.zeros((), dtype=torch.float64, device=self._device), {}
        for route in working.routes:
            leaves = [working.leaves[name] for name in route.names]
            gradients = torch.cat([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves])
            skipped = np.repeat(np.arange(1, len(leaves) + 1), [len(leaf) - 1 for leaf in leaves])  # padding rows
            index = to_device(torch.from_numpy((np.arange(len(skipped)) + skipped)[route.order]), self._device)
            received = self._exchange(gradients[index], route.sent, route.received)
            for number, name in enumerate(route.names):
                # summed in the order of ranks: the same bits in every run
                of_table = np.flatnonzero(route.table_of == number)
                order = np.argsort(route.requested[of_table], kind="stable")
                rows, lengths = np.unique(route.requested[of_table], return_counts=True)
                by_row, counts = (to_device(torch.from_numpy(n), self._device) for n in (of_table[order], lengths))
                # one thread adds the gradients of a number; unsafe: without reading the lengths on the device
                total = torch.segment_reduce(received[by_row], "sum", lengths=counts, axis=0, unsafe=True)
                gradients_of_rows = total / self.partition.world_size
                square += gradients_of_rows.double().square().sum()
                self._pending[name] = rows, gradients_of_rows
        return distributed.all_reduce(square)

    def commit(self, coefficient: float | Tensor, lr_factor: float) -> None:
        """Update the rows of the last `reduce`, their gradients times `coefficient`."""
        for name, (rows, gradients) in self._pending.items():
            if len(rows):
                self.stores[name].update(rows, gradients * coefficient, self.optimizer.lr * lr_factor, self.steps)
        self._pending = {}
        self.steps += 1
        if self.steps % TRIM_STEPS == 0:
            for store in self.stores.values():
                store.trim(self.steps)

    def discard(self) -> None:
        """Leave the rows of the last `reduce` as they are."""
        self._pending = {}

    def _exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        others = len(rows) - sent[self.partition.rank]
        self.sent_bytes += others * rows[:1].nbytes if len(rows) else 0
        self.num_exchanges += 1
        return distributed.all_to_all_rows(rows, sent, received)
