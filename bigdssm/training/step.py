"""One training step: forward of both towers, one loss over the global batch, backward, and the ranks' agreement.

A whole batch is one forward, which retains its graph. In chunks (gradient cache, Gao et al. 2021), the last ones,
within the budget, retain their graphs. The others are encoded without a graph, and in backward again with one and with
the same random state, so that dropout masks are equal.

Shapes: m queries, n documents, D vector width.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from bigdssm import distributed
from bigdssm.errors import ConfigError
from bigdssm.loader.batch import Batch, Features
from bigdssm.loader.step_plan import (
    Chunk,
    ChunkCounts,
    Chunked,
    SidePlan,
    StepPlan,
    at_least_one,
)
from bigdssm.loader.stream import RowCounts
from bigdssm.losses import LossOutput
from bigdssm.models import DualEncoder, Encoded, Values
from bigdssm.utils import timing
from bigdssm.utils.device import RandomState, to_device

if TYPE_CHECKING:  # `cached_step` does not import DeepSpeed
    from bigdssm.training.engine import Engine

TowersBackward = Callable[[Encoded], None]  # back-propagates leaf tensors, whose gradients the loss has set
LossFunction = Callable[[Encoded, Batch], LossOutput]
OutputGradients = list[tuple[Tensor, Tensor]]  # pairs (output of the towers, gradient)


class RankReport(NamedTuple):
    """The numbers that a rank sends to all ranks in a step."""

    stop: float = 0.0  # 1 if a stop was requested
    save: float = 0.0  # 1 if a checkpoint is due
    queries: float = 0.0  # number of queries in the batch
    rows: RowCounts = RowCounts(0.0, 0.0, 0.0)
    chunks: ChunkCounts = ChunkCounts()  # of the next batch's plan

    def numbers(self) -> list[float]:
        """Return the numbers of all fields, in their order."""
        return [self.stop, self.save, self.queries, *self.rows, *self.chunks]

    @classmethod
    def of_numbers(cls, numbers: Iterable[float]) -> "RankReport":
        """Return the report with these numbers."""
        stop, save, queries, *others = numbers
        rows, chunks = others[: len(RowCounts._fields)], others[len(RowCounts._fields) :]
        return cls(stop, save, queries, RowCounts(*rows), ChunkCounts(*map(int, chunks)))


def exchange_reports(
    loss: Tensor, alpha: Tensor, report: RankReport
) -> Callable[[], tuple[float, float, tuple[RankReport, ...]]]:
    """Start an all-gather of loss, alpha and report. All ranks must call it.

    The returned function waits for it and returns the mean loss, alpha, and the reports by rank, equal on every rank.
    """
    on_device = torch.stack([loss.detach().double().view(()), alpha.detach().double().view(())])
    row = torch.cat([on_device, to_device(torch.tensor(report.numbers(), dtype=torch.float64), loss.device)])
    gathered = distributed.all_gather_padded(row[None], 1)

    def read() -> tuple[float, float, tuple[RankReport, ...]]:
        table = gathered.tolist()
        reports = tuple(RankReport.of_numbers(numbers) for _, _, *numbers in table)
        return sum(loss for loss, *_ in table) / len(table), table[0][1], reports

    return read


@dataclass(frozen=True)
class StepResult:
    """The result of a step."""

    loss: float  # mean over ranks
    alpha: float
    reports: tuple[RankReport, ...]  # by rank
    applied: bool  # False if loss or gradients were not finite
    gradient_norm: float | Tensor  # a tensor if it has not been read from the device
    stats: dict[str, Tensor]
    plan: StepPlan  # as executed

    @property
    def stop(self) -> bool:
        """Whether a stop was requested on any rank."""
        return any(report.stop for report in self.reports)


def train_step(
    engine: "Engine",
    batch: Batch,
    plan: StepPlan,
    loss_function: LossFunction,
    lr_factor: float,
    make_report: Callable[[], RankReport] = RankReport,
) -> StepResult:
    """Run one step on this rank's share of the global batch. All ranks must call it.

    make_report: called after the backward pass, while gradients are being reduced.
    """
    if batch.table_rows is not None:
        with timing.span("tables"):
            engine.fetch(batch.table_rows)
    with timing.span("encode"):
        encoded, towers_backward = encode(engine, batch, plan)
    output = back_propagate(encoded, towers_backward, lambda leaves: loss_function(leaves, batch))
    with timing.span("optimizer"):
        read_reports = exchange_reports(output.loss, encoded.alpha, make_report())
        applied = engine.step(lr_factor)
    norm = engine.gradient_norm() if applied else float("nan")
    return StepResult(*read_reports(), applied, norm, output.stats, plan)


class StepEngine(Protocol):
    """A model with two towers, and the reduction of its gradients over the ranks."""

    @property
    def module(self) -> nn.Module:
        """The model."""

    def forward(self, query: Any = None, doc: Any = None, **extra_inputs: Any) -> Encoded:
        """Encode queries, documents, or both, on this rank; see `DualEncoder.forward`."""

    def backward(self, outputs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Back-propagate (output, gradient) pairs."""

    def single_reduction(self) -> AbstractContextManager[None]:
        """A context that accumulates the gradients of several backward passes and reduces them once, at exit."""


def back_propagate(
    encoded: Encoded, towers_backward: TowersBackward, loss_function: Callable[[Encoded], LossOutput]
) -> LossOutput:
    """Compute the loss of encoded vectors and accumulate the gradients of the towers' weights. All ranks must call it.

    If this rank's loss is not finite, its gradients are NaN: after the reduction, all ranks can skip the step.
    """
    with timing.span("loss"):
        leaves = Encoded(*(None if t is None else t.detach().requires_grad_() for t in encoded))  # type: ignore[arg-type]
        output = loss_function(leaves)
        output.loss.backward()
        zero_or_nan = output.loss.detach() * 0
        for leaf in leaves:
            if leaf is not None and leaf.grad is not None:
                leaf.grad.add_(zero_or_nan)
    with timing.span("backward"):
        towers_backward(leaves)
    return output


def encode(engine: StepEngine, batch: Batch, plan: StepPlan) -> tuple[Encoded, TowersBackward]:
    """Encode a batch; return the embeddings U [m, D], W [n, D] and the towers' backward pass.

    The towers run in chunks, or in one forward pass with one backward pass.
    """
    if not plan.whole:
        return _encode_in_chunks(engine, batch, encoded_chunks(batch, plan))
    inputs: dict[str, Any] = {}
    if batch.query_positions is not None:
        inputs["query_positions"] = batch.query_positions
    query = whole_features(batch.query, plan.query)
    doc = None if batch.doc_vectors is not None else whole_features(batch.doc, plan.doc)
    padded = engine.forward(query, doc, **inputs)
    num_queries, num_docs = len(batch.query_ids), len(batch.doc_ids)
    W, beta = (padded.W, padded.beta) if batch.doc_vectors is None else _fixed_columns(engine, batch, padded.alpha)
    assert padded.U is not None and W is not None
    # without the row of padding that stands for an empty side
    beta = None if beta is None else beta[:num_docs]
    encoded = Encoded(padded.U[:num_queries], W[:num_docs], beta, padded.alpha)

    def backward_whole(leaves: Encoded) -> None:
        pairs = [
            (output, _gradient(leaf))
            for output, leaf in zip(encoded, leaves, strict=True)
            if output is not None and output.requires_grad and leaf is not None
        ]
        engine.backward(pairs)

    return encoded, backward_whole


def _fixed_columns(engine: StepEngine, batch: Batch, alpha: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return W [n, D] and beta [n], if the model has one, of fixed document vectors [alpha * w, beta]."""
    assert batch.doc_vectors is not None
    model = cast(DualEncoder, engine.module)
    beta = batch.doc_vectors[:, -1] if model.has_beta else None
    return batch.doc_vectors[:, : model.config.dim] / alpha.detach(), beta


def whole_features(features: Features, side: SidePlan) -> Mapping[str, Values]:
    """Return the features of one side for one forward, packed if the plan is."""
    return Chunked(features, side).features(side.chunks[0]) if side.packed else {**at_least_one(features)}


@dataclass
class EncodedChunk:
    """A chunk of one side. Between its forward and backward it has its graph, or the random state to recompute it."""

    name: str  # of the side
    side: Chunked
    chunk: Chunk
    retain_graph: bool
    encoded: Encoded | None = None
    state: RandomState | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """The inputs of the model's forward."""
        query_positions = self.side.query_positions(self.chunk)
        return {
            self.name: self.side.features(self.chunk),
            **({} if query_positions is None else {"query_positions": query_positions}),
        }

    def encode(self, engine: StepEngine) -> Encoded:
        """Return the outputs of the chunk, detached."""
        if not self.retain_graph:
            self.state = RandomState.now()
        with torch.set_grad_enabled(self.retain_graph and torch.is_grad_enabled()):
            encoded = engine.forward(**self.inputs)
        if self.retain_graph:
            self.encoded = encoded
        return Encoded(*(None if t is None else t.detach() for t in encoded))  # type: ignore[arg-type]

    def gradients(self, encoded: Encoded, leaves: Encoded) -> OutputGradients:
        """Return the vectors and biases with their gradients."""
        index = self.side.outputs(self.chunk)
        outputs = ((encoded.U, leaves.U), (encoded.W, leaves.W), (encoded.beta, leaves.beta))
        return [
            (output[: len(index)], _gradient(leaf)[index])
            for output, leaf in outputs
            if output is not None and leaf is not None
        ]


def encoded_chunks(batch: Batch, plan: StepPlan) -> list[EncodedChunk]:
    """Return the chunks of a plan that is not whole: of queries, and of documents unless they are fixed."""
    sides = [("query", Chunked(batch.query, plan.query, batch.query_positions))]
    if batch.doc_vectors is None:
        sides.append(("doc", Chunked(batch.doc, plan.doc)))
    chunks = [(name, side, chunk) for name, side in sides for chunk in side.plan.chunks]
    # the last chunks of the plan retain their graphs, those of fixed documents included, which are not encoded
    num_fixed = 0 if batch.doc_vectors is None else len(plan.doc.chunks)
    first_retained = len(chunks) + num_fixed - plan.num_retained
    return [EncodedChunk(name, side, chunk, i >= first_retained) for i, (name, side, chunk) in enumerate(chunks)]


def _encode_in_chunks(engine: StepEngine, batch: Batch, chunks: list[EncodedChunk]) -> tuple[Encoded, TowersBackward]:
    """Encode chunk by chunk; see `_backward_in_chunks`."""
    _refuse_batch_statistics(engine.module)
    outputs = [chunk.encode(engine) for chunk in chunks]
    alpha = outputs[-1].alpha
    by_side: dict[str, list[Encoded]] = {"query": [], "doc": []}
    for chunk, output in zip(chunks, outputs, strict=True):
        by_side[chunk.name].append(output)
    U = _assembled(chunks[0].side, by_side["query"], "U")
    if batch.doc_vectors is None:
        documents = chunks[-1].side
        W = _assembled(documents, by_side["doc"], "W")
        beta = _assembled(documents, by_side["doc"], "beta")
    else:
        W, beta = _fixed_columns(engine, batch, alpha)
    return Encoded(U, W, beta, alpha), partial(_backward_in_chunks, engine, chunks)


def _refuse_batch_statistics(model: nn.Module) -> None:
    """Raise ConfigError for a module whose output, state or gradient depends on the rows of a forward."""
    for name, module in model.named_modules():
        batch_norm, instance_norm = isinstance(module, _BatchNorm), isinstance(module, _InstanceNorm)
        updated = batch_norm or isinstance(module, _SpectralNorm) or (instance_norm and module.track_running_stats)
        updated |= any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
        if (module.training and updated) or (batch_norm and module.running_mean is None):
            raise ConfigError(
                f"{name}: got {type(module).__name__} in training mode, whose output or state depends on the rows of a "
                "chunk; needs .eval(), a norm per row such as LayerNorm, or a step without chunks (chunk_tokens 0)"
            )
        is_embedding = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        if is_embedding and module.scale_grad_by_freq and module.weight.requires_grad:
            raise ConfigError(
                f"{name}: got {type(module).__name__} with scale_grad_by_freq=True, which divides gradients by the "
                "counts of ids in a chunk; needs scale_grad_by_freq=False, or a step without chunks (chunk_tokens 0)"
            )


def _backward_in_chunks(engine: StepEngine, chunks: Sequence[EncodedChunk], leaves: Encoded) -> None:
    """Back-propagate all retained graphs together, then encode the other chunks again, one by one.

    Autograd adds to the weights' gradients, which are reduced over ranks once.
    """
    retained = [chunk for chunk in chunks if chunk.retain_graph]
    groups = ([retained] if retained else []) + [[chunk] for chunk in chunks if not chunk.retain_graph]
    with engine.single_reduction():
        for group in groups:
            pairs: OutputGradients = []
            for chunk in group:
                if chunk.state is None:
                    assert chunk.encoded is not None
                    encoded, chunk.encoded = chunk.encoded, None
                else:
                    with timing.span("encode again"), chunk.state.replayed():
                        encoded = engine.forward(**chunk.inputs)
                pairs.extend(chunk.gradients(encoded, leaves))
                if chunk is groups[0][-1]:  # once: alpha is the same in every chunk
                    pairs.append((encoded.alpha, _gradient(leaves.alpha)))
            engine.backward(pairs)


def _assembled(side: Chunked, outputs: Sequence[Encoded], part: str) -> Tensor | None:
    """Return a part of the outputs of a side in the order of the batch, None if the model has no such output."""
    parts = [getattr(output, part) for output in outputs]
    return None if parts[0] is None else side.assemble(parts)


def _gradient(leaf: Tensor) -> Tensor:
    return leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
