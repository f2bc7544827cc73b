"""The page's API besides search: explanations, filter choices, a second model; and its security policy."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigdssm.checkpoints.model_folder import load_model_folder, save_model_folder
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.features import Categorical, Numeric, Ragged, Vocabulary
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.index import build_index, open_index
from bigdssm.retrieval.model import Model
from bigdssm.retrieval.request import Request
from bigdssm.retrieval.vectors import write_vectors
from bigdssm.serving.searcher import Folders, Searcher
from bigdssm.utils.atomic import replace_folder
from tests.tolerances import assert_scores_close
from tests.unit.conftest import SMALL, WIDTH, random_model
from tests.unit.serving.metrics_text import counted

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from bigdssm.serving.app import make_app


@pytest.fixture(scope="module")
def searcher(model_dir: Path, index_dir: Path, dataset: Dataset) -> Searcher:
    return Searcher(load_model_folder(model_dir), open_index(index_dir), dataset)


@pytest.fixture(scope="module")
def other(other_model_dir: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    folder, loaded = tmp_path_factory.mktemp("other"), load_model_folder(other_model_dir)
    write_vectors(folder / "vectors", tower_encoders(loaded.model, dataset), dataset, loaded.checksum)
    build_index(folder / "vectors", folder / "index")
    return Searcher(loaded, open_index(folder / "index"), dataset)


@pytest.fixture
def client(searcher: Searcher, other: Searcher) -> Iterator[TestClient]:
    with TestClient(make_app(searcher, second=other)) as client:
        yield client


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_an_explanation_lists_the_nearest_history_items(
    kind: Any, model_dir: Path, index_dir: Path, dataset: Dataset, tmp_path: Path
) -> None:
    vectors_dir = index_dir.with_name("vectors")
    build_index(vectors_dir, tmp_path / "index", kind)
    vectors = np.load(vectors_dir / "vectors.npy")[:, :-1]
    with TestClient(
        make_app(Searcher(load_model_folder(model_dir), open_index(tmp_path / "index"), dataset))
    ) as client:
        events = [f"i{i}" for i in (30, 31, 2, 9, 2, 11, 20, 21, 22, 23, 24, 25)]  # the last ten are used
        body = {"events": [{"item": item} for item in events], "answer": "i31"}
        answer = client.post("/api/why", json=body).json()
    read = {item: cosine(vectors[int(item[1:])], vectors[31]) for item in events[2:]}
    wanted = sorted(read, key=lambda item: -read[item])[:5]
    assert [item["key"] for item in answer["history"]] == wanted
    np.testing.assert_allclose([i["cosine"] for i in answer["history"]], [read[key] for key in wanted], atol=1e-5)
    names = dataset.catalogue.titles(np.array([int(key[1:]) for key in [*wanted, "i31"]]))
    assert [item["title"] for item in answer["history"]] + [answer["of"]] == names
    assert answer["words"] == [] and answer["total_ms"] > 0


@pytest.mark.parametrize("width", [None, 4])
def test_an_explanation_lists_the_nearest_words(width: int | None, tiny_pairs: Any, tmp_path: Path) -> None:
    config, dataset = load_config(tiny_pairs.config, [f"model.{some}" for some in SMALL]), Dataset.open(tiny_pairs.dir)
    save_model_folder(
        tmp_path / "model", random_model(config, dataset, 1), config, dataset.schema, dataset.tokenizer_dir, {}
    )
    folder = load_model_folder(tmp_path / "model")
    write_vectors(tmp_path / "vectors", tower_encoders(folder.model, dataset), dataset, folder.checksum, score="dot")
    build_index(tmp_path / "vectors", tmp_path / "index", width=width)
    key = dataset.catalogue.keys(np.array([5]))[0]
    body = {"features": {"query": "Stone, bridge stone-lantern: river"}, "answer": key}
    with TestClient(make_app(Searcher(folder, open_index(tmp_path / "index"), dataset))) as client:
        answer = client.post("/api/why", json=body).json()
        assert client.post("/api/why", json={**body, "answer": "gone"}).status_code == 404
    words = ["Stone", "bridge", "stone", "lantern", "river"]
    vectors, document = Model(folder).encode_queries(words), np.load(tmp_path / "vectors/vectors.npy")[5]
    near = {
        word: cosine(vector[:-1][:width], document[:-1][:width]) for word, vector in zip(words, vectors, strict=True)
    }
    assert [word["word"] for word in answer["words"]] == sorted(near, key=lambda word: -near[word])
    found = {word["word"]: word["cosine"] for word in answer["words"]}
    np.testing.assert_allclose([found[word] for word in words], [near[word] for word in words], atol=1e-5)
    assert answer["history"] == [] and {word["feature"] for word in answer["words"]} == {"query"}


def test_invalid_explanation_requests_are_refused(client: TestClient) -> None:
    for body, status, sentence in (
        ({"user": "u7"}, 422, "answer: Field required"),
        ({"user": "u7", "answer": "i99"}, 404, "no document has the key 'i99'"),
        ({"user": "nobody", "answer": "i7"}, 404, "no user is called 'nobody'"),
        ({"answer": "i7"}, 400, "the query is empty"),
        ({"user": "u7", "answer": "i7", "tpo": 3}, 422, "tpo: Extra inputs are not permitted"),
    ):
        answer = client.post("/api/why", json=body)
        assert answer.status_code == status and sentence in answer.json()["error"]


def test_a_second_model_is_served_next_to_the_first(client: TestClient, searcher: Searcher, other: Searcher) -> None:
    both = {"": searcher, "/second": other}
    abouts = {side: client.get(f"{side}/api/about").json() for side in both}
    assert all(about["second"] for about in abouts.values())
    assert abouts[""]["model"] != abouts["/second"]["model"] == other.about()["model"]
    for side, one in both.items():
        found = client.post(f"{side}/api/search", json={"user": "u7"}).json()
        alone = [document.score for document in one.search([Request("u7")])[0]]
        assert_scores_close([document["score"] for document in found["documents"]], alone, WIDTH)
        near = client.get(f"{side}/api/similar", params={"key": "i3"}).json()["documents"]
        assert [document["key"] for document in near] == [document.key for document in one.similar("i3", 10)[1]]
    found = counted(client)
    assert (
        found["bigdssm_requests_total /api/search 200"] == found["bigdssm_requests_total /second/api/search 200"] == 1
    )
    with TestClient(make_app(searcher)) as alone:
        assert alone.get("/second/api/about").status_code == 404
        assert not alone.get("/api/about").json()["second"]


def test_a_new_second_model_is_loaded_next_to_the_first(
    model_dir: Path, index_dir: Path, dataset: Dataset, searcher: Searcher, other: Searcher, tmp_path: Path
) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    shutil.copytree(index_dir, tmp_path / "index")
    build_index(index_dir.with_name("vectors"), tmp_path / "new", "sq8")
    folders = Folders(tmp_path / "model", tmp_path / "index", str(dataset.dir))
    with TestClient(make_app(other, second=folders.open(), second_folders=folders, poll_s=0.02)) as client:
        assert client.get("/second/api/about").json()["index"] == "flat"
        replace_folder(tmp_path / "new", tmp_path / "index")
        until = time.monotonic() + 20
        while client.get("/second/api/about").json()["index"] != "sq8":
            assert time.monotonic() < until
        assert client.get("/api/about").json()["model"] == other.about()["model"]


def test_filter_fields_of_the_page(client: TestClient) -> None:
    filters = client.get("/api/about").json()["filters"]
    assert filters["year"] == {"type": "numeric", "least": 1961.0, "most": 1999.0}
    assert filters["genres"]["type"] == "categorical"
    assert sorted(filters["genres"]["values"]) == ["Action", "Comedy", "Drama", "Western"]
    assert set(filters) == {"year", "genres"}, "keys are unique, a title is a text"


def test_choices_are_existing_values_by_frequency() -> None:
    feature = Categorical(vocabulary=Vocabulary.of(["a", "b", "c", "d"]), name="kind")
    column = Ragged.of_lists([[3], [4, 2], [0], [4, 1, 1, 1], [3, 4], []])
    assert feature.choices(column) == {"values": ["c", "b", "a"]}
    assert feature.choices(np.array([2, 3, 1, 0])) is None, "all values are distinct"
    assert Categorical(hash_buckets=4).choices(column) is None
    assert feature.choices(np.zeros(0, np.int32)) is None
    assert Numeric().choices(np.array([np.nan, 12.34, 3, -1], np.float32)) == {"least": -1.0, "most": 12.34}
    assert Numeric().choices(np.array([np.nan], np.float32)) is None


def test_the_page_runs_no_code_but_its_own(client: TestClient) -> None:
    page = client.get("/")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy
    assert "<style" not in page.text and "onclick" not in page.text and "<script>" not in page.text
    for name, kind in (("page.js", "text/javascript"), ("page.css", "text/css")):
        assert name in page.text and client.get(f"/{name}").headers["Content-Type"].startswith(kind)
