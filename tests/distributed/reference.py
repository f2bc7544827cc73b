"""The losses written down directly: dense matrices on the concatenated batch, float64, autograd, sets for the masks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

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
    negatives: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the optional arguments that are given."""
        names = ("beta", "neg_bias", "weight", "query_ids", "doc_ids", "known", "negatives")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass
class Dense:
    """The concatenated batch: scores and who is dropped."""

    S: Tensor  # [M, N]
    positive: Tensor  # [M]
    weight: Tensor
    in_X: Tensor  # [M, N] bool
    neg_bias: Tensor
    leaves: list[Tensor | None]  # U, W, alpha, beta


def dense(shards: list[Shard], alpha: float, scalar_beta: float | None = None) -> Dense:
    """Concatenate the shards and find the drop set by comparing sets of ids."""
    U = torch.cat([s.U for s in shards]).to(DOUBLE).requires_grad_()
    W = torch.cat([s.W for s in shards]).to(DOUBLE).requires_grad_()
    a = torch.tensor([alpha], dtype=DOUBLE, requires_grad=True)
    beta = None
    if scalar_beta is not None:
        beta = torch.tensor([scalar_beta], dtype=DOUBLE, requires_grad=True)
    elif shards[0].beta is not None:
        beta = torch.cat([s.beta for s in shards if s.beta is not None]).to(DOUBLE).requires_grad_()
    M, N = U.shape[0], W.shape[0]
    starts = [sum(s.W.shape[0] for s in shards[:k]) for k in range(len(shards))]
    positive = torch.cat([s.positive + start for s, start in zip(shards, starts, strict=True)])
    weight = _join([s.weight for s in shards], M, 1.0)
    queries = _ids([s.query_ids for s in shards], M)
    docs = _ids([s.doc_ids for s in shards], N)
    pairs = {(queries[i], docs[int(positive[i])]) for i in range(M) if weight[i] > 0}
    first_row = 0
    for shard in shards:
        if shard.known is not None:
            first = first_row if shard.query_ids is None else 0  # rows of the shard stand for ids
            pairs |= {(int(q) + first, int(d)) for q, d in shard.known.tolist()}
        first_row += shard.U.shape[0]
    in_X = torch.tensor([[(q, d) in pairs for d in docs] for q in queries], dtype=torch.bool).view(M, N)
    S = a * (U @ W.T) + (0 if beta is None else beta)
    return Dense(S, positive, weight, in_X, _join([s.neg_bias for s in shards], N, 0.0), [U, W, a, beta])


def fps(shards: list[Shard], alpha: float, direction: str) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss and the gradients of U, W, alpha, beta."""
    x = dense(shards, alpha)
    if x.weight.sum() == 0:
        return torch.zeros((), dtype=DOUBLE), [None if t is None else torch.zeros_like(t) for t in x.leaves]
    losses = []
    for i in range(len(x.positive)):
        if x.weight[i] == 0:
            continue
        p = int(x.positive[i])
        row = [x.S[i, p]] + [x.S[i, j] + x.neg_bias[j] for j in range(x.S.shape[1]) if j != p and not x.in_X[i, j]]
        column = [x.S[i, p]] + [x.S[other, p] for other in range(x.S.shape[0]) if not x.in_X[other, p]]
        terms = {"q2d": torch.logsumexp(torch.stack(row), 0), "d2q": torch.logsumexp(torch.stack(column), 0)}
        terms["both"] = (terms["q2d"] + terms["d2q"]) / 2
        losses.append(x.weight[i] * (terms[direction] - x.S[i, p]))
    return _gradients(torch.stack(losses).sum() / x.weight.sum(), x.leaves)


def fps_at_once(shards: list[Shard], alpha: float, direction: str) -> tuple[Tensor, list[Tensor | None]]:
    """Return what `fps` does, of all rows at once: for hundreds of them."""
    x = dense(shards, alpha)
    every = torch.arange(len(x.positive))
    S_pos = x.S[every, x.positive]
    own = torch.zeros_like(x.in_X).index_put_((every, x.positive), torch.tensor(True))
    rows = (x.S + x.neg_bias).masked_fill(x.in_X | own, -math.inf)
    columns = x.S.masked_fill(x.in_X, -math.inf).logsumexp(0)[x.positive]
    q2d, d2q = torch.cat([S_pos[:, None], rows], 1).logsumexp(1), torch.logaddexp(S_pos, columns)
    lse = {"q2d": q2d, "d2q": d2q, "both": (q2d + d2q) / 2}[direction]
    loss = (x.weight * (lse - S_pos)).sum() / x.weight.sum()
    return _gradients(loss, x.leaves)


def ranking(
    name: str,
    shards: list[Shard],
    alpha: float,
    in_batch: bool,
    margin: float = 0.2,
    scalar_beta: float | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss and the gradients of U, W, alpha, beta; a positive per query stands in the batch once each."""
    x = dense(shards, alpha, scalar_beta)
    starts = [sum(s.W.shape[0] for s in shards[:k]) for k in range(len(shards))]
    lists = [
        [start + int(c) for c in row if c >= 0] if s.negatives is not None else []
        for s, start in zip(shards, starts, strict=True)
        for row in (s.negatives if s.negatives is not None else s.positive[:, None]).tolist()
    ]
    shared = x.positive.tolist() if in_batch else []
    total = x.S.sum() * 0
    for i, p in enumerate(x.positive.tolist()):
        kept = [j for j in shared + lists[i] if j != p and not x.in_X[i, j]]
        if x.weight[i] == 0:
            continue
        positive = x.S[i, p]
        S = torch.stack([x.S[i, j] + x.neg_bias[j] for j in kept]) if kept else x.S[i, :0]
        softplus = torch.nn.functional.softplus
        if name == "softmax":
            term = torch.logsumexp(torch.cat([positive[None], S]), 0) - positive
        elif name == "sigmoid":
            term = softplus(-positive, threshold=500) + softplus(S, threshold=500).sum()
        elif not kept:
            continue
        elif name == "pair_ce":
            term = softplus(S - positive, threshold=500).mean()
        else:
            term = (margin - positive + S).clamp(min=0).mean()
        total = total + x.weight[i] * term
    return _gradients(total / x.weight.sum().clamp(min=1e-300), x.leaves)


def _gradients(loss: Tensor, leaves: list[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
    given = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(loss, given, allow_unused=True))
    results = []
    for leaf in leaves:
        grad = None if leaf is None else next(found)
        results.append(None if leaf is None else torch.zeros_like(leaf) if grad is None else grad)
    return loss.detach(), results


def _join(parts: list[Tensor | None], total: int, default: float) -> Tensor:
    if all(part is None for part in parts):
        return torch.full((total,), default, dtype=DOUBLE)
    return torch.cat([part.to(DOUBLE) for part in parts if part is not None])


def _ids(parts: list[Tensor | None], total: int) -> list[int]:
    given = [part for part in parts if part is not None]
    return torch.cat(given).tolist() if given else list(range(total))


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
    """Draw a batch: `sizes` are (m, n) per rank; `options` name what is given beside the vectors.

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
        if "negatives" in options:
            negatives = torch.randint(-1, n, (m, 4), generator=generator)
            shard = replace(shard, negatives=negatives)
        shards.append(shard)
    return shards
