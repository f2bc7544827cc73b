"""What encodes one feature of one side, and which class does it for which type of feature.

Shapes: R rows, m queries, T tokens or history items, K values, E table width, H encoder width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigdssm.config import TowerConfig
from bigdssm.errors import ConfigError
from bigdssm.features import Feature
from bigdssm.models.embedding_tables import EmbeddingTables
from bigdssm.models.packed import FLASH_WIDTHS, Attention, QueryPositions, Values, flash_attention

RECOMPILE_LIMIT = 64  # of a layer, above which torch gives up compiling it; by default 8


class Encoder(nn.Module, ABC):
    """A feature's values → one vector of width `dim` a row."""

    is_pretrained_part: ClassVar[bool] = False  # else each tower has one for itself
    dim: int
    compiled = False  # its layers, by torch.compile
    recomputed = False  # its layers, in the backward
    packed_attention: Attention | None = None  # within rows of packed lists: the kernel, where there is one

    @abstractmethod
    def forward(self, values: Any) -> Tensor:
        """Return [R, dim] for a tensor as `Feature.array` makes it, or for a packed list where `packs` says so."""

    def packs(self, training: bool) -> bool:
        """Return whether its lists may come packed."""
        return False

    def at(self, values: Values, places: QueryPositions) -> Tensor:
        """Return [m, dim] for queries at places of rows: here what is said of the row, encoded once."""
        vectors: Tensor = self(values)[places.row]
        return vectors

    def checkpoint_activations(self) -> None:
        """Keep only the layers' inputs for the backward, which computes the rest again."""
        self.recomputed = True

    def transformer_layers(self) -> list[nn.Module]:
        """Return the layers of its transformer, where it has one."""
        return []

    def run_layer(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """Return the output of a transformer layer; with `checkpoint_activations` its graph keeps the inputs alone."""
        output: Tensor
        if self.recomputed and self.training:
            output = checkpoint(layer, *inputs, use_reentrant=False)
        else:
            output = layer(*inputs)
        return output

    def use_packing(self, attention: Attention) -> None:
        """Attend within rows of packed lists by `attention`, where it can."""
        self.packed_attention = attention

    def use_plain_attention(self) -> None:
        """Multiply attention out in training, where there is any."""

    def flops(self, name: str, size: SideSize) -> float:
        """Return the operations of a forward's matrix products for the feature `name` of a side, padding left out."""
        return size.rows * linear_flops(self)


@dataclass(frozen=True)
class SideSize:
    """How much one side of a batch holds, as the host knows it."""

    rows: int
    filled: Mapping[str, np.ndarray]  # by feature that is a list, int64 [R]: cells that hold something
    queries: int | None = None  # at places of the rows; None: each row is one

    @property
    def vectors(self) -> int:
        """Return the vectors that come of it."""
        return self.rows if self.queries is None else self.queries


@dataclass(frozen=True)
class Parts:
    """What an encoder may be built from beside its feature."""

    side: str  # query or doc
    config: TowerConfig  # of the side
    tables: EmbeddingTables
    item_dim: int  # width of the tables of documents
    text: Encoder | None  # of the model, for the side's texts


E = TypeVar("E", bound=type[Encoder])
_ENCODERS: dict[str, Callable[[Feature, Parts], Encoder]] = {}


def encodes(feature_type: type[Feature]) -> Callable[[E], E]:
    """Make a class the encoder of a type of features, by its class method `build(feature, parts)`; a decorator."""

    def known(cls: E) -> E:
        _ENCODERS[feature_type.type] = cls.build  # type: ignore[attr-defined]
        return cls

    return known


def build_encoder(feature: Feature, parts: Parts) -> Encoder:
    """Return the encoder of a feature. Raises ConfigError: nothing encodes its type."""
    if feature.type not in _ENCODERS:
        raise ConfigError(f"no encoder of features of type {feature.type} is registered; see models.encoders.encodes")
    return _ENCODERS[feature.type](feature, parts)


def use_plain_attention(model: nn.Module) -> None:
    """Let the model's encoders multiply attention out in training: the fused backward in bfloat16 is slow on a CPU.

    MiniLM on a Xeon with AMX, forward and backward a CPU-second: 4,700 tokens of texts of 70 against 2,700, 3,800 of
    texts of 128 against 3,100. In float32 both take the same time. Without a backward the fused kernel is the faster
    one: 15,600 tokens of texts of 128 against 8,300. 64 histories of 200 items through 2 layers of width 128 with 2
    heads on an EPYC without AMX, forward and backward: 189 ms against 243, and 322 in float32.
    """
    for part in model.modules():
        if isinstance(part, Encoder):
            part.use_plain_attention()


def use_packing(model: nn.Module, attention: Attention = flash_attention) -> None:
    """Have the model's encoders attend within packed lists by a kernel, where they can: then texts may come packed."""
    for part in model.modules():
        if isinstance(part, Encoder):
            part.use_packing(attention)


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Have the layers of the model's transformers compiled when they are first called, once for all lengths.

    All layers of a kind share what is compiled; it is one for each of: with and without gradients, training or not,
    padded or packed, a history's last layer or not.
    """
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    for part in model.modules():
        if isinstance(part, Encoder):
            part.compiled = True
            for layer in part.transformer_layers():
                layer.compile(dynamic=True, backend=backend)


def packs_heads(width: int, heads: int) -> bool:
    """Return whether attention within packed rows takes heads of this model's width."""
    return width // heads in FLASH_WIDTHS


def linear_flops(module: nn.Module) -> float:
    """Return the operations of all linear layers in `module`, a row; their weights may be sharded away."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return float(sum(2 * layer.in_features * layer.out_features for layer in layers))
