"""Datasets at a URL, through the disk cache: whole files, and range requests for blocks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from bigdssm.dataset.cache import FileCache, cache_key
from bigdssm.dataset.schema import SCHEMA_FILE, vocabulary_checksums
from bigdssm.errors import DataError
from bigdssm.utils.urls import CHUNK_BYTES, MISMATCHES, fetch, join, redacted, size_of

COUNTS_FILE = "counts.arrow"  # per partition: train positives per document
KEYS_SUFFIX = ".keys.npy"  # files of sorted keys, see keys.py
SEQUENCE_KEYS_FILE = f"sequences{KEYS_SUFFIX}"


def catalogue_entries(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of all files of the catalogue in a dataset.json."""
    return [*content["catalogue"], *content.get("versions", []), *content.get("withdrawals", [])]


@dataclass(frozen=True)
class RemoteFile:
    """A shard at a URL."""

    url: str
    cache: FileCache

    def __str__(self) -> str:
        return redacted(self.url)

    @property
    def name(self) -> str:
        """The file name."""
        return redacted(self.url).rpartition("/")[2]

    def read(self, offset: int, size: int, checksum: int) -> bytes:
        """Read a block through the cache.

        Short or damaged content is returned unchanged, for the caller to report. Raises FileNotFoundError: no such
        shard; DataError: the server is unreachable, which is not damage.
        """
        key = cache_key(self.url, offset, size, checksum)
        content = self.cache.get_block(key, checksum)
        if content is None:
            content = fetch(self.url, offset, size, lambda got: xxhash.xxh3_64_intdigest(got) == checksum)
            if xxhash.xxh3_64_intdigest(content) == checksum:
                self.cache.put_block(key, content)
        return content


class RemoteFolder:
    """The files of a dataset at a URL.

    All but the shards stay in the cache while this object lives.
    """

    def __init__(
        self, url: str, cache: FileCache, partitions: Sequence[str] | None = None, first: str | None = None
    ) -> None:
        """Download missing files: of all partitions, the given ones, or those from `first` on.

        Raises DataError: not a dataset, damaged, unreachable, or too large for the cache; ConfigError: an unsupported
        kind of URL, or a missing package for it.
        """
        self.url, self.cache = url, cache
        self._held: list[int] = []
        self._entries: dict[str, str] = {}
        try:
            self.dir = self._mirror(partitions, first)
        except BaseException as error:
            self._release()  # now: the traceback keeps this object alive
            if isinstance(error, OSError):
                raise DataError(f"data.cache_dir={cache.dir} cannot be used: {error}; choose another one") from None
            raise

    def __del__(self) -> None:
        self._release()

    def _release(self) -> None:
        while self._held:
            os.close(self._held.pop())

    def file(self, path: str) -> RemoteFile:
        """Return the remote file at a relative path."""
        return RemoteFile(join(self.url, path), self.cache)

    def _mirror(self, partitions: Sequence[str] | None, first: str | None) -> Path:
        content = self._json("dataset.json", f"{redacted(self.url)} is not a dataset")
        try:
            names = [str(name) for name in content["partitions"]]
            described = self._json(SCHEMA_FILE, "copy the dataset whole")
            for file, checksum in vocabulary_checksums(described).items():
                self._large(file, checksum)
            for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
                self._small(f"tokenizer/{file}", optional=True)
            for part in catalogue_entries(content):
                self._large(part["file"], part["checksum"])
            required = names[names.index(first) :] if first in names else names if partitions is None else partitions
            for name in names:
                path = f"partitions/{name}"
                of_partition = self._json(f"{path}/partition.json", "copy the dataset whole")
                if name not in required:
                    continue
                for split, of_split in of_partition["splits"].items():
                    self._large(f"{path}/{split}.index.arrow", of_split["index_checksum"])
                self._large(f"{path}/{COUNTS_FILE}", of_partition["counts_checksum"])
                for part in of_partition.get("sequences", []):
                    self._large(f"{path}/{part['file']}", part["checksum"])
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{redacted(self.url)} holds metadata of another format: {error!r}") from None
        return self.cache.link(redacted(self.url).rstrip("/").rpartition("/")[2] or "dataset", self.url, self._entries)

    def _json(self, path: str, fix: str) -> dict[str, Any]:
        content = self._small(path, fix=fix)
        try:
            return dict(json.loads(content))
        except (ValueError, TypeError) as error:
            raise DataError(f"{redacted(join(self.url, path))} is damaged: {error}") from None

    def _small(self, path: str, *, optional: bool = False, fix: str = "copy the dataset whole") -> bytes:
        """Download and return a file without a recorded checksum, at every opening."""
        url = _checked_join(self.url, path)
        try:
            content = fetch(url, None, None, _parses if path.endswith(".json") else lambda _: True)
        except FileNotFoundError:
            if optional:
                return b""
            raise DataError(f"{redacted(url)} does not exist; {fix}") from None
        key = cache_key(url, xxhash.xxh3_128_hexdigest(content))
        self._hold(path, key, self.cache.fill(key, len(content), lambda fd: _write(fd, 0, content)))
        return content

    def _large(self, path: str, checksum: str) -> None:
        """Download a file unless the cache has it with this checksum."""
        url = _checked_join(self.url, path)
        key = cache_key(url, checksum)
        held = self.cache.acquire(key)

        def download(fd: int) -> None:
            for _ in range(MISMATCHES):
                digest = xxhash.xxh3_64()
                for start in range(0, size, CHUNK_BYTES):
                    length = min(CHUNK_BYTES, size - start)
                    content = fetch(url, start, length, lambda got, length=length: len(got) == length)  # type: ignore[misc]
                    digest.update(content)
                    _write(fd, start, content)
                if digest.hexdigest() == checksum:
                    return
            raise DataError(
                f"{redacted(url)} is damaged: its checksum is not the recorded one; copy the dataset there again"
            )

        if held is None:
            try:
                size = size_of(url)
                held = self.cache.fill(key, size, download)
            except FileNotFoundError:
                raise DataError(f"{redacted(url)} does not exist; copy the dataset whole") from None
        self._hold(path, key, held)

    def _hold(self, path: str, key: str, held: int) -> None:
        self._entries[path] = key
        self._held.append(held)


def _checked_join(url: str, path: str) -> str:
    if any(part in ("", ".", "..") for part in path.split("/")) or "\\" in path:
        raise DataError(f"{redacted(url)}: its metadata names a file {path!r}, not a plain path inside it; rejected")
    return join(url, path)


def _write(fd: int, offset: int, content: bytes) -> None:
    while content:
        written = os.pwrite(fd, content, offset)
        offset, content = offset + written, content[written:]


def _parses(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True
