"""Debian's build dependencies as pairs of packages: a symmetric relation between documents of one domain."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from bigdssm.utils.hashing import hash64
from tools.public_data.files import PublicFile, PublicTable, find_source_file

KIND = "debian-build-depends"
COLUMNS = ("query_id", "query_description", "query_section", "doc_id", "doc_description", "doc_section")
MAX_SHARE = 0.005  # of all sources; more common packages are unspecific
MAX_PACKAGES, MIN_SOURCES = 12, 2  # packages per source, sources per pair


def read_build_depends(source: Path) -> Iterator[PublicTable]:
    """Yield pairs of packages that at least two sources have as common build dependencies, in a random direction.

    `source` contains build_depends.tsv (lines `source ⇥ package package …`) and packages.jsonl, or the subfolders
    debian_build_depends and debian_packages. Common packages, and sources with many dependencies, are dropped. Raises
    DataError.
    """
    packages = _packages(_find(source, "debian_packages", "packages.jsonl"))
    needed = _needed(_find(source, "debian_build_depends", "build_depends.tsv"))
    counts = Counter(name for names in needed for name in names)
    common = {name for name, count in counts.items() if count > MAX_SHARE * len(needed)}
    together: Counter[tuple[str, str]] = Counter()
    for names in needed:
        described = sorted((names & packages.keys()) - common)
        if len(described) <= MAX_PACKAGES:
            together.update(combinations(described, 2))
    pairs = [pair for pair, count in together.items() if count >= MIN_SOURCES]
    note = f"{len(common)} packages that more than one source in {1 / MAX_SHARE:.0f} needs are dropped"
    yield PublicTable("pairs", COLUMNS, (_row(packages, *pair) for pair in pairs), note)


def _row(packages: dict[str, tuple[str, str]], a: str, b: str) -> tuple[str, ...]:
    query, doc = (a, b) if hash64(f"{a} {b}") % 2 else (b, a)
    return (query, *packages[query], doc, *packages[doc])


def _find(source: Path, folder: str, name: str) -> PublicFile:
    return PublicFile(find_source_file(source / folder if (source / folder).is_dir() else source, name), KIND)


def _packages(file: PublicFile) -> dict[str, tuple[str, str]]:
    """Return (synopsis and description, section) of packages by name."""
    packages = {}
    for line in file.lines():
        try:
            package = json.loads(line)
            about = f"{package['synopsis']}. {package['description']}"
            packages[package["package"]] = about, package["section"]
        except (ValueError, KeyError, TypeError):
            raise file.error(line, "package, synopsis, description, section as JSON") from None
    return packages


def _needed(file: PublicFile) -> list[set[str]]:
    """Return the build dependencies per source."""
    dependencies = []
    for line in file.lines():
        parts = line.split("\t")
        file.check(len(parts) == 2, line, "a source, a tab, and packages")
        dependencies.append(set(parts[1].split()))
    return dependencies
