"""A feature type end to end: table → dataset → training → vectors → search → ONNX, inspection and card.

The vectors of `vector` come from a list column or a matrix; `angle` is registered by a module outside the package.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest
import yaml

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.export.convert import export, folder_source
from bigdssm.export.formats import EXPORT_FORMATS
from bigdssm.features import TextTokenizer
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.loader.batch import to_features
from bigdssm.loader.inspection import describe, sample_rows
from bigdssm.retrieval.embed import document_vectors, query_vectors, tower_encoders
from bigdssm.retrieval.index import build_index, open_index
from bigdssm.retrieval.queries import Queries
from bigdssm.retrieval.request import Request
from bigdssm.retrieval.shards import Share
from bigdssm.retrieval.vectors import write_vectors

from . import small_run
from .spawn import Pool

ROWS, TOPICS, DIM = 400, 8, 6


def write_table(folder: Path) -> None:
    """A query and its document share a topic: its direction in `near`, and its hour."""
    random = np.random.RandomState(0)
    topic = random.randint(0, TOPICS, ROWS)
    near = random.randn(TOPICS, DIM)[topic] + 0.1 * random.randn(ROWS, DIM)
    lists: list[Any] = near.astype(np.float32).tolist()
    lists[3], lists[5], lists[7] = None, [1.0, 2.0], [float("inf")] * DIM
    hours: list[Any] = (24 * topic / TOPICS + 0.2 * random.rand(ROWS)).tolist()
    hours[4] = None
    names = [f"t{t} {i % 3}" for i, t in enumerate(topic)]
    table = {
        "near": pa.array(lists, pa.list_(pa.float32())),
        "hour": hours,
        "doc": names,
        "key": [f"k{n}" for n in names],
    }
    read = pa.table({**table, "word": [f"w{t}" for t in topic]})
    pq.write_table(read, folder / "pairs.parquet")
    np.save(folder / "near.npy", near.astype(np.float64))
    with orc.ORCWriter(str(folder / "pairs.orc"), batch_size=100, stripe_size=1000) as writer:
        for start in range(0, ROWS, 150):
            writer.write(read.slice(start, 150))


def go_all_the_way(
    rank: int,
    world_size: int,
    folder: Path,
    feature: dict[str, Any],
    value: Any,
    source: str,
    stage: dict[str, Any],
) -> dict[str, Any]:
    from . import outside  # noqa: F401, it registers what it holds

    content = {
        "run": {"dir": str(folder / "run"), "trackers": []},
        "data": {
            "dir": str(folder / "dataset"), "lanes": 4, "num_workers": 0, "tokenizer": {"vocab_size": 100},
            "max_bad_fraction": 0.1,
            "query": {"asked": feature, "word": {"type": "text", "max_tokens": 6}},
            "doc": {"doc": {"type": "text", "max_tokens": 6}, "own": feature},
        },
        "model": {
            "dim": 8, "query": {"text": {"layers": 1, "hidden": 8}, "numeric_dim": 8, "vector_dim": 8},
            "doc": {"text": {"layers": 1, "hidden": 8}, "numeric_dim": 8, "vector_dim": 8},
        },
        "pretrain": {"rows_global": 32, "steps": 6, "log_every_steps": 1, **stage},
        "engine": {"chunk_tokens": 64},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    tables = PairTables((folder / source,), doc_id_column="key")
    report = make_pairs(load_config(path).data, tables, IngestTarget(folder / "dataset"))
    dataset = Dataset.open(str(folder / "dataset"))
    small_run.run(rank, world_size, path, folder / "run")
    model = load_model_folder(folder / "run" / "pretrain" / "best")
    write_vectors(folder / "vectors", tower_encoders(model.model, dataset), dataset, model.checksum, Share())
    build_index(folder / "vectors", folder / "index")
    assert model.tokenizer_dir is not None
    queries = Queries(model.schema, TextTokenizer(model.tokenizer_dir), None, exclude_seen=True)
    typed = queries.of(Request(features={"asked": str(value), "word": "w1"}))
    vector = query_vectors(model.model, to_features(model.schema.query, typed.columns)).numpy()
    scores, rows = open_index(folder / "index").nearest(vector, 3, model.checksum, [typed.seen])
    every = document_vectors(
        model.model, to_features(dataset.schema.doc, dataset.catalogue.columns(np.arange(dataset.catalogue.num_docs)))
    ).numpy()
    parity = export(folder_source(folder / "run" / "pretrain" / "best"), folder / "exported", "onnx")
    npz = export(
        folder_source(folder / "run" / "pretrain" / "best"),
        folder / "npz",
        EXPORT_FORMATS.make("npz", {"compressed": True}),
    )
    with zipfile.ZipFile(folder / "npz" / "weights.npz") as weights:
        assert {entry.compress_type for entry in weights.infolist()} == {zipfile.ZIP_DEFLATED}
    assert 'np.load("npz/weights.npz")' in (folder / "npz" / "README.md").read_text()
    names = run_card(folder / "exported")
    from_card = names["encode_query"]([{"asked": value, "word": "w1"}, {"word": "w1"}])
    unknown = queries.of(Request(features={"word": "w1"}))
    nothing = query_vectors(model.model, to_features(model.schema.query, unknown.columns)).numpy()
    bad = (folder / "dataset" / "quarantine.jsonl").read_text().splitlines()
    return {
        "bad": report.num_bad,
        "losses": [record["loss"] for record in small_run.records(folder / "run")],
        "found": float(np.abs(np.sort(vector @ every.T)[0, ::-1][:3] - scores[0]).max()), "rows": rows[0].tolist(),
        "parity": max(parity.query, parity.doc, npz.query, npz.doc),
        "card": float(np.abs(from_card - np.concatenate([vector, nothing])).max()),
        "apart": float(np.abs(vector - nothing).max()),
        "shown": [row["query.asked"] for row in sample_rows(dataset, count=400)],
        "fitted": dict((f"{side}.{f.name}", f.describe(1)) for side, f in describe(dataset).features)["query.asked"],
        "validation": small_run.validations(folder / "run")[-1], "selected_by": selected_by(folder / "run"),
        "quarantine": [json.loads(line)["reason"] for line in bad],
    }  # fmt: skip


def selected_by(run: Path) -> str:
    """Return the metric that selects best/, from its record and computed from best/."""
    lines = map(json.loads, (run / "pretrain" / "metrics.jsonl").read_text().splitlines())
    name: str = next(line["selected_by"] for line in lines if "validation" in line)
    origin = load_model_folder(run / "pretrain" / "best").provenance
    assert origin["validation"] in [record[name] for record in small_run.validations(run)]
    return name


def run_card(folder: Path) -> dict[str, Any]:
    """Run the code of an export's card, and return its names."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    code = code.replace("from __future__ import annotations", "").replace('"exported"', repr(str(folder)))
    names: dict[str, Any] = {"__name__": "card"}
    exec(compile(code, "card", "exec"), names)
    return names


NEAR = {"type": "vector", "column": "near", "dim": DIM}
CASES = {
    "lists of halves, normalized": ({**NEAR, "dtype": "float16", "normalize": True}, [0.5, -1.0] * (DIM // 2)),
    "matrix": ({"type": "vector", "matrix": "near.npy", "dim": DIM}, [0.5] * DIM),
    "from outside": ({"type": "angle", "column": "hour", "whole": 24.0}, 6.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_feature_type_works_from_ingestion_to_serving(
    case: str, outside_pools: dict[int, Pool], tmp_path: Path
) -> None:
    write_table(tmp_path)
    feature, value = CASES[case]
    if "matrix" in feature:
        feature = {**feature, "matrix": str(tmp_path / "near.npy")}
    source, stage = "pairs.parquet", {"optimizer": {"lr": 0.01, "warmup_steps": 1}}
    if case == "from outside":  # everything that the module registers
        source = "pairs.orc"
        stage = {
            "loss": {"name": "cubed", "margin": 0.5},
            "validation_metric": "hr_at_1",
            "optimizer": {"name": "heavy_ball", "lr": 0.02, "friction": 0.2},
        }
    (found,) = outside_pools[1].run(go_all_the_way, tmp_path, feature, value, source, stage)
    assert 0 <= found["validation"]["hr_at_1"] <= found["validation"]["hr_at_10"]
    assert found["selected_by"] == stage.get("validation_metric", "ndcg_at_10")
    assert found["losses"][-1] < found["losses"][0]
    assert found["found"] < 1e-5 and len(set(found["rows"])) == 3
    assert found["parity"] <= 1e-5 and found["card"] <= 1e-4 and found["apart"] > 1e-3
    missing = sum(value is None for value in found["shown"])
    if case.startswith("lists"):
        said = (
            "near has 2 numbers, needs 6",
            f"near has a number that is not finite in {feature.get('dtype', 'float32')}",
        )
        assert sorted(found["quarantine"]) == [f"{one}; taken as missing" for one in said for _ in ("query", "doc")]
        assert missing >= 2
    if case == "matrix":
        assert not found["quarantine"] and not missing
