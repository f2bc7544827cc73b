"""Sampling correction (logQ) for the frequency of documents as in-batch negatives.

With c_j the expected number of columns of the global batch that hold document j:

    none        the score learns log p(d|q) − log q(d), where q(d) is the document's share in the data
    corrected   neg_bias_j −= γ log c_j on negatives only, since a positive is not sampled by chance

The serving score is not corrected. c is computed from the catalogue's counts or from a streaming estimate. A constant
factor of c does not cancel, so c must be a number of columns and not a share.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.config import FrequencyCorrection
from bigdssm.distributed import Group
from bigdssm.losses.inputs import LossInputError, add_biases
from bigdssm.utils.hashing import MIX64_INCREMENT, MIX64_STEPS, signed64

_COUNTS_AT_ONCE = 1 << 20


def apply_sampling(
    sampling: FrequencyCorrection, log_expected: Tensor, *, beta: Tensor | None = None, neg_bias: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Return beta and neg_bias [n] with a correction added; log_expected [n] is log c. Raises: LossInputError."""
    if log_expected.device.type == "cpu" and bool(log_expected.isnan().any()):  # on a GPU this would synchronize
        raise LossInputError("log_expected holds NaN")
    if sampling.gamma == 0:
        return beta, neg_bias
    of_beta, of_neg_bias = sampling.shares(-sampling.gamma * log_expected)
    return add_biases(beta, of_beta), add_biases(neg_bias, of_neg_bias)


@dataclass
class CountedFrequency:
    """Estimates c from the catalogue's counts [num_documents]; a document with count 0 is treated as seen once.

    The counts are moved to the device of the first requested documents; a lookup reads only those documents' counts.

    On average, num_columns of the global batch follow the data distribution; num_uniform are drawn uniformly from the
    catalogue without `undrawn` documents. Source: Yang et al. 2020 (mixed negative sampling), eq. 4, times the number
    of columns.
    """

    counts: Tensor
    num_columns: float
    num_uniform: int = 0
    undrawn: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # int64: documents
    total: Tensor = field(init=False)  # of all documents, float64

    def __post_init__(self) -> None:
        """Sum the counts in chunks, without a second copy of them. Raises: LossInputError."""
        parts = self.counts.split(_COUNTS_AT_ONCE)
        if bool(torch.stack([(part < 0).any() for part in parts]).any()):
            raise LossInputError("counts hold negative values")
        self.total = torch.stack([part.double().clamp(min=1).sum() for part in parts]).sum()

    def log_expected(self, documents: Tensor) -> Tensor:
        """Return log c float64 [n] of `documents` (catalogue rows)."""
        if self.counts.device != documents.device:
            self.counts, self.total = self.counts.to(documents.device), self.total.to(documents.device)
        counts = self.counts[documents].double()
        uniform = self.num_uniform / (self.counts.shape[0] - len(self.undrawn))
        return (self.num_columns * counts.clamp(min=1) / self.total + uniform).log()


def sample_uniform(num: int, num_documents: int, generator: torch.Generator) -> Tensor:
    """Draw catalogue rows int64 [num], uniform with replacement: extra columns for mixed negative sampling."""
    return torch.randint(num_documents, (num,), generator=generator)


@dataclass
class StreamingFrequency:
    """Estimates c from the stream of batches: a document's count per step, over its gap between steps.

    Both are moving averages, stored in buckets of several hashes; the minimum over hashes has the least error from
    collisions. The state is the same on every rank, since all ids are gathered, and depends only on the batches.
    Source: Yi et al. 2019, Algorithm 2 and section 5, extended by the count per step: the original only records whether
    a step contains a document; many occurrences per step therefore look as frequent as one.
    """

    num_buckets: int
    num_hashes: int = 4
    rate: float = 0.05
    step: int = 0
    last_seen: Tensor = field(init=False)
    gap: Tensor = field(init=False)
    counts: Tensor = field(init=False)  # average number of columns per step that holds the document
    _sums: Tensor = field(init=False, repr=False)  # counts of the current step; 0 between steps

    def __post_init__(self) -> None:
        shape = (self.num_hashes, self.num_buckets)
        self.last_seen = torch.zeros(shape, dtype=torch.int64)
        self.gap = torch.zeros(shape, dtype=torch.float64)
        self.counts = torch.zeros(shape, dtype=torch.float64)
        self._sums = torch.zeros(shape, dtype=torch.int64)

    def update(self, doc_ids: Tensor, counts: Tensor | None = None, group: Group | None = None) -> None:
        """Add this rank's document ids int64 [n] of the next step, with their counts [n]; a collective."""
        counts = torch.ones_like(doc_ids) if counts is None else counts.to(torch.int64)
        lengths = distributed.all_gather_padded(doc_ids.new_full((1,), doc_ids.shape[0]), 1, group).tolist()
        rows = distributed.all_gather_rows(torch.stack([doc_ids, counts], 1), lengths, group)
        last_seen, gap, all_counts, sums = self._flat(rows.device)
        self.step += 1
        bucket = self._buckets(rows[:, 0]).flatten()
        sums.scatter_add_(0, bucket, rows[:, 1].repeat(self.num_hashes))
        # A bucket that occurs several times is written several times with the same value.
        new_count, last, before, old_count = (
            table.index_select(0, bucket) for table in (sums, last_seen, gap, all_counts)
        )
        sums.scatter_(0, bucket, 0)
        new_gap = (self.step - last).double()
        # the first gap initializes the moving average (Algorithm 2 starts at 0, a bias that lasts for 1 / rate gaps)
        moved_gap = torch.where(before == 0, new_gap, torch.lerp(before, new_gap, self.rate))
        gap.scatter_(0, bucket, torch.where(last == 0, 0.0, moved_gap))
        moved = torch.lerp(old_count, new_count.double(), self.rate)
        all_counts.scatter_(0, bucket, torch.where(last == 0, new_count.double(), moved))
        last_seen.scatter_(0, bucket, self.step)

    def log_expected(self, doc_ids: Tensor) -> Tensor:
        """Return log c float64 [n]: the log of the estimated number of columns of a step that hold the document."""
        _, gaps, all_counts, _ = self._flat(doc_ids.device)
        bucket = self._buckets(doc_ids).flatten()
        gap, count = gaps.index_select(0, bucket), all_counts.index_select(0, bucket).clamp(min=1)
        # without a second occurrence, the gap is the number of steps so far
        expected = count / torch.where(gap == 0, float(max(1, self.step)), gap)
        return expected.view(self.num_hashes, len(doc_ids)).amin(0).log()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint."""
        tables = {"last_seen": self.last_seen, "gap": self.gap, "copies": self.counts}
        return {"step": torch.tensor([self.step]), **{name: table.cpu() for name, table in tables.items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the state of a checkpoint. Raises: LossInputError: another shape."""
        if state["gap"].shape != self.gap.shape:
            raise LossInputError(
                f"the checkpoint's estimator has {list(state['gap'].shape)} hashes and buckets, this one "
                f"{list(self.gap.shape)}"
            )
        self.step = int(state["step"])
        self.last_seen, self.gap, self.counts = (state[name].clone() for name in ("last_seen", "gap", "copies"))

    def _flat(self, device: torch.device) -> tuple[Tensor, ...]:
        """Move the tables to `device`; return views [hashes · buckets] of last_seen, gap, counts and _sums."""
        if self.gap.device != device or self._sums.device != device:
            self.last_seen, self.gap, self.counts, self._sums = (
                table.to(device) for table in (self.last_seen, self.gap, self.counts, self._sums)
            )
        return tuple(table.view(-1) for table in (self.last_seen, self.gap, self.counts, self._sums))

    def _buckets(self, ids: Tensor) -> Tensor:
        """Return int64 [hashes, n], the index of each id in the flat tables, by splitmix64 in torch for any device."""
        hashes = torch.arange(1, self.num_hashes + 1, device=ids.device)[:, None]
        x = ids + hashes * signed64(MIX64_INCREMENT)
        for distance, factor in MIX64_STEPS:
            x = x ^ _shift_right(x, distance)
            x = x if factor is None else x * signed64(factor)
        return _shift_right(x, 1) % self.num_buckets + (hashes - 1) * self.num_buckets


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift right as unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
