"""Slices of a split's rows, by conditions on their items, histories, events and features.

A condition (features/conditions.py) is on features of the query, of the document, or of the event (its request has the
same), and on three numbers that every dataset of events has: see NUMBERS. None is computed from the present.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import ConfigError
from bigdssm.features import Feature, Numeric, ragged
from bigdssm.features.base import filterable
from bigdssm.features.conditions import conditions, evaluate, parse_filter, resolve
from bigdssm.features.event_time import DAY
from bigdssm.features.ragged import Column

FEW_QUERIES = 200  # below, a mean has no interval: at an HR@10 of 0.05 it would rest on 10 hits
MOST_VALUES = 10  # slices of a feature, by its most frequent values
ROWS_AT_ONCE = 65_536
TRAIN_EVENTS, ITEM_AGE, HISTORY = "train_events", "item_age", "history"
# The numbers and their slices: positive train events of the item (0: it is cold), days from its first version or event
# to the request, and events of the user before the request.
NUMBERS = {
    TRAIN_EVENTS: ["train_events = 0", "train_events >= 1"],
    ITEM_AGE: [
        "item_age < 1", "item_age >= 1 and item_age < 3", "item_age >= 3 and item_age < 7",
        "item_age >= 7 and item_age < 30", "item_age >= 30",
    ],
    HISTORY: [
        "history < 1", "history >= 1 and history < 3", "history >= 3 and history < 10",
        "history >= 10 and history < 50", "history >= 50",
    ],
}  # fmt: skip
OTHER = "other or missing"
_WORD = re.compile(r'[^\s"=<>(),]+')


@dataclass(frozen=True)
class Slice:
    """Rows of a split that match a condition."""

    by: str  # the feature, or the condition
    condition: str
    rows: np.ndarray  # bool [rows with a rank]
    num_queries: int  # distinct query ids; in a dataset of events, users

    @property
    def has_few(self) -> bool:
        """Whether it has too few queries for an interval."""
        return self.num_queries < FEW_QUERIES


def read_slices(dataset: Dataset, split: str, by: Sequence[str]) -> list[Slice]:
    """Divide the rows of a split by each of `by`, a feature or a condition; empty: by NUMBERS.

    A condition has a second slice, of the other rows; a feature one per value, and one of the other rows if there are
    any. Raises: ConfigError: an invalid condition, or no such feature; DataError: no such split.
    """
    sources = _sources(dataset)
    by = by or [name for name in NUMBERS if name in sources]
    columns: dict[str, list[Column]] = {}
    for text in by:
        parsed = [] if text in sources else conditions(parse_filter(text, "--by"))
        for name in [condition.feature for condition in parsed] or [text]:
            if name not in sources:
                known = [own for own in sources if own.partition(".")[2] not in sources]
                raise ConfigError(f"--by {text!r}: got {name}, needs one of {', '.join(known)}")
            columns[name] = []
    query_ids = [np.zeros(0, np.int64)]
    for rows in dataset.iterate(split, ROWS_AT_ONCE):
        relevant = np.flatnonzero(rows.relevance > 0)
        query_ids.append(rows.query_ids[relevant])
        for name, parts in columns.items():
            parts.append(ragged.take(sources[name][1](rows), relevant))
    values, ids = {name: ragged.concat(parts) for name, parts in columns.items()}, np.concatenate(query_ids)
    slices, features = [], {name: feature for name, (feature, _) in sources.items()}
    for text in dict.fromkeys(by):
        others = np.ones(len(ids), bool)
        for condition in _conditions(text, sources, values):
            expression = resolve(parse_filter(condition, "--by"), features, f"--by {text!r}")
            mask = evaluate(expression, features, values.__getitem__)
            slices.append(Slice(text, condition, mask, len(np.unique(ids[mask]))))
            others &= ~mask
        if others.any():
            name = f"{text}: {OTHER}" if text in sources else f"not ({text})"
            slices.append(Slice(text, name, others, len(np.unique(ids[others]))))
    return slices


def _conditions(text: str, sources: "Mapping[str, Source]", values: Mapping[str, Column]) -> list[str]:
    """Return the conditions of a feature's slices, or `text` if it is a condition."""
    if text not in sources:
        return [text]
    if text in NUMBERS:
        return NUMBERS[text]
    choices = (sources[text][0].choices(values[text]) or {}).get("values", [])
    if not choices:
        raise ConfigError(f"--by {text}: it has no values that repeat; give a condition, such as {text} < 10")
    quoted = (value if _WORD.fullmatch(value) else json.dumps(value) for value in choices[:MOST_VALUES])
    return [f"{text} = {value}" for value in quoted]


Source = tuple[Feature, Callable[[Rows], Column]]
"""A feature, and its encoded values of the queries of rows."""


def _sources(dataset: Dataset) -> dict[str, Source]:
    """Return the features that rows can be divided by: a name that two sides have is `query.name` or `doc.name`."""
    schema = dataset.schema
    sides: dict[str, Source] = {}
    for side, features, read in (
        ("query", schema.query, lambda name, rows: ragged.take(rows.query[name], rows.row_of_query)),
        (
            "doc",
            schema.doc | dataset.header.schema.filter,
            lambda name, rows: dataset.catalogue.column(name, rows.doc_rows),
        ),
        ("event", schema.event, lambda name, rows: dataset.target_feature(rows, name)),
    ):
        sides |= {f"{side}.{name}": (f, partial(read, name)) for name, f in filterable(features).items()}
    counts = dataset.doc_counts()
    numbers: dict[str, Callable[[Rows], np.ndarray]] = {TRAIN_EVENTS: lambda rows: counts[rows.doc_rows]}
    if dataset.has_times:
        days = dataset.header.time_unit / DAY
        numbers[ITEM_AGE] = lambda rows: (dataset.request_times(rows) - dataset.item_times[rows.doc_rows]) * days
    if dataset.sequences is not None:
        numbers[HISTORY] = lambda rows: np.asarray(rows.prefix)
    of_numbers: dict[str, Source] = {name: (Numeric(name=name), read) for name, read in numbers.items()}
    bare = [name.partition(".")[2] for name in sides] + list(NUMBERS)
    unique = {name: source for name, source in zip(bare, sides.values(), strict=False) if bare.count(name) == 1}
    return unique | of_numbers | sides
