"""Fine-tuning a cross-encoder gives the same result for any number of ranks, ZeRO stage and chunk size.

The towers do not change, and a run resumes.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.evaluation.evaluate import Reranking, evaluate_split
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.model import PairScorer

from . import small_run
from .spawn import Pool
from .test_training import assert_same_curve

SFT = (
    "sft={rows_global: 24, steps: 6, rerank: 10, log_every_steps: 1}",
    "sft={loss: {name: softmax}, negatives: {hard: 3, in_batch: false, mining: {first: 1, last: 20}}}",
    "sft.scorer.name=cross_encoder",
    "sft.optimizer={lr: 0.003, warmup_steps: 1}",
)  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(siamese_config: Path, tmp_path_factory: pytest.TempPathFactory, pools: dict[int, Pool]) -> str:
    run_dir = tmp_path_factory.mktemp("pretrained")
    pools[2].run(small_run.run, siamese_config, run_dir)
    return f"sft.init={run_dir / 'pretrain/best'}"


@pytest.fixture(scope="module")
def reference(
    siamese_config: Path, pretrained: str, tmp_path_factory: pytest.TempPathFactory, pools: dict[int, Pool]
) -> Path:
    run_dir = tmp_path_factory.mktemp("reference")
    pools[2].run(small_run.run, siamese_config, run_dir, (*SFT, pretrained, "engine.zero_stage=1"), "sft")
    return run_dir


@pytest.mark.slow
def test_the_same_curve_sharded_in_chunks_and_resumed(
    siamese_config: Path, pretrained: str, reference: Path, tmp_path: Path, pools: dict[int, Pool]
) -> None:
    """The loss curve is the same with ZeRO 3, with chunks and after a resume."""
    mode = (*SFT, pretrained, "engine.zero_stage=3", "engine.chunk_tokens=200", "sft.save_every_steps=3")
    pools[3].run(small_run.run, siamese_config, tmp_path, mode, "sft")
    assert_same_curve(tmp_path, reference, stage="sft")
    mine = small_run.records(tmp_path, "sft")
    assert len(mine) == 6
    # log 4 would be the loss of equal scores; the towers' product is part of the score from the first step
    assert abs(mine[0]["loss"] - math.log(4)) > 0.01
    validated = [small_run.validations(run, "sft")[-1]["ndcg_at_10"] for run in (tmp_path, reference)]
    assert validated[0] == pytest.approx(validated[1], abs=1e-6)
    shutil.rmtree(tmp_path / "sft" / "checkpoints" / "step-00000006")
    pools[2].run(small_run.run, siamese_config, tmp_path, (*mode, "engine.zero_stage=1"), "sft", True)
    again = small_run.records(tmp_path, "sft")[-3:]
    assert [record["loss"] for record in again] == pytest.approx([record["loss"] for record in mine[3:]], rel=1e-5)


def test_throughput_counts_the_tokens_of_pairs(reference: Path) -> None:
    record = small_run.records(reference, "sft")[0]
    tokens_per_row = record["tokens_per_s"] / record["rows_per_s"]
    assert tokens_per_row > 4 * 2 * 5  # four pairs of two texts of three words each; the towers read half of that


def test_the_towers_are_unchanged_and_the_validated_scorer_is_saved(
    siamese_config: Path, pretrained: str, reference: Path
) -> None:
    before = load_model_folder(Path(pretrained.removeprefix("sft.init="))).model.state_dict()
    folder = load_model_folder(reference / "sft" / "best")
    for name, tensor in before.items():
        assert torch.equal(folder.model.state_dict()[name], tensor), name
    dataset = Dataset.open(load_config(siamese_config).data.dir)
    found = evaluate_split(
        tower_encoders(folder.model, dataset), dataset, "validation",
        rerank=Reranking(PairScorer.from_folder(folder, dataset), 10),
    )  # fmt: skip
    best = max(metrics["ndcg_at_10"] for metrics in small_run.validations(reference, "sft"))
    assert found.metrics["ndcg_at_10"] == pytest.approx(best, abs=1e-6)
