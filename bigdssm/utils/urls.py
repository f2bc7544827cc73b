"""Remote files through fsspec: read, read ranges, size, list, upload; transient failures are retried.

Needs the extra `remote`.
"""

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

# About 24 s of waiting in total: longer than the restart of a server.
ATTEMPTS, FIRST_WAIT_S, LONGEST_WAIT_S = 8, 0.25, 8.0
MISMATCHES = 3  # attempts to fetch valid content before the last one is returned
TIMEOUT_S, SLOWEST_BYTES_PER_S = 30.0, 1 << 16  # limit of a request: the first plus size over the second
CHUNK_BYTES = 1 << 22  # of a sequentially read file
VERSION_KEYS = ("ETag", "etag", "LastModified", "Last-Modified", "mtime")  # fsspec's names of version fields

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+::)*[A-Za-z][A-Za-z0-9+.-]+://")
_waits = itertools.count()  # numbers of retries in this process, for different jitter
T = TypeVar("T")
log = get_logger(__name__)


def is_url(folder: str | Path) -> bool:
    """Return whether `folder` is a URL (scheme://…) and not a local path."""
    return isinstance(folder, str) and _URL.match(folder) is not None


def redacted(url: str) -> str:
    """Return the URL without credentials and query, which may contain secrets."""
    return re.sub(r"//[^/@]*@", "//", url.partition("?")[0])


def join(url: str, path: str) -> str:
    """Return the URL of the relative `path` under the folder `url`; a query stays at the end."""
    folder, mark, query = url.partition("?")
    is_http = urlsplit(url).scheme.lower() in ("http", "https")
    return f"{folder.rstrip('/')}/{quote(path, safe='/=') if is_http else path}{mark}{query}"


def fetch(url: str, offset: int | None, size: int | None, is_valid: Callable[[bytes], bool]) -> bytes:
    """Read a range of a file, or all of it; read again, up to MISMATCHES times, until `is_valid` accepts the content.

    Raises FileNotFoundError or DataError.
    """
    content = b""
    end = None if offset is None or size is None else offset + size
    for _ in range(MISMATCHES):
        content = _retried(url, lambda: _request(url, offset, end))
        if size is not None and len(content) > size:
            raise DataError(
                f"{redacted(url)}: the server ignores byte ranges; use one that does not, or copy the dataset"
            )
        if is_valid(content):
            break
    return content


def _retried(url: str, attempt: Callable[[], T]) -> T:
    """Return the result of `attempt`, retried after transient failures. Raises FileNotFoundError or DataError."""
    for number in range(ATTEMPTS):
        try:
            return attempt()
        except (ConfigError, DataError):
            raise
        except Exception as error:
            text, status = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", _status(error)
            error.__traceback__ = None  # fsspec's frames reference it, and thereby all objects of their callers
        # the attempt failed: raise if another one cannot succeed, else wait
        if status == 404:
            raise FileNotFoundError(errno.ENOENT, "no such file", redacted(url))
        if 400 <= status < 500 and status not in (408, 425, 429):
            raise DataError(f"{redacted(url)}: the server refuses it ({redacted(text)}); check address and credentials")
        if number + 1 < ATTEMPTS:
            spread = xxhash.xxh3_64_intdigest(f"{os.getpid()} {next(_waits)} {url}".encode()) / 2**64
            wait = min(FIRST_WAIT_S * 2**number, LONGEST_WAIT_S) * (0.5 + spread / 2)  # jitter between ranks
            log.info("%s: %s; trying again in %.1f s", redacted(url), redacted(text), wait)
            time.sleep(wait)
    raise UnavailableError(
        f"{redacted(url)} cannot be reached: {ATTEMPTS} attempts failed, the last with {redacted(text)}; retry later"
    )


def _status(error: BaseException) -> int:
    """Return the HTTP status of an error, 0 for a transient one."""
    if isinstance(error, FileNotFoundError):
        cause = error.__cause__  # fsspec also raises it when a failing server did not return a size
        return 404 if cause is None or not type(cause).__module__.startswith("aiohttp") else _status(cause)
    if isinstance(error, PermissionError):
        return 403
    response = getattr(error.__cause__, "response", None)  # botocore's error, wrapped by s3fs
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    status = getattr(error, "status", 0)
    return status if isinstance(status, int) else 0


def _request(url: str, start: int | None, end: int | None) -> bytes:
    """Read a complete range, shorter only at the end of the file. Raises OSError: a proxy returned less."""
    limit = TIMEOUT_S + ((end or CHUNK_BYTES) - (start or 0)) / SLOWEST_BYTES_PER_S
    try:
        content = bytes(_call(url, "cat_file", limit, start=start, end=end))
    except Exception as error:
        if start is not None and _status(error) == 416:  # the range starts after the end of the file
            content = b""
        else:
            raise
    if start is not None and end is not None:
        reached = start + len(content)
        if reached < end and reached < _size(url):  # the size takes another request
            raise OSError(f"received {len(content)} of {end - start} bytes at {start}")
    return content


def size_of(url: str) -> int:
    """Return a file's size in bytes. Raises FileNotFoundError or DataError."""
    return _retried(url, lambda: _size(url))


def version_of(url: str) -> str:
    """Return a string that changes with the file's content: its size, and its etag or time if available.

    Raises FileNotFoundError or DataError.
    """
    info = _retried(url, lambda: _call(url, "info"))
    return " ".join(str(info[key]) for key in ("size", *VERSION_KEYS) if info.get(key) is not None)


def is_folder(url: str) -> bool:
    """Return True for a folder, False for a file. Raises FileNotFoundError or DataError."""
    return bool(_retried(url, lambda: _call(url, "info"))["type"] == "directory")


def list_names(url: str) -> list[str]:
    """Return the sorted names of a folder's entries. Raises FileNotFoundError or DataError."""
    names = _retried(url, lambda: _call(url, "ls", detail=False))
    return sorted({str(name).rstrip("/").rpartition("/")[2] for name in names})


def exists(url: str) -> bool:
    """Return whether a file exists. Raises DataError: the server refuses the request."""
    try:
        _retried(url, lambda: _call(url, "info"))
    except FileNotFoundError:
        return False
    return True


def upload_folder(folder: Path, url: str, last: str) -> None:
    """Copy a folder to a URL, the file `last` at the end: it marks a complete copy. Other remote files are removed.

    Raises ConfigError: the file system is read-only; UnavailableError.
    """
    files, path = _filesystem(url, os.getpid())
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    names = [*(name for name in names if name != last), last]
    try:
        if exists(join(url, last)):
            files.rm_file(f"{path}/{last}")
        for name in names:
            _retried(join(url, name), partial(files.put_file, str(folder / name), f"{path}/{name}"))
        retained = {f"{path}/{name}" for name in names}
        if others := [name for name in files.find(path) if name not in retained]:
            files.rm(others)
    except NotImplementedError:
        raise ConfigError(f"{redacted(url)} is read-only; write to a local folder and copy the dataset") from None


def download_folder(url: str, folder: Path) -> None:
    """Copy all files under a URL to a local folder. Raises DataError."""
    files, path = _filesystem(url, os.getpid())
    names = [str(name).removeprefix(f"{path}/") for name in _retried(url, partial(files.find, path))]
    for name in names:
        download_file(join(url, name), folder / name)


def download_file(url: str, file: Path) -> None:
    """Copy a file at a URL to a local path, whose folder may not exist yet. Raises FileNotFoundError or DataError."""
    files, path = _filesystem(url, os.getpid())
    file.parent.mkdir(parents=True, exist_ok=True)
    _retried(url, partial(files.get_file, path, str(file)))


def remove_folder(url: str) -> None:
    """Remove all files under a URL. Raises DataError."""
    files, path = _filesystem(url, os.getpid())
    _retried(url, partial(files.rm, path, recursive=True))


def upload_file(file: Path, url: str) -> None:
    """Copy a file to a URL. Raises DataError."""
    files, path = _filesystem(url, os.getpid())
    _retried(url, partial(files.put_file, str(file), path))


def _size(url: str) -> int:
    size = _call(url, "info")["size"]
    if size is None:
        raise DataError(f"{redacted(url)}: the server does not report the file's size; use one that does")
    return int(size)


def _call(url: str, method: str, timeout_s: float = TIMEOUT_S, **options: Any) -> Any:
    """Call a method of the URL's file system on its path; only asynchronous file systems have a time limit."""
    from fsspec.asyn import sync

    files, path = _filesystem(url, os.getpid())
    if method != "cat_file":
        files.invalidate_cache(path)  # the cached listing may be outdated
    if files.async_impl:
        return sync(files.loop, getattr(files, f"_{method}"), path, timeout=timeout_s, **options)
    return getattr(files, method)(path, **options)


@functools.lru_cache(maxsize=1024)
def _filesystem(url: str, pid: int) -> tuple[Any, str]:
    """Return fsspec's file system and the path; cached per process, because connections do not survive a fork."""
    if "::" in url:
        raise ConfigError(f"{redacted(url)}: chained URLs are not supported; use the plain URL, files are cached")
    try:
        from fsspec.core import url_to_fs

        files, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{redacted(url)} needs another package ({' '.join(str(error).split())}): for http(s) pip install "
            f"'bigdssm[remote]'"
        ) from None
    return files, path
