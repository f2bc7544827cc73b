"""TREC run and qrels files, and trec_eval's measures of a run.

A run contains the retrieved documents and scores per query. As in trec_eval, documents are ranked by score, ties (as
float32) by descending document id, and a relevance above 0 is relevant. A query of the qrels without results counts as
0 (trec_eval -c).
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from bigdssm.errors import ConfigError, DataError
from bigdssm.sources.beir import add_judgement, check_judgements, numbered_lines, parse_integer
from bigdssm.utils.atomic import write_text

Run = Mapping[str, Mapping[str, float]]
"""Scores by query id and document id."""
Judgements = Mapping[str, Mapping[str, int]]
"""Relevance grades (qrels) by query id and document id."""


def run_metrics(qrels: Judgements, run: Run, k: int = 10, recall_k: int = 100) -> dict[str, np.ndarray]:
    """Return float64 [queries] by metric: ndcg_at_k, recall_at_k, mrr (uncut), hr_at_k.

    Queries are those of the qrels, sorted by id. Gains are the relevance grades. Raises DataError: the run has none of
    the queries. Source: trec_eval 9 (ndcg_cut, recall, recip_rank, success).
    """
    if not qrels.keys() & run.keys():
        raise DataError("the run has none of the queries of the qrels; it is of another collection or split")
    names = (f"ndcg_at_{k}", f"recall_at_{recall_k}", "mrr", f"hr_at_{k}")
    values: dict[str, np.ndarray] = {name: np.zeros(len(qrels)) for name in names}
    for i, query in enumerate(sorted(qrels)):
        grades = qrels[query]
        gains = np.array([max(0, grades.get(key, 0)) for key in ranked(run.get(query, {}))], np.float64)
        ideal = np.sort([grade for grade in grades.values() if grade > 0])[::-1]
        relevant = np.flatnonzero(gains > 0)
        if not len(ideal) or not len(relevant):
            continue
        values[names[0]][i] = _dcg(gains[:k]) / _dcg(ideal[:k])
        values[names[1]][i] = (relevant < recall_k).sum() / len(ideal)
        values[names[2]][i] = 1 / (relevant[0] + 1)
        values[names[3]][i] = relevant[0] < k
    return values


def ranked(scores: Mapping[str, float]) -> list[str]:
    """Return the document ids of one query, best first."""
    return sorted(scores, key=lambda key: (np.float32(scores[key]), key), reverse=True)


def read_run(path: Path) -> dict[str, dict[str, float]]:
    """Read a run file (query, Q0, document, rank, score, tag). Raises DataError naming the line.

    Ranks must be integers but are ignored, as in trec_eval.
    """
    run: dict[str, dict[str, float]] = {}
    for number, (query, _, document, rank, score, _) in _fields(path, 6, "query Q0 document rank score tag"):
        documents = run.setdefault(query, {})
        if document in documents:
            raise DataError(f"{path}:{number} repeats document {document} of query {query}")
        parse_integer(rank, "rank", path, number)
        try:
            value = math.nan if "_" in score else float(score)  # Python, unlike TREC, accepts 1_0
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{path}:{number}: got the score {score!r}, needs a finite number")
        documents[document] = value
    if not run:
        raise DataError(f"{path} is an empty run: it has no line")
    return run


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Read a qrels file (query, iteration, document, relevance). Raises DataError naming the line."""
    qrels: dict[str, dict[str, int]] = {}
    for number, (query, _, document, grade) in _fields(path, 4, "query iteration document relevance"):
        add_judgement(qrels, query, document, grade, path, number)
    check_judgements(qrels, path)
    return qrels


def write_run(path: Path, run: Run, tag: str) -> None:
    """Write `run` in TREC's format. Raises ConfigError: an id contains whitespace."""
    tag = "-".join(tag.split()) or "run"
    _write(
        path,
        (
            (query, "Q0", document, str(rank), repr(float(scores[document])), tag)
            for query, scores in run.items()
            for rank, document in enumerate(ranked(scores), 1)
        ),
    )


def write_qrels(path: Path, qrels: Judgements) -> None:
    """Write `qrels` in TREC's format. Raises ConfigError: an id contains whitespace."""
    pairs = ((query, document, grade) for query, grades in qrels.items() for document, grade in grades.items())
    _write(path, ((query, "0", document, str(grade)) for query, document, grade in pairs))


def _dcg(gains: np.ndarray) -> float:
    return float((gains / np.log2(np.arange(2, len(gains) + 2))).sum())


def _fields(path: Path, num_fields: int, layout: str) -> Iterable[tuple[int, list[str]]]:
    for number, line in numbered_lines(path):
        fields = line.split()
        if len(fields) != num_fields:
            raise DataError(f"{path}:{number} has {len(fields)} fields, needs {num_fields}: {layout}")
        yield number, fields


def _write(path: Path, lines: Iterable[tuple[str, ...]]) -> None:
    """Write the fields of each line. Raises ConfigError: a query or document, the first and third, has whitespace."""
    written = []
    for fields in lines:
        for key in (fields[0], fields[2]):
            if key.split() != [key]:
                raise ConfigError(f"the id {key!r} is empty or contains whitespace, which TREC files do not allow")
        written.append(f"{' '.join(fields)}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(written))
