"""Search queries as people give them: a known user, a typed history, or typed feature values."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Column, Ragged, TextTokenizer, encode_values, histories_of, stored
from bigdssm.hashing import hash64
from bigdssm.schema import Schema

NUM_SUGGESTIONS = 3
# A name that nobody knows is compared with so many titles, as far as so many characters: at worst about a second.
MOST_COMPARED, COMPARED_CHARACTERS = 5000, 80


@dataclass(frozen=True)
class Query:
    """One query: its feature columns (as `Collator.query_features` takes them) and what it has seen."""

    columns: dict[str, Column]
    seen: np.ndarray  # int64 catalogue rows, oldest first


def check_typed(values: Sequence[str]) -> None:
    """Raise ConfigError where a user, titles or values of features are nothing but spaces, or no text at all."""
    if not any(value.strip() for value in values):
        raise ConfigError("the query is empty; type something")
    for value in values:
        if any("\ud800" <= character <= "\udfff" for character in value):  # as the shell's bytes arrive
            raise ConfigError(f"{ascii(value)[:COMPARED_CHARACTERS]} is no text in UTF-8")


def user_query(dataset: Dataset, key: str) -> Query:
    """Return the query of a known user, with all events in the history. Raises DataError: no such user or sequences."""
    table = dataset.sequences
    if table is None:
        raise DataError(f"{dataset.dir} holds pairs, no users; describe the query by its features instead")
    rows = np.flatnonzero(table.whole("query_id") == hash64(key))
    if not len(rows):
        some = "; ".join(table.strings("query_key", np.arange(min(NUM_SUGGESTIONS, table.num_rows))))
        raise DataError(f"no user is called {key!r}; some who are: {some}")
    newest = rows[-1:]  # a later partition knows more of the user
    columns = _missing(dataset.schema, dataset.tokenizer)
    columns |= {name: table.take(name, newest) for name in dataset.schema.query if name in table.schema.names}
    length = table.lengths("items", newest)
    seen = table.take_slices("items", newest, np.zeros_like(length), length)[0]
    return Query(columns | _histories(dataset, seen), np.asarray(seen, np.int64))


class DocumentNames:
    """Finds documents by key or display name, whatever the case."""

    def __init__(self, keys: Sequence[str], display: Sequence[str]) -> None:
        self._display = display
        self._by_key = {key: row for row, key in enumerate(keys)}
        self._by_name = {name.casefold(): row for row, name in reversed(list(enumerate(display)))}

    @classmethod
    def of(cls, dataset: Dataset) -> DocumentNames:
        """Return the names of a dataset's catalogue."""
        rows = np.arange(dataset.catalogue.num_docs)
        return cls(dataset.catalogue.keys(rows), dataset.catalogue.display(rows))

    def find(self, names: Sequence[str]) -> np.ndarray:
        """Return int64 catalogue rows. Raises DataError that suggests names near the first unknown one."""
        rows = []
        for name in names:
            row = self._by_key.get(name.strip(), self._by_name.get(name.strip().casefold()))
            if row is None:
                near = [self._display[self._by_name[title]] for title in _nearest(name, self._by_name)]
                some = f"; the nearest are: {'; '.join(near)}" if near else ", nor nearly so"
                raise DataError(f"no document is called {name.strip()[:COMPARED_CHARACTERS]!r}{some}")
            rows.append(row)
        return np.array(rows, np.int64)


def history_query(dataset: Dataset, documents: DocumentNames, names: Sequence[str]) -> Query:
    """Return the query of a typed history, oldest first, by document keys or display names; other features are missing.

    Raises DataError: an unknown name, or a schema without a history.
    """
    if not histories_of(dataset.schema.query):
        raise DataError(f"queries of {dataset.dir} have no history; they have {list(dataset.schema.query)}")
    seen = documents.find(names)
    return Query(_missing(dataset.schema, dataset.tokenizer) | _histories(dataset, seen), seen)


def feature_query(schema: Schema, values: Mapping[str, str], tokenizer: TextTokenizer | None) -> Query:
    """Return the query of typed feature values; features that are not given are missing.

    Raises ConfigError: an unknown feature, a history, or a number that is none.
    """
    columns, known = _missing(schema, tokenizer), stored(schema.query)
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{name} is not a query feature that can be typed; these are: {', '.join(known)}")
        columns[name] = encode_values(known[name], [known[name].typed(value)], tokenizer)
    return Query(columns, np.zeros(0, np.int64))


def _missing(schema: Schema, tokenizer: TextTokenizer | None) -> dict[str, Column]:
    """Return one row in which every feature is missing."""
    return {name: encode_values(feature, [feature.missing], tokenizer) for name, feature in schema.query.items()}


def _histories(dataset: Dataset, seen: np.ndarray) -> dict[str, Column]:
    return {
        name: Ragged.of_lists([dataset.catalogue.codes(str(feature.of), seen[-feature.max_items :])])
        for name, feature in histories_of(dataset.schema.query).items()
    }


def _nearest(name: str, by_name: dict[str, int]) -> list[str]:
    """Return some keys of `by_name` that hold the name, else some that resemble it."""
    wanted = name.strip().casefold()[:COMPARED_CHARACTERS]
    inside = list(islice((title for title in reversed(by_name) if wanted and wanted in title), NUM_SUGGESTIONS))
    if inside:
        return inside
    few = len(by_name) <= MOST_COMPARED
    same_letter = (title for title in reversed(by_name) if few or title[:1] == wanted[:1])
    compared = {title[:COMPARED_CHARACTERS]: title for title in islice(same_letter, MOST_COMPARED)}
    return [compared[start] for start in difflib.get_close_matches(wanted, compared, NUM_SUGGESTIONS)]
