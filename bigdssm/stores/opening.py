"""Open a store by URL."""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any
from urllib.parse import unquote, urlsplit

from bigdssm.errors import ConfigError
from bigdssm.stores.base import STORES, Store

LIVE = "live"  # the alias that is served by default
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
