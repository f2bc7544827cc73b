"""Validation and mining with each rank's share of the documents: the whole's results, and no more held than a share."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.evaluation import evaluate as ranks_module
from bigdssm.evaluation import evaluate as split_module
from bigdssm.evaluation.comparison import MeasuredRows
from bigdssm.evaluation.evaluate import evaluate_split
from bigdssm.retrieval import exact_search as rounds_module
from bigdssm.retrieval import exact_search as top_module
from bigdssm.retrieval import mining as mine_module
from bigdssm.retrieval.embed import Encoders
from bigdssm.retrieval.mining import TrainPositives, gather_hard_negatives, mine
from bigdssm.retrieval.shards import Share
from bigdssm.training.estimate import LiveBytes

from .spawn import Pool

DOCS, DIFFERENT, D, FIRST, LAST, MARGIN = 1003, 400, 17, 3, 20, 1.0
SMALL: tuple[tuple[Any, str, int], ...] = (
    (split_module, "QUERIES_AT_ONCE", 37), (mine_module, "QUERIES_AT_ONCE", 142), (rounds_module, "PAIRS_AT_ONCE", 290),
    (ranks_module, "QUERIES_PER_TILE", 16), (ranks_module, "SCORES_PER_TILE", 16 * 128),
    (top_module, "TOP_QUERIES_AT_ONCE", 64), (top_module, "TILE_DOCS", 128),
)  # fmt: skip


class Larger:
    """A catalogue with more documents, of which there are vectors alone."""

    def __init__(self, catalogue: Any, num_docs: int) -> None:
        self._catalogue, self.num_docs = catalogue, num_docs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._catalogue, name)


def larger(folder: Path, num_docs: int) -> Dataset:
    dataset = copy.copy(Dataset.open(folder))
    dataset.catalogue = Larger(dataset.catalogue, num_docs)  # type: ignore[assignment]
    return dataset


def tables(kind: str) -> tuple[Tensor, Tensor]:
    """Return vectors of queries and documents; of documents many are equal."""
    generator = torch.Generator().manual_seed(0)
    number = {"normal": torch.randn, "whole": lambda *size, **given: torch.randint(-3, 4, size, **given).float()}[kind]
    queries, documents = (number(n, D, generator=generator) for n in (997, DIFFERENT))
    return queries, documents[torch.randint(DIFFERENT, (DOCS,), generator=generator)]


def encoders_of(queries: Tensor, documents: Tensor) -> Encoders:
    def of_rows(rows: Rows) -> Tensor:
        return queries[torch.from_numpy(rows.query_keys % len(queries))]

    return Encoders(of_rows, lambda rows: documents[torch.from_numpy(rows)])


def ranks_and_hard_negatives(rank: int, world_size: int, folder: Path, out: Path, kind: str) -> list[np.ndarray]:
    """Return the ranks of two splits, and windows of hard negatives for all and for some rows.

    Seen documents are excluded from the first split only.
    """
    dataset, encoders = larger(folder, DOCS), encoders_of(*tables(kind))
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in SMALL if world_size > 1 else ():
            patch.setattr(module, name, value)
        shared: Any = {"rank": rank, "world_size": world_size, "rows_per_chunk": 50}
        found = [
            evaluate_split(encoders, dataset, "validation", **shared),
            evaluate_split(encoders, dataset, "test", exclude_seen=False, **shared),
        ]
        dated = larger(folder, DOCS)
        dated.header = replace(dated.header, items="events")
        item_times = np.random.RandomState(0).randint(0, 40_000, DOCS).astype(float)
        vars(dated).update(item_times=item_times, _history=dataset._history)  # its items have times, but no versions
        found.append(evaluate_split(encoders, dated, "test", coverage=True, **shared))
        share = Share(rank, world_size, 100)
        own = mine(encoders, dataset, first=FIRST, last=LAST, margin=MARGIN, share=share)
        everything = gather_hard_negatives(out, own, dataset)
        rows = next(dataset.iterate("train", 1000))
        parts = [np.arange(90), np.arange(90, 100), np.arange(0)] if world_size > 1 else [np.arange(100)]
        pieces = [rows.take(parts[rank] + start) for start in (0, 100, 200)]  # of three ranks one has none
        some = mine(encoders, dataset, pieces, first=FIRST, last=LAST, share=share)
    for evaluation, split in zip(found, ("validation", "test", "test"), strict=True):
        assert len(evaluation.ranks) == dataset.num_rows(split)
        np.testing.assert_array_equal(evaluation.query_ids, MeasuredRows.of(dataset, split).query_ids)
    windows, of_times = everything.windows(everything.queries), np.append(found[2].ranks, found[2].coverage)
    mined = [everything.queries, windows, some["query"], some["window"]]
    return [*(evaluation.ranks for evaluation in found[:2]), *mined, of_times]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "whole"])
def test_ranks_and_hard_negatives_equal_those_of_one_rank(
    kind: str, tiny_interactions: Any, pools: dict[int, Pool], tmp_path: Path
) -> None:
    folder, out = tiny_interactions.dir, tmp_path / "mined.npy"
    alone = ranks_and_hard_negatives(0, 1, folder, out, kind)
    for world_size in (2, 3):
        each = pools[world_size].run(ranks_and_hard_negatives, folder, out, kind)
        for of_rank in each:
            for found, expected in zip(of_rank[:4], alone, strict=False):
                np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(of_rank[6], alone[6])
        queries, windows = (np.concatenate([of_rank[part] for of_rank in each]) for part in (4, 5))
        order = np.argsort(queries)
        np.testing.assert_array_equal(queries[order], alone[4])
        np.testing.assert_array_equal(windows[order], alone[5])
    assert ((alone[0] % 1) == 0.5).any(), "no ties"
    assert (alone[6][:-1] < alone[1]).all() and alone[6][-1] > 0, "later items are ranked"


def test_ranks_and_hard_negatives_match_the_definition(
    tiny_interactions: Any, pools: dict[int, Pool], tmp_path: Path
) -> None:
    """Scores of whole numbers are exact, and many are equal: of these the lower row is mined first."""
    dataset, (queries, documents) = larger(tiny_interactions.dir, DOCS), tables("whole")
    found = pools[3].run(ranks_and_hard_negatives, tiny_interactions.dir, tmp_path / "mined.npy", "whole")[1]
    encoders, known = encoders_of(queries, documents), TrainPositives.of(dataset)
    for rows in dataset.iterate("validation", 1000):
        scores = (encoders.queries(rows) @ documents.T).numpy()
        for i, row in enumerate(rows.row_ids):
            others = np.setdiff1d(np.arange(DOCS), [*rows.seen(i), rows.doc_rows[i]])
            less = scores[i, others] - scores[i, rows.doc_rows[i]]
            assert found[0][row] == 1 + (less > 0).sum() + (less == 0).sum() / 2
    windows = dict(zip(found[2].tolist(), found[3].tolist(), strict=True))
    for rows in dataset.iterate("train", 1000):
        scores = (encoders.queries(rows) @ documents.T).numpy()
        for i, key in enumerate(rows.query_keys.tolist()):
            gone = {*rows.seen(i), rows.doc_rows[i], *known.pairs(rows.query_ids[i : i + 1])[1]}
            ranking = [doc for doc in np.argsort(-scores[i], kind="stable") if doc not in gone][FIRST:LAST]
            close = scores[i, ranking] > scores[i, rows.doc_rows[i]] - MARGIN
            assert windows[key] == np.where(close, -1, ranking).tolist()


def approximate_hard_negatives(rank: int, world_size: int, folder: Path, docs: int) -> tuple[np.ndarray, list[str]]:
    """Return windows from exact and approximate search in each rank's share, and the log lines."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mine_module.logger, "info", lambda text, *values: said.append(text % values))
        patch.setattr(mine_module, "QUERIES_AT_ONCE", 142)
        patch.setattr(mine_module, "SAMPLE", 90)
        given: Any = {"first": FIRST, "last": LAST, "share": Share(rank, world_size)}
        queries, documents = tables("normal")
        encoders, dataset = encoders_of(queries, documents[:docs]), larger(folder, docs)
        exact = mine(encoders, dataset, exact_up_to=docs, **given)
        assert not said
        found = mine(encoders, dataset, exact_up_to=docs - 1, **given)
    np.testing.assert_array_equal(found["query"], exact["query"])
    return np.stack([exact["window"], found["window"]]), said


def test_an_approximate_index_excludes_the_same_and_reports_its_recall(
    tiny_interactions: Any, pools: dict[int, Pool]
) -> None:
    # so few that each rank's index has one list and finds everything: what is left out, and the order, are exact
    for windows, said in pools[2].run(approximate_hard_negatives, tiny_interactions.dir, 70):
        assert (windows[0] == windows[1]).mean() > 0.99  # the index adds in another order: near ties may change places
        assert len(said) == 1 and "recall 100.0 % of the best 20 documents (90 queries)" in said[0]
    windows, said = approximate_hard_negatives(0, 1, tiny_interactions.dir, DOCS)
    recall = np.mean([np.isin(*row).mean() for row in zip(*windows, strict=True)])
    assert 0.1 < recall < 0.95
    stated = float(said[0].split("recall ")[1].split(" %")[0]) / 100
    assert stated == pytest.approx(recall, abs=0.15)


MANY, WIDTH = 60_000, 65


def peaks(rank: int, world_size: int, folder: Path) -> list[int]:
    """Return the highest sums of the bytes of all tensors at once, while evaluating and while mining."""
    dataset, generator = larger(folder, MANY), torch.Generator().manual_seed(rank)
    encoders = Encoders(
        lambda rows: torch.randn(len(rows), WIDTH, generator=generator),
        lambda rows: torch.randn(len(rows), WIDTH, generator=generator),
    )
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks_module, "SCORES_PER_TILE", 65_536)
        patch.setattr(top_module, "TILE_DOCS", 2048)
        with LiveBytes() as live:
            evaluate_split(encoders, dataset, "test", rank=rank, world_size=world_size)
        found.append(live.peak)
        with LiveBytes() as live:
            rows = next(dataset.iterate("train", 20))
            mine(encoders, dataset, [rows], first=FIRST, last=LAST, share=Share(rank, world_size))
        found.append(live.peak)
    return found


def test_a_rank_holds_the_vectors_of_its_share_alone(tiny_interactions: Any, pools: dict[int, Pool]) -> None:
    everything, beside = MANY * WIDTH * 4, 1_500_000
    for world_size, of_ranks in (
        (1, [peaks(0, 1, tiny_interactions.dir)]),
        *((ranks, pools[ranks].run(peaks, tiny_interactions.dir)) for ranks in (2, 3)),
    ):
        for peak in np.ravel(of_ranks):
            assert everything / world_size < peak < everything / world_size + beside
