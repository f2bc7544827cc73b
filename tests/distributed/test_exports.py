"""Exports do not depend on the number of ranks and the ZeRO stage of the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.config import load_config
from bigdssm.export.convert import export, stage_source
from bigdssm.export.formats import Probe
from bigdssm.export.onnx_model import EXPORT_FILE
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs

from . import small_run
from .spawn import Pool

WORDS = ["river", "stone", "bridge", "lantern", "copper", "meadow", "signal", "harbor", "winter", "violet"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """480 pairs of a short and a longer text."""
    folder = tmp_path_factory.mktemp("texts")
    with (folder / "pairs.jsonl").open("w") as file:
        for row in range(480):
            words = [WORDS[(row * k + k) % len(WORDS)] for k in range(1, 7)]
            file.write(json.dumps({"query": words[0] + " " + words[2], "doc": " ".join(words)}) + "\n")
    content = {
        "run": {"dir": "replaced", "trackers": []},
        "data": {
            "dir": str(folder / "dataset"),
            "lanes": 6,
            "num_workers": 0,
            "query": {"query": {"type": "text", "max_tokens": 6}},
            "doc": {"doc": {"type": "text", "max_tokens": 10}},
            "tokenizer": {"vocab_size": 100},
        },
        "model": {
            "dim": 8, "score": "dot",
            "query": {"text": {"layers": 1, "hidden": 8}}, "doc": {"text": {"layers": 1, "hidden": 8}},
        },
        "pretrain": {"rows_global": 48, "steps": 4, "optimizer": {"lr": 0.01, "warmup_steps": 1}},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    make_pairs(load_config(path).data, PairTables((folder / "pairs.jsonl",)), IngestTarget(folder / "dataset"))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "zero_stage"), [(3, 1), (2, 3)])
def test_a_checkpoint_of_any_ranks_and_stage_is_exported(
    config: Path, tmp_path: Path, pools: dict[int, Pool], world_size: int, zero_stage: int
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    pools[world_size].run(small_run.run, config, tmp_path / "run", (f"engine.zero_stage={zero_stage}",))
    stage_dir = tmp_path / "run" / "pretrain"
    best = load_model_folder(stage_dir / "best")  # of the same step: the run is validated at its end only
    export(stage_source(stage_dir, "latest"), tmp_path / "exported", "sentence-transformers")
    probe = Probe(best)
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "exported"), device="cpu", local_files_only=True)
    for side, encode in (("query", loaded.encode_query), ("doc", loaded.encode_document)):
        vectors = torch.as_tensor(encode(probe.only_text(side)))
        torch.testing.assert_close(vectors, probe.vectors[side], rtol=1e-5, atol=1e-5)
    marker = json.loads((tmp_path / "exported" / EXPORT_FILE).read_text())
    assert marker["model_checksum"] == best.checksum
    assert marker["provenance"]["checkpoint"] == "step-00000004"
