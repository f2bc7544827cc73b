"""Base class of vector stores, their registration by URL scheme, and their opening by URL.

A collection holds the document vectors of one model with keys, titles and filterable columns. It is built by
`retrieval.publish`; an alias such as `live` names the collection that is served. A store is one file: a frozen
dataclass, registered with `register_store`, whose fields are options (`bigdssm publish … KEY=VALUE`).

    create → contents, write, delete → finish → switch

A dataset has a stamp, which is later after every build and append (`dataset.stamps`). A collection refuses a dataset
of an earlier stamp than its own. Its publications are counted by the publisher that holds `Store.publishing`, so that a
later publication never has an earlier dataset. A write or delete has the number of its publication as its version. Of
several writes and deletes of one key, the one of the largest version wins, and of equal versions the delete, in any
order of arrival: the latest publication decides, also on a document that an earlier one has deleted. Deletes of
`forget` have the version FORGOTTEN, above all publications.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, ClassVar, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np

from bigdssm.errors import CheckpointError, ConfigError, DataError
from bigdssm.features.base import FITTED, ColumnType
from bigdssm.features.conditions import Expression
from bigdssm.utils.components import Registry, keys_of


class ScoredDocument(NamedTuple):
    """A search result."""

    score: float
    key: str
    title: str


class StoredVector(NamedTuple):
    """Title and vector, float32 [width], of a document."""

    title: str
    vector: np.ndarray


@dataclass(frozen=True)
class Collection:
    """Description of a collection."""

    name: str
    model: str  # checksum of the document tower, `VectorsMeta.model_checksum`
    dataset: str  # fingerprint
    version: int  # of the dataset: the latest published stamp; before there were stamps, a number of partitions
    width: int  # of the vectors: D+1, or D without beta
    has_beta: bool
    score: str  # dot or cosine; truncated cosine vectors are rescaled to their norm
    radius: float = 0.0  # above the length of the first vectors: a store can reduce inner products to distances
    columns: Mapping[str, ColumnType] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # of the store
    published: float = 0.0  # seconds since 1970; 0: not complete yet
    publication: int = 0  # number of the last publication; 0: before they were counted, rows had `version`

    @property
    def next_publication(self) -> int:
        """The version of writes and deletes of the next publication, above all earlier ones."""
        return 1 + (self.publication or self.version)

    def check_model(self, model: str) -> None:
        """Raise CheckpointError if this collection holds vectors of a model other than `model`, a checksum."""
        if model != self.model:
            raise CheckpointError(
                f"collection {self.name} holds vectors of model {self.model[:12]}, the queries are of model "
                f"{model[:12]}; their scores are not comparable: publish the vectors of the model in use"
            )

    def check_rows(self, models: Iterable[str]) -> None:
        """Raise CheckpointError if a stored document is of another model; `models` are checksums."""
        for model in set(models):
            if model != self.model:
                raise CheckpointError(
                    f"collection {self.name} of model {self.model[:12]} has rows of model {model[:12]}; publish under "
                    "another name"
                )

    def check_queries(self, queries: np.ndarray) -> None:
        """Raise ConfigError unless the shape of query vectors is [m, width]."""
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise ConfigError(f"got queries {list(queries.shape)}, needs [queries, {self.width}] for {self.name}")

    def column_type(self, name: str) -> ColumnType:
        """Return the type of a filter's column. Raises ConfigError: no such column."""
        if name not in self.columns:
            raise ConfigError(f"filter: {name} is not a column of the collection; they are {', '.join(self.columns)}")
        return self.columns[name]


@dataclass(frozen=True)
class Documents:
    """A batch of n documents to write."""

    keys: Sequence[str]
    titles: Sequence[str]
    vectors: np.ndarray  # float32 [n, width]
    contents: np.ndarray  # int64 [n]: hash of title, vector and columns
    columns: Mapping[str, Sequence[Any]]  # by name: str, list[str] or float per document; None: missing


class Alias(NamedTuple):
    """The collection that an alias names, and the one before the last switch."""

    name: str
    previous: str | None


@dataclass(frozen=True)
class Store(ABC):
    """A vector store; dataclass fields are options of its collections.

    Errors of the server are `UnavailableError` (try again) or `DataError`, in one sentence without credentials.
    """

    scheme: ClassVar[str]  # of URLs: SCHEME://…
    uses_radius: ClassVar[bool] = False  # whether vectors longer than `Collection.radius` are indexed less exactly
    url: str = field(default="", metadata=FITTED, repr=False)
    given: frozenset[str] = field(default=frozenset(), metadata=FITTED, repr=False)  # explicit options of `open_store`

    @abstractmethod
    def collections(self) -> dict[str, Collection]:
        """Return all collections by name, complete or not."""

    @abstractmethod
    def create(self, collection: Collection) -> None:
        """Create a collection, or replace the description of an existing one of the same model and columns."""

    @abstractmethod
    def publishing(self, name: str) -> AbstractContextManager[None]:
        """Return a context in which no other process publishes to `name`. Raises DataError: one does."""

    @abstractmethod
    def contents(self, collection: Collection) -> dict[str, int]:
        """Return `Documents.contents` of all stored documents by key."""

    @abstractmethod
    def write(self, collection: Collection, documents: Documents, version: int) -> None:
        """Insert or replace documents by key, unless a later version of the key was written or deleted.

        A delete of an equal version wins, too.
        """

    @abstractmethod
    def delete(self, collection: Collection, keys: Sequence[str], version: int) -> None:
        """Delete documents, and reject their writes of versions up to `version`; the keys may be unknown."""

    @abstractmethod
    def finish(self, collection: Collection) -> None:
        """Make a collection complete: build its index as `collection.options` define it, if there is no such index."""

    @abstractmethod
    def compact(self, collection: Collection) -> Sequence[str]:
        """Remove the bytes of deleted documents from the files of the store; return the places that may have them."""

    @abstractmethod
    def drop(self, name: str) -> None:
        """Remove a collection that no alias names, if it exists. Raises ConfigError: an alias names it."""

    @abstractmethod
    def count(self, collection: Collection, where: Expression | None = None) -> int:
        """Return the number of documents that match `where`."""

    @abstractmethod
    def search(
        self, collection: Collection, queries: np.ndarray, top: int, where: Expression | None = None,
        exclude: Sequence[Sequence[str]] | None = None,
    ) -> list[list[ScoredDocument]]:  # fmt: skip
        """Return the `top` documents per query with the largest inner products, best first.

        queries are float32 [m, width]; `exclude` holds keys to exclude per query. A query gets fewer documents only if
        no more match. Raises CheckpointError: a row is of another model than the collection.
        """

    @abstractmethod
    def vectors(self, collection: Collection, keys: Sequence[str]) -> dict[str, StoredVector]:
        """Return the vectors of the existing documents among `keys`. Raises CheckpointError as `search` does."""

    @abstractmethod
    def aliases(self) -> dict[str, Alias]:
        """Return all aliases."""

    @abstractmethod
    def switch(self, alias: str, name: str) -> None:
        """Let `alias` name another collection, in one step; the one that it named becomes `Alias.previous`.

        Raises ConfigError, DataError: as `check_switch`.
        """

    @property
    def address(self) -> str:
        """The URL without user and options, for messages."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def check_complete(self, name: str) -> Collection:
        """Return the collection `name`. Raises DataError: there is none, or its first publication has not ended."""
        collection = self.collections().get(name)
        if collection is None:
            raise DataError(f"{self.address} has no collection {name!r}; publish it first")
        if not collection.published:
            raise DataError(f"{self.address}: collection {name} is not complete; publish it again")
        return collection

    def check_switch(self, alias: str, name: str) -> None:
        """Raise ConfigError if a new alias has the name of a collection; DataError as `check_complete`.

        Names of collections and aliases are distinct: `URL#NAME` may be either.
        """
        self.check_complete(name)
        if alias in self.collections() and alias not in self.aliases():
            raise ConfigError(f"alias {alias}: it is the name of a collection; choose another one with --alias")

    def check_new_collection(self, name: str) -> None:
        """Raise ConfigError if a collection would have the name of an alias."""
        if (alias := self.aliases().get(name)) is not None:
            raise ConfigError(
                f"collection {name}: it is the name of an alias, of {alias.name}; choose another one with --as"
            )

    def check_unnamed(self, name: str) -> None:
        """Raise ConfigError if an alias names the collection `name`."""
        if names := [alias for alias, (current, _) in self.aliases().items() if current == name]:
            raise ConfigError(f"collection {name}: the alias {names[0]} names it; switch the alias first")

    def named(self, name: str) -> list[Collection]:
        """Return the collection of a name or alias, and the one that the alias named before, if it is complete.

        Raises DataError: no such name, or its collection is not complete.
        """
        aliases, collections = self.aliases(), self.collections()
        candidates = [collections.get(one or "") for one in aliases.get(name, Alias(name, None))]
        if candidates[0] is None:
            names = ", ".join([*aliases, *collections]) or "nothing"
            raise DataError(f"the store has no collection or alias {name!r}, only {names}; publish it first")
        self.check_complete(candidates[0].name)
        return [collection for collection in candidates if collection is not None and collection.published]

    def collection(self, name: str) -> Collection:
        """Return a collection by name or alias. Raises DataError: none has it."""
        return self.named(name)[0]

    def options(self, existing: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the options of a new collection, or those of an `existing` one with the explicit ones replaced."""
        options = {key: getattr(self, key) for key in keys_of(type(self))}
        if existing is None:
            return options
        defaults = type(self)()
        changed = {key for key in options if key in self.given or options[key] != getattr(defaults, key)}
        return {key: options[key] if key in changed else existing.get(key, options[key]) for key in options}


STORES: Registry[Store] = Registry("a store", "scheme", Store)
register_store = STORES.register


WAITS_S = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 3.2)  # before trying again: longer than the restart of a server
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
LIVE = "live"  # the alias that is served by default
FORGOTTEN = 2**53 - 1  # the version of deletes by `forget`, exact also in float64, by which Qdrant compares
BUILT_IN = {  # by scheme; each module imports its client, or FAISS
    "postgresql": "bigdssm.stores.postgres",
    "file": "bigdssm.retrieval.folder_store",
    "qdrant": "bigdssm.stores.qdrant",
}


def store_class(url: str) -> type[Store]:
    """Return the class of the store at a URL. Raises ConfigError: a scheme without store, or a missing client."""
    scheme = url.partition(":")[0]
    if scheme in BUILT_IN:
        import_module(BUILT_IN[scheme])
    if scheme not in STORES.classes:
        names = ", ".join(f"{name}://" for name in sorted({*BUILT_IN, *STORES.classes}))
        raise ConfigError(f"got a store at {scheme[:20]}://…, needs {names}, or a plugin (docs/extending.md)")
    return STORES.classes[scheme]


def is_store(address: object) -> bool:
    """Return whether this is a URL of a store, not a folder."""
    return "://" in str(address)


def open_named(address: str) -> tuple[Store, str]:
    """Return the store at URL#NAME, and the name of a collection or alias, LIVE by default. Raises as `open_store`."""
    url, _, name = address.partition("#")
    if "@" in name:  # the rest of a password
        raise ConfigError("the URL of the store is invalid; needs SCHEME://USER@HOST:PORT/DATABASE#NAME")
    return open_store(url), unquote(name) or LIVE


def open_store(url: str, options: Mapping[str, Any] | None = None) -> Store:
    """Return the store at a URL; a connection is opened by its first use.

    Raises ConfigError: a scheme without store, an invalid option, or a password or #NAME in the URL.
    """
    store = store_class(url)
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ConfigError("the URL of the store is invalid; needs SCHEME://USER@HOST:PORT/DATABASE") from None
    if parts.password is not None or "@" in parts.path or "password" in parts.query:
        raise ConfigError(
            "got a password in the URL of the store, where logs and process lists show it; use the environment or the "
            "files of the store's client (docs/stores.md)"
        )
    if "#" in url:
        raise ConfigError(
            "got #NAME in the URL of the store, which search and serve alone take; name a collection by an option "
            "(publish --as, forget --collection)"
        )
    return replace(STORES.make(store.scheme, options), url=url, given=frozenset(options or ()))
