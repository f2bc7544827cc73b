"""A chain of the last items, with the options of a shop's own, and their choice on the validation split.

In: the events of a dataset, read once (`ChainEvents`). Out: scores of all documents per request (`Chain`).

A transition leads from an item i to a later event of an item j, where i is one of the last distinct items before that
event. For a request with the last items i, at most `window`, document j has the sum over its transitions of

    1 / distance of i at the event · 1 / distance of i at the request
    · 2^(-age / half_life_days)    the age of the event on the day of the request
    · other_source                 if the action of i at the event is not that of i in the request
    · other_requested                 if the action of the event is not the requested one

The sums of a request are divided by their maximum, so that a share of the popularity of j that is too small to change
the order of different sums decides between equal ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import EVENT_PREFIX, Rows
from bigdssm.dataset.transitions import QUERIES_AT_ONCE
from bigdssm.errors import ConfigError, DataError
from bigdssm.evaluation.counted_events import counted_splits, is_split_by_time, request_days, single_valued
from bigdssm.evaluation.evaluate import evaluate_scores
from bigdssm.features.ragged import gather_ranges

MOST_ITEMS = 10  # the largest window
EVENTS_PER_ITEM = 4  # newest events that are read per item of the window
NO_ACTION = -1
POPULARITY_WEIGHT = 1e-9  # of a document's share of the counted events
TRANSITIONS_AT_ONCE = 1 << 23


@dataclass(frozen=True)
class ChainOptions:
    """Options of a chain; by default transitions neither age nor depend on actions."""

    window: int = 3  # distinct items
    half_life_days: float = 0.0  # 0: transitions do not age
    other_source: float = 1.0
    other_requested: float = 1.0

    def __str__(self) -> str:
        """Return the options in words."""
        items = "last item" if self.window == 1 else f"last {self.window} items"
        age = f"half-life {self.half_life_days:g} days" if self.half_life_days else ""
        source = f"other sources × {self.other_source:g}" if self.other_source < 1 else ""
        requested = f"other actions × {self.other_requested:g}" if self.other_requested < 1 else ""
        return ", ".join(part for part in (items, age, source, requested) if part)


GRID: Mapping[str, tuple[Any, ...]] = {  # values by option; each option starts from the best of those before it
    "window": (3, 1, 2, 5, 10),
    "half_life_days": (0.0, 60.0, 20.0, 7.0),
    "other_source": (1.0, 0.3, 0.1),
    "other_requested": (1.0, 0.3, 0.1, 0.03),
}


@dataclass(frozen=True)
class LastItems:
    """The last distinct items of histories; arrays are int64 [items], ordered by request and distance."""

    request: np.ndarray
    item: np.ndarray  # catalogue row
    action: np.ndarray  # of the newest event of the item; NO_ACTION without actions
    distance: np.ndarray  # 1 for the newest item

    @classmethod
    def of(cls, rows: Rows, window: int, action: str | None) -> LastItems:
        """Read the last `window` distinct items of each history, and their action, a feature of events."""
        events_read = EVENTS_PER_ITEM * window
        items, offsets = rows.seen_ragged(newest=events_read)
        actions = np.full(len(items), NO_ACTION)
        if action is not None and rows.sequences is not None and rows.sequence is not None:
            assert rows.prefix is not None
            start = np.maximum(rows.prefix - events_read, 0)
            sequence = rows.sequence[rows.row_of_query]
            actions = rows.sequences.take_slices(EVENT_PREFIX + action, sequence, start, rows.prefix).values
        request = np.repeat(np.arange(rows.num_queries), np.diff(offsets))
        age = offsets[1:][request] - np.arange(len(items))  # in events

        # of the events of one item in a history the newest
        order = np.lexsort((age, items, request))
        is_newest = np.ones(len(order), bool)
        is_newest[1:] = (np.diff(request[order]) != 0) | (np.diff(items[order]) != 0)
        newest = order[is_newest]
        newest = newest[np.lexsort((age[newest], request[newest]))]

        first_of_request = np.searchsorted(request[newest], np.arange(rows.num_queries))
        distance = np.arange(len(newest)) - first_of_request[request[newest]] + 1
        last = cls(request[newest], items[newest], actions[newest].astype(np.int64), distance)
        return last.within(window)

    def within(self, window: int) -> LastItems:
        """Return the items of distances up to `window`."""
        is_near = self.distance <= window
        return LastItems(*(getattr(self, column.name)[is_near] for column in fields(self)))


class ChainEvents:
    """The transitions of a dataset, of the largest window, ordered by source, then by day.

    With a split by time they are those of all splits, and a request counts those before its day; `daily=False` or
    another split: those of the train split. Without times all events are of one day.
    """

    def __init__(self, dataset: Dataset, action: str | None = None, *, daily: bool = True) -> None:
        """Read the targets of `dataset`; `action` is a feature of its events.

        Raises: DataError: pairs without histories; ConfigError: no such feature.
        """
        if dataset.sequences is None:
            raise DataError(f"{dataset.dir} has pairs without histories, so no transitions")
        names = list(single_valued(dataset.schema.event))
        if action is not None and action not in names:
            raise ConfigError(f"feature={action}: needs a categorical feature of data.event, of {names}")
        splits, counted = counted_splits(dataset)
        self.rebuilt = is_split_by_time(dataset) and daily
        if not self.rebuilt:
            splits = ["train"]
        self.dataset = counted
        self.action = action

        events: list[np.ndarray] = [np.zeros((2, 0), np.int64)]  # day, item
        transitions: list[np.ndarray] = [np.zeros((6, 0), np.int32)]  # ten per event: the large table
        for split in splits:
            for rows in counted.iterate(split, QUERIES_AT_ONCE):
                relevant = rows.relevance > 0
                days = request_days(counted, rows)
                events.append(np.stack([days[relevant], rows.doc_rows[relevant]]))
                last = LastItems.of(rows, MOST_ITEMS, action)
                requested = self._requested(rows, of_event=True)
                of_events = np.stack([days, rows.doc_rows, requested])[:, last.request]
                sources = np.stack([last.item, last.action, last.distance])
                of_rows = np.concatenate([sources, of_events])[:, relevant[last.request]]
                transitions.append(of_rows.astype(np.int32))
        self.event_day, self.event_item = _by_day(np.concatenate(events, axis=1))

        source, source_action, distance, day, item, requested = np.concatenate(transitions, axis=1)
        order = np.lexsort((day, source))
        self.day = day[order]
        self.item = item[order]
        self.distance = distance[order].astype(np.int8)
        self.source_action = source_action[order]
        self.requested = requested[order]
        self.first_day = int(self.day.min()) if len(self.day) else 0
        self.num_days = int(self.day.max()) - self.first_day + 1 if len(self.day) else 1
        self.key = source[order].astype(np.int64) * self.num_days + self.day - self.first_day

    def _requested(self, rows: Rows, *, of_event: bool) -> np.ndarray:
        """Return the requested action of requests, int64 [m]; NO_ACTION: none. of_event: else that of their target."""
        if self.action is None:
            return np.full(rows.num_queries, NO_ACTION)
        if self.action in rows.request:
            return np.asarray(rows.request[self.action], np.int64)
        if not of_event or rows.sequences is None or rows.sequence is None or rows.position is None:
            return np.full(rows.num_queries, NO_ACTION)
        sequence = rows.sequence[rows.row_of_query]
        column = EVENT_PREFIX + self.action
        of_target = rows.sequences.take_slices(column, sequence, rows.position, rows.position + 1)
        return of_target.values.astype(np.int64)

    def popularity(self, before: int | None) -> np.ndarray:
        """Return the share of each document in the events before a day (None: all), float64 [N]."""
        end = len(self.event_day) if before is None else int(np.searchsorted(self.event_day, before))
        counts = np.bincount(self.event_item[:end], minlength=self.dataset.catalogue.num_docs)
        return counts / max(1, end)

    def scores(self, rows: Rows, options: ChainOptions) -> np.ndarray:
        """Return the scores of all documents, float64 [m, N]."""
        num_docs = self.dataset.catalogue.num_docs
        days = request_days(self.dataset, rows)
        requested = self._requested(rows, of_event=False)
        last = LastItems.of(rows, options.window, self.action)

        before = np.full(rows.num_queries, self.num_days)
        if self.rebuilt:
            before = np.clip(days - self.first_day, 0, self.num_days)
        first_key = last.item * self.num_days
        begin = np.searchsorted(self.key, first_key)
        end = np.searchsorted(self.key, first_key + before[last.request])

        scores = np.zeros((rows.num_queries, num_docs))
        for part in _parts(end - begin):
            entries = gather_ranges(np.arange(len(self.key)), begin[part], end[part])
            entry = entries.values
            source = np.repeat(np.arange(len(last.item))[part], entries.lengths)
            request = last.request[source]
            weight = 1.0 / (self.distance[entry] * last.distance[source])
            weight[self.distance[entry] > options.window] = 0.0
            if options.half_life_days:
                age = np.maximum(days[request] - self.day[entry], 0)
                weight *= np.exp2(-age / options.half_life_days)
            if options.other_source < 1:
                weight[self.source_action[entry] != last.action[source]] *= options.other_source
            if options.other_requested < 1:
                is_other = (self.requested[entry] != requested[request]) & (requested[request] != NO_ACTION)
                weight[is_other] *= options.other_requested
            cell = request * num_docs + self.item[entry]
            scores += np.bincount(cell, weight, scores.size).reshape(scores.shape)
        highest = scores.max(axis=1, keepdims=True)
        scores /= np.where(highest > 0, highest, 1.0)
        return scores + POPULARITY_WEIGHT * self._popularity_of(days)

    def _popularity_of(self, days: np.ndarray) -> np.ndarray:
        if not self.rebuilt:
            return self.popularity(None)[None]
        distinct, nth = np.unique(days, return_inverse=True)
        return np.stack([self.popularity(day) for day in distinct.tolist()])[nth]


def _by_day(events: np.ndarray) -> np.ndarray:
    return events[:, np.argsort(events[0], kind="stable")]


def _parts(counts: np.ndarray) -> list[slice]:
    """Return consecutive slices of about TRANSITIONS_AT_ONCE counted transitions each."""
    total = np.cumsum(counts)
    edges = [0]
    while edges[-1] < len(counts):
        done = total[edges[-1] - 1] if edges[-1] else 0
        end = int(np.searchsorted(total, done + TRANSITIONS_AT_ONCE, side="right"))
        edges.append(max(end, edges[-1] + 1))
    return [slice(begin, end) for begin, end in pairwise(edges)]


def action_of(dataset: Dataset) -> str | None:
    """Return the action of events: their first categorical feature with one value; None: they have none."""
    return next(iter(single_valued(dataset.schema.event)), None)


@dataclass(frozen=True)
class Chain:
    """A fitted chain: a function from requests to the scores of all documents."""

    events: ChainEvents
    options: ChainOptions

    def __call__(self, rows: Rows) -> np.ndarray:
        """Return the scores of m requests, float64 [m, N]."""
        return self.events.scores(rows, self.options)


def tuned_chain(events: ChainEvents, dataset: Dataset, exclude_seen: bool | str = True) -> Chain:
    """Return the chain with the best NDCG@10 on validation of `dataset`, one option of GRID after the other.

    Without a validation split its options are the defaults.
    """
    best = Chain(events, ChainOptions())
    if not dataset.num_rows("validation"):
        return best

    def ndcg(chain: Chain) -> float:
        measured = evaluate_scores(chain, dataset, "validation", exclude_seen=exclude_seen)
        return measured.metrics["ndcg_at_10"]

    without_effect = set()
    if events.action is None:
        without_effect.add("other_source")
    if events.action not in dataset.schema.request:
        without_effect.add("other_requested")
    if events.num_days == 1:
        without_effect.add("half_life_days")

    best_ndcg = ndcg(best)
    for name, values in GRID.items():
        if name in without_effect:
            continue
        for value in values:
            options = replace(best.options, **{name: value})
            if options == best.options:
                continue
            chain = Chain(events, options)
            measured = ndcg(chain)
            if measured > best_ndcg:
                best, best_ndcg = chain, measured
    return best
