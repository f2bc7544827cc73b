"""A BEIR collection of a dataset: the same metrics as the dataset's evaluation and reference implementations."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from bigdssm.checkpoints.model_folder import save_model_folder
from bigdssm.config import Config, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import EVENT_BITS
from bigdssm.errors import ConfigError, DataError
from bigdssm.evaluation.collection import bm25_run, model_run, model_vectors, pretrained_run
from bigdssm.evaluation.comparison import distinct_names
from bigdssm.evaluation.evaluate import evaluate_split
from bigdssm.evaluation.trec import run_metrics
from bigdssm.features import Ragged, TextTokenizer
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.losses.contrastive import truncate
from bigdssm.models import DualEncoder
from bigdssm.models.encoders.pretrained import build_pretrained, pretrained_architecture, pretrained_encoder
from bigdssm.retrieval.embed import encode_in, tower_encoders, truncate_vectors
from bigdssm.retrieval.hard_negatives import HardNegatives, sample_negatives
from bigdssm.retrieval.mining import mine
from bigdssm.sources.beir import Collection, CollectionEntry, read_collection
from tests.command_line import Tools
from tests.hard_negatives import write_hard_negatives
from tests.unit.conftest import SMALL, random_model

SPLITS = {"train": "train", "validation": "dev", "test": "test"}


@pytest.fixture(scope="module")
def made(tiny_pairs: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path, Config]:
    root = tmp_path_factory.mktemp("collection")
    config = load_config(tiny_pairs.config, [f"model.{override}" for override in SMALL])
    tables = PairTables(
        (tiny_pairs.source / "pairs.jsonl",), doc_id_column="doc_key", relevance_column="relevance",
        validation_fraction=0.1, test_fraction=0.1, beir=root / "beir",
    )  # fmt: skip
    make_pairs(config.data, tables, IngestTarget(root / "dataset"))
    return Dataset.open(root / "dataset"), root / "beir", config


@pytest.fixture(scope="module")
def text_model(made: tuple[Dataset, Path, Config]) -> DualEncoder:
    return random_model(made[2], made[0], seed=3)


def test_collection_holds_the_pairs(made: tuple[Dataset, Path, Config], tiny_pairs: Any) -> None:
    dataset, folder, _ = made
    records = [json.loads(line) for line in (tiny_pairs.source / "pairs.jsonl").open()]
    expected = Counter({(r["query"], r["doc_key"], int(r["relevance"])) for r in records})
    found: Counter[tuple[str, str, int]] = Counter()
    for split in SPLITS:
        collection = read_collection(folder, split)
        texts = {entry.key: entry.text for entry in collection.queries}
        found.update((texts[q], d, grade) for q, judged in collection.qrels.items() for d, grade in judged.items())
        assert (folder / "qrels" / f"{SPLITS[split]}.tsv").read_text().startswith("query-id\tcorpus-id\tscore\n")
    # A pair with contradicting relevances is kept once, with the first one.
    assert {pair[:2] for pair in found} == {pair[:2] for pair in expected} and max(found.values()) == 1
    corpus = {entry.key: entry for entry in read_collection(folder, "test").corpus}
    assert sorted(corpus) == sorted(dataset.catalogue.keys(np.arange(dataset.catalogue.num_docs)))
    one = next(r for r in records if r["doc_key"] == "d4")
    assert corpus["d4"] == CollectionEntry(
        "d4", one["text"], {"section": one["section"], "tags": one["tags"], "size": one["size"]}
    )


def test_a_folder_that_is_no_own_collection_is_not_replaced(
    made: tuple[Dataset, Path, Config], tiny_pairs: Any, tmp_path: Path
) -> None:
    beir, data = tmp_path / "beir", made[2].data
    tables = PairTables((tiny_pairs.source / "pairs.jsonl",), doc_id_column="doc_key", beir=beir)
    beir.mkdir()
    for name in ("corpus.jsonl", "notes.txt"):
        (beir / name).write_text("the user's")
    with pytest.raises(ConfigError, match=r"holds no collection that bigdssm make_shards wrote; .*--overwrite it"):
        make_pairs(data, tables, IngestTarget(tmp_path / "dataset"))
    assert (beir / "corpus.jsonl").read_text() == "the user's"
    make_pairs(data, tables, IngestTarget(tmp_path / "dataset", overwrite=True))
    make_pairs(data, tables, IngestTarget(tmp_path / "another"))  # its own collection
    assert len(read_collection(beir, "test").corpus) > 99 and (beir / "notes.txt").read_text() == "the user's"
    (tmp_path / "dataset" / "notes.txt").touch()
    make_pairs(data, tables, IngestTarget(tmp_path / "dataset", overwrite=True))
    assert (tmp_path / "dataset" / "notes.txt").exists()


def test_a_models_run_is_the_datasets_evaluation(
    made: tuple[Dataset, Path, Config], text_model: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigdssm.retrieval.embed.ROWS_AT_ONCE", 37)
    dataset, folder, _ = made
    collection = read_collection(folder, "test")
    run = model_run(text_model, dataset.schema, dataset.tokenizer_dir, collection, top=dataset.catalogue.num_docs)
    ranks = evaluate_split(tower_encoders(text_model, dataset), dataset, "test").ranks
    ids = np.concatenate([rows.query_ids for rows in dataset.iterate("test", 999)]).view(np.uint64)
    docs = dataset.catalogue.keys(np.concatenate([rows.doc_rows for rows in dataset.iterate("test", 999)]))
    compared = 0
    for query, doc, rank in zip((f"{i:016x}" for i in ids.tolist()), docs, ranks, strict=True):
        if not np.isnan(rank):
            place = sorted(run[query], key=run[query].__getitem__, reverse=True).index(doc) + 1
            assert abs(place - rank) <= 0.5  # scores within rounding error tie, half a rank
            compared += 1
    assert compared > 50


def test_bfloat16_changes_the_products_alone(made: tuple[Dataset, Path, Config], text_model: DualEncoder) -> None:
    dataset, folder, _ = made
    collection = read_collection(folder, "test")
    model = copy.deepcopy(text_model)
    encode_in(model, "bf16")
    exact, rounded = (
        model_vectors(m, dataset.schema, dataset.tokenizer_dir, collection) for m in (text_model, model)
    )  # fmt: skip
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32 and not torch.equal(a, b)
        assert (a - b).abs().mean() < 0.02 * a.abs().mean()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_hard_negatives_are_readable_as_text(
    made: tuple[Dataset, Path, Config], text_model: DualEncoder, monkeypatch: pytest.MonkeyPatch, capsys: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    tools, (dataset, _, _) = Tools(monkeypatch, capsys), made
    mined = mine(tower_encoders(text_model, dataset), dataset, first=2, last=9)
    windows, read = mined["window"], sample_negatives(dataset, HardNegatives(mined), 20)
    own = np.concatenate([rows.doc_rows for rows in dataset.iterate("train", 999)])
    assert dataset.tokenizer_dir is not None and len(own) == len(windows)
    column = dataset.catalogue.columns(np.arange(dataset.catalogue.num_docs))["text"]
    assert isinstance(column, Ragged)
    texts = TextTokenizer(dataset.tokenizer_dir).decode(column)
    assert len(read) == 20
    for one in read:
        assert one.document == texts[own[one.row_id]] and one.negative in [texts[i] for i in windows[one.row_id]]
    write_hard_negatives(tmp_path / "mined.npy", mined, dataset)
    out = tools.ran("sample_negatives", "--mined", tmp_path / "mined.npy", "--data", dataset.dir, "--count", 20)
    assert out.count("negative:") == 20 and read[7].query in out
    few = mined[::7]
    assert {one.row_id for one in sample_negatives(dataset, HardNegatives(few), 10**6)} == set(
        (few["query"] >> EVENT_BITS).tolist()
    )
    mined["query"][-1] += 1 << EVENT_BITS
    write_hard_negatives(tmp_path / "mined.npy", mined, dataset)
    message = tools.refused(3, "sample_negatives", "--mined", tmp_path / "mined.npy", "--data", dataset.dir)
    assert "train rows" in message


def test_known_positives_can_be_excluded(made: tuple[Dataset, Path, Config], text_model: DualEncoder) -> None:
    dataset, folder, _ = made
    collection = read_collection(folder, "test")
    query = collection.queries[0].key
    collection.known_positives[query] = {entry.key: 1 for entry in collection.corpus[:150]}
    arguments = (text_model, dataset.schema, dataset.tokenizer_dir, collection)
    everything, left = (model_run(*arguments, filter_known=known, top=100)[query] for known in (False, True))
    assert len(everything) == len(left) == 100
    assert everything.keys() & collection.known_positives[query].keys()
    assert not left.keys() & collection.known_positives[query].keys()


@pytest.mark.parametrize("grade", [1, 0, None])
def test_positives_of_the_split_are_not_excluded(
    made: tuple[Dataset, Path, Config], tmp_path: Path, grade: int | None
) -> None:
    shutil.copytree(made[1], tmp_path / "beir")
    query, judged = next(iter(read_collection(made[1], "test").qrels.items()))
    positive, other = next(key for key, value in judged.items() if value > 0), "d3"
    with (tmp_path / "beir" / "qrels" / "other.tsv").open("w") as file:
        file.write(f"query-id\tcorpus-id\tscore\n{query}\t{positive}\t1\n{query}\t{other}\t1\n")
    if grade is not None:
        with (tmp_path / "beir" / "qrels" / "test.tsv").open("a") as file:
            file.write(f"{query}\t{other}\t{grade}\n")
    known = read_collection(tmp_path / "beir", "test").known_positives[query]
    assert positive not in known and (other in known) == (grade != 1)


def test_cut_vectors_score_as_the_loss_scores_them(made: tuple[Dataset, Path, Config], text_model: DualEncoder) -> None:
    dataset, folder, _ = made
    collection = read_collection(folder, "validation")
    queries, documents = model_vectors(text_model, dataset.schema, dataset.tokenizer_dir, collection)
    with torch.no_grad():
        alpha = text_model().alpha
    U, W, beta = queries[:, :-1], documents[:, :-1] / alpha, documents[:, -1]
    expected = alpha * truncate(U, 3, True) @ truncate(W, 3, True).T + beta
    torch.testing.assert_close(truncate_vectors(queries, 3, True) @ truncate_vectors(documents, 3, True).T, expected)
    expected = alpha * truncate(U, 3, False) @ truncate(W, 3, False).T + beta
    torch.testing.assert_close(truncate_vectors(queries, 3, False) @ truncate_vectors(documents, 3, False).T, expected)


def test_a_pretrained_encoder_as_it_is(made: tuple[Dataset, Path, Config], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertModel

    dataset, folder, _ = made
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                intermediate_size=32, max_position_embeddings=32)).eval()  # fmt: skip
    bert.save_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(str(dataset.tokenizer_dir))
    tokenizer.save_pretrained(str(tmp_path / "hf"))
    collection = read_collection(folder, "test")
    run = pretrained_run(tmp_path / "hf", collection, max_tokens=12)

    def vectors(texts: list[str]) -> torch.Tensor:
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=12, return_tensors="pt")
        mask = inputs["attention_mask"].unsqueeze(2)
        with torch.no_grad():
            hidden = bert(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    entry = collection.queries[0]
    scores = (vectors([entry.text]) @ vectors([doc.text for doc in collection.corpus]).T)[0]
    best = scores.topk(100)
    assert list(run[entry.key].values()) == pytest.approx(best.values.tolist(), abs=1e-5)
    values = run_metrics(collection.qrels, run)
    assert all(len(value) == len(collection.qrels) for value in values.values())
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        pretrained_run(tmp_path, collection)


def test_bm25_finds_words_by_their_stems_best_first() -> None:
    for package in ("bm25s", "Stemmer"):
        pytest.importorskip(package)
    texts = {
        "sea": "Rivers run to the sea.",
        "bridge": "A stone bridge over a river of stones.",
        "lantern": "the copper lantern",
        "none": "",
    }
    asked = {"one": "the stone bridges", "two": "running rivers", "three": "a River"}
    asked |= {"stop words": "the of", "unknown": "zephyr", "": ""}
    corpus, queries = ([CollectionEntry(key, text, {}) for key, text in side.items()] for side in (texts, asked))
    collection = Collection(corpus, queries, {}, {"two": {"sea": 1}})
    run = bm25_run(collection)
    assert {key: list(found) for key, found in run.items()} == {
        "one": ["bridge"], "two": ["sea", "bridge"], "three": ["sea", "bridge"],
        "stop words": [], "unknown": [], "": [],
    }  # fmt: skip
    assert run["two"]["sea"] > run["two"]["bridge"] > 0
    assert {key: list(found) for key, found in bm25_run(collection, top=1).items() if found} == {
        "one": ["bridge"], "two": ["sea"], "three": ["sea"],
    }  # fmt: skip
    filtered = bm25_run(collection, filter_known=True, top=1)
    assert list(filtered["two"]) == ["bridge"], "the next document must be retrieved"
    assert list(filtered["three"]) == ["sea"], "no further document"


def test_damage_is_named(made: tuple[Dataset, Path, Config], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing.tsv does not exist; splits there: dev, test, train"):
        read_collection(made[1], "nothing")
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "title": "A", "text": "b"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "c"}\n')
    assert read_collection(tmp_path, "test").corpus[0].text == "A b"
    (tmp_path / "queries.jsonl").write_text('{"_id": "p", "text": "c"}\n')
    with pytest.raises(DataError, match=r"judges query 'q', which is not in queries"):
        read_collection(tmp_path, "test")
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "text": "b"}\n{"_id": "e"}\n')
    with pytest.raises(DataError, match=r"corpus.jsonl:2 is not a BEIR record: KeyError\('text'\)"):
        read_collection(tmp_path, "test")


def test_a_pretrained_encoder_can_be_cut_to_its_first_layers(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                         intermediate_size=32, max_position_embeddings=16)).save_pretrained(tmp_path)  # fmt: skip
    whole = pretrained_encoder(str(tmp_path))
    light = build_pretrained(pretrained_architecture(str(tmp_path), keep_layers=2), str(tmp_path))
    for name, weight in light.state_dict().items():
        torch.testing.assert_close(weight, whole.state_dict()[name])
    layers = [sum(".attention.output.dense.weight" in n for n in e.state_dict()) for e in (whole, light)]
    assert layers == [3, 2]
    assert {m.p for m in light.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    with pytest.raises(ConfigError, match=r"keep_layers=4, but text.init=.* has 3 layers"):
        pretrained_architecture(str(tmp_path), keep_layers=4)


@pytest.fixture
def trained_run(made: tuple[Dataset, Path, Config], text_model: DualEncoder, tmp_path: Path) -> Path:
    """Return a run folder whose stages have one model."""
    dataset, _, config = made
    sft = yaml.safe_dump({**config.to_dict(), "sft": config.to_dict()["pretrain"]})
    for stage in ("pretrain", "sft"):
        best = tmp_path / "run" / stage / "best"
        save_model_folder(best, text_model, config, dataset.schema, dataset.tokenizer_dir, {})
        (tmp_path / "run" / stage / "config.yaml").write_text(sft)
        (tmp_path / "run" / stage / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    return tmp_path / "run"


def test_the_tools_on_a_collection(
    made: tuple[Dataset, Path, Config], trained_run: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tools, best = Tools(monkeypatch, capsys), trained_run / "sft/best"
    beir, split = ("--beir", made[1]), ("--split", "validation")
    files = ("--save-run", tmp_path / "own.trec", "--save-qrels", tmp_path / "qrels")
    out = tools.ran("evaluate", *beir, *split, "--model", best, *files, "--out", tmp_path / "own.json")
    system = json.loads((tmp_path / "own.json").read_text())["systems"][0]
    assert f"{system['ndcg_at_10']:.4f} ± " in out and "Recall@100" in out
    out = tools.ran("evaluate", "--run", tmp_path / "own.trec", "--qrels", tmp_path / "qrels")
    assert f"{system['ndcg_at_10']:.4f} ± " in out
    out = tools.ran("evaluate", *beir, *split, "--model", best, "--widths", 4, 8)
    assert "best truncated to 4" in out
    assert "best − best truncated to 8: NDCG@10 +0.0000 [+0.0000, +0.0000]" in out
    report = ("report", tmp_path / "run", "--out", tmp_path / "report.json", *beir, *split)
    out = tools.ran(*report, "--compare", tmp_path / "own.trec", "--save-runs", tmp_path / "runs")
    systems = json.loads((tmp_path / "report.json").read_text())
    assert [s["name"] for s in systems] == ["own", "FPS pretraining", "+ SFT"]
    assert len({s["recall_at_100"] for s in systems}) == 1
    assert "+ SFT − FPS pretraining: NDCG@10 +0.0000 [+0.0000, +0.0000], Recall@100 " in out
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"own.trec", "FPS-pretraining.trec", "+-SFT.trec"}
    out = tools.ran("evaluate", *beir, *split, "--model", best, "--compare", tmp_path / "run" / "pretrain" / "best")
    assert "sft/best − pretrain/best: NDCG@10 +0.0000 [+0.0000, +0.0000]" in out


def test_the_time_of_a_system_includes_encoding(
    made: tuple[Dataset, Path, Config], trained_run: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def slow(*arguments: Any) -> Any:
        time.sleep(0.5)
        return model_vectors(*arguments)

    monkeypatch.setattr("bigdssm.evaluation.collection.model_vectors", slow)
    monkeypatch.setattr("bigdssm.commands.evaluate.model_vectors", slow)
    best = trained_run / "sft/best"
    compared = ("--widths", 4, "--compare", best, "--out", tmp_path / "compared.json")
    collection = ("--beir", made[1], "--split", "validation")
    Tools(monkeypatch, capsys).ran("evaluate", *collection, "--model", best, *compared)
    seconds = [system["seconds"] for system in json.loads((tmp_path / "compared.json").read_text())["systems"]]
    assert len(seconds) == 3 and min(seconds) > 0.5, "the time of a system excludes encoding"


def test_invalid_evaluations_are_refused(
    made: tuple[Dataset, Path, Config], text_model: DualEncoder, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    dataset, folder, config = made
    save_model_folder(tmp_path / "model", text_model, config, dataset.schema, dataset.tokenizer_dir, {})
    tools, beir, model = Tools(monkeypatch, capsys), ("--beir", folder), ("--model", tmp_path / "model")
    assert "needs a system to evaluate" in tools.refused(2, "evaluate", *beir)
    assert "needs --model and --data, or --beir" in tools.refused(2, "evaluate")
    for width in (config.model.dim + 1, 0, -1):
        message = tools.refused(2, "evaluate", *beir, *model, "--widths", 4, width)
        assert f"--widths {width}: the model's vectors are 8 wide, needs 1 to 8" in message
    data, run = ("--data", dataset.dir), ("--run", tmp_path / "run.trec")
    out = ("report", tmp_path, "--out", tmp_path / "out.json")
    for arguments, message in (
        ((*model, *data, "--bm25", "--widths", 4), "--widths, --bm25 would have no effect without --beir; leave them"),
        ((*model, *data, *run), "--run would have no effect without --qrels; leave it out"),
        ((*beir, *model, *data), "--data would have no effect with --beir, which has its own documents"),
        ((*beir, "--bm25", "--widths", 4), "--widths would have no effect without --model"),
        ((*model, "--widths", 4), "--widths would have no effect without --beir; leave it out"),
        (model, "needs --data or --beir"),
        ((*beir, *model, "--max-tokens", 9), "--max-tokens would have no effect without --pretrained"),
        ((*run, "--qrels", tmp_path / "qrels", *model), "--model would have no effect with --run and --qrels"),
    ):
        assert message in tools.refused(2, "evaluate", *arguments)
    assert "--filter-known would have no effect without --beir" in tools.refused(2, *out, "--filter-known")
    assert "--data would have no effect with --beir" in tools.refused(2, *out, *beir, *data)


def test_names_of_systems_are_distinct(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/pretrain/best", "a/sft/best", "b/sft/best", "v1.5", "own.trec")]
    paths[-1].write_text("")
    assert distinct_names(paths) == ["pretrain/best", "a/sft/best", "b/sft/best", "v1.5", "own"]
    assert distinct_names([paths[0], paths[0]]) == ["best", "best"]
    paths[-1].with_suffix(".json").write_text("")
    assert distinct_names([paths[-1], paths[-1].with_suffix(".json")]) == ["own.trec", "own.json"]
    assert len(set(distinct_names([Path("best"), Path("../best")]))) == 2
