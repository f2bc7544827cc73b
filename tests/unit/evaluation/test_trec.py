"""Runs and qrels: agreement with trec_eval, round trips through files, and errors of damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval

from bigdssm.errors import ConfigError, DataError
from bigdssm.evaluation.trec import ranked, read_qrels, read_run, run_metrics, write_qrels, write_run
from tests.command_line import Tools

THEIRS = {"ndcg_at_10": "ndcg_cut_10", "recall_at_100": "recall_100", "mrr": "recip_rank", "hr_at_10": "success_10"}


def random_collection(seed: int) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    """Return graded qrels with several relevant documents, and a run of 150 documents a query, with many ties."""
    random = np.random.RandomState(seed)
    qrels, run = {}, {}
    for q in range(60):
        judged = random.choice(400, random.randint(1, 30), replace=False)
        qrels[f"q{q}"] = {f"d{d}": int(random.randint(0, 4)) for d in judged}
        found = random.choice(400, 150, replace=False)
        # trec_eval ranks scores that are equal in float32 by name.
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
    with (tmp_path / "run.trec").open() as file:  # trec_eval parses the file with the same ranks
        assert pytrec_eval.parse_run(file).keys() == run.keys()
    first = (tmp_path / "run.trec").read_text().splitlines()[0].split()
    assert first[:2] == ["q0", "Q0"] and first[3:6:2] == ["1", "two-words"] and first[2] == ranked(run["q0"])[0]


def test_a_query_that_the_run_lacks_counts_as_nothing() -> None:
    values = run_metrics({"a": {"x": 1}, "b": {"x": 1}}, {"b": {"x": 2.0, "y": 1.0}})
    assert values["ndcg_at_10"].tolist() == [0.0, 1.0]


def test_files_that_are_damaged_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "run.trec"
    path.write_text("q Q0 d 1 0.5 tag\n\nq Q0 d 2 0.4 tag\n")
    with pytest.raises(DataError, match=r"run.trec:3 repeats document d of query q"):
        read_run(path)
    path.write_text("q Q0 d 1 half tag\n")
    with pytest.raises(DataError, match=r"run.trec:1: got the score 'half', needs a finite"):
        read_run(path)
    path.write_text("q 0 d\n")
    with pytest.raises(DataError, match=r"run.trec:1 has 3 fields"):
        read_qrels(path)
    with pytest.raises(ConfigError, match="'two words' is empty or contains whitespace"):
        write_run(path, {"q": {"two words": 1.0}}, "tag")


COLLECTION = {
    "corpus.jsonl": '{"_id": "d1", "text": "a stone bridge"}\n{"_id": "d2", "text": "two rivers"}\n',
    "queries.jsonl": '{"_id": "q1", "text": "bridge"}\n{"_id": "q2", "text": "river"}\n',
    "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t1\n",
}
RUN, QRELS = "q1 Q0 d1 1 2.5 t\nq2 Q0 d1 1 1.5 t\nq2 Q0 d2 2 0.5 t\n", "q1 0 d1 1\nq2 0 d2 1\n"


def write_collection(folder: Path, **changed: str | bytes) -> Path:
    """Write the files; `changed` overrides contents by file stem."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, text in {**COLLECTION, "run.trec": RUN, "qrels.trec": QRELS}.items():
        content = changed.get(Path(name).stem, text)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def on_files(folder: Path) -> list[tuple[object, ...]]:
    """Return both forms of the command that evaluate a run."""
    return [
        ("evaluate", "--beir", folder, "--run", folder / "run.trec"),
        ("evaluate", "--run", folder / "run.trec", "--qrels", folder / "qrels.trec"),
    ]


@pytest.mark.parametrize(
    ("form", "changed", "sentence"),
    [
        (0, {"test": "query-id\tcorpus-id\tscore\n"}, "test.tsv has no relevant documents"),
        (0, {"test": "q1\td1\t0\nq2\td2\t-1\n"}, "test.tsv has no relevant documents"),
        (0, {"test": "q1\td1\t1\nq1\td1\t2\n"}, "test.tsv:2 judges d1 for query q1 2, an earlier line 1"),
        (0, {"test": "q1\td1\t1.5\n"}, "test.tsv:1: '1.5' is not an integer"),
        (0, {"test": "q1\td1\t1_0\n"}, "test.tsv:1: '1_0' is not an integer"),
        (0, {"test": "q1 d1 1\n"}, "test.tsv:1 has 1 fields"),
        (0, {"test": "\x00\n"}, "test.tsv:1 has 1 fields"),
        (0, {"test": COLLECTION["qrels/test.tsv"].encode("utf-16")}, "test.tsv is not a qrels file"),
        (0, {"test": "q1\td3\t1\n"}, "judges document 'd3', which is not in corpus.jsonl"),
        (0, {"test": "q3\td1\t1\n"}, "judges query 'q3', which is not in queries.jsonl"),
        (0, {"corpus": "[]\n"}, "corpus.jsonl:1 is not a BEIR record"),
        (0, {"corpus": '{"_id": "d1"}\n'}, "corpus.jsonl:1 is not a BEIR record"),
        (0, {"corpus": '{"_id": "d1", "text": ["a"]}\n'}, "corpus.jsonl:1 is not a BEIR record"),
        (0, {"corpus": '{"_id": "d1", "text": "a", "metadata": 3}\n'}, "corpus.jsonl:1 is not a BEIR record"),
        (0, {"corpus": '{"_id": "d1", "text": "\\ud800"}\n'}, "corpus.jsonl:1 is not a BEIR record"),
        (0, {"corpus": '{"_id": null, "text": "a"}\n'}, "corpus.jsonl:1 is not a BEIR record"),
        (0, {"corpus": COLLECTION["corpus.jsonl"] * 2}, "corpus.jsonl has 2 duplicate ids"),
        (0, {"corpus": COLLECTION["corpus.jsonl"].encode("utf-16")}, "corpus.jsonl is not a UTF-8 text file"),
        (1, {"qrels": ""}, "qrels.trec has no relevant documents"),
        (1, {"qrels": "q1 0 d1 one\n"}, "qrels.trec:1: 'one' is not an integer"),
        (1, {"run": ""}, "run.trec is an empty run"),
        (1, {"run": "q9 Q0 d1 1 1.0 t\n"}, "has none of the queries of the qrels"),
        (1, {"run": "q1 Q0 d1 first 1.0 t\n"}, "run.trec:1: 'first' is not an integer"),
        (1, {"run": "q1 Q0 d1 1 nan t\n"}, "run.trec:1: got the score 'nan', needs a finite"),
        (1, {"run": "q1 Q0 d1 1 -inf t\n"}, "run.trec:1: got the score '-inf', needs a finite"),
        (1, {"run": "q1 Q0 d1 1 1_0 t\n"}, "run.trec:1: got the score '1_0', needs a finite"),
    ],
)  # fmt: skip
def test_files_that_would_give_wrong_figures_are_refused(
    tools: Tools, tmp_path: Path, form: int, changed: dict[str, str | bytes], sentence: str
) -> None:  # fmt: skip
    command = on_files(write_collection(tmp_path, **changed))[form]
    assert sentence in tools.refused(3, *command)


def test_a_byte_order_mark_and_carriage_returns_change_nothing(tools: Tools, tmp_path: Path) -> None:
    """With the line ends and byte order marks of Windows editors, and a trailing empty line."""

    def figures(folder: Path) -> list[str]:
        printed = []
        for command in on_files(folder):
            tools.ran(*command, "--out", folder / "out.json")
            content = json.loads((folder / "out.json").read_text())
            printed.append([{**system, "seconds": 0} for system in content["systems"]])
        return printed

    texts = {Path(name).stem: text for name, text in {**COLLECTION, "run.trec": RUN, "qrels.trec": QRELS}.items()}
    changed = {name: "\ufeff" + text.replace("\n", "\r\n") + "\r\n" for name, text in texts.items()}
    plain = figures(write_collection(tmp_path / "plain"))
    assert figures(write_collection(tmp_path / "windows", **changed)) == plain
    headless = changed | {"test": "\ufeff" + COLLECTION["qrels/test.tsv"].partition("\n")[2]}
    assert figures(write_collection(tmp_path / "headless", **headless)) == plain


def test_files_that_cannot_be_read_or_written_are_named_first(tools: Tools, tmp_path: Path) -> None:
    folder, a_file = write_collection(tmp_path / "c"), tmp_path / "file"
    a_file.write_text("x")
    for form in on_files(folder):
        for out in (folder, a_file / "out.json"):
            assert f"--out {out}" in tools.refused(2, *form, "--out", out)
    for option in ("--save-run", "--save-qrels"):
        assert f"{option} {folder} is a folder" in tools.refused(2, *on_files(folder)[0], option, folder)
    assert "cannot be read: Not a directory" in tools.refused(3, "evaluate", "--beir", a_file, "--bm25")
    assert "cannot be read: Is a directory" in tools.refused(3, "evaluate", "--run", folder, "--qrels", folder)
