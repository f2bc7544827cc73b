"""Withdrawn items are no negatives and no ranked candidates; a running segment keeps its catalogue."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bigdssm import make_dataset
from bigdssm.config import Config, NegativesConfig, SourceConfig, StageConfig
from bigdssm.dataset.dataset import Dataset, open_dataset
from bigdssm.dataset.negatives import NegativeDocuments
from bigdssm.errors import DataError
from bigdssm.evaluation.evaluate import evaluate_scores, evaluate_split
from bigdssm.loader.stream import PairStream
from bigdssm.models import DualEncoder
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.hard_negatives import UniformNegatives
from bigdssm.retrieval.mining import mine
from bigdssm.training import start
from bigdssm.training.batches import BatchBuilder, read_batches
from bigdssm.training.objective import in_catalogue_share
from tests.conftest import NUM_ITEMS

GONE = [0, 3, 4, 17, 39]
AVAILABLE = [row for row in range(NUM_ITEMS) if row not in GONE]


def withdraw(config: Config, folder: Path, rows: list[int], name: str = "gone") -> Dataset:
    keys = Dataset.open(folder).catalogue.keys(np.array(rows))
    make_dataset(config, out=folder, append=True, partition=name, withdrawn={"item_id": keys})
    return Dataset.open(folder)


@pytest.fixture(scope="module")
def smaller(config: Config, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = Path(shutil.copytree(dataset.dir, tmp_path_factory.mktemp("smaller") / "data"))
    return withdraw(config, folder, GONE)


def batches(dataset: Dataset, world_size: int, **negatives: Any) -> Iterator[tuple[Any, BatchBuilder]]:
    for rank in range(world_size):
        stream = PairStream(dataset, rows_global=24, lanes=4, rank=rank, world_size=world_size)
        make = BatchBuilder(stream, StageConfig(negatives=NegativesConfig(**negatives)))
        yield next(read_batches(stream, make, torch.device("cpu"))), make


@pytest.mark.parametrize("world_size", [1, 2])
def test_uniform_and_catalogue_negatives(smaller: Dataset, world_size: int) -> None:
    drawn: list[int] = []
    for _, make in batches(smaller, world_size, uniform=64):
        drawn += [int(row) for step in range(40) for row in make.drawn(step)]  # type: ignore[union-attr]
    assert sorted(set(drawn)) == AVAILABLE and len(drawn) == 40 * 64
    for rank, (batch, make) in enumerate(batches(smaller, world_size, uniform=63)):
        made = make.drawn(batch.step)
        assert made is not None and len(made) == -(-(63 - rank) // world_size)
        assert np.isin(made, batch.doc_rows.numpy()).all()
    shares: list[int] = []
    positives = set()
    for rank, (batch, _) in enumerate(batches(smaller, world_size, columns="catalogue")):
        own = in_catalogue_share(batch, rank, world_size)
        shares += batch.doc_rows[own].tolist()
        positives |= set(batch.doc_rows[batch.positive].tolist())
        added = batch.doc_rows[len(set(batch.positive.tolist())) :]
        assert not set(added.tolist()) & set(GONE)
    assert sorted(set(shares)) == sorted(shares) and set(shares) <= set(AVAILABLE)
    assert set(AVAILABLE) <= set(shares) and positives & set(GONE), "rows of withdrawn items are still learned"
    rows = next(smaller.iterate("train", 400))
    sampled = UniformNegatives(NegativeDocuments.of(smaller, id_dropout=0)).sample(rows, 0, 1, 9).documents
    assert sorted(set(sampled.ravel().tolist())) == [-1, *AVAILABLE]


@pytest.mark.parametrize("exact_up_to", [None, 10])
def test_hard_negatives(model: DualEncoder, smaller: Dataset, dataset: Dataset, exact_up_to: int | None) -> None:
    """The windows of a catalogue without the withdrawn items; an approximate index of few documents is exact."""
    encoders = tower_encoders(model, smaller)
    everything = mine(encoders, dataset, first=0, last=NUM_ITEMS)["window"]
    mined = mine(encoders, smaller, first=0, last=NUM_ITEMS, exact_up_to=exact_up_to)["window"]
    expected = [[doc for doc in window if doc >= 0 and doc not in GONE] for window in everything.tolist()]
    got = [[doc for doc in window if doc >= 0] for window in mined.tolist()]
    if exact_up_to is None:
        assert got == expected
    assert not {doc for window in got for doc in window} & set(GONE) and sum(map(len, got)) > 0


def test_evaluation_ranks_what_is_available_and_the_target(model: DualEncoder, smaller: Dataset) -> None:
    """A held-out event of a withdrawn item stays: the item could be bought then."""
    encoders = tower_encoders(model, smaller)
    documents = encoders.documents(np.arange(NUM_ITEMS)).numpy()
    expected = []
    for rows in smaller.iterate("test", 1000):
        scores = encoders.queries(rows).numpy() @ documents.T
        for i, target in enumerate(rows.doc_rows.tolist()):
            others = set(AVAILABLE) - set(rows.seen(i).tolist()) - {target}
            expected.append(1 + sum(scores[i, other] > scores[i, target] for other in others))
    targets = {row for rows in smaller.iterate("test", 1000) for row in rows.doc_rows.tolist()}
    assert targets & set(GONE)
    assert evaluate_split(encoders, smaller, "test").ranks.tolist() == expected
    of_scores = evaluate_scores(lambda rows: encoders.queries(rows).numpy() @ documents.T, smaller, "test")
    assert of_scores.ranks.tolist() == expected


def test_a_mixture_has_the_withdrawals_of_its_sources(config: Config, smaller: Dataset, dataset: Dataset) -> None:
    sources = [SourceConfig(dir=str(some.dir)) for some in (dataset, smaller)]
    joined = open_dataset(replace(config.data, mixture=sources))
    assert joined.catalogue.withdrawn.tolist() == GONE
    assert [len(extent.vocabularies) for extent in joined.extents] == [2, 2]


def test_a_running_segment_keeps_its_catalogue(
    config: Config, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume after appends of items reads the rows, draws and documents of an uninterrupted run."""
    folder = Path(shutil.copytree(dataset.dir, tmp_path / "data"))
    config = replace(config, data=replace(config.data, dir=str(folder)))
    before = open_dataset(config.data)
    stream = PairStream(before, rows_global=24, lanes=4)
    state = json.loads(json.dumps(stream.state()))
    monkeypatch.setattr(start, "checkpoints_in", lambda folder: [tmp_path])
    monkeypatch.setattr(start, "read_manifest", lambda path: SimpleNamespace(state={"stream": state}))
    item = {name: ["new"] for name in ("item_id", "title", "genres")} | {"year": [1990]}
    make_dataset(config, append=True, partition="items", items=item, withdrawn={"item_id": ["i1"]})
    now, continued = open_dataset(config.data), start.open_segment(config, "pretrain")
    assert (now.catalogue.num_docs, now.catalogue.withdrawn.tolist()) == (NUM_ITEMS + 1, [1])
    assert now.catalogue.num_candidates == NUM_ITEMS
    assert continued.fingerprint == before.fingerprint and continued.catalogue.num_candidates == NUM_ITEMS
    assert continued.schema == before.schema != now.schema
    assert PairStream(continued, rows_global=24, lanes=4).check_state(state), "the same segment"
    with pytest.raises(DataError, match="extents was"):
        PairStream(now, rows_global=24, lanes=4).check_state(state)
    draws = [next(batches(some, 1, uniform=64))[1].drawn(3) for some in (before, continued, now)]
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], draws[2])  # type: ignore[arg-type]
    state["partitions"] = [["other", "x"]]
    assert start.open_segment(config, "pretrain").fingerprint == now.fingerprint, "a new segment begins with all"
