"""Pairs are split, shuffled globally, and fitted to train rows only, in bounded memory."""

import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from bigdssm.config import DataConfig, TokenizerConfig, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Categorical, History, Text, Vector
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.loader.inspection import sample_rows
from bigdssm.sources.beir import read_qrels_tsv

CONFIG = DataConfig(
    time_unit="s",
    dir="",
    query={"q": Text(max_tokens=8)},
    doc={"text": Text(max_tokens=16), "kind": Categorical()},
    tokenizer=TokenizerConfig(vocab_size=120),
    max_bad_fraction=0.5,
)
Record = dict[str, Any]


def records(count: int) -> list[Record]:
    return [
        {
            "q": f"find item {i}",
            "text": f"this is item {i // 2}",
            "kind": f"k{i % 3}",
            "group": f"g{i // 2}",
            "time": i,
        }
        for i in range(count)
    ]


def make(folder: Path, rows: list[Record], out: str = "out", seed: int = 0, **options: Any) -> Dataset:
    path = folder / f"{out}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    append = options.pop("append", None)
    target = IngestTarget(folder / (options.pop("to", out)), append or "base", append=append is not None, seed=seed)
    make_pairs(CONFIG, PairTables((path,), **options), target)
    return Dataset.open(target.out)


def queries(dataset: Dataset, split: str) -> list[str]:
    return [row["query.q"] for row in sample_rows(dataset, split, dataset.num_rows(split))]


def test_every_pair_is_in_one_split_with_its_document(tiny_pairs: Any) -> None:
    source = [json.loads(line) for line in (tiny_pairs.source / "pairs.jsonl").open()]
    dataset = Dataset.open(tiny_pairs.dir)
    rows = [row for split in ("train", "validation", "test") for row in sample_rows(dataset, split, 2000)]
    found = Counter((r["query.query"], r["doc.text"], r["doc.size"], r["relevance"]) for r in rows)
    expected = Counter(
        (f"[CLS] {s['query']} [SEP]", f"[CLS] {s['text']} [SEP]", float(s["size"]), float(s["relevance"]))
        for s in source
    )
    assert found == expected
    for row, record in ((r, s) for r in rows for s in source if f"[CLS] {s['text']} [SEP]" == r["doc.text"]):
        assert (row["doc.section"], row["doc.tags"]) == (record["section"], list(record["tags"]))
    positives = sum(r["relevance"] > 0 for r in sample_rows(dataset, "train", 2000))
    assert dataset.doc_counts().sum() == positives


@pytest.mark.parametrize("split_column", ["group", None])
def test_random_splits_keep_groups_together(tmp_path: Path, split_column: str | None) -> None:
    rows = records(600) * 2
    dataset = make(tmp_path, rows, split_column=split_column, validation_fraction=0.2, test_fraction=0.2)
    unit = {f"[CLS] {row['q']} [SEP]": row["group"] if split_column else row["q"] for row in rows}
    units = {split: {unit[q] for q in queries(dataset, split)} for split in ("train", "validation", "test")}
    assert not units["train"] & units["validation"] and not units["train"] & units["test"]
    sizes = {split: dataset.num_rows(split) for split in units}
    assert sum(sizes.values()) == 1200
    spread = (
        4 * (300 * 0.2 * 0.8) ** 0.5 if split_column else 2 * (600 * 0.2 * 0.8) ** 0.5
    )  # rows; groups stay together
    assert all(abs(sizes[split] - 240) < 4 * spread for split in ("validation", "test")), sizes


def test_time_and_column_splits(tmp_path: Path) -> None:
    rows = records(100)[::-1]
    dataset = make(tmp_path, rows, split="time", split_column="time", validation_fraction=0.1, test_fraction=0.2)
    assert {len(queries(dataset, "test")), len(queries(dataset, "validation"))} == {20, 10}
    assert set(queries(dataset, "test")) == {f"[CLS] find item {i} [SEP]" for i in range(80, 100)}
    moments = {"validation_from": 70, "test_from": "80", "until": 95.0}
    dataset = make(tmp_path, rows, "told", split="time", split_column="time", **moments)
    found = {name: set(queries(dataset, name)) for name in ("train", "validation", "test")}
    wanted = {"train": range(70), "validation": range(70, 80), "test": range(80, 95)}
    assert found == {name: {f"[CLS] find item {i} [SEP]" for i in numbers} for name, numbers in wanted.items()}
    for row, name in zip(rows, ["train", "valid", "dev", "Test", "none"] * 20, strict=True):
        row["group"] = name
        if name == "none":
            row["q"] = ""
    dataset = make(tmp_path, rows, "by_column", split="column", split_column="group")
    assert [dataset.num_rows(split) for split in ("train", "validation", "test")] == [20, 40, 20]
    assert dataset.catalogue.num_docs == len(rows), "rows of no split add documents, without a query, too"


def test_the_fit_excludes_held_out_rows(tmp_path: Path) -> None:
    rows = records(40)
    for i, row in enumerate(rows):
        row["group"] = "test" if i >= 30 else "train"
        if i >= 30:
            row |= {"kind": f"only{i}", "text": f"жук {i}", "q": f"щука {i}"}
    dataset = make(tmp_path, rows, split="column", split_column="group")
    assert tuple(dataset.schema.doc["kind"].vocabulary) == ("k0", "k1", "k2")
    assert not set("жщ") & set((tmp_path / "out/tokenizer/tokenizer.json").read_text())
    assert {row["doc.kind"] for row in sample_rows(dataset, "test", 40)} == {"<out of vocabulary>"}


def test_bad_rows_are_named_and_the_rest_is_whole(tmp_path: Path) -> None:
    rows = records(50)
    wrong: list[Record] = [{"text": ""}, {"text": None}, {"q": "  "}, {"relevance": float("nan")}, {"relevance": -1}]
    for row in rows:
        row["relevance"] = 1
    for row, change in zip(rows, [*wrong, {"text": "x" * 5_000_000}], strict=False):
        row |= change
    dataset = make(tmp_path, rows, split="train", relevance_column="relevance")
    found = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").open()]
    assert [entry["row"] for entry in found] == [6, 3, 1, 2, 4, 5] or {e["row"] for e in found} == {1, 2, 3, 4, 5, 6}
    assert dataset.num_rows("train") == 44
    reasons = " ".join(entry["reason"] for entry in found)
    for said in ("no document", "no query", "needs a finite number ≥ 0", "5000000 bytes"):
        assert said in reasons


def test_dedup_keeps_the_first_of_a_pair(tmp_path: Path) -> None:
    assert make(tmp_path, records(30) * 2, split="train").num_rows("train") == 60
    assert make(tmp_path, records(30) * 2, "once", split="train", dedup=True).num_rows("train") == 30


def test_a_collection_has_one_judgement_per_pair_and_split(tmp_path: Path) -> None:
    """Pairs of the train split that return in later splits, some of them twice."""
    rows = [{"q": f"find {i % 8}", "text": f"item {i % 8}", "kind": "k", "time": i} for i in range(80)]
    times = {"split": "time", "split_column": "time", "validation_from": 40, "test_from": 60}
    for dedup in (False, True):
        name = f"out{dedup}"
        dataset = make(tmp_path, rows, name, beir=tmp_path / f"{name}.beir", dedup=dedup, **times)
        files = {path.stem: read_qrels_tsv(path) for path in (tmp_path / f"{name}.beir/qrels").iterdir()}
        judged = {name: sum(map(len, qrels.values())) for name, qrels in files.items()}
        assert judged == ({"train": 8} if dedup else {"train": 8, "dev": 8, "test": 8})
        assert dedup or dataset.num_rows("test") == 20


@pytest.mark.parametrize("separator", ["\t", "\n", "\r"])
def test_ids_that_qrels_cannot_hold_are_refused(tmp_path: Path, separator: str) -> None:
    rows = [row | {"id": f"a{separator}{i // 2}"} for i, row in enumerate(records(20))]
    with pytest.raises(ConfigError, match=r"--beir: the id 'a\\.\d+' has a tab or line break"):
        make(tmp_path, rows, split="train", doc_id_column="id", beir=tmp_path / "beir")
    assert not (tmp_path / "beir").exists()
    assert make(tmp_path, rows, split="train", doc_id_column="id").catalogue.num_docs == 10


BOOLEANS = (["True", "False"], ["true", "false"], ["TRUE", "FALSE"], ["1", "0"])


def test_booleans_are_one_value_in_every_kind_of_table(tmp_path: Path) -> None:
    def table(name: str, spelling: Any, values: list[bool]) -> Path:
        path = tmp_path / name
        if path.suffix == ".csv":
            path.write_text("q,kind\n" + "".join(f"find,{spelling[0 if value else 1]}\n" for value in values))
        elif path.suffix == ".jsonl":
            rows = ({"q": "find", "kind": spelling(value)} for value in values)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.table({"q": ["find"] * len(values), "kind": pa.array(values)}), path)
        return path

    def built(out: str, tables: list[Path], *, append: bool = False, **kind: Any) -> tuple[tuple[str, ...], list[int]]:
        config = DataConfig(dir="", query={"q": Categorical()}, doc={"kind": Categorical(**kind)})
        target = IngestTarget(tmp_path / out, "more" if append else "base", append=append)
        make_pairs(config, PairTables(tuple(tables), split="train"), target)
        dataset = Dataset.open(target.out)
        codes = np.asarray(dataset.catalogue.columns(np.arange(dataset.catalogue.num_docs))["kind"])
        return tuple(dataset.schema.doc["kind"].vocabulary), sorted({int(code) for code in codes})

    values = [True, True, False]
    csvs = [table(f"{i}.csv", spelling, values) for i, spelling in enumerate(BOOLEANS)]
    others = [table("a.jsonl", bool, values), table("b.jsonl", int, values), table("c.parquet", None, values)]
    assert built("all", [*csvs, *others]) == (("True", "False"), [2, 3])
    for path in [*csvs, *others]:
        vocabulary, codes = built(f"of {path.name}", [path])
        assert len(vocabulary) == 2 and codes == [2, 3], "one kind of table keeps its spelling"
        assert built(f"of {path.name}", [*csvs, *others], append=True) == (vocabulary, codes)
    integers = table("d.csv", ["1", "2"], values)
    assert built("integers", [integers, csvs[0]])[0] == ("1", "2", "True", "False"), "no column of booleans"


def test_append_extends_catalogue_and_vocabularies_at_their_end(tmp_path: Path) -> None:
    first = make(tmp_path, records(40), split="train")
    more = [{"q": "new", "text": f"this is item {i}", "kind": "k9" if i > 18 else "k0"} for i in range(0, 30, 3)]
    both = make(tmp_path, more, "more", to="out", append="more", split="train")
    assert both.num_rows("train") == 50 and tuple(both.schema.doc["kind"].vocabulary) == ("k0", "k1", "k2", "k9")
    old = np.arange(first.catalogue.num_docs)
    assert both.catalogue.keys(old) == first.catalogue.keys(old) and both.catalogue.num_docs > len(old)
    assert both.doc_counts().sum() == 50


def test_shards_are_tars_that_stock_webdataset_reads(tiny_pairs: Any) -> None:
    folder = tiny_pairs.dir / "partitions/base"
    index = pa.ipc.open_file(str(folder / "train.index.arrow")).read_all()
    samples = list(wds.WebDataset(str(folder / "train-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{i:08d}" for i in range(index.num_rows)]
    content = (folder / "train-000000.tar").read_bytes()
    for sample, entry in zip(samples, index.to_pylist(), strict=True):
        assert content[entry["offset"] : entry["offset"] + entry["size"]] == sample["arrow"]
        block = pa.ipc.open_stream(sample["arrow"]).read_all()
        assert block.num_rows == entry["rows"] and block.column_names == ["query_id", "doc", "relevance", "query"]
    with tarfile.open(folder / "train-000000.tar") as tar:
        assert {member.mtime for member in tar} == {0}


def test_shards_roll_over_and_read_as_one(tiny_pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigdssm.ingest.job.BLOCKS_PER_SHARD", 2)
    tables = PairTables((tiny_pairs.source / "pairs.jsonl",), relevance_column="relevance", split="train")
    make_pairs(load_config(tiny_pairs.config).data, tables, IngestTarget(tmp_path / "out"))
    dataset = Dataset.open(tmp_path / "out")
    assert len(dataset.index("train").shards) > 2
    assert sum(len(rows) for rows in dataset.iterate("train", 100)) == 1200


def test_histories_and_empty_train_splits_are_refused(tmp_path: Path) -> None:
    rows = [{**row, "split": "test"} for row in records(10)]
    with pytest.raises(DataError, match="no rows remain for the train split"):
        make(tmp_path, rows, split="column", split_column="split")
    with pytest.raises(ConfigError, match="--split time needs --time-column"):
        make(tmp_path, rows, split="time")
    history = DataConfig(dir="", query={"h": History(of="kind")}, doc=CONFIG.doc)
    with pytest.raises(ConfigError, match="pairs have no histories"):
        make_pairs(history, PairTables((tmp_path / "x.jsonl",)), IngestTarget(tmp_path / "out"))


def test_whole_documents_stay_in_one_split_through_chains_of_groups(tmp_path: Path) -> None:
    # Groups a and b share document 1, b and c share document 2 …: chains of 6 groups connected by documents.
    rows = [
        {
            "q": f"query {chain} {link} {side}",
            "text": f"text {chain} {link + side}",
            "kind": "k",
            "group": f"{chain}/{link}",
        }
        for chain in range(120)
        for link in range(6)
        for side in (0, 1)
    ]
    options: dict[str, Any] = {"split_column": "group", "validation_fraction": 0.2, "test_fraction": 0.2}

    def splits(dataset: Dataset) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for split in ("train", "validation", "test"):
            for query in queries(dataset, split):
                found.setdefault(query.split()[2], set()).add(split)
        return found

    whole = splits(make(tmp_path, rows, "whole", whole_documents=True, **options))
    assert len(whole) == 120 and all(len(found) == 1 for found in whole.values())
    assert {next(iter(found)) for found in whole.values()} == {"train", "validation", "test"}
    assert splits(make(tmp_path, rows[::-1], "reversed", whole_documents=True, **options)) == whole
    assert any(len(found) > 1 for found in splits(make(tmp_path, rows, "apart", **options)).values())
    with pytest.raises(ConfigError, match="--whole-documents needs --split random, not --split train"):
        make(tmp_path, rows, "never", split="train", whole_documents=True)


def test_documents_in_several_splits_are_reported(tmp_path: Path) -> None:
    rows = [{"q": f"q {i}", "text": f"t {i % 40}", "kind": "k"} for i in range(400)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = make_pairs(CONFIG, PairTables((path,)), IngestTarget(tmp_path / "out"))
    dataset = Dataset.open(tmp_path / "out")
    splits = [
        {int(d) for rows in dataset.iterate(s, 500) for d in rows.doc_rows} for s in ("train", "validation", "test")
    ]
    apart = sum(sum(doc in split for split in splits) > 1 for doc in range(40))
    assert apart > 0
    have = "1 document has" if apart == 1 else f"{apart} documents have"
    assert f"{have} rows in several splits; --whole-documents keeps each in one" in report.notes


def test_every_value_of_a_list_column_makes_a_row(tmp_path: Path) -> None:
    rows = [{"q": [f"word {i}", f"other {i}"][: i % 3], "text": f"t {i}", "kind": f"k{i}"} for i in range(30)]
    rows.append({"q": ["lost", "too"], "text": "", "kind": ""})
    dataset = make(tmp_path, rows, each_of="q", split="train")
    del rows[-1]
    bad = [json.loads(line) for line in (dataset.dir / "quarantine.jsonl").open()]
    assert [entry["row"] for entry in bad if "no document" in entry["reason"]] == [31, 31]
    found = sample_rows(dataset, "train", 100)
    assert sorted(row["query.q"] for row in found) == sorted(f"[CLS] {q} [SEP]" for row in rows for q in row["q"])
    assert all(row["query.q"].split()[2] == row["doc.text"].split()[2] for row in found)
    assert "q holds no value" in (dataset.dir / "quarantine.jsonl").read_text()
    with pytest.raises(DataError, match=r"column 'kind' holds .*string, --each-of needs lists"):
        make(tmp_path, rows, "never", each_of="kind")


def test_the_number_of_values_per_list_is_limited(tmp_path: Path) -> None:
    """More values would have the ordinals of the next row's values."""
    values = [[f"q{row} {i}" for i in range(length)] for row, length in enumerate((4096, 4097, 3))]
    dataset = make(
        tmp_path, [{"q": q, "text": f"t {i}", "kind": "k"} for i, q in enumerate(values)], each_of="q", split="train"
    )
    assert dataset.num_rows("train") == 4099
    assert "q holds 4097 values, at most 4096 are allowed" in (dataset.dir / "quarantine.jsonl").read_text()


def test_an_append_does_not_continue_a_split_that_would_leak(tmp_path: Path) -> None:
    rows = records(40)
    make(tmp_path, rows, "whole", whole_documents=True)
    new = [{"q": f"new {i}", "text": f"new text {i}", "kind": "k"} for i in range(9)]
    make(tmp_path, new, "new", to="whole", append="p1")
    known = [{**row, "q": f"other {row['q']}"} for row in rows]
    with pytest.raises(DataError, match=r"40 documents of \S+ are in \S+ already, whose split keeps the rows"):
        make(tmp_path, known, "known", to="whole", append="p2")
    make(tmp_path, known, "known", to="whole", append="p2", split="train")
    make(tmp_path, rows, "by_query")
    with pytest.raises(ConfigError, match="--group-column: the dataset is split by query"):
        make(tmp_path, new, "new", to="by_query", append="p1", split_column="kind")


def test_siamese_documents_stay_whole_as_queries_and_results(tmp_path: Path) -> None:
    lines = [{"a": f"{i} {n}", "b": f"{i} {n + 1}", "text": f"t {i} {n}"} for i in range(80) for n in (0, 1)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    features: dict[str, Any] = {"kind": Categorical(column="b")}
    config = DataConfig(dir="", siamese=True, query={"kind": Categorical(column="a")}, doc=features)
    options: dict[str, Any] = {"query_id_column": "a", "doc_id_column": "b", "validation_fraction": 0.3}
    tables = PairTables((tmp_path / "pairs.jsonl",), whole_documents=True, test_fraction=0.3, **options)
    make_pairs(config, tables, IngestTarget(tmp_path / "out"))
    dataset = Dataset.open(tmp_path / "out")
    splits: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        for rows in dataset.iterate(split, 500):
            for key in dataset.catalogue.keys(rows.doc_rows):
                splits.setdefault(key.split()[0], set()).add(split)
    assert len(splits) == 80 and all(len(found) == 1 for found in splits.values())


def test_a_matrix_belongs_to_the_rows_of_one_table(tmp_path: Path) -> None:
    """Also with empty lines, which are not rows; an append has a matrix of its own."""

    def config(matrix: str) -> DataConfig:
        vector = Vector(dim=2, matrix=str(tmp_path / f"{matrix}.npy"))
        return DataConfig(dir="", query={"q": Categorical()}, doc={"v": vector})

    def build(matrix: str, *names: str, append: str | None = None) -> Dataset:
        tables = PairTables(tuple(tmp_path / name for name in names), doc_id_column="d", split="train")
        make_pairs(config(matrix), tables, IngestTarget(tmp_path / "out", append or "base", append=append is not None))
        return Dataset.open(tmp_path / "out")

    for name, first, count in (("old", 0, 4), ("new", 4, 3)):
        lines = [json.dumps({"q": f"q{i}", "d": f"d{i}"}) for i in range(first, first + count)]
        (tmp_path / f"{name}.jsonl").write_text("\n\n".join(lines) + "\n\n")
        np.save(tmp_path / f"{name}.npy", np.arange(first, first + count, dtype=np.float32)[:, None] + [0, 0.5])
    with pytest.raises(ConfigError, match="got 2 tables, a matrix needs a single one"):
        build("old", "old.jsonl", "new.jsonl")
    with pytest.raises(DataError, match=r"old\.npy has 4 rows, but \S+new.jsonl has 3; give the matrix of this table"):
        build("old", "new.jsonl")
    with pytest.raises(DataError, match=r"new\.npy has 3 rows, and none for row 4 of the table"):
        build("new", "old.jsonl")
    first = build("old", "old.jsonl")
    with pytest.raises(DataError, match=r"old\.npy has 4 rows, but"):
        build("old", "new.jsonl", append="day2")
    dataset = build("new", "new.jsonl", append="day2")
    assert dataset.header.schema.doc == first.header.schema.doc, "a resumed run finds the same schema"
    vectors = np.asarray(dataset.catalogue.column("v", np.arange(7)))
    assert [f"d{int(a)}" for a, _ in vectors] == dataset.catalogue.keys(np.arange(7))


def test_a_batch_without_values_does_not_end_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unnested column whose values are all null or empty in a batch, with document vectors."""
    monkeypatch.setattr("bigdssm.sources.text.ROWS_PER_BATCH", 2)
    lines = [{"q": "a", "d": ["x", "y"], "v": [1, 2]}, {"q": "b", "d": ["z"], "v": [1, 2]}]
    for empty in ([], None):
        without = [{"q": "c", "d": empty, "v": [1, 2]}] * 2
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *without]))
        config = DataConfig(dir="", query={"q": Categorical()}, doc={"v": Vector(dim=2)}, max_bad_fraction=0.5)
        tables = PairTables((tmp_path / "pairs.jsonl",), doc_id_column="d", each_of="d", split="train")
        report = make_pairs(config, tables, IngestTarget(tmp_path / "out", overwrite=True))
        assert report.rows == {"train": 3} and report.num_bad == 2


def test_an_append_to_a_dataset_without_its_file_of_bad_rows(tmp_path: Path) -> None:
    make(tmp_path, records(9))
    (tmp_path / "out" / "quarantine.jsonl").unlink()
    make(tmp_path, [{"text": "no query", "kind": "k"}, *records(12)[9:]], "more", to="out", append="p1")
    assert json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())["partition"] == "p1"
