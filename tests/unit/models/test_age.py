"""The age of documents at a request: in every score of training, evaluation, an index and a search, by a formula."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from bigdssm.checkpoints.model_folder import ModelFolder, load_model_folder, save_model_folder
from bigdssm.config import Config, check_config, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.features import Age
from bigdssm.features.columns import RowCheck, SourceBatch
from bigdssm.features.event_time import UNKNOWN_TIME
from bigdssm.ingest.api import make_dataset
from bigdssm.loader.stream import PairStream
from bigdssm.models import new_model
from bigdssm.models.age import LONGEST, SHORTEST, AgeCoordinates
from bigdssm.retrieval.embed import item_contents, tower_encoders
from bigdssm.retrieval.index import build_index, open_index
from bigdssm.retrieval.request import Request
from bigdssm.retrieval.vectors import write_vectors
from bigdssm.serving.searcher import Searcher
from bigdssm.training.batches import BatchBuilder, read_batches

DAY, START, NUM_ITEMS, NUM_USERS, K, D = 86_400, 1_699_920_000, 30, 20, 3, 8
PERIODS = SHORTEST / 1e6 * (LONGEST / SHORTEST) ** (np.arange(K) / (K - 1))  # seconds
TIME = 1_700_000_000_000_000  # microseconds, 2023-11-14T22:13:20Z
ARRIVALS = [None if n % 7 == 0 else START - DAY * (n * n - 40) for n in range(NUM_ITEMS)]


def tables() -> dict[str, list[dict[str, Any]]]:
    """Return events of 20 users over 30 days, and items, some of them without a time of arrival."""
    random = np.random.RandomState(0)
    times = START + np.sort(random.randint(0, 30 * DAY, 500))
    events = [
        {"user_id": f"u{random.randint(NUM_USERS)}", "item_id": f"i{random.randint(NUM_ITEMS)}", "timestamp": int(time)}
        for time in times
    ]
    return {"interactions": events, "items": [{"item_id": f"i{n}", "since": s} for n, s in enumerate(ARRIVALS)]}


def config_of(folder: Path, **changes: Any) -> Config:
    """Return the config of a dataset in `folder`, with overrides KEY__KEY=value."""
    content = {
        "run": {"dir": str(folder.parent / "run")}, "pretrain": {"rows_global": 8, "steps": 1},
        "data": {
            "dir": str(folder), "lanes": 1, "targets_per_row": 4, "exclude_seen": False,
            "event": {"when": {"type": "timestamp"}}, "request": ["when"],
            "query": {"past": {"type": "history", "of": "item_id", "max_items": 6}},
            "doc": {"item_id": {"type": "categorical"}, "arrival": {"type": "age", "column": "since", "periods": K}},
        },
        "model": {
            "dim": D + 2 * K, "score": "dot", "beta": "document",
            "query": {"residual": "past", "mlp": [], "history": {"positions": "relative"}},
            "doc": {"residual": "item_id", "mlp": [], "embedding_dim": D},
        },
    }  # fmt: skip
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_config(path, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("age")


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    config = config_of(folder / "dataset")
    make_dataset(config, **tables(), split="time", processes=1)
    return config


@pytest.fixture(scope="module")
def dataset(config: Config) -> Dataset:
    return Dataset.open(Path(config.data.dir))


@pytest.fixture(scope="module")
def model(config: Config, dataset: Dataset, folder: Path) -> ModelFolder:
    torch.manual_seed(0)
    model = new_model(config.model, dataset.schema)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    save_model_folder(folder / "model", model, config, dataset.schema, None, {"stage": "pretrain", "step": 1})
    return load_model_folder(folder / "model")


def of_age(model: ModelFolder, times: np.ndarray) -> np.ndarray:
    """Return the part of the score of queries at `times` and each item that depends on its age, [m, N]."""
    module = model.model.age
    assert module is not None
    a, b = module.amplitudes.detach().double().numpy().reshape(2, K)
    arrivals = np.array([np.nan if time is None else time for time in ARRIVALS])
    turns = (times[:, None] - arrivals)[:, :, None] / PERIODS
    terms = a * np.cos(2 * math.pi * turns) + b * np.sin(2 * math.pi * turns)
    return np.nan_to_num(terms.sum(axis=2))


def items_of(dataset: Dataset) -> np.ndarray:
    """Return the numbers of the items by catalogue row."""
    return np.array([int(key[1:]) for key in dataset.catalogue.keys(np.arange(NUM_ITEMS))])


def test_the_scores_of_evaluation_are_those_of_the_formula(model: ModelFolder, dataset: Dataset) -> None:
    rows = next(iter(dataset.iterate("test", 100)))
    assert rows.sequence is not None and len(rows) > 10
    encoders = tower_encoders(model.model, dataset)
    with torch.no_grad():
        queries, documents = encoders.queries(rows), encoders.documents(np.arange(NUM_ITEMS))
    assert queries.shape[1] == documents.shape[1] == D + 2 * K + 1 == model.index_width
    times = np.asarray(rows.inputs["request.when"]) / 1e6
    assert len(np.unique(times)) > 10
    no_age = torch.cat([queries[:, :D], queries[:, -1:]], 1) @ torch.cat([documents[:, :D], documents[:, -1:]], 1).T
    found = (queries @ documents.T - no_age).double().numpy() / model.alpha
    expected = of_age(model, times)[:, items_of(dataset)]
    assert np.abs(expected).max() > 0.5 and (expected == 0).any()
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_each_negative_of_a_batch_has_its_age_at_the_time_of_each_query(
    model: ModelFolder, config: Config, dataset: Dataset
) -> None:
    """With several queries per row, and all items as columns."""
    stage = config_of(Path(config.data.dir), pretrain__negatives="{columns: catalogue, mask: none}").pretrain
    stream = PairStream(dataset, rows_global=8, lanes=1)
    batch = next(read_batches(stream, BatchBuilder(stream, stage, 0, None), torch.device("cpu"), 1))
    assert batch.query_positions is not None and len(batch.query_ids) > 8 and len(batch.doc_ids) == NUM_ITEMS
    with torch.no_grad():
        encoded = model.model(batch.query, batch.doc, query_positions=batch.query_positions)
    times = batch.query["request.when"].double().numpy() / 1e6
    found = (encoded.U[:, D:] @ encoded.W[:, D:].T).double().numpy()
    items = items_of(dataset)[batch.doc_rows.numpy()]
    np.testing.assert_allclose(found, of_age(model, times)[:, items], atol=2e-4)


def test_a_search_scores_the_age_at_its_time_with_an_index_that_never_changes(
    model: ModelFolder, dataset: Dataset, folder: Path
) -> None:
    write_vectors(folder / "vectors", tower_encoders(model.model, dataset), dataset, model.checksum)
    build_index(folder / "vectors", folder / "index")
    searcher = Searcher(model, open_index(folder / "index"), dataset)
    times = START + 40.0 * DAY, START + 49.0 * DAY
    requests = [Request(user="u3", now=time, top=NUM_ITEMS) for time in times]
    answers = [{answer.key: answer.score for answer in result} for result in searcher.search(requests)]
    assert answers[0].keys() == answers[1].keys() and len(answers[0]) == NUM_ITEMS
    before, after = of_age(model, np.array(times))
    assert np.abs(after - before).max() > 0.5
    for n in range(NUM_ITEMS):
        expected = model.alpha * (after[n] - before[n])
        assert answers[1][f"i{n}"] - answers[0][f"i{n}"] == pytest.approx(expected, abs=1e-3)


def test_the_product_depends_on_the_age_alone() -> None:
    torch.manual_seed(0)
    module = AgeCoordinates(16)
    torch.nn.init.normal_(module.amplitudes)
    ages = torch.arange(50) * 3 * DAY * 1_000_000
    arrivals = torch.full((50,), START * 1_000_000)
    products = []
    for shift in (0, 12_345_678_901_234, -7 * DAY * 1_000_000):
        of_query = module(arrivals + ages + shift)
        products.append((of_query * module.of_documents(arrivals + shift)).sum(dim=1))
    assert products[0].std() > 1
    torch.testing.assert_close(products[1], products[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(products[2], products[0], atol=1e-4, rtol=0)


def test_an_unknown_time_adds_nothing() -> None:
    module = AgeCoordinates(K)
    torch.nn.init.normal_(module.amplitudes)
    times = torch.tensor([UNKNOWN_TIME, START * 1_000_000])
    for coordinates in (module.of_documents(times), module(times)):
        assert (coordinates[0] == 0).all() and (coordinates[1] != 0).any()


def test_age_has_no_effect_before_training(config: Config, dataset: Dataset) -> None:
    model = new_model(config.model, dataset.schema)
    rows = next(iter(dataset.iterate("test", 10)))
    assert (tower_encoders(model, dataset).queries(rows)[:, D : D + 2 * K] == 0).all()


def test_similar_documents_are_not_those_of_the_same_age() -> None:
    """The norm of the coordinates is small compared with that of an item's vector."""
    coordinates = AgeCoordinates(16).of_documents(torch.arange(5) * DAY * 1_000_000)
    assert coordinates.norm(dim=1).tolist() == pytest.approx([0.25] * 5)


def test_contents_of_items_have_no_age(dataset: Dataset, config: Config) -> None:
    """They are inputs of histories, which are constants over time."""
    path = Path(config.data.dir)
    age = f"arrival: {{type: age, column: since, periods: {K}}}"
    doc = f"{{item_id: {{type: categorical}}, since: {{type: numeric}}, {age}}}"
    other = config_of(path.parent / "contents", data__doc=doc, model__query__history__items="both")
    make_dataset(other, **tables(), split="time", processes=1)
    of_contents = Dataset.open(Path(other.data.dir))
    contents = item_contents(new_model(other.model, of_contents.schema), of_contents)
    assert contents.shape == (1 + NUM_ITEMS, D)


@pytest.mark.parametrize(
    ("unit", "column", "expected", "reported"),
    [
        ("s", [1_700_000_000, None, 5], [TIME, UNKNOWN_TIME, 5_000_000], []),
        ("ms", [1_700_000_000_123.0, None], [1_700_000_000_123_000, UNKNOWN_TIME], []),
        ("s", ["2023-11-14T22:13:20Z", "", "1700000000"], [TIME, UNKNOWN_TIME, TIME], []),
        ("s", ["yesterday", "2023-11-14"], [UNKNOWN_TIME, 1_699_920_000_000_000], ["1: since is 'yesterday'"]),
        ("s", [1_700_000_000_123, 1_700_000_000], [UNKNOWN_TIME, TIME], ["1: since is 1700000000123"]),
        ("ms", pa.array([1_700_000_000, None], pa.timestamp("s")), [TIME, UNKNOWN_TIME], []),
        ("s", pa.nulls(1), [UNKNOWN_TIME], []),
    ],
)  # fmt: skip
def test_reading(unit: Any, column: Any, expected: list[int], reported: list[str]) -> None:
    column = column if isinstance(column, pa.Array) else pa.array(column)
    problems: list[str] = []
    batch = SourceBatch("t", pa.table({"since": column}), np.arange(1, len(column) + 1))
    check = RowCheck(batch, lambda file, row, reason, left_out=True: problems.append(f"{row}: {reason}"))
    assert Age(name="since", unit=unit).read(check).to_pylist() == expected
    assert [text[: len(start)] for text, start in zip(problems, reported, strict=True)] == reported


def test_parsing() -> None:
    age = Age(name="since")
    assert age.parse("1700000000") == age.parse("2023-11-14T22:13:20Z") == TIME
    for wrong in ("yesterday", "1700000000123", "nan", ""):
        with pytest.raises(ConfigError, match="since is"):
            age.parse(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__request": "[]"}, "type timestamp in it"),
        ({"model__score": "cosine", "model__beta": "none"}, "needs dot with a feature of data.doc of type age"),
        ({"model__dim": 2 * K}, f"more than {2 * K}"),
        ({"pretrain__loss": "{name: fps, widths: [4]}"}, "none with a feature of data.doc of type age"),
        ({"data__event__since": "{type: age}"}, "needs a feature of data.doc"),
        ({"data__doc__second": "{type: age, column: since}"}, "2 features of type age"),
    ],
)
def test_configs_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(config_of(tmp_path, **changes))


def test_a_width_that_forgets_the_age(tmp_path: Path, dataset: Dataset) -> None:
    config = config_of(tmp_path, model__dim=D)
    with pytest.raises(ConfigError, match=f"model.dim={D} has {D - 2 * K} without the {2 * K} of age"):
        new_model(config.model, dataset.schema)
