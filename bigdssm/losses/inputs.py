"""What a loss is given: checked on every rank, and the facts about all ranks that it needs before it can start.

One small all-gather carries each rank's sizes, value ranges and verdict, so bad input ends in one error on every rank
and never in a hang.

Shape legend: m queries and n document columns of this rank, D vector size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.errors import DataError

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


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

    def beta_of(self, columns: Tensor) -> Tensor | None:
        """Return beta at `columns` of any shape, float64."""
        return None if self.beta is None else self.beta.detach().double()[columns]


@dataclass(frozen=True)
class Facts:
    """What every rank knows about all ranks."""

    rank: int
    num_queries: list[int]
    num_columns: list[int]
    num_known: list[int]
    weight_sum: float
    norm_U: float
    norm_W: float
    beta_range: tuple[float, float]
    neg_bias_range: tuple[float, float]
    wants: int

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.num_queries)

    @property
    def longest(self) -> int:
        """The most columns on any rank: the stride between ranks in gathered buffers."""
        return max(self.num_columns)


WANTS_U, WANTS_W, WANTS_ALPHA, WANTS_BETA = 1, 2, 4, 8

# the header's fields; those before "m" must agree on all ranks
_FIELDS = (
    "ok", "D", "dtype", "mode", "given", "alpha",
    "m", "n", "known", "weight_sum", "norm_U", "norm_W", "beta_lo", "beta_hi", "neg_lo", "neg_hi", "wants",
)  # fmt: skip


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
        _need(isinstance(x, Tensor), f"{name} must be a tensor, got {type(x).__name__}")
        _need(x.ndim == 2, f"{name} must be [rows, D], got shape {list(x.shape)}")
        _need(x.dtype in DTYPES, f"{name} must be float64, float32 or bfloat16, got {x.dtype}")
    _need(U.shape[1] == W.shape[1], f"U has vectors of size {U.shape[1]}, W of size {W.shape[1]}")
    _need(U.dtype == W.dtype, f"U is {U.dtype}, W is {W.dtype}; they must be the same")
    m, n = U.shape[0], W.shape[0]
    acc = torch.float64 if U.dtype == torch.float64 else torch.float32
    if positive is None:
        _need(n >= m, f"without `positive` W needs a column for each of the {m} queries, got {n}")
        positive = torch.arange(m, device=U.device)
    _check_ids("positive", positive, m)
    if m:
        lo, hi = int(positive.min()), int(positive.max())
        _need(lo >= 0 and hi < n, f"positive holds {lo if lo < 0 else hi}, outside this rank's {n} columns")
    if weight is None:
        weight = torch.ones(m, dtype=torch.float64, device=U.device)
    _check_vector("weight", weight, m)
    _need(not weight.requires_grad, "weight is a constant of the data: it gets no gradient")
    _need(bool((weight >= 0).all()) and bool(weight.isfinite().all()), "weight holds NaN, infinite or negative values")
    _check_bias("beta", beta, n)
    _check_bias("neg_bias", neg_bias, n)
    _need(neg_bias is None or not neg_bias.requires_grad, "neg_bias is a constant of the sampling: it gets no gradient")
    if query_ids is not None:
        _check_ids("query_ids", query_ids, m)
    if doc_ids is not None:
        _check_ids("doc_ids", doc_ids, n)
    if known is not None:
        _need(isinstance(known, Tensor), f"known must be a tensor, got {type(known).__name__}")
        _need(query_ids is not None and doc_ids is not None, "known pairs need query_ids and doc_ids")
        _need(known.dtype == torch.int64, f"known must be int64, got {known.dtype}")
        _need(known.ndim == 2 and known.shape[1] == 2, f"known must be [pairs, 2], got {list(known.shape)}")
    _need(isinstance(alpha, Tensor | float | int), f"alpha must be one float, got {type(alpha).__name__}")
    alpha = alpha if isinstance(alpha, Tensor) else torch.tensor([float(alpha)], dtype=torch.float64)
    _need(alpha.numel() == 1 and alpha.is_floating_point(), f"alpha must be one float, got shape {list(alpha.shape)}")
    wants = 0
    if torch.is_grad_enabled():
        for bit, leaf in ((WANTS_U, U), (WANTS_W, W), (WANTS_ALPHA, alpha), (WANTS_BETA, beta)):
            wants |= bit if leaf is not None and leaf.requires_grad else 0
    return LossInputs(
        U,
        W,
        positive,
        weight.detach().double(),
        alpha,
        beta,
        neg_bias,
        query_ids,
        doc_ids,
        known,
        acc,
        wants,
    )


def exchange(
    checked: LossInputs | LossInputError, mode: int, device: torch.device, group: Group | None
) -> tuple[LossInputs, Facts]:
    """Tell all ranks what this one has and return what all have; a collective.

    `mode` numbers what the ranks must agree on (loss and direction). Raises: LossInputError on the ranks whose input
    is bad or where ranks disagree, PeerError on the others.
    """
    header = torch.tensor(_header(checked, mode), dtype=torch.float64, device=device)
    table = distributed.all_gather_padded(header[None], 1, group).wait().tolist()
    if any(row[0] == 0 for row in table):
        distributed.raise_together(checked if isinstance(checked, LossInputError) else None, group)
    assert isinstance(checked, LossInputs)
    for at, name in enumerate(_FIELDS[: _FIELDS.index("m")]):
        values = [row[at] for row in table]
        if any(v != values[0] and not (math.isnan(v) and math.isnan(values[0])) for v in values):
            raise LossInputError(f"the ranks disagree on {_MEANING.get(name, name)}: {values} in rank order")
    return checked, _facts(table, distributed.rank(group))


_MEANING = {
    "D": "the vector size D",
    "dtype": "the dtype (0 float64, 1 float32, 2 bfloat16)",
    "mode": "the loss or its direction (numbers of their modes)",
    "given": "which of beta, neg_bias, query_ids, doc_ids, known are given (bits)",
}


def _header(checked: LossInputs | LossInputError, mode: int) -> list[float]:
    if isinstance(checked, LossInputError):
        return [0.0] * len(_FIELDS)
    x = checked
    optional = (x.beta, x.neg_bias, x.query_ids, x.doc_ids, x.known)
    given = sum(1 << bit for bit, value in enumerate(optional) if value is not None)
    return [
        1.0, float(x.U.shape[1]), float(DTYPES.index(x.U.dtype)), float(mode), float(given), float(x.alpha.detach()),
        float(x.U.shape[0]), float(x.W.shape[0]), 0.0 if x.known is None else float(x.known.shape[0]),
        float(x.weight.sum()), _largest_norm(x.U), _largest_norm(x.W), *_range(x.beta), *_range(x.neg_bias),
        float(x.wants),
    ]  # fmt: skip


def _facts(table: list[list[float]], rank: int) -> Facts:
    column = dict(zip(_FIELDS, zip(*table, strict=True), strict=True))
    wants = 0
    for value in column["wants"]:
        wants |= int(value)
    return Facts(
        rank=rank,
        num_queries=[int(v) for v in column["m"]],
        num_columns=[int(v) for v in column["n"]],
        num_known=[int(v) for v in column["known"]],
        weight_sum=sum(column["weight_sum"]),
        norm_U=_max(column["norm_U"]),
        norm_W=_max(column["norm_W"]),
        beta_range=(-_max([-v for v in column["beta_lo"]]), _max(column["beta_hi"])),
        neg_bias_range=(-_max([-v for v in column["neg_lo"]]), _max(column["neg_hi"])),
        wants=wants,
    )


def _max(values: tuple[float, ...] | list[float]) -> float:
    return math.nan if any(math.isnan(v) for v in values) else max(values)


def _largest_norm(rows: Tensor) -> float:
    if rows.shape[0] == 0:
        return 0.0
    return float(torch.linalg.vector_norm(rows.detach(), dim=1, dtype=torch.float64).max())


def _range(bias: Tensor | None) -> tuple[float, float]:
    """The least and greatest finite entry (-inf says: never a negative), widened to hold 0."""
    if bias is None or bias.numel() == 0:
        return 0.0, 0.0
    finite = bias.detach().double()
    finite = torch.where(finite == -math.inf, 0.0, finite)
    return min(0.0, float(finite.min())), max(0.0, float(finite.max()))


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise LossInputError(message)


def _check_ids(name: str, ids: Tensor, rows: int) -> None:
    _need(isinstance(ids, Tensor), f"{name} must be a tensor, got {type(ids).__name__}")
    _need(ids.dtype == torch.int64, f"{name} must be int64, got {ids.dtype}")
    _need(list(ids.shape) == [rows], f"{name} must be [{rows}], got {list(ids.shape)}")


def _check_vector(name: str, vector: Tensor, rows: int) -> None:
    _need(isinstance(vector, Tensor), f"{name} must be a tensor, got {type(vector).__name__}")
    _need(vector.is_floating_point(), f"{name} must be floating point, got {vector.dtype}")
    _need(list(vector.shape) == [rows], f"{name} must be [{rows}], got {list(vector.shape)}")


def _check_bias(name: str, bias: Tensor | None, rows: int) -> None:
    if bias is not None:
        _check_vector(name, bias, rows)
        _need(not bool((bias.detach() == math.inf).any()), f"{name} holds +inf")
