"""Record of the data that a model was trained on: partitions, and the time of the newest training target.

A model folder has it under `trained` in its provenance; it contains the record of the model that the stage started
from. `evaluation.succession` decides by it which requests are newer than the training of a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bigdssm.dataset.dataset import Dataset

TRAINED = "trained"  # key in the provenance of a model folder, and in the state of a checkpoint


@dataclass(frozen=True)
class TrainingRecord:
    """The partitions that were trained on, and the newest time of a target."""

    partitions: dict[str, str]  # names by identity
    until: float | None = None  # seconds since 1970; None: the targets have no times

    @classmethod
    def of(cls, provenance: Mapping[str, Any]) -> TrainingRecord | None:
        """Return the record in a provenance, None if it has none."""
        content = provenance.get(TRAINED)
        if not isinstance(content, Mapping):
            return None
        until = content.get("until")
        return cls(dict(content.get("partitions", {})), None if until is None else float(until))

    @classmethod
    def of_dataset(cls, dataset: Dataset) -> TrainingRecord:
        """Return the record of training on the train split of `dataset`; reads its blocks if events have times."""
        partitions = {partition.identity: partition.name for partition in dataset.partitions}
        return cls(partitions, dataset.newest_target("train"))

    def after(self, earlier: TrainingRecord | None) -> TrainingRecord:
        """Return the record of both, `earlier` first."""
        if earlier is None:
            return self
        times = [record.until for record in (earlier, self) if record.until is not None]
        return TrainingRecord({**earlier.partitions, **self.partitions}, max(times, default=None))

    def num_known(self, dataset: Dataset) -> int:
        """Return the number of partitions of `dataset`, opened or not, in this record."""
        return sum(partition.identity in self.partitions for partition in dataset.partitions_on_disk())

    def as_json(self) -> dict[str, Any]:
        """Return the content of the key `trained`."""
        return asdict(self)
