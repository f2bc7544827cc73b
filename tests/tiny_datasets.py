"""Writes tiny datasets by hand, so that reading is tested against the format and not against our writer."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from bigdssm.dataset.schema import Schema
from bigdssm.features import Categorical, History, Numeric, Text, Vocabulary
from bigdssm.utils.hashing import hash64

NUM_DOCS = 37
ITEMS_PER_SEQUENCE = 30
SEQUENCES = "sequences-000000.arrow"
WORDS = ["[PAD]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(50))]


@dataclass
class Writer:
    """Writes a dataset folder of a given kind; tests damage it."""

    dir: Path
    rows: int = 1000
    rows_per_block: int = 64
    blocks_per_shard: int = 4
    text: bool = False
    interactions: bool = True
    targets_per_row: int = 1
    partitions: list[str] = field(default_factory=list)

    @property
    def schema(self) -> Schema:
        doc = {
            "item": Categorical(vocabulary=Vocabulary.of(f"i{i}" for i in range(NUM_DOCS))).with_name("item"),
            "tags": Categorical(multi=True, vocabulary=Vocabulary.of(("a", "b", "c"))).with_name("tags"),
            "year": Numeric(mean=1990.0, std=10.0).with_name("year"),
        }
        query = {"age": Numeric().with_name("age")}
        if self.text:
            doc["title"] = Text(max_tokens=8).with_name("title")
            query["words"] = Text(max_tokens=6).with_name("words")
            query["job"] = Categorical(vocabulary=Vocabulary.of(("a", "b", "c"))).with_name("job")
            query["likes"] = Categorical(multi=True, vocabulary=Vocabulary.of(("a", "b", "c"))).with_name("likes")
        if self.interactions:
            query["history"] = History(of="item", max_items=5).with_name("history")
        return Schema(query, doc)

    def write(self, *names: str) -> Path:
        self.dir.mkdir(parents=True, exist_ok=True)
        self.schema.save(self.dir)
        if self.text:
            self._tokenizer()
        catalogue = self._catalogue()
        for name in names or ("all",):
            self._partition(name, seed=len(self.partitions))
            self.partitions.append(name)
        content = {
            "format": 1,
            "name": "tiny",
            "schema": self.schema.fingerprint(),
            "catalogue": [catalogue],
            "partitions": self.partitions,
        }
        (self.dir / "dataset.json").write_text(json.dumps(content))
        return self.dir

    def _tokenizer(self) -> None:
        folder = self.dir / "tokenizer"
        folder.mkdir(exist_ok=True)
        tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))

    def doc_columns(self, rows: np.ndarray) -> dict[str, pa.Array]:
        columns = {
            "item": pa.array((rows + 2).astype(np.int32)),
            "tags": pa.array([[2 + int(r) % 3] * (int(r) % 3) for r in rows], pa.list_(pa.int32())),
            "year": pa.array((1950 + rows).astype(np.float32)),
        }
        if self.text:
            lists = [[1, *range(3, 3 + int(r) % 5), 2] for r in rows]
            columns["title"] = pa.array(lists, pa.large_list(pa.int32()))
        return columns

    def _catalogue(self) -> dict[str, object]:
        rows = np.arange(NUM_DOCS)
        keys = [f"d{i}" for i in rows]
        columns = {
            "doc_key": pa.array(keys),
            "doc_id": pa.array([hash64(key) for key in keys]),
            "doc_title": pa.array([f"Document {i}" for i in rows]),
            **self.doc_columns(rows),
        }
        path = self.dir / "catalogue" / "000000.arrow"
        path.parent.mkdir(exist_ok=True)
        write_arrow(path, pa.table(columns), rows_per_batch=20)  # two record batches
        return {"file": "catalogue/000000.arrow", "rows": NUM_DOCS, "checksum": checksum(path)}

    def columns(self, first: int, count: int, seed: int) -> dict[str, pa.Array]:
        """Return block columns of rows first … first + count, their values functions of the row's number."""
        row = np.arange(first, first + count)
        if self.interactions:
            start = (row + seed) % (ITEMS_PER_SEQUENCE + 1 - self.targets_per_row)
            end = start + 1 + row % self.targets_per_row
            return {
                "sequence": pa.array(row % 11),
                "first": pa.array(start.astype(np.int32)),
                "end": pa.array(end.astype(np.int32)),
            }
        columns = {"query_id": pa.array(row * 10 + seed), "relevance": pa.array((row % 3 / 2).astype(np.float32))}
        columns["doc"] = pa.array((row * 7 + seed) % NUM_DOCS)
        columns["age"] = pa.array((row % 80).astype(np.float32))
        if self.text:
            columns["words"] = pa.array([[1, *range(3, 3 + int(r) % 4), 2] for r in row], pa.list_(pa.int32()))
            columns["job"] = pa.array((row % 3 + 2).astype(np.int32))
            columns["likes"] = pa.array([[2 + int(r) % 3] * (int(r) % 2) for r in row], pa.list_(pa.int32()))
        return columns

    def _partition(self, name: str, seed: int) -> None:
        folder = self.dir / "partitions" / name
        folder.mkdir(parents=True)
        sizes = {"train": self.rows, "test": 100}
        splits = {split: self._split(folder, split, rows, seed) for split, rows in sizes.items()}
        if self.interactions:
            items = [[(s + i + seed) % NUM_DOCS for i in range(ITEMS_PER_SEQUENCE)] for s in range(11)]
            sequences = {
                "query_key": pa.array([f"u{s}" for s in range(11)]),
                "query_id": pa.array([hash64(f"u{s}") for s in range(11)]),
                "items": pa.array(items, pa.large_list(pa.int32())),
                "relevance": pa.array([[doc % 3 / 2 for doc in docs] for docs in items], pa.large_list(pa.float32())),
                "age": pa.array(np.arange(11, dtype=np.float32) + 100 * seed),
            }
            write_arrow(folder / SEQUENCES, pa.table(sequences))
        counts = {"doc": np.arange(NUM_DOCS), "count": np.full(NUM_DOCS, 1 + seed)}
        write_arrow(folder / "counts.arrow", pa.table(counts))
        content = {"name": name, "splits": splits, "fingerprint": f"{name}-{seed}"}
        content["counts_checksum"] = checksum(folder / "counts.arrow")
        if self.interactions:
            content["sequences"] = [{"file": SEQUENCES, "rows": 11, "checksum": checksum(folder / SEQUENCES)}]
        (folder / "partition.json").write_text(json.dumps(content))

    def _split(self, folder: Path, split: str, rows: int, seed: int) -> dict[str, object]:
        entries, shards = [], []
        per_shard = self.rows_per_block * self.blocks_per_shard
        for number, start in enumerate(range(0, rows, per_shard)):
            name = f"{split}-{number:06d}.tar"
            shards.append(name)
            with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
                for first in range(start, min(start + per_shard, rows), self.rows_per_block):
                    count = min(self.rows_per_block, rows - first)
                    columns = self.columns(first, count, seed)
                    content = block_bytes(columns)
                    member = tarfile.TarInfo(f"{first // self.rows_per_block:08d}.arrow")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                    data = tar.offset - -(-len(content) // 512) * 512
                    queries = int(np.sum(columns["end"].to_numpy() - columns["first"])) if self.interactions else count
                    entries.append((name, data, len(content), count, queries, xxhash.xxh3_64_intdigest(content)))
        path = folder / f"{split}.index.arrow"
        write_index(path, entries)
        counts = {"rows": rows, "queries": sum(entry[4] for entry in entries), "blocks": len(entries)}
        return {**counts, "shards": shards, "index_checksum": checksum(path)}


def write_index(path: Path, entries: list[tuple[str, int, int, int, int, int]]) -> None:
    shard, offset, size, rows, queries, checksums = (list(column) for column in zip(*entries, strict=True))
    columns = {
        "shard": pa.array(shard).dictionary_encode(),
        "offset": pa.array(offset, pa.int64()),
        "size": pa.array(size, pa.int64()),
        "rows": pa.array(rows, pa.int32()),
        "queries": pa.array(queries, pa.int64()),
        "checksum": pa.array(checksums, pa.uint64()),
    }
    write_arrow(path, pa.table(columns))


def write_arrow(path: Path, table: pa.Table, rows_per_batch: int | None = None) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_per_batch)


def block_bytes(columns: dict[str, pa.Array], compression: str | None = "zstd") -> bytes:
    batch = pa.RecordBatch.from_pydict(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def checksum(path: Path) -> str:
    return xxhash.xxh3_64_hexdigest(path.read_bytes())
