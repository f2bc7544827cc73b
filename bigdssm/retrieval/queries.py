"""Resolve requests to queries: feature columns, seen documents, and the allowed documents.

An index resolves the text of a filter (features/conditions.py) to the form that it searches with.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any

import numpy as np

from bigdssm.config import VisitConfig
from bigdssm.dataset.catalogue import NO_ROWS, Catalogue, MappedTable
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import FORGOTTEN_ID, TIME_COLUMN
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError, DataError, UnknownKeyError
from bigdssm.features import (
    PADDING,
    Categorical,
    Column,
    Decoder,
    Elapsed,
    EventTime,
    Feature,
    Numeric,
    Ragged,
    TextTokenizer,
    Vector,
    encode_values,
    histories_of,
    item_codes,
    stored_features,
    timestamp_of,
)
from bigdssm.features.base import ITEM_ROW, REQUEST_PREFIX, ColumnType
from bigdssm.features.canonical import columns_of_values
from bigdssm.features.conditions import Expression, evaluate, parse_filter, resolve
from bigdssm.features.ragged import gather_ranges, joined
from bigdssm.features.times import mixes_units
from bigdssm.retrieval.index_types import AllowedDocuments
from bigdssm.retrieval.request import Event, Request
from bigdssm.utils.arguments import check_utf8
from bigdssm.utils.hashing import hash64

NUM_SUGGESTIONS = 3
# Bounds of the fuzzy match of an unknown name against titles: at worst about a second.
MOST_COMPARED, COMPARED_CHARACTERS = 5000, 80
BOOLEANS = (("true", "True", "TRUE", "1"), ("false", "False", "FALSE", "0"))  # as in features/categorical.py
CACHED_FILTERS = 32  # a byte and a bit per document and cached filter


class Filters:
    """Evaluates filters over the documents of one catalogue, with a cache."""

    def __init__(self, catalogue: Catalogue, num_docs: int | None = None) -> None:
        """`num_docs`: the first documents, which an index has; None: all."""
        self._catalogue, self._num_docs = catalogue, num_docs
        self.allowed = lru_cache(CACHED_FILTERS)(self._allowed)

    @cached_property
    def choices(self) -> dict[str, dict[str, Any]]:
        """Return the type and `Feature.choices` per filterable feature."""
        every, choices = np.arange(self._catalogue.num_docs), {}
        for name, feature in self._catalogue.filterable.items():
            if values := feature.choices(self._catalogue.column(name, every)):
                choices[name] = {"type": feature.type, **values}
        return choices

    def _allowed(self, text: str) -> AllowedDocuments:
        """Return the documents that match the filter `text` and are not withdrawn.

        Raises ConfigError: an unknown feature or value.
        """
        features = self._catalogue.filterable
        expression = resolve(parse_filter(text), features)
        every = np.arange(self._catalogue.num_docs)
        passed = evaluate(expression, features, lambda name: self._catalogue.column(name, every))
        passed[self._catalogue.withdrawn] = False
        return AllowedDocuments(passed[: self._num_docs])


class StoreFilters:
    """Resolves filters to expressions on the columns of a collection."""

    def __init__(self, columns: Mapping[str, ColumnType], catalogue: Catalogue | None) -> None:
        """`catalogue` of the dataset has the vocabularies; without one, every value may exist."""
        self._catalogue = catalogue
        self._features: dict[str, Feature] = {}
        for name, type in columns.items():
            if catalogue is None:
                self._features[name] = Numeric(name=name) if type == "number" else _AnyCategory(name=name)
            elif name in catalogue.filterable:
                self._features[name] = catalogue.filterable[name]

    @cached_property
    def choices(self) -> dict[str, dict[str, Any]]:
        """Return the choices in the dataset; none without it."""
        choices = {} if self._catalogue is None else Filters(self._catalogue).choices
        return {name: choice for name, choice in choices.items() if name in self._features}

    def allowed(self, text: str) -> Expression:
        """Return the resolved expression."""
        return resolve(parse_filter(text), self._features)


class _AnyCategory(Categorical):
    """A category with an unknown vocabulary; it may be one of booleans, so a boolean has all its spellings."""

    def operands(self, operator: str, values: Sequence[str]) -> tuple[str, ...]:
        super().operands(operator, ())
        spellings = {text for value in values for group in BOOLEANS if value in group for text in group}
        return tuple(sorted({*values, *spellings} - {""}))


@dataclass(frozen=True)
class Query:
    """A resolved request: feature columns for `Collator.query_features`, and constraints on the results."""

    columns: dict[str, Column]
    top: int
    seen: np.ndarray  # int64: catalogue rows of the events, oldest first
    unknown_user: bool  # the user of the request does not exist
    unknown: tuple[str, ...]  # event items that match no document
    unknown_excluded: tuple[str, ...]  # keys of `Request.exclude` of no document
    excluded: np.ndarray  # int64: catalogue rows
    exclude: tuple[str, ...]  # `Request.exclude`
    allowed: AllowedDocuments | Expression | None  # filter as resolved by the index; None: all documents


class Queries:
    """Resolves requests to one model."""

    def __init__(
        self, schema: Schema, tokenizer: TextTokenizer | None, dataset: Dataset | None, exclude_seen: bool | str,
        filters: Filters | StoreFilters | None = None,
    ) -> None:  # fmt: skip
        """Users and events need a dataset. `exclude_seen` is the default of requests.

        `filters` are those of the index; None: of all documents of the dataset.

        Raises DataError: queries of `schema` have a history, and there is no dataset to look items up in.
        """
        self._schema, self._tokenizer, self._dataset, self._exclude_seen = schema, tokenizer, dataset, exclude_seen
        self.has_history = bool(histories_of(schema.query))
        if self.has_history and dataset is None:
            raise DataError("queries of this model have a history; give its dataset with --data")
        self.names = DocumentNames.of(dataset) if dataset is not None and self.has_history else None
        if filters is None and dataset is not None:
            filters = Filters(dataset.whole.catalogue)
        self.filters = filters

    def of(self, request: Request, as_of: float | None = None) -> Query:
        """Resolve a request; stored events after `as_of`, in seconds since 1970, are ignored.

        An unknown user has no stored events: the events of the request are its history. Without any, a model that was
        trained without `empty_histories` has no answer.

        Raises: ConfigError: invalid for this model; UnknownKeyError: an unknown document, or an unknown user without
        events.
        """
        features, dataset = request.features or {}, self._dataset
        # Strings that are not UTF-8 (lone surrogates from JSON) would fail later, in hashing or in the answer.
        texts = [text for text in (request.user, request.document, request.filter) if text is not None]
        for value in features.values():
            entries = value if isinstance(value, list | tuple) else [value]
            texts += [entry for entry in entries if isinstance(entry, str)]
        for event in request.events or ():
            texts += [event.item, *(value for value in (event.features or {}).values() if isinstance(value, str))]
        texts += [value for value in (request.context or {}).values() if isinstance(value, str)]
        keys = list(request.exclude or ())
        check_utf8([*texts, *keys])
        values = (request.user, request.document, *features.values())
        blank = all(value is None or (isinstance(value, str) and not value.strip()) for value in values)
        if blank and request.events is None:
            raise ConfigError("the query is empty; give features, events or a user")

        # Missing values are replaced by those of the user or the document, and these by the given ones.
        query = self._schema.query.items()
        columns = {name: encode_values(feature, [feature.missing], self._tokenizer) for name, feature in query}
        stored, query_document = PastEvents.none(self._schema), NO_ROWS
        unknown_user = False
        if request.user is not None:
            if dataset is None:
                raise ConfigError("this model is served without users; describe the query by its features")
            until = request.now
            if as_of is not None and dataset.has_times:
                until = min(as_of / dataset.header.time_unit, np.inf if until is None else until)
            user = read_user(dataset, request.user, until)
            unknown_user = user is None
            if user is not None:
                user_columns, stored = user
                columns |= user_columns
            elif request.events is None and not self._schema.empty_histories:
                raise unknown_user_error(dataset, request.user)
        if request.document is not None:
            if not self._schema.siamese or dataset is None:
                raise ConfigError("queries of this model are not documents; describe the query by its features")
            query_document = dataset.catalogue.rows_by_key([request.document])
            if query_document[0] < 0:
                raise UnknownKeyError(f"no document has the key {request.document!r}")
            columns |= dataset.catalogue.columns(query_document)
        if dataset is not None:
            check_now(dataset, request.now)
        columns |= {name: self.feature(name, value) for name, value in features.items()}

        # The history is the user's stored events, followed by those of the request.
        requested, unknown = self._events(request.events or [], request.now, stored)
        past = stored.followed_by(requested)
        seen = past.rows.values
        visit = VisitConfig() if dataset is None else dataset.rules.visit
        names = [*self._schema.request, *([] if visit.feature is None else [visit.feature])]
        context, context_features = {}, stored_features({name: self._schema.event[name] for name in names})
        for name, value in (request.context or {}).items():
            if name not in context_features:
                beginning = name[:COMPARED_CHARACTERS]
                raise ConfigError(
                    f"context: {beginning!r} is not a feature of requests; they are: "
                    f"{', '.join(context_features) or 'none'}"
                )
            context[name] = self._encoded(context_features[name], value)
        if dataset is not None:
            columns |= histories(dataset, past) | request_columns(dataset, past, context, request.now)

        # Constraints on the results: the filter; seen documents, the query document and the listed keys are excluded.
        allowed = None
        if request.filter is not None:
            if self.filters is None:
                raise ConfigError("a filter needs the documents' features; give the dataset with --data")
            allowed = self.filters.allowed(request.filter)
        exclude = self._exclude_seen if request.exclude_seen is None else request.exclude_seen
        seen_rows = NO_ROWS
        if dataset is not None:
            session = None if visit.feature is None else context.get(visit.feature)
            seen_rows = excluded_rows(dataset, past, exclude, request.now, session).values
        by_key = NO_ROWS if dataset is None else dataset.catalogue.rows_by_key(keys)
        unknown_excluded = tuple(key for key, row in zip(keys, by_key.tolist(), strict=False) if row < 0)
        excluded = np.concatenate([seen_rows, query_document, by_key[by_key >= 0]])
        return Query(
            columns=columns,
            top=request.top,
            seen=seen,
            unknown_user=unknown_user,
            unknown=unknown,
            unknown_excluded=unknown_excluded,
            excluded=excluded,
            exclude=tuple(keys),
            allowed=allowed,
        )

    def decoded(self, columns: Mapping[str, Column]) -> dict[str, Any]:
        """Return the readable values of one query's columns: items by their id, texts as their tokens."""

        def item(feature: str, code: int) -> str:
            return str(self._schema.doc[feature].display(np.array(code), decoder))

        decoder = Decoder(self._tokenizer, item)
        decoded: dict[str, Any] = {}
        for name, column in columns.items():
            _, _, event = name.partition(".")
            if name in self._schema.query:
                feature = self._schema.query[name]
                value = feature.array(column)[0]
                # the display of a vector has its first numbers only
                is_whole = isinstance(feature, Vector) and not np.isnan(value).any()
                decoded[name] = value.tolist() if is_whole else feature.display(value, decoder)
            elif event != ITEM_ROW:  # of an event per item of a history, or of the request
                of_event = self._schema.event[event]
                codes = column.values if isinstance(column, Ragged) else np.asarray(column)
                values = [of_event.display(code, decoder) for code in codes]
                decoded[name] = values[0] if name.startswith(REQUEST_PREFIX) else values
        return decoded

    def feature(self, name: str, value: Any) -> Column:
        """Encode one value as a column. Raises ConfigError: an unknown feature, or an invalid value."""
        allowed = stored_features(self._schema.query)
        if name not in allowed:
            events = "; give events instead of a history" if name in self._schema.query else ""
            requested = (name if name.isprintable() else repr(name))[:COMPARED_CHARACTERS]
            raise ConfigError(
                f"{requested} is not a query feature that can be given; they are: {', '.join(allowed)}{events}"
            )
        return self._encoded(allowed[name], value)

    def _encoded(self, feature: Feature, value: Any) -> Column:
        """Encode one value of a feature as a column. Raises ConfigError: an invalid value."""
        try:
            if isinstance(value, str):
                return encode_values(feature, [feature.parse(value)], self._tokenizer)
            row, one = {feature.name: value}, {feature.name: feature}
            given, _ = columns_of_values([row], one, self._schema.doc, self._tokenizer)
        except DataError as error:
            raise ConfigError(str(error).removeprefix("row 0: ")) from None
        return given[feature.name]

    def unknown_user_message(self, user: str) -> str:
        """Return a message about an unknown user, with existing ones."""
        assert self._dataset is not None, "users require a dataset"
        return str(unknown_user_error(self._dataset, user))

    def unknown_item_message(self, item: str) -> str:
        """Return a message about an unknown event item, with similar titles."""
        assert self.names is not None, "events require names"
        near = self.names.nearest(item)
        suggestions = f"; the nearest are: {'; '.join(near)}" if near else ", and none is similar"
        return f"no document is called {item.strip()[:COMPARED_CHARACTERS]!r}{suggestions}"

    def _events(
        self, events: Sequence[Event], now: float | None, stored: PastEvents
    ) -> tuple[PastEvents, tuple[str, ...]]:
        """Return the events up to now that follow the `stored` ones, oldest first in stable order, and unknown items.

        Raises ConfigError: only some events have times, `now` without times, mixed time units, or a feature of events
        is unknown or invalid.
        """
        none = PastEvents.none(self._schema)
        if not events:
            return none, ()
        if self.names is None or self._dataset is None:
            raise ConfigError("queries of this model have no history, so events cannot be given")
        times = np.array([np.nan if event.time is None else event.time for event in events], np.float64)
        timed = ~np.isnan(times)
        if timed.all():
            check_unit(self._dataset, "time of an event", times)
            newest = stored.newest_time[np.isfinite(stored.newest_time)]
            if mixes_units(np.concatenate([times, newest, [] if now is None else [now]])):
                raise ConfigError(f"the request mixes units of time, such as {times[0]:.15g}; give all in one unit")
            if self._schema.event and (times < stored.newest_time).any():
                raise ConfigError(
                    f"time of an event is {times.min():.15g}, needs at least {stored.newest_time[0]:.15g}, that of "
                    "the user's newest stored event; give later events only"
                )
            order = np.argsort(times, kind="stable")
            order = order[times[order] <= (np.inf if now is None else now)]
        elif timed.any() or now is not None or (timestamp_of(self._schema.event) and np.isfinite(stored.newest_time)):
            raise ConfigError(f"{(~timed).sum()} of {len(events)} events have no time; give it for all")
        else:
            order = np.arange(len(events))
        rows = self.names.rows([events[i].item for i in order])
        unknown = tuple(events[i].item for i, row in zip(order, rows.tolist(), strict=True) if row < 0)
        matched, event_features = order[rows >= 0], stored_features(self._schema.event)
        for event in events:
            for name in event.features or {}:
                if name not in event_features:
                    raise ConfigError(
                        f"{name[:COMPARED_CHARACTERS]!r} is not a feature of events; they are: "
                        f"{', '.join(event_features) or 'none'}"
                    )
        features = {}
        for name, feature in self._schema.event.items():
            if isinstance(feature, EventTime):
                previous = np.concatenate([stored.newest_time, times[matched]])[:-1]
                values = feature.codes(times[matched], previous, self._dataset.header.time_unit)
            else:
                every = ((events[i].features or {}).get(name) for i in matched)
                encoded = [self._encoded(feature, feature.missing if value is None else value) for value in every]
                values = np.concatenate([none.features[name].values, *map(np.asarray, encoded)])
            features[name] = Ragged(values, np.array([0, len(matched)]))
        newest = times[matched[-1:]] if len(matched) else np.full(1, np.nan)
        event_times = Ragged.of_lists([times[matched]], np.float64)
        return PastEvents(Ragged.of_lists([rows[rows >= 0]], np.int64), features, newest, event_times), unknown


@dataclass(frozen=True)
class PastEvents:
    """All events of queries, oldest first."""

    rows: Ragged  # int64: catalogue rows
    features: Mapping[str, Ragged]  # of events, by name, aligned with `rows`
    newest_time: np.ndarray  # float64, per query; NaN without times or events
    times: Ragged  # float64, aligned with `rows`; NaN unless visits are by gaps

    @classmethod
    def of_users(
        cls, dataset: Dataset, table: MappedTable, sequences: np.ndarray, now: float | None = None
    ) -> PastEvents:
        """Read all events of `sequences`, int64, of `table`; with `now`, of their times those up to it."""
        length = table.lengths("items", sequences)
        first = np.zeros_like(length)
        if now is not None:
            # the number of times up to `now` per sequence; reduceat returns no 0 for an empty one
            times = table.take_slices(TIME_COLUMN, sequences, first, length)
            length = np.add.reduceat(np.append(times.values <= now, 0), times.offsets[:-1]) * (length > 0)
        items = table.take_slices("items", sequences, first, length)
        newest = np.full(len(sequences), np.nan)
        if TIME_COLUMN in table.schema.names:
            newest[length > 0] = table.take_slices(TIME_COLUMN, sequences, np.maximum(length - 1, 0), length).values
        features = dataset.event_features(table, sequences, first, length, dataset.schema.event)
        untimed = Ragged(np.full(len(items.values), np.nan), items.offsets)
        by_gaps = dataset.rules.visit.gap_s is not None
        times = table.take_slices(TIME_COLUMN, sequences, first, length) if by_gaps else untimed
        return cls(Ragged(items.values.astype(np.int64), items.offsets), features, newest, times)

    @classmethod
    def of_items(cls, schema: Schema, rows: Ragged) -> PastEvents:
        """Return events of which the items alone are known, int64 catalogue rows."""
        features = {}
        for name, feature in schema.event.items():
            missing = np.asarray(encode_values(feature, [feature.missing], None))
            features[name] = Ragged(np.repeat(missing, len(rows.values)), rows.offsets)
        return cls(rows, features, np.full(len(rows), np.nan), Ragged(np.full(len(rows.values), np.nan), rows.offsets))

    @classmethod
    def none(cls, schema: Schema) -> PastEvents:
        """Return one query without events."""
        return cls.of_items(schema, Ragged.of_lists([[]], np.int64))

    def followed_by(self, later: PastEvents) -> PastEvents:
        """Return the events of one query with its `later` ones."""
        features = {name: joined(self.features[name], values) for name, values in later.features.items()}
        newest = later.newest_time if len(later.rows.values) else self.newest_time
        return PastEvents(joined(self.rows, later.rows), features, newest, joined(self.times, later.times))


def read_user(dataset: Dataset, key: str, now: float | None = None) -> tuple[dict[str, Column], PastEvents] | None:
    """Read a user's feature columns, and all events, up to `now` if given; None: no such user.

    Raises ConfigError: the dataset has no users, or `now` is given and it has no times.
    """
    table = dataset.sequences
    if table is None:
        raise ConfigError(
            "the dataset of this model holds pairs, no users; describe the query by its features",
            details=f" (the dataset is {dataset.dir})",
        )
    rows = np.flatnonzero(table.column("query_id") == hash64(key))
    if not len(rows):
        return None
    newest = rows[-1:]  # the latest partition has the full history
    stored = {name: table.take(name, newest) for name in stored_features(dataset.schema.query)}
    columns = dataset.limited_query(stored)
    if now is not None and not dataset.has_times:
        raise ConfigError(
            f"now is given, but the events of {key!r} have no times; leave now out",
            details=f" (the dataset is {dataset.dir})",
        )
    return columns, PastEvents.of_users(dataset, table, newest, now)


def unknown_user_error(dataset: Dataset, key: str) -> UnknownKeyError:
    """Return the error of an unknown user; its details are existing users."""
    assert dataset.sequences is not None, "users require sequences"
    examples = "; ".join(first_users(dataset.sequences, NUM_SUGGESTIONS))
    return UnknownKeyError(f"no user is called {key!r}", details=f"; existing users are: {examples}")


def check_unit(dataset: Dataset, name: str, times: np.ndarray) -> None:
    """Raise ConfigError: one of `times`, float64, is no time in the unit of the events of `dataset`."""
    rule = dataset.header.time_rule
    wrong = times[~rule.accepts(times)]
    if len(wrong):
        raise ConfigError(
            f"{name} is {wrong[0]:.15g}, needs {rule.needed}, as the events of the dataset", details=f" {dataset.dir}"
        )


def times_of_requests(schema: Schema) -> list[str]:
    """Return the names of the features of requests that are computed from their time."""
    return [name for name in schema.request if isinstance(schema.event[name], EventTime)]


def check_now(dataset: Dataset, now: float | None) -> None:
    """Raise ConfigError: the time of requests is not finite, in another unit than events, or missing but needed."""
    needed = times_of_requests(dataset.schema)
    if now is None and needed:
        raise ConfigError(
            f"now is missing: the features {', '.join(needed)} of a request are computed from it; give it in the unit "
            "of the events' times"
        )
    if now is not None and not np.isfinite(now):
        raise ConfigError(f"now is {now}, needs a finite number")
    if now is not None:
        check_unit(dataset, "now", np.array([now]))


def excluded_rows(
    dataset: Dataset, past: PastEvents, exclude_seen: bool | str, now: float | None = None,
    session: Column | None = None,
) -> Ragged:  # fmt: skip
    """Return the catalogue rows that are no answers per query, see `EventRules.excluded` and `Dataset.later_items`.

    The visit of a request is that of its newest event, unless `now` or `session` differ from it. Without `now`, no item
    is too late. Raises ConfigError: a visit needs the times of events, and some have none.
    """
    visit = dataset.rules.visit
    if visit.gap_s is not None and exclude_seen is not True and np.isnan(past.times.values).any():
        raise ConfigError("some events have no time, which data.visit.gap_s needs; give it for all")

    def visits() -> tuple[Ragged, np.ndarray]:
        """Return the times or session codes of the events, and those of the requests."""
        if visit.feature is None:
            return past.times, past.newest_time if now is None else np.full(len(past.rows), now)
        events = past.features[visit.feature]
        newest = np.append(events.values, PADDING)[np.maximum(events.offsets[1:], 1) - 1]
        return events, newest if session is None else np.repeat(np.asarray(session), len(past.rows))

    excluded = dataset.rules.excluded(
        past.rows, exclude_seen, dataset.schema, lambda name: past.features[name].values, visits,
        dataset.header.time_unit,
    )  # fmt: skip
    return joined(excluded, dataset.later_items(np.full(len(past.rows), np.nan if now is None else now)))


def request_columns(
    dataset: Dataset, past: PastEvents, context: Mapping[str, Column], now: float | None
) -> dict[str, Column]:
    """Return the features of requests after `past` events: one value of `context` for all, and those of `now`."""
    columns: dict[str, Column] = {}
    for name in dataset.schema.request:
        feature = dataset.schema.event[name]
        if isinstance(feature, EventTime):
            codes = feature.codes(np.full(len(past.rows), now), past.newest_time, dataset.header.time_unit)
            undated = (past.rows.lengths > 0) & np.isnan(past.newest_time) & isinstance(feature, Elapsed)
            columns[REQUEST_PREFIX + name] = np.where(undated, feature.missing, codes)
        else:
            value = context.get(name, encode_values(feature, [feature.missing], None))
            columns[REQUEST_PREFIX + name] = np.repeat(np.asarray(value), len(past.rows))
    return columns


def first_users(table: MappedTable, most: int) -> list[str]:
    """Return the keys of the first `most` distinct users of a dataset's sequences."""
    users, rows = np.unique(table.column("query_id"), return_index=True)
    first = np.sort(rows[users != FORGOTTEN_ID])[:most]
    return table.strings("query_key", first)


def histories(dataset: Dataset, past: PastEvents) -> dict[str, Column]:
    """Return the columns of the histories of queries: their newest `max_items` events."""
    columns: dict[str, Column] = {}
    begin, end = past.rows.offsets[:-1], past.rows.offsets[1:]
    for name, feature in histories_of(dataset.schema.query).items():
        first = np.maximum(end - feature.max_items, begin)
        newest = gather_ranges(past.rows.values, first, end)
        columns[name] = Ragged(item_codes(dataset.catalogue.codes(str(feature.of), newest.values)), newest.offsets)
        if dataset.rules.item_rows:
            columns[f"{name}.{ITEM_ROW}"] = Ragged(newest.values + 1, newest.offsets)
        for key in dataset.schema.event_inputs:
            columns[f"{name}.{key}"] = gather_ranges(past.features[key].values, first, end)
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
