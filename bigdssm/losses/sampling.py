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
from typing import Literal

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.losses.exchange import LossInputError
from bigdssm.losses.inputs import add_biases

Sampling = Literal["none", "classic", "corrected"]
SAMPLINGS = ("none", "classic", "corrected")


@dataclass(frozen=True)
class Biases:
    """The beta and neg_bias to call a loss with; beta keeps the gradient of the learned one."""

    beta: Tensor | None
    neg_bias: Tensor | None


def apply_sampling(
    sampling: Sampling,
    log_expected: Tensor,
    *,
    gamma: float = 1.0,
    beta: Tensor | None = None,
    neg_bias: Tensor | None = None,
) -> Biases:
    """Return beta and neg_bias [n] with the correction of strength gamma added; log_expected [n] is log c.

    Raises: LossInputError.
    Source: classic, Yi et al. 2019, eq. 4; corrected, arXiv 2507.09331.
    """
    if sampling not in SAMPLINGS:
        raise LossInputError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
    if bool(log_expected.isnan().any()):
        raise LossInputError("log_expected holds NaN")
    if sampling == "none" or gamma == 0:
        return Biases(beta, neg_bias)
    correction = -gamma * log_expected
    if sampling == "classic":
        return Biases(add_biases(beta, correction), neg_bias)
    return Biases(beta, add_biases(neg_bias, correction))


@dataclass(frozen=True)
class CountedFrequency:
    """c by the catalogue's counts [num_documents], read once; a document never seen counts as seen once.

    num_columns of the global batch, on average, follow the data, num_uniform are drawn uniformly from the catalogue
    (mixed negative sampling). Source: Yang et al. 2020 (mixed negative sampling), eq. 4, times the number of columns.
    """

    counts: Tensor
    num_columns: float
    num_uniform: int = 0
    total: Tensor = field(init=False)  # of all documents, float64

    def __post_init__(self) -> None:
        """Add the counts up. Raises: LossInputError."""
        if bool((self.counts < 0).any()):
            raise LossInputError("counts hold negative values")
        object.__setattr__(self, "total", self.counts.double().clamp(min=1).sum())

    def log_expected(self, documents: Tensor) -> Tensor:
        """Return log c float64 [n] of `documents` (catalogue rows)."""
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

    def __post_init__(self) -> None:
        shape = (self.num_hashes, self.num_buckets)
        self.last_seen = torch.zeros(shape, dtype=torch.int64)
        self.gap = torch.zeros(shape, dtype=torch.float64)
        self.copies = torch.zeros(shape, dtype=torch.float64)

    def update(self, doc_ids: Tensor, copies: Tensor | None = None, group: Group | None = None) -> None:
        """Take in the next step's document ids int64 [n] of this rank, each in so many copies [n]; a collective."""
        copies = torch.ones_like(doc_ids) if copies is None else copies.to(torch.int64)
        counts = distributed.all_gather_padded(doc_ids.new_tensor([doc_ids.shape[0]]), 1, group).wait().tolist()
        rows = distributed.all_gather_rows(torch.stack([doc_ids, copies], 1), counts, group).cpu()
        ids, inverse = torch.unique(rows[:, 0], return_inverse=True)
        copies = torch.zeros_like(ids).index_add_(0, inverse, rows[:, 1])
        self.step += 1
        for hash_index in range(self.num_hashes):
            bucket, inverse = torch.unique(self._bucket(ids, hash_index), return_inverse=True)
            new_copies = torch.zeros_like(bucket).index_add_(0, inverse, copies).double()
            last, gap = self.last_seen[hash_index, bucket], self.gap[hash_index, bucket]
            new_gap = (self.step - last).double()
            # the first gap starts the moving average (Algorithm 2 starts it at 0, which takes 1 / rate gaps to forget)
            self.gap[hash_index, bucket] = torch.where(
                last == 0, 0.0, torch.where(gap == 0, new_gap, torch.lerp(gap, new_gap, self.rate))
            )
            moved = torch.lerp(self.copies[hash_index, bucket], new_copies, self.rate)
            self.copies[hash_index, bucket] = torch.where(last == 0, new_copies, moved)
            self.last_seen[hash_index, bucket] = self.step

    def log_expected(self, doc_ids: Tensor) -> Tensor:
        """Return log c float64 [n]: the log of the estimated number of columns of a step that hold the document."""
        found = []
        for hash_index in range(self.num_hashes):
            bucket = self._bucket(doc_ids.cpu(), hash_index)
            gap, copies = self.gap[hash_index, bucket], self.copies[hash_index, bucket].clamp(min=1)
            # not seen twice: as if once in all steps so far
            found.append(copies / torch.where(gap == 0, float(max(1, self.step)), gap))
        return torch.stack(found).amin(0).log().to(doc_ids.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that goes into a checkpoint."""
        step = torch.tensor([self.step])
        return {"step": step, "last_seen": self.last_seen, "gap": self.gap, "copies": self.copies}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint. Raises: LossInputError where it has another shape."""
        if state["gap"].shape != self.gap.shape:
            raise LossInputError(
                f"the checkpoint's estimator has {list(state['gap'].shape)} hashes and buckets, this one "
                f"{list(self.gap.shape)}"
            )
        self.step = int(state["step"])
        self.last_seen, self.gap, self.copies = (state[name].clone() for name in ("last_seen", "gap", "copies"))

    def _bucket(self, ids: Tensor, hash_index: int) -> Tensor:
        """Mix 64-bit ids (splitmix64 again, in torch: they may be on a device) and take the remainder."""
        x = ids + _wrap(0x9E3779B97F4A7C15 * (hash_index + 1))
        x = (x ^ _shift_right(x, 30)) * _wrap(0xBF58476D1CE4E5B9)
        x = (x ^ _shift_right(x, 27)) * _wrap(0x94D049BB133111EB)
        x = x ^ _shift_right(x, 31)
        return _shift_right(x, 1) % self.num_buckets


def _wrap(value: int) -> int:
    """Return the int64 with the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift as unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
