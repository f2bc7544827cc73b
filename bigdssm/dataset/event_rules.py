"""Rules on the events of sequences: which are targets, which items are excluded from answers, and visits.

They belong to a run, not to a dataset: runs with other rules read the same dataset (`Dataset.with_rules`). Whether an
event is a target, and what its query excludes, depends on earlier events and on the event's request (time, session).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bigdssm.config import DataConfig, VisitConfig
from bigdssm.dataset.catalogue import MappedTable
from bigdssm.dataset.rows import EVENT_PREFIX, TIME_COLUMN
from bigdssm.dataset.schema import Schema
from bigdssm.features.base import PADDING
from bigdssm.features.conditions import matching_events
from bigdssm.features.ragged import Ragged, offsets_of

SEQUENCES_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class EventRules:
    """The keys of a config on events; by default every event is a target, and seen items are excluded."""

    targets: Mapping[str, str] = field(default_factory=dict)  # condition by split
    exclude_seen: bool | str = True
    visit: VisitConfig = field(default_factory=VisitConfig)
    item_rows: bool = False  # whether histories have the catalogue rows of their items, for models of their contents

    @classmethod
    def of(cls, config: DataConfig) -> "EventRules":
        """Return the rules of a config."""
        return cls(dict(config.targets or {}), config.exclude_seen, config.visit)

    @property
    def row_keys(self) -> dict[str, Any]:
        """The keys that determine rows, in JSON types; empty by default."""
        visit = {"data.visit": asdict(self.visit)} if self.visit.is_set else {}
        return {f"data.targets.{split}": text for split, text in self.targets.items()} | visit

    def selects(self, split: str) -> bool:
        """Return whether the rules can reject events of a split as targets."""
        return split in self.targets or self.visit.is_set

    def target_mask(self, table: MappedTable, schema: Schema, time_unit: float, split: str) -> Ragged:
        """Return whether each event of all sequences is a target in `split`, bool.

        An event is no target if the history of its query contains its item in the same visit. Raises ConfigError: a
        condition is invalid.
        """
        every = np.arange(table.num_rows)
        masks = [np.zeros(0, bool)]  # of a table without rows
        for begin in range(0, table.num_rows, SEQUENCES_AT_ONCE):
            sequences = every[begin : begin + SEQUENCES_AT_ONCE]
            events = EventSlices(table, sequences, np.zeros_like(sequences), table.lengths("items", sequences))
            mask = np.ones(int(events.end.sum()), bool)
            if split in self.targets:
                mask &= matching_events(self.targets[split], f"data.targets.{split}", schema.event, events.feature)
            if self.visit.is_set:
                num_earlier = events.num_earlier(schema.ties) if schema.request else None
                mask &= ~_repeated(events.column("items"), self._visits(events, time_unit), num_earlier)
            masks.append(mask)
        return Ragged(np.concatenate(masks), offsets_of(table.lengths("items", every)))

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

    def _visits(self, events: "EventSlices", time_unit: float) -> np.ndarray:
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

    def column(self, name: str) -> Ragged:
        """Return a list column."""
        return self.table.take_slices(name, self.sequence, self.first, self.end)

    def feature(self, name: str) -> np.ndarray:
        """Return a feature of all events."""
        return self.column(EVENT_PREFIX + name).values

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


def _repeated(items: Ragged, visits: np.ndarray, num_earlier: np.ndarray | None) -> np.ndarray:
    """Return whether the visit of an event has its item among the first `num_earlier` events (None: all before it)."""
    sequence = np.repeat(np.arange(len(items)), items.lengths)
    position = np.arange(len(sequence)) - items.offsets[sequence]
    # the events of one (sequence, visit, item) become neighbours, the earliest first, as lexsort is stable
    order = np.lexsort((items.values, visits, sequence))
    keys = np.stack([sequence[order], visits[order], items.values[order]])
    is_first = np.ones(len(order), bool)
    is_first[1:] = (keys[:, 1:] != keys[:, :-1]).any(axis=0)
    first = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
    earliest = position[order][first]
    repeated = np.empty(len(order), bool)
    repeated[order] = earliest < (position if num_earlier is None else num_earlier)[order]
    return repeated & (visits != PADDING)
