"""Inspect a dataset: sizes, schema, lengths, popular documents, duplicates, decoded sample rows, and damage."""

import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bigdssm.config import DEFAULT_CACHE_BYTES
from bigdssm.dataset.blocks import FORGOTTEN, good_rows, read_block, read_range
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.partition import read_dataset_json, read_index
from bigdssm.dataset.remote import COUNTS_FILE, FileCache, catalogue_entries
from bigdssm.dataset.schema import QUARANTINE_FILE, VOCABULARIES, pair_hash
from bigdssm.errors import DataError
from bigdssm.features import Decoder, Feature
from bigdssm.features.ragged import Ragged
from bigdssm.loader.batch import Collator, inputs_of_events
from bigdssm.utils.hashing import file_checksum
from bigdssm.utils.log import Progress, no_progress
from bigdssm.utils.urls import is_url

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
        good = good_rows(batch, bad)
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


def verify_dataset(folder: str | Path, progress: Progress = no_progress) -> list[str]:
    """Return a message per damaged file or block, an empty list if there is no damage.

    A dataset at a URL is downloaded into a temporary cache. Raises DataError: the dataset cannot be opened; at a URL,
    also: a file other than a shard is damaged.
    """
    if is_url(folder):
        with tempfile.TemporaryDirectory(prefix="verify-") as cache:
            return _damages(Dataset.open(folder, cache=FileCache(Path(cache), DEFAULT_CACHE_BYTES)), progress)
    entries = catalogue_entries(read_dataset_json(Path(folder)))
    # references into a damaged catalogue cannot be validated
    return _compared(Path(folder), _checksums(entries)) or _damages(Dataset.open(folder), progress)


def _damages(dataset: Dataset, progress: Progress) -> list[str]:
    damages = _compared(dataset.dir / "tokenizer", read_dataset_json(dataset.dir).get("tokenizer", {}))
    vocabularies = {file.path.name: file.checksum for file in dataset.schema.vocabulary_files}
    damages += _compared(dataset.dir / VOCABULARIES, vocabularies)
    for number, partition in enumerate([*dataset.partitions, *dataset.item_partitions]):
        content = partition.content
        sequences = _checksums(content.get("sequences", []))
        damages += _compared(partition.folder, {COUNTS_FILE: content["counts_checksum"], **sequences})
        for split in content["splits"]:
            try:
                index = read_index(partition, split, number)
            except DataError as error:
                damages.append(str(error))
                continue
            for block in range(index.num_blocks):
                faults = read_block(index, block, dataset.layout)[1]
                damages += [str(fault) for fault in faults if fault.reason != FORGOTTEN]
                shard = index.shards[index.shard[block]]
                if isinstance(shard, Path) and shard.is_file():
                    # this project ignores the headers, other tar readers do not
                    header = read_range(shard, int(index.offset[block]) - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
                    name, recorded_size = index.name(block), int(index.size[block])
                    try:
                        size = tarfile.TarInfo.frombuf(header, "utf-8", "strict").size
                    except (tarfile.HeaderError, UnicodeDecodeError) as error:
                        damages.append(f"{name}: its tar header is damaged ({error}); plain tar readers stop there")
                    else:
                        if size != recorded_size:
                            damages.append(f"{name}: its tar header gives {size} bytes, the index {recorded_size}")
                progress(f"verifying {partition.name}/{split}", block + 1, index.num_blocks)
    return damages


def _checksums(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {entry["file"]: entry["checksum"] for entry in entries}


def _compared(folder: Path, checksums: Mapping[str, str]) -> list[str]:
    """Return a message per file that is missing or has another checksum."""
    damages = []
    for name, checksum in checksums.items():
        path = folder / name
        if not path.is_file():
            damages.append(f"{path} is missing")
        elif file_checksum(path, bits=64) != checksum:
            damages.append(f"{path} is damaged: its checksum is not the recorded one")
    return damages
