"""Evaluation of a split against dense scores, on several ranks, and baselines against dense definitions."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigdssm import distributed
from bigdssm.config import Config, DataConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import DivergedError
from bigdssm.evaluation.baselines import markov, popularity
from bigdssm.evaluation.comparison import MeasuredRows, System, baseline_systems
from bigdssm.evaluation.evaluate import evaluate_scores, evaluate_split
from bigdssm.evaluation.metrics import mean_metrics, paired_bootstrap, standard_errors
from bigdssm.features import Categorical, History, Numeric
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from bigdssm.loader.batch import Collator, to_features
from bigdssm.models import DualEncoder
from bigdssm.retrieval.embed import Encoders, encode_queries, tower_encoders
from bigdssm.retrieval.shards import Share


def model_scores(model: DualEncoder, dataset: Dataset, rows: Rows) -> np.ndarray:
    """Return S = alpha * U @ W.T + beta, [m, N], as the training loss computes it."""
    collator = Collator(dataset.schema, dataset.catalogue)
    with torch.no_grad():
        query = collator.query_features(rows.query)
        encoded = model(
            query=query,
            doc=to_features(dataset.schema.doc, dataset.catalogue.columns(np.arange(dataset.catalogue.num_docs))),
        )
        return (encoded.alpha * encoded.U @ encoded.W.T + encoded.beta).numpy()


def expected_ranks(model: DualEncoder, dataset: Dataset, split: str) -> list[float]:
    ranks = []
    for rows in dataset.iterate(split, 7):
        for i, scores in enumerate(model_scores(model, dataset, rows)):
            own = rows.doc_rows[i]
            others = np.setdiff1d(np.arange(len(scores)), [*rows.seen(i), own])
            ranks.append(1.0 + (scores[others] > scores[own]).sum())
    return ranks


@pytest.mark.parametrize("split", ["validation", "test"])
def test_ranks_are_those_of_the_training_score(model: DualEncoder, dataset: Dataset, split: str) -> None:
    evaluation = evaluate_split(tower_encoders(model, dataset), dataset, split, rows_per_chunk=13)
    assert evaluation.ranks.tolist() == expected_ranks(model, dataset, split)
    assert evaluation.metrics == mean_metrics(evaluation.ranks)


def test_every_query_of_a_row_has_the_rank_of_a_single_query_row(
    tiny_interactions: Any, config: Config, model: DualEncoder, dataset: Dataset, tmp_path: Path
) -> None:
    source = tiny_interactions.source
    tables = InteractionTables(source / "interactions.csv", source / "items.csv", source / "users.csv")
    make_interactions(replace(config.data, targets_per_row=7), tables, IngestTarget(tmp_path / "pieces"))
    pieces = Dataset.open(tmp_path / "pieces")
    assert pieces.num_rows("train") < pieces.num_queries("train") == dataset.num_rows("train")
    evaluations = [evaluate_split(tower_encoders(model, of), of, "train") for of in (pieces, dataset)]
    assert evaluations[0].ranks.tolist() == expected_ranks(model, pieces, "train")
    assert np.array_equal(*(np.sort(evaluation.ranks) for evaluation in evaluations))
    assert len(evaluate_scores(popularity(pieces), pieces, "train").ranks) == pieces.num_queries("train")


def test_seen_documents_count_only_without_the_filter(model: DualEncoder, dataset: Dataset) -> None:
    encoders = tower_encoders(model, dataset)
    filtered = evaluate_split(encoders, dataset, "test")
    everything = evaluate_split(encoders, dataset, "test", exclude_seen=False)
    assert (filtered.ranks <= everything.ranks).all()
    assert (filtered.ranks < everything.ranks).any()


def test_the_model_is_left_in_the_mode_it_was_in(model: DualEncoder, dataset: Dataset) -> None:
    model.train()
    evaluation = evaluate_split(tower_encoders(model, dataset), dataset, "test")
    assert model.training
    model.eval()
    assert evaluation.ranks.tolist() == evaluate_split(tower_encoders(model, dataset), dataset, "test").ranks.tolist()


@pytest.mark.parametrize("world_size", [2, 3, 64])
def test_shares_of_ranks_make_the_whole_and_calls_are_equally_many(dataset: Dataset, world_size: int) -> None:
    whole = np.concatenate([rows.row_ids for rows in dataset.iterate("test", 1000)])
    calls, row_ids = [], []
    for rank in range(world_size):
        sizes: list[int] = []
        encoders = Encoders(lambda rows, to=sizes: to.append(len(rows)) or torch.zeros(len(rows), 2), None)  # type: ignore
        for rows, vectors in encode_queries(encoders, dataset, "test", Share(rank, world_size, rows_per_chunk=3)):
            assert len(vectors) == len(rows)
            row_ids.extend(rows.row_ids)
        assert min(sizes) > 0
        calls.append(len(sizes))
    assert row_ids == whole.tolist()
    assert len(set(calls)) == 1


def test_non_finite_vectors_stop_an_evaluation(model: DualEncoder, dataset: Dataset) -> None:
    encoders = tower_encoders(model, dataset)
    spoiled = Encoders(lambda rows: encoders.queries(rows) * float("nan"), encoders.documents)
    with pytest.raises(DivergedError, match="NaN"):
        evaluate_split(spoiled, dataset, "test")
    spoiled = Encoders(encoders.queries, lambda rows: encoders.documents(rows) / 0)
    with pytest.raises(DivergedError, match="NaN"):
        evaluate_split(spoiled, dataset, "test")


def test_rows_without_relevance_have_no_rank(model: DualEncoder, dataset: Dataset) -> None:
    half = copy.copy(dataset)
    half.iterate = lambda *args: (replace(rows, relevance=rows.row_ids % 2) for rows in dataset.iterate(*args))  # type: ignore
    found = evaluate_split(tower_encoders(model, dataset), half, "test")
    ranks, query_ids = found.ranks, found.query_ids
    assert np.isnan(ranks).tolist() == [row % 2 == 0 for row in range(len(ranks))]
    system = System.from_ranks("x", ranks, query_ids, 0.0)
    assert system.query_ids.tolist() == query_ids[1::2].tolist()


def test_systems_are_compared_by_query(model: DualEncoder, dataset: Dataset) -> None:
    """A user's train rows are resampled together, for any system and in saved comparisons."""
    rows = MeasuredRows.of(dataset, "train")
    ours = evaluate_split(tower_encoders(model, dataset), dataset, "train")
    theirs = evaluate_scores(popularity(dataset), dataset, "train")
    assert len(set(rows.query_ids)) < len(rows.query_ids) / 5
    assert rows.query_ids.tolist() == ours.query_ids.tolist() == theirs.query_ids.tolist()
    systems = [System.from_ranks("x", found.ranks, found.query_ids, 0.0) for found in (ours, theirs)]
    values = [system.values["mrr"] for system in systems]
    expected = paired_bootstrap(*values, query_ids=rows.query_ids)
    assert systems[0].difference(systems[1], "mrr") == expected != paired_bootstrap(*values)
    seeds = System.from_seeds([systems[0], systems[0]])
    assert seeds.difference(systems[1], "mrr").mean == pytest.approx(expected.mean)
    assert seeds.errors()["mrr"] == standard_errors(systems[0].values, rows.query_ids)["mrr"]


def train_sequences(dataset: Dataset) -> dict[int, list[int]]:
    """Reassemble each user's train events in order from the rows."""
    events: dict[int, dict[int, int]] = {}
    for rows in dataset.iterate("train", 1000):
        for i in range(len(rows)):
            user = events.setdefault(int(rows.query_ids[i]), {})
            user[len(rows.seen(i))] = int(rows.doc_rows[i])
            user |= dict(enumerate(rows.seen(i).tolist()))
    return {user: [items[i] for i in range(len(items))] for user, items in events.items()}


def test_markov_is_the_dense_definition(dataset: Dataset) -> None:
    num_docs = dataset.catalogue.num_docs
    counts = np.zeros((num_docs, num_docs))
    for items in train_sequences(dataset).values():
        for distance in (1, 2, 3):
            for before, after in zip(items, items[distance:], strict=False):
                counts[before, after] += 6 / distance
    baseline = markov(dataset, window=3)
    for rows in dataset.iterate("test", 11):
        expected = np.zeros((len(rows), num_docs))
        for i in range(len(rows)):
            for distance, item in enumerate(rows.seen(i)[-3:][::-1], start=1):
                expected[i] += counts[item] * 6 / distance
        np.testing.assert_array_equal(baseline(rows), expected.round())


def test_popularity_counts_train_events_alone(dataset: Dataset) -> None:
    counts = np.zeros(dataset.catalogue.num_docs, np.int64)
    for rows in dataset.iterate("train", 1000):
        np.add.at(counts, rows.doc_rows, 1)
    rows = next(dataset.iterate("test", 5))
    np.testing.assert_array_equal(popularity(dataset)(rows), np.tile(counts, (5, 1)))


def test_a_constant_score_has_the_middle_rank(dataset: Dataset) -> None:
    evaluation = evaluate_scores(
        lambda rows: np.zeros((len(rows), dataset.catalogue.num_docs)), dataset, "test", exclude_seen=False
    )
    assert set(evaluation.ranks) == {(dataset.catalogue.num_docs + 1) / 2}


def test_baselines_of_a_split(dataset: Dataset) -> None:
    systems = baseline_systems(dataset, "test")
    assert [system.name for system in systems] == ["popularity", "Markov, window 3"]
    assert all(len(system.ranks) == dataset.num_rows("test") for system in systems)
    assert distributed.world_size() == 1


def test_rows_pair_for_any_features(tmp_path: Path) -> None:
    """Ranks are comparable across datasets of the same tables, not with other documents, users or histories."""
    events = [(user, f"i{k}", k) for user in ("u", "v") for k in range(4)]

    def checksum(name: str, events: list[tuple[str, str, int]], config: DataConfig, items: int = 5) -> str:
        folder = tmp_path / name
        folder.mkdir()
        lines = ["user_id,item_id,timestamp", *(",".join(map(str, event)) for event in events)]
        (folder / "events.csv").write_text("\n".join(lines) + "\n")
        (folder / "items.csv").write_text("item_id,price\n" + "".join(f"i{k},{k}\n" for k in range(items)))
        tables = InteractionTables(folder / "events.csv", folder / "items.csv")
        make_interactions(config, tables, IngestTarget(folder / "out"))
        found = MeasuredRows.of(Dataset.open(folder / "out"), "test")
        assert len(found.query_ids) == 2
        return found.checksum

    plain = DataConfig(
        time_unit="s",
        dir="",
        query={"past": History(of="item", max_items=5)},
        doc={"item": Categorical(column="item_id")},
    )
    priced = replace(plain, doc={**plain.doc, "price": Numeric()})
    of_rows = checksum("plain", events, plain)
    assert checksum("priced", events, priced) == of_rows
    other = [(user, "i4" if (user, k) == ("v", 3) else item, k) for user, item, k in events]
    changed = {
        checksum("longer", [("u", "i4", -1), *events], plain),
        checksum("other", other, plain),
        checksum("renamed", [(user.replace("v", "w"), item, k) for user, item, k in events], plain),
        checksum("more", events, plain, items=6),
    }
    assert of_rows not in changed and len(changed) == 4
