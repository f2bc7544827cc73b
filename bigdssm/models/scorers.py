"""Scorers that replace or extend the inner product: an MLP over both vectors, a cross-encoder over both texts."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bigdssm.config import ModelConfig
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError
from bigdssm.features import texts_of
from bigdssm.features.text import NO_TOKEN
from bigdssm.models.encoders.base import SideSize, linear_flops
from bigdssm.models.encoders.text import text_configs, text_keys
from bigdssm.models.packed import Values

if TYPE_CHECKING:
    from bigdssm.models.encoders.transformer import TransformerEncoder

PREFIX = "scorer."  # of its weights in a model's state
POSITIONS = "embeddings.position_embeddings.weight"


class Scorer(nn.Module, ABC):
    """Base class of scorers of pairs: a `VectorScorer` or a `FeatureScorer`."""

    @staticmethod
    def weights_in(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the scorer's weights in a model's state, by their full names."""
        return {name: tensor for name, tensor in state.items() if name.startswith(PREFIX)}

    @abstractmethod
    def initialize(self, text_encoders: Mapping[str, nn.Module]) -> None:
        """Initialize a new scorer from the model's trained text encoders, by name."""


class VectorScorer(Scorer):
    """Scores the vectors of both towers in place of their inner product; the towers are trained with it."""

    def initialize(self, text_encoders: Mapping[str, nn.Module]) -> None:
        """Keep the random initialization."""

    @abstractmethod
    def new(self) -> VectorScorer:
        """Return a scorer of the same architecture, with other weights."""

    def copy(self, state: Mapping[str, Tensor]) -> VectorScorer:
        """Return a copy with the scorer's weights in a model's state."""
        scorer = self.new()
        scorer.load_state_dict({name.removeprefix(PREFIX): t for name, t in self.weights_in(state).items()})
        return scorer

    @abstractmethod
    def forward(self, u: Tensor, w: Tensor) -> Tensor:
        """Return the scores […] of queries and documents […, D]."""


class FeatureScorer(Scorer):
    """A term from the features of both sides, added to the product of the towers, which are frozen.

    `features`: names of the features that it reads, by side.
    """

    features: dict[str, list[str]]

    @abstractmethod
    def forward(self, query: Mapping[str, Values], doc: Mapping[str, Values]) -> Tensor:
        """Return the term [p] to add to the products of pairs (row i of both sides); lists are [p, T]."""

    @abstractmethod
    def flops(self, length_p: np.ndarray) -> float:
        """Return the operations of a forward's matrix products over pairs of `length_p` tokens."""


class MlpScorer(VectorScorer):
    """An MLP on [u, w, u * w]; `hidden`: widths of the hidden layers, at least one. Source: He et al. 2017, eq. 11."""

    def __init__(self, dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.widths = dim, tuple(hidden)
        # The first layer in three parts: those of a query and a document are computed once for all their pairs.
        self.of_query = nn.Linear(dim, hidden[0])
        self.of_doc = nn.Linear(dim, hidden[0], bias=False)
        self.of_product = nn.Linear(dim, hidden[0], bias=False)
        layers: list[nn.Module] = [nn.GELU()]
        for width, following in zip(hidden, [*hidden[1:], 1], strict=True):
            layers += [nn.Linear(width, following), nn.GELU()]
        self.rest = nn.Sequential(*layers[:-1])

    def new(self) -> MlpScorer:
        """Return a scorer of the same widths."""
        return MlpScorer(*self.widths)

    def forward(self, u: Tensor, w: Tensor) -> Tensor:
        """Return the scores […] of queries and documents […, D]."""
        scores: Tensor = self.rest(self.of_query(u) + self.of_doc(w) + self.of_product(u * w))
        return scores.squeeze(-1)


class CrossEncoder(FeatureScorer):
    """A text encoder over pairs, pooled as the tower's, and one linear layer. Source: Nogueira and Cho 2019."""

    def __init__(self, text: TransformerEncoder, key: str, query: list[str], doc: list[str]) -> None:
        """`key`: the model's text encoder to start from; `query`, `doc`: the text features of the sides."""
        super().__init__()
        self.text, self.key, self.features = text, key, {"query": query, "doc": doc}
        self.head = nn.Linear(text.dim, 1, bias=False)  # a bias common to all documents has no gradient in a softmax
        nn.init.zeros_(self.head.weight)  # training starts from the towers' ranking

    @classmethod
    def build(cls, config: ModelConfig, schema: Schema, texts: Mapping[str, Any]) -> CrossEncoder:
        """Return a new cross-encoder for a model. Raises ConfigError: a side without text, or no BERT."""
        from transformers import BertConfig

        from bigdssm.models.encoders.transformer import TransformerEncoder

        texts_of_side = {side: texts_of(features) for side, features in schema.sides.items()}
        for side, features in texts_of_side.items():
            if not features:
                raise ConfigError(f"sft.scorer.name=cross_encoder: data.{side} has no text feature, needs at least one")
        key = text_keys(config, schema)["doc"]
        architecture, text_config = copy.deepcopy(texts[key]), text_configs(config, schema)[key]
        if not isinstance(architecture, BertConfig) or architecture.type_vocab_size < 2:
            kind = f"{text_config.type} ({type(architecture).__name__})"
            raise ConfigError(
                f"sft.scorer.name=cross_encoder: got a text encoder {kind}, needs a BERT with 2 token types"
            )
        architecture.bigdssm["lora"] = None  # all its weights are trained
        longest = sum(feature.max_tokens for features in texts_of_side.values() for feature in features.values())
        architecture.max_position_embeddings = max(architecture.max_position_embeddings, longest)
        text = text_config.build(architecture)
        assert isinstance(text, TransformerEncoder)
        return cls(text, key, list(texts_of_side["query"]), list(texts_of_side["doc"]))

    def initialize(self, text_encoders: Mapping[str, nn.Module]) -> None:
        """Load the weights of the text encoder `key`; positions beyond its last one repeat from the first."""
        from bigdssm.models.encoders.lora import merged_state

        trained: Any = text_encoders[self.key]
        state = merged_state(trained.transformer)
        positions, required = len(state[POSITIONS]), self.text.transformer.config.max_position_embeddings
        state[POSITIONS] = state[POSITIONS][torch.arange(required) % positions]
        self.text.transformer.load_state_dict(state)

    def forward(self, query: Mapping[str, Values], doc: Mapping[str, Values]) -> Tensor:
        """Return the term [p] to add to the products of pairs (row i of both sides); texts are [p, T]."""
        parts = [(query[name], 0) for name in self.features["query"]]
        parts += [(doc[name], 1) for name in self.features["doc"]]
        tokens, types = join_texts(parts)
        scores: Tensor = self.head(self.text.pooled(tokens, types))
        return scores.squeeze(1)

    def flops(self, length_p: np.ndarray) -> float:
        """Return the operations of a forward's matrix products over pairs of `length_p` tokens."""
        size = SideSize(len(length_p), {"pair": length_p})
        return self.text.flops("pair", size) + size.vectors * linear_flops(self.head)


def join_texts(parts: list[tuple[Values, int]]) -> tuple[Tensor, Tensor]:
    """Return token ids and types, int64 [p, T], of (text [p, T_i], type) parts; only the first keeps its [CLS]."""
    first = parts[0][0]
    assert isinstance(first, Tensor)
    num_pairs, width = first.shape[0], sum(int(text.shape[1]) for text, _ in parts if isinstance(text, Tensor))
    tokens, types = first.new_full((num_pairs, width), NO_TOKEN), first.new_zeros((num_pairs, width))
    begin = first.new_zeros((num_pairs, 1))
    # each text is written behind the tokens of those before it, over their padding
    for index, (text, token_type) in enumerate(parts):
        assert isinstance(text, Tensor)
        text = text[:, 1:] if index else text
        position = begin + torch.arange(text.shape[1], device=text.device)
        tokens.scatter_(1, position, text)
        types.scatter_(1, position, (text != NO_TOKEN).long() * token_type)
        begin = begin + (text != NO_TOKEN).sum(1, keepdim=True)
    return tokens, types
