"""Datasets at a URL: small and mapped files are fetched whole, blocks by range reads, all into the cache on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from bigdssm.dataset.cache import FileCache, key_of
from bigdssm.dataset.schema import SCHEMA_FILE, vocabulary_checksums
from bigdssm.errors import DataError
from bigdssm.utils.urls import CHUNK_BYTES, MISMATCHES, fetch, join, shown, size_of

COUNTS_FILE = "counts.arrow"  # of a partition: the train positives of each document that has some
KEYS_SUFFIX = ".keys.npy"  # of sorted keys, see keys.py
SEQUENCE_KEYS_FILE = f"sequences{KEYS_SUFFIX}"


@dataclass(frozen=True)
class RemoteFile:
    """A shard at a URL."""

    url: str
    cache: FileCache

    def __str__(self) -> str:
        return shown(self.url)

    @property
    def name(self) -> str:
        """Return the file's own name."""
        return shown(self.url).rpartition("/")[2]

    def read(self, offset: int, size: int, checksum: int) -> bytes:
        """Return the bytes of a block, from the cache where they are there.

        What the server has instead comes back as it is: shorter, or of another checksum. Raises FileNotFoundError: no
        such shard; DataError: the server cannot be read, which is no damage.
        """
        key = key_of(self.url, offset, size, checksum)
        content = self.cache.block(key, checksum)
        if content is None:
            content = fetch(self.url, offset, size, lambda got: xxhash.xxh3_64_intdigest(got) == checksum)
            if xxhash.xxh3_64_intdigest(content) == checksum:
                self.cache.keep_block(key, content)
        return content


class RemoteFolder:
    """A dataset's files at a URL, all but the shards held in the cache as long as this object lives."""

    def __init__(
        self, url: str, cache: FileCache, partitions: Sequence[str] | None = None, first: str | None = None
    ) -> None:
        """Fetch what is not there; of the partitions only the named ones, or those from `first` on.

        Raises DataError: no dataset there, damaged, unreachable, or too large for the cache; ConfigError: no such kind
        of URL, or a package is missing for it.
        """
        self.url, self.cache = url, cache
        self._held: list[int] = []
        self._entries: dict[str, str] = {}
        try:
            self.dir = self._mirror(partitions, first)
        except BaseException as error:
            self._release()  # now, not when the last traceback that leads here is collected
            if isinstance(error, OSError):
                raise DataError(f"data.cache_dir={cache.dir} cannot be used: {error}; choose another one") from None
            raise

    def __del__(self) -> None:
        self._release()

    def _release(self) -> None:
        while self._held:
            os.close(self._held.pop())

    def file(self, place: str) -> RemoteFile:
        """Return the file that stands at `place` in the folder."""
        return RemoteFile(join(self.url, place), self.cache)

    def _mirror(self, partitions: Sequence[str] | None, first: str | None) -> Path:
        content = self._json("dataset.json", f"{shown(self.url)} is no dataset")
        try:
            names = [str(name) for name in content["partitions"]]
            described = self._json(SCHEMA_FILE, "copy the dataset whole")
            for file, checksum in vocabulary_checksums(described).items():
                self._large(file, checksum)
            for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
                self._small(f"tokenizer/{file}", optional=True)
            for part in [*content["catalogue"], *content.get("versions", [])]:
                self._large(part["file"], part["checksum"])
            wanted = names[names.index(first) :] if first in names else names if partitions is None else partitions
            for name in names:
                self._partition(f"partitions/{name}", name in wanted)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{shown(self.url)} holds metadata of another format: {error!r}") from None
        return self.cache.link(shown(self.url).rstrip("/").rpartition("/")[2] or "dataset", self.url, self._entries)

    def _partition(self, place: str, wanted: bool) -> None:
        content = self._json(f"{place}/partition.json", "copy the dataset whole")
        if not wanted:
            return
        for split, described in content["splits"].items():
            self._large(f"{place}/{split}.index.arrow", described["index_checksum"])
        self._large(f"{place}/{COUNTS_FILE}", content["counts_checksum"])
        for part in content.get("sequences", []):
            self._large(f"{place}/{part['file']}", part["checksum"])

    def _json(self, place: str, fix: str) -> dict[str, Any]:
        content = self._small(place, fix=fix)
        try:
            return dict(json.loads(content))
        except (ValueError, TypeError) as error:
            raise DataError(f"{shown(join(self.url, place))} is damaged: {error}") from None

    def _small(self, place: str, *, optional: bool = False, fix: str = "copy the dataset whole") -> bytes:
        """Fetch a file without a recorded checksum, at every opening, and return it."""
        url = _checked_join(self.url, place)
        try:
            content = fetch(url, None, None, _parses if place.endswith(".json") else lambda _: True)
        except FileNotFoundError:
            if optional:
                return b""
            raise DataError(f"{shown(url)} does not exist; {fix}") from None
        key = key_of(url, xxhash.xxh3_128_hexdigest(content))
        self._hold(place, key, self.cache.fill(key, len(content), lambda fd: _write(fd, 0, content)))
        return content

    def _large(self, place: str, checksum: str) -> None:
        """Fetch a file, if the cache has not the one of this checksum."""
        url = _checked_join(self.url, place)
        key = key_of(url, checksum)
        held = self.cache.hold(key)
        if held is None:
            try:
                size = size_of(url)
                held = self.cache.fill(key, size, lambda fd: _download(fd, url, size, checksum))
            except FileNotFoundError:
                raise DataError(f"{shown(url)} does not exist; copy the dataset whole") from None
        self._hold(place, key, held)

    def _hold(self, place: str, key: str, held: int) -> None:
        self._entries[place] = key
        self._held.append(held)


def _checked_join(url: str, place: str) -> str:
    if any(part in ("", ".", "..") for part in place.split("/")) or "\\" in place:
        raise DataError(f"{shown(url)}: its metadata name a file {place!r}, not a plain path inside it; refused")
    return join(url, place)


def _download(fd: int, url: str, size: int, checksum: str) -> None:
    for _ in range(MISMATCHES):
        digest = xxhash.xxh3_64()
        for start in range(0, size, CHUNK_BYTES):
            wanted = min(CHUNK_BYTES, size - start)
            content = fetch(url, start, wanted, lambda got, wanted=wanted: len(got) == wanted)  # type: ignore[misc]
            digest.update(content)
            _write(fd, start, content)
        if digest.hexdigest() == checksum:
            return
    raise DataError(f"{shown(url)} is damaged: its checksum is not the recorded one; copy the dataset there again")


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
