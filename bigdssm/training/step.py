"""One training step: encode, one loss over all vectors of the global batch, and the way back through the towers.

The loss runs on vectors detached from the towers. Without a token budget both towers encode everything at once and
keep their graph. With one they encode in chunks (the gradient cache, Gao et al. 2021): first without a graph, then,
once the loss has given every vector its gradient, again chunk by chunk with one, each chunk's random state replayed
so that dropout masks agree.

Shapes: m queries, n documents, D vector width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.data import Batch, chunks
from bigdssm.data.chunks import Chunk
from bigdssm.losses import LossOutput
from bigdssm.models import Encoded
from bigdssm.training.engine import Engine
from bigdssm.training.random_state import RandomState

LossFunction = Callable[[Encoded, Batch], LossOutput]


@dataclass(frozen=True)
class StepResult:
    """What one step reports; the same on every rank."""

    loss: float
    applied: bool  # False where loss or gradients were not finite
    gradient_norm: float
    alpha: float
    stats: dict[str, Tensor]


def train_step(
    engine: Engine,
    batch: Batch,
    loss_function: LossFunction,
    lr_factor: float,
    chunk_tokens: int,
    listed: Tensor | None = None,
) -> StepResult:
    """Run one step on this rank's share of the global batch and return what all ranks report of it. A collective.

    listed int64 [m, l]: columns for the model to score for each query, where its score is no product (without chunks).
    """
    cut = _agreed_chunks(batch, chunk_tokens)
    encoded, backward = _encode_whole(engine, batch, listed) if cut is None else _encode_in_chunks(engine, batch, *cut)
    leaves = Encoded(*(None if t is None else t.detach().requires_grad_() for t in encoded))  # type: ignore[arg-type]
    output = loss_function(leaves, batch)
    output.loss.backward()
    loss = _agreed_loss(output, leaves)
    applied = False
    if math.isfinite(loss):
        backward(leaves)
        applied = engine.step(lr_factor)
    norm = engine.gradient_norm() if applied else float("nan")
    return StepResult(loss, applied, norm, float(leaves.alpha.detach()), output.stats)


Backward = Callable[[Encoded], None]  # takes leaves whose gradients the loss has filled


def _encode_whole(engine: Engine, batch: Batch, listed: Tensor | None) -> tuple[Encoded, Backward]:
    """Encode both sides, and score what is listed, in one forward: every parameter has its gradient in one backward."""
    some = None if listed is None else chunks.at_least_one({"listed": listed})["listed"]
    full = engine.forward(chunks.at_least_one(batch.query), chunks.at_least_one(batch.doc), some)
    assert full.U is not None and full.W is not None
    num_queries, num_docs = len(batch.query_ids), len(batch.doc_ids)
    beta = None if full.beta is None else full.beta[:num_docs]
    scores = None if full.scores is None else full.scores[:num_queries]
    encoded = Encoded(full.U[:num_queries], full.W[:num_docs], beta, full.alpha, scores)

    def backward(leaves: Encoded) -> None:
        sides = zip(encoded, leaves, strict=True)
        engine.backward([(out, _gradient(leaf)) for out, leaf in sides if out is not None and leaf is not None])

    return encoded, backward


def _encode_in_chunks(
    engine: Engine, batch: Batch, query_chunks: list[Chunk], doc_chunks: list[Chunk]
) -> tuple[Encoded, Backward]:
    """Encode without graphs; the backward encodes each chunk again with one."""
    work = [("query", chunk) for chunk in query_chunks] + [("doc", chunk) for chunk in doc_chunks]
    states: list[RandomState] = []
    parts: list[Encoded] = []
    with torch.no_grad():
        for side, chunk in work:
            states.append(RandomState.now())
            parts.append(engine.forward(**{side: chunk.features}))  # type: ignore[arg-type]
    queries, docs = parts[: len(query_chunks)], parts[len(query_chunks) :]
    U = _whole([part.U for part in queries], query_chunks, len(batch.query_ids))
    W = _whole([part.W for part in docs], doc_chunks, len(batch.doc_ids))
    beta = _whole([part.beta for part in docs], doc_chunks, len(batch.doc_ids))

    def backward(leaves: Encoded) -> None:
        with engine.one_reduction():
            for number, ((side, chunk), state) in enumerate(zip(work, states, strict=True)):
                last = number == len(work) - 1
                with state.replayed():
                    encoded = engine.forward(**{side: chunk.features})  # type: ignore[arg-type]
                with nullcontext() if last else engine.no_reduction():
                    engine.backward(_chunk_gradients(encoded, leaves, chunk, with_alpha=last))

    return Encoded(U, W, beta, docs[0].alpha), backward


def _chunk_gradients(encoded: Encoded, leaves: Encoded, chunk: Chunk, with_alpha: bool) -> list[tuple[Tensor, Tensor]]:
    """Return a chunk's outputs with their gradients; alpha's goes with one chunk only."""
    pairs = []
    sides = ((encoded.U, leaves.U), (encoded.W, leaves.W), (encoded.beta, leaves.beta))
    for output, leaf in sides:
        if output is not None and leaf is not None:
            pairs.append((output[: len(chunk.rows)], _gradient(leaf)[chunk.rows]))
    alpha = _gradient(leaves.alpha)
    return [*pairs, (encoded.alpha, alpha if with_alpha else torch.zeros_like(alpha))]


def _gradient(leaf: Tensor) -> Tensor:
    return leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)


def _agreed_loss(output: LossOutput, leaves: Encoded) -> float:
    """Return the mean loss over ranks, NaN on every rank where a loss or a vector's gradient on any is not finite."""
    gradients = [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]
    finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    local = float(output.loss.detach()) if finite else float("nan")
    return float(distributed.all_reduce(torch.tensor([local], dtype=torch.float64))) / distributed.world_size()


def _whole(parts: Sequence[Tensor | None], side: list[Chunk], num_rows: int) -> Tensor | None:
    """Return the chunks' outputs in the batch's order, None where the model has no such output."""
    present = [part for part in parts if part is not None]
    return chunks.assemble(present, side, num_rows) if present else None


def _agreed_chunks(batch: Batch, chunk_tokens: int) -> tuple[list[Chunk], list[Chunk]] | None:
    """Return both sides' chunks, equally many on every rank, or None where everything is encoded at once."""
    if chunk_tokens == 0:
        return None
    query = chunks.cut(batch.query, len(batch.query_ids), chunk_tokens)
    doc = chunks.cut(batch.doc, len(batch.doc_ids), chunk_tokens)
    num_query, num_doc = distributed.all_reduce(torch.tensor([len(query), len(doc)]), "max").tolist()
    if max(num_query, num_doc) <= 1:
        return None
    return chunks.filled_up(query, batch.query, num_query), chunks.filled_up(doc, batch.doc, num_doc)
