"""What scores pairs beside the product: an MLP on both vectors here, a BERT on both texts in cross_encoder.py.

An index cannot serve such a score: it ranks what the product of the towers' vectors has found.

Shapes: D vector width, … leading dimensions of queries and documents, which broadcast against each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig

from bigdssm.config import ModelConfig, ScorerConfig
from bigdssm.schema import Schema

PREFIX = "scorer."  # of its weights in a whole model

Build = Callable[[ScorerConfig, ModelConfig, Schema, Mapping[str, PretrainedConfig]], "Scorer"]
SCORERS: dict[str, Build] = {}


class Scorer(nn.Module, ABC):
    """Scores of pairs."""

    takes_vectors: ClassVar[bool]  # those of the towers, which learn with it; else features, and the towers stay

    @staticmethod
    def named(whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return its weights in the state of a whole model, where it is called `scorer`, by their names there."""
        return {name: tensor for name, tensor in whole.items() if name.startswith(PREFIX)}

    @abstractmethod
    def begin(self, texts: Mapping[str, nn.Module]) -> None:
        """Take what a new one starts from of the model's trained text encoders, by name."""


class MlpScorer(Scorer):
    """An MLP on [u, w, u * w]; `hidden` are its hidden layers' widths, at least one. Source: He et al. 2017, eq. 11."""

    takes_vectors = True

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.widths = dim, tuple(hidden)
        # The first layer in three parts: a query's and a document's are computed once for all pairs that they are in.
        self.of_query = nn.Linear(dim, hidden[0])
        self.of_doc = nn.Linear(dim, hidden[0], bias=False)
        self.of_product = nn.Linear(dim, hidden[0], bias=False)
        layers: list[nn.Module] = [nn.GELU()]
        for width, following in zip(hidden, [*hidden[1:], 1], strict=True):
            layers += [nn.Linear(width, following), nn.GELU()]
        self.rest = nn.Sequential(*layers[:-1])

    @classmethod
    def build(
        cls, scorer: ScorerConfig, config: ModelConfig, schema: Schema, texts: Mapping[str, PretrainedConfig]
    ) -> MlpScorer:
        """Return a new one for a model."""
        return cls(config.dim, scorer.hidden)

    def begin(self, texts: Mapping[str, nn.Module]) -> None:
        """Take nothing: it starts as it was drawn."""

    def copy(self, whole: Mapping[str, Tensor]) -> MlpScorer:
        """Return a copy with the weights that it has in the state of a whole model."""
        scorer = MlpScorer(*self.widths)
        scorer.load_state_dict({name.removeprefix(PREFIX): t for name, t in self.named(whole).items()})
        return scorer

    def forward(self, u: Tensor, w: Tensor) -> Tensor:
        """Return the scores […] of queries and documents […, D]."""
        scores: Tensor = self.rest(self.of_query(u) + self.of_doc(w) + self.of_product(u * w))
        return scores.squeeze(-1)


SCORERS["mlp"] = MlpScorer.build
