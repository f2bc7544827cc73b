"""Files at a URL, through fsspec: whole, by ranges, their size; a failure that may pass is waited out.

Needs the extra `remote`; s3:// needs s3fs, gs:// gcsfs.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import xxhash

from bigdssm.errors import ConfigError, DataError, UnavailableError
from bigdssm.utils.log import get_logger

# About 24 s of waiting in all: longer than a server's restart, shorter than anybody's patience.
ATTEMPTS, FIRST_WAIT_S, LONGEST_WAIT_S = 8, 0.25, 8.0
MISMATCHES = 3  # times that a wrong content is fetched before it is taken for what the server has
TIMEOUT_S, SLOWEST_BYTES_PER_S = 30.0, 1 << 16  # of a request: the sum of the first and size over the second
CHUNK_BYTES = 1 << 22  # of a file that is read from its beginning to its end
VERSION_KEYS = ("ETag", "etag", "LastModified", "Last-Modified", "mtime")  # as file systems name what tells versions

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+::)*[A-Za-z][A-Za-z0-9+.-]+://")
_count = itertools.count()
T = TypeVar("T")
log = get_logger(__name__)


def is_url(folder: str | Path) -> bool:
    """Return whether this is a URL (scheme://…) and no local path."""
    return isinstance(folder, str) and _URL.match(folder) is not None


def shown(url: str) -> str:
    """Return the URL without what may be secret in it: password and query."""
    return re.sub(r"//[^/@]*@", "//", url.partition("?")[0])


def join(url: str, place: str) -> str:
    """Return the URL of what stands at `place` under the folder `url`; a query stays behind the path."""
    path, mark, query = url.partition("?")
    is_http = urlsplit(url).scheme.lower() in ("http", "https")
    return f"{path.rstrip('/')}/{quote(place, safe='/=') if is_http else place}{mark}{query}"


def fetch(url: str, offset: int | None, size: int | None, is_right: Callable[[bytes], bool]) -> bytes:
    """Return a range of a file, or all of it: right, or what the server gave again and again.

    Raises FileNotFoundError or DataError.
    """
    content = b""
    end = None if offset is None or size is None else offset + size
    for _ in range(MISMATCHES):
        content = _retried(url, lambda: _request_all(url, offset, end))
        if size is not None and len(content) > size:
            raise DataError(f"{shown(url)}: the server ignores byte ranges; use one that does not, or copy the dataset")
        if is_right(content):
            break
    return content


def _retried(url: str, attempt: Callable[[], T]) -> T:
    """Return what `attempt` does, after as many failures as are forgiven. Raises FileNotFoundError or DataError."""
    for number in range(ATTEMPTS):
        try:
            return attempt()
        except (ConfigError, DataError):
            raise
        except Exception as error:
            told, status = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", _status(error)
            error.__traceback__ = None  # fsspec's frames hold it, and through their callers all that is opened here
        if status == 404:
            raise FileNotFoundError(errno.ENOENT, "no such file", shown(url))
        if 400 <= status < 500 and status not in (408, 425, 429):
            raise DataError(f"{shown(url)}: the server refuses it ({shown(told)}); check address and credentials")
        if number + 1 < ATTEMPTS:
            spread = xxhash.xxh3_64_intdigest(f"{os.getpid()} {next(_count)} {url}".encode()) / 2**64
            wait = min(FIRST_WAIT_S * 2**number, LONGEST_WAIT_S) * (0.5 + spread / 2)  # not all ranks at once
            log.info("%s: %s; trying again in %.1f s", shown(url), shown(told), wait)
            time.sleep(wait)
    raise UnavailableError(
        f"{shown(url)} cannot be reached: {ATTEMPTS} attempts failed, the last with {shown(told)}; go on later"
    )


def _status(error: BaseException) -> int:
    """Return the HTTP status that an error amounts to, 0 for one that may pass."""
    if isinstance(error, FileNotFoundError):
        cause = error.__cause__  # fsspec says so, too, of a size that a failing server did not tell
        return 404 if cause is None or not type(cause).__module__.startswith("aiohttp") else _status(cause)
    if isinstance(error, PermissionError):
        return 403
    response = getattr(error.__cause__, "response", None)  # botocore's, behind what s3fs makes of it
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    status = getattr(error, "status", 0)
    return status if isinstance(status, int) else 0


def _request_all(url: str, start: int | None, end: int | None) -> bytes:
    """Return a range, cut only where the file itself ends. Raises OSError: a proxy gave less than there is."""
    content = _request(url, start, end)
    if start is not None and end is not None and (reached := start + len(content)) < end and reached < _size(url):
        raise OSError(f"{len(content)} bytes came of {end - start} at {start}")
    return content


def _request(url: str, start: int | None, end: int | None) -> bytes:
    from fsspec.asyn import sync

    files, path = _filesystem(url, os.getpid())
    if not files.async_impl:
        return bytes(files.cat_file(path, start=start, end=end))
    limit = TIMEOUT_S + ((end or CHUNK_BYTES) - (start or 0)) / SLOWEST_BYTES_PER_S
    try:
        return bytes(sync(files.loop, files._cat_file, path, start=start, end=end, timeout=limit))
    except Exception as error:
        if start is not None and _status(error) == 416:  # the file ends before the range begins
            return b""
        raise


def size_of(url: str) -> int:
    """Return a file's size in bytes. Raises FileNotFoundError or DataError."""
    return _retried(url, lambda: _size(url))


def version_of(url: str) -> str:
    """Return what is another one when the file's content is: its size, and its etag or time where they are told.

    Raises FileNotFoundError or DataError.
    """
    info = _retried(url, lambda: _info(url))
    return " ".join(str(info[key]) for key in ("size", *VERSION_KEYS) if info.get(key) is not None)


def is_folder(url: str) -> bool:
    """Return whether a folder stands there, False for a file. Raises FileNotFoundError or DataError."""
    return bool(_retried(url, lambda: _info(url))["type"] == "directory")


def names_in(url: str) -> list[str]:
    """Return the names of what a folder holds, sorted. Raises FileNotFoundError or DataError."""
    return _retried(url, lambda: _names(url))


def exists(url: str) -> bool:
    """Return whether a file stands there. Raises DataError: the server does not say."""
    try:
        _retried(url, lambda: _info(url))
    except FileNotFoundError:
        return False
    return True


def put_folder(folder: Path, url: str, last: str) -> None:
    """Copy a folder's files to a URL, `last` behind all others: where it is, the folder is whole. Others there go.

    Raises ConfigError: such URLs cannot be written; UnavailableError.
    """
    files, path = _filesystem(url, os.getpid())
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    names = [*(name for name in names if name != last), last]
    try:
        if exists(join(url, last)):
            files.rm_file(f"{path}/{last}")
        for name in names:
            _retried(join(url, name), partial(files.put_file, str(folder / name), f"{path}/{name}"))
        kept = {f"{path}/{name}" for name in names}
        if strangers := [name for name in files.find(path) if name not in kept]:
            files.rm(strangers)
    except NotImplementedError:
        raise ConfigError(f"{shown(url)} cannot be written; copy the dataset there yourself") from None


def _size(url: str) -> int:
    size = _info(url)["size"]
    if size is None:
        raise DataError(f"{shown(url)}: the server does not tell the file's size; use one that does")
    return int(size)


def _info(url: str) -> dict[str, Any]:
    from fsspec.asyn import sync

    files, path = _filesystem(url, os.getpid())
    files.invalidate_cache(path)  # a listing that this process keeps may be an old one
    info = sync(files.loop, files._info, path, timeout=TIMEOUT_S) if files.async_impl else files.info(path)
    return dict(info)


def _names(url: str) -> list[str]:
    from fsspec.asyn import sync

    files, path = _filesystem(url, os.getpid())
    files.invalidate_cache(path)
    if files.async_impl:
        found = sync(files.loop, files._ls, path, detail=False, timeout=TIMEOUT_S)
    else:
        found = files.ls(path, detail=False)
    return sorted({str(name).rstrip("/").rpartition("/")[2] for name in found})


@functools.lru_cache(maxsize=1024)
def _filesystem(url: str, pid: int) -> tuple[Any, str]:
    """Return fsspec's file system, for this process alone (its connections do not survive a fork), and the path."""
    if "::" in url:
        raise ConfigError(f"{shown(url)}: chained URLs are not read; give the plain one, there is a cache already")
    try:
        from fsspec.core import url_to_fs

        files, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{shown(url)} cannot be read without another package ({' '.join(str(error).split())}); for http(s) "
            f"pip install 'bigdssm[remote]', for s3:// s3fs, for gs:// gcsfs"
        ) from None
    return files, path
