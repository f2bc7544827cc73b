"""Baselines: popularity, Markov chains over the last items, and BM25; others register in BASELINES.

All are evaluated as a model is: same rows, exclusions and tie handling. They are fitted on the train split, except that
those by day are rebuilt at every day of the requests if the split is by time, from the events before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_origin, get_type_hints

import numpy as np
from scipy.sparse.linalg import svds

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.dataset.transitions import MAX_WINDOW, QUERIES_AT_ONCE, Transitions, last_items
from bigdssm.errors import ConfigError, DataError
from bigdssm.evaluation.chains import MOST_ITEMS, Chain, ChainEvents, ChainOptions, action_of
from bigdssm.evaluation.counted_events import counted_splits, request_days
from bigdssm.evaluation.teachers import Bm25Teacher
from bigdssm.features.event_time import DAY
from bigdssm.retrieval.reranking import Texts
from bigdssm.utils.arguments import argument
from bigdssm.utils.components import Bound, require

Count = Annotated[int, Bound(1)]  # types of options
Window = Annotated[int, Bound(1, at_most=MAX_WINDOW)]
ChainWindow = Annotated[int, Bound(1, at_most=MOST_ITEMS)]
Share = Annotated[float, Bound(0.0, at_most=1.0)]
NotNegative = Annotated[float, Bound(0.0)]


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
        counts = np.bincount(cell, values, len(rows) * chain.num_docs)
        # bincount returns integers if no item has a follower
        return counts.astype(np.float64).reshape(len(rows), chain.num_docs)

    return scores


class DailyEvents:
    """The positive events that a baseline counts, by day (UTC); arrays are [events].

    With a split by time they are the targets of all splits, and a request counts those before its day. Otherwise they
    are those of train.
    """

    def __init__(self, dataset: Dataset) -> None:
        """Read the events of `dataset`. Raises DataError: events have no times."""
        if not dataset.has_times:
            raise DataError(f"{dataset.dir}: its events have no times; build it with --time-column")
        splits, self.dataset = counted_splits(dataset)
        days = [np.zeros(0, np.int64)]
        items = [np.zeros(0, np.int64)]
        for split in splits:
            for rows in self.dataset.iterate(split, QUERIES_AT_ONCE):
                relevant = rows.relevance > 0
                days.append(request_days(self.dataset, rows)[relevant])
                items.append(rows.doc_rows[relevant])
        day = np.concatenate(days)
        order = np.argsort(day, kind="stable")
        self.day = day[order]  # int64, ascending
        self.item = np.concatenate(items)[order]  # int64: catalogue rows

    def counts(self, first_day: float, last_day: float) -> np.ndarray:
        """Return the number of events per document on the days [first_day, last_day), float64 [N]."""
        first, last = np.searchsorted(self.day, [first_day, last_day])
        return np.bincount(self.item[first:last], minlength=self.dataset.catalogue.num_docs).astype(np.float64)

    def per_day(self, rows: Rows, counts: Callable[[int], np.ndarray]) -> np.ndarray:
        """Return `counts` of the day of each request, float64 [m, N]."""
        days, nth = np.unique(request_days(self.dataset, rows), return_inverse=True)
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

    A document is new after its first event, or from its first version on if it is earlier: on that day, and on the
    `days` days after it. Raises DataError: events have no times.
    """
    events = DailyEvents(dataset)
    first_day = np.floor(dataset.item_times * dataset.header.time_unit / DAY)
    first_event = dataset.first_event_times
    first_version = dataset.first_version_times

    def scores(rows: Rows) -> np.ndarray:
        time = dataset.request_times(rows)[:, None]
        # at the time of its first event a document is not known yet: the request may be that event
        is_known = (first_event < time) | (first_version <= time)
        is_recent = first_day >= request_days(dataset, rows)[:, None] - days
        counts = events.per_day(rows, lambda day: events.counts(-np.inf, day))
        return np.where(is_known & is_recent, counts + 0.5, 0.0)  # one without events is new, too

    return scores


def chain(
    dataset: Dataset,
    window: ChainWindow = 3,
    half_life_days: NotNegative = 0.0,
    other_source: Share = 1.0,
    other_requested: Share = 1.0,
    feature: str = "",
    daily: bool = True,
) -> Scores:
    """Score documents by the transitions from the last distinct items (see chains.py).

    `feature` is the action, by default the first categorical feature of events. Raises: DataError: pairs without
    histories; ConfigError: no such feature.
    """
    events = ChainEvents(dataset, feature or action_of(dataset), daily=daily)
    return Chain(events, ChainOptions(window, half_life_days, other_source, other_requested))


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
    teacher, documents = Bm25Teacher(dataset, Texts.of(dataset)), np.arange(dataset.catalogue.num_docs)
    return lambda rows: teacher(rows, np.broadcast_to(documents, (len(rows), len(documents)))).astype(np.float64)


BASELINES: dict[str, Callable[..., Scores]] = {  # by name; each is called with a dataset and its options
    "popularity": popularity,
    "popularity_by_day": recent_popularity,
    "newest_by_day": newest_popularity,
    "markov": markov,
    "chain": chain,
    "markov_vectors": markov_vectors,
    "bm25": bm25,
}


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError if the options are invalid or incomplete for the baseline `name`."""
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
        if parameter.default is inspect.Parameter.empty and option not in options:
            raise ConfigError(f"the baseline {name} needs the option {option}")


def fit_baseline(name: str, dataset: Dataset, options: Mapping[str, Any]) -> Scores:
    """Fit the baseline `name` of BASELINES. Raises ConfigError: an option is invalid or missing."""
    check_options(name, options)
    return BASELINES[name](dataset, **options)
