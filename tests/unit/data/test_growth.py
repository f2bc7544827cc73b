"""What make_shards writes is what the stream reads; a dataset grows by partitions and leaves the old ones alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xxhash

from bigdssm.config import DataConfig, FeatureConfig, TokenizerConfig
from bigdssm.data import Collator, Dataset, PairStream
from bigdssm.data.making import Target
from bigdssm.data.pairs import PairTables, make_pairs
from bigdssm.errors import DataError

ROWS = 3000
CONFIG = DataConfig(
    dir="data",
    query={"line": FeatureConfig(type="numeric"), "words": FeatureConfig(type="text", max_tokens=8)},
    doc={"kind": FeatureConfig(type="categorical")},
    tokenizer=TokenizerConfig(vocab_size=200),
)


def table(path: Path, first: int, count: int) -> Path:
    rows = (
        {"line": i, "words": f"word{i % 50} of {i % 7}", "kind": f"kind {i % 40}"} for i in range(first, first + count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A dataset of two days, and the checksums of its first day's files from before the second was appended."""
    folder = tmp_path_factory.mktemp("grown")
    first = PairTables(files=(table(folder / "1.jsonl", 0, ROWS),), split="train")
    make_pairs(CONFIG, first, Target(folder / "data", partition="day1"))
    before = checksums(folder / "data" / "partitions" / "day1")
    second = PairTables(files=(table(folder / "2.jsonl", ROWS, 500),), split="train")
    make_pairs(CONFIG, second, Target(folder / "data", partition="day2", append=True))
    return folder / "data", before


def checksums(folder: Path) -> dict[str, str]:
    return {path.name: xxhash.xxh3_64_hexdigest(path.read_bytes()) for path in folder.iterdir()}


def epoch(dataset: Dataset) -> np.ndarray:
    """Return the lines of the source in the order in which an epoch gives them."""
    stream = PairStream(dataset, rows_global=100, lanes=4)
    parts = [np.asarray(next(stream).query["line"]) for _ in range(stream.steps_per_epoch)]
    return np.concatenate(parts).astype(np.int64)


def test_every_row_of_both_days_arrives_with_its_own_document(grown: tuple[Path, dict[str, str]]) -> None:
    dataset = Dataset.open(grown[0])
    assert [partition.name for partition in dataset.partitions] == ["day1", "day2"]
    dataset.check_against(CONFIG)
    assert sorted(epoch(dataset).tolist()) == list(range(ROWS + 500))
    stream = PairStream(dataset, rows_global=100, lanes=4)
    collate = Collator(dataset.schema, dataset.catalogue, dataset.pad_token_id)
    vocabulary = dataset.schema.doc["kind"].vocabulary
    for _ in range(stream.steps_per_epoch):
        batch = collate(next(stream))
        kinds = [vocabulary[code - 2] for code in batch.doc["kind"][batch.positive].tolist()]
        assert kinds == [f"kind {int(line) % 40}" for line in batch.query["line"].tolist()]
    assert dataset.doc_counts().sum() == ROWS + 500


def test_an_appended_partition_leaves_the_first_as_it_was(grown: tuple[Path, dict[str, str]]) -> None:
    folder, before = grown
    assert checksums(folder / "partitions" / "day1") == before
    first, second = Dataset.open(folder, ["day1"]), Dataset.open(folder, ["day2"])
    assert sorted(epoch(first).tolist()) == list(range(ROWS))
    assert sorted(epoch(second).tolist()) == list(range(ROWS, ROWS + 500))
    with pytest.raises(DataError, match="partition day2 is new"):
        PairStream(folder, rows_global=100, lanes=4).check_state(PairStream(first, rows_global=100, lanes=4).state())


def test_neighbours_of_the_source_are_far_apart(grown: tuple[Path, dict[str, str]]) -> None:
    lines = epoch(Dataset.open(grown[0], ["day1"]))
    assert np.abs(np.diff(lines)).mean() >= 0.3 * ROWS  # given one after the other: far apart in the source
    place = np.empty(ROWS, np.int64)
    place[lines] = np.arange(ROWS)
    assert np.abs(np.diff(place)).mean() >= 0.3 * ROWS  # neighbours in the source: given far apart
