"""Base classes and registries of a stage's components; imports the standard library only.

The arguments `config`, `stage`, `data` and `model` are a `Config`, `StageConfig`, `DataConfig` and `ModelConfig`. They
are annotated as Any, because their module, `keys`, imports this one.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bigdssm.utils.components import MISSING, Component, Registry, bounded, require

if TYPE_CHECKING:
    import torch
    from torch import Tensor

StageName = Literal["pretrain", "sft"]
STAGES: tuple[StageName, ...] = ("pretrain", "sft")
NEW_WEIGHTS_LR, PRETRAINED_LR = 1e-3, 5e-5  # defaults of learning rates
MAX_WIDTH, MAX_ROWS, MAX_COUNT = 2**14, 2**20, 10**9  # limits of vector widths, rows per step, and other counts


class StageComponent(Component):
    """Base class of the components of a stage."""

    def check_in_stage(self, name: StageName, config: Any) -> None:
        """Raise ConfigError: this component of the stage `name` conflicts with the rest of the config."""


@dataclass(frozen=True)
class LossConfig(StageComponent):
    """The keys of every loss. A loss is a subclass with additional keys, registered in LOSSES."""

    all_columns: ClassVar[bool] = False  # over every column of the batch; else over in-batch and hard negatives
    softmax: ClassVar[bool] = False  # over sampled documents: `sampling: auto` applies the logQ correction
    directions: ClassVar[tuple[str, ...]] = ("q2d",)

    name: str = MISSING  # fps, softmax, pair_ce, triplet, or a registered one
    weight: Literal["indicator", "relevance"] = "indicator"  # of a row: 1[r>0], or r itself
    # Matryoshka: further widths, below model.dim, that vectors can be truncated to. None: no further widths; in sft
    # those of the pretraining.
    widths: tuple[int, ...] | None = bounded(None, 1, MAX_WIDTH)
    # Positions with a learned bias of the pairs shown there, in the loss alone; later ones have the last. 0: none.
    position_bias: int = bounded(0, 0, 10_000)
    position_bias_lr: float = bounded(0.05, 0, 10)  # its learning rate, by Adam; follows the stage's schedule

    @property
    def direction(self) -> str:
        """Return q2d (softmax over the documents of a query), d2q (over the queries of a document), or both."""
        return "q2d"

    def check_in_stage(self, name: StageName, config: Any) -> None:
        """Raise ConfigError: a bias of positions with negatives that were not shown."""
        negatives = config.stage(name).negatives
        is_shown = not self.all_columns and not negatives.in_batch and negatives.hard and negatives.mining.file
        require(
            self.position_bias == 0 or bool(is_shown), f"{name}.loss.position_bias", self.position_bias,
            "0, or negatives that were shown: a loss other than fps, negatives.in_batch=false, negatives.hard and "
            "negatives.mining.file",
        )  # fmt: skip

    @abstractmethod
    def value_and_gradients(self, scores: Any) -> Any:
        """Return the values and their gradients by `scores` (`losses.terms.Scores`), a `losses.terms.TermResult`."""


@dataclass(frozen=True)
class SamplingConfig(StageComponent):
    """A correction of scores for the sampling of in-batch documents in proportion to their popularity (logQ)."""

    name: str = MISSING  # auto, none, corrected, or a registered one

    def resolve(self, stage: Any, data: Any) -> SamplingConfig:
        """Return the correction of a stage; `auto` depends on the stage's other keys."""
        return self


@dataclass(frozen=True)
class FrequencyCorrection(SamplingConfig):
    """The keys of every correction by document frequencies."""

    gamma: float = bounded(1.0, 0, 10)  # strength: 0 learns PMI, 1 learns p(doc|query)
    frequency: Literal["counts", "streaming"] = "counts"  # of the catalogue, or estimated from the batches
    # Streaming: hash buckets, several times the number of documents (96 bytes each).
    frequency_buckets: int = bounded(65536, 1, 2**26)

    def check_in_stage(self, name: StageName, config: Any) -> None:
        """Raise ConfigError unless there are in-batch negatives."""
        negatives = config.stage(name).negatives
        require(negatives.in_batch, f"{name}.sampling.name", self.name, "in_batch=true: it corrects in-batch documents")

    def shares(self, correction: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the parts of the `correction`, −γ log c [n], for beta and for neg_bias; None for no part."""
        raise NotImplementedError


@dataclass(frozen=True)
class DistillationConfig(StageComponent):
    """The keys of every distillation: a term for teacher scores, in addition to the loss."""

    name: str = MISSING  # kl, margin_mse, batch_kl, or a registered one
    weight: float = bounded(1.0, at_most=1_000_000, above=0)  # weight of the term; that of the loss is 1
    temperature: float = bounded(1.0, at_most=1_000_000, above=0)  # divides the teacher's scores


@dataclass(frozen=True)
class OptimizerConfig(Component):
    """The keys of every optimizer; linear warm-up and cosine decay to `final_lr_ratio`, by applied steps.

    A type of optimizer is a subclass with additional keys, registered in OPTIMIZERS.
    """

    whole_tensors: ClassVar[bool] = False  # requires unsharded parameters: ZeRO 1 to 3 provide flat partitions

    name: str = MISSING  # adamw, or a registered one
    # None: 1e-3, or 5e-5 with a pretrained text encoder (without adapters).
    lr: float | None = bounded(None, 0, 10, resume="segment")
    embedding_lr_ratio: float = bounded(1.0, 0, 1_000_000)  # learning rate of embedding tables over lr
    weight_decay: float = bounded(0.01, 0, 10)  # matrices only: not biases, norms, tables, alpha
    warmup_steps: int = bounded(100, 0, MAX_COUNT)  # limited to half of the stage's steps
    final_lr_ratio: float = bounded(0.0, 0, 1000)
    # Factor of this rate, and of `table_optimizer.lr`, where a stage continues a model of its kind on newer partitions
    # of the dataset. An `lr` on the command line is the rate itself: this factor is then 1.
    continue_lr_ratio: float = bounded(0.1, 0, 1000, resume="segment")
    gradient_clipping: float = bounded(1.0, 0, MAX_COUNT)  # 0: off

    @property
    def learning_rate(self) -> float:
        """Return `lr`, by default that of weights from scratch."""
        return NEW_WEIGHTS_LR if self.lr is None else self.lr

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimizer of parameter groups, each with params, lr, weight_decay, `name` and `base_lr`."""

    @abstractmethod
    def state_of(self, group: str) -> tuple[str, ...]:
        """Return the names of the state tensors per parameter of a group, each with the parameter's shape.

        In addition, the state may contain one number, `step`. Checkpoints and estimates use these names.
        """


@dataclass(frozen=True)
class TableOptimizerConfig(Component):
    """The keys of every optimizer of tables that are sharded by rows; the rate follows the stage's schedule.

    Gradients are clipped together with those of the other weights. A type of optimizer is a subclass with additional
    keys, registered in TABLE_OPTIMIZERS.
    """

    name: str = MISSING  # rowwise_adagrad, lazy_adam, or a registered one
    lr: float = bounded(0.05, 0, 1000, resume="segment")

    @abstractmethod
    def state_widths(self, dim: int) -> dict[str, int]:
        """Return the float32 numbers per row of width `dim`, by name of a state."""

    @abstractmethod
    def update(self, rows: Tensor, gradients: Tensor, states: dict[str, Tensor], lr: float, step: int) -> None:
        """Update float32 rows [n, dim] and their states [n, width] in place; `step` counts the applied steps from 0."""


LOSSES: Registry[LossConfig] = Registry("a loss", "name", LossConfig, home="bigdssm.losses.declarations")
SAMPLINGS: Registry[SamplingConfig] = Registry(
    "a sampling correction", "name", SamplingConfig, home="bigdssm.losses.declarations"
)
DISTILLATIONS: Registry[DistillationConfig] = Registry(
    "a distillation", "name", DistillationConfig, home="bigdssm.losses.declarations"
)
OPTIMIZERS: Registry[OptimizerConfig] = Registry(
    "an optimizer", "name", OptimizerConfig, home="bigdssm.training.optimizers"
)
TABLE_OPTIMIZERS: Registry[TableOptimizerConfig] = Registry(
    "a table optimizer", "name", TableOptimizerConfig, home="bigdssm.tables.optimizers"
)
