"""Which source this package is: two runs whose checksums are equal compute the same."""

from __future__ import annotations

import sys
from pathlib import Path

import xxhash


def code_checksum() -> str:
    """Return a checksum of all source files of this package."""
    root = Path(sys.modules["bigdssm"].__file__ or "").parent
    digest = xxhash.xxh3_64()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
