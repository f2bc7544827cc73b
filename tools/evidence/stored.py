"""Stored results of finished trials (trials.jsonl), from which another machine can go on without their runs.

One JSON line a trial: its name, the ranks of the split's queries and the CPU-seconds that they cost. Intervals are
computed from the ranks, so whoever has the dataset can check the page without a training.
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
from tools.evidence.running import Trial, cpu_seconds

DTYPE = np.dtype("<f4")  # of the ranks in the file


@dataclass(frozen=True)
class StoredTrial:
    """What one trial measured."""

    trial: str  # Trial.name
    split: str
    rows: str  # checksum of the split's rows
    exclude_seen: bool
    cpu_seconds: float  # of training, that of the pretraining included
    ranks: str  # DTYPE [queries], deflated, in base64

    @classmethod
    def of(cls, trial: Trial) -> StoredTrial:
        """Return what the trial's folder says. Raises DataError where it is not finished."""
        saved = read_ranks(trial.report)
        packed = base64.b64encode(zlib.compress(saved.ranks.astype(DTYPE).tobytes(), 9)).decode()
        spent = round(cpu_seconds(trial), 1)
        return cls(trial.name, saved.split, saved.rows, saved.exclude_seen, spent, packed)

    def saved(self) -> SavedRanks:
        """Return the ranks, float64. Raises DataError where they are damaged."""
        try:
            ranks = np.frombuffer(zlib.decompress(base64.b64decode(self.ranks, validate=True)), DTYPE)
        except (ValueError, zlib.error) as error:
            raise DataError(f"the kept ranks of {self.trial} are damaged ({error}); remove its line") from None
        return SavedRanks(self.trial, ranks.astype(np.float64), 0.0, self.split, self.rows, self.exclude_seen)


def read_trials(path: Path) -> dict[str, StoredTrial]:
    """Return what a file keeps, by the trial's name; nothing where there is none. Raises DataError: damaged."""
    if not path.exists():
        return {}
    try:
        lines = [StoredTrial(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} holds no trials: {error!r}; remove it") from None
    return {kept.trial: kept for kept in lines}


def store_trial(kept: Mapping[str, StoredTrial], which: Iterable[Trial]) -> dict[str, StoredTrial]:
    """Return what is kept with what those trials measured whose runs are finished, which counts where both are."""
    return {**kept, **{trial.name: StoredTrial.of(trial) for trial in which if trial.report.exists()}}


def write_trials(path: Path, kept: Mapping[str, StoredTrial]) -> None:
    """Write the file, in the order of the names."""
    write_text(path, "".join(json.dumps(asdict(kept[name])) + "\n" for name in sorted(kept)))
