"""Tables of every format are read completely, with row numbers, and every unreadable line is reported."""

import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigdssm.errors import DataError
from bigdssm.features import Numeric, Vector
from bigdssm.features.columns import RowCheck, SourceBatch, relevances, strings, value_lists
from bigdssm.features.times import TimeRule, times
from bigdssm.sources.beir import read_collection, texts_and_metadata
from bigdssm.sources.opening import read_table
from bigdssm.sources.text import record_batch

ROWS = [{"id": f"{i:03d}", "title": f'a "{i}" b', "year": i} for i in range(5)]


class Bad:
    """Collects reported bad rows."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, bool]] = []

    def __call__(self, file: str, row: int, reason: str, left_out: bool = True) -> None:
        self.seen.append((row, reason, left_out))


def read(path: Path, *columns: str, bad: Bad | None = None) -> tuple[list[dict[str, object]], list[int]]:
    rows: list[dict[str, object]] = []
    numbers: list[int] = []
    for batch in read_table(path, columns, bad or Bad()):
        rows += batch.table.to_pylist()
        numbers += batch.rows.tolist()
    return rows, numbers


def written(folder: Path, suffix: str) -> Path:
    path = folder / f"table{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
        return path
    if "jsonl" in suffix:
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
    elif "csv" in suffix:
        text = "id,title,year\n" + "".join(f'{r["id"]},"a ""{r["year"]}"" b",{r["year"]}\n' for r in ROWS)
    else:
        text = "id:token\ttitle:token_seq\tyear:float\n" + "".join(
            f"{r['id']}\t{r['title']}\t{r['year']}\n" for r in ROWS
        )
    return compressed(path, text.encode())


@pytest.mark.parametrize(
    "suffix", [".csv", ".csv.xz", ".tsv", ".inter", ".tsv.gz", ".jsonl", ".jsonl.xz", ".jsonl.zst", ".parquet"]
)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows, numbers = read(written(tmp_path, suffix), "title", "id", "year")
    assert [row["title"] for row in rows] == [row["title"] for row in ROWS]
    assert [row["id"] for row in rows] == ["000", "001", "002", "003", "004"], "ids keep their leading zeros"
    assert [str(row["year"]) for row in rows] == ["0", "1", "2", "3", "4"]
    assert numbers == [1, 2, 3, 4, 5]


def test_broken_lines_are_named_and_the_others_keep_their_numbers(tmp_path: Path) -> None:
    table = tmp_path / "t.tsv"
    table.write_bytes(b"a\tb\n1\t2\n3\n4\t\xff5\n6\t7\t8\n9\t10\n")
    bad = Bad()
    rows, numbers = read(table, "a", "b", bad=bad)
    assert rows == [{"a": "1", "b": "2"}, {"a": "9", "b": "10"}] and numbers == [1, 5]
    assert sorted(bad.seen) == [
        (2, "has 1 fields, the header has 2", True),
        (3, "invalid UTF-8 in column 'b'", True),
        (4, "has 3 fields, the header has 2", True),
    ]
    lines = tmp_path / "t.jsonl"
    lines.write_bytes(b'{"a": 1}\nnonsense\n[1]\n{"a": "\xff"}\n\n{"a": "x"}\n')
    bad = Bad()
    rows, numbers = read(lines, "a", bad=bad)
    assert rows == [{"a": "1"}, {"a": "x"}] and numbers == [1, 5], "empty lines are not rows, as in a CSV"
    assert [row for row, _, _ in bad.seen] == [2, 3, 4]


def test_row_numbers_stay_right_over_many_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigdssm.sources.text.BYTES_PER_BATCH", 1000)
    table = tmp_path / "t.csv"
    broken = {7, 8, 500, 999}
    table.write_text("a,b\n" + "".join(f"{i}\n" if i in broken else f"{i},x\n" for i in range(1, 1001)))
    bad = Bad()
    rows, numbers = read(table, "a", bad=bad)
    assert [int(str(row["a"])) for row in rows] == numbers == [i for i in range(1, 1001) if i not in broken]
    assert {row for row, _, _ in bad.seen} == broken


def compressed(path: Path, content: bytes) -> Path:
    """Write a table, compressed by the suffix of its path."""
    zstd = pa.Codec("zstd")
    by_suffix = {
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".zst": lambda content: zstd.compress(content, asbytes=True),
    }
    path.write_bytes(by_suffix.get(path.suffix, bytes)(content))
    return path


OPEN_QUOTES = {  # lines by number, of 1,000 lines, and the line with the open quote
    "alone": ({12: b'11,"eleven'}, 12),
    "at the end": ({1000: b'999,"'}, 1000),
    "before a quoted field": ({12: b'11,"eleven', 500: b'499,"sound"'}, 12),
    "before quoted fields with quotes": ({12: b'11,"eleven', 500: b'499,"a ""b"" c"', 600: b'599,"x"'}, 12),
    "after fields of several lines": ({3: b'2,"a\n""b"",\n"', 900: b'"8\n99","x'}, 903),
    "in the header": ({1: b'id,"title'}, 1),
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("case", OPEN_QUOTES)
def test_an_open_quote_is_an_error_with_its_line(tmp_path: Path, case: str, suffix: str) -> None:
    changes, line = OPEN_QUOTES[case]
    lines = {1: b"id,title", **{number: b"%d,title" % number for number in range(2, 1001)}, **changes}
    table = compressed(tmp_path / f"t.csv{suffix}", b"\n".join(lines.values()))
    for column in ("id", "title"):
        with pytest.raises(DataError, match=rf"t\.csv.*: the quote that opens a field in line {line} is not closed"):
            read(table, column)


def test_the_line_of_an_open_quote_counts_all_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigdssm.sources.text.BYTES_PER_BATCH", 1000)
    table = tmp_path / "t.csv"
    lines = [*(f"{i},x" for i in range(800)), '800,"x', *(f'{i},"x"' for i in range(801, 9999))]
    table.write_text("\n".join(["a,b", *lines]))
    with pytest.raises(DataError, match="in line 802 is not closed"):
        read(table, "a")


@pytest.mark.parametrize("block_bytes", [500, 501, 4096, 1 << 20])
def test_quoted_fields_are_those_of_pythons_csv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    """Fields of several lines, with quotes and delimiters, at any offset within a block."""
    monkeypatch.setattr("bigdssm.sources.text.BYTES_PER_BATCH", block_bytes)
    random = np.random.RandomState(block_bytes)
    fields = ["".join(random.choice(list('ab",\r\n '), random.randint(12))) for _ in range(2000)]
    fields = [field.replace("\r\n", "\n") for field in fields]  # which Arrow reads as \r at the end of a block
    expected = [{"a": f"{i}", "b": fields[i], "c": fields[-i]} for i in range(1000)]
    with (tmp_path / "t.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, "abc", quoting=csv.QUOTE_ALL if block_bytes == 501 else csv.QUOTE_MINIMAL)
        writer.writeheader()
        writer.writerows(expected)
    assert read(tmp_path / "t.csv", "a", "b", "c")[0] == expected
    loose = '1,12" disk,x\n2,"12"" disk" new,"a" b "c"\n3,a"b,"c\n"'  # as Python's csv and Arrow read them
    (tmp_path / "t.csv").write_text("a,b,c\n" + loose)
    assert [[*row.values()] for row in read(tmp_path / "t.csv", "a", "b", "c")[0]] == list(
        csv.reader(io.StringIO(loose))
    )


def test_json_of_too_many_levels_is_a_bad_row(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    for levels, good in ((500, True), (501, False), (100_000, False)):
        bad = Bad()
        table.write_text('{"a": 1}\n{"a": ' + "[" * (levels - 1) + "]" * (levels - 1) + "}\n")
        rows, _ = read(table, "a", bad=bad)
        assert len(rows) == 1 + good
        assert good or bad.seen == [(2, "not a JSON object: an object with more than 500 levels", True)]


def test_metadata_of_a_collection_may_have_mixed_types_and_limited_levels(tmp_path: Path) -> None:
    values: list[object] = [1, "x", None, 10**30, True, 2.5, [1], {"a": 1}]
    corpus = [json.dumps({"_id": f"d{i}", "text": "t", "metadata": {"m": value}}) for i, value in enumerate(values)]
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td0\t1\n")
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "t"}\n')
    (tmp_path / "corpus.jsonl").write_text("\n".join(corpus))
    entries, numeric = read_collection(tmp_path, "test").corpus, Numeric().with_name("m")
    table = texts_and_metadata({"m": numeric}, entries)
    assert table["m"].to_pylist() == ["1", "x", None, f"{10**30}", "true", "2.5", "[1]", '{"a": 1}']
    read_values = numeric.read(RowCheck(SourceBatch("f", table, np.arange(len(values))), Bad())).to_numpy()
    np.testing.assert_array_equal(read_values, [1, np.nan, np.nan, 1e30, np.nan, 2.5, np.nan, np.nan])
    deep = '{"_id": "e", "text": "t", "metadata": {"m": ' + "[" * 2000 + "]" * 2000 + "}}"
    (tmp_path / "corpus.jsonl").write_text("\n".join([*corpus, deep]))
    with pytest.raises(DataError, match=r"corpus.jsonl:9 is not a BEIR record: .* more than 500 levels"):
        read_collection(tmp_path, "test")


def test_vectors_of_json_that_are_not_numbers_are_missing_and_reported(tmp_path: Path) -> None:
    """As vectors of another length are; the other rows have the same values as without them."""
    table, vector = tmp_path / "t.jsonl", Vector(dim=2).with_name("v")
    for odd in ([1, "x"], [1, True], [1, None], [1, 2, 3], "x", 5, {"a": 1}, [[1, 2]], [{}, 2], [1, 1e300]):
        bad = Bad()
        table.write_text("".join(json.dumps({"v": value}) + "\n" for value in ([0.1, 2**60], odd, None, [3, 4.5])))
        (batch,) = read_table(table, ["v"], bad)
        values = np.array(vector.read(RowCheck(batch, bad)).to_pylist(), np.float32)
        np.testing.assert_array_equal(values, np.float32([[0.1, 2**60], [np.nan] * 2, [np.nan] * 2, [3, 4.5]]))
        assert [(row, left_out) for row, _, left_out in bad.seen] == [(2, False)], odd


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"item,title\n1,x\n", "has no column 'items'; did you mean 'item'"),
        ("t.jsonl", b'{"other": 1}\n', "has no column 'items'; it has 'other'"),
        ("t.csv", b"", "is empty"),
        ("t.csv", b"items\n", "no usable rows"),
        ("t.csv", b"items,items\n1,2\n", "twice"),
        ("t.xlsx", b"x", "unknown table format"),
        ("t.parquet.gz", b"x", "unknown table format"),
        ("t.parquet", b"not parquet", "is damaged or not of the format of its name"),
        ("t.csv.xz", b"not xz", "is damaged or not of the format of its name"),
        ("t.csv.gz", b"not gzip", "is damaged or not of the format of its name"),
        ("t.csv.xz", lzma.compress(b"items\n" + b"1\n" * 9999)[:-20], "is damaged or not of the format of its name"),
    ],
)
def test_structural_errors_name_the_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name, "items")
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.csv does not exist"):
        read(tmp_path / "no.csv", "a")


def check_of(values: list[object], bad: Bad) -> RowCheck:
    return RowCheck(SourceBatch("f", pa.table({"x": pa.array(values)}), np.arange(len(values)) + 1), bad)


def test_numbers_that_cannot_be_read_are_missing_and_reported_but_the_row_stays() -> None:
    bad = Bad()
    check = check_of(["1.5", "", "V", "nan", "inf", "-3", None, "1_0"], bad)
    values = Numeric(log=True).with_name("x").read(check).to_numpy()
    np.testing.assert_array_equal(values, [1.5, *[np.nan] * 7])
    assert check.good.all() and {row for row, _, left_out in bad.seen if not left_out} == {3, 5, 6, 8}


@pytest.mark.parametrize("values", [["1", "0", "-1", "x", "", "inf"], [1.0, 0.0, -1.0, None, float("nan"), 1e300]])
def test_relevance_must_be_a_finite_number_not_negative(values: list[object]) -> None:
    bad = Bad()
    check = check_of(values, bad)
    relevances(check, "x")
    assert check.good.tolist() == [True, True, False, False, False, False]
    assert [row for row, _, left_out in bad.seen if left_out] == [3, 4, 5, 6]


def test_times_are_numbers_or_iso_8601() -> None:
    bad = Bad()
    check = check_of(
        ["881250949", "1997-12-04T15:55:49", "1997-12-04T15:55:49Z", "1997-12-04T17:55:49+02:00", "?"], bad
    )
    assert times(check, "x", TimeRule()).values[:4].tolist() == [881250949.0] * 4
    assert check.good.tolist() == [True] * 4 + [False] and "'?'" in bad.seen[0][1]


def test_strings_of_whole_floats_are_integers_and_lists_are_refused() -> None:
    assert strings(check_of([1.0, None, 3.0], Bad()), "x").to_pylist() == ["1", "", "3"]
    assert strings(check_of([" a ", None], Bad()), "x").to_pylist() == ["a", ""]
    with pytest.raises(DataError, match="multi: true"):
        strings(check_of([["a"], ["b"]], Bad()), "x")


@pytest.mark.parametrize(
    ("values", "separator"),
    [
        (["a|b", None, "", "c||d "], "|"),
        (["a  b", None, " ", "c d"], " "),
        ([["a", "b"], None, [], ["c", "", "d"]], "|"),
    ],
)
def test_multi_valued_cells_lose_their_empty_values(values: list[object], separator: str) -> None:
    lists = value_lists(check_of(values, Bad()), "x", separator)
    assert lists.to_pylist() == [["a", "b"], [], [], ["c", "d"]]


def test_a_text_beyond_a_megabyte_fails_its_row() -> None:
    bad = Bad()
    check = check_of(["x" * 5_000_000, "y"], bad)
    strings(check, "x")
    assert check.good.tolist() == [False, True] and "5000000 bytes" in bad.seen[0][1]


@pytest.mark.parametrize("other", [1.5, "x", 7, True, 2**70], ids=str)
def test_the_text_of_a_json_value_is_the_same_in_any_batch(other: Any) -> None:
    numbers = [1, 1.0, 2.5, 3e5, -0.0, 1e16, 1e-7, float("nan"), 2**53 + 1, 2**63, 2**70, -(2**63)]
    values = [*numbers, "x", "1.0", True, None]

    def texts(some: list[Any]) -> list[str]:
        records = [{"id": value} for value in some]
        batch = record_batch("t", records, list(range(len(some))), ["id"], False, _no_bad)
        return strings(RowCheck(batch, _no_bad), "id").to_pylist()

    def of_lists(some: list[list[Any]]) -> list[list[str]]:
        batch = record_batch("t", [{"id": value} for value in some], list(range(len(some))), ["id"], False, _no_bad)
        return value_lists(RowCheck(batch, _no_bad), "id", ",").to_pylist()

    for value in values:
        (alone,) = texts([value])
        assert texts([value, other])[0] == texts([other, value])[1] == alone, value
        (in_list,) = of_lists([[value]])
        assert of_lists([[value], [other]])[0] == of_lists([[other], [value]])[1] == in_list, value
    assert texts([1, 1.0, "1", "x"]) == ["1", "1", "1", "x"]


def _no_bad(file: str, row: int, reason: str, left_out: bool = True) -> None:
    raise AssertionError(reason)
