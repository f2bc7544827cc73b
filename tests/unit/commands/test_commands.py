"""All commands around a trained model, on a synthetic run folder."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
import yaml

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cluster.metrics import read_stage, stage_folders, training_seconds
from bigdssm.dataset.dataset import Dataset
from bigdssm.evaluation.evaluate import evaluate_split
from bigdssm.models import DualEncoder
from bigdssm.retrieval.embed import tower_encoders
from tests.command_line import Tools

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.e2e
def test_every_tool_as_a_user_runs_it(model_dir: Path, run_dir: Path, dataset: Dataset, tmp_path: Path) -> None:
    data = ["--data", str(dataset.dir)]
    model = ["--model", str(model_dir)]
    chains = [
        [
            ["embed", *model, *data, "--out", "vectors"],
            ["build_index", "--vectors", "vectors", "--out", "index"],
            ["search", *model, "--index", "index", "--user", "u7"],
        ],
        [
            ["convert_checkpoint", "--run", str(run_dir / "sft"), "--out", "model"],
            ["evaluate", "--model", "model", *data, "--out", "evaluation.json"],
            ["report", str(run_dir), "--out", "report.json"],
            ["plot_run", str(run_dir), "--out", "curves.png"],
        ],
    ]
    python, folder = shlex.quote(sys.executable), ROOT / "tools"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = []
    for chain in chains:
        script = " && ".join(f"{python} {folder}/{name}.py {shlex.join(arguments)}" for name, *arguments in chain)
        running.append(subprocess.Popen(["sh", "-c", script], cwd=tmp_path, env=environment, stderr=subprocess.PIPE))
    for process in running:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors.decode()
    for made in (
        "index/index.faiss",
        "model/bigdssm.json",
        "evaluation.json",
        "report.json",
        "curves.png",
    ):
        assert (tmp_path / made).is_file()


def test_embed_and_index(tools: Tools, model_dir: Path, index_dir: Path, dataset: Dataset, tmp_path: Path) -> None:
    out = tools.ran("embed", "--model", model_dir, "--data", dataset.dir, "--out", tmp_path / "vectors")
    assert "40 vectors of width 9" in out
    np.testing.assert_array_equal(
        np.load(tmp_path / "vectors" / "vectors.npy"), np.load(index_dir.with_name("vectors") / "vectors.npy")
    )
    for kind in ("flat", "hnsw"):
        out = tools.ran("build_index", "--vectors", tmp_path / "vectors", "--out", tmp_path / "index", "--type", kind)
        assert f"{kind} index of 40 documents" in out
    message = tools.refused(4, "build_index", "--vectors", tmp_path / "index", "--out", tmp_path / "again")
    assert "is an index" in message


def test_targets_of_folder_links_are_replaced(tools: Tools, model_dir: Path, dataset: Dataset, tmp_path: Path) -> None:
    for name in ("vectors", "index", "export"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    (tmp_path / "disk" / "vectors").mkdir(parents=True)
    for _ in range(2):  # to an empty or missing folder, then to its own output
        tools.ran("embed", "--model", model_dir, "--data", dataset.dir, "--out", tmp_path / "vectors")
        tools.ran("build_index", "--vectors", tmp_path / "vectors", "--out", tmp_path / "index")
        tools.ran("convert_checkpoint", "--model", model_dir, "--out", tmp_path / "export")
    for name, file in (("vectors", "vectors.npy"), ("index", "index.faiss"), ("export", "model.safetensors")):
        assert (tmp_path / name).is_symlink() and (tmp_path / "disk" / name / file).is_file()
    assert len(list((tmp_path / "disk").iterdir())) == 3


def test_search_for_a_user(
    tools: Tools, model: DualEncoder, model_dir: Path, index_dir: Path, dataset: Dataset
) -> None:
    out = tools.ran("search", "--model", model_dir, "--index", index_dir, "--user", "u7")
    found = [line.split()[-1] for line in out.splitlines() if " i" in line and "history" not in line]
    assert len(found) == 10
    assert dataset.sequences is not None
    rows = next(dataset.iterate("test", 1000))
    i = dataset.sequences.strings("query_key", rows.sequence).index("u7")
    seen = {*dataset.catalogue.keys(rows.seen(i)), *dataset.catalogue.keys(rows.doc_rows[i : i + 1])}
    assert not seen & set(found)


def test_search_for_a_typed_history_and_features(
    tools: Tools, model_dir: Path, index_dir: Path, dataset: Dataset
) -> None:
    title = dataset.catalogue.titles(np.array([3]))[0]
    out = tools.ran("search", "--model", model_dir, "--index", index_dir, "--history", f"i9; {title}", "--top", 4)
    assert title in out.splitlines()[0]
    assert len([line for line in out.splitlines() if "." in line]) == 4
    assert "skipped: no document is called 'river lanter'; the nearest are: river lantern" in tools.ran(
        "search", "--model", model_dir, "--index", index_dir, "--history", "i2; river lanter"
    )
    out = tools.ran("search", "--model", model_dir, "--index", index_dir, "--text", "age=33", "occupation=artist")
    assert len([line for line in out.splitlines() if "." in line]) == 10


def test_search_for_a_request_as_json_is_that_of_the_options(
    tools: Tools, model_dir: Path, index_dir: Path, tmp_path: Path
) -> None:
    times = {"i3": 1_000_020, "i9": 1_000_010, "i1": 1_000_099}  # later than the user's events
    events = [{"item": item, "time": time} for item, time in times.items()]
    request = {"user": "u7", "features": {"age": 33}, "events": events, "now": 1_000_050, "filter": "year < 1990"}
    request["exclude"] = ["i5", "i999"]
    (tmp_path / "request.json").write_text(json.dumps({**request, "exclude_seen": False, "top": 7}))
    command = ("search", "--model", model_dir, "--index", index_dir)
    out = tools.ran(
        *command, "--user", "u7", "--text", "age=33", "--history", "i9; i3", "--filter", "year < 1990",
        "--seen", "allow", "--top", 7, "--exclude", "i5", "i999",
    )  # fmt: skip
    assert "not excluded: no document has the key 'i999'" in out and "'i5'" not in out
    assert out == tools.ran(*command, "--request", tmp_path / "request.json")
    assert len([line for line in out.splitlines() if "." in line]) == 7
    file = tmp_path / "found.csv"
    assert out == tools.ran(*command, "--request", tmp_path / "request.json", "--out", file)
    written = list(csv.DictReader(file.open()))
    assert [row["rank"] for row in written] == list("1234567") and list(written[0]) == [
        "rank",
        "score",
        "key",
        "title",
    ]
    assert all(row["key"] in out and row["title"] in out for row in written)
    assert "ending in .csv" in tools.refused(2, *command, "--user", "u7", "--out", tmp_path / "found")
    (tmp_path / "request.json").write_text("[" * 100_000)
    assert "is not JSON" in tools.refused(2, *command, "--request", tmp_path / "request.json")
    (tmp_path / "request.json").write_text(json.dumps({"user": "${oc.env:HOME}"}))
    assert "no user is called '${oc.env:HOME}'" in tools.refused(3, *command, "--request", tmp_path / "request.json")
    (tmp_path / "request.json").write_text(json.dumps({**request, "tpo": 7}))
    assert "tpo" in tools.refused(2, *command, "--request", tmp_path / "request.json")
    (tmp_path / "request.json").write_text("[")
    assert "is not JSON" in tools.refused(2, *command, "--request", tmp_path / "request.json")


def test_an_invalid_search_command_gives_a_one_line_error(
    tools: Tools, model_dir: Path, other_model_dir: Path, index_dir: Path
) -> None:
    message = tools.refused(2, "search", "--model", model_dir, "--index", index_dir, "--request", "-", "--user", "u7")
    assert "--user would have no effect with --request" in message
    message = tools.refused(4, "search", "--model", other_model_dir, "--index", index_dir, "--user", "u7")
    assert "holds vectors of model" in message
    for words in (["--user", "u\udcff"], ["--text", "age=33", "occupation=\udcff"]):
        message = tools.refused(2, "search", "--model", model_dir, "--index", index_dir, *words)
        assert "is not valid UTF-8" in message


def test_evaluate(
    tools: Tools, model: DualEncoder, model_dir: Path, other_model_dir: Path, dataset: Dataset, tmp_path: Path
) -> None:
    common = ("--data", dataset.dir, "--split", "validation")
    tools.ran("evaluate", "--model", other_model_dir, *common, "--out", tmp_path / "other.json")
    out = tools.ran(
        "evaluate", "--model", model_dir, *common,
        "--baselines", "--compare", tmp_path / "other.json", "--out", tmp_path / "first.json",
        "--by", "occupation", "history < 20",
    )  # fmt: skip
    content = json.loads((tmp_path / "first.json").read_text())
    assert [system["name"] for system in content["systems"]] == [
        "first", "popularity", "Markov, window 3", "chain", "second (other)",
    ]  # fmt: skip
    expected = evaluate_split(tower_encoders(model, dataset), dataset, "validation")
    np.testing.assert_array_equal(np.load(tmp_path / content["systems"][0]["ranks"]), expected.ranks)
    for name in ("hr_at_10", "ndcg_at_10", "mrr"):
        assert content["systems"][0][name] == pytest.approx(expected.metrics[name], abs=1e-6)
        assert f"{expected.metrics[name]:.4f} ± " in out
    assert [(d["system"], d["less"]) for d in content["differences"][::3]] == [
        ("first", "popularity"), ("first", "Markov, window 3"), ("first", "chain"), ("first", "second (other)"),
    ]  # fmt: skip
    assert "first − popularity: HR@10 " in out
    assert "occupation = doctor: 20 queries of 20 users" in out and "too few" in out
    coverage = [system.get("coverage") for system in content["systems"]]
    assert f"coverage of the top 10: first {coverage[0]:.3f}, popularity {coverage[1]:.3f}" in out
    assert re.search(r"^chain: last (item|\d+ items) \(chosen on validation\)$", out, re.MULTILINE)
    assert coverage[4] is None and [part["condition"] for part in content["slices"][-2:]] == [
        "history < 20", "not (history < 20)",
    ]  # fmt: skip
    assert sum(part["rows"] for part in content["slices"] if part["by"] == "occupation") == dataset.num_rows(
        "validation"
    )
    message = tools.refused(
        3, "evaluate", "--model", model_dir, "--data", dataset.dir, "--compare", tmp_path / "first.json"
    )  # the test split
    assert "other rows" in message


def test_kinds_of_index_are_measured(
    tools: Tools, model: DualEncoder, model_dir: Path, index_dir: Path, dataset: Dataset, tmp_path: Path
) -> None:
    """The exact index reproduces the model's evaluation."""
    threads = faiss.omp_get_max_threads()
    arguments = ("--model", model_dir, "--data", dataset.dir, "--vectors", index_dir.with_name("vectors"))
    try:
        options = ("--types", "hnsw", "--rescore", "2", "--dtypes", "float32", "int8")
        out = tools.ran("bench_index", *arguments, *options, "--out", tmp_path / "measured.json")
    finally:
        faiss.omp_set_num_threads(threads)  # the command sets one
    content = json.loads((tmp_path / "measured.json").read_text())
    kinds = ["flat", "flat × 2", "hnsw", "hnsw × 2"]
    assert [one["kind"] for one in content["indexes"]] == [*kinds, *(f"{kind} of int8" for kind in kinds)]
    assert [one["bytes_on_disk"] for one in content["indexes"]] == [0, 4 * 9, 0, 4 * 9, 0, 8 + 8, 0, 8 + 8]
    flat, _, hnsw, *_, of_int8 = content["indexes"]
    assert 0.8 < of_int8["recall_at_100"] <= 1.0 and "hnsw" in out
    assert f"{dataset.num_rows('test')} queries of test, 40 documents, width 9" in content["about"]
    metrics = evaluate_split(tower_encoders(model, dataset), dataset, "test").metrics
    assert flat["recall_at_100"] == 1.0 and flat["ndcg_at_10"] == pytest.approx(metrics["ndcg_at_10"], abs=1e-6)
    assert 0.8 < hnsw["recall_at_100"] <= 1.0
    assert 4 * 9 <= flat["bytes_per_vector"] < hnsw["bytes_per_vector"]
    assert all(0 < one["p50_ms"] <= one["p99_ms"] and one["build_s"] > 0 for one in (flat, hnsw))
    code, _, said = tools.run("bench_index", *arguments, "--queries", 0)
    assert code == 2 and "--queries" in said and "at least 1" in said


def test_the_cost_of_a_query_is_measured(tools: Tools, model_dir: Path, dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "measured.json"
    threads = torch.get_num_threads()
    try:
        tools.ran("bench_query", "--model", model_dir, "--data", dataset.dir, "--queries", 5, "--out", out)
    finally:
        torch.set_num_threads(threads)
    (measured,) = json.loads(out.read_text())["queries"]
    assert 0 < measured["p50 ms"] <= measured["p99 ms"]
    tools.ran("bench_cache", "--distinct", 100, "--requests", 4000, "--sizes", 1, 10, 100, "--out", out)
    for record in json.loads(out.read_text())["hit_rates"]:
        one, ten, all_of_them = list(record.values())[1:]
        assert 0 < one < ten < all_of_them and all_of_them == 1.0, "the first half of the requests contains all queries"


def test_mine_negatives(tools: Tools, model_dir: Path, other_model_dir: Path, dataset: Dataset, tmp_path: Path) -> None:
    arguments = ("--data", dataset.dir, "--out", tmp_path / "mined.npy", "--model")
    out = tools.ran("mine_negatives", *arguments, model_dir, "--first", 2, "--last", 9)
    assert f"{dataset.num_rows('train')} queries" in out
    mined = np.load(tmp_path / "mined.npy")["window"]
    assert mined.shape == (dataset.num_rows("train"), 7)
    tools.ran("embed", "--model", model_dir, "--data", dataset.dir, "--out", tmp_path / "vectors")
    window = ("--first", 2, "--last", 9, "--vectors", tmp_path / "vectors", "--margin", 0.5)
    tools.ran("mine_negatives", *arguments, model_dir, *window)
    kept = np.load(tmp_path / "mined.npy")["window"]
    assert ((kept == mined) | (kept == -1)).all() and 0 < (kept >= 0).sum() < (mined >= 0).sum()
    assert "vectors of model" in tools.refused(4, "mine_negatives", *arguments, other_model_dir, *window)
    message = tools.refused(2, "mine_negatives", *arguments, model_dir, "--first", 9, "--last", 9)
    assert "needs 0 <= first < last" in message
    (tmp_path / "mined.npy").unlink()
    for window in (("--first", 10**5, "--last", 10**6), ("--first", 0, "--last", 9, "--margin", 10**9)):
        message = tools.refused(2, "mine_negatives", *arguments, model_dir, *window)
        assert f"{dataset.catalogue.num_docs} documents" in message and "choose a lower" in message
    (tmp_path / "mined.npy").write_text("the user's")
    message = tools.refused(2, "mine_negatives", *arguments, model_dir)
    assert "is not the file that bigdssm mine_negatives wrote" in message
    assert (tmp_path / "mined.npy").read_text() == "the user's"


def test_convert_the_best_weights(tools: Tools, run_dir: Path, tmp_path: Path) -> None:
    tools.ran("convert_checkpoint", "--run", run_dir / "sft", "--out", tmp_path / "model")
    best = load_model_folder(run_dir / "sft" / "best")
    assert load_model_folder(tmp_path / "model").checksum == best.checksum
    message = tools.refused(
        4, "convert_checkpoint", "--run", run_dir / "sft", "--checkpoint", "latest", "--out", tmp_path / "model"
    )
    assert "no checkpoint" in message


def test_plot(tools: Tools, run_dir: Path, tmp_path: Path) -> None:
    tools.ran("plot_run", run_dir, run_dir / "pretrain", "--out", tmp_path / "curves.png")
    content = (tmp_path / "curves.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(content) > 20_000
    assert "contains no metrics.jsonl" in tools.refused(3, "plot_run", tmp_path, "--out", tmp_path / "none.png")


def test_curves_of_a_run(run_dir: Path) -> None:
    assert [folder.name for folder in stage_folders(run_dir)] == ["pretrain", "sft"]
    records = read_stage(run_dir / "sft")
    assert records[-1]["step"] == 100
    assert next((record["step"], record["alpha"]) for record in records if "alpha" in record) == (10, 11.0)
    assert [(record["step"], record["validation"]) for record in records if "validation" in record] == [
        (50, {"hr_at_10": 0.1, "ndcg_at_10": 0.05, "mrr": 0.1}),
        (100, {"hr_at_10": 0.1, "ndcg_at_10": 0.1, "mrr": 0.1}),
    ]
    assert training_seconds(run_dir / "sft") == pytest.approx(100 * 1024 / 2048 + 2 * 0.5)


def test_report(tools: Tools, run_dir: Path, dataset: Dataset, tmp_path: Path) -> None:
    out = tools.ran("report", run_dir, "--out", tmp_path / "report.json")
    systems = json.loads((tmp_path / "report.json").read_text())
    names = ["popularity", "Markov, window 3", "FPS pretraining", "+ SFT"]
    assert [system["name"] for system in systems] == names
    assert all({"hr_at_10", "ndcg_at_10", "mrr", "seconds"} <= set(system) for system in systems)
    for first, second in (names[2:0:-1], (names[3], names[1]), (names[3], names[2])):
        assert f"{first} − {second}: HR@10 " in out
    assert "train first" in tools.refused(4, "report", tmp_path, "--out", tmp_path / "none.json")


@pytest.mark.slow
def test_report_of_several_seeds(tools: Tools, run_dir: Path, dataset: Dataset, tmp_path: Path) -> None:
    """Means over runs, per seed under `seeds`; runs of another config are rejected."""
    other = tmp_path / "seed-1"
    for stage, trained in (("pretrain", "sft"), ("sft", "pretrain")):
        shutil.copytree(run_dir / stage, other / stage)
        shutil.rmtree(other / stage / "best")
        shutil.copytree(run_dir / trained / "best", other / stage / "best")
        config = other / stage / "best" / "config.yaml"
        content = yaml.safe_load(config.read_text())
        config.write_text(yaml.safe_dump({**content, "run": {**content["run"], "seed": 1}}))
    for name, runs in (("one", [run_dir]), ("two", [run_dir, other])):
        out = tools.ran("report", *runs, "--out", tmp_path / f"{name}.json")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert "2 seeds" in out and "(seeds " in out
    assert [system["name"] for system in one] == [system["name"] for system in two]
    assert two[:2] == [{**system, "seconds": again["seconds"]} for system, again in zip(one[:2], two[:2], strict=True)]
    for metric in ("hr_at_10", "ndcg_at_10", "mrr"):
        first, second = one[2][metric], one[3][metric]
        assert two[2][metric] == two[3][metric] == pytest.approx((first + second) / 2, abs=2e-6)
        assert [seed[metric] for seed in two[2]["seeds"]] == [first, second]
        assert [seed[metric] for seed in two[3]["seeds"]] == [second, first]
    path = other / "pretrain" / "best" / "config.yaml"
    changed = yaml.safe_load(path.read_text())
    changed["pretrain"]["rows_global"] *= 2
    path.write_text(yaml.safe_dump(changed))
    message = tools.refused(2, "report", run_dir, other, "--out", tmp_path / "none.json")
    assert "differ in more than the seed" in message
