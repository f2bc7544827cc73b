"""Histories that read items by their contents: new items, and equal vectors in training, evaluation and serving."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from bigdssm.checkpoints.model_folder import ModelFolder, load_model_folder, save_model_folder
from bigdssm.commands import recommend
from bigdssm.config import Config, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.export.convert import export, folder_source
from bigdssm.export.formats import Probe
from bigdssm.features.base import ITEM_ROW, OUT_OF_VOCABULARY
from bigdssm.features.ragged import Ragged
from bigdssm.ingest.api import make_dataset
from bigdssm.loader.batch import to_features
from bigdssm.models import DualEncoder
from bigdssm.retrieval.embed import item_contents, query_vectors, tower_encoders
from bigdssm.retrieval.index import build_index, open_index
from bigdssm.retrieval.model import Model
from bigdssm.retrieval.queries import PastEvents, histories
from bigdssm.retrieval.request import Event, Request
from bigdssm.retrieval.vectors import write_vectors
from bigdssm.serving.searcher import Searcher
from tests.conftest import NUM_ITEMS
from tests.unit.conftest import SMALL, random_model

NEW = {"item_id": ["n0", "n1", "n2"], "title": ["moon", "river", "moon"], "genres": ["Drama", "Western", "Drama"],
       "year": [1999, 2001, 1999]}  # fmt: skip


@pytest.fixture(scope="module", params=["content", "both"])
def changed(request: pytest.FixtureRequest, tiny_interactions: object) -> Config:
    overrides = [*SMALL, f"query.history.items={request.param}"]
    return load_config(tiny_interactions.config, [f"model.{override}" for override in overrides])  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def path(changed: Config, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, model = tmp_path_factory.mktemp("contents") / "model", random_model(changed, dataset, seed=1)
    save_model_folder(path, model, changed, dataset.schema, dataset.tokenizer_dir, {"step": 3})
    return path


@pytest.fixture
def folder(path: Path) -> ModelFolder:
    return load_model_folder(path)


def test_contents_are_the_vectors_of_documents_with_unknown_ids(folder: ModelFolder, dataset: Dataset) -> None:
    view = folder.view(dataset)
    doc = to_features(view.schema.doc, view.catalogue.columns(np.arange(NUM_ITEMS)))
    doc["item_id"] = torch.full_like(doc["item_id"], OUT_OF_VOCABULARY)
    with torch.no_grad():
        expected = folder.model(doc=doc).W
    contents = item_contents(folder.model, view)
    torch.testing.assert_close(contents[1:], expected)
    assert not contents[0].any() and expected.std(0).min() > 0


def test_stored_histories_and_those_of_requests_have_the_same_rows(folder: ModelFolder, dataset: Dataset) -> None:
    view = folder.view(dataset)
    rows = next(view.iterate("test", 1000))
    past = PastEvents.of_items(view.schema, Ragged(*rows.seen_ragged()))
    columns = histories(view, past)
    for name in ("history", f"history.{ITEM_ROW}"):
        assert rows.query[name].values.tolist() == columns[name].values.tolist()  # type: ignore[union-attr]
    model = folder.model
    vectors = tower_encoders(model, view).queries(rows)
    model.set_contents(item_contents(model, view))
    torch.testing.assert_close(vectors, query_vectors(model, to_features(view.schema.query, {**rows.query, **columns})))
    names = dataset.catalogue.codes("item_id", columns[f"history.{ITEM_ROW}"].values - 1)
    assert names.tolist() == columns["history"].values.tolist() and len(names) > 100
    assert f"history.{ITEM_ROW}" not in next(dataset.iterate("test", 9)).query, "models of ids read ids alone"


def test_new_items_enter_histories_by_their_content(
    changed: Config, path: Path, dataset: Dataset, tmp_path: Path
) -> None:
    """Without an event, and in a request: two new items of one content are the same to a query, others are not."""
    grown = Path(shutil.copytree(dataset.dir, tmp_path / "data"))
    make_dataset(changed, out=grown, append=True, partition="new", items=NEW)
    folder = load_model_folder(path)
    view = folder.view(Dataset.open(grown))
    write_vectors(tmp_path / "vectors", tower_encoders(folder.model, view), view, folder.checksum)
    build_index(tmp_path / "vectors", tmp_path / "index")
    searcher = Searcher(folder, open_index(tmp_path / "index"), Dataset.open(grown))
    requests = [Request(events=[Event("i3"), Event(item)]) for item in ("n0", "n1", "n2", "i4")]
    vectors = searcher.encode([searcher.queries.of(request) for request in requests])
    assert np.abs(vectors[0] - vectors[2]).max() < 1e-6 < 1e-3 < np.abs(vectors[0] - vectors[1]).max()
    (answers,) = searcher.search([Request(user="u7", top=5)])
    options = ("--model", path, "--index", tmp_path / "index", "--data", grown, "--users", "--top", 5)
    assert recommend.main([*map(str, options), "--out", str(tmp_path / "answers")]) == 0
    table = parquet.read_table(tmp_path / "answers" / "part-0000000.parquet").to_pandas()
    assert table[table["query"] == "u7"]["document"].tolist() == [one.key for one in answers]
    # As by hand: the history's codes, and the contents of its items.
    model: DualEncoder = folder.model
    model.set_contents(item_contents(model, view))
    rows = view.catalogue.rows_by_key(["i3", "n0"])
    codes = view.catalogue.codes("item_id", rows)
    assert codes[1] == OUT_OF_VOCABULARY
    query = searcher.queries.of(requests[0]).columns
    by_hand = {
        "history": Ragged.of_lists([codes], np.int64),
        f"history.{ITEM_ROW}": Ragged.of_lists([rows + 1], np.int64),
    }
    features = to_features(view.schema.query, {**query, **by_hand})
    torch.testing.assert_close(query_vectors(model, features)[0], torch.from_numpy(vectors[0]))
    # Only the ids of items, if they are read, tell two known items of one content apart.
    features["history"] = torch.where(features["history"] == OUT_OF_VOCABULARY, 5, features["history"])
    same = np.abs(query_vectors(model, features)[0].numpy() - vectors[0]).max() < 1e-6
    assert same == (changed.model.query.history.items == "content")


def test_a_model_folder_is_exported(path: Path, folder: ModelFolder, dataset: Dataset, tmp_path: Path) -> None:
    source = folder_source(path)
    before = source.model.model.set_contents(torch.zeros(1, source.model.config.model.dim))
    parity = export(source, tmp_path / "exported")
    assert (parity.query, parity.doc) == (0.0, 0.0) and before.shape == (1, source.model.config.model.dim)
    assert torch.equal(source.model.model.set_contents(before), before), "contents of the probe"
    exported = load_model_folder(tmp_path / "exported")
    assert exported.checksum == folder.checksum
    rows = next(folder.view(dataset).iterate("test", 20))
    vectors = [tower_encoders(one.model, one.view(dataset)).queries(rows) for one in (exported, folder)]
    assert torch.equal(*vectors)
    of_probe = Probe(folder)
    assert of_probe.features["query"][f"history.{ITEM_ROW}"].max() > 1
    vectors_of_probe = of_probe.vectors["query"]
    with torch.no_grad():  # the probe covers the weights of contents
        for name, weight in folder.model.named_parameters():
            if "content_map" in name:
                weight *= 2
    assert not torch.allclose(Probe(folder).vectors["query"], vectors_of_probe)


def test_other_uses_and_exports_are_refused(path: Path, folder: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"history: got items without catalogue rows, needs them with model.query"):
        Model(folder).encode_queries([{"history": ["i3"]}])
    with pytest.raises(ConfigError, match=r"needs id: an exported query tower has no catalogue"):
        export(folder_source(path), tmp_path / "exported", "onnx")
    assert not (tmp_path / "exported").exists()
