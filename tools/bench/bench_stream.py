"""Measure the speed of the row stream, and its cost at scale.

    python tools/bench/bench_stream.py speed --config configs/debian_packages.yaml \\
        --pairs ../shared/data/debian_packages/packages.jsonl.xz --query synopsis --doc description
    python tools/bench/bench_stream.py scale              # an index of 1e9 rows, without the data
    python tools/bench/bench_stream.py catalogue          # 10 million documents of 32 tokens: 2 GB on disk
    python tools/bench/bench_stream.py batches --config configs/tldr.yaml pretrain.rows_global=8192

`speed` measures CPU seconds of one process: stock webdataset on shards with one pair per sample (query.txt, doc.txt,
json) and `.decode()`, against PairStream on the same pairs, to columns and to tensors; and the bytes of both; then
PairStream with tokenization on the fly. `batches` measures the CPU seconds of the training process per pretraining
batch, without and with loader processes.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import webdataset as wds
import xxhash

from bigdssm.cli import run_main
from bigdssm.config import DataConfig, load_config
from bigdssm.dataset.catalogue import Catalogue
from bigdssm.dataset.dataset import Dataset, open_dataset
from bigdssm.dataset.schema import Schema
from bigdssm.features import Numeric, Text, TextTokenizer
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.loader.batch import Collator, to_features
from bigdssm.loader.order import WINDOW_BLOCKS, Order
from bigdssm.loader.stream import PairStream
from bigdssm.training.batches import BatchBuilder, read_batches, row_stream

ROWS_GLOBAL, LANES = 4096, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS), help="measurement")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of config keys")
    parser.add_argument("--config", type=Path, help="YAML file, for `speed` and `batches`")
    parser.add_argument("--pairs", type=Path, help="JSONL file of pairs, also .xz, for `speed`")
    parser.add_argument("--query", help="text column of queries, for `speed`")
    parser.add_argument("--doc", help="text column of documents, for `speed`")
    parser.add_argument("--rows", type=float, default=1e9, help="rows of the index, for `scale` (default: 1e9)")
    parser.add_argument("--docs", type=float, default=1e7, help="documents, for `catalogue` (default: 1e7)")
    args = parser.parse_intermixed_args()
    return run_main(lambda: TASKS[args.task](args))


def speed(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stock = write_stock(args, Path(folder) / "stock")
        config = load_config(args.config, args.overrides).data
        make_pairs(config, PairTables(files=(args.pairs,), split="train"), IngestTarget(Path(folder) / "ours"))
        dataset = Dataset.open(Path(folder) / "ours")
        rows = dataset.num_rows("train")
        urls = [str(path) for path in sorted(stock.glob("*.tar"))]
        plain_s, count = cpu_seconds(lambda: wds.WebDataset(urls, shardshuffle=False).decode())
        report("stock webdataset, .decode()", count, plain_s, size(stock))

        def stream() -> Iterator[Any]:
            steps = rows // ROWS_GLOBAL
            return islice(PairStream(dataset, rows_global=ROWS_GLOBAL, lanes=LANES), steps)

        given = rows // ROWS_GLOBAL * ROWS_GLOBAL
        ours = size(dataset.dir / "partitions") + size(dataset.dir / "catalogue")
        collate = Collator(dataset.schema, dataset.catalogue)
        columns_s, _ = cpu_seconds(lambda: ((step, dataset.catalogue.columns(step.doc_rows)) for step in stream()))
        report("PairStream, to columns", given, columns_s, ours)
        tensors_s, _ = cpu_seconds(lambda: map(collate, stream()))
        report("PairStream and Collator, to tensors", given, tensors_s, ours)
        live(args, Path(folder) / "raw", config)
        faster, smaller = (given / columns_s) / (count / plain_s), size(stock) / count / (ours / rows)
        print(f"to columns: {faster:.0f} × the rows per CPU-second; {smaller:.1f} × fewer bytes per pair")


def live(args: argparse.Namespace, folder: Path, config: DataConfig) -> None:
    """Measure a stream that tokenizes queries on the fly, and the share of its time outside the tokenizer."""
    make_pairs(config, PairTables(files=(args.pairs,), split="train", raw_text=True), IngestTarget(folder))
    dataset = Dataset.open(folder)
    collate = Collator(dataset.schema, dataset.catalogue)
    steps = dataset.num_rows("train") // ROWS_GLOBAL
    tokenizing_s, encode = 0.0, TextTokenizer.encode

    def timed(*texts: Any) -> Any:
        nonlocal tokenizing_s
        begin = time.process_time()
        tokens = encode(*texts)
        tokenizing_s += time.process_time() - begin
        return tokens

    TextTokenizer.encode = timed  # type: ignore[method-assign, assignment]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in a loader process
    passes = []
    for _ in range(3):
        begin, tokenizing_s = time.process_time(), 0.0
        for step in islice(PairStream(dataset, rows_global=ROWS_GLOBAL, lanes=LANES), steps):
            collate(step)
        passes.append((time.process_time() - begin, tokenizing_s))
    seconds, tokenizing_s = min(passes)
    report("with live tokenizing, to tensors", steps * ROWS_GLOBAL, seconds, size(folder / "partitions"))
    print(f"of that, {1 - tokenizing_s / seconds:.1%} is not the tokenizer")


def batches(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    dataset, rows, warm, counted = open_dataset(config.data), config.pretrain.rows_global, 12, 60
    for num_workers in (0, 1, 2):
        stream = row_stream(config, config.pretrain, dataset, 0, 1, num_workers)
        made = read_batches(stream, BatchBuilder(stream, config.pretrain), torch.device("cpu"), warm + counted)
        for _ in islice(made, warm):
            pass
        begin, cpu_s, batch_bytes = time.perf_counter(), time.process_time(), 0
        for batch in made:
            batch_bytes += batch.nbytes
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - begin
        print(
            f"{num_workers} loader processes: a batch of {rows:,} rows, {batch_bytes / counted / 1e6:.1f} MB, costs "
            f"the training process {1e3 * cpu_s / counted:.1f} ms of CPU time; {counted / wall_s:.0f} batches/s"
        )


def write_stock(args: argparse.Namespace, folder: Path) -> Path:
    """Write the pairs as stock WebDataset shards, one sample per pair."""
    folder.mkdir()
    opener = lzma.open if args.pairs.suffix == ".xz" else open
    with (
        opener(args.pairs, "rt", encoding="utf-8") as lines,
        wds.ShardWriter(str(folder / "%06d.tar"), maxcount=10_000, verbose=0) as sink,
    ):
        for number, line in enumerate(lines):
            row = json.loads(line)
            sample = {"query.txt": row.pop(args.query), "doc.txt": row.pop(args.doc), "json": row}
            sink.write({"__key__": f"{number:09d}", **sample})
    return folder


def cpu_seconds(make: Callable[[], Any]) -> tuple[float, int]:
    """Return the CPU seconds of the best of three passes over the result of `make`, and its number of items."""
    best = float("inf")
    for _ in range(3):
        begin = time.process_time()
        count = sum(1 for _ in make())
        best = min(best, time.process_time() - begin)
    return best, count


def report(name: str, rows: int, seconds: float, size_bytes: int) -> None:
    print(
        f"{name:38} {rows:8,} rows {seconds:7.3f} CPU-s {rows / seconds:10,.0f} rows/CPU-s {size_bytes / 1e6:8.1f} MB"
    )


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def scale(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder), int(args.rows))
        base_mb, begin = resident_mb(), time.perf_counter()
        dataset = Dataset.open(folder)
        stream = PairStream(dataset, rows_global=ROWS_GLOBAL, lanes=LANES)
        ids = stream.order.row_ids(0)
        seconds, mb = time.perf_counter() - begin, peak_mb() - base_mb
        blocks = dataset.index("train").num_blocks
        size = f"{dataset.num_rows('train'):,} rows in {blocks:,} blocks"
        print(f"{size}: opened, and the first batch planned, in {seconds:.2f} s and {mb:.0f} MB")
        assert len(np.unique(ids)) == ROWS_GLOBAL
    for rows in (10**5, int(args.rows)):
        order = Order(np.full(rows // 2048, 2048, np.int32), rows_global=ROWS_GLOBAL, lanes=LANES)
        order.row_ids(0)
        begin = time.perf_counter()
        planned = sum(len(order.window(0, lane, 0).order) for lane in range(LANES))
        per_step = (time.perf_counter() - begin) / planned * ROWS_GLOBAL
        print(f"{rows:13,} rows: a step of {ROWS_GLOBAL:,} takes {per_step * 1e3:.2f} ms of planning")
    blocks = LANES * WINDOW_BLOCKS
    print(f"in memory: at most {LANES} lanes × {WINDOW_BLOCKS} blocks = {blocks} blocks, over all ranks together")


def write_index(folder: Path, rows: int) -> None:
    """Write the metadata of a dataset without its rows."""
    per_block, blocks_per_shard = 2048, 64
    blocks = -(-rows // per_block)
    counts = np.full(blocks, per_block, np.int32)
    counts[-1] = rows - per_block * (blocks - 1)
    schema = Schema({"age": Numeric().with_name("age")}, {"year": Numeric().with_name("year")})
    schema.save(folder)
    partition = folder / "partitions" / "base"
    partition.mkdir(parents=True)
    number = np.arange(blocks) // blocks_per_shard
    names = pa.array([f"train-{i:06d}.tar" for i in range(int(number[-1]) + 1)])
    table = pa.table(
        {
            "shard": pa.DictionaryArray.from_arrays(pa.array(number.astype(np.int32)), names),
            "offset": np.arange(blocks) % blocks_per_shard * 400_000 + 512,
            "size": np.full(blocks, 399_000),
            "rows": counts,
            "queries": counts,
            "checksum": np.zeros(blocks, np.uint64),
        }
    )
    path = partition / "train.index.arrow"
    write_table(path, table)
    facts = {"rows": rows, "queries": rows, "blocks": blocks, "shards": names.to_pylist()}
    facts["index_checksum"] = xxhash.xxh3_64_hexdigest(path.read_bytes())
    content = {"splits": {"train": facts}, "counts_checksum": ""}
    (partition / "partition.json").write_text(json.dumps(content))
    (folder / "catalogue").mkdir()
    one = {"doc_key": ["0"], "doc_id": [0], "doc_title": ["0"], "year": pa.array([0.0], pa.float32())}
    write_table(folder / "catalogue" / "0.arrow", pa.table(one))
    head = {"format": 1, "name": "synthetic", "schema": schema.fingerprint(), "partitions": ["base"]}
    entry = {"file": "catalogue/0.arrow", "rows": 1, "checksum": ""}
    (folder / "dataset.json").write_text(json.dumps({**head, "catalogue": [entry]}))


def catalogue(args: argparse.Namespace) -> None:
    docs, tokens = int(args.docs), 32
    schema = Schema({}, {"title": Text(max_tokens=tokens).with_name("title")})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "000000.arrow"
        keys = pa.array(np.arange(docs)).cast(pa.string())
        offsets = pa.array(np.arange(docs + 1) * tokens)
        values = pa.array(np.resize(np.arange(30_000, dtype=np.int32), docs * tokens))
        title = pa.LargeListArray.from_arrays(offsets, values)
        write_table(path, pa.table({"doc_key": keys, "doc_id": np.arange(docs), "doc_title": keys, "title": title}))
        del keys, offsets, values, title
        base_mb, begin = private_mb(), time.perf_counter()
        opened = Catalogue([path], schema)
        rows = np.arange(0, docs, docs // 8192)[:8192]
        features = to_features(schema.doc, opened.columns(rows))
        seconds = time.perf_counter() - begin
        print(
            f"{opened.num_docs:,} documents × {tokens} tokens, {path.stat().st_size / 1e9:.2f} GB: opened and", end=" "
        )
        print(f"{len(features['title']):,} read in {seconds:.2f} s; {private_mb() - base_mb:.0f} MB private")


def write_table(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def resident_mb() -> float:
    return status_mb("VmRSS")


def private_mb() -> float:
    return status_mb("RssAnon")


def status_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


TASKS: dict[str, Callable[[argparse.Namespace], None]] = {
    "speed": speed,
    "scale": scale,
    "catalogue": catalogue,
    "batches": batches,
}

if __name__ == "__main__":
    raise SystemExit(main())
