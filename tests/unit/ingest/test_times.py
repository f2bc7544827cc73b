"""The unit of times: declared, or found by one rule over all values; recorded once, and never changed by an append."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import bigdssm
from bigdssm.config import DataConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Categorical, History
from bigdssm.features.times import END_DATE, FIRST_DATE, PER_SECOND, TimeRule, groups_of, matching_unit
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestReport, IngestTarget
from bigdssm.ingest.pairs import ItemTables, PairTables, make_items, make_pairs
from bigdssm.retrieval.queries import Queries
from bigdssm.retrieval.request import Event, Request

S_1997, MS_2026 = 860_000_000, 1_770_000_000_000
CONFIG = DataConfig(dir="", query={"past": History(of="item")}, doc={"item": Categorical(column="item_id")})
PAIRS = DataConfig(dir="", query={"q": Categorical()}, doc={"d": Categorical()}, max_bad_fraction=0.1)


def make(folder: Path, times: Sequence[Any], partition: str | None = None, user: str = "u", **options: Any) -> Dataset:
    """Build a dataset of one event per time, of users with ten events each, or append to it."""
    events = pd.DataFrame({
        "user_id": [f"{user}{number // 10}" for number in range(len(times))],
        "item_id": [f"i{number % 7}" for number in range(len(times))],
        "timestamp": times,
    })  # fmt: skip
    events.to_parquet(folder / "events.parquet")
    pd.DataFrame({"item_id": [f"i{number}" for number in range(7)]}).to_parquet(folder / "items.parquet")
    config = options.pop("config", CONFIG)
    tables = InteractionTables(folder / "events.parquet", folder / "items.parquet", **{"split": "train", **options})
    target = IngestTarget(folder / "out", partition or "base", append=partition is not None, processes=1)
    make_interactions(config, tables, target)
    return Dataset.open(folder / "out")


def recorded(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "out/dataset.json").read_text())["times"])


def without_record(folder: Path, num_times: int, units: list[list[float]]) -> None:
    """Give dataset.json the counts of earlier versions: dates of 2000 to 2100 by power of ten."""
    path = folder / "out/dataset.json"
    content = json.loads(path.read_text())
    content["times"] = {"num_times": num_times, "units": units}
    path.write_text(json.dumps(content))


def test_the_ranges_of_units_are_disjoint() -> None:
    assert END_DATE < 1000 * FIRST_DATE
    days = np.array([FIRST_DATE // 86_400, END_DATE // 86_400 - 1])
    for unit, per_second in PER_SECOND.items():
        dates = np.array([FIRST_DATE, END_DATE - 1], np.float64) * per_second
        assert groups_of(dates).tolist() == [list(PER_SECOND).index(unit)] * 2
        assert groups_of(np.nextafter(dates, [-np.inf, np.inf])).tolist()[0] != groups_of(dates).tolist()[0]
        others = [TimeRule.recognized(other) for other in PER_SECOND if other != unit]
        assert not any(rule.accepts(dates).any() for rule in others)
    assert not set(groups_of(days)) & set(range(len(PER_SECOND)))


@pytest.mark.parametrize(("unit", "per_second"), PER_SECOND.items())
@pytest.mark.parametrize("second", [FIRST_DATE, S_1997, END_DATE - 1000])
def test_the_unit_is_that_of_all_values(tmp_path: Path, unit: str, per_second: int, second: int) -> None:
    dataset = make(tmp_path, [(second + number) * per_second for number in range(20)])
    assert recorded(tmp_path)["unit"] == unit and dataset.header.time_unit == 1 / per_second


@pytest.mark.parametrize(
    ("times", "sentence"),
    [
        (
            [S_1997] * 5000 + [MS_2026] * 2,
            r"mixes units of time: 5000 in s, such as 860000000 .*; 2 in ms, such as 177",
        ),
        ([S_1997 * 1000] * 30 + [5], r"30 in ms, .*; 1 near 0, such as 5 \(events.parquet, row 31\); give the unit by"),
        (
            list(range(30)),
            r"times of unknown unit: 30 near 0, such as 0 .*; give the unit by --time-unit s, ms, us or ns",
        ),
        (list(range(20_000, 20_030)), r"30 day numbers, such as 20000 .* times 86,400 for day numbers"),
        ([10_000_000_000] * 30, r"30 outside 1975 to 2100 in each unit, such as 10000000000"),
    ],
)
def test_an_unknown_unit_is_requested(tmp_path: Path, times: list[int], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        make(tmp_path, times)
    assert not (tmp_path / "out").exists()


def test_one_decision_over_all_parts() -> None:
    """A part of its own has the two values in another unit."""
    parts = [
        {"groups": {"s": [40, float(S_1997), "a.csv", 1]}, "range": [S_1997, S_1997]},
        {"groups": {"ms": [2, float(MS_2026), "b.csv", 7]}, "range": [MS_2026, MS_2026]},
    ]
    for ordered in (parts, parts[::-1]):
        with pytest.raises(
            DataError, match=r"mixes units of time: 40 in s, .*\(a.csv, row 1\); 2 in ms, .*\(b.csv, row 7"
        ):
            matching_unit(ordered, "events")


@pytest.mark.parametrize("how", ["option", "config"])
def test_a_declared_unit(tmp_path: Path, how: str) -> None:
    given = {"time_unit": "ms"} if how == "option" else {"config": DataConfig(**{**vars(CONFIG), "time_unit": "ms"})}
    dataset = make(tmp_path, list(range(0, 20_000, 1000)), **given)  # near 0
    assert recorded(tmp_path) == {"unit": "ms", "oldest": 0, "newest": 19_000}
    assert dataset.header.time_unit == 0.001


def test_values_that_contradict_a_declared_unit(tmp_path: Path) -> None:
    bad = (
        r"30 × timestamp is … needs a time of … to … in s; the first is .* row 1: .* needs a time of 1900 to 2100 in s"
    )
    with pytest.raises(DataError, match=bad):
        make(tmp_path, [MS_2026] * 30, time_unit="s")
    for seconds, sentence in (([S_1997] * 30, "30 in s"), ([S_1997] * 2 + [MS_2026] * 30, "30 in ms, .*; 2 in s")):
        with pytest.raises(DataError, match=rf"another unit than --time-unit ms \(data.time_unit\): {sentence}"):
            make(tmp_path, seconds, time_unit="ms")
    with pytest.raises(ConfigError, match="--time-unit ms needs a --time-column"):
        make(tmp_path, [MS_2026] * 30, time_unit="ms", time_column=None)


@pytest.mark.parametrize("unit", ["ms", "us", "ns", "s"])
def test_dates_have_the_unit_of_their_type(tmp_path: Path, unit: str) -> None:
    dates = pd.date_range("1960-03-01 12:00:00.5", periods=20).astype(f"datetime64[{'ms' if unit == 's' else unit}]")
    seconds = [date.timestamp() for date in dates]
    dataset = make(tmp_path, dates)
    assert dataset.header.time_unit == 1 and recorded(tmp_path)["oldest"] == seconds[0]
    for times in (dates, dates.astype(str)):
        (folder := tmp_path / times.dtype.name.replace("[", "_")).mkdir(exist_ok=True)
        make(folder, times, time_unit=unit)
        assert recorded(folder)["newest"] == seconds[-1] * PER_SECOND[unit]  # type: ignore[index]


def test_an_append_has_the_unit_of_the_dataset(tmp_path: Path) -> None:
    make(tmp_path, [S_1997 + number for number in range(20)])
    with pytest.raises(DataError, match=r"2 × timestamp is … needs a time of … to … in s;"):
        make(tmp_path, [MS_2026, MS_2026], "day1", user="v")
    with pytest.raises(ConfigError, match="has times in s, which an append does not change; got --time-unit ms"):
        make(tmp_path, [MS_2026, MS_2026], "day1", user="v", time_unit="ms")
    lenient = DataConfig(**{**vars(CONFIG), "max_bad_fraction": 0.5})
    dataset = make(tmp_path, [S_1997] * 9 + [MS_2026], "day1", user="v", config=lenient)
    assert dataset.header.time_unit == 1
    assert recorded(tmp_path) == {"unit": "s", "oldest": S_1997, "newest": S_1997 + 19}
    make(tmp_path, pd.date_range("1998-01-01", periods=9), "day2", user="w")
    assert recorded(tmp_path)["unit"] == "s"


@pytest.mark.parametrize(
    ("factor", "units", "unit", "bad"),
    [
        (1, [], "s", MS_2026),  # of 1997, which was not recognized
        (1000, [], "s", S_1997),  # ms of 1997 were read as seconds
        (2000, [[3, 20, 1.72e12]], "ms", S_1997),
        (2, [[0, 18, 1.72e9], [3, 2, 1.72e12]], "s", MS_2026),
    ],
)
def test_datasets_without_a_record_keep_their_unit(
    tmp_path: Path, factor: int, units: list[list[float]], unit: str, bad: int
) -> None:
    times = [(S_1997 + number) * factor for number in range(20)]
    make(tmp_path, times)
    without_record(tmp_path, 20, units)
    assert Dataset.open(tmp_path / "out").header.time_unit == 1 / PER_SECOND[unit]  # type: ignore[index]
    for start, partition in ((times[-1] + factor, "day1"), (times[-1] + 99 * factor, "day2")):
        dataset = make(tmp_path, [start + number * factor for number in range(9)], partition)
        assert recorded(tmp_path) == {"unit": unit, "oldest": times[0], "newest": start + 8 * factor}
        assert dataset.header.time_unit == 1 / PER_SECOND[unit]  # type: ignore[index]
    if factor != 1000:  # their times are no dates in their unit, so that none is refused
        with pytest.raises(DataError, match=rf"2 × timestamp is … needs a time of … to … in {unit}"):
            make(tmp_path, [bad, bad], "day3", user="v")


def test_versions_of_items_have_the_unit_of_the_dataset(tmp_path: Path) -> None:
    times = [S_1997 + number for number in range(20)]
    items = pd.DataFrame({"item_id": [f"i{number}" for number in range(7)], "updated": S_1997})
    config = tmp_path / "config.yaml"
    config.write_text(
        f"run: {{dir: {tmp_path}/run}}\ndata: {{dir: {tmp_path}/out, query: {{past: {{type: history, of: item_id}}}}, "
        "doc: {item_id: {type: categorical}, price: {type: numeric}}}\n"
    )
    events = pd.DataFrame({"user_id": ["u", "v"] * 10, "item_id": ["i0", "i1"] * 10, "timestamp": times})
    bigdssm.make_dataset(
        config, interactions=events, items=items.assign(price=1.0), items_time_column="updated", split="train"
    )
    later = items.assign(price=2.0)
    more = {"append": True, "items_time_column": "updated"}
    with pytest.raises(DataError, match=r"7 × updated is … needs a time of … to … in s"):
        bigdssm.make_dataset(config, items=later.assign(updated=MS_2026), partition="a", **more)
    with pytest.raises(ConfigError, match="has times in s, which an append does not change"):
        bigdssm.make_dataset(config, items=later.assign(updated=MS_2026), partition="a", time_unit="ms", **more)
    assert bigdssm.make_dataset(config, items=later.assign(updated=S_1997 + 9), partition="a", **more).changed_docs == 7


def pairs(folder: Path, times: Sequence[float], partition: str | None = None, **options: Any) -> IngestReport:
    rows = pd.DataFrame({"q": [f"q{n}" for n in range(len(times))], "d": [f"d{n % 5}" for n in range(len(times))]})
    rows.assign(time=times).to_parquet(folder / "pairs.parquet")
    target = IngestTarget(folder / "out", partition or "base", append=partition is not None, processes=1)
    tables = PairTables((folder / "pairs.parquet",), split_column="time", **options)
    return make_pairs(PAIRS, tables, target)


@pytest.mark.parametrize("has_record", [True, False])
def test_a_split_of_pairs_by_time_has_one_unit(tmp_path: Path, has_record: bool) -> None:
    times = [S_1997 * 1000 + 1000 * number for number in range(100)]
    pairs(tmp_path, times, split="time")
    assert recorded(tmp_path)["unit"] == "ms"
    if not has_record:
        path = tmp_path / "out/dataset.json"
        content = json.loads(path.read_text())
        del content["times"]
        path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="20 × time is … needs a time of … to … in ms"):
        pairs(tmp_path, [S_1997] * 20, "day1")
    assert pairs(tmp_path, [times[-1] + number for number in range(1, 9)], "day1").rows == {"train": 8}
    assert recorded(tmp_path)["unit"] == "ms"


def test_a_unit_without_times_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--time-unit s has no effect without --split time"):
        pairs(tmp_path, [S_1997] * 20, split="column", time_unit="s")
    tables = ItemTables(tmp_path / "pairs.parquet", time_unit="s")
    with pytest.raises(ConfigError, match="--time-unit s needs --items-time-column"):
        make_items(PAIRS, tables, IngestTarget(tmp_path / "out", "day1", append=True))


def test_cut_off_times_are_in_the_unit_of_the_column(tmp_path: Path) -> None:
    start = 1_577_836_800  # 2020
    times = [(start + 86_400 * number) * 1000 for number in range(100)]
    cut_offs = {"split": "time", "validation_from": "2020-02-01", "test_from": "2020-03-01"}
    with pytest.raises(DataError, match=r"2020-03-01, mixes units of time: the column is in ms; with --time-unit ms"):
        make(tmp_path, times, **cut_offs)
    numbers = {"split": "time", "validation_from": start + 86_400, "test_from": start + 2 * 86_400}
    with pytest.raises(
        DataError, match=r"mixes units of time: 1577923200 is given, needs a time of 1975 to 2100 in ms"
    ):
        pairs(tmp_path, times, **numbers)
    make(tmp_path, times, time_unit="ms", until="2020-04-01", **cut_offs)
    split = json.loads((tmp_path / "out/dataset.json").read_text())["split"]
    days = [split[name] / 86_400_000 - start / 86_400 for name in ("validation_from", "test_from", "train_from")]
    assert days == [31, 60, 91]


@pytest.mark.parametrize("unit", ["s", "ms"])
def test_requests_have_the_unit_of_the_dataset(tmp_path: Path, unit: str) -> None:
    per_second = PER_SECOND[unit]  # type: ignore[index]
    dataset = make(tmp_path, [(S_1997 + number) * per_second for number in range(20)])
    queries = Queries(dataset.schema, None, dataset, exclude_seen=True)
    now = (S_1997 + 30) * per_second
    assert len(queries.of(Request(user="u1", now=now, events=[Event("i3", time=now)])).seen) == 11
    for factor in (1 / 1000, 1000, 0):
        with pytest.raises(ConfigError, match=rf"now is .*, needs a time of 1975 to 2100 in {unit}, as the events of"):
            queries.of(Request(user="u1", now=now * factor))
        with pytest.raises(ConfigError, match=rf"time of an event is .*, needs a time of 1975 to 2100 in {unit}"):
            queries.of(Request(user="u1", events=[Event("i3", time=now * factor)]))
