"""The inspection shows the model's inputs, and --verify reports all damage."""

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from bigdssm.config import DataConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.features import Categorical, Numeric
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.loader.inspection import describe, sample_rows, verify_dataset

ROOT = Path(__file__).parents[3]


def inspect_main(argv: list[str]) -> int:
    spec = importlib.util.spec_from_file_location("inspect_shards", ROOT / "tools/inspect_shards.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return int(module.main(argv))


def test_description_and_rows(tiny_interactions: Any, capsys: Any) -> None:
    dataset = Dataset.open(tiny_interactions.dir)
    found = describe(dataset)
    assert [size.rows for size in found.sizes if size.split == "train"] == [found.scanned_queries]
    assert found.top_docs[0][0] == dataset.catalogue.titles([int(dataset.doc_counts().argmax())])[0]
    history = next(entry for entry in found.lengths if entry.feature == "query.history")
    assert history.percentiles[-1] == 10 and history.cut is not None and 0.3 < history.cut < 0.9
    row = sample_rows(dataset, "test", 3)[0]
    rows = next(dataset.iterate("test", 3))
    assert row["query.history"] == dataset.catalogue.titles(rows.seen(0)[-10:])
    assert row["doc.item_id"] == dataset.catalogue.keys(rows.doc_rows[:1])[0]
    assert row["doc.title"].startswith("[CLS] ") and row["query.occupation"] in ("artist", "doctor", "farmer")
    assert inspect_main([str(tiny_interactions.dir), "--rows", "2"]) == 0
    said = capsys.readouterr().out
    assert "doc.title: [CLS]" in said and "40 documents" in said and "newest 10 of doc.item_id" in said


def test_every_figure_is_the_one_of_the_rows(tmp_path: Path, capsys: Any) -> None:
    config = DataConfig(
        dir="", title="kind", doc={"kind": Categorical()}, max_bad_fraction=0.2,
        query={"tags": Categorical(multi=True), "n": Numeric()},
    )  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"tags": ["a", "b", "c"][: i % 4], "n": i, "kind": f"k{min(i, 2)}"} for i in (*range(8), 5, 5, 6)
    ]
    for name, more in (("base", [{"tags": ["a"], "n": 1, "kind": ""}]), ("day2", [])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + more))
        tables = PairTables((tmp_path / f"{name}.jsonl",), split="train")
        make_pairs(config, tables, IngestTarget(tmp_path / "data", name, append=name != "base"))
        rows = [{"tags": [], "n": 50, "kind": "new"}]
    found = describe(Dataset.open(tmp_path / "data", ["base"]))
    shard = tmp_path / "data/partitions/base/train-000000.tar"
    (size,) = found.sizes
    assert (size.rows, size.blocks, size.shards, size.num_bytes) == (11, 1, 1, shard.stat().st_size)
    assert (found.scanned_queries, found.duplicate_pairs, found.num_bad) == (11, 3, 1)
    assert found.top_docs == [("k2", 9), ("k0", 1), ("k1", 1), ("new", 0)]
    assert (found.num_docs, found.docs_without_train_rows) == (4, 1)
    (lengths,) = found.lengths
    assert (lengths.feature, lengths.percentiles) == ("query.tags", (0, 1, 1, 2, 3, 3))
    assert lengths.histogram == (2, 4, 3, 2) and sum(lengths.histogram) == 11
    assert inspect_main([str(tmp_path / "data"), "--rows", "0"]) == 0
    line = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["query.tags"]][-1]
    assert line.split()[-1] == "▆█▆▄"  # 3, 4, 3 and 2 rows, including day2's
    row = sample_rows(Dataset.open(tmp_path / "data"), count=12)[-1]
    assert (row["query.tags"], row["query.n"], row["doc.kind"]) == ([], 50, "new")
    flip(shard, 700)
    both = describe(Dataset.open(tmp_path / "data"))
    assert (both.scanned_queries, both.unreadable_blocks, len(both.sizes)) == (1, 1, 2)
    assert inspect_main([str(tmp_path / "data")]) == 0
    said = capsys.readouterr().out
    assert "day2" in said and "1 bad rows or values" in said and "1 blocks cannot be read: use --verify" in said


def test_a_sound_dataset_verifies(tiny_pairs: Any, tiny_interactions: Any) -> None:
    assert verify_dataset(tiny_pairs.dir) == [] and verify_dataset(tiny_interactions.dir) == []
    assert inspect_main([str(tiny_pairs.dir), "--verify"]) == 0


def block_range(folder: Path, block: int) -> tuple[int, int]:
    index = pa.ipc.open_file(str(folder / "partitions/base/train.index.arrow")).read_all().to_pylist()
    return index[block]["offset"], index[block]["size"]


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(bytes(content))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def word_piece_offset(folder: Path) -> int:
    """Return the offset of a word piece's letter; with another letter there the tokenizer still loads."""
    return (folder / "tokenizer/tokenizer.json").read_bytes().index(b'"##e"') + 3


SHARD, VOCABULARY = "partitions/base/train-000000.tar", "vocabularies/doc.item_id.000000.arrow"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "payload": (lambda d: flip(d / SHARD, block_range(d, 1)[0] + 9), "train-000000.tar, block 1: .*damaged"),
    "header": (lambda d: flip(d / SHARD, block_range(d, 2)[0] - 400), "train-000000.tar, block 2: .*header"),
    "cut in data": (lambda d: cut(d / SHARD, block_range(d, 3)[0] + 50), "train-000000.tar, block 3: .*cut short"),
    "cut in header": (lambda d: cut(d / SHARD, block_range(d, 3)[0] - 100), "train-000000.tar, block 3: .*cut short"),
    "no shard": (lambda d: (d / SHARD).unlink(), "train-000000.tar, block 0: .*missing"),
    "index": (lambda d: flip(d / "partitions/base/train.index.arrow", 300), "train.index.arrow is damaged"),
    "catalogue": (lambda d: flip(d / "catalogue/000000.arrow", 2000), "catalogue/000000.arrow is damaged"),
    "sequences": (
        lambda d: flip(d / "partitions/base/sequences-000000.arrow", 2000),
        "sequences-000000.arrow is damaged",
    ),
    "tokenizer": (lambda d: flip(d / "tokenizer/tokenizer.json", word_piece_offset(d)), "tokenizer.json is damaged"),
    "vocabulary": (
        lambda d: flip(d / VOCABULARY, os.stat(d / VOCABULARY).st_size // 2),
        "item_id.000000.arrow is damaged",
    ),
    "counts": (lambda d: flip(d / "partitions/base/counts.arrow", 200), "counts.arrow is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tiny_interactions: Any, tmp_path: Path, damage: str, capsys: Any) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_interactions.dir, folder)
    harm, named = DAMAGES[damage]
    harm(folder)
    assert inspect_main([str(folder), "--verify"]) == 3
    assert re.search(named, capsys.readouterr().out)


def test_a_missing_dataset_gives_a_one_line_error(tmp_path: Path, capsys: Any) -> None:
    assert inspect_main([str(tmp_path)]) == 3 and inspect_main([str(tmp_path), "--verify"]) == 3
    assert "is not a dataset" in capsys.readouterr().err
