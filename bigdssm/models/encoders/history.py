"""Encoder of histories. Shapes: R rows, T items, A query positions, m queries, E table width, K width of requests."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from bigdssm.dataset.schema import REQUEST
from bigdssm.errors import ConfigError
from bigdssm.features import PADDING, History
from bigdssm.features.base import ITEM_ROW, REQUEST_PREFIX
from bigdssm.features.event_time import UNKNOWN_TIME
from bigdssm.models.blocks import MASKED_SCORE, AttentionContext, AttentionLayout, position_angle, time_angle
from bigdssm.models.embedding_tables import INIT_STD, table_name
from bigdssm.models.encoders.base import (
    BuildContext,
    Encoder,
    SideSize,
    build_encoder,
    checked_output,
    encodes,
    linear_flops,
    supports_head_width,
)
from bigdssm.models.packed import Packed, QueryPositions, RowGroup, SequenceBounds, Values


class HistoryInputs(NamedTuple):
    """Histories: items, features of events, and requests. A tuple: ZeRO-3 hooks search tuples only."""

    items: Values
    features: tuple[Tensor, ...]  # as the items: [R, T], or packed [P]
    request: Tensor | None = None  # [m, K]: the vectors of the queries' requests
    times: Tensor | None = None  # as the items, int64: of the events, in microseconds
    request_times: Tensor | None = None  # int64 [m]
    rows: Tensor | None = None  # as the items, int64: of `contents`


@encodes(History)
class HistoryEncoder(Encoder):
    """A causal transformer over [start, oldest event, …, newest event]: the output at position j depends on j events.

    The vector of an event is that of its item (of its id, a linear map of its content, or their sum), plus a linear map
    of its features' vectors: no key or value depends on what follows the event (with positions=age: but for the number
    of events that follow). A request enters in the last layer alone, as an addition to the query's position.

    The start token makes an empty history an ordinary one. The vector of a history is the output at its newest
    position; with `QueryPositions` one pass gives any number of queries. Positional information is the distance from
    the newest item (`age`: the newest item has the same position in long and short histories), the distance of query
    and key, as a learned bias per head (`relative`) or as rotary embeddings (`rotary`), or nothing (`none`). All layers
    share the biases: neither the mask nor its gradient grows with the depth.
    With times=rotary, attention depends on the time between two events, and in the last layer on that between request
    and event.
    With `transition`, a vector of the newest event's item and action is added to the output.
    Source: Kang and McAuley 2018 (SASRec); Raffel et al. 2020 (T5) for shared biases; Rendle et al. 2010 (FPMC) for
    transitions; see `blocks` for the layers.
    """

    contents: Tensor  # of items

    def __init__(self, feature: History, context: BuildContext) -> None:
        """It shares the embedding table of its items, and has encoders of the features of their events.

        Raises ConfigError: the heads do not divide the width, or have too small or an odd one with rotary embeddings.
        """
        super().__init__()
        config, dim = context.config.history, context.item_dim
        of_event = replace(context, side="event")
        event = {name: build_encoder(part, of_event) for name, part in context.event.items()}
        if dim % config.heads:
            raise ConfigError(
                f"model.query.history.heads={config.heads} must divide the items' model.doc.embedding_dim={dim}"
            )
        rotary = [key for key in ("positions", "times") if getattr(config, key) == "rotary"]
        if rotary and (dim // config.heads % 2 or dim // config.heads < 2 * len(rotary)):
            raise ConfigError(
                f"model.query.history.{' and '.join(rotary)}=rotary needs heads of an even width of at least "
                f"{2 * len(rotary)}, got {dim // config.heads}: "
                f"model.doc.embedding_dim={dim} over model.query.history.heads={config.heads}; change one of them"
            )
        self.event = nn.ModuleDict({f"of_{name}": encoder for name, encoder in event.items()})
        if event:  # starts as a small addition to the item
            self.event_map = nn.Linear(sum(encoder.dim for encoder in event.values()), dim, bias=False)
            nn.init.normal_(self.event_map.weight, std=INIT_STD)
        self.request_map = nn.Linear(context.request_dim, dim, bias=False) if context.request_dim else None
        if self.request_map is not None:
            nn.init.normal_(self.request_map.weight, std=INIT_STD)
        self.content_map = None
        if config.items != "id":
            self.content_map = nn.Linear(context.content_dim, dim, bias=False)
            nn.init.normal_(self.content_map.weight, std=INIT_STD)
            # [1 + documents, D], the first row is zero; a constant that the model's user sets, see `item_contents`
            self.register_buffer("contents", torch.zeros(1, context.content_dim), persistent=False)
        self.time = context.time if config.times == "rotary" else None
        self.request_time = self.time is not None and context.request_time
        self.table = table_name("doc", str(feature.of))
        self.dim = dim
        self.config = config
        self._tables = (context.tables,)
        self.start = nn.Parameter(torch.randn(dim) * INIT_STD)
        if config.positions in ("age", "relative"):
            width = config.heads if config.positions == "relative" else dim
            self.positions = nn.Embedding(feature.max_items + 1, width)
            nn.init.normal_(self.positions.weight, std=INIT_STD)
        self.dropout = nn.Dropout(config.item_dropout)
        self.layers = nn.ModuleList(config.build(dim) for _ in range(config.layers))
        self.norm = nn.LayerNorm(dim)
        self._eager_in_training = False
        if config.transition is not None and self.table in context.tables.sharded:
            raise ConfigError(
                f"model.query.history.transition={config.transition}: the table of doc.{feature.of} is sharded; set "
                "model.tables.replicated"
            )
        self.transition = config.transition
        self.transition_table = table_name("query", feature.name)
        self.transition_dropout = nn.Dropout(config.transition_dropout)

    def inputs(self, name: str, features: Mapping[str, Values]) -> HistoryInputs | Values:
        """Return the items of the history `name`, with the features of its events and the request, if any."""
        if not self.event and self.time is None and self.content_map is None:
            return features[name]
        rows = None
        if self.content_map is not None:
            if (key := f"{name}.{ITEM_ROW}") not in features:
                raise ConfigError(
                    f"{name}: got items without catalogue rows, needs them with model.query.history.items="
                    f"{self.config.items}, as in evaluate, search, serve and recommend; use them, or items=id"
                )
            rows = cast(Tensor, features[key])
        columns = (features[f"{name}.{key.removeprefix('of_')}"] for key in self.event)
        request = None if self.request_map is None else cast(Tensor, features[REQUEST])
        times = None if self.time is None else cast(Tensor, features[f"{name}.{self.time}"])
        request_times = cast(Tensor, features[f"{REQUEST_PREFIX}{self.time}"]) if self.request_time else None
        of_events = tuple(cast(Tensor, values) for values in columns)
        return HistoryInputs(features[name], of_events, request, times, request_times, rows)

    def transformer_layers(self) -> list[nn.Module]:
        """Return the transformer layers."""
        return list(self.layers)

    def run_layer(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """Return the output of a layer, of the shape of its first input."""
        return checked_output(layer, super().run_layer(layer, *inputs), inputs[0].shape)

    def use_eager_attention(self) -> None:
        """Use eager attention in training."""
        self._eager_in_training = True

    def accepts_packed(self, training: bool) -> bool:
        """Return whether there is a kernel, or the layers are not compiled (groups of rows would recompile them)."""
        return self._has_kernel or not self.compiled

    @property
    def _has_kernel(self) -> bool:
        """Return whether the kernel can be used: softmax attention, no learned bias, a supported head width."""
        config = self.config
        supported = (
            config.softmax_attention and config.positions != "relative" and supports_head_width(self.dim, config.heads)
        )
        return self.packed_attention is not None and supported

    def at_positions(self, values: HistoryInputs | Values, query_positions: QueryPositions) -> Tensor:
        """Return [m, E] for queries at positions of the rows [R, T]; queries of one row share a pass."""
        return cast(Tensor, self(values, query_positions))

    def forward(self, events: HistoryInputs | Values, query_positions: QueryPositions | None = None) -> Tensor:
        """Return [R, E], or [m, E] at `query_positions`, for item codes [R, T], oldest first, padded or packed."""
        assert query_positions is None or self.config.allows_many_queries
        inputs = events if isinstance(events, HistoryInputs) else HistoryInputs(events, ())
        items, features = inputs[:2]
        if isinstance(items, Packed) and not self._has_kernel:
            # histories of one length are a tensor
            full = len(items.values) == items.num_rows * items.bounds.longest
            items = items.values.view(items.num_rows, -1) if full else items
        added = None  # to the items' vectors, [events, E], padding included
        if features:
            parts = [encoder(values.flatten()) for encoder, values in zip(self.event.values(), features, strict=True)]
            added = self.event_map(torch.cat(parts, dim=1))
        if self.content_map is not None and inputs.rows is not None:
            contents = self.contents[inputs.rows.flatten()].to(self.content_map.weight.dtype)
            content = self._scaled(self.content_map(contents))
            added = content if added is None else added + content
        if isinstance(items, Packed):
            vectors = self._packed(items, added, inputs, query_positions)
        else:
            vectors = self._padded(items, added, inputs, query_positions)
        vectors = self.norm(vectors)
        if self.transition is not None:
            actions = features[list(self.event).index(f"of_{self.transition}")]
            vectors = vectors + self._transitions(inputs.items, actions, query_positions).to(vectors.dtype)
        return cast(Tensor, vectors)

    def _transitions(self, items: Values, actions: Tensor, query_positions: QueryPositions | None) -> Tensor:
        """Return the vectors [m, E] of the newest items and their actions; zeros for empty histories.

        actions: codes of `transition`, as the items.
        """
        if isinstance(items, Packed):
            codes, length_R, first_R = items.values, items.lengths, items.bounds.offsets[:-1].long()
        else:
            num_rows, num_items = items.shape
            codes, length_R = items.flatten(), (items != PADDING).sum(dim=1)
            first_R = num_items * torch.arange(num_rows, device=items.device)
        if query_positions is None:
            prefix_length, first = length_R, first_R
        else:
            prefix_length, first = query_positions.prefix_length, first_R[query_positions.row]
        # a first value of PADDING is the event of empty histories
        newest = torch.where(prefix_length > 0, first + prefix_length, 0)
        item = nn.functional.pad(codes, (1, 0), value=PADDING)[newest]
        action = nn.functional.pad(actions.flatten(), (1, 0), value=PADDING)[newest]
        # shape[0], not len(): an export would fix the number of rows
        number = item.shape[0]
        rows = self._tables[0].look_up(self.transition_table, item).unflatten(-1, (-1, self.dim))
        of_action = rows[torch.arange(number, device=item.device), 1 + action]
        return cast(Tensor, self.transition_dropout(rows[:, 0] + of_action))

    def _padded(
        self, items_RT: Tensor, added: Tensor | None, inputs: HistoryInputs, query_positions: QueryPositions | None
    ) -> Tensor:
        num_rows, num_items = items_RT.shape
        device = items_RT.device
        length_R = (items_RT != PADDING).sum(dim=1)
        position_T = torch.arange(num_items + 1, device=device)
        vectors = self._items(items_RT)
        if added is not None:
            vectors = vectors + added.view_as(vectors).to(vectors.dtype)
        start = self.start.to(vectors.dtype).expand(num_rows, 1, -1)
        hidden = self._add_positions(torch.cat([start, vectors], dim=1), position_T, length_R.unsqueeze(1))
        hidden = self.dropout(hidden)
        bias, times = self._bias(hidden.dtype), inputs.times
        if times is not None:  # the start has the time of the first event
            times = times.view_as(items_RT)
            times = torch.cat([nn.functional.pad(times, (0, 1))[:, :1], times], dim=1)
        angle = self._angle(position_T, times)
        context = self._context(position_T, position_T, bias, angle, angle)
        for layer in self.layers[:-1]:
            hidden = self.run_layer(layer, hidden, hidden, context)
        if inputs.request is not None or inputs.request_times is not None:
            return self._at_requests(hidden, length_R, bias, times, inputs, query_positions)
        last = self.layers[-1]
        if query_positions is None:  # the last layer computes the newest position only
            newest = hidden[torch.arange(num_rows, device=device), length_R].unsqueeze(1)
            newest_R1 = length_R.unsqueeze(1)
            of_newest = self._angle(newest_R1, None if times is None else times.gather(1, newest_R1))
            context = self._context(newest_R1, position_T, bias, of_newest, angle)
            return self.run_layer(last, newest, hidden, context).squeeze(1)
        # all positions: most are used, and rows share one mask
        return self.run_layer(last, hidden, hidden, context)[query_positions.row, query_positions.prefix_length]

    def _at_requests(
        self, hidden: Tensor, length_R: Tensor, bias: Tensor | None, times: Tensor | None, inputs: HistoryInputs,
        query_positions: QueryPositions | None,
    ) -> Tensor:  # fmt: skip
        """Return the last layer's output [m, E] for requests [m, K], over padded histories `hidden` [R, T + 1, E].

        The rows of the layer are requests: several may have one prefix, and none is a key of another. times: of the
        positions, int64 [R, T + 1]; a request without a time has that of its newest event.
        """
        num_rows, width = hidden.shape[:2]
        if query_positions is None:
            query_positions = QueryPositions(torch.arange(num_rows, device=hidden.device), length_R, 1)
        row, prefix_length, most = query_positions
        count_R = torch.zeros_like(length_R).index_add_(0, row, torch.ones_like(row))
        most = most or max(1, int(count_R.max()))
        # The slot of a request is its number among those of its row.
        order = row.argsort(stable=True)
        slot = torch.empty_like(row)
        slot[order] = torch.arange(len(row), device=row.device) - (count_R.cumsum(0) - count_R)[row[order]]
        queries = hidden[row, prefix_length]
        if self.request_map is not None:
            queries = queries + self.request_map(inputs.request).to(hidden.dtype)
        cell = row * most + slot
        padded = hidden.new_zeros(num_rows * most, hidden.shape[2]).index_copy(0, cell, queries)
        empty, key_position = prefix_length.new_zeros(num_rows * most), torch.arange(width, device=row.device)
        position = empty.index_copy(0, cell, prefix_length).view(num_rows, most)
        query_times = None
        if times is not None:
            query_times = times[row, prefix_length]
            if inputs.request_times is not None:  # a dummy chunk has a row of them, but no queries
                request_times = inputs.request_times[: len(row)]
                unknown = (request_times == UNKNOWN_TIME) | (query_times == UNKNOWN_TIME)
                query_times = torch.where(unknown, query_times, request_times)
            query_times = empty.index_copy(0, cell, query_times).view(num_rows, most)
        angle, key_angle = self._angle(position, query_times), self._angle(key_position, times)
        context = self._context(position, key_position, bias, angle, key_angle)
        output = self.run_layer(self.layers[-1], padded.view(num_rows, most, -1), hidden, context)
        return output.flatten(0, 1)[cell]

    def _items(self, items: Tensor) -> Tensor:
        if self.config.items == "content":
            return self.start.new_zeros(*items.shape, self.dim)
        return self._scaled(self._tables[0].look_up(self.table, items))

    def _scaled(self, vectors: Tensor) -> Tensor:
        return vectors * self.dim**0.5 if self.config.item_scale else vectors

    def _add_positions(self, hidden: Tensor, position: Tensor, length: Tensor) -> Tensor:
        """Add the embeddings of ages, if there are any; `length` is the length of the history."""
        if self.config.positions != "age":
            return hidden
        return hidden + self.positions((length - position).clamp(min=0))

    def _packed(
        self, items: Packed, added: Tensor | None, inputs: HistoryInputs, query_positions: QueryPositions | None
    ) -> Tensor:
        length_R, device = items.lengths, items.row.device
        offsets, longest = items.bounds
        bounds = SequenceBounds(offsets + torch.arange(len(offsets), dtype=torch.int32, device=device), longest + 1)
        # Items are interleaved with one start token per row, which has code PADDING and position 0.
        target = torch.arange(1, len(items.row) + 1, device=device) + items.row
        empty = target.new_zeros(len(items.row) + items.num_rows)
        codes, position = (empty.index_copy(0, target, cells) for cells in (items.values, items.position + 1))
        vectors = self._items(codes)
        if added is not None:
            vectors = vectors.index_add(0, target, added.to(vectors.dtype))
        hidden = torch.where(position.unsqueeze(1) == 0, self.start.to(vectors.dtype), vectors)
        row = (position == 0).cumsum(0) - 1
        length = length_R[row]
        hidden = self.dropout(self._add_positions(hidden, position, length)).unsqueeze(0)
        bias = self._bias(hidden.dtype)
        order = None if self._has_kernel else items.longest_first
        times = inputs.times
        if times is not None:
            times = empty.index_copy(0, target, times)
            first = bounds.offsets[:-1].long()
            times = times.index_copy(0, first, times[(first + 1).clamp(max=len(times) - 1)])
        context = self._packed_context(items, position, bounds, bias, order, self._angle(position, times))
        for layer in self.layers[:-1]:
            hidden = self.run_layer(layer, hidden, hidden, context)
        if inputs.request is not None or inputs.request_times is not None:
            padded = hidden.new_zeros(items.num_rows, longest + 1, self.dim).index_put((row, position), hidden[0])
            if times is not None:
                times = times.new_zeros(items.num_rows, longest + 1).index_put((row, position), times)
            return self._at_requests(padded, length_R, bias, times, inputs, query_positions)
        last = self.layers[-1]
        if query_positions is not None:
            return self.run_layer(last, hidden, hidden, context)[
                0, bounds.offsets[query_positions.row] + query_positions.prefix_length
            ]
        # the newest position only, as above; it attends over its whole history
        cell = bounds.offsets[1:] - 1
        newest = self._newest_context(context, items, bias, order, cell)
        return self.run_layer(last, hidden[:, cell], hidden, newest).squeeze(0)

    def _packed_context(
        self, items: Packed, position: Tensor, bounds: SequenceBounds, bias: Tensor | None, order: Tensor | None,
        angle: Tensor | None,
    ) -> AttentionContext:  # fmt: skip
        """Return the context of packed histories: for the kernel, or per group of rows in `order`."""
        device = position.device
        if order is None:
            both = (bounds.offsets, bounds.offsets, bounds.longest, bounds.longest)
            return AttentionContext(
                position, position, None, True, angle, angle, self.packed_attention, *both, causal=True
            )
        groups = tuple(RowGroup(group.rows, group.longest + 1) for group in items.groups)
        starts, masks, end = [], [], 0
        for rows, width in groups:
            starts.append(torch.arange(rows, device=device) * width + end)
            end += rows * width
            position_T = torch.arange(width, device=device)
            masks.append(_mask(position_T, position_T, bias))
        start = torch.empty_like(order).index_copy_(0, order, torch.cat(starts))
        slot = start[(position == 0).cumsum(0) - 1] + position
        return AttentionContext(
            position,
            position,
            None,
            self._fused(device),
            angle,
            angle,
            layout=AttentionLayout(slot, slot, False, groups, tuple(masks)),
        )

    def _newest_context(
        self, context: AttentionContext, items: Packed, bias: Tensor | None, order: Tensor | None, cell: Tensor
    ) -> AttentionContext:
        """Return `context` restricted to the newest position of each packed history, which is at `cell`."""
        length_R, layout = items.lengths, context.layout
        number = torch.arange(items.num_rows + 1, device=length_R.device)
        if context.query_angle is not None:
            context = context._replace(query_angle=context.query_angle[cell])
        if order is None or layout is None:
            return context._replace(query_position=length_R, query_offsets=number.int(), query_longest=1, causal=False)
        lengths = length_R[order].split([group.rows for group in layout.groups])
        masks = tuple(
            _mask(length.unsqueeze(1), torch.arange(group.longest, device=length.device), bias)
            for length, group in zip(lengths, layout.groups, strict=True)
        )
        slot = torch.empty_like(order).index_copy_(0, order, number[:-1])
        layout = layout._replace(query_slot=slot, newest_only=True, masks=masks)
        return context._replace(query_position=length_R, layout=layout)

    def _context(
        self, query_position: Tensor, key_position: Tensor, bias: Tensor | None, query_angle: Tensor | None,
        key_angle: Tensor | None,
    ) -> AttentionContext:  # fmt: skip
        """Return the context of query positions, [A] or [R, A], and key positions [T], and their angles."""
        mask = _mask(query_position, key_position, bias)
        fused = self._fused(key_position.device)
        return AttentionContext(query_position, key_position, mask, fused, query_angle, key_angle)

    def _angle(self, position: Tensor, times: Tensor | None) -> Tensor | None:
        """Return the angles of rotary embeddings, [A, W / 2] or [R, A, W / 2], by positions, times or both."""
        pairs = self.dim // self.config.heads // 2
        if self.config.positions != "rotary":
            return None if times is None else time_angle(times, pairs)
        if times is None:
            return position_angle(position, pairs)
        by_position = position_angle(position, pairs - pairs // 2).expand(*times.shape, -1)
        return torch.cat([by_position, time_angle(times, pairs // 2)], dim=-1)

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return the learned bias per distance, [T, h], for positions=relative.

        Called once per forward, independent of the groups: under ZeRO-3 each call of a module is a collective.
        """
        if self.config.positions != "relative":
            return None
        bias: Tensor = self.positions(torch.arange(self.positions.num_embeddings, device=self.start.device))
        return bias.to(dtype)

    def _fused(self, device: torch.device) -> bool:
        """Return whether masked attention uses the fused kernel."""
        learned_on_cpu = self.config.positions == "relative" and device.type == "cpu"  # no fused backward for the mask
        return not (self.training and (self._eager_in_training or learned_on_cpu))

    def flops(self, name: str, size: SideSize) -> float:
        """Return the operations of a forward; with one query per row the last layer computes one position only."""
        length_R = size.filled[name].astype(float) + 1  # the start token
        flops, key_value = 0.0, 4 * self.dim**2
        for number, layer in enumerate(self.layers, 1):
            newest_only = size.queries is None and number == len(self.layers)
            read_R = np.ones_like(length_R) if newest_only else length_R
            flops += float(length_R.sum()) * key_value
            flops += float(read_R.sum()) * (linear_flops(layer) - key_value)
            flops += float((read_R * length_R).sum()) * 2 * self.dim * self.config.pair_products
        return flops


def _mask(query_position: Tensor, key_position: Tensor, bias: Tensor | None) -> Tensor:
    """Return the causal mask, [1 or R, 1 or h, A, T], for query positions [A] or [R, A] and key positions [T]."""
    distance = query_position.unsqueeze(-1) - key_position
    mask = (distance >= 0).unsqueeze(-3)
    if bias is not None:
        # the fused kernel of a GPU requires contiguous rows
        by_head = nn.functional.embedding(distance.clamp(min=0), bias).movedim(-1, -3).contiguous()
        mask = by_head.masked_fill(~mask, MASKED_SCORE)
    return mask if mask.dim() == 4 else mask.unsqueeze(0)  # the fused kernel takes masks of 2 or 4 dimensions
