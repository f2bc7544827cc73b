"""Serving on a vector store: the answers are those of FAISS, and a request sees one model and one collection."""

# ruff: noqa: F811

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.commands import recommend as recommend_command
from bigdssm.commands import search as search_command
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError, ConfigError, DataError
from bigdssm.retrieval.index import build_index
from bigdssm.retrieval.publish import publish
from bigdssm.retrieval.request import Event, Request
from bigdssm.serving.searcher import Searcher
from bigdssm.stores.base import Store
from tests.unit.retrieval.test_stores import (  # noqa: F401
    embedded,
    memory_store,
    other_vectors_dir,
    server,
    store,
    url,
    vectors_dir,
)

pytest.importorskip("fastapi")


REQUESTS = [
    Request("u7", top=12), Request("u8", filter="genres = Comedy and year < 1995", top=40), Request("u9", top=100),
    Request("u7", filter="year >= 1990 or genres not in (Drama, Action)", exclude=["i3", "i999"], exclude_seen=False),
    Request(features={"age": 30}, events=[Event("i5"), Event("i6")], top=7),
]  # fmt: skip


@pytest.fixture
def live(
    store: Store,
    vectors_dir: Path,
    other_vectors_dir: Path,
    dataset: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> Store:
    """A store whose alias `live` is the collection of the first model; the second one's is `second`."""
    publish(store, vectors_dir, dataset, "first")
    publish(store, other_vectors_dir, dataset, "second")
    store.switch("live", "first")
    if store.scheme == "memory":  # its content is in the object
        monkeypatch.setattr("bigdssm.stores.opening.open_store", lambda url: replace(store, url=url))
    return store


@pytest.fixture
def models(model_dir: Path, other_model_dir: Path, tmp_path: Path) -> Path:
    """A folder of both models."""
    for number, folder in enumerate((model_dir, other_model_dir)):
        shutil.copytree(folder, tmp_path / "models" / f"night {number}")
    return tmp_path / "models"


def keys(documents: list[Any]) -> list[str]:
    return [document.key for document in documents]


def test_answers_are_those_of_faiss(
    live: Store,
    model_dir: Path,
    vectors_dir: Path,
    dataset: Dataset,
    tmp_path: Path,
) -> None:
    build_index(vectors_dir, tmp_path / "index")
    on_faiss, on_store = (Searcher.open(model_dir, index) for index in (tmp_path / "index", live.url))
    for mine, other in zip(on_store.search(REQUESTS), on_faiss.search(REQUESTS), strict=True):
        assert keys(mine) == keys(other) and len(mine) > 3
        assert [document.title for document in mine] == [document.title for document in other]
        np.testing.assert_allclose([document.score for document in mine], [document.score for document in other], 1e-5)
    for exclude in ((), ("i4", "i5", "i999")):
        (title, mine), (other_title, other) = (one.similar("i3", 6, exclude) for one in (on_store, on_faiss))
        assert title == other_title and keys(mine) == keys(other)
        np.testing.assert_allclose([document.score for document in mine], [document.score for document in other], 1e-5)
    mine, other = (one.why(Request("u7"), "i3") for one in (on_store, on_faiss))
    assert (mine.of, keys(mine.history)) == (other.of, keys(other.history)) and len(mine.history) == 5
    for call in (on_store.similar, lambda key, top: on_store.why(Request("u7"), key)):
        with pytest.raises(DataError, match="no document has the key 'none'"):
            call("none", 3)
    with pytest.raises(ConfigError, match="got 'yeer', needs one of"):
        on_store.search([Request("u7", filter="yeer > 3")])
    about, other_about = on_store.about(), on_faiss.about()
    assert about["filters"] == other_about["filters"] and about["documents"] == 40
    assert (about["index"], about["collection"], about["version"]) == (live.scheme, "first", 1)
    assert abs(about["published"] - time.time()) < 600 and 0 <= about["age_s"] < 600 and 0 <= other_about["age_s"] < 600
    assert about["store"] == live.address and "postgres@" not in str(about)


def test_seen_documents_that_the_store_lacks_have_no_part_in_why(live: Store, model_dir: Path) -> None:
    searcher = Searcher.open(model_dir, live.url)
    before = keys(searcher.why(Request("u7"), "i3").history)
    live.delete(live.collection("first"), [before[1]], 9)
    after = keys(searcher.why(Request("u7"), "i3").history)
    assert before[0] == "i3" and after[:4] == [before[0], *before[2:]]


@pytest.mark.parametrize("second", [False, True])
def test_the_model_of_the_collection_is_opened(live: Store, models: Path, second: bool) -> None:
    """Among several folders, at start and by name."""
    address = f"{live.url}#second" if second else live.url
    checksum = load_model_folder(models / f"night {int(second)}").checksum
    assert Searcher.open(models, address).about()["model"] == checksum
    other = models / f"night {int(not second)}"
    with pytest.raises(CheckpointError, match=r"holds vectors of model .*embed and index or publish with the model in"):
        Searcher.open(other, address)
    with pytest.raises(DataError, match="has no collection or alias 'none'"):
        Searcher.open(models, f"{live.url}#none")


def test_the_commands(live: Store, model_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    search = ["--model", str(model_dir), "--index", live.url, "--user", "u7", "--top", "4"]
    assert search_command.main(search) == 0
    expected = Searcher.open(model_dir, live.url).search([Request("u7", top=4)])[0]
    out = capsys.readouterr().out
    assert all(f"{document.score:.4f}" in out for document in expected) and len(expected) == 4
    code = recommend_command.main([*search[:4], "--users", "--out", str(tmp_path / "out")])
    assert code == ConfigError.exit_code and "recommend needs an index folder, not a store" in capsys.readouterr().err
