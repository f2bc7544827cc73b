"""A query tower trained against the document vectors of another model, which keep their index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from bigdssm.checkpoints.checkpoint import find_checkpoint
from bigdssm.checkpoints.model_folder import load_checkpoint_model, load_model_folder
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError, ConfigError
from bigdssm.models.dual_encoder import DOCUMENT_WEIGHTS
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.index import build_index, open_index
from bigdssm.retrieval.model import Model
from bigdssm.retrieval.vectors import write_vectors
from bigdssm.training.estimate import estimate

from . import small_run
from .compared_runs import assert_same_curve, stop_after, weights
from .spawn import Pool, RankFailed

CHUNKS = ("engine.chunk_tokens=150", "engine.keep_graph_tokens=0")
LIGHTER = ("model.query.history.layers=2", "model.query.mlp=[8]", "model.query.residual=null")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pools: dict[int, Pool]) -> Path:
    """Return a folder with a dataset, the run of a model, and `vectors` of its documents."""
    folder = tmp_path_factory.mktemp("fixed_documents")
    config = small_run.write_dataset(folder)
    pools[1].run(small_run.run, config, folder / "old")
    write_vectors_of(folder, config)
    return folder


def write_vectors_of(folder: Path, config: Path) -> None:
    """Write `vectors` of the model in `old`, and `fixed.yaml`, whose stage trains against them."""
    model = load_model_folder(folder / "old" / "pretrain" / "best")
    dataset = model.view(Dataset.open(folder / "dataset"))
    write_vectors(folder / "vectors", tower_encoders(model.model, dataset), dataset, model.doc_checksum)
    documents = {"model": str(folder / "old" / "pretrain" / "best"), "vectors": str(folder / "vectors")}
    content = yaml.safe_load(config.read_text())
    content["pretrain"]["documents"] = documents
    (folder / "fixed.yaml").write_text(yaml.safe_dump(content))


def test_the_loss_is_that_of_the_encoded_documents(trained: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    start = (f"pretrain.init={trained / 'old' / 'pretrain' / 'best'}", "pretrain.steps=1")
    pools[1].run(small_run.run, trained / "config.yaml", tmp_path / "encoded", start)
    pools[1].run(small_run.run, trained / "fixed.yaml", tmp_path / "fixed", start)
    encoded, fixed = (small_run.records(tmp_path / name)[0] for name in ("encoded", "fixed"))
    assert fixed["loss"] == pytest.approx(encoded["loss"], rel=1e-5)
    assert 0 < fixed["grad_norm"] < encoded["grad_norm"]


@pytest.mark.parametrize(
    ("ranks", "modes"),
    [
        (1, CHUNKS), (2, ("engine.zero_stage=2",)),
        pytest.param(2, ("engine.zero_stage=3", *CHUNKS), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_any_ranks_and_chunks_train_the_query_tower_alone(
    trained: Path, tmp_path: Path, pools: dict[int, Pool], ranks: int, modes: tuple[str, ...]
) -> None:
    fixed, whole = trained / "fixed.yaml", trained / "whole"
    if not whole.exists():
        pools[1].run(small_run.run, fixed, whole, LIGHTER)
    pools[ranks].run(small_run.run, fixed, tmp_path / "run", (*LIGHTER, *modes))
    assert_same_curve(tmp_path / "run", whole)
    old, new = weights(trained / "old"), weights(tmp_path / "run")
    kept = {name for name in new if name.startswith(DOCUMENT_WEIGHTS)}
    assert kept and all(torch.equal(new[name], old[name]) for name in kept)
    first, last = small_run.records(whole)[0]["loss"], small_run.records(whole)[-1]["loss"]
    assert last < first


def test_a_new_query_tower_searches_the_old_index(trained: Path, pools: dict[int, Pool]) -> None:
    whole = trained / "whole"
    if not whole.exists():
        pools[1].run(small_run.run, trained / "fixed.yaml", whole, LIGHTER)
    new, old = (load_model_folder(trained / name / "pretrain" / "best") for name in ("whole", "old"))
    assert new.checksum != old.checksum and new.doc_checksum == old.doc_checksum
    build_index(trained / "vectors", trained / "index")
    index = open_index(trained / "index", Model(new))
    with pytest.raises(CheckpointError, match="their scores are not comparable"):
        index.check_model(new.checksum)
    dataset = new.view(Dataset.open(trained / "dataset"))
    rows = np.arange(dataset.catalogue.num_docs)
    ours, theirs = (tower_encoders(m.model, dataset).documents(rows) for m in (new, old))
    assert torch.equal(ours, theirs)


def test_the_documents_of_a_model_with_one_text_encoder(tmp_path: Path, pools: dict[int, Pool]) -> None:
    """Its document encoder is described by the section of queries."""
    config = small_run.write_dataset(tmp_path, ["data.query.words={type: text, column: gender, max_tokens: 8}"])
    size = [f"model.query.text.{key}" for key in ("layers=1", "hidden=16", "heads=2")]
    shared = (*size, "model.share_text=true", "model.query.text.pooling=cls", "pretrain.steps=1")
    pools[1].run(small_run.run, config, tmp_path / "old", shared)
    write_vectors_of(tmp_path, config)
    fixed, separate = tmp_path / "fixed.yaml", (*size, "pretrain.steps=1")
    with pytest.raises(RankFailed, match="pooling was cls, is auto"):
        pools[1].run(small_run.run, fixed, tmp_path / "wrong", separate)
    pools[1].run(small_run.run, fixed, tmp_path / "new", (*separate, "model.doc.text.pooling=cls"))
    new, model = (load_model_folder(tmp_path / name / "pretrain" / "best") for name in ("new", "old"))
    dataset = new.view(Dataset.open(tmp_path / "dataset"))
    assert new.doc_checksum == model.doc_checksum
    rows = np.arange(dataset.catalogue.num_docs)
    ours, theirs = (tower_encoders(m.model, dataset).documents(rows) for m in (new, model))
    assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_hard_negatives_resume_and_estimate(trained: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    hard = ("pretrain.loss.name=pair_ce", "pretrain.sampling.name=none", "pretrain.negatives.uniform=0")
    hard += ("pretrain.negatives.hard=3", "pretrain.negatives.in_batch=false", "pretrain.negatives.mining.first=1")
    hard += ("pretrain.negatives.mining.last=20", "pretrain.negatives.mining.every_steps=4", *LIGHTER)
    other = tmp_path / "other"  # its document tower is replaced
    pools[1].run(small_run.run, trained / "config.yaml", other, (*LIGHTER, "pretrain.steps=1"))
    hard += (f"pretrain.init={other / 'pretrain' / 'best'}",)
    fixed = trained / "fixed.yaml"
    pools[1].run(small_run.run, fixed, tmp_path / "whole", hard)
    hard += ("pretrain.save_every_steps=6",)
    pools[1].run(stop_after, fixed, tmp_path / "run", hard, 6)
    # frozen weights of odd sizes are partitioned with padding
    pools[2].run(small_run.run, fixed, tmp_path / "run", (*hard, "engine.zero_stage=3"), "pretrain", True)
    stage = tmp_path / "run" / "pretrain"
    saved = load_checkpoint_model(find_checkpoint(stage, "latest"))
    (stage / "best").rename(stage / "aside")
    without = load_checkpoint_model(find_checkpoint(stage, "latest"))
    old = load_model_folder(trained / "old" / "pretrain" / "best")
    assert saved.doc_checksum == without.doc_checksum == old.doc_checksum
    weights_of = saved.model.state_dict()
    assert all(torch.equal(weight, weights_of[name]) for name, weight in without.model.state_dict().items())
    assert_same_curve(tmp_path / "run", tmp_path / "whole", tolerance=1e-4)
    config = load_config(fixed, [f"run.dir={tmp_path}", *LIGHTER])
    both = load_config(trained / "config.yaml", [f"run.dir={tmp_path}", *LIGHTER])
    dataset = Dataset.open(trained / "dataset")
    ours, theirs = (estimate(of, "pretrain", dataset, 1) for of in (config, both))  # type: ignore[assignment]
    assert ours.checkpoint_bytes < theirs.checkpoint_bytes  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pretrain.documents.vectors=null"], "needs both, or neither"),
        (["model.share_text=true"], "needs false with pretrain.documents.model"),
        (["data.siamese=true"], "siamese"),
    ],
)
def test_configs_that_are_refused(trained: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(trained / "fixed.yaml", overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.doc.mlp=[17]",), "was trained with another model section"),
        (("pretrain.documents.vectors=/nowhere",), "is not a folder"),
    ],
)
def test_stages_that_are_refused(
    trained: Path, tmp_path: Path, pools: dict[int, Pool], overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RankFailed, match=message):
        pools[1].run(small_run.run, trained / "fixed.yaml", tmp_path / "run", overrides)
