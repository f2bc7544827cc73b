"""A tower: encoders → concatenation → MLP → vector.

Shapes: R rows, m queries, C concatenated width, D vector width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bigdssm.config import TowerConfig
from bigdssm.errors import ConfigError
from bigdssm.features import Feature
from bigdssm.models.encoders import Encoder, Parts, build_encoder
from bigdssm.models.encoders.base import SideSize, linear_flops
from bigdssm.models.packed import Values
from bigdssm.models.places import Places
from bigdssm.models.tables import INIT_STD


class _ByFeature(nn.ModuleDict):
    """Modules by feature, which may be called `type` or `items` as methods of a module are."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module


class Tower(nn.Module):
    """One side of the dual encoder."""

    def __init__(self, features: Mapping[str, Feature], parts: Parts, dim: int) -> None:
        super().__init__()
        self.residual = parts.config.residual
        encoders = {name: build_encoder(feature, parts) for name, feature in features.items()}
        self.encoders = _ByFeature({name: e for name, e in encoders.items() if not e.is_models_own})
        self._models_own = ({name: e for name, e in encoders.items() if e.is_models_own},)  # not modules of the tower
        widths = {name: encoder.dim for name, encoder in self._all().items()}
        self._check_residual(parts.side, widths, dim)
        width = sum(width for name, width in widths.items() if name != self.residual)
        self.mlp = _mlp(width, parts.config, dim) if width else None

    def forward(self, features: Mapping[str, Values], places: Places | None = None) -> Tensor:
        """Return [R, D] for one side's features of R rows, or [m, D] for queries at `places` of them."""
        parts = {
            name: encoder(features[name]) if places is None else encoder.at(features[name], places)
            for name, encoder in self._all().items()
        }
        residual = parts.pop(self.residual) if self.residual else None
        if self.mlp is None:
            assert residual is not None
            return residual
        output: Tensor = self.mlp(torch.cat(list(parts.values()), dim=1))
        return output if residual is None else output + residual

    def packs(self, training: bool) -> frozenset[str]:
        """Return the features whose lists may come packed."""
        return frozenset(name for name, encoder in self._all().items() if encoder.packs(training))

    def flops(self, size: SideSize) -> float:
        """Return the operations of a forward's matrix products over a side of a batch, padding left out."""
        own = 0.0 if self.mlp is None else size.vectors * linear_flops(self.mlp)
        return own + sum(encoder.flops(name, size) for name, encoder in self._all().items())

    def _all(self) -> dict[str, Encoder]:
        """Return the encoders by feature, the model's own last: the order in which their vectors stand."""
        return {**self.encoders, **self._models_own[0]}  # type: ignore[dict-item]

    def _check_residual(self, side: str, widths: dict[str, int], dim: int) -> None:
        if self.residual is None:
            return
        if self.residual not in widths:
            raise ConfigError(
                f"model.{side}.residual={self.residual} is no {side} feature, needs one of {list(widths)}"
            )
        if widths[self.residual] != dim:
            raise ConfigError(
                f"model.{side}.residual={self.residual} has width {widths[self.residual]}, but model.dim={dim}; "
                f"set both to the same (embedding_dim of model.doc for categorical features and histories)"
            )


def _mlp(width: int, config: TowerConfig, dim: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Dropout(config.dropout)]
    for hidden in config.mlp:
        layers += [nn.Linear(width, hidden), nn.GELU(), nn.Dropout(config.dropout)]
        width = hidden
    head = nn.Linear(width, dim)
    if config.residual:  # starts as a small addition to what the residual says
        nn.init.normal_(head.weight, std=INIT_STD)
        nn.init.zeros_(head.bias)
    return nn.Sequential(*layers, head)
