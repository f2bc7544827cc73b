"""A run that continues on a shop's next day: unknown ids, new ids, the data of validation, and the learning rate."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import yaml
from pyarrow import parquet

import bigdssm
from bigdssm.checkpoints.checkpoint import find_checkpoint, open_tensors
from bigdssm.checkpoints.model_folder import load_checkpoint_model, load_model_folder, save_model_folder
from bigdssm.commands import build_index, embed, evaluate, make_shards, recommend
from bigdssm.config import DataConfig, NegativesConfig, SourceConfig, StageConfig, load_config
from bigdssm.dataset.dataset import Dataset, open_dataset
from bigdssm.errors import ConfigError
from bigdssm.features.base import FIRST_CODE, OUT_OF_VOCABULARY
from bigdssm.features.categorical import categorical_of, codes_of
from bigdssm.loader.stream import PairStream
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.request import Event, Request
from bigdssm.retrieval.vectors import load_vectors, read_meta
from bigdssm.serving.searcher import Searcher
from bigdssm.training.batches import BatchBuilder, read_batches
from bigdssm.training.start import StageProgress
from bigdssm.training.validation import BestSelection, Validator

ITEMS, GHOSTS, USERS = [f"i{n}" for n in range(12)], ["g0", "g1"], 20
CONFIG: dict[str, Any] = {
    "data": {
        "time_unit": "s",
        "lanes": 2, "query": {"past": {"type": "history", "of": "item_id", "max_items": 4}},
        "doc": {"item_id": {"type": "categorical"}, "price": {"type": "numeric"}},
    },
    "model": {
        "dim": 8, "query": {"residual": "past", "mlp": []},
        "doc": {"residual": "item_id", "mlp": [], "embedding_dim": 8},
    },
    "pretrain": {
        "rows_global": 16, "steps": 4, "optimizer": {"lr": 0.05, "warmup_steps": 0}, "validate_every_steps": 2,
        "negatives": {"columns": "catalogue", "mask": "none"},
    },
}  # fmt: skip


def add_day(folder: Path, day: int, ids: list[str], without_events: list[str], **options: Any) -> None:
    options = {"partition": f"day{day}", "append": day > 0, **options}
    random = np.random.RandomState(day)
    events = pd.DataFrame({
        "user_id": np.repeat([f"u{n}" for n in range(USERS)], 6), "item_id": random.choice(ids, 6 * USERS),
        "timestamp": 100 * day + np.tile(np.arange(6), USERS),
    })  # fmt: skip
    items = pd.DataFrame({"item_id": [*ids, *without_events], "price": 5.0})
    bigdssm.make_dataset(folder / "config.yaml", interactions=events, items=items, **options)


def first_day(folder: Path) -> Path:
    """Return the folder, with a dataset of one day and a run that trained on it."""
    content = {**CONFIG, "run": {"dir": str(folder / "run"), "trackers": []}}
    content["data"] = {**CONFIG["data"], "dir": str(folder / "data")}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    add_day(folder, 0, ITEMS, GHOSTS)
    bigdssm.pretrain(folder / "config.yaml")
    return folder


@pytest.fixture(scope="module")
def one_day(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the first day alone."""
    return first_day(tmp_path_factory.mktemp("day"))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the first day; the tests add days to it, one after another."""
    return first_day(tmp_path_factory.mktemp("shop"))


def vectors(folder: Path) -> dict[str, list[float]]:
    model = load_model_folder(folder / "run/pretrain/best")
    dataset = model.view(Dataset.open(folder / "data"))
    every = np.arange(dataset.catalogue.num_docs)
    made = tower_encoders(model.model, dataset).documents(every)
    return dict(zip(dataset.catalogue.keys(every), made.tolist(), strict=True))


def test_an_id_without_a_positive_train_event_is_unknown_everywhere(one_day: Path) -> None:
    """As a negative of every step it would have a trained vector that no positive has formed."""
    shop = one_day
    made, model = vectors(shop), bigdssm.load_model(shop / "run/pretrain/best")
    assert made["g0"] == pytest.approx(made["g1"], abs=1e-6) and made["g0"] != pytest.approx(made["i0"], abs=1e-2)
    features = [{"item_id": name, "price": 5.0} for name in ("g0", "never seen", "i0")]
    ghost, unseen, known = model.encode_documents(features)
    assert ghost.tolist() == unseen.tolist() and ghost[:8].tolist() == pytest.approx(made["g0"][:8], abs=1e-5)
    assert known[:8].tolist() == pytest.approx(made["i0"][:8], abs=1e-5)
    schema = model.folder.schema
    feature = categorical_of(schema.doc)["item_id"]
    i0, *ghosts = (list(feature.vocabulary).index(name) + FIRST_CODE for name in ("i0", *GHOSTS))
    assert codes_of(schema.exported()["doc"]["item_id"], ["g0", "i0", "never seen", ""]) == [1, i0, 1, 0]
    last = find_checkpoint(shop / "run/pretrain", "latest")
    moments = open_tensors(last)("exp_avg/tables.tables.doc_item_id.weight").abs().sum(1)
    assert not moments[ghosts].any() and moments[i0] > 0, "in training, too"
    assert load_checkpoint_model(last).schema.trained["item_id"].tolist() == schema.trained["item_id"].tolist()


def test_a_segment_starts_from_the_vectors_before_it(shop: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = vectors(shop)
    add_day(shop, 1, ["i0", "i1", "g0", "new"], ["newest"], split="train")
    made = vectors(shop)
    assert made.keys() - before.keys() == {"new", "newest"}
    for name, vector in made.items():
        assert vector == pytest.approx(before.get(name, before["g0"]), abs=1e-5)
    on = ["data.from_partition=day1", "pretrain.optimizer.lr=1e-9"]
    caplog.set_level("INFO")
    bigdssm.pretrain(shop / "config.yaml", on, resume=True)
    after = vectors(shop)
    for name, vector in made.items():
        assert after[name] == pytest.approx(vector, abs=1e-5), f"{name}: without training, no vector changes"
    feature = categorical_of(load_model_folder(shop / "run/pretrain/best").schema.doc)["item_id"]
    unknown = [name for name in after if feature.codes(pa.array([name]))[0] == OUT_OF_VOCABULARY]
    assert unknown == ["g1", "newest"], "ids of earlier days stay known"
    (line,) = [line for line in caplog.messages if "pretrain finished" in line]
    assert "the newest weights are the best, validation NDCG@10" in line and "at step 8, " in line
    assert "validated on 20 queries of day0, which are older than the newest training data and select nothing" in line
    assert "at the start" in line
    with pytest.raises(ConfigError, match=r"pretrain.optimizer.lr was 1e-09, is 0.5: it may change only where a run"):
        bigdssm.pretrain(shop / "config.yaml", [on[0], "pretrain.optimizer.lr=0.5"], resume=True)


def test_old_rows_select_nothing(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of new days are not worse because they are evaluated on days before."""
    shutil.copytree(shop / "run", tmp_path / "run")
    monkeypatch.setattr(BestSelection, "add", lambda *_, **__: (False, False))
    on = [f"run.dir={tmp_path / 'run'}", "data.from_partition=day1b"]
    add_day(shop, 2, ["i11"], [], partition="day1b", split="train")
    best = bigdssm.pretrain(shop / "config.yaml", on, resume=True).best
    assert load_model_folder(best).provenance["step"] == 12


def test_validation_is_on_the_newest_partition_with_rows(shop: Path) -> None:
    add_day(shop, 3, ["i0", "i1", "new"], [])
    data = str(shop / "data")

    def validated(dataset: Dataset) -> list[str]:
        part = dataset.with_trained_ids().newest_part("validation")
        assert "item_id" in part.schema.trained, "of the schema of the run"
        return [partition.name for partition in part.partitions]

    names = [partition.name for partition in Dataset.open(data).partitions]
    assert validated(Dataset.open(data)) == ["day3"] and len(names) == 4
    assert validated(Dataset.open(data, names[:2])) == ["day0"]
    assert validated(Dataset.open(data, ["day3"])) == ["day3"]
    mixture = (SourceConfig(partitions=("day3",)), SourceConfig(partitions=("day0",)))
    assert validated(open_dataset(DataConfig(dir=data, mixture=mixture, lanes=2))) == ["day3"]


def test_the_start_of_a_segment_is_not_the_end_of_the_one_before(shop: Path) -> None:
    """Both validate at the same step, on other rows."""
    config = load_config(str(shop / "config.yaml"))
    validator = Validator(open_dataset(config.data), config, "pretrain", rows_per_chunk=64, continues=True)
    history = [{"step": step, "ndcg_at_10": value} for step, value in ((4, 0.9), (4, 0.1), (8, 0.2))]
    progress = StageProgress(step=8, best=0.2, best_step=8, segment_start_step=4, history=history)
    assert "(NDCG@10 0.1000 at the start, 0.2000 at the end)" in validator.describe(progress, "ndcg_at_10")


def test_no_command_reads_the_vector_of_an_unknown_id(one_day: Path, tmp_path: Path) -> None:
    """With other weights in the rows of unknown ids, every answer is the same, also with them in histories."""
    shutil.copy(one_day / "config.yaml", tmp_path)
    shutil.copytree(one_day / "data", tmp_path / "data")
    add_day(tmp_path, 1, ["i0", "i1", "g0"], [], out=tmp_path / "data")
    best = one_day / "run/pretrain/best"
    loaded = load_model_folder(best)
    table = loaded.model.tables.tables["doc_item_id"].weight
    unknown = categorical_of(loaded.schema.doc)["item_id"].unknown(np.arange(len(table)))
    assert unknown.sum() == len(GHOSTS)
    with torch.no_grad():
        table[torch.from_numpy(unknown)] += 9.0
    save_model_folder(tmp_path / "changed", loaded.model, loaded.config, loaded.schema, None, {})

    def answers(model: Path) -> list[Any]:
        out, data = tmp_path / f"out-{model.name}", ["--model", model, "--data", tmp_path / "data"]
        for main, arguments in (
            (evaluate.main, [*data, "--split", "test", "--out", out / "test.json"]),
            (embed.main, [*data, "--out", out / "vectors"]),
            (build_index.main, ["--vectors", out / "vectors", "--out", out / "index"]),
            (recommend.main, [*data, "--index", out / "index", "--users", "--out", out / "answers", "--top", 14]),
        ):
            main([str(argument) for argument in arguments])
        searcher = Searcher.open(model, out / "index", str(tmp_path / "data"))
        requests = [Request(user="u0", top=14), Request(events=[Event("g0"), Event("i3")], top=14)]
        found = [[(d.key, d.score) for d in documents] for documents in searcher.search(requests)]
        assert {key for key, _ in found[0]} >= {"g1"}
        vectors = load_vectors(out / "vectors", read_meta(out / "vectors"))[:]
        bulk = parquet.read_table(sorted((out / "answers").glob("part-*.parquet"))).to_pylist()
        return [np.load(next(out.glob("test*.npy"))).tolist(), vectors.tolist(), found, bulk]

    assert answers(tmp_path / "changed") == answers(best)


@pytest.mark.parametrize("negatives", [{"columns": "catalogue"}, {"uniform": 200}])
def test_unknown_ids_are_no_negatives_where_ids_are_dropped(one_day: Path, negatives: dict[str, Any]) -> None:
    """The row out of vocabulary is a positive in dropped ids alone, and would be a negative in all new items."""
    dataset = Dataset.open(one_day / "data").with_trained_ids()
    unknown = set(dataset.catalogue.rows_by_key(GHOSTS).tolist())
    stage = StageConfig(negatives=NegativesConfig(mask="none", **negatives))
    for world_size in (1, 2):
        for share in (0.0, 0.2):
            columns: set[int] = set()
            for rank in range(world_size):
                stream = PairStream(dataset, rows_global=16, lanes=2, rank=rank, world_size=world_size)
                batch = next(read_batches(stream, BatchBuilder(stream, stage, id_dropout=share), torch.device("cpu")))
                columns |= set(batch.doc_rows.tolist())
            every = set(range(dataset.catalogue.num_docs))
            assert columns == (every if share == 0 else every - unknown)


def evening(folder: Path, model: Path, top: int, *since: object) -> list[set[str]]:
    """Return the first answers of each user, by the commands of docs/tutorials/shop.md."""
    data, out = folder / "data", folder / "out"
    folders = ["--model", model, "--index", out / "index", "--users"]
    for main, arguments in (
        (embed.main, ["--model", model, "--data", data, *since, "--out", out / "vectors"]),
        (build_index.main, ["--vectors", out / "vectors", "--out", out / "index"]),
        (recommend.main, [*folders, "--top", top, "--out", out / "a.csv"]),
    ):
        main([str(argument) for argument in [*arguments, "--overwrite"]])
    answers = pd.read_csv(out / "a.csv")
    return [set(documents) for _, documents in answers.groupby("row")["document"]]  # row n is user n


def test_items_without_events_are_in_the_answers_of_the_evening(tmp_path: Path) -> None:
    """A user buys items of one kind: the first six answers are its five known items and the new one."""
    kinds, per_kind = "abc", 5
    content = {**CONFIG, "run": {"dir": str(tmp_path / "run"), "trackers": []}, "data": {
        "time_unit": "s",
        **CONFIG["data"], "dir": str(tmp_path / "data"), "exclude_seen": False,
        "doc": {"item_id": {"type": "categorical"}, "kind": {"type": "categorical"}},
    }}  # fmt: skip
    content["model"] = {**CONFIG["model"], "tables": {"id_dropout": 0.5}}
    content["model"]["doc"] = {**CONFIG["model"]["doc"], "residual_limit": 0.2}
    content["pretrain"] = {**CONFIG["pretrain"], "steps": 60, "validate_every_steps": 0}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    random, users = np.random.RandomState(0), np.repeat(np.arange(USERS), 8)
    events = pd.DataFrame({
        "user_id": [f"u{user}" for user in users], "timestamp": np.tile(np.arange(8), USERS),
        "item_id": [f"{kinds[user % 3]}{random.randint(per_kind)}" for user in users],
    })  # fmt: skip
    ids = [f"{kind}{number}" for kind in kinds for number in range(per_kind)]
    bigdssm.make_dataset(config, interactions=events, items=pd.DataFrame({"item_id": ids, "kind": [i[0] for i in ids]}))
    model, top = bigdssm.pretrain(config).best, per_kind + 1
    assert not any(f"{kind}-new" in found for found in evening(tmp_path, model, top) for kind in kinds)
    pd.DataFrame({"item_id": [f"{kind}-new" for kind in kinds], "kind": list(kinds)}).to_csv(tmp_path / "new.csv")
    tomorrow = ["items", "--config", config, "--items", tmp_path / "new.csv", "--append", "items-1"]
    make_shards.main([str(argument) for argument in tomorrow])
    found = evening(tmp_path, model, top, "--since", tmp_path / "out/vectors")
    own = sum(f"{kinds[user % 3]}-new" in answers for user, answers in enumerate(found))
    of_others = sum(len([key for key in answers if key.endswith("-new")]) for answers in found) - own
    assert own > 0.8 * USERS and of_others < own  # twice as many by chance
