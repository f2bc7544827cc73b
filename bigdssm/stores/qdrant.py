"""Qdrant 1.16 or later: a collection of points per collection, searched by its HNSW graph of inner products.

bigdssm                   points without vectors: descriptions (`Collection` as JSON), earlier names of aliases, leases
bigdssm_vectors_NAME      a point per document: doc_key, doc_title, doc_model, doc_version, doc_content, filter columns
bigdssm_tombstones_NAME   a point per deleted key (by its hash, not the key itself): version
bigdssm_alias_ALIAS       an alias of Qdrant

The id of a point is the 128-bit hash of its key, doc_version the number of a publication. Versions are compared by the
server: a write updates points of earlier versions only. The API key comes from QDRANT_API_KEY.
"""

import atexit
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, TypeVar
from urllib.parse import unquote, urlsplit
from uuid import UUID, uuid4

import numpy as np
import xxhash

from bigdssm.errors import BigDSSMError, ConfigError, DataError, UnavailableError
from bigdssm.features.base import FITTED, ColumnType
from bigdssm.features.conditions import And, Expression, Or
from bigdssm.stores.base import (
    LOCAL_HOSTS,
    WAITS_S,
    Alias,
    Collection,
    Documents,
    ScoredDocument,
    Store,
    StoredVector,
    register_store,
)
from bigdssm.utils.components import bounded

try:
    from qdrant_client import QdrantClient, models
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
except ImportError as error:
    raise ConfigError(f"a store at qdrant:// needs qdrant-client ({error}): pip install 'bigdssm[qdrant]'") from None

KEY_VARIABLE = "QDRANT_API_KEY"
LEAST_VERSION = (1, 16)  # of the server: writes that compare versions
ADMIN = "bigdssm"
NAME_BYTES = 100
ROWS_AT_ONCE, SCROLLED = 512, 10_000  # points per request
LEASE_S = 120.0  # of a publisher, who renews it with every change
TIMEOUT_S = 60
PAYLOAD_TYPES: Mapping[ColumnType, str] = {"category": "keyword", "categories": "keyword", "number": "float"}
T = TypeVar("T")


@dataclass
class _State:
    """The connection, and the leases that this process holds by collection."""

    client: QdrantClient | None = None
    leases: dict[str, str] = field(default_factory=dict)


@register_store
@dataclass(frozen=True)
class QdrantStore(Store):
    """Collections of Qdrant."""

    scheme: ClassVar[str] = "qdrant"

    m: int = bounded(24, 2, 100)  # links per document in the HNSW graph
    ef_construction: int = bounded(128, 4, 1000)  # candidates per document when the graph is built
    ef_search: int = bounded(200, 1, 10_000)  # candidates per query, at least the number of requested documents
    _state: _State = field(default_factory=_State, metadata=FITTED, repr=False, compare=False)

    # ----- collections

    def collections(self) -> dict[str, Collection]:
        """Return all collections by name; none before the first `create`, and none whose `drop` was killed."""
        described = self._described()
        existing = {one.name for one in self._run(lambda client: client.get_collections()).collections}
        return {name: collection for name, collection in described.items() if _vectors(name) in existing}

    def create(self, collection: Collection) -> None:
        """Create the points, tombstones and payload indexes of a collection, or replace its description."""
        name, options = collection.name, collection.options
        self._check_name(name)
        self.check_new_collection(name)
        if invalid := [column for column in collection.columns if column.startswith("doc_") or '"' in column]:
            raise ConfigError(
                f"column {invalid[0]!r}: needs a name without double quotes that does not begin with doc_"
            )
        graph = models.HnswConfigDiff(m=options["m"], ef_construct=options["ef_construction"])
        vectors = models.VectorParams(size=collection.width, distance=models.Distance.DOT)

        def work(client: Any) -> None:
            self._create_admin(client)
            if not client.collection_exists(_tombstones(name)):
                client.create_collection(_tombstones(name), vectors_config={})
            if not client.collection_exists(_vectors(name)):
                client.create_collection(_vectors(name), vectors_config=vectors, hnsw_config=graph)
            else:
                client.update_collection(_vectors(name), hnsw_config=graph)  # the same values rebuild nothing
            if not self._is_local:
                indexes = {_path(column): PAYLOAD_TYPES[type] for column, type in collection.columns.items()}
                for path, type in {"doc_version": "integer", **indexes}.items():
                    client.create_payload_index(_vectors(name), path, models.PayloadSchemaType(type))

        self._run(work)
        self._describe(collection)

    @contextmanager
    def publishing(self, name: str) -> Iterator[None]:
        """Hold a lease, which ends LEASE_S seconds after the last change by a killed publisher.

        A local folder is locked as a whole by the process that opened it.
        """
        self._check_name(name)
        self._run(self._create_admin)
        if name in self._state.leases:
            raise DataError(f"{self.address}: another process publishes to {name}; wait for it, then try again")
        self._state.leases[name] = uuid4().hex
        try:
            self._renew(name)
            yield
        finally:
            owner = self._state.leases.pop(name)
            mine = models.FieldCondition(key="owner", match=models.MatchValue(value=owner))
            self._run(lambda client: client.delete(ADMIN, models.Filter(must=[mine])))

    def finish(self, collection: Collection) -> None:
        """Wait until the server has built the graph, and note the time."""
        while self._run(lambda client: client.get_collection(_vectors(collection.name))).status not in (
            "green",
            "grey",
        ):
            self._renew(collection.name)
            time.sleep(0.5)
        self._describe(replace(collection, published=time.time()))

    def compact(self, collection: Collection) -> Sequence[str]:
        """Change nothing: the server alone rewrites its segments, when many of their points are deleted."""
        return [
            f"segments, write-ahead log, replicas and snapshots of {self.address}, until its optimizer rewrites them",
            f"{_tombstones(collection.name)} of {self.address}, which has a 128-bit hash of each removed key",
        ]

    def drop(self, name: str) -> None:
        """Drop the points, tombstones and description of a collection."""
        self.check_unnamed(name)
        if name in self._described():

            def work(client: Any) -> None:
                client.delete_collection(_vectors(name))
                client.delete_collection(_tombstones(name))
                client.delete(ADMIN, [_id(f"collection {name}")])  # last: after a kill, drop it again

            self._run(work)

    # ----- aliases

    def aliases(self) -> dict[str, Alias]:
        """Return the aliases of Qdrant that name collections, with the earlier names."""
        names, previous = self.collections(), {point["alias"]: point["previous"] for point in self._admin("alias")}
        if not names:
            return {}
        stored = self._run(lambda client: client.get_aliases()).aliases
        current = {alias.alias_name: alias.collection_name.removeprefix(_vectors("")) for alias in stored}
        aliases = {
            alias.removeprefix(_alias("")): name for alias, name in current.items() if alias.startswith(_alias(""))
        }
        return {
            alias: Alias(name, before if (before := previous.get(alias)) in names and before != name else None)
            for alias, name in sorted(aliases.items()) if name in names
        }  # fmt: skip

    def switch(self, alias: str, name: str) -> None:
        """Replace the alias in one step."""
        self._check_name(alias)
        self.check_switch(alias, name)
        current = self.aliases().get(alias)
        if current is not None and current.name == name:
            return
        # The earlier one first: after a kill between both, the same switch has the same result
        before = {"kind": "alias", "alias": alias, "previous": current and current.name}
        changes: list[Any] = [] if current is None else [
            models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=_alias(alias)))
        ]  # fmt: skip
        target = models.CreateAlias(collection_name=_vectors(name), alias_name=_alias(alias))
        changes.append(models.CreateAliasOperation(create_alias=target))
        self._put(ADMIN, [models.PointStruct(id=_id(f"alias {alias}"), vector={}, payload=before)])
        self._run(lambda client: client.update_collection_aliases(changes))

    # ----- documents

    def contents(self, collection: Collection) -> dict[str, int]:
        """Return the hashes of all points."""
        points = self._scroll(_vectors(collection.name), None, ["doc_key", "doc_content"])
        return {point["doc_key"]: point["doc_content"] for point in points}

    def write(self, collection: Collection, documents: Documents, version: int) -> None:
        """Update points of earlier versions, without those that have a later tombstone."""
        self._renew(collection.name)
        rows = zip(documents.keys, documents.titles, documents.contents.tolist(), strict=True)
        points = []
        for row, (key, title, content) in enumerate(rows):
            values = {name: documents.columns[name][row] for name in collection.columns}
            payload = {
                "doc_key": key, "doc_title": title, "doc_model": collection.model, "doc_version": version,
                "doc_content": content, **{name: value for name, value in values.items() if value is not None},
            }  # fmt: skip
            points.append(models.PointStruct(id=_id(key), vector=documents.vectors[row].tolist(), payload=payload))
        for first in range(0, len(points), ROWS_AT_ONCE):
            batch = points[first : first + ROWS_AT_ONCE]
            deleted = self._deleted(collection, [point.id for point in batch])
            batch = [point for point in batch if deleted.get(point.id, version - 1) < version]
            self._put(_vectors(collection.name), batch, _range("doc_version", lte=version))
            self._erase(collection, [point.id for point in batch])  # deleted meanwhile

    def delete(self, collection: Collection, keys: Sequence[str], version: int) -> None:
        """Write tombstones, then delete points."""
        self._renew(collection.name)
        ids = sorted({_id(key) for key in keys})
        for first in range(0, len(ids), ROWS_AT_ONCE):
            batch = ids[first : first + ROWS_AT_ONCE]
            tombstones = [models.PointStruct(id=id, vector={}, payload={"version": version}) for id in batch]
            self._put(_tombstones(collection.name), tombstones, _range("version", lt=version))
            self._erase(collection, batch)

    def count(self, collection: Collection, where: Expression | None = None) -> int:
        """Count points."""
        matching = _filter(where, collection)
        return int(self._run(lambda client: client.count(_vectors(collection.name), matching, exact=True)).count)

    def search(
        self, collection: Collection, queries: np.ndarray, top: int, where: Expression | None = None,
        exclude: Sequence[Sequence[str]] | None = None,
    ) -> list[list[ScoredDocument]]:  # fmt: skip
        """Search the graph; a result with fewer than `top` documents is repeated exactly."""
        collection.check_queries(queries)
        matching = _filter(where, collection)

        def search(numbers: Sequence[int], exact: bool) -> list[Any]:
            parameters = None  # local mode is exact
            if not self._is_local:
                parameters = models.SearchParams(hnsw_ef=max(top, collection.options["ef_search"]), exact=exact)
            requests = []
            for number in numbers:
                excluded = [_id(key) for key in exclude[number]] if exclude is not None else []
                must_not = [models.HasIdCondition(has_id=excluded)] if excluded else None
                restriction = models.Filter(must=None if matching is None else [matching], must_not=must_not)
                requests.append(models.QueryRequest(
                    query=queries[number].tolist(), filter=restriction, params=parameters, limit=top,
                    with_payload=["doc_key", "doc_title", "doc_model"],
                ))  # fmt: skip
            return self._run(lambda client: client.query_batch_points(_vectors(collection.name), requests))

        results = [response.points for response in search(range(len(queries)), False)] if len(queries) else []
        if short := [number for number, points in enumerate(results) if len(points) < top]:
            for number, response in zip(short, search(short, True), strict=True):
                results[number] = response.points
        collection.check_rows(point.payload["doc_model"] for points in results for point in points)
        return [
            [ScoredDocument(point.score, point.payload["doc_key"], point.payload["doc_title"]) for point in points]
            for points in results
        ]

    def vectors(self, collection: Collection, keys: Sequence[str]) -> dict[str, StoredVector]:
        """Return the vectors of the existing documents among `keys`."""
        name, ids = _vectors(collection.name), [_id(key) for key in keys]
        points = self._run(lambda client: client.retrieve(name, ids, with_payload=True, with_vectors=True))
        collection.check_rows(point.payload["doc_model"] for point in points)
        return {
            point.payload["doc_key"]: StoredVector(point.payload["doc_title"], np.array(point.vector, np.float32))
            for point in points
        }

    # ----- requests

    def _check_name(self, name: str) -> None:
        if not re.fullmatch(r"[\w .-]+", name) or len(name.encode()) > NAME_BYTES:
            raise ConfigError(
                f"{name!r}: needs a name of 1 to {NAME_BYTES} letters, digits, and any of _ . - or blanks"
            )

    def _create_admin(self, client: Any) -> None:
        if not client.collection_exists(ADMIN):
            client.create_collection(ADMIN, vectors_config={})

    def _admin(self, kind: str) -> list[dict[str, Any]]:
        """Return the payloads of a kind of points of ADMIN."""
        if not self._run(lambda client: client.collection_exists(ADMIN)):
            return []
        return self._scroll(ADMIN, models.Filter(must=[_match("kind", [kind])]), True)

    def _described(self) -> dict[str, Collection]:
        """Return all descriptions by name."""
        stored = [Collection(**json.loads(point["description"])) for point in self._admin("collection")]
        return {collection.name: collection for collection in sorted(stored, key=lambda one: one.name)}

    def _describe(self, collection: Collection) -> None:
        payload = {"kind": "collection", "description": json.dumps(asdict(collection))}
        self._put(ADMIN, [models.PointStruct(id=_id(f"collection {collection.name}"), vector={}, payload=payload)])

    def _renew(self, name: str) -> None:
        """Renew the lease that this process holds. Raises DataError: it ended, and another process has one."""
        if (owner := self._state.leases.get(name)) is None:
            return
        id, now = _id(f"lease {name}"), time.time()
        lease = {"kind": "lease", "owner": owner, "until": now + LEASE_S}
        free = models.Filter(should=[_match("owner", [owner]), _range("until", lt=now)])
        self._put(ADMIN, [models.PointStruct(id=id, vector={}, payload=lease)], free)
        (stored,) = self._run(lambda client: client.retrieve(ADMIN, [id]))
        if stored.payload["owner"] != owner:
            raise DataError(
                f"{self.address}: another process publishes to {name}, or was killed in the last {LEASE_S:g} s; wait "
                "for it, then try again"
            )

    def _put(self, name: str, points: list[Any], update: Any = None) -> None:
        """Insert points, and replace existing ones that match the condition `update`."""
        condition = update if update is None or isinstance(update, models.Filter) else models.Filter(must=[update])
        if points:
            self._run(lambda client: client.upsert(name, points, update_filter=condition))

    def _deleted(self, collection: Collection, ids: list[Any]) -> dict[Any, int]:
        """Return the versions of tombstones by id."""
        points = self._run(lambda client: client.retrieve(_tombstones(collection.name), ids))
        return {point.id: point.payload["version"] for point in points}

    def _erase(self, collection: Collection, ids: list[Any]) -> None:
        """Delete points whose tombstones are not of an earlier version."""
        by_version: dict[int, list[Any]] = {}
        for id, version in self._deleted(collection, ids).items():
            by_version.setdefault(version, []).append(id)

        def work(client: Any) -> None:
            for version, batch in by_version.items():
                dead = models.Filter(must=[models.HasIdCondition(has_id=batch), _range("doc_version", lte=version)])
                client.delete(_vectors(collection.name), dead)

        self._run(work)

    def _scroll(self, name: str, matching: Any, payload: Any) -> list[dict[str, Any]]:
        """Return the payloads of all matching points."""

        def work(client: Any) -> list[dict[str, Any]]:
            points, offset = client.scroll(name, matching, SCROLLED, with_payload=payload)
            while offset is not None:
                more, offset = client.scroll(name, matching, SCROLLED, offset=offset, with_payload=payload)
                points += more
            return [point.payload for point in points]

        return self._run(work)

    # ----- connection

    @property
    def _is_local(self) -> bool:
        """Whether the store is a folder of Qdrant's local mode."""
        return not urlsplit(self.url).netloc

    def _client(self) -> QdrantClient:
        """Return the connection. Raises ConfigError: an invalid URL, or an API key that would be sent without TLS."""
        if self._state.client is not None:
            return self._state.client
        parts, key = urlsplit(self.url), os.environ.get(KEY_VARIABLE)
        try:
            host, port = parts.hostname, parts.port or 6333
        except ValueError:
            host, port = None, 0
        if self._is_local and parts.path:
            client = QdrantClient(path=unquote(parts.path), force_disable_check_same_thread=True)
            atexit.register(client.close)
        elif not host or parts.path.strip("/") or parts.query not in ("", "tls=off") or parts.username:
            raise ConfigError(
                "the URL of the store is invalid; needs qdrant://HOST:PORT, with ?tls=off without TLS, or "
                f"qdrant:///FOLDER; the API key comes from {KEY_VARIABLE}"
            )
        else:
            is_here = host in LOCAL_HOSTS
            with_tls = not is_here and parts.query != "tls=off"
            if key and not with_tls and not is_here:
                raise ConfigError(f"{KEY_VARIABLE} is set, and ?tls=off would send it unencrypted; remove one of them")
            client = QdrantClient(
                host=host, port=port, https=with_tls, api_key=key, timeout=TIMEOUT_S, check_compatibility=False
            )
            version = tuple(map(int, client.info().version.split(".")[:2]))
            if version < LEAST_VERSION:
                raise DataError(f"{self.address} has Qdrant {client.info().version}, needs 1.16 to compare versions")
        self._state.client = client
        return client

    def _run(self, work: Callable[[Any], T]) -> T:
        """Return the result of `work`, which may be repeated; try again if the server went away."""
        waits = () if self._state.client is None else WAITS_S
        for wait_s in (*waits, None):
            try:
                return work(self._client())
            except BigDSSMError:
                raise
            except ResponseHandlingException as error:
                if wait_s is None:
                    text = " ".join(str(error).split()) or type(error.source).__name__
                    raise UnavailableError(f"{self.address}: {text}; try again when this is fixed") from None
                time.sleep(wait_s)
            except UnexpectedResponse as error:
                if error.status_code == 404:
                    raise DataError(f"{self.address}: the collection was dropped; publish it again") from None
                if error.status_code in (429, 500, 502, 503, 504):
                    if wait_s is None:
                        raise UnavailableError(
                            f"{self.address}: answers {error.status_code}; try again when this is fixed"
                        ) from None
                    time.sleep(wait_s)
                    continue
                fix = f"; set {KEY_VARIABLE}" if error.status_code in (401, 403) else ""
                text = " ".join(error.content.decode(errors="replace").split())[:200]
                raise DataError(f"{self.address}: answers {error.status_code} {text}{fix}") from None
            except (ValueError, RuntimeError) as error:  # of the local mode
                if "not found" in str(error):
                    raise DataError(f"{self.address}: the collection was dropped; publish it again") from None
                raise DataError(f"{self.address}: {' '.join(str(error).split())}") from None
        raise AssertionError("unreachable")


def _vectors(name: str) -> str:
    return f"bigdssm_vectors_{name}"


def _tombstones(name: str) -> str:
    return f"bigdssm_tombstones_{name}"


def _alias(alias: str) -> str:
    return f"bigdssm_alias_{alias}"


def _id(text: str) -> str:
    """Return the id of a key."""
    return str(UUID(xxhash.xxh3_128_hexdigest(text.encode())))


def _path(column: str) -> str:
    """Return the path of a column in a payload."""
    return column if re.fullmatch(r"[A-Za-z_]\w*", column, re.ASCII) else f'"{column}"'


def _match(key: str, values: Sequence[Any]) -> Any:
    return models.FieldCondition(key=key, match=models.MatchAny(any=list(values)))


def _range(key: str, **bounds: Any) -> Any:
    return models.FieldCondition(key=key, range=models.Range(**bounds))


def _filter(where: Expression | None, collection: Collection) -> Any:
    """Translate a resolved expression to a filter. Raises ConfigError: not a column."""
    if where is None:
        return None
    if isinstance(where, And | Or):
        parts = [_filter(part, collection) for part in where.parts]
        return models.Filter(must=parts) if isinstance(where, And) else models.Filter(should=parts)
    type = collection.column_type(where.feature)
    path, operator = _path(where.feature), where.operator
    if operator in ("<", "<=", ">", ">="):
        name = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}[operator]
        return models.Filter(must=[_range(path, **{name: where.values[0]})])
    if type == "number":
        has_value = [_range(path, gte=value, lte=value) for value in where.values]
    else:
        has_value = [_match(path, where.values)] if where.values else []
    if operator in ("=", "in"):
        return models.Filter(should=has_value or [models.HasIdCondition(has_id=[])])
    is_missing = models.FieldCondition(key=path, is_empty=True)
    return models.Filter(must_not=[is_missing, *has_value])
