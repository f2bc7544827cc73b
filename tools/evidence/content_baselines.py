"""A Markov chain for known items and content for unknown ones, with weights that are fitted to the validation split.

It is an estimate of what content can give, not of a model: it reads the history's unknown items, too, and its weights
are fitted to requests of the year after the training data, as a model's are not.

Shapes: m queries, N documents, F terms, C sampled documents.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import lcm
from typing import cast

import numpy as np
import torch
from scipy.sparse import csr_matrix, diags, hstack
from torch import Tensor

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.dataset.transitions import last_items
from bigdssm.errors import DataError
from bigdssm.evaluation.baselines import Scores, Window, markov
from bigdssm.evaluation.evaluate import evaluate_scores
from bigdssm.features import Categorical
from bigdssm.features.event_time import DAY
from bigdssm.features.ragged import Ragged
from tools.evidence.item_baselines import Seed, history

YEAR = 365.25 * DAY  # seconds
AGES = (1, 2, 3, 5, 10)  # years between release and request: bounds of buckets
WIDTHS = (0.3, 2.0, 8.0)  # years: similarity of release years, exp(-difference / width)
COUNT_ADDED = 1e-3  # to the score of the chain, before its logarithm
FITTED_ROWS, KNOWN_SAMPLED, NEW_SAMPLED = 2500, 700, 300  # of the validation split, and of the catalogue per row
ROWS_AT_ONCE, ITERATIONS, PENALTY = 64, 100, 1e-4
RESAMPLES = 10_000  # of users, for intervals
WORD = re.compile(r"[a-z0-9]{2,}")


@dataclass(frozen=True)
class ContentNeighbours:
    """Score documents by a sum of weighted terms, each apart for known and unknown items.

    The terms are the Markov chain and the number of events (known items), the categories and the share of unknown items
    in the history (unknown ones), the time since the release, and the similarities of categories, release years and
    titles to the newest items, weighted by 1 / distance, and to the whole history. Source: McFadden 1974 for the
    conditional logit.
    """

    dataset: Dataset
    window: int  # of the chain
    chain: Scores
    values: np.ndarray  # [N, values] of the categories, rows of unit length
    contents: list[csr_matrix]  # [N, values], rows of unit length: of the categories, then of the titles
    kernels: list[tuple[np.ndarray, np.ndarray]]  # of release years: [years, N], and the year of each item [N]
    neighbours: bool
    weights: Tensor  # [F]

    @classmethod
    def fit(
        cls, dataset: Dataset, window: Window = 8, neighbours: bool = True, titles: bool = True, seed: Seed = 0
    ) -> ContentNeighbours:
        """Fit the weights; without `neighbours` to the ages of items alone. Raises DataError: items have no times."""
        if not dataset.header.dated:
            raise DataError(f"{dataset.dir}: its items have no times; build it with --items-time-column")
        rows = np.arange(dataset.catalogue.num_docs)
        contents = []
        for name, feature in dataset.schema.doc.items():
            if isinstance(feature, Categorical) and feature.multi:
                values = cast(Ragged, dataset.catalogue.column(name, rows))
                shape = (len(rows), feature.num_codes)
                contents.append(csr_matrix((np.ones(len(values.values)), values.values, values.offsets), shape))
        if titles:
            words = [sorted(set(WORD.findall(title.lower()))) for title in dataset.catalogue.titles(rows)]
            number = Counter(word for title in words for word in title)
            code = {word: i for i, word in enumerate(word for word, count in number.items() if count > 1)}
            entries = [(i, word) for i, title in enumerate(words) for word in title if word in code]
            weights = [np.log(len(words) / number[word]) for _, word in entries]
            places = [i for i, _ in entries], [code[word] for _, word in entries]
            contents.append(csr_matrix((weights, places), (len(words), len(code))))
        lengths = [np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel()) for matrix in contents]
        contents = [
            diags(1 / np.maximum(length, 1e-9)) @ matrix for matrix, length in zip(contents, lengths, strict=True)
        ]
        years, of_item = np.unique(dataset.item_times * dataset.header.time_unit // YEAR, return_inverse=True)
        kernels = [(np.exp(-np.abs(years[:, None] - years[of_item]) / width), of_item) for width in WIDTHS]
        values = hstack(contents[: len(contents) - titles]).toarray()
        fitted = cls(dataset, window, markov(dataset, window), values, contents, kernels, neighbours, torch.zeros(0))
        return replace(fitted, weights=fitted._fit(seed))

    def __call__(self, rows: Rows) -> np.ndarray:
        """Return scores float64 [m, N]."""
        scores = np.zeros((len(rows), self.dataset.catalogue.num_docs))
        for weight, term in zip(self.weights.tolist(), self._terms(rows), strict=True):
            scores += weight * term
        return scores

    def _terms(self, rows: Rows) -> Iterator[np.ndarray]:
        """Yield the F terms, [m, N]."""
        counts = self.dataset.doc_counts()
        known, new = (counts > 0).astype(np.float32), (counts == 0).astype(np.float32)
        chain = self.chain(rows) / lcm(*range(1, self.window + 1)) ** 2  # its counts are integers
        yield np.log(COUNT_ADDED + chain) * known
        yield (chain == 0) * known
        yield np.repeat((np.log1p(counts))[None], len(rows), axis=0)
        years = self.dataset.header.time_unit / YEAR
        bucket = np.digitize((self.dataset.request_times(rows)[:, None] - self.dataset.item_times) * years, AGES)
        for number in range(len(AGES) + 1):
            yield (bucket == number) * new
            yield (bucket == number) * known
        for value in self.values.T:
            yield np.repeat((value * new)[None], len(rows), axis=0)
        if not self.neighbours:
            return
        weights, items, row = last_items(rows, self.window)
        newest, whole = csr_matrix((weights, (row, items)), chain.shape), history(rows, chain.shape[1])
        for seen in (newest, whole):
            seen = diags(1 / np.maximum(np.asarray(seen.sum(axis=1)).ravel(), 1e-9)) @ seen
            yield (seen @ new)[:, None] * new
            similar = [((seen @ matrix) @ matrix.T).toarray() for matrix in self.contents]
            for kernel, year in self.kernels:
                of_years = csr_matrix((np.ones(len(year)), (np.arange(len(year)), year)), (len(year), len(kernel)))
                similar.append((seen @ of_years) @ kernel)
            for term in similar:
                yield term * known
                yield term * new

    def _fit(self, seed: int) -> Tensor:
        """Return the weights with the highest likelihood of the validation rows' targets among sampled documents."""
        random, dataset = np.random.RandomState(seed), self.dataset
        counts = dataset.doc_counts()
        share = FITTED_ROWS / dataset.num_queries("validation")
        groups = [(np.flatnonzero(counts > 0), KNOWN_SAMPLED), (np.flatnonzero(counts == 0), NEW_SAMPLED)]
        tables, offsets = [], []
        for rows in dataset.iterate("validation", ROWS_AT_ONCE):
            chosen = np.flatnonzero(random.rand(len(rows)) < share)
            if not len(chosen):
                continue
            rows = rows.take(chosen)
            candidates, corrections = [rows.doc_rows[:, None]], [np.zeros((len(rows), 1))]
            for group, number in groups:
                number = min(number, len(group))
                candidates.append(np.stack([random.choice(group, number, replace=False) for _ in chosen]))
                corrections.append(np.full((len(rows), number), np.log(len(group) / number)))
            sampled, added = np.concatenate(candidates, axis=1), np.concatenate(corrections, axis=1)
            excluded = dataset.item_times[sampled] > dataset.request_times(rows)[:, None]
            excluded |= sampled == rows.doc_rows[:, None]
            excluded[:, 0] = False
            for i in range(len(rows)):
                excluded[i] |= np.isin(sampled[i], rows.seen(i)) & (np.arange(sampled.shape[1]) > 0)
            terms = np.stack([np.take_along_axis(term, sampled, axis=1) for term in self._terms(rows)], axis=2)
            tables.append(torch.from_numpy(terms.astype(np.float32)))
            offsets.append(torch.from_numpy(np.where(excluded, -np.inf, added).astype(np.float32)))
        table, offset = torch.cat(tables), torch.cat(offsets)
        weights = torch.zeros(table.shape[2], requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = -(table @ weights + offset).log_softmax(dim=1)[:, 0].mean() + PENALTY * weights.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return weights.detach()


def main() -> None:
    """Print NDCG@10 of the test rows of datasets, together, with 95 % intervals over users."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datasets", nargs="+", help="folders of datasets whose items have times")
    parser.add_argument("--split", default="test")
    args = parser.parse_args()
    fits: dict[str, Callable[[Dataset], Callable[[Rows], np.ndarray]]] = {
        "Markov chain": partial(markov, window=8),
        "and ages": partial(ContentNeighbours.fit, neighbours=False, titles=False),
        "and categories and years": partial(ContentNeighbours.fit, titles=False),
        "and titles": ContentNeighbours.fit,
    }
    opened = [Dataset.open(folder) for folder in args.datasets]
    for name, fit in fits.items():
        gains, users, cold = [], [], []
        for dataset in opened:
            evaluation = evaluate_scores(fit(dataset), dataset, args.split)
            counts = dataset.doc_counts()
            parts = [counts[rows.doc_rows[rows.relevance > 0]] == 0 for rows in dataset.iterate(args.split, 1024)]
            with np.errstate(invalid="ignore"):
                gain = np.where(evaluation.ranks <= 10, 1 / np.log2(evaluation.ranks + 1), 0.0)
            kept = np.isfinite(evaluation.ranks)
            gains.append(gain[kept])
            users.append([f"{dataset.dir} {user}" for user in evaluation.query_ids[kept]])
            cold.append(np.concatenate(parts))
        gain, is_cold = np.concatenate(gains), np.concatenate(cold)
        _, user = np.unique(np.concatenate(users), return_inverse=True)
        line = []
        for label, rows in (("all", np.ones(len(gain), bool)), ("known", ~is_cold), ("new", is_cold)):
            sums, number = (np.bincount(user[rows], weights) for weights in (gain[rows], None))
            drawn = np.random.RandomState(0).randint(len(sums), size=(RESAMPLES, len(sums)))
            low, high = np.percentile(sums[drawn].sum(axis=1) / number[drawn].sum(axis=1), [2.5, 97.5])
            line.append(f"{label} {gain[rows].mean():.4f} [{low:.4f}, {high:.4f}] of {rows.sum():,}")
        print(f"{name}: {'; '.join(line)}", flush=True)


if __name__ == "__main__":
    main()
