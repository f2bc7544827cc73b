"""The one configuration of a run: frozen dataclasses, read from YAML and `key=value` overrides, checked as a whole.

A YAML file has the sections `run`, `data`, `model`, `engine`, `pretrain` and (optionally) `sft`. Unknown keys are
rejected with the nearest name; every message names the dotted key, what it got and what it needs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from bigdssm.errors import ConfigError
from bigdssm.loss_options import LOSSES

FeatureType = Literal["text", "categorical", "numeric", "history"]
StageName = Literal["pretrain", "sft"]
DEFAULT_CACHE_BYTES = 50 * 1024**3


@dataclass(frozen=True)
class FeatureConfig:
    """One feature of a query or a document, as declared; `schema.Feature` is the same, fitted to a dataset."""

    type: FeatureType = MISSING
    column: str | None = None  # column of the source table; the feature's own name by default
    max_tokens: int = 64  # text: longer texts are cut, newest history items and first tokens stay
    multi: bool = False  # categorical: several values in one cell, or a list
    separator: str = " "  # categorical, multi: what parts the values in a cell
    min_count: int = 1  # categorical: rarer values become out-of-vocabulary
    hash_buckets: int = 0  # categorical: 0 keeps an exact vocabulary, else values are hashed into this many
    log: bool = False  # numeric: log1p before the normalisation, for heavy tails
    of: str | None = None  # history: the categorical document feature that stands for an item
    max_items: int = 50  # history: the newest so many items


@dataclass(frozen=True)
class TokenizerConfig:
    """Where token ids come from."""

    path: str | None = None  # folder of a Hugging Face tokenizer; none: WordPiece is trained on the dataset's texts
    vocab_size: int = 8000  # of a trained one
    lowercase: bool = True


@dataclass(frozen=True)
class SourceConfig:
    """One part of a mixture: a dataset, or some of its partitions."""

    dir: str | None = None  # none: data.dir
    partitions: tuple[str, ...] = ()  # empty: all of its partitions
    weight: float = 1.0  # share of the rows, over the sum of all weights; kept to a thousandth


@dataclass(frozen=True)
class DataConfig:
    """The dataset and its schema."""

    dir: str = MISSING
    query: dict[str, FeatureConfig] = field(default_factory=dict)
    doc: dict[str, FeatureConfig] = field(default_factory=dict)
    display: str | None = None  # column of the document table shown to people; the document id by default
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    lanes: int = 8  # fixed order lanes; divides rows_global, at least the world size
    num_workers: int = 1  # loader processes per rank
    max_bad_fraction: float = 0.001  # of the rows met; past it the run stops
    cache_dir: str | None = None  # where a dataset at a URL is cached; none: bigdssm/ in the user's cache folder
    cache_bytes: int = DEFAULT_CACHE_BYTES  # most that all files in it take
    from_partition: str | None = None  # train on the dataset's partitions from this one on; none: on all of them
    webdataset: str | None = None  # train on these plain shards (path with {000..009}), `dir` giving all but train rows
    mixture: list[SourceConfig] = field(default_factory=list)  # several datasets or partitions, by weight
    mixture_batches: Literal["mixed", "one_source"] = "mixed"  # a step's lanes each from one source, or all of them
    tail: Literal["carry", "drop"] = "carry"  # an epoch's rows that fill no step: into the next, or left out


@dataclass(frozen=True)
class TextEncoderConfig:
    """A BERT: from a pretrained folder, or small and from scratch."""

    init: str | None = None  # folder of a Hugging Face model; layers, hidden and heads are then the folder's
    keep_layers: int = 0  # with init: the first so many of its layers, for a lighter tower; 0: all
    layers: int = 2
    hidden: int = 128
    heads: int = 2
    dropout: float = 0.0  # inside the BERT, also in place of a pretrained folder's own
    pooling: Literal["mean", "cls"] = "mean"


@dataclass(frozen=True)
class HistoryEncoderConfig:
    """A transformer over the item vectors of a history."""

    layers: int = 1
    heads: int = 2
    feedforward: int = 2  # width of the feed-forward layer over the item vectors' width
    dropout: float = 0.1
    item_dropout: float = 0.1  # on the item vectors


@dataclass(frozen=True)
class TowerConfig:
    """Encoders → concatenation → MLP → D-dim vector."""

    mlp: tuple[int, ...] = (128,)  # hidden widths; empty: one linear layer
    residual: str | None = None  # feature whose vector (width model.dim) skips the MLP and is added to its output
    dropout: float = 0.0
    embedding_dim: int = 32  # of every categorical feature
    numeric_dim: int = 16
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    history: HistoryEncoderConfig = field(default_factory=HistoryEncoderConfig)


@dataclass(frozen=True)
class ModelConfig:
    """Two towers and the scorer S = alpha * <u, w> + beta."""

    dim: int = 64
    score: Literal["dot", "cosine"] = "cosine"
    alpha_init: float = 10.0
    alpha_learned: bool = True
    # Part of the score everywhere: learned per document; one for all, which only `sigmoid` can learn; or none.
    beta: Literal["document", "scalar", "none"] = "document"
    beta_init: float = -10.0  # of a scalar beta (SigLIP's)
    share_text: bool = False  # one text encoder for both towers
    query: TowerConfig = field(default_factory=TowerConfig)
    doc: TowerConfig = field(default_factory=TowerConfig)


@dataclass(frozen=True)
class EngineConfig:
    """How steps are computed; none of it changes what is learned."""

    zero_stage: int = 1
    precision: Literal["fp32", "bf16", "bf16_pure"] = "fp32"
    offload_optimizer: bool = False
    checkpoint_activations: bool = False  # transformer layers are computed again in the backward, not kept
    chunk_tokens: int = 0  # gradient cache: tokens encoded at once per tower; 0 encodes all rows at once
    keep_graph_tokens: int | None = None  # of them kept for the backward, not encoded again; none: chunk_tokens
    peer_timeout_s: float = 300.0  # without a sign of life from a rank, or without progress, before the others stop
    loss_tile: int | None = None  # columns of the score matrix held at once; none: chosen by the loss


@dataclass(frozen=True)
class LossConfig:
    """Which loss, over which negatives."""

    name: str = "fps"  # or softmax, pair_ce, triplet, sigmoid, or one that losses.register was given
    direction: Literal["q2d", "d2q", "both"] = "q2d"
    weight: Literal["indicator", "relevance"] = "indicator"  # 1[r>0], or r itself
    sampling: Literal["none", "classic", "corrected"] = "none"  # correction for popular in-batch documents
    gamma: float = 1.0  # its strength: 0 learns PMI, 1 learns p(doc|query)
    frequency: Literal["counts", "streaming"] = (
        "counts"  # what it knows of them: the catalogue's counts, or the batches
    )
    frequency_buckets: int = 65536  # streaming: several times the number of documents (96 bytes each)
    negatives: int = 0  # mined negatives per row
    uniform_negatives: int = 0  # documents per step drawn uniformly from the catalogue, as extra columns
    in_batch: bool = True  # SFT losses: the other documents of the global batch are negatives too
    mask_history: bool = False  # what a row's sequence holds before it is no negative, as at serving time
    margin: float = 0.2  # triplet
    widths: tuple[int, ...] = ()  # Matryoshka: further widths, below model.dim, that vectors can be cut to
    # Hidden widths of an MLP on [u, w, u * w] that scores in place of the product: a comparison, which has no index.
    mlp: tuple[int, ...] = ()
    norm_penalty: float = 0.0  # times the mean squared norms of both towers' vectors, for model.score=dot


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and a cosine to `final_lr_ratio`; the schedule counts applied steps."""

    lr: float = 1e-3
    embedding_lr_ratio: float = 1.0  # learning rate of embedding tables over lr
    weight_decay: float = 0.01  # matrices only: not biases, norms, tables, alpha
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    warmup_steps: int = 100
    final_lr_ratio: float = 0.0
    gradient_clipping: float = 1.0  # 0 turns it off


@dataclass(frozen=True)
class MiningConfig:
    """Where the mined negatives of a row come from: the ranks [first, last) of its own query's ranking."""

    first: int = 10
    last: int = 200
    margin: float | None = None  # leave out what scores above the row's own document less this much, in score units
    file: str | None = None  # of tools/mine_negatives.py, by any model: in place of all of the above


@dataclass(frozen=True)
class StageConfig:
    """One stage of training."""

    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rows_global: int = 1024
    epochs: float = 1.0
    steps: int = 0  # 0: as many as `epochs` says
    # Model folder or checkpoint (STAGE/checkpoints/step-…) to start from; sft: by default its pretraining's best.
    init: str | None = None
    mining: MiningConfig = field(default_factory=MiningConfig)
    validate_every_steps: int = 0  # 0: once, at the end
    patience: int = 0  # stop after so many validations without a better one; 0: never
    save_every_steps: int = 500  # 0: not by steps
    save_every_minutes: float = 0.0  # since the last checkpoint; 0: not by time
    keep_checkpoints: int = 2
    log_every_steps: int = 10
    max_skipped_steps: int = 5  # non-finite steps in a row before the run stops


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes and what follows it."""

    dir: str = MISSING
    seed: int = 0
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
        return cast(dict[str, Any], json.loads(json.dumps(asdict(self))))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the checked Config of the YAML file `path` with `key=value` overrides (dotted keys, YAML values).

    Raises ConfigError: missing file, YAML that does not parse, unknown or missing keys, wrong types, or values that
    do not go together.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; --config takes a YAML file such as those in configs/")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form key=value, for example pretrain.steps=100")
    try:
        content = OmegaConf.load(path)
        merged = OmegaConf.merge(OmegaConf.structured(Config), content, OmegaConf.from_dotlist(list(overrides)))
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(f"{path}: required key {missing[0]} is missing; give it a value")
        config = cast(Config, OmegaConf.to_object(merged))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except ConfigKeyError as error:
        raise ConfigError(f"{path}: unknown key {error.full_key}: {_first_line(error)}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key or 'config'}: {_first_line(error)}") from None
    check_config(config)
    return config


def check_config(config: Config) -> None:
    """Raise ConfigError with one sentence on the first thing in `config` that cannot work."""
    data, engine = config.data, config.engine
    _require(bool(data.query), "data.query", "no features", "at least one feature")
    _require(bool(data.doc), "data.doc", "no features", "at least one feature")
    _require(0 <= config.run.seed < 2**32, "run.seed", config.run.seed, "0 to 2^32 - 1")
    _require(data.lanes >= 1, "data.lanes", data.lanes, "at least 1")
    _require(data.num_workers >= 0, "data.num_workers", data.num_workers, "at least 0")
    _require(data.cache_bytes >= 1, "data.cache_bytes", data.cache_bytes, "at least 1")
    _check_mixture(data)
    _require(engine.zero_stage in (0, 1, 2, 3), "engine.zero_stage", engine.zero_stage, "0, 1, 2 or 3")
    _require(engine.chunk_tokens >= 0, "engine.chunk_tokens", engine.chunk_tokens, "at least 0")
    kept = engine.keep_graph_tokens
    _require(kept is None or kept >= 0, "engine.keep_graph_tokens", kept, "at least 0")
    shards_optimizer = engine.zero_stage > 0
    for key, needs_it in (
        ("engine.offload_optimizer=true", engine.offload_optimizer),
        ("engine.precision=bf16_pure", engine.precision == "bf16_pure"),
    ):
        _require(shards_optimizer or not needs_it, "engine.zero_stage", 0, f"1, 2 or 3 with {key}")
    _require(engine.peer_timeout_s >= 5, "engine.peer_timeout_s", engine.peer_timeout_s, "at least 5")
    _require(config.model.alpha_init > 0, "model.alpha_init", config.model.alpha_init, "a number above 0")
    for side, tower in (("query", config.model.query), ("doc", config.model.doc)):
        _check_text(f"model.{side}.text", tower.text)
    for side, features in (("query", data.query), ("doc", data.doc)):
        for name, feature in features.items():
            _check_feature(f"data.{side}.{name}", side, feature, data)
    stages: dict[str, StageConfig | None] = {"pretrain": config.pretrain, "sft": config.sft}
    for name, stage in stages.items():
        if stage is not None:
            _check_stage(name, stage, data.lanes)
            _check_optimizer(f"{name}.optimizer", stage.optimizer)
            _check_loss(f"{name}.loss", stage.loss, config.model, engine.chunk_tokens)
            parts = data.from_partition is not None or bool(data.mixture)
            _require(
                stage.mining.file is None or not parts, f"{name}.mining.file", stage.mining.file,
                "no data.from_partition or data.mixture, which number the rows otherwise",
            )  # fmt: skip
    if config.model.beta == "scalar":
        fits = any(stage is not None and not LOSSES[stage.loss.name].relative for stage in stages.values())
        _require(fits, "model.beta", "scalar", "document or none without a sigmoid loss: in all others it cancels")


def first_difference(before: Any, now: Any, key: str = "") -> str | None:
    """Return `dotted.key was …, is …` for the first place in which two plain config containers differ, or None."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return None if before == now else f"{key} was {before}, is {now}"
    for name in {**before, **now}:
        found = first_difference(before.get(name), now.get(name), f"{key}.{name}" if key else name)
        if found:
            return found
    return None


def _check_mixture(data: DataConfig) -> None:
    for number, source in enumerate(data.mixture):
        weight = source.weight
        _require(0 < weight < float("inf"), f"data.mixture[{number}].weight", weight, "a finite number above 0")
    both = bool(data.mixture) and data.from_partition is not None
    plain = data.webdataset is not None
    _require(not plain or not data.mixture, "data.webdataset", data.webdataset, "no mixture beside it")
    _require(
        not both, "data.from_partition", data.from_partition, "no mixture beside it; name partitions in the mixture"
    )


def _check_feature(key: str, side: str, feature: FeatureConfig, data: DataConfig) -> None:
    if feature.type != "history":
        return
    _require(side == "query", key, "type=history on a document", "a query feature")
    of = data.doc.get(feature.of or "")
    known = [name for name, doc in data.doc.items() if doc.type == "categorical" and not doc.multi]
    fits = of is not None and of.type == "categorical" and not of.multi
    _require(fits, f"{key}.of", feature.of, f"a single-valued categorical document feature, one of {known}")
    _require(feature.max_items >= 1, f"{key}.max_items", feature.max_items, "at least 1")


def _check_text(key: str, text: TextEncoderConfig) -> None:
    _require(0 <= text.dropout < 1, f"{key}.dropout", text.dropout, "at least 0 and below 1")
    _require(text.keep_layers >= 0, f"{key}.keep_layers", text.keep_layers, "at least 0")
    _require(
        text.init is not None or text.keep_layers == 0, f"{key}.keep_layers", text.keep_layers,
        "an init folder to keep them of; without one `layers` says how many there are",
    )  # fmt: skip


def _check_stage(name: str, stage: StageConfig, lanes: int) -> None:
    rows = stage.rows_global
    if rows < 1 or rows % lanes:
        below, above = max(0, rows // lanes) * lanes, (max(0, rows // lanes) + 1) * lanes
        fix = f"use {below} or {above}" if below else f"use {above}"
        raise ConfigError(f"{name}.rows_global={rows} must be divisible by data.lanes={lanes}; {fix}")
    _require(stage.steps > 0 or stage.epochs > 0, f"{name}.epochs", stage.epochs, "above 0 where steps is 0")
    least = {
        "steps": 0, "save_every_steps": 0, "save_every_minutes": 0, "validate_every_steps": 0, "patience": 0,
        "keep_checkpoints": 1, "log_every_steps": 1, "max_skipped_steps": 1,
    }  # fmt: skip
    for key, number in least.items():
        _require(getattr(stage, key) >= number, f"{name}.{key}", getattr(stage, key), f"at least {number}")
    mining = stage.mining
    _require(0 <= mining.first < mining.last, f"{name}.mining", f"[{mining.first}, {mining.last})", "first < last")
    if mining.file is None:
        room, negatives = mining.last - mining.first, stage.loss.negatives
        _require(negatives <= room, f"{name}.loss.negatives", negatives, f"at most the mining window's {room}")


def _check_optimizer(key: str, optimizer: OptimizerConfig) -> None:
    _require(optimizer.lr >= 0, f"{key}.lr", optimizer.lr, "at least 0")
    _require(optimizer.eps > 0, f"{key}.eps", optimizer.eps, "a number above 0")
    _require(all(0 <= beta < 1 for beta in optimizer.betas), f"{key}.betas", list(optimizer.betas), "[0, 1) for both")
    for name in ("embedding_lr_ratio", "weight_decay", "warmup_steps", "final_lr_ratio", "gradient_clipping"):
        _require(getattr(optimizer, name) >= 0, f"{key}.{name}", getattr(optimizer, name), "at least 0")


def _check_loss(key: str, loss: LossConfig, model: ModelConfig, chunk_tokens: int) -> None:
    _require(loss.name in LOSSES, f"{key}.name", loss.name, f"one of {', '.join(map(repr, LOSSES))}")
    options = LOSSES[loss.name]
    over_all, directions = options.all_columns, options.directions
    _require(loss.in_batch or not over_all, f"{key}.in_batch", False, f"true for {loss.name}, over the whole batch")
    mined_or_batch = loss.in_batch or loss.negatives > 0
    _require(mined_or_batch, f"{key}.negatives", loss.negatives, "at least 1 where in_batch is false")
    fit = loss.direction in directions
    _require(fit, f"{key}.direction", loss.direction, f"{' or '.join(directions)}: {loss.name} has no other")
    uniform = loss.uniform_negatives
    _require(over_all or uniform == 0, f"{key}.uniform_negatives", uniform, f"0: {loss.name} takes no extra columns")
    if loss.sampling == "none":
        _require(loss.frequency == "counts", f"{key}.frequency", loss.frequency, "sampling=classic or corrected")
    else:
        _require(loss.in_batch, f"{key}.sampling", loss.sampling, "in_batch=true: it corrects in-batch documents")
    buckets = loss.frequency_buckets
    _require(buckets >= 1, f"{key}.frequency_buckets", buckets, "several times the number of documents")
    widths = loss.widths
    fit = len(set(widths)) == len(widths) and all(0 < width < model.dim for width in widths)
    _require(fit, f"{key}.widths", list(widths), f"distinct numbers from 1 to {model.dim - 1}, below model.dim")
    _require(loss.norm_penalty >= 0, f"{key}.norm_penalty", loss.norm_penalty, "a number not below 0")
    if model.score == "cosine":
        _require(loss.norm_penalty == 0, f"{key}.norm_penalty", loss.norm_penalty, "0: model.score=cosine has norms 1")
    if loss.mlp:
        given = "name other than fps, in_batch=false and negatives: it scores documents given for each query"
        _require(not over_all and not loss.in_batch, f"{key}.mlp", list(loss.mlp), given)
        _require(key == "sft.loss", f"{key}.mlp", list(loss.mlp), "the stage sft: mining needs a model that can search")
        _require(chunk_tokens == 0, f"{key}.mlp", list(loss.mlp), "engine.chunk_tokens=0: it sees both towers at once")
        _require(not loss.widths, f"{key}.mlp", list(loss.mlp), "widths=[]: it takes vectors whole")
        _require(min(loss.mlp) >= 1, f"{key}.mlp", list(loss.mlp), "widths of at least 1")
    elif not options.relative:
        _require(model.beta == "scalar", "model.beta", model.beta, f"scalar where {key}.name is {loss.name}")


def _require(holds: bool, key: str, got: object, needed: str) -> None:
    if not holds:
        raise ConfigError(f"{key}: got {got}, needs {needed}")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
