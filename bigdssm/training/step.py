"""One training step: encode, one loss over all vectors of the global batch, and the way back through the towers.

The loss runs on vectors detached from the towers. Without a token budget both towers encode everything at once and
keep their graph. With one they encode in chunks (the gradient cache, Gao et al. 2021): the last of them, as many as
may be kept, with a graph; the others without, and, once the loss has given every vector its gradient, again with one,
each chunk's random state replayed so that dropout masks agree.

Shapes: m queries, n documents, D vector width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdssm import distributed, timing
from bigdssm.batching import chunks
from bigdssm.batching.batch import Batch
from bigdssm.batching.chunks import Chunk
from bigdssm.config import EngineConfig
from bigdssm.dataset.tensors import Features
from bigdssm.losses import LossOutput
from bigdssm.models import Encoded
from bigdssm.training.engine import Engine
from bigdssm.training.random_state import RandomState

LossFunction = Callable[[Encoded, Batch], LossOutput]


@dataclass(frozen=True)
class StepResult:
    """What one step reports; the same on every rank but for the padding."""

    loss: float
    applied: bool  # False where loss or gradients were not finite
    gradient_norm: float
    alpha: float
    padding: float  # share of what this rank encoded, its own
    stats: dict[str, Tensor]


@dataclass(frozen=True)
class Budget:
    """How much is encoded at once and how much is kept for the backward, in tokens: rows × the longest row."""

    chunk_tokens: int  # 0: both sides whole
    kept_tokens: int

    @classmethod
    def of(cls, config: EngineConfig) -> Budget:
        """Return the budget that a config states; what is kept by default takes no more memory than one chunk."""
        kept = config.keep_graph_tokens
        return cls(config.chunk_tokens, config.chunk_tokens if kept is None else kept)


def train_step(
    engine: Engine,
    batch: Batch,
    loss_function: LossFunction,
    lr_factor: float,
    budget: Budget,
    further: Features | None = None,
) -> StepResult:
    """Run one step on this rank's share of the global batch and return what all ranks report of it. A collective.

    further: what the model's forward takes for the queries beside both sides (without chunks), by name.
    """
    with timing.span("encode"):
        pieces = pieces_of(batch, budget)
        if pieces is None:
            encoded, backward = _encode_whole(engine, batch, further or {})
        else:
            encoded, backward = _encode_pieces(engine, batch, pieces)
    with timing.span("loss"):
        leaves = Encoded(*(None if t is None else t.detach().requires_grad_() for t in encoded))  # type: ignore[arg-type]
        output = loss_function(leaves, batch)
        output.loss.backward()
        loss = _agreed_loss(output, leaves)
    applied = False
    if math.isfinite(loss):
        with timing.span("backward"):
            backward(leaves)
        with timing.span("optimizer"):
            applied = engine.step(lr_factor)
    norm = engine.gradient_norm() if applied else float("nan")
    pad_ids = {"query": batch.query_pad_ids, "doc": batch.doc_pad_ids}
    inputs = [(p.side, p.chunk.features) for p in pieces] if pieces else [("query", batch.query), ("doc", batch.doc)]
    padding = chunks.padding_fraction([(features, pad_ids[side]) for side, features in inputs])
    return StepResult(loss, applied, norm, float(leaves.alpha.detach()), padding, output.stats)


Backward = Callable[[Encoded], None]  # takes leaves whose gradients the loss has filled
Gradients = list[tuple[Tensor, Tensor]]  # outputs of the towers, and the gradient of each


def _encode_whole(engine: Engine, batch: Batch, further: Features) -> tuple[Encoded, Backward]:
    """Encode both sides, and what goes with them, in one forward: every parameter has its gradient in one backward."""
    further = chunks.at_least_one(further) if further else {}
    full = engine.forward(chunks.at_least_one(batch.query), chunks.at_least_one(batch.doc), **further)
    assert full.U is not None and full.W is not None
    num_queries, num_docs = len(batch.query_ids), len(batch.doc_ids)
    beta = None if full.beta is None else full.beta[:num_docs]
    scores = None if full.scores is None else full.scores[:num_queries]
    encoded = Encoded(full.U[:num_queries], full.W[:num_docs], beta, full.alpha, scores)

    def backward(leaves: Encoded) -> None:
        sides = zip(encoded, leaves, strict=True)
        engine.backward([(out, _gradient(leaf)) for out, leaf in sides if out is not None and leaf is not None])

    return encoded, backward


@dataclass
class Piece:
    """A chunk of one side; between encoding and backward it has its graph, or the random state to make it again."""

    side: str
    chunk: Chunk
    keep: bool
    encoded: Encoded | None = None
    state: RandomState | None = None

    def encode(self, engine: Engine) -> Encoded:
        """Return the chunk's vectors, without a graph."""
        if not self.keep:
            self.state = RandomState.now()
        with torch.set_grad_enabled(self.keep):
            encoded = engine.forward(**{self.side: self.chunk.features})  # type: ignore[arg-type]
        if self.keep:
            self.encoded = encoded
        return Encoded(*(None if t is None else t.detach() for t in encoded))  # type: ignore[arg-type]

    def with_graph(self, engine: Engine) -> Encoded:
        """Return the vectors with their graph, once."""
        if self.state is None:
            encoded, self.encoded = self.encoded, None
            assert encoded is not None
            return encoded
        with timing.span("encode again"), self.state.replayed():
            return engine.forward(**{self.side: self.chunk.features})  # type: ignore[arg-type]


def _encode_pieces(engine: Engine, batch: Batch, pieces: list[Piece]) -> tuple[Encoded, Backward]:
    """Encode piece by piece; backward goes through those kept at once, then through the others one by one."""
    parts = [piece.encode(engine) for piece in pieces]
    query = [(piece.chunk, part) for piece, part in zip(pieces, parts, strict=True) if piece.side == "query"]
    doc = [(piece.chunk, part) for piece, part in zip(pieces, parts, strict=True) if piece.side == "doc"]
    U = _whole([(chunk, part.U) for chunk, part in query], len(batch.query_ids))
    W = _whole([(chunk, part.W) for chunk, part in doc], len(batch.doc_ids))
    beta = _whole([(chunk, part.beta) for chunk, part in doc], len(batch.doc_ids))
    kept = [piece for piece in pieces if piece.keep]
    groups = ([kept] if kept else []) + [[piece] for piece in pieces if not piece.keep]

    def backward(leaves: Encoded) -> None:
        with engine.one_reduction():
            for number, group in enumerate(groups):
                gradients: Gradients = []
                for piece in group:
                    encoded = piece.with_graph(engine)
                    gradients += _gradients(encoded, leaves, piece.chunk)
                if number == 0:
                    gradients.append((encoded.alpha, _gradient(leaves.alpha)))
                engine.backward(gradients)

    return Encoded(U, W, beta, parts[-1].alpha), backward


def _gradients(encoded: Encoded, leaves: Encoded, chunk: Chunk) -> Gradients:
    """Return a chunk's vectors and biases with their gradients; alpha's is the batch's and goes with one chunk."""
    sides = ((encoded.U, leaves.U), (encoded.W, leaves.W), (encoded.beta, leaves.beta))
    return [
        (output[: len(chunk.rows)], _gradient(leaf)[chunk.rows])
        for output, leaf in sides
        if output is not None and leaf is not None
    ]


def _gradient(leaf: Tensor) -> Tensor:
    return leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)


def _agreed_loss(output: LossOutput, leaves: Encoded) -> float:
    """Return the mean loss over ranks, NaN on every rank where a loss or a vector's gradient on any is not finite."""
    gradients = [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]
    finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    local = float(output.loss.detach()) if finite else float("nan")
    return float(distributed.all_reduce(torch.tensor([local], dtype=torch.float64))) / distributed.world_size()


def _whole(parts: Sequence[tuple[Chunk, Tensor | None]], num_rows: int) -> Tensor | None:
    """Return the chunks' outputs in the batch's order, None where the model has no such output."""
    present = [(chunk, part) for chunk, part in parts if part is not None]
    return (
        chunks.assemble([part for _, part in present], [chunk for chunk, _ in present], num_rows) if present else None
    )


def pieces_of(batch: Batch, budget: Budget) -> list[Piece] | None:
    """Return both sides' chunks, equally many and as many of them kept on every rank; None: everything at once.

    A collective.
    """
    if budget.chunk_tokens == 0:
        return None
    query = chunks.cut(batch.query, len(batch.query_ids), budget.chunk_tokens, batch.query_pad_ids)
    doc = chunks.cut(batch.doc, len(batch.doc_ids), budget.chunk_tokens, batch.doc_pad_ids)
    num_query, num_doc = distributed.all_reduce(torch.tensor([len(query), len(doc)]), "max").tolist()
    if max(num_query, num_doc) <= 1:
        return None
    work = [("query", chunk) for chunk in chunks.filled_up(query, batch.query, num_query)]
    work += [("doc", chunk) for chunk in chunks.filled_up(doc, batch.doc, num_doc)]
    tokens = torch.tensor([chunk.tokens for _, chunk in reversed(work)]).cumsum(0)
    num_kept = int(distributed.all_reduce((tokens <= budget.kept_tokens).sum(), "min"))
    return [Piece(side, chunk, number >= len(work) - num_kept) for number, (side, chunk) in enumerate(work)]
