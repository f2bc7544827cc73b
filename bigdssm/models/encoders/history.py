"""Histories. Shapes: R rows, T items, A places that are read, E table width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigdssm.config import HistoryEncoderConfig
from bigdssm.errors import ConfigError
from bigdssm.features import PADDING, History
from bigdssm.models.encoders.base import Encoder, Parts, encodes, linear_flops
from bigdssm.models.tables import INIT_STD, EmbeddingTables, table_name


@encodes(History)
class HistoryEncoder(Encoder):
    """A causal transformer over [start, oldest item, …, newest item]; the vector at the newest item is the history's.

    The start token makes an empty history an ordinary one. Positions count from the newest item back, so that what
    happened last has the same position in long and short histories. Source: Kang and McAuley 2018 (SASRec).
    """

    def __init__(
        self, config: HistoryEncoderConfig, feature: History, dim: int, table: str, tables: EmbeddingTables
    ) -> None:
        super().__init__()
        self.table = table
        self.dim = dim
        self._tables = (tables,)
        self.start = nn.Parameter(torch.randn(dim) * INIT_STD)
        self.positions = nn.Embedding(feature.max_items + 1, dim)
        nn.init.normal_(self.positions.weight, std=INIT_STD)
        self.dropout = nn.Dropout(config.item_dropout)
        self.layers = nn.ModuleList(_HistoryLayer(config, dim) for _ in range(config.layers))
        self.norm = nn.LayerNorm(dim)
        self._recompute = False

    @classmethod
    def build(cls, feature: History, parts: Parts) -> HistoryEncoder:
        """Return the encoder of a feature, which reads the table of its items."""
        table = table_name("doc", str(feature.of))
        return cls(parts.config.history, feature, parts.item_dim, table, parts.tables)

    def checkpoint_activations(self) -> None:
        """Keep only the layers' inputs for the backward, which computes the rest again."""
        self._recompute = True

    def forward(self, items_RT: Tensor) -> Tensor:
        """Return [R, E] for item codes [R, T], oldest first, padded at the end."""
        num_rows, num_items = items_RT.shape
        device = items_RT.device
        length_R = (items_RT != PADDING).sum(dim=1)
        vectors = self._tables[0].look_up(self.table, items_RT)
        start = self.start.to(vectors.dtype).expand(num_rows, 1, -1)
        place_T = torch.arange(num_items + 1, device=device)
        age_RT = (length_R.unsqueeze(1) - place_T).clamp(min=0)
        hidden = self.dropout(torch.cat([start, vectors], dim=1) + self.positions(age_RT))
        newest = (torch.arange(num_rows, device=device), length_R)
        causal_TT = place_T.unsqueeze(1) >= place_T
        for layer in self.layers[:-1]:
            hidden = self._run(layer, hidden, hidden, causal_TT)
        # Only the newest place is read, so the last layer computes only that one.
        up_to_newest_R1T = (place_T <= length_R.unsqueeze(1)).unsqueeze(1)
        hidden = self._run(self.layers[-1], hidden[newest].unsqueeze(1), hidden, up_to_newest_R1T)
        vector: Tensor = self.norm(hidden.squeeze(1))
        return vector

    def _run(self, layer: nn.Module, *inputs: Tensor) -> Tensor:
        output: Tensor
        if self._recompute and self.training:
            output = checkpoint(layer, *inputs, use_reentrant=False)
        else:
            output = layer(*inputs)
        return output

    def flops(self, values: Tensor) -> float:
        """Return the operations of a forward: the last layer computes the newest place alone."""
        length_R = (values != PADDING).sum(dim=1).double() + 1  # the start token
        flops, key_value = 0.0, 4 * self.dim**2
        for number, layer in enumerate(self.layers, 1):
            read_R = length_R.new_ones(length_R.shape) if number == len(self.layers) else length_R
            flops += float(length_R.sum()) * key_value
            flops += float(read_R.sum()) * (linear_flops(layer) - key_value)
            flops += float((read_R * length_R).sum()) * 4 * self.dim
        return flops


class _HistoryLayer(nn.Module):
    """A pre-norm transformer layer whose queries may stand at fewer places than its keys."""

    def __init__(self, config: HistoryEncoderConfig, dim: int) -> None:
        super().__init__()
        if dim % config.heads:
            raise ConfigError(
                f"model.query.history.heads={config.heads} must divide the items' model.doc.embedding_dim={dim}"
            )
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query, self.key_value, self.output = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.feedforward = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, config.feedforward * dim),
            nn.GELU(),
            nn.Linear(config.feedforward * dim, dim),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, at: Tensor, over: Tensor, mask: Tensor) -> Tensor:
        """Return [R, A, E] at places `at` [R, A, E] attending over [R, T, E] where `mask` (…, A, T) is True."""
        q = self._split(self.query(self.attention_norm(at)))
        k, v = (self._split(part) for part in self.key_value(self.attention_norm(over)).chunk(2, dim=2))
        mask = mask.unsqueeze(1) if mask.dim() == 3 else mask
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        hidden = at + self.dropout(self.output(attended.transpose(1, 2).flatten(2)))
        return hidden + self.dropout(self.feedforward(hidden))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
