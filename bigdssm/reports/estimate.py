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
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from bigdssm.artifacts.checkpoint import checkpoint_bytes
from bigdssm.batching.batch import Batch
from bigdssm.batching.chunks import Chunked
from bigdssm.batching.plan import Budget, plan_side, plan_step
from bigdssm.config import Config, EngineConfig, StageConfig, StageName
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.tensors import Features
from bigdssm.losses.passes import loss_bytes, loss_sent_bytes, vector_bytes
from bigdssm.models import CrossEncoder, DualEncoder, Encoded, use_plain_attention
from bigdssm.models.encoders import text_architectures
from bigdssm.precision import settle_precision
from bigdssm.reports.live_memory import LiveBytes
from bigdssm.retrieval.embed import CHUNK_TOKENS_CPU
from bigdssm.retrieval.mined import UniformNegatives
from bigdssm.running.records import METRICS_FILE, read_stage
from bigdssm.training.batches import Batches, row_stream
from bigdssm.training.encoding import Piece, pair_pieces, pieces_of, whole_features
from bigdssm.training.objective import listed_columns, num_negatives
from bigdssm.training.zero import ModelSizes, held_bytes, sent_bytes, step_bytes

FP32 = 4
# What glibc's heap keeps in holes between what is in use, over that, as measured: tensors of many sizes come and go.
# MALLOC_MMAP_THRESHOLD_=131072 does away with them (there 584 MB became 477), for page faults at every tensor.
HEAP_HOLES = 0.35
RUNTIME_BYTES = 100_000_000  # libraries' own when they are first used: what the smallest run takes


@dataclass(frozen=True)
class Estimate:
    """One rank's memory in bytes, and what a step and a run take; see `lines`."""

    held: dict[str, int]  # all the time, by what it is for
    phases: dict[str, int]  # on top of it at the most, one after another
    num_weights: int
    table_weights: int  # of them, in embedding tables
    negatives: int  # documents that a query is compared with, its own left out
    # Bytes that a rank sends in a step, by what for, as if collectives went round a ring: there an all-gather or a
    # reduce-scatter of S bytes sends S (N - 1) / N, an all-reduce twice that.
    sent: dict[str, int]
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
    engine = settle_precision(engine, "cuda" if torch.cuda.is_available() else "cpu")
    stream = row_stream(config, stage, dataset, rank=0, world_size=world_size)
    share = replace(stage.loss, uniform_negatives=-(-stage.loss.uniform_negatives // world_size))
    mined = UniformNegatives(dataset.catalogue.num_docs) if stage.loss.negatives else None  # before they are mined
    batch = next(iter(Batches(stream, share, mined, config.run.seed, torch.device("cpu"))))
    texts = text_architectures(config.model, dataset.schema, dataset.pad_token_id, dataset.vocab_size)
    mode = FakeTensorMode()
    with mode:
        model = DualEncoder(config.model, dataset.schema, texts, stage.loss.scorer)
        if engine.precision == "bf16_pure":
            _to_bfloat16(model)
    model.train()
    if engine.precision != "fp32" and not torch.cuda.is_available():
        use_plain_attention(model)  # as the engine does
    if engine.checkpoint_activations:
        model.checkpoint_activations()
    sizes = ModelSizes.of(model, stage.optimizer)
    held, in_step = held_bytes(engine, sizes, world_size), step_bytes(engine, sizes, world_size)
    # and what is put aside while it is in place
    averaged = {"moving average of the weights": 2 * FP32 * sizes.weights} if stage.weight_average else {}
    saved = sizes.weights + sizes.states + (sizes.weights if stage.weight_average else 0)
    kept, towers = _towers(model, mode, batch, engine)
    rows, width = (len(batch.query_ids), len(batch.doc_ids)), config.model.dim
    tile, both, known = config.engine.loss_tile, stage.loss.direction != "q2d", batch.known
    vectors = vector_bytes(*rows, width)
    loss, sent = 0, sent_bytes(engine, sizes)
    if stage.loss.scorer is None:  # which compares a few documents for each query
        loss = loss_bytes(
            *rows, width, world_size, both=both, tile=tile, num_known=0 if known is None else len(known),
            gathers_known=stage.loss.mask in ("batch", "user"),
        )  # fmt: skip
        sent = loss_sent_bytes(rows[1], width, world_size, both=both) | sent
    steps = stage.steps or int(np.ceil(stage.epochs * stream.steps_per_epoch))
    behind = engine.async_checkpoints and (stage.save_every_minutes > 0 or 0 < stage.save_every_steps < steps)
    copied = {"copy that a checkpoint is written from": -(-checkpoint_bytes(saved) // world_size)} if behind else {}
    return Estimate(
        held={
            **held,
            **averaged,
            **copied,
            "batch": 2 * batch.nbytes,  # and the next one
            "libraries at first use": RUNTIME_BYTES,
        },
        phases={
            "loss, beside graphs that are kept": kept + vectors + loss,
            "towers' activations and gradients": towers + vectors,
            "optimizer's step": in_step,
            "validation, mining": _encoding(model, mode, batch) + _documents(stage, width, dataset, world_size),
        },
        num_weights=sizes.weights,
        table_weights=sum(parameter.numel() for parameter in model.tables.parameters()),
        negatives=num_negatives(stage, batch, world_size, dataset.catalogue.num_docs),
        sent={name: int(size * (world_size - 1) / world_size) for name, size in sent.items()},
        checkpoint_bytes=checkpoint_bytes(saved),
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


def _towers(model: DualEncoder, mode: FakeTensorMode, batch: Batch, engine: EngineConfig) -> tuple[int, int]:
    """Return the bytes of the graphs that wait for the loss, and the most that encoding and backward take.

    Gradients of the weights are in it, and the heap's holes.
    """
    plan = plan_step(batch, Budget.of(engine, model.packs(training=True)))
    pieces = [] if plan.whole else pieces_of(batch, plan)
    places = {} if batch.places is None else {"places": batch.places}
    listed = {} if model.scorer is None else {"listed": listed_columns(batch)}
    query, doc = whole_features(batch.query, plan.query), whole_features(batch.doc, plan.doc)
    whole: dict[str, Any] = {"query": query, "doc": doc, **places}
    fixed: list[dict[str, Any]] = []  # of towers that stay as they are
    if isinstance(model.scorer, CrossEncoder):
        fixed = [piece.inputs for piece in pieces] or [whole]
        pieces = [*pair_pieces(model.scorer, batch, listed["listed"], Budget.of(engine))]
    kept_inputs = [piece.inputs for piece in pieces if piece.keep] if pieces else [{**whole, **listed}]
    again = [piece.inputs for side in ("query", "doc", "pairs") if (piece := _largest(pieces, side)) is not None]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=engine.precision == "bf16")

    def encode(**given: Any) -> Encoded:
        with autocast:
            encoded: Encoded = model(**tree_map_only(Tensor, mode.from_tensor, given))
        return encoded

    with mode, LiveBytes() as live:
        kept = [encode(**inputs) for inputs in kept_inputs]
        waiting = live.now
        with torch.no_grad():
            for inputs in (*fixed, *again):
                encode(**inputs)
        if kept:
            _backward(kept)
            kept.clear()
        for inputs in again:
            _backward([encode(**inputs)])
        return waiting, live.peak + int(HEAP_HOLES * live.in_heap)


def _encoding(model: DualEncoder, mode: FakeTensorMode, batch: Batch) -> int:
    """Return the bytes of encoding a catalogue's documents without a graph."""
    plan = plan_side(batch.doc_lengths, len(batch.doc_ids), CHUNK_TOKENS_CPU)
    chunk, side = plan.chunks[0], Chunked(batch.doc, plan)
    features = cast(Features, side.features(chunk))  # the plan packs nothing
    inputs = {name: mode.from_tensor(values) for name, values in features.items()}
    with mode, torch.no_grad(), LiveBytes() as live:
        model(doc=inputs)
    return live.peak * max(1, CHUNK_TOKENS_CPU // max(1, chunk.tokens))


def _documents(stage: StageConfig, width: int, dataset: Dataset, world_size: int) -> int:
    """Return the bytes of the index vectors of a rank's share of the documents; an approximate index has them again."""
    num_docs = dataset.catalogue.num_docs
    mines = stage.loss.negatives > 0 and stage.mining.file is None and not stage.mining.uniform
    copies = 2 if mines and num_docs > stage.mining.exact_up_to else 1
    return copies * FP32 * -(-num_docs // world_size) * (width + 1)


def _backward(encoded: Sequence[Encoded]) -> None:
    """Push gradients of ones through the towers, as `Engine.backward` does with those of the loss."""
    torch.stack(
        [t.float().sum() for part in encoded for t in part if t is not None and t.requires_grad]
    ).sum().backward()


def _largest(pieces: Sequence[Piece], side: str) -> Piece | None:
    """Return the piece of a side with the most cells among those that are encoded twice; None where there is none."""
    own = [piece for piece in pieces if piece.name == side and not piece.keep]
    return max(own, key=lambda piece: piece.chunk.tokens, default=None)


def _to_bfloat16(model: nn.Module) -> None:
    """What `model.bfloat16()` does, which cannot on tensors without memory."""
    for owner in model.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.detach().bfloat16(), parameter.requires_grad)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.2f} GB"
