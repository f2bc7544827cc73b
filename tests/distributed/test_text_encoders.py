"""Text encoders of all families train alike on any number of ranks, in chunks, at any ZeRO stage, and with LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from bigdssm.checkpoints.checkpoint import find_checkpoint, read_manifest
from bigdssm.checkpoints.model_folder import FROZEN_FILE, load_checkpoint_model, load_model_folder
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError, ConfigError
from bigdssm.export.convert import ExportSource, export
from bigdssm.models import new_model
from bigdssm.models.encoders.lora import base_name
from bigdssm.training.engine import partitioned_loading
from bigdssm.training.process_group import init_process_group
from tests.encoders import FAMILIES, LORA, write_pairs

from . import small_run
from .compared_runs import stop_after, weights
from .encoder_matrix import AGAIN, BF16, CHUNKS, losses
from .spawn import Pool, RankFailed

OFFLOAD = "engine.offload_optimizer=true"

# A pairwise design: each two of family, ranks, ZeRO stage, LoRA, precision and recomputation meet in some run.
DESIGN = [
    ("bert", 2, 3, (*LORA, CHUNKS, AGAIN)),
    ("bert", 3, 1, (CHUNKS,)),
    ("xlm-roberta", 2, 2, (*LORA, CHUNKS, OFFLOAD)),
    ("xlm-roberta", 3, 3, (AGAIN,)),
    ("mpnet", 2, 3, (CHUNKS, OFFLOAD)),
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


def assert_frozen_weights_are_saved_once(stage: Path) -> None:
    """They are in best/ alone; without it a checkpoint takes them from the model that the stage starts from."""
    path = find_checkpoint(stage, "latest")
    saved, whole = set(read_manifest(path).tensors), load_checkpoint_model(path).model
    assert whole.frozen_weights() and not saved & whole.frozen_weights().keys()
    (stage / "best").rename(stage / "aside")
    without = load_checkpoint_model(path).model.state_dict()
    (stage / "aside").rename(stage / "best")
    assert all(torch.equal(without[name], tensor) for name, tensor in whole.state_dict().items())


@pytest.mark.slow
def test_best_folders_share_the_frozen_weights(tmp_path: Path, pools: dict[int, Pool]) -> None:
    config, folder = write_pairs(tmp_path, "llama"), tmp_path / "run"
    modes = ("engine.zero_stage=3", *LORA, "pretrain.save_every_steps=1", "pretrain.optimizer.lr=1e-12")
    pools[2].run(small_run.run, config, folder, (*modes, "pretrain.steps=2"))
    frozen = folder / "pretrain" / "best" / FROZEN_FILE
    before = frozen.stat().st_ino, (frozen.with_name("model.safetensors")).stat().st_ino
    pools[2].run(small_run.run, config, folder, (*modes, "pretrain.steps=3"), "pretrain", True)
    after = frozen.stat().st_ino, (frozen.with_name("model.safetensors")).stat().st_ino
    assert after[0] == before[0] and after[1] != before[1]
    content = bytearray(frozen.read_bytes())
    content[-1] ^= 1
    frozen.write_bytes(content)
    pools[2].run(small_run.run, config, folder, (*modes, "pretrain.steps=4"), "pretrain", True)
    with pytest.raises(CheckpointError, match=r"frozen\.safetensors"):
        load_model_folder(frozen.parent)
    for file in (tmp_path / "llama").glob("*.safetensors"):
        save_file({name: 1.01 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(RankFailed, match="was written with other frozen weights"):
        pools[2].run(small_run.run, config, folder, (*modes, "pretrain.steps=5"), "pretrain", True)


@pytest.mark.slow
def test_a_stage_adds_adapters_to_a_trained_encoder(tmp_path: Path, pools: dict[int, Pool]) -> None:
    """Its frozen weights are those of the stage before, also after a resume and in a checkpoint without best/."""
    config, before = write_pairs(tmp_path, "qwen3"), tmp_path / "before"
    pools[2].run(small_run.run, config, before, ("pretrain.steps=2", "pretrain.optimizer.lr=0.01"))
    modes = (
        "engine.zero_stage=3", *LORA, f"pretrain.init={before / 'pretrain/best'}", "pretrain.save_every_steps=2",
        "pretrain.optimizer.lr=0.01", "pretrain.steps=6",
    )  # fmt: skip
    pools[2].run(small_run.run, config, tmp_path / "whole", modes)
    pools[2].run(stop_after, config, tmp_path / "half", modes, 2)
    assert_frozen_weights_are_saved_once(tmp_path / "half" / "pretrain")
    pools[2].run(small_run.run, config, tmp_path / "half", modes, "pretrain", True)
    one, two = (
        load_checkpoint_model(find_checkpoint(tmp_path / run / "pretrain", "latest")) for run in ("whole", "half")
    )
    assert all(torch.equal(two.model.state_dict()[name], t) for name, t in one.model.state_dict().items())
    trained = load_model_folder(before / "pretrain/best").model.state_dict()
    for name, weight in one.model.frozen_weights().items():
        assert torch.equal(weight, trained[base_name(name)])
    assert all(t.any() for name, t in one.model.state_dict().items() if ".lora_B." in name)
    source = ExportSource(one, "trained")
    export(source, tmp_path / "merged", "model")
    with pytest.raises(ConfigError, match=r"the frozen weights differ from text\.init="):
        export(source, tmp_path / "adapter", "adapter")


def loaded_sizes(rank: int, world_size: int, path: Path) -> dict[str, tuple[int, int]]:
    """Return (whole, local) numbers of elements per weight of a new model at ZeRO stage 3."""
    config = load_config(path)
    dataset = Dataset.open(config.data.dir)
    init_process_group()
    loading = partitioned_loading(config.engine, config.pretrain.optimizer)
    model = new_model(config.model, dataset.schema, dataset.vocab_size, loading=loading)
    return {name: (p.ds_numel, p.ds_tensor.numel()) for name, p in model.named_parameters() if hasattr(p, "ds_tensor")}


def test_pretrained_weights_are_partitioned_as_they_are_read(tmp_path: Path, pools: dict[int, Pool]) -> None:
    config = write_pairs(tmp_path, "modernbert", pairs=60)
    overridden = tmp_path / "zero3.yaml"
    overridden.write_text(yaml.safe_dump(load_config(config, ["engine.zero_stage=3"]).to_dict()))
    for sizes in pools[2].run(loaded_sizes, overridden):
        assert len(sizes) > 10 and all(name.startswith("text.shared.transformer.") for name in sizes)
        assert all(local == -(-whole // 2) for whole, local in sizes.values())


@pytest.mark.slow
def test_lora_trains_the_adapters_alone_and_resumes_on_other_ranks(tmp_path: Path, pools: dict[int, Pool]) -> None:
    config = write_pairs(tmp_path, "qwen3")
    modes = (*LORA, CHUNKS, "pretrain.steps=6", "pretrain.save_every_steps=2")
    pools[2].run(small_run.run, config, tmp_path / "whole", ("engine.zero_stage=3", *modes))
    pools[2].run(stop_after, config, tmp_path / "half", ("engine.zero_stage=3", *modes), 2)
    pools[3].run(small_run.run, config, tmp_path / "half", ("engine.zero_stage=1", *modes), "pretrain", True)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert whole.keys() == resumed.keys()
    assert_frozen_weights_are_saved_once(tmp_path / "half" / "pretrain")
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    pools[1].run(small_run.run, config, tmp_path / "none", ("pretrain.optimizer.lr=1e-12", "pretrain.steps=1", *LORA))
    start = weights(tmp_path / "none")
    changed = {name for name in whole if not torch.equal(whole[name], start[name])}
    assert any(".lora_B." in name for name in changed)
    assert not {name for name in changed if name.startswith("text.") and ".lora_" not in name}
