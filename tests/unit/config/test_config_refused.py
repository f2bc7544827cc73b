"""Invalid configs on the command line: exit code 2 and one sentence, before any process group."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from bigdssm.commands import _stage
from bigdssm.config import Config
from bigdssm.training import stages
from bigdssm.utils.components import BOUND, REGISTRY

ROOT = Path(__file__).parents[3]
Launch = Callable[..., tuple[int, str]]


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Launch:
    """Return a function that calls launch/pretrain.py (or sft) with words and returns its exit code and stderr."""

    def run(*words: object, stage: str = "pretrain") -> tuple[int, str]:
        monkeypatch.setattr(stages, "init_process_group", lambda: pytest.fail("a process group was started"))
        code = _stage.run(stage, None, list(map(str, words)))  # type: ignore[arg-type]
        return code, capsys.readouterr().err

    return run


def assert_refused(answer: tuple[int, str], *words: str) -> None:
    code, said = answer
    errors = [line for line in said.splitlines() if not line.startswith("[0] ranks: ")]
    assert code == 2 and len(errors) == 1 and errors[0].startswith("error: "), answer
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.dim=0", "model.dim: got 0, needs at least 1 and at most 16,384"),
        ("model.dim=-4", "model.dim: got -4"),
        ("model.dim=100000", "model.dim: got 100000"),
        ("model.query.mlp=[16, 0]", "model.query.mlp[1]: got 0"),
        ("model.doc.embedding_dim=0", "model.doc.embedding_dim: got 0"),
        ("model.doc.numeric_dim=-1", "model.doc.numeric_dim: got -1"),
        ("model.doc.dropout=1.5", "model.doc.dropout: got 1.5, needs at least 0 and below 1"),
        ("model.query.text.dropout=.nan", "model.query.text.dropout: got nan, needs a finite number"),
        ("model.query.text.layers=0", "model.query.text.layers: got 0"),
        ("model.query.history.heads=0", "model.query.history.heads: got 0"),
        ("model.query.history.feedforward=-2", "model.query.history.feedforward: got -2"),
        ("model.alpha_init=.inf", "model.alpha_init: got inf, needs a finite number, above 0 and at most 10,000"),
        ("pretrain.optimizer.lr=.inf", "pretrain.optimizer.lr: got inf"),
        ("pretrain.optimizer.betas=[0.9, -1]", "pretrain.optimizer.betas[1]: got -1"),
        ("pretrain.sampling.gamma=-5", "pretrain.sampling.gamma: got -5"),
        ("sft.loss={name: triplet, margin: -1}", "sft.loss.margin: got -1"),
        ("pretrain.negatives.uniform=-1", "pretrain.negatives.uniform: got -1"),
        ("pretrain.epochs=1e9", "pretrain.epochs: got 1000000000.0, needs at least 0 and at most 100,000"),
        ("pretrain.epochs=.inf", "pretrain.epochs: got inf"),
        ("pretrain.rows_global=1000000000000", "pretrain.rows_global: got 1000000000000, needs at least 1 and at most"),
        ("data.max_bad_fraction=-1", "data.max_bad_fraction: got -1"),
        ("data.query.query.max_tokens=2", "data.query.query.max_tokens: got 2"),
        ("data.mixture=[{weight: 0}]", "data.mixture[0].weight: got 0"),
        ("engine.zero_stage=-1", "engine.zero_stage: got -1"),
        ("run.dir=''", "run.dir: got '', needs a folder"),
        ("pretrain.init=''", "pretrain.init: got '', needs a folder, or null"),
        ('run.dir="a\\0b"', "run.dir: got 'a\\x00b', needs text without NUL"),
        ("data.doc.tags.separator=''", "data.doc.tags.separator: got ''"),
    ],
)
def test_numbers_beyond_their_bounds(launch: Launch, tiny_pairs: Any, override: str, words: str) -> None:
    assert_refused(launch("--config", tiny_pairs.config, "--validate", override), words)


def test_every_number_has_declared_bounds() -> None:
    def numbers(cls: Any, key: str) -> Iterator[tuple[str, bool]]:
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            kinds = [hints[field.name], *getattr(hints[field.name], "__args__", ())]
            if {int, float} & set(kinds):
                yield f"{key}.{field.name}", BOUND in field.metadata
            registry = field.metadata.get(REGISTRY)
            components = [] if registry is None else [registry.find(name, "") for name in registry.names()]
            for kind in (*filter(dataclasses.is_dataclass, kinds), *components):
                yield from numbers(kind, f"{key}.{field.name}.{kind.__name__}")

    found = dict(numbers(Config, ""))
    assert len(found) > 200 and all(found.values()), [key for key, bound in found.items() if not bound]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.query.text.heads=3"],
            "model.query.text.hidden: got 128, needs a multiple of model.query.text.heads=3",
        ),
        (["model.doc.residual=nope"], "model.doc.residual=nope is no doc feature"),
        (["model.doc.residual=section"], "model.doc.residual=section has width 32, but model.dim=64"),
        (["model.query.text.init=no/such"], "text.init=no/such is not a folder"),
        (["model.doc.text.init={tmp}"], "does not load as a Hugging Face model"),
        (["pretrain.rows_global=1048576"], "a step would contain each of them more than 64 times"),
        (["data.webdataset={tmp}/{{000.."], "Unbalanced braces"),
        (["pretrain.negatives.mask=past"], "pretrain.negatives.mask: got past, needs batch or none: the rows of"),
        (["run.dir={tmp}/file"], "run.dir: {tmp}/file/pretrain cannot be created, since {tmp}/file is not a folder"),
        (["run.dir={tmp}/file/below"], "since {tmp}/file is not a folder"),
        (["run.dir={tmp}/sealed/run"], "since {tmp}/sealed is not writable"),
    ],
)
def test_models_and_folders_that_cannot_be_created(
    launch: Launch, tiny_pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], words: str
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "sealed").mkdir()
    may = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "sealed" and may(path, mode))
    overrides = [override.format(tmp=tmp_path) for override in overrides]
    assert_refused(launch("--config", tiny_pairs.config, "--validate", *overrides), words.format(tmp=tmp_path))


def test_heads_that_do_not_divide_a_historys_items(launch: Launch, tiny_interactions: Any) -> None:
    answer = launch("--config", tiny_interactions.config, "model.query.history.heads=5")
    assert_refused(answer, "model.query.history.heads=5 must divide the items' model.doc.embedding_dim=32")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "many"}, "RANK= WORLD_SIZE=many: needs a rank from 0 to WORLD_SIZE - 1"),
        ({"WORLD_SIZE": "0"}, "RANK= WORLD_SIZE=0: needs a rank"),
        ({"WORLD_SIZE": "2"}, "RANK= WORLD_SIZE=2: needs a rank"),  # both would train independently
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK=5 WORLD_SIZE=2: needs a rank"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK= MASTER_ADDR= MASTER_PORT= with RANK=1: needs the local rank"),
        ({"RANK": "0", "LOCAL_RANK": "x", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}, "LOCAL_RANK=x MASTER_ADDR=a"),
        ({"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "65536"}, "MASTER_PORT=65536 with RANK=0"),
    ],
)
def test_launchers_without_a_rendezvous_are_refused(
    launch: Launch, tiny_pairs: Any, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert_refused(launch("--config", tiny_pairs.config), words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- run: {dir: x}\n", "contains a list"),
        (b"12\n", "cannot be read, needs the sections run, data, model"),
        (b"run: {dir: caf\xe9}\n", "is not valid YAML in UTF-8"),
        (b"run: " + b"[" * 5000, "is not valid YAML"),
        (b"run: {dir: x}\nrun: {dir: y}\n", "is not valid YAML"),
        (b"", "required key"),
        (b"run: [1]\n", "run: got [1], needs a mapping"),
        (b"run: {dir: ${oc.env:HOME}}\n", "config"),
        (b"run: {dir: x}\ndata: {dir: x, query: {a: 1}}\n", "data.query.a: got 1"),
    ],
)
def test_files_that_are_not_configs(launch: Launch, tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    assert_refused(launch("--config", tmp_path / "config.yaml"), words)


@pytest.mark.parametrize(
    "override", ["=1", ".=1", "a..b=1", "[=1", "data.query.=1", "run.dir.x=1", "pretrain=[", "sft=1", "run=null"]
)
def test_invalid_overrides_are_refused(launch: Launch, tiny_pairs: Any, override: str) -> None:
    assert_refused(launch("--config", tiny_pairs.config, override), "")


def test_an_invalid_yaml_override_is_named_and_not_the_file(launch: Launch, tiny_pairs: Any) -> None:
    assert_refused(launch("--config", tiny_pairs.config, "run.seed=1", "pretrain=["), "override 'pretrain=[' has no")
