"""What a request asks for, looked up: the query's feature columns, what it has seen, and which documents may answer."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.mapped import MappedTable
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Column, Ragged, TextTokenizer, encode_values, histories_of, item_codes, stored_features
from bigdssm.features.canonical import columns_of_values
from bigdssm.features.columns import check_single_unit
from bigdssm.features.ragged import gather_ranges
from bigdssm.retrieval.filters import Filters
from bigdssm.retrieval.index_types import AllowedDocuments
from bigdssm.retrieval.request import Event, Request, check_encoded
from bigdssm.utils.hashing import hash64

NUM_SUGGESTIONS = 3
# A name that nobody knows is compared with so many titles, as far as so many characters: at worst about a second.
MOST_COMPARED, COMPARED_CHARACTERS = 5000, 80
NOTHING = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Query:
    """A request's query: its feature columns (as `Collator.query_features` takes them), and what may answer it."""

    columns: dict[str, Column]
    top: int
    seen: np.ndarray  # int64: the catalogue rows of its events, oldest first
    unknown: tuple[str, ...]  # the items of events that are no documents
    left_out: np.ndarray  # int64: catalogue rows that are no answer
    allowed: AllowedDocuments | None  # the documents that the filter lets through; none: all


class Queries:
    """Looks up requests to one model."""

    def __init__(
        self, schema: Schema, tokenizer: TextTokenizer | None, dataset: Dataset | None, exclude_seen: bool
    ) -> None:
        """Without a dataset there are no users, events or filters. `exclude_seen` is for requests that do not say.

        Raises DataError: queries of `schema` have a history, and there is no dataset to look items up in.
        """
        self._schema, self._tokenizer, self._dataset, self._exclude_seen = schema, tokenizer, dataset, exclude_seen
        self.has_history = bool(histories_of(schema.query))
        if self.has_history and dataset is None:
            raise DataError("queries of this model have a history; give its dataset with --data")
        self.names = DocumentNames.of(dataset) if dataset is not None and self.has_history else None
        self._filters = None if dataset is None else Filters(dataset.whole.schema, dataset.whole.catalogue)

    @property
    def choices(self) -> dict[str, dict[str, Any]]:
        """Return what filters may be made of, see `Filters.choices`."""
        return {} if self._filters is None else self._filters.choices

    def of(self, request: Request) -> Query:
        """Return the query of a request. Raises ConfigError, DataError: it cannot be asked, or names no user."""
        if request.top < 1:
            raise ConfigError(f"top is {request.top}, needs at least 1")
        _check_given(request)
        columns, stored_events = _missing(self._schema, self._tokenizer), NOTHING
        if request.user is not None:
            of_user, stored_events = self._user(request.user)
            columns |= of_user
        own = NOTHING
        if request.document is not None:
            of_document, own = self._document(request.document)
            columns |= of_document
        for name, value in (request.features or {}).items():
            columns[name] = self.feature(name, value)
        live, unknown = self._events(request.events or [], request.now)
        if request.now is not None and len(stored_events) and not (len(live) or unknown):
            # With an event up to now, those of the dataset lie before it; else nothing tells which lie before now.
            raise ConfigError(
                f"now is given with the user {request.user!r}, whose events in the dataset have no times that it could "
                "bound, and with no event up to it; leave now out, or give features and events in the user's place"
            )
        seen = np.concatenate([stored_events, live])
        exclude = self._exclude_seen if request.exclude_seen is None else request.exclude_seen
        allowed = None if request.filter is None else self._filter(request.filter)
        columns |= self._histories(seen)
        left_out = np.concatenate([seen if exclude else NOTHING, own])
        return Query(columns, request.top, seen, unknown, left_out, allowed)

    def _document(self, key: str) -> tuple[dict[str, Column], np.ndarray]:
        """Return the features of the document that a query is, and its catalogue row, int64 [1]."""
        if not self._schema.siamese or self._dataset is None:
            raise ConfigError("queries of this model are no documents; describe the query by its features")
        row = self._dataset.catalogue.find([key])
        if row[0] < 0:
            raise DataError(f"no document has the key {key!r}")
        return self._dataset.catalogue.columns(row), row

    def feature(self, name: str, value: Any) -> Column:
        """Return one value as a column. Raises ConfigError: no such feature, or a value that it cannot have."""
        known = stored_features(self._schema.query)
        if name not in known:
            events = "; give events in the place of a history" if name in self._schema.query else ""
            asked = (name if name.isprintable() else repr(name))[:COMPARED_CHARACTERS]
            raise ConfigError(
                f"{asked} is not a query feature that can be given; these are: {', '.join(known)}{events}"
            )
        if isinstance(value, str):
            return encode_values(known[name], [known[name].parse(value)], self._tokenizer)
        try:
            given, _ = columns_of_values([{name: value}], {name: known[name]}, self._schema.doc, self._tokenizer)
        except DataError as error:
            raise ConfigError(str(error).removeprefix("row 0: ")) from None
        return given[name]

    def unknown(self, item: str) -> str:
        """Return a sentence on an event's item that is no document, with documents whose names are near."""
        assert self.names is not None, "there are events only where there are names"
        near = self.names.nearest(item)
        some = f"; the nearest are: {'; '.join(near)}" if near else ", nor nearly so"
        return f"no document is called {item.strip()[:COMPARED_CHARACTERS]!r}{some}"

    def _user(self, key: str) -> tuple[dict[str, Column], np.ndarray]:
        if self._dataset is None:
            raise ConfigError("this model is served without users; describe the query by its features")
        return user_facts(self._dataset, key)

    def _events(self, events: Sequence[Event], now: float | None) -> tuple[np.ndarray, tuple[str, ...]]:
        """Return the catalogue rows of events up to now, oldest first, and the items that are no documents."""
        if not events:
            return NOTHING, ()
        if self.names is None:
            raise ConfigError("queries of this model have no history that events could stand in")
        items = [event.item for event in item_lookup(events, now)]
        rows = self.names.rows(items)
        return rows[rows >= 0], tuple(item for item, row in zip(items, rows.tolist(), strict=True) if row < 0)

    def _filter(self, text: str) -> AllowedDocuments:
        if self._filters is None:
            raise ConfigError("a filter looks at the documents' features; give the dataset with --data")
        return self._filters.allowed(text)

    def _histories(self, seen: np.ndarray) -> dict[str, Column]:
        return {} if self._dataset is None else histories(self._dataset, Ragged.of_lists([seen], np.int64))


def _check_given(request: Request) -> None:
    """Raise ConfigError where a request says nothing of its query, or what it says is no text."""
    texts = [text for text in (request.user, request.document, request.filter) if text is not None]
    for value in (request.features or {}).values():
        texts += [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, str)]
    texts += [event.item for event in request.events or ()]
    check_encoded(texts)
    said = (request.user, request.document, *(request.features or {}).values())
    blank = all(value is None or (isinstance(value, str) and not value.strip()) for value in said)
    if blank and request.events is None:
        raise ConfigError("the query is empty; give features, events or a user")


def item_lookup(events: Sequence[Event], now: float | None) -> list[Event]:
    """Return the events up to now, oldest first; those of one time as given.

    Raises ConfigError: some have times and others none, there is a `now` to compare none with, or several units.
    """
    times = [event.time for event in events if event.time is not None]
    if len(times) < len(events):
        if times or now is not None:
            raise ConfigError(f"{len(events) - len(times)} of {len(events)} events have no time; give that of all")
        return list(events)
    moments = np.array(times if now is None else [*times, now], np.float64)
    try:
        check_single_unit(moments, "the request")
    except DataError as error:
        raise ConfigError(str(error)) from None
    order = np.argsort(moments[: len(times)], kind="stable")
    return [events[i] for i in order.tolist() if now is None or moments[i] <= now]


def user_facts(dataset: Dataset, key: str) -> tuple[dict[str, Column], np.ndarray]:
    """Return what a dataset knows of a user: feature columns, and the catalogue rows of all events, oldest first.

    Raises DataError: no such user, or no sequences.
    """
    table = dataset.sequences
    if table is None:
        raise DataError(f"{dataset.dir} holds pairs, no users; describe the query by its features instead")
    rows = np.flatnonzero(table.column("query_id") == hash64(key))
    if not len(rows):
        some = "; ".join(some_users(table, NUM_SUGGESTIONS))
        raise DataError(f"no user is called {key!r}; some who are: {some}")
    newest = rows[-1:]  # a later partition knows more of the user
    columns = {name: dataset.query_column(table, name, newest) for name in stored_features(dataset.schema.query)}
    length = table.lengths("items", newest)
    events = table.take_slices("items", newest, np.zeros_like(length), length).values
    return columns, events.astype(np.int64)


def some_users(table: MappedTable, most: int) -> list[str]:
    """Return the keys of up to `most` users of a dataset's sequences, each once, in the order of their first rows."""
    first = np.sort(np.unique(table.column("query_id"), return_index=True)[1])[:most]
    return table.strings("query_key", first)


def histories(dataset: Dataset, seen: Ragged) -> dict[str, Column]:
    """Return the histories of queries that have seen these catalogue rows, oldest first: the newest codes of each."""
    found: dict[str, Column] = {}
    for name, feature in histories_of(dataset.schema.query).items():
        first = np.maximum(seen.offsets[1:] - feature.max_items, seen.offsets[:-1])
        newest = gather_ranges(seen.values, first, seen.offsets[1:])
        found[name] = Ragged(item_codes(dataset.catalogue.codes(str(feature.of), newest.values)), newest.offsets)
    return found


class DocumentNames:
    """Finds documents by key or title, whatever the case."""

    def __init__(self, keys: Sequence[str], title: Sequence[str]) -> None:
        self._title = title
        self._by_key = {key: row for row, key in enumerate(keys)}
        self._by_name = {_folded(name): row for row, name in reversed(list(enumerate(title)))}

    @classmethod
    def of(cls, dataset: Dataset) -> DocumentNames:
        """Return the names of a dataset's catalogue."""
        rows = np.arange(dataset.catalogue.num_docs)
        return cls(dataset.catalogue.keys(rows), dataset.catalogue.title(rows))

    def rows(self, names: Sequence[str]) -> np.ndarray:
        """Return int64 catalogue rows, -1 for a name that no document has."""
        found = [self._by_key.get(name.strip(), self._by_name.get(_folded(name), -1)) for name in names]
        return np.array(found, np.int64)

    def nearest(self, name: str) -> list[str]:
        """Return the titles of some documents whose names hold this one, else resemble it."""
        return [self._title[self._by_name[title]] for title in _nearest(name, self._by_name)]


def _folded(name: str) -> str:
    """Return a name without its case, and in one of the forms that Unicode has for the same characters."""
    return unicodedata.normalize("NFC", name.strip()).casefold()


def _missing(schema: Schema, tokenizer: TextTokenizer | None) -> dict[str, Column]:
    """Return one row in which every feature is missing."""
    return {name: encode_values(feature, [feature.missing], tokenizer) for name, feature in schema.query.items()}


def _nearest(name: str, by_name: dict[str, int]) -> list[str]:
    """Return some keys of `by_name` that hold the name, else some that resemble it."""
    wanted = _folded(name)[:COMPARED_CHARACTERS]
    inside = list(islice((title for title in reversed(by_name) if wanted and wanted in title), NUM_SUGGESTIONS))
    if inside:
        return inside
    few = len(by_name) <= MOST_COMPARED
    same_letter = (title for title in reversed(by_name) if few or title[:1] == wanted[:1])
    compared = {title[:COMPARED_CHARACTERS]: title for title in islice(same_letter, MOST_COMPARED)}
    return [compared[start] for start in difflib.get_close_matches(wanted, compared, NUM_SUGGESTIONS)]
