"""The Python API: a cheap import, the commands' results, no side effects on the process."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import logging
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import bigdssm
from bigdssm import distributed
from bigdssm.commands import __main__ as command
from bigdssm.commands import _stage
from bigdssm.errors import CheckpointError, ConfigError, DataError, Preempted
from bigdssm.retrieval.embed import tower_encoders
from tests.distributed import small_run
from tools.checks.pages import code_of

ROOT = Path(__file__).parents[2]
SHORT = ["pretrain.steps=4", "sft.steps=2", "data.lanes=6"]


def tables_of(folder: Path) -> dict[str, pa.Table]:
    """Return the tables of the small run, its items with a number and a vector each as well."""
    strings = pa_csv.ParseOptions(delimiter="\t")
    tables = {
        name: pa_csv.read_csv(folder / f"{name}.tsv", parse_options=strings) for name in ("events", "items", "users")
    }
    random, count = np.random.RandomState(1), tables["items"].num_rows
    vectors = random.randn(count, 3).astype(np.float32)
    size = [None if i % 7 == 3 else float(i * i) for i in range(count)]
    tables["items"] = (
        tables["items"].append_column("size", pa.array(size)).append_column("seen", pa.array(list(vectors)))
    )
    return tables


def autocast_depth() -> int:
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


def state_of_process() -> tuple[Any, ...]:
    handlers = {name: list(logging.getLogger(name).handlers) for name in (None, "bigdssm")}
    signals = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    logger = logging.getLogger("bigdssm")
    zero = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")
    return (
        dict(os.environ), signals, wakeup, handlers, logger.level, logger.propagate, logging.getLogger().level,
        distributed.is_distributed(), torch.get_rng_state().tolist(), torch.get_num_threads(),
        zero.is_invalid_grad_norm, torch.nn.functional.linear, torch.get_default_dtype(), torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), autocast_depth(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with tables, a config and both stages' runs, all made by the functions."""
    folder = tmp_path_factory.mktemp("api")
    small_run.write_dataset(folder)
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["data"]["doc"] |= {
        "number": {"type": "numeric", "column": "size"}, "seen": {"type": "vector", "dim": 3, "normalize": True},
    }  # fmt: skip
    content["data"]["dir"], content["run"]["dir"] = str(folder / "made"), str(folder / "run")
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    tables = tables_of(folder)
    bigdssm.make_dataset(
        folder / "config.yaml", interactions=tables["events"], items=tables["items"], users=tables["users"]
    )
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> list[Any]:
    import deepspeed  # noqa: F401, sets an environment variable

    before, config = state_of_process(), bigdssm.load_config(folder / "config.yaml", SHORT)
    first = bigdssm.pretrain(config)
    assert state_of_process() == before
    second = bigdssm.sft(folder / "config.yaml", SHORT)
    assert state_of_process() == before
    return [first, second]


def test_importing_brings_no_torch_and_takes_no_time() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import bigdssm; t = time.perf_counter() - t\n"
        "assert {name for name in dir(bigdssm) if name[0] != '_'} == {*bigdssm.__all__, 'utils'}, dir(bigdssm)\n"
        "print(t, sorted({'torch', 'numpy', 'pyarrow', 'deepspeed'} & set(sys.modules)))"
    )
    took = []
    for _ in range(3):  # the best of some: the machine may be busy
        said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        took.append(float(said.split()[0]))
        assert said.split(maxsplit=1)[1].strip() == "[]"
    assert min(took) < 0.3


def test_commands_of_a_model_without_texts_import_no_transformers() -> None:
    names = ("search", "serve", "recommend", "replay", "evaluate", "report", "compare_models", "mine_negatives")
    modules = [f"bigdssm.commands.{name}" for name in names]
    script = (
        f"import sys, bigdssm.serving.app, {', '.join(modules)}; print({{'torch', 'transformers'}} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "{'torch'}\n"


def test_all_public_names_exist() -> None:
    for name in bigdssm.__all__:
        assert getattr(bigdssm, name).__module__.startswith("bigdssm.")
    with pytest.raises(AttributeError, match="no attribute 'fsp_loss'"):
        bigdssm.fsp_loss  # noqa: B018


@pytest.mark.parametrize("kind", ["frames", "files"])
def test_tables_of_any_kind_make_the_same_dataset(folder: Path, tmp_path: Path, kind: str) -> None:
    tables: dict[str, Any] = tables_of(folder)
    if kind == "frames":
        tables = {name: table.to_pandas() for name, table in tables.items()}
        tables["users"]["gender"] = tables["users"]["gender"].astype("category")
    else:
        for name, table in tables.items():
            pq.write_table(table, tmp_path / f"{name}.parquet")
        tables = {name: str(tmp_path / f"{name}.parquet") for name in tables}
    events, items, users = tables["events"], tables["items"], tables["users"]
    report = bigdssm.make_dataset(
        folder / "config.yaml", interactions=events, items=items, users=users, out=tmp_path / "out"
    )
    assert report.num_bad == 0 and report.out == tmp_path / "out"
    assert bigdssm.Dataset.open(report.out).fingerprint == bigdssm.Dataset.open(folder / "made").fingerprint
    assert len(list(tmp_path.iterdir())) == (1 if kind == "frames" else 4), "nothing is left beside it"


def test_pairs_from_a_frame(tmp_path: Path) -> None:
    content = {
        "run": {"dir": str(tmp_path / "run")},
        "data": {
            "dir": str(tmp_path / "data"), "query": {"word": {"type": "categorical"}},
            "doc": {"title": {"type": "categorical"}},
        },
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    frame = pd.DataFrame({"word": [f"w{i % 9}" for i in range(80)], "title": [f"t{i % 20}" for i in range(80)]})
    report = bigdssm.make_dataset(tmp_path / "config.yaml", pairs=[frame, frame], split="train", dedup=True)
    assert report.num_docs == 20 and sum(report.rows.values()) == 80
    for wrong, sentence in (
        ({"pairs": frame, "items": frame}, "needs pairs=, or interactions="),
        ({"items": frame}, "interactions= is missing"),
        ({"pairs": frame, "doc_id_colum": "title"}, "did you mean doc_id_column"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            bigdssm.make_dataset(tmp_path / "config.yaml", out=tmp_path / "other", **wrong)


def test_both_stages_train_in_one_process(folder: Path, trained: list[Any]) -> None:
    for stage, result in zip(("pretrain", "sft"), trained, strict=True):
        assert result.best == folder / "run" / stage / "best" and (result.best / "model.safetensors").is_file()
        best = max(small_run.validations(folder / "run", stage), key=lambda metrics: metrics["ndcg_at_10"])
        assert result.metrics["ndcg_at_10"] == pytest.approx(best["ndcg_at_10"], abs=1e-6)
    with pytest.raises(CheckpointError, match="continue with --resume auto"):
        bigdssm.pretrain(folder / "config.yaml", SHORT)
    assert bigdssm.pretrain(folder / "config.yaml", SHORT, resume=True).metrics == trained[0].metrics


def test_a_stage_that_fails_leaves_the_process_as_it_was(folder: Path, tmp_path: Path) -> None:
    before = state_of_process()
    with pytest.raises(ConfigError, match="lanes"):
        bigdssm.pretrain(folder / "config.yaml", [f"run.dir={tmp_path}", "pretrain.rows_global=7"])
    with pytest.raises(ConfigError, match="dataclasses"):
        bigdssm.pretrain(bigdssm.load_config(folder / "config.yaml"), SHORT)
    assert state_of_process() == before


def test_a_stage_that_fails_with_an_engine_leaves_none_of_its_patches(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer is not complete, and does not destroy its engine."""
    from deepspeed.runtime.zero import stage_1_and_2

    from bigdssm.training import stages

    before, patched, engines = state_of_process(), [], []
    kind = stages.Engine

    def engine(*args: Any) -> Any:
        engines.append(kind(*args))
        return engines[-1]

    def fail(*args: Any, **options: Any) -> Any:
        patched.append(stage_1_and_2.is_invalid_grad_norm not in before)
        engines.pop().deepspeed.destroy()  # for the tests that follow
        raise DataError("a shard is damaged")

    monkeypatch.setattr(stages, "Engine", engine)
    monkeypatch.setattr(stages, "Validator", fail)
    with pytest.raises(DataError, match="damaged"):
        bigdssm.pretrain(folder / "config.yaml", [*SHORT, f"run.dir={tmp_path}", "engine.zero_stage=1"])
    assert patched == [True] and state_of_process() == before


@pytest.mark.parametrize("gradients", [torch.no_grad, torch.inference_mode])
def test_a_stage_within_the_contexts_of_a_notebook_is_the_same(folder: Path, tmp_path: Path, gradients: Any) -> None:
    """The weights that DeepSpeed casts to bfloat16 are those of the step, also within an outer autocast."""
    settings = [*SHORT, "pretrain.steps=3", "engine.precision=bf16", "pretrain.log_every_steps=1"]
    if not (folder / "plain").exists():
        bigdssm.pretrain(folder / "config.yaml", [*settings, f"run.dir={folder}/plain"])
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", dtype=torch.float16), torch.autocast("cpu"), gradients():
            before = state_of_process()
            bigdssm.pretrain(folder / "config.yaml", [*settings, f"run.dir={tmp_path}"])
            assert state_of_process() == before
    finally:
        torch.set_default_dtype(torch.float32)
    plain, within = (
        [(record["loss"], record["grad_norm"]) for record in small_run.records(run)]
        for run in (folder / "plain", tmp_path)
    )
    assert within == plain and len(plain) == 3


def test_a_process_trains_by_command_and_by_function(folder: Path, tmp_path: Path) -> None:
    """In any order: neither leaves a process group, functions or groups of DeepSpeed, or a launcher's variables."""
    linear, threads = torch.nn.functional.linear, small_run.group_threads()
    config, ranks = str(folder / "config.yaml"), {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    for name, zero_stage in (("first", 3), ("second", 3), ("other", 1)):
        settings = [*SHORT, f"run.dir={tmp_path}/{name}", f"engine.zero_stage={zero_stage}"]
        assert _stage.run("pretrain", None, ["--config", config, *settings]) == 0
        assert torch.nn.functional.linear is linear
        assert not distributed.is_distributed() and not ranks & set(os.environ)
        assert small_run.group_threads() == threads
        assert not any(type(alive).__name__ == "DeepSpeedEngine" for alive in gc.get_objects())
    bigdssm.pretrain(config, [*SHORT, f"run.dir={tmp_path}/third"])


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_second_stage_in_the_process_is_refused(
    folder: Path, trained: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """In any thread; the first has the weights that it has alone."""
    from bigdssm.training import trainer

    step, refusals = trainer.train_step, list[str]()

    def second() -> None:
        try:
            getattr(bigdssm, stage)(folder / "config.yaml", [*SHORT, f"run.dir={tmp_path}/second"])
        except ConfigError as error:
            refusals.append(str(error))

    def step_with_a_second_stage(*arguments: Any) -> Any:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        return step(*arguments)

    monkeypatch.setattr(trainer, "train_step", step_with_a_second_stage)
    best = bigdssm.pretrain(folder / "config.yaml", [*SHORT, f"run.dir={tmp_path}/first"]).best
    assert len(refusals) == 4 and all("a stage is training in this process, needs none" in words for words in refusals)
    assert not (tmp_path / "second").exists()
    weights = (folder / "run/pretrain/best/model.safetensors").read_bytes()
    assert (best / "model.safetensors").read_bytes() == weights


def test_a_stage_in_the_process_stops_on_request_by_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigdssm.training import trainer

    step = trainer.train_step

    def step_and_ask(*arguments: Any) -> Any:
        stop = next(path for path in (tmp_path / "other" / "pretrain", tmp_path / "pretrain") if path.exists()) / "stop"
        stop.write_text("save")
        until = 50
        while stop.exists() and (until := until - 1):
            signal.sigtimedwait([], 0.1)
        return step(*arguments)

    monkeypatch.setattr(trainer, "train_step", step_and_ask)
    before, threads = state_of_process(), small_run.group_threads()
    with pytest.raises(Preempted, match="saved"):
        bigdssm.pretrain(folder / "config.yaml", [*SHORT, f"run.dir={tmp_path}"])
    assert state_of_process() == before
    code = _stage.run("pretrain", None, ["--config", str(folder / "config.yaml"), *SHORT, f"run.dir={tmp_path}/other"])
    assert code == Preempted.exit_code
    assert small_run.group_threads() == threads


def rows_of(folder: Path) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Return the items as dicts of features, and the vectors that the command makes of them."""
    model, vectors = str(folder / "run/sft/best"), folder / "vectors"
    if not vectors.exists():
        assert command.main(["embed", "--model", model, "--data", str(folder / "made"), "--out", str(vectors)]) == 0
        assert command.main(["build_index", "--vectors", str(vectors), "--out", str(folder / "index")]) == 0
    items = tables_of(folder)["items"].rename_columns({"size": "number"}).to_pylist()
    keys = pa.ipc.open_file(vectors / "documents.arrow").read_all()["doc_key"].to_pylist()
    order = {row["item_id"]: row for row in items}
    return [order[key] for key in keys], np.load(vectors / "vectors.npy")


@pytest.fixture(autouse=True)
def own_logging(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Restore the logger and the command line after each test."""
    logger = logging.getLogger("bigdssm")
    before = list(logger.handlers), logger.level, logger.propagate
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.mark.parametrize("form", ["dicts", "table", "frame", "parts"])
def test_documents_get_the_vectors_of_the_command(folder: Path, trained: list[Any], form: str) -> None:
    rows, expected = rows_of(folder)
    model = bigdssm.load_model(trained[1].best)
    if form == "parts":
        rows = [{**row, "genre": row["genre"].split(" ")} for row in rows]
        found = np.concatenate([model.encode_documents(rows[:5]), model.encode_documents(iter(rows[5:]))])
    else:
        table = pa.Table.from_pylist(rows)
        found = model.encode_documents({"dicts": rows, "table": table, "frame": table.to_pandas()}[form])
    assert found.dtype == np.float32 and found.shape == (len(rows), 17)
    assert np.abs(found - expected).max() <= 1e-5
    assert model.encode_documents([]).shape == (0, 17)


def test_queries_get_the_vectors_of_training(folder: Path, trained: list[Any]) -> None:
    model, dataset = bigdssm.load_model(trained[1].best), bigdssm.Dataset.open(folder / "made")
    rows = next(dataset.iterate("test", 40))
    expected = tower_encoders(model.folder.model, dataset).queries(rows).numpy()
    users = {row["user_id"]: row for row in tables_of(folder)["users"].to_pylist()}
    table = dataset.sequences
    assert table is not None and rows.sequence is not None
    given = []
    for i in range(len(rows)):
        user = users[table.strings("query_key", rows.sequence[i : i + 1])[0]]
        history = dataset.catalogue.keys(rows.seen(i))  # all of it: the model takes the newest
        given.append({"history": history, "age": user["age"], "gender": user["gender"]})
    assert max(len(row["history"]) for row in given) > 8
    assert np.abs(model.encode_queries(given) - expected).max() <= 1e-5
    frame = pd.DataFrame(given)
    frame["gender"] = frame["gender"].astype("category")
    assert np.abs(model.encode_queries(frame) - expected).max() <= 1e-5


def test_absent_features_are_missing_and_invalid_ones_refused(folder: Path, trained: list[Any]) -> None:
    model = bigdssm.load_model(trained[1].best)
    same = model.encode_queries([{}, {"age": None}, {"history": [], "gender": ""}, {"history": None}])
    assert np.abs(same - same[0]).max() <= 1e-6
    fixed = pa.table({"history": pa.array([["i3", "i5"]], pa.list_(pa.string(), 2))})
    assert np.array_equal(model.encode_queries(fixed), model.encode_queries([{"history": ["i3", "i5"]}]))
    assert np.isfinite(model.encode_queries([{"history": [2**63 + 5]}, {"history": None}])).all()
    title = model.encode_documents(["word1 word2"])
    assert np.abs(title - model.encode_documents([{"title": "word1 word2"}])).max() <= 1e-6
    assert np.abs(title - model.encode_documents(["word7"])).max() > 1e-4
    for side, rows, sentence in (
        ("documents", [{"tilte": "a"}], "'tilte' is not a feature; did you mean 'title'"),
        ("documents", pa.table({"size": [1.0]}), "'size' is not a feature; did you mean 'number'"),
        ("documents", [{"number": "many"}], "row 0: number is 'many', needs"),
        ("documents", [{"title": "a"}, {"seen": [1.0, 2.0]}], "row 1: seen has 2 numbers, needs 3"),
        ("documents", [{"title": "a"}, "b"], "got rows of str"),
        ("documents", [{"number": 1.0}, {"number": "2"}], "number: values of one feature need one type"),
        ("queries", ["a text"], "there are 0; give dicts"),
        ("queries", [{"history": "i1"}], "history holds string, needs lists"),
    ):
        with pytest.raises(DataError, match=re.escape(sentence)):
            getattr(model, f"encode_{side}")(rows)


def test_an_index_returns_the_exact_top_documents(folder: Path, trained: list[Any]) -> None:
    rows, vectors = rows_of(folder)
    model = bigdssm.load_model(str(trained[1].best))
    index = bigdssm.open_index(str(folder / "index"), model)
    queries = model.encode_queries([{"history": ["i3", "i5"], "age": 30}, {"gender": "F"}])
    found = index.search(queries, 5, exclude=[["i3", "nowhere"], []])
    for query, documents, out in zip(queries, found, (["i3"], []), strict=True):
        scores = vectors @ query
        best = [i for i in np.argsort(-scores) if rows[i]["item_id"] not in out][:5]
        assert [document.key for document in documents] == [rows[i]["item_id"] for i in best]
        assert [document.score for document in documents] == pytest.approx(scores[best], abs=1e-5)
        assert all(document.title for document in documents)
    assert [d.key for d in index.search(queries, 48)[0]].count("i3") == 1
    for wrong, sentence in (
        ((queries[:, 1:], 5), r"got vectors \[2, 16\], needs \[queries, 17\]"),
        ((queries, 0), "top 0"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            index.search(*wrong)
    with pytest.raises(ConfigError, match="keys of 1 queries, needs 2"):
        index.search(queries, 5, exclude=[["i3"]])
    with pytest.raises(CheckpointError, match="holds vectors of model"):
        bigdssm.open_index(folder / "index", bigdssm.load_model(trained[0].best))


@pytest.mark.slow
def test_the_example_of_the_docs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    page = (ROOT / "docs/python.md").read_text().split("\n## ")[0]
    make, shell, encode = code_of(page)
    tables = tables_of(folder)
    pq.write_table(tables["events"], tmp_path / "events.parquet")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["run"]["dir"], config["data"]["dir"] = "runs/mine", "datasets/mine"
    config["pretrain"]["steps"], config["sft"]["steps"] = 4, 2
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    exec(make, {name: tables[name] for name in ("items", "users")})
    for line in shell.splitlines():
        if line.startswith("bigdssm "):
            assert command.main(shlex.split(line)[1:]) == 0
    exec(encode, {"bigdssm": bigdssm})
    assert len(capsys.readouterr().out.strip().splitlines()) > 12


@pytest.mark.parametrize("tool", sorted(path.stem for path in (ROOT / "bigdssm/commands").glob("[a-z]*.py")))
def test_every_tool_runs_as_a_module(tool: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", [tool, "--help"])
    monkeypatch.delitem(sys.modules, f"bigdssm.commands.{tool}", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"bigdssm.commands.{tool}", run_name="__main__")
    assert ended.value.code == 0 and "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("tool", sorted(path.stem for path in (ROOT / "bigdssm/commands").glob("[a-z]*.py")))
def test_every_option_has_a_help_text_and_its_default(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: list[argparse.ArgumentParser] = []

    def collect(parser: argparse.ArgumentParser, *arguments: Any) -> None:
        parsers.append(parser)
        raise SystemExit(0)

    for name in ("parse_args", "parse_intermixed_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, collect)
    with contextlib.suppress(SystemExit):
        importlib.import_module(f"bigdssm.commands.{tool}").main([])
    for action in (action for parser in parsers for action in parser._actions):
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
            continue
        assert action.help, action.option_strings
        has_default = action.default not in (None, False, [], argparse.SUPPRESS) and action.help != argparse.SUPPRESS
        assert not has_default or "default" in action.help, action.option_strings
    assert parsers


def test_the_command_lists_its_tools_and_suggests_the_nearest(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    tools = {line.split()[0] for line in lines if line.startswith("  ")}
    assert tools == {path.stem for path in (ROOT / "bigdssm/commands").glob("[a-z]*.py")} and "__main__" not in tools
    assert all(len(line) <= 120 and (not line.startswith("  ") or len(line.split()) > 4) for line in lines)
    files = {path.stem for folder in ("tools", "launch") for path in (ROOT / folder).glob("[a-z]*.py")}
    assert files == tools, "each tool is a file, too"
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{bigdssm.__version__}\n"
    assert command.main(["mine_negative"]) == 2
    assert capsys.readouterr().err == "error: bigdssm has no command 'mine_negative'; did you mean mine_negatives?\n"
    assert command.main(["xyzzy"]) == 2
    assert "`bigdssm --help` lists them" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["bigdssm", "stop_run", "nowhere"])
    assert command.main() not in (0, 2) and "nowhere" in capsys.readouterr().err
