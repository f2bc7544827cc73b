"""Scorers that replace or extend the inner product: an MLP over both vectors, and a cross-encoder over both texts."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig

from bigdssm.config import ModelConfig
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError
from bigdssm.features import texts_of
from bigdssm.models.encoders.base import SideSize, linear_flops
from bigdssm.models.encoders.bert import BertEncoder
from bigdssm.models.encoders.text import text_configs, text_keys
from bigdssm.models.packed import Values

PREFIX = "scorer."  # of its weights in a whole model


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


POSITIONS = "embeddings.position_embeddings.weight"


class CrossEncoder(Scorer):
    """A text encoder over pairs, pooled as the tower's, and one linear layer. Source: Nogueira and Cho 2019."""

    takes_vectors = False

    def __init__(self, text: BertEncoder, key: str, query: list[str], doc: list[str]) -> None:
        """`key` names the text encoder of the model that it starts from, `query` and `doc` the texts of the sides."""
        super().__init__()
        self.text, self.key, self.texts = text, key, {"query": query, "doc": doc}
        self.head = nn.Linear(text.dim, 1, bias=False)  # a bias common to all documents has no gradient in a softmax
        nn.init.zeros_(self.head.weight)  # it starts at the towers' ranking

    @classmethod
    def build(cls, config: ModelConfig, schema: Schema, texts: Mapping[str, Any]) -> CrossEncoder:
        """Return a new one for a model. Raises ConfigError: a side without text, or no BERT."""
        read = {side: texts_of(features) for side, features in schema.sides.items()}
        for side, found in read.items():
            if not found:
                raise ConfigError(f"sft.scorer.name=cross_encoder: data.{side} has no text, needs one to read")
        key = text_keys(config, schema)["doc"]
        architecture, text_config = copy.deepcopy(texts[key]), text_configs(config, schema)[key]
        if not isinstance(architecture, BertConfig) or architecture.type_vocab_size < 2:
            kind = f"{text_config.type} ({type(architecture).__name__})"
            raise ConfigError(f"sft.scorer.name=cross_encoder: got a text encoder {kind}, needs a BERT of two types")
        longest = sum(feature.max_tokens for found in read.values() for feature in found.values())
        architecture.max_position_embeddings = max(architecture.max_position_embeddings, longest)
        text = text_config.build(architecture)
        assert isinstance(text, BertEncoder)
        return cls(text, key, list(read["query"]), list(read["doc"]))

    def begin(self, texts: Mapping[str, nn.Module]) -> None:
        """Take the weights of the text encoder `key`; positions behind its last one begin again at its first."""
        trained = texts[self.key]
        assert isinstance(trained, BertEncoder)
        state = trained.bert.state_dict()
        known, needed = len(state[POSITIONS]), self.text.bert.config.max_position_embeddings
        state[POSITIONS] = state[POSITIONS][torch.arange(needed) % known]
        self.text.bert.load_state_dict(state)

    def forward(self, query: Mapping[str, Values], doc: Mapping[str, Values]) -> Tensor:
        """Return what to add to the products [p] of pairs: row i of the query's texts with row i of the document's.

        Texts are [p, T].
        """
        parts = [(query[name], 0) for name in self.texts["query"]] + [(doc[name], 1) for name in self.texts["doc"]]
        tokens, types = joined(parts, self.text.pad_token_id)
        scores: Tensor = self.head(self.text.pooled(tokens, types))
        return scores.squeeze(1)

    def flops(self, length_p: np.ndarray) -> float:
        """Return the operations of a forward's matrix products over pairs of so many tokens."""
        size = SideSize(len(length_p), {"pair": length_p})
        return self.text.flops("pair", size) + size.vectors * linear_flops(self.head)


def joined(parts: list[tuple[Values, int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return token ids and types, int64 [p, T], of texts [p, T_i] with a type each, all but the first without [CLS]."""
    first = parts[0][0]
    assert isinstance(first, Tensor)
    num_pairs, width = first.shape[0], sum(int(text.shape[1]) for text, _ in parts if isinstance(text, Tensor))
    tokens, types = first.new_full((num_pairs, width), pad), first.new_zeros((num_pairs, width))
    begin = first.new_zeros((num_pairs, 1))
    for number, (text, kind) in enumerate(parts):
        assert isinstance(text, Tensor)
        text = text[:, 1:] if number else text
        at = begin + torch.arange(text.shape[1], device=text.device)
        tokens.scatter_(1, at, text)
        types.scatter_(1, at, (text != pad).long() * kind)
        begin = begin + (text != pad).sum(1, keepdim=True)
    return tokens, types
