"""Both towers over a step's batch as its plan says, and the way back through them once every vector has its gradient.

Whole, both sides are one forward, which keeps its graph. In chunks (the gradient cache, Gao et al. 2021) the last of
them, as many as may be kept, are encoded with a graph; the others without, and, on the way back, again with one, each
chunk's random state replayed so that dropout masks agree.

Shapes: m queries, n documents, D vector width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.dataset.tensors import Features
from bigdssm.loader.batch import Batch
from bigdssm.loader.chunks import Chunked, at_least_one, join_sides, split_sides
from bigdssm.loader.step_plan import Chunk, SidePlan, StepPlan, TokenBudget, plan_side
from bigdssm.models import CrossEncoder, DualEncoder, Encoded, Values
from bigdssm.models.dual_encoder import document_head, query_head
from bigdssm.training.engine import Engine
from bigdssm.utils import timing

Backward = Callable[[Encoded], None]  # takes leaves whose gradients the loss has filled
Gradients = list[tuple[Tensor, Tensor]]  # outputs of the towers, and the gradient of each


def encode(engine: Engine, batch: Batch, plan: StepPlan, further: Features) -> tuple[Encoded, Backward, StepPlan]:
    """Return the vectors U [m, D], W [n, D] and what goes with them, without a graph; their way back; what was encoded.

    further: what the model's forward takes for the queries beside both sides, by name; whole batches alone have it.
    """
    if isinstance(getattr(engine.module, "scorer", None), CrossEncoder):
        return encode_pairs(engine, batch, plan, further["candidates"])
    encoded = _whole(engine, batch, plan, further) if plan.whole else _in_pieces(engine, batch, pieces_of(batch, plan))
    return *encoded, plan


def _whole(engine: Engine, batch: Batch, plan: StepPlan, listed: Features) -> tuple[Encoded, Backward]:
    """Encode in one forward: every parameter has its gradient in one backward."""
    further: dict[str, Any] = dict(at_least_one(listed)) if listed else {}
    if batch.query_positions is not None:
        further["query_positions"] = batch.query_positions
    query, doc = whole_features(batch.query, plan.query), whole_features(batch.doc, plan.doc)
    full = engine.forward(query, doc, **further)
    assert full.U is not None and full.W is not None
    num_queries, num_docs = len(batch.query_ids), len(batch.doc_ids)
    beta = None if full.beta is None else full.beta[:num_docs]
    scores = None if full.scores is None else full.scores[:num_queries]
    encoded = Encoded(full.U[:num_queries], full.W[:num_docs], beta, full.alpha, scores)

    def backward(leaves: Encoded) -> None:
        sides = zip(encoded, leaves, strict=True)
        engine.backward([(out, _gradient(leaf)) for out, leaf in sides if out is not None and leaf is not None])

    return encoded, backward


def whole_features(features: Features, side: SidePlan) -> Mapping[str, Values]:
    """Return one side's features for one forward, lists packed where they are."""
    return Chunked(features, side).features(side.chunks[0]) if side.packed else {**at_least_one(features)}


@dataclass
class EncodedChunk:
    """A chunk of one side; between encoding and backward it has its graph, or the random state to make it again."""

    name: str  # of its side
    side: Chunked
    chunk: Chunk
    keep: bool
    encoded: Encoded | None = None
    state: RandomState | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """Return what the model's forward takes."""
        query_positions = self.side.query_positions(self.chunk)
        return {
            self.name: self.side.features(self.chunk),
            **({} if query_positions is None else {"query_positions": query_positions}),
        }

    def encode(self, engine: Engine) -> Encoded:
        """Return the chunk's vectors, without a graph."""
        if not self.keep:
            self.state = RandomState.now()
        with torch.set_grad_enabled(self.keep):
            encoded = engine.forward(**self.inputs)
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
            return engine.forward(**self.inputs)

    def gradients(self, encoded: Encoded, leaves: Encoded) -> Gradients:
        """Return its vectors and biases with their gradients; alpha's is the batch's and goes with one chunk."""
        its = self.side.outputs(self.chunk)
        sides = ((encoded.U, leaves.U), (encoded.W, leaves.W), (encoded.beta, leaves.beta))
        return [
            (output[: len(its)], _gradient(leaf)[its])
            for output, leaf in sides
            if output is not None and leaf is not None
        ]


def pieces_of(batch: Batch, plan: StepPlan) -> list[EncodedChunk]:
    """Return the pieces of a plan that is not whole, queries' before documents'."""
    query, doc = Chunked(batch.query, plan.query, batch.query_positions), Chunked(batch.doc, plan.doc)
    work = [("query", query, chunk) for chunk in plan.query.chunks] + [("doc", doc, chunk) for chunk in plan.doc.chunks]
    return [EncodedChunk(*what, keep=number >= len(work) - plan.num_retained) for number, what in enumerate(work)]


def _in_pieces(engine: Engine, batch: Batch, pieces: list[EncodedChunk]) -> tuple[Encoded, Backward]:
    """Encode piece by piece; backward goes through those kept at once, then through the others one by one."""
    parts = [piece.encode(engine) for piece in pieces]
    query, doc = pieces[0].side, pieces[-1].side
    encoded = Encoded(
        _assembled(query, [part.U for piece, part in zip(pieces, parts, strict=True) if piece.side is query]),
        _assembled(doc, [part.W for piece, part in zip(pieces, parts, strict=True) if piece.side is doc]),
        _assembled(doc, [part.beta for piece, part in zip(pieces, parts, strict=True) if piece.side is doc]),
        parts[-1].alpha,
    )
    return encoded, partial(_backward, engine, pieces)


def _backward(engine: Engine, pieces: Sequence[EncodedChunk], leaves: Encoded) -> None:
    kept = [piece for piece in pieces if piece.keep]
    groups = ([kept] if kept else []) + [[piece] for piece in pieces if not piece.keep]
    with engine.one_reduction():
        for number, group in enumerate(groups):
            gradients: Gradients = []
            for piece in group:
                encoded = piece.with_graph(engine)
                gradients += piece.gradients(encoded, leaves)
            if number == 0:
                gradients.append((encoded.alpha, _gradient(leaves.alpha)))
            engine.backward(gradients)


class EncodedPairChunk(EncodedChunk):
    """A chunk of pairs, whose scores are made of both sides' features."""

    @property
    def inputs(self) -> dict[str, Any]:
        """Return what the model's forward takes."""
        return {**split_sides(self.side.features(self.chunk)), "paired": True}

    def gradients(self, encoded: Encoded, leaves: Encoded) -> Gradients:
        """Return its scores with their gradients."""
        its = self.side.outputs(self.chunk)
        assert encoded.scores is not None and leaves.scores is not None
        return [(encoded.scores[: len(its)], _gradient(leaves.scores).flatten()[its])]


def encode_pairs(engine: Engine, batch: Batch, plan: StepPlan, listed: Tensor) -> tuple[Encoded, Backward, StepPlan]:
    """Return the scores of each query's documents, columns int64 [m, l], read as pairs, as `encode` does. A collective.

    They are added to the products of the towers' vectors, which have no gradient.
    """
    scorer = cast(DualEncoder, engine.module).scorer
    assert isinstance(scorer, CrossEncoder)
    pieces = pair_pieces(scorer, batch, listed, engine.budget)
    side = pieces[0].side
    parts = [piece.encode(engine) for piece in pieces]
    scores = side.assemble([part.scores for part in parts if part.scores is not None]).view(listed.shape)
    scores = scores.float() + _products(engine, batch, plan, listed)
    encoded = Encoded(None, None, None, parts[-1].alpha, scores)
    return encoded, partial(_backward, engine, pieces), replace(plan, pairs=side.plan)


def pair_pieces(scorer: CrossEncoder, batch: Batch, listed: Tensor, budget: TokenBudget) -> list[EncodedPairChunk]:
    """Return the pairs of each query with its documents, columns int64 [m, l], in pieces. A collective.

    The ranks agree on the number of pieces, and of those whose graph is kept.
    """
    row = (
        torch.arange(len(listed), device=listed.device) if batch.query_positions is None else batch.query_positions.row
    )
    row, column = row.repeat_interleave(listed.shape[1]), listed.flatten()
    query, doc = scorer.texts["query"], scorer.texts["doc"]
    features = join_sides(
        {name: batch.query[name][row] for name in query}, {name: batch.doc[name][column] for name in doc}
    )
    lengths = join_sides(
        {name: batch.query_lengths[name].take(row) for name in query},
        {name: batch.doc_lengths[name].take(column) for name in doc},
    )
    pairs = plan_side(lengths, listed.numel(), budget.chunk_tokens)
    fits = np.cumsum([chunk.tokens for chunk in reversed(pairs.chunks)]) <= budget.retained_tokens
    unkept = len(pairs.chunks) - int(fits.sum()) if budget.chunk_tokens else 0
    number, most_unkept = distributed.all_reduce(torch.tensor([max(1, len(pairs.chunks)), unkept]), "max").tolist()
    pairs = pairs.padded_to(number)
    side = Chunked(features, pairs)
    return [EncodedPairChunk("pairs", side, chunk, keep=i >= most_unkept) for i, chunk in enumerate(pairs.chunks)]


def _products(engine: Engine, batch: Batch, plan: StepPlan, listed: Tensor) -> Tensor:
    """Return the towers' scores float32 [m, l] of listed columns, without a graph, by the towers as they evaluate."""
    engine.module.eval()
    with torch.no_grad():
        towers, _ = _whole(engine, batch, plan, {}) if plan.whole else _in_pieces(engine, batch, pieces_of(batch, plan))
    engine.module.train()
    assert towers.U is not None and towers.W is not None
    queries, documents = query_head(towers.U), document_head(towers.W, towers.alpha.detach(), towers.beta)
    return torch.einsum("md,mld->ml", queries, documents[listed]).detach()


def _assembled(side: Chunked, parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return a side's outputs in the batch's order, None where the model has no such output."""
    present = [part for part in parts if part is not None]
    return side.assemble(present) if present else None


def _gradient(leaf: Tensor) -> Tensor:
    return leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)


@dataclass(frozen=True)
class RandomState:
    """The random state at one moment, of the CPU and of this rank's device."""

    cpu: Tensor
    device: Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        """Return the present state."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None)

    def restore(self) -> None:
        """Make this the present state."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within it this state runs; afterwards the one from before goes on."""
        present = RandomState.now()
        self.restore()
        yield
        present.restore()
