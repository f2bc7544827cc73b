"""A model on its dataset after an append: new values are out of vocabulary."""

from __future__ import annotations

import csv
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest

from bigdssm.checkpoints.model_folder import load_model_folder, save_model_folder
from bigdssm.commands import build_index, embed, evaluate, mine_negatives, recommend, score_pairs, search
from bigdssm.config import Config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError
from bigdssm.features.base import OUT_OF_VOCABULARY
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from bigdssm.retrieval.hard_negatives import HardNegatives
from bigdssm.retrieval.request import Request
from bigdssm.retrieval.vectors import load_vectors, read_meta
from bigdssm.serving.searcher import Searcher
from tests.conftest import WORDS
from tests.unit.retrieval.conftest import random_model

NEW_ITEMS, NEW_USERS = 3, 4


@dataclass(frozen=True)
class Grown:
    """A model with its dataset before and after an append, and the vectors and indexes of both."""

    model: Path
    before: Path
    after: Path
    work: Path


@pytest.fixture(scope="module")
def grown(tiny_interactions: Any, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Grown:
    work = tmp_path_factory.mktemp("grown")
    before, after = work / "before", work / "after"
    shutil.copytree(tiny_interactions.dir, before)
    shutil.copytree(before, after)
    dataset = Dataset.open(before)
    model = random_model(config, dataset, seed=1)
    save_model_folder(work / "model", model, config, dataset.schema, dataset.tokenizer_dir, {"stage": "pretrain"})
    source = shutil.copytree(tiny_interactions.source, work / "source")
    rows = {
        "items": [[f"new{i}", f"river {WORDS[i]}", "Musical|Drama", 1990] for i in range(NEW_ITEMS)],
        "users": [[f"v{u}", 30, "pilot"] for u in range(NEW_USERS)],
    }
    for name, more in rows.items():
        with (source / f"{name}.csv").open("a", newline="") as stream:
            csv.writer(stream).writerows(more)
    events = [["user_id", "item_id", "rating", "timestamp"]]
    for user in [f"v{u}" for u in range(NEW_USERS)] + ["u0"]:
        items = [f"new{i}" for i in range(NEW_ITEMS)] + [f"i{i}" for i in range(6)]
        events += [[user, item, "3", str(10**6 + 1000 * t)] for t, item in enumerate(items)]
    with (source / "interactions.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(events)
    tables = InteractionTables(source / "interactions.csv", source / "items.csv", source / "users.csv")
    make_interactions(config.data, tables, IngestTarget(after, "more", append=True))
    for data in (before, after):
        run(embed.main, "--model", work / "model", "--data", data, "--out", work / f"vectors-{data.name}")
        run(build_index.main, "--vectors", work / f"vectors-{data.name}", "--out", work / f"index-{data.name}")
    return Grown(work / "model", before, after, work)


def run(main: Any, *arguments: object) -> None:
    main([str(argument) for argument in arguments])


def served(grown: Grown, state: Path, index: str = "--index") -> list[object]:
    return ["--model", grown.model, index, grown.work / f"index-{state.name}", "--data", state]


def test_the_vocabularies_have_grown(grown: Grown) -> None:
    known, now = load_model_folder(grown.model).schema.vocabulary_sizes(), Dataset.open(grown.after).schema
    assert now.vocabulary_sizes()["doc"]["item_id"] == known["doc"]["item_id"] + NEW_ITEMS
    assert now.vocabulary_sizes()["doc"]["genres"] == known["doc"]["genres"] + 1
    assert now.vocabulary_sizes()["query"]["occupation"] == known["query"]["occupation"] + 1


def test_vectors_of_old_items_stay_and_new_items_have_those_of_their_content(grown: Grown) -> None:
    before, after = (
        load_vectors(folder, read_meta(folder))[:]
        for folder in (grown.work / "vectors-before", grown.work / "vectors-after")
    )
    assert len(after) == len(before) + NEW_ITEMS
    assert np.allclose(after[: len(before)], before, rtol=0, atol=1e-5)  # rounding depends on the batch
    assert len(np.unique(after[len(before) :], axis=0)) == NEW_ITEMS  # the same id, different titles


def test_unchanged_documents_are_not_encoded_again(grown: Grown, capsys: pytest.CaptureFixture[str]) -> None:
    since = ("--since", grown.work / "vectors-before", "--out", grown.work / "since")
    run(embed.main, "--model", grown.model, "--data", grown.after, *since)
    assert f"{NEW_ITEMS} encoded, 40 unchanged" in capsys.readouterr().out


def test_a_view_has_no_code_beyond_the_models(grown: Grown) -> None:
    folder, whole = load_model_folder(grown.model), Dataset.open(grown.after)
    view = pickle.loads(pickle.dumps(folder.view(whole)))
    assert view.fingerprint == whole.fingerprint
    codes = view.catalogue.codes("item_id", np.arange(view.catalogue.num_docs))
    assert codes.max() < folder.schema.doc["item_id"].num_codes
    assert (codes[-NEW_ITEMS:] == OUT_OF_VOCABULARY).all()
    rows = [rows for split in ("train", "validation", "test") for rows in view.iterate(split, 4096)]
    for name, last in (("history", "item_id"), ("occupation", "occupation")):
        feature = folder.schema.doc.get(last) or folder.schema.query[last]
        values = [getattr(some.query[name], "values", some.query[name]) for some in rows]
        assert max(value.max() for value in values) < feature.num_codes
        assert any((value == OUT_OF_VOCABULARY).any() for value in values)


def test_search_accepts_users_events_and_filters_of_a_grown_dataset(grown: Grown) -> None:
    answers = {}
    for state in (grown.before, grown.after):
        searcher = Searcher.open(grown.model, grown.work / f"index-{state.name}", str(state))
        requests = [Request(user="u7", top=40, exclude_seen=False), Request(features={"age": 31}, events=[], top=40)]
        old = [[found for found in some if found.key.startswith("i")] for some in searcher.search(requests)]
        answers[state] = [{found.key: found.score for found in some[:30]} for some in old]
    for before, after in zip(answers[grown.before], answers[grown.after], strict=True):
        assert list(before) == list(after)
        assert before == pytest.approx(after, abs=1e-4)
    (of_new,) = searcher.search([Request(user="v1", top=5)])
    assert len(of_new) == 5
    (musicals,) = searcher.search([Request(user="u7", top=40, filter="genres = Musical")])
    assert {found.key for found in musicals} == {f"new{i}" for i in range(NEW_ITEMS)}


def test_commands_accept_a_grown_dataset(grown: Grown, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for state in (grown.before, grown.after):
        run(recommend.main, *served(grown, state), "--users", "--seen", "allow", "--out", tmp_path / state.name)
    found = {}
    for state in (grown.before, grown.after):
        table = parquet.read_table(tmp_path / state.name / "part-0000000.parquet").to_pylist()
        found[state] = {(row["query"], row["document"]): row["score"] for row in table}
    same = {key for key in found[grown.before] if key in found[grown.after] and key[0] != "u0"}
    assert len(same) > 300
    assert {key: found[grown.before][key] for key in same} == pytest.approx(
        {key: found[grown.after][key] for key in same}, abs=1e-4
    )
    assert {user for user, _ in found[grown.after]} >= {"v0", "v3"}

    run(search.main, *served(grown, grown.after), "--user", "v2")
    run(evaluate.main, "--model", grown.model, "--data", grown.after, "--split", "test")
    run(mine_negatives.main, "--model", grown.model, "--data", grown.after, "--out", tmp_path / "mined.npy")
    run(
        score_pairs.main, "--model", grown.model, "--data", grown.after, "--mined", tmp_path / "mined.npy",
        "--out", tmp_path / "scored.npy",
    )  # fmt: skip
    assert HardNegatives.open(tmp_path / "scored.npy").scored


def test_another_dataset_is_refused_with_a_suggestion(grown: Grown, tiny_interactions: Any, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_interactions.source, tmp_path / "source")
    lines = (source / "users.csv").read_text().replace("artist", "sailor")
    (source / "users.csv").write_text(lines)
    tables = InteractionTables(source / "interactions.csv", source / "items.csv", source / "users.csv")
    folder = load_model_folder(grown.model)
    make_interactions(folder.config.data, tables, IngestTarget(tmp_path / "other"))
    with pytest.raises(CheckpointError, match=r"the vocabulary or normalization differs.* make_shards .*--like"):
        folder.view(Dataset.open(tmp_path / "other"))


def test_another_tokenizer_is_refused(grown: Grown, tmp_path: Path) -> None:
    other = Path(shutil.copytree(grown.before, tmp_path / "other"))
    path = other / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(CheckpointError, match="the tokenizer differs"):
        load_model_folder(grown.model).view(Dataset.open(other))
