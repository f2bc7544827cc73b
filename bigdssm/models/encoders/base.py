"""Base class of the encoders of features, and their registry by type of feature.

Shapes: R rows, m queries, T tokens or history items, K values, E table width, H encoder width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigdssm.config import TowerConfig
from bigdssm.errors import ConfigError
from bigdssm.features import Feature
from bigdssm.models.embedding_tables import EmbeddingTables
from bigdssm.models.packed import FLASH_WIDTHS, Attention, QueryPositions, Values, flash_attention

RECOMPILE_LIMIT = 64  # compiled graphs per layer; torch's default is 8
_ENCODERS: "dict[str, Callable[[Feature, BuildContext], Encoder]]" = {}


class Encoder(nn.Module, ABC):
    """Maps the values of a feature to one vector of width `dim` per row."""

    is_shared: ClassVar[bool] = False  # whether it belongs to the model; else each tower builds its own
    dim: int
    compiled = False  # whether torch.compile compiles its layers
    recomputes = False  # whether the backward recomputes its layers
    packed_attention: Attention | None = None  # kernel for packed lists, if there is one

    @classmethod
    def build(cls, feature: Any, context: "BuildContext") -> "Encoder":
        """Return the encoder of a feature."""
        return cls(feature, context)

    @abstractmethod
    def forward(self, values: Any) -> Tensor:
        """Return [R, dim] for a tensor from `Feature.array`, or for a packed list if `accepts_packed`."""

    def inputs(self, name: str, features: Mapping[str, Values]) -> Any:
        """Return the argument of `forward` for the feature `name` of a side."""
        return features[name]

    def accepts_packed(self, training: bool) -> bool:
        """Return whether its lists may be packed."""
        return False

    def at_positions(self, values: Any, query_positions: QueryPositions) -> Tensor:
        """Return [m, dim] for queries at positions of rows; by default the vector of the row."""
        return cast(Tensor, self(values)[query_positions.row])

    def checkpoint_activations(self) -> None:
        """Keep only the layers' inputs for the backward, which recomputes the rest."""
        self.recomputes = True

    def transformer_layers(self) -> list[nn.Module]:
        """Return the layers of its transformer, if it has one."""
        return []

    def run_layer(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """Return the output of a transformer layer, recomputed in the backward after `checkpoint_activations`."""
        if self.recomputes and self.training:
            return cast(Tensor, checkpoint(layer, *inputs, use_reentrant=False))
        return cast(Tensor, layer(*inputs))

    def use_packing(self, attention: Attention) -> None:
        """Use the kernel `attention` for packed lists, if supported."""
        self.packed_attention = attention

    def use_eager_attention(self) -> None:
        """Use eager attention in training, if it has any."""

    def flops(self, name: str, size: "SideSize") -> float:
        """Return the operations of a forward's matrix products for the feature `name` of a side, padding left out."""
        return size.rows * linear_flops(self)


@dataclass(frozen=True)
class SideSize:
    """The size of one side of a batch, from lengths on the host."""

    rows: int
    filled: Mapping[str, np.ndarray]  # by list feature, int64 [R]: number of filled cells
    queries: int | None = None  # at positions of the rows; None: one per row

    @property
    def vectors(self) -> int:
        """Return the number of encoded vectors."""
        return self.rows if self.queries is None else self.queries


@dataclass(frozen=True)
class BuildContext:
    """The parts of the model that an encoder may be built from, in addition to its feature."""

    side: str  # query or doc
    config: TowerConfig  # of the side
    tables: EmbeddingTables
    item_dim: int  # width of the tables of documents
    text: Encoder | None  # the model's text encoder of the side
    event: Mapping[str, Feature] = field(default_factory=dict)  # features of the events of histories
    request: tuple[str, ...] = ()  # names of those that the queries of this side have, too
    request_dim: int = 0  # width of the vectors of these
    time: str | None = None  # name of the feature of events that is their time, which is not in `event`
    request_time: bool = False  # whether queries have it, too
    content_dim: int = 0  # width of the contents of items, vectors of documents
    age_dim: int = 0  # of model.dim, the dimensions that the towers do not have


def checked_output(part: nn.Module, output: Any, shape: Sequence[int]) -> Tensor:
    """Return the output of a part, which may be of a plug-in. Raises ConfigError: it is not a tensor of this shape."""
    if not torch.compiler.is_compiling() and getattr(output, "shape", None) != tuple(shape):
        got = list(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        name = f"{type(part).__module__}.{type(part).__qualname__}"
        raise ConfigError(f"{name}.forward returned {got}, needs a tensor {list(shape)}")
    return cast(Tensor, output)


E = TypeVar("E", bound=type[Encoder])


def encodes(feature_type: type[Feature]) -> Callable[[E], E]:
    """Register a class as the encoder of a type of feature; it is constructed by its class method `build`."""

    def register(cls: E) -> E:
        _ENCODERS[feature_type.type] = cls.build
        return cls

    return register


def build_encoder(feature: Feature, context: BuildContext) -> Encoder:
    """Return the encoder of a feature. Raises ConfigError: no encoder is registered for its type."""
    if feature.type not in _ENCODERS:
        raise ConfigError(f"no encoder of features of type {feature.type} is registered; see models.encoders.encodes")
    return _ENCODERS[feature.type](feature, context)


def use_eager_attention(model: nn.Module) -> None:
    """Use eager attention in training: the fused backward in bfloat16 is slow on a CPU.

    MiniLM on a Xeon with AMX, forward and backward, eager against fused, per CPU-second: 4,700 tokens against 2,700
    with texts of 70 tokens, 3,800 against 3,100 with texts of 128. In float32 both take the same time. Without a
    backward the fused kernel is faster: 15,600 tokens against 8,300 with texts of 128. For 64 histories of 200 items,
    2 layers of width 128 with 2 heads, on an EPYC without AMX: 189 ms against 243, and 322 in float32.
    """
    for part in model.modules():
        if isinstance(part, Encoder):
            part.use_eager_attention()


def use_packing(model: nn.Module, attention: Attention = flash_attention) -> None:
    """Use the kernel `attention` in all encoders that support it; texts may then be packed."""
    for part in model.modules():
        if isinstance(part, Encoder):
            part.use_packing(attention)


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the transformer layers on their first call, once for all lengths.

    All layers of a kind share their compiled graphs: one per combination of with or without gradients, training or
    not, padded or packed, a history's last layer or not.
    """
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    for part in model.modules():
        if isinstance(part, Encoder):
            part.compiled = True
            for layer in part.transformer_layers():
                layer.compile(dynamic=True, backend=backend)


def supports_head_width(width: int, heads: int) -> bool:
    """Return whether the kernel for packed rows supports the width of the heads."""
    return width // heads in FLASH_WIDTHS


def linear_flops(module: nn.Module) -> float:
    """Return the operations per row of all linear layers in `module`; their weights may be sharded (ZeRO-3)."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return float(sum(2 * layer.in_features * layer.out_features for layer in layers))
