"""Estimate a stage before it runs: memory per rank, communication per step, checkpoint size, duration."""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bigdssm.cluster.metrics import METRICS_FILE, read_stage
from bigdssm.config import Config, EngineConfig, StageName
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.negatives import NegativeDocuments
from bigdssm.errors import ConfigError
from bigdssm.loader.batch import Batch, Features
from bigdssm.loader.step_plan import CHUNK_TOKENS_CPU, Chunked, StepPlan, TokenBudget, plan_side, plan_step
from bigdssm.losses.kernels import loss_bytes, loss_sent_bytes
from bigdssm.models import DualEncoder, Encoded, use_eager_attention
from bigdssm.models.embedding_tables import sharded_tables
from bigdssm.models.encoders import text_architectures
from bigdssm.models.precision import resolve_engine_precision
from bigdssm.retrieval.hard_negatives import UniformNegatives
from bigdssm.retrieval.vectors import load_vectors, read_meta
from bigdssm.tables.rows import SHARDS, RowPartition, TableSpec
from bigdssm.training.batches import BatchBuilder, FixedDocuments, read_batches, row_stream
from bigdssm.training.metrics_logger import step_flops
from bigdssm.training.objective import num_negatives
from bigdssm.training.optimizers import parameter_groups
from bigdssm.training.start import segment_steps
from bigdssm.training.step import EncodedChunk, encoded_chunks, whole_features
from bigdssm.training.validation import SPLIT

MASTER_WEIGHTS, OPTIMIZER_STATES = "float32 copy of the weights", "optimizer's states"
GRADIENTS_ON_HOST, TABLE_ROWS = "gradients on the host", "rows of sharded tables, and their states"
BUCKET = 500_000_000  # elements of a reduction bucket of DeepSpeed
MAX_LIVE = 10**9  # weights that ZeRO 3 keeps gathered at a time: `stage3_max_live_parameters`, by default
HEAP_BELOW = 32 << 20  # bytes: glibc maps larger allocations separately, and unmaps them when they are freed
FP32 = 4
# Fragmentation of glibc's heap, relative to the bytes in use, as measured. MALLOC_MMAP_THRESHOLD_=131072 avoids it
# (584 MB became 477 MB), at the cost of page faults for every tensor.
HEAP_HOLES = 0.35
RUNTIME_BYTES = 100_000_000  # allocated by libraries at first use: the memory of the smallest run


def resident_bytes(engine: EngineConfig, weights: int, trained: int, states: int, world_size: int) -> dict[str, int]:
    """Return the bytes of weights and optimizer that are always allocated on a rank, by purpose.

    weights, trained, states: numbers of all weights, of those that are trained, and of optimizer states.
    ZeRO 1 to 3 keep a float32 copy of the weights that a rank updates, even if weights are float32.
    """
    stage, share, weight_bytes = engine.zero_stage, -(-trained // world_size), _weight(engine) * weights
    if stage == 0:
        return {"weights": weight_bytes, OPTIMIZER_STATES: FP32 * states}
    resident = {
        "weights": weight_bytes if stage < 3 else -(-weight_bytes // world_size),
        MASTER_WEIGHTS: FP32 * share,
        OPTIMIZER_STATES: FP32 * -(-states // world_size),
    }
    if engine.offload_optimizer:
        resident[GRADIENTS_ON_HOST] = FP32 * share
    if stage == 3:
        resident["gathered weights"] = _weight(engine) * min(weights, MAX_LIVE)
        resident["this rank's gradients"] = _weight(engine) * share
    return resident


def step_bytes(engine: EngineConfig, trained: int, largest: int, world_size: int) -> int:
    """Return the additional bytes of the optimizer's step on a rank; `largest` is the size of the largest tensor.

    ZeRO 1 and 2 reduce all gradients in one bucket and copy the rank's share; AdamW works on whole flat groups.
    """
    if engine.zero_stage == 0:
        bucket = FP32 * min(BUCKET, trained) if world_size > 1 else 0
        return FP32 * trained + max(bucket, 2 * FP32 * largest)
    gradients = FP32 * trained if engine.zero_stage < 3 else 0
    return gradients + 4 * FP32 * -(-trained // world_size)


def sent_bytes(engine: EngineConfig, trained: int, gathered: int) -> dict[str, int]:
    """Return the bytes reduced and gathered in a step, by purpose; an all-reduce counts twice.

    gathered: the weights that all forwards and backwards of a step gather at ZeRO stage 3.
    """
    sent = {"weights' gradients": (1 if engine.zero_stage == 3 else 2) * FP32 * trained}
    if engine.zero_stage in (1, 2):
        sent["updated weights"] = _weight(engine) * trained
    elif engine.zero_stage == 3:
        sent["weights, for forwards and backwards"] = _weight(engine) * gathered
    return sent


def _weight(engine: EngineConfig) -> int:
    return 2 if engine.precision == "bf16_pure" else FP32


class LiveBytes(TorchDispatchMode):
    """A context that counts the bytes of live storages allocated by operations.

    `peak` is the maximum of all; `in_heap` the maximum of those that glibc allocates in its heap.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.in_heap = self._heap_now = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its new storages."""
        output = func(*args, **(kwargs or {}))
        inputs = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in inputs:
                self._count(leaf.untyped_storage())
        return output

    def _count(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._counted:
            return
        in_heap = size if size < HEAP_BELOW else 0
        self._counted.add(key)
        self.now += size
        self._heap_now += in_heap
        self.peak = max(self.peak, self.now)
        self.in_heap = max(self.in_heap, self._heap_now)

        def free() -> None:
            self._counted.discard(key)
            self.now -= size
            self._heap_now -= in_heap

        weakref.finalize(storage, free)


@dataclass(frozen=True)
class Estimate:
    """Memory of a rank in bytes, communication and duration; see `lines`."""

    resident: dict[str, int]  # always allocated, by purpose
    host_bytes: int  # of these, in the memory of the host if the ranks have GPUs
    phases: dict[str, int]  # additional peaks of consecutive phases
    num_weights: int
    table_weights: int  # weights of embedding tables
    negatives: int  # per query
    # Bytes that a rank sends per step, by purpose, with ring collectives: an all-gather or a reduce-scatter of S bytes
    # sends S (N - 1) / N, an all-reduce twice that.
    sent: dict[str, int]
    checkpoint_bytes: int  # of all ranks
    steps: int
    rows_global: int
    world_size: int
    validations: int
    validation: str  # the size of one
    validation_rows: float  # training rows whose matrix products take as long as those of a validation

    @property
    def peak_bytes(self) -> int:
        """The peak memory of a rank, without that of a process after all imports."""
        return sum(self.resident.values()) + max(self.phases.values())

    def seconds(self, rows_per_s: float) -> float:
        """Return the duration of all steps at `rows_per_s` rows per second of all ranks together."""
        return self.steps * self.rows_global / rows_per_s

    def lines(self, rows_per_s: float | None, validation_s: float | None = None) -> list[str]:
        """Format the estimate; `validation_s` is the measured duration of a validation."""
        highest = max(self.phases, key=lambda name: self.phases[name])
        lines = [
            "estimates, before a run:",
            f"{self.num_weights:,} weights, {self.table_weights:,} of them in tables; {self.world_size} ranks",
            *(f"  {name:42s} {size_text(size)}" for name, size in self.resident.items()),
            *(f"  {name + ' (then)':42s} {size_text(size)}" for name, size in self.phases.items()),
            f"memory of a rank, at its highest ({highest}): {size_text(self.peak_bytes)}",
            f"  {'in it, of the host if the ranks have GPUs':42s} {size_text(self.host_bytes)}",
            f"{self.rows_global:,} rows per step; a query has {self.negatives:,} negatives",
            *(f"  {name:42s} {size_text(size)}" for name, size in self.sent.items()),
            f"sent by a rank in a step: {size_text(sum(self.sent.values()))}",
            f"a checkpoint: {size_text(self.checkpoint_bytes)}",
        ]
        time = "unknown without rows per second (--rows-per-s, or the metrics of a run)"
        if rows_per_s:
            time = f"{_duration(self.seconds(rows_per_s))} at {rows_per_s:,.0f} rows per second"
        lines.append(f"{self.steps:,} steps: {time}")
        if self.validations and rows_per_s:
            each, source = validation_s, "as recorded"
            if each is None:
                each, source = self.validation_rows / rows_per_s, "by the matrix products of a step"
            time = f"{_duration(self.validations * each)}, {_duration(each)} each {source}"
            number = f"{self.validations:,} validation{'s' * (self.validations != 1)}"
            lines.append(f"{number} of {self.validation}: {time}")
            lines.append(f"in all: {_duration(self.seconds(rows_per_s) + self.validations * each)}")
        return lines


@dataclass(frozen=True)
class StatedSizes:
    """The sizes of a dataset of pairs that does not exist yet."""

    pairs: int  # of training
    documents: int
    queries: int  # of validation


def estimate(
    config: Config, name: StageName, dataset: Dataset, world_size: int, stated: StatedSizes | None = None
) -> Estimate:
    """Estimate the stage `name` of `config` on `world_size` ranks; reads the rows of one step of `dataset`.

    `stated` sizes replace those of the dataset. Raises ConfigError: a step encodes the catalogue, which is not built.
    """
    stage = config.stage(name)
    dataset = dataset.with_rules(replace(dataset.rules, item_rows=config.model.query.history.items != "id"))
    stream = row_stream(config, stage, dataset, rank=0, world_size=world_size)
    drawn = -(-stage.negatives.uniform // world_size)
    share = replace(stage, negatives=replace(stage.negatives, uniform=drawn), distillation=None)
    negatives = None
    if stage.negatives.hard:  # in place of mined ones
        negatives = UniformNegatives(NegativeDocuments(dataset.catalogue.num_docs))
    documents = None
    if stage.documents.vectors:  # without their model
        vectors_dir = Path(stage.documents.vectors)
        meta = read_meta(vectors_dir)
        documents = FixedDocuments(load_vectors(vectors_dir, meta), meta.model_checksum)
    if stated is not None and stage.negatives.columns == "catalogue":
        raise ConfigError(f"{name}.negatives.columns: catalogue needs a dataset; build it first")
    steps_per_epoch = stream.steps_per_epoch if stated is None else -(-stated.pairs // stage.rows_global)
    num_docs = dataset.catalogue.num_docs if stated is None else stated.documents
    num_queries = dataset.num_queries(SPLIT) if stated is None else stated.queries
    specs = sharded_tables(dataset.schema, config.model)
    builder = BatchBuilder(stream, share, config.run.seed, negatives, documents, specs)
    batch = next(read_batches(stream, builder, torch.device("cpu")))
    texts = text_architectures(config.model, dataset.schema, dataset.vocab_size)
    mode = FakeTensorMode()
    with torch.device("meta"):  # peft cannot build its layers of fake tensors
        model = DualEncoder(config.model, dataset.schema, texts)
    engine = resolve_engine_precision(config.engine, model, "cuda" if torch.cuda.is_available() else "cpu")
    with mode:
        _materialize(model, torch.bfloat16 if engine.precision == "bf16_pure" else None)
    model.tables.source = FakeRows(specs)
    model.train()
    if documents is not None:
        model.freeze_documents()
    if engine.precision != "fp32" and not torch.cuda.is_available():
        use_eager_attention(model)  # as in the engine
    if engine.checkpoint_activations:
        model.checkpoint_activations()
    # numbers of weights, which may be meta or fake tensors, and of the optimizer's states
    trained_sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    weights, trained = sum(parameter.numel() for parameter in model.parameters()), sum(trained_sizes)
    states = sum(
        len(stage.optimizer.state_of(group["name"])) * parameter.numel()
        for group in parameter_groups(model, stage.optimizer)
        for parameter in group["params"]
    )
    resident = resident_bytes(engine, weights, trained, states, world_size)
    # the average, and a copy of the weights while the average replaces them
    widths = {name: sum(stage.table_optimizer.state_widths(spec.dim).values()) for name, spec in specs.items()}
    # keyed: at most an id per document, or per row
    distinct = {"doc": num_docs, "query": steps_per_epoch * stage.rows_global}
    stored = {}
    for table, spec in specs.items():
        most = distinct[table.partition("_")[0]] if spec.is_keyed else spec.stored_rows
        stored[table] = min(most, spec.shard_capacity * SHARDS or most)
    if specs and config.engine.table_memory != "file":
        numbers = 0
        for table, spec in specs.items():
            rows_of_rank = RowPartition(0, world_size).capacity(stored[table])
            # keyed: up to twice as many slots as rows, with their rows and entries on the host
            numbers += rows_of_rank * (1 + spec.is_keyed) * (spec.dim + widths[table] + 1 + 4 * spec.is_keyed)
        resident[TABLE_ROWS] = FP32 * numbers
    averaged = {"moving average of the weights": 2 * FP32 * trained} if stage.weight_average else {}
    in_tables = sum(stored[name] * (spec.dim + widths[name] + 3) for name, spec in specs.items())  # all rows updated
    saved = in_tables + trained + states + (trained if stage.weight_average else 0)
    of_catalogue: dict[str, int] = {}
    if model.content_ids:
        of_catalogue["contents of items"] = FP32 * num_docs * model.tower_dim
        saved += num_docs * model.tower_dim
    plan = plan_step(batch, TokenBudget.of(engine, model.accepts_packed(training=True)))
    graphs, towers = _towers(model, mode, batch, plan, engine)
    sides, width = (len(batch.query_ids), len(batch.doc_ids)), config.model.dim
    num_known = 0 if batch.known_positives is None else len(batch.known_positives)
    both = stage.loss.direction != "q2d"
    vectors = 2 * FP32 * sum(sides) * width  # and their gradients
    sent = sent_bytes(engine, trained, _gathered_weights(model, plan))
    if specs:  # each row, its values and their gradients
        fetched = {name: len(rows) * specs[name].hashes for name, rows in (batch.table_rows or {}).items()}
        sent["sharded tables"] = sum(number * 8 * (1 + specs[name].dim) for name, number in fetched.items())
    loss = loss_bytes(
        *sides, width, world_size, both=both, num_known=num_known,
        gathers_known=stage.negatives.mask in ("batch", "user"),
    )  # fmt: skip
    sent = loss_sent_bytes(sides[1], width, world_size, both=both) | sent
    steps = segment_steps(stage, steps_per_epoch)
    validations = max(1, -(-steps // (stage.validate_every_steps or steps or 1)))
    validations += config.initial_model(name) is not None
    query, doc = batch.sizes
    encoded = num_queries * model.query_tower.flops(query) / max(1, len(batch.query_ids))
    if documents is None:
        encoded += num_docs * model.doc_tower.flops(doc) / max(1, len(batch.doc_ids))
    products = encoded + 2.0 * num_queries * num_docs * config.model.dim
    behind = engine.async_checkpoints and (stage.save_every_minutes > 0 or 0 < stage.save_every_steps < steps)
    copied = {"copy that a checkpoint is written from": -(-FP32 * saved // world_size)} if behind else {}
    resident |= averaged | copied | of_catalogue
    resident |= {"batch": 2 * batch.nbytes, "libraries at first use": RUNTIME_BYTES}  # the current batch and the next
    # a rank's share of index vectors; an approximate index has a copy of them
    mining = stage.negatives.mining
    mines = stage.negatives.hard > 0 and mining.file is None and not mining.uniform
    copies = 2 if mines and num_docs > mining.exact_up_to else 1
    index_bytes = copies * FP32 * -(-num_docs // world_size) * (width + model.has_beta)
    on_host = [GRADIENTS_ON_HOST, *copied, *([TABLE_ROWS] if engine.table_memory == "host" else [])]
    if engine.offload_optimizer:
        on_host += [MASTER_WEIGHTS, OPTIMIZER_STATES]
    return Estimate(
        resident=resident,
        host_bytes=sum(resident.get(name, 0) for name in on_host),
        phases={
            "loss, with retained graphs": graphs + vectors + loss,
            "towers' activations and gradients": towers + vectors,
            "optimizer's step": step_bytes(engine, trained, max(trained_sizes), world_size),
            "validation, mining": _encoding(model, mode, batch) + index_bytes,
        },
        num_weights=weights,
        table_weights=sum(parameter.numel() for parameter in model.tables.parameters())
        + sum(stored[name] * spec.dim for name, spec in specs.items()),
        negatives=num_negatives(stage, batch, world_size, num_docs),
        sent={name: int(size * (world_size - 1) / world_size) for name, size in sent.items()},
        checkpoint_bytes=FP32 * saved,
        steps=steps,
        rows_global=stage.rows_global,
        world_size=world_size,
        validations=validations if num_queries else 0,
        validation=f"{num_queries:,} queries and {num_docs:,} documents",
        validation_rows=products * len(batch.query_ids) / max(1.0, step_flops(model, batch)),
    )


@dataclass(frozen=True)
class FakeRows:
    """Zeros in place of the rows of sharded tables."""

    specs: Mapping[str, TableSpec]

    def look_up(self, name: str, rows: Tensor) -> Tensor:
        """Return zeros [*rows.shape, d] with a gradient, as of a working set."""
        leaf = torch.zeros(int(rows.numel()) + 1, self.specs[name].dim, requires_grad=True)
        return nn.functional.embedding(rows, leaf)


def recorded_times(folder: Path) -> tuple[float | None, float | None]:
    """Return the median rows per second and seconds of a validation in a stage folder's metrics, None without any."""
    if not (folder / METRICS_FILE).is_file():
        return None, None
    records = read_stage(folder)
    speeds = [record["rows_per_s"] for record in records if record.get("rows_per_s")]
    validations = [record["seconds"] for record in records if "validation" in record]
    return median(speeds) if speeds else None, median(validations) if validations else None


def _materialize(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace the meta tensors of a model by tensors of the current mode, on the CPU; parameters by some of `dtype`."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    is_parameter = isinstance(tensor, nn.Parameter)
                    kind = dtype if is_parameter and dtype is not None else tensor.dtype
                    empty = torch.empty(tensor.shape, dtype=kind, device="cpu")
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def _gathered_weights(model: DualEncoder, plan: StepPlan) -> int:
    """Return the weights that are gathered in a step: by each forward and backward, those of its side."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if plan.whole:
        return 2 * sum(sizes.values())
    other = {"query": ("doc_tower.", "text.doc.", "beta"), "doc": ("query_tower.", "text.query.")}
    sides = ["query"] * len(plan.query.chunks) + ["doc"] * len(plan.doc.chunks)
    passes = dict.fromkeys(other, 0)
    for number, side in enumerate(sides):
        passes[side] += 2 if number >= len(sides) - plan.num_retained else 3
    return sum(
        number * sum(size for name, size in sizes.items() if not name.startswith(other[side]))
        for side, number in passes.items()
    )


def _towers(
    model: DualEncoder, mode: FakeTensorMode, batch: Batch, plan: StepPlan, engine: EngineConfig
) -> tuple[int, int]:
    """Return the bytes of graphs retained until the loss, and the peak of forward and backward.

    The peak includes gradients of the weights and heap fragmentation.
    """
    chunks = [] if plan.whole else encoded_chunks(batch, plan)
    query_positions = {} if batch.query_positions is None else {"query_positions": batch.query_positions}
    query = whole_features(batch.query, plan.query)
    doc = whole_features(batch.doc, plan.doc) if batch.doc_vectors is None else None
    batch_inputs: dict[str, Any] = {"query": query, "doc": doc, **query_positions}
    retained_inputs = [chunk.inputs for chunk in chunks if chunk.retain_graph] if chunks else [batch_inputs]
    # the largest chunk of each side without a retained graph
    by_side: dict[str, list[EncodedChunk]] = {}
    for chunk in chunks:
        if not chunk.retain_graph:
            by_side.setdefault(chunk.name, []).append(chunk)
    again = [max(of_side, key=lambda chunk: chunk.chunk.tokens).inputs for of_side in by_side.values()]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=engine.precision == "bf16")

    def encode(**inputs: Any) -> Encoded:
        with autocast:
            encoded: Encoded = model(**tree_map_only(Tensor, mode.from_tensor, inputs))
        return encoded

    with mode, LiveBytes() as live:
        retained = [encode(**inputs) for inputs in retained_inputs]
        waiting = live.now
        with torch.no_grad():
            for inputs in again:
                encode(**inputs)
        if retained:
            _backward(retained)
            retained.clear()
        for inputs in again:
            _backward([encode(**inputs)])
        return waiting, live.peak + int(HEAP_HOLES * live.in_heap)


def _encoding(model: DualEncoder, mode: FakeTensorMode, batch: Batch) -> int:
    """Return the bytes of encoding the catalogue's documents without a graph; 0 if their vectors are fixed."""
    if batch.doc_vectors is not None:
        return 0
    plan = plan_side(batch.doc_lengths, len(batch.doc_ids), CHUNK_TOKENS_CPU)
    chunk, side = plan.chunks[0], Chunked(batch.doc, plan)
    features = cast(Features, side.features(chunk))  # the plan packs nothing
    inputs = {name: mode.from_tensor(values) for name, values in features.items()}
    with mode, torch.no_grad(), LiveBytes() as live:
        model(doc=inputs)
    return live.peak * max(1, CHUNK_TOKENS_CPU // max(1, chunk.tokens))


def _backward(encoded: Sequence[Encoded]) -> None:
    """Back-propagate gradients of ones, in place of those of the loss."""
    torch.stack(
        [t.float().sum() for part in encoded for t in part if t is not None and t.requires_grad]
    ).sum().backward()


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2g} seconds"


def size_text(num_bytes: float) -> str:
    """Format a number of bytes."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.2f} GB"
