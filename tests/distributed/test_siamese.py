"""A shared tower gives the same curve with other ranks, ZeRO stage and chunks, and its checkpoints serve."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.export.convert import export, stage_source
from bigdssm.export.formats import PARITY_LIMIT

from . import small_run
from .compared_runs import assert_same_weights
from .spawn import Pool


@pytest.fixture(scope="module")
def reference(siamese_config: Path, tmp_path_factory: pytest.TempPathFactory, pools: dict[int, Pool]) -> Path:
    run_dir = tmp_path_factory.mktemp("reference")
    pools[2].run(small_run.run, siamese_config, run_dir, ("engine.zero_stage=1",))
    return run_dir


@pytest.mark.slow
def test_the_same_curve_sharded_and_in_chunks(
    siamese_config: Path, reference: Path, tmp_path: Path, pools: dict[int, Pool]
) -> None:
    pools[3].run(small_run.run, siamese_config, tmp_path, ("engine.zero_stage=3", "engine.chunk_tokens=60"))
    pairs = zip(small_run.records(tmp_path), small_run.records(reference), strict=True)
    assert max(abs(mine["loss"] / theirs["loss"] - 1) for mine, theirs in pairs) < 1e-5
    assert_same_weights(tmp_path, reference)


def test_a_checkpoint_is_the_model_that_was_validated(
    siamese_config: Path, reference: Path, tmp_path: Path, pools: dict[int, Pool]
) -> None:
    stage_dir = reference / "pretrain"
    source = stage_source(stage_dir, "latest")
    assert source.model.checksum  # its weights fit, each of them there once
    parity = export(source, tmp_path / "exported", "model")
    assert max(parity.query, parity.doc) <= PARITY_LIMIT
    best = load_model_folder(stage_dir / "best").model.state_dict()
    assert {name: t.tolist() for name, t in source.model.model.state_dict().items()} == {
        name: t.tolist() for name, t in best.items()
    }
