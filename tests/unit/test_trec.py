"""Runs and qrels: trec_eval's own figures, files that go out and come back, and what a damaged one says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import pytrec_eval

from bigdssm.errors import ConfigError, DataError
from bigdssm.evaluation.trec import ranked, read_qrels, read_run, run_metrics, write_qrels, write_run

THEIRS = {"ndcg_at_10": "ndcg_cut_10", "recall_at_100": "recall_100", "mrr": "recip_rank", "hr_at_10": "success_10"}


def random_collection(seed: int) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    """Return graded qrels with several relevant documents, and a run of 150 documents a query, with many ties."""
    random = np.random.RandomState(seed)
    qrels, run = {}, {}
    for q in range(60):
        judged = random.choice(400, random.randint(1, 30), replace=False)
        qrels[f"q{q}"] = {f"d{d}": int(random.randint(0, 4)) for d in judged}
        found = random.choice(400, 150, replace=False)
        # Scores a float32 cannot tell apart tie for trec_eval, which ranks by name then.
        run[f"q{q}"] = {f"d{d}": float(random.randint(0, 40)) + 1e-9 * random.rand() for d in found}
    return qrels, run


def test_figures_are_trec_evals(tmp_path: Path) -> None:
    qrels, run = random_collection(1)
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100", "recip_rank", "success.10"})
    theirs = evaluator.evaluate(run)
    write_run(tmp_path / "run.trec", run, "two words")
    write_qrels(tmp_path / "qrels.trec", qrels)
    from_files = run_metrics(read_qrels(tmp_path / "qrels.trec"), read_run(tmp_path / "run.trec"))
    for name, values in run_metrics(qrels, run).items():
        expected = [theirs[query][THEIRS[name]] for query in sorted(qrels)]
        np.testing.assert_allclose(values, expected, atol=1e-9, err_msg=name)
        np.testing.assert_array_equal(from_files[name], values)
    with (tmp_path / "run.trec").open() as file:  # trec_eval's own parser takes the file, and its ranks are ours
        assert pytrec_eval.parse_run(file).keys() == run.keys()
    first = (tmp_path / "run.trec").read_text().splitlines()[0].split()
    assert first[:2] == ["q0", "Q0"] and first[3:6:2] == ["1", "two-words"] and first[2] == ranked(run["q0"])[0]


def test_a_query_that_the_run_lacks_counts_as_nothing() -> None:
    values = run_metrics({"a": {"x": 1}, "b": {"x": 1}}, {"b": {"x": 2.0, "y": 1.0}})
    assert values["ndcg_at_10"].tolist() == [0.0, 1.0]


def test_files_that_are_damaged_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    path.write_text("q Q0 d 1 0.5 tag\n\nq Q0 d 2 0.4 tag\n")
    with pytest.raises(DataError, match=r"run.trec:3 retrieves d for query q a second time"):
        read_run(path)
    path.write_text("q Q0 d 1 half tag\n")
    with pytest.raises(DataError, match=r"run.trec:1: 'half' is no number"):
        read_run(path)
    path.write_text("q 0 d\n")
    with pytest.raises(DataError, match=r"run.trec:1 has 3 fields, needs 4: query iteration document relevance"):
        read_qrels(path)
    with pytest.raises(ConfigError, match="'two words' is empty or holds white space"):
        write_run(path, {"q": {"two words": 1.0}}, "tag")
