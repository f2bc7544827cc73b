"""One rule for the documents that may be negatives at a time, against plain Python, for every kind of negative."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import bigdssm
from bigdssm.commands import mine_negatives
from bigdssm.config import Config, ModelConfig, NegativesConfig, StageConfig, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.negatives import NegativeDocuments
from bigdssm.dataset.rows import Rows
from bigdssm.loader.stream import PairStream
from bigdssm.losses import FPS, Softmax
from bigdssm.losses.declarations import NoCorrection
from bigdssm.models import Encoded
from bigdssm.retrieval.embed import Encoders
from bigdssm.retrieval.hard_negatives import HardNegatives, SampledNegatives
from bigdssm.retrieval.mining import mine
from bigdssm.training.batches import BatchBuilder, read_batches
from bigdssm.training.objective import Objective, in_catalogue_share
from bigdssm.training.refresh import HardNegativeRefresh

SINCE = {f"i{n}": 300.0 * (n // 4) for n in range(12)} | {"disliked": 0.0, "new": 0.0, "newest": 900.0}
WITHDRAWN, UNKNOWN = {"i1", "i6"}, {"disliked", "new", "newest"}
CONFIG: dict[str, Any] = {
    "data": {
        "lanes": 2, "exclude_seen": False, "time_unit": "s",
        "query": {"past": {"type": "history", "of": "item_id", "max_items": 4}},
        "doc": {"item_id": {"type": "categorical"}, "price": {"type": "numeric"}},
    },
    "model": {
        "dim": 8, "score": "dot", "query": {"residual": "past", "mlp": []}, "tables": {"id_dropout": 0.3},
        "doc": {"residual": "item_id", "mlp": [], "embedding_dim": 8},
    },
    "pretrain": {"rows_global": 40, "steps": 1, "loss": {"name": "softmax"}, "validate_every_steps": 0},
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a shop with new, disliked and withdrawn items, whose times start with or after the events."""
    folder, random = tmp_path_factory.mktemp("shop"), np.random.RandomState(0)
    content = {**CONFIG, "data": {**CONFIG["data"], "dir": str(folder / "data")}}
    content["run"] = {"dir": str(folder / "run"), "trackers": []}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    events = []
    for user in range(25):
        for time in sorted(random.choice(1000, 8, replace=False).tolist()):
            offered = [item for item, since in SINCE.items() if since <= time and item not in ("new", "newest")]
            item = random.choice(offered)
            events.append((f"u{user}", item, float(time), int(item != "disliked")))
    columns = ["user_id", "item_id", "timestamp", "rating"]
    items = pd.DataFrame({"item_id": list(SINCE), "price": 5.0, "since": list(SINCE.values())})
    bigdssm.make_dataset(
        path, interactions=pd.DataFrame(events, columns=columns), items=items, items_time_column="since",
        rating_column="rating", split="train",
    )  # fmt: skip
    bigdssm.make_dataset(path, append=True, partition="gone", withdrawn={"item_id": sorted(WITHDRAWN)})
    return path


@pytest.fixture(scope="module")
def dataset(config: Path) -> Dataset:
    dataset = Dataset.open(load_config(config).data.dir).with_trained_ids()
    assert set(dataset.catalogue.keys(dataset.catalogue.withdrawn)) == WITHDRAWN
    return dataset


def allowed(dropout: float, time: float = np.inf, *, given: bool = False) -> set[str]:
    """Return the items that may be negatives of a query at `time`."""
    items = {item for item, since in SINCE.items() if since <= time}
    if dropout:
        items -= UNKNOWN
    return items if given else items - WITHDRAWN


def keys(dataset: Dataset, rows: Any) -> list[str]:
    return dataset.catalogue.keys(np.asarray(rows, np.int64))


def builder(dataset: Dataset, dropout: float, stage: StageConfig, config: Path | None = None) -> BatchBuilder:
    hard = None
    if config is not None:
        loaded = with_dropout(load_config(config, ["pretrain.negatives={hard: 9, mining: {uniform: true}}"]), dropout)
        hard, _ = HardNegativeRefresh(loaded, "pretrain", None, dataset, None).load(0, False)  # type: ignore[arg-type]
    return BatchBuilder(PairStream(dataset, rows_global=40, lanes=2), stage, 0, hard, id_dropout=dropout)


def with_dropout(config: Config, dropout: float) -> Config:
    tables = replace(config.model.tables, id_dropout=dropout)
    return replace(config, model=replace(config.model, tables=tables))


def train_rows(dataset: Dataset) -> Iterator[Rows]:
    yield from dataset.iterate("train", 50)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_drawn_columns(dataset: Dataset, dropout: float) -> None:
    stage = StageConfig(negatives=NegativesConfig(uniform=60))
    drawn = builder(dataset, dropout, stage)
    assert {key for step in range(9) for key in keys(dataset, drawn.drawn(step))} == allowed(dropout)
    stage = StageConfig(negatives=NegativesConfig(columns="catalogue", mask="none"))
    build = builder(dataset, dropout, stage)
    batch = next(read_batches(PairStream(dataset, rows_global=40, lanes=2), build, torch.device("cpu")))
    columns = keys(dataset, batch.doc_rows[in_catalogue_share(batch, 0, 1)])
    assert sorted(columns) == sorted(allowed(dropout))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_negatives_that_are_drawn_instead_of_hard_ones(config: Path, dataset: Dataset, dropout: float) -> None:
    """Each query's are those that were offered at its time, and all of them are drawn."""
    build = builder(dataset, dropout, StageConfig(negatives=NegativesConfig(hard=9)), config)
    drawn: set[tuple[str, float]] = set()
    times: set[float] = set()
    for rows in train_rows(dataset):
        documents = build.negatives(rows)[0]
        assert documents is not None
        for time, of_query in zip(dataset.request_times(rows).tolist(), documents, strict=True):
            found = keys(dataset, of_query[of_query >= 0])
            assert found and set(found) <= allowed(dropout, time)
            epoch = SINCE["i11"] if time >= SINCE["i11"] else SINCE["i7"] if time >= SINCE["i7"] else 0.0
            times.add(epoch)
            drawn |= {(key, epoch) for key in found}
    assert len(times) == 3
    assert drawn >= {(key, time) for time in times for key in allowed(dropout, time)}


@pytest.mark.parametrize("exact_up_to", [None, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_hard_negatives(dataset: Dataset, dropout: float, exact_up_to: int | None) -> None:
    """The windows hold all that were offered at the query's time, but for the target; an index may miss some."""
    random = np.random.RandomState(1)
    vectors = torch.from_numpy(random.standard_normal((len(SINCE), 3)).astype(np.float32))
    encoders = Encoders(lambda rows: torch.ones(len(rows), 3), lambda rows: vectors[torch.from_numpy(rows)])
    negatives = NegativeDocuments.of(dataset, dropout)
    records = mine(
        encoders, dataset, first=0, last=len(SINCE), exact_up_to=exact_up_to, exclude_seen=False, negatives=negatives
    )
    windows = dict(zip(records["query"].tolist(), records["window"].tolist(), strict=True))
    num_later = 0
    for rows in train_rows(dataset):
        queries = zip(rows.query_keys.tolist(), rows.doc_rows, dataset.request_times(rows).tolist(), strict=True)
        for query, target, time in queries:
            found = keys(dataset, [row for row in windows[query] if row >= 0])
            expected = allowed(dropout, time) - set(keys(dataset, [target]))
            assert set(found) <= expected and (exact_up_to is not None or sorted(found) == sorted(expected))
            num_later += len(allowed(dropout)) - len(allowed(dropout, time))
    assert num_later > 0


def test_the_files_of_a_stage_and_of_the_command(config: Path, dataset: Dataset, tmp_path: Path) -> None:
    """Both mine by the id_dropout of their model."""
    negatives = "pretrain.negatives={hard: 3, mining: {first: 0, last: 15}}"
    options = [f"run.dir={tmp_path}", negatives, "pretrain.steps=9"]  # an epoch, which is mined whole
    best = bigdssm.pretrain(config, options).best
    command = ["--model", str(best), "--data", str(dataset.dir), "--first", "0", "--last", "15"]
    assert not mine_negatives.main([*command, "--out", str(tmp_path / "mined.npy")])
    for path in (tmp_path / "pretrain" / "mined_negatives.npy", tmp_path / "mined.npy"):
        hard = HardNegatives.open(path)
        for rows in train_rows(dataset):
            windows = hard.windows(rows.query_keys)
            for time, window in zip(dataset.request_times(rows).tolist(), windows, strict=True):
                assert set(keys(dataset, window[window >= 0])) <= allowed(0.3, time), path


@pytest.mark.parametrize("loss", [FPS(), Softmax()], ids=lambda loss: loss.name)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_columns_of_the_batch(dataset: Dataset, dropout: float, loss: Any) -> None:
    """A withdrawn document of another query is a negative, as it was offered then; a disliked unknown one is none."""
    stage = StageConfig(loss=loss, negatives=NegativesConfig(mask="none"), sampling=NoCorrection())
    build = builder(dataset, dropout, stage)
    numbers, disliked, gone = [], 0, 0
    for batch in read_batches(PairStream(dataset, rows_global=40, lanes=2), build, torch.device("cpu"), 3):
        assert batch.time is not None
        columns = keys(dataset, batch.doc_rows)
        # such a loss counts a document as often as it is a positive of the batch
        counts = np.ones(len(columns), int) if loss.all_columns else np.bincount(batch.positive, minlength=len(columns))
        disliked += columns.count("disliked")
        gone += len(WITHDRAWN & set(columns))
        expected = 0
        queries = zip(batch.time.tolist(), batch.positive.tolist(), batch.relevance.tolist(), strict=True)
        for time, positive, relevance in queries:
            may_be = allowed(dropout, time, given=True)
            others = zip(columns, counts.tolist(), strict=True)
            expected += sum(count for key, count in others if key in may_be and key != columns[positive])
            if relevance == 0 and columns[positive] in may_be:  # of other rows; this query has no weight
                expected += counts[positive] - 1
        U, W = torch.randn(len(batch.time), 8), torch.randn(len(columns), 8)
        objective = Objective(stage, ModelConfig(score="dot"), None, 40)
        output = objective(Encoded(U, W, None, torch.tensor([1.0])), batch)
        numbers.append((float(output.stats["effective_negatives"]) * len(batch.time), expected))
    for number, expected in numbers:
        assert number == pytest.approx(expected)
    assert disliked > 0 and gone > 0
    few = read_batches(PairStream(dataset, rows_global=2, lanes=2), build, torch.device("cpu"), 9)
    assert {batch.no_negative is not None for batch in few} == {dropout > 0}, "the same on ranks without such documents"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_candidates(dataset: Dataset, dropout: float) -> None:
    """A list may have withdrawn items, which were offered then, but no unknown ones."""
    negatives = NegativesConfig(in_batch=False, hard=len(SINCE), mask="none")
    stage = StageConfig(loss=Softmax(), negatives=negatives, sampling=NoCorrection())
    build = builder(dataset, dropout, stage)
    every = np.arange(len(SINCE))
    build.negatives = lambda rows: SampledNegatives(np.tile(every, (rows.num_queries, 1)))  # type: ignore[method-assign]
    batch = next(read_batches(PairStream(dataset, rows_global=40, lanes=2), build, torch.device("cpu")))
    assert batch.time is not None and batch.negatives is not None
    positives = keys(dataset, batch.doc_rows[batch.positive])
    rows = zip(batch.time.tolist(), positives, strict=True)
    expected = sum(len(allowed(dropout, time, given=True) - {positive}) for time, positive in rows)
    is_positive = batch.negatives == batch.positive[:, None]
    batch = replace(batch, negatives=batch.negatives.masked_fill(is_positive, -1))
    U, W = torch.randn(len(batch.time), 8), torch.randn(len(batch.doc_ids), 8)
    objective = Objective(stage, ModelConfig(score="dot"), None, 40)
    output = objective(Encoded(U, W, None, torch.tensor([1.0])), batch)
    assert float(output.stats["effective_negatives"]) * len(batch.time) == pytest.approx(expected)


def test_draws_without_a_document() -> None:
    """Before any document is available there is none to draw; at an unknown time all are."""
    since = np.array([5.0, 1.0, 3.0])
    documents = NegativeDocuments(3, withdrawn=np.array([2]), since=since)
    random = np.arange(12, dtype=np.uint64).reshape(3, 4)
    drawn = documents.draw(random, np.array([0.0, 1.0, np.nan]))
    assert drawn.tolist() == [[-1] * 4, [1] * 4, [1, 0, 1, 0]]
    assert documents.allow(np.arange(3), np.array([1.0, np.nan])).tolist() == [[0, 1, 0], [1, 1, 0]]
    nothing = NegativeDocuments(1, withdrawn=np.array([0]))
    assert nothing.draw(random, np.full(3, np.nan)).tolist() == [[-1] * 4] * 3
