"""The keys of a run's YAML as frozen dataclasses, with defaults and bounds."""

import json
import os
from abc import abstractmethod
from dataclasses import asdict, dataclass, field, replace
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from bigdssm.config.components import (
    DISTILLATIONS,
    LOSSES,
    MAX_COUNT,
    MAX_ROWS,
    MAX_WIDTH,
    NEW_WEIGHTS_LR,
    OPTIMIZERS,
    PRETRAINED_LR,
    SAMPLINGS,
    TABLE_OPTIMIZERS,
    DistillationConfig,
    LossConfig,
    OptimizerConfig,
    SamplingConfig,
    StageName,
    TableOptimizerConfig,
)
from bigdssm.errors import ConfigError
from bigdssm.features import Feature, texts_of
from bigdssm.features.base import FEATURES
from bigdssm.features.times import DeclaredUnit
from bigdssm.utils.components import MISSING, RESUME, Component, Registry, bounded, component, named_components

if TYPE_CHECKING:
    from torch import nn

DEFAULT_CACHE_BYTES = 50 * 1024**3
ARCHITECTURE_FILE = "config.json"
SPLITS = ("train", "validation", "test")
FEATURE_SIDES = ("query", "doc", "filter", "event")  # the keys of `data` with features


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer of texts."""

    path: str | None = None  # folder of a Hugging Face tokenizer; none: WordPiece is trained on the dataset's texts
    vocab_size: int = bounded(8000, 1, 2**22)  # of a trained one
    lowercase: bool = True


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture: a dataset, or some of its partitions."""

    dir: str | None = None  # none: data.dir
    partitions: tuple[str, ...] = ()  # empty: all partitions
    # Share of the rows, relative to the sum of all weights; rounded to a thousandth.
    weight: float = bounded(1.0, at_most=MAX_COUNT, above=0)


@dataclass(frozen=True)
class VisitConfig:
    """Visits of a user, by session or by gaps: an item that the current visit already has is no target or answer."""

    feature: str | None = None  # feature of data.event of type session; none: by gaps
    gap_s: float | None = bounded(None, at_most=MAX_COUNT, above=0)  # maximum seconds between two events of a visit
    # One target per user, document and visit, at its first event, with the furthest action of the visit as the wanted
    # action: a categorical feature of data.event with its values from the first step to the last, such as
    # {action: [view, cart, purchase]}.
    funnel: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def is_set(self) -> bool:
        """Return whether there are visits."""
        return self.feature is not None or self.gap_s is not None

    @property
    def action(self) -> str | None:
        """Return the feature of events with the steps of the funnel; None without a funnel."""
        return next(iter(self.funnel), None)


@dataclass(frozen=True)
class DataConfig:
    """The dataset and its schema."""

    dir: str = field(default=MISSING, metadata={RESUME: "may"})
    query: dict[str, Any] = named_components(FEATURES)  # features by name, with the keys of their type
    doc: dict[str, Any] = named_components(FEATURES)
    # Features of documents that are no inputs of the model, such as stock or region, of type categorical or numeric:
    # filters and slices read them, and a change needs no new vectors.
    filter: dict[str, Any] = named_components(FEATURES, resume="may")
    # Features of an event (interaction), from columns of the table of interactions: every history reads them.
    event: dict[str, Any] = named_components(FEATURES)
    # Features of data.event that a query has, too: in training those of its target's event (the wanted action, the time
    # since the newest event of the history), in serving those of the request.
    request: tuple[str, ...] = ()
    # With `request`: events at the time of a target are no history of it, or those before it in the table are (order).
    ties: Literal["exclude", "order"] = "exclude"
    # Unit of the numbers in columns of times, since 1970; auto: the one in which all are dates of 1975 to 2100. It is
    # recorded in the dataset, and an append has the same.
    time_unit: DeclaredUnit = field(default="auto", metadata={RESUME: "may"})
    title: str | None = None  # column of the document table with display titles; by default the document id
    # Queries are documents: both sides declare the same features, from separate columns; one tower (model.doc) encodes
    # both; a query has its document's id and never returns itself; a pair applies in both directions.
    siamese: bool = False
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig, metadata={RESUME: "may"})
    # Maximum number of targets per train row built from interactions: one pass over a segment of a sequence encodes a
    # query per target.
    targets_per_row: int = bounded(1, 1, 65_536, resume="may")
    # Whether a user's first event is a target, too, in datasets built with it: the model learns the choices of users
    # without events, and serves unknown users.
    empty_histories: bool = False
    # Events that are targets: a condition on features of data.event, such as `action = purchase`, or a mapping of the
    # splits train, validation and test to conditions; none: all events. Histories have all events.
    targets: Any = None
    # Whether a user's earlier items are excluded: from negatives, mining, evaluation, search, serve and recommend.
    # False for repeated consumption (music, groceries). A condition on features of data.event, such as
    # `action = purchase`: the items of the events that match it.
    exclude_seen: bool | str = True
    visit: VisitConfig = field(default_factory=VisitConfig)
    lanes: int = bounded(8, 1, 65_536)  # virtual data-parallel workers; divides rows_global, at least the world size
    num_workers: int = bounded(1, 0, 1024, resume="may")  # loader processes per rank
    max_bad_fraction: float = bounded(0.001, 0, 1, resume="may")  # of the rows read; the run stops above it
    # Where a dataset at a URL is cached; none: bigdssm/ in the user's cache folder.
    cache_dir: str | None = field(default=None, metadata={RESUME: "may"})
    cache_bytes: int = bounded(DEFAULT_CACHE_BYTES, 1, 2**62, resume="may")  # maximum size of the cache
    # Train on the partitions from this one on; none: on all.
    from_partition: str | None = field(default=None, metadata={RESUME: "segment"})
    webdataset: str | None = None  # train on these plain shards (path with {000..009}); `dir` provides everything else
    # Several datasets or partitions, by weight; each lane of a step has rows of one of them.
    mixture: list[SourceConfig] = field(default_factory=list, metadata={RESUME: "segment"})

    def __post_init__(self) -> None:
        for side in FEATURE_SIDES:
            features = {
                name: content if isinstance(content, Feature) else FEATURES.read(f"data.{side}.{name}", content)
                for name, content in getattr(self, side).items()
            }
            object.__setattr__(self, side, features)
        if isinstance(self.targets, str):
            object.__setattr__(self, "targets", dict.fromkeys(SPLITS, self.targets))


@dataclass(frozen=True)
class TextInputs:
    """The properties of token ids that a text encoder is built for."""

    vocab_size: int
    max_tokens: int  # of the longest text


@dataclass(frozen=True)
class TextEncoderConfig(Component):
    """The keys of every text encoder.

    A type of text encoder is a subclass with additional keys, registered in TEXT_ENCODERS.
    """

    type: str = MISSING  # transformer, of Hugging Face; or a registered one
    dropout: float = bounded(0.0, 0, below=1)  # inside the encoder; replaces that of a pretrained folder

    def architecture(self, inputs: TextInputs) -> Any:
        """Return the values that determine the shapes of the weights, besides these keys; by default `inputs`.

        It is saved in the model folder, so that the encoder can be rebuilt without the dataset or a pretrained folder.
        Raises ConfigError: a pretrained folder does not match the keys.
        """
        return inputs

    @abstractmethod
    def build(self, architecture: Any) -> "nn.Module":
        """Return an encoder with new weights, a `models.encoders.TextEncoder`."""

    def build_pretrained(self, architecture: Any) -> "nn.Module":
        """Return an encoder with pretrained weights, by default new ones. Raises ConfigError: they do not load."""
        return self.build(architecture)

    @property
    def is_pretrained(self) -> bool:
        """Return whether all its weights are trained, from those of a pretrained model."""
        return False

    def check_tokenizer(self, key: str, tokenizer: Path | None) -> None:
        """Raise ConfigError if pretrained weights belong to other tokens than those of the folder `tokenizer`.

        None: a tokenizer that is trained on the dataset's texts. `key` names the block.
        """

    def write_architecture(self, architecture: Any, folder: Path) -> None:
        """Write an architecture to ARCHITECTURE_FILE in a new folder."""
        folder.mkdir(parents=True)
        (folder / ARCHITECTURE_FILE).write_text(json.dumps(asdict(architecture)), encoding="utf-8")

    def read_architecture(self, folder: Path) -> Any:
        """Read an architecture. Raises any exception: the file is damaged."""
        content = json.loads((folder / ARCHITECTURE_FILE).read_text(encoding="utf-8"))
        if not all(type(value) is int for value in content.values()):
            raise ValueError(f"{content} has a value that is not an integer")
        return TextInputs(**content)


TEXT_ENCODERS: Registry[TextEncoderConfig] = Registry(
    "a text encoder", "type", TextEncoderConfig, home="bigdssm.models.declarations"
)


@dataclass(frozen=True)
class HistoryEncoderConfig(Component):
    """A transformer over the item vectors of a history: the keys of every type of block (its layer).

    A type of block is a subclass with additional keys, registered in HISTORY_BLOCKS.
    """

    # Whether it attends by `models.blocks.attend` alone, softmax(q kᵀ / √W) v, which has kernels for packed histories.
    softmax_attention: ClassVar[bool] = True
    pair_products: ClassVar[int] = 2  # matrix products over pairs of positions: the scores and the weighted sum

    block: str = MISSING  # sasrec; gated, as in LiGR and eSASRec; lowpass, after BSARec; or a registered one
    # Position of an item: its distance from the newest item (age), or the distance of two items as a learned bias
    # (relative) or rotary embedding (rotary); none: attention does not depend on the order of events, but by their
    # times. Several queries per row exclude age.
    positions: Literal["age", "relative", "rotary", "none"] = "age"
    # Whether attention depends on the time between two events, and from the request in the last layer, as rotary
    # embeddings; it needs a feature of data.event of type timestamp.
    times: Literal["none", "rotary"] = "none"
    layers: int = bounded(1, 1, 1024)
    heads: int = bounded(2, 1, 1024)
    dropout: float = bounded(0.1, 0, below=1)
    item_dropout: float = bounded(0.1, 0, below=1)  # on the item vectors
    item_scale: bool = False  # item vectors times the square root of their width, as in SASRec
    # What an item is to a history: the vector of its id; a linear map of its content, which is the document tower's
    # vector for it with an unknown id; or the sum of both. Contents have no gradient; they are computed for the whole
    # catalogue every STAGE.refresh_contents_every_steps.
    items: Literal["id", "content", "both"] = "id"
    # Categorical feature of events, such as an action: the vector of a history has, in addition, a vector of the newest
    # event's item and of its value of this feature, as in factorized Markov chains. It needs a table of its own.
    transition: str | None = None
    transition_dropout: float = bounded(0.4, 0, below=1)  # on this vector

    @property
    def allows_many_queries(self) -> bool:
        """Return whether one pass can encode several queries of a row; ages differ between queries."""
        return self.positions != "age"

    @abstractmethod
    def build(self, dim: int) -> "nn.Module":
        """Return a layer over vectors of width `dim`, with the `forward` of `models.blocks.SasrecBlock`."""


HISTORY_BLOCKS: Registry[HistoryEncoderConfig] = Registry(
    "a sequence block", "block", HistoryEncoderConfig, home="bigdssm.models.declarations"
)


@dataclass(frozen=True)
class TowerConfig:
    """Encoders → concatenation → MLP → vector of width model.dim."""

    mlp: tuple[int, ...] = bounded((128,), 1, MAX_WIDTH)  # hidden widths; empty: one linear layer
    residual: str | None = None  # feature whose vector (width model.dim) skips the MLP and is added to its output
    # Largest norm of the vector of an id as the residual over that of the MLP's output: the other features decide, and
    # alone if the id is unknown. None: no limit.
    residual_limit: float | None = bounded(None, at_most=1_000_000, above=0)
    dropout: float = bounded(0.0, 0, below=1)
    embedding_dim: int = bounded(32, 1, MAX_WIDTH)  # of every categorical feature
    numeric_dim: int = bounded(16, 1, MAX_WIDTH)
    vector_dim: int = bounded(64, 1, MAX_WIDTH)  # of every vector feature
    text: TextEncoderConfig = component(TEXT_ENCODERS, "transformer")
    history: HistoryEncoderConfig = component(HISTORY_BLOCKS, "sasrec")


@dataclass(frozen=True)
class TablesConfig:
    """Division of embedding tables: replicated on every rank, or sharded by rows over the ranks."""

    sharding: Literal["auto", "replicated", "rows"] = "auto"  # auto: rows for tables with at least `rows_from` rows
    rows_from: int = bounded(1_000_000, 1, 2**40)
    rows: tuple[str, ...] = ()  # features, such as doc.item_id, that are sharded whatever `sharding` is
    replicated: tuple[str, ...] = ()  # features that are replicated whatever `sharding` is
    # Of sharded tables: a row is used after this many steps with it; before, it counts as out of vocabulary.
    admit_after: int = bounded(1, 1, 32_767)
    evict_after: int = bounded(0, 0, 2**30)  # a row that occurred in none of so many steps is evicted; 0: none is
    # Rows of a table above which the least recently updated ones are evicted; 0: all updated rows are stored.
    capacity: int = bounded(0, 0, 2**40)
    # Of sharded tables of features with hash_buckets: an id's vector is the sum of `hashes` of `hash_rows` shared rows,
    # which hashes of the id select; 0: each id has a row.
    hashes: int = bounded(1, 1, 16)
    hash_rows: int = bounded(0, 0, 2**40)
    # Share of ids that are out of vocabulary in a step: of sharded tables, and of the items of histories, also where
    # they are documents. It trains the vector of ids without a positive event.
    id_dropout: float = bounded(0.0, 0, below=1)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of stored rows; states and updates are float32

    def is_sharded(self, side: str, feature: str, num_codes: int) -> bool:
        """Return whether the table of a feature is sharded."""
        name = f"{side}.{feature}"
        if name in self.rows or name in self.replicated:
            return name in self.rows
        return self.sharding == "rows" or (self.sharding == "auto" and num_codes >= self.rows_from)


@dataclass(frozen=True)
class ModelConfig:
    """Two towers and the score S = alpha * <u, w> + beta."""

    dim: int = bounded(64, 1, MAX_WIDTH)
    score: Literal["dot", "cosine"] = "cosine"
    alpha_init: float = bounded(10.0, at_most=10_000, above=0)
    alpha_learned: bool = True
    # Bias in the score: learned per document, or none. auto: none if the score is the cosine, else document.
    beta: Literal["auto", "document", "none"] = "auto"
    share_text: bool = False  # one text encoder for both towers
    tables: TablesConfig = field(default_factory=TablesConfig)
    query: TowerConfig = field(default_factory=TowerConfig)
    doc: TowerConfig = field(default_factory=TowerConfig)

    def __post_init__(self) -> None:
        if self.beta == "auto":  # a written config has the value itself
            object.__setattr__(self, "beta", "none" if self.score == "cosine" else "document")

    def tower(self, side: str) -> TowerConfig:
        """Return the keys of the tower that encodes a side of the schema; events are encoded by the query's."""
        return self.doc if side == "doc" else self.query


@dataclass(frozen=True)
class EngineConfig:
    """How steps are computed; none of these keys changes the trained function beyond rounding."""

    zero_stage: int = bounded(1, 0, 3)
    # auto: bf16 on GPUs since Ampere and on processors with AMX; with AVX512-BF16 alone if texts are at least 64 wide,
    # or other towers 256; else fp32; the same on all ranks.
    precision: Literal["auto", "fp32", "bf16", "bf16_pure"] = "auto"
    offload_optimizer: bool = False
    checkpoint_activations: bool = False  # recompute transformer layers in the backward
    compile: bool = False  # torch.compile transformer layers, once for all lengths; not with zero_stage=3
    # Gradient cache: tokens and vectors per chunk and tower; 0: no chunks.
    chunk_tokens: int = bounded(0, 0, 2**40)
    # Tokens and vectors of the chunks whose graph is retained for the backward, not recomputed; none: chunk_tokens.
    keep_graph_tokens: int | None = bounded(None, 0, 2**40)
    # Seconds without a heartbeat from a rank, or without progress, before the others stop.
    peer_timeout_s: float = bounded(300.0, 5, 1_000_000)
    # Write a checkpoint from a copy while the next steps run; false: the steps wait for it.
    async_checkpoints: bool = True
    # Tables that are sharded by rows, and their optimizer states: in the memory of the device or the host, or in files.
    table_memory: Literal["device", "host", "file"] = "device"
    table_dir: str | None = None  # local folder of these files; none: a folder of the run


@dataclass(frozen=True)
class MiningConfig:
    """The source of a row's hard negatives: the ranks [first, last) of its query's ranking."""

    first: int = bounded(10, 0, MAX_COUNT)
    last: int = bounded(200, 1, MAX_COUNT)
    # Exclude documents whose score exceeds that of the positive minus this margin.
    margin: float | None = bounded(None, -1_000_000, 1_000_000)
    # Size of a catalogue up to which all documents are scored; above it an approximate index scores about an eighth.
    exact_up_to: int = bounded(1_000_000, 0, MAX_COUNT)
    # Number of steps after which negatives are mined again, with the current weights; 0: once.
    every_steps: int = bounded(0, 0, MAX_COUNT)
    # File of bigdssm mine_negatives, by any model, or list_candidates; replaces all of the above.
    file: str | None = None
    # Exclude documents whose teacher score in the file exceeds that of the positive minus this margin.
    teacher_margin: float | None = bounded(None, -1_000_000, 1_000_000)
    uniform: bool = False  # draw documents uniformly from the catalogue instead of mining, different ones in each epoch


@dataclass(frozen=True)
class NegativesConfig:
    """The negatives of a query."""

    in_batch: bool = True  # the other documents of the global batch; true for losses over all columns, such as fps
    # For losses over all columns: the documents of the global batch, or the whole catalogue in every step.
    columns: Literal["batch", "catalogue"] = "batch"
    # For losses over all columns: documents per step drawn uniformly from the catalogue, as extra columns.
    uniform: int = bounded(0, 0, MAX_ROWS)
    # Documents that are masked as negatives: batch: positives of the same query id, on any rank; user: also the items
    # of its sequence up to its latest row; past: exactly the items before the query; none: only its positive; auto:
    # batch, or none with data.exclude_seen=false. With a condition in data.exclude_seen, of events that match it.
    mask: Literal["auto", "batch", "user", "past", "none"] = "auto"
    hard: int = bounded(0, 0, 65_536)  # hard negatives per row
    mining: MiningConfig = field(default_factory=MiningConfig)


@dataclass(frozen=True)
class WarmStartConfig:
    """Initialization of a new model's item tables from the events of histories (training/warm_start.py)."""

    window: int = bounded(0, 0, 16)  # maximum distance of events, weighted by 1 / distance; 0: random initialization
    length: float = bounded(0.6, at_most=1000, above=0)  # root mean square of the vectors
    # With model.query.history.transition: documents and transitions start from a factorized Markov chain, which is
    # trained on counts alone.
    chain: bool = False
    half_life_days: float = bounded(30.0, 0, MAX_COUNT)  # of an event in the chain; 0: events do not age


@dataclass(frozen=True)
class DocumentsConfig:
    """Document vectors of a trained model, against which the query tower is trained alone."""

    model: str | None = None  # model folder whose document tower and alpha are taken, and not trained; none: train both
    vectors: str | None = None  # vectors of all documents by this model, of bigdssm embed


@dataclass(frozen=True)
class StageConfig:
    """One stage of training."""

    loss: LossConfig = component(LOSSES, "fps")
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    # auto: corrected if queries have histories and a softmax uses in-batch negatives, else none.
    sampling: SamplingConfig = component(SAMPLINGS, "auto")
    distillation: DistillationConfig | None = component(DISTILLATIONS, None)
    optimizer: OptimizerConfig = component(OPTIMIZERS, "adamw")
    table_optimizer: TableOptimizerConfig = component(TABLE_OPTIMIZERS, "rowwise_adagrad")  # of tables sharded by rows
    rows_global: int = bounded(1024, 1, MAX_ROWS)
    epochs: float = bounded(1.0, 0, 100_000, resume="longer")
    steps: int = bounded(0, 0, MAX_COUNT, resume="longer")  # 0: from `epochs`
    # Model folder or checkpoint (STAGE/checkpoints/step-…) to start from; sft: by default best/ of its pretraining.
    init: str | None = None
    documents: DocumentsConfig = field(default_factory=DocumentsConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    # With model.query.history.items content or both: the contents of all items are computed again every so many steps;
    # 0: ten times per epoch, or in the stage if it is shorter.
    refresh_contents_every_steps: int = bounded(0, 0, MAX_COUNT)
    validate_every_steps: int = bounded(0, 0, MAX_COUNT, resume="may")  # 0: once, at the end
    # The registered validation metric, larger is better: best/ is the latest validation within a standard error of the
    # highest, and leaves trained initial weights only for a gain beyond it. Patience and tuning use it, too.
    validation_metric: str = "ndcg_at_10"
    # Decay of an exponential moving average of the weights, used for validation and best/; 0: the weights themselves.
    # Not with zero_stage=3.
    weight_average: float = bounded(0.0, 0, below=1)
    patience: int = bounded(0, 0, MAX_COUNT, resume="may")  # stop after this many validations without a gain; 0: never
    save_every_steps: int = bounded(500, 0, MAX_COUNT, resume="may")  # 0: not by steps
    save_every_minutes: float = bounded(0.0, 0, 1_000_000, resume="may")  # since the last checkpoint; 0: not by time
    keep_checkpoints: int = bounded(2, 1, MAX_COUNT, resume="may")
    log_every_steps: int = bounded(10, 1, MAX_COUNT, resume="may")
    max_skipped_steps: int = bounded(5, 1, MAX_COUNT, resume="may")  # consecutive non-finite steps before the run stops


@dataclass(frozen=True)
class RunConfig:
    """The folder, seed and trackers of a run."""

    dir: str = field(default=MISSING, metadata={RESUME: "may"})
    seed: int = bounded(0, 0, 2**32 - 1)
    trackers: tuple[str, ...] = field(default=("tensorboard",), metadata={RESUME: "may"})


@dataclass(frozen=True)
class DebugConfig:
    """Debugging switches."""

    log_row_ids: bool = False  # write each consumed step's row ids per rank into the run's folder


@dataclass(frozen=True)
class Config:
    """The configuration of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig, metadata={RESUME: "may"})
    pretrain: StageConfig = field(default_factory=StageConfig)
    sft: StageConfig | None = None
    debug: DebugConfig = field(default_factory=DebugConfig, metadata={RESUME: "may"})

    def __post_init__(self) -> None:
        for name in ("pretrain", "sft"):
            stage: StageConfig | None = getattr(self, name)
            if stage is not None:
                object.__setattr__(self, name, _resolved(name, stage, self))

    def text_encoders(self) -> dict[str, TextEncoderConfig]:
        """Return the text encoders of the model, by the keys of their blocks."""
        sides = [side for side in ("query", "doc") if texts_of(getattr(self.data, side))]
        if self.data.siamese or self.model.share_text:
            sides = ["doc"] if sides and self.data.siamese else sides[:1]
        return {f"model.{side}.text": getattr(self.model, side).text for side in sides}

    def stage(self, name: StageName) -> StageConfig:
        """Return the stage `name`. Raises ConfigError: the section is missing."""
        stage = self.pretrain if name == "pretrain" else self.sft
        if stage is None:
            raise ConfigError(f"the config has no section `{name}:`; add one (an empty one has the defaults)")
        return stage

    def stage_dir(self, name: StageName) -> Path:
        """Return the folder of the stage `name`."""
        return Path(self.run.dir) / name

    def initial_model(self, name: StageName) -> Path | None:
        """Return the folder that a stage starts from: its `init`; for SFT, by default, the best of pretraining."""
        init = self.stage(name).init
        if init is not None:
            return Path(init)
        return self.stage_dir("pretrain") / "best" if name == "sft" else None

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved config as plain containers, for a YAML or JSON file."""
        content = asdict(self)
        for side in FEATURE_SIDES:
            features: dict[str, Feature] = getattr(self.data, side)
            content["data"][side] = {name: feature.declaration() for name, feature in features.items()}
        return cast(dict[str, Any], json.loads(json.dumps(content, default=_plain)))


def _plain(value: Any) -> Any:
    """Convert a path or a NumPy number for JSON. Raises TypeError."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Number) and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r:.80} is not a string, number, list or mapping")


def _resolved(name: str, stage: StageConfig, config: Config) -> StageConfig:
    """Return a stage with `auto` values and defaults resolved."""
    if stage.negatives.mask == "auto":
        mask: Literal["batch", "none"] = "batch" if config.data.exclude_seen else "none"
        stage = replace(stage, negatives=replace(stage.negatives, mask=mask))
    if stage.loss.widths is None:
        widths = config.pretrain.loss.widths if name == "sft" else ()
        stage = replace(stage, loss=replace(stage.loss, widths=widths))
    if stage.optimizer.lr is None:
        pretrained = any(text.is_pretrained for text in config.text_encoders().values())
        stage = replace(stage, optimizer=replace(stage.optimizer, lr=PRETRAINED_LR if pretrained else NEW_WEIGHTS_LR))
    return replace(stage, sampling=stage.sampling.resolve(stage, config.data))
