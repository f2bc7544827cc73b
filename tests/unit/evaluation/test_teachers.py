"""Teacher scores of hard negatives: correct pairs, averages of several teachers, resuming after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from bigdssm.config import Config, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import DataError
from bigdssm.evaluation.baselines import fit_baseline
from bigdssm.evaluation.pretrained import PretrainedEncoder, text_encoders
from bigdssm.evaluation.teachers import (
    PairTeacher,
    VectorTeacher,
    ensemble,
    score_pairs,
)
from bigdssm.features import Ragged
from bigdssm.models import DualEncoder
from bigdssm.retrieval import shards
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.hard_negatives import HardNegatives, window_records
from bigdssm.retrieval.mining import gather_hard_negatives, mine
from bigdssm.retrieval.reranking import Texts
from bigdssm.retrieval.shards import Share
from bigdssm.utils.atomic import put_file
from tests.command_line import Tools
from tests.hard_negatives import write_hard_negatives
from tests.unit.conftest import SMALL, random_model, write_cross_encoder


@pytest.fixture(scope="module")
def negatives(model: DualEncoder, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of all training queries, partly padded."""
    path = tmp_path_factory.mktemp("mined") / "mined.npy"
    own = mine(tower_encoders(model, dataset), dataset, first=1, last=5, margin=-5.0)
    found = gather_hard_negatives(path, own, dataset)
    assert 0 < (found.windows(found.queries) < 0).mean() < 0.9
    return path


@pytest.fixture(scope="module")
def pairs(tiny_pairs: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path, Config]:
    """A dataset of texts, made-up windows, and its config."""
    dataset = Dataset.open(tiny_pairs.dir)
    keys = np.concatenate([rows.query_keys for rows in dataset.iterate("train", 999)])[::9]
    windows = np.random.RandomState(0).randint(-1, dataset.catalogue.num_docs, (len(keys), 3))
    path = tmp_path_factory.mktemp("pairs") / "mined.npy"
    write_hard_negatives(path, window_records(keys, windows), dataset)
    return dataset, path, load_config(tiny_pairs.config, [f"model.{override}" for override in SMALL])


def rows_and_docs(dataset: Dataset, negatives: HardNegatives) -> tuple[Rows, np.ndarray]:
    """Return the queries as rows, and their documents, the target first."""
    rows = next(dataset.iterate("train", 10**6))
    rows = rows.take(np.flatnonzero(np.isin(rows.query_keys, negatives.queries)))
    return rows, np.concatenate([rows.doc_rows[:, None], negatives.windows(rows.query_keys)], 1)


def assert_scores(path: Path, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    scored = HardNegatives.open(path)
    np.testing.assert_allclose(scored.teacher_scores(scored.queries), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_a_models_scores_are_its_products(
    tools: Tools, negatives: Path, other_model_dir: Path, config: Config, dataset: Dataset, tmp_path: Path
) -> None:  # fmt: skip
    out = tools.ran(
        "score_pairs", "--data", dataset.dir, "--mined", negatives, "--out", tmp_path / "scored.npy",
        "--model", other_model_dir, "--rows-per-shard", 100,
    )  # fmt: skip
    given = HardNegatives.open(negatives)
    assert f"scored.npy: {len(given)} queries, {given.per_query():.1f} documents per query, 1 teachers" in out
    rows, docs = rows_and_docs(dataset, given)
    encoders = tower_encoders(random_model(config, dataset, seed=2), dataset)
    scores = (encoders.queries(rows) @ encoders.documents(np.arange(dataset.catalogue.num_docs)).T).numpy()
    expected = np.where(docs < 0, np.nan, np.take_along_axis(scores, np.maximum(docs, 0), 1))
    assert_scores(tmp_path / "scored.npy", expected)
    np.testing.assert_array_equal(HardNegatives.open(tmp_path / "scored.npy").windows(given.queries), docs[:, 1:])
    assert [path.name for path in tmp_path.iterdir()] == ["scored.npy"]


def test_a_pretrained_encoder_as_teacher(
    tools: Tools, pairs: tuple[Dataset, Path, Config], tmp_path: Path
) -> None:  # fmt: skip
    """Compared with transformers on the same texts."""
    dataset, negatives, _ = pairs
    assert dataset.tokenizer_dir is not None
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertModel(BertConfig(vocab_size=dataset.vocab_size, initializer_range=0.5, **sizes)).eval()
    bert.save_pretrained(tmp_path / "bert")
    tokenizer = AutoTokenizer.from_pretrained(str(dataset.tokenizer_dir))
    tokenizer.save_pretrained(str(tmp_path / "bert"))
    arguments = ("--data", dataset.dir, "--mined", negatives, "--out", tmp_path / "scored.npy")
    tools.ran("score_pairs", *arguments, "--pretrained", tmp_path / "bert")
    rows, docs = rows_and_docs(dataset, HardNegatives.open(negatives))
    texts = Texts.of(dataset)

    def vector(text: str) -> torch.Tensor:
        with torch.no_grad():
            return bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    scored = HardNegatives.open(tmp_path / "scored.npy").teacher_scores(rows.query_keys)
    for i in (0, 7, len(rows) - 1):
        query = vector(texts.queries(rows.query)[i])
        for at, text in zip(np.flatnonzero(docs[i] >= 0), texts.documents(docs[i][docs[i] >= 0]), strict=True):
            cosine = torch.nn.functional.cosine_similarity(query, vector(text), dim=0)
            assert scored[i, at] == pytest.approx(float(cosine), abs=1e-5)
    assert (np.isnan(scored) == (docs < 0)).all() and np.nanstd(scored) > 1e-3
    encoders = text_encoders(PretrainedEncoder(tmp_path / "bert"), texts)
    everything = (encoders.queries(rows) @ encoders.documents(np.arange(dataset.catalogue.num_docs)).T).numpy()
    np.testing.assert_allclose(_of(everything, docs), scored, atol=1e-5)


def test_several_teachers_are_averaged_on_one_scale(pairs: tuple[Dataset, Path, Config]) -> None:
    dataset, path, config = pairs
    rows, docs = rows_and_docs(dataset, HardNegatives.open(path))
    encoders = [tower_encoders(random_model(config, dataset, seed), dataset) for seed in (5, 6)]
    teachers: list[PairTeacher] = [VectorTeacher(some, dataset.catalogue.num_docs) for some in encoders]
    first, second = (teacher(rows, np.maximum(docs, 0)) for teacher in teachers)
    found = ensemble([teachers[0], lambda *pair: 100 * teachers[1](*pair) + 7], rows, docs)
    for i, there in enumerate(docs >= 0):
        assert (np.isnan(found[i]) == ~there).all()
        scaled = [(s[i, there] - s[i, there].mean()) / max(float(s[i, there].std()), 1e-30) for s in (first, second)]
        np.testing.assert_allclose(found[i, there], (scaled[0] + scaled[1]) / 2, atol=1e-4)
    np.testing.assert_array_equal(ensemble(teachers[:1], rows, docs)[docs >= 0], first[docs >= 0])


def test_bm25_and_a_cross_encoder_read_the_texts(
    tools: Tools, pairs: tuple[Dataset, Path, Config], tmp_path: Path
) -> None:  # fmt: skip
    """Each teacher separately, compared with BM25 and transformers on the same texts."""
    for package in ("bm25s", "Stemmer", "sentence_transformers"):
        pytest.importorskip(package)
    dataset, negatives, _ = pairs
    folder, tokenizer = write_cross_encoder(tmp_path / "cross", dataset)
    arguments = ("--data", dataset.dir, "--mined", negatives, "--out")
    tools.ran("score_pairs", *arguments, tmp_path / "bm25.npy", "--bm25")
    tools.ran("score_pairs", *arguments, tmp_path / "cross.npy", "--cross-encoder", tmp_path / "cross")
    given = HardNegatives.open(negatives)
    rows, docs = rows_and_docs(dataset, given)
    texts = Texts.of(dataset)
    lexical, read = (
        HardNegatives.open(tmp_path / f"{name}.npy").teacher_scores(rows.query_keys) for name in ("bm25", "cross")
    )
    queries, documents = texts.queries(rows.query), texts.documents(np.arange(dataset.catalogue.num_docs))
    assert isinstance(rows.query["query"], Ragged) and len(set(documents)) > 100
    shared = [[len({*query.split()} & {*documents[doc].rstrip(" .").split()}) for doc in row if doc >= 0]
              for query, row in zip(queries, docs.tolist(), strict=True)]  # fmt: skip
    for counts, scores in zip(shared, lexical, strict=True):
        assert [count > 0 for count in counts] == (scores[~np.isnan(scores)] > 0).tolist()
    assert np.nanmean(lexical[:, 0]) > 3 * np.nanmean(lexical[:, 1:])
    np.testing.assert_allclose(_of(fit_baseline("bm25", dataset, {})(rows), docs), lexical, rtol=1e-6)
    for i in (0, 7, len(rows) - 1):
        for at, doc in enumerate(docs[i].tolist()):
            if doc >= 0:
                inputs = tokenizer(queries[i], documents[doc], return_tensors="pt")
                with torch.no_grad():
                    logit = float(folder(**inputs).logits)
                assert read[i, at] == pytest.approx(logit, abs=1e-5)
    assert (np.isnan(read) == (docs < 0)).all() and np.nanstd(read) > 1e-3


def _of(everything: np.ndarray, docs: np.ndarray) -> np.ndarray:
    """Select documents from scores of all documents, NaN for -1."""
    return np.where(docs < 0, np.nan, np.take_along_axis(everything, np.maximum(docs, 0), 1))


def recording(teacher: PairTeacher, requested: list[np.ndarray], calls: int | None = None) -> PairTeacher:
    """Return a teacher that lists the queries of its calls, and is killed after some."""

    def record(rows: Rows, docs: np.ndarray) -> np.ndarray:
        if len(requested) == calls:
            raise KeyboardInterrupt
        requested.append(rows.query_keys)
        return teacher(rows, docs)

    return record


def test_ranks_share_the_queries_and_resume_after_a_kill(
    model: DualEncoder, negatives: Path, dataset: Dataset, tmp_path: Path
) -> None:
    given, out = HardNegatives.open(negatives), tmp_path / "scored.npy"
    teacher = VectorTeacher(tower_encoders(model, dataset), dataset.catalogue.num_docs)
    requested: list[np.ndarray] = []
    seen: list[np.ndarray] = []
    killed, counted = recording(teacher, requested, 3), recording(teacher, seen)

    def make(teacher: PairTeacher, rank: int, names: list[str]) -> HardNegatives | None:
        return score_pairs(out, given, dataset, [teacher], names, Share(rank, 2, rows_per_chunk=60))

    with pytest.raises(KeyboardInterrupt):
        make(killed, 0, ["one"])
    assert not out.exists()
    assert make(counted, 1, ["one"]) is None and not out.exists()
    whole = make(counted, 0, ["one"])
    assert whole is not None
    np.testing.assert_array_equal(np.sort(np.concatenate([*requested, *seen])), given.queries)
    direct = score_pairs(tmp_path / "direct.npy", given, dataset, [teacher], ["one"], Share())
    assert direct is not None
    np.testing.assert_allclose(
        whole.teacher_scores(given.queries), direct.teacher_scores(given.queries), rtol=1e-4, atol=1e-4
    )
    # scores of another teacher are not reused
    requested.clear()
    with pytest.raises(KeyboardInterrupt):
        make(killed, 0, ["one"])
    seen.clear()
    make(counted, 0, ["two"])
    make(counted, 1, ["two"])
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), given.queries)


def test_a_kill_after_the_file_has_its_name(
    negatives: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the rest of the unfinished folder is removed: the same command ends with the same file."""

    def make() -> HardNegatives | None:
        def teacher(rows: Rows, docs: np.ndarray) -> np.ndarray:
            return np.ones(docs.shape, np.float32)

        return score_pairs(tmp_path / "scored.npy", given, dataset, [teacher], ["one"], Share())

    def killed(aside: Path, path: Path) -> None:
        put_file(aside, path)
        raise KeyboardInterrupt

    given = HardNegatives.open(negatives)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shards, "put_file", killed)
        make()
    first = (tmp_path / "scored.npy").read_bytes()
    assert make() is not None and (tmp_path / "scored.npy").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["scored.npy"]


def test_non_finite_scores_are_refused(negatives: Path, dataset: Dataset, tmp_path: Path) -> None:
    def nothing(rows: Rows, docs: np.ndarray) -> np.ndarray:
        return np.full(docs.shape, np.nan)

    with pytest.raises(DataError, match=r"teacher scores of rows 0 to \d+ hold NaN or inf"):
        score_pairs(tmp_path / "scored.npy", HardNegatives.open(negatives), dataset, [nothing], ["nobody"], Share())
    assert not (tmp_path / "scored.npy").exists()


def test_invalid_teachers_are_refused(
    tools: Tools, negatives: Path, dataset: Dataset, pairs: tuple[Dataset, Path, Config], tmp_path: Path,
) -> None:  # fmt: skip
    out = ("--out", tmp_path / "scored.npy")
    arguments = ("--data", dataset.dir, "--mined", negatives, *out)
    assert "no teacher: needs at least one of --model" in tools.refused(2, "score_pairs", *arguments)
    assert "needs a text feature on both sides" in tools.refused(2, "score_pairs", *arguments, "--bm25")
    assert "is not a model folder" in tools.refused(4, "score_pairs", *arguments, "--model", tmp_path)
    texts = ("--data", pairs[0].dir, "--mined", pairs[1], *out)
    message = tools.refused(2, "score_pairs", *texts, "--cross-encoder", tmp_path)
    assert "holds no cross-encoder: config.json is missing" in message
    assert "has no tokenizer.json" in tools.refused(2, "score_pairs", *texts, "--pretrained", tmp_path)
    assert "another dataset" in tools.refused(3, "score_pairs", "--data", dataset.dir, *texts[2:], "--bm25")
    assert not list(tmp_path.iterdir())
