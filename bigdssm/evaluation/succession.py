"""Decide whether a new model may replace the live one, on requests newer than the training of both."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from bigdssm.checkpoints.model_folder import ModelFolder
from bigdssm.checkpoints.training_record import TrainingRecord
from bigdssm.config import first_difference
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import EventRules
from bigdssm.errors import CheckpointError, ConfigError, DataError, Verdict
from bigdssm.evaluation.comparison import System, chain_systems, model_system
from bigdssm.evaluation.metrics import Difference, means
from bigdssm.utils.log import Progress, no_progress

MARGIN = 0.02  # accepted loss, as a share of the metric of the live model
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class NewerRequests:
    """Rows of a split that are newer than the training of some models."""

    all_data: Dataset  # all partitions
    dataset: Dataset  # the partitions that have some
    split: str
    mask: np.ndarray | None  # bool [rows with a relevant document]; None: all of them
    since: str  # for messages: what they are newer than


@dataclass(frozen=True)
class Succession:
    """The comparison of a new model with the live one."""

    verdict: Verdict
    systems: tuple[System, ...] = ()  # live, new, and the strongest chain, if there are sequences
    difference: Difference | None = None  # new − live
    margin: float = 0.0  # absolute
    requests: NewerRequests | None = None


def newer_requests(data: str, split: str, live: ModelFolder, new: ModelFolder) -> NewerRequests:
    """Return the rows of a split that neither model was trained on, and that are not older than their training.

    If events have times, these are the requests after the newest training target of both. Otherwise they are the
    held-out rows of the newest partition that one of them was trained on, and all rows of later partitions. Raises
    CheckpointError: a model has no record of its training; DataError: there are no such rows.
    """
    records = [TrainingRecord.of(folder.provenance) for folder in (live, new)]
    for name, record in zip(("LIVE", "NEW"), records, strict=True):
        if record is None:
            raise CheckpointError(
                f"{name} has no record of the data that it was trained on: an earlier version wrote it; compare with "
                "bigdssm evaluate --compare, and train it again"
            )
    live_record, new_record = (record for record in records if record is not None)
    trained = new_record.after(live_record)
    all_data = Dataset.open(data).with_rules(EventRules.of(live.config.data))
    has_times = all_data.has_times and live_record.until is not None and new_record.until is not None
    known = [part.number for part in all_data.partitions if part.identity in trained.partitions]
    newest = max(known, default=-1)
    if newest < 0 and not has_times:
        raise DataError(
            f"{data}: LIVE and NEW were trained on none of its partitions, and its rows have no times, so that none is "
            "known to be newer than their training; name the dataset that they were trained on"
        )
    # Appends are in order of time. A partition that was trained on has newer rows in its other splits alone.
    first = newest + 1 if split == "train" and not has_times else newest
    names = [part.name for part in all_data.partitions if part.number >= first and part.content["splits"].get(split)]
    since = f"training on {', '.join(trained.partitions.values())}"
    if names:
        dataset = Dataset.open(data, names).with_rules(all_data.rules)
        if dataset.num_rows(split):
            mask = _later_than(dataset, split, trained.until) if has_times and trained.until is not None else None
            if mask is None or mask.any():
                return NewerRequests(all_data, dataset, split, mask, since)
    raise DataError(
        f"{data} has no request in split {split} that is newer than the {since}; append newer rows with held-out ones "
        "(make_shards --append, for events with --split time), or name another --split"
    )


def _later_than(dataset: Dataset, split: str, until: float) -> np.ndarray:
    """Return whether each row with a relevant document has a time after `until` (seconds), bool [rows]."""
    later = [np.zeros(0, bool)]
    for rows in dataset.iterate(split, ROWS_AT_ONCE):
        times = dataset.request_times(rows)[rows.relevance > 0] * dataset.header.time_unit
        later.append(times > until)
    return np.concatenate(later)


def compare_models(
    live: ModelFolder, new: ModelFolder, data: str, split: str = "test", *, metric: str = "ndcg_at_10",
    margin: float = MARGIN, progress: Progress = no_progress,
) -> Succession:  # fmt: skip
    """Compare a new model with the live one. margin: the accepted loss, as a share of the metric of `live`.

    Raises: CheckpointError, DataError: as `newer_requests`; ConfigError: the models answer different requests.
    """
    if live.checksum == new.checksum:
        return Succession(Verdict.EQUAL_WEIGHTS)
    rules = EventRules.of(live.config.data)
    if difference := first_difference(asdict(rules), asdict(EventRules.of(new.config.data)), "data"):
        raise ConfigError(f"LIVE and NEW answer other requests: {difference}; compare models of one kind")
    requests = newer_requests(data, split, live, new)
    exclude_seen = live.config.data.exclude_seen
    models = [
        model_system(name, folder, requests.dataset, split, exclude_seen, progress=progress)
        for name, folder in (("LIVE", live), ("NEW", new))
    ]
    chains = chain_systems(requests.dataset, split, exclude_seen, requests.all_data)
    if requests.mask is not None:
        models, chains = ([system.of_slice(requests.mask) for system in part] for part in (models, chains))
    strongest = sorted(chains, key=lambda system: means(system.values)[metric])[-1:]
    gain = models[1].difference(models[0], metric)
    absolute = margin * means(models[0].values)[metric]
    return Succession(verdict_of(gain, absolute), (*models, *strongest), gain, absolute, requests)


def verdict_of(gain: Difference, margin: float) -> Verdict:
    """Return the verdict on an interval of new − live, NaN for a single query, and an absolute margin."""
    if gain.low >= -margin:
        return Verdict.NOT_WORSE
    return Verdict.WORSE if gain.high < 0 else Verdict.UNDECIDED
