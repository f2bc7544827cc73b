"""Sampling correction (logQ): how often a document is a column of the batch by chance, and what that does to scores.

With c_j the expected number of the global batch's columns that hold document j:

    none        nothing: in the limit the score learns log p(d|q) − log q(d), with q the documents' share of the data
    classic     beta_j −= γ log c_j, everywhere in training, the positive included
    corrected   neg_bias_j −= γ log c_j: negatives only, since a positive is there by right and not by chance

Neither enters the score that serves. c comes from the catalogue's counts or from a streaming estimate. In `classic` a
constant factor of c cancels; in `corrected` it does not, which is why c is a number of columns and not a share.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.config import FrequencyCorrection
from bigdssm.distributed import Group
from bigdssm.losses.inputs import LossInputError, add_biases

_COUNTS_AT_ONCE = 1 << 20


def apply_sampling(
    sampling: FrequencyCorrection, log_expected: Tensor, *, beta: Tensor | None = None, neg_bias: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Return beta and neg_bias [n] with a correction added; log_expected [n] is log c. Raises: LossInputError."""
    if log_expected.device.type == "cpu" and bool(log_expected.isnan().any()):  # on a device that would be waited for
        raise LossInputError("log_expected holds NaN")
    if sampling.gamma == 0:
        return beta, neg_bias
    of_beta, of_neg_bias = sampling.shares(-sampling.gamma * log_expected)
    return add_biases(beta, of_beta), add_biases(neg_bias, of_neg_bias)


@dataclass
class CountedFrequency:
    """c by the catalogue's counts [num_documents], read once; a document never seen counts as seen once.

    The counts go to the device of the first documents that are asked for; a look-up then touches theirs alone.

    num_columns of the global batch, on average, follow the data, num_uniform are drawn uniformly from the catalogue
    (mixed negative sampling). Source: Yang et al. 2020 (mixed negative sampling), eq. 4, times the number of columns.
    """

    counts: Tensor
    num_columns: float
    num_uniform: int = 0
    total: Tensor = field(init=False)  # of all documents, float64

    def __post_init__(self) -> None:
        """Add the counts up, some at a time: a catalogue's are not to be held twice. Raises: LossInputError."""
        parts = self.counts.split(_COUNTS_AT_ONCE)
        if bool(torch.stack([(part < 0).any() for part in parts]).any()):
            raise LossInputError("counts hold negative values")
        self.total = torch.stack([part.double().clamp(min=1).sum() for part in parts]).sum()

    def log_expected(self, documents: Tensor) -> Tensor:
        """Return log c float64 [n] of `documents` (catalogue rows)."""
        if self.counts.device != documents.device:
            self.counts, self.total = self.counts.to(documents.device), self.total.to(documents.device)
        share = self.counts[documents].double().clamp(min=1) / self.total
        return (self.num_columns * share + self.num_uniform / self.counts.shape[0]).log()


def sample_uniform(num: int, num_documents: int, generator: torch.Generator) -> Tensor:
    """Return catalogue rows int64 [num], uniform with replacement: extra columns for mixed negative sampling."""
    return torch.randint(num_documents, (num,), generator=generator)


@dataclass
class StreamingFrequency:
    """An estimate of c from the stream of batches: the copies that a document comes in, over the steps between them.

    Both are moving averages, kept in buckets by several hashes; the smallest of their estimates is the least disturbed
    by collisions. Its state is the same on every rank, since all ranks see all ids, and depends on the batches alone.
    Source: Yi et al. 2019, Algorithm 2 and section 5, with the number of copies in a step in addition: there a step
    holds a document or does not, which makes one that every step holds many times no more frequent than one it holds
    once.
    """

    num_buckets: int
    num_hashes: int = 4
    rate: float = 0.05
    step: int = 0
    last_seen: Tensor = field(init=False)
    gap: Tensor = field(init=False)
    copies: Tensor = field(init=False)
    _sums: Tensor = field(init=False, repr=False)  # of the copies of a step; 0 between steps

    def __post_init__(self) -> None:
        shape = (self.num_hashes, self.num_buckets)
        self.last_seen = torch.zeros(shape, dtype=torch.int64)
        self.gap = torch.zeros(shape, dtype=torch.float64)
        self.copies = torch.zeros(shape, dtype=torch.float64)
        self._sums = torch.zeros(shape, dtype=torch.int64)

    def update(self, doc_ids: Tensor, copies: Tensor | None = None, group: Group | None = None) -> None:
        """Take in the next step's document ids int64 [n] of this rank, each in so many copies [n]; a collective."""
        copies = torch.ones_like(doc_ids) if copies is None else copies.to(torch.int64)
        counts = distributed.all_gather_padded(doc_ids.new_full((1,), doc_ids.shape[0]), 1, group).wait().tolist()
        rows = distributed.all_gather_rows(torch.stack([doc_ids, copies], 1), counts, group)
        last_seen, gap, copies_of, sums = self._flat(rows.device)
        self.step += 1
        bucket = self._buckets(rows[:, 0]).flatten()
        sums.scatter_add_(0, bucket, rows[:, 1].repeat(self.num_hashes))
        # Buckets that come several times are written several times, each time the same.
        new_copies, last, before, of_it = (table.index_select(0, bucket) for table in (sums, last_seen, gap, copies_of))
        sums.scatter_(0, bucket, 0)
        new_gap = (self.step - last).double()
        # the first gap starts the moving average (Algorithm 2 starts it at 0, which takes 1 / rate gaps to forget)
        moved_gap = torch.where(before == 0, new_gap, torch.lerp(before, new_gap, self.rate))
        gap.scatter_(0, bucket, torch.where(last == 0, 0.0, moved_gap))
        moved = torch.lerp(of_it, new_copies.double(), self.rate)
        copies_of.scatter_(0, bucket, torch.where(last == 0, new_copies.double(), moved))
        last_seen.scatter_(0, bucket, self.step)

    def log_expected(self, doc_ids: Tensor) -> Tensor:
        """Return log c float64 [n]: the log of the estimated number of columns of a step that hold the document."""
        _, gaps, all_copies, _ = self._flat(doc_ids.device)
        bucket = self._buckets(doc_ids).flatten()
        gap, copies = gaps.index_select(0, bucket), all_copies.index_select(0, bucket).clamp(min=1)
        # not seen twice: as if once in all steps so far
        expected = copies / torch.where(gap == 0, float(max(1, self.step)), gap)
        return expected.view(self.num_hashes, len(doc_ids)).amin(0).log()

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that goes into a checkpoint."""
        tables = {"last_seen": self.last_seen, "gap": self.gap, "copies": self.copies}
        return {"step": torch.tensor([self.step]), **{name: table.cpu() for name, table in tables.items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint. Raises: LossInputError where it has another shape."""
        if state["gap"].shape != self.gap.shape:
            raise LossInputError(
                f"the checkpoint's estimator has {list(state['gap'].shape)} hashes and buckets, this one "
                f"{list(self.gap.shape)}"
            )
        self.step = int(state["step"])
        self.last_seen, self.gap, self.copies = (state[name].clone() for name in ("last_seen", "gap", "copies"))

    def _flat(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return views [hashes · buckets] of last_seen, gap, copies and the sums of a step, on `device` from now on."""
        if self.gap.device != device or self._sums.device != device:
            self.last_seen, self.gap, self.copies, self._sums = (
                table.to(device) for table in (self.last_seen, self.gap, self.copies, self._sums)
            )
        return tuple(table.view(-1) for table in (self.last_seen, self.gap, self.copies, self._sums))

    def _buckets(self, ids: Tensor) -> Tensor:
        """Return int64 [hashes, n], the place of each id in the flat tables by every hash.

        It is splitmix64 of the 64-bit ids, in torch: they may be on a device.
        """
        hashes = torch.arange(1, self.num_hashes + 1, device=ids.device)[:, None]
        x = ids + hashes * _wrap(0x9E3779B97F4A7C15)
        x = (x ^ _shift_right(x, 30)) * _wrap(0xBF58476D1CE4E5B9)
        x = (x ^ _shift_right(x, 27)) * _wrap(0x94D049BB133111EB)
        x = x ^ _shift_right(x, 31)
        return _shift_right(x, 1) % self.num_buckets + (hashes - 1) * self.num_buckets


def _wrap(value: int) -> int:
    """Return the int64 with the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift as unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
