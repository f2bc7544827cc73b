"""The gradient cache as a library: exact gradients of a loss over the documents of all ranks, in chunks.

    engine, *_ = deepspeed.initialize(model=TwoTowers(query_encoder, doc_encoder), optimizer=…, config=…)
    batch = pair_batch(queries, documents, query_ids=…, doc_ids=…)        # this rank's share
    output = cached_step(engine, batch, loss=FPS(), chunk_tokens=8192)
    engine.step()

The engine is one of DeepSpeed (ZeRO 0 to 3), DistributedDataParallel, or a plain module. The gradients are those of one
backward over the whole batch. No dataset, config file or Trainer is needed.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from numbers import Integral
from typing import Any
from weakref import WeakKeyDictionary

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
from bigdssm.models.two_towers import check_vectors
from bigdssm.training.objective import Objective
from bigdssm.training.step import LossFunction, StepEngine, back_propagate, encode

Numbers = Any  # a tensor, an array, or lists of numbers
Inputs = Mapping[str, Tensor]
EncodeSide = Callable[[Any, str, Inputs], Tensor]  # (engine, "query" or "doc", inputs of R rows) → vectors [R, D]
DEFAULT_LOSS = FPS()
DEFAULT_TOKENS: Mapping[str, Sequence[str]] = {
    "attention_mask": (
        "input_ids", "inputs_embeds", "token_type_ids", "position_ids", "special_tokens_mask", "global_attention_mask",
        "bbox", "langs",
    )
}  # fmt: skip
"""By mask: the inputs of transformers' models with one entry per token."""
_COMPARED: WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = WeakKeyDictionary()
"""By model: the forwards, (modes of its modules, sides), whose buffers were compared."""


def pair_batch(
    query: Mapping[str, Numbers],
    doc: Mapping[str, Numbers],
    *,
    query_ids: Numbers | None = None,
    doc_ids: Numbers | None = None,
    positive: Numbers | None = None,
    negatives: Numbers | None = None,
    relevance: Numbers | None = None,
    tokens: Mapping[str, Sequence[str]] = DEFAULT_TOKENS,
) -> Batch:
    """Return this rank's m queries and n documents as a batch; `query` and `doc` are inputs of encoders by name.

    query_ids [m], doc_ids [n]: int64; documents of equal ids are encoded once, and no document of a query id is a
    negative of that query, on any rank. By default, all are distinct. positive [m]: the row of `doc` of each query, by
    default 0 to m - 1; further documents are negatives. negatives [m, k]: rows of `doc`, for losses over candidates, -1
    for none. relevance [m]: by default 1; a pair with 0 only gives negatives. tokens: by the name of a mask [R, T], the
    inputs [R, T, …] that are cut with it to the longest row of a chunk, token ids first; all other inputs stay whole.
    Raises ConfigError.
    """
    queries, documents = _inputs("query", query), _inputs("doc", doc)
    m, n = (len(next(iter(side.values()))) for side in (queries, documents))
    device = next(iter(queries.values())).device
    query_ids = _distinct_ids(m, device) if query_ids is None else _integers("query_ids", query_ids, m, device)
    positive = torch.arange(m, device=device) if positive is None else _integers("positive", positive, m, device)
    negatives = None if negatives is None else _integers("negatives", negatives, m, device, of="[m, k]")
    for name, columns, least in (("positive", positive, 0), ("negatives", negatives, -1)):
        if columns is not None and columns.numel() and (columns.min() < least or columns.max() >= n):
            raise ConfigError(
                f"{name}: got values from {int(columns.min())} to {int(columns.max())}, needs rows of doc, 0 to {n - 1}"
                + (", or -1 for none" if least else "")
            )
    relevance = torch.ones(m, device=device) if relevance is None else _tensor("relevance", relevance).to(device)
    if relevance.shape != (m,) or not ((relevance >= 0) & (relevance < torch.inf)).all():
        kind = f"{list(relevance.shape)}, {relevance.flatten()[:3].tolist()} …"
        raise ConfigError(f"relevance: got {kind}, needs [{m}], finite and not negative")
    counts = torch.ones(n, dtype=torch.int64, device=device)
    if doc_ids is None:
        doc_ids = _distinct_ids(n, device)
    else:
        doc_ids = _integers("doc_ids", doc_ids, n, device)
        doc_ids, column_n, counts = doc_ids.unique(return_inverse=True, return_counts=True)
        first_row = torch.full_like(doc_ids, n).scatter_reduce(
            0, column_n, torch.arange(n, device=device), reduce="amin"
        )
        documents, positive = {name: value[first_row] for name, value in documents.items()}, column_n[positive]
        negatives = None if negatives is None else torch.where(negatives < 0, negatives, column_n[negatives])
    return Batch(
        step=0,
        row_ids=torch.arange(m),
        query=queries,
        doc=documents,
        positive=positive,
        relevance=relevance.float(),
        query_ids=query_ids,
        doc_ids=doc_ids,
        doc_rows=torch.full_like(doc_ids, -1),
        counts=counts,
        query_lengths=_lengths("query", queries, tokens),
        doc_lengths=_lengths("doc", documents, tokens),
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
    every rank. Raises ConfigError: FSDP, accumulated steps, a model with state. Source: Gao et al. 2021.
    """
    budget = TokenBudget(chunk_tokens, chunk_tokens if retained_tokens is None else retained_tokens)
    for name, tokens in (("chunk_tokens", budget.chunk_tokens), ("retained_tokens", budget.retained_tokens)):
        if not isinstance(tokens, Integral) or tokens < 0:
            raise ConfigError(f"{name}: got {tokens!r}, needs an integer of at least 0 (chunk_tokens=0: no chunks)")
    if isinstance(loss, type) or (not callable(loss) and not isinstance(loss, LossConfig)):
        raise ConfigError(f"loss: got {loss!r}, needs a loss such as bigdssm.losses.FPS(), or a function")
    function = loss_function(loss, batch) if isinstance(loss, LossConfig) else loss
    _check_trainer()
    plan = plan_step(batch, budget)
    step_engine = _step_engine(engine, encode_side, alpha, in_chunks=not plan.whole)
    encoded, towers_backward = encode(step_engine, batch, plan)
    if not torch.is_grad_enabled():
        return function(encoded, batch)

    def add_gradients(leaves: Encoded) -> None:
        with _added_to_earlier(step_engine, plan.whole):
            towers_backward(leaves)

    output = back_propagate(encoded, add_gradients, lambda leaves: function(leaves, batch))
    return LossOutput(output.loss.detach(), output.stats)


def loss_function(loss: LossConfig, batch: Batch) -> LossFunction:
    """Return a registered loss over the batch's documents, and its candidates if there are any."""
    hard = 0 if batch.negatives is None else batch.negatives.shape[1]
    negatives = NegativesConfig(mask="batch", hard=hard)
    stage = StageConfig(loss=loss, negatives=negatives, sampling=NoCorrection())
    return Objective(stage, ModelConfig(score="cosine", beta="none"), None, 0.0)


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
        """A context that accumulates the gradients of several backward passes and averages them once, at exit."""
        self._accumulates = True
        try:
            yield
        finally:
            self._accumulates = False
        self._average()

    def _average(self) -> None:
        ranks, parameters = distributed.world_size(), list(self.module.parameters())
        if ranks == 1:
            return
        kinds = [0 if p.grad is None else 2 if p.grad.is_sparse else 1 for p in parameters]
        used_kinds = distributed.all_reduce(torch.tensor(kinds, device=parameters[0].device), "max").tolist()
        if 2 in used_kinds:
            raise ConfigError("engine: got sparse gradients on several ranks, needs embeddings with sparse=False")
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for parameter, used_kind in zip(parameters, used_kinds, strict=True):
            if used_kind:
                if parameter.grad is None:  # not used by this rank's rows
                    parameter.grad = torch.zeros_like(parameter)
                by_type.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_type.values():
            mean = distributed.all_reduce(torch.cat([gradient.flatten() for gradient in gradients])) / ranks
            for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))


@contextmanager
def _added_to_earlier(step_engine: StepEngine, one_forward: bool) -> Iterator[None]:
    """A context of a step's backward passes in which ZeRO 1 and 2 add the gradients of all parameters to earlier ones.

    By itself DeepSpeed replaces the gradients of an earlier step, and reduces those of the parameters that a rank uses
    as if all ranks used the same.
    """
    optimizer = getattr(getattr(step_engine, "deepspeed", None), "optimizer", None)
    zero_1_and_2 = sys.modules.get("deepspeed.runtime.zero.stage_1_and_2")
    if zero_1_and_2 is None or not isinstance(optimizer, zero_1_and_2.DeepSpeedZeroOptimizer):
        yield
        return
    if optimizer.cpu_offload and optimizer.micro_step_id >= 0:
        raise ConfigError(
            "offload_optimizer: got a second cached_step before engine.step() at ZeRO 1 or 2, which would drop the "
            "gradients of the first; needs ZeRO 0 or 3, no offload, or one batch of all rows, in chunks"
        )
    earlier, optimizer.averaged_gradients = optimizer.averaged_gradients, {}
    for parameter in chain(*optimizer.bit16_groups):
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    with step_engine.single_reduction() if one_forward else nullcontext():
        yield
    for group, gradients in earlier.items():
        if gradients is not None:
            torch._foreach_add_(optimizer.averaged_gradients[group], gradients)


def _check_trainer() -> None:
    """Raise ConfigError if accelerate, and so a trainer, lacks ranks of the launcher, or DeepSpeed."""
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is None or not accelerate.is_initialized():
        return
    state, ranks = accelerate.AcceleratorState(), max(distributed.world_size(), int(os.environ.get("WORLD_SIZE", "1")))
    if state.num_processes != ranks:
        raise ConfigError(
            f"accelerate: got {state.num_processes} ranks of {ranks}, needs all, since each rank would read the same "
            "rows; on CPUs, see docs/cached_step.md"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and state.distributed_type != "DEEPSPEED":
        raise ConfigError(
            f"accelerate: got a DeepSpeed config and {state.distributed_type}, needs an engine of DeepSpeed; on CPUs, "
            "use neither ACCELERATE_USE_CPU nor use_cpu (docs/cached_step.md)"
        )


def _step_engine(engine: Any, encode_side: EncodeSide | None, alpha: float, in_chunks: bool) -> StepEngine:
    if isinstance(engine, nn.parallel.DistributedDataParallel):
        engine = engine.module  # the wrapper's reduction expects one backward per forward
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp and any(isinstance(part, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)) for part in engine.modules()):
        raise ConfigError("engine: got FSDP, needs DeepSpeed (ZeRO stage 3 shards weights), DDP or a plain module")
    weight = next(engine.parameters(), None)
    if weight is None:
        raise ConfigError(f"engine: got {type(engine).__name__} without parameters, needs a model to train")
    scale = torch.full((1,), alpha, device=weight.device)

    def call(query: Inputs | None = None, doc: Inputs | None = None) -> Encoded:
        sides = {side: inputs for side, inputs in (("query", query), ("doc", doc)) if inputs is not None}
        if encode_side is None:
            encoded = engine(**sides)
            if not isinstance(encoded, Encoded):
                raise ConfigError(
                    f"engine: got {type(encoded).__name__} of its forward, needs bigdssm.models.Encoded, as TwoTowers "
                    "returns; another model is called by `encode_side`"
                )
            return encoded
        vectors = {
            side: check_vectors("encode_side", encode_side(engine, side, inputs), len(next(iter(inputs.values()))))
            for side, inputs in sides.items()
        }
        return Encoded(vectors.get("query"), vectors.get("doc"), None, scale)

    is_deepspeed = "deepspeed" in sys.modules and isinstance(engine, sys.modules["deepspeed"].DeepSpeedEngine)
    model = engine.module if is_deepspeed else engine
    encode_sides = _with_compared_buffers(model, call) if in_chunks else call
    if is_deepspeed:
        from bigdssm.training.engine import DeepSpeedStepEngine  # with DeepSpeed only

        step_engine = DeepSpeedStepEngine(engine, encode_sides)
        _check_gradients(step_engine.module, step_engine.zero_stage)
        return step_engine
    return ModuleStepEngine(engine, encode_sides)


def _with_compared_buffers(model: nn.Module, call: Callable[..., Encoded]) -> Callable[..., Encoded]:
    """Return `call`, whose first forward of each side in a mode of the model must not change a buffer."""
    mode = tuple(module.training for module in model.modules())
    compared = _COMPARED.setdefault(model, set())

    def compared_call(**inputs: Inputs | None) -> Encoded:
        forward = (mode, *(side for side, values in inputs.items() if values is not None))
        if forward in compared:
            return call(**inputs)
        with _unchanged_buffers(model):
            encoded = call(**inputs)
        compared.add(forward)
        return encoded

    return compared_call


@contextmanager
def _unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Raise ConfigError if a forward in this context changes a buffer; the buffers then have their earlier values."""
    retained = [
        (owner, name, buffer, buffer.clone())
        for owner in model.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and buffer.layout == torch.strided
    ]
    yield
    changed = [one for one in retained if not _is_equal(one[0]._buffers.get(one[1]), one[3])]
    if not changed:
        return
    with torch.no_grad():
        for owner, name, buffer, earlier in changed:
            owner._buffers[name] = buffer.copy_(earlier)
    owner, name, *_ = changed[0]
    module = next(path for path, one in model.named_modules() if one is owner)
    raise ConfigError(
        f"{module}.{name}: got a buffer that a forward of {type(owner).__name__} changes, which chunks do several "
        "times; needs a forward without state, or a step without chunks (chunk_tokens 0)"
    )


def _is_equal(now: Tensor | None, earlier: Tensor) -> bool:
    """Return whether a buffer has its earlier values; NaN equals NaN."""
    if now is None or now.shape != earlier.shape or now.dtype != earlier.dtype or now.device != earlier.device:
        return False
    return bool(((now == earlier) | ((now != now) & (earlier != earlier))).all())


def _check_gradients(model: nn.Module, zero_stage: int) -> None:
    """Raise ConfigError for gradients DeepSpeed cannot reduce: sparse at ZeRO 3 or in float64, float64 at ZeRO 0."""
    for name, module in model.named_modules():
        is_sparse = isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
        if not is_sparse or not module.weight.requires_grad:
            continue
        if zero_stage == 3 or module.weight.dtype == torch.float64:
            raise ConfigError(
                f"{name}: got {type(module).__name__} with sparse=True and {module.weight.dtype} at ZeRO {zero_stage}, "
                "where DeepSpeed reduces dense gradients only; needs sparse=False"
            )
    for name, parameter in model.named_parameters():
        if zero_stage == 0 and parameter.dtype == torch.float64 and parameter.requires_grad:
            raise ConfigError(
                f"{name}: got float64 at ZeRO 0, where DeepSpeed reduces 16- and 32-bit gradients only; needs float32 "
                "weights, or ZeRO 1 to 3"
            )


def _inputs(side: str, inputs: Any) -> dict[str, Tensor]:
    if not isinstance(inputs, Mapping):
        raise ConfigError(f"{side}: got {type(inputs).__name__}, needs inputs of an encoder by name, {{name: tensor}}")
    tensors = {name: _tensor(f"{side}.{name}", value) for name, value in inputs.items()}
    rows = {name: len(tensor) for name, tensor in tensors.items()}
    if not rows or len(set(rows.values())) > 1:
        raise ConfigError(f"{side}: got rows {rows}, needs at least one input, and equally many rows in all")
    return tensors


def _tensor(name: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
        len(tensor)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{name}: got {type(value).__name__} ({error}), needs a tensor, or numbers of one shape for each row"
        ) from None
    return tensor


def _integers(name: str, value: Any, rows: int, device: torch.device, of: str = "[m]") -> Tensor:
    numbers = _tensor(name, value).to(device)
    if not numbers.numel():  # an empty list has another type
        numbers = numbers.long()
    if numbers.dtype != torch.int64 or len(numbers) != rows or numbers.ndim != len(of.split(",")):
        needed = of.replace("m", str(rows))
        raise ConfigError(f"{name}: got {numbers.dtype} {list(numbers.shape)}, needs torch.int64 {needed}")
    return numbers


def _distinct_ids(rows: int, device: torch.device) -> Tensor:
    return (distributed.rank() << 40) + torch.arange(rows, device=device)


def _lengths(side: str, inputs: Mapping[str, Tensor], tokens: Mapping[str, Sequence[str]]) -> Lengths:
    lengths = {}
    if not isinstance(tokens, Mapping) or any(isinstance(group, str) or not group for group in tokens.values()):
        raise ConfigError(
            f"tokens: got {tokens!r:.200}, needs the names of inputs by that of their mask, such as "
            '{"attention_mask": ("input_ids",)}'
        )
    for name, group in tokens.items():
        present = tuple(other for other in group if other in inputs)
        if name not in inputs:
            if group[0] in present:
                raise ConfigError(f"{side}: got {group[0]} without {name}, needs both: padding is not inferred")
            continue
        mask = inputs[name]
        for other in present:
            if mask.ndim != 2 or inputs[other].shape[:2] != mask.shape or (mask < 0).any():
                raise ConfigError(
                    f"{side}: got {other} {list(inputs[other].shape)} with {name} {list(mask.shape)}, needs a mask "
                    "[R, T] of 0 and 1 and tokens [R, T, …]; `tokens` of pair_batch names the tokens of each mask"
                )
        if present:
            lengths[name] = lengths_of_mask(mask.bool().cpu().numpy(), 0, present)
    return lengths
