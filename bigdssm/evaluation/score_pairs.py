"""A file of mined windows with scores that judges give: made in shards by any number of ranks, going on where killed.

.OUT.unfinished/   the file while it grows, see retrieval/shards.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from bigdssm.array_file import new_array, seal
from bigdssm.atomic import real_place
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import DataError
from bigdssm.evaluation.judges import Judge, ensemble
from bigdssm.retrieval.mined import MinedNegatives, mined_records, record_type, rows_of_queries
from bigdssm.retrieval.shards import ShardedFolder, Work

QUERIES_AT_ONCE = 256
FILE = "judged.npy"


def score_pairs(
    out: Path, mined: MinedNegatives, dataset: Dataset, judges: Sequence[Judge], names: Sequence[str], work: Work
) -> MinedNegatives | None:
    """Write `mined` with the judges' scores to `out`; return it on the rank that put it in its place, None on others.

    `names` tell what is scored, and by whom, from anything else: finished shards of a run that was ended are kept where
    these are the same. Raises DataError where a judge's score is not finite.
    """
    out = real_place(out)
    record = record_type(mined.width, judged=True)

    def prepare(aside: Path) -> None:
        new_array(aside / FILE, record, (len(mined),))

    job = {"kind": "score_pairs", "names": list(names), "dataset": dataset.fingerprint}
    shards = ShardedFolder(out, job, len(mined), work, prepare)
    whole = open_memmap(shards.aside / FILE, "r+")
    for _, first, last in shards.pending("shards scored"):
        whole[first:last] = _scored(mined.queries[first:last], mined, dataset, judges)
        whole.flush()
    finished = shards.finish_file(FILE, lambda path: seal(path, dataset.fingerprint))
    return MinedNegatives.open(out) if finished else None


def _scored(queries: np.ndarray, mined: MinedNegatives, dataset: Dataset, judges: Sequence[Judge]) -> np.ndarray:
    """Return the records of some queries, whose keys ascend; NaN where a query's row cannot be read."""
    windows = mined.windows(queries)
    teacher = np.full((len(queries), 1 + mined.width), np.nan, np.float32)
    for asked in rows_of_queries(dataset, queries, QUERIES_AT_ONCE):
        at = np.searchsorted(queries, asked.query_keys)
        docs = np.concatenate([asked.doc_rows[:, None], windows[at]], 1)
        scores = ensemble(judges, asked, docs)
        if not np.isfinite(scores[docs >= 0]).all():
            raise DataError(f"a judge's scores of rows {asked.row_ids[0]} to {asked.row_ids[-1]} hold NaN or inf")
        teacher[at] = scores
    return mined_records(queries, windows, teacher)
