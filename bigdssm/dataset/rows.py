"""Decoded rows, before their conversion to tensors.

A row has one query (a pair), or is a segment of a sequence: a user's events in order of time. A row (sequence, first,
end) has one query per target in items[first:end]. The target at position p is predicted from items[:p]. Shapes: R rows,
m queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from bigdssm.config import DataConfig, VisitConfig
from bigdssm.dataset.catalogue import MappedTable
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError
from bigdssm.features import ragged
from bigdssm.features.base import PADDING, REQUEST_PREFIX
from bigdssm.features.conditions import matching_events
from bigdssm.features.ragged import Column, Ragged, offsets_of

EVENT_COLUMNS = ("items", "relevance")  # lists with one value per event, in addition to further event columns
TIME_COLUMN = "event_time"  # list of float64, if events have times
EVENT_PREFIX = "event."  # of the columns of events' features
VERSION_COLUMN = "version"  # list, if items have times: the item version that an event saw
FORGOTTEN_ID = 0  # the query id of sequences and rows that `bigdssm forget` has emptied
FORGOTTEN_DOC = -(1 << 63)  # and the document of such a row of pairs
EVENT_BITS = 22  # low bits of a query key; the row id is in the bits above
SEQUENCES_AT_ONCE = 1 << 12
ROW_ARRAYS = ("row_ids", "sequence", "history_start")  # of Rows: the arrays per row, and per query
QUERY_ARRAYS = ("doc_rows", "relevance", "query_ids", "position", "outcome", "num_earlier", "doc_ids")


@dataclass(frozen=True)
class TargetEvents:
    """The targets among all events of sequences, by the rules on events.

    The requested action and the relevance of a target are those of its outcome, an event of its visit.
    """

    is_target: Ragged  # bool, per event of every sequence
    outcome: np.ndarray | None = None  # int32 [events]: events from a target to its outcome; None: it is the target

    def from_sequence(self, first: int) -> TargetEvents:
        """Return the events of the sequences from `first` on."""
        return replace(self, is_target=Ragged(self.is_target.values, self.is_target.offsets[first:]))

    @classmethod
    def concat(cls, parts: Sequence[TargetEvents]) -> TargetEvents:
        """Concatenate the events of several tables of sequences."""
        is_target = Ragged.concat([part.is_target for part in parts])
        outcomes = [part.outcome for part in parts if part.outcome is not None]
        return cls(is_target, np.concatenate(outcomes) if outcomes else None)


@dataclass(frozen=True)
class Targets:
    """The m targets of R rows, ordered by row."""

    row: np.ndarray  # int64 [m]
    position: np.ndarray  # int64 [m]: in the sequence
    item: np.ndarray  # int64 [m]: the catalogue row
    relevance: np.ndarray  # float32 [m]: of the outcome
    outcome: np.ndarray | None = None  # int64 [m]: position of the outcome, see `TargetEvents`; None: `position`

    @classmethod
    def of(
        cls, table: MappedTable, sequence: np.ndarray, first: np.ndarray, end: np.ndarray,
        events: TargetEvents | None = None,
    ) -> Targets:  # fmt: skip
        """Read the targets of rows (int64 [R], in range): all events, or with `events` those that are targets."""
        items = table.take_slices("items", sequence, first, end)
        relevance = table.take_slices("relevance", sequence, first, end)
        row = np.repeat(np.arange(len(sequence)), items.lengths)
        position = np.arange(len(row)) - offsets_of(items.lengths)[row] + first[row]
        targets = cls(row, position, items.values.astype(np.int64), relevance.values)
        if events is None:
            return targets
        event = events.is_target.offsets[sequence[row]] + position
        is_target = events.is_target.values[event]
        targets = targets.take(is_target)
        if events.outcome is None:
            return targets
        outcome = targets.position + events.outcome[event[is_target]]
        relevance = table.take_slices("relevance", sequence[targets.row], outcome, outcome + 1)
        return replace(targets, relevance=relevance.values, outcome=outcome)

    def faults(self, num_docs: int) -> Iterator[tuple[int, str]]:
        """Yield (target number, reason) of the invalid targets."""
        for number in np.flatnonzero(~self.valid(num_docs)).tolist():
            item, relevance = self.item[number], self.relevance[number]
            if 0 <= item < num_docs:
                yield number, f"relevance is {relevance}, needs a number of at least 0"
            else:
                yield number, f"unknown document: {item} is not a row of the catalogue's {num_docs}"

    def valid(self, num_docs: int) -> np.ndarray:
        """Return the mask of valid targets, bool [m]."""
        in_catalogue = (self.item >= 0) & (self.item < num_docs)
        return np.asarray(in_catalogue & np.isfinite(self.relevance) & (self.relevance >= 0))

    def take(self, targets: np.ndarray) -> Targets:
        """Select targets by index or mask."""
        outcome = None if self.outcome is None else self.outcome[targets]
        return Targets(self.row[targets], self.position[targets], self.item[targets], self.relevance[targets], outcome)


@dataclass(frozen=True)
class Rows:
    """Rows as columns.

    A history contains the codes of the most recent items before the row's last query, in chronological order.
    """

    step: int
    row_ids: np.ndarray  # int64 [R]: row number within the split
    query: dict[str, Column]  # per row
    doc_rows: np.ndarray  # int64 [m]: catalogue rows; -1 without a catalogue
    relevance: np.ndarray  # float32 [m]
    query_ids: np.ndarray  # int64 [m]
    row: np.ndarray | None = None  # int64 [m], ascending: the row of each query; None: one query per row
    position: np.ndarray | None = None  # int64 [m]: in the sequence; the query's history is items[:prefix]
    outcome: np.ndarray | None = None  # int64 [m]: position of the target's outcome, see `TargetEvents`; None: its own
    num_earlier: np.ndarray | None = None  # int64 [m]: with requests, the history is items[:num_earlier], see `prefix`
    history_start: np.ndarray | None = None  # int64 [R]: the history starts at items[history_start]
    sequence: np.ndarray | None = None  # int64 [R]: sequence number
    doc: dict[str, Column] = field(default_factory=dict)  # rows with inline documents: their features
    doc_ids: np.ndarray | None = None  # int64 [m], rows with inline documents
    request: dict[str, Column] = field(default_factory=dict)  # per query: features of the request
    num_invalid: int = 0  # targets that were skipped when the rows were read
    sequences: MappedTable | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.row_ids)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the sequences, which the receiving process maps itself."""
        return {**self.__dict__, "sequences": None}

    @property
    def num_queries(self) -> int:
        """The number of queries, m."""
        return len(self.query_ids)

    @property
    def row_of_query(self) -> np.ndarray:
        """The row of each query, int64 [m]."""
        return np.arange(len(self)) if self.row is None else self.row

    @property
    def prefix(self) -> np.ndarray | None:
        """The number of events of each query's history, int64 [m]; None without sequences.

        They are those before its target, or with requests those before the target's time.
        """
        return self.position if self.num_earlier is None else self.num_earlier

    @property
    def inputs(self) -> dict[str, Column]:
        """The columns of the query side: features per row, and those of the requests, per query."""
        return {**self.query, **{REQUEST_PREFIX + name: column for name, column in self.request.items()}}

    @property
    def query_keys(self) -> np.ndarray:
        """Keys of the queries, int64 [m], ordered by (row id, position).

        The position is 0 in datasets without sequences. Keys are unique for positions below 2^EVENT_BITS - 1.
        """
        position = 0 if self.position is None else np.minimum(self.position, (1 << EVENT_BITS) - 1)
        return np.asarray((self.row_ids[self.row_of_query] << EVENT_BITS) | position)

    def seen_ragged(
        self, queries: np.ndarray | None = None, newest: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return, per query, the catalogue rows of the events of its history (`prefix`).

        queries: query numbers (default: all); newest: the maximum number per query. Returns values and offsets [m + 1],
        without values if the dataset has no sequences.
        """
        queries = np.arange(self.num_queries) if queries is None else queries
        if self.sequences is None or self.sequence is None or self.prefix is None:
            return np.empty(0, np.int64), np.zeros(len(queries) + 1, np.int64)
        sequence = self.sequence[self.row_of_query[queries]]
        end = self.prefix[queries]
        start = np.zeros_like(end) if newest is None else np.maximum(end - newest, 0)
        seen = self.sequences.take_slices("items", sequence, start, end)
        return seen.values.astype(np.int64, copy=False), seen.offsets

    def seen(self, i: int) -> np.ndarray:
        """Return the catalogue rows of the events before query i's target, int64, oldest first."""
        return self.seen_ragged(np.array([i]))[0]

    def take(self, rows: np.ndarray) -> Rows:
        """Select rows by number (int64), with all their queries."""
        row, queries = None, rows
        if self.row is not None:
            edges = np.searchsorted(self.row, np.arange(len(self) + 1))
            selected = ragged.gather_ranges(np.arange(self.num_queries), edges[rows], edges[rows + 1])
            row, queries = np.repeat(np.arange(len(rows)), selected.lengths), selected.values
        arrays: dict[str, Any] = {
            name: getattr(self, name)[numbers]
            for names, numbers in ((ROW_ARRAYS, rows), (QUERY_ARRAYS, queries))
            for name in names
            if getattr(self, name) is not None
        }
        return Rows(
            step=self.step,
            query={name: ragged.take(column, rows) for name, column in self.query.items()},
            doc={name: ragged.take(column, rows) for name, column in self.doc.items()},
            request={name: ragged.take(column, queries) for name, column in self.request.items()},
            sequences=self.sequences,
            row=row,
            **arrays,
        )

    @classmethod
    def concat(cls, parts: Sequence[Rows]) -> Rows:
        """Concatenate rows of one step."""
        if len(parts) == 1:
            return parts[0]

        row = None
        if parts[0].row is not None:
            bases = np.cumsum([0] + [len(part) for part in parts[:-1]])
            row = np.concatenate([part.row_of_query + base for part, base in zip(parts, bases, strict=True)])
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ROW_ARRAYS + QUERY_ARRAYS
            if getattr(parts[0], name) is not None
        }
        return cls(
            step=parts[0].step,
            query={name: ragged.concat([part.query[name] for part in parts]) for name in parts[0].query},
            doc={name: ragged.concat([part.doc[name] for part in parts]) for name in parts[0].doc},
            request={name: ragged.concat([part.request[name] for part in parts]) for name in parts[0].request},
            sequences=parts[0].sequences,
            row=row,
            **arrays,
        )


@dataclass(frozen=True)
class EventRules:
    """The keys of a config on events; by default every event is a target, and seen items are excluded."""

    targets: Mapping[str, str] = field(default_factory=dict)  # condition by split
    exclude_seen: bool | str = True
    visit: VisitConfig = field(default_factory=VisitConfig)
    item_rows: bool = False  # whether histories have the catalogue rows of their items, for models of their contents

    @classmethod
    def of(cls, config: DataConfig) -> EventRules:
        """Return the rules of a config."""
        return cls(dict(config.targets or {}), config.exclude_seen, config.visit)

    @property
    def row_keys(self) -> dict[str, Any]:
        """The keys that determine rows, in JSON types; empty by default."""
        keys: dict[str, Any] = {f"data.targets.{split}": text for split, text in self.targets.items()}
        if self.visit.is_set:
            keys["data.visit"] = {"feature": self.visit.feature, "gap_s": self.visit.gap_s}
        if self.visit.funnel:
            keys["data.visit.funnel"] = {name: list(steps) for name, steps in self.visit.funnel.items()}
        return keys

    def selects(self, split: str) -> bool:
        """Return whether the rules can reject events of a split as targets."""
        return split in self.targets or self.visit.is_set

    def target_events(
        self, table: MappedTable, schema: Schema, time_unit: float, split: str, cut_offs: Sequence[float] = ()
    ) -> TargetEvents:
        """Return which events of all sequences are targets in `split`, and their outcomes.

        An event is no target if the history of its query contains its item in the same visit. With a funnel, the first
        event of an item in a visit is its only target, and its outcome is the earliest of the events with the furthest
        step; those after one of the times `cut_offs`, at which a later split starts, do not count. Conditions read the
        action of the outcome. Raises ConfigError: a condition is invalid.
        """
        masks = [np.zeros(0, bool)]  # of a table without rows
        outcomes = [np.zeros(0, np.int32)]
        action = self.visit.action
        for events in EventSlices.in_chunks(table):
            mask, feature = np.ones(int(events.end.sum()), bool), events.feature
            if self.visit.is_set:
                items, visits = events.column("items"), self._visits(events, time_unit)
                first = _first_events(items, visits)
                if action is not None:
                    step = self.steps(schema, events.feature(action))
                    outcome = _furthest_events(first, step, events.periods(cut_offs))
                    mask = outcome >= 0
                    outcome = np.where(mask, outcome, np.arange(len(mask)))
                    outcomes.append((outcome - np.arange(len(mask))).astype(np.int32))
                    feature = partial(_feature_of_targets, events, action, outcome)
                else:
                    num_earlier = events.num_earlier(schema.ties) if schema.request else None
                    mask = ~_repeated(items, first, num_earlier)
            if split in self.targets:
                mask &= matching_events(self.targets[split], f"data.targets.{split}", schema.event, feature)
            masks.append(mask)
        offsets = offsets_of(table.lengths("items", np.arange(table.num_rows)))
        return TargetEvents(Ragged(np.concatenate(masks), offsets), np.concatenate(outcomes) if action else None)

    def steps(self, schema: Schema, actions: np.ndarray) -> np.ndarray:
        """Return the step of the funnel of each encoded action, int64; −1: none.

        Raises ConfigError: the events have no such feature, or it has no such value.
        """
        assert self.visit.action is not None
        feature = schema.event.get(self.visit.action)
        if feature is None:
            names = ", ".join(schema.event) or "none"
            raise ConfigError(f"data.visit.funnel: the events have no feature {self.visit.action}, only {names}")
        step = np.full(len(actions), -1)
        for number, value in enumerate(self.visit.funnel[self.visit.action]):
            try:
                operands = feature.operands("=", (value,))
            except ConfigError as error:
                raise ConfigError(f"data.visit.funnel: {error}") from None
            step[feature.matches(actions, "=", operands)] = number
        return step

    def excluded(
        self, items: Ragged, exclude_seen: bool | str, schema: Schema, feature: Callable[[str], np.ndarray],
        visit: Callable[[], tuple[Ragged, np.ndarray]] | None = None, time_unit: float = 1.0,
    ) -> Ragged:  # fmt: skip
        """Return the `items` of histories to exclude from answers: seen ones, and those of the request's visit.

        `feature` returns a feature of all events; `visit` their sessions or times, and those of the requests. Raises
        ConfigError: a condition is invalid.
        """
        if exclude_seen is True:
            return items
        mask = np.zeros(len(items.values), bool)
        if exclude_seen:
            mask = matching_events(exclude_seen, "data.exclude_seen", schema.event, feature)
        if self.visit.is_set and visit is not None:
            events, request = visit()
            of_request = np.repeat(request, events.lengths)
            if self.visit.feature is not None:
                mask |= (events.values == of_request) & (of_request != PADDING)
            else:  # the events of the visit are those without a break between them and the request
                next_time = np.append(events.values[1:], np.nan)
                last = events.offsets[1:][events.lengths > 0] - 1  # the request follows the last event of a history
                next_time[last] = of_request[last]
                is_break = ~(next_time - events.values <= self._gap(time_unit))  # also after an unknown time, NaN
                num_breaks = np.append(0, np.cumsum(is_break))
                mask |= num_breaks[:-1] == np.repeat(num_breaks[events.offsets[1:]], events.lengths)
        return Ragged(items.values[mask], np.append(0, np.cumsum(mask))[items.offsets])

    def visit_column(self) -> str:
        """Return the column of sequences with the sessions or times of events."""
        return TIME_COLUMN if self.visit.feature is None else EVENT_PREFIX + self.visit.feature

    def _gap(self, time_unit: float) -> float:
        return (self.visit.gap_s or 0.0) / time_unit

    def _visits(self, events: EventSlices, time_unit: float) -> np.ndarray:
        """Return the visit of each event, int64, distinct within its sequence; PADDING: none."""
        values = events.column(self.visit_column())
        if self.visit.feature is not None:
            return values.values
        begins = ~(np.diff(values.values, prepend=np.nan) <= self._gap(time_unit))
        begins[values.offsets[:-1][values.lengths > 0]] = True
        return PADDING + np.cumsum(begins)  # from PADDING + 1


@dataclass(frozen=True)
class EventSlices:
    """The events [first, end) of sequences of a table; arrays are int64 [sequences]."""

    table: MappedTable
    sequence: np.ndarray
    first: np.ndarray
    end: np.ndarray

    @classmethod
    def in_chunks(cls, table: MappedTable) -> Iterator[EventSlices]:
        """Yield all events of a table, in chunks of sequences."""
        for begin in range(0, table.num_rows, SEQUENCES_AT_ONCE):
            sequences = np.arange(begin, min(begin + SEQUENCES_AT_ONCE, table.num_rows))
            yield cls(table, sequences, np.zeros_like(sequences), table.lengths("items", sequences))

    def column(self, name: str) -> Ragged:
        """Return a list column."""
        return self.table.take_slices(name, self.sequence, self.first, self.end)

    def feature(self, name: str) -> np.ndarray:
        """Return a feature of all events."""
        return self.column(EVENT_PREFIX + name).values

    def periods(self, cut_offs: Sequence[float]) -> np.ndarray:
        """Return the number of `cut_offs` up to the time of each event, int64 [events]."""
        if not cut_offs:
            return np.zeros(int((self.end - self.first).sum()), np.int64)
        return np.searchsorted(np.sort(np.array(cut_offs)), self.column(TIME_COLUMN).values, "right")

    def num_earlier(self, ties: str) -> np.ndarray:
        """Return the number of events before the time of each event, int64 [events]; `first` is 0.

        ties: as data.ties; with `order`, preceding events of the same time are earlier, too.
        """
        times = self.column(TIME_COLUMN)
        index = np.arange(len(times.values))
        is_later = (np.diff(times.values, prepend=-np.inf) > 0) | (ties == "order")
        is_later[times.offsets[:-1][times.lengths > 0]] = True
        first_of_time: np.ndarray = np.maximum.accumulate(np.where(is_later, index, 0))
        return first_of_time - np.repeat(times.offsets[:-1], times.lengths)


def _first_events(items: Ragged, visits: np.ndarray) -> np.ndarray:
    """Return the index of the first event of each event's sequence, visit and item, int64; its own without a visit."""
    sequence = np.repeat(np.arange(len(items)), items.lengths)
    # the events of one (sequence, visit, item) become neighbours, the earliest first, as lexsort is stable
    order = np.lexsort((items.values, visits, sequence))
    keys = np.stack([sequence[order], visits[order], items.values[order]])
    is_first = np.ones(len(order), bool)
    is_first[1:] = (keys[:, 1:] != keys[:, :-1]).any(axis=0) | (visits[order][1:] == PADDING)
    first = np.empty(len(order), np.int64)
    first[order] = order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
    return first


def _repeated(items: Ragged, first: np.ndarray, num_earlier: np.ndarray | None) -> np.ndarray:
    """Return whether the `first` event of an event's visit and item is before it; `num_earlier`: as its query reads."""
    begin = np.repeat(items.offsets[:-1], items.lengths)
    position = np.arange(len(first)) - begin
    return np.asarray(first - begin < (position if num_earlier is None else num_earlier))


def _furthest_events(first: np.ndarray, step: np.ndarray, period: np.ndarray) -> np.ndarray:
    """Return, for each event that is the first of its visit and item, the earliest event with the furthest step, int64.

    `first`: the first event of each event; `step`: −1 counts as none. Events of a later period than the first do not
    count. −1: no first event, or one without steps.
    """
    counted = np.flatnonzero((step >= 0) & (period == period[first]))
    best = counted[np.lexsort((counted, -step[counted], first[counted]))]
    groups, begin = np.unique(first[best], return_index=True)
    furthest = np.full(len(first), -1)
    furthest[groups] = best[begin]
    return furthest


def _feature_of_targets(events: EventSlices, action: str, outcome: np.ndarray, name: str) -> np.ndarray:
    """Return a feature of events: of `action` the value of the event's outcome, an index."""
    values = events.feature(name)
    return values[outcome] if name == action else values
