"""A small dataset of pairs of documents of one domain: adjacent words on a circle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from bigdssm.config import load_config
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from tests.conftest import WORDS

CIRCLE = 60
NUM_DOCS = CIRCLE + 1  # the last one is only a query
FEATURES = ("text", "kind", "size")


def document(number: int, side: str) -> dict[str, Any]:
    """Return a document's columns for one side."""
    words = [WORDS[(number * step + step) % len(WORDS)] for step in (1, 3, 7)]
    values = (" ".join(words), f"k{number % 4}", number * 3)
    return {f"{side}_key": f"d{number}", **{f"{side}_{name}": v for name, v in zip(FEATURES, values, strict=True)}}


def write_dataset(folder: Path, model: dict[str, Any] | None = None) -> Path:
    """Build the dataset in `folder` with one shared tower; return the config's path."""
    pairs = [(number, (number + step) % CIRCLE) for number in range(CIRCLE) for step in (1, 2, 5, 11)]
    pairs += [(CIRCLE, number) for number in range(3)]
    rows = [document(a, "a") | document(b, "b") for a, b in pairs]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def side(name: str) -> dict[str, Any]:
        return {
            "text": {"type": "text", "column": f"{name}_text", "max_tokens": 8},
            "kind": {"type": "categorical", "column": f"{name}_kind"},
            "size": {"type": "numeric", "column": f"{name}_size"},
        }

    content = {
        "run": {"dir": str(folder / "run"), "trackers": []},
        "data": {
            "dir": str(folder / "dataset"), "siamese": True, "query": side("a"), "doc": side("b"),
            "tokenizer": {"vocab_size": 200}, "lanes": 6, "num_workers": 0,
        },
        "model": {
            "dim": 16, "alpha_init": 4.0, "beta": "none",
            "doc": {"mlp": [16], "embedding_dim": 8, "text": {"layers": 1, "hidden": 16}}, **(model or {}),
        },
        "pretrain": {
            "rows_global": 48, "steps": 6, "loss": {"direction": "both"}, "log_every_steps": 1,
            "optimizer": {"lr": 0.01, "warmup_steps": 2},
        },
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    tables = PairTables(
        (folder / "pairs.jsonl",), doc_id_column="b_key", query_id_column="a_key", split_column="a_key",
        validation_fraction=0.1, test_fraction=0.2, beir=folder / "beir",
    )  # fmt: skip
    make_pairs(load_config(path).data, tables, IngestTarget(folder / "dataset"))
    return path
