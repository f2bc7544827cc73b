"""The keys of a run's YAML as frozen dataclasses, each with its default and its bounds."""

from __future__ import annotations

import json
import os
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
    OPTIMIZERS,
    SAMPLINGS,
    SCORERS,
    DistillationConfig,
    LossConfig,
    OptimizerConfig,
    SamplingConfig,
    ScorerConfig,
    StageName,
)
from bigdssm.errors import ConfigError
from bigdssm.features import Feature
from bigdssm.features.base import FEATURES
from bigdssm.utils.bounds import bounded, out_of_bounds
from bigdssm.utils.components import MISSING, Component, Registry, component, named_components

if TYPE_CHECKING:
    from torch import nn

DEFAULT_CACHE_BYTES = 50 * 1024**3


@dataclass(frozen=True)
class TokenizerConfig:
    """Where token ids come from."""

    path: str | None = None  # folder of a Hugging Face tokenizer; none: WordPiece is trained on the dataset's texts
    vocab_size: int = bounded(8000, 1, 2**22)  # of a trained one
    lowercase: bool = True


@dataclass(frozen=True)
class SourceConfig:
    """One part of a mixture: a dataset, or some of its partitions."""

    dir: str | None = None  # none: data.dir
    partitions: tuple[str, ...] = ()  # empty: all of its partitions
    # Share of the rows, over the sum of all weights; kept to a thousandth.
    weight: float = bounded(1.0, at_most=MAX_COUNT, above=0)


@dataclass(frozen=True)
class DataConfig:
    """The dataset and its schema."""

    dir: str = MISSING
    query: dict[str, Any] = named_components(FEATURES)  # Feature by name, each as its type declares it; see features/
    doc: dict[str, Any] = named_components(FEATURES)
    title: str | None = None  # column of the document table shown to people; the document id by default
    # Queries are documents: both sides declare the same features, of columns of their own, one tower (model.doc) reads
    # both, a query's id is its document's, which is never its own answer, and a pair holds in both directions.
    siamese: bool = False
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    # Most targets of a train row made of interactions: one pass over a piece of a sequence gives a query for each.
    targets_per_row: int = bounded(1, 1, 65_536)
    # Whether what a user met before may be the answer again (music, groceries). It decides the losses' mask, what is
    # mined, what evaluation counts, and what search, serve and recommend leave out.
    exclude_seen: bool = True
    lanes: int = bounded(8, 1, 65_536)  # fixed order lanes; divides rows_global, at least the world size
    num_workers: int = bounded(1, 0, 1024)  # loader processes per rank
    max_bad_fraction: float = bounded(0.001, 0, 1)  # of the rows met; past it the run stops
    cache_dir: str | None = None  # where a dataset at a URL is cached; none: bigdssm/ in the user's cache folder
    cache_bytes: int = bounded(DEFAULT_CACHE_BYTES, 1, 2**62)  # most that all files in it take
    from_partition: str | None = None  # train on the dataset's partitions from this one on; none: on all of them
    webdataset: str | None = None  # train on these plain shards (path with {000..009}), `dir` giving all but train rows
    mixture: list[SourceConfig] = field(default_factory=list)  # several datasets or partitions, by weight
    mixture_batches: Literal["mixed", "one_source"] = "mixed"  # a step's lanes each from one source, or all of them
    tail: Literal["carry", "drop"] = "carry"  # an epoch's rows that fill no step: into the next, or left out

    def __post_init__(self) -> None:
        for side in ("query", "doc"):
            declared = {name: _feature(f"data.{side}.{name}", f) for name, f in getattr(self, side).items()}
            object.__setattr__(self, side, declared)


@dataclass(frozen=True)
class TextInputs:
    """The token ids that a text encoder is built for."""

    vocab_size: int
    pad_token_id: int
    max_tokens: int  # of its longest text


@dataclass(frozen=True)
class TextEncoderConfig(Component):
    """The keys of every text encoder.

    A type of text encoder is a subclass with keys of its own, registered in TEXT_ENCODERS.
    """

    type: str = MISSING  # bert, of transformers; or one from outside
    dropout: float = bounded(0.0, 0, below=1)  # inside the encoder, also in place of a pretrained folder's own

    def architecture(self, inputs: TextInputs) -> Any:
        """Return the values that the shapes of the weights depend on in addition to these keys, by default `inputs`.

        A model folder holds it: neither the dataset nor a pretrained folder is needed to build the encoder again.
        Raises ConfigError: a pretrained folder that does not fit.
        """
        return inputs

    def build(self, architecture: Any) -> nn.Module:
        """Return an encoder with new weights, a `models.encoders.TextEncoder`."""
        raise NotImplementedError

    def load_pretrained(self, encoder: nn.Module) -> None:
        """Load the weights that training begins with, where these are not new. Raises ConfigError: they do not load."""

    def write_architecture(self, architecture: Any, folder: Path) -> None:
        """Write an architecture into the file ARCHITECTURE_FILE of a new folder."""
        folder.mkdir(parents=True)
        (folder / ARCHITECTURE_FILE).write_text(json.dumps(asdict(architecture)), encoding="utf-8")

    def read_architecture(self, folder: Path) -> Any:
        """Return a written architecture. Raises any error: the file is damaged."""
        content = json.loads((folder / ARCHITECTURE_FILE).read_text(encoding="utf-8"))
        if not all(type(value) is int for value in content.values()):
            raise ValueError(f"{content} holds a value that is no integer")
        return TextInputs(**content)


ARCHITECTURE_FILE = "config.json"
TEXT_ENCODERS: Registry[TextEncoderConfig] = Registry("a text encoder", "type", home="bigdssm.models.declarations")


@dataclass(frozen=True)
class HistoryEncoderConfig(Component):
    """A transformer over the item vectors of a history: the keys of every kind of block, which is its layer.

    A kind of block is a subclass with keys of its own, registered in HISTORY_BLOCKS.
    """

    # It attends by softmax(q kᵀ / √W) v (`models.blocks.attend`), which kernels for packed histories compute.
    softmax_attention: ClassVar[bool] = True

    block: str = MISSING  # sasrec; gated, as in LiGR and eSASRec; hstu; or one from outside
    # Of an item: its distance from the newest (age), from the oldest (absolute), or of two from each other, as a bias
    # (relative) or as turns (rotary). Several queries of a row need another than age; hstu has relative alone.
    positions: Literal["age", "absolute", "relative", "rotary"] = "age"
    layers: int = bounded(1, 1, 1024)
    heads: int = bounded(2, 1, 1024)
    dropout: float = bounded(0.1, 0, below=1)
    item_dropout: float = bounded(0.1, 0, below=1)  # on the item vectors
    item_scale: bool = False  # item vectors times the root of their width, as in SASRec

    @property
    def allows_many_queries(self) -> bool:
        """Return whether one pass can give several queries of a row: an item's age is another to each of them."""
        return self.positions != "age"

    def build(self, dim: int) -> nn.Module:
        """Return a layer over vectors of width `dim`: a module called as `models.blocks.SasrecBlock` is."""
        raise NotImplementedError


HISTORY_BLOCKS: Registry[HistoryEncoderConfig] = Registry(
    "a sequence block", "block", home="bigdssm.models.declarations"
)


@dataclass(frozen=True)
class TowerConfig:
    """Encoders → concatenation → MLP → D-dim vector."""

    mlp: tuple[int, ...] = bounded((128,), 1, MAX_WIDTH)  # hidden widths; empty: one linear layer
    residual: str | None = None  # feature whose vector (width model.dim) skips the MLP and is added to its output
    dropout: float = bounded(0.0, 0, below=1)
    embedding_dim: int = bounded(32, 1, MAX_WIDTH)  # of every categorical feature
    numeric_dim: int = bounded(16, 1, MAX_WIDTH)
    vector_dim: int = bounded(64, 1, MAX_WIDTH)  # of every feature that is a vector already
    text: TextEncoderConfig = component(TEXT_ENCODERS, "bert")
    history: HistoryEncoderConfig = component(HISTORY_BLOCKS, "sasrec")


@dataclass(frozen=True)
class ModelConfig:
    """Two towers and the scorer S = alpha * <u, w> + beta."""

    dim: int = bounded(64, 1, MAX_WIDTH)
    score: Literal["dot", "cosine"] = "cosine"
    alpha_init: float = bounded(10.0, at_most=10_000, above=0)
    alpha_learned: bool = True
    # Part of the score everywhere: learned per document; one for all, which only `sigmoid` can learn; or none.
    beta: Literal["document", "scalar", "none"] = "document"
    beta_init: float = bounded(-10.0, -10_000, 10_000)  # of a scalar beta (SigLIP's)
    share_text: bool = False  # one text encoder for both towers
    query: TowerConfig = field(default_factory=TowerConfig)
    doc: TowerConfig = field(default_factory=TowerConfig)


@dataclass(frozen=True)
class EngineConfig:
    """How steps are computed; none of it changes what is learned."""

    zero_stage: int = bounded(1, 0, 3)
    # auto: bf16 on GPUs since Ampere and on processors with AMX or AVX512-BF16, else fp32; the same on all ranks.
    precision: Literal["auto", "fp32", "bf16", "bf16_pure"] = "auto"
    offload_optimizer: bool = False
    checkpoint_activations: bool = False  # transformer layers are computed again in the backward, not kept
    compile: bool = False  # transformer layers by torch.compile, once for all lengths; not with zero_stage=3
    # Gradient cache: tokens and vectors encoded at once per tower; 0 encodes all rows at once.
    chunk_tokens: int = bounded(0, 0, 2**40)
    # Of them kept for the backward, not encoded again; none: chunk_tokens.
    keep_graph_tokens: int | None = bounded(None, 0, 2**40)
    # Without a sign of life from a rank, or without progress, before the others stop.
    peer_timeout_s: float = bounded(300.0, 5, 1_000_000)
    # A checkpoint is written from a copy while the next steps run; false: they wait for it.
    async_checkpoints: bool = True
    # Columns of the score matrix held at once; none: chosen by the loss.
    loss_tile: int | None = bounded(None, 1, 2**31)


@dataclass(frozen=True)
class MiningConfig:
    """Where the hard negatives of a row come from: the ranks [first, last) of its own query's ranking."""

    first: int = bounded(10, 0, MAX_COUNT)
    last: int = bounded(200, 1, MAX_COUNT)
    # Leave out what scores above the query's own document less this much, in score units.
    margin: float | None = bounded(None, -1_000_000, 1_000_000)
    # Documents of a catalogue that are all scored; of more, by an approximate index, about an eighth.
    exact_up_to: int = bounded(1_000_000, 0, MAX_COUNT)
    # Mined again, by the weights of the moment, every so many steps; 0: once.
    every_steps: int = bounded(0, 0, MAX_COUNT)
    # Of bigdssm mine_negatives, by any model, or list_candidates: in place of all of the above.
    file: str | None = None
    # Leave out what a judge's score in the file puts above the query's own document less this much, in its units.
    teacher_margin: float | None = bounded(None, -1_000_000, 1_000_000)
    uniform: bool = False  # in place of mining: documents drawn uniformly from the catalogue, others in each epoch


@dataclass(frozen=True)
class NegativesConfig:
    """The documents that a query's own is compared with."""

    in_batch: bool = True  # the other documents of the global batch; true for losses over all columns, such as fps
    # All documents of the global batch, or all of the catalogue in every step, for losses over all columns.
    columns: Literal["batch", "catalogue"] = "batch"
    # Documents per step drawn uniformly from the catalogue, as extra columns, for losses over all columns.
    uniform: int = bounded(0, 0, MAX_ROWS)
    # Documents that are no negatives: batch: positives of the same query id, of any rank; user: and the items of its
    # sequence up to its latest row; past: exactly the items before the query; none: its own document alone; auto:
    # batch, and none with data.exclude_seen=false, where an earlier item may be the answer, or just not now.
    mask: Literal["auto", "batch", "user", "past", "none"] = "auto"
    hard: int = bounded(0, 0, 65_536)  # hard negatives per row
    mining: MiningConfig = field(default_factory=MiningConfig)


@dataclass(frozen=True)
class WarmStartConfig:
    """Where a new model's table of the items in histories begins: at what meets in them (training/warm_start.py)."""

    window: int = bounded(0, 0, 16)  # events apart that count, each by 1 / distance; 0: random numbers, as all tables
    length: float = bounded(0.6, at_most=1000, above=0)  # root mean square of the vectors


@dataclass(frozen=True)
class StageConfig:
    """One stage of training."""

    loss: LossConfig = component(LOSSES, "fps")
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    # auto: corrected where queries have histories and a softmax takes their documents for negatives, else none.
    sampling: SamplingConfig = component(SAMPLINGS, "auto")
    distillation: DistillationConfig | None = component(DISTILLATIONS, None)
    scorer: ScorerConfig | None = component(SCORERS, None)
    optimizer: OptimizerConfig = component(OPTIMIZERS, "adamw")
    rows_global: int = bounded(1024, 1, MAX_ROWS)
    epochs: float = bounded(1.0, 0, 100_000)
    steps: int = bounded(0, 0, MAX_COUNT)  # 0: as many as `epochs` says
    # Model folder or checkpoint (STAGE/checkpoints/step-…) to start from; sft: by default its pretraining's best.
    init: str | None = None
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    validate_every_steps: int = bounded(0, 0, MAX_COUNT)  # 0: once, at the end
    # The registered metric of validation that selects best/, and that patience and tuning go by; larger is better.
    validation_metric: str = "ndcg_at_10"
    rerank: int = bounded(50, 2, MAX_COUNT)  # of the towers' best documents, that validation has a cross_encoder rank
    # Decay of a moving average of the weights, which validation measures and best/ keeps; 0: the weights themselves.
    weight_average: float = bounded(0.0, 0, below=1)
    patience: int = bounded(0, 0, MAX_COUNT)  # stop after so many validations without a better one; 0: never
    save_every_steps: int = bounded(500, 0, MAX_COUNT)  # 0: not by steps
    save_every_minutes: float = bounded(0.0, 0, 1_000_000)  # since the last checkpoint; 0: not by time
    keep_checkpoints: int = bounded(2, 1, MAX_COUNT)
    log_every_steps: int = bounded(10, 1, MAX_COUNT)
    max_skipped_steps: int = bounded(5, 1, MAX_COUNT)  # non-finite steps in a row before the run stops


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes and what follows it."""

    dir: str = MISSING
    seed: int = bounded(0, 0, 2**32 - 1)
    trackers: tuple[str, ...] = ("tensorboard",)


@dataclass(frozen=True)
class DebugConfig:
    """Switches for looking closer."""

    log_row_ids: bool = False  # write each consumed step's row ids per rank into the run's folder


@dataclass(frozen=True)
class Config:
    """Everything about a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    pretrain: StageConfig = field(default_factory=StageConfig)
    sft: StageConfig | None = None
    debug: DebugConfig = field(default_factory=DebugConfig)

    def __post_init__(self) -> None:
        for name in ("pretrain", "sft"):
            stage: StageConfig | None = getattr(self, name)
            if stage is not None:
                object.__setattr__(self, name, _resolved(name, stage, self.data))

    def stage(self, name: StageName) -> StageConfig:
        """Return the stage `name`. Raises ConfigError where the file has no such section."""
        stage = self.pretrain if name == "pretrain" else self.sft
        if stage is None:
            raise ConfigError(f"the config has no section `{name}:`; add one (an empty one takes the defaults)")
        return stage

    def stage_dir(self, name: StageName) -> Path:
        """Return the folder that the stage `name` writes."""
        return Path(self.run.dir) / name

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved config as plain containers, for a YAML or JSON file."""
        content = asdict(self)
        for side in ("query", "doc"):
            features: dict[str, Feature] = getattr(self.data, side)
            content["data"][side] = {name: feature.declaration() for name, feature in features.items()}
        return cast(dict[str, Any], json.loads(json.dumps(content, default=_plain)))


def _plain(value: Any) -> Any:
    """Return what JSON has for a path, or for NumPy's number. Raises TypeError."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Number) and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r:.80} is no text, number, list or mapping")


def _resolved(name: str, stage: StageConfig, data: DataConfig) -> StageConfig:
    """Return a stage without `auto`. Raises ConfigError: a key of `sampling` is out of bounds."""
    for key, got, needed in out_of_bounds(stage.sampling, f"{name}.sampling"):
        raise ConfigError(f"{key}: got {got}, needs {needed}")
    if stage.negatives.mask == "auto":
        mask: Literal["batch", "none"] = "batch" if data.exclude_seen else "none"
        stage = replace(stage, negatives=replace(stage.negatives, mask=mask))
    return replace(stage, sampling=stage.sampling.resolve(stage, data))


def _feature(key: str, content: Any) -> Feature:
    return content if isinstance(content, Feature) else FEATURES.read(key, content)
