"""`bigdssm publish` and `forget --store`: rollbacks, updates of the previous collection, and wrong names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.commands import embed as embed_command
from bigdssm.commands import forget as forget_command
from bigdssm.commands import publish as publish_command
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError, DataError
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import ItemTables, make_items
from bigdssm.stores.base import Store, open_store
from tests.conftest import TinyDataset
from tests.unit.stores.shop import new_url

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(params=["file", "postgresql", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    opened = open_store(new_url(request.param, request, tmp_path))
    for module in (publish_command, forget_command):
        monkeypatch.setattr(module, "open_store", lambda url, options=None: replace(opened, **(options or {})))
    return opened


@pytest.fixture
def run(store: Store, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = publish_command.main(["--to", store.url, *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def data(tiny_interactions: TinyDataset, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_interactions.dir, tmp_path / "data"))


@pytest.fixture
def shop(store: Store, run: Run, data: Path, model_dir: Path, other_model_dir: Path, tmp_path: Path) -> Path:
    """Return a folder of `models` and `vectors` of two nights, both published; the second one is live."""
    for night, folder in (("one", model_dir), ("two", other_model_dir)):
        model, vectors = tmp_path / "models" / night, tmp_path / "vectors" / night
        shutil.copytree(folder, model)
        assert embed_command.main(["--model", str(model), "--data", str(data), "--out", str(vectors)]) == 0
        assert run("--vectors", vectors, "--data", data, "--as", night, "--switch")[0] == 0
    return tmp_path


def change(data: Path, config: Path, withdrawn: Sequence[str], new: Sequence[str]) -> None:
    """Append a partition of new and of withdrawn items."""
    tables = {"items": data.parent / "new.csv", "withdrawn": data.parent / "withdrawn.csv"}
    rows = "".join(f"{key},A new title,Drama,1999\n" for key in new)
    tables["items"].write_text("item_id,title,genres,year\n" + rows)
    tables["withdrawn"].write_text("\n".join(["item_id", *withdrawn]) + "\n")
    make_items(load_config(config).data, ItemTables(**tables), IngestTarget(data, "noon", append=True, processes=1))


def publish_changes(shop: Path, run: Run, data: Path, night: str) -> None:
    vectors, model = shop / "vectors" / night, shop / "models" / night
    options = ["--model", model, "--data", data, "--since", vectors, "--out", vectors]
    assert embed_command.main([str(option) for option in options]) == 0
    assert run("--vectors", vectors, "--data", data, "--as", night)[0] == 0


def test_a_rollback_prints_what_the_collection_lacks(
    shop: Path, run: Run, store: Store, data: Path, tiny_interactions: TinyDataset
) -> None:
    """Compared with the collection that was live, or with a dataset."""
    change(data, tiny_interactions.config, ["i3", "i4"], ["n1", "n2", "n3", "n4"])
    publish_changes(shop, run, data, "two")
    code, out, _ = run("--rollback")
    assert code == 0 and "live is one\n" in out and store.aliases()["live"].name == "one"
    assert "one: lacks 4 documents of two (n1, n2, n3, …), has 2 others (i3, i4)\n" in out
    store.switch("live", "two")
    code, out, _ = run("--rollback", "--data", data)
    assert code == 0 and f"one: lacks 4 documents of {data} (n1, n2, n3, …), has 2 others (i3, i4)\n" in out


def test_a_rollback_with_update_brings_the_documents_of_the_dataset(
    shop: Path, run: Run, store: Store, data: Path, tiny_interactions: TinyDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(data, tiny_interactions.config, ["i3", "i4"], ["n1", "n2"])
    options = ["--rollback", "--update", "--data", data, "--model", shop / "models", "--vectors", shop / "vectors/one"]
    switched: list[set[str]] = []
    switch = type(store).switch

    def noted(self: Store, alias: str, name: str) -> None:
        switched.append(set(self.contents(self.collection(name))))
        switch(self, alias, name)

    monkeypatch.setattr(type(store), "switch", noted)
    code, out, _ = run(*options, "--verify")
    expected = {f"i{number}" for number in range(40)} - {"i3", "i4"} | {"n1", "n2"}
    assert code == 0 and switched == [expected], "before the switch"
    assert "vectors/one: 2 encoded, 40 unchanged\n" in out and "one: 2 written, 2 deleted, 38 unchanged" in out
    assert "recall@40 1.0000" in out and "live is one\n" in out
    assert f"one: lacks 0 documents of {data}, has 0 others\n" in out
    model, again = shop / "models/one", shop / "again"
    assert store.collection("live").model == load_model_folder(model).doc_checksum
    assert embed_command.main(["--model", str(model), "--data", str(data), "--out", str(again)]) == 0
    computed, expected_vectors = (np.load(folder / "vectors.npy") for folder in (shop / "vectors/one", again))
    np.testing.assert_allclose(computed, expected_vectors, rtol=1e-5, atol=1e-5)


def test_what_an_update_needs(shop: Path, run: Run, store: Store, data: Path, model_dir: Path) -> None:
    given = {"--data": data, "--model": shop / "models", "--vectors": shop / "vectors/one"}
    for missing in given:
        options = [part for pair in given.items() if pair[0] != missing for part in pair]
        code, _, error = run("--rollback", "--update", *options)
        assert code == ConfigError.exit_code and f"--rollback --update needs {missing}, the " in error
    for change_of, message in (
        ({"--vectors": shop / "vectors/two"}, "give the vectors that it was published from"),
        ({"--model": shop / "models/two"}, "none of 1 model folders is model"),
    ):
        options = [part for pair in {**given, **change_of}.items() for part in pair]
        code, _, error = run("--rollback", "--update", *options)
        assert code == ConfigError.exit_code and message in error
    assert run("--update", *(part for pair in given.items() for part in pair))[0] == ConfigError.exit_code
    assert run("--rollback", "--vectors", shop / "vectors/one")[0] == ConfigError.exit_code
    assert store.aliases()["live"].name == "two", "nothing was switched"


def test_a_collection_to_drop_exists(shop: Path, run: Run, store: Store) -> None:
    code, _, error = run("--drop", "tow")
    assert code == DataError.exit_code
    assert f"--drop tow: {store.address} has no such collection, only ['one', 'two']" in error
    assert run("--drop", "one")[0] == 0 and set(store.collections()) == {"two"}


def test_a_collection_to_drop_exists_in_a_new_store(run: Run) -> None:
    code, _, error = run("--drop", "one")
    assert code == DataError.exit_code and "has no such collection, only []" in error


def test_rejected_documents_are_printed_and_not_verified(shop: Path, run: Run, store: Store, data: Path) -> None:
    """Of an item that `forget` has removed, and that a dataset has again."""
    copy = shutil.copytree(data, shop / "copy")
    arguments = ["--data", str(copy), "--item", "i3", "--store", store.url, "--out", str(shop / "report.json")]
    assert forget_command.main(arguments) == 0
    vectors = shop / "vectors/two"
    code, out, _ = run("--vectors", vectors, "--data", data, "--as", "two", "--verify")
    assert code == 0 and "two: 0 written, 0 deleted, 39 unchanged" in out
    assert "two: 1 rejected (i3): bigdssm forget has removed them from this collection for good; publish under" in out
    assert "recall@39 1.0000" in out


def test_items_leave_collections_of_their_dataset_alone(
    shop: Path, run: Run, store: Store, data: Path, tiny_interactions: TinyDataset, model_dir: Path
) -> None:
    """Also those of its earlier states; others are named in the report, and changed on request."""
    change(data, tiny_interactions.config, ["i9"], ["n1"])
    publish_changes(shop, run, data, "two")  # `one` is of the state before
    other = shop / "other"
    other.mkdir()
    shutil.copytree(tiny_interactions.dir, other / "data")
    change(other / "data", tiny_interactions.config, ["i8"], ["n2"])
    vectors = str(other / "vectors")
    assert embed_command.main(["--model", str(model_dir), "--data", str(other / "data"), "--out", vectors]) == 0
    assert run("--vectors", vectors, "--data", other / "data", "--as", "other")[0] == 0
    report = shop / "report.json"
    arguments = ["--data", str(data), "--item", "i3", "--store", store.url, "--out", str(report)]
    assert forget_command.main(arguments) == 0
    content = json.loads(report.read_text())
    assert {entry["collection"]: entry["found"] for entry in content["collections"]} == {"one": 1, "two": 1}
    fingerprint = Dataset.open(other / "data").fingerprint[:12]
    (line,) = [line for line in content["not_reached"] if line.startswith("collection ")]
    assert line == (
        f"collection other at {store.url}: published from another dataset, {fingerprint}; give it as --collection if "
        "it has these items"
    )
    assert "i3" in store.contents(store.collection("other")) and "i3" not in store.contents(store.collection("two"))
    assert forget_command.main([*arguments, "--collection", "other", "--overwrite"]) == 0
    assert "i3" not in store.contents(store.collection("other"))


def test_a_collection_with_the_name_of_an_alias_is_refused(shop: Path, run: Run, store: Store, data: Path) -> None:
    code, _, error = run("--vectors", shop / "vectors/one", "--data", data, "--as", "live", "--verify")
    assert code == ConfigError.exit_code and "collection live: it is the name of an alias, of two" in error
    code, _, error = run("--vectors", shop / "vectors/one", "--data", data, "--as", "one", "--alias", "two", "--switch")
    assert code == ConfigError.exit_code and "alias two: it is the name of a collection" in error
    assert set(store.collections()) == {"one", "two"} and set(store.aliases()) == {"live"}
