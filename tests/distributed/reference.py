"""Random batches of one to three ranks, and the dense losses of the concatenated batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bigdssm.config import LossConfig
from bigdssm.losses import FPS, LossBatch
from bigdssm.losses.reference import dense_loss

DOUBLE = torch.float64


@dataclass
class Shard:
    """One rank's input to a loss, as plain tensors; None as in the losses' arguments."""

    U: Tensor
    W: Tensor
    positive: Tensor
    beta: Tensor | None = None
    neg_bias: Tensor | None = None
    weight: Tensor | None = None
    query_ids: Tensor | None = None
    doc_ids: Tensor | None = None
    known: Tensor | None = None
    is_known: Tensor | None = None
    time: Tensor | None = None
    since: Tensor | None = None
    negatives: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the optional arguments that are not None."""
        required = ("U", "W", "positive")
        return {name: value for name, value in vars(self).items() if name not in required and value is not None}


Dense = tuple[Tensor, list[Tensor | None]]  # the loss, and the gradients of U, W, alpha, beta


def concatenate(shards: list[Shard], alpha: float) -> LossBatch:
    """Concatenate all shards in float64; U, W, alpha and beta are leaves."""
    moved, rows, columns = [], 0, 0
    for shard in shards:
        known, negatives = shard.known, shard.negatives
        if known is not None and shard.query_ids is None:  # rows of the shard in place of ids
            known = known + torch.tensor([rows, 0])
        negatives = None if negatives is None else torch.where(negatives < 0, -1, negatives + columns)
        moved.append(replace(shard, positive=shard.positive + columns, known=known, negatives=negatives))
        rows, columns = rows + len(shard.U), columns + len(shard.W)
    joined = {
        name: None if value is None else torch.cat([getattr(shard, name) for shard in moved])
        for name, value in vars(moved[0]).items()
    }
    for name in ("U", "W", "beta"):
        joined[name] = None if joined[name] is None else joined[name].to(DOUBLE).requires_grad_()
    return LossBatch(**joined, alpha=torch.tensor([alpha], dtype=DOUBLE, requires_grad=True))


def gradients(loss: Tensor, batch: LossBatch) -> Dense:
    """Return the loss and its gradients of a batch's leaves."""
    leaves = [batch.U, batch.W, batch.alpha, batch.beta]
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    found = iter(torch.autograd.grad(loss, given, materialize_grads=True))
    return loss.detach(), [next(found) if isinstance(leaf, Tensor) else None for leaf in leaves]


def dense(loss: LossConfig, shards: list[Shard], alpha: float, **options: str) -> Dense:
    """Return the dense loss of the concatenated batch, and its gradients."""
    batch = concatenate(shards, alpha)
    return gradients(dense_loss(loss, batch, **options), batch)


def fps(shards: list[Shard], alpha: float, direction: str) -> Dense:
    """Return the dense softmax over all columns."""
    return dense(FPS(direction=direction), shards, alpha)  # type: ignore[arg-type]


def ranking(loss: LossConfig, shards: list[Shard], alpha: float, in_batch: bool) -> Dense:
    """Return the dense loss over in-batch negatives and candidates."""
    return dense(loss, shards, alpha, columns="in_batch" if in_batch else "none")


def make_shards(
    generator: torch.Generator,
    sizes: list[tuple[int, int]],
    D: int,
    *,
    norm: float = 1.0,
    num_queries: int | None = None,
    num_docs: int | None = None,
    options: frozenset[str] = frozenset(),
    dtype: torch.dtype = DOUBLE,
) -> list[Shard]:
    """Draw a batch: `sizes` are (m, n) per rank; `options` names the optional fields.

    Columns with the same document id get the same vector, as encoding the same document twice would.
    """
    total_docs = num_docs or 10**6
    table = torch.randn(total_docs if num_docs else 1, D, generator=generator, dtype=DOUBLE)
    shards = []
    for m, n in sizes:
        m = m if n else 0
        docs = torch.randint(total_docs, (n,), generator=generator)
        W = table[docs] if num_docs else torch.randn(n, D, generator=generator, dtype=DOUBLE)
        U = torch.randn(m, D, generator=generator, dtype=DOUBLE)
        U, W = (norm * x / x.norm(dim=1, keepdim=True).clamp(min=1e-9) for x in (U, W))
        shared = "shared" in options or n < m
        positive = torch.randint(n, (m,), generator=generator) if shared and n else torch.arange(m)
        shard = Shard(U.to(dtype), W.to(dtype), positive)
        if "beta" in options:
            shard = replace(shard, beta=torch.randn(n, generator=generator, dtype=DOUBLE).to(dtype))
        if "neg_bias" in options:
            shard = replace(shard, neg_bias=torch.randn(n, generator=generator, dtype=DOUBLE))
        if "weight" in options:
            weight = torch.rand(m, generator=generator, dtype=DOUBLE) * 3
            shard = replace(shard, weight=torch.where(torch.rand(m, generator=generator) < 0.3, 0.0, weight))
        if "query_ids" in options:
            ids = torch.randint(num_queries or 10**6, (m,), generator=generator) - 2**62
            shard = replace(shard, query_ids=ids)
        if "doc_ids" in options:
            shard = replace(shard, doc_ids=docs + 2**61)
        if "known" in options and "doc_ids" in options:
            number = 3 if "query_ids" in options else 3 * m
            known = torch.stack([
                torch.randint(num_queries or 10**6, (number,), generator=generator) - 2**62
                if "query_ids" in options else torch.randint(max(m, 1), (number,), generator=generator),
                torch.randint(total_docs, (number,), generator=generator) + 2**61,
            ], 1)  # fmt: skip
            shard = replace(shard, known=known)
        if "is_known" in options:
            shard = replace(shard, is_known=torch.rand(m, generator=generator) < 0.5)
        if "times" in options:
            time = torch.rand(m, generator=generator, dtype=DOUBLE)
            time[torch.rand(m, generator=generator) < 0.2] = torch.nan
            shard = replace(shard, time=time, since=torch.rand(n, generator=generator, dtype=DOUBLE))
        if "negatives" in options:
            negatives = torch.randint(-1, n, (m, 4), generator=generator)
            shard = replace(shard, negatives=negatives)
        shards.append(shard)
    return shards
