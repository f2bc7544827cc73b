"""Baselines: popularity, Markov chains over the last items, and BM25; others register in BASELINES.

All are evaluated as a model is: same rows, exclusions and tie handling. They are fitted on the train split, except that
those by day are rebuilt at every day of the requests if the split is by time, from the events before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, get_origin, get_type_hints

import numpy as np
from scipy.sparse.linalg import svds

from bigdssm.config.keys import SPLITS
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import EventSlices, Rows
from bigdssm.dataset.transitions import MAX_WINDOW, QUERIES_AT_ONCE, Transitions, last_items
from bigdssm.errors import ConfigError, DataError
from bigdssm.evaluation.teachers import Bm25Teacher
from bigdssm.features import Categorical, Feature
from bigdssm.features.event_time import DAY
from bigdssm.features.ragged import gather_ranges
from bigdssm.retrieval.model import Texts
from bigdssm.utils.arguments import argument
from bigdssm.utils.components import Bound, require

Count = Annotated[int, Bound(1)]  # types of options
Window = Annotated[int, Bound(1, at_most=MAX_WINDOW)]


Scores = Callable[[Rows], np.ndarray]
"""A fitted baseline: maps m Rows to the scores of all N documents, float64 [m, N]."""


def popularity(dataset: Dataset) -> Scores:
    """Score documents by their number of train positives."""
    counts = dataset.doc_counts().astype(np.float64)
    return lambda rows: np.repeat(counts[None], len(rows), axis=0)


def markov(dataset: Dataset, window: Window = 3) -> Scores:
    """Score document j by Σ count(item → j) / distance over the last `window` items of the history.

    The counts of Transitions are weighted by distance, too. Weighting neither or only one is weaker on MovieLens-100K.
    Raises DataError: the rows have no history.
    """
    chain = Transitions.of(dataset, window)

    def scores(rows: Rows) -> np.ndarray:
        weights, items, row = last_items(rows, window)
        length = chain.starts[items + 1] - chain.starts[items]
        entry = np.repeat(chain.starts[items] - np.cumsum(length) + length, length) + np.arange(length.sum())
        cell = np.repeat(row, length) * chain.num_docs + chain.followers[entry]
        values = chain.counts[entry] * np.repeat(weights, length)
        return np.bincount(cell, values, len(rows) * chain.num_docs).reshape(len(rows), chain.num_docs)

    return scores


class DailyEvents:
    """The positive events that a baseline counts, by day (UTC), and the last event before each; arrays are [events].

    With a split by time they are the targets of all splits, and a request counts those before its day. Otherwise they
    are those of train.
    """

    def __init__(self, dataset: Dataset, feature: str | None = None) -> None:
        """Read the events of `dataset`. Raises: DataError: events have no times; ConfigError: no such feature."""
        if not dataset.has_times:
            raise DataError(f"{dataset.dir}: its events have no times; build it with --time-column")
        self.feature: Categorical | None = None  # of events, part of the state
        if feature is not None:
            known = single_valued(dataset.schema.event)
            if feature not in known:
                raise ConfigError(f"feature={feature}: needs a categorical feature of data.event, of {list(known)}")
            self.feature = known[feature]
        self.rebuilt = dataset.header.split.get("how") == "time"  # whether a request counts earlier days alone
        splits, targets = ["train"], dict(dataset.rules.targets)
        if self.rebuilt:
            splits = [split for split in SPLITS if dataset.num_rows(split)]
            # the events of all splits that would be targets in train
            targets = dict.fromkeys(splits, targets["train"]) if "train" in targets else {}
        self.dataset = dataset.with_rules(replace(dataset.rules, targets=targets))
        parts = [(np.zeros(0, np.int64),) * 3]
        for split in splits:
            for rows in self.dataset.iterate(split, QUERIES_AT_ONCE):
                relevant = rows.relevance > 0
                parts.append((self.days(rows)[relevant], rows.doc_rows[relevant], self.states(rows)[relevant]))
        day, item, state = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(day, kind="stable")
        self.day = day[order]  # int64, ascending
        self.item = item[order]  # int64: catalogue rows
        self.state = state[order]  # int64: the last item, its `feature`, and that of the request; -1: no last event

    def days(self, rows: Rows) -> np.ndarray:
        """Return the days of requests since 1970, int64 [m]."""
        seconds = self.dataset.request_times(rows) * self.dataset.header.time_unit
        return np.asarray(seconds // DAY, np.int64)

    def states(self, rows: Rows) -> np.ndarray:
        """Return the states of requests, int64 [m]; -1: without a last event."""
        _, items, row = last_items(rows, 1)
        states = np.full(rows.num_queries, -1)
        values = items
        if self.feature is not None and rows.sequences is not None:
            assert rows.sequence is not None and rows.prefix is not None
            name, codes = self.feature.name, self.feature.num_codes
            sequence, end = rows.sequence[rows.row_of_query][row], rows.prefix[row]
            last = EventSlices(rows.sequences, sequence, end - 1, end).feature(name)
            requested = np.asarray(rows.request[name])[row] if name in rows.request else 0
            values = (items * codes + last) * codes + requested
        states[row] = values
        return states

    def counts(self, first_day: float, last_day: float) -> np.ndarray:
        """Return the number of events per document on the days [first_day, last_day), float64 [N]."""
        first, last = np.searchsorted(self.day, [first_day, last_day])
        return np.bincount(self.item[first:last], minlength=self.dataset.catalogue.num_docs).astype(np.float64)

    def per_day(self, rows: Rows, counts: Callable[[int], np.ndarray]) -> np.ndarray:
        """Return `counts` of the day of each request, float64 [m, N]."""
        days, nth = np.unique(self.days(rows), return_inverse=True)
        return np.stack([counts(day) for day in days.tolist()])[nth]


def recent_popularity(dataset: Dataset, days: Count = 7) -> Scores:
    """Score documents by their number of positives in the `days` days before the day of the request.

    Raises DataError: events have no times.
    """
    return popularity_of_days(DailyEvents(dataset), days)


def popularity_of_days(events: DailyEvents, days: int) -> Scores:
    """Return `recent_popularity` of events that are read."""
    return lambda rows: events.per_day(rows, lambda day: events.counts(day - days, day))


def newest_popularity(dataset: Dataset, days: Count = 3) -> Scores:
    """Score documents by their number of positives before the day of the request, 0 unless they are new.

    A document is new on the day of its first event, or first version if it is earlier, and on the `days` days after it.
    Raises DataError: events have no times.
    """
    events = DailyEvents(dataset)
    first_day = np.floor(dataset.item_times * dataset.header.time_unit / DAY)

    def counts(day: int) -> np.ndarray:
        is_new = (first_day >= day - days) & (first_day <= day)
        return np.where(is_new, events.counts(-np.inf, day) + 0.5, 0.0)  # one without events is new, too

    return lambda rows: events.per_day(rows, counts)


def markov_by_action(dataset: Dataset, feature: str = "") -> Scores:
    """Score document j by count(state → j): the last item, its action, and the requested action if requests have one.

    `feature` is the action, by default the first categorical feature of events. Popularity decides between equal
    counts. Raises: DataError: events have no times or no categorical feature; ConfigError: no such feature.
    """
    known = list(single_valued(dataset.schema.event))
    if not known:
        raise DataError(f"{dataset.dir} has no categorical feature of events; declare one in data.event")
    return markov_of_states(DailyEvents(dataset, feature or known[0]))


def markov_of_states(events: DailyEvents) -> Scores:
    """Return `markov_by_action` of events that are read."""
    first, last = events.day[[0, -1]] if len(events.day) else (0, 0)
    num_days, num_docs = last - first + 1, events.dataset.catalogue.num_docs
    keys = events.state * num_days + events.day - first
    order = np.flatnonzero(events.state >= 0)
    order = order[np.argsort(keys[order], kind="stable")]  # events by state, then by day
    keys = keys[order]

    def scores(rows: Rows) -> np.ndarray:
        days = np.clip(events.days(rows) - first, 0, num_days) if events.rebuilt else num_days
        states = events.states(rows)
        begin, end = (np.searchsorted(keys, states * num_days + upto) for upto in (0, days))
        entries = gather_ranges(order, begin, np.where(states < 0, begin, end))
        cell = np.repeat(np.arange(len(rows)), entries.lengths) * num_docs + events.item[entries.values]
        counts = np.bincount(cell, minlength=len(rows) * num_docs).reshape(len(rows), num_docs)
        num_events = events.per_day(rows, lambda day: events.counts(-np.inf, day if events.rebuilt else np.inf))
        return counts + num_events / (num_events.sum(axis=1, keepdims=True) + 1)

    return scores


def markov_vectors(dataset: Dataset, dim: Count, window: Window = 3) -> Scores:
    """Score by the Markov chain as a two-tower model of width `dim`: an upper bound for vectors of that width.

    The counts are approximated by their truncated SVD of rank `dim`. Source: Eckart and Young 1936.
    Raises: ConfigError: `dim` out of range; DataError: no histories.
    """
    chain = Transitions.of(dataset, window)
    if not 0 < dim < chain.num_docs:
        raise ConfigError(f"dim={dim}: needs at least 1 and less than the number of documents, {chain.num_docs}")
    left, lengths, right = svds(chain.matrix(), dim, v0=np.ones(chain.num_docs))
    of_items = left * lengths  # a query's vector is the sum of its last items' rows over their distance

    def scores(rows: Rows) -> np.ndarray:
        weights, items, row = last_items(rows, window)
        vectors = np.zeros((len(rows), dim))
        np.add.at(vectors, row, weights[:, None] * of_items[items])
        return vectors @ right

    return scores


def bm25(dataset: Dataset) -> Scores:
    """Score documents by BM25. Raises ConfigError: a side has no text, or a package is not installed."""
    teacher, documents = Bm25Teacher(dataset, Texts(dataset)), np.arange(dataset.catalogue.num_docs)
    return lambda rows: teacher(rows, np.broadcast_to(documents, (len(rows), len(documents)))).astype(np.float64)


BASELINES: dict[str, Callable[..., Scores]] = {  # by name; each is called with a dataset and its options
    "popularity": popularity,
    "popularity_by_day": recent_popularity,
    "newest_by_day": newest_popularity,
    "markov": markov,
    "markov_by_action": markov_by_action,
    "markov_vectors": markov_vectors,
    "bm25": bm25,
}


def single_valued(features: Mapping[str, Feature]) -> dict[str, Categorical]:
    """Return the categorical features with one value."""
    return {name: f for name, f in features.items() if isinstance(f, Categorical) and not f.multi}


def check_options(name: str, options: Mapping[str, Any], *, require_all: bool = True) -> None:
    """Raise ConfigError if the options are invalid for the baseline `name`; `require_all`: or incomplete."""
    fit = BASELINES[name]
    known, hints = dict(list(inspect.signature(fit).parameters.items())[1:]), get_type_hints(fit, include_extras=True)
    for option, given in options.items():
        if option not in known:
            raise ConfigError(f"the baseline {name} has no option {option}; its options: {', '.join(known) or 'none'}")
        key, hint = f"the baseline {name}: {option}", hints[option]
        kind, bound = (hint.__origin__, hint.__metadata__[0]) if get_origin(hint) is Annotated else (hint, None)
        value = argument(key, given, kind)
        require(bound is None or bound.holds(value), key, given, str(bound))
    for option, parameter in known.items():
        if require_all and parameter.default is inspect.Parameter.empty and option not in options:
            raise ConfigError(f"the baseline {name} needs the option {option}")


def fit_baseline(name: str, dataset: Dataset, options: Mapping[str, Any]) -> Scores:
    """Fit the baseline `name` of BASELINES. Raises ConfigError: an option is invalid or missing."""
    check_options(name, options)
    return BASELINES[name](dataset, **options)
