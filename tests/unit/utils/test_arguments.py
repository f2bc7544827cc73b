"""Validation of the arguments of the Python API: choices, numbers, flags and paths, as on the command line."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import bigdssm
from bigdssm.errors import BigDSSMError, ConfigError, DataError
from tests.frames import EVENTS, ITEMS, make

PAIRS = pd.DataFrame({"word": [f"w{i % 9}" for i in range(80)], "title": [f"t{i % 20}" for i in range(80)]})


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"split": "leave_one_out"}, "split='leave_one_out': needs one of 'leave-one-out', 'time', 'train'; did you"),
        ({"split": "Time"}, "did you mean 'time'?"),
        ({"split": 5}, "split=5: needs one of"),
        ({"split": "random"}, "split='random': needs one of"),
        ({"pairs": PAIRS, "split": "leave-one-out"}, "needs one of 'random', 'time', 'column', 'train'"),
        ({"pairs": PAIRS, "dedup": "no"}, "dedup='no': needs True or False"),
        ({"pairs": PAIRS, "raw_text": 0}, "raw_text=0: needs True or False"),
        ({"pairs": PAIRS, "beir": 5}, "beir=5: needs a path"),
        ({"pairs": []}, "pairs=[]: needs at least one table"),
        ({"pairs": [PAIRS, 5]}, "pairs[1]=5: needs the path or URL of a table"),
        ({"interactions": 5}, "interactions=5: needs the path or URL of a table"),
        ({"interactions": EVENTS["user_id"]}, "needs the path or URL of a table"),
        ({"interactions": EVENTS.to_numpy()}, "needs the path or URL of a table"),
        ({"engine": "Spark"}, "engine='Spark': needs one of 'built-in', 'spark'; did you mean 'spark'?"),
        ({"seed": 1.5}, "seed=1.5: needs a whole number"),
        ({"seed": "x"}, "seed='x': needs a whole number"),
        ({"processes": True}, "processes=True: needs a whole number"),
        ({"overwrite": "no"}, "overwrite='no': needs True or False"),
        ({"append": np.int64(0)}, "needs True or False"),
        ({"out": b"x"}, "out=b'x': needs a path"),
        ({"out": ""}, "out='': needs a path"),
        ({"out": "a\0b"}, "out='a\\x00b': needs a path"),
        ({"like": 5}, "like=5: needs a path"),
        ({"partition": 5}, "partition=5: needs a text"),
        ({"user_column": None}, "user_column=None: needs a text"),
        ({"item_column": ""}, "--item-column is '', needs the name of a column"),
        ({"rating_column": "timestamp", "min_rating": "3"}, "min_rating='3': needs a number"),
        ({"split": "time", "validation_fraction": "0.1"}, "validation_fraction='0.1': needs a number"),
        ({"split": "time", "validation_from": [1], "test_from": 2}, "validation_from=[1]: needs a number or"),
        ({"split": "time", "validation_from": pd.NaT, "test_from": 2}, "--validation-from NaT is neither a number"),
        ({"spark_conf": {"a": 5}}, "spark_conf['a']=5: needs a text"),
        ({"progress": 5}, "progress=5: needs a function"),
    ],
)
def test_arguments_of_make_dataset(tmp_path: Path, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        make(tmp_path, **arguments)
    assert not (tmp_path / "data").exists(), "a refused call leaves no files"


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda d: bigdssm.make_dataset({"data": {}}, pairs=PAIRS), "config={'data': {}}: needs a Config or a path"),
        (lambda d: bigdssm.make_dataset(d, "run.seed=1", pairs=PAIRS), "overrides='run.seed=1': needs a list, each"),
        (lambda d: bigdssm.load_config(d, [5]), "overrides[0]=5: needs a text"),
        (lambda d: bigdssm.load_config(None), "path=None: needs a path"),
        (lambda d: bigdssm.pretrain(d, resume="auto"), "resume='auto': needs True or False"),
        (lambda d: bigdssm.sft(5), "config=5: needs a Config or a path"),
        (lambda d: bigdssm.load_model(5), "folder=5: needs a path"),
        (lambda d: bigdssm.from_pretrained(5), "repo_id=5: needs a text"),
        (lambda d: bigdssm.push_to_hub(d, "a/b", private="no"), "private='no': needs True or False"),
        (lambda d: bigdssm.open_index(d, "model"), "model='model': needs a Model"),
        (lambda d: bigdssm.Dataset.open(d, partitions="base"), "partitions='base': needs a list, each element a text"),
        (lambda d: bigdssm.Searcher.open(d, d, threads="2"), "threads='2': needs a whole number"),
        (lambda d: bigdssm.Searcher.open(d, d, rerank=2.0), "rerank=2.0: needs a whole number"),
    ],
)
def test_arguments_of_the_other_functions(tmp_path: Path, call: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        call(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"interactions": EVENTS.to_dict("list"), "items": {"item_id": np.array(ITEMS["item_id"])}},
        {"interactions": EVENTS.to_dict("records"), "items": {"item_id": ITEMS["item_id"].astype("category")}},
        {"interactions": EVENTS.convert_dtypes(), "items": pa.table(ITEMS).to_batches()[0]},
        {"interactions": pa.table(EVENTS).to_reader(), "items": {"item_id": pa.array(ITEMS["item_id"])}},
        {"interactions": EVENTS.set_index(EVENTS.index + 5), "seed": np.int64(0), "overwrite": np.True_},
    ],
    ids=["columns", "dicts", "nullable", "reader", "scalars"],
)
def test_python_argument_types_build_the_same_dataset(tmp_path: Path, arguments: dict[str, Any]) -> None:
    expected = bigdssm.Dataset.open(make(tmp_path, out=tmp_path / "first").out).fingerprint
    assert bigdssm.Dataset.open(make(tmp_path, out=str(tmp_path / "second"), **arguments).out).fingerprint == expected


def test_times_of_a_split_as_programs_have_them(tmp_path: Path) -> None:
    times = [1_500_000_060, pd.Timestamp(1_500_000_060, unit="s"), np.datetime64(1_500_000_060, "s"),
               datetime.datetime.fromtimestamp(1_500_000_060, datetime.timezone.utc)]  # fmt: skip
    rows = [make(tmp_path, out=tmp_path / str(n), split="time", validation_from=time, test_from=1_500_000_070).rows
            for n, time in enumerate(times)]  # fmt: skip
    assert rows == [rows[0]] * 4 and rows[0]["validation"] == 10


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        (
            {"interactions": EVENTS.drop(columns="item_id")},
            "interactions= has no column 'item_id', which --item-column names",
        ),
        ({"items": ITEMS.rename(columns={"item_id": "item"})}, "--item-column names; did you mean 'item'?"),
        ({"pairs": PAIRS, "doc_id_column": "titel"}, "'titel', which --doc-id-column names; did you mean 'title'?"),
        ({"pairs": PAIRS, "split_column": "x"}, "'x', which --group-column names; it has 'word', 'title'"),
        ({"pairs": PAIRS, "split": "time", "split_column": "x"}, "'x', which --time-column names"),
        ({"pairs": PAIRS, "each_of": "x"}, "'x', which --each-of names"),
        ({"interactions": EVENTS[:0]}, "interactions= has no usable rows"),
        ({"items": ITEMS.assign(a=[object()] * 20)}, "items= cannot be read: the table cannot be read: "),
        ({"items": {"item_id": "i1"}}, "items= cannot be read: item_id: got str, needs a list of values"),
        ({"items": {"item_id": 5}}, "items= cannot be read: item_id: got int, needs a list of values"),
        ({"items": {"item_id": [1, "a"]}}, "items= cannot be read: item_id: values of one feature need one type"),
        ({"items": [{"item_id": "i1"}, 5]}, "items= cannot be read: got rows of int"),
        ({"interactions": EVENTS.assign(timestamp="x")}, "the first is interactions=, row 1: timestamp is 'x'"),
        (
            {"pairs": [PAIRS, PAIRS.drop(columns="word")]},
            "pairs[1]= has no column 'word', which data.query.word names; it has 'title'",
        ),
    ],
)
def test_errors_name_the_argument_and_the_column(tmp_path: Path, tables: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=re.escape(sentence)) as caught:
        make(tmp_path, **tables)
    assert isinstance(caught.value, BigDSSMError) and ".parquet" not in str(caught.value)
