"""Validation of loss inputs, and one small all-gather of sizes, ranges and errors before each loss."""

import functools
import math
import operator
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import NoReturn

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.errors import DataError
from bigdssm.losses.masks import count_known_positives

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
GRAD_U, GRAD_W, GRAD_ALPHA, GRAD_BETA, GRAD_SCORE_BIAS = 1, 2, 4, 8, 16  # bits of grad_flags
# the ranks must agree on which are given
_OPTIONAL = ("beta", "neg_bias", "query_ids", "doc_ids", "known", "is_known", "time", "since", "score_bias")

# Exchanged by all ranks, in this order. minus_least and largest are of finite values and 0; bad is a number of values.
_NUMBERS = (
    "queries", "columns", "shared_columns", "known", "weight_sum", "grad_flags", "alpha", "largest_norm_U",
    "largest_norm_W", "minus_least_beta", "largest_beta", "minus_least_neg_bias", "largest_neg_bias", "least_positive",
    "largest_positive", "bad_weight", "bad_beta", "bad_neg_bias", "bad_known", "least_negative", "largest_negative",
)  # fmt: skip
Number = Tensor | float


class LossInputError(DataError, ValueError):
    """Invalid vectors, ids or weights of a loss."""


def require(condition: bool, message: str) -> None:
    """Raise LossInputError with `message` unless `condition` holds."""
    if not condition:
        raise LossInputError(message)


def exchange(
    error: LossInputError | None,
    agreed: Mapping[str, str],
    numbers: Mapping[str, Number],
    find_fault: Callable[[Mapping[str, float]], str | None],
    device: torch.device,
    group: Group | None,
) -> tuple[list[dict[str, float]], Tensor]:
    """Gather `numbers` of all ranks, as dicts by rank and as a tensor [world_size, numbers]; a collective.

    error: the fault of this rank's input, if any; its `numbers` have the names of the other ranks'. agreed:
    descriptions that must be equal on all ranks; only their checksum is sent unless they differ. find_fault: returns
    the fault in a rank's numbers, if any. Raises: LossInputError on ranks with an error, or on all if ranks disagree;
    PeerError on the others.
    """
    checksum = float(zlib.crc32(repr(sorted(agreed.items())).encode()))
    values = [float(error is None), checksum, *numbers.values()]
    if device.type == "cpu":
        header = torch.tensor([float(value) for value in values], dtype=torch.float64)
    else:  # an upload would synchronize; a fill does not
        header = torch.zeros(len(values), dtype=torch.float64, device=device)
        for cell, value in zip(header.split(1), values, strict=True):
            if isinstance(value, Tensor) and value.device.type == device.type:
                cell.copy_(value.reshape(1))
            elif float(value):
                cell.fill_(float(value))
    table = distributed.all_gather_padded(header[None], 1, group)
    rows = table.tolist()
    of_ranks = [dict(zip(numbers, row[2:], strict=True)) for row in rows]
    if not all(row[0] and find_fault(rank) is None for row, rank in zip(rows, of_ranks, strict=True)):
        fault = find_fault(of_ranks[distributed.rank(group)])
        distributed.raise_together(error or (None if fault is None else LossInputError(fault)), group)
    if any(row[1] != checksum for row in rows):
        others = distributed.all_gather_object(dict(agreed), group)
        for name in agreed:
            require_agreement(name, [other[name] for other in others])
    return of_ranks, table[:, 2:]


def require_agreement(name: str, values: Sequence[object]) -> None:
    """Raise LossInputError, on every rank, unless the values of all ranks are equal."""
    if any(repr(value) != repr(values[0]) for value in values):
        words = "; ".join(f"rank {rank} has {value}" for rank, value in enumerate(values))
        raise LossInputError(f"the ranks disagree on {name}: {words}")


@dataclass(frozen=True)
class LossBatch:
    """One rank's input to a loss: m queries, n document columns, k candidates per query; None where absent.

    m and n may differ between ranks and be 0. U and W are float64, float32 or bfloat16; ids and columns are int64.
    """

    U: Tensor  # [m, D] queries
    W: Tensor  # [n, D] documents
    positive: Tensor | None = None  # [m] the column of each query's document, arange(m) by default; may repeat
    _: KW_ONLY
    alpha: Tensor | float  # one float: the factor of the products
    beta: Tensor | None = None  # [n] added to a document's scores
    neg_bias: Tensor | None = None  # [n] added if the document is a negative, q2d only; constant; −inf excludes it
    weight: Tensor | None = None  # [m] ≥ 0, constant
    query_ids: Tensor | None = None  # [m] for the false-negative mask; by default each query is distinct
    doc_ids: Tensor | None = None  # [n] the same for columns
    known: Tensor | None = None  # [p, 2] additional known positives (query id, doc id); without query_ids (row, doc id)
    is_known: Tensor | None = None  # bool [m]: whether a positive is known of all queries of its id; None: all are
    time: Tensor | None = None  # float64 [m]; documents with a later `since` are no negatives; NaN: unknown, all are
    since: Tensor | None = None  # float64 [n]: time from which a document is available
    negatives: Tensor | None = None  # [m, k] columns of each query's candidates (hard negatives), −1 for none
    teacher: Tensor | None = None  # [m, 1 + k] a teacher's scores of the positive and the candidates
    score_bias: Tensor | None = None  # [m, 1 + k] added to the scores of the positive and the candidates


@dataclass(frozen=True, kw_only=True)
class LossInputs(LossBatch):
    """A validated `LossBatch` with defaults; `acc` is the dtype of products, exponentials and sums."""

    positive: Tensor
    alpha: Tensor
    weight: Tensor
    acc: torch.dtype
    grad_flags: int  # bits of the inputs that require gradients: U, W, alpha, beta, score_bias
    present: str  # names of the optional fields that are not None

    @property
    def known_weight(self) -> Tensor:
        """The weight of each query's positive as a known positive of other queries, [m]."""
        return self.weight if self.is_known is None else self.weight * self.is_known

    @property
    def operand(self) -> torch.dtype:
        """The dtype of matrix operands: a CPU has no bfloat16 products with float32 results."""
        return self.acc if self.U.device.type == "cpu" else self.U.dtype


@dataclass(frozen=True)
class GlobalSizes:
    """Sizes and value ranges over all ranks, equal on every rank."""

    rank: int
    num_columns: list[int]
    num_known: list[int]
    column_counts: Tensor  # num_columns on the device of the vectors, int64 [world_size]
    known_counts: Tensor
    alpha: float
    weight_sum: float
    lowest: float  # bounds of all finite scores, from the vectors' norms; not finite if a norm is not
    highest: float
    grad_flags: int  # union over ranks

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.num_columns)

    @property
    def gradient_factor(self) -> float:
        """The factor from the gradient of a sum of weighted values to world_size times that of their mean."""
        return self.world_size / self.weight_sum if self.weight_sum > 0 else 0.0

    @property
    def longest(self) -> int:
        """The largest number of columns of a rank: the stride between ranks in gathered buffers."""
        return max(self.num_columns)


def check_inputs(batch: LossBatch) -> LossInputs:
    """Validate shapes and dtypes and fill in defaults; `global_sizes` checks values. Raises: LossInputError."""
    U, W, positive, weight, alpha, known = (
        batch.U, batch.W, batch.positive, batch.weight, batch.alpha, batch.known,
    )  # fmt: skip
    for name, x in (("U", U), ("W", W)):
        require(isinstance(x, Tensor), f"{name} must be a tensor, got {type(x).__name__}")
        require(x.ndim == 2, f"{name} must be [rows, D], got shape {list(x.shape)}")
        require(x.dtype in DTYPES, f"{name} must be float64, float32 or bfloat16, got {x.dtype}")
    require(U.shape[1] == W.shape[1], f"U has vectors of size {U.shape[1]}, W of size {W.shape[1]}")
    require(U.dtype == W.dtype, f"U is {U.dtype}, W is {W.dtype}; they must be the same")
    m, n = U.shape[0], W.shape[0]
    if positive is None:
        require(n >= m, f"without `positive` W needs a column for each of the {m} queries, got {n}")
        positive = torch.arange(m, device=U.device)
    if weight is None:
        weight = torch.ones(m, dtype=torch.float64, device=U.device)
    for name, given, rows, dtype in (
        ("positive", positive, m, torch.int64), ("query_ids", batch.query_ids, m, torch.int64),
        ("doc_ids", batch.doc_ids, n, torch.int64), ("is_known", batch.is_known, m, torch.bool),
        ("time", batch.time, m, torch.float64), ("since", batch.since, n, torch.float64),
        ("weight", weight, m, None), ("beta", batch.beta, n, None), ("neg_bias", batch.neg_bias, n, None),
    ):  # fmt: skip
        if given is not None:  # dtype None: any floating dtype
            require(isinstance(given, Tensor), f"{name} must be a tensor, got {type(given).__name__}")
            is_valid = given.is_floating_point() if dtype is None else given.dtype == dtype
            require(
                is_valid, f"{name} must be {str(dtype or 'floating point').removeprefix('torch.')}, got {given.dtype}"
            )
            require(list(given.shape) == [rows], f"{name} must be [{rows}], got {list(given.shape)}")
    require((batch.time is None) == (batch.since is None), "time of queries and since of documents need each other")
    require(m == 0 or n > 0, f"U has {m} queries, W no columns for their documents")
    require(not weight.requires_grad, "weight is a constant of the data: it gets no gradient")
    constant = batch.neg_bias is None or not batch.neg_bias.requires_grad
    require(constant, "neg_bias is a constant of the sampling: it gets no gradient")
    if known is not None:
        require(isinstance(known, Tensor), f"known must be a tensor, got {type(known).__name__}")
        require(batch.doc_ids is not None, "known pairs need doc_ids, and query_ids or row indices in place of them")
        require(known.dtype == torch.int64, f"known must be int64, got {known.dtype}")
        require(known.ndim == 2 and known.shape[1] == 2, f"known must be [pairs, 2], got {list(known.shape)}")
    require(isinstance(alpha, Tensor | float | int), f"alpha must be one float, got {type(alpha).__name__}")
    alpha = alpha if isinstance(alpha, Tensor) else torch.tensor([float(alpha)], dtype=torch.float64)
    require(alpha.numel() == 1 and alpha.is_floating_point(), f"alpha must be one float, got shape {list(alpha.shape)}")
    grad_flags = 0
    if torch.is_grad_enabled():
        leaves = (
            (GRAD_U, U),
            (GRAD_W, W),
            (GRAD_ALPHA, alpha),
            (GRAD_BETA, batch.beta),
            (GRAD_SCORE_BIAS, batch.score_bias),
        )
        for bit, leaf in leaves:
            grad_flags |= bit if leaf is not None and leaf.requires_grad else 0
    acc = torch.float64 if U.dtype == torch.float64 else torch.float32
    checked = {"positive": positive, "alpha": alpha, "weight": weight.detach().double()}
    present = ", ".join(name for name in _OPTIONAL if getattr(batch, name) is not None) or "none"
    return LossInputs(**{**vars(batch), **checked}, acc=acc, grad_flags=grad_flags, present=present)


def global_sizes(x: LossInputs, shared: LossInputs, loss: str, group: Group | None) -> GlobalSizes:
    """Exchange sizes and value ranges of the input of all ranks; a collective that synchronizes.

    shared: the columns of x that are gathered to every rank. loss: a description that must be equal on all ranks.
    Raises: LossInputError on ranks with invalid input, or on all if ranks disagree; PeerError on the others.
    """
    agreed = {
        "the vector size D": str(x.U.shape[1]),
        "the dtype": str(x.U.dtype).removeprefix("torch."),
        "the loss or its direction": loss,
        f"which of {', '.join(_OPTIONAL)} are given": x.present,
    }
    bad_known: Number = 0
    if x.known is not None and x.query_ids is None:  # it holds rows in place of query ids
        bad_known = ((x.known[:, 0] < 0) | (x.known[:, 0] >= x.U.shape[0])).sum()
    numbers: list[Number] = [
        x.U.shape[0], x.W.shape[0], shared.W.shape[0], count_known_positives(x.query_ids, x.known_weight, x.known),
        x.weight.sum(), x.grad_flags, x.alpha.detach(), _largest_norm(x.U), _largest_norm(shared.W),
        *_range(shared.beta), *_range(shared.neg_bias), *_ends(x.positive),
        (~((x.weight >= 0) & x.weight.isfinite())).sum(),
        0 if x.beta is None else (x.beta.detach() == math.inf).sum(),
        0 if x.neg_bias is None else (x.neg_bias == math.inf).sum(), bad_known, *_ends(x.negatives),
    ]  # fmt: skip
    local = dict(zip(_NUMBERS, numbers, strict=True))
    rows, table = exchange(None, agreed, local, _find_fault, x.W.device, group)
    of_ranks = {name: [row[name] for row in rows] for name in _NUMBERS}
    require_agreement("alpha", of_ranks["alpha"])
    alpha = of_ranks["alpha"][0]
    # NaN if that of any rank is, unlike Python's max
    norm_U, norm_W, minus_least_beta, largest_beta, minus_least_neg_bias, largest_neg_bias = (
        float(torch.tensor(of_ranks[name]).amax()) for name in _NUMBERS[7:13]
    )
    largest_product = abs(alpha) * norm_U * norm_W
    return GlobalSizes(
        rank=distributed.rank(group),
        num_columns=[int(number) for number in of_ranks["shared_columns"]],
        num_known=[int(number) for number in of_ranks["known"]],
        column_counts=table[:, _NUMBERS.index("shared_columns")].long(),
        known_counts=table[:, _NUMBERS.index("known")].long(),
        alpha=alpha,
        weight_sum=sum(of_ranks["weight_sum"]),
        lowest=-largest_product - minus_least_beta - minus_least_neg_bias,
        highest=largest_product + largest_beta + largest_neg_bias,
        grad_flags=functools.reduce(operator.or_, (int(bits) for bits in of_ranks["grad_flags"])),
    )


def raise_on_all_ranks(error: LossInputError, device: torch.device, group: Group | None) -> NoReturn:
    """Raise the error of this rank's input, and PeerError on ranks with valid input, which call `global_sizes`."""
    exchange(error, {}, dict.fromkeys(_NUMBERS, 0.0), _find_fault, device, group)
    raise error


def _find_fault(x: Mapping[str, float]) -> str | None:
    """Return the fault in a rank's numbers, None if they are valid."""
    n = int(x["columns"])
    least, largest = int(x["least_positive"]), int(x["largest_positive"])
    if x["queries"] and (least < 0 or largest >= n):
        return f"positive holds {least if least < 0 else largest}, outside this rank's {n} columns"
    if x["bad_weight"]:
        return "weight holds NaN, infinite or negative values"
    for name in ("beta", "neg_bias"):
        if x[f"bad_{name}"]:
            return f"{name} holds +inf"
    if x["bad_known"]:
        return f"known holds a row outside this rank's {int(x['queries'])} queries"
    if x["least_negative"] < -1 or x["largest_negative"] > max(n - 1, 0):
        return f"negatives hold a column outside -1 … {n - 1}"
    return None


def add_biases(*biases: Tensor | None) -> Tensor | None:
    """Return the sum of the biases that are not None."""
    given = [bias for bias in biases if bias is not None]
    return sum(given[1:], given[0]) if given else None


def weighted(weight_m: Tensor, values_m: Tensor) -> Tensor:
    """Return weight · value, 0 if the weight is 0, even for a non-finite value."""
    return torch.where(weight_m > 0, weight_m * values_m, 0.0)


def _largest_norm(rows: Tensor) -> Number:
    if rows.shape[0] == 0:
        return 0.0
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32  # float32 is not copied
    return torch.linalg.vector_norm(rows.detach(), dim=1, dtype=dtype).max()


def _range(bias: Tensor | None) -> tuple[Number, Number]:
    """Return the negated minimum and the maximum of the finite entries and 0; -inf marks excluded columns."""
    if bias is None or bias.numel() == 0:
        return 0.0, 0.0
    finite = torch.where(bias.detach() == -math.inf, 0.0, bias.detach().double())
    least, most = finite.aminmax()
    return -least.clamp(max=0), most.clamp(min=0)


def _ends(columns: Tensor | None) -> tuple[Number, Number]:
    """Return the minimum and the maximum, 0 if empty."""
    if columns is None or columns.numel() == 0:
        return 0.0, 0.0
    least, most = columns.aminmax()
    return least, most
