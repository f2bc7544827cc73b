"""Debian's build dependencies as pairs of packages: documents of one domain, in a relation that has no direction."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from bigdssm.utils.hashing import hash64
from tools.public_data.files import PublicFile, PublicTable, find

KIND = "debian-build-depends"
COLUMNS = ("query_id", "query_description", "query_section", "doc_id", "doc_description", "doc_section")
MOST_COMMON = 0.005  # of all sources: what more of them need goes with everything
MOST_NEEDED, LEAST_SOURCES = 12, 2  # packages of a source, and sources of a pair


def read_build_depends(source: Path) -> Iterator[PublicTable]:
    """Yield the pairs of packages that at least two sources build from together, each once, either as the query.

    `source` holds build_depends.tsv (a line `source ⇥ package package …`) and packages.jsonl, or folders
    debian_build_depends and debian_packages that do. Common packages, and sources of many others, are left out. Raises
    DataError.
    """
    packages = _packages(_find(source, "debian_packages", "packages.jsonl"))
    needed = _needed(_find(source, "debian_build_depends", "build_depends.tsv"))
    counts = Counter(name for names in needed for name in names)
    common = {name for name, count in counts.items() if count > MOST_COMMON * len(needed)}
    together: Counter[tuple[str, str]] = Counter()
    for names in needed:
        described = sorted((names & packages.keys()) - common)
        if len(described) <= MOST_NEEDED:
            together.update(combinations(described, 2))
    pairs = [pair for pair, count in together.items() if count >= LEAST_SOURCES]
    note = f"{len(common)} packages that more than one source in {1 / MOST_COMMON:.0f} needs are left out"
    yield PublicTable("pairs", COLUMNS, (_row(packages, *pair) for pair in pairs), note)


def _row(packages: dict[str, tuple[str, str]], a: str, b: str) -> tuple[str, ...]:
    query, doc = (a, b) if hash64(f"{a} {b}") % 2 else (b, a)
    return (query, *packages[query], doc, *packages[doc])


def _find(source: Path, folder: str, name: str) -> PublicFile:
    return PublicFile(find(source / folder if (source / folder).is_dir() else source, name), KIND)


def _packages(file: PublicFile) -> dict[str, tuple[str, str]]:
    """Return (synopsis and description, section) of packages by name."""
    found = {}
    for line in file.lines():
        try:
            package = json.loads(line)
            about = f"{package['synopsis']}. {package['description']}"
            found[package["package"]] = about, package["section"]
        except (ValueError, KeyError, TypeError):
            raise file.wrong(line, "package, synopsis, description, section as JSON") from None
    return found


def _needed(file: PublicFile) -> list[set[str]]:
    """Return the packages that each source is built from."""
    found = []
    for line in file.lines():
        parts = line.split("\t")
        file.check(len(parts) == 2, line, "a source, a tab, and packages")
        found.append(set(parts[1].split()))
    return found
