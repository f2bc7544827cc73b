"""Malformed tables given to make_shards: a one-line message, the right exit code, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from datetime import time, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from bigdssm.dataset.dataset import Dataset
from bigdssm.ingest import job
from tests.conftest import write_config
from tests.unit.commands.hostile_tables import EVENTS, INTERACTIONS, ITEMS, PAIRS, RECORDS, Maker, Record

TOLD_WRONG = {
    "--validation-from=5 --test-from=7": "--validation-from needs --split time, not --split leave-one-out",
    "--split=time --until=7": "--until needs --validation-from, too",
    "--split=time --test-from=7": "--test-from needs --validation-from, too",
    "--split=time --validation-from=5": "--validation-from needs --test-from, too",
    "--split=time --validation-from=soon --test-from=7": "'soon' is neither a number nor an ISO-8601 time",
    "--split=time --validation-from=8 --test-from=7": "--validation-from 8, --test-from 7: validation comes before",
    "--split=time --validation-from=5 --test-from=7 --until=7": "--until 7: validation comes before test",
    "--split=time --validation-from=5 --test-from=7 --test-fraction=.1": "fractions of validation",
}


@pytest.fixture
def make(tmp_path: Path, capsys: Any) -> Maker:
    return Maker(tmp_path, capsys)


def changed(**columns: Callable[[int], Any]) -> list[Record]:
    return [{**record, **{name: of(i) for name, of in columns.items()}} for i, record in enumerate(RECORDS)]


def test_half_characters_are_one_bad_row(make: Maker) -> None:
    half, mine = {**RECORDS[0], "q": "\ud800 x"}, {**RECORDS[1], "\udfff": 1}
    code, said = make.records([half, *RECORDS, mine, {**RECORDS[2], "q": "\ud83d\ude00 whole"}], bad=0.1)
    assert code == 0 and "2 bad rows" in said
    bad = [json.loads(line) for line in (make.out / "quarantine.jsonl").read_text().splitlines()]
    assert [line["row"] for line in bad] == [1, 62] and all("lone surrogate" in line["reason"] for line in bad)


def test_ids_with_nul_characters_are_bad_rows(make: Maker) -> None:
    told = "id is 'k\\x000', needs an id without a NUL character"
    answer = make.records(changed(id=lambda i: f"k\0{i}" if i < 2 else f"k{i}"), "--doc-id-column=id")
    make.refused(answer, 3, "2 of 60 rows are bad", "pairs.jsonl, row 1", told)
    answer = make.records(changed(id=lambda i: f"k\0{i}" if i < 2 else f"k{i}"), "--query-id-column=id")
    make.refused(answer, 3, "2 of 60 rows are bad", told)
    answer = make.interactions([("u\0", "i1", 5), *EVENTS, ("u1", "i\0", 5)], items=ITEMS + "i\0\n")
    make.refused(answer, 3, "3 of 215 rows", "items.csv, row 13: item_id is 'i\\x00'", "1 × user_id is …, needs an id")


@pytest.mark.parametrize(
    ("content", "table", "words"),
    [
        (json.dumps(RECORDS), "t.jsonl", "is a JSON array, needs one object per line"),
        (json.dumps(RECORDS, indent=1), "t.jsonl", "is a JSON array"),
        (
            "q,d,n,c\n" + "x" * 20_000_000,
            "t.csv",
            "a row of more than 8,388,608 bytes, or a quote that is never closed",
        ),
        ("q,d,n,c\r" * 3, "t.csv", "is damaged or not of the format of its name"),
        (f"q,d,n,c,{'x' * 200_000}\n", "t.csv", "is damaged or not of the format of its name"),
        ("\nq,d,n,c\n", "t.csv", "has no header: the file or its first line is empty"),
        ("not\njson\n", "t.jsonl", "has no usable rows: 2 × not a JSON object: Expecting value"),
        (None, "t.csv", "table {tmp}/t.csv is not a file"),
    ],
)
def test_files_that_are_not_tables(make: Maker, content: str | None, table: str, words: str) -> None:
    path = make.folder / table
    path.mkdir() if content is None else path.write_text(content, newline="")
    make.refused(make.pairs(table=table), 3, words)


@pytest.mark.slow
def test_nothing_to_learn_from_is_refused(make: Maker) -> None:
    zero = "every relevance in the train split is 0"
    make.refused(make.records(changed(r=lambda i: 0), "--relevance-column=r"), 3, zero)
    rated = [(*event, 0) for event in EVENTS]
    header = "user_id,item_id,timestamp,rating"
    make.refused(make.interactions(rated, "--rating-column=rating", header=header), 3, zero)
    make.refused(
        make.interactions(rated, "--rating-column=rating", "--min-rating=nan", header=header), 2, "--min-rating"
    )
    make.refused(make.interactions(EVENTS, "--min-rating=3"), 2, "--min-rating 3.0 needs", "--rating-column")
    make.refused(make.interactions(EVENTS, "--positive-rating=3"), 2, "--positive-rating 3.0 needs", "--rating-column")
    low = make.interactions(rated, "--rating-column=rating", "--min-rating=1", header=header)
    make.refused(low, 3, "no interactions remain to train on; 200 are rated below 1.0")


def test_reasons_are_reported_when_no_row_remains(make: Maker) -> None:
    """The most frequent reasons with their counts, the first bad row, and the path of the quarantine."""
    us = [(user, item, "12/31/2024" if when % 2 else "") for user, item, when in EVENTS]
    reason = "200 × timestamp is …, needs a number or an ISO"
    kept = "all are in {tmp}/dataset.quarantine.jsonl"
    make.refused(make.interactions(us), 3, "no interactions remain", reason, "row 1: timestamp is ''", kept)
    floats = [(user, "1.0", when) for user, _, when in EVENTS]
    answer = make.interactions(floats, items="1\n2\n")
    make.refused(answer, 3, "200 × item_id … is not in", "item_id '1.0' is not in {tmp}/items.csv", kept)
    assert len((make.folder / "dataset.quarantine.jsonl").read_text().splitlines()) == 200
    dates = make.records(changed(t=lambda i: "12/31/2024"), "--split=time", "--time-column=t")
    make.refused(dates, 3, "60 of 60 rows are bad", "60 × t is …", "t is '12/31/2024'", kept)
    make.refused(make.records(changed(s=lambda i: "test"), "--split=column", "--split-column=s"), 3, "is never train")
    make.refused(make.records(changed(t=lambda i: 5), "--split=time", "--time-column=t"), 3, "have one time")


def test_bad_values_of_rows_that_stay_are_counted_once(make: Maker) -> None:
    answer = make.records(changed(n=lambda i: "x" if i < 12 else i))
    make.refused(answer, 3, "12 of 60 rows are bad or have bad values", "12 × n is …, needs a finite 32-bit number")


def test_seconds_and_milliseconds_in_one_column(make: Maker) -> None:
    mixed = [(user, item, when * (1000 if when % 2 else 1)) for user, item, when in EVENTS]
    make.refused(make.interactions(mixed), 3, "column 'timestamp' mixes units of time: 100 in s, such as 16000")
    some = changed(t=lambda i: 1.7e9 + i if i % 10 else (1.7e9 + i) * 1e6)
    make.refused(
        make.records(some, "--split=time", "--time-column=t", "--time-unit=auto"),
        3,
        "column 't' mixes units of time",
        "6 in us, such as",
    )
    for first, words in ((0, ["--time-unit=ns"]), (1_700_000_000_000_000_000, [])):
        times = [first + 2**31 * when for when in range(200)]
        events = [(user, item, when) for (user, item, _), when in zip(EVENTS, times, strict=True)]
        assert make.interactions(events, "--overwrite", *words)[0] == 0, "a counter, and nanoseconds"


@pytest.mark.parametrize("fractions", [("-1", "0.05"), ("0.9", "0.9"), ("nan", "0.1"), ("0", "1")])
@pytest.mark.parametrize("command", ["pairs", "interactions"])
def test_fractions_that_leave_nothing(make: Maker, fractions: tuple[str, str], command: str) -> None:
    words = ["--validation-fraction", fractions[0], "--test-fraction", fractions[1]]
    if command == "pairs":
        answer = make.records(changed(t=lambda i: i), "--split=time", "--time-column=t", *words)
    else:
        answer = make.interactions(EVENTS, "--split=time", *words)
    make.refused(answer, 2, "must be at least 0 and sum to less than 1")


@pytest.mark.slow
def test_time_splits_of_odd_times(make: Maker) -> None:
    def split(*words: object, **columns: Any) -> tuple[int, str]:
        return make.parquet("--split=time", "--time-column=t", "--time-unit=ns", "--overwrite", *words, **columns)

    for values in ([-i * 1e9 for i in range(60)], pa.array([2**61 - 1 - i * 10**9 for i in range(60)], pa.uint64())):
        code, said = split(t=values)
        assert code == 0 and "53 train, 4 validation, 3 test rows" in said
    for values in ([time(1, i) for i in range(60)], [timedelta(days=i) for i in range(60)]):
        code, said = split(t=values)
        assert code == 3 and "column 't' holds" in said
    code, said = make.records(
        changed(t=lambda i: 10**39 if i == 0 else i),
        "--split=time",
        "--time-column=t",
        "--time-unit=ns",
        "--overwrite",
        bad=1,
    )
    assert code == 0 and "1 bad rows" in said  # 1e39 is beyond 32 bits
    make.out.rename(make.folder / "made")
    make.refused(make.interactions(EVENTS, "--split=time", "--time-column="), 2, "--split time needs a --time-column")
    for words, said in TOLD_WRONG.items():
        make.refused(make.interactions(EVENTS, *words.split()), 2, said)
    late = "--split=time --validation-from=2040-01-01 --test-from=2041-01-01"
    millis = [(user, item, 1_600_000_000_000 + time) for user, item, time in EVENTS]
    make.refused(make.interactions(millis, *late.split()), 3, "with --validation-from 2040-01-01")


def test_lists_in_parquet(make: Maker) -> None:
    multi = {**PAIRS["doc"], "c": {"type": "categorical", "multi": True}}
    pairs = make.pairs
    make.pairs = lambda *words, **more: pairs(*words, **{**more, "doc": multi})  # type: ignore[method-assign]
    assert make.parquet(c=pa.array([["a", "b"]] * 60, pa.list_(pa.string(), 2)))[0] == 0
    assert tuple(Dataset.open(make.out).schema.doc["c"].vocabulary) == ("a", "b")
    code, said = make.parquet("--each-of=tags", "--overwrite")
    assert code == 3 and "has no column 'tags'" in said
    words = ["--each-of=c", "--split=time", "--time-column=n", "--overwrite"]
    code, said = make.parquet(*words, c=[["a", "b"]] * 60)
    assert code == 0 and "106 train, 8 validation, 6 test rows" in said


def test_growth_that_would_add_everything_again(make: Maker) -> None:
    assert make.records(RECORDS, "--doc-id-column=id")[0] == 0
    before = (make.out / "dataset.json").read_bytes()
    for words, told in (
        ([], "identifies each doc by its id, so give --doc-id-column here, too"),
        (
            ["--doc-id-column=id", "--query-id-column=c"],
            "identifies each query by its features, so leave out --query-id-column",
        ),
    ):
        code, said = make.records(RECORDS, "--append=more", *words)
        assert code == 2 and told in said
    for name, told in (
        ("", "partition name ''"),
        ("..", "'..'"),
        ("a/b", "'a/b'"),
        ("a\nb", r"'a\nb'"),
        ("x" * 300, "xxx"),
    ):
        code, said = make.records(RECORDS, "--doc-id-column=id", "--append", name)
        assert code == 2 and told in said and "must be a plain folder name" in said
    code, said = make.records(RECORDS, "--doc-id-column=id", "--append=more", f"--beir={make.folder / 'beir'}")
    assert code == 2 and "would have the new partition only; leave it out with --append" in said
    code, said = make.records(RECORDS, "--append=more", "--overwrite", "--partition=p")
    assert code == 2 and "--overwrite, --partition would have no effect with --append" in said
    assert (make.out / "dataset.json").read_bytes() == before and not (make.out / ".unfinished").exists()
    code, said = make.records(changed(key=lambda i: f"k{i % 12}"), "--append=more", "--doc-id-column=key")
    assert code == 0 and "12 documents (1 of them new)" in said


def test_pairs_are_not_added_to_interactions(make: Maker) -> None:
    users = {"query": {"age": {"type": "numeric"}}, "doc": INTERACTIONS["doc"]}
    (make.folder / "users.csv").write_text("user_id,age\n" + "".join(f"u{u},{u}\n" for u in range(20)))
    assert make.interactions(EVENTS)[0] == 0
    shutil.rmtree(make.out)
    config = write_config(make.folder, users)
    tables = [f"--{name}={make.folder / file}.csv" for name, file in (("interactions", "events"), ("items", "items"))]
    assert make("interactions", "--config", config, *tables, f"--users={make.folder}/users.csv")[0] == 0
    (make.folder / "pairs.jsonl").write_text('{"age": 3, "item_id": "i1", "user": "u1"}\n' * 9)
    ids = ["--doc-id-column=item_id", "--query-id-column=user", "--split=train", "--append=more"]
    code, said = make("pairs", "--config", config, "--pairs", make.folder / "pairs.jsonl", *ids)
    assert code == 3 and "holds interactions; the sub-command `interactions` appends to it" in said
    code, said = make("interactions", "--config", config, *tables, f"--users={make.folder}/nope.csv", "--append=more")
    assert code == 3 and "nope.csv does not exist" in said


def test_a_link_stays_a_link(make: Maker) -> None:
    real, link, beir = make.folder / "disk" / "real", make.folder / "dataset", make.folder / "beir"
    real.mkdir(parents=True)
    link.symlink_to(real)
    beir.symlink_to(make.folder / "disk" / "beir")
    for words in (["--beir", beir], ["--overwrite", "--beir", beir], ["--append=more"]):
        assert make.records(RECORDS, *words)[0] == 0
        assert link.is_symlink() and (real / "dataset.json").is_file()
        assert beir.is_symlink() and (beir / "corpus.jsonl").is_file()
    assert sorted(path.name for path in real.parent.iterdir()) == ["beir", "real"]
    (make.folder / "circle").symlink_to("circle")
    code, said = make.records(RECORDS, "--out", make.folder / "circle")
    assert code == 2 and "is a link that cannot be resolved" in said


def test_output_paths_that_cannot_be_written(make: Maker) -> None:
    for place in (make.folder / "pairs.jsonl" / "below", make.folder / ("x" * 255), Path("/proc/dataset")):
        make.refused(make.records(RECORDS, "--out", place), 2, "cannot be written (", "; choose another --out")


def test_a_full_disk_is_named(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(job.tarfile.TarFile, "addfile", full)
        code, said = make.records(RECORDS)
    assert code == 1 and f"No space left on device: {make.folder}/.dataset.unfinished" in said and not make.out.exists()
    assert make.records(RECORDS)[0] == 0, "with room again it goes on"
