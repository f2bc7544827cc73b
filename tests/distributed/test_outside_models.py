"""A sequence block and a text encoder of a module outside the package, with additional keys, end to end.

Training on two ranks in chunks, a stopped run that continues, best/ loaded again, vectors, an index and the estimate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bigdssm.checkpoints.model_folder import ModelFolder, load_model_folder
from bigdssm.config import Config, ModelConfig, TowerConfig, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError
from bigdssm.export.convert import export, folder_source
from bigdssm.export.formats import Parity
from bigdssm.export.text_tower import text_towers
from bigdssm.features import Text
from bigdssm.models import new_model
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.index import build_index, open_index
from bigdssm.retrieval.shards import Share
from bigdssm.retrieval.vectors import write_vectors
from bigdssm.training.estimate import estimate

from . import small_run
from .spawn import Pool

STEPS = ("pretrain.steps=8", "pretrain.optimizer.warmup_steps=0", "pretrain.save_every_steps=4")
MODEL = (
    "model.query.history={block: cosine, sharpness: 2.0, layers: 2, positions: rotary, dropout: 0.0}",
    "model.doc.text={type: bag, width: 12}",
)  # fmt: skip


def train(rank: int, world_size: int, config: Path, run_dir: Path, overrides: tuple[str, ...], resume: bool) -> None:
    from . import outside  # noqa: F401, it registers what it holds

    small_run.run(rank, world_size, config, run_dir, overrides, "pretrain", resume)


def use(rank: int, world_size: int, config: Path, run_dir: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Load best/, compute vectors of rows and documents and an index; estimate the run."""
    from . import outside

    model = load_model_folder(run_dir / "pretrain" / "best")
    history = model.config.model.query.history
    assert isinstance(history, outside.Cosine) and history.sharpness == 2
    assert model.config.model.doc.text == outside.Bag(width=12) and model.model.text["doc"].dim == 12
    dataset = Dataset.open(model.config.data.dir)
    encoders = tower_encoders(model.model, dataset)
    queries = np.concatenate([encoders.queries(rows).numpy() for rows in dataset.iterate("validation", 32)])
    documents = encoders.documents(np.arange(dataset.catalogue.num_docs)).numpy()
    write_vectors(run_dir / "vectors", encoders, dataset, model.checksum, Share())
    build_index(run_dir / "vectors", run_dir / "index")
    scores, _ = open_index(run_dir / "index").nearest(
        queries, 3, model.checksum, [np.array([], np.int64)] * len(queries)
    )
    loaded = load_config(config, [f"run.dir={run_dir}", *overrides])
    return {
        "queries": queries, "documents": documents, "provenance": model.provenance,
        "found": float(np.abs(np.sort(queries @ documents.T)[:, ::-1][:, :3] - scores).max()),
        "weights": sum(tensor.numel() for tensor in model.model.state_dict().values()),
        "estimate": estimate(loaded, "pretrain", dataset, 2),
    }  # fmt: skip


def exported(rank: int, world_size: int, run_dir: Path) -> Parity:
    from . import outside  # noqa: F401

    return export(folder_source(run_dir / "pretrain" / "best"), run_dir / "exported", "onnx")


def refused(rank: int, world_size: int) -> str:
    """Return the error message of an export that needs a BERT."""
    from . import outside

    tower = TowerConfig(text=outside.Bag(width=8))
    config, schema = ModelConfig(query=tower, doc=tower), Schema(*({"text": Text().with_name("text")} for _ in "qd"))
    model = new_model(config, schema, vocab_size=50)
    folder = ModelFolder(model, Config(model=config), schema, None, {}, "")
    with pytest.raises(ConfigError) as error:
        text_towers(folder, "sentence-transformers")
    return str(error.value)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = small_run.write_dataset(tmp_path_factory.mktemp("data"))
    content = yaml.safe_load(path.read_text())
    del content["model"]["doc"]["text"]  # whose keys are a BERT's
    path.write_text(yaml.safe_dump(content))
    return path


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in small_run.records(run_dir)]


@pytest.mark.slow
def test_parts_of_the_towers_from_outside(config: Path, tmp_path: Path, outside_pools: dict[int, Pool]) -> None:
    whole, chunked = (*STEPS, *MODEL), (*STEPS, *MODEL, "engine.zero_stage=3", "engine.chunk_tokens=100")
    outside_pools[2].run(train, config, tmp_path / "whole", whole, False)
    outside_pools[2].run(train, config, tmp_path / "chunked", chunked, False)
    np.testing.assert_allclose(losses(tmp_path / "chunked"), losses(tmp_path / "whole"), rtol=1e-4)
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]
    (before,) = outside_pools[1].run(use, config, tmp_path / "chunked", chunked)
    for file in (tmp_path / "chunked" / "pretrain" / "checkpoints" / "step-00000008").iterdir():
        file.unlink()  # damaged: the run resumes from step 4
    first = losses(tmp_path / "chunked")
    outside_pools[2].run(train, config, tmp_path / "chunked", chunked, True)
    assert losses(tmp_path / "chunked") == first
    (after,) = outside_pools[1].run(use, config, tmp_path / "chunked", chunked)
    for name in ("queries", "documents"):
        np.testing.assert_array_equal(after[name], before[name])
    assert after["found"] < 1e-5 and after["estimate"].num_weights == after["weights"]
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    (parity,) = outside_pools[1].run(exported, tmp_path / "chunked")
    assert max(parity.query, parity.doc) <= 1e-5


def test_bert_only_options_are_refused_for_other_encoders(outside_pools: dict[int, Pool]) -> None:
    (of_export,) = outside_pools[1].run(refused)
    assert of_export.startswith("--format sentence-transformers: the query tower's text encoder is bag, needs one of ")
