"""Each family of text encoders from pairs to an index: ingestion, FPS, SFT with hard negatives, exports, search."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import bigdssm
from bigdssm.commands import __main__ as command
from bigdssm.export.convert import export, folder_source
from bigdssm.export.formats import PARITY_LIMIT
from tests.encoders import FAMILIES, LORA, write_pairs


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_from_pairs_to_search(family: str, tmp_path: Path) -> None:
    config = write_pairs(tmp_path, family)
    overrides = LORA if family in ("modernbert", "qwen3") else []
    bigdssm.pretrain(config, overrides)
    trained = bigdssm.sft(config, overrides)
    source = folder_source(trained.best)
    formats = ["model", "sentence-transformers", "onnx", *(["adapter"] if overrides else [])]
    for name in formats:
        parity = export(source, tmp_path / name, name)
        assert max(parity.query, parity.doc) <= PARITY_LIMIT, name
    model, merged = bigdssm.load_model(trained.best), bigdssm.load_model(tmp_path / "model")
    queries = ["red wine", "blue sea stone"]
    np.testing.assert_allclose(merged.encode_queries(queries), model.encode_queries(queries), rtol=1e-4, atol=1e-5)
    data = ["--data", str(tmp_path / "dataset"), "--out", str(tmp_path / "vectors")]
    assert command.main(["embed", "--model", str(tmp_path / "model"), *data]) == 0
    assert command.main(["build_index", "--vectors", str(tmp_path / "vectors"), "--out", str(tmp_path / "index")]) == 0
    searcher = bigdssm.Searcher.open(tmp_path / "model", tmp_path / "index")
    request = bigdssm.Request(features={"query": "red wine"})
    best = searcher.search([request])[0][0]
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    (document,) = merged.encode_documents([pair["text"] for pair in pairs if pair["doc_key"] == best.key])
    assert best.score == pytest.approx(float(merged.encode_queries(["red wine"])[0] @ document), rel=1e-4, abs=1e-5)
