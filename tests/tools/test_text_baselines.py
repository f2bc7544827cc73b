"""The baseline trained with sentence-transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

import tools.evidence.baselines  # noqa: F401, which registers them
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.evaluation.baselines import fit_baseline
from bigdssm.evaluation.evaluate import evaluate_scores
from bigdssm.retrieval.reranking import Texts


@pytest.fixture(scope="module")
def dataset(tiny_pairs: Any) -> Dataset:
    return Dataset.open(tiny_pairs.dir)


@pytest.fixture(scope="module")
def folder(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with random weights and the tokenizer of the dataset."""
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=dataset.vocab_size, **sizes)).save_pretrained(path)
    AutoTokenizer.from_pretrained(str(dataset.tokenizer_dir)).save_pretrained(str(path))
    return path


def test_a_text_baseline_learns_from_the_train_pairs(dataset: Dataset, folder: Path) -> None:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("datasets")
    options = {"folder": str(folder), "rows": 64, "lr": 3e-3}
    as_it_is = evaluate_scores(fit_baseline("pretrained", dataset, {"folder": str(folder)}), dataset, "test")
    found = [fit_baseline("sentence_transformers", dataset, {**options, "steps": steps}) for steps in (1, 60)]
    measured = [evaluate_scores(scores, dataset, "test").metrics["mrr"] for scores in found]
    assert measured[1] > 2 * max(measured[0], as_it_is.metrics["mrr"])

    rows, texts = next(dataset.iterate("test", 5)), Texts.of(dataset)
    model = found[1].model  # type: ignore[attr-defined]
    pair = [texts.queries(rows.query)[3], texts.documents(np.array([7]))[0]]
    query, document = model.encode(pair)
    cosine = query @ document / np.linalg.norm(query) / np.linalg.norm(document)
    assert found[1](rows)[3, 7] == pytest.approx(cosine, abs=1e-5)


def test_invalid_text_baseline_options_are_refused(
    dataset: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong, said in (
        ({"folder": "nowhere", "steps": 1}, "nowhere has no tokenizer.json"),
        ({"folder": str(folder), "steps": 0}, "steps: got 0, needs at least 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            fit_baseline("sentence_transformers", dataset, wrong)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"sentence_transformers.*install bigdssm\[baselines\]"):
        fit_baseline("sentence_transformers", dataset, {"folder": str(folder), "steps": 1})
