"""The bad rows of a making: counted, told, written as JSON lines, and too many of them refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from bigdssm.errors import DataError
from bigdssm.making.reading import BadRow

# What one bad row's reason has and another's of the kind has not.
PARTICULAR = re.compile(r"'.*'|\".*\"|(?<!\S)-?\d[\d.,e+-]*(?![\w-])")
MAX_KINDS = 100


class Quarantine:
    """Takes bad rows in their order into a file."""

    def __init__(self, path: Path, kept: Path, partition: str, max_bad_fraction: float) -> None:
        """Write to `path`; `kept` is where the file will stand if the making fails."""
        self.path, self.kept = path, kept
        self._partition, self._max_bad_fraction = partition, max_bad_fraction
        self._file = path.open("w", encoding="utf-8")
        self._first = ""
        self._kinds: Counter[str] = Counter()
        self.num_bad = 0
        self.num_left_out = 0
        self.num_good = 0

    def add(self, rows: Iterable[BadRow]) -> None:
        """Take in bad rows."""
        for file, row, reason, left_out in rows:
            self.num_bad += 1
            self.num_left_out += left_out
            kind = PARTICULAR.sub("…", reason)
            if kind in self._kinds or len(self._kinds) < MAX_KINDS:
                self._kinds[kind] += 1
            self._first = self._first or f"{file}, row {row}: {reason}"
            record = {"partition": self._partition, "file": file, "row": row, "reason": reason, "left_out": left_out}
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def check(self) -> None:
        """Raise DataError, naming the first bad row, where there are too many."""
        total, limit = self.num_left_out + self.num_good, self._max_bad_fraction
        if self.num_bad > limit * total:
            told = f"{self.num_bad} of {total} rows are bad or have bad values, all tables together"
            raise DataError(f"{told}, more than data.max_bad_fraction={limit}{self.told()}")

    def told(self) -> str:
        """Return the commonest reasons with their counts, the first bad row and the file, to end a sentence with."""
        if not self.num_bad:
            return ""
        said = ", ".join(f"{count} × {kind}" for kind, count in self._kinds.most_common(3))
        return f": {said}; the first is {self._first}; all are in {self.kept}"

    def close(self) -> None:
        """Close the file."""
        self._file.close()
