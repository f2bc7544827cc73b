"""PostgreSQL 17 with pgvector 0.8: a table per collection, with an HNSW index for inner products.

bigdssm_collections       name, description (a `Collection` as JSON)
bigdssm_aliases           alias, name, previous
bigdssm_tombstones        collection, id (hash of the key, not the key itself), version
bigdssm_vectors_NAME      doc_key, doc_title, doc_vector, doc_model, doc_version (number of the publication),
                          doc_content, and a column per filter

doc_vector has one dimension more than the vectors x: sqrt(radius² - |x|²). All rows thus have the same length, and the
nearest rows to [query, 0] are those of the largest inner product, which HNSW finds far better than by inner products
(at 50,000 vectors with lengths of 0.4 to 11, recall@100 is 0.997 and not 0.42). Source: Bachrach et al. 2014. A row
beyond the radius has 0 there; the index searches for [FAR * radius * query / |query|, 0], since the order by distance
approaches the order by inner products with the length of the query.

The functions bigdssm_exact and bigdssm_nearest make these two operands of a query's vector, for SQL of the user's own
(docs/stores.md).

They are in the first schema of the connection's search path. The connection is libpq's: the password comes from
PGPASSWORD, .pgpass or a service file.
"""

import json
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, TypeVar
from uuid import UUID

import numpy as np

from bigdssm.errors import ConfigError, DataError, UnavailableError
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
from bigdssm.utils.arguments import short_repr
from bigdssm.utils.components import bounded
from bigdssm.utils.hashing import hash64

try:
    import psycopg
    from psycopg import sql
    from psycopg.adapt import Dumper
    from psycopg.pq import Format
    from psycopg.types import TypeInfo
except ImportError as error:
    raise ConfigError(f"a store at postgresql:// needs psycopg ({error}): pip install 'bigdssm[postgres]'") from None

INDEXED_WIDTH, HALF_WIDTH = 2000, 4000  # of HNSW: of float32, and of float16, whose results are rescored
RESCORED = 4  # float16 candidates per requested document
FAR, MOST_LENGTH = 100, 60_000.0  # length of an index query, in radii; float16 ends at 65,504
EXACT_ROWS = 20_000  # a filter with at most as many matches is evaluated exactly
LOCK_WAIT_S = 5.0  # until the server notices that a publisher was killed
INDEXED_BYTES = 2600  # of a key, or of a value of a filter: an entry of a B-tree or GIN index has at most about 2,700
NUL = "\0"  # no text of PostgreSQL has it
NAME_BYTES = 40  # of a collection; an identifier has 63
OWN_COLUMNS: Mapping[str, str] = {
    "doc_key": "text", "doc_title": "text", "doc_vector": "vector", "doc_model": "uuid", "doc_version": "int8",
    "doc_content": "int8",
}  # fmt: skip
TYPES: Mapping[ColumnType, str] = {"category": "text", "categories": "text[]", "number": "float8"}
SCHEMA = """
CREATE TABLE IF NOT EXISTS bigdssm_collections (name text PRIMARY KEY, description json NOT NULL);
CREATE TABLE IF NOT EXISTS bigdssm_aliases (
    alias text PRIMARY KEY, name text NOT NULL REFERENCES bigdssm_collections,
    previous text REFERENCES bigdssm_collections ON DELETE SET NULL
);
CREATE TABLE IF NOT EXISTS bigdssm_tombstones (
    collection text REFERENCES bigdssm_collections ON DELETE CASCADE, id bigint, version bigint NOT NULL,
    PRIMARY KEY (collection, id)
)"""
FUNCTIONS = {
    # [query, 0], whose inner product with doc_vector is the score
    "bigdssm_exact(float8[])": """
CREATE FUNCTION bigdssm_exact(query float8[]) RETURNS vector
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT (query || 0::float8)::vector
$$""",
    # [query, 0] of such a length that the nearest doc_vector is that of the largest inner product
    "bigdssm_nearest(float8[], text)": f"""
CREATE FUNCTION bigdssm_nearest(query float8[], collection text) RETURNS vector
LANGUAGE sql STABLE STRICT PARALLEL SAFE AS $$
    SELECT (array_agg(value * far / greatest(norm, 1e-37) ORDER BY position) || 0::float8)::vector
    FROM unnest(query) WITH ORDINALITY AS dimensions (value, position),
        (SELECT sqrt(sum(value * value)) FROM unnest(query) AS value) AS lengths (norm),
        (
            SELECT least({FAR} * (description->>'radius')::float8, {MOST_LENGTH})
            FROM bigdssm_collections WHERE name = collection
        ) AS radii (far)
$$""",
}
T = TypeVar("T")


class _VectorDumper(Dumper):
    """Converts a row of big-endian float32 to pgvector's binary format."""

    format = Format.BINARY

    def dump(self, obj: np.ndarray) -> bytes:
        return struct.pack(">HH", len(obj), 0) + obj.tobytes()


@dataclass
class _Pool:
    """Idle connections, which any thread may take, and whether the server was reached last time."""

    idle: list[Any] = field(default_factory=list)
    is_reached: bool = False


@register_store
@dataclass(frozen=True)
class PostgresStore(Store):
    """Tables of PostgreSQL, searched by pgvector."""

    scheme: ClassVar[str] = "postgresql"
    uses_radius: ClassVar[bool] = True

    m: int = bounded(24, 2, 100)  # links per document in the HNSW graph
    ef_construction: int = bounded(128, 4, 1000)  # candidates per document when the graph is built
    ef_search: int = bounded(200, 1, 1000)  # candidates per query, at least the number of requested documents
    build_memory_mb: int = bounded(512, 1, 10**6)  # maintenance_work_mem: a graph that exceeds it is built slowly
    _pool: _Pool = field(default_factory=_Pool, metadata=FITTED, repr=False, compare=False)

    # ----- collections

    def collections(self) -> dict[str, Collection]:
        """Return all collections by name; none before the first `create`."""
        if self._is_new():
            return {}
        rows = self._select("SELECT description FROM bigdssm_collections ORDER BY name")
        return {content["name"]: Collection(**content) for (content,) in rows}

    def create(self, collection: Collection) -> None:
        """Create the table of a collection, or replace its description."""
        if not collection.name.isprintable() or not 0 < len(collection.name.encode()) <= NAME_BYTES:
            raise ConfigError(f"collection {collection.name!r}: needs a name of 1 to {NAME_BYTES} printable bytes")
        if reserved := [name for name in collection.columns if name in OWN_COLUMNS or len(name.encode()) > 63]:
            raise ConfigError(
                f"column {reserved[0]!r}: needs another name of at most 63 bytes, not {list(OWN_COLUMNS)}"
            )
        types = {**OWN_COLUMNS, "doc_vector": f"vector({collection.width + 1})"}
        columns = [sql.SQL(f"{name} {type} NOT NULL") for name, type in types.items()]
        columns += [
            sql.SQL(f"{{}} {TYPES[type]}").format(sql.Identifier(name)) for name, type in collection.columns.items()
        ]

        def work(connection: Any) -> None:
            with connection.transaction():
                _lock_names(connection)  # IF NOT EXISTS does not exclude two processes
                connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
                (version,) = connection.execute(
                    "SELECT extversion FROM pg_extension WHERE extname = 'vector'"
                ).fetchone()
                if tuple(map(int, version.split(".")[:2])) < (0, 8):
                    raise DataError(
                        f"{self.address} has pgvector {version}, needs 0.8 for filters; update the extension"
                    )
                connection.execute(SCHEMA)
                for signature, statement in FUNCTIONS.items():
                    # replaced only by its owner, so it is created once
                    if connection.execute("SELECT to_regprocedure(%s)", [signature]).fetchone() == (None,):
                        connection.execute(statement)
                is_alias = "SELECT FROM bigdssm_aliases WHERE alias = %s"
                if connection.execute(is_alias, [collection.name]).fetchone() is not None:
                    self.check_new_collection(collection.name)
                self._describe(connection, collection)
                connection.execute(
                    sql.SQL("CREATE TABLE IF NOT EXISTS {} ({}, PRIMARY KEY (doc_key))").format(
                        _table(collection), sql.SQL(", ").join(columns)
                    )
                )

        self._run(work)

    def _describe(self, connection: Any, collection: Collection) -> None:
        connection.execute(
            "INSERT INTO bigdssm_collections AS old VALUES (%s, %s) "
            "ON CONFLICT (name) DO UPDATE SET description = EXCLUDED.description "
            # the lock of a publisher is lost if the server restarts
            "WHERE coalesce((old.description->>'publication')::int8, 0) "
            "<= coalesce((EXCLUDED.description->>'publication')::int8, 0)",
            [collection.name, json.dumps(asdict(collection))],
        )

    @contextmanager
    def publishing(self, name: str) -> Iterator[None]:
        """Hold an advisory lock of the server, released when the process ends."""
        with self._errors(), self._connect() as connection:
            key, until = hash64(f"bigdssm {name}"), time.monotonic() + LOCK_WAIT_S
            while not connection.execute("SELECT pg_try_advisory_lock(%s)", [key]).fetchone()[0]:
                if time.monotonic() > until:
                    raise DataError(f"{self.address}: another process publishes to {name}; wait for it, then try again")
                time.sleep(0.2)
            yield

    def finish(self, collection: Collection) -> None:
        """Build the HNSW index and those of the columns, analyze, and note the time.

        Dead rows are left to autovacuum: to remove a thousand of them from a graph of 100,000 takes minutes.
        """
        table, width = _table(collection), collection.width + 1
        options = {name: str(collection.options[name]) for name in ("m", "ef_construction")}
        index = sql.Identifier(f"bigdssm_vectors_{collection.name}_hnsw")

        def work(connection: Any) -> None:
            with connection.transaction():
                memory = f"{collection.options['build_memory_mb']}MB"
                connection.execute("SELECT set_config('maintenance_work_mem', %s, true)", [memory])
                existing = connection.execute(
                    "SELECT reloptions FROM pg_class WHERE oid = to_regclass(%s)", [index.as_string(connection)]
                ).fetchone()
                if existing is not None and dict(option.split("=") for option in existing[0]) != options:
                    connection.execute(sql.SQL("DROP INDEX {}").format(index))
                    existing = None
                if existing is None and width <= HALF_WIDTH:
                    operators = "vector_l2_ops" if width <= INDEXED_WIDTH else "halfvec_l2_ops"
                    vector = sql.SQL(f"{_indexed(collection)} {operators}")
                    connection.execute(
                        sql.SQL("CREATE INDEX {} ON {} USING hnsw ({}) WITH (m = {}, ef_construction = {})").format(
                            index, table, vector, *map(int, options.values())
                        )
                    )
                for name, type in collection.columns.items():
                    column_index = sql.Identifier(f"bigdssm_vectors_{collection.name}_{hash64(name) % 2**32:08x}")
                    method = sql.SQL("gin" if type == "categories" else "btree")
                    connection.execute(
                        sql.SQL("CREATE INDEX IF NOT EXISTS {} ON {} USING {} ({})").format(
                            column_index, table, method, sql.Identifier(name)
                        )
                    )
                self._describe(connection, replace(collection, published=time.time()))
            connection.execute(sql.SQL("ANALYZE {}").format(table))

        self._run(work)

    def compact(self, collection: Collection) -> Sequence[str]:
        """Rewrite table, TOAST table and indexes, and the statistics of the planner, which have keys and titles.

        Raises UnavailableError: an older transaction still needs the deleted rows.
        """

        def rewrite(connection: Any, table: Any) -> bool:
            """Return whether the user may. Deleted rows are copied while a transaction may read them."""
            details: list[str] = []

            def note(notice: Any) -> None:
                if notice.message_detail:
                    details.append(notice.message_detail)

            connection.add_notice_handler(note)
            try:
                until = time.monotonic() + LOCK_WAIT_S
                while True:
                    details.clear()
                    connection.execute(sql.SQL("VACUUM (FULL, VERBOSE) {}").format(table))
                    if not any(int(detail.split()[0]) for detail in details):  # "0 dead row versions cannot be removed"
                        return bool(details)
                    if time.monotonic() > until:
                        raise UnavailableError(
                            f"{self.address}: an older transaction keeps deleted rows of {table.as_string(connection)}"
                            "; end it (pg_stat_activity, pg_prepared_xacts, pg_replication_slots), then try again"
                        )
                    time.sleep(0.2)
            finally:
                connection.remove_notice_handler(note)

        def work(connection: Any) -> list[str]:
            memory = f"{collection.options['build_memory_mb']}MB"
            connection.execute("SELECT set_config('maintenance_work_mem', %s, false)", [memory])
            table = _table(collection)
            if not rewrite(connection, table):
                raise DataError(f"{self.address}: only the owner of {table.as_string(connection)} may compact it")
            connection.execute(sql.SQL("ANALYZE {}").format(table))
            left = [
                "write-ahead log, replicas, archives, backups, snapshots and statement logs of the server",
                "bigdssm_tombstones, which has a 64-bit hash of each removed key",
            ]
            if not rewrite(connection, sql.Identifier("pg_catalog", "pg_statistic")):
                left.append(
                    "pg_statistic, samples of keys and titles, until the database's owner runs VACUUM FULL pg_statistic"
                )
            with suppress(psycopg.errors.InsufficientPrivilege):
                connection.execute("CHECKPOINT")  # older segments of the log are no longer needed
            connection.execute("RESET maintenance_work_mem")
            return [f"{self.address}: {what}" for what in left]

        return self._run(work)

    def drop(self, name: str) -> None:
        """Drop the table of a collection."""

        def work(connection: Any) -> None:
            with connection.transaction():
                connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(_table(name)))
                connection.execute("DELETE FROM bigdssm_collections WHERE name = %s", [name])

        self.check_unnamed(name)
        if not self._is_new():
            self._run(work)

    # ----- aliases

    def aliases(self) -> dict[str, Alias]:
        """Return all aliases; none before the first `create`."""
        if self._is_new():
            return {}
        rows = self._select("SELECT alias, name, previous FROM bigdssm_aliases ORDER BY alias")
        return {alias: Alias(name, previous) for alias, name, previous in rows}

    def switch(self, alias: str, name: str) -> None:
        """Update the row of an alias."""

        def work(connection: Any) -> None:
            with connection.transaction():
                _lock_names(connection)
                self.check_switch(alias, name)
                connection.execute(
                    "INSERT INTO bigdssm_aliases AS old VALUES (%s, %s, NULL) "
                    "ON CONFLICT (alias) DO UPDATE SET name = EXCLUDED.name, previous = "
                    "CASE WHEN old.name = EXCLUDED.name THEN old.previous ELSE old.name END",
                    [alias, name],
                )

        self.check_complete(name)  # also before there are tables
        self._run(work)

    # ----- documents

    def contents(self, collection: Collection) -> dict[str, int]:
        """Return the hashes of all rows."""
        return dict(self._select(sql.SQL("SELECT doc_key, doc_content FROM {}").format(_escaped_table(collection))))

    def write(self, collection: Collection, documents: Documents, version: int) -> None:
        """Copy the batch to a temporary table and merge it. Raises DataError: a document that cannot be stored."""
        self._check_texts(collection, documents)
        names = [*OWN_COLUMNS, *collection.columns]
        columns = sql.SQL(", ").join(map(sql.Identifier, names))
        types = ["int8", *OWN_COLUMNS.values(), *(TYPES[type] for type in collection.columns.values())]
        vectors = documents.vectors.astype(np.float64)
        rest = np.sqrt(np.maximum(collection.radius**2 - (vectors**2).sum(1, keepdims=True), 0))
        vectors, model = np.concatenate([vectors, rest], 1).astype(">f4"), UUID(collection.model)
        others = [documents.columns[name] for name in collection.columns]

        def work(connection: Any) -> None:
            with connection.transaction():
                _lock_rows(connection, collection)
                batch = "CREATE TEMP TABLE bigdssm_batch ON COMMIT DROP AS SELECT 0::int8 AS id, {} FROM {} LIMIT 0"
                connection.execute(sql.SQL(batch).format(columns, _table(collection)))
                with connection.cursor().copy("COPY bigdssm_batch FROM STDIN (FORMAT BINARY)") as copy:
                    copy.set_types(types)
                    for row in zip(
                        documents.keys, documents.titles, vectors, documents.contents.tolist(), *others, strict=True
                    ):
                        key, title, vector, content, *values = row
                        copy.write_row([hash64(key), key, title, vector, model, version, content, *values])
                connection.execute(
                    "DELETE FROM bigdssm_batch USING bigdssm_tombstones AS t "
                    "WHERE t.collection = %s AND t.id = bigdssm_batch.id AND t.version >= %s",
                    [collection.name, version],
                )
                assigned = sql.SQL(", ").join(
                    sql.SQL("{0} = EXCLUDED.{0}").format(sql.Identifier(name)) for name in names
                )
                connection.execute(
                    sql.SQL(
                        "INSERT INTO {} AS old ({}) SELECT {} FROM bigdssm_batch "
                        "ON CONFLICT (doc_key) DO UPDATE SET {} WHERE old.doc_version <= EXCLUDED.doc_version"
                    ).format(_table(collection), columns, columns, assigned)
                )

        self._run(work)

    def _check_texts(self, collection: Collection, documents: Documents) -> None:
        """Raise DataError, with the document, if PostgreSQL cannot store or index one of its texts."""
        texts = {"key": documents.keys, "title": documents.titles}
        texts |= {name: documents.columns[name] for name, type in collection.columns.items() if type != "number"}
        for name, values in texts.items():
            for key, value in zip(documents.keys, values, strict=True):
                for text in value if isinstance(value, list) else [value or ""]:
                    if NUL in text:
                        raise DataError(
                            f"document {short_repr(key)}: its {name} has a NUL character, which PostgreSQL cannot "
                            "store; remove it from the tables"
                        )
                    size = len(text.encode()) if 4 * len(text) > INDEXED_BYTES and name != "title" else 0
                    if size > INDEXED_BYTES:
                        raise DataError(
                            f"document {short_repr(key)}: its {name} has {size} bytes, needs at most {INDEXED_BYTES} "
                            "for an index of PostgreSQL; shorten it, or use another store"
                        )

    def delete(self, collection: Collection, keys: Sequence[str], version: int) -> None:
        """Delete rows and write tombstones."""

        def work(connection: Any) -> None:
            with connection.transaction():
                _lock_rows(connection, collection)
                connection.execute(
                    sql.SQL("DELETE FROM {} WHERE doc_key = ANY(%s) AND doc_version <= %s").format(
                        _escaped_table(collection)
                    ),
                    [_storable(keys), version],
                )
                connection.execute(
                    "INSERT INTO bigdssm_tombstones AS old SELECT %s, id, %s FROM unnest(%s::int8[]) AS ids(id) "
                    "ON CONFLICT (collection, id) DO UPDATE SET version = greatest(old.version, EXCLUDED.version)",
                    [collection.name, version, sorted({hash64(key) for key in keys})],
                )

        self._run(work)

    def vectors(self, collection: Collection, keys: Sequence[str]) -> dict[str, StoredVector]:
        """Return the vectors of the existing documents among `keys`."""
        statement = sql.SQL("SELECT doc_key, doc_title, doc_vector::text, doc_model FROM {} WHERE doc_key = ANY(%s)")
        rows = self._select(statement.format(_escaped_table(collection)), [_storable(keys)])
        collection.check_rows(model.hex for *_, model in rows)
        return {
            key: StoredVector(title, np.array(json.loads(vector)[: collection.width], np.float32))
            for key, title, vector, _ in rows
        }

    def count(self, collection: Collection, where: Expression | None = None) -> int:
        """Count rows."""
        condition, values = _condition(where, collection)
        statement = sql.SQL("SELECT count(*) FROM {} WHERE {}").format(_escaped_table(collection), condition)
        return int(self._select(statement, values)[0][0])

    def search(
        self, collection: Collection, queries: np.ndarray, top: int, where: Expression | None = None,
        exclude: Sequence[Sequence[str]] | None = None,
    ) -> list[list[ScoredDocument]]:  # fmt: skip
        """Search the HNSW index in iterative scans, or every match if there are few.

        A result with fewer than `top` documents is completed by an exact search.
        """
        condition, values = _condition(where, collection)
        table, vectors = _escaped_table(collection), np.asarray(queries)
        collection.check_queries(vectors)
        vectors = np.pad(vectors, ((0, 0), (0, 1)))  # the inner product is without the last dimension
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=np.finfo(np.float32).tiny)
        distant = (vectors / lengths * min(FAR * collection.radius, MOST_LENGTH)).astype(">f4")
        vectors = vectors.astype(">f4")
        exact = sql.SQL(
            "SELECT doc_key, doc_title, doc_vector <#> %s AS distance, doc_model FROM {} "
            "WHERE {} AND doc_key <> ALL(%s) ORDER BY distance LIMIT %s"
        ).format(table, condition)
        approximate = sql.SQL(
            "SELECT doc_key, doc_title, doc_vector <#> %s AS distance, doc_model FROM (SELECT * FROM {} WHERE {} AND "
            "doc_key <> ALL(%s) ORDER BY {} <-> %s LIMIT %s) AS candidates ORDER BY distance LIMIT %s"
        ).format(table, condition, sql.SQL(_indexed(collection)))
        num_candidates = top * (RESCORED if collection.width >= INDEXED_WIDTH else 1)
        few = sql.SQL("SELECT count(*) FROM (SELECT FROM {} WHERE {} LIMIT {}) AS matches").format(
            table, condition, EXACT_ROWS + 1
        )

        def work(connection: Any) -> list[list[tuple[Any, ...]]]:
            with connection.transaction():
                is_exact = collection.width >= HALF_WIDTH or (
                    where is not None and connection.execute(few, values).fetchone()[0] <= EXACT_ROWS
                )
                settings = {
                    "hnsw.ef_search": min(1000, max(collection.options["ef_search"], top)),
                    "hnsw.iterative_scan": "relaxed_order",  # the outer query sorts
                    "hnsw.max_scan_tuples": 2**31 - 1,
                    "hnsw.scan_mem_multiplier": 32,
                }
                calls = ", ".join(["set_config(%s, %s, true)"] * len(settings))
                connection.execute(f"SELECT {calls}", [str(part) for pair in settings.items() for part in pair])
                of_queries = []
                for number, vector in enumerate(vectors):
                    operands = [*values, [] if exclude is None else _storable(exclude[number])]
                    rows = []
                    if not is_exact:
                        rows = connection.execute(
                            approximate, [vector, *operands, distant[number], num_candidates, top]
                        ).fetchall()
                    if len(rows) < top:
                        rows = connection.execute(exact, [vector, *operands, top]).fetchall()
                    of_queries.append(rows)
            return of_queries

        results = self._run(work)
        collection.check_rows(model.hex for rows in results for *_, model in rows)
        return [[ScoredDocument(-distance, key, title) for key, title, distance, _ in rows] for rows in results]

    # ----- connection

    @property
    def address(self) -> str:
        """The server and database, without user."""
        known = psycopg.conninfo.conninfo_to_dict(self.url)
        host = known.get("host") or known.get("service") or os.environ.get("PGHOST", "local")
        return f"postgresql://{host}/{known.get('dbname', '')}"

    def _connect(self) -> Any:
        """Return a new connection. Raises ConfigError: an invalid URL; psycopg.OperationalError."""
        try:
            known = psycopg.conninfo.conninfo_to_dict(self.url)
        except psycopg.ProgrammingError:  # its message may quote a password
            raise ConfigError(
                "the URL of the store is invalid; needs postgresql://USER@HOST:PORT/DATABASE?KEY=VALUE, no password"
            ) from None
        if "password" in known:
            raise ConfigError("got a password in the URL of the store; use PGPASSWORD, .pgpass or a service file")
        address = known.get("hostaddr") or os.environ.get("PGHOSTADDR")  # libpq connects there, whatever the host
        hosts = str(address or known.get("host") or os.environ.get("PGHOST") or "").split(",")
        has_service = "service" in known or "PGSERVICE" in os.environ
        is_local = not has_service and all(not host or host[0] in "/@" or host in LOCAL_HOSTS for host in hosts)
        if not is_local and "sslmode" not in known and "PGSSLMODE" not in os.environ:
            known["sslmode"] = "verify-full"
            if "sslrootcert" not in known and "PGSSLROOTCERT" not in os.environ:
                known["sslrootcert"] = "system"
        connection = psycopg.connect(**{"connect_timeout": 10, **known}, autocommit=True, application_name="bigdssm")
        connection.prepare_threshold = None  # a prepared statement keeps its plan when settings change
        # The server notices during a long statement that its client was killed
        with suppress(psycopg.errors.InvalidParameterValue):  # not every system can
            connection.execute("SET client_connection_check_interval = '1s'")
        return connection

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        """Return a connection that no other thread uses within the context."""
        try:
            connection = self._pool.idle.pop()
        except IndexError:
            connection = self._connect()
        self._pool.is_reached = True
        try:
            no_vectors = connection.adapters.types.get("vector") is None
            if no_vectors and (info := TypeInfo.fetch(connection, "vector")) is not None:
                info.register(connection)
                dumper = type("VectorDumper", (_VectorDumper,), {"oid": info.oid})
                connection.adapters.register_dumper(np.ndarray, dumper)
            yield connection
        finally:
            if connection.closed:
                self._pool.idle.clear()  # the others are lost, too
            elif connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
                self._pool.idle.append(connection)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Convert errors of the server."""
        try:
            yield
        except psycopg.errors.UndefinedTable:
            raise DataError(f"{self.address}: the collection was dropped; publish it again") from None
        except psycopg.Error as error:
            text = " ".join((error.diag.message_primary or str(error)).split())
            if isinstance(error, psycopg.OperationalError):
                raise UnavailableError(f"{self.address}: {text}; try again when this is fixed") from None
            raise DataError(f"{self.address}: {text}") from None

    def _run(self, work: Callable[[Any], T]) -> T:
        """Return the result of `work`, which may be repeated, on a connection; reconnect if the server went away.

        After waiting in vain, the next call waits no more.
        """
        with self._errors():
            was_reached, connection = self._pool.is_reached, None
            for wait_s in (*WAITS_S, None):
                try:
                    with self._connection() as connection:
                        return work(connection)
                except psycopg.OperationalError:
                    if connection is not None and not connection.closed:
                        raise
                    if not was_reached or wait_s is None:
                        self._pool.is_reached = False
                        raise
                    time.sleep(wait_s)
        raise AssertionError("unreachable")

    def _select(self, statement: Any, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self._run(lambda connection: connection.execute(statement, values).fetchall())

    def _is_new(self) -> bool:
        """Return whether nothing was ever created."""
        return self._select("SELECT to_regclass('bigdssm_aliases') IS NULL")[0][0]


class _Escaped(sql.Identifier):
    """An identifier in a statement with parameters, where % begins a placeholder."""

    def as_bytes(self, context: Any = None) -> bytes:
        return super().as_bytes(context).replace(b"%", b"%%")


def _escaped_table(collection: Collection) -> Any:
    return _Escaped(f"bigdssm_vectors_{collection.name}")


def _table(collection: Collection | str) -> Any:
    name = collection if isinstance(collection, str) else collection.name
    return sql.Identifier(f"bigdssm_vectors_{name}")


def _indexed(collection: Collection) -> str:
    """Return the SQL expression that is indexed: doc_vector, in half precision if it is too wide."""
    width = collection.width + 1
    return "doc_vector" if width <= INDEXED_WIDTH else f"(doc_vector::halfvec({width}))"


def _storable(values: Iterable[Any]) -> list[Any]:
    """Return the values that a row may have; the server refuses others also in comparisons."""
    return [value for value in values if not isinstance(value, str) or NUL not in value]


def _lock_names(connection: Any) -> None:
    """Wait for other transactions that create a collection or switch an alias."""
    connection.execute("SELECT pg_advisory_xact_lock(%s)", [hash64("bigdssm")])


def _lock_rows(connection: Any, collection: Collection) -> None:
    """Wait for other writes: a write compares versions with the tombstones of finished deletes only."""
    statement = "SELECT FROM bigdssm_collections WHERE name = %s FOR UPDATE"
    if connection.execute(statement, [collection.name]).fetchone() is None:
        raise DataError(f"collection {collection.name} was dropped; publish it again")


def _condition(where: Expression | None, collection: Collection) -> tuple[Any, list[Any]]:
    """Translate a resolved expression to SQL and its values. Raises ConfigError: not a column."""
    if where is None:
        return sql.SQL("true"), []
    if isinstance(where, And | Or):
        parts = [_condition(part, collection) for part in where.parts]
        joined = sql.SQL(" AND " if isinstance(where, And) else " OR ").join(part for part, _ in parts)
        return sql.SQL("({})").format(joined), [value for _, values in parts for value in values]
    type, column = collection.column_type(where.feature), _Escaped(where.feature)
    if where.operator in ("<", "<=", ">", ">="):
        return sql.SQL(f"{{}} {where.operator} %s").format(column), list(where.values)
    is_in = where.operator in ("=", "in")
    # A missing value is NULL, which `<> ALL ('{}')` matches.
    if type == "categories":
        form = "{0} && %s::text[]" if is_in else "({0} IS NOT NULL AND NOT {0} && %s::text[])"
    else:
        cast = f"%s::{TYPES[type]}[]"
        form = f"{{0}} = ANY({cast})" if is_in else f"({{0}} IS NOT NULL AND {{0}} <> ALL({cast}))"
    return sql.SQL(form).format(column), [_storable(where.values)]
