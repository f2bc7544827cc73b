"""Exports reproduce the trainer's vectors and load with their card's code.

A format that cannot reproduce them writes nothing.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from transformers import AutoModel, AutoTokenizer

from bigdssm.checkpoints.model_folder import ModelFolder, load_model_folder, model_checksum, save_model_folder
from bigdssm.commands import convert_checkpoint
from bigdssm.config import HISTORY_BLOCKS, Config, TokenizerConfig, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.schema import Schema
from bigdssm.errors import CheckpointError, ConfigError
from bigdssm.evaluation.trec import run_metrics
from bigdssm.export import formats
from bigdssm.export.convert import ExportSource, export, folder_source, stage_source
from bigdssm.export.formats import PARITY_LIMIT, Probe, ReportedMetrics, source_of
from bigdssm.export.onnx_model import EXPORT_FILE, query_tower
from bigdssm.export.text_tower import text_towers
from bigdssm.features import CalendarTime, Feature, Ragged, Session, TextTokenizer, Timestamp
from bigdssm.ingest.fitting import make_tokenizer
from bigdssm.loader.batch import Collator, to_features
from bigdssm.models import DualEncoder, new_model
from bigdssm.retrieval.embed import Encoders, document_vectors, query_vectors, tower_encoders
from bigdssm.retrieval.index import build_index, open_index
from bigdssm.retrieval.model import Model
from bigdssm.retrieval.queries import Queries
from bigdssm.retrieval.request import Event, Request
from bigdssm.retrieval.vectors import Dtype, difference_from_model, read_vectors, write_card, write_file, write_vectors
from bigdssm.serving.searcher import Searcher
from tests.conftest import WORDS
from tests.tolerances import assert_scores_close
from tests.unit.conftest import random_model
from tools.checks.pages import code_of

ONNX = ("onnx", "onnxscript", "onnxruntime")
TUTORIAL = Path(__file__).resolve().parents[3] / "docs" / "tutorials" / "text.md"
QUERIES = ["copper lantern", "", "River STONE, bridge?", "walnut " * 40]
DOCUMENTS = ["a lantern of copper", "stone bridges over a river. " * 9, "zephyr"]
MODELS = {
    "dot with beta, one encoder": {"score": "dot", "share_text": True},
    "dot without beta": {"score": "dot", "beta": "none", "doc": {"text": {"pooling": "cls"}}},
    "cosine with beta": {"score": "cosine", "beta": "document"},
    "the text's own vector": {
        "score": "cosine",
        "beta": "none",
        "dim": 8,
        "query": {"residual": "text"},
        "doc": {"residual": "text"},
    },
    "cosine without beta": {"score": "cosine", "beta": "none", "share_text": True, "query": {"mlp": []}},
    "one module": {
        "score": "cosine",
        "beta": "none",
        "share_text": True,
        "dim": 8,
        "query": {"residual": "text", "mlp": []},
        "doc": {"residual": "text", "mlp": []},
    },
}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "tokenizer"
    make_tokenizer(TokenizerConfig(vocab_size=300), lambda: [WORDS, DOCUMENTS, QUERIES], folder)
    return folder


@pytest.fixture(scope="module")
def make_source(tokenizer_dir: Path) -> Any:
    """Return a function from model settings to an ExportSource: a random model of one text per side."""

    def make(
        lengths: tuple[int, int] = (12, 24), prompts: tuple[str, str] = ("", ""), feature: str = "text", **settings: Any
    ) -> ExportSource:
        sides = {
            side: {feature: {"type": "text", "max_tokens": n, "prompt": prompt}}
            for side, n, prompt in zip(("query", "doc"), lengths, prompts, strict=True)
        }
        towers = {side: {"mlp": [10], **settings.pop(side, {})} for side in ("query", "doc")}
        for tower in towers.values():
            tower["text"] = {"layers": 1, "hidden": 8, **tower.get("text", {})}
        content = {
            "run": {"dir": "r"},
            "data": {"dir": "d", **sides},
            "model": {"dim": 6, **settings, **towers},
        }
        path = tokenizer_dir.with_name("config.yaml")
        path.write_text(yaml.safe_dump(content))
        config = load_config(path)
        schema = Schema.declared(config.data)
        torch.manual_seed(0)
        model = new_model(config.model, schema, vocab_size=300).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        checksum = model_checksum(model, config, schema, tokenizer_dir, {"step": 3})
        folder = ModelFolder(model, config, schema, tokenizer_dir, {"step": 3}, checksum)
        return ExportSource(folder, "random", ReportedMetrics("step 3", {"ndcg_at_10": 0.1234}))

    return make


def trainers_scores(
    source: ExportSource, queries: list[str] = QUERIES, documents: list[str] = DOCUMENTS
) -> torch.Tensor:
    """Return alpha * <u, w> + beta of queries and documents, [m, n]."""
    model, vectors = source.model, []
    for side, texts, encode in (("query", queries, query_vectors), ("doc", documents, document_vectors)):
        (feature,) = getattr(model.schema, side).values()
        assert model.tokenizer_dir is not None
        ids = TextTokenizer(model.tokenizer_dir).encode(pa.array(texts, pa.large_string()), feature.max_tokens)
        columns = {feature.name: Ragged(*ids)}
        vectors.append(encode(model.model, to_features({feature.name: feature}, columns)))
    return vectors[0] @ vectors[1].T


def run_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Execute the code of a model card next to its folder, and return its namespace."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder.parent)
    names: dict[str, Any] = {"__name__": "card"}
    exec(compile(code.replace("from __future__ import annotations", ""), "card", "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_sentence_transformers_scores_as_the_trainer(
    make_source: Any, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sentence_transformers")
    source = make_source(**settings)
    parity = export(source, tmp_path / "exported", "sentence-transformers")
    assert max(parity.query, parity.doc) <= PARITY_LIMIT
    model = run_card(tmp_path / "exported", monkeypatch)["model"]
    scores = model.similarity(model.encode_query(QUERIES), model.encode_document(DOCUMENTS))
    has_custom_module = settings == MODELS["cosine with beta"]
    assert has_custom_module == (tmp_path / "exported" / "sentence_transformers_module.py").exists()
    scale = source.model.model.log_alpha.exp() if settings["score"] == "cosine" and not has_custom_module else 1.0
    torch.testing.assert_close(scale * scores, trainers_scores(source), rtol=1e-5, atol=1e-5)
    weights = (tmp_path / "exported").rglob("model.safetensors")
    encoders = len([path for path in weights if not path.parent.name.endswith("Dense")])
    assert encoders == (1 if settings.get("share_text") else 2)
    dims = {len(vector) for vector in (*model.encode_query(QUERIES), *model.encode_document(DOCUMENTS))}
    dim = settings.get("dim", 6)
    assert dims == {dim + (settings["score"] == "dot" or has_custom_module) * (settings.get("beta") != "none")}
    if settings == MODELS["one module"]:
        np.testing.assert_array_equal(model.encode(DOCUMENTS), model.encode_document(DOCUMENTS))
        return
    with pytest.raises(ValueError, match="task"):
        model.encode(QUERIES)


def test_transformers_loads_the_encoder_as_on_the_page(
    make_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sentence_transformers")
    source = make_source(**MODELS["one module"])
    export(source, tmp_path / "runs" / "docstrings" / "st", "sentence-transformers")
    monkeypatch.chdir(tmp_path)
    (code,) = (code for code in code_of(TUTORIAL.read_text("utf-8")) if "AutoModel" in code)
    names: dict[str, Any] = {}
    exec(compile(code, TUTORIAL.name, "exec"), names)
    texts = ["return the sorted keys", "open a file"]
    expected = Model(source.model).encode_documents(texts) / source.model.alpha
    np.testing.assert_allclose(names["vectors"].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "folders"),
    [
        ("dot with beta, one encoder", ["query_0_Transformer"]),
        ("dot without beta", ["query_0_Transformer", "document_0_Transformer"]),
    ],
)
def test_transformers_loads_the_encoders_of_two_routes(
    make_source: Any, tmp_path: Path, model: str, folders: list[str]
) -> None:
    pytest.importorskip("sentence_transformers")
    source = make_source(lengths=(24, 24), **MODELS[model])
    export(source, tmp_path / "exported", "sentence-transformers")
    assert sorted(path.name for path in tmp_path.glob("exported/*_Transformer")) == sorted(folders)
    for folder, tower in zip(folders, text_towers(source.model, "sentence-transformers"), strict=False):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported" / folder)
        encoder = AutoModel.from_pretrained(tmp_path / "exported" / folder)
        tokens = tokenizer(DOCUMENTS, padding=True, truncation=True, return_tensors="pt")
        inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        with torch.no_grad():
            found = encoder.eval()(**inputs).last_hidden_state
            expected = tower.encoder.transformer(**inputs).last_hidden_state
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_mteb_measures_an_exported_model_as_trec_eval_does(make_source: Any, tmp_path: Path) -> None:
    mteb, abstasks = pytest.importorskip("mteb"), pytest.importorskip("mteb.abstasks")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    source = make_source(**MODELS["the text's own vector"])
    export(source, tmp_path / "exported", "sentence-transformers")
    documents = {f"d{i:02}": " ".join(WORDS[i % (len(WORDS) - 5) :][:5]) for i in range(40)}
    queries = {f"q{i}": " ".join(WORDS[3 * i % (len(WORDS) - 2) :][:2]) for i in range(8)}
    judged = {key: {f"d{(7 * i + 3) % 40:02}": 1, f"d{(11 * i + 5) % 40:02}": 2} for i, key in enumerate(queries)}

    class Lanterns(abstasks.AbsTaskRetrieval):  # type: ignore[misc, name-defined]
        metadata = mteb.TaskMetadata(
            name="Lanterns", description="words", type="Retrieval", category="t2t", modalities=["text"],
            eval_splits=["test"], eval_langs=["eng-Latn"], main_score="ndcg_at_10",
            dataset={"path": "local/lanterns", "revision": "1"},
        )  # fmt: skip

        def load_data(self, *_: Any, **__: Any) -> None:
            self.corpus = {"test": {key: {"text": text} for key, text in documents.items()}}
            self.queries, self.relevant_docs = {"test": queries}, {"test": judged}
            self.data_loaded = True

    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "exported"))
    (result,) = mteb.evaluate(loaded, tasks=[Lanterns()], cache=None).task_results
    (scores,) = result.scores["test"]
    trainers = trainers_scores(source, list(queries.values()), list(documents.values()))
    run = {
        key: dict(zip(documents, row, strict=True)) for key, row in zip(queries, trainers.tolist(), strict=True)
    }  # fmt: skip
    assert scores["ndcg_at_10"] == pytest.approx(run_metrics(judged, run)["ndcg_at_10"].mean(), abs=1e-4)


def test_sentence_transformers_keeps_one_encoder_where_it_is_one(make_source: Any, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    for lengths in ((16, 16), (24, 12)):
        source = make_source(lengths=lengths, **MODELS["dot with beta, one encoder"])
        export(source, tmp_path / "exported", "sentence-transformers")
        assert [path.name for path in (tmp_path / "exported").glob("*_Transformer")] == ["query_0_Transformer"]


@pytest.mark.parametrize(
    ("lengths", "prompts", "note", "differing"),
    [
        ((16, 16), ("", ""), "`encode` returns the vectors of `encode_query` and `encode_document`.", ("", "")),
        (
            (12, 24),
            ("", ""),
            "`encode` returns the vectors of `encode_document`; `encode_query` truncates at 12 tokens in place of 24.",
            ("long", ""),
        ),
        (
            (24, 12),
            ("", ""),
            "`encode` returns the vectors of `encode_query`; `encode_document` truncates at 12 tokens in place of 24.",
            ("", "long"),
        ),
        (
            (12, 24),
            ("river: ", "stone: "),
            "`encode` is for neither side; `encode_query` adds the prompt 'river: ' and truncates at 12 tokens in "
            "place of 24. `encode_document` adds the prompt 'stone: '.",
            ("long short", "long short"),
        ),
    ],
)
def test_the_card_states_what_encode_of_a_plain_model_returns(
    make_source: Any,
    lengths: tuple[int, int],
    prompts: tuple[str, str],
    note: str,
    differing: tuple[str, str],
    tmp_path: Path,
) -> None:
    """`differing`: the texts whose vectors by `encode_query` and by `encode_document` are not those of `encode`."""
    library = pytest.importorskip("sentence_transformers")
    source = make_source(lengths=lengths, prompts=prompts, **MODELS["one module"])
    export(source, tmp_path / "exported", "sentence-transformers")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"Both towers are the same modules. {note}\n" in card
    assert len(list((tmp_path / "exported").rglob("model.safetensors"))) == 1
    model = library.SentenceTransformer(str(tmp_path / "exported"), device="cpu")
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    texts = {"long": "walnut river " * 40, "short": "copper lantern"}
    plain = model.encode(list(texts.values()))
    for encode, names in zip((model.encode_query, model.encode_document), differing, strict=True):
        difference = np.abs(plain - encode(list(texts.values()))).max(axis=1)
        assert [name for name, value in zip(texts, difference, strict=True) if value > 1e-4] == names.split()
        assert all(value < 1e-6 for name, value in zip(texts, difference, strict=True) if name not in names.split())


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_vectors_of_a_model_without_beta_have_the_width_of_the_model(
    config: Config, dataset: Dataset, dtype: Dtype, tmp_path: Path
) -> None:
    changed = replace(config, model=replace(config.model, beta="none"))
    model, dim = random_model(changed, dataset, seed=1), config.model.dim
    save_model_folder(tmp_path / "model", model, changed, dataset.schema, dataset.tokenizer_dir, {"step": 3})
    folder = load_model_folder(tmp_path / "model")
    loaded = Model(folder)
    assert loaded.encode_queries([{}, {}]).shape == (2, dim) == loaded.encode_documents([{}, {}]).shape
    assert loaded.encode_queries([]).shape == (0, dim)
    encoders = tower_encoders(folder.model, dataset)
    written = write_vectors(
        tmp_path / "vectors", encoders, dataset, folder.checksum, score=config.model.score, dtype=dtype
    )
    assert written.meta is not None and (written.meta.width, written.meta.has_beta) == (dim, False)
    difference_from_model(write_file(tmp_path / "vectors", "npy"), encoders)
    difference_from_model(write_file(tmp_path / "vectors", "parquet"), encoders)
    write_card(tmp_path / "vectors", config.model.score, {"npy": 0.0})
    assert "a query's is u, as" in (tmp_path / "vectors" / "README.md").read_text()
    build_index(tmp_path / "vectors", tmp_path / "index", rescore=20, width=dim - 2)
    index = open_index(tmp_path / "index", loaded)
    assert (index.meta.width, index.meta.whole) == (dim - 2, dim)
    query, every = loaded.encode_queries([{}]), read_vectors(tmp_path / "vectors", folder.checksum, dataset)
    best = float((every @ query[0]).max())
    scale = float((np.abs(every) @ np.abs(query[0])).max())
    assert_scores_close([index.search(query, 1)[0][0].score], [best], dim, scale)
    cosines, rows = index.similar(3, 1)
    norms = np.linalg.norm(every, axis=1)
    assert cosines[0] == pytest.approx(float(every[3] @ every[rows[0]] / norms[3] / norms[rows[0]]), rel=1e-5)
    # earlier versions stored a beta of 0
    earlier = Encoders(encoders.queries, lambda rows: torch.nn.functional.pad(encoders.documents(rows), (0, 1)))
    write_vectors(tmp_path / "earlier", earlier, dataset, folder.checksum, score=config.model.score, dtype=dtype)
    build_index(tmp_path / "earlier", tmp_path / "earlier_index")
    found = open_index(tmp_path / "earlier_index", loaded)
    assert_scores_close([found.search(query, 1)[0][0].score], [best], dim, scale)
    with pytest.raises(CheckpointError, match=f"vectors of width {dim + 1}, needs {dim}; embed it again"):
        read_vectors(tmp_path / "earlier", folder.checksum, dataset, width=folder.index_width)


def test_a_model_folder_is_the_model(make_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source()
    parity = export(source, tmp_path / "exported")
    assert (parity.query, parity.doc) == (0.0, 0.0)
    card = run_card(tmp_path / "exported", monkeypatch)
    assert card["folder"].checksum == source.model.checksum == load_model_folder(tmp_path / "exported").checksum
    export(folder_source(tmp_path / "exported"), tmp_path / "exported")  # an export may be replaced
    readme = (tmp_path / "exported" / "README.md").read_text()
    assert "None were recorded" in readme and "model-index" not in readme


def test_the_model_card_contains_the_metrics(make_source: Any, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    source = make_source()
    export(source, tmp_path / "named", "sentence-transformers")
    card = (tmp_path / "named" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "sentence-transformers"
    (results,) = metadata["model-index"]
    (result,) = results["results"]
    assert (results["name"], result["dataset"]["split"]) == ("named", "validation")
    assert result["metrics"] == [{"type": "ndcg_at_10", "value": 0.1234}]
    parameters = sum(parameter.numel() for parameter in source.model.model.parameters())
    words = TextTokenizer(source.model.tokenizer_dir).vocab_size
    row = f"| query | text | text | {words} word pieces, at most 12 tokens |"
    for entry in ("# named", row, "| ndcg_at_10 | 0.1234 |",
                 source.model.checksum, f"{parameters:,} parameters", "step 3"):  # fmt: skip
        assert entry in card, entry
    settings = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)[0])
    assert settings == source.model.config.to_dict()
    marker = json.loads((tmp_path / "named" / EXPORT_FILE).read_text())
    assert (marker["format"], marker["model_checksum"]) == ("sentence-transformers", source.model.checksum)


def test_vectors_that_differ_are_not_written(make_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentence_transformers")
    source = make_source(score="dot")
    alpha = 1.0001 * source.model.alpha
    monkeypatch.setattr(ModelFolder, "alpha", alpha)
    differences = r"queries (0\.0e\+00|\d\.\de-07), documents (1\.0e-04|9\.\de-05)"
    with pytest.raises(CheckpointError, match=f"does not match the trainer: {differences}"):
        export(source, tmp_path / "exported", "sentence-transformers")
    assert not list(tmp_path.iterdir())


def test_the_probe_covers_hard_inputs_of_exports(make_source: Any) -> None:
    probe = Probe(make_source().model)
    texts = probe.only_text("query")
    tokens = probe.features["query"]["text"]
    assert "" in texts and any(text != text.lower() for text in texts)
    assert (tokens >= 0).sum(dim=1).tolist().count(12) > 5, "too few truncated texts"
    assert len(set((tokens >= 0).sum(dim=1).tolist())) > 5, "too few different lengths"


def test_towers_of_more_than_a_text_are_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the query tower reads history \(history\), age \(numeric\)"):
        export(folder_source(model_dir), tmp_path / "exported", "sentence-transformers")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def of_events(config: Config, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a feature of events to the folder of a random model with it."""

    def make(feature: Feature) -> Path:
        folder, schema = (
            tmp_path_factory.mktemp("events"),
            replace(dataset.schema, event={"it": feature.with_name("it")}),
        )
        changed = replace(config, data=replace(config.data, event=schema.event))
        model = new_model(config.model, schema, dataset.vocab_size)
        save_model_folder(folder / "model", model, changed, schema, dataset.tokenizer_dir, {"step": 3})
        return folder / "model"

    return make


@pytest.mark.parametrize("target", ["onnx", "sentence-transformers"])
@pytest.mark.parametrize("feature", [Timestamp(), CalendarTime(), Session()], ids=lambda feature: feature.type)
def test_features_of_events_are_refused_in_one_sentence(
    of_events: Any, feature: Feature, target: str, tmp_path: Path
) -> None:
    if target == "onnx" and not feature.is_input:
        pytest.skip("exported: test_onnx_holds_histories_whose_events_have_sessions")
    sentence = f"--format {target} has no inputs for the features of events it; use --format model"
    with pytest.raises(
        ConfigError, match=sentence if feature.is_input else r"the query tower reads history \(history\)"
    ):
        export(folder_source(of_events(feature)), tmp_path / "exported", target)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_onnx_holds_histories_whose_events_have_sessions(
    of_events: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ONNX:
        pytest.importorskip(package)
    source = folder_source(of_events(Session()))
    parity = export(source, tmp_path / "exported", "onnx")
    assert max(parity.query, parity.doc) <= PARITY_LIMIT and source.model.schema.event
    card = run_card(tmp_path / "exported", monkeypatch)
    query = {"history": ["i3", "i4"], "age": 33.0}
    expected = Model(source.model).encode_queries([query])
    np.testing.assert_allclose(card["encode_query"]([query]), expected, rtol=1e-4, atol=1e-5)


def test_foreign_files_are_not_replaced(make_source: Any, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("do not touch")
    for target in ("sentence-transformers", "model"):
        with pytest.raises(ConfigError, match="is not an export of the format"):
            export(make_source(), tmp_path, target)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_an_export_is_replaced_by_one_of_its_format_alone(make_source: Any, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    source, out = make_source(), tmp_path / "exported"
    export(source, out, "sentence-transformers")
    export(source, out, "sentence-transformers")
    marker = json.loads((out / EXPORT_FILE).read_text())
    for other in (json.dumps({**marker, "format": "onnx"}), "[]", "{"):
        (out / EXPORT_FILE).write_text(other)
        with pytest.raises(ConfigError, match="exists and is not an export of the format sentence-transformers"):
            export(source, out, "sentence-transformers")
        assert (out / EXPORT_FILE).read_text() == other


def test_a_stages_best_brings_its_figures(make_source: Any, tmp_path: Path) -> None:
    """The export of a stage's best/ includes its validation metrics."""
    model = make_source().model
    for step, recorded in ((3, {"ndcg_at_10": 0.25}), (4, None)):
        provenance = {"stage": "pretrain", "step": step}
        save_model_folder(
            tmp_path / "best", model.model, model.config, model.schema, model.tokenizer_dir, provenance
        )  # fmt: skip
        (tmp_path / "metrics.jsonl").write_text(
            '{"step": 3, "validation": {"ndcg_at_10": 0.25}, "selected_by": "ndcg_at_10", "seconds": 1}\n'
        )
        reported = stage_source(tmp_path, "best").metrics
        assert (reported and reported.metrics) == recorded
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        stage_source(tmp_path, "latest")
    with pytest.raises(CheckpointError, match="has the stage validated or finished yet"):
        stage_source(tmp_path / "new", "best")
    (tmp_path / "new" / "checkpoints" / "step-00000002").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="stopped before its first validation; use --checkpoint latest"):
        stage_source(tmp_path / "new", "best")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "feature"), [("dot with beta, one encoder", "embedding"), ("cosine with beta", 'any "text" of it')]
)
def test_onnx_scores_as_the_trainer(
    make_source: Any, name: str, feature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ONNX:
        pytest.importorskip(package)
    source = make_source(feature=feature, **MODELS[name])
    parity = export(source, tmp_path / "exported", "onnx")
    assert max(parity.query, parity.doc) <= PARITY_LIMIT
    card = run_card(tmp_path / "exported", monkeypatch)
    queries, documents = ([{feature: text} for text in texts] for texts in (QUERIES, DOCUMENTS))
    scores = torch.from_numpy(card["encode_query"](queries) @ card["encode_document"](documents).T)
    torch.testing.assert_close(scores, trainers_scores(source), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "positions"),
    [
        ("gated", "relative"),
        ("gated", "rotary"),
        ("sasrec", "age"),
        ("lowpass", "relative"),
    ],
)
def test_onnx_holds_histories_of_every_kind(
    config: Config, dataset: Dataset, block: Any, positions: Any, tmp_path: Path
) -> None:
    """Export a model folder; the export compares rows of all lengths, batched and single."""
    for package in ONNX:
        pytest.importorskip(package)
    history = HISTORY_BLOCKS.find(block, "")(positions=positions, layers=2, item_scale=True)
    query = replace(config.model.query, history=history)
    changed = replace(config, model=replace(config.model, query=query))
    model = random_model(changed, dataset, seed=1)
    save_model_folder(tmp_path / "model", model, changed, dataset.schema, dataset.tokenizer_dir, {"step": 3})
    source = folder_source(tmp_path / "model")
    assert source.model.config.model.query.history == history
    parity = export(source, tmp_path / "exported", "onnx")
    assert max(parity.query, parity.doc) <= PARITY_LIMIT


@pytest.mark.slow
def test_onnx_holds_towers_of_all_features(
    tiny_interactions: Any,
    model_dir: Path,
    model: DualEncoder,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Encode raw values of histories, categories, numbers and texts with the card's code."""
    for package in ONNX:
        pytest.importorskip(package)
    export(folder_source(model_dir), tmp_path / "exported", "onnx")
    card = run_card(tmp_path / "exported", monkeypatch)
    items = [f"i{number}" for number in range(14)]  # more than max_items
    assert dataset.tokenizer_dir is not None
    lookup = Queries(dataset.schema, dataset.tokenizer, dataset, exclude_seen=True)
    collator = Collator(dataset.schema, dataset.catalogue)
    queries = [{"history": items}, {"history": [], "age": 33.0, "occupation": "farmer"}, {"occupation": "unknown"}]
    vectors = card["encode_query"](queries)
    for given, vector in zip(queries, vectors, strict=True):
        features = {name: value for name, value in given.items() if name != "history"}
        events = [Event(item) for item in given.get("history", [])]  # type: ignore[attr-defined]
        query = lookup.of(Request(features=features, events=events))
        expected = query_vectors(model, collator.query_features(query.columns))[0].numpy()
        np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-5)
    with (tiny_interactions.source / "items.csv").open() as file:
        items_read = list(csv.DictReader(file))
    documents = [
        {**item, "genres": item["genres"].split("|"), "year": float(item["year"]) if item["year"] else None}
        for item in items_read
    ]
    rows = dataset.catalogue.rows_by_key([item["item_id"] for item in items_read])
    expected_docs = document_vectors(model, to_features(dataset.schema.doc, dataset.catalogue.columns(rows))).numpy()
    np.testing.assert_allclose(card["encode_document"](documents), expected_docs, rtol=1e-4, atol=1e-5)
    queries8 = card["load_tower"]("exported", "query", "query.int8.onnx")(queries)
    cosines = (queries8 * vectors).sum(1) / np.linalg.norm(queries8, axis=1) / np.linalg.norm(vectors, axis=1)
    assert queries8.shape == vectors.shape and cosines.min() > 0.9


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["onnx", "int9=false"], "unknown key int9: onnx has int8; did you mean int8?"),
        (["onnx", "int8=some"], "int8: got 'some', needs true or false"),
        (["model", "int8=false"], "unknown key int8: model has no keys"),
        (
            ["tf"],
            "format: got tf, needs one of adapter, model, onnx, sentence-transformers, or an export format whose",
        ),
    ],
)
def test_unknown_formats_and_options_are_refused(
    model_dir: Path, tmp_path: Path, arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ["--model", str(model_dir), "--out", str(tmp_path / "out")]
    assert convert_checkpoint.main(["--format", *arguments, *folders]) == 2
    assert capsys.readouterr().err.startswith(f"error: {error}") and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_onnx_without_the_tower_in_int8(make_source: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ONNX:
        pytest.importorskip(package)
    assert export(make_source(), tmp_path / "model")
    folders = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "exported")]
    assert convert_checkpoint.main([*folders, "--format", "onnx", "int8=false"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'exported'}: onnx of {tmp_path / 'model'}, model\n")
    assert {path.name for path in (tmp_path / "exported").glob("*.onnx")} == {"query.onnx", "doc.onnx"}
    assert "int8" not in (tmp_path / "exported" / "README.md").read_text()


@pytest.mark.slow
def test_a_server_may_encode_with_the_exported_query_tower(
    model_dir: Path, other_model_dir: Path, dataset: Dataset, tmp_path: Path
) -> None:
    for package in ONNX:
        pytest.importorskip(package)
    export(folder_source(model_dir), tmp_path / "exported", "onnx")
    folder = load_model_folder(model_dir)
    write_vectors(tmp_path / "vectors", tower_encoders(folder.model, dataset), dataset, folder.checksum)
    build_index(tmp_path / "vectors", tmp_path / "index")
    index, requests = open_index(tmp_path / "index"), [Request(f"u{user}") for user in range(8)]
    expected = Searcher(folder, index, dataset).search(requests)
    for file, tolerance in (("query.onnx", 1e-4), ("query.int8.onnx", 0.2)):
        searcher = Searcher(folder, index, dataset, onnx=tmp_path / "exported" / file)
        queries = [searcher.queries.of(request) for request in requests]
        with monkeypatched_forward(folder):
            found = [answer.documents for answer in searcher.answer(queries)]
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a[0].score, b[0].score, rtol=tolerance, atol=tolerance)
            assert tolerance > 0.1 or [d.key for d in a] == [d.key for d in b]
    with pytest.raises(ConfigError, match="needs the file of a query tower"):
        Searcher(folder, index, dataset, onnx=tmp_path / "exported" / "doc.onnx")
    other = load_model_folder(other_model_dir)
    with pytest.raises(CheckpointError, match="is the tower of model"):
        query_tower(tmp_path / "exported" / "query.onnx", other.checksum)


@contextmanager
def monkeypatched_forward(folder: ModelFolder) -> Iterator[None]:
    """Make the model's forward raise."""

    def refuse(*_: object) -> None:
        raise AssertionError("the model encoded, not its export")

    hook = folder.model.register_forward_pre_hook(refuse)
    yield
    hook.remove()


@pytest.mark.parametrize("name", ["one module", "the text's own vector", "dot without beta"])
def test_a_normalized_encoder_is_normalized_once(make_source: Any, name: str, tmp_path: Path) -> None:
    """A cosine model has one Normalize, its last module; a dot model those of its encoders."""
    library = pytest.importorskip("sentence_transformers")
    settings = {side: {"mlp": [], **MODELS[name].get(side, {})} for side in ("query", "doc")}
    source = make_source(**{**MODELS[name], "dim": 8, **settings})
    for encoder in source.model.model.text.values():
        encoder.normalize = True
    parity = export(source, tmp_path / "exported", "sentence-transformers")
    assert max(parity.query, parity.doc) <= PARITY_LIMIT
    modules = json.loads((tmp_path / "exported" / "modules.json").read_text())
    routes = tmp_path / "exported" / "router_config.json"
    inner = list(json.loads(routes.read_text())["types"]) if routes.exists() else []
    paths = [path for path in [*(module["path"] for module in modules), *inner] if path.endswith("Normalize")]
    expected = {"one module": ["2_Normalize"], "the text's own vector": ["1_Normalize"]}
    assert paths == expected.get(name, ["query_2_Normalize", "document_2_Normalize"])
    model = library.SentenceTransformer(str(tmp_path / "exported"), device="cpu")
    scores = model.similarity(model.encode_query(QUERIES), model.encode_document(DOCUMENTS))
    scale = 1.0 if name.startswith("dot") else source.model.model.log_alpha.exp()
    torch.testing.assert_close(scale * scores, trainers_scores(source), rtol=1e-5, atol=1e-5)


def test_a_cosine_model_by_default_has_vectors_alone_and_no_code(make_source: Any, tmp_path: Path) -> None:
    """Without a key, the score has no bias: index vectors have the width D, and the export has no module of ours."""
    library = pytest.importorskip("sentence_transformers")
    source = make_source()
    assert source.model.config.model.beta == "none" and source.model.index_width == 6
    export(source, tmp_path / "exported", "sentence-transformers")
    assert not list((tmp_path / "exported").rglob("*.py"))
    model = library.SentenceTransformer(str(tmp_path / "exported"), device="cpu")
    assert model.encode_query(QUERIES).shape == (len(QUERIES), 6)


def test_the_code_of_a_model_card_is_the_whole_module() -> None:
    module = Path(formats.__file__).with_name("onnx_loading.py")
    assert module.read_text(encoding="utf-8").rstrip().endswith(source_of(module.name))
    compile(source_of(module.name), module.name, "exec")
    assert source_of(module.name).count("def ") == module.read_text(encoding="utf-8").count("def ")
