"""Folders that were damaged, edited or mistaken for others, as the command lines meet them: one sentence, no scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigdssm.data import Dataset
from tests.unit.retrieval.test_tools import Tools, index_dir, tools  # noqa: F401, fixtures


@pytest.fixture
def copies(model_dir: Path, index_dir: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A folder with copies of a model, its vectors and its index."""
    shutil.copytree(model_dir, tmp_path / "model")
    shutil.copytree(index_dir, tmp_path / "index")
    shutil.copytree(index_dir.with_name("vectors"), tmp_path / "vectors")
    return tmp_path


def search(copies: Path, *options: object) -> list[object]:
    return ["search", "--model", copies / "model", "--index", copies / "index", *(options or ("--user", "u7"))]


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change a YAML or JSON file in place."""
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["model"].update(score="cosine" if config["model"]["score"] == "dot" else "dot"),
        lambda config: config["model"].update(alpha_init=3.0),
        lambda config: config.pop("model"),
    ],
)
def test_a_config_that_would_score_otherwise_is_refused(tools: Tools, copies: Path, change: Any) -> None:  # noqa: F811
    edit(copies / "model" / "config.yaml", change)
    message = tools.refused(4, *search(copies))
    assert "the model section of config.yaml, or sft.loss.mlp, is not what the model was trained with" in message


def test_what_changes_no_score_may_be_edited(tools: Tools, copies: Path, dataset: Dataset) -> None:  # noqa: F811
    """A dataset that moved, and the order and the comments of the YAML."""
    expected = tools.ran(*search(copies))
    shutil.copytree(dataset.dir, copies / "moved")
    edit(copies / "model" / "config.yaml", lambda config: config["data"].update(dir=str(copies / "moved")))
    path = copies / "model" / "config.yaml"
    path.write_text("# it moved\n" + path.read_text())
    assert tools.ran(*search(copies)) == expected


@pytest.mark.parametrize("file", ["schema.json", "tokenizer/tokenizer.json", "text/doc/config.json"])
def test_an_index_is_of_all_that_scores(tools: Tools, copies: Path, file: str) -> None:  # noqa: F811
    """The same weights beside another schema, tokenizer or architecture are another model."""
    from bigdssm.checkpoint import file_checksum

    model = copies / "model"
    text = (model / file).read_text()
    (model / file).write_text(text + "\n")
    edit(model / "bigdssm.json", lambda meta: meta["checksums"].update({file: file_checksum(model / file)}))
    assert "the index holds vectors of model" in tools.refused(4, *search(copies))


def test_an_old_model_folder_says_what_it_is(tools: Tools, copies: Path) -> None:  # noqa: F811
    edit(copies / "model" / "bigdssm.json", lambda meta: meta.update(format=1))
    message = tools.refused(4, *search(copies))
    assert "is a model folder of format 1, this version reads format 2" in message


def test_a_run_is_not_a_model_folder_but_holds_some(tools: Tools, copies: Path) -> None:  # noqa: F811
    run, index = copies / "run", ("--index", copies / "index", "--user", "u7")
    shutil.copytree(copies / "model", run / "pretrain" / "best")
    for given, meant in ((run, "pretrain/best"), (run / "pretrain", "best")):
        message = tools.refused(4, "search", "--model", given, *index)
        assert f"holds no bigdssm.json; did you mean {given / meant}?" in message
    shutil.copytree(copies / "model", run / "sft" / "best")
    assert f"did you mean {run / 'sft' / 'best'}?" in tools.refused(4, "search", "--model", run, *index)
    assert "did you mean" not in tools.refused(4, "search", "--model", copies, *index)


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-20])])
@pytest.mark.parametrize("file", ["index.faiss", "documents.arrow", "meta.json"])
def test_a_damaged_index_is_named(tools: Tools, copies: Path, damage: Any, file: str) -> None:  # noqa: F811
    damage(copies / "index" / file)
    assert file in tools.refused(4, *search(copies))


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-20])])
@pytest.mark.parametrize("file", ["vectors.npy", "documents.arrow", "contents.npy", "meta.json"])
def test_damaged_vectors_are_named(
    tools: Tools, copies: Path, dataset: Dataset, damage: Any, file: str  # noqa: F811
) -> None:  # fmt: skip
    damage(copies / "vectors" / file)
    if file == "contents.npy":  # is for --since alone
        command: list[object] = ["embed", "--model", copies / "model", "--data", dataset.dir, "--out", copies / "out"]
        command += ["--since", copies / "vectors"]
    else:
        command = ["build_index", "--vectors", copies / "vectors", "--out", copies / "out"]
    assert file in tools.refused(4, *command)
    assert not (copies / "out").exists()


@pytest.mark.parametrize("key", ["kind", "model_checksum", "dataset_fingerprint", "num_docs", "width", "files"])
def test_an_edited_meta_is_not_believed(tools: Tools, copies: Path, key: str) -> None:  # noqa: F811
    """An index of one model given out as another's, for example."""
    edit(copies / "index" / "meta.json", lambda meta: meta.update({key: "other"}))
    assert "meta.json is damaged: its checksum" in tools.refused(4, *search(copies))


def test_top_is_cut_to_the_documents(tools: Tools, copies: Path) -> None:  # noqa: F811
    """A thousand million places take most of a minute to fill with nothing."""
    everything = tools.ran(*search(copies, "--user", "u7", "--top", 40))
    assert tools.ran(*search(copies, "--user", "u7", "--top", 10**15)) == everything


@pytest.mark.parametrize(
    "query",
    [("--text", "age="), ("--text", "age= ", "occupation="), ("--history", ""), ("--history", " ; ;"), ("--user", "")],
)
def test_an_empty_query_is_refused(tools: Tools, copies: Path, query: tuple[str, ...]) -> None:  # noqa: F811
    assert "the query is empty" in tools.refused(2, *search(copies, *query))


def test_a_split_that_is_not_there_is_no_figure(tools: Tools, model_dir: Path, dataset: Dataset) -> None:  # noqa: F811
    message = tools.refused(3, "evaluate", "--model", model_dir, "--data", dataset.dir, "--split", "nope")
    assert "has no rows in split 'nope'; its splits are ['test', 'train', 'validation']" in message
