"""The stream reads the rows that make_shards wrote; new partitions do not change existing ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from bigdssm.config import DataConfig, TokenizerConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.schema import Schema
from bigdssm.errors import DataError
from bigdssm.features import Categorical, Numeric, Text, Vocabulary
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.loader.batch import Collator
from bigdssm.loader.stream import PairStream

ROWS = 3000
CONFIG = DataConfig(
    dir="data",
    query={"line": Numeric(), "words": Text(max_tokens=8)},
    doc={"kind": Categorical()},
    tokenizer=TokenizerConfig(vocab_size=200),
)


def kind_of(line: int) -> int:
    """Return one of 40 on the first day, on the second one of 49."""
    return line % 40 if line < ROWS else line % 49


def table(path: Path, first: int, count: int) -> Path:
    rows = (
        {"line": i, "words": f"word{i % 50} of {i % 7}", "kind": f"kind {kind_of(i)}"}
        for i in range(first, first + count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A dataset of two days, and the checksums of its first day's files from before the second was appended."""
    folder = tmp_path_factory.mktemp("grown")
    first = PairTables(files=(table(folder / "1.jsonl", 0, ROWS),), split="train")
    make_pairs(CONFIG, first, IngestTarget(folder / "data", partition="day1"))
    before = checksums(folder / "data" / "partitions" / "day1")
    second = PairTables(files=(table(folder / "2.jsonl", ROWS, 500),), split="train")
    make_pairs(CONFIG, second, IngestTarget(folder / "data", partition="day2", append=True))
    return folder / "data", before


def checksums(folder: Path) -> dict[str, str]:
    return {path.name: xxhash.xxh3_64_hexdigest(path.read_bytes()) for path in folder.iterdir()}


def epoch(dataset: Dataset) -> np.ndarray:
    """Return the lines of the source in the order of an epoch."""
    stream = PairStream(dataset, rows_global=100, lanes=4)
    parts = [np.asarray(next(stream).query["line"]) for _ in range(stream.steps_per_epoch)]
    return np.concatenate(parts).astype(np.int64)


def test_every_row_of_both_days_arrives_with_its_own_document(grown: tuple[Path, dict[str, str]]) -> None:
    dataset = Dataset.open(grown[0])
    assert [partition.name for partition in dataset.partitions] == ["day1", "day2"]
    dataset.check_against(CONFIG)
    assert sorted(epoch(dataset).tolist()) == list(range(ROWS + 500))
    stream = PairStream(dataset, rows_global=100, lanes=4)
    collate = Collator(dataset.schema, dataset.catalogue)
    vocabulary = dataset.schema.doc["kind"].vocabulary
    for _ in range(stream.steps_per_epoch):
        batch = collate(next(stream))
        kinds = [vocabulary[code - 2] for code in batch.doc["kind"][batch.positive].tolist()]
        assert kinds == [f"kind {kind_of(int(line))}" for line in batch.query["line"].tolist()]
    assert dataset.doc_counts().sum() == ROWS + 500


def test_an_appended_partition_leaves_the_first_as_it_was(grown: tuple[Path, dict[str, str]]) -> None:
    folder, before = grown
    assert checksums(folder / "partitions" / "day1") == before
    files = Dataset.open(folder).schema.vocabulary_files
    assert [(file.path.name, file.rows) for file in files] == [
        ("doc.kind.000000.arrow", 40),
        ("doc.kind.000001.arrow", 9),
    ]
    first, second = Dataset.open(folder, ["day1"]), Dataset.open(folder, ["day2"])
    assert sorted(epoch(first).tolist()) == list(range(ROWS))
    assert sorted(epoch(second).tolist()) == list(range(ROWS, ROWS + 500))
    with pytest.raises(DataError, match="partition day2 is new"):
        PairStream(folder, rows_global=100, lanes=4).check_state(PairStream(first, rows_global=100, lanes=4).state())


def streams(folder: Path) -> tuple[PairStream, PairStream]:
    """Return a stream of the first day, and one over the days from the second on."""
    days = Dataset.open(folder, ["day1"]), Dataset.open(folder, first="day2")
    first, second = (PairStream(day, rows_global=100, lanes=4) for day in days)
    return first, second


def changed_schema(folder: Path, **changes: object) -> Path:
    """Change the document feature `kind` of a dataset."""
    schema = Schema.load(folder)
    schema = replace(schema, doc={"kind": replace(schema.doc["kind"], **changes)})
    schema.save(folder)
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "schema": schema.fingerprint()}))
    return folder


def test_a_stream_begins_at_partitions_that_were_added(grown: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    first, second = streams(grown[0])
    assert first.check_state(first.state())
    assert not second.check_state(first.state())
    folder = Path(shutil.copytree(grown[0], tmp_path / "data"))
    vocabulary = Schema.load(folder).doc["kind"].vocabulary
    longer = changed_schema(folder, vocabulary=Vocabulary.of((*vocabulary, "a new kind")))
    assert not streams(longer)[1].check_state(first.state())


@pytest.mark.parametrize("change", ["order", "shorter", "declaration"])
def test_a_vocabulary_that_has_not_only_grown_is_refused(
    grown: tuple[Path, dict[str, str]], tmp_path: Path, change: str
) -> None:
    state = streams(grown[0])[0].state()
    folder = Path(shutil.copytree(grown[0], tmp_path / "data"))
    words = list(Schema.load(folder).doc["kind"].vocabulary)
    changes = {"order": {"vocabulary": Vocabulary.of([*words[::-1], "new"])}}
    changes["shorter"] = {"vocabulary": Vocabulary.of(words[:-1])}
    changed_schema(folder, **changes.get(change, {"column": "other"}))
    with pytest.raises(DataError, match="schema was") as caught:
        streams(folder)[1].check_state(state)
    assert "partition" not in str(caught.value)


def test_a_refusal_names_the_ways_to_continue(grown: tuple[Path, dict[str, str]]) -> None:
    first, second = streams(grown[0])
    whole = PairStream(grown[0], rows_global=100, lanes=4)
    with pytest.raises(DataError, match=r"day2 is new.* on the new partitions with data\.from_partition=day2"):
        whole.check_state(first.state())
    with pytest.raises(DataError, match=r"day1 is new.* resume with data\.from_partition=day2"):
        whole.check_state(second.state())


def test_old_partitions_must_be_unchanged(grown: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    first, second = streams(grown[0])
    other = PairStream(second.dataset, rows_global=200, lanes=4)
    with pytest.raises(DataError, match="rows_global was 100, is 200"):
        other.check_state(first.state())
    with pytest.raises(DataError, match="partition day1 is older than day2"):
        first.check_state(second.state())
    folder = Path(shutil.copytree(grown[0], tmp_path / "data"))
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "partitions": ["day2"]}))
    with pytest.raises(DataError, match="partition day1 is missing"):
        PairStream(Dataset.open(folder, first="day2"), rows_global=100, lanes=4).check_state(first.state())
    with pytest.raises(DataError, match=r"no partition 'day3', only \['day1', 'day2'\]"):
        Dataset.open(grown[0], first="day3")


def test_neighbours_of_the_source_are_far_apart(grown: tuple[Path, dict[str, str]]) -> None:
    lines = epoch(Dataset.open(grown[0], ["day1"]))
    assert np.abs(np.diff(lines)).mean() >= 0.3 * ROWS  # consecutive rows: far apart in the source
    position = np.empty(ROWS, np.int64)
    position[lines] = np.arange(ROWS)
    assert np.abs(np.diff(position)).mean() >= 0.3 * ROWS  # neighbours in the source: far apart in the epoch
