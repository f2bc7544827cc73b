"""The events that baselines count: which splits and targets, and the days of requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from bigdssm.config.keys import SPLITS
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.features import Categorical, Feature
from bigdssm.features.event_time import DAY


def is_split_by_time(dataset: Dataset) -> bool:
    """Return whether the newest events are held out, so that a request may count all events of earlier days."""
    return dataset.header.split.get("how") == "time"


def counted_splits(dataset: Dataset) -> tuple[list[str], Dataset]:
    """Return the splits whose events are counted, and a view with their targets.

    With a split by time they are all splits, and a request counts the events before its day. Otherwise they are train.
    The targets of every split are the events that would be targets in train.
    """
    if not is_split_by_time(dataset):
        return ["train"], dataset
    splits = [split for split in SPLITS if dataset.num_rows(split)]
    targets = dataset.rules.targets
    of_train = dict.fromkeys(splits, targets["train"]) if "train" in targets else {}
    return splits, dataset.with_rules(replace(dataset.rules, targets=of_train))


def request_days(dataset: Dataset, rows: Rows) -> np.ndarray:
    """Return the days of requests since 1970 (UTC), int64 [m]; 0 if events have no times."""
    if not dataset.has_times:
        return np.zeros(rows.num_queries, np.int64)
    seconds = dataset.request_times(rows) * dataset.header.time_unit
    return np.asarray(seconds // DAY, np.int64)


def single_valued(features: Mapping[str, Feature]) -> dict[str, Categorical]:
    """Return the categorical features with one value."""
    return {name: f for name, f in features.items() if isinstance(f, Categorical) and not f.multi}
