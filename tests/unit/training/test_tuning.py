"""The search: invalid spaces, the first trial, continuation, and early stopping of trials."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("optuna")

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from bigdssm.commands.tune import main
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError, ConfigError, DataError
from bigdssm.evaluation.baselines import BASELINES, Scores
from bigdssm.training.tuning import Space, read_space, search, values_of


def space(tmp_path: Path, text: str) -> Space:
    (tmp_path / "space.yaml").write_text(text)
    return read_space(tmp_path / "space.yaml")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[1]", "contains a list, needs keys with their values"),
        ("", "is empty, needs keys with their values"),
        ("a: [", "is not valid YAML"),
        ("a: 1", "a: got 1, needs {low: …, high: …, log: true or false} or {choices: …}"),
        ("a: {lo: 1, high: 2}", "a: got .*, needs {low"),
        ("a: {low: 3, high: 2}", "needs numbers low <= high"),
        ("a: {low: 0, high: 2, log: true}", "above 0 with log"),
        ("a: {low: true, high: 2}", "needs numbers"),
        ("a: {choices: []}", "needs only a list of choices"),
        ("a: {choices: [1], low: 1}", "needs only a list of choices"),
    ],
)
def test_invalid_search_spaces_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence.replace("[", r"\[").replace("{choices: …}", "")):
        space(tmp_path, text)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_space(tmp_path / "none.yaml")


def test_a_search_starts_from_the_config_and_improves_on_it(tmp_path: Path) -> None:
    where = space(tmp_path, "x: {low: -1.0, high: 1.0}\nn: {low: 1, high: 9}\nkind: {choices: [a, b]}\n")
    asked: list[dict[str, Any]] = []

    def value(trial: optuna.Trial, values: dict[str, Any]) -> float:
        asked.append(values)
        return -((values["x"] - 0.5) ** 2) - abs(values["n"] - 4) + (values["kind"] == "b")

    found = search(value, where, tmp_path / "out", 25, first={"x": -0.9, "n": 8, "kind": "a", "other": 1})
    assert asked[0] == {"x": -0.9, "n": 8, "kind": "a"} and len(asked) == 25
    assert all(isinstance(values["n"], int) for values in asked)
    assert found[0].value == max(trial.value for trial in found) and found[0].params["kind"] == "b"
    search(value, where, tmp_path / "out", 25, first={})
    assert len(asked) == 25, "finished"
    search(value, where, tmp_path / "out", 27, first={})
    assert len(asked) == 27


def test_interrupted_trials_are_repeated(tmp_path: Path) -> None:
    where, asked = space(tmp_path, "x: {low: 0.0, high: 1.0}"), list[float]()

    def value(trial: optuna.Trial, values: dict[str, Any]) -> float:
        asked.append(values["x"])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return float(values["x"])

    with pytest.raises(KeyboardInterrupt):
        search(value, where, tmp_path / "out", 4, first={})
    found = search(value, where, tmp_path / "out", 4, first={})
    assert asked[2] == asked[1] and len(asked) == 5 and len(found) == 4


def test_an_interrupted_trial_outside_a_corrected_space_is_not_repeated(tmp_path: Path) -> None:
    def value(trial: optuna.Trial, values: dict[str, Any]) -> float:
        if values["x"] > 1:
            raise ConfigError("x is above 1")
        return float(values["x"])

    with pytest.raises(ConfigError, match="x is above 1"):
        search(value, space(tmp_path, "x: {low: 0.0, high: 9.0}"), tmp_path / "out", 2, first={"x": 8.0})
    found = search(value, space(tmp_path, "x: {low: 0.0, high: 1.0}"), tmp_path / "out", 2, first={})
    assert len(found) == 2


def test_trials_outside_a_changed_space_do_not_count(tmp_path: Path) -> None:
    def value(trial: optuna.Trial, values: dict[str, Any]) -> float:
        return float(values["x"])

    def values_with(text: str) -> list[dict[str, Any]]:
        return [trial.params for trial in search(value, space(tmp_path, text), tmp_path / "out", 3, first={"x": 9})]

    assert values_with("x: {low: 1, high: 9}")[0] == {"x": 9}
    journal = JournalStorage(JournalFileBackend(str(tmp_path / "out" / "study.log")))
    optuna.load_study(study_name="search", storage=journal).enqueue_trial({"x": 8})  # as a killed search leaves it
    narrower = values_with("x: {low: 1, high: 5}")
    assert len(narrower) == 3 and max(params["x"] for params in narrower) <= 5
    wider = values_with("x: {low: 1, high: 5}\ny: {low: 0.0, high: 1.0}")
    assert len(wider) == 3 and all(params.keys() == {"x", "y"} for params in wider)
    for other in ("x: {low: 1, high: 5, log: true}", "x: {low: 1.0, high: 5.0}", "x: {choices: [1, 2]}"):
        with pytest.raises(ConfigError, match=r"the space's x: got .*, was IntDistribution.* choose another --out"):
            values_with(other)


def test_trials_below_the_median_are_pruned(tmp_path: Path) -> None:
    where, started, ended = space(tmp_path, "x: {low: 0.0, high: 1.0}"), list[float](), list[float]()

    def value(trial: optuna.Trial, values: dict[str, Any]) -> float:
        started.append(values["x"])
        trial.report(values["x"], step=1)
        if trial.should_prune():
            raise optuna.TrialPruned
        ended.append(values["x"])
        return float(values["x"])

    found = search(value, where, tmp_path / "out", 10, first={"x": 0.5})
    assert len(started) == len(found) == 10 and 3 <= len(ended) < 10
    assert [trial.value for trial in found][: len(ended)] == sorted(ended, reverse=True)
    assert all(trial.state.name == "PRUNED" for trial in found[len(ended) :])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("run.dir: {choices: [a, b]}", "the space's run.dir: needs a key of data, model, engine, pretrain"),
        ("run.seed: {low: 0, high: 9}", "the space's run.seed: needs a key of data, model"),
        ("debug.log_row_ids: {choices: [true]}", "the space's debug.log_row_ids: needs a key of"),
        (
            "pretrain.optimizer.lr: {low: -1.0, high: 1}",
            "the space's pretrain.optimizer.lr: got -1.0, needs at least 0",
        ),
        (
            "pretrain.optimizer.lr: {low: 1, high: 100}",
            "the space's pretrain.optimizer.lr: got 100.*, needs .*at most 10",
        ),
        ("pretrain.optimizer.weight_decay: {choices: [0.1, -0.1]}", "weight_decay: got -0.1"),
        ("pretrain.loss.direction: {choices: [q2d, up]}", "pretrain.loss.direction"),
    ],
)
def test_an_infeasible_search_space_is_refused_first(
    tiny_interactions: Any, tmp_path: Path, capsys: Any, text: str, sentence: str
) -> None:
    space(tmp_path, text)
    command = ["--config", str(tiny_interactions.config), "--space", str(tmp_path / "space.yaml")]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert re.search(sentence, errors) and len(errors.splitlines()) == 1, errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("low", "high", "wrong"), [(-5, 10, -5), (1, 20, 20)])
def test_a_baselines_bounds_are_those_of_its_options(
    tiny_interactions: Any, tmp_path: Path, capsys: Any, low: int, high: int, wrong: int
) -> None:
    space(tmp_path, f"window: {{low: {low}, high: {high}}}")
    command = ["--config", str(tiny_interactions.config), "--space", str(tmp_path / "space.yaml")]
    assert main([*command, "--baseline", "markov", "--out", str(tmp_path / "out")]) == 2
    assert f"the baseline markov: window: got {wrong}, needs at least 1 and at most 16" in capsys.readouterr().err


def test_a_truncated_journal_is_resumed_and_a_damaged_one_refused(tmp_path: Path) -> None:
    where, asked = space(tmp_path, "x: {low: 0.0, high: 1.0}"), list[float]()

    def value(trial: optuna.Trial, values: dict[str, Any]) -> float:
        asked.append(values["x"])
        return float(values["x"])

    out, journal = tmp_path / "out", tmp_path / "out" / "study.log"
    search(value, where, out, 3, first={})
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-20])  # the last record is incomplete
    search(value, where, out, 3, first={})
    assert len(asked) == 4 and asked[3] == asked[2]
    journal.write_bytes(whole + b'{"op_code": 4, "tri')
    search(value, where, out, 4, first={})
    assert len(asked) == 5, "what is appended behind it can be read"
    search(value, where, out, 4, first={})
    lines = whole.splitlines(keepends=True)
    journal.write_bytes(b"".join([lines[0], b"\x00\x00\n", *lines[1:]]))
    with pytest.raises(CheckpointError, match=r"study\.log is damaged in line 2"):
        search(value, where, out, 4, first={})


def test_a_second_search_in_a_folder_is_refused(tmp_path: Path) -> None:
    """It would treat the first one's running trial as interrupted."""
    where, out = space(tmp_path, "x: {low: 0.0, high: 1.0}"), tmp_path / "out"

    def value(trial: optuna.Trial, values: dict[str, Any]) -> float:
        with pytest.raises(DataError, match=r"another process is writing .*choose another --out"):
            search(value, where, out, 1, first={})
        return 1.0

    assert len(search(value, where, out, 1, first={})) == 1


def popularity_to_a_power(dataset: Dataset, power: int) -> Scores:
    counts = dataset.doc_counts() * float(power)
    return lambda rows: np.repeat(counts[None], len(rows), axis=0)


def test_a_baseline_from_outside_is_tuned_too(
    tiny_interactions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BASELINES, "power", popularity_to_a_power)
    space(tmp_path, "power: {choices: [-1, 1]}")
    command = ["--config", str(tiny_interactions.config), "--space", str(tmp_path / "space.yaml"), "--trials", "4"]
    assert main([*command, "--baseline", "power", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/best.json").read_text())[0] in ("power=-1", "power=1")


def test_a_baseline_is_tuned_by_the_command(tiny_interactions: Any, tmp_path: Path, capsys: Any) -> None:
    space(tmp_path, "window: {low: 1, high: 9, log: true}")
    command = ["--config", str(tiny_interactions.config), "--space", str(tmp_path / "space.yaml"), "--trials", "3"]
    assert main([*command, "--baseline", "markov", "--out", str(tmp_path / "out")]) == 0
    (best,) = json.loads((tmp_path / "out/best.json").read_text())
    assert best.startswith("window=") and "complete" in capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / "other")]) == 2
    assert "the space's window is not a key of the config" in capsys.readouterr().err
    config = load_config(tiny_interactions.config)
    keys = space(tmp_path, "model.dim: {low: 1, high: 128}\npretrain.loss.widths: {choices: [8]}")
    assert keys.allowed_values(values_of(config, keys)) == {"model.dim": 64}
