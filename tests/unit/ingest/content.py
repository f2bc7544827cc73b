"""Everything that ingestion wrote, in a form that two datasets are compared by."""

from __future__ import annotations

from pathlib import Path

from bigdssm.dataset.stamps import STAMPS_FILE


def content(folder: Path) -> dict[str, bytes]:
    """Return all files of a dataset, and of the BEIR collection next to it, if any."""
    beside = folder.with_name(f"{folder.name}.beir")
    found = {
        f"{number}/{path.relative_to(place)}": path.read_bytes()
        for number, place in enumerate((folder, beside))
        for path in place.rglob("*")
        if path.is_file() and path.name != STAMPS_FILE
    }
    found["0/dataset.json"] = found["0/dataset.json"].replace(f'"name": "{folder.name}"'.encode(), b"")
    return found
