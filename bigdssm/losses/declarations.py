"""Config classes of losses, sampling corrections and distillations; they import torch on build.

S⁺ is the score of the positive, S⁻_j the scores of query i's negatives A_i:

    fps, softmax   log(1 + Σ_j∈A exp(S⁻_j − S⁺)); fps also over the queries in the positive's column, or their mean
    pair_ce        mean over A of −log σ(S⁺ − S⁻_j)
    triplet        mean over A of max(0, margin − S⁺ + S⁻_j)

A pairwise loss needs only its value (`PairLoss`), and may be declared in any module:

    @register_loss
    @dataclass(frozen=True)
    class Squared(PairLoss):
        name: str = "squared"
        def value(self, x): return (x + 1).relu().square()

Source: softmax and triplet, Karpukhin et al. 2020 and Schroff et al. 2015; pair_ce, Burges et al. 2005 (RankNet),
eq. 3.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from bigdssm.config.components import (
    DISTILLATIONS,
    LOSSES,
    SAMPLINGS,
    DistillationConfig,
    FrequencyCorrection,
    LossConfig,
    SamplingConfig,
    StageName,
)
from bigdssm.utils.components import MISSING, bounded, require

if TYPE_CHECKING:
    from torch import Tensor

    from bigdssm.config import Config, DataConfig, StageConfig
    from bigdssm.losses.terms import Scores, TermResult

register_loss = LOSSES.register
Class = TypeVar("Class", bound=type)


def register_sampling(cls: Class) -> Class:
    """Register a sampling correction, a subclass of FrequencyCorrection; a class decorator."""
    if not issubclass(cls, FrequencyCorrection):
        raise TypeError(f"{cls.__name__}: a sampling correction is a FrequencyCorrection")
    if cls.shares is FrequencyCorrection.shares and cls.resolve is FrequencyCorrection.resolve:
        raise TypeError(f"{cls.__name__} lacks the method shares, or resolve, of a sampling correction")
    return SAMPLINGS.register(cls)


def register_distillation(cls: Class) -> Class:
    """Register a distillation, a subclass of ListDistillation or BatchDistillation; a class decorator."""
    if not issubclass(cls, ListDistillation | BatchDistillation):
        raise TypeError(f"{cls.__name__}: a distillation is a ListDistillation or a BatchDistillation")
    return DISTILLATIONS.register(cls)


@dataclass(frozen=True)
class SoftmaxLoss(LossConfig):
    """The cross-entropy of the positive among its negatives."""

    softmax: ClassVar[bool] = True
    directions: ClassVar[tuple[str, ...]] = ("q2d", "d2q", "both")

    def value_and_gradients(self, scores: Scores) -> TermResult:
        """Return the values of the loss and their gradients by the scores; a collective."""
        from bigdssm.losses.terms import softmax_term

        return softmax_term(scores)


@register_loss
@dataclass(frozen=True)
class FPS(SoftmaxLoss):
    """The Full Product Softmax: the cross-entropy of the positive among all documents of the global batch."""

    all_columns: ClassVar[bool] = True

    name: str = "fps"
    direction: Literal["q2d", "d2q", "both"] = "q2d"  # softmax over documents, over queries, or the mean of both


@register_loss
@dataclass(frozen=True)
class Softmax(SoftmaxLoss):
    """The cross-entropy of the positive among in-batch and hard negatives."""

    name: str = "softmax"


@dataclass(frozen=True)
class PairLoss(LossConfig):
    """A pairwise loss, a function of x = S⁻ − S⁺.

    It is averaged over the query's negatives (0 without any), which are in-batch and hard ones; merged columns are not
    counted with multiplicity.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.all_columns:
            raise TypeError(f"{cls.__name__}: a PairLoss cannot use all columns; derive it from LossConfig")

    def value_and_gradients(self, scores: Scores) -> TermResult:
        """Return the values of the loss and their gradients by the scores; a collective."""
        from bigdssm.losses.terms import pair_term

        return pair_term(scores, self.value)

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """Return the loss, elementwise, differentiable by autograd; 0 with derivative 0 at −inf (no negative)."""


@register_loss
@dataclass(frozen=True)
class PairCE(PairLoss):
    """The pairwise logistic loss (RankNet)."""

    name: str = "pair_ce"

    def value(self, x: Tensor) -> Tensor:
        """Return log(1 + exp(x))."""
        from torch.nn.functional import softplus

        return softplus(x, threshold=40)  # above 40 the value is x to the last bit of float64; the default is 20


@register_loss
@dataclass(frozen=True)
class Triplet(PairLoss):
    """The pairwise hinge loss with a margin."""

    name: str = "triplet"
    margin: float = bounded(0.2, 0, 1_000_000)  # in score units

    def value(self, x: Tensor) -> Tensor:
        """Return max(0, x + margin)."""
        return (x + self.margin).relu()  # derivative 0 at the kink; clamp has 1 there, and takes 6 times as long


@SAMPLINGS.register
@dataclass(frozen=True)
class NoCorrection(SamplingConfig):
    """No correction: a softmax learns log p(d|q) − log q(d), with the document's share q(d) in the data."""

    name: str = "none"


@register_sampling
@dataclass(frozen=True)
class AutoCorrection(FrequencyCorrection):
    """`corrected` for a softmax over in-batch negatives with user histories, else `none`.

    Measured for recommendation, over time and over users (docs/sequences.md); there is no evidence for other data.
    """

    name: str = "auto"

    def resolve(self, stage: StageConfig, data: DataConfig) -> SamplingConfig:
        """Return the correction of the stage."""
        from bigdssm.features.history import histories_of

        negatives = stage.negatives
        samples = stage.loss.softmax and negatives.in_batch and negatives.columns == "batch"
        if samples and histories_of(data.query):
            return Corrected(gamma=self.gamma, frequency=self.frequency, frequency_buckets=self.frequency_buckets)
        return NoCorrection()


@register_sampling
@dataclass(frozen=True)
class Corrected(FrequencyCorrection):
    """−γ log c on negatives only: a positive is not sampled by chance. Source: arXiv 2507.09331."""

    name: str = "corrected"

    def shares(self, correction: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the correction as an addition to neg_bias."""
        return None, correction


@dataclass(frozen=True)
class ListDistillation(DistillationConfig):
    """A distillation of teacher scores of the positive and the hard negatives.

    Scores are read from negatives.mining.file.

    Shapes: m queries, l = 1 + k documents per query, the positive first.
    """

    @abstractmethod
    def value(self, S_ml: Tensor, T_ml: Tensor, valid_ml: Tensor) -> Tensor:
        """Return the loss [m] of student scores S and teacher scores T, both 0 where not `valid_ml`.

        Column 0, the positive, is always valid. Differentiable by autograd, with derivatives 0 where not `valid_ml`.
        """

    def value_and_gradients(self, scores: Scores) -> TermResult:
        """Return the values of the loss and their gradients by the scores."""
        from bigdssm.losses.terms import distillation_term

        return distillation_term(scores, self.value, self.temperature)

    def check_in_stage(self, name: StageName, config: Config) -> None:
        """Raise ConfigError unless hard negatives are read from a file with teacher scores."""
        negatives = config.stage(name).negatives
        condition, key = f"with {name}.distillation.name={self.name}", f"{name}.negatives"
        file = negatives.mining.file
        require(file is not None, f"{key}.mining.file", file, f"a file with a teacher's scores {condition}")
        require(negatives.hard > 0, f"{key}.hard", negatives.hard, f"at least 1 {condition}")


@dataclass(frozen=True)
class BatchDistillation(DistillationConfig):
    """A distillation of a teacher's vectors over the documents of the global batch."""

    teacher: str = MISSING  # output folder of bigdssm embed_teacher

    @abstractmethod
    def build(self) -> Any:
        """Return the loss, a function with the arguments of `losses.batch_kl`."""
        raise NotImplementedError

    def check_in_stage(self, name: StageName, config: Config) -> None:
        """Raise ConfigError unless the columns are catalogue documents, which have teacher vectors."""
        data, stage = config.data, config.stage(name)
        for where, got, only in (
            (f"{name}.negatives.columns", stage.negatives.columns, "batch"),
            ("data.webdataset", data.webdataset, None),
            ("data.from_partition", data.from_partition, None),
            ("data.mixture", list(data.mixture), []),
        ):
            require(got == only, where, got, f"{only} with {name}.distillation.name={self.name}")


@register_distillation
@dataclass(frozen=True)
class ListwiseKL(ListDistillation):
    """KL divergence from the teacher's softmax over the scored documents to the student's."""

    name: str = "kl"

    def value(self, S_ml: Tensor, T_ml: Tensor, valid_ml: Tensor) -> Tensor:
        """Return the loss [m]."""
        log_p, log_q = _log_softmax(T_ml, valid_ml), _log_softmax(S_ml, valid_ml)
        return (log_p.exp() * (log_p - log_q).masked_fill(~valid_ml, 0.0)).sum(1)


@register_distillation
@dataclass(frozen=True)
class MarginMSE(ListDistillation):
    """Squared error of the margins between the positive and the other documents."""

    name: str = "margin_mse"

    def value(self, S_ml: Tensor, T_ml: Tensor, valid_ml: Tensor) -> Tensor:
        """Return the loss [m]."""
        excess_ml = S_ml - T_ml
        error_mk = (excess_ml[:, :1] - excess_ml[:, 1:]).masked_fill(~valid_ml[:, 1:], 0.0)
        return error_mk.square().sum(1) / valid_ml[:, 1:].sum(1).clamp(min=1)


@register_distillation
@dataclass(frozen=True)
class BatchKL(BatchDistillation):
    """KL divergence from the softmax of a teacher's vectors over the documents of the global batch."""

    name: str = "batch_kl"

    def build(self) -> Any:
        """Return `batch_kl`."""
        from bigdssm.losses.distillation import batch_kl

        return batch_kl


def _log_softmax(x_ml: Tensor, valid_ml: Tensor) -> Tensor:
    return x_ml.masked_fill(~valid_ml, -math.inf).log_softmax(1)
