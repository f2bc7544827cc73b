"""Stored results of finished trials (trials.jsonl), usable on other machines without the runs.

One JSON line per trial: its name, the ranks of the split's queries up to RANK_LIMIT and the CPU seconds. The metrics of
a claim (CLAIM_METRICS) are 0 beyond RANK_LIMIT, so their values and intervals are those of the exact ranks: the page
can be verified with the dataset alone, without training.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bigdssm.errors import DataError
from bigdssm.evaluation.comparison import SavedRanks, read_ranks
from bigdssm.utils.atomic import write_text
from tools.evidence.claims import RANK_LIMIT
from tools.evidence.running import Trial, cpu_seconds

BEYOND = RANK_LIMIT + 1  # stored in place of all lower ranks


@dataclass(frozen=True)
class StoredTrial:
    """Result of one trial."""

    trial: str  # Trial.name
    split: str
    rows: str  # checksum of the split's rows
    exclude_seen: bool | str
    cpu_seconds: float  # of training including pretraining
    first_ranks: str  # uint8 [queries], twice the rank (equal scores have half ranks), deflated, base64

    @classmethod
    def of(cls, trial: Trial) -> StoredTrial:
        """Read the result from the trial's folder. Raises DataError: not finished."""
        saved = read_ranks(trial.report)
        spent = round(cpu_seconds(trial), 1)
        return cls(trial.name, saved.split, saved.rows, saved.exclude_seen, spent, pack_ranks(saved.ranks))

    def saved(self) -> SavedRanks:
        """Return the ranks, float64, BEYOND in place of lower ones. Raises DataError: damaged."""
        try:
            doubled = np.frombuffer(zlib.decompress(base64.b64decode(self.first_ranks, validate=True)), np.uint8)
        except (ValueError, zlib.error) as error:
            raise DataError(f"the stored ranks of {self.trial} are damaged ({error}); remove its line") from None
        return SavedRanks(self.trial, doubled / 2, 0.0, self.split, self.rows, self.exclude_seen)


def pack_ranks(ranks: np.ndarray) -> str:
    """Return ranks (float [queries]) as in `first_ranks`. Raises DataError: a rank is not a multiple of 1/2."""
    doubled = 2 * np.where(ranks <= RANK_LIMIT, ranks, BEYOND)
    codes = doubled.astype(np.uint8)
    if not (np.isfinite(ranks).all() and (codes == doubled).all()):
        raise DataError("a rank is not a multiple of 1/2, which trials.jsonl cannot store")
    return base64.b64encode(zlib.compress(codes.tobytes(), 9)).decode()


def read_trials(path: Path) -> dict[str, StoredTrial]:
    """Read stored trials by name; none if the file does not exist. Raises DataError: damaged."""
    if not path.exists():
        return {}
    try:
        lines = [StoredTrial(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error!r}; restore it, or remove it to train again") from None
    return {stored.trial: stored for stored in lines}


def with_finished(stored: Mapping[str, StoredTrial], trials: Iterable[Trial]) -> dict[str, StoredTrial]:
    """Return the stored trials updated with the finished runs among `trials`; writes no file."""
    return {**stored, **{trial.name: StoredTrial.of(trial) for trial in trials if trial.report.exists()}}


def write_trials(path: Path, stored: Mapping[str, StoredTrial]) -> None:
    """Write stored trials in the order of their names."""
    write_text(path, "".join(json.dumps(asdict(stored[name])) + "\n" for name in sorted(stored)))
