"""Small datasets of real rows, with the schemas and losses of configs/ and towers that train in seconds."""

from __future__ import annotations

import atexit
import functools
import itertools
import lzma
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigdssm.config import load_config
from bigdssm.errors import DataError
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from tools.public_data.movielens_100k import fetch_movielens, has_tables

ROOT = Path(__file__).resolve().parents[2]
NUM_PACKAGES = 3000
TEXT = {"init": None, "layers": 1, "hidden": 16, "heads": 2}
NO_DROPOUT = {"dropout": 0.0, "item_dropout": 0.0}
# With dot products a shift of all document vectors has no gradient: nothing to compare.
MODEL: dict[str, Any] = {"dim": 16, "score": "cosine", "beta": "document", "alpha_init": 10.0}
# A word that a batch holds once may have a gradient that is all but zero: with the usual eps Adam's steps for it are of
# the size of lr, in the direction of its rounding noise.
OPTIMIZER = {"lr": 0.001, "eps": 1.0e-5, "warmup_steps": 5}
PRETRAIN: dict[str, Any] = {"rows_global": 120, "steps": 30, "validate_every_steps": 0, "log_every_steps": 1}


def shared(folder: str) -> Path:
    """Return a folder of real data; skip the test where there is none."""
    found = Path(os.environ.get("BIGDSSM_SHARED", ROOT.parent / "shared")) / "data" / folder
    if not found.is_dir():
        pytest.skip(f"{found} is not there")
    return found


def debian_packages(folder: Path) -> Path:
    """Make a dataset of the first packages in `folder`; return its config."""
    pairs = folder / "pairs.jsonl"
    with lzma.open(shared("debian_packages") / "packages.jsonl.xz", "rt") as lines, pairs.open("w") as kept:
        kept.writelines(itertools.islice(lines, NUM_PACKAGES))
    tower = {"residual": None, "text": TEXT, "embedding_dim": 8}
    config = _config(
        folder,
        "debian_packages",
        {"tokenizer": {"path": None, "vocab_size": 2000}},
        {**MODEL, "query": tower, "doc": tower},
        {"optimizer": OPTIMIZER, "loss": {"name": "fps", "direction": "both"}},
    )
    tables = PairTables((pairs,), doc_id_column="package", split_column="source")
    make_pairs(load_config(config).data, tables, IngestTarget(folder / "dataset"))
    return config


@functools.cache
def fetched_movielens() -> Path | str:
    """Return the folder with MovieLens-100K's tables, the checkout's or one fetched for this session, or why not."""
    source = ROOT / "datasets" / "source" / "ml-100k"  # where the quickstart puts them
    if not has_tables(source):
        source = Path(tempfile.mkdtemp(prefix="ml-100k-"))
        atexit.register(shutil.rmtree, source, ignore_errors=True)
        try:
            fetch_movielens(source, source)
        except DataError as error:
            return str(error)
    return source


def movielens_100k(folder: Path) -> Path:
    """Make a dataset of MovieLens-100K in `folder`, users' profiles among it; return its config: the towers shipped."""
    source = fetched_movielens()
    if isinstance(source, str):
        pytest.skip(f"ml_latest_small stands in for it: {source}")
    model = yaml.safe_load((ROOT / "configs" / "movielens_100k.yaml").read_text(encoding="utf-8"))["model"]
    for side in ("query", "doc"):
        model[side]["dropout"] = 0.0
    model["query"]["history"] |= NO_DROPOUT
    model |= {"score": MODEL["score"], "alpha_init": MODEL["alpha_init"]}
    config = _config(folder, "movielens_100k", {}, model, {"optimizer": OPTIMIZER, "epochs": 1})
    tables = InteractionTables(*(source / f"ml-100k.{name}" for name in ("inter", "item", "user")))
    make_interactions(load_config(config).data, tables, IngestTarget(folder / "dataset"))
    return config


def ml_latest_small(folder: Path) -> Path:
    """Make a dataset of ml-latest-small in `folder`; return its config. Its users have no profile."""
    if isinstance(fetched_movielens(), Path):
        pytest.skip("movielens_100k is there")
    source = shared("ml_latest_small")
    for name in ("ratings", "movies"):
        (folder / f"{name}.csv").write_bytes(lzma.decompress((source / f"{name}.csv.xz").read_bytes()))
    features = {
        "title": "title",
        "query": {"history": {"type": "history", "of": "item_id", "max_items": 10}},
        "doc": {
            "item_id": {"type": "categorical", "column": "movieId"},
            "title": {"type": "text", "max_tokens": 24},
            "genres": {"type": "categorical", "multi": True, "separator": "|"},
        },
    }
    config = _config(
        folder,
        "movielens_100k",
        features,
        {
            **MODEL,
            "query": {"residual": "history", "mlp": [], "history": {"layers": 1, "heads": 2, **NO_DROPOUT}},
            "doc": {"residual": "item_id", "mlp": [], "embedding_dim": 16, "text": TEXT},
        },
        {"optimizer": OPTIMIZER, "epochs": 1},
    )
    columns = {"user_column": "userId", "item_column": "movieId", "time_column": "timestamp"}
    make_interactions(
        load_config(config).data,
        InteractionTables(folder / "ratings.csv", folder / "movies.csv", None, **columns),
        IngestTarget(folder / "dataset"),
    )
    return config


def movielens(folder: Path) -> Path:
    """Make a dataset of the MovieLens that is there in `folder`; return its config."""
    return (ml_latest_small if isinstance(fetched_movielens(), str) else movielens_100k)(folder)


def _config(folder: Path, name: str, data: dict[str, Any], model: dict[str, Any], pretrain: dict[str, Any]) -> Path:
    """Write the config `name` of configs/ with these sections in place of its own, and return the file."""
    content = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    content["run"] = {"dir": str(folder / "run"), "trackers": []}
    content["data"] |= {**data, "dir": str(folder / "dataset"), "lanes": 6, "num_workers": 0}
    content["pretrain"] |= {**PRETRAIN, **pretrain}
    content.pop("sft")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**content, "model": model, "engine": {}}, sort_keys=False))
    return path
