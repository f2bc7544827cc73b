"""Describe a dataset: sizes, schema, lengths, popular documents, duplicates, and decoded sample rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from bigdssm.dataset.blocks import read_block
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.partition import read_index
from bigdssm.dataset.schema import QUARANTINE_FILE, pair_hash
from bigdssm.errors import DataError
from bigdssm.features import Decoder, Feature
from bigdssm.features.ragged import Ragged
from bigdssm.loader.batch import Collator, inputs_of_events

MAX_SCAN_BLOCKS = 512  # about a million rows, spread evenly over the split
MAX_SCAN_DOCS = 1_000_000
PERCENTILES = (0, 25, 50, 75, 95, 100)
MAX_BINS = 16


@dataclass(frozen=True)
class SplitSize:
    """The size of one split of one partition."""

    partition: str
    split: str
    rows: int
    queries: int  # of these rows
    blocks: int
    shards: int
    num_bytes: int


@dataclass(frozen=True)
class LengthStatistics:
    """Statistics of the lengths of a list feature (tokens, values, history items)."""

    feature: str
    percentiles: tuple[int, ...]  # at PERCENTILES
    cut: float | None  # share of rows at the maximum length, None without one
    histogram: tuple[int, ...]  # rows in at most MAX_BINS equal ranges from 0 to the longest


@dataclass(frozen=True)
class Description:
    """The output of bigdssm inspect_shards."""

    sizes: list[SplitSize]
    features: list[tuple[str, Feature]]  # (side, feature)
    vocab_size: int  # of the tokenizer, 0 without text
    num_docs: int
    docs_without_train_rows: int
    num_withdrawn: int
    num_versions: int  # of changed documents, in addition to the first ones
    seen_as_of: str  # partition or event: the time of the versions in a history
    top_docs: list[tuple[str, int]]  # title, train positives
    lengths: list[LengthStatistics]
    scanned_queries: int
    unreadable_blocks: int
    duplicate_pairs: int  # scanned rows with a (query_id, document) of an earlier one
    num_bad: int  # entries of the quarantine


def describe(dataset: Dataset, split: str = "train", top: int = 10) -> Description:
    """Describe a dataset; lengths and duplicates are those of `split`. Raises DataError."""
    index = dataset.index(split)
    step = -(-index.num_blocks // MAX_SCAN_BLOCKS)
    lengths: dict[str, list[np.ndarray]] = {}
    pairs: list[np.ndarray] = []
    unreadable = 0
    for block in range(0, index.num_blocks, step):
        batch, bad = read_block(index, block, dataset.layout)
        if batch is None:
            unreadable += 1
            continue
        good = np.setdiff1d(np.arange(batch.num_rows), [fault.row for fault in bad if fault.rows])
        rows = dataset.rows(split, 0, index.first_row[block] + good, batch.take(pa.array(good)))
        for name, column in rows.query.items():
            if isinstance(column, Ragged) and "." not in name:  # else of the history that it belongs to
                lengths.setdefault(f"query.{name}", []).append(column.lengths)
        pairs.append(pair_hash(rows.query_ids, rows.doc_rows))
    sample = np.unique(np.linspace(0, dataset.catalogue.num_docs - 1, MAX_SCAN_DOCS).astype(np.int64))
    for name, column in dataset.catalogue.columns(sample).items():
        if isinstance(column, Ragged):
            lengths[f"doc.{name}"] = [column.lengths]
    counts = dataset.doc_counts()
    best = np.argsort(-counts, kind="stable")[:top]
    hashes = np.concatenate(pairs) if pairs else np.empty(0, np.int64)
    sizes = []
    for number, partition in enumerate(dataset.partitions):
        for split_name, content in partition.content["splits"].items():
            files = [partition.folder / name for name in content["shards"]]
            if partition.remote is None:
                num_bytes = sum(path.stat().st_size for path in files if path.exists())
            else:  # without the tar headers
                num_bytes = int(read_index(partition, split_name, number).size.sum())
            rows, queries = dataset.sizes(split_name)[number].tolist()
            sizes.append(SplitSize(partition.name, split_name, rows, queries, content["blocks"], len(files), num_bytes))
    quarantine = dataset.dir / QUARANTINE_FILE
    features = [
        (side, feature) for side, by_name in dataset.header.schema.sides.items() for feature in by_name.values()
    ]
    caps = {f"{side}.{feature.name}": feature.max_length for side, feature in features}
    return Description(
        sizes=sizes,
        features=features,
        vocab_size=dataset.vocab_size,
        num_docs=dataset.catalogue.num_docs,
        docs_without_train_rows=int((counts == 0).sum()),
        num_withdrawn=len(dataset.catalogue.withdrawn),
        num_versions=sum(file.rows for file in dataset.catalogue_files if file.since is not None),
        seen_as_of={"partitions": "partition", "events": "event"}[dataset.header.items],
        top_docs=list(zip(dataset.catalogue.titles(best), counts[best].tolist(), strict=True)),
        lengths=[_lengths(name, np.concatenate(parts), caps[name]) for name, parts in lengths.items()],
        scanned_queries=len(hashes),
        unreadable_blocks=unreadable,
        duplicate_pairs=len(hashes) - len(np.unique(hashes)),
        num_bad=len(quarantine.read_bytes().splitlines()) if quarantine.exists() else 0,
    )


def _lengths(name: str, lengths: np.ndarray, cap: int | None) -> LengthStatistics:
    values = np.percentile(lengths, PERCENTILES, method="nearest") if len(lengths) else np.zeros(len(PERCENTILES))
    cut = None if cap is None or not len(lengths) else float((lengths >= cap).mean())
    longest = int(lengths.max(initial=0))
    histogram = np.histogram(lengths, min(longest + 1, MAX_BINS), (0, longest + 1))[0]
    return LengthStatistics(name, tuple(int(value) for value in values), cut, tuple(histogram.tolist()))


def sample_rows(dataset: Dataset, split: str = "train", count: int = 10) -> list[dict[str, Any]]:
    """Return the split's first rows, decoded from the model's input tensors: feature → readable value.

    Texts are their tokens, categories their values, histories the titles of their items, oldest first.
    """
    rows = next(dataset.iterate(split, count), None)
    if rows is None:
        raise DataError(f"{dataset.dir}: no row of the split {split} can be read; use --verify")
    batch = Collator(dataset.schema, dataset.catalogue)(rows)
    items: dict[str, dict[int, str]] = {}

    def item(of: str, code: int) -> str:
        if of not in items:
            codes = dataset.catalogue.codes(of, dataset.catalogue.all_rows)
            distinct, first = np.unique(codes, return_index=True)
            items[of] = dict(zip(distinct.tolist(), dataset.catalogue.titles(first), strict=True))
        return items[of][code]

    decoder = Decoder(dataset.tokenizer, item)
    decoded = []
    for i in range(len(rows)):
        row: dict[str, Any] = {"row": int(batch.row_ids[i]), "relevance": float(batch.relevance[i])}
        for name, feature in dataset.schema.query.items():
            row[f"query.{name}"] = feature.display(batch.query[name][i].numpy(), decoder)
            for event in inputs_of_events(name, batch.query):
                of_event = dataset.schema.event[event.removeprefix(f"{name}.")]
                values = batch.query[event][i][: batch.query_lengths[name].used[i]].numpy()
                row[f"query.{event}"] = [of_event.display(value, decoder) for value in values]
        for name, feature in dataset.schema.doc.items():
            row[f"doc.{name}"] = feature.display(batch.doc[name][int(batch.positive[i])].numpy(), decoder)
        decoded.append(row)
    return decoded
