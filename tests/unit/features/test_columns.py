"""Source columns of every Arrow type as ids, categories, numbers, times and lists: exact, or rejected."""

from __future__ import annotations

import datetime
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import bigdssm
from bigdssm.errors import DataError
from bigdssm.features import Categorical, Numeric, Text, Vector
from bigdssm.features.columns import RowCheck, SourceBatch, ids, numbers, strings, value_lists
from bigdssm.features.times import TimeRule, times

DAY = datetime.date(2020, 1, 2)
MOMENT = datetime.datetime(2020, 1, 2, 3, 4, 5, 250_000)
SECONDS = 1_577_934_245.25
READERS = {
    "ids": lambda check: ids(check, "c"),
    "text": lambda check: strings(check, "c"),
    "lists": lambda check: value_lists(check, "c", " "),
    "numbers": lambda check: numbers(check, "c"),
    "times": lambda check: times(check, "c", TimeRule()).values,
    "category": lambda check: Categorical(name="c").read(check),
    "number": lambda check: Numeric(name="c").read(check),
    "words": lambda check: Text(name="c").read(check),
    "vector": lambda check: Vector(name="c", dim=2).read(check),
}


def check_of(column: Any) -> tuple[RowCheck, list[str]]:
    """Return the check of a table of one column, and the reasons that it reports."""
    column = column if isinstance(column, pa.Array) else pa.array(column)
    said: list[str] = []
    batch = SourceBatch("t", pa.table({"c": column}), np.arange(1, len(column) + 1))
    return RowCheck(batch, lambda file, row, reason, left_out=True: said.append(f"{row}: {reason}")), said


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([2**63, 2**63 + 1, 2**64 - 1], pa.uint64()), [str(2**63), str(2**63 + 1), str(2**64 - 1)]),
        ([2**53, 2**53 + 1, -(2**63)], [str(2**53), str(2**53 + 1), str(-(2**63))]),
        ([1.0, None, 2.0**53 - 1, -0.0], ["1", "", str(2**53 - 1), "0"]),
        ([1.0, 1.5, 2.0], ["1", "1.5", "2"]),
        ([2.0**63, 2.0**64, 1e300, float("inf"), -float("inf")], ["9.223372036854776e+18", "1.8446744073709552e+19",
                                                                    "1e+300", "inf", "-inf"]),
        (pa.array([1.0, 0.1, 7e7], pa.float32()), ["1", "0.1", "70000000"]),
        (pa.array(np.array([1, 0.5], np.float16)), ["1", "0.5"]),
        ([Decimal("7.00"), Decimal("7.50"), Decimal("-0.10"), Decimal("1000.00")], ["7", "7.5", "-0.1", "1000"]),
        (pa.array([Decimal(10**30)], pa.decimal256(40, 0)), ["1" + "0" * 30]),
        (pa.array([Decimal("0E-8"), Decimal("1E-7"), None], pa.decimal128(18, 8)), ["0", "0.0000001", ""]),
        (pa.array([Decimal("1200")], pa.decimal128(10, -2)), ["1200"]),
        *((pa.array([MOMENT, MOMENT.replace(microsecond=0)], pa.timestamp(unit)),
           ["2020-01-02 03:04:05.25", "2020-01-02 03:04:05"]) for unit in ("ms", "us", "ns")),
        (pa.array([MOMENT], pa.timestamp("us", "UTC")), ["2020-01-02 03:04:05.25Z"]),
        (pa.array([MOMENT.time()], pa.time64("ns")), ["03:04:05.25"]),
        ([True, False, None], ["true", "false", ""]),
        ([DAY], ["2020-01-02"]),
        (pa.array([b"ab"], pa.binary(2)), ["ab"]),
        (pa.array([b"a", None], pa.binary_view()), ["a", ""]),
        (pa.array(["a", None], pa.string_view()), ["a", ""]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ["b", "a", "b"]),
        (pa.array([1.0, 2.5]).dictionary_encode(), ["1", "2.5"]),
        (pc.run_end_encode(pa.array([5, 5, 6])), ["5", "5", "6"]),
        (pa.nulls(2), ["", ""]),
        (pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(range(16)), None], pa.binary(16))),
         ["00010203-0405-0607-0809-0a0b0c0d0e0f", ""]),
    ],
)  # fmt: skip
def test_the_text_of_a_value(column: Any, expected: list[str]) -> None:
    check, said = check_of(column)
    assert strings(check, "c").to_pylist() == expected and not said
    for place, text in enumerate(expected):  # also one by one
        assert strings(check_of(check.column("c").slice(place, 1))[0], "c").to_pylist() == [text]


@pytest.mark.parametrize(("kind", "bits"), [(pa.float16(), 11), (pa.float32(), 24), (pa.float64(), 53)])
def test_floats_too_large_for_exact_ids_are_bad_rows(kind: pa.DataType, bits: int) -> None:
    values = np.array([1, 2.0**bits - 1, 2.0**bits, -(2.0**bits), np.inf, 1.5, np.nan], kind.to_pandas_dtype())
    check, said = check_of(pa.array(values))
    assert ids(check, "c").to_pylist()[:2] == ["1", str(2**bits - 1)]
    assert check.good.tolist() == [True, True, False, False, False, True, False]
    assert said[1].endswith(f"beyond 2^{bits}, which stands for several integers; store ids as integers or texts")


def test_large_ids_in_a_frame_stay_apart_or_are_refused(tmp_path: Path) -> None:
    from tests.frames import EVENTS, ITEMS, make

    big = {f"i{i}": 2**63 + i for i in range(20)}
    for kind in (np.uint64, np.float64):
        tables = {
            "interactions": EVENTS.assign(item_id=EVENTS["item_id"].map(big).astype(kind)),
            "items": ITEMS.assign(item_id=ITEMS["item_id"].map(big).astype(kind)),
        }
        if kind is np.uint64:
            report = make(tmp_path, **tables, overwrite=True)
            keys = bigdssm.Dataset.open(report.out).catalogue.keys(np.arange(20))
            assert sorted(keys) == [str(2**63 + i) for i in range(20)]
        else:
            with pytest.raises(DataError, match=r"items= has no usable rows.*store ids as integers or texts"):
                make(tmp_path, **tables, overwrite=True)


@pytest.mark.parametrize(
    ("column", "seconds"),
    [
        ([DAY, None], [18_263 * 86_400.0, np.nan]),
        (pa.array([DAY], pa.date64()), [18_263 * 86_400.0]),
        *((pa.array([MOMENT], pa.timestamp(unit, zone)), [SECONDS])
          for unit in ("ms", "us", "ns") for zone in (None, "UTC")),
        (pa.array([2**31 - 1], pa.int32()).cast(pa.date32()), [(2**31 - 1) * 86_400.0]),
        (pa.array([2**62]).cast(pa.timestamp("s")), [2.0**62]),
        (pa.array([-(2**62)]).cast(pa.timestamp("ns")), [-(2.0**62) / 1e9]),
    ],
)  # fmt: skip
def test_dates_are_numbers_and_times(column: Any, seconds: list[float]) -> None:
    check, said = check_of(column)
    found, unreadable = numbers(check, "c")
    np.testing.assert_allclose(found, seconds, rtol=1e-15)
    assert not unreadable.any()
    np.testing.assert_array_equal(Numeric(name="c").read(check).to_numpy(), found)
    np.testing.assert_array_equal(times(check, "c", TimeRule()).values, found)
    assert said == ["2: c is None, needs a number or an ISO-8601 time"] * (len(seconds) - 1)


@pytest.mark.parametrize(
    ("column", "seconds"),
    [
        ([datetime.time(0, 1, 5)], 65.0),
        (pa.array([65], pa.time32("s")), 65.0),
        (pa.array([65 * 10**9], pa.time64("ns")), 65.0),
        ([datetime.timedelta(minutes=1, seconds=5)], 65.0),
    ],
)
def test_durations_and_times_of_day_are_numbers_and_no_times(column: Any, seconds: float) -> None:
    check, _ = check_of(column)
    assert numbers(check, "c")[0].tolist() == [seconds]
    with pytest.raises(DataError, match=re.escape("'c' holds") + ".*needs dates, timestamps or numbers"):
        times(check, "c", TimeRule())


def test_booleans_are_not_times() -> None:
    with pytest.raises(DataError, match="'c' holds bool, needs dates, timestamps or numbers"):
        times(check_of([True])[0], "c", TimeRule())


KINDS = [
    pa.null(), pa.bool_(), pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.decimal128(5, 2),
    pa.decimal256(50, 2), pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(),
    pa.binary_view(), pa.binary(3), pa.date32(), pa.date64(), pa.timestamp("s"), pa.timestamp("ns", "Asia/Tokyo"),
    pa.time32("s"), pa.time64("ns"), pa.duration("ms"), pa.month_day_nano_interval(), pa.uuid(),
    pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int8(), pa.float64()), pa.list_(pa.int8()),
    pa.list_(pa.string()), pa.list_(pa.float32(), 2), pa.large_list(pa.string()), pa.list_(pa.list_(pa.int8())),
    pa.list_(pa.dictionary(pa.int8(), pa.string())), pa.list_(pa.month_day_nano_interval()),
    pa.list_(pa.struct({"a": pa.int8()})), pa.struct({"a": pa.int8()}), pa.map_(pa.string(), pa.int8()),
    pa.run_end_encoded(pa.int32(), pa.string()),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("reader", READERS)
def test_every_type_is_read_or_refused(kind: pa.DataType, reader: str) -> None:
    for rows in (0, 3):
        check, _ = check_of(pa.nulls(rows, kind))
        try:
            READERS[reader](check)
        except DataError as error:
            assert "'c' holds" in str(error) and "needs" in str(error)


def test_lists_hold_the_same_texts_as_columns() -> None:
    for values in ([1.0, 2.0**63, 0.5], [Decimal("7.00")], pa.array([2**64 - 1], pa.uint64()), [True], [DAY]):
        column = pa.ListArray.from_arrays([0, len(values)], pa.array(values))
        check, _ = check_of(column)
        assert value_lists(check, "c", " ").to_pylist() == [strings(check_of(values)[0], "c").to_pylist()]
    broken = pa.array([[b"a"], [b"\xff"], None]).cast(pa.list_(pa.binary()))
    for column in (
        broken,
        pa.Array.from_buffers(
            pa.list_(pa.string()),
            3,
            broken.buffers()[:2],
            children=[pa.Array.from_buffers(pa.string(), 2, broken.flatten().buffers())],
        ),
    ):
        check, said = check_of(column)
        assert value_lists(check, "c", " ").to_pylist()[0] == ["a"]
        assert check.good.tolist() == [True, False, True] and said == ["2: c has a value of invalid UTF-8"]


@pytest.mark.parametrize("kind", [pa.list_view, pa.large_list_view])
def test_views_of_lists_keep_every_list(kind: Any) -> None:
    check, said = check_of(pa.array([[1.0, 2.0], None, [], [3.0, 4.0]], kind(pa.float64())))
    vectors = Vector(name="c", dim=2).read(check).to_pylist()
    assert vectors[0] == [1, 2] and vectors[3] == [3, 4] and np.isnan([*vectors[1], *vectors[2]]).all() and not said
    check, _ = check_of(pa.array([["a"], ["b", "c"]], kind(pa.string())))
    assert value_lists(check, "c", " ").to_pylist() == [["a"], ["b", "c"]]
