"""The gradient cache as a library: exact gradients of a loss over the documents of all ranks, in chunks.

    engine, *_ = deepspeed.initialize(model=TwoTowers(query_encoder, doc_encoder), optimizer=…, config=…)
    batch = pair_batch(queries, documents, query_ids=…, doc_ids=…)        # this rank's share
    output = cached_step(engine, batch, loss=FPS(), chunk_tokens=8192)
    engine.step()

The engine is one of DeepSpeed (ZeRO 0 to 3), DistributedDataParallel, or a plain module. The gradients are those of one
backward over the whole batch. No dataset, config file or Trainer is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from bigdssm import distributed
from bigdssm.config import LossConfig, ModelConfig, NegativesConfig, StageConfig
from bigdssm.errors import ConfigError
from bigdssm.loader.batch import Batch, Lengths, lengths_of_mask
from bigdssm.loader.step_plan import TokenBudget, plan_step
from bigdssm.losses import FPS, LossOutput
from bigdssm.losses.declarations import NoCorrection
from bigdssm.models import Encoded
from bigdssm.training.encoding import LossFunction, StepEngine, back_propagate, encode
from bigdssm.training.objective import Objective

Inputs = Mapping[str, Tensor]
EncodeSide = Callable[[Any, str, Inputs], Tensor]  # (engine, "query" or "doc", inputs of R rows) → vectors [R, D]
TOKENS, MASK = "input_ids", "attention_mask"
DEFAULT_LOSS = FPS()


def pair_batch(
    query: Inputs,
    doc: Inputs,
    *,
    query_ids: Tensor | None = None,
    doc_ids: Tensor | None = None,
    positive: Tensor | None = None,
    negatives: Tensor | None = None,
    relevance: Tensor | None = None,
) -> Batch:
    """Return this rank's m queries and n documents as a batch; `query` and `doc` are inputs of encoders by name.

    query_ids [m], doc_ids [n]: int64; documents of equal ids are encoded once, and no document of a query id is a
    negative of that query, on any rank. By default, all are distinct. positive [m]: the row of `doc` of each query, by
    default 0 to m - 1; further documents are negatives. negatives [m, k]: rows of `doc`, for losses over candidates.
    relevance [m]: by default 1; a pair with 0 only gives negatives. Raises ConfigError.
    """
    m, n = _rows("query", query), _rows("doc", doc)
    device = next(iter(query.values())).device
    query_ids = _distinct_ids(m, device) if query_ids is None else query_ids
    positive = torch.arange(m, device=device) if positive is None else positive
    for name, ids, rows in (("query_ids", query_ids, m), ("doc_ids", doc_ids, n), ("positive", positive, m)):
        if ids is not None and (ids.dtype != torch.int64 or ids.shape != (rows,)):
            raise ConfigError(f"{name}: got {ids.dtype} {list(ids.shape)}, needs torch.int64 [{rows}]")
    if m and (int(positive.min()) < 0 or int(positive.max()) >= n):
        raise ConfigError(f"positive: got values up to {int(positive.max())}, needs rows of doc, 0 to {n - 1}")
    counts = torch.ones(n, dtype=torch.int64, device=device)
    if doc_ids is None:
        doc_ids = _distinct_ids(n, device)
    else:
        doc_ids, column_n, counts = doc_ids.unique(return_inverse=True, return_counts=True)
        first_row = torch.full_like(doc_ids, n).scatter_reduce(
            0, column_n, torch.arange(n, device=device), reduce="amin"
        )
        doc, positive = {name: value[first_row] for name, value in doc.items()}, column_n[positive]
        negatives = None if negatives is None else torch.where(negatives < 0, negatives, column_n[negatives])
    return Batch(
        step=0,
        row_ids=torch.arange(m),
        query=dict(query),
        doc=dict(doc),
        positive=positive,
        relevance=torch.ones(m, device=device) if relevance is None else relevance.float(),
        query_ids=query_ids,
        doc_ids=doc_ids,
        doc_rows=torch.full_like(doc_ids, -1),
        counts=counts,
        query_lengths=_lengths(query),
        doc_lengths=_lengths(doc),
        negatives=negatives,
    )


def cached_step(
    engine: Any,
    batch: Batch,
    *,
    loss: LossConfig | LossFunction = DEFAULT_LOSS,
    chunk_tokens: int,
    retained_tokens: int | None = None,
    encode_side: EncodeSide | None = None,
    alpha: float = 20.0,
) -> LossOutput:
    """Accumulate the gradients of a loss over the batches of all ranks, and return it. All ranks must call it.

    The caller then steps the optimizer. Where gradients are disabled, only the loss is computed. engine: returns
    `Encoded`, as `TwoTowers` does. chunk_tokens: tokens of a chunk with padding, plus one per row; 0: no chunks.
    retained_tokens: tokens of the chunks that are not encoded again, by default one chunk. encode_side: calls an engine
    that does not return `Encoded`; the score is then alpha times the product of its vectors. The loss is the same on
    every rank. Raises ConfigError: FSDP, accumulated steps. Source: Gao et al. 2021.
    """
    budget = TokenBudget(chunk_tokens, chunk_tokens if retained_tokens is None else retained_tokens)
    function = loss_function(loss, batch) if isinstance(loss, LossConfig) else loss
    step_engine = _step_engine(engine, encode_side, alpha)
    encoded, backward, _ = encode(step_engine, batch, plan_step(batch, budget), {})
    if not torch.is_grad_enabled():
        return function(encoded, batch)
    output = back_propagate(encoded, backward, lambda leaves: function(leaves, batch))
    return LossOutput(output.loss.detach(), output.stats)


def loss_function(loss: LossConfig, batch: Batch) -> LossFunction:
    """Return a registered loss over the batch's documents, and its candidates if there are any."""
    hard = 0 if batch.negatives is None else batch.negatives.shape[1]
    negatives = NegativesConfig(mask="batch", hard=hard)
    stage = StageConfig(loss=loss, negatives=negatives, sampling=NoCorrection())
    return Objective(stage, ModelConfig(score="cosine", beta="none"), None, None, 0.0)


class ModuleStepEngine:
    """A module, or one under DistributedDataParallel, whose gradients are averaged here, once per step."""

    def __init__(self, module: nn.Module, call: Callable[..., Encoded]) -> None:
        self.module, self._call, self._accumulates = module, call, False

    def forward(self, query: Any = None, doc: Any = None, **extra_inputs: Any) -> Encoded:
        """Encode queries, documents, or both."""
        return self._call(query=query, doc=doc, **extra_inputs)

    def backward(self, outputs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Back-propagate (output, gradient) pairs."""
        differentiable = [(output, gradient) for output, gradient in outputs if output.requires_grad]
        torch.autograd.backward([output for output, _ in differentiable], [gradient for _, gradient in differentiable])
        if not self._accumulates:
            self._average()

    @contextmanager
    def single_reduction(self) -> Iterator[None]:
        """A context that accumulates the gradients of several backwards and averages them once, at exit."""
        self._accumulates = True
        try:
            yield
        finally:
            self._accumulates = False
        self._average()

    def _average(self) -> None:
        ranks = distributed.world_size()
        if ranks == 1:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_type.values():
            whole = distributed.all_reduce(torch.cat([gradient.flatten() for gradient in gradients])) / ranks
            for gradient, part in zip(gradients, whole.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))


def _step_engine(engine: Any, encode_side: EncodeSide | None, alpha: float) -> StepEngine:
    if isinstance(engine, nn.parallel.DistributedDataParallel):
        engine = engine.module  # the wrapper's reduction expects one backward per forward
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp and any(isinstance(part, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)) for part in engine.modules()):
        raise ConfigError("engine: got FSDP, needs DeepSpeed (ZeRO stage 3 shards weights), DDP or a plain module")
    scale = torch.full((1,), alpha, device=next(engine.parameters()).device)

    def call(query: Inputs | None = None, doc: Inputs | None = None) -> Encoded:
        sides = (("query", query), ("doc", doc))
        aligned = {side: _aligned(inputs) for side, inputs in sides if inputs is not None}
        if encode_side is None:
            return cast(Encoded, engine(**aligned))
        vectors = {side: encode_side(engine, side, inputs) for side, inputs in aligned.items()}
        return Encoded(vectors.get("query"), vectors.get("doc"), None, scale)

    if "deepspeed" in sys.modules and isinstance(engine, sys.modules["deepspeed"].DeepSpeedEngine):
        from bigdssm.training.engine import DeepSpeedStepEngine  # with DeepSpeed only

        return DeepSpeedStepEngine(engine, call)
    return ModuleStepEngine(engine, call)


def _aligned(inputs: Inputs) -> Inputs:
    """Return the inputs with masks and token types as wide as the token ids, which are cut to a chunk's longest row."""
    if TOKENS not in inputs:
        return inputs
    width, whole = inputs[TOKENS].shape[1], inputs[MASK].shape
    return {name: value[:, :width] if value.shape == whole else value for name, value in inputs.items()}


def _rows(side: str, inputs: Inputs) -> int:
    rows = {name: len(value) for name, value in inputs.items()}
    if not rows or len(set(rows.values())) > 1:
        raise ConfigError(f"{side}: got rows {rows}, needs at least one input, and equally many rows in all")
    if TOKENS in inputs and MASK not in inputs:
        raise ConfigError(f"{side}: got {TOKENS} without {MASK}, needs both: padding is not inferred from token ids")
    return next(iter(rows.values()))


def _distinct_ids(rows: int, device: torch.device) -> Tensor:
    return (distributed.rank() << 40) + torch.arange(rows, device=device)


def _lengths(inputs: Inputs) -> Lengths:
    if TOKENS not in inputs:
        return {}
    return {TOKENS: lengths_of_mask(inputs[MASK].bool().cpu().numpy(), 0)}
