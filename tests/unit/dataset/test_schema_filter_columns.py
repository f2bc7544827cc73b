"""Columns that only filter: no model depends on them, and their changes need no new vectors and no new index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigdssm import make_dataset
from bigdssm.checkpoints.model_folder import load_model_folder, save_model_folder
from bigdssm.commands import build_index, embed
from bigdssm.config import Config, DataConfig
from bigdssm.config.checks import check_config
from bigdssm.dataset.dataset import Dataset, open_dataset
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError
from bigdssm.evaluation.slices import read_slices
from bigdssm.features import Categorical, History, Numeric, Text
from bigdssm.loader.inspection import describe, verify_dataset
from bigdssm.loader.stream import PairStream
from bigdssm.retrieval.request import Request
from bigdssm.retrieval.vectors import load_vectors, read_meta
from bigdssm.serving.searcher import Searcher
from tests.unit.conftest import random_model

FILTER = {"stock": Numeric(), "region": Categorical(multi=True)}
DATA = DataConfig(
    time_unit="s",
    dir="", query={"past": History(of="item", max_items=9)},
    doc={"item": Categorical(column="item_id"), "kind": Categorical()}, filter=FILTER, lanes=1,
)  # fmt: skip
NUM_ITEMS = 12


def items(stock: Sequence[float | None], region: str = "north south") -> dict[str, list[Any]]:
    return {
        "item_id": [f"i{n}" for n in range(NUM_ITEMS)],
        "kind": ["ab"[n % 2] for n in range(NUM_ITEMS)],
        "stock": list(stock),
        "region": [region.split()[n % 2] if n else None for n in range(NUM_ITEMS)],
        "since": [0] * NUM_ITEMS,
    }


EVENTS = {
    "user_id": [user for user in "uvw" for _ in range(6)],
    "item_id": [f"i{(3 * n + 5 * m) % NUM_ITEMS}" for m in range(3) for n in range(6)],
    "timestamp": [n for _ in range(3) for n in range(6)],
}
FULL, SOLD = [float(n) for n in range(NUM_ITEMS)], [None, *[0.0] * 6, *[9.0] * 5]


def make(config: Config, folder: Path, data: DataConfig = DATA, **options: Any) -> Config:
    config = replace(config, data=replace(data, dir=str(folder)))
    make_dataset(config, interactions=EVENTS, items=items(FULL), processes=1, **options)
    return config


def answers(searcher: Searcher, condition: str) -> list[str]:
    (documents,) = searcher.search([Request(user="u", filter=condition, exclude_seen=False, top=NUM_ITEMS)])
    return sorted((document.key for document in documents), key=lambda key: int(key[1:]))


def run(main: Any, *arguments: object) -> None:
    main([str(argument) for argument in arguments])


def write_models(config: Config, folder: Path, **options: Any) -> None:
    """Save a model of the dataset, and one of the same dataset without columns for filters, of equal checksums."""
    plain = make(config, folder / "plain", replace(DATA, filter={}), **options)
    for name, own in (("model", config), ("model_of_plain", plain)):
        dataset = open_dataset(own.data)
        save_model_folder(folder / name, random_model(own, dataset, seed=1), own, dataset.schema, None, {})
    first, second = (load_model_folder(folder / name) for name in ("model", "model_of_plain"))
    assert first.checksum == second.checksum
    assert not first.schema.filter and "region" not in (folder / "model" / "schema.json").read_text()


@pytest.mark.parametrize("options", [{}, {"items_time_column": "since"}])
def test_a_change_needs_no_new_vectors_and_no_new_index(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    config = make(config, tmp_path / "data", **options)
    write_models(config, tmp_path, **options)
    model = load_model_folder(tmp_path / "model")
    folders = ("--model", tmp_path / "model", "--data", tmp_path / "data")
    run(embed.main, *folders, "--out", tmp_path / "vectors")
    run(build_index.main, "--vectors", tmp_path / "vectors", "--out", tmp_path / "index")

    searcher = Searcher.open(tmp_path / "model", tmp_path / "index")
    assert answers(searcher, "stock >= 5 and region = north") == ["i6", "i8", "i10"]
    assert answers(searcher, "region != north") == [f"i{n}" for n in range(1, NUM_ITEMS, 2)], "i0 has no region"
    assert searcher.queries.filters.choices["region"]["values"] == ["south", "north"]
    extents, stream = open_dataset(config.data).extents, PairStream(open_dataset(config.data), rows_global=2, lanes=1)
    assert not searcher.is_outdated()

    changed = items(SOLD, "north east") | {"since": [50] * NUM_ITEMS}
    report = make_dataset(config, items=changed, append=True, partition="day", processes=1, **options)
    assert (report.new_docs, report.changed_docs) == (0, NUM_ITEMS)
    assert searcher.is_outdated(), "a server reloads"
    searcher = Searcher.open(tmp_path / "model", tmp_path / "index")
    assert answers(searcher, "stock > 0") == [f"i{n}" for n in range(7, NUM_ITEMS)]
    assert answers(searcher, "region = east or stock = 9 and kind = b") == [f"i{n}" for n in range(1, NUM_ITEMS, 2)]
    capsys.readouterr()
    run(embed.main, *folders, "--out", tmp_path / "again", "--since", tmp_path / "vectors")
    assert f"0 encoded, {NUM_ITEMS} unchanged" in capsys.readouterr().out
    before, after = (load_vectors(tmp_path / name, read_meta(tmp_path / name))[:] for name in ("vectors", "again"))
    assert np.array_equal(before, after)

    dataset = Dataset.open(tmp_path / "data")
    assert verify_dataset(tmp_path / "data") == []
    assert PairStream(open_dataset(config.data, extents), rows_global=2, lanes=1).check_state(stream.state())
    assert model.view(dataset).schema == model.schema
    assert ("filter", "stock") in {(side, feature.name) for side, feature in describe(dataset).features}
    masks = {one.condition: one.rows for one in read_slices(model.view(dataset), "test", ["region"])}
    targets = [rows.doc_rows for rows in dataset.iterate("test", 100)]
    assert masks["region = east"].tolist() == [row % 2 == 1 for row in np.concatenate(targets)]


def test_documents_without_ids_keep_their_identity(config: Config, tmp_path: Path) -> None:
    """A document is identified by the features of data.doc."""
    data = replace(DATA, query={"word": Categorical()}, doc={"kind": Categorical()}, dir=str(tmp_path / "data"))
    config = replace(config, data=data)
    pairs = {"word": list("xyzxyz"), "kind": list("ababab"), "stock": [1, 2] * 3, "region": ["north", "south"] * 3}
    split = {"split": ["train"] * 4 + ["test"] * 2}
    options: dict[str, Any] = {"split": "column", "split_column": "split", "processes": 1}
    make_dataset(config, pairs=pairs | split, **options)
    report = make_dataset(config, pairs=pairs | split | {"stock": [7, 2] * 3}, append=True, partition="day", **options)
    assert (report.num_docs, report.new_docs, report.changed_docs) == (2, 0, 1)
    catalogue = Dataset.open(data.dir).catalogue
    assert np.asarray(catalogue.column("stock", np.arange(2))).tolist() == [7.0, 2.0]
    assert list(catalogue.columns(np.arange(2))) == ["kind"] and list(catalogue.filterable) == ["kind", *FILTER]


def test_columns_are_added_to_the_dataset_of_a_model(config: Config, tmp_path: Path) -> None:
    plain = make(config, tmp_path / "plain", replace(DATA, filter={}))
    dataset = open_dataset(plain.data)
    save_model_folder(tmp_path / "model", random_model(plain, dataset, seed=1), plain, dataset.schema, None, {})
    added = make(config, tmp_path / "added", like=tmp_path / "plain")
    other = make(config, tmp_path / "other", like=tmp_path / "added")
    schemas = [Schema.load(Path(own.data.dir)) for own in (added, other)]
    assert schemas[0] == schemas[1] and len(schemas[0].filter["region"].vocabulary) == 2
    view = load_model_folder(tmp_path / "model").view(Dataset.open(tmp_path / "added"))
    assert list(view.catalogue.filterable) == ["item", "kind", "stock", "region"]
    with pytest.raises(ConfigError, match=r"data\.dir=.* another schema .*doc features"):
        open_dataset(added.data).check_against(replace(added.data, doc={"item": DATA.doc["item"]}))
    open_dataset(added.data).check_against(plain.data)  # training needs no word of them


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"filter": {"name": Text()}}, r"data\.filter\.name: got text, needs categorical without them, or numeric"),
        ({"filter": {"shop": Categorical(hash_buckets=9)}}, r"data\.filter\.shop: got categorical with hash_buckets"),
        ({"filter": {"kind": Categorical()}}, r"data\.filter\.kind: got the name of a feature of data\.doc"),
        ({"webdataset": "x-{0..1}.tar"}, r"data\.filter: got \['stock', 'region'\], needs none with data\.webdataset"),
    ],
)
def test_refused_columns(config: Config, keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_config(replace(config, data=replace(DATA, dir="d", **keys)))
