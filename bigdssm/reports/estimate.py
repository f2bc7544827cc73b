"""What a stage will take, before it runs: memory of a rank, communication of a step, checkpoints, days.

Activations are not guessed by formula: the model's own forward and backward run on the first batch's chunks, with
tensors that have no memory (see live_memory.py). What DeepSpeed and AdamW hold is counted by the rules in `_states`.
Left out is what a process takes without training anything: the interpreter, the libraries, loader processes; and, in
bfloat16 on a CPU, the compiled kernels that oneDNN keeps, one a shape, up to 1,024 of some 0.3 MB
(ONEDNN_PRIMITIVE_CACHE_CAPACITY bounds them).

Shapes: m queries and n documents of this rank, D vector width. P: number of weights, N: ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bigdssm.batching import chunks
from bigdssm.batching.batch import Batch
from bigdssm.config import Config, EngineConfig, StageConfig, StageName
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.tensors import Features
from bigdssm.loss_options import LOSSES
from bigdssm.losses.passes import score_bytes
from bigdssm.models import DualEncoder, Encoded, use_plain_attention
from bigdssm.models.encoders import text_architectures
from bigdssm.reports.live_memory import LiveBytes
from bigdssm.retrieval.embed import CHUNK_TOKENS_CPU
from bigdssm.running.records import METRICS_FILE, read_stage
from bigdssm.training.batches import Batches, row_stream
from bigdssm.training.objective import prepare_model
from bigdssm.training.optimizers import state_size
from bigdssm.training.step import Budget, Piece, pieces_of

FP32, FP64 = 4, 8
# What glibc's heap keeps in holes between what is in use, over that, as measured: tensors of many sizes come and go.
# MALLOC_MMAP_THRESHOLD_=131072 does away with them (there 584 MB became 477), for page faults at every tensor.
HEAP_HOLES = 0.35
RUNTIME_BYTES = 100_000_000  # libraries' own when they are first used: what the smallest run takes
BUCKET = 500_000_000  # elements that DeepSpeed reduces at once


@dataclass(frozen=True)
class Estimate:
    """One rank's memory in bytes, and what a step and a run take; see `lines`."""

    held: dict[str, int]  # all the time, by what it is for
    phases: dict[str, int]  # on top of it at the most, one after another
    num_weights: int
    table_weights: int  # of them, in embedding tables
    negatives: int  # documents that a query is compared with, its own left out
    sent: dict[str, int]  # bytes that a rank sends in a step, by what for
    checkpoint_bytes: int  # of all ranks
    steps: int
    rows_global: int
    world_size: int

    @property
    def peak_bytes(self) -> int:
        """Return the highest memory of a rank above that of a process which has imported everything."""
        return sum(self.held.values()) + max(self.phases.values())

    def days(self, rows_per_s: float) -> float:
        """Return how long all steps take at so many rows a second of all ranks together."""
        return self.steps * self.rows_global / rows_per_s / 86400

    def lines(self, rows_per_s: float | None) -> list[str]:
        """Return what people read."""
        highest = max(self.phases, key=lambda name: self.phases[name])
        lines = [f"{self.num_weights:,} weights, {self.table_weights:,} of them in tables; {self.world_size} ranks"]
        lines += [f"  {name:42s} {_size(size)}" for name, size in self.held.items()]
        lines += [f"  {name + ' (then)':42s} {_size(size)}" for name, size in self.phases.items()]
        lines.append(f"memory of a rank, at its highest ({highest}): {_size(self.peak_bytes)}")
        lines.append(f"{self.rows_global:,} rows a step; a query has {self.negatives:,} negatives")
        lines += [f"  {name:42s} {_size(size)}" for name, size in self.sent.items()]
        lines.append(f"sent by a rank in a step: {_size(sum(self.sent.values()))}")
        lines.append(f"a checkpoint: {_size(self.checkpoint_bytes)}")
        time = "unknown without rows a second (--rows-per-s, or a run that has some)"
        if rows_per_s:
            time = f"{self.days(rows_per_s):.2f} days at {rows_per_s:,.0f} rows a second"
        lines.append(f"{self.steps:,} steps: {time}")
        return lines


def estimate(config: Config, name: StageName, dataset: Dataset, world_size: int) -> Estimate:
    """Return what the stage `name` of `config` takes on `world_size` ranks; of `dataset`, one step's rows are read."""
    stage, engine = config.stage(name), config.engine
    stream = row_stream(config, stage, dataset, rank=0, world_size=world_size)
    share = replace(stage.loss, uniform_negatives=-(-stage.loss.uniform_negatives // world_size))
    mined: Any = _AnyNegatives(dataset, stage.loss.negatives) if stage.loss.negatives else None
    batch = next(iter(Batches(stream, share, mined, config.run.seed, torch.device("cpu"))))
    texts = text_architectures(config.model, dataset.schema, dataset.pad_token_id, dataset.vocab_size)
    mode = FakeTensorMode()
    with mode:
        model = DualEncoder(config.model, dataset.schema, texts)
        prepare_model(model, stage.loss)
        if engine.precision == "bf16_pure":
            _to_bfloat16(model)
    model.train()
    if engine.precision != "fp32" and not torch.cuda.is_available():
        use_plain_attention(model)  # as the engine does
    if engine.checkpoint_activations:
        model.checkpoint_activations()
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    kept_numbers = state_size(model, stage.optimizer)
    held, in_step = _states(engine, num_weights, sum(trained), kept_numbers, max(trained), world_size)
    kept, towers = _towers(model, mode, batch, engine)
    vectors, loss = _loss(config, stage, batch, world_size)
    saving = (12 * num_weights // world_size) + FP32 * max(trained)
    steps = stage.steps or int(np.ceil(stage.epochs * stream.steps_per_epoch))
    return Estimate(
        held={**held, "batch": _batch_bytes(batch), "libraries at first use": RUNTIME_BYTES},
        phases={
            "loss, beside graphs that are kept": kept + vectors + loss,
            "towers' activations and gradients": towers + vectors,
            "optimizer's step": in_step,
            "checkpoint": saving,
            "validation": _validation(config, model, mode, batch, -(-dataset.catalogue.num_docs // world_size)),
        },
        num_weights=num_weights,
        table_weights=sum(parameter.numel() for parameter in model.tables.parameters()),
        negatives=_negatives(stage, batch, world_size),
        sent=_sent(config, stage, batch, num_weights, world_size),
        checkpoint_bytes=FP32 * (num_weights + kept_numbers),
        steps=steps,
        rows_global=stage.rows_global,
        world_size=world_size,
    )


def recorded_rows_per_s(folder: Path) -> float | None:
    """Return the median speed that a stage folder's metrics tell, None where there are none."""
    if not (folder / METRICS_FILE).is_file():
        return None
    speeds = [record["rows_per_s"] for record in read_stage(folder).records if record.get("rows_per_s")]
    return median(speeds) if speeds else None


def _states(
    engine: EngineConfig, num_weights: int, num_trained: int, kept_numbers: int, largest: int, world_size: int
) -> tuple[dict[str, int], int]:
    """Return what weights and optimizer take all the time, and what the optimizer's step takes on top of it.

    ZeRO 1 to 3 keep a float32 copy of the weights that a rank updates, also beside float32 weights; 1 and 2 reduce
    gradients in a bucket as large as they are, and cut their own out of it; AdamW works on whole flat groups.
    """
    weight = 2 if engine.precision == "bf16_pure" else FP32
    stage, share = engine.zero_stage, -(-num_trained // world_size)
    weights = weight * num_weights
    if stage == 0:
        held = {"weights": weights, "optimizer's states": FP32 * kept_numbers}
        bucket = FP32 * min(BUCKET, num_trained) if world_size > 1 else 0
        return held, FP32 * num_trained + max(bucket, 2 * FP32 * largest)
    held = {
        "weights": weights if stage < 3 else -(-weights // world_size),
        "float32 copy of the weights": FP32 * share,
        "optimizer's states": FP32 * -(-kept_numbers // world_size),
    }
    if engine.offload_optimizer:
        held["gradients on the host"] = FP32 * share
    if stage == 3:
        held["weights put together"] = weights
        held["this rank's gradients"] = weight * share
    gradients = FP32 * num_trained if stage < 3 else 0
    return held, gradients + 4 * FP32 * share


def _towers(model: DualEncoder, mode: FakeTensorMode, batch: Batch, engine: EngineConfig) -> tuple[int, int]:
    """Return the bytes of the graphs that wait for the loss, and the most that encoding and backward take.

    Gradients of the weights are in it, and the heap's holes.
    """
    pieces = pieces_of(batch, Budget.of(engine))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=engine.precision == "bf16")

    def encode(**sides: Features) -> Encoded:
        inputs = {side: {name: mode.from_tensor(t) for name, t in given.items()} for side, given in sides.items()}
        with autocast:
            encoded: Encoded = model(**inputs)
        return encoded

    with mode, LiveBytes() as live:
        if pieces is None:
            kept = [encode(query=batch.query, doc=batch.doc)]
            again = []
        else:
            kept = [encode(**{piece.side: piece.chunk.features}) for piece in pieces if piece.keep]
            again = [_largest(pieces, side) for side in ("query", "doc")]
        waiting = live.now
        with torch.no_grad():
            for piece in again:
                if piece is not None:
                    encode(**{piece.side: piece.chunk.features})
        if kept:
            _backward(kept)
            kept.clear()
        for piece in again:
            if piece is not None:
                _backward([encode(**{piece.side: piece.chunk.features})])
        return waiting, live.peak + int(HEAP_HOLES * live.in_heap)


def _validation(config: Config, model: DualEncoder, mode: FakeTensorMode, batch: Batch, documents: int) -> int:
    """Return the bytes of encoding the catalogue's documents without a graph, `documents` of them on this rank."""
    chunk = chunks.cut(batch.doc, len(batch.doc_ids), CHUNK_TOKENS_CPU, batch.doc_pad_ids)[0]
    inputs = {name: mode.from_tensor(values) for name, values in chunk.features.items()}
    with mode, torch.no_grad(), LiveBytes() as live:
        model(doc=inputs)
    return live.peak * max(1, CHUNK_TOKENS_CPU // max(1, chunk.tokens)) + FP32 * documents * config.model.dim


def _backward(encoded: Sequence[Encoded]) -> None:
    """Push gradients of ones through the towers, as `Engine.backward` does with those of the loss."""
    torch.stack(
        [t.float().sum() for part in encoded for t in part if t is not None and t.requires_grad]
    ).sum().backward()


def _largest(pieces: Sequence[Piece], side: str) -> Piece | None:
    """Return the piece of a side with the most cells among those that are encoded twice; None where there is none."""
    own = [piece for piece in pieces if piece.side == side and not piece.keep]
    return max(own, key=lambda piece: piece.chunk.tokens, default=None)


def _loss(config: Config, stage: StageConfig, batch: Batch, world_size: int) -> tuple[int, int]:
    """Return the bytes of this rank's vectors and their gradients, and those that the loss has beside them."""
    m, n, dim = len(batch.query_ids), len(batch.doc_ids), config.model.dim
    columns = n * world_size
    vectors = 2 * FP32 * (m + n) * dim
    gathered = FP32 * (columns if world_size > 1 else 0) * dim
    sums = FP32 * (m + columns) * dim
    scores = score_bytes(m, columns, stage.loss.direction != "q2d", config.engine.loss_tile, FP32)
    ids = FP64 * (4 * columns + 2 * m * world_size) + (0 if batch.known is None else 2 * FP64 * len(batch.known))
    return vectors, gathered + sums + scores + ids + 8 * FP64 * (m + columns)


def _negatives(stage: StageConfig, batch: Batch, world_size: int) -> int:
    """Return how many documents, copies included, a query's own is told apart from."""
    if not LOSSES[stage.loss.name].all_columns:
        return (stage.rows_global - 1 if stage.loss.in_batch else 0) + stage.loss.negatives
    return int(batch.multiplicity.sum()) * world_size - 1


def _sent(config: Config, stage: StageConfig, batch: Batch, num_weights: int, world_size: int) -> dict[str, int]:
    """Return the bytes that a rank sends, by what for, as if collectives went round a ring.

    Round a ring an all-gather or a reduce-scatter of S bytes sends S (N - 1) / N, an all-reduce twice that.
    """
    ring = (world_size - 1) / world_size
    engine, dim, columns = config.engine, config.model.dim, len(batch.doc_ids) * world_size
    weight = 2 if engine.precision == "bf16_pure" else FP32
    sent = {
        "loss: documents' vectors": FP32 * columns * dim,
        "loss: their gradients": FP32 * columns * dim,
        "loss: ids and biases": FP64 * 4 * columns,
        "loss: sums of columns": 0 if stage.loss.direction == "q2d" else 2 * FP64 * columns,
        "weights' gradients": (1 if engine.zero_stage == 3 else 2) * FP32 * num_weights,
    }
    if engine.zero_stage in (1, 2):
        sent["updated weights"] = weight * num_weights
    elif engine.zero_stage == 3:
        sent["weights, for forward and backward"] = 2 * weight * num_weights
    return {name: int(size * ring) for name, size in sent.items()}


class _AnyNegatives:
    """Stands for mined negatives before they are mined: any documents, for any row."""

    def __init__(self, dataset: Dataset, number: int) -> None:
        self._random, self._num_docs, self._number = np.random.RandomState(0), dataset.catalogue.num_docs, number

    def windows(self, row_ids: np.ndarray) -> np.ndarray:
        """Return int32 [m, k]."""
        window: np.ndarray = self._random.randint(0, self._num_docs, (len(row_ids), self._number))
        return window.astype(np.int32)


def _to_bfloat16(model: nn.Module) -> None:
    """What `model.bfloat16()` does, which cannot on tensors without memory."""
    for owner in model.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.detach().bfloat16(), parameter.requires_grad)


def _batch_bytes(batch: Batch) -> int:
    tensors: list[Tensor] = [*batch.query.values(), *batch.doc.values()]
    tensors += [t for t in (batch.known, batch.negatives) if t is not None]
    return sum(t.nbytes for t in tensors) + 5 * FP64 * (len(batch.query_ids) + len(batch.doc_ids))


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.2f} GB"
