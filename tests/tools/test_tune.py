"""tools/evidence/tune.py: baselines and trainings, continued searches, and invalid spaces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from bigdssm.errors import ConfigError
from tests.conftest import TinyDataset
from tools.evidence.tune import Values, main, read_space, search


def command(dataset: TinyDataset, folder: Path, space: str, *others: str) -> list[str]:
    (folder / "space.yaml").write_text(space)
    given = ["--config", str(dataset.config), "--space", str(folder / "space.yaml"), "--out", str(folder / "out")]
    return [*given, *others]


def test_a_search_continues_where_it_was_interrupted(tmp_path: Path) -> None:
    space: dict[str, Values] = {
        "x": {"low": -1.0, "high": 1.0},
        "n": {"low": 1, "high": 9},
        "kind": {"choices": ["a", "b"]},
    }
    tried: list[Values] = []

    def score(values: Values, number: int) -> float:
        if number == 2:
            raise KeyboardInterrupt
        tried.append(values)
        return -((values["x"] - 0.5) ** 2) - abs(values["n"] - 4) + (values["kind"] == "b")

    with pytest.raises(KeyboardInterrupt):
        search(score, space, tmp_path / "out", 25, seed=0)
    assert len(tried) == 2
    best = search(score, space, tmp_path / "out", 25, seed=0)
    assert len(tried) == 25 and all(isinstance(values["n"], int) for values in tried)
    assert best.params in tried and best.params["kind"] == "b"
    assert search(score, space, tmp_path / "out", 25, seed=0).params == best.params and len(tried) == 25
    search(score, space, tmp_path / "out", 27, seed=0)
    assert len(tried) == 27


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[1]", "contains a list, needs keys with their values"),
        ("a: 1", "a: got 1, needs keys with their values"),
        ("a: {low: 3}", "a: got {'low': 3}, needs"),
        ("a: {choices: [1], low: 1}", "a: got .*, needs"),
    ],
)
def test_invalid_search_spaces_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read_space(tmp_path / "space.yaml")


def test_the_options_of_a_baseline(tiny_interactions: TinyDataset, tmp_path: Path, capsys: Any) -> None:
    given = command(tiny_interactions, tmp_path, "window: {low: 1, high: 9, log: true}", "--baseline", "markov")
    assert main([*given, "--trials", "3"]) == 0
    (best,) = json.loads((tmp_path / "out/best.json").read_text())
    assert best.startswith("window=") and "ndcg_at_10" in capsys.readouterr().out
    given = command(tiny_interactions, tmp_path, "regularisation: {choices: [1, 100]}", "--baseline", "ease")
    assert main([*given, "--trials", "1", "--out", str(tmp_path / "other")]) == 0
    given = command(tiny_interactions, tmp_path, "window: {low: 17, high: 20}", "--baseline", "markov")
    assert main([*given, "--out", str(tmp_path / "third")]) == 2
    assert "needs at least 1 and at most 16" in capsys.readouterr().err


@pytest.mark.slow
def test_the_values_of_a_pretraining(tiny_interactions: TinyDataset, tmp_path: Path) -> None:
    small = ["model.dim=8", "model.query.mlp=[]", "model.doc.mlp=[]", "pretrain.rows_global=64", "pretrain.steps=60"]
    small += ["model.doc.text.layers=1", "model.doc.text.hidden=8", "pretrain.validate_every_steps=10"]
    given = command(tiny_interactions, tmp_path, "pretrain.optimizer.lr: {choices: [0.001, 0.0000001]}")
    assert main([*given, "--trials", "3", *small]) == 0
    assert json.loads((tmp_path / "out/best.json").read_text()) == ["pretrain.optimizer.lr=0.001"]
    assert (tmp_path / "out/trial-0/pretrain/best").is_dir()
