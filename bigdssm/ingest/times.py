"""The unit of the times of an ingestion: declared, found from all times of its tables, or that of the dataset."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bigdssm.config import DataConfig
from bigdssm.dataset.catalogue import SINCE_COLUMN, MappedTable, catalogue_files
from bigdssm.dataset.partition import read_partition
from bigdssm.dataset.rows import TIME_COLUMN, EventSlices
from bigdssm.errors import ConfigError
from bigdssm.features.times import (
    PER_SECOND,
    DeclaredUnit,
    TimeRule,
    TimeSummary,
    check_declared,
    groups_of,
    matching_unit,
    recorded_unit,
)
from bigdssm.ingest.dataset_writer import AS_OF, PARTITIONS, SPLIT, TIMES, DatasetWriter


def declared_rule(config: DataConfig, option: DeclaredUnit | None) -> TimeRule:
    """Return the rule of a new dataset; `option` replaces data.time_unit."""
    unit = option or config.time_unit
    return TimeRule() if unit == "auto" else TimeRule.declared(unit)


def time_rule(writer: DatasetWriter, config: DataConfig, option: DeclaredUnit | None) -> TimeRule:
    """Return the rule by which times are read: that of the dataset, or of a new one.

    Raises ConfigError: the declared unit is not that of the dataset.
    """
    rule = declared_rule(config, option)
    if not writer.append:
        return rule
    recorded = writer.content.get(TIMES)
    if recorded is None or "unit" not in recorded:  # a dataset of an earlier version
        recorded = _stored_times(writer, recorded)
    if recorded is None:
        return rule
    if rule.unit not in (None, recorded["unit"]):
        raise ConfigError(
            f"{writer.out} has times in {recorded['unit']}, which an append does not change; got --time-unit "
            f"{rule.unit} (data.time_unit), leave it out"
        )
    writer.content[TIMES] = recorded
    return TimeRule.of_dataset(recorded)


def record_times(writer: DatasetWriter, rule: TimeRule, columns: Mapping[str, Sequence[Mapping[str, Any]]]) -> TimeRule:
    """Record the unit and the range of the times that were read by `rule`; return the rule of the dataset.

    `columns` has the facts of the parts by column; the name of the first one begins messages. Raises DataError: there
    is no unit that all times have, or they contradict a declared one.
    """
    unit, parts = rule.unit, list[Mapping[str, Any]]()
    first = next(iter(columns))
    for name, facts in columns.items():
        parts += facts
        where = first if name == first else f"{first}, with {name},"
        if rule.unit is None:
            unit = matching_unit(parts, where)
        elif TIMES not in writer.content or "unit" not in writer.content[TIMES]:
            check_declared(parts, rule.unit, where)
    extent = TimeSummary.merged(parts).range
    recorded = writer.content.get(TIMES, {})
    if extent is None:
        return rule
    writer.content[TIMES] = {
        "unit": unit,
        "oldest": min(extent[0], recorded.get("oldest", np.inf)),
        "newest": max(extent[1], recorded.get("newest", -np.inf)),
    }
    return TimeRule.of_dataset(writer.content[TIMES])


def _stored_times(writer: DatasetWriter, counted: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the unit and the range of the times in a dataset that has no record of them; None without times.

    `counted`: the dates that were counted when it was built; None for pairs, of which the cut-off times are read.
    """
    if counted is not None:
        ranges = [(values.min(), values.max()) for values in _times_of_events(writer) if len(values)]
        unit = recorded_unit(counted)
        return {"unit": unit, "oldest": float(np.min(ranges)), "newest": float(np.max(ranges))} if ranges else None
    split = writer.content.get(SPLIT, {})
    given = [split.get(name) for name in ("validation_from", "test_from", "train_from")]
    cut_offs = [time for time in given if time is not None]
    if not cut_offs:
        return None
    groups = np.unique(groups_of(np.array(cut_offs, np.float64)))
    is_recognized = len(groups) == 1 and groups[0] < len(PER_SECOND)
    unit = list(PER_SECOND)[groups[0]] if is_recognized else "s"
    return {"unit": unit, "oldest": float(min(cut_offs)), "newest": float(max(cut_offs))}


def _times_of_events(writer: DatasetWriter) -> Iterator[np.ndarray]:
    """Yield the times of all events, and of all versions of items if they have times."""
    content = writer.content
    for name in content[PARTITIONS]:
        if files := read_partition(writer.out, name).sequence_files:
            for events in EventSlices.in_chunks(MappedTable(files)):
                yield events.column(TIME_COLUMN).values
    if content.get("items") == AS_OF["items"]:
        yield MappedTable([file.path for file in catalogue_files(writer.out, content)]).column(SINCE_COLUMN)
