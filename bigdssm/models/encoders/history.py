"""Histories. Shapes: R rows, T items, A places that ask, m queries, E table width."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from bigdssm.config import HistoryEncoderConfig
from bigdssm.errors import ConfigError
from bigdssm.features import PADDING, History
from bigdssm.models.blocks import HIDDEN, AttentionContext, AttentionLayout
from bigdssm.models.embedding_tables import INIT_STD, EmbeddingTables, table_name
from bigdssm.models.encoders.base import Encoder, Parts, SideSize, encodes, linear_flops, packs_heads
from bigdssm.models.packed import Packed, QueryPositions, RowGroup, SequenceBounds, Values


@encodes(History)
class HistoryEncoder(Encoder):
    """A causal transformer over [start, oldest item, …, newest item]: the vector at place j has seen j items.

    The start token makes an empty history an ordinary one. A history's own vector is that of its newest place; with
    `QueryPositions` one pass gives any number of queries. Positions count back from the newest item (`age`), so what
    happened last has the same position in long and short histories; from the left edge (`absolute`); or they are the
    distances of two places, as a learned bias of each head (`relative`) or as turns of queries and keys (`rotary`).
    The biases are all layers' own, so that neither the mask with them nor its gradient grows with the depth.
    Source: Kang and McAuley 2018 (SASRec); Raffel et al. 2020 (T5) for shared biases; `blocks` for what a layer does.
    """

    def __init__(
        self, config: HistoryEncoderConfig, feature: History, dim: int, table: str, tables: EmbeddingTables
    ) -> None:
        super().__init__()
        _check_heads(config, dim)
        self.table = table
        self.dim = dim
        self.config = config
        self._tables = (tables,)
        self.start = nn.Parameter(torch.randn(dim) * INIT_STD)
        if config.positions != "rotary":
            per_place = config.heads if config.positions == "relative" else dim
            self.positions = nn.Embedding(feature.max_items + 1, per_place)
            nn.init.normal_(self.positions.weight, std=INIT_STD)
        self.dropout = nn.Dropout(config.item_dropout)
        self.layers = nn.ModuleList(config.build(dim) for _ in range(config.layers))
        self.norm = nn.LayerNorm(dim)
        self._plain_in_training = False

    @classmethod
    def build(cls, feature: History, parts: Parts) -> HistoryEncoder:
        """Return the encoder of a feature, which reads the table of its items."""
        table = table_name("doc", str(feature.of))
        return cls(parts.config.history, feature, parts.item_dim, table, parts.tables)

    def transformer_layers(self) -> list[nn.Module]:
        """Return its layers."""
        return list(self.layers)

    def use_plain_attention(self) -> None:
        """Multiply attention out in training."""
        self._plain_in_training = True

    def packs(self, training: bool) -> bool:
        """Return whether a kernel attends, or groups of like length do: their number is nothing to compile."""
        return self._has_kernel or not self.compiled

    @property
    def _has_kernel(self) -> bool:
        """Return whether a kernel attends within packed histories: by a softmax, without a learned bias."""
        config = self.config
        able = config.softmax_attention and config.positions != "relative" and packs_heads(self.dim, config.heads)
        return self.packed_attention is not None and able

    def at(self, values: Values, places: QueryPositions) -> Tensor:
        """Return [m, E] for queries at places of the rows [R, T]; places of one row share a pass."""
        vectors: Tensor = self(values, places)
        return vectors

    def forward(self, items: Values, places: QueryPositions | None = None) -> Tensor:
        """Return [R, E] for item codes [R, T], oldest first, padded at the end, or packed; [m, E] at `places`."""
        assert places is None or self.config.allows_many_queries
        if isinstance(items, Packed) and not self._has_kernel:
            items = items.if_full()
        vectors = self._packed(items, places) if isinstance(items, Packed) else self._padded(items, places)
        normed: Tensor = self.norm(vectors)
        return normed

    def _padded(self, items_RT: Tensor, places: QueryPositions | None) -> Tensor:
        num_rows, num_items = items_RT.shape
        device = items_RT.device
        length_R = (items_RT != PADDING).sum(dim=1)
        place_T = torch.arange(num_items + 1, device=device)
        hidden = self._first(items_RT, length_R, place_T)
        bias = self._bias(hidden.dtype)
        sight = self._sight(place_T, place_T, bias)
        for layer in self.layers[:-1]:
            hidden = self.run_layer(layer, hidden, hidden, sight)
        last = self.layers[-1]
        if places is None:  # only the newest place is read, so the last layer computes only that one
            newest = hidden[torch.arange(num_rows, device=device), length_R].unsqueeze(1)
            sight = self._sight(length_R.unsqueeze(1), place_T, bias)
            vectors = self.run_layer(last, newest, hidden, sight).squeeze(1)
        else:  # all of them: most are read, and rows share one mask
            vectors = self.run_layer(last, hidden, hidden, sight)[places.row, places.seen]
        return vectors

    def _first(self, items_RT: Tensor, length_R: Tensor, place_T: Tensor) -> Tensor:
        """Return [R, T + 1, E], what the first layer takes."""
        vectors = self._items(items_RT)
        start = self.start.to(vectors.dtype).expand(items_RT.shape[0], 1, -1)
        hidden = self._placed(torch.cat([start, vectors], dim=1), place_T, length_R.unsqueeze(1))
        dropped: Tensor = self.dropout(hidden)
        return dropped

    def _items(self, items: Tensor) -> Tensor:
        vectors = self._tables[0].look_up(self.table, items)
        return vectors * self.dim**0.5 if self.config.item_scale else vectors

    def _placed(self, hidden: Tensor, place: Tensor, length: Tensor) -> Tensor:
        """Return the vectors with those of their places, where positions have some; `length` is of their history."""
        if self.config.positions == "age":
            hidden = hidden + self.positions((length - place).clamp(min=0))
        elif self.config.positions == "absolute":
            hidden = hidden + self.positions(place)
        return hidden

    def _packed(self, items: Packed, places: QueryPositions | None) -> Tensor:
        hidden, place, spans = self._first_packed(items)
        bias = self._bias(hidden.dtype)
        order = None if self._has_kernel else items.longest_first
        sight = self._packed_sight(items, place, spans, bias, order)
        for layer in self.layers[:-1]:
            hidden = self.run_layer(layer, hidden, hidden, sight)
        last = self.layers[-1]
        if places is not None:
            return self.run_layer(last, hidden, hidden, sight)[0, spans.offsets[places.row] + places.seen]
        # only the newest place is read, as above; it sees all of its history
        newest = self._of_newest(sight, items, bias, order)
        return self.run_layer(last, hidden[:, spans.offsets[1:] - 1], hidden, newest).squeeze(0)

    def _packed_sight(
        self, items: Packed, place: Tensor, spans: SequenceBounds, bias: Tensor | None, order: Tensor | None
    ) -> AttentionContext:
        """Return what places see where histories are packed: by the kernel, or group by group of rows in `order`."""
        rotary, device = self.config.positions == "rotary", place.device
        if order is None:
            each = (spans.offsets, spans.offsets, spans.longest, spans.longest)
            return AttentionContext(place, place, None, True, rotary, self.packed_attention, *each, causal=True)
        groups = tuple(RowGroup(group.rows, group.longest + 1) for group in items.groups)
        begins, masks, end = [], [], 0
        for rows, width in groups:
            begins.append(torch.arange(rows, device=device) * width + end)
            end += rows * width
            place_T = torch.arange(width, device=device)
            masks.append(_mask(place_T, place_T, bias))
        begin = torch.empty_like(order).index_copy_(0, order, torch.cat(begins))
        at = begin[(place == 0).cumsum(0) - 1] + place
        return AttentionContext(
            place, place, None, self._fused(device), rotary, layout=AttentionLayout(at, at, False, groups, tuple(masks))
        )

    def _of_newest(
        self, sight: AttentionContext, items: Packed, bias: Tensor | None, order: Tensor | None
    ) -> AttentionContext:
        """Return what the newest place of each packed history sees of what is told by `sight`."""
        length_R, layout = items.lengths, sight.layout
        number = torch.arange(items.num_rows + 1, device=length_R.device)
        if order is None or layout is None:
            return sight._replace(at=length_R, at_offsets=number.int(), at_longest=1, causal=False)
        lengths = length_R[order].split([group.rows for group in layout.groups])
        masks = tuple(
            _mask(length.unsqueeze(1), torch.arange(group.longest, device=length.device), bias)
            for length, group in zip(lengths, layout.groups, strict=True)
        )
        at = torch.empty_like(order).index_copy_(0, order, number[:-1])
        return sight._replace(at=length_R, layout=layout._replace(at=at, newest_alone=True, masks=masks))

    def _first_packed(self, items: Packed) -> tuple[Tensor, Tensor, SequenceBounds]:
        """Return [1, P + R, E], what the first layer takes, each cell's place int64 [P + R], and where rows lie."""
        length_R, device = items.lengths, items.row.device
        offsets, longest = items.spans
        spans = SequenceBounds(offsets + torch.arange(len(offsets), dtype=torch.int32, device=device), longest + 1)
        # Where items go between the start tokens, whose code is the padding's, place 0.
        goes_to = torch.arange(1, len(items.row) + 1, device=device) + items.row
        empty = goes_to.new_zeros(len(items.row) + items.num_rows)
        codes, place = (empty.index_copy(0, goes_to, cells) for cells in (items.values, items.place + 1))
        vectors = self._items(codes)
        hidden = torch.where(place.unsqueeze(1) == 0, self.start.to(vectors.dtype), vectors)
        length = length_R[(place == 0).cumsum(0) - 1]
        return self.dropout(self._placed(hidden, place, length)).unsqueeze(0), place, spans

    def _sight(self, at: Tensor, over: Tensor, bias: Tensor | None) -> AttentionContext:
        """Return what the places `at`, [A] or [R, A], see of the places `over` [T]."""
        return AttentionContext(
            at, over, _mask(at, over, bias), self._fused(over.device), self.config.positions == "rotary"
        )

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return the learned bias of each distance, [T, h], where there is one.

        Once a forward, whatever the groups: under ZeRO-3 each call of a module is a collective.
        """
        if self.config.positions != "relative":
            return None
        bias: Tensor = self.positions(torch.arange(self.positions.num_embeddings, device=self.start.device))
        return bias.to(dtype)

    def _fused(self, device: torch.device) -> bool:
        """Return whether attention by a mask is the fused kernel's."""
        learned_on_cpu = self.config.positions == "relative" and device.type == "cpu"  # has no fused backward
        return not (self.training and (self._plain_in_training or learned_on_cpu))

    def flops(self, name: str, size: SideSize) -> float:
        """Return the operations of a forward; of rows of one query the last layer computes the newest place alone."""
        length_R = size.filled[name].astype(float) + 1  # the start token
        flops, key_value = 0.0, 4 * self.dim**2
        for number, layer in enumerate(self.layers, 1):
            newest_alone = size.queries is None and number == len(self.layers)
            read_R = np.ones_like(length_R) if newest_alone else length_R
            flops += float(length_R.sum()) * key_value
            flops += float(read_R.sum()) * (linear_flops(layer) - key_value)
            flops += float((read_R * length_R).sum()) * 4 * self.dim
        return flops


def _mask(at: Tensor, over: Tensor, bias: Tensor | None) -> Tensor:
    """Return what places `at`, [A] or [R, A], see of the places `over` [T], and how: [1 or R, 1 or h, A, T]."""
    distance = at.unsqueeze(-1) - over
    mask = (distance >= 0).unsqueeze(-3)
    if bias is not None:
        # the fused kernel of a device wants rows of numbers side by side
        by_head = nn.functional.embedding(distance.clamp(min=0), bias).movedim(-1, -3).contiguous()
        mask = by_head.masked_fill(~mask, HIDDEN)
    return mask if mask.dim() == 4 else mask.unsqueeze(0)  # the fused kernel is for masks of 2 or 4 dimensions


def _check_heads(config: HistoryEncoderConfig, dim: int) -> None:
    """Raise ConfigError unless the heads divide the width, into even widths where positions turn pairs of numbers."""
    if dim % config.heads:
        raise ConfigError(
            f"model.query.history.heads={config.heads} must divide the items' model.doc.embedding_dim={dim}"
        )
    if config.positions == "rotary" and dim // config.heads % 2:
        raise ConfigError(
            f"model.query.history.positions=rotary needs heads of an even width, got {dim // config.heads}: "
            f"model.doc.embedding_dim={dim} over model.query.history.heads={config.heads}; change one of them"
        )
