"""The record of the partitions that a model was trained on."""

from __future__ import annotations

from types import SimpleNamespace

from bigdssm.checkpoints.training_record import TrainingRecord


def test_the_known_partitions_of_a_dataset_are_counted() -> None:
    partitions = [SimpleNamespace(identity=name) for name in ("base", "day1", "day2")]
    dataset = SimpleNamespace(partitions_on_disk=lambda: partitions)
    record = TrainingRecord({"base": {}, "elsewhere": {}})  # type: ignore[dict-item]
    assert record.num_known(dataset) == 1  # type: ignore[arg-type]
    assert TrainingRecord({}).num_known(dataset) == 0  # type: ignore[arg-type]
