"""Resolve requests to queries: feature columns, seen documents, and the allowed documents."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from bigdssm.dataset.catalogue import MappedTable
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Column, Ragged, TextTokenizer, encode_values, histories_of, item_codes, stored_features
from bigdssm.features.canonical import columns_of_values
from bigdssm.features.columns import TimeUnits, check_time_units
from bigdssm.features.ragged import gather_ranges
from bigdssm.retrieval.filters import Filters
from bigdssm.retrieval.index_types import AllowedDocuments
from bigdssm.retrieval.request import Event, Request, check_utf8
from bigdssm.utils.hashing import hash64

NUM_SUGGESTIONS = 3
# Bounds of the fuzzy match of an unknown name against titles: at worst about a second.
MOST_COMPARED, COMPARED_CHARACTERS = 5000, 80
NOTHING = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Query:
    """A resolved request: feature columns for `Collator.query_features`, and constraints on the results."""

    columns: dict[str, Column]
    top: int
    seen: np.ndarray  # int64: catalogue rows of the events, oldest first
    unknown: tuple[str, ...]  # event items that match no document
    excluded: np.ndarray  # int64: catalogue rows
    allowed: AllowedDocuments | None  # documents that pass the filter; None: all


class Queries:
    """Resolves requests to one model."""

    def __init__(
        self, schema: Schema, tokenizer: TextTokenizer | None, dataset: Dataset | None, exclude_seen: bool,
        num_docs: int | None = None,
    ) -> None:  # fmt: skip
        """Users, events and filters need a dataset. `exclude_seen` is the default of requests.

        `num_docs`: the first documents of the dataset, which the index has; None: all.

        Raises DataError: queries of `schema` have a history, and there is no dataset to look items up in.
        """
        self._schema, self._tokenizer, self._dataset, self._exclude_seen = schema, tokenizer, dataset, exclude_seen
        self.has_history = bool(histories_of(schema.query))
        if self.has_history and dataset is None:
            raise DataError("queries of this model have a history; give its dataset with --data")
        self.names = DocumentNames.of(dataset) if dataset is not None and self.has_history else None
        whole = None if dataset is None else dataset.whole
        self._filters = None if whole is None else Filters(whole.schema, whole.catalogue, num_docs)

    @property
    def choices(self) -> dict[str, dict[str, Any]]:
        """Return the filterable features and their values, see `Filters.choices`."""
        return {} if self._filters is None else self._filters.choices

    def of(self, request: Request) -> Query:
        """Resolve a request. Raises: ConfigError, DataError: invalid for this model, or an unknown user."""
        features, dataset = request.features or {}, self._dataset
        texts = [text for text in (request.user, request.document, request.filter) if text is not None]
        for value in features.values():
            texts += [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, str)]
        check_utf8([*texts, *(event.item for event in request.events or ())])
        values = (request.user, request.document, *features.values())
        blank = all(value is None or (isinstance(value, str) and not value.strip()) for value in values)
        if blank and request.events is None:
            raise ConfigError("the query is empty; give features, events or a user")

        # Missing values are replaced by those of the user or the document, and these by the given ones.
        query = self._schema.query.items()
        columns = {name: encode_values(feature, [feature.missing], self._tokenizer) for name, feature in query}
        stored_events = query_document = NOTHING
        if request.user is not None:
            if dataset is None:
                raise ConfigError("this model is served without users; describe the query by its features")
            of_user, stored_events = read_user(dataset, request.user)
            columns |= of_user
        if request.document is not None:
            if not self._schema.siamese or dataset is None:
                raise ConfigError("queries of this model are not documents; describe the query by its features")
            query_document = dataset.catalogue.rows_by_key([request.document])
            if query_document[0] < 0:
                raise DataError(f"no document has the key {request.document!r}")
            columns |= dataset.catalogue.columns(query_document)
        columns |= {name: self.feature(name, value) for name, value in features.items()}

        live, unknown = self._events(request.events or [], request.now)
        if request.now is not None and len(stored_events) and not (len(live) or unknown):
            # Stored events precede the given ones; without a given one, their times relative to now are unknown.
            raise ConfigError(
                f"now is given with the user {request.user!r}, whose events in the dataset have no times, and with no "
                "event up to it; leave now out, or give features and events instead of the user"
            )
        seen = np.concatenate([stored_events, live])
        if dataset is not None:
            columns |= histories(dataset, Ragged.of_lists([seen], np.int64))
        allowed = None
        if request.filter is not None:
            if self._filters is None:
                raise ConfigError("a filter needs the documents' features; give the dataset with --data")
            allowed = self._filters.allowed(request.filter)
        exclude = self._exclude_seen if request.exclude_seen is None else request.exclude_seen
        excluded = np.concatenate([seen if exclude else NOTHING, query_document])
        return Query(columns, request.top, seen, unknown, excluded, allowed)

    def feature(self, name: str, value: Any) -> Column:
        """Encode one value as a column. Raises ConfigError: an unknown feature, or an invalid value."""
        known = stored_features(self._schema.query)
        if name not in known:
            events = "; give events instead of a history" if name in self._schema.query else ""
            requested = (name if name.isprintable() else repr(name))[:COMPARED_CHARACTERS]
            raise ConfigError(
                f"{requested} is not a query feature that can be given; they are: {', '.join(known)}{events}"
            )
        if isinstance(value, str):
            return encode_values(known[name], [known[name].parse(value)], self._tokenizer)
        try:
            given, _ = columns_of_values([{name: value}], {name: known[name]}, self._schema.doc, self._tokenizer)
        except DataError as error:
            raise ConfigError(str(error).removeprefix("row 0: ")) from None
        return given[name]

    def unknown(self, item: str) -> str:
        """Return a message about an unknown event item, with similar titles."""
        assert self.names is not None, "events require names"
        near = self.names.nearest(item)
        some = f"; the nearest are: {'; '.join(near)}" if near else ", and none is similar"
        return f"no document is called {item.strip()[:COMPARED_CHARACTERS]!r}{some}"

    def _events(self, events: Sequence[Event], now: float | None) -> tuple[np.ndarray, tuple[str, ...]]:
        """Return the catalogue rows of events up to now, oldest first in stable order, and the unknown items.

        Raises ConfigError: only some events have times, `now` without times, or mixed time units.
        """
        if not events:
            return NOTHING, ()
        if self.names is None:
            raise ConfigError("queries of this model have no history, so events cannot be given")
        items = [event.item for event in events]
        times = [event.time for event in events if event.time is not None]
        if len(times) == len(events):
            all_times = np.array(times if now is None else [*times, now], np.float64)
            try:
                units = TimeUnits()
                units.add(all_times)
                check_time_units([units.facts()], "the request")
            except DataError as error:
                raise ConfigError(str(error)) from None
            order = np.argsort(all_times[: len(times)], kind="stable").tolist()
            items = [items[i] for i in order if now is None or all_times[i] <= now]
        elif times or now is not None:
            raise ConfigError(f"{len(events) - len(times)} of {len(events)} events have no time; give it for all")
        rows = self.names.rows(items)
        return rows[rows >= 0], tuple(item for item, row in zip(items, rows.tolist(), strict=True) if row < 0)


def read_user(dataset: Dataset, key: str) -> tuple[dict[str, Column], np.ndarray]:
    """Read a user's feature columns, and the catalogue rows of all events, oldest first.

    Raises DataError: no such user, or no sequences.
    """
    table = dataset.sequences
    if table is None:
        raise DataError(f"{dataset.dir} holds pairs, no users; describe the query by its features instead")
    rows = np.flatnonzero(table.column("query_id") == hash64(key))
    if not len(rows):
        some = "; ".join(first_users(table, NUM_SUGGESTIONS))
        raise DataError(f"no user is called {key!r}; existing users are: {some}")
    newest = rows[-1:]  # the latest partition has the full history
    columns = {name: dataset.query_column(table, name, newest) for name in stored_features(dataset.schema.query)}
    return columns, events_of(table, newest).values


def events_of(table: MappedTable, rows: np.ndarray) -> Ragged:
    """Read the catalogue rows of all events of sequences, oldest first, int64."""
    length = table.lengths("items", rows)
    events = table.take_slices("items", rows, np.zeros_like(length), length)
    return Ragged(events.values.astype(np.int64), events.offsets)


def first_users(table: MappedTable, most: int) -> list[str]:
    """Return the keys of the first `most` distinct users of a dataset's sequences."""
    first = np.sort(np.unique(table.column("query_id"), return_index=True)[1])[:most]
    return table.strings("query_key", first)


def histories(dataset: Dataset, seen: Ragged) -> dict[str, Column]:
    """Encode histories from seen catalogue rows, oldest first: the newest `max_items` codes per query."""
    columns: dict[str, Column] = {}
    for name, feature in histories_of(dataset.schema.query).items():
        first = np.maximum(seen.offsets[1:] - feature.max_items, seen.offsets[:-1])
        newest = gather_ranges(seen.values, first, seen.offsets[1:])
        columns[name] = Ragged(item_codes(dataset.catalogue.codes(str(feature.of), newest.values)), newest.offsets)
    return columns


class DocumentNames:
    """Looks up documents by key, or by case-insensitive title."""

    def __init__(self, keys: Sequence[str], title: Sequence[str]) -> None:
        self._title = title
        self._by_key = {key: row for row, key in enumerate(keys)}
        self._by_name = {_folded(name): row for row, name in reversed(list(enumerate(title)))}

    @classmethod
    def of(cls, dataset: Dataset) -> DocumentNames:
        """Return the names of a dataset's catalogue."""
        rows = np.arange(dataset.catalogue.num_docs)
        return cls(dataset.catalogue.keys(rows), dataset.catalogue.titles(rows))

    def rows(self, names: Sequence[str]) -> np.ndarray:
        """Return int64 catalogue rows, -1 for an unknown name."""
        rows = [self._by_key.get(name.strip(), self._by_name.get(_folded(name), -1)) for name in names]
        return np.array(rows, np.int64)

    def nearest(self, name: str) -> list[str]:
        """Return titles that contain this name, else similar ones."""
        pattern, by_name = _folded(name)[:COMPARED_CHARACTERS], self._by_name
        containing = (title for title in reversed(by_name) if pattern and pattern in title)
        nearest = list(islice(containing, NUM_SUGGESTIONS))
        if not nearest:
            few = len(by_name) <= MOST_COMPARED
            same_letter = (title for title in reversed(by_name) if few or title[:1] == pattern[:1])
            compared = {title[:COMPARED_CHARACTERS]: title for title in islice(same_letter, MOST_COMPARED)}
            close = difflib.get_close_matches(pattern, compared, NUM_SUGGESTIONS)
            nearest = [compared[start] for start in close]
        return [self._title[by_name[title]] for title in nearest]


def _folded(name: str) -> str:
    """Return a name case-folded, in Unicode's NFC."""
    return unicodedata.normalize("NFC", name.strip()).casefold()
