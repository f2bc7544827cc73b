"""What a loss is given: checked on every rank, and the sizes and ranges of all ranks that it needs before it starts.

One small all-gather carries each rank's numbers and verdict, so bad input ends in one error on every rank and never in
a hang.

Shape legend: m queries and n document columns of this rank, D vector size.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.errors import DataError
from bigdssm.losses.masks import count_known

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
WANTS_U, WANTS_W, WANTS_ALPHA, WANTS_BETA = 1, 2, 4, 8


class LossInputError(DataError, ValueError):
    """Vectors, ids or weights that a loss cannot work with."""


@dataclass
class LossInputs:
    """One rank's input to a loss, checked. `acc` is the dtype of products, exponentials and sums."""

    U: Tensor
    W: Tensor
    positive: Tensor
    weight: Tensor
    alpha: Tensor
    beta: Tensor | None
    neg_bias: Tensor | None
    query_ids: Tensor | None
    doc_ids: Tensor | None
    known: Tensor | None
    acc: torch.dtype
    wants: int  # bits: gradients of U, W, alpha, beta
    given: str  # names of what is optional and there


@dataclass(frozen=True)
class GlobalSizes:
    """What every rank knows about all ranks."""

    rank: int
    num_columns: list[int]
    num_known: list[int]
    weight_sum: float
    lowest: float  # bounds of all finite scores, by the vectors' norms; not finite where these are not
    highest: float
    wants: int  # of any rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.num_columns)

    @property
    def longest(self) -> int:
        """The most columns on any rank: the stride between ranks in gathered buffers."""
        return max(self.num_columns)


def check_inputs(
    U: Tensor,
    W: Tensor,
    positive: Tensor | None,
    *,
    alpha: Tensor | float,
    beta: Tensor | None,
    neg_bias: Tensor | None,
    weight: Tensor | None,
    query_ids: Tensor | None,
    doc_ids: Tensor | None,
    known: Tensor | None,
) -> LossInputs:
    """Return this rank's input with its defaults filled in. Raises: LossInputError."""
    for name, x in (("U", U), ("W", W)):
        need(isinstance(x, Tensor), f"{name} must be a tensor, got {type(x).__name__}")
        need(x.ndim == 2, f"{name} must be [rows, D], got shape {list(x.shape)}")
        need(x.dtype in DTYPES, f"{name} must be float64, float32 or bfloat16, got {x.dtype}")
    need(U.shape[1] == W.shape[1], f"U has vectors of size {U.shape[1]}, W of size {W.shape[1]}")
    need(U.dtype == W.dtype, f"U is {U.dtype}, W is {W.dtype}; they must be the same")
    m, n = U.shape[0], W.shape[0]
    if positive is None:
        need(n >= m, f"without `positive` W needs a column for each of the {m} queries, got {n}")
        positive = torch.arange(m, device=U.device)
    if weight is None:
        weight = torch.ones(m, dtype=torch.float64, device=U.device)
    optional = {"beta": beta, "neg_bias": neg_bias, "query_ids": query_ids, "doc_ids": doc_ids, "known": known}
    given = ", ".join(name for name, value in optional.items() if value is not None) or "none"
    _check_rows({"positive": positive, "query_ids": query_ids}, m, torch.int64)
    _check_rows({"doc_ids": doc_ids}, n, torch.int64)
    _check_rows({"weight": weight}, m, None)
    _check_rows({"beta": beta, "neg_bias": neg_bias}, n, None)
    if m:
        lo, hi = int(positive.min()), int(positive.max())
        need(lo >= 0 and hi < n, f"positive holds {lo if lo < 0 else hi}, outside this rank's {n} columns")
    need(not weight.requires_grad, "weight is a constant of the data: it gets no gradient")
    need(bool((weight >= 0).all()) and bool(weight.isfinite().all()), "weight holds NaN, infinite or negative values")
    for name, bias in (("beta", beta), ("neg_bias", neg_bias)):
        need(bias is None or not bool((bias.detach() == math.inf).any()), f"{name} holds +inf")
    need(neg_bias is None or not neg_bias.requires_grad, "neg_bias is a constant of the sampling: it gets no gradient")
    if known is not None:
        need(isinstance(known, Tensor), f"known must be a tensor, got {type(known).__name__}")
        need(doc_ids is not None, "known pairs need query_ids, or the queries' rows in their place, and doc_ids")
        need(known.dtype == torch.int64, f"known must be int64, got {known.dtype}")
        need(known.ndim == 2 and known.shape[1] == 2, f"known must be [pairs, 2], got {list(known.shape)}")
        if query_ids is None and known.shape[0]:
            outside = (known[:, 0] < 0) | (known[:, 0] >= m)
            need(not bool(outside.any()), f"known names a row outside this rank's {m} queries")
    need(isinstance(alpha, Tensor | float | int), f"alpha must be one float, got {type(alpha).__name__}")
    alpha = alpha if isinstance(alpha, Tensor) else torch.tensor([float(alpha)], dtype=torch.float64)
    need(alpha.numel() == 1 and alpha.is_floating_point(), f"alpha must be one float, got shape {list(alpha.shape)}")
    wants = 0
    if torch.is_grad_enabled():
        for bit, leaf in ((WANTS_U, U), (WANTS_W, W), (WANTS_ALPHA, alpha), (WANTS_BETA, beta)):
            wants |= bit if leaf is not None and leaf.requires_grad else 0
    acc = torch.float64 if U.dtype == torch.float64 else torch.float32
    return LossInputs(U, W, positive, weight.detach().double(), alpha, **optional, acc=acc, wants=wants, given=given)


def global_sizes(
    x: LossInputs | LossInputError, loss: str, device: torch.device, group: Group | None
) -> tuple[LossInputs, GlobalSizes]:
    """Tell all ranks what this one has, and return its input with the sizes of all; a collective.

    `loss` says in words which loss this is: the ranks must agree on it. Raises: LossInputError on the ranks whose
    input is bad or where ranks disagree, PeerError on the others.
    """
    if isinstance(x, LossInputError):
        exchange(x, {}, [0.0] * 10, device, group)
        raise x
    agreed = {
        "the vector size D": str(x.U.shape[1]),
        "the dtype": str(x.U.dtype).removeprefix("torch."),
        "the loss or its direction": loss,
        "which of beta, neg_bias, query_ids, doc_ids, known are given": x.given,
        "alpha": repr(float(x.alpha.detach())),
    }
    ranges = [*_range(x.beta), *_range(x.neg_bias)]
    numbers = [
        x.W.shape[0],
        count_known(x.query_ids, x.weight, x.known),
        float(x.weight.sum()),
        x.wants,
        _largest_norm(x.U),
        _largest_norm(x.W),
    ]
    table = exchange(None, agreed, [*numbers, *ranges], device, group)
    num_columns, num_known, weights, wants = zip(*(row[:4] for row in table), strict=True)
    norm_U, norm_W, beta_down, beta_up, neg_down, neg_up = (
        torch.tensor(table, dtype=torch.float64)[:, 4:].amax(0).tolist()
    )
    reach = abs(float(x.alpha.detach())) * norm_U * norm_W
    return x, GlobalSizes(
        rank=distributed.rank(group),
        num_columns=[int(number) for number in num_columns],
        num_known=[int(number) for number in num_known],
        weight_sum=sum(weights),
        lowest=-reach - beta_down - neg_down,
        highest=reach + beta_up + neg_up,
        wants=sum(bit for bit in (WANTS_U, WANTS_W, WANTS_ALPHA, WANTS_BETA) if any(int(bits) & bit for bits in wants)),
    )


def exchange(
    error: LossInputError | None,
    agreed: Mapping[str, str],
    numbers: Sequence[float],
    device: torch.device,
    group: Group | None,
) -> list[list[float]]:
    """Return every rank's `numbers`, where no rank has an error and all agree; a collective.

    agreed: what the ranks must agree on, in words; only a checksum of it is sent unless they differ. Raises:
    LossInputError on the ranks that bring it or where ranks disagree, PeerError on the others.
    """
    checksum = zlib.crc32(repr(sorted(agreed.items())).encode())
    header = torch.tensor([[error is None, checksum, *numbers]], dtype=torch.float64, device=device)
    table = distributed.all_gather_padded(header, 1, group).wait().tolist()
    if not all(row[0] for row in table):
        distributed.raise_together(error, group)
    if any(row[1] != checksum for row in table):
        told = distributed.all_gather_object(dict(agreed), group)
        what = next(name for name in agreed if any(other[name] != agreed[name] for other in told))
        words = "; ".join(f"rank {rank} has {other[what]}" for rank, other in enumerate(told))
        raise LossInputError(f"the ranks disagree on {what}: {words}")
    return [row[2:] for row in table]


def need(condition: bool, message: str) -> None:
    """Raise LossInputError with the message unless the condition holds."""
    if not condition:
        raise LossInputError(message)


def add_biases(*biases: Tensor | None) -> Tensor | None:
    """Return the sum of those that are there."""
    total = None
    for bias in biases:
        total = bias if total is None else total if bias is None else total + bias
    return total


def _largest_norm(rows: Tensor) -> float:
    if rows.shape[0] == 0:
        return 0.0
    return float(torch.linalg.vector_norm(rows.detach(), dim=1, dtype=torch.float64).max())


def _range(bias: Tensor | None) -> tuple[float, float]:
    """Minus the least, and the greatest, finite entry (-inf says: never a negative), with 0 among them."""
    if bias is None or bias.numel() == 0:
        return 0.0, 0.0
    finite = torch.where(bias.detach() == -math.inf, 0.0, bias.detach().double())
    return -min(0.0, float(finite.min())), max(0.0, float(finite.max()))


def _check_rows(tensors: Mapping[str, Tensor | None], rows: int, dtype: torch.dtype | None) -> None:
    """Check those that are there: one entry a row; dtype None is any floating one."""
    for name, x in tensors.items():
        if x is not None:
            need(isinstance(x, Tensor), f"{name} must be a tensor, got {type(x).__name__}")
            fits = x.is_floating_point() if dtype is None else x.dtype == dtype
            need(fits, f"{name} must be {'floating point' if dtype is None else 'int64'}, got {x.dtype}")
            need(list(x.shape) == [rows], f"{name} must be [{rows}], got {list(x.shape)}")
