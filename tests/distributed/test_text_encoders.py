"""Text encoders of all families train alike on any number of ranks, in chunks, at any ZeRO stage, and with LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bigdssm.cluster.metrics import read_stage
from tests.encoders import FAMILIES, LORA, write_pairs

from . import small_run
from .spawn import Pool
from .test_training import stop_after, weights

CHUNKS, AGAIN, BF16 = "engine.chunk_tokens=60", "engine.checkpoint_activations=true", "engine.precision=bf16"

# A pairwise design: each two of family, ranks, ZeRO stage, LoRA, precision and recomputation meet in some run.
DESIGN = [
    ("bert", 2, 3, (*LORA, CHUNKS, AGAIN)),
    ("bert", 3, 1, (CHUNKS,)),
    ("xlm-roberta", 2, 2, (*LORA, CHUNKS)),
    ("xlm-roberta", 3, 3, (AGAIN,)),
    ("mpnet", 2, 3, (CHUNKS,)),
    ("mpnet", 3, 0, (*LORA,)),
    ("modernbert", 2, 0, (CHUNKS, AGAIN)),
    ("modernbert", 3, 3, (*LORA, CHUNKS, BF16)),
    ("qwen3", 2, 1, (*LORA, CHUNKS, AGAIN)),
    ("qwen3", 3, 3, (CHUNKS, BF16)),
    ("llama", 2, 3, (*LORA, CHUNKS)),
    ("llama", 3, 2, (AGAIN, BF16)),
    ("gemma3_text", 2, 2, (*LORA, AGAIN, BF16)),
    ("gemma3_text", 3, 3, (CHUNKS,)),
]


@pytest.fixture(scope="module", params=FAMILIES)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts") / request.param
    folder.mkdir()
    return write_pairs(folder, request.param)


def losses(run_dir: Path) -> torch.Tensor:
    records = read_stage(run_dir / "pretrain").records
    return torch.tensor([record["loss"] for record in records if "loss" in record])


@pytest.mark.slow
def test_all_modes_give_the_curve_of_one_rank(config: Path, tmp_path: Path, pools: dict[int, Pool]) -> None:
    for family, ranks, stage, modes in DESIGN:
        if family != config.parent.name:
            continue
        model = tuple(mode for mode in modes if mode in LORA or mode == BF16)
        one, many = tmp_path / f"one{ranks}", tmp_path / f"many{ranks}"
        pools[1].run(small_run.run, config, one, ("engine.zero_stage=0", *model))
        pools[ranks].run(small_run.run, config, many, (f"engine.zero_stage={stage}", *modes))
        close = {"rtol": 0.02, "atol": 0.02} if BF16 in modes else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(losses(many), losses(one), **close)
        assert losses(one)[-1] != losses(one)[0]


@pytest.mark.slow
def test_lora_trains_the_adapters_alone_and_resumes_on_other_ranks(tmp_path: Path, pools: dict[int, Pool]) -> None:
    config = write_pairs(tmp_path, "qwen3")
    modes = (*LORA, CHUNKS, "pretrain.steps=6", "pretrain.save_every_steps=2")
    pools[2].run(small_run.run, config, tmp_path / "whole", ("engine.zero_stage=3", *modes))
    pools[2].run(stop_after, config, tmp_path / "half", ("engine.zero_stage=3", *modes), 2)
    pools[3].run(small_run.run, config, tmp_path / "half", ("engine.zero_stage=1", *modes), "pretrain", True)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert whole.keys() == resumed.keys()
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    pools[1].run(small_run.run, config, tmp_path / "none", ("pretrain.optimizer.lr=1e-12", "pretrain.steps=1", *LORA))
    start = weights(tmp_path / "none")
    changed = {name for name in whole if not torch.equal(whole[name], start[name])}
    assert any(".lora_B." in name for name in changed)
    assert not {name for name in changed if name.startswith("text.") and ".lora_" not in name}
