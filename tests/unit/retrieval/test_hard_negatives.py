"""Hard-negative mining: correct ranks, no known positives, no leak of held-out rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.negatives import NegativeDocuments
from bigdssm.dataset.rows import EVENT_BITS, Rows
from bigdssm.errors import DataError
from bigdssm.features.ragged import Ragged
from bigdssm.models import DualEncoder
from bigdssm.retrieval import exact_search as top_module
from bigdssm.retrieval.embed import DocumentVectors, Encoders, tower_encoders
from bigdssm.retrieval.exact_search import top_documents
from bigdssm.retrieval.hard_negatives import (
    HardNegatives,
    UniformNegatives,
    sample_positions,
    sample_window,
    take_positions,
    window_records,
)
from bigdssm.retrieval.mining import TrainPositives, gather_hard_negatives, mine
from bigdssm.retrieval.shards import Share
from tests.hard_negatives import write_hard_negatives


def brute_force(encoders: Encoders, dataset: Dataset, first: int, last: int) -> np.ndarray:
    """Return the windows by definition."""
    documents = encoders.documents(np.arange(dataset.catalogue.num_docs)).numpy()
    positives: dict[int, set[int]] = {}
    for rows in dataset.iterate("train", 1000):
        for query_id, doc in zip(rows.query_ids.tolist(), rows.doc_rows.tolist(), strict=True):
            positives.setdefault(query_id, set()).add(doc)
    windows = []
    for rows in dataset.iterate("train", 1000):
        scores = encoders.queries(rows).numpy() @ documents.T
        for i in range(len(rows)):
            gone = positives[int(rows.query_ids[i])] | set(rows.seen(i).tolist())
            ranking = [doc for doc in np.argsort(-scores[i], kind="stable").tolist() if doc not in gone]
            windows.append((ranking + [-1] * last)[first : min(last, len(documents))])
    return np.array(windows)


@pytest.mark.parametrize(("first", "last", "tile"), [(0, 5, 1000), (3, 20, 7), (0, 70, 16)])
def test_windows(
    model: DualEncoder, dataset: Dataset, first: int, last: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top_module, "TILE_DOCS", tile)
    encoders = tower_encoders(model, dataset)
    mined = mine(encoders, dataset, first=first, last=last, share=Share(rows_per_chunk=50))
    assert mined["window"].dtype == np.int32
    np.testing.assert_array_equal((mined["query"] >> EVENT_BITS), np.arange(dataset.num_rows("train")))
    np.testing.assert_array_equal(mined["window"], brute_force(encoders, dataset, first, last))


def test_documents_within_the_margin_of_the_rows_own_are_left_out(model: DualEncoder, dataset: Dataset) -> None:
    encoders = tower_encoders(model, dataset)
    documents = encoders.documents(np.arange(dataset.catalogue.num_docs))
    everything = mine(encoders, dataset, first=2, last=25)["window"]
    # precomputed vectors are used: nothing is encoded again
    only_queries = Encoders(encoders.queries, None)  # type: ignore[arg-type]
    kept = mine(only_queries, dataset, first=2, last=25, margin=0.5, documents=DocumentVectors(documents))["window"]
    left_out = 0
    for rows in dataset.iterate("train", 1000):
        scores = encoders.queries(rows) @ documents.T
        for i, row in enumerate(rows.row_ids.tolist()):
            own = float(scores[i, rows.doc_rows[i]])
            for before, now in zip(everything[row].tolist(), kept[row].tolist(), strict=True):
                close = float(scores[i, before]) > own - 0.5 if before >= 0 else True
                assert now == (-1 if close else before)
                left_out += before >= 0 and close
    assert 0 < left_out < (everything >= 0).sum()


def test_held_out_items_are_not_avoided(model: DualEncoder, dataset: Dataset) -> None:
    """Never mining a user's test item would leak it to the model."""
    held_out = {
        (int(query_id), int(doc))
        for split in ("validation", "test")
        for rows in dataset.iterate(split, 1000)
        for query_id, doc in zip(rows.query_ids, rows.doc_rows, strict=True)
    }
    mined = mine(tower_encoders(model, dataset), dataset, first=0, last=dataset.catalogue.num_docs)["window"]
    row_of = next(dataset.iterate("train", 10_000))
    ids = row_of.query_ids.tolist()
    named = {(query_id, doc) for query_id, docs in zip(ids, mined.tolist(), strict=True) for doc in docs}
    known = {(query_id, doc) for query_id, doc in zip(ids, row_of.doc_rows.tolist(), strict=True)}
    known |= {(query_id, doc) for i, query_id in enumerate(ids) for doc in row_of.seen(i).tolist()}
    assert held_out - known <= named


def test_the_file_contains_all_rows_or_the_requested_ones(model: DualEncoder, dataset: Dataset, tmp_path: Path) -> None:
    encoders, path = tower_encoders(model, dataset), tmp_path / "mined.npy"
    own, everything = mine(encoders, dataset, first=1, last=4), np.arange(dataset.num_rows("train"))
    mined, windows = gather_hard_negatives(path, own, dataset), own["window"]
    keys = np.concatenate([rows.query_keys for rows in dataset.iterate("train", 1000)])
    np.testing.assert_array_equal(mined.queries, keys)
    np.testing.assert_array_equal(mined.queries >> EVENT_BITS, everything)
    np.testing.assert_array_equal(HardNegatives.open(path).windows(keys[::-3]), windows[::-3])
    assert [file.name for file in tmp_path.iterdir()] == ["mined.npy"]

    rows = next(dataset.iterate("train", 1000))
    some = [rows.take(np.array([9, 2, 11])), rows.take(np.array([4, 2]))]
    own = mine(encoders, dataset, some, first=1, last=4, share=Share(rows_per_chunk=2))
    mined = gather_hard_negatives(path, own, dataset)
    assert (mined.queries >> EVENT_BITS).tolist() == [2, 4, 9, 11]
    np.testing.assert_array_equal(mined.windows(keys[[11, 2, 2]]), windows[[11, 2, 2]])
    for others in ([3], [12], [2, 0]):
        with pytest.raises(DataError, match=f"mined.npy has no negatives for row {others[-1]} "):
            mined.windows(keys[others])
    np.save(path, windows)
    with pytest.raises(DataError, match="needs records of query, window and"):
        HardNegatives.open(path)


def test_the_file_may_contain_teacher_scores(dataset: Dataset, tmp_path: Path) -> None:
    path, keys = tmp_path / "scored.npy", np.array([3, 5, 9]) << EVENT_BITS
    windows = np.array([[4, 2], [1, -1], [0, 7]])
    teacher = np.array([[1, 0.5, np.nan], [2, -1, np.nan], [np.nan, 4, 3]], np.float32)
    write_hard_negatives(path, window_records(keys, windows, teacher), dataset)
    mined = HardNegatives.open(path)
    mined.check_against(dataset)
    assert mined.scored and (len(mined), mined.width, mined.per_query()) == (3, 2, 5 / 3)
    np.testing.assert_array_equal(mined.windows(keys[[2, 0, 0]]), windows[[2, 0, 0]])
    np.testing.assert_array_equal(mined.teacher_scores(keys[[2, 0, 0]]), teacher[[2, 0, 0]])
    with pytest.raises(DataError, match=r"scored.npy has no negatives for row 4 "):
        mined.teacher_scores(keys[:1] + (1 << EVENT_BITS))
    assert not HardNegatives(window_records(keys, windows)).scored
    narrow = np.dtype([("query", np.int64), ("window", np.int32, (2,)), ("teacher", np.float32, (2,))], align=True)
    for wrong in (narrow, np.dtype([("query", np.int64), ("window", np.int32)])):
        np.save(path, np.zeros(3, wrong))
        with pytest.raises(DataError, match="needs records of query, window and"):
            HardNegatives.open(path)


def test_ranks_hold_the_positives_of_their_rows_and_together_all(dataset: Dataset) -> None:
    ids = np.unique(np.concatenate([rows.query_ids for rows in dataset.iterate("train", 1000)]))
    whole, shares = TrainPositives.of(dataset), [TrainPositives.of(dataset, Share(rank, 3)) for rank in range(3)]
    assert max(len(share.documents.values) for share in shares) < 0.4 * len(whole.documents.values)
    together = np.concatenate([np.stack(share.pairs(ids), 1) for share in shares])
    assert sorted(together.tolist()) == np.stack(whole.pairs(ids), 1).tolist()


def test_known_positives_of_queries_without_any() -> None:
    known = TrainPositives(np.array([3, 7]), Ragged.of_lists([[10, 11], [12]], np.int64))
    rows, docs = known.pairs(np.array([7, 5, 3, 9, 1]))
    assert (rows.tolist(), docs.tolist()) == ([0, 2, 2], [12, 10, 11])
    nothing = TrainPositives(np.zeros(0, np.int64), Ragged.of_lists([], np.int64))
    assert [len(part) for part in nothing.pairs(np.array([7, 5]))] == [0, 0]


def test_top_documents_leaves_out_excluded_pairs() -> None:
    queries, documents = torch.eye(2), torch.tensor([[1.0, 0.0], [2.0, 1.0], [3.0, 2.0]])
    excluded = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1])
    scores, found = top_documents(queries, documents, 2, *excluded)
    assert found.tolist() == [[1, 0], [2, -1]]
    expected = (queries @ documents.T).gather(1, found.clamp(min=0)).masked_fill(found < 0, float("-inf"))
    torch.testing.assert_close(scores, expected)


def rows_of(row_ids: np.ndarray, row: np.ndarray | None = None, position: np.ndarray | None = None) -> Rows:
    nothing = np.zeros(len(row_ids) if row is None else len(row))
    return Rows(0, row_ids, {}, nothing, nothing, nothing, row=row, position=position)


def test_queries_of_one_row_have_draws_of_their_own() -> None:
    window = np.tile(np.arange(100, dtype=np.int32), (3, 1))
    rows = rows_of(np.array([7, 9]), np.array([0, 0, 1]), np.array([4, 5, 4]))
    chosen = sample_window(window, rows, 0, 0, 5)
    assert len({tuple(row) for row in chosen.tolist()}) == 3
    alone = rows_of(np.array([9]), np.array([0]), np.array([4]))
    np.testing.assert_array_equal(sample_window(window[:1], alone, 0, 0, 5), chosen[2:])


def test_choice_is_a_function_of_the_row_and_the_epoch() -> None:
    window = np.random.RandomState(0).permutation(5000).reshape(50, 100).astype(np.int32)
    window[3, 2:] = -1
    row_ids = np.arange(50) * 1_000_003
    chosen = sample_window(window, rows_of(row_ids), epoch=4, seed=9, k=8)
    assert chosen.shape == (50, 8)
    for i, row in enumerate(chosen):
        real = row[row >= 0]
        assert set(real) <= set(window[i])
        assert len(set(real)) == len(real) == (2 if i == 3 else 8)
    order = np.random.RandomState(1).permutation(50)
    np.testing.assert_array_equal(sample_window(window[order], rows_of(row_ids[order]), 4, 9, 8), chosen[order])
    for epoch, seed in ((5, 9), (4, 10)):
        again = sample_window(window, rows_of(row_ids), epoch, seed, 8)
        assert (np.delete(again, 3, 0) == np.delete(chosen, 3, 0)).mean() < 0.05
    assert sample_window(window[:, :3], rows_of(row_ids), 0, 0, 5)[0].tolist()[3:] == [-1, -1]
    assert sample_window(window, rows_of(row_ids), -1, -1, 1).shape == (50, 1)


def test_parallel_arrays_of_a_window_are_sampled_with_it() -> None:
    window = np.random.RandomState(0).permutation(400).reshape(20, 20).astype(np.int32)
    window[3, 2:] = -1
    rows = rows_of(np.arange(20) * 7)
    places = sample_positions(window, rows, 2, 5, 6)
    chosen, beside = sample_window(window, rows, 2, 5, 6), take_positions(window * 0.5, places, np.nan)
    np.testing.assert_array_equal(np.isnan(beside), chosen < 0)
    np.testing.assert_array_equal(beside[chosen >= 0], chosen[chosen >= 0] * 0.5)


def test_choice_is_uniform_over_the_window() -> None:
    window = np.tile(np.arange(20, dtype=np.int32), (4000, 1))
    counts = np.bincount(sample_window(window, rows_of(np.arange(4000)), 0, 0, 5).ravel(), minlength=20)
    assert abs(counts - 1000).max() < 130  # 5 standard deviations


def test_uniform_negatives_are_a_function_of_the_query_and_the_epoch_and_come_once() -> None:
    ids, uniform = np.arange(4000) * 1_000_003, UniformNegatives(NegativeDocuments(20))
    chosen = uniform.sample(rows_of(ids), 4, 9, 5).documents
    assert chosen.shape == (4000, 5) and chosen.dtype == np.int64
    for row in chosen[:200]:
        real = row[row >= 0].tolist()
        assert len(set(real)) == len(real) > 0
    counts = np.bincount(chosen[chosen >= 0], minlength=20)
    assert len(counts) == 20 and abs(counts - counts.mean()).max() < 5 * counts.mean() ** 0.5
    assert abs((chosen < 0).mean() - (1 - 20 * (1 - 0.95**5) / 5)) < 0.01
    order = np.random.RandomState(1).permutation(4000)
    np.testing.assert_array_equal(uniform.sample(rows_of(ids[order]), 4, 9, 5).documents, chosen[order])
    assert (uniform.sample(rows_of(ids), 5, 9, 5).documents == chosen).mean() < 0.1
