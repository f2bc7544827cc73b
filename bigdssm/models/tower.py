"""A tower: encoders → concatenation → MLP → vector. Shapes: R rows, C concatenated width, D vector width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigdssm.config import TowerConfig
from bigdssm.models.encoders import CategoricalEncoder, HistoryEncoder, NumericEncoder, TextEncoder
from bigdssm.models.tables import EmbeddingTables, table_name
from bigdssm.schema import Feature


class Tower(nn.Module):
    """One side of the dual encoder; text features go through `text`, which both towers may share."""

    def __init__(
        self,
        side: str,
        features: dict[str, Feature],
        config: TowerConfig,
        dim_out: int,
        tables: EmbeddingTables,
        item_dim: int,
        text: TextEncoder | None,
    ) -> None:
        super().__init__()
        self.side = side
        self._text = (text,)  # in a tuple: the model owns the text encoder
        self.text_names = [name for name, feature in features.items() if feature.type == "text"]
        self.encoders = nn.ModuleDict()
        width = len(self.text_names) * (text.dim if text else 0)
        for name, feature in features.items():
            if feature.type == "categorical":
                self.encoders[name] = CategoricalEncoder(table_name(side, feature), tables)
                width += config.embedding_dim
            elif feature.type == "numeric":
                self.encoders[name] = NumericEncoder(feature, config.numeric_dim)
                width += config.numeric_dim
            elif feature.type == "history":
                self.encoders[name] = HistoryEncoder(
                    config.history, feature, item_dim, table_name(side, feature), tables
                )
                width += item_dim
        self.mlp = _mlp(width, config, dim_out)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Return [R, D] for one side's features of R rows."""
        parts = [encoder(features[name]) for name, encoder in self.encoders.items()]
        text = self._text[0]
        if text is not None:
            parts += [text(features[name]) for name in self.text_names]
        output: Tensor = self.mlp(torch.cat(parts, dim=1))
        return output


def _mlp(width: int, config: TowerConfig, dim_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for hidden in config.mlp:
        layers += [nn.Linear(width, hidden), nn.GELU(), nn.Dropout(config.dropout)]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, dim_out))
