"""A tower: encoders → concatenation → MLP → vector. Shapes: R rows, C concatenated width, D vector width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigdssm.config import TowerConfig
from bigdssm.errors import ConfigError
from bigdssm.models.encoders import CategoricalEncoder, HistoryEncoder, NumericEncoder, TextEncoder
from bigdssm.models.tables import INIT_STD, EmbeddingTables, table_name
from bigdssm.schema import Feature


class _ByFeature(nn.ModuleDict):
    """Modules by feature, which may be called `type` or `items` as methods of a module are."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module


class Tower(nn.Module):
    """One side of the dual encoder; text features go through `text`, which both towers may share."""

    def __init__(
        self,
        side: str,
        features: dict[str, Feature],
        config: TowerConfig,
        dim: int,
        tables: EmbeddingTables,
        item_dim: int,
        text: TextEncoder | None,
    ) -> None:
        super().__init__()
        self._text = (text,)  # in a tuple: the model owns the text encoder
        self.residual = config.residual
        self.text_names = [name for name, feature in features.items() if feature.type == "text"]
        self.encoders = _ByFeature()
        widths = dict.fromkeys(self.text_names, text.dim if text else 0)
        for name, feature in features.items():
            if feature.type == "categorical":
                self.encoders[name] = CategoricalEncoder(table_name(side, feature), tables)
                widths[name] = config.embedding_dim
            elif feature.type == "numeric":
                self.encoders[name] = NumericEncoder(feature, config.numeric_dim)
                widths[name] = config.numeric_dim
            elif feature.type == "history":
                self.encoders[name] = HistoryEncoder(
                    config.history, feature, item_dim, table_name(side, feature), tables
                )
                widths[name] = item_dim
        self._check_residual(side, widths, dim)
        width = sum(width for name, width in widths.items() if name != self.residual)
        self.mlp = _mlp(width, config, dim) if width else None

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Return [R, D] for one side's features of R rows."""
        parts = {name: encoder(features[name]) for name, encoder in self.encoders.items()}
        text = self._text[0]
        if text is not None:
            parts |= {name: text(features[name]) for name in self.text_names}
        residual = parts.pop(self.residual) if self.residual else None
        if self.mlp is None:
            assert residual is not None
            return residual
        output: Tensor = self.mlp(torch.cat(list(parts.values()), dim=1))
        return output if residual is None else output + residual

    def encoder_of(self, name: str) -> nn.Module:
        """Return the encoder of the feature `name`."""
        text = self._text[0]
        return text if text is not None and name in self.text_names else self.encoders[name]

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
