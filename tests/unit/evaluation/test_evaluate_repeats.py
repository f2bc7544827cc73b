"""Repeated consumption: `data.exclude_seen` decides masks, mining, evaluation and answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

import bigdssm
from bigdssm.checkpoints.model_folder import ModelFolder, load_model_folder, save_model_folder
from bigdssm.config import Config, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError, DataError
from bigdssm.evaluation.comparison import System, load_system, save_comparison
from bigdssm.evaluation.evaluate import evaluate_split
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.index import build_index, open_index
from bigdssm.retrieval.mining import mine
from bigdssm.retrieval.recommend import RecommendOptions, Users, recommend
from bigdssm.retrieval.request import Event, Request
from bigdssm.retrieval.shards import Share
from bigdssm.retrieval.vectors import write_vectors
from bigdssm.serving.searcher import Searcher
from tests.conftest import pick

NUM_USERS, NUM_SONGS, PLAYS = 80, 40, 12
SONGS = [f"s{number}" for number in range(NUM_SONGS)]


def favourites(user: int) -> list[int]:
    """Each user plays two songs, now one and now the other, and nothing else."""
    return [user % NUM_SONGS, (user * 7 + 11) % NUM_SONGS]


@pytest.fixture(scope="module")
def listening(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a dataset of listening, which is made."""
    folder = tmp_path_factory.mktemp("listening")
    content = {
        "run": {"dir": str(folder / "run"), "trackers": []},
        "data": {
            "time_unit": "s",
            "dir": str(folder / "dataset"), "exclude_seen": False, "lanes": 4,
            "query": {"history": {"type": "history", "of": "song", "max_items": 8}},
            "doc": {"song": {"type": "categorical"}},
        },
        "model": {
            "dim": 16, "beta": "none",
            "query": {"mlp": [], "embedding_dim": 16, "history": {"dropout": 0.0, "item_dropout": 0.0}},
            "doc": {"mlp": [], "embedding_dim": 16},
        },
        "pretrain": {
            "rows_global": 64, "steps": 80, "optimizer": {"lr": 0.02, "warmup_steps": 5},
            "negatives": {"columns": "catalogue"},
        },
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    plays = [(user, time) for user in range(NUM_USERS) for time in range(PLAYS)]
    events = pa.table(
        {
            "user_id": [f"u{user}" for user, _ in plays],
            "song": [SONGS[favourites(user)[pick(user, time, below=2)]] for user, time in plays],
            "timestamp": [float(time) for _, time in plays],
        }
    )
    bigdssm.make_dataset(
        folder / "config.yaml", interactions=events, items=pa.table({"song": SONGS}), item_column="song",
        rating_column=None,
    )  # fmt: skip
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def trained(listening: Path) -> Any:
    return bigdssm.pretrain(listening)


def with_exclude_seen(folder: ModelFolder, exclude_seen: bool, out: Path) -> ModelFolder:
    """Return the same model as if it had been trained with another key."""
    config = replace(folder.config, data=replace(folder.config.data, exclude_seen=exclude_seen))
    save_model_folder(out, folder.model, config, folder.schema, folder.tokenizer_dir, folder.provenance)
    return load_model_folder(out)


def test_a_model_of_repeats_returns_repeated_items(trained: Any, tmp_path: Path) -> None:
    """In evaluation, search and bulk; with the other key the model returns only unplayed items."""
    folder = load_model_folder(trained.best)
    dataset = Dataset.open(folder.config.data.dir)
    encoders = tower_encoders(folder.model, dataset)
    write_vectors(tmp_path / "vectors", encoders, dataset, folder.checksum)
    build_index(tmp_path / "vectors", tmp_path / "index")
    index = open_index(tmp_path / "index")
    users, asked = [f"u{user}" for user in range(NUM_USERS)], {}
    for exclude_seen in (False, True):
        model, bulk = (
            with_exclude_seen(folder, exclude_seen, tmp_path / f"{exclude_seen}"),
            tmp_path / f"{exclude_seen}-bulk",
        )
        searcher = Searcher(model, index, dataset)
        found = searcher.search([Request(user, top=2) for user in users])
        recommend(bulk, model, index, dataset, Users(dataset), RecommendOptions(2), Share())
        table = parquet.read_table(bulk / "part-0000000.parquet")
        assert table["document"].to_pylist() == [document.key for some in found for document in some]
        asked[exclude_seen] = [{document.key for document in some} for some in found]
        live = searcher.search([Request(events=[Event("s3"), Event("s9")], top=NUM_SONGS)])[0]
        assert ({"s3", "s9"} <= {document.key for document in live}) != exclude_seen
    played = [{SONGS[song] for song in favourites(user)} for user in range(NUM_USERS)]
    assert np.mean([bool(a & b) for a, b in zip(asked[False], played, strict=True)]) > 0.9
    assert not any(a & b for a, b in zip(asked[True], played, strict=True))
    every, unseen = (evaluate_split(encoders, dataset, "test", exclude_seen=seen) for seen in (False, True))
    assert (every.ranks <= 2).mean() > 0.7, "chance is 0.05"
    assert (unseen.ranks <= every.ranks).all() and (unseen.ranks < every.ranks).any()


def test_training_metrics_follow_the_key(trained: Any) -> None:
    folder = load_model_folder(trained.best)
    dataset = Dataset.open(folder.config.data.dir)
    found = evaluate_split(tower_encoders(folder.model, dataset), dataset, "validation", exclude_seen=False).metrics
    assert trained.metrics["mrr"] == pytest.approx(found["mrr"], abs=1e-6)


def test_results_of_the_other_key_are_not_compared(trained: Any, tmp_path: Path) -> None:
    folder = load_model_folder(trained.best)
    dataset = Dataset.open(folder.config.data.dir)
    found = evaluate_split(tower_encoders(folder.model, dataset), dataset, "test", exclude_seen=False)
    systems = [System.from_ranks("a", found.ranks, found.query_ids, 1.0)]
    save_comparison(tmp_path / "a.json", systems, [], dataset, "test", False)
    assert load_system(tmp_path / "a.json", dataset, "test", False).name == "a (a)"
    with pytest.raises(DataError, match=r"was measured with data.exclude_seen=false, this model has true"):
        load_system(tmp_path / "a.json", dataset, "test", True)


def test_hard_negatives_may_be_past_items_but_not_the_positive(trained: Any) -> None:
    folder = load_model_folder(trained.best)
    dataset = Dataset.open(folder.config.data.dir)
    encoders, rows = tower_encoders(folder.model, dataset), next(dataset.iterate("train", 100_000))
    first = [mine(encoders, dataset, first=0, last=1, exclude_seen=seen)["window"][:, 0] for seen in (False, True)]
    seen = [set(rows.seen(i)) for i in range(len(rows))]
    others = [i for i in range(len(rows)) if seen[i] - {rows.doc_rows[i]}]
    assert len(others) > 200
    assert np.mean([first[0][i] in seen[i] for i in others]) > 0.8, "the other favourite scores next"
    assert not any(first[1][i] in seen[i] for i in range(len(rows)))
    assert all((window != rows.doc_rows).all() for window in first), "its own document is never one"


@pytest.mark.parametrize(
    ("exclude_seen", "mask", "resolved"),
    [("true", None, "batch"), ("false", None, "none"), ("false", "batch", "batch"), ("true", "past", "past")],
)
def test_the_key_decides_the_losses_mask(listening: Path, exclude_seen: str, mask: str | None, resolved: str) -> None:
    given = [f"pretrain.negatives.mask={mask}", f"sft={{negatives: {{mask: {mask}}}}}"] if mask else ["sft={}"]
    config: Config = load_config(listening, [f"data.exclude_seen={exclude_seen}", *given])
    for stage in ("pretrain", "sft"):
        assert config.stage(stage).negatives.mask == resolved  # type: ignore[arg-type]
    assert load_config(listening, [f"data.exclude_seen={exclude_seen}", *given]) == config


@pytest.mark.parametrize("mask", ["user", "past"])
def test_a_mask_of_seen_documents_is_refused_with_repeats(listening: Path, mask: str) -> None:
    with pytest.raises(ConfigError, match=f"negatives.mask: got {mask}"):
        load_config(listening, [f"pretrain.negatives.mask={mask}"])
