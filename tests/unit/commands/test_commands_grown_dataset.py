"""A model on its dataset after an append: new values are out of vocabulary."""

from __future__ import annotations

import csv
import pickle
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from bigdssm import make_dataset
from bigdssm.checkpoints.model_folder import load_model_folder, save_model_folder
from bigdssm.commands import build_index, embed, evaluate, mine_negatives, recommend, score_pairs, search
from bigdssm.config import Config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError
from bigdssm.features.base import OUT_OF_VOCABULARY
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from bigdssm.retrieval.hard_negatives import HardNegatives
from bigdssm.retrieval.index import open_index
from bigdssm.retrieval.request import Request
from bigdssm.retrieval.vectors import load_vectors, read_meta
from bigdssm.serving.searcher import Searcher
from tests.conftest import WORDS
from tests.unit.conftest import random_model

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


def test_since_keeps_the_options_of_the_earlier_vectors(grown: Grown, tmp_path: Path) -> None:
    """A nightly command without them replaces the folder that has them."""
    options = ("--width", 4, "--dtype", "float16", "--format", "parquet")
    run(embed.main, "--model", grown.model, "--data", grown.before, "--out", tmp_path / "v", *options)
    again = ("--model", grown.model, "--data", grown.after, "--since", tmp_path / "v", "--out", tmp_path / "v")
    run(embed.main, *again)
    meta, table = read_meta(tmp_path / "v"), parquet.read_table(tmp_path / "v" / "vectors.parquet")
    assert (meta.num_docs, meta.width, meta.dtype) == (43, 5, "float16") and meta.whole == 9
    assert table.num_rows == 43 and table.schema.field("vector").type == pa.list_(pa.float16(), 5)
    run(embed.main, *again, "--format", "npy")
    assert {path.name for path in (tmp_path / "v").glob("vectors.*")} == {"vectors.npy"}


def test_an_index_answers_until_the_next_is_built(
    grown: Grown, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The documents of the append have no vectors in it; users, histories and filters are those of the dataset."""
    searcher = Searcher.open(grown.model, grown.work / "index-before", str(grown.after))
    assert "was built before changes of" in caplog.text and "the 40 documents of then" in caplog.text
    query = searcher.queries.of(Request(user="v1", top=60, exclude_seen=False))
    assert query.seen.max() >= 40, "of a user whose history has new documents"
    (result,) = searcher.answer([query])
    assert {found.key for found in result.documents} == {f"i{n}" for n in range(40)}
    assert len(searcher.seen(query)) == 5
    (fewer,) = searcher.search([Request(user="v1", top=60)])
    assert len(fewer) == 40 - len(set(query.seen[query.seen < 40].tolist()))
    assert searcher.search([Request(user="v1", filter="genres = Musical")]) == [[]], "all matches are newer"
    assert 0 < len(searcher.search([Request(user="v1", top=60, filter="genres = Drama")])[0]) < 40
    assert searcher.why(Request(user="v1"), "i3").history
    assert len(searcher.similar("i3", 50)[1]) == 39
    command = ["--model", grown.model, "--index", grown.work / "index-before", "--data", grown.after, "--users"]
    run(recommend.main, *command, "--out", tmp_path / "answers")
    run(recommend.main, *command, "--out", tmp_path / "few", "--filter", "genres = Drama")
    for name in ("answers", "few"):
        found = parquet.read_table(tmp_path / name / "part-0000000.parquet").to_pylist()
        assert found and not any(row["document"].startswith("new") for row in found)


def test_an_index_never_mixes_rows_of_two_catalogues(grown: Grown, tiny_interactions: Any, tmp_path: Path) -> None:
    """The same items in another order, and an index with documents that the dataset lacks."""
    source = shutil.copytree(tiny_interactions.source, tmp_path / "source")
    header, *lines = (source / "items.csv").read_text().splitlines()
    (source / "items.csv").write_text("\n".join([header, *reversed(lines)]) + "\n")
    tables = InteractionTables(source / "interactions.csv", source / "items.csv", source / "users.csv")
    folder = load_model_folder(grown.model)
    make_interactions(folder.config.data, tables, IngestTarget(tmp_path / "other", like=grown.before))
    for index, data in (("index-before", tmp_path / "other"), ("index-after", grown.before)):
        with pytest.raises(CheckpointError, match=r"built from another dataset: its 4\d documents are not the first"):
            Searcher.open(grown.model, grown.work / index, str(data))
        answers = ("--data", data, "--users", "--out", tmp_path / "answers")
        with pytest.raises(SystemExit):
            sys.exit(recommend.main(list(map(str, ["--model", grown.model, "--index", grown.work / index, *answers]))))
        assert not (tmp_path / "answers").exists()


def append_items(grown: Grown, data: Path, name: str, **tables: Any) -> None:
    make_dataset(load_model_folder(grown.model).config, out=data, append=True, partition=name, **tables)


def test_withdrawn_items_are_no_answers(grown: Grown, tmp_path: Path) -> None:
    """Neither before the next index, nor in it, with and without the dataset; a later append brings one back."""
    data = Path(shutil.copytree(grown.after, tmp_path / "data"))
    served = Searcher.open(grown.model, grown.work / "index-after", str(data))
    gone = {"i1", "i3", "i5", "new1"}
    append_items(grown, data, "gone", withdrawn={"item_id": sorted(gone)})
    assert served.is_outdated()

    filters = (None, "genres = Drama")
    requests = [Request(user="v1", top=60, exclude_seen=False, filter=text) for text in filters]
    before = [{one.key for one in found} for found in served.search(requests)]
    assert all(some & gone for some in before)

    def check(index: Path, gone: set[str]) -> None:
        searcher = Searcher.open(grown.model, index, str(data))
        assert not searcher.is_outdated()
        assert [{one.key for one in found} for found in searcher.search(requests)] == [some - gone for some in before]
        assert {one.key for one in searcher.similar("i0", 60)[1]} == before[0] - gone - {"i0"}
        assert searcher.why(Request(user="v1"), "i3").of, "it stays in histories"
        command = ["--model", grown.model, "--index", index, "--data", data, "--users", "--top", 60, "--seen", "allow"]
        for text, some in zip(filters, before, strict=True):
            run(recommend.main, *command, *(["--filter", text] if text else []), "--out", tmp_path / "answers")
            table = parquet.read_table(tmp_path / "answers" / "part-0000000.parquet")
            assert set(table["document"].to_pylist()) == some - gone

    check(grown.work / "index-after", gone)
    vectors = ("--since", grown.work / "vectors-after", "--out", tmp_path / "vectors", "--format", "parquet")
    run(embed.main, "--model", grown.model, "--data", data, *vectors)
    run(build_index.main, "--vectors", tmp_path / "vectors", "--out", tmp_path / "index")
    check(tmp_path / "index", gone)
    table = parquet.read_table(tmp_path / "vectors" / "vectors.parquet")
    assert set(table.filter(table["withdrawn"])["doc_key"].to_pylist()) == gone
    index = open_index(tmp_path / "index")
    (found,) = index.search(np.ones((1, index.meta.width), np.float32), 60)
    assert len(found) == 43 - len(gone) and not {one.key for one in found} & gone
    items = pd.read_csv(grown.work / "source" / "items.csv")
    append_items(grown, data, "back", items=items[items["item_id"] == "i3"])
    check(tmp_path / "index", gone - {"i3"})


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
