"""Accepted row types: pandas, NumPy, Arrow, polars and Python values are read exactly or rejected with a message."""

from __future__ import annotations

import datetime
import re
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from bigdssm.errors import DataError
from bigdssm.features import Categorical, History, Numeric, Ragged, Vector
from bigdssm.features.canonical import columns_of_values

FEATURES = {
    "c": Categorical(name="c", hash_buckets=10**6), "n": Numeric(name="n"), "v": Vector(name="v", dim=2),
    "m": Categorical(name="m", multi=True, hash_buckets=10**6),
}  # fmt: skip


def read(rows: Any) -> dict[str, Any]:
    """Return the encoded columns as lists."""
    found, _ = columns_of_values(rows, FEATURES, FEATURES, None)
    lists = {name: column.values if isinstance(column, Ragged) else column for name, column in found.items()}
    return {name: np.asarray(column).tolist() for name, column in lists.items()}


@pytest.mark.parametrize(
    ("rows", "same"),
    [
        ([{"c": "a", "n": float("nan")}, {"c": float("nan"), "n": 1}], [{"c": "a"}, {"n": 1.0}]),
        ([{"c": pd.NA, "n": pd.NA}, {"c": "a", "n": 1}], [{}, {"c": "a", "n": 1.0}]),
        (pd.DataFrame({"n": pd.array([1, None], "Int64"), "c": pd.array(["a", None], "string")}),
         [{"c": "a", "n": 1}, {}]),
        (pd.DataFrame({"c": pd.Categorical(["a", None])}), [{"c": "a"}, {}]),
        (pd.Series([{"c": "a"}]), [{"c": "a"}]),
        (({"c": x} for x in "ab"), [{"c": "a"}, {"c": "b"}]),
        ([{"c": 2**63}, {"c": 2**63 + 1}], [{"c": str(2**63)}, {"c": str(2**63 + 1)}]),
        ([{"c": np.uint64(2**63)}, {"c": 7}], [{"c": str(2**63)}, {"c": "7"}]),
        ([{"c": Decimal("7.00"), "n": Decimal("1.5")}], [{"c": "7", "n": 1.5}]),
        ([{"n": np.float32(1)}, {"n": 2}, {"n": np.int64(3)}], [{"n": 1.0}, {"n": 2.0}, {"n": 3.0}]),
        ([{"n": "5"}], [{"n": 5.0}]),
        *(([{"n": day}], [{"n": 1577923200.0}]) for day in (
            datetime.date(2020, 1, 2), pd.Timestamp("2020-01-02"), np.datetime64("2020-01-02"))),
        ([{"v": torch.tensor([1.0, 2.0])}], [{"v": [1.0, 2.0]}]),
        ([{"v": np.array([1, 2])}], [{"v": [1.0, 2.0]}]),
        ([{"m": ("a", "b")}], [{"m": "a b"}]),
        ([{"m": np.array(["a", "b"])}], [{"m": "a b"}]),
        (pa.table({"c": ["a"]}).to_reader(), [{"c": "a"}]),
        (pa.record_batch({"c": ["a"]}), [{"c": "a"}]),
        (pa.table({"m": pa.array([["a", "b"]], pa.list_(pa.string(), 2))}), [{"m": "a b"}]),
        (pa.table({"m": pa.array([["a"]], pa.large_list(pa.large_string()))}), [{"m": "a"}]),
        (pd.DataFrame({"c": [], "n": []}), []),
    ],
)  # fmt: skip
def test_rows_that_programs_give(rows: Any, same: list[dict[str, Any]]) -> None:
    found, expected = read(rows), read(same)
    for name, column in expected.items():
        np.testing.assert_array_equal(np.array(found[name], float), np.array(column, float))


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ({"c": "a"}, "got dict, needs a list of rows; put a single one into a list"),
        ("abc", "got str, needs a list of rows"),
        (5, "got int, needs a list of rows"),
        (None, "got NoneType, needs a list of rows"),
        (np.zeros((2, 2)), "got rows of ndarray; give dicts"),
        ([{"c": "\ud800"}], "c: values of one feature need one type"),
        ([{"c": 2**64}], "c: values of one feature need one type"),
        ([{"n": 1j}], "n: values of one feature need one type"),
        ([{"x": 1}], "'x' is not a feature; the features are c, n, v, m"),
        (pd.DataFrame([[1, 2]], columns=["n", "n"]), "Duplicate column names"),
        (pd.DataFrame({"n": pd.arrays.SparseArray([0.0, 1.0])}), "column n"),
        (pd.DataFrame({"c": pd.period_range("2020", periods=2, freq="D")}), "column 'c' holds"),
        (pd.DataFrame({"n": pd.period_range("2020", periods=2, freq="D")}), "column 'n' holds"),
    ],
)
def test_rows_that_are_refused(rows: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=re.escape(sentence)):
        read(rows)


@pytest.mark.parametrize(("buckets", "code_type"), [(2**31 - 3, np.int32), (2**31 - 2, np.int64), (2**62, np.int64)])
def test_codes_are_as_wide_as_their_number(buckets: int, code_type: type) -> None:
    """Of a value, of several, of a history, and of a probe; datasets of up to 2**31 - 3 buckets keep their bytes."""
    one, many = (Categorical(name=name, multi=name == "m", hash_buckets=buckets) for name in "cm")
    features: dict[str, Any] = {"c": one, "m": many, "h": History(name="h", of="c")}
    given = [{"c": "a", "m": "a b", "h": ["a", "b"]}, {"c": "b", "m": "", "h": []}]
    found, _ = columns_of_values(given, features, features, None)
    a, b = np.asarray(found["c"]).tolist()
    assert np.asarray(found["c"]).dtype == code_type and min(a, b) > 2**16
    for column in (found["m"], found["h"]):
        assert isinstance(column, Ragged) and column.values.dtype == code_type and column.values.tolist() == [a, b]
    for feature in features.values():
        probe = feature.probe(np.random.RandomState(0), 9, features)
        assert (probe.values if isinstance(probe, Ragged) else probe).dtype == code_type
    width = 8 * np.dtype(code_type).itemsize
    assert [str(feature.arrow_type()) for feature in (one, many)] == [f"int{width}", f"list<item: int{width}>"]
