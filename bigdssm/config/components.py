"""The bases and registries of a stage's components; importable with the standard library alone.

`config` is a `Config`, `stage` a `StageConfig`, `data` a `DataConfig`, `model` a `ModelConfig`, of `keys`, above this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bigdssm.utils.bounds import bounded, require
from bigdssm.utils.components import MISSING, Component, Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

StageName = Literal["pretrain", "sft"]
MAX_WIDTH, MAX_ROWS, MAX_COUNT = 2**14, 2**20, 10**9  # of vectors, of a step's rows, of anything counted


class StageComponent(Component):
    """The base of components of a stage."""

    def check_in_stage(self, name: StageName, config: Any) -> None:
        """Raise ConfigError: this component of the stage `name` contradicts the rest of the config."""


@dataclass(frozen=True)
class LossConfig(StageComponent):
    """The keys of every loss. A loss is a subclass with keys of its own, registered in LOSSES."""

    all_columns: ClassVar[bool] = False  # over every column of the batch; else over in-batch and hard negatives
    relative: ClassVar[bool] = True  # depends on differences of a query's scores alone: a beta of all documents cancels
    softmax: ClassVar[bool] = False  # over sampled documents, whose popularity `sampling: auto` then corrects

    name: str = MISSING  # fps, softmax, pair_ce, triplet, sigmoid, or one from outside
    weight: Literal["indicator", "relevance"] = "indicator"  # of a row: 1[r>0], or r itself
    # Matryoshka: further widths, below model.dim, that vectors can be cut to.
    widths: tuple[int, ...] = bounded((), 1, MAX_WIDTH)
    # Times the mean squared norms of both towers' vectors, for model.score=dot.
    norm_penalty: float = bounded(0.0, 0, 1_000_000)

    @property
    def direction(self) -> str:
        """Return q2d (the documents of a query compete), d2q (the queries of a document), or both."""
        return "q2d"

    def build(self) -> Any:
        """Return the function of scores, a `losses.terms.Term`."""
        raise NotImplementedError


@dataclass(frozen=True)
class SamplingConfig(StageComponent):
    """A correction of the scores of documents that are columns of a batch because they are popular."""

    name: str = MISSING  # auto, none, classic, corrected, or one from outside

    def resolve(self, stage: Any, data: Any) -> SamplingConfig:
        """Return the correction of a stage, decided by its other keys where it is `auto`."""
        return self


@dataclass(frozen=True)
class FrequencyCorrection(SamplingConfig):
    """The keys of every correction by the frequencies of documents."""

    gamma: float = bounded(1.0, 0, 10)  # strength: 0 learns PMI, 1 learns p(doc|query)
    frequency: Literal["counts", "streaming"] = "counts"  # of the catalogue, or estimated from the batches
    # Streaming: several times the number of documents (96 bytes each).
    frequency_buckets: int = bounded(65536, 1, 2**26)

    def check_in_stage(self, name: StageName, config: Any) -> None:
        """Raise ConfigError unless documents of the batch are negatives."""
        negatives = config.stage(name).negatives
        require(negatives.in_batch, f"{name}.sampling.name", self.name, "in_batch=true: it corrects in-batch documents")

    def shares(self, correction: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the parts of the `correction`, −γ log c [n], for beta and for neg_bias; None where there is none."""
        raise NotImplementedError


@dataclass(frozen=True)
class DistillationConfig(StageComponent):
    """The keys of every distillation: a teacher's scores, learned in addition to the loss."""

    name: str = MISSING  # kl, margin_mse, batch_kl, or one from outside
    weight: float = bounded(1.0, at_most=1_000_000, above=0)  # its factor; that of the loss is 1
    temperature: float = bounded(1.0, at_most=1_000_000, above=0)  # divides the teacher's scores


@dataclass(frozen=True)
class ScorerConfig(StageComponent):
    """A score of pairs that replaces or extends the product of vectors; a stage `sft` trains it."""

    name: str = MISSING  # mlp or cross_encoder

    def build(self, model: Any, schema: Any, texts: Mapping[str, Any]) -> Any:
        """Return a new `models.Scorer` of a model with a `Schema` and its text architectures. Raises ConfigError."""
        raise NotImplementedError


@dataclass(frozen=True)
class OptimizerConfig(Component):
    """The keys of every optimizer; linear warm-up and a cosine to `final_lr_ratio`, by applied steps.

    A kind of optimizer is a subclass with keys of its own, registered in OPTIMIZERS.
    """

    whole_tensors: ClassVar[bool] = False  # it needs parameters as they are: ZeRO 1 to 3 would give it flat pieces

    name: str = MISSING  # adamw; muon, for matrices with AdamW for the rest (engine.zero_stage=0); or one from outside
    lr: float = bounded(1e-3, 0, 10)
    embedding_lr_ratio: float = bounded(1.0, 0, 1_000_000)  # learning rate of embedding tables over lr
    weight_decay: float = bounded(0.01, 0, 10)  # matrices only: not biases, norms, tables, alpha
    warmup_steps: int = bounded(100, 0, MAX_COUNT)  # at most half of the stage's steps are taken
    final_lr_ratio: float = bounded(0.0, 0, 1000)
    gradient_clipping: float = bounded(1.0, 0, MAX_COUNT)  # 0 turns it off

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return the optimizer of parameter groups, each with params, lr, weight_decay, `name` and `base_lr`."""
        raise NotImplementedError

    def state_of(self, group: str) -> tuple[str, ...]:
        """Return the names of the tensors that it keeps of a parameter in a group, each of the parameter's shape.

        Beside these it may keep one number, `step`. Checkpoints and estimates go by these names.
        """
        raise NotImplementedError


LOSSES: Registry[LossConfig] = Registry("a loss", "name", home="bigdssm.losses.declarations")
SAMPLINGS: Registry[SamplingConfig] = Registry("a sampling correction", "name", home="bigdssm.losses.declarations")
DISTILLATIONS: Registry[DistillationConfig] = Registry("a distillation", "name", home="bigdssm.losses.declarations")
SCORERS: Registry[ScorerConfig] = Registry("a scorer", "name", home="bigdssm.models.declarations")
OPTIMIZERS: Registry[OptimizerConfig] = Registry("an optimizer", "name", home="bigdssm.training.optimizers")
